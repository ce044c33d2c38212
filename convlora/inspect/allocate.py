"""Rank where it matters: how much each layer would gain from an update, and ranks within a budget of parameters."""

from __future__ import annotations

import heapq
import itertools
import math
import numbers
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from convlora.config import AdapterConfig, Targets
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.factors.base import Factorization, WeightSpec, get_factors
from convlora.inspect.probe import measure_gradients
from convlora.layer.adapted import weight_spec
from convlora.model.inject import check_injectable
from convlora.targets import describe_target, select_layers

_ROUNDING = 1e-12  # of the squared norm: what a gradient summed in float32 has beyond its true rank


def allocate_ranks(
    model: nn.Module,
    targets: Targets,
    *,
    budget: int,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    factors: str = "convlora",
    max_rank: int | None = None,
    exclude: Targets = (),
) -> dict[str, int]:
    """`{layer name: rank}` for `inject(model, targets, exclude=exclude, ranks=…)`, of at most `budget` parameters.

    One backward pass a batch gives the gradient G of each layer's weight, written as the matrix that the factorization
    makes of ΔW. A component that takes the singular values S of the mean of G is worth

        n · Σ_{σ in S} σ² / mean ‖G‖²     for a layer of n weights, the second mean over the batches,

    and ranks go to the components that are worth most per parameter: a greedy choice, best as long as the last
    component that fits is small beside the budget. The first-order gain of the best update of rank r and norm one
    is the norm of the r largest singular values (Eckart and Young 1936), so σ² says how much and at which rank.
    Dividing by mean ‖G‖² / n, the mean square of one element, measures each layer in its own unit, as Adam does (Kingma
    and Ba 2014, arXiv 1412.6980, section 2.1, where the step is mean over root mean square): neither the scale of a
    layer's weights or inputs counts nor that of the loss, and batches that disagree lower the worth of a layer. The
    gradient as a guide to ranks is that of GoRA (He et al. 2025, arXiv 2502.12171).

    Args:
        model: in the mode in which it is to be measured. Adapters that act count as part of it: the ranks are then
            those of one more adapter. It comes back as it was, and so does torch's state of random numbers.
        targets: as for `inject`.
        budget: number of adapter parameters, without biases.
        batches: a finite iterable of what `loss` takes; four to sixteen as they occur in training will do.
        loss: `(model, batch)` -> scalar, with the bare model where the given one is compiled or averaged. For float16
            weights multiply it by some 1000, lest small gradients vanish.
        factors: name of the factorization.
        max_rank: of any layer. No layer gets more rank than its gradient has, nor, beyond rank 1, as many parameters
            as make the adapter larger than its weight.
        exclude: as for `inject`.

    Memory is that of a training step with adapters, and one float32 gradient of each selected layer. A Parameter that
    the loss itself writes to in place keeps what was written.

    Raises:
        ConvLoRAError: a value is out of range, the budget pays for no layer, there is no batch, the loss is no
            finite scalar or does not depend on the layers; and where `inject` raises. What the loss raises passes.

    Example:
        >>> import convlora
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 3))
        >>> batches = [torch.rand(4, 3, 8, 8) for _ in range(4)]
        >>> ranks = allocate_ranks(
        ...     model, "*", budget=400, batches=batches, loss=lambda model, x: model(x).square().mean()
        ... )
        >>> list(ranks), convlora.summary(convlora.inject(model, "*", ranks=ranks)).trainable <= 400
        (['0', '2'], True)
    """
    config = AdapterConfig(targets=targets, exclude=exclude, factors=factors, name="allocate_ranks")
    budget = _positive("budget", budget)
    most = budget if max_rank is None else _positive("max_rank", max_rank)
    _check_types(batches, loss)
    root = check_injectable(model, config, "allocate_ranks")
    layers, idle = select_layers(root, config.targets, config.exclude, "allocate_ranks")  # type: ignore[arg-type]
    for target in idle:
        warnings.warn(
            f"allocate_ranks: exclude {describe_target(target)} matches no layer", ConvLoRAWarning, stacklevel=2
        )
    factorization = get_factors(factors)
    if getattr(factorization, "free_rank", False):
        raise ConvLoRAError(
            f"allocate_ranks: the rank of {factors!r} factors counts no components of ΔW; 'locon' has ranks to allocate"
        )
    specs = {path: weight_spec(layer) for path, layer in layers.items()}
    prices = {path: _prices(factorization, spec, most) for path, spec in specs.items()}
    cheapest = min(prices, key=lambda path: prices[path][0])
    if prices[cheapest][0] > budget:
        raise ConvLoRAError(
            f"allocate_ranks: budget (={budget}) pays for no layer; rank 1 of '{cheapest}', the cheapest of"
            f" {len(layers)}, has {prices[cheapest][0]} parameters"
        )
    measured = measure_gradients(root, layers, config, batches, loss)
    worths = {path: _worths(factorization, specs[path], *measured[path]) for path in layers}
    ranks = _spend(budget, worths, prices)
    if not any(ranks.values()):
        raise ConvLoRAError(f"allocate_ranks: budget (={budget}) pays for none of the layers that have a gradient")
    # A name matches from any dot on, and the last match wins: the fewer dots, the earlier.
    return {_exactly(path): ranks[path] for path in sorted(ranks, key=lambda path: path.count("."))}


def _positive(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ConvLoRAError(f"allocate_ranks: {field} (={value!r}) must be an integer of at least 1")
    return int(value)


def _check_types(batches: Any, loss: Any) -> None:
    if not isinstance(batches, Iterable):
        raise ConvLoRAError(f"allocate_ranks: batches (={batches!r}) must be an iterable, of what loss takes")
    if not callable(loss):
        raise ConvLoRAError(f"allocate_ranks: loss (={loss!r}) must be callable: (model, batch) -> scalar")


def _exactly(name: str) -> str:
    """The pattern of `ranks=` for a layer name, which may have characters that patterns have a use for."""
    return f"re:{re.escape(name)}" if name.startswith("re:") or any(c in name for c in "*?[") else name


# --- what a component is worth, and what it costs ----------------------------------------------------------------


def _worths(factorization: Factorization, spec: WeightSpec, total: Tensor, power: float) -> list[float]:
    """What each further component of a layer is worth, largest first; the number of batches cancels out."""
    squares = _component_squares(factorization, spec, total) if power > 0 else []
    return [math.prod(spec.shape) * square / power for square in squares if square > _ROUNDING * sum(squares)]


def _component_squares(factorization: Factorization, spec: WeightSpec, gradient: Tensor) -> list[float]:
    """The squared norm of each component of the best approximation of a gradient, largest first."""
    convolution = spec.to_convolution(gradient)
    fit = getattr(factorization, "fit", None)
    if fit is None:  # it does not tell its matrix: that of a row for each output channel
        return [
            float(square)
            for square in torch.linalg.svdvals(rearrange(convolution, "o i ... -> o (i ...)").double()).square()
        ]
    seen: list[float] = []

    def look(squares: Tensor) -> int:
        seen.extend(squares.tolist())
        return 1

    fit(convolution, spec, look)
    return seen


def _prices(factorization: Factorization, spec: WeightSpec, most: int) -> list[int]:
    """The parameters of component 1, 2, … of a layer; at least one component."""
    sizes = [0]
    weights = math.prod(spec.shape)
    for rank in range(1, min(most, weights) + 1):
        size = sum(math.prod(shape) for shape in factorization.shapes(spec, rank).values())
        if rank > 1 and size > weights:
            break
        sizes.append(size)
    return [max(after - before, 1) for before, after in itertools.pairwise(sizes)]


def _spend(budget: int, worths: Mapping[str, Sequence[float]], prices: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Ranks by the worth of the next component per parameter, as long as one fits; the first layer wins a tie."""
    ranks = dict.fromkeys(worths, 0)
    offers: list[tuple[float, int, str]] = []

    def offer(place: int, path: str) -> None:
        rank = ranks[path]
        if rank < min(len(worths[path]), len(prices[path])):
            heapq.heappush(offers, (-worths[path][rank] / prices[path][rank], place, path))

    for place, path in enumerate(worths):
        offer(place, path)
    while offers:
        _, place, path = heapq.heappop(offers)
        price = prices[path][ranks[path]]
        if price <= budget:
            budget -= price
            ranks[path] += 1
            offer(place, path)
    return ranks
