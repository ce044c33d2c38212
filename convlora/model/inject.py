"""Adapters into a model and out again: `inject` and `remove`."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convlora.adapter.parts import tensor_key
from convlora.config import AdapterConfig, Target, Targets
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.factors.base import WeightSpec, get_factors
from convlora.layer.adapted import (
    CHILD,
    Adapted,
    adapt,
    adapted_class,
    has_child_name,
    peek_base_tensor,
    release,
    slot_of,
    weight_spec,
    why_not,
)
from convlora.layer.copies import TensorCopies, copied, own_tensors, statistics_names
from convlora.layer.loading import AdapterTensors
from convlora.layer.lowrank import LowRank
from convlora.layer.projection import home_of
from convlora.model.bake import plan_baking
from convlora.model.outside import freeze_base, is_frozen, thaw_base
from convlora.model.places import departed_modules, forget_places, record_places, vacate_place
from convlora.model.traversal import (
    adapted_modules,
    adapter_slots,
    adapters,
    base_modules,
    refuse_stacked,
    refuse_wrapped,
    require_adapters,
    unwrap_model,
)
from convlora.support.patterns import values_by_layer
from convlora.targets import describe_target, named_layers, select_layers, select_modules

M = TypeVar("M", bound=nn.Module)


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


@dataclass(frozen=True)
class CopyPlacement:
    """One adapter's copies of tensors of one module, decided but not yet made."""

    path: str
    module: nn.Module
    names: Sequence[str]
    values: Mapping[str, Tensor] | None = None  # None: start as the base's
    freezes: bool = False


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
    modules_to_save: Targets = (),
    norm_statistics: str = "adapter",
    config: AdapterConfig | None = None,
) -> M:
    """Add a named adapter to every layer that the targets select, and freeze the base.

    Each layer then computes with `W + Σ strength·scale·ΔW`; ΔW starts at zero, so the output stays bitwise what it
    was. Adapters that are there stay active. For the arguments see `AdapterConfig`; `config=` replaces them all.

    The projections that `nn.MultiheadAttention` holds itself are layers, too: `attn.in_proj_weight` is the weight of
    `attn.in_proj`, and where keys or values have another width, those of `attn.q_proj`, `attn.k_proj` and
    `attn.v_proj`, which have no bias of their own.

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
            modules_to_save=modules_to_save, norm_statistics=norm_statistics,
        )  # fmt: skip
    else:
        given = dict(
            targets=targets, rank=rank, alpha=alpha, factors=factors, name=name, exclude=exclude, ranks=ranks,
            alphas=alphas, rank_scaling=rank_scaling, init=init, bias=bias, rank_dropout=rank_dropout,
            modules_to_save=modules_to_save, norm_statistics=norm_statistics,
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
    copies = plan_copies(root, config, "inject")
    layers, idle = select_layers(root, config.targets, config.exclude, "inject")  # type: ignore[arg-type]
    saved = {id(module) for module in modules_to_save_of(root, config, "inject").values()}
    layers = {path: layer for path, layer in layers.items() if id(home_of(layer, "weight")[0]) not in saved}
    if not layers:
        raise ConvLoRAError("inject: modules_to_save leaves no layer of those that the targets select")
    for target in idle:
        warnings.warn(f"inject: exclude {describe_target(target)} matches no layer", ConvLoRAWarning, stacklevel=2)
    named = root.named_modules(remove_duplicate=False) if config.ranks else ()
    others = [path for path, module in named if why_not(module) is None]
    layer_ranks = values_by_layer(config.ranks, config.rank, layers, "inject", "ranks", unselected=others)
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
    copies = _without_factored(copies, plan)
    place_adapter(root, plan, copies, named_targets(config, list(layers), root))
    return model


def _without_factored(copies: Sequence[CopyPlacement], plan: Sequence[Placement]) -> list[CopyPlacement]:
    """Without the statistics of layers that get factors: an adapter has one or the other of a module."""
    factored = {id(placement.layer) for placement in plan}
    if left := [c.path for c in copies if id(c.module) in factored]:
        warnings.warn(
            f"inject: {len(left)} of the selected layers (first: '{left[0]}') keep running statistics of their own,"
            " which stay the base's and move in train mode; exclude= or modules_to_save= gives the adapter its own",
            ConvLoRAWarning,
            stacklevel=3,
        )
    return [c for c in copies if id(c.module) not in factored]


def modules_to_save_of(root: nn.Module, config: AdapterConfig, operation: str) -> dict[str, nn.Module]:
    """Module name -> module with tensors of its own, of those that the config saves with all below them.

    Raises:
        ConvLoRAError: a pattern selects nothing, or only modules without tensors.
    """
    targets: Sequence[Target] = config.modules_to_save  # type: ignore[assignment]
    chosen = select_modules(root, targets, operation, "modules_to_save") if targets else {}
    inside = {id(inner) for module in chosen.values() for _, inner in base_modules(module)}
    found = {path: module for path, module in base_modules(root) if id(module) in inside and own_tensors(module)}
    if chosen and not found:
        raise ConvLoRAError(f"{operation}: modules_to_save selects {sorted(chosen)}, which hold no tensors")
    return found


def plan_copies(root: nn.Module, config: AdapterConfig, operation: str) -> list[CopyPlacement]:
    """What an adapter is to have copies of: all of the modules to save, and statistics elsewhere."""
    saved = modules_to_save_of(root, config, operation)
    plan = [CopyPlacement(path, module, list(own_tensors(module))) for path, module in saved.items()]
    whole = {id(module) for module in saved.values()}
    plan += plan_statistics(root, config, whole, operation)
    for placement in plan:
        check_copyable(placement.path, placement.module, operation, statistics=id(placement.module) not in whole)
    copied = {id(t) for p in plan for n, t in own_tensors(p.module).items() if n in p.names}
    ties = [
        tensor_key(path, name)
        for path, module in base_modules(root)
        for name, tensor in own_tensors(module).items()
        if id(tensor) in copied and not any(module is p.module and name in p.names for p in plan)
    ]
    if ties:
        warnings.warn(
            f"{operation}: {', '.join(ties)} shared with modules_to_save, and of a module that is not among them;"
            " it stays the base's: name both modules to keep them tied",
            ConvLoRAWarning,
            stacklevel=3,
        )
    return plan


def plan_statistics(
    root: nn.Module, config: AdapterConfig, beside: Container[int], operation: str
) -> list[CopyPlacement]:
    """Copies of running statistics, or that they are frozen, as the config says, but for the modules in `beside`."""
    keeping = [(p, m) for p, m in base_modules(root) if id(m) not in beside and statistics_names(m)]
    if config.norm_statistics == "base":
        if keeping:
            warnings.warn(
                f"{operation}: norm_statistics='base': the statistics of {len(keeping)} modules"
                f" (first: '{keeping[0][0]}') move in train mode, in the base itself, and no adapter has them",
                ConvLoRAWarning,
                stacklevel=4,
            )
        return []
    freezes = config.norm_statistics == "frozen"
    return [CopyPlacement(p, m, [] if freezes else statistics_names(m), freezes=freezes) for p, m in keeping]


def check_copyable(path: str, module: nn.Module, operation: str, *, statistics: bool = False) -> None:
    """Refuse a module of which no copies can be had, before anything is changed."""
    if has_child_name(module):
        raise ConvLoRAError(f"{operation}: '{path}' cannot be copied: it has an attribute named {CHILD!r}")
    if any(nn.parameter.is_lazy(tensor) for tensor in own_tensors(module).values()):
        raise ConvLoRAError(f"{operation}: '{path}' has no shape yet (run one batch through the model first)")
    remedy = "; norm_statistics='base' leaves the statistics in the base" if statistics else ""
    check_adaptable(path, module, operation, remedy)


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


def place_adapter(
    root: nn.Module, plan: Sequence[Placement], copies: Sequence[CopyPlacement], config: AdapterConfig
) -> None:
    """Carry out a checked plan: make all factors and copies, then put them in and freeze the base."""
    made: list[tuple[str, nn.Module, AdapterTensors]] = []
    for p in plan:
        check_adaptable(p.path, p.layer, "inject")
    with torch.inference_mode(False):  # factors are to be trained and switched outside it, too
        for p in plan:
            base = peek_base_tensor(p.layer, "weight")
            try:
                low_rank = LowRank(
                    config, p.spec, rank=p.rank, alpha=p.alpha, device=base.device, factors=p.factors, bias=p.bias,
                    base=base,
                )  # fmt: skip
            except (RuntimeError, TypeError, OverflowError) as error:
                raise ConvLoRAError(f"inject: no factors of rank {p.rank} for '{p.path}' ({error})") from error
            made.append((p.path, p.layer, low_rank))
        shared: dict[int, Tensor] = {}  # tied tensors stay tied
        for c in copies:
            tensors = {n: copied(c.module, n, shared, (c.values or {}).get(n)) for n in c.names}
            held = TensorCopies(config, tensors, freezes=c.freezes, trained=c.values is not None)
            made.append((c.path, c.module, held))
    entries: list[nn.Module] = [entry for _, _, entry in made]
    for entry in entries:
        if isinstance(entry, TensorCopies):
            entry.adapter_modules = entries
    freeze_base(root)
    record_places(root, config.name, {path: entry for path, _, entry in made})
    for _, module, adapter_tensors in made:
        adapt(module, config.name, adapter_tensors)


def check_adaptable(path: str, layer: nn.Module, operation: str, remedy: str = "") -> None:
    """Make the class that a layer is to get, before anything is changed: a class may refuse to be subclassed."""
    try:
        layer, _ = home_of(layer, "weight")
        if not isinstance(layer, Adapted):
            adapted_class(type(layer))
    except Exception as error:
        kind = type(layer).__name__
        raise ConvLoRAError(
            f"{operation}: '{path}' cannot be adapted: {kind} cannot be subclassed ({error!r}){remedy}"
        ) from error


def named_targets(config: AdapterConfig, selected: Sequence[str], root: nn.Module) -> AdapterConfig:
    """The config with classes and callables replaced by the names of the layers selected: plain data."""
    saved: Sequence[Target] = config.modules_to_save  # type: ignore[assignment]
    if not all(isinstance(target, str) for target in saved):
        chosen = select_modules(root, saved, "inject", "modules_to_save")
        config = config.replace(modules_to_save=tuple(f"re:{re.escape(name)}" for name in chosen))
    if all(isinstance(target, str) for target in (*config.targets, *config.exclude)):  # type: ignore[misc]
        return config
    names = [name for name, _ in named_layers(root)]
    tails = Counter(".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1))
    exact = [
        name if tails[name] == 1 and not any(c in name for c in "*?[") and not name.startswith("re:")
        else f"re:{re.escape(name)}"
        for name in selected
    ]  # fmt: skip
    return config.replace(targets=tuple(exact), exclude=())


def remove(model: M, name: str | None = None, *, norms: str = "bake") -> M:
    """Take adapters out: all, or the named one. A layer left with none is exactly what it was before `inject`.

    If the model is merged, the merged weights stay in the plain layers. A Parameter shared with another layer is
    then untied (with a warning), since it could not hold both.

    Args:
        norms: of a merged model, what becomes of a weight that its layer computes. "bake": the weight or spectral
            norm is baked in (with a warning), the mask of `torch.nn.utils.prune` goes and leaves its zeros. "keep":
            the norm stays, with `v = W` and `g = ‖W‖`, so the original keys load; so do masks, and parametrizations
            whose `right_inverse` gives the merged weight exactly.

    Raises:
        ConvLoRAError: no such adapter; one of several adapters of a merged model; a wrapped model (DDP, FSDP); a
            layer that a parametrization was put on after `inject`; a norm that is to be kept and cannot give the
            merged values (a spectral norm; a weight norm in half precision). The model is unchanged then.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> type(remove(model)[0]).__name__
        'Conv2d'
    """
    if norms not in ("bake", "keep"):
        raise ConvLoRAError(f"remove: norms (={norms!r}) must be 'bake' or 'keep'")
    refuse_wrapped(model, "remove")
    root = unwrap_model(model, "remove")
    if name is None and not adapters(root) and (is_frozen(root) or departed_modules(root)):
        thaw_base(root, [])  # the adapters went with a part of the model, `remove(model.body)`
        forget_places(root, None)
        return model
    require_adapters(root, "remove", [name] if name is not None else [])
    refuse_stacked(root, "remove")
    modules = list(adapted_modules(root).values())
    merged = [module for module in modules if slot_of(module).merged]
    going = {module: [n for n in slot_of(module).names() if name in (None, n)] for module in modules}
    if merged and name is not None and len(adapters(root)) > 1:
        raise ConvLoRAError(f"remove: {name!r} is one of several merged adapters; unmerge first")
    bake = plan_baking(root, merged, norms)  # of all of its adapters, or it would have been refused
    for module, names in going.items():
        for n in names:
            vacate_place(slot_of(module).entry(n))
            release(module, n)
    forget_places(root, name)
    for step in bake:
        step()
    thaw_base(root, [module for module in modules if not isinstance(module, Adapted)])
    return model


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
