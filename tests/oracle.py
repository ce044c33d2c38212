"""Naive references in float64, and the layers on which the laws are tried."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
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
PRODUCTS = ("convlora", "locon")  # one matrix product: the algebra of adapters is for these
FACTORS = (*PRODUCTS, "dora", "loha", "lokr", "dense")
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
    """ΔW element by element, in float64, as the layer stores it; of factors that do not see the base weight."""
    _, shape, _ = _as_convolution(spec)
    conv = torch.zeros(shape, dtype=torch.float64)
    element = _ELEMENTS[name]({n: t.detach().double() for n, t in tensors.items()}, shape)
    for at, index in enumerate(itertools.product(*map(range, shape))):
        conv[index] = element(at, *index)
    return _stored(conv, spec)


def change(name: str, tensors: dict[str, Tensor], spec: WeightSpec, scale: float, weight: Tensor) -> Tensor:
    """What an adapter of strength 1 adds to a layer's weight, in float64."""
    if name not in ("dora", "dora_in"):
        return scale * delta(name, tensors, spec)
    direction = weight.detach().double() + scale * delta("locon", tensors, spec)
    changed = torch.zeros_like(direction)
    places = _stored_places(spec)
    magnitude = tensors["lora_magnitude"].detach().double()
    for channel in range(len(magnitude)):
        own = [at for (o, i, *_), at in places.items() if channel == (o if name == "dora" else i)]
        norm = math.sqrt(sum(direction.view(-1)[at].item() ** 2 for at in own))
        for at in own:
            changed.view(-1)[at] = magnitude[channel] * direction.view(-1)[at] / norm if norm else 0.0
    return changed - weight.detach().double()


Element = Callable[..., float]  # of the place in row-major order, o, i and the place in the kernel


def _locon(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Element:
    a, b = tensors["lora_A"].reshape(-1, *shape[1:]), tensors["lora_B"].flatten(1)
    return lambda at, o, *rest: sum(b[o, r].item() * a[(r, *rest)].item() for r in range(len(a)))


def _convlora(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Element:
    """Row-major elements of the matrix product are row-major elements of the weight."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    return lambda at, *_: sum(b[at // a.shape[1], r].item() * a[r, at % a.shape[1]].item() for r in range(a.shape[0]))


def _loha(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Element:
    columns = math.prod(shape[1:])

    def entry(which: str, row: int, column: int) -> float:
        a, b = tensors[f"hada_{which}_a"], tensors[f"hada_{which}_b"]
        return sum(a[row, r].item() * b[r, column].item() for r in range(len(b)))

    return lambda at, *_: entry("w1", *divmod(at, columns)) * entry("w2", *divmod(at, columns))


def _lokr(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Element:
    w1 = tensors["lokr_w1"]
    rows, columns = shape[0] // w1.shape[0], shape[1] // w1.shape[1]
    small = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    w2 = small.reshape(rows, columns, *shape[2:])
    return lambda at, o, i, *k: w1[o // rows, i // columns].item() * w2[(o % rows, i % columns, *k)].item()


_ELEMENTS: dict[str, Callable[[dict[str, Tensor], tuple[int, ...]], Element]] = {
    "convlora": _convlora,
    "locon": _locon,
    "loha": _loha,
    "lokr": _lokr,
    "dense": lambda tensors, shape: lambda at, *index: tensors["diff"][tuple(index)].item(),
}


def _as_convolution(spec: WeightSpec) -> tuple[int, tuple[int, ...], int]:
    """Channels out, the shape `(out, in/groups, *kernel)`, channels in."""
    out_channels = spec.shape[1] * spec.groups if spec.transposed else spec.shape[0]
    in_channels = spec.shape[0] if spec.transposed else spec.shape[1] * spec.groups
    return out_channels, (out_channels, in_channels // spec.groups, *spec.kernel), in_channels


def _stored_places(spec: WeightSpec) -> dict[tuple[int, ...], int]:
    """`(o, i, *k)` -> where the layer stores that element."""
    out_channels, shape, in_channels = _as_convolution(spec)
    places = {}
    kernel = math.prod(spec.kernel)
    for at, (o, i, *k) in enumerate(itertools.product(*map(range, shape))):
        group, within = divmod(o, out_channels // spec.groups)
        row, column = (group * (in_channels // spec.groups) + i, within) if spec.transposed else (o, i)
        places[(o, i, *k)] = (row * spec.shape[1] + column) * kernel + at % kernel
    return places


def _stored(conv: Tensor, spec: WeightSpec) -> Tensor:
    stored = torch.zeros(spec.shape, dtype=torch.float64)
    for index, at in _stored_places(spec).items():
        stored.view(-1)[at] = conv[index]
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
