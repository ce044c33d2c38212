"""What can be done with adapters as values: the mathematics behind `Adapter.combine`, `.resize` and `.refactor`.

All of it is computed in float64 and rounded once, to float32 factors (float64 ones stay float64).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from convlora.adapter.parts import (
    BIAS_DELTA,
    AdapterParts,
    LayerFactors,
    layer_delta,
    refuse_weight,
    strengths_of,
    tensor_key,
)
from convlora.config import AdapterConfig, Strength, is_number
from convlora.errors import ConvLoRAError, Problems
from convlora.factors.base import Factorization, WeightSpec, get_factors, needs_weight, start_factors
from convlora.factors.svd import ChooseRank, Fit, rank_chooser
from convlora.support.progress import counted_steps

T = TypeVar("T")
A = TypeVar("A", bound=AdapterParts)


class Algebraic(Protocol):
    """What a factorization offers for the algebra of adapters, beside what `Factorization` needs; each is optional."""

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Factors of the sum of the updates; the rank components of the parts one after the other."""

    def fit(self, delta: Tensor, spec: WeightSpec, choose: ChooseRank) -> Fit:
        """The factors nearest in the Frobenius norm to an update `(out, in/groups, *kernel)`.

        `choose` gets the squared norm that each rank component adds, largest first, and says how many to keep.
        """

    def pad(self, factors: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors of a higher rank and the same update, of which `more` start as new ones; missing, `join` is used."""

    def shrink(self, factors: Mapping[str, Tensor], spec: WeightSpec, choose: ChooseRank) -> Fit:
        """`fit` to the update of other factors, without forming it; where it is missing, `fit` is used."""


def factorization_with(name: str, method: str, operation: str) -> Any:
    """A factorization that has a method of `Algebraic`.

    Raises:
        ConvLoRAError: it has not.
    """
    factorization = get_factors(name)
    if not callable(getattr(factorization, method, None)):
        remedy = ", or bring the adapter to 'locon' by refactor" if method == "join" else ""
        raise ConvLoRAError(
            f"{operation}: factorization {name!r} cannot do this; give its class a method '{method}'{remedy}"
        )
    return factorization


def can_be_resized(factors: str) -> bool:
    """Whether `Adapter.resize` takes factors of a sort."""
    factorization = get_factors(factors)
    return not (needs_weight(factorization) or getattr(factorization, "free_rank", False))


def refuse_free_rank(factors: str, operation: str, remedy: str) -> None:
    """Refuse what takes or adds components one by one.

    Raises:
        ConvLoRAError: the rank of the factorization counts none.
    """
    if getattr(get_factors(factors), "free_rank", False):
        raise ConvLoRAError(f"{operation}: the rank of {factors!r} factors counts no components of ΔW; {remedy}")


def assemble(
    make: type[A],
    config: AdapterConfig,
    layers: Mapping[str, LayerFactors],
    *,
    fingerprint: str | None = None,
    errors: Mapping[str, float] | None = None,
    modules: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> A:
    """An adapter of the class `make`, its config made from its layers: targets, ranks, alphas and bias."""
    if not layers:
        raise ConvLoRAError("Adapter: it has no layer")
    exact = {path: f"re:{re.escape(path)}" for path in layers}
    rank = _commonest([layer.rank for layer in layers.values()])
    alpha = None
    if any(layer.alpha != layer.rank for layer in layers.values()):
        alpha = _commonest([layer.alpha for layer in layers.values()])
    stated = config.replace(
        targets=tuple(exact.values()),
        exclude=(),
        rank=rank,
        alpha=alpha,
        ranks={exact[p]: layer.rank for p, layer in layers.items() if layer.rank != rank},
        alphas={exact[p]: layer.alpha for p, layer in layers.items() if alpha is not None and layer.alpha != alpha},
        init=config.init if config.init in get_factors(config.factors).inits else "default",
        bias=any(BIAS_DELTA in layer.tensors for layer in layers.values()),
    )
    return make(stated, dict(layers), fingerprint, dict(errors or {}), dict(modules or {}))


def _commonest(values: Sequence[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def combine(adapters: Sequence[A], weights: Sequence[Strength]) -> A:
    """See `Adapter.combine`."""
    adapters, weights = list(adapters), list(weights)
    if not adapters or not all(isinstance(adapter, AdapterParts) for adapter in adapters):
        raise ConvLoRAError("Adapter.combine: give a list of one or more adapters")
    if len(weights) != len(adapters) or not all(is_number(w) or isinstance(w, Mapping) for w in weights):
        raise ConvLoRAError(f"Adapter.combine: weights (={weights}) must be {len(adapters)} finite numbers")
    by_layer = [strengths_of(a, w, "Adapter.combine", "weight") for a, w in zip(adapters, weights, strict=True)]
    kinds = sorted({adapter.config.factors for adapter in adapters})
    if len(kinds) > 1:
        raise ConvLoRAError(
            f"Adapter.combine: the factorizations differ ({', '.join(kinds)}); "
            f"bring all to one first: adapter.refactor({kinds[0]!r})"
        )
    refuse_weight(kinds[0], "Adapter.combine")
    factorization = factorization_with(kinds[0], "join", "Adapter.combine")
    layers = {
        path: _sum(
            factorization, [(adapters[i].config, layer, by_layer[i][own]) for i, (own, layer) in summands.items()]
        )
        for path, summands in _by_layer(adapters).items()
    }
    first = adapters[0]
    same_base = all(a.fingerprint == first.fingerprint and set(a.layers) == set(first.layers) for a in adapters)
    return assemble(
        type(first),
        first.config.replace(rank_scaling="linear"),
        layers,
        fingerprint=first.fingerprint if same_base else None,
        modules=_averaged(adapters, by_layer),
    )


def _averaged(adapters: Sequence[AdapterParts], weights: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Tensor]]:
    """`base + Σ weight·(copy − base)` of each copied tensor, which needs no base where the weights sum to 1."""
    problems = Problems()
    averaged: dict[str, dict[str, Tensor]] = {}
    names = {(path, name): None for a in adapters for path, tensors in a.modules.items() for name in tensors}
    for path, name in names:
        parts = [
            (a.modules[path][name], by_layer[path])
            for a, by_layer in zip(adapters, weights, strict=True)
            if name in a.modules.get(path, ())
        ]
        total = sum(weight for _, weight in parts)
        copies = [copy for copy, _ in parts]
        if abs(total - 1) > 1e-9:
            problems.mismatched.append(f"{tensor_key(path, name)} has weights that sum to {total:g} instead of 1")
        elif any(copy.shape != copies[0].shape for copy in copies):
            problems.mismatched.append(f"{tensor_key(path, name)} has shapes {[tuple(copy.shape) for copy in copies]}")
        elif copies[0].is_floating_point():
            mixed = torch.stack([copy.double() * weight for copy, weight in parts]).sum(0)
            averaged.setdefault(path, {})[name] = mixed.to(copies[0].dtype)
        else:
            averaged.setdefault(path, {})[name] = [copy for copy, weight in parts if weight][-1]
    problems.raise_if_any("Adapter.combine")
    return averaged


def _by_layer(adapters: Sequence[AdapterParts]) -> dict[str, dict[int, tuple[str, LayerFactors]]]:
    """Layer path -> number of the adapter -> its own path and factors; a module of several paths is one layer."""
    problems = Problems()
    first_name: dict[str, str] = {}
    layers: dict[str, dict[int, tuple[str, LayerFactors]]] = {}
    for number, adapter in enumerate(adapters):
        for path, layer in adapter.layers.items():
            names = (path, *layer.aliases)
            known = dict.fromkeys(first_name[name] for name in names if name in first_name)
            canonical = next(iter(known), path)
            first_name.update(dict.fromkeys(names, canonical))
            summands = layers.setdefault(canonical, {})
            others = [other.spec for _, other in summands.values() if other.spec != layer.spec]
            if others:
                problems.mismatched.append(f"{path} has weight {layer.spec}, in another adapter {others[0]}")
            elif number in summands or len(known) > 1:
                problems.mismatched.append(f"{path} is one module with {', '.join(known)} in another adapter only")
            else:
                aliases = tuple(name for name in names if name != canonical)
                summands[number] = path, replace(layer, aliases=aliases)
    problems.raise_if_any("Adapter.combine")
    return layers


def _sum(factorization: Any, summands: Sequence[tuple[AdapterConfig, LayerFactors, float]]) -> LayerFactors:
    parts, biases, aliases = [], [], {}
    dtype = _dtype(*(layer for _, layer, _ in summands))
    for config, layer, weight in summands:
        parts.append(scaled_factors(factorization, layer, weight * config.scale(layer.rank, layer.alpha)))
        if BIAS_DELTA in layer.tensors:
            biases.append(layer.tensors[BIAS_DELTA].double() * weight)
        aliases.update(dict.fromkeys(layer.aliases))
    tensors = factorization.join(parts)
    if biases:
        tensors[BIAS_DELTA] = torch.stack(biases).sum(0)
    rank = sum(layer.rank for _, layer, _ in summands)
    return LayerFactors(
        {n: t.to(dtype) for n, t in tensors.items()}, summands[0][1].spec, rank, float(rank), tuple(aliases)
    )


def resize(adapter: A, rank: int | None, energy: float | None) -> A:
    """See `Adapter.resize`."""
    choose = rank_chooser("Adapter.resize", rank, energy)
    refuse_weight(adapter.config.factors, "Adapter.resize")
    refuse_free_rank(adapter.config.factors, "Adapter.resize", "adapter.refactor('locon', rank=…) cuts the update")
    layers, errors = {}, {}
    for path, layer in counted_steps(adapter.layers.items()):
        errors[path] = 0.0
        layers[path] = layer
        if rank is None or layer.rank > rank:
            fit = _shrink(adapter.config, layer, choose)
            if fit.rank < layer.rank:
                layers[path], errors[path] = fitted(fit, adapter.config, layer), fit.error
    return assemble(
        type(adapter), adapter.config, layers, fingerprint=adapter.fingerprint, errors=errors, modules=adapter.modules
    )


def _shrink(config: AdapterConfig, layer: LayerFactors, choose: ChooseRank) -> Fit:
    factorization = get_factors(config.factors)
    if not hasattr(factorization, "shrink"):
        factorization = factorization_with(config.factors, "fit", "Adapter.resize")
        fit: Fit = factorization.fit(dense_delta(config, layer), layer.spec, choose)
        return fit
    factors = scaled_factors(factorization, layer, config.scale(layer.rank, layer.alpha))
    shrunk: Fit = factorization.shrink(factors, layer.spec, choose)
    return shrunk


def refactor(adapter: A, factors: str, rank: int | None, energy: float | None) -> A:
    """See `Adapter.refactor`."""
    limited = rank is not None or energy is not None
    choose = rank_chooser("Adapter.refactor", rank, energy if limited else 1.0)
    if factors == adapter.config.factors:
        return resize(adapter, rank, energy) if limited else adapter
    refuse_weight(adapter.config.factors, "Adapter.refactor")
    target = factorization_with(factors, "fit", "Adapter.refactor")
    config = adapter.config.replace(factors=factors, init="default")
    layers, errors = {}, {}
    for path, layer in counted_steps(adapter.layers.items()):
        errors[path] = 0.0
        if _means_the_same(get_factors(adapter.config.factors), target, layer):
            layers[path] = layer
            if rank is None and energy is None:
                continue
            fit = _shrink(config, layer, choose)
            if fit.rank >= layer.rank:
                continue
        else:
            fit = target.fit(dense_delta(adapter.config, layer), layer.spec, choose)
        layers[path], errors[path] = fitted(fit, config, layer), fit.error
    return assemble(
        type(adapter), config, layers, fingerprint=adapter.fingerprint, errors=errors, modules=adapter.modules
    )


def _means_the_same(source: Factorization, target: Factorization, layer: LayerFactors) -> bool:
    """Whether the same tensors give the same update: for Linear layers, all shipped forms are plain LoRA."""
    shapes = target.shapes(layer.spec, layer.rank)
    if shapes != source.shapes(layer.spec, layer.rank):
        return False
    tensors = {name: layer.tensors[name].double() for name in shapes}
    return torch.equal(source.delta(tensors, layer.spec).flatten(), target.delta(tensors, layer.spec).flatten())


def dense_delta(config: AdapterConfig, layer: LayerFactors, base: Tensor | None = None) -> Tensor:
    """ΔW with its scale, float64, `(out, in/groups, *kernel)`; `base`: the weight, where ΔW depends on it."""
    return layer.spec.to_convolution(layer_delta(config, layer, 1.0, exact=True, base=base))


def scaled_factors(factorization: Factorization, layer: LayerFactors, gain: float) -> dict[str, Tensor]:
    """The factors of `gain` times the update, float64."""
    factors = {name: tensor.double() for name, tensor in layer.tensors.items() if name != BIAS_DELTA}
    keep = torch.full((layer.rank,), gain, dtype=torch.float64)
    return factorization.drop(factors, keep)


def fitted(fit: Fit, config: AdapterConfig, layer: LayerFactors) -> LayerFactors:
    """A layer with other factors, of scale 1; all else stays."""
    tensors = {name: tensor.to(_dtype(layer)) for name, tensor in fit.factors.items()}
    if BIAS_DELTA in layer.tensors:
        tensors[BIAS_DELTA] = layer.tensors[BIAS_DELTA].to(_dtype(layer))
    return LayerFactors(tensors, layer.spec, fit.rank, alpha_of_scale_one(config, fit.rank), layer.aliases)


def alpha_of_scale_one(config: AdapterConfig, rank: int) -> float:
    """The alpha of scale 1."""
    return float(rank) if config.rank_scaling == "linear" else math.sqrt(rank)


def padded(adapter: A, ranks: Mapping[str, int]) -> A:
    """The same adapter at higher ranks, by layer path: what is added updates nothing, and trains as a new adapter does.

    The scale of each layer stays, so its alpha changes with its rank. See `why_not_padded`.
    """
    wanted = {path: rank for path, rank in ranks.items() if rank != adapter.layers[path].rank}
    if not wanted:
        return adapter
    factorization = get_factors(adapter.config.factors)
    layers = {
        path: _padded(factorization, adapter.config, layer, wanted[path]) if path in wanted else layer
        for path, layer in adapter.layers.items()
    }
    return assemble(
        type(adapter),
        adapter.config,
        layers,
        fingerprint=adapter.fingerprint,
        errors=adapter.errors,
        modules=adapter.modules,
    )


def why_not_padded(name: str, spec: WeightSpec, rank: int, to: int) -> str | None:
    """Why factors of a rank cannot be had at another; None if they can: a higher one, or where it says nothing."""
    factorization = get_factors(name)
    if factorization.shapes(spec, rank) == factorization.shapes(spec, to):
        return None
    if rank > to:
        return f"the file has rank {rank}, the adapter on the model rank {to}"
    if not hasattr(factorization, "pad") and not hasattr(factorization, "join"):
        return f"rank {rank} on rank {to}, which {name!r} factors cannot be padded to"
    return None


def _padded(factorization: Any, config: AdapterConfig, layer: LayerFactors, rank: int) -> LayerFactors:
    tensors = dict(layer.tensors)
    if factorization.shapes(layer.spec, layer.rank) != factorization.shapes(layer.spec, rank):
        shapes = factorization.shapes(layer.spec, rank - layer.rank)
        more = {name: torch.empty(shape, dtype=_dtype(layer)) for name, shape in shapes.items()}
        with torch.random.fork_rng(devices=[]):  # the same in every process, and the caller's random numbers stay
            torch.default_generator.manual_seed(0)
            start_factors(factorization, more, config.init, layer.spec, torch.ones(layer.spec.shape))
        own = {name: layer.tensors[name] for name in shapes}
        tensors |= factorization.pad(own, more) if hasattr(factorization, "pad") else factorization.join([own, more])
    alpha = config.scale(layer.rank, layer.alpha) * alpha_of_scale_one(config, rank)
    return LayerFactors(tensors, layer.spec, rank, alpha, layer.aliases)


def with_linear_scaling(adapter: AdapterParts) -> dict[str, LayerFactors]:
    """The layers with alphas for which the scale is `alpha / rank`, whatever the adapter's `rank_scaling`."""
    if adapter.config.rank_scaling == "linear":
        return dict(adapter.layers)
    scale = adapter.config.scale
    return {p: replace(layer, alpha=scale(layer.rank, layer.alpha) * layer.rank) for p, layer in adapter.layers.items()}


def _dtype(*layers: LayerFactors) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for layer in layers for tensor in layer.tensors.values())
    return torch.float64 if wide else torch.float32
