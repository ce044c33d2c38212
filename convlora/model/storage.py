"""Between a model and an `Adapter`: take one out, put one in, as a value or as a file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import can_be_resized, padded, why_not_padded
from convlora.adapter.cast import cast_adapter
from convlora.adapter.fingerprint import base_fingerprint, compare_bases
from convlora.adapter.naming import describe_prefix, other_prefixes
from convlora.adapter.parts import LayerFactors, tensor_key
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import WeightSpec, get_factors, needs_weight
from convlora.factors.fuse import is_finite
from convlora.layer.adapted import (
    Adapted,
    effective_names,
    effective_tensor,
    peek_base_tensor,
    slot_of,
    weight_spec,
    why_not,
)
from convlora.layer.copies import TensorCopies, own_tensors, statistics_names
from convlora.layer.lowrank import LowRank
from convlora.layer.sharded import device_mesh_of, full_tensor, is_first_rank, is_sharded, on_all_ranks, reshard_model
from convlora.model.inject import (
    CopyPlacement,
    Placement,
    check_copyable,
    check_injectable,
    place_adapter,
    plan_statistics,
)
from convlora.model.outside import warn_of_changed
from convlora.model.places import departed_modules, shown_names, warn_of_departed
from convlora.model.switch import Names, using
from convlora.model.traversal import (
    adapted_modules,
    brought_paths,
    only_adapter_name,
    refuse_sharded,
    refuse_stacked,
    require_adapters,
    unwrap_model,
)
from convlora.support.patterns import nearest_names
from convlora.targets import is_part_of_adapter, named_layers

M = TypeVar("M", bound=nn.Module)


def adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """An adapter of the model as a value: its tensors copied to the CPU, detached from the model.

    Warns of what has changed outside of any adapter, and so is not in it: see `convlora.changed`; and of adapted
    layers that have left the model since `inject`, replaced or deleted.

    Under FSDP2 every process has to call it, and each gets the whole adapter.

    Raises:
        ConvLoRAError: no such adapter, several and no name, or non-finite factors.

    Example:
        >>> from convlora import inject
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> sorted(adapter(model).layers["0"].tensors)
        ['lora_A', 'lora_B']
    """
    taken = _take(model, name, copy=True)
    _warn_of_lost(model, taken.config.name, "adapter")
    return taken


def _take(model: nn.Module, name: str | None, copy: bool) -> Adapter:
    name = only_adapter_name(model, name, "adapter")
    reshard_model(model, "adapter")
    root = unwrap_model(model, "adapter")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, Adapted) and name in slot_of(module).names():
            paths.setdefault(module, []).append(path)
    layers: dict[str, LayerFactors] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    kinds = set()
    for module, (path, *aliases) in paths.items():
        entry = slot_of(module).entry(name)
        config = entry.config
        if isinstance(entry, LowRank):
            kinds.add((config.factors, config.rank_scaling))
            tensors = {n: _on_cpu(p, copy) for n, p in entry.factors().items()}
            layers[path] = LayerFactors(tensors, entry.spec, entry.rank, entry.alpha, tuple(aliases))
        elif isinstance(entry, TensorCopies) and not _are_unmoved_statistics(module, entry):
            held = {n: _on_cpu(t, copy) for n, t in entry.tensors().items()}
            modules |= {p: held for p in (path, *aliases) if held}
    if len(kinds) > 1:
        raise ConvLoRAError(f"adapter: parts of {name!r} differ ({sorted(kinds)}); give each part a name of its own")
    if not layers and (departed := departed_modules(root, name)):
        raise ConvLoRAError(
            f"adapter: {name!r} has no layer any more; {shown_names(departed)}, which had it, left since inject"
        )
    base = {path: layer for layer, (path, *_) in paths.items() if path in layers}
    return Adapter(config, layers, base_fingerprint(_base_weights(base)), modules=modules)


def _are_unmoved_statistics(module: nn.Module, copies: TensorCopies) -> bool:
    """Whether copies are running statistics that still are the base's: a file without them says the same."""
    return set(copies.tensors()) <= {*statistics_names(module)} and copies.equal(own_tensors(module))


def save(
    model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Write an adapter of the model to a `.safetensors` file, atomically. Returns the model.

    The file holds the factors, the copies of `modules_to_save`, and the running statistics that have moved. A warning
    names what has changed outside of any adapter, and so is not in it: see `convlora.changed`; and adapted layers that
    have left the model since `inject`, replaced or deleted.

    `dtype`: of the tensors in the file; float16 or bfloat16 halve it, and a warning names what is too small for them,
    as in `Adapter.to`. Of several processes with one model the first
    writes. Under FSDP2 all of them have to call it, and each goes on once the file is there; under DDP the others do
    not wait.

    Raises:
        ConvLoRAError: no such adapter, several and no name, non-finite factors, or the file cannot be written; an
            old file stays as it was then.

    Example:
        >>> import tempfile
        >>> from convlora import inject
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(model, f"{folder}/rain.safetensors")
    """
    taken = cast_adapter(_take(model, name, copy=False), dtype, "save", stacklevel=2)
    _warn_of_lost(model, taken.config.name, "save")
    mesh = device_mesh_of(model)
    first = is_first_rank(model, mesh)
    on_all_ranks(mesh, lambda: taken.write(path) if first else None)
    return model


def load(
    model: M,
    path: str | os.PathLike[str] | Adapter,
    *,
    name: str | None = None,
    prefix: str = "",
    strict: bool = True,
) -> M:
    """Put the adapter of a file (or an `Adapter`) on a model: `inject` and restore, from the file alone.

    Onto an adapter of the same name and layers it copies in place: a hot swap, which recompiles nothing. Layers of
    lower ranks than the model's get components that update nothing.
    A new adapter acts, beside those that already do; `activate` chooses. `name`: another name than the file's.
    `prefix`: what all names of one side, the file's or the model's, begin with and those of the other do not, as
    `"net."` of a network inside of another; left out, it is found where exactly one makes all of the file fit.
    `strict=False` takes what fits and warns of the rest. A base other than the adapted one, or another precision of
    it, gives a warning; one that is equal up to rounding does not.
    A model that FSDP2 has sharded takes a hot swap only, and every process has to call it and reads the file.
    It changes the model for everybody: nobody may be running it meanwhile.

    Raises:
        ConvLoRAError: the file is damaged or foreign, layers are missing, unexpected or of other shapes, or of a higher
            rank than those of the adapter to be swapped; all are listed, and the model is left as it was.

    Example:
        >>> import tempfile
        >>> from convlora import inject
        >>> base, fresh = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> _ = fresh.load_state_dict(base.state_dict())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(inject(base, targets="*", rank=1), f"{folder}/rain.safetensors")
        ...     fresh = load(fresh, f"{folder}/rain.safetensors")
    """
    if not isinstance(prefix, str):
        raise ConvLoRAError(f"load: prefix (={prefix!r}) must be a string")
    root = unwrap_model(model, "load")
    reshard_model(root, "load")
    as_named = on_all_ranks(device_mesh_of(root), lambda: path if isinstance(path, Adapter) else Adapter.read(path))
    config = as_named.config if name is None else as_named.config.replace(name=name)
    present = {p: m for p, m in adapted_modules(root).items() if config.name in slot_of(m).names()}
    if not present:
        check_injectable(model, config, "load")
    loaded, fitting, modules, problems, note = _best_match(root, as_named, config.name if present else None, prefix)
    fitting_ids = {id(module) for module in (*fitting.values(), *modules.values())}
    left_out = {p: slot_of(m).entry(config.name) for p, m in present.items() if id(m) not in fitting_ids}
    bad = {text.split(" ")[0] for text in problems.mismatched}
    problems.missing += [p for p, entry in left_out.items() if p not in bad and not _is_optional(present[p], entry)]
    complaint = f"{problems}{note}"
    if problems and (strict or not fitting):
        raise ConvLoRAError(f"load: {complaint}{_swap_remedy(loaded, present, config.name)}")
    if problems:
        warnings.warn(f"load: left out what does not fit: {complaint}", ConvLoRAWarning, stacklevel=2)
    else:
        _warn_of_another_base(as_named, [fitting[p] for p in loaded.layers], note)
    if present:
        _swap(loaded, config.name, present, fitting, modules)
    else:
        _place(root, loaded, config.name, fitting, modules)
    return model


def _warn_of_another_base(loaded: Adapter, layers: Sequence[nn.Module], note: str) -> None:
    """`layers`: those of the model, in the order of the adapter's, whose names the fingerprint covers."""
    adapted = dict(zip(loaded.layers, layers, strict=True))
    if loaded.fingerprint is None:
        return
    found = compare_bases(loaded.fingerprint, _base_weights(adapted))
    if found.kind in ("precision", "other"):
        where = "the model has" if found.kind == "precision" else "the adapter was trained on"
        dependent = found.kind == "other" and needs_weight(get_factors(loaded.config.factors))
        change = f", and the change that {loaded.config.factors!r} factors make is another on it" if dependent else ""
        warnings.warn(f"load: {where} {found}{change}{note}", ConvLoRAWarning, stacklevel=3)


def _place(
    root: nn.Module, loaded: Adapter, name: str, fitting: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> None:
    """Put a new adapter on a model."""
    config = loaded.config.replace(name=name)
    copies = [CopyPlacement(p, m, list(loaded.modules[p]), loaded.modules[p]) for p, m in modules.items()]
    for copy in copies:
        check_copyable(copy.path, copy.module, "load")
    taken = {id(m) for m in (*modules.values(), *fitting.values())}
    copies += plan_statistics(root, config, taken, "load")
    place_adapter(root, [_placement(p, layer, loaded.layers[p]) for p, layer in fitting.items()], copies, config)


def _swap(
    loaded: Adapter,
    name: str,
    present: Mapping[str, nn.Module],
    fitting: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
) -> None:
    """Make an adapter that is on a model another one, in place; what the other lacks starts anew."""
    loaded = padded(loaded, {p: slot_of(layer).low_rank(name).rank for p, layer in fitting.items()})
    # Whose statistics move is a matter of the copies that are there.
    there = slot_of(next(iter(present.values()))).entry(name).config
    config = loaded.config.replace(name=name, norm_statistics=there.norm_statistics)
    for p, layer in fitting.items():
        slot_of(layer).swap(name, loaded.layers[p].tensors, config, loaded.layers[p].alpha)
    for p, module in modules.items():
        slot_of(module).copies()[name].swap(loaded.modules[p], config)
    swapped = {id(module) for module in (*fitting.values(), *modules.values())}
    for module in present.values():  # no mixture of two adapters
        entry = slot_of(module).entry(name)
        if id(module) in swapped:
            continue
        if isinstance(entry, TensorCopies):
            entry.swap(own_tensors(module), config)
        elif isinstance(entry, LowRank):
            entry.reset_parameters(full_tensor(peek_base_tensor(module, "weight")))
            entry.configure(config, entry.alpha)


def _swap_remedy(loaded: Adapter, present: Mapping[str, nn.Module], name: str) -> str:
    if not present:
        return ""
    ranks = [low_rank.rank for m in present.values() if (low_rank := slot_of(m).low_ranks().get(name)) is not None]
    too_high = ranks and any(layer.rank > min(ranks) for layer in loaded.layers.values())
    too_high = too_high and can_be_resized(loaded.config.factors)
    lower = f", Adapter.resize(rank={min(ranks)}) lowers its ranks" if too_high else ""
    return f"; adapter {name!r} is on the model already: name= loads beside it{lower}"


class _Match(NamedTuple):
    """An adapter with the names of a model: path -> layer or module that fits; what does not; a note on names."""

    adapter: Adapter
    layers: dict[str, nn.Module]
    modules: dict[str, nn.Module]
    problems: Problems
    note: str = ""


def _best_match(root: nn.Module, loaded: Adapter, swap: str | None, prefix: str) -> _Match:
    """By its own names, or by those that exactly one prefix, or the given one, makes fit. `swap`: see `_match`."""
    known = {p: m for p, m in named_layers(root) if not is_part_of_adapter(p)}

    def match(adapter: Adapter, swap: str | None = None) -> _Match:
        layers, problems = _match(known, adapter, swap)
        return _Match(adapter, layers, _match_modules(known, adapter, swap, problems), problems)

    as_named = match(loaded, swap)
    if not prefix and not (as_named.problems and match(loaded).problems):
        return as_named  # the names are right, whether or not they can be swapped
    ways = other_prefixes(loaded, known, prefix)
    renamed = [match(loaded.rename(names)) for names in ways]
    fitting = [(names, other.adapter) for names, other in zip(ways, renamed, strict=True) if not other.problems]
    if len(fitting) > 1 and swap is not None:
        fitting = [(names, other) for names, other in fitting if not match(other, swap).problems] or fitting
    if len(fitting) == 1:
        names, other = fitting[0]
        return match(other, swap)._replace(note=f"; its names fit {describe_prefix(names)}")
    if fitting:
        found = ", ".join(describe_prefix(names) for names, _ in fitting)
        how = "rename it by Adapter.rename" if prefix else "say which by prefix="
        as_named.problems.unexpected = as_named.problems.unexpected or [*loaded.layers]
        return as_named._replace(note=f"; its names fit in several ways, {found}: {how}")
    if as_named.problems and prefix:
        note = f"; prefix {prefix!r} neither added nor taken away gives the model's names"
        return renamed[0] if renamed else as_named._replace(note=note)
    if as_named.problems.unexpected:
        return as_named._replace(note=f"; {nearest_names(as_named.problems.unexpected[0].split(' ')[0], known)}")
    return as_named


def _is_optional(module: nn.Module, entry: nn.Module) -> bool:
    """Whether a file may lack what an adapter has of a module: statistics, which then are the base's."""
    return isinstance(entry, TensorCopies) and set(entry.tensors()) <= {*statistics_names(module)}


def _match_modules(
    named: Mapping[str, nn.Module], loaded: Adapter, swap: str | None, problems: Problems
) -> dict[str, nn.Module]:
    """File path -> module for the copies that fit; adds to `problems` what does not."""
    fitting: dict[str, nn.Module] = {}
    taken: set[int] = set()
    for path, tensors in loaded.modules.items():
        module = named.get(path)
        if module is None:
            problems.unexpected.append(path)
        elif found := _cannot_copy(module, tensors, swap):
            problems.mismatched.append(f"{path} ({found})")
        elif id(module) not in taken:  # else the module is in the file by another of its paths, too
            fitting[path] = module
            taken.add(id(module))
    return fitting


def _cannot_copy(module: nn.Module, tensors: Mapping[str, Tensor], swap: str | None) -> str | None:
    own, statistics = own_tensors(module), statistics_names(module)
    if any(tensor.is_meta for tensor in own.values()):
        return "the model has no values yet: meta device"
    if strange := [name for name in tensors if name not in module._parameters and name not in module._buffers]:
        return f"the file has {', '.join(strange)}, the module {', '.join(own) or 'no tensors'}"
    if not set(tensors) <= {*statistics} and (absent := [name for name in own if name not in tensors]):
        return f"the file lacks {', '.join(absent)}"
    for name, tensor in tensors.items():
        if name in own and _kind_of_number(tensor) != _kind_of_number(own[name]):
            return f"the file has {name} of {tensor.dtype}, the model of {own[name].dtype}"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if swap is not None:
        copies = slot_of(module).copies().get(swap) if isinstance(module, Adapted) else None
        if copies is None:
            return f"adapter {swap!r} has no copies of this module"
        if shapes != (ours := {name: tuple(tensor.shape) for name, tensor in copies.tensors().items()}):
            return f"the file has {shapes}, the adapter on the model {ours}"
    for name, shape in shapes.items():
        other = own.get(name)
        if other is not None and (len(shape) != other.dim() or (name in statistics and shape != tuple(other.shape))):
            return f"the file has {name} {shape}, the model {tuple(other.shape)}"
    return None


def _kind_of_number(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _match(named: Mapping[str, nn.Module], loaded: Adapter, swap: str | None) -> tuple[dict[str, nn.Module], Problems]:
    """File path -> layer for the layers that fit, and what does not; `swap`: the adapter to be overwritten."""
    fitting: dict[str, nn.Module] = {}
    taken: set[int] = set()
    problems = Problems()
    for path, factors in loaded.layers.items():
        layer = named.get(path)
        if layer is None:
            problems.unexpected.append(path)
        elif reason := why_not(layer):
            problems.mismatched.append(f"{path} ({reason})")
        elif peek_base_tensor(layer, "weight").is_meta:
            problems.mismatched.append(f"{path} (the model has no values yet: meta device)")
        elif weight_spec(layer) != factors.spec:
            problems.mismatched.append(
                f"{path} (the file has weight {_show(factors.spec)}, the model {_show(weight_spec(layer))})"
            )
        elif "lora_bias" in factors.tensors and peek_base_tensor(layer, "bias") is None:
            problems.mismatched.append(f"{path} (the file has a bias delta, the layer no bias)")
        elif swap is not None and (reason := _cannot_swap(layer, swap, loaded, factors)):
            problems.mismatched.append(f"{path} ({reason})")
        elif id(layer) in taken:
            problems.mismatched.append(f"{path} (a second entry for one module)")
        else:
            fitting[path] = layer
            taken.add(id(layer))
    return fitting, problems


def _cannot_swap(layer: nn.Module, name: str, loaded: Adapter, factors: LayerFactors) -> str | None:
    low_rank = slot_of(layer)._modules.get(name) if isinstance(layer, Adapted) else None
    if not isinstance(low_rank, LowRank):
        return f"adapter {name!r} is not on this layer"
    if low_rank.config.factors != loaded.config.factors:
        return f"the file has {loaded.config.factors!r} factors, the model {low_rank.config.factors!r}"
    if set(low_rank.factors()) != set(factors.tensors):
        return f"the file has {sorted(factors.tensors)}, the model {sorted(low_rank.factors())}"
    return why_not_padded(loaded.config.factors, factors.spec, factors.rank, low_rank.rank)


def _placement(path: str, layer: nn.Module, f: LayerFactors) -> Placement:
    return Placement(path, layer, f.spec, f.rank, f.alpha, "lora_bias" in f.tensors, f.tensors)


def _show(spec: WeightSpec) -> str:
    return (
        f"{spec.shape}"
        + (f" groups {spec.groups}" if spec.groups > 1 else "")
        + (" transposed" if spec.transposed else "")
    )


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    if tensor.is_meta:
        raise ConvLoRAError("adapter: the factors have no values yet (meta device)")
    return full_tensor(tensor).detach().to("cpu", copy=copy)


def _base_weights(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The base weights of layers, whole where they are sharded."""
    weights = {path: peek_base_tensor(layer, "weight") for path, layer in layers.items()}
    return {p: _on_cpu(w, copy=False) if is_sharded(w) and not w.is_meta else w for p, w in weights.items()}


def merged_state_dict(model: nn.Module, names: Names | None = None) -> dict[str, Any]:
    """The checkpoint of the merged network: base keys, merged weights, and copies in the place of the base's tensors.

    What `merge(model, names); remove(model); model.state_dict()` gives, bitwise, from a model that is not touched: it
    loads with `strict=True` into the plain network. `names` as for `activate`, those that act by default. Warns of
    what has changed outside of any adapter, which the checkpoint has: see `convlora.changed`.

    Raises:
        ConvLoRAError: no such adapter; non-finite values; a weight that the layer computes (weight norm), since no
            entry could hold the merged one: merge and remove, which bakes it in; a sharded model (FSDP).

    Example:
        >>> from convlora import inject
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> list(merged_state_dict(model))
        ['0.weight', '0.bias']
    """
    root = require_adapters(model, "merged_state_dict")
    refuse_sharded(root, "merged_state_dict")
    refuse_stacked(root, "merged_state_dict")
    brought = set(brought_paths(root))
    state = root.state_dict()
    kept = OrderedDict((key, v) for key, v in state.items() if not _is_below(key, brought))
    metadata = getattr(state, "_metadata", {})
    kept._metadata = {  # type: ignore[attr-defined]
        path: versions for path, versions in metadata.items() if path not in brought and not _is_below(path, brought)
    }
    problems = Problems()
    with using(root, names) if names is not None else contextlib.nullcontext(), torch.no_grad():
        for path, module in root.named_modules(remove_duplicate=False):
            for kind in effective_names(module) if isinstance(module, Adapted) else ():
                base, value = peek_base_tensor(module, kind), effective_tensor(module, kind)
                if value is None or value is base:
                    continue
                if kind not in module._parameters and kind not in module._buffers:
                    raise ConvLoRAError(
                        f"merged_state_dict: '{path}' computes its {kind} (a norm); merge and remove, which bakes it in"
                    )
                if value.is_floating_point() and not is_finite(value):
                    problems.non_finite.append(tensor_key(path, kind))
                kept[tensor_key(path, kind)] = value.detach().clone()
    problems.raise_if_any("merged_state_dict")
    _warn_of_lost(root, None, "merged_state_dict")
    return kept


def _is_below(name: str, paths: Container[str]) -> bool:
    """Whether a dotted name lies below one of some paths."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in paths for end in range(1, len(parts)))


def _warn_of_lost(model: nn.Module, name: str | None, operation: str) -> None:
    """What no adapter holds and has changed, and what has left the model with the adapter on it."""
    root = unwrap_model(model, operation)
    warn_of_changed(root, operation, stacklevel=3)
    warn_of_departed(root, name, operation, stacklevel=3)
