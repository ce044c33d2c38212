"""Between adapters and bare checkpoints: what is behind `Adapter.apply_to` and `Adapter.extract`."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from convlora.adapter.algebra import alpha_of_scale_one, assemble, factorization_with
from convlora.adapter.fingerprint import base_fingerprint
from convlora.adapter.parts import (
    BIAS_DELTA,
    AdapterParts,
    LayerFactors,
    at_least_float32,
    base_key,
    layer_delta,
    tensor_key,
)
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import PROJECTIONS, WeightSpec
from convlora.factors.fuse import fuse_weight, fuse_weight_exactly, is_finite, mixture
from convlora.factors.svd import rank_chooser
from convlora.support.progress import counted_steps

OPERATION = "Adapter.extract"
A = TypeVar("A", bound=AdapterParts)


def apply_adapters(
    strengths: Sequence[tuple[AdapterParts, float]], state_dict: Mapping[str, Any], exact: bool = False
) -> dict[str, Any]:
    """See `Adapter.apply_to`; of several adapters the updates are summed before the one rounding, as in a model."""
    if not isinstance(state_dict, Mapping):
        raise ConvLoRAError(f"Adapter.apply_to: expected a state dict, got {type(state_dict).__name__}")
    copies = {  # a module of several paths is one layer
        base_key(alias, kind, state_dict, layer.spec): base_key(path, kind, state_dict, layer.spec)
        for adapter, _ in strengths
        for path, layer in adapter.layers.items()
        for kind in _kinds(layer)
        for alias in layer.aliases
    }
    changes: dict[str, dict[int, tuple[AdapterParts, LayerFactors, float]]] = {}
    for number, (adapter, strength) in enumerate(strengths):
        if not is_number(strength):
            raise ConvLoRAError(f"Adapter.apply_to: strength (={strength!r}) must be a finite number")
        state_dict_misfits(adapter, state_dict).raise_if_any("Adapter.apply_to")
        for path, layer in adapter.layers.items():
            for kind in _kinds(layer):
                name = base_key(path, kind, state_dict, layer.spec)
                name = copies.get(name, name)
                changes.setdefault(name, {}).setdefault(number, (adapter, layer, strength))
    problems = Problems()
    merged: dict[str, Tensor] = {}
    mixed = _copies(strengths)
    for name in counted_steps(dict.fromkeys([*changes, *mixed])):
        base: Any = state_dict.get(name)
        parts, owned = changes.get(name, {}), mixed.get(name, [])
        if owned and (not owned[-1][0].is_floating_point() or (len(owned) == 1 and not parts and owned[0][1] == 1)):
            whole = owned[-1][0]
            merged[name] = whole.clone() if base is None else whole.to(base.device, base.dtype, copy=True)
        elif owned and (base is None or any(copy.shape != base.shape for copy, _ in owned)):
            problems.mismatched.append(f"{name} has another shape than the base's: a copy acts at strength 1 and alone")
            continue
        else:
            updates = [_change(name, *part, exact).to(base.device) for part in parts.values()]
            stored = [(copy.to(base.device, base.dtype), share) for copy, share in owned]
            start, mixed_in = mixture(base.detach(), stored, exact)
            merged[name] = (fuse_weight_exactly if exact else fuse_weight)(start, [*updates, *mixed_in])
        if merged[name].is_floating_point() and not is_finite(merged[name]):
            problems.non_finite.append(name)
    problems.raise_if_any("Adapter.apply_to")
    merged.update({alias: merged[name] for alias, name in copies.items()})
    result = OrderedDict((name, merged.get(name, value)) for name, value in state_dict.items())
    result.update({name: value for name, value in merged.items() if name not in result})  # a bias that the base lacks
    if hasattr(state_dict, "_metadata"):  # the versions of torch's modules
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return result


def _copies(strengths: Sequence[tuple[AdapterParts, float]]) -> dict[str, list[tuple[Tensor, float]]]:
    """Entry of a checkpoint -> the copies that take its place, by strength."""
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for adapter, strength in strengths:
        for path, tensors in adapter.modules.items() if strength else ():
            for name, copy in tensors.items():
                found.setdefault(tensor_key(path, name), []).append((copy, strength))
    return found


def state_dict_misfits(adapter: AdapterParts, state_dict: Mapping[str, Any]) -> Problems:
    """What a state dict lacks for an adapter, and what it has in another shape or dtype."""
    problems = Problems()
    for path, layer in adapter.layers.items():
        for kind in _kinds(layer):
            name = base_key(path, kind, state_dict, layer.spec)
            shape = layer.spec.shape if kind == "weight" else (layer.spec.out_channels,)
            base = state_dict.get(name)
            if not isinstance(base, Tensor):
                problems.missing.append(name)
            elif tuple(base.shape) != shape:
                problems.mismatched.append(f"{name} {tuple(base.shape)} instead of {shape}")
            elif not base.is_floating_point() or base.element_size() < 2:
                problems.mismatched.append(f"{name} {base.dtype} instead of floating point of at least 16 bits")
    for path, tensors in adapter.modules.items():
        entries = {tensor_key(path, name): copy for name, copy in tensors.items()}
        if not entries.keys() & state_dict.keys():
            problems.missing += entries
        for name, copy in entries.items():
            base = state_dict.get(name)
            if isinstance(base, Tensor) and base.dim() != copy.dim():
                problems.mismatched.append(f"{name} {tuple(base.shape)} instead of {tuple(copy.shape)}")
    return problems


def _kinds(layer: LayerFactors) -> tuple[str, ...]:
    return ("weight", "bias") if BIAS_DELTA in layer.tensors else ("weight",)


def _change(name: str, adapter: AdapterParts, layer: LayerFactors, strength: float, exact: bool) -> Tensor:
    if name.endswith("weight"):
        return layer_delta(adapter.config, layer, strength, exact)
    return (layer.tensors[BIAS_DELTA].double() if exact else at_least_float32(layer.tensors[BIAS_DELTA])) * strength


def extract_adapter(
    make: type[A],
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    rank: int | None,
    energy: float | None,
    factors: str,
    name: str,
    specs: Mapping[str, WeightSpec] | None,
) -> A:
    """See `Adapter.extract`."""
    choose = rank_chooser(OPERATION, rank, energy)
    factorization = factorization_with(factors, "fit", OPERATION)
    config = AdapterConfig(targets="*", factors=factors, name=name)
    differing, left_out = _compare(base, tuned)
    layers, errors = {}, {}
    for path, spec in counted_steps(_layers(base, tuned, differing, specs or {}).items()):
        weight, bias = (base_key(path, kind, base, spec) for kind in ("weight", "bias"))
        fit = factorization.fit(spec.to_convolution(_difference(base, tuned, weight)), spec, choose)
        tensors = dict(fit.factors)
        if bias in differing and tuple(base[bias].shape) == (spec.out_channels,):
            tensors[BIAS_DELTA] = _difference(base, tuned, bias)
        dtype = torch.float64 if base[weight].dtype == tuned[weight].dtype == torch.float64 else torch.float32
        tensors = {n: t.to("cpu", dtype) for n, t in tensors.items()}
        layers[path] = LayerFactors(tensors, spec, fit.rank, alpha_of_scale_one(config, fit.rank))
        errors[path] = fit.error
        differing -= {weight, bias} if BIAS_DELTA in tensors else {weight}
    if not layers:
        raise ConvLoRAError(f"{OPERATION}: no weight of two or more dimensions, nor its bias, differs")
    if left_out or differing:
        names = ", ".join(sorted(map(str, {*left_out, *differing})))
        warnings.warn(
            f"{OPERATION}: these differ, and an adapter cannot express it: {names}", ConvLoRAWarning, stacklevel=3
        )
    return assemble(
        make,
        config,
        layers,
        fingerprint=base_fingerprint({p: base[base_key(p, "weight", base, layers[p].spec)] for p in layers}),
        errors=errors,
    )


def _compare(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The tensors of one shape whose values differ, and all else that does."""
    for state_dict in (base, tuned):
        if not isinstance(state_dict, Mapping):
            raise ConvLoRAError(f"{OPERATION}: expected two state dicts, got {type(state_dict).__name__}")
    differing = set()
    left_out = {name for name in set(base) ^ set(tuned) if isinstance(base.get(name, tuned.get(name)), Tensor)}
    for name in set(base) & set(tuned):
        one, other = base[name], tuned[name]
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.is_meta or other.is_meta:
                raise ConvLoRAError(f"{OPERATION}: '{name}' has no values yet (meta device)")
            if one.shape != other.shape:
                left_out.add(name)
            elif not _same(one, other):
                differing.add(name)
    return differing, left_out


def _same(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(one.device, wide))


def _layers(
    base: Mapping[str, Any], tuned: Mapping[str, Any], differing: set[str], specs: Mapping[str, WeightSpec]
) -> dict[str, WeightSpec]:
    """Layer path -> its weight, for each layer whose weight or bias differs, in the order of the checkpoint."""
    problems = Problems()
    layers = {}
    for name, weight in base.items():
        path = layer_of_weight(str(name))
        if path is None or not is_layer_weight(weight) or not is_layer_weight(tuned.get(name)):
            continue
        comparable = weight.shape == tuned[name].shape
        if name in differing or (comparable and base_key(path, "bias", base) in differing):
            layers[path] = specs.get(path) or guess_spec_of(path, base)
            if layers[path].shape != tuple(weight.shape):
                problems.mismatched.append(f"{name} {tuple(weight.shape)} instead of {layers[path].shape}")
    problems.missing += [
        base_key(path, "weight", base, spec)
        for path, spec in specs.items()
        if not isinstance(base.get(base_key(path, "weight", base, spec)), Tensor)
    ]
    problems.raise_if_any(OPERATION)
    return layers


def _difference(base: Mapping[str, Any], tuned: Mapping[str, Any], name: str) -> Tensor:
    difference: Tensor = tuned[name].detach().double() - base[name].detach().to(tuned[name].device).double()
    if not bool(difference.isfinite().all()):
        raise ConvLoRAError(f"{OPERATION}: non-finite: {name}")
    return difference


# --- the weights of a bare checkpoint, as `WeightSpec`s


def specs_from_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, WeightSpec]:
    """Layer path -> weight, for every floating `.weight` of two or more dimensions, in the order of the checkpoint.

    `attn.in_proj_weight` is the weight of the layer `attn.in_proj`, and so on for the other projections of attention. A
    bare checkpoint tells neither groups nor transposed layers: see `guess_spec`.

    Example:
        >>> from torch import nn
        >>> specs_from_checkpoint(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).state_dict())
        {'0': WeightSpec(shape=(8, 4, 3, 3), groups=1, transposed=False)}
    """
    if not isinstance(state_dict, Mapping):
        raise ConvLoRAError(f"specs_from_checkpoint: expected a state dict, got {type(state_dict).__name__}")
    specs = {}
    for name, weight in state_dict.items():
        path = layer_of_weight(str(name))
        if path is not None and is_layer_weight(weight):
            specs[path] = guess_spec_of(path, state_dict)
    return specs


def layer_of_weight(name: str) -> str | None:
    """The path of the layer whose weight an entry of a checkpoint is, by its name; None if it is none.

    Example:
        >>> layer_of_weight("body.0.weight"), layer_of_weight("attn.in_proj_weight"), layer_of_weight("body.0.bias")
        ('body.0', 'attn.in_proj', None)
    """
    path, _, last = name.rpartition(".")
    if last == "weight":
        return path
    projection = last.removesuffix("_weight")
    return tensor_key(path, projection) if last != projection and projection in PROJECTIONS else None


def guess_spec_of(path: str, state_dict: Mapping[str, Any]) -> WeightSpec:
    """What a checkpoint that has the weight of a layer tells of it."""
    weight = base_key(path, "weight", state_dict)
    spec = guess_spec(tuple(state_dict[weight].shape), state_dict.get(base_key(path, "bias", state_dict)))
    return replace(spec, in_parent=weight != tensor_key(path, "weight"))


def is_layer_weight(value: Any) -> bool:
    """Whether an entry of a checkpoint named `weight` can be that of a convolution or Linear.

    Example:
        >>> import torch
        >>> is_layer_weight(torch.zeros(8, 4, 3, 3)), is_layer_weight(torch.zeros(8)), is_layer_weight(None)
        (True, False, False)
    """
    return isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point() and value.numel() > 0


def guess_spec(shape: tuple[int, ...], bias: Any) -> WeightSpec:
    """groups=1, but for a bias that has the length of a transposed convolution's `(in, out/groups, *kernel)` alone.

    Example:
        >>> import torch
        >>> guess_spec((8, 4, 2, 2), torch.zeros(4))
        WeightSpec(shape=(8, 4, 2, 2), groups=1, transposed=True)
    """
    length = bias.numel() if isinstance(bias, Tensor) else shape[0]
    groups, rest = divmod(length, shape[1])
    if length == shape[0] or len(shape) < 3 or rest or not groups or shape[0] % groups:
        return WeightSpec(shape)
    return WeightSpec(shape, groups, transposed=True)
