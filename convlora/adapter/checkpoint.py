"""Between adapters and bare checkpoints: what is behind `Adapter.apply_to` and `Adapter.extract`."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from convlora.adapter.algebra import alpha_of_scale_one, assemble, factorization_with
from convlora.adapter.fingerprint import base_fingerprint
from convlora.adapter.naming import other_prefixes, rename_layers
from convlora.adapter.parts import (
    BIAS_DELTA,
    AdapterParts,
    LayerFactors,
    at_least_float32,
    base_key,
    delta_and_gain,
    refuse_weight,
    strengths_of,
    tensor_key,
)
from convlora.config import AdapterConfig, Strength
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import PROJECTIONS, WeightSpec, get_factors, needs_weight
from convlora.factors.fuse import fuse_weight, fuse_weight_exactly, is_finite, mixture
from convlora.factors.svd import rank_chooser
from convlora.support.progress import counted_steps
from convlora.support.tensorfile import BLOCK, RenamedTensors, flat_parts, shapes_of

OPERATION = "Adapter.extract"
A = TypeVar("A", bound=AdapterParts)


@dataclass(frozen=True)
class MergedEntry:
    """An entry of a merged checkpoint, computed when it is asked for: whole, or block by block with the same values.

    Args:
        name: in the checkpoint.
        shape: of the entry.
        dtype: of the entry.
        state: the checkpoint that is merged into.
        changes: adapter, layer and strength of each update; in a model they are summed before the one rounding.
        copies: what takes the entry's place, by strength.
        exact: see `Adapter.apply_to`.
        problems: where non-finite values are named.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: Mapping[str, Any]
    changes: Sequence[tuple[AdapterParts, LayerFactors, float]]
    copies: Sequence[tuple[Tensor, float]]
    exact: bool
    problems: Problems

    def whole(self) -> Tensor:
        """All of it, `shape`."""
        if self._is_copy:
            base: Any = self.state.get(self.name)
            copy = self.copies[-1][0]
            return self._checked(copy.clone() if base is None else copy.to(base.device, self.dtype, copy=True))
        updates = [delta * gain for delta, gain in map(self._update, self.changes)]
        return self._checked(self._fused(self.state[self.name].detach(), updates, [copy for copy, _ in self.copies]))

    def blocks(self) -> Iterator[Tensor]:
        """Its elements in C order, `BLOCK` of them at a time; of all that is computed only ΔW is in memory whole."""
        copies = [copy.reshape(-1) for copy, _ in self.copies]
        updates = [] if self._is_copy else [(d.reshape(-1), gain) for d, gain in map(self._update, self.changes)]
        base = None if self._is_copy else flat_parts(self.state, self.name)
        for start in range(0, math.prod(self.shape), BLOCK):
            stop = min(start + BLOCK, math.prod(self.shape))
            parts = [copy[start:stop] for copy in copies]
            if base is None:
                yield self._checked(parts[-1].to(self.dtype))
            else:
                scaled = [delta[start:stop] * gain for delta, gain in updates]
                yield self._checked(self._fused(base(start, stop), scaled, parts))

    @property
    def _is_copy(self) -> bool:
        """Whether it is a copy as it is: one that acts alone and whole, or one that cannot be mixed."""
        alone = len(self.copies) == 1 and not self.changes and self.copies[0][1] == 1
        return bool(self.copies) and (alone or not self.copies[-1][0].is_floating_point())

    def _update(self, change: tuple[AdapterParts, LayerFactors, float]) -> tuple[Tensor, float]:
        """An update, and what it is to be multiplied with."""
        adapter, layer, strength = change
        if self.name.endswith("weight"):
            base = None
            if needs_weight(get_factors(adapter.config.factors)):
                base = self.state[self.name].detach().to(next(iter(layer.tensors.values())).device)
            return delta_and_gain(adapter.config, layer, strength, self.exact, base)
        delta = layer.tensors[BIAS_DELTA]
        return delta.double() if self.exact else at_least_float32(delta), strength

    def _fused(self, base: Tensor, updates: Sequence[Tensor], copies: Sequence[Tensor]) -> Tensor:
        """`base` with updates and copies, element by element."""
        strengths = [strength for _, strength in self.copies]
        stored = [(c.to(base.device, base.dtype), s) for c, s in zip(copies, strengths, strict=True)]
        start, mixed_in = mixture(base, stored, self.exact)
        fuse = fuse_weight_exactly if self.exact else fuse_weight
        return fuse(start, [*(update.to(base.device) for update in updates), *mixed_in])

    def _checked(self, values: Tensor) -> Tensor:
        known = self.name in self.problems.non_finite
        if not known and values.is_floating_point() and not is_finite(values):
            self.problems.non_finite.append(self.name)
        return values


@dataclass(frozen=True)
class MergePlan:
    """A checkpoint with adapters merged into it, decided but not yet computed.

    Args:
        entries: what is not as in the checkpoint, by its name; aliases of one module share an entry.
        problems: what stands against it; complete once every entry has been computed.
    """

    entries: dict[str, MergedEntry]
    problems: Problems

    def refuse_problems(self) -> None:
        """
        Raises:
            ConvLoRAError: a value is not finite, or a copy of another shape is to be mixed.
        """
        self.problems.raise_if_any("Adapter.apply_to")


def plan_merge(
    strengths: Sequence[tuple[AdapterParts, Strength]], state_dict: Mapping[str, Any], exact: bool = False
) -> MergePlan:
    """What `apply_adapters` computes; of a `TensorFile` nothing but the header is read.

    Raises:
        ConvLoRAError: an adapter does not fit, or a strength is not finite.
    """
    if not isinstance(state_dict, Mapping):
        raise ConvLoRAError(f"Adapter.apply_to: expected a state dict, got {type(state_dict).__name__}")
    aliases = {  # a module of several paths is one layer
        base_key(alias, kind, state_dict, layer.spec): base_key(path, kind, state_dict, layer.spec)
        for adapter, _ in strengths
        for path, layer in adapter.layers.items()
        for kind in _kinds(layer)
        for alias in layer.aliases
    }
    shapes = shapes_of(state_dict)
    changes: dict[str, dict[int, tuple[AdapterParts, LayerFactors, float]]] = {}
    by_layer = [(adapter, strengths_of(adapter, strength, "Adapter.apply_to")) for adapter, strength in strengths]
    for number, (adapter, each) in enumerate(by_layer):
        if problems := state_dict_misfits(adapter, shapes):
            ways = ", or ".join(f"by rename({names})" for names, _ in renamings_that_fit(adapter, shapes))
            raise ConvLoRAError(f"Adapter.apply_to: {problems}{f'; it fits {ways}' if ways else ''}")
        for path, layer in adapter.layers.items():
            for kind in _kinds(layer) if each[path] else ():
                name = base_key(path, kind, state_dict, layer.spec)
                name = aliases.get(name, name)
                changes.setdefault(name, {}).setdefault(number, (adapter, layer, each[path]))
    plan = MergePlan({}, Problems())
    mixed = _copies(by_layer)
    for name in dict.fromkeys([*changes, *mixed]):
        parts, owned = [*changes.get(name, {}).values()], mixed.get(name, [])
        shape, dtype = _shape_and_dtype(shapes.get(name), owned)
        entry = MergedEntry(name, shape, dtype, state_dict, parts, owned, exact, plan.problems)
        base: Any = shapes.get(name)
        if owned and not entry._is_copy and (base is None or any(copy.shape != base.shape for copy, _ in owned)):
            plan.problems.mismatched.append(
                f"{name} has another shape than the base's: a copy acts at strength 1 and alone"
            )
        else:
            plan.entries[name] = entry
    plan.entries.update({alias: plan.entries[name] for alias, name in aliases.items() if name in plan.entries})
    return plan


def _shape_and_dtype(base: Any, copies: Sequence[tuple[Tensor, float]]) -> tuple[tuple[int, ...], torch.dtype]:
    """Of an entry: the base's, but the shape of what takes its place."""
    values = copies[-1][0] if copies else base
    return tuple(values.shape), values.dtype if base is None else base.dtype


def apply_adapters(
    strengths: Sequence[tuple[AdapterParts, Strength]], state_dict: Mapping[str, Any], exact: bool = False
) -> dict[str, Any]:
    """See `Adapter.apply_to`; of several adapters the updates are summed before the one rounding, as in a model."""
    plan = plan_merge(strengths, state_dict, exact)
    distinct = {id(entry): entry for entry in plan.entries.values()}
    computed = {number: distinct[number].whole() for number in counted_steps(distinct)}
    plan.refuse_problems()
    merged = {name: computed[id(entry)] for name, entry in plan.entries.items()}
    result = OrderedDict((name, merged.get(name, value)) for name, value in state_dict.items())
    result.update({name: value for name, value in merged.items() if name not in result})  # a bias that the base lacks
    if hasattr(state_dict, "_metadata"):  # the versions of torch's modules
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return result


def _copies(by_layer: Sequence[tuple[AdapterParts, Mapping[str, float]]]) -> dict[str, list[tuple[Tensor, float]]]:
    """Entry of a checkpoint -> the copies that take its place, by strength."""
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for adapter, each in by_layer:
        for path, tensors in adapter.modules.items():
            for name, copy in tensors.items() if each[path] else ():
                found.setdefault(tensor_key(path, name), []).append((copy, each[path]))
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


def renamings_that_fit(adapter: A, state_dict: Mapping[str, Any], prefix: str = "") -> list[tuple[dict[str, str], A]]:
    """The prefixes, added or taken away, by which an adapter fits a state dict, and the adapter by each."""
    paths = dict.fromkeys(str(name).rpartition(".")[0] for name in state_dict)
    paths |= {path: None for name in state_dict if (path := layer_of_weight(str(name))) is not None}
    renamed = ((names, rename_layers(adapter, names)) for names in other_prefixes(adapter, paths, prefix))
    return [(names, other) for names, other in renamed if not state_dict_misfits(other, state_dict)]


def _kinds(layer: LayerFactors) -> tuple[str, ...]:
    return ("weight", "bias") if BIAS_DELTA in layer.tensors else ("weight",)


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
    refuse_weight(factors, OPERATION)
    factorization = factorization_with(factors, "fit", OPERATION)
    config = AdapterConfig(targets="*", factors=factors, name=name)
    differing, left_out = _compare(base, tuned)
    layers, errors = {}, {}
    shapes = shapes_of(base), shapes_of(tuned)
    for path, spec in counted_steps(_layers(*shapes, differing, specs or {}).items()):
        weight, bias = (base_key(path, kind, base, spec) for kind in ("weight", "bias"))
        fit = factorization.fit(spec.to_convolution(_difference(base, tuned, weight)), spec, choose)
        tensors = dict(fit.factors)
        like: Any = shapes[0].get(bias)
        if bias in differing and like.is_floating_point() and tuple(like.shape) == (spec.out_channels,):
            tensors[BIAS_DELTA] = _difference(base, tuned, bias)
        dtype = torch.float64 if shapes[0][weight].dtype == shapes[1][weight].dtype == torch.float64 else torch.float32
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
        fingerprint=base_fingerprint(
            RenamedTensors(base, {p: base_key(p, "weight", base, layer.spec) for p, layer in layers.items()})
        ),
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
