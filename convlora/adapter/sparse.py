"""Sums of adapters of which only a part of each update counts: magnitude pruning, DARE and TIES.

They are defined on task vectors, the change of all weights together: here every ΔW of an adapter and every bias delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from convlora.adapter.algebra import assemble, averaged_copies, dense_delta, layers_of_all
from convlora.adapter.parts import BIAS_DELTA, AdapterParts, LayerFactors, refuse_weight, strengths_of
from convlora.config import Strength, is_number
from convlora.errors import ConvLoRAError

OPERATION = "Adapter.combine"
METHODS = ("sum", "magnitude", "dare", "ties")

A = TypeVar("A", bound=AdapterParts)
Vector = dict[tuple[str, str], Tensor]  # (layer, "diff" or the bias delta) -> the update, float64


def combine_sparse(
    adapters: Sequence[A], weights: Sequence[Strength], method: str, density: float | None, seed: int
) -> A:
    """See `Adapter.combine`; the adapters and weights have been checked."""
    if not is_number(density) or density is None or not 0 < density <= 1:
        raise ConvLoRAError(
            f"{OPERATION}: density (={density!r}) must be in (0, 1], the share of ΔW that {method} keeps"
        )
    for adapter in adapters:
        refuse_weight(adapter.config.factors, OPERATION)
    by_layer = [strengths_of(a, w, OPERATION, "weight") for a, w in zip(adapters, weights, strict=True)]
    layers = layers_of_all(adapters)
    vectors: list[Vector] = []
    shares: list[dict[str, float]] = []
    for number, adapter in enumerate(adapters):
        vector: Vector = {}
        share: dict[str, float] = {}
        for path, summands in layers.items():
            if number in summands:
                own, layer = summands[number]
                share[path] = by_layer[number][own]
                vector[path, "diff"] = dense_delta(adapter.config, layer)
                if BIAS_DELTA in layer.tensors:
                    vector[path, BIAS_DELTA] = layer.tensors[BIAS_DELTA].double()
        vectors.append(_dropped(vector, density, seed + number) if method == "dare" else _trimmed(vector, density))
        shares.append(share)
    together: Callable[[Sequence[Tensor]], Tensor] = _disjoint_mean if method == "ties" else _sum
    made: dict[str, LayerFactors] = {}
    for path, summands in layers.items():
        tensors = {}
        for kind in ("diff", BIAS_DELTA):
            parts = [v[path, kind] * s[path] for v, s in zip(vectors, shares, strict=True) if (path, kind) in v]
            if parts:
                tensors[kind] = together(parts).float()
        known = [layer for _, layer in summands.values()]
        aliases = dict.fromkeys(alias for layer in known for alias in layer.aliases)
        made[path] = LayerFactors(tensors, known[0].spec, 1, 1.0, tuple(aliases))
    first = adapters[0]
    same_base = all(a.fingerprint == first.fingerprint and set(a.layers) == set(first.layers) for a in adapters)
    return assemble(
        type(first),
        first.config.replace(factors="dense", rank_scaling="linear", init="default"),
        made,
        fingerprint=first.fingerprint if same_base else None,
        modules=averaged_copies(adapters, by_layer),
    )


def _trimmed(vector: Vector, density: float) -> Vector:
    """The share of largest magnitude, over all layers together; the rest is zero."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()])
    kept = math.ceil(density * len(sizes))
    least = sizes.kthvalue(len(sizes) - kept + 1).values
    return {key: torch.where(tensor.abs() >= least, tensor, 0.0) for key, tensor in vector.items()}


def _dropped(vector: Vector, density: float, seed: int) -> Vector:
    """Each element kept with the probability `density` and then divided by it, so that the mean stays."""
    generator = torch.Generator().manual_seed(seed)
    kept = ((k, t, torch.rand(t.shape, dtype=torch.float64, generator=generator) < density) for k, t in vector.items())
    return {key: torch.where(mask, tensor / density, 0.0) for key, tensor, mask in kept}


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _disjoint_mean(parts: Sequence[Tensor]) -> Tensor:
    """The sign that has more weight is elected, and those that have it, and are not zero, are averaged."""
    stacked = torch.stack(list(parts))
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return torch.where(agrees, stacked, 0.0).sum(0) / agrees.sum(0).clamp_min(1)
