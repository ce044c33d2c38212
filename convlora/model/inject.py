"""Adapters into a model and out again: `inject` and `remove`."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig, Targets
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.factors.base import WeightSpec, get_factors
from convlora.layer.adapted import Adapted, adapt, adapted_class, peek_base_tensor, release, slot_of, weight_spec
from convlora.layer.lowrank import LowRank
from convlora.model.bake import plan_baking
from convlora.model.traversal import (
    adapted_layers,
    adapter_slots,
    adapters,
    own_parameters,
    refuse_stacked,
    refuse_wrapped,
    require_adapters,
    unwrap_model,
)
from convlora.targets import describe_target, select_layers, values_by_layer

M = TypeVar("M", bound=nn.Module)

_FROZEN = "_convlora_frozen"  # on a module while adapters are there: the parameters that inject froze


@dataclass(frozen=True)
class Placement:
    """One adapter on one layer, decided but not yet made."""

    path: str
    layer: nn.Module
    spec: WeightSpec
    rank: int
    alpha: float
    bias: bool
    factors: Mapping[str, Tensor] | None = None  # None: start at ΔW = 0


def inject(
    model: M,
    targets: Targets | None = None,
    *,
    rank: int = 4,
    alpha: float | None = None,
    factors: str = "convlora",
    name: str = "default",
    exclude: Targets = (),
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    rank_scaling: str = "linear",
    init: str = "default",
    bias: bool = False,
    rank_dropout: float = 0.0,
    config: AdapterConfig | None = None,
) -> M:
    """Add a named adapter to every layer that the targets select, and freeze the base.

    Each layer then computes with `W + Σ strength·scale·ΔW`; ΔW starts at zero, so the output stays bitwise what it
    was. Adapters that are there stay active. For the arguments see `AdapterConfig`; `config=` replaces them all.

    Raises:
        ConvLoRAError: a target selects nothing or names what cannot be adapted, the name is taken, the model is
            merged or already wrapped (DDP, FSDP). The model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
        >>> _ = inject(model, targets=["0"], rank=2)
        >>> tuple(model[0].weight.shape), list(adapters(model))
        ((8, 3, 3, 3), ['default'])
    """
    if config is None:
        if targets is None:
            raise ConvLoRAError("inject: targets is missing; name layers, for example targets=['body.*']")
        config = AdapterConfig(
            targets=targets, rank=rank, alpha=alpha, factors=factors, name=name, exclude=exclude, ranks=ranks,
            alphas=alphas, rank_scaling=rank_scaling, init=init, bias=bias, rank_dropout=rank_dropout,
        )  # fmt: skip
    else:
        given = dict(
            targets=targets, rank=rank, alpha=alpha, factors=factors, name=name, exclude=exclude, ranks=ranks,
            alphas=alphas, rank_scaling=rank_scaling, init=init, bias=bias, rank_dropout=rank_dropout,
        )  # fmt: skip
        defaults = inspect.signature(inject).parameters
        both = [key for key, value in given.items() if value != defaults[key].default]
        if both:
            raise ConvLoRAError(
                f"inject: give {', '.join(both)} or config, not both; config.replace(…) changes a config"
            )
        if not isinstance(config, AdapterConfig):
            raise ConvLoRAError(f"inject: config (={config!r}) must be an AdapterConfig")
    root = check_injectable(model, config, "inject")
    layers, idle = select_layers(root, config.targets, config.exclude, "inject")  # type: ignore[arg-type]
    for target in idle:
        warnings.warn(f"inject: exclude {describe_target(target)} matches no layer", ConvLoRAWarning, stacklevel=2)
    layer_ranks = values_by_layer(config.ranks, config.rank, layers, "inject", "ranks")
    layer_alphas = values_by_layer(config.alphas, config.alpha, layers, "inject", "alphas")
    plan = []
    for path, layer in layers.items():
        r, a = layer_ranks[path], layer_alphas[path]
        if r > 0:
            has_bias = config.bias and peek_base_tensor(layer, "bias") is not None
            plan.append(Placement(path, layer, weight_spec(layer), r, float(r if a is None else a), has_bias))
    if not plan:
        raise ConvLoRAError("inject: every selected layer has rank 0; give one of them a rank of at least 1")
    if config.bias and not any(placement.bias for placement in plan):
        raise ConvLoRAError(f"inject: bias=True, but none of the {len(plan)} layers has a bias")
    _warn_oversized(plan, config)
    place_adapter(root, plan, named_targets(config, list(layers), root))
    return model


def check_injectable(model: Any, config: AdapterConfig, operation: str) -> nn.Module:
    """The bare model if an adapter of this config can go in; raises otherwise."""
    refuse_wrapped(model, operation)
    root = unwrap_model(model, operation)
    if config.init not in (inits := get_factors(config.factors).inits):
        raise ConvLoRAError(f"{operation}: {config.factors!r} has no init {config.init!r}; it has {', '.join(inits)}")
    if config.name in (known := adapters(root)):
        raise ConvLoRAError(
            f"{operation}: adapter {config.name!r} is there already (of {sorted(known)}); remove it or use another name"
        )
    if any(slot.merged for slot in adapter_slots(root)):
        raise ConvLoRAError(f"{operation}: the model is merged; unmerge it first")
    refuse_stacked(root, operation)
    return root


def place_adapter(root: nn.Module, plan: Sequence[Placement], config: AdapterConfig) -> None:
    """Carry out a checked plan: make all factors, then put them in and freeze the base."""
    made = []
    for p in plan:
        check_adaptable(p.path, p.layer, "inject")
    with torch.inference_mode(False):  # factors are to be trained and switched outside it, too
        for p in plan:
            device = peek_base_tensor(p.layer, "weight").device
            try:
                made.append(
                    LowRank(config, p.spec, rank=p.rank, alpha=p.alpha, device=device, factors=p.factors, bias=p.bias)
                )
            except (RuntimeError, TypeError, OverflowError) as error:
                raise ConvLoRAError(f"inject: no factors of rank {p.rank} for '{p.path}' ({error})") from error
    _freeze(root)
    for p, low_rank in zip(plan, made, strict=True):
        adapt(p.layer, config.name, low_rank)


def check_adaptable(path: str, layer: nn.Module, operation: str) -> None:
    """Make the class that a layer is to get, before anything is changed: a class may refuse to be subclassed."""
    try:
        if not isinstance(layer, Adapted):
            adapted_class(type(layer))
    except Exception as error:
        kind = type(layer).__name__
        raise ConvLoRAError(
            f"{operation}: '{path}' cannot be adapted: {kind} cannot be subclassed ({error!r})"
        ) from error


def named_targets(config: AdapterConfig, selected: Sequence[str], root: nn.Module) -> AdapterConfig:
    """The config with classes and callables replaced by the names of the layers selected: plain data."""
    if all(isinstance(target, str) for target in (*config.targets, *config.exclude)):  # type: ignore[misc]
        return config
    names = [name for name, _ in root.named_modules(remove_duplicate=False)]
    tails = Counter(".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1))
    exact = [
        name if tails[name] == 1 and not any(c in name for c in "*?[") and not name.startswith("re:")
        else f"re:{re.escape(name)}"
        for name in selected
    ]  # fmt: skip
    return config.replace(targets=tuple(exact), exclude=())


def remove(model: M, name: str | None = None) -> M:
    """Take adapters out: all, or the named one. A layer left with none is exactly what it was before `inject`.

    If the model is merged, the merged weights stay in the plain layers. A Parameter shared with another layer is
    then untied (with a warning), and a weight or spectral norm is baked in (with a warning), since neither could
    hold the merged values.

    Raises:
        ConvLoRAError: no such adapter; one of several adapters of a merged model; a wrapped model (DDP, FSDP); a
            layer that a parametrization was put on after `inject`. The model is unchanged then.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> type(remove(model)[0]).__name__
        'Conv2d'
    """
    refuse_wrapped(model, "remove")
    root = unwrap_model(model, "remove")
    if name is None and not adapters(root) and any(_FROZEN in module.__dict__ for module in root.modules()):
        _thaw(root, [])  # the adapters went with a part of the model, `remove(model.body)`
        return model
    require_adapters(root, "remove", [name] if name is not None else [])
    refuse_stacked(root, "remove")
    layers = list(adapted_layers(root).values())
    merged = [layer for layer in layers if slot_of(layer).merged]
    going = {layer: [n for n in slot_of(layer).names() if name in (None, n)] for layer in layers}
    if any(going[layer] and going[layer] != slot_of(layer).names() for layer in merged):
        raise ConvLoRAError(f"remove: {name!r} is one of several merged adapters; unmerge first")
    bake = plan_baking(root, [layer for layer in merged if going[layer]])
    for layer, names in going.items():
        for n in names:
            release(layer, n)
    for step in bake:
        step()
    _thaw(root, [layer for layer, names in going.items() if names and not isinstance(layer, Adapted)])
    return model


def _freeze(root: nn.Module) -> None:
    trainable = {
        id(p)
        for m in root.modules()
        if not isinstance(m, LowRank)
        for p in own_parameters(m).values()
        if p.requires_grad
    }
    for module in root.modules():
        if isinstance(module, LowRank):
            continue
        names = [name for name, p in own_parameters(module).items() if id(p) in trainable]
        if names:
            module.__dict__[_FROZEN] = tuple(dict.fromkeys((*module.__dict__.get(_FROZEN, ()), *names)))
            for name in names:
                _set_requires_grad(own_parameters(module)[name], False)


def _thaw(root: nn.Module, released: Iterable[nn.Module]) -> None:
    """Make trainable again what `inject` froze: everything with the last adapter, else the released layers."""
    held = {id(p) for layer in adapted_layers(root).values() for p in own_parameters(layer).values()}
    for module in list(root.modules()) if not adapted_layers(root) else released:
        for name in module.__dict__.pop(_FROZEN, ()):
            p = own_parameters(module).get(name)
            if p is not None and id(p) not in held:
                _set_requires_grad(p, True)


def _set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    # The flag of an inference tensor is set in inference mode only; lazy parameters know neither question nor method.
    with torch.inference_mode(not nn.parameter.is_lazy(parameter) and parameter.is_inference()):
        parameter.requires_grad = value


def _warn_oversized(plan: Sequence[Placement], config: AdapterConfig) -> None:
    factorization = get_factors(config.factors)
    large = [
        p.path for p in plan
        if sum(math.prod(s) for s in factorization.shapes(p.spec, p.rank).values()) > math.prod(p.spec.shape)
    ]  # fmt: skip
    if large:
        warnings.warn(
            f"inject: the adapter has more parameters than the layer itself in {len(large)} of {len(plan)} layers"
            f" (first: '{large[0]}'); a lower rank, exclude= or rank 0 there saves them",
            ConvLoRAWarning,
            stacklevel=3,
        )
