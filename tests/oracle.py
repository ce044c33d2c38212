"""Naive references in float64, and the layers on which the laws are tried."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convlora
from convlora.factors.base import WeightSpec
from convlora.layer.slot import Slot

# (class, arguments, input shape): one line a hazard
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "plain": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3}, (2, 6, 9, 9)),
    "stride": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "stride": 2}, (2, 6, 9, 9)),
    "dilation": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "dilation": 2}, (2, 6, 9, 9)),
    "groups": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "groups": 2}, (2, 6, 9, 9)),
    "depthwise": (nn.Conv2d, {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6}, (2, 6, 9, 9)),
    "depthwise_multiplier": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 12, "kernel_size": 3, "groups": 6},
        (2, 6, 9, 9),
    ),
    "reflect": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        (2, 6, 9, 9),
    ),
    "circular": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
        (2, 6, 9, 9),
    ),
    "replicate": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 5, "padding": 2, "padding_mode": "replicate"},
        (2, 6, 9, 9),
    ),
    "same": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": "same", "dilation": 2},
        (2, 6, 9, 9),
    ),
    "valid": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": "valid"}, (2, 6, 9, 9)),
    "non_square": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 2)},
        (2, 6, 9, 9),
    ),
    "non_square_tall": (
        nn.Conv2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": (5, 2), "dilation": (1, 3)},
        (2, 6, 9, 9),
    ),
    "pointwise": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 1, "bias": False}, (2, 6, 9, 9)),
    "pointwise_groups": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 1, "groups": 2}, (2, 6, 9, 9)),
    "unbatched": (nn.Conv2d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3}, (6, 9, 9)),
    "conv1d": (nn.Conv1d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1}, (2, 6, 11)),
    "conv1d_groups": (
        nn.Conv1d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 5, "groups": 2, "dilation": 2},
        (2, 6, 11),
    ),
    "conv3d": (nn.Conv3d, {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1}, (2, 6, 5, 5, 5)),
    "conv3d_flat": (nn.Conv3d, {"in_channels": 6, "out_channels": 8, "kernel_size": (1, 1, 3)}, (2, 6, 5, 5, 5)),
    "transposed1d": (
        nn.ConvTranspose1d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "stride": 2},
        (2, 6, 7),
    ),
    "transposed2d": (
        nn.ConvTranspose2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": (3, 4), "stride": 2, "output_padding": 1},
        (2, 6, 7, 7),
    ),
    "transposed2d_groups": (
        nn.ConvTranspose2d,
        {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "groups": 2, "dilation": 2},
        (2, 6, 7, 7),
    ),
    "transposed3d": (nn.ConvTranspose3d, {"in_channels": 6, "out_channels": 4, "kernel_size": 2}, (2, 6, 4, 4, 4)),
    "linear": (nn.Linear, {"in_features": 6, "out_features": 8}, (2, 5, 6)),
    "linear_plain": (nn.Linear, {"in_features": 6, "out_features": 8, "bias": False}, (6,)),
}
FACTORS = ("convlora", "locon")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def build(hazard: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A stock layer and an input for it."""
    kind, arguments, shape = LAYERS[hazard]
    return kind(**arguments).to(dtype), torch.randn(shape).to(dtype)


def net() -> nn.Sequential:
    """A small net with a convolution of each sort, a norm and a Linear."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(64, 5),
    )


NET_INPUT = (2, 3, 4, 4)
NET_LAYERS = ["0", "3", "4", "6"]


def adapted_net(**options: Any) -> nn.Sequential:
    """`net` with trained-looking adapters."""
    options = {"targets": NET_LAYERS, "rank": 1, **options}
    return randomise(convlora.inject(net(), **options))


def randomise(model: nn.Module, name: str | None = None, std: float = 0.2) -> Any:
    """Factors as if trained: every one random."""
    with torch.no_grad():
        for parameter in convlora.parameters(model, name):
            parameter.normal_(std=std)
    return model


def stock(layer: nn.Module) -> nn.Module:
    """A plain layer that carries the effective weight and bias of an adapted one."""
    plain = convlora.remove(copy.deepcopy(layer))
    with torch.no_grad():
        plain.weight.copy_(layer.weight)  # type: ignore[operator, arg-type]
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)  # type: ignore[operator, arg-type]
    return plain


def delta(name: str, tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """ΔW element by element, in float64, as the layer stores it."""
    a, b = tensors["lora_A"].double(), tensors["lora_B"].double()
    groups, kernel = spec.groups, spec.kernel
    out_channels = spec.shape[1] * groups if spec.transposed else spec.shape[0]
    in_channels = spec.shape[0] if spec.transposed else spec.shape[1] * groups
    conv = torch.zeros(out_channels, in_channels // groups, *kernel, dtype=torch.float64)
    flat = conv.view(-1)
    if name == "locon":
        for at, (o, i, *k) in enumerate(itertools.product(*map(range, conv.shape))):
            flat[at] = sum(
                b[o, r].item() * a[r].reshape(in_channels // groups, *kernel)[(i, *k)].item() for r in range(a.shape[0])
            )
    else:  # row-major elements of the matrix product are row-major elements of the weight
        columns = a.shape[1]
        for at in range(flat.numel()):
            row, column = divmod(at, columns)
            flat[at] = sum(b[row, r].item() * a[r, column].item() for r in range(a.shape[0]))
    if not spec.transposed:
        return conv
    stored = torch.zeros(spec.shape, dtype=torch.float64)
    for o, i in itertools.product(range(out_channels), range(in_channels // groups)):
        group, within = divmod(o, out_channels // groups)
        stored[group * (in_channels // groups) + i, within] = conv[o, i]
    return stored


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every entry of the state dict, as bytes."""
    return {key: bytes_of(value) for key, value in model.state_dict().items()}


def snapshot(model: nn.Module) -> list[Any]:
    """All that a call which fails must leave alone: classes, identities, order, flags, values, adapters, what acts."""
    return list(_snapshot(model))


def _snapshot(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, type(module), module.training, list(module.__dict__), list(module._modules), list(module._buffers)
        yield [(key, id(p), p is not None and p.requires_grad) for key, p in module._parameters.items()]
        if isinstance(module, Slot):
            yield module.state()
    yield bits(model), convlora.adapters(model)


# --- losses between features, by their definitions -----------------------------------------------------------------


def _spatial(student: Tensor, teacher: Tensor) -> Tensor:
    """FAKD: A = F̃ᵀF̃ with a unit vector per pixel, mean |A_S - A_T|."""
    a, b = (F.normalize(f.flatten(2), dim=1) for f in (student, teacher))
    return (a.mT @ a - b.mT @ b).abs().mean()


def _channel(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = (F.normalize(f.flatten(2), dim=2) for f in (student, teacher))
    return (a @ a.mT - b @ b.mT).abs().mean()


def _instance(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = (F.normalize(f.flatten(1), dim=1) for f in (student, teacher))
    return (a @ a.T - b @ b.T).abs().mean()


def _attention(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = (F.normalize(f.pow(2).sum(1).flatten(1), dim=1) for f in (student, teacher))
    return (a - b).pow(2).mean()


AFFINITIES = {
    "spatial_affinity": _spatial,
    "channel_affinity": _channel,
    "instance_affinity": _instance,
    "attention": _attention,
    "l1": lambda student, teacher: (student - teacher).abs().mean(),
    "mse": lambda student, teacher: (student - teacher).pow(2).mean(),
}
