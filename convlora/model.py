"""The verbs on a model: inject, remove, activate, merge, unmerge. All work in place and return the model."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from convlora.config import AdapterConfig, Targets
from convlora.conv import is_finite
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.factors import WeightSpec, get_factors
from convlora.layer import (
    Adapted,
    LowRank,
    Slot,
    adapt,
    is_stacked,
    raw,
    release,
    slot_of,
    weight_spec,
)
from convlora.targets import describe, per_layer, select

M = TypeVar("M", bound=nn.Module)
Names = str | Iterable[str] | Mapping[str, float]

_FROZEN = "_convlora_frozen"  # on a module while adapters are there: the parameters that inject froze


# --- looking ----------------------------------------------------------------------------------------------------


def unwrap(model: Any, operation: str) -> nn.Module:
    """The module inside `torch.compile`, DDP and DataParallel wrappers: names are those of the bare model."""
    if not isinstance(model, nn.Module):
        raise ConvLoRAError(f"{operation}: expected an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule
            model = model._modules["_orig_mod"]
        else:
            return model  # type: ignore[no-any-return]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layer name -> adapted layer, each once, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def slots(model: nn.Module) -> list[Slot]:
    return [slot_of(module) for module in model.modules() if isinstance(module, Adapted)]


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """`{name: AdapterConfig}` of what is injected, in order of injection; empty for a plain model.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> adapters(model)["default"].rank
        2
    """
    found = slots(unwrap(model, "adapters"))
    return {name: slot.low_rank(name).config for slot in found for name in slot.names()}


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable adapter parameters, of all adapters or of one.

    Raises:
        ConvLoRAError: the model has no adapter, or none of that name.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> [tuple(p.shape) for p in parameters(model)]
        [(6, 9), (24, 6)]
    """
    found = slots(_with_adapters(model, "parameters", [name] if name is not None else []))
    chosen = (slot.low_rank(n) for slot in found for n in slot.names() if name in (None, n))
    return [p for low_rank in chosen for p in low_rank.parameters() if p.requires_grad]


def only_name(model: nn.Module, name: str | None, operation: str) -> str:
    """The adapter that a call means: the named one, or the only one."""
    known = adapters(_with_adapters(model, operation, [name] if name is not None else []))
    if name is None and len(known) > 1:
        raise ConvLoRAError(f"{operation}: the model has adapters {sorted(known)}; say which by name=")
    return next(iter(known)) if name is None else name


def _with_adapters(model: nn.Module, operation: str, names: Iterable[str] = ()) -> nn.Module:
    root = unwrap(model, operation)
    known = adapters(root)
    if not known:
        raise ConvLoRAError(f"{operation}: the model has no adapters; inject or load one first")
    for name in names:
        if name not in known:
            raise ConvLoRAError(f"{operation}: no adapter {name!r}; the model has {sorted(known)}")
    return root


# --- inject and remove ------------------------------------------------------------------------------------------


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
        >>> tuple(model[0].weight.shape), len(parameters(model))
        ((8, 3, 3, 3), 2)
    """
    if config is None:
        if targets is None:
            raise ConvLoRAError("inject: targets is missing; name layers, for example targets=['body.*']")
        config = AdapterConfig(
            targets=targets, rank=rank, alpha=alpha, factors=factors, name=name, exclude=exclude, ranks=ranks,
            alphas=alphas, rank_scaling=rank_scaling, init=init, bias=bias, rank_dropout=rank_dropout,
        )  # fmt: skip
    elif targets is not None:
        raise ConvLoRAError("inject: give targets or config, not both")
    root = check_injectable(model, config, "inject")
    layers, idle = select(root, config.targets, config.exclude, "inject")  # type: ignore[arg-type]
    for target in idle:
        warnings.warn(f"inject: exclude {describe(target)} matches no layer", ConvLoRAWarning, stacklevel=2)
    layer_ranks = per_layer(config.ranks, config.rank, layers, "inject", "ranks")
    layer_alphas = per_layer(config.alphas, config.alpha, layers, "inject", "alphas")
    plan = []
    for path, layer in layers.items():
        r, a = layer_ranks[path], layer_alphas[path]
        if r > 0:
            has_bias = config.bias and raw(layer, "bias") is not None
            plan.append(Placement(path, layer, weight_spec(layer), r, float(r if a is None else a), has_bias))
    if not plan:
        raise ConvLoRAError("inject: every selected layer has rank 0; give one of them a rank of at least 1")
    if config.bias and not any(placement.bias for placement in plan):
        raise ConvLoRAError(f"inject: bias=True, but none of the {len(plan)} layers has a bias")
    _warn_oversized(plan, config)
    place(root, plan, named_targets(config, list(layers)))
    return model


def check_injectable(model: Any, config: AdapterConfig, operation: str) -> nn.Module:
    """The bare model if an adapter of this config can go in; raises otherwise."""
    _refuse_wrapped(model, operation)
    root = unwrap(model, operation)
    if config.init not in (inits := get_factors(config.factors).inits):
        raise ConvLoRAError(f"{operation}: {config.factors!r} has no init {config.init!r}; it has {', '.join(inits)}")
    if config.name in (known := adapters(root)):
        raise ConvLoRAError(
            f"{operation}: adapter {config.name!r} is there already (of {sorted(known)}); remove it or use another name"
        )
    if any(slot.merged for slot in slots(root)):
        raise ConvLoRAError(f"{operation}: the model is merged; unmerge it first")
    _refuse_stacked(root, operation)
    return root


def place(root: nn.Module, plan: Sequence[Placement], config: AdapterConfig) -> None:
    """Carry out a checked plan: make all factors, then put them in and freeze the base."""
    made = []
    for p in plan:
        device = raw(p.layer, "weight").device
        made.append(LowRank(config, p.spec, rank=p.rank, alpha=p.alpha, device=device, factors=p.factors, bias=p.bias))
    _freeze(root)
    for p, low_rank in zip(plan, made, strict=True):
        adapt(p.layer, config.name, low_rank)


def named_targets(config: AdapterConfig, selected: Sequence[str]) -> AdapterConfig:
    """The config with classes and callables replaced by the names of the layers selected: plain data."""
    if all(isinstance(target, str) for target in (*config.targets, *config.exclude)):  # type: ignore[misc]
        return config
    return config.replace(targets=tuple(selected), exclude=())


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
    _refuse_wrapped(model, "remove")
    root = _with_adapters(model, "remove", [name] if name is not None else [])
    _refuse_stacked(root, "remove")
    layers = list(adapted_layers(root).values())
    merged = [layer for layer in layers if slot_of(layer).merged]
    going = {layer: [n for n in slot_of(layer).names() if name in (None, n)] for layer in layers}
    if any(going[layer] and going[layer] != slot_of(layer).names() for layer in merged):
        raise ConvLoRAError(f"remove: {name!r} is one of several merged adapters; unmerge first")
    bake = _plan_baking(root, [layer for layer in merged if going[layer]])
    for layer, names in going.items():
        for n in names:
            release(layer, n)
    for step in bake:
        step()
    _thaw(root, [layer for layer, names in going.items() if names and not isinstance(layer, Adapted)])
    return model


def _freeze(root: nn.Module) -> None:
    trainable = {
        id(p) for m in root.modules() if not isinstance(m, LowRank) for p in _own(m).values() if p.requires_grad
    }
    for module in root.modules():
        if isinstance(module, LowRank):
            continue
        names = [name for name, p in _own(module).items() if id(p) in trainable]
        if names:
            module.__dict__[_FROZEN] = tuple(dict.fromkeys((*module.__dict__.get(_FROZEN, ()), *names)))
            for name in names:
                _own(module)[name].requires_grad_(False)


def _thaw(root: nn.Module, released: Iterable[nn.Module]) -> None:
    """Make trainable again what `inject` froze: everything with the last adapter, else the released layers."""
    held = {id(p) for layer in adapted_layers(root).values() for p in _own(layer).values()}
    for module in list(root.modules()) if not adapted_layers(root) else released:
        for name in module.__dict__.pop(_FROZEN, ()):
            p = module._parameters.get(name)
            if p is not None and id(p) not in held:
                p.requires_grad_(True)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _refuse_wrapped(model: Any, operation: str) -> None:
    if not isinstance(model, nn.Module):
        return
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.parallel.DistributedDataParallel) or kind == "FullyShardedDataParallel":
            raise ConvLoRAError(f"{operation}: the model is wrapped in {kind}; {operation} before wrapping")
        if any(type(p).__name__ == "DTensor" for p in module._parameters.values()):
            raise ConvLoRAError(f"{operation}: the model is sharded (DTensor); {operation} before fully_shard")


def _refuse_stacked(root: nn.Module, operation: str) -> None:
    for path, layer in adapted_layers(root).items():
        if is_stacked(layer):
            raise ConvLoRAError(
                f"{operation}: '{path}' was parametrized after inject ({type(layer).__name__});"
                " remove that parametrization first"
            )


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


# --- which adapters act -----------------------------------------------------------------------------------------


def activate(model: M, names: Names) -> M:
    """Say which adapters act: a name, a list, or `{name: strength}`; `[]` switches all off.

    Strengths add up: ΔW = Σ strength·scale·ΔWᵢ. A merged model stays merged, with the new weights.

    Raises:
        ConvLoRAError: no such adapter, or a strength that is no finite number. Nothing is changed then.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1, name="rain")
        >>> _ = activate(model, {"rain": 0.5})
    """
    strengths = _strengths(names, "activate")
    for slot in slots(_with_adapters(model, "activate", strengths)):
        slot.activate(strengths)
    return model


@contextlib.contextmanager
def disabled(model: M) -> Iterator[M]:
    """Switch all adapters off inside the block; the former state comes back, also after an exception.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> with disabled(model):
        ...     model[0].weight is dict(model.named_parameters())["0.weight"]
        True
    """
    with _restored(_with_adapters(model, "disabled")):
        activate(model, [])
        yield model


def _strengths(names: Names, operation: str) -> dict[str, float]:
    if isinstance(names, str):
        names = [names]
    try:
        pairs = names.items() if isinstance(names, Mapping) else ((name, 1.0) for name in names)
        strengths = dict(pairs)
    except TypeError:
        raise ConvLoRAError(
            f"{operation}: expected a name, a list of names or {{name: strength}}, got {names!r}"
        ) from None
    for name, strength in strengths.items():
        if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not math.isfinite(strength):
            raise ConvLoRAError(f"{operation}: strength of {name!r} (={strength!r}) must be a finite number")
    return {name: float(strength) for name, strength in strengths.items()}


@contextlib.contextmanager
def _restored(root: nn.Module) -> Iterator[None]:
    before = [(slot, slot.state()) for slot in slots(root)]
    try:
        yield
    finally:
        for slot, state in before:
            slot.restore(state)


# --- merge and unmerge ------------------------------------------------------------------------------------------


def merge(model: M, names: Names | None = None, *, check_finite: bool = True) -> M:
    """From now on each layer computes with one fused weight, formed from the active (or the named) adapters.

    The fused weight lies beside the base Parameter, which is never written: `state_dict()` stays the same, and
    `unmerge` is exact in every dtype. While merged, no gradient reaches the factors.

    Raises:
        ConvLoRAError: no such adapter, or a fused weight with a non-finite value (`check_finite`), naming the
            layers. The model is unchanged then.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> merge(model)[0].weight.requires_grad
        False
    """
    strengths = None if names is None else _strengths(names, "merge")
    root = _with_adapters(model, "merge", strengths or ())
    _refuse_stacked(root, "merge")
    before = [(slot, slot.state()) for slot in slots(root)]
    bad = []
    for path, layer in adapted_layers(root).items():
        slot_of(layer).merge(strengths)
        for kind in ("weight", "bias"):
            value = getattr(layer, kind)
            if check_finite and value is not None and not is_finite(value):
                bad.append(f"'{path}.{kind}'")
    if bad:
        for slot, state in before:
            slot.restore(state)
        raise ConvLoRAError(f"merge: non-finite values in {', '.join(bad)}; check the adapter, or check_finite=False")
    return model


def unmerge(model: M) -> M:
    """Compute with base and adapters apart again, bitwise as before `merge`.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> unmerge(merge(model))[0].weight.requires_grad
        True
    """
    for slot in slots(_with_adapters(model, "unmerge")):
        slot.unmerge()
    return model


@contextlib.contextmanager
def merged(model: M) -> Iterator[M]:
    """Merge inside the block; the former state comes back, also after an exception.

    Example:
        >>> import torch
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> with merged(model):
        ...     y = model(torch.ones(1, 3, 8, 8))
    """
    with _restored(_with_adapters(model, "merged")):
        merge(model)
        yield model


def _plan_baking(root: nn.Module, merged_layers: Sequence[nn.Module]) -> list[Callable[[], None]]:
    """How the merged values get into the plain layers; to be carried out once the layers are plain."""
    owners = Counter(id(p) for module in root.modules() for p in _own(module).values())
    steps: list[Callable[[], None]] = []
    untied = baked = 0
    for layer, kind in itertools.product(merged_layers, ("weight", "bias")):
        base, value = raw(layer, kind), getattr(layer, kind)
        if base is value or value is None:
            continue
        value = value.detach()
        if kind not in layer._parameters:
            steps.append(_bare(layer, kind, value))
            baked += 1
        elif owners[id(base)] > 1:
            steps.append(_set(layer, kind, value, base.requires_grad))
            untied += 1
        else:
            steps.append(_assign(base, value))
    if untied:
        warnings.warn(
            f"remove: {untied} shared Parameters were untied to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    if baked:
        warnings.warn(
            f"remove: the norm of {baked} weights was baked in to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    return steps


def _bare(layer: nn.Module, kind: str, value: Tensor) -> Callable[[], None]:
    """A step that takes a norm off a computed weight and leaves a plain Parameter with a value."""
    hooks = {
        type(hook).__name__: hook for hook in layer._forward_pre_hooks.values() if getattr(hook, "name", "") == kind
    }

    def step() -> None:
        if "WeightNorm" in hooks:
            nn.utils.remove_weight_norm(layer, kind)
        elif "SpectralNorm" in hooks:
            nn.utils.remove_spectral_norm(layer, kind)
        else:
            parametrize.remove_parametrizations(layer, kind, leave_parametrized=True)
        layer._parameters[kind] = nn.Parameter(value)

    if not (hooks.keys() & {"WeightNorm", "SpectralNorm"} or parametrize.is_parametrized(layer, kind)):
        raise ConvLoRAError(f"remove: {type(layer).__name__} computes its {kind} in an unknown way; unmerge first")
    return step


def _set(layer: nn.Module, kind: str, value: Tensor, requires_grad: bool) -> Callable[[], None]:
    def step() -> None:
        layer._parameters[kind] = nn.Parameter(value, requires_grad)

    return step


def _assign(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    def step() -> None:
        parameter.data = value  # new memory: a state dict taken earlier keeps the base

    return step
