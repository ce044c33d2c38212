"""Networks with norms, statistics and heads of their own, and the life of an adapter on them in train mode."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from oracle import bits
from torch import Tensor, nn

import convlora


class UNet(nn.Module):
    """Down and up again, with BatchNorm and a skip."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), norm(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, stride=2), norm(6), nn.ReLU())
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        return self.out(torch.cat([x, self.up(self.down(x))], 1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.body(self.embed(tokens)).relu())  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A norm and a head at two places each: one module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.again = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), self.norm, self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.head(self.norm(self.conv(x)).relu()))  # type: ignore[no-any-return]


class Average(nn.Module):
    """Keeps an average of what passes, and assigns it anew instead of writing into it."""

    ema: Tensor
    count: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("ema", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema = self.ema * 0.9 + x.detach().abs().mean((0, 2, 3)) * 0.1
            self.count = self.count + 1
        return x / self.ema[:, None, None]


def _blocks(norm: Callable[[int], nn.Module], head: nn.Module | None = None) -> nn.Sequential:
    last = nn.Linear(8, 5) if head is None else head
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm(8))
    return nn.Sequential(OrderedDict(body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=last))


def small(head: int = 5, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Convolutions with norms, and a head."""
    return _blocks(norm, nn.Linear(8, head))


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5)  # type: ignore[no-any-return]


def _resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=5)  # type: ignore[no-any-return]


def _instance(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


def _nested() -> nn.Module:
    return _blocks(
        nn.BatchNorm2d,
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Sequential(nn.ReLU(), nn.Linear(6, 5))),
    )


@dataclass(frozen=True)
class Life:
    """A network, a batch for it, and what of it an adapter has.

    Args:
        make: the network.
        shape: of a batch.
        options: of `inject`.
        tokens: the batch is of integers below this.
        dtype: of network and batch.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 3, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    dtype: torch.dtype = torch.float32

    def base(self) -> nn.Module:
        """The same at every call."""
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def batch(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(self.tokens, self.shape, generator=generator)
        return (torch.randn(self.shape, generator=generator) * 2 + 1).to(self.dtype)


LIVES: dict[str, Life] = {
    "resnet18": Life(_resnet18, (3, 3, 32, 32), dict(targets="layer[12].*.conv*", modules_to_save="fc")),
    "unet": Life(UNet, options=dict(targets="*", exclude="out", modules_to_save="out", factors="locon")),
    "unet, statistics alone": Life(UNet, options=dict(targets="*", bias=True)),
    "unet, bf16": Life(UNet, options=dict(targets="*", modules_to_save=["out"]), dtype=torch.bfloat16),
    "unet, float64": Life(UNet, options=dict(targets="down.*", modules_to_save=["inside"]), dtype=torch.float64),
    "resnet10t": Life(
        lambda: _timm("resnet10t"), (2, 3, 32, 32), dict(targets="layer[12].*.conv*", modules_to_save="fc")
    ),
    "mobilenetv3": Life(
        lambda: _timm("mobilenetv3_small_050"),
        (2, 3, 32, 32),
        dict(targets="re:blocks.*conv_pwl?", modules_to_save="classifier"),
    ),
    "convnext": Life(
        lambda: _timm("test_convnext"),
        (2, 3, 32, 32),
        dict(targets="*.fc1", modules_to_save=[lambda name, module: isinstance(module, nn.LayerNorm), "head.fc"]),
    ),
    "instance norm": Life(lambda: small(norm=_instance), options=dict(targets="body.*", modules_to_save="body.4")),
    "group norm": Life(
        lambda: small(norm=functools.partial(nn.GroupNorm, 2)),
        options=dict(targets="body.*", modules_to_save=[nn.GroupNorm]),
    ),
    "sync batch norm": Life(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()),
        options=dict(targets="body.*", modules_to_save="head"),
    ),
    "embedding": Life(
        lambda: nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        (4, 5),
        dict(targets="*", modules_to_save="0"),
        tokens=9,
    ),
    "nested head": Life(_nested, options=dict(targets="body.*", modules_to_save="head")),
    "tied": Life(Tied, (4, 5), dict(targets="body", modules_to_save=["embed", "out"]), tokens=9),
    "used twice": Life(Twice, options=dict(targets="*", modules_to_save="head")),
    "assigned buffers": Life(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Average(8), nn.ReLU(), nn.Conv2d(8, 3, 3)),
        options=dict(targets="*", modules_to_save="1"),
    ),
}
for library, names in {"timm": ["resnet10t", "mobilenetv3", "convnext"], "torchvision": ["resnet18"]}.items():
    if find_spec(library) is None:
        for name in names:
            del LIVES[name]


def injected(name: str, **options: Any) -> nn.Module:
    """A base with a fresh adapter."""
    return convlora.inject(LIVES[name].base(), rank=1, **{**LIVES[name].options, **options})


def train(model: nn.Module, batches: Iterable[Tensor], parameters: Iterable[nn.Parameter] | None = None) -> nn.Module:
    """A step in train mode on each batch; of what adapters train, by default."""
    ours = convlora.parameters(model) if parameters is None else list(parameters)
    optimizer = torch.optim.AdamW(ours, lr=1e-2)
    model.train()
    for x in batches:
        optimizer.zero_grad()
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()
    return model


@functools.cache
def _trained(name: str, steps: int) -> nn.Module:
    return train(injected(name), (LIVES[name].batch(seed) for seed in range(1, steps + 1))).eval()


def trained(name: str, steps: int = 20) -> nn.Module:
    """A base whose adapter has lived; in eval mode, a copy for each caller."""
    return copy.deepcopy(_trained(name, steps))


def base_bits(model: nn.Module) -> dict[str, bytes]:
    """The entries of the state dict that are the base's, as bytes."""
    return {key: value for key, value in bits(model).items() if ".convlora." not in key and key[:9] != "convlora."}


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """In eval mode."""
    result: Tensor = model.eval()(x)
    assert bool(result.isfinite().all())
    return result
