"""How a layer with one low-rank update computes while it trains: forms of equal values, chosen by shape.

- The composite, `layer(x; W + s·B∘A)`: the reference, for everything; its backward forms the gradient of all of W.
- Thin products (thin.py): the same forward, and a backward without that gradient, on a CPU.
- Two branches, `layer(x; W) + s·B(A(x))`, where the weight is larger than what goes through it, or wide: its gradient
  would cost more than the branch. ΔW is formed nowhere. `convlora` factors of kernels, which are no two layers,
  multiply patches (im2col) instead, where these are few.

All but the first are for stock layers whose frozen weight has one active adapter. What needs operations to be looked
into (functional transforms, forward-mode derivatives, tracing, compilation) gets the composite. The shapes at which
thin products win were measured by benchmarks/training_step.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from convlora.layer import thin
from convlora.layer.again import forms_again, note_formed, without_keeping
from convlora.layer.lowrank import LowRank
from convlora.layer.slot import Slot
from convlora.layer.thin import LowRankUpdate

# Below this many multiplications in a layer's forward, times the threads (by which small products gain less than
# convolutions do), the calls of other forms cost more than they save.
LEAST_WORK = 4.5e7
# Above this share of the smaller side of the weight, thin products cost more than the whole gradient.
LARGEST_SHARE = 1 / 5
# Two branches where the weight has more elements than this many times the output's positions,
HEAVY = 200
# or more than this many times the channels that go in and out. The gradient of a weight takes two operations for each
# element and position, a branch moves some four bytes more for each channel and position, and chips do 100 (float32)
# to 400 (bfloat16) operations while they move a byte. Reasoned, not measured on a GPU.
WIDE = 600

# Factors that multiply blocks of patches do so where the weight has more elements than this many times the positions.
FEW_PATCHES = 3000

Form = Callable[[Any, Slot, Tensor], Tensor | None]
Layer = Callable[[Tensor, Tensor], Tensor]  # of input and weight

_CONVOLVE: dict[int, Callable[..., Tensor]] = {
    1: F.conv1d,
    2: F.conv2d,
    3: F.conv3d,
}  # by the number of kernel dimensions
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def training_form_of(kind: Any) -> Form | None:
    """What to try before a layer class's own forward; None if it does not compute as the stock layers do."""
    if kind.forward is nn.Linear.forward:
        return _linear
    for stock in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if kind.forward is stock.forward and kind._conv_forward is stock._conv_forward:
            return _convolution
    stock_transposed = (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward)
    return _transposed if kind.forward in stock_transposed else None


def _linear(layer: Any, slot: Slot, x: Tensor) -> Tensor | None:
    weight = layer._parameters.get("weight")
    update = _update(slot, x, weight)
    if update is None or x.dim() < 2:
        return None
    rows = x.numel() // x.shape[-1]
    if weight.numel() <= HEAVY * rows:
        if _takes_thin_products(x, weight, update) and _is_worth_it(weight, update, rows):
            return thin.linear(x, weight, layer.bias, update)
        if not _is_wide(weight):
            return None
    return _branches(slot, x, update, F.linear(x, weight, layer.bias), F.linear, F.linear)


def _convolution(layer: Any, slot: Slot, x: Tensor) -> Tensor | None:
    weight = layer._parameters.get("weight")
    acting = _only_acting(slot, x, weight)
    if acting is None or x.dim() != weight.dim() or layer.groups != 1:
        return None
    update, positions, padding = _as_layers(*acting), _positions(layer, x), layer.padding
    if update is None:
        return _on_patches(layer, slot, x, weight, *acting) if weight.numel() > FEW_PATCHES * positions else None
    heavy, thin_padding = weight.numel() > HEAVY * positions, _thin_padding(layer, x, weight, update)
    thin_wins = not heavy and thin_padding is not None and _is_worth_it(weight, update, positions)
    if not (heavy or thin_wins or _is_wide(weight)):
        return None
    if layer.padding_mode != "zeros":
        x, padding, thin_padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), 0, (0, 0)
    if thin_wins:
        assert thin_padding is not None
        return thin.conv2d(x, weight, layer.bias, update, thin_padding, layer.dilation)
    convolve = _CONVOLVE[weight.dim() - 2]

    def thin_layer(x: Tensor, a: Tensor) -> Tensor:
        return convolve(x, a, None, layer.stride, padding, layer.dilation)

    y = convolve(x, weight, layer.bias, layer.stride, padding, layer.dilation)
    return _branches(slot, x, update, y, thin_layer, convolve)


def _on_patches(layer: Any, slot: Slot, x: Tensor, weight: Tensor, low_rank: LowRank, strength: float) -> Tensor | None:
    """`layer(x; W) + s·ΔW·patches`, for factors that multiply blocks of a patch; backward forms the patches again."""
    on_patches = getattr(low_rank.factorization, "on_patches", None)
    if on_patches is None or weight.dim() != 4 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    a, b, blocks = on_patches(low_rank._parameters, low_rank.spec)
    if x.dtype != a.dtype and not _is_cast(x):
        return None

    def patches() -> Tensor:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return columns.view(len(x) * blocks, -1, columns.shape[-1])

    def thin_side(columns: Tensor) -> Tensor:
        return torch.bmm(a.expand(len(columns), -1, -1), columns).view(len(x), -1, columns.shape[-1])

    def call() -> Tensor:
        columns = patches()
        note_formed(slot, columns, patches, [x])
        z = thin_side(columns)
        note_formed(slot, z, lambda: thin_side(patches()), [x, a])
        y = layer._conv_forward(x, weight, layer.bias)
        change = torch.bmm(b.expand(len(x), -1, -1), z)
        return torch.add(y, change.view_as(y), alpha=strength * low_rank.scale)

    return without_keeping((slot,), call) if forms_again() else call()


def _transposed(layer: Any, slot: Slot, x: Tensor) -> Tensor | None:
    weight = layer._parameters.get("weight")
    update = _update(slot, x, weight)
    if update is None or x.dim() != weight.dim() or layer.groups != 1 or layer.padding_mode != "zeros":
        return None
    if not _is_wide(weight) and weight.numel() <= HEAVY * _positions(layer, x):
        return None
    convolve = _TRANSPOSED[weight.dim() - 2]
    more = layer.stride, layer.padding, layer.output_padding, 1, layer.dilation

    def thin_layer(x: Tensor, a: Tensor) -> Tensor:
        return convolve(x, a.transpose(0, 1), None, *more)

    y = convolve(x, weight, layer.bias, *more)
    return _branches(slot, x, update, y, thin_layer, _CONVOLVE[weight.dim() - 2])


def _branches(slot: Slot, x: Tensor, update: LowRankUpdate, y: Tensor, a_layer: Layer, b_layer: Layer) -> Tensor:
    """`y + s·B(A(x))`. A half-precision input meets the factors in theirs, but under autocast, as it does in PEFT."""
    a, b = update.a, update.b
    if a_layer is F.linear:
        a, b = a.flatten(1), b.flatten(1)
    if x.dtype == a.dtype or _is_cast(x):
        return torch.add(y, b_layer(a_layer(x, a), b), alpha=update.gain)
    dtype = torch.promote_types(x.dtype, a.dtype)

    def in_precision_of_factors() -> Tensor:
        wide = x.to(dtype)
        note_formed(slot, wide, lambda: x.to(dtype), [x])
        return torch.add(y, b_layer(a_layer(wide, a.to(dtype)), b.to(dtype)), alpha=update.gain).to(y.dtype)

    return without_keeping((slot,), in_precision_of_factors) if forms_again() else in_precision_of_factors()


def _positions(layer: Any, x: Tensor) -> int:
    """Where a convolution meets its weight: of the output, of a transposed one those of the input."""
    strides = 1 if layer.transposed else math.prod(layer.stride)
    return x.numel() // (x.shape[1] * strides)


def _is_wide(weight: Tensor) -> bool:
    return weight.numel() >= WIDE * (weight.shape[0] + weight.shape[1])


def _takes_thin_products(x: Tensor, weight: Tensor, update: LowRankUpdate) -> bool:
    """Half precision, of autocast as well, would round sums over images."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.dtype == update.a.dtype
    return plain and not torch.is_autocast_enabled("cpu")


def _thin_padding(layer: Any, x: Tensor, weight: Tensor, update: LowRankUpdate) -> tuple[int, int] | None:
    """The zeros on each side, (rows, columns), for thin products; None where these do not do: of stride 1 and two
    dimensions are they alone, and the sides may not differ, nor the outputs outnumber the inputs."""
    if weight.dim() != 4 or layer.stride != (1, 1) or not _takes_thin_products(x, weight, update):
        return None
    spans = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    given = layer.padding
    if isinstance(given, str):
        given = [span / 2 for span in spans] if given == "same" else (0, 0)
    if any(2 * side > span or side % 1 for side, span in zip(given, spans, strict=True)):
        return None
    return int(given[0]), int(given[1])


def _is_worth_it(weight: Tensor, update: LowRankUpdate, positions: int) -> bool:
    smaller = min(weight.shape[:2])
    return (
        positions * weight.numel() >= LEAST_WORK * torch.get_num_threads() and len(update.a) <= LARGEST_SHARE * smaller
    )


def _update(slot: Slot, x: Any, weight: Any) -> LowRankUpdate | None:
    """The update of the only acting adapter as two layers, if it is that and anything but the composite may be used."""
    acting = _only_acting(slot, x, weight)
    return None if acting is None else _as_layers(*acting)


def _only_acting(slot: Slot, x: Any, weight: Any) -> tuple[LowRank, float] | None:
    """The only acting adapter and its strength, if anything but the composite may be used: not where calling it does
    more than form its update. Dropout draws, hooks (of FSDP2, say) have work to do, a replica of DataParallel has no
    parameters."""
    if (
        type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or weight.requires_grad
        or x.layout is not torch.strided
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or not _is_one_precision(x, weight)
    ):
        return None
    acting = slot.only_acting()
    if acting is None:
        return None
    low_rank, _ = acting
    hooked = low_rank._forward_pre_hooks or low_rank._forward_hooks
    return None if low_rank.drops() or hooked or type(low_rank) is not LowRank or not low_rank._parameters else acting


def _is_one_precision(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer takes its input as it is; else the composite gives the error, or autocast sees to it."""
    return x.dtype == weight.dtype or (_is_cast(x) and torch.float64 not in (x.dtype, weight.dtype))


def _is_cast(x: Tensor) -> bool:
    """Whether autocast sees to the precision."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


_PLAIN = (Tensor, nn.Parameter)


def _as_layers(low_rank: LowRank, strength: float) -> LowRankUpdate | None:
    """The update as two layers one after the other; None where it is not that."""
    chain = getattr(low_rank.factorization, "chain", None)
    factors = None if chain is None else chain(low_rank._parameters, low_rank.spec)
    if factors is None:
        return None
    a, b = factors
    return LowRankUpdate(a, b, strength * low_rank.scale)
