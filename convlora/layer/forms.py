"""How a layer with one low-rank update computes while it trains: three forms of equal values, chosen by shape.

- The composite, `layer(x; W + s·B∘A)`: the reference, for everything; its backward forms the gradient of all of W.
- Thin products (thin.py): the same forward, and a backward without that gradient.
- Two branches, `layer(x; W) + s·B(A(x))`, where the weight is larger than what goes through it: W is not even read.

The last two are for stock `Conv2d` and `Linear` on a CPU whose frozen weight has one active adapter in float32 or
float64. What needs operations to be looked into (functional transforms, forward-mode derivatives, tracing, compilation)
gets the composite, and so does autocast, whose half precision would round sums over images. The rule of shapes was
measured by benchmarks/training_step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from convlora.layer import thin
from convlora.layer.lowrank import LowRank
from convlora.layer.slot import Slot
from convlora.layer.thin import LowRankUpdate

# Below this many multiplications in a layer's forward, times the threads (by which small products gain less than
# convolutions do), the calls of other forms cost more than they save.
LEAST_WORK = 4.5e7
# Above this share of the smaller side of the weight, thin products cost more than the whole gradient.
LARGEST_SHARE = 1 / 5
# Two branches where the weight has more elements than this many times the output's positions.
HEAVY = 200

Form = Callable[[Any, Slot, Tensor], Tensor | None]


def training_form_of(kind: Any) -> Form | None:
    """What to try before a layer class's own forward; None if it does not compute as the stock layers do."""
    if kind.forward is nn.Linear.forward:
        return _linear
    stock = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return _conv2d if stock else None


def _linear(layer: Any, slot: Slot, x: Tensor) -> Tensor | None:
    weight = layer._parameters.get("weight")
    update = _update(slot, x, weight)
    if update is None or x.dim() < 2:
        return None
    rows = x.numel() // x.shape[-1]
    if weight.numel() > HEAVY * rows:
        low = F.linear(x, update.a.flatten(1))
        return torch.add(F.linear(x, weight, layer.bias), F.linear(low, update.b.flatten(1)), alpha=update.gain)
    if _is_worth_it(weight, update, rows):
        return thin.linear(x, weight, layer.bias, update)
    return None


def _conv2d(layer: Any, slot: Slot, x: Tensor) -> Tensor | None:
    weight = layer._parameters.get("weight")
    update = _update(slot, x, weight)
    if update is None or x.dim() != 4 or layer.groups != 1:
        return None
    positions = x.numel() // x.shape[1] // (layer.stride[0] * layer.stride[1])
    if weight.numel() > HEAVY * positions:
        low = layer._conv_forward(x, update.a, None)
        return torch.add(layer._conv_forward(x, weight, layer.bias), F.conv2d(low, update.b), alpha=update.gain)
    padding = _padding(layer)
    if layer.stride != (1, 1) or padding is None or not _is_worth_it(weight, update, positions):
        return None
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), (0, 0)
    return thin.conv2d(x, weight, layer.bias, update, padding, layer.dilation)


def _padding(layer: Any) -> tuple[int, int] | None:
    """The zeros on each side, (rows, columns); None where the sides differ or outputs outnumber inputs."""
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
    """The update of the only acting adapter, if anything but the composite may be used."""
    if (
        type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or weight.requires_grad
        or x.device.type != "cpu"
        or x.dtype not in _WHOLE
        or x.dtype != weight.dtype
        or x.layout is not torch.strided
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    ):
        return None
    acting = slot.only_acting()
    return None if acting is None else _chained(*acting, x.dtype)


_PLAIN = (Tensor, nn.Parameter)
_WHOLE = (torch.float32, torch.float64)


def _chained(low_rank: LowRank, strength: float, dtype: torch.dtype) -> LowRankUpdate | None:
    """The update as two layers one after the other; None where it is not that, or where calling the module does more:
    dropout draws, hooks (of FSDP2, say) have work to do, a replica of DataParallel has no parameters."""
    chain = getattr(low_rank.factorization, "chain", None)
    dropping = low_rank.training and low_rank.config.rank_dropout > 0
    hooked = low_rank._forward_pre_hooks or low_rank._forward_hooks
    if chain is None or dropping or hooked or type(low_rank) is not LowRank or not low_rank._parameters:
        return None
    factors = chain(low_rank._parameters, low_rank.spec)
    if factors is None or any(factor.dtype != dtype for factor in factors):
        return None
    a, b = factors
    return LowRankUpdate(a, b, strength * low_rank.scale)
