"""An adapter out of a training checkpoint that holds everything: what is behind `Adapter.from_state_dict`."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from convlora.adapter.checkpoint import is_layer_weight, layer_of_weight
from convlora.adapter.fingerprint import base_fingerprint
from convlora.adapter.parts import BIAS_DELTA, AdapterParts, LayerFactors, base_key, base_keys, is_statistic, tensor_key
from convlora.config import CHILD, AdapterConfig
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import Factorization, WeightSpec, get_factors
from convlora.support.patterns import checked_match, value_of_layer

OPERATION = "Adapter.from_state_dict"
A = TypeVar("A", bound=AdapterParts)

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, DDP and AveragedModel; torch.compile
_SCALE = "lora_scale"  # beside the factors, where a checkpoint states it
# Where a layer keeps its weight, or that from which a norm, a pruning or a parametrization computes it.
_WEIGHTS = ("{}", "{}_v", "{}_orig", "parametrizations.{}.original", "parametrizations.{}.original1")

Entries = dict[str, dict[str, Tensor]]  # module path -> tensor name -> values


class TrainingState(NamedTuple):
    """A state dict taken apart: the base's entries, those of each adapter, and what torch notes beside."""

    base: dict[str, Any]
    adapters: dict[str, Entries]
    metadata: dict[str, Mapping[str, Any]]


def adapter_from_state_dict(
    make: type[A], state_dict: Mapping[str, Any], config: AdapterConfig, specs: Mapping[str, WeightSpec] | None
) -> A:
    """See `Adapter.from_state_dict`."""
    if not isinstance(state_dict, Mapping) or not isinstance(config, AdapterConfig):
        raise ConvLoRAError(
            f"{OPERATION}: expected a state dict and an AdapterConfig,"
            f" got {type(state_dict).__name__} and {type(config).__name__}"
        )
    state = take_apart(state_dict)
    if not state.adapters:
        nested = [str(key) for key, value in state_dict.items() if isinstance(value, Mapping)]
        inner = f"; the state dict may be in {', '.join(map(repr, nested))}" if nested else ""
        raise ConvLoRAError(f"{OPERATION}: no key is '<layer>.{CHILD}.<adapter>.<tensor>'{inner}")
    if config.name not in state.adapters:
        known = sorted(state.adapters)
        raise ConvLoRAError(f"{OPERATION}: no adapter {config.name!r} in the state dict; it has {known}")
    problems = Problems()
    entries = {
        path: {name: _values(value, path, problems) for name, value in tensors.items()}
        for path, tensors in state.adapters[config.name].items()
    }
    problems.raise_if_any(OPERATION)
    copied = {p for p, tensors in entries.items() if any(tensor_key(p, name) in state.base for name in tensors)}
    layers = _layers({p: t for p, t in entries.items() if p not in copied}, state, config, specs or {}, problems)
    _check_targets({p for p in entries if p not in copied}, copied, state.base, config, problems)
    modules = _modules({p: t for p, t in entries.items() if p in copied}, state, config, problems)
    problems.raise_if_any(OPERATION)
    weights = {path: state.base.get(base_key(path, "weight", state.base)) for path in layers}
    known_base = {path: weight for path, weight in weights.items() if isinstance(weight, Tensor)}
    fingerprint = base_fingerprint(known_base) if len(known_base) == len(weights) else None
    return make(_as_plain_data(config, layers, modules), layers, fingerprint, modules=modules)


def take_apart(state_dict: Mapping[str, Any]) -> TrainingState:
    """The entries of a state dict by the names of the bare model.

    Example:
        >>> import torch
        >>> state = take_apart({"module.0.weight": 1, "module.0.convlora.rain.lora_A": 2, "n_averaged": 3})
        >>> state.base, state.adapters
        ({'0.weight': 1}, {'rain': {'0': {'lora_A': 2}}})
    """
    ours = [key for key in map(str, state_dict) if f".{CHILD}." in f".{key}"]
    prefix = ""
    while ours and (found := [w for w in _WRAPPERS if all(key.startswith(prefix + w) for key in ours)]):
        prefix += found[0]
    base: dict[str, Any] = {}
    adapters: dict[str, Entries] = {}
    for key, value in state_dict.items():
        if not str(key).startswith(prefix):
            continue
        inner = str(key)[len(prefix) :]
        path, mark, rest = f".{inner}".rpartition(f".{CHILD}.")
        name, _, tensor = rest.partition(".")
        if mark and tensor:
            adapters.setdefault(name, {}).setdefault(path[1:], {})[tensor] = value
        else:
            base[inner] = value
    metadata: dict[str, Mapping[str, Any]] = {}
    for key, noted in getattr(state_dict, "_metadata", {}).items():
        bare = re.sub(f"^({'|'.join(map(re.escape, _WRAPPERS))})+", "", key)  # trainers take prefixes off keys alone
        for name in (key.removeprefix(prefix), bare):
            metadata.setdefault(name, noted)
    return TrainingState(base, adapters, metadata)


def _values(value: Any, path: str, problems: Problems) -> Tensor:
    plain = isinstance(value, Tensor) and type(value).__name__ != "DTensor" and not value.is_meta
    if not plain:
        problems.mismatched.append(f"{path} has {type(value).__name__}s, not whole tensors with values")
        return value  # type: ignore[no-any-return]
    return value.detach().to("cpu", copy=True)  # type: ignore[no-any-return]


# --- factors


def _layers(
    entries: Entries,
    state: TrainingState,
    config: AdapterConfig,
    specs: Mapping[str, WeightSpec],
    problems: Problems,
) -> dict[str, LayerFactors]:
    factorization = get_factors(config.factors)
    layers: dict[str, LayerFactors] = {}
    unclear = []
    for first, (path, *aliases) in _first_names(entries, state.adapters[config.name]).items():
        weight, in_parent = _held_weight(path, state.base)
        if not isinstance(weight, Tensor):
            problems.missing.append(tensor_key(path, "weight"))
            continue
        rank = value_of_layer(config.ranks, config.rank, first, OPERATION)
        given = value_of_layer(config.alphas, config.alpha, first, OPERATION)
        alpha = float(rank if given is None else given)
        tensors = {name: tensor for name, tensor in entries[path].items() if name != _SCALE}
        stated = entries[path].get(_SCALE)
        if rank and stated is not None and not math.isclose(stated, config.scale(rank, alpha), rel_tol=0.01):
            scale = config.scale(rank, alpha)
            problems.mismatched.append(f"{path} has scale {float(stated):g}, by the config {scale:g}")
        noted = state.metadata.get(tensor_key(path, f"{CHILD}.{config.name}"), {})
        fits = _fitting_specs(path, weight, tensors, state.base, factorization, rank, config, problems)
        known = specs.get(path) or _noted_spec(weight, noted)
        if known is not None and fits and known not in fits:
            problems.mismatched.append(f"{path} has factors of another layer than {known}")
        elif fits:
            unclear += [path] if known is None and len({spec.transposed for spec in fits}) > 1 else []
            spec = replace(known or fits[0], in_parent=in_parent)
            layers[path] = LayerFactors(tensors, spec, rank, alpha, tuple(aliases))
        _check_bias(path, tensors, state.base, config, problems)
    if unclear and not problems:
        warnings.warn(
            f"{OPERATION}: {len(unclear)} layers (first: '{unclear[0]}') count as convolutions, and could be transposed"
            " ones by the shapes; specs=convlora.formats.specs_of(model) says which",
            ConvLoRAWarning,
            stacklevel=4,
        )
    return layers


def _held_weight(path: str, base: Mapping[str, Any]) -> tuple[Any, bool]:
    """What a layer's weight is, or is computed from, and whether the module above the layer holds it."""
    for key in base_keys(path, "weight"):
        in_parent = key != tensor_key(path, "weight")
        holder, _, name = key.rpartition(".")
        names = (tensor_key(holder, form.format(name)) for form in _WEIGHTS)
        if (weight := next((base[name] for name in names if base.get(name) is not None), None)) is not None:
            return weight, in_parent
    return None, False


def _first_names(entries: Entries, stored: Entries) -> dict[str, list[str]]:
    """The paths of each layer under its first one: a module of several paths has one memory there."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for path in entries:
        memory = tuple((name, t.data_ptr(), tuple(t.shape)) for name, t in sorted(stored[path].items()))
        found.setdefault(memory, []).append(path)
    return {paths[0]: paths for paths in found.values()}


def _fitting_specs(
    path: str,
    weight: Tensor,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Any],
    factorization: Factorization,
    rank: int,
    config: AdapterConfig,
    problems: Problems,
) -> list[WeightSpec]:
    """What the layer can be by the shapes of its weight, its bias and its factors; the likeliest first."""
    candidates = list(_candidates(tuple(weight.shape), base.get(base_key(path, "bias", base))))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != BIAS_DELTA}
    wanted = [name for spec in candidates[:1] for name in factorization.shapes(spec, max(rank, 1))]
    if absent := [name for name in wanted if name not in shapes]:
        problems.missing += [tensor_key(path, name) for name in absent]
        return []
    if fits := [spec for spec in candidates if rank and factorization.shapes(spec, rank) == shapes]:
        return fits
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for other in range(1, largest + 1):
        if any(factorization.shapes(spec, other) == shapes for spec in candidates):
            problems.mismatched.append(f"{path} has rank {other}, by the config {rank}")
            return []
    problems.mismatched.append(f"{path} has {shapes}, no {config.factors!r} factors of a weight {tuple(weight.shape)}")
    return []


def _candidates(shape: tuple[int, ...], bias: Any) -> Iterator[WeightSpec]:
    if not 2 <= len(shape) <= 5:
        return
    divisors = [g for g in range(1, shape[0] + 1) if shape[0] % g == 0] if len(shape) > 2 else [1]
    for transposed in (False, True)[: len(shape) - 1]:
        for groups in divisors:
            spec = WeightSpec(shape, groups, transposed)
            if not isinstance(bias, Tensor) or bias.numel() == spec.out_channels:
                yield spec


def _noted_spec(weight: Tensor, noted: Mapping[str, Any]) -> WeightSpec | None:
    """What a layer's factors note in the metadata of a state dict, which `torch.save` keeps."""
    if "groups" not in noted or "transposed" not in noted:
        return None
    return WeightSpec(tuple(weight.shape), noted["groups"], bool(noted["transposed"]))


def _check_targets(
    adapted: set[str], copied: set[str], base: Mapping[str, Any], config: AdapterConfig, problems: Problems
) -> None:
    """That the config's targets select the layers that there are, and each of them some; if they are patterns."""
    targets: Any = config.targets
    excludes: Any = config.exclude
    if not all(isinstance(target, str) for target in (*targets, *excludes)):
        return
    if not any(checked_match(target, path, OPERATION) for target in targets for path in adapted):
        problems.unexpected += [f"{path} (the config's targets select another layer)" for path in sorted(adapted)]
    layers = [p for key, w in base.items() if (p := layer_of_weight(str(key))) is not None and is_layer_weight(w)]
    absent = [
        path
        for path in layers
        if path not in adapted | copied
        and value_of_layer(config.ranks, config.rank, path, OPERATION)
        and not any(checked_match(pattern, path, OPERATION) for pattern in excludes)
    ]
    for target in targets:
        if not any(checked_match(target, path, OPERATION) for path in adapted | copied):
            selected = [path for path in absent if checked_match(target, path, OPERATION)]
            problems.missing += [f"{path} (of target '{target}')" for path in selected]


def _check_bias(
    path: str, tensors: Mapping[str, Tensor], base: Mapping[str, Any], config: AdapterConfig, problems: Problems
) -> None:
    has = isinstance(base.get(base_key(path, "bias", base)), Tensor)
    if BIAS_DELTA in tensors and not config.bias:
        problems.unexpected.append(tensor_key(path, BIAS_DELTA))
    elif BIAS_DELTA not in tensors and config.bias and has:
        problems.missing.append(tensor_key(path, BIAS_DELTA))


# --- copies


def _modules(entries: Entries, state: TrainingState, config: AdapterConfig, problems: Problems) -> Entries:
    modules: Entries = {}
    base = state.base
    names = _first_names(entries, state.adapters[config.name]).values()
    saved = {path for paths in names if any(_is_saved(path, config) for path in paths) for path in paths}
    for path, tensors in entries.items():
        own = {key[len(path) + 1 if path else 0 :]: base[key] for key in base if key.rpartition(".")[0] == path}
        moved = all(map(is_statistic, tensors))
        if not moved and path not in saved:
            problems.unexpected += [tensor_key(path, name) for name in tensors]
        wanted = [name for name in own if not moved or is_statistic(name)]
        problems.missing += [tensor_key(path, name) for name in wanted if name not in tensors]
        if not (moved and all(name in own and _equal(tensor, own[name]) for name, tensor in tensors.items())):
            modules[path] = tensors  # a file without statistics that are the base's says the same
    whole = [path for path, tensors in entries.items() if not all(map(is_statistic, tensors))]
    for target in config.modules_to_save:  # type: ignore[union-attr]
        if isinstance(target, str) and not any(_is_at_or_below(path, target) for path in whole):
            problems.missing.append(f"copies of modules_to_save '{target}'")
    return modules


def _equal(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and one.shape == other.shape and bool((one == other.to(one.device)).all())


def _is_saved(path: str, config: AdapterConfig) -> bool:
    """Whether the config saves a module whole; a class or a callable may."""
    targets: Any = config.modules_to_save
    return any(not isinstance(target, str) or _is_at_or_below(path, target) for target in targets)


def _is_at_or_below(path: str, pattern: str) -> bool:
    parts = path.split(".")
    return any(checked_match(pattern, ".".join(parts[:end]), OPERATION) for end in range(len(parts) + 1))


def _as_plain_data(config: AdapterConfig, layers: Mapping[str, Any], modules: Entries) -> AdapterConfig:
    """The config with classes and callables replaced by the names of what they have selected."""
    targets: Any = (*config.targets, *config.exclude)  # type: ignore[misc]
    if not all(isinstance(target, str) for target in targets):
        config = config.replace(targets=tuple(f"re:{re.escape(path)}" for path in layers), exclude=())
    if not all(isinstance(target, str) for target in config.modules_to_save):  # type: ignore[union-attr]
        whole = [path for path, tensors in modules.items() if not all(map(is_statistic, tensors))]
        config = config.replace(modules_to_save=tuple(f"re:{re.escape(path)}" for path in whole))
    return config
