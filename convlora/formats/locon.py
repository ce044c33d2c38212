"""An adapter in one file of tensors, as LyCORIS, kohya's scripts, ComfyUI and diffusers write it.

A key is a name of a layer and a part of its update: names.py has the spellings, updates.py what the parts mean. LoCon:
`<name>.lora_down.weight` `(r, in/groups, *kernel)`, `<name>.lora_up.weight` `(out, r, 1…)` and `<name>.alpha`, one
number: the factorization `"locon"` with scale `alpha / r`; no alpha, or 0, means r.

diffusers has PEFT's tensors, `<path>.lora_A.weight` and `.lora_B.weight`, and PEFT's config as JSON in `__metadata__`,
under `lora_adapter_metadata`; in the file of a pipeline, names and the fields of the config begin with the network's
name: `unet.`. Files of older versions, and tensors of PEFT without their config, state no scale at all.

Names of kohya's scripts and of LyCORIS are `<prefix>_<layer path with _ for each dot>`, which does not say the path;
the layers of the base do. Files of this library name them in `__metadata__`, under `convlora.layers`.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import assemble, with_linear_scaling
from convlora.adapter.file import layers_from_json, layers_to_json
from convlora.adapter.parts import BIAS_DELTA, LayerFactors
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError, Problems
from convlora.factors.base import WeightSpec
from convlora.formats.names import flat, other_key, resolve, split_key, why_refused, within, without_prefix
from convlora.formats.peft import METADATA, Settings, settings_by_network
from convlora.formats.tensors import read_tensors, write_tensors
from convlora.formats.updates import (
    MAGNITUDE,
    Update,
    in_one_form,
    kind_of,
    missing_parts,
    stated_alpha,
    update_of,
    with_scaled_bias,
)

PREFIX, LAYERS = "lycoris", "convlora.layers"
FOLDER_FILE = "pytorch_lora_weights.safetensors"  # of diffusers
FOLDER_FILES = (FOLDER_FILE, "pytorch_lora_weights.bin")
_BARE = ("lora_A", "lora_B")  # PEFT's names, which leave the scale to a config
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def recognises(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """`locon` or `diffusers`, if these are tensors of an adapter in one file, one that can be read or not."""
    names = set(names)
    found = [name for name in names if _is_part(name) or _is_refused(name, names)]
    if found and (METADATA in metadata or any(f".{bare}." in name for name in found for bare in _BARE)):
        return "diffusers"
    return "locon" if found else None


def in_folder(folder: Path) -> Path | None:
    """The file that diffusers looks for in a folder, if it is there."""
    return next((folder / name for name in FOLDER_FILES if os.path.isfile(folder / name)), None)


def _is_part(name: str) -> bool:
    split = split_key(name)
    return split is not None and split[1] != "alpha"


def _is_refused(name: str, names: Container[str]) -> bool:
    """Whether a tensor is one of a method that is refused: a plain layer may be called `a1` as well as a part."""
    plain = name.endswith(".weight") and f"{name.rsplit('.', 2)[0]}.alpha" not in names
    return not plain and why_refused(name) is not None


def read(
    path: str | os.PathLike[str],
    layers: Mapping[str, WeightSpec] | None,
    alpha: float | None = None,
    prefix: str | None = None,
) -> Adapter:
    """Read an adapter in one file; see `convlora.formats.read`."""
    tensors, metadata = read_tensors(path)
    stated = layers_from_json(metadata[LAYERS]) if LAYERS in metadata else {}
    networks = settings_by_network(metadata[METADATA]) if METADATA in metadata else {}
    prefix, settings = _network(networks, prefix)
    own, keys = _by_name({rest: tensors[key] for key, rest in within(tensors, prefix or "").items()})
    _check_scales(own, keys, settings, alpha)
    base = layers if layers is not None else {p: layer.spec for p, layer in stated.items()}
    paths = resolve(own, base) if base or layers is not None else without_prefix(own, prefix is not None)
    scaling = settings.scaling if settings else "linear"
    config = AdapterConfig(targets="*", factors="locon", rank_scaling=scaling)
    updates: dict[str, Update] = {}
    for name, parts in own.items():
        layer_path, rank = paths[name], None
        given = stated_alpha(f"{name}.alpha", parts["alpha"]) if "alpha" in parts else alpha
        if settings is not None:
            rank, given = settings.of_layer(name, parts)
        whole = with_scaled_bias(parts, config, given)
        update = update_of(name, whole, base.get(layer_path), given, stated_rank=rank, known=layers is not None)
        aliases = stated[layer_path].aliases if layer_path in stated else ()
        updates[layer_path] = replace(update, layer=replace(update.layer, aliases=aliases))
    if settings is not None:
        settings.check_kinds(updates)
    factors, read_layers = in_one_form(updates, layers is not None)
    return assemble(Adapter, config.replace(factors=factors), read_layers)


def _network(networks: Mapping[str, Settings], prefix: str | None) -> tuple[str | None, Settings | None]:
    """The prefix of the names that are read, and the config that the metadata has for them."""
    if not networks or prefix is not None:
        return prefix, networks.get((prefix or "").rstrip("._"))
    if len(networks) > 1:
        shown = ", ".join(map(repr, networks))
        raise ConvLoRAError(f"the file is of several networks, {shown}: prefix= reads one of them")
    [(name, settings)] = networks.items()
    return name or None, settings


def _by_name(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Name -> part -> values, with no part missing; and name -> one of its keys."""
    own: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, str] = {}
    problems = Problems()
    for key, tensor in tensors.items():
        if reason := why_refused(key):
            raise ConvLoRAError(f"'{key}': {reason}, which no factorization here expresses")
        split = split_key(key)
        if split is None:
            problems.unexpected.append(key)
            continue
        name, part = split
        if part in own.setdefault(name, {}):
            raise ConvLoRAError(f"'{key}' is the {part} of '{name}', which has one already")
        own[name][part] = tensor
        if part != "alpha":
            keys[name] = key
        if not tensor.is_floating_point() and not (part == "alpha" and tensor.dtype in _INTEGERS):
            problems.mismatched.append(f"{key} {tensor.dtype} instead of floating point")
    for name, parts in own.items():
        kind = kind_of(name, parts)
        if kind is not None:
            problems.missing += [other_key(keys[name], part) for part in missing_parts(parts, kind)]
        elif "diff_b" not in parts:
            problems.unexpected += [f"{name}.{part} alone" for part in parts]
    problems.raise_if_any("LoCon")
    return own, keys


def _check_scales(
    own: Mapping[str, Mapping[str, Tensor]], keys: Mapping[str, str], settings: Settings | None, alpha: float | None
) -> None:
    """That the scale of each layer is stated once: by its alpha, in the metadata, or by the caller."""
    if alpha is not None and not is_number(alpha):
        raise ConvLoRAError(f"alpha (={alpha!r}) must be a finite number")
    stating = [name for name, parts in own.items() if "alpha" in parts]
    scaled = [name for name, parts in own.items() if kind_of(name, parts) not in ("dense", None)]
    silent = [name for name in scaled if "alpha" not in own[name]]
    if settings is not None and stating:
        raise ConvLoRAError(f"'{stating[0]}.alpha' and {METADATA} both state a scale: which one is meant?")
    if alpha is not None and (settings is not None or not silent):
        raise ConvLoRAError("rank= and alpha= are for files that do not state them; this one does")
    bare = [name for name in silent if any(f".{part}." in keys[name] for part in _BARE)]
    if bare and settings is None and alpha is None:
        raise ConvLoRAError(
            f"'{keys[bare[0]]}' has no scale: neither an alpha, nor {METADATA} in the file, nor PEFT's"
            " adapter_config.json beside it; give alpha=, the lora_alpha of its training (its rank, for a scale of 1)"
        )


# --- writing -----------------------------------------------------------------------------------------------------

_NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", MAGNITUDE: "dora_scale", BIAS_DELTA: "diff_b"}
WRITTEN = ("locon", "dora", "dora_in", "loha", "lokr", "dense")  # the factorizations that such a file holds


def write(adapter: Adapter, path: str | os.PathLike[str], prefix: str | None) -> None:
    """Write a file of LyCORIS; see `convlora.formats.write`."""
    adapter = adapter if adapter.config.factors in WRITTEN else adapter.refactor("locon")
    layers = with_linear_scaling(adapter)
    names = {layer_path: flat(layer_path, PREFIX if prefix is None else prefix) for layer_path in layers}
    tensors: dict[str, Tensor] = {}
    for layer_path, layer in layers.items():
        _check(layer_path, layer, adapter.config.factors)
        name = names[layer_path]
        if any(key.startswith(f"{name}.") for key in tensors):
            alike = " and ".join(repr(p) for p in layers if names[p] == name)
            raise ConvLoRAError(f"write: {alike} are both '{name}' in a LoCon file; write another format")
        for part, tensor in _parts(layer, adapter.config.factors).items():
            tensors[f"{name}.{part}"] = tensor
    write_tensors(path, tensors, {"format": "pt", LAYERS: layers_to_json(layers)})


def _parts(layer: LayerFactors, factors: str) -> dict[str, Tensor]:
    """The tensors of a layer by LyCORIS's names and in its shapes; what is scaled differently there is scaled here."""
    spec, alpha = layer.spec, layer.alpha
    tensors = {_NAMES.get(name, name): tensor for name, tensor in layer.tensors.items()}
    first = {"loha": "hada_w1_a", "lokr": "lokr_w1", "dense": "diff"}.get(factors, "lora_up.weight")
    unscaled = factors == "dense" or "lokr_w2" in tensors
    if alpha == 0 or (unscaled and alpha != layer.rank):  # an alpha of 0 means the rank there; of these none counts
        first_factor = tensors[first]
        tensors[first] = (first_factor.double() * (alpha / layer.rank)).to(first_factor.dtype)
        alpha = float(layer.rank)
    if "lora_up.weight" in tensors:
        point = [1] * len(spec.kernel)
        tensors["lora_down.weight"] = tensors["lora_down.weight"].reshape(layer.rank, *spec.shape[1:])
        tensors["lora_up.weight"] = tensors["lora_up.weight"].reshape(spec.out_channels, layer.rank, *point)
    if "dora_scale" in tensors:
        sides = (1, -1) if factors == "dora_in" else (-1, 1)
        tensors["dora_scale"] = tensors["dora_scale"].reshape(*sides, *[1] * len(spec.kernel))
    if factors != "dense":
        tensors.pop("diff_b", None)  # zero, see _check
        tensors["alpha"] = torch.tensor(float(alpha))
    return tensors


def _check(path: str, layer: LayerFactors, factors: str) -> None:
    reason = None
    if layer.spec.transposed:
        reason = "is a transposed convolution, which LyCORIS cannot adapt"
    elif factors != "dense" and BIAS_DELTA in layer.tensors and bool(layer.tensors[BIAS_DELTA].ne(0).any()):
        reason = "has a bias delta, which LyCORIS leaves out beside factors"
    if reason:
        raise ConvLoRAError(f"write: no LoCon file holds this adapter: '{path}' {reason}")
