"""Between a model and an `Adapter`: take one out, put one in, as a value or as a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from convlora.adapter.adapter import Adapter
from convlora.adapter.parts import LayerFactors
from convlora.adapter.parts import base_fingerprint as fingerprint_of
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import WeightSpec
from convlora.layer.adapted import Adapted, peek_base_tensor, slot_of, weight_spec, why_not
from convlora.layer.lowrank import LowRank
from convlora.layer.sharded import device_mesh_of, full_tensor, is_first_rank, is_sharded, on_all_ranks, reshard_model
from convlora.model.inject import Placement, check_injectable, place_adapter
from convlora.model.traversal import adapted_layers, only_adapter_name, unwrap_model
from convlora.targets import nearest_names

M = TypeVar("M", bound=nn.Module)


def adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """An adapter of the model as a value: copies on the CPU, detached from the model.

    Under FSDP2 every process has to call it, and each gets the whole adapter.

    Raises:
        ConvLoRAError: no such adapter, several and no name, or non-finite factors.

    Example:
        >>> from convlora import inject
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> sorted(adapter(model).layers["0"].tensors)
        ['lora_A', 'lora_B']
    """
    return _take(model, name, copy=True)


def _take(model: nn.Module, name: str | None, copy: bool) -> Adapter:
    name = only_adapter_name(model, name, "adapter")
    reshard_model(model, "adapter")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in unwrap_model(model, "adapter").named_modules(remove_duplicate=False):
        if isinstance(module, Adapted) and name in slot_of(module).names():
            paths.setdefault(module, []).append(path)
    layers = {}
    kinds = set()
    for layer, (path, *aliases) in paths.items():
        low_rank = slot_of(layer).low_rank(name)
        kinds.add((low_rank.config.factors, low_rank.config.rank_scaling))
        tensors = {n: _on_cpu(p, copy) for n, p in low_rank.factors().items()}
        layers[path] = LayerFactors(tensors, low_rank.spec, low_rank.rank, low_rank.alpha, tuple(aliases))
    if len(kinds) > 1:
        raise ConvLoRAError(f"adapter: parts of {name!r} differ ({sorted(kinds)}); give each part a name of its own")
    return Adapter(low_rank.config, layers, fingerprint({path: layer for layer, (path, *_) in paths.items()}))


def save(
    model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Write an adapter of the model to a `.safetensors` file, atomically. Returns the model.

    `dtype`: of the tensors in the file; float16 or bfloat16 halve it. Of several processes with one model the first
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
    taken = _take(model, name, copy=False).to(dtype)
    mesh = device_mesh_of(model)
    first = is_first_rank(model, mesh)
    on_all_ranks(mesh, lambda: taken.write(path) if first else None)
    return model


def load(model: M, path: str | os.PathLike[str] | Adapter, *, name: str | None = None, strict: bool = True) -> M:
    """Put the adapter of a file (or an `Adapter`) on a model: `inject` and restore, from the file alone.

    Onto an adapter of the same name with the same shapes it copies in place: a hot swap, which recompiles nothing.
    A new adapter acts, beside those that already do; `activate` chooses. `name`: another name than the file's.
    `strict=False` takes what fits and warns of the rest. A base other than the adapted one gives a warning.
    A model that FSDP2 has sharded takes a hot swap only, and every process has to call it and reads the file.
    It changes the model for everybody: nobody may be running it meanwhile.

    Raises:
        ConvLoRAError: the file is damaged or foreign, or layers are missing, unexpected or of other shapes; all are
            listed, and the model is left as it was.

    Example:
        >>> import tempfile
        >>> from convlora import inject
        >>> base, fresh = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> _ = fresh.load_state_dict(base.state_dict())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(inject(base, targets="*", rank=1), f"{folder}/rain.safetensors")
        ...     fresh = load(fresh, f"{folder}/rain.safetensors")
    """
    root = unwrap_model(model, "load")
    reshard_model(root, "load")
    loaded = on_all_ranks(device_mesh_of(root), lambda: path if isinstance(path, Adapter) else Adapter.read(path))
    config = loaded.config if name is None else loaded.config.replace(name=name)
    present = {p: layer for p, layer in adapted_layers(root).items() if config.name in slot_of(layer).names()}
    if not present:
        check_injectable(model, config, "load")
    fitting, problems = _match(root, loaded, config.name if present else None)
    fitting_ids = {id(layer) for layer in fitting.values()}
    left_out = [p for p, layer in present.items() if id(layer) not in fitting_ids]
    bad = {text.split(" ")[0] for text in problems.mismatched}
    problems.missing += [p for p in left_out if p not in bad]
    complaint = str(problems)
    if problems.unexpected:
        complaint += f"; {nearest_names(problems.unexpected[0].split(' ')[0], dict(root.named_modules()))}"
    if problems and (strict or not fitting):
        hint = f"; adapter {config.name!r} is on the model already: name= loads beside it" if present else ""
        raise ConvLoRAError(f"load: {complaint}{hint}")
    if problems:
        warnings.warn(f"load: left out what does not fit: {complaint}", ConvLoRAWarning, stacklevel=2)
    elif loaded.fingerprint is not None and loaded.fingerprint != fingerprint(fitting):
        warnings.warn(
            "load: the adapter was trained on another base of the same shapes, or on another precision of it",
            ConvLoRAWarning,
            stacklevel=2,
        )
    if not present:
        place_adapter(root, [_placement(p, layer, loaded.layers[p]) for p, layer in fitting.items()], config)
        return model
    for p, layer in fitting.items():
        slot_of(layer).swap(config.name, loaded.layers[p].tensors, config, loaded.layers[p].alpha)
    for p in left_out:  # no mixture of two adapters
        slot_of(present[p]).low_rank(config.name).reset_parameters()
        slot_of(present[p]).low_rank(config.name).configure(config, slot_of(present[p]).low_rank(config.name).alpha)
    return model


def _match(root: nn.Module, loaded: Adapter, swap: str | None) -> tuple[dict[str, nn.Module], Problems]:
    """File path -> layer for the layers that fit, and what does not; `swap`: the adapter to be overwritten."""
    modules = dict(root.named_modules(remove_duplicate=False))
    fitting: dict[str, nn.Module] = {}
    taken: set[int] = set()
    problems = Problems()
    for path, factors in loaded.layers.items():
        layer = modules.get(path)
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
    ours = {n: tuple(p.shape) for n, p in low_rank.factors().items()}
    theirs = {n: tuple(t.shape) for n, t in factors.tensors.items()}
    return None if ours == theirs else f"the file has {theirs}, the model {ours}"


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


def fingerprint(layers: Mapping[str, nn.Module]) -> str | None:
    """Of the base weights of layers; see `formats.native.fingerprint`."""
    weights = {path: peek_base_tensor(layer, "weight") for path, layer in layers.items()}
    if any(weight.is_meta for weight in weights.values()):
        return None
    return fingerprint_of({p: _on_cpu(w, copy=False) if is_sharded(w) else w for p, w in weights.items()})
