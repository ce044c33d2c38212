"""A LoCon file, as LyCORIS and kohya's scripts write it: one file of tensors, without a config.

Keys are `<name>.lora_down.weight` `(r, in/groups, *kernel)`, `<name>.lora_up.weight` `(out, r, 1…)` and `<name>.alpha`,
one number: the factorization `"locon"` with scale `alpha / r`; no alpha, or 0, means r. Tucker files have a down of
kernel 1 and `<name>.lora_mid.weight` `(r, r, *kernel)`, `ΔW = einsum('or,rskl,si->oikl', up, mid, down)`, which is a
LoCon with `A = einsum('rskl,si->rikl', mid, down)`.

A name is `<prefix>_<layer path with _ for each dot>`, so it does not say the path; the layers of the base do. Files of
this library name them in `__metadata__`, under `convlora.layers`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import assemble, with_linear_scaling
from convlora.adapter.file import layers_from_json, layers_to_json
from convlora.adapter.parts import BIAS_DELTA, LayerFactors
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import WeightSpec
from convlora.formats.tensors import read_tensors, write_tensors
from convlora.support.patterns import nearest_names

PREFIX, LAYERS = "lycoris", "convlora.layers"
_FOLDED = 64  # a Tucker file's factor, folded, over its parts: at most the kernel's size, 9 to 49 for images
PREFIXES = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_transformer", "lora")

_DOWN, _UP, _MID, _ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"
_FOREIGN = {
    "dora_scale": "DoRA rescales the whole weight",
    "hada_": "LoHa is a product of low-rank updates, element by element",
    "lokr_": "LoKr is a Kronecker product",
    "oft_": "OFT rotates the weight",
    "diff": "it holds whole differences; Adapter.extract fits factors to two checkpoints",
    "w_norm": "it holds the weights of norms",
    "b_norm": "it holds the biases of norms",
}


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a file of LyCORIS or kohya's scripts, one that can be read or not."""
    return any(name.partition(".")[2].startswith(("lora_down", "lora_up", "hada_", "lokr_", "oft_")) for name in names)


def read(path: str | os.PathLike[str], layers: Mapping[str, WeightSpec] | None) -> Adapter:
    """Read a LoCon file; see `convlora.formats.read`."""
    tensors, metadata = read_tensors(path)
    stated = layers_from_json(metadata[LAYERS]) if LAYERS in metadata else {}
    own = _by_name(tensors)
    base = layers if layers is not None else {p: layer.spec for p, layer in stated.items()}
    paths = _resolve(own, base) if base or layers is not None else _without_prefix(own)
    read_layers = {}
    for name, parts in own.items():
        layer = _layer(name, parts, base.get(paths[name]))
        aliases = stated[paths[name]].aliases if paths[name] in stated else ()
        read_layers[paths[name]] = replace(layer, aliases=aliases)
    return assemble(Adapter, AdapterConfig(targets="*", factors="locon"), read_layers)


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name -> suffix -> values, with a down and an up each."""
    own: dict[str, dict[str, Tensor]] = {}
    problems = Problems()
    for full, tensor in tensors.items():
        name, _, suffix = full.partition(".")
        for start, reason in _FOREIGN.items():
            if suffix.startswith(start):
                raise ConvLoRAError(f"'{full}': {reason}, which LoCon factors do not express")
        if suffix in (_DOWN, _UP, _MID, _ALPHA):
            own.setdefault(name, {})[suffix] = tensor
        else:
            problems.unexpected.append(full)
        if not tensor.is_floating_point():
            problems.mismatched.append(f"{full} {tensor.dtype} instead of floating point")
    problems.missing += [f"{name}.{part}" for name, parts in own.items() for part in (_DOWN, _UP) if part not in parts]
    problems.raise_if_any("LoCon")
    return own


def _layer(name: str, parts: Mapping[str, Tensor], spec: WeightSpec | None) -> LayerFactors:
    down, up, rank = parts[_DOWN], parts[_UP], parts[_UP].shape[1] if parts[_UP].dim() > 1 else 0
    if _MID in parts:
        down = _fold(name, parts[_MID], down)
    if (
        0 in (rank, *up.shape, *down.shape)
        or not 2 <= down.dim() <= 5
        or up[0].numel() != rank
        or down.shape[0] != rank
    ):
        shapes = ", ".join(f"{suffix} {tuple(tensor.shape)}" for suffix, tensor in parts.items())
        raise ConvLoRAError(f"'{name}' has {shapes}, which do not fit together")
    if spec is not None and spec.transposed:
        raise ConvLoRAError(f"'{name}' is a transposed convolution in the base, for which LoCon has no factors")
    if spec is None:
        spec = WeightSpec((up.shape[0], *down.shape[1:]))
    point = math.prod(down.shape[2:]) == 1
    tensors = {
        "lora_A": down.flatten(1) if point else down,
        "lora_B": up.reshape(-1, rank, *[1] * (0 if point else down.dim() - 2)),
    }
    return LayerFactors(tensors, spec, rank, _alpha(name, parts.get(_ALPHA), rank))


def _fold(name: str, mid: Tensor, down: Tensor) -> Tensor:
    """A down of the whole kernel in place of a Tucker one."""
    shapes = f"'{name}' has a mid {tuple(mid.shape)} and a down {tuple(down.shape)}"
    if not 3 <= mid.dim() <= 5 or mid.shape[1] != down.shape[0] or down.dim() < 2 or down[0].numel() != down.shape[1]:
        raise ConvLoRAError(shapes)
    if mid.shape[0] * down.shape[1] * math.prod(mid.shape[2:]) > _FOLDED * (mid.numel() + down.numel()):
        raise ConvLoRAError(f"{shapes}, which make a factor of more than {_FOLDED} times their size")
    folded = torch.einsum("rs...,si->ri...", mid.double(), down.flatten(1).double())
    return folded.to(torch.promote_types(down.dtype, torch.float32))


def _alpha(name: str, alpha: Tensor | None, rank: int) -> float:
    if alpha is None:
        return float(rank)
    value = float(alpha) if alpha.numel() == 1 else None
    if not is_number(value):
        stated = alpha.item() if alpha.numel() == 1 else f"a tensor {tuple(alpha.shape)}"
        raise ConvLoRAError(f"'{name}.{_ALPHA}' is {stated} instead of one finite number")
    return value or float(rank)


# --- names and paths ---------------------------------------------------------------------------------------------


def flat(path: str, prefix: str) -> str:
    """The name of a layer in a file.

    Example:
        >>> flat("body.0.conv", "lycoris")
        'lycoris_body_0_conv'
    """
    return f"{prefix}_{path}".replace(".", "_") if prefix else path.replace(".", "_")


def _resolve(names: Collection[str], layers: Mapping[str, WeightSpec]) -> dict[str, str]:
    """Name -> layer path, by the one prefix with which all names are those of layers."""
    paths: dict[str, list[str]] = {}
    for path in layers:
        paths.setdefault(flat(path, ""), []).append(path)
    first = next(iter(names), "")
    prefixes = [first[: len(first) - len(f)] for f in paths if first.endswith(f)]
    prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith("_")]
    fitting = [prefix for prefix in prefixes if all(_rest(name, prefix) in paths for name in names)]
    known = [prefix for prefix in fitting if prefix[:-1] in PREFIXES]
    if not fitting:
        closest = max([*prefixes, *(f"{p}_" for p in PREFIXES)], key=lambda p: sum(_rest(n, p) in paths for n in names))
        unknown = sorted(name for name in names if _rest(name, closest) not in paths)
        raise ConvLoRAError(
            f"no layer of the base has these names: {', '.join(unknown)}; "
            f"{nearest_names(unknown[0].removeprefix(closest), paths)}"
        )
    if len(known or fitting) > 1:
        readings = " or ".join(repr(paths[first.removeprefix(prefix)][0]) for prefix in known or fitting)
        raise ConvLoRAError(f"the prefix of the names is ambiguous: '{first}' can be {readings}; rename the keys")
    prefix = (known or fitting)[0]
    for name in names:
        if len(paths[name.removeprefix(prefix)]) > 1:
            alike = " and ".join(map(repr, paths[name.removeprefix(prefix)]))
            raise ConvLoRAError(f"'{name}' is the name of {alike}: a LoCon file cannot tell them apart")
    return {name: paths[name.removeprefix(prefix)][0] for name in names}


def _rest(name: str, prefix: str) -> str | None:
    return name[len(prefix) :] if name.startswith(prefix) else None


def _without_prefix(names: Collection[str]) -> dict[str, str]:
    """Name -> what is left without a known prefix: the layer path, but for its dots."""
    prefixes = sorted((f"{prefix}_" for prefix in PREFIXES), key=len, reverse=True)
    paths = {name: name.removeprefix(next(filter(name.startswith, prefixes), "")) for name in names}
    if len(set(paths.values())) < len(paths):
        paths = {name: name for name in names}
    if any("_" in path for path in paths.values()):
        warnings.warn(
            "read: a LoCon file does not say where the dots of its layer paths are; layers= of the base does",
            ConvLoRAWarning,
            stacklevel=4,
        )
    return paths


# --- writing -----------------------------------------------------------------------------------------------------


def write(adapter: Adapter, path: str | os.PathLike[str], prefix: str | None) -> None:
    """Write a LoCon file; see `convlora.formats.write`."""
    layers = with_linear_scaling(adapter.refactor("locon"))
    names = {layer_path: flat(layer_path, PREFIX if prefix is None else prefix) for layer_path in layers}
    tensors: dict[str, Tensor] = {}
    for layer_path, layer in layers.items():
        _check(layer_path, layer)
        name = names[layer_path]
        if f"{name}.{_DOWN}" in tensors:
            alike = " and ".join(repr(p) for p in layers if names[p] == name)
            raise ConvLoRAError(f"write: {alike} are both '{name}' in a LoCon file; write another format")
        point = (1,) * (len(layer.spec.shape) - 2)
        up = layer.tensors["lora_B"].reshape(layer.spec.out_channels, layer.rank, *point)
        alpha = layer.alpha
        if alpha == 0:  # which there means the rank
            up, alpha = torch.zeros_like(up), float(layer.rank)
        tensors[f"{name}.{_DOWN}"] = layer.tensors["lora_A"].reshape(layer.rank, *layer.spec.shape[1:])
        tensors[f"{name}.{_UP}"] = up
        tensors[f"{name}.{_ALPHA}"] = torch.tensor(float(alpha))
    write_tensors(path, tensors, {"format": "pt", LAYERS: layers_to_json(layers)})


def _check(path: str, layer: LayerFactors) -> None:
    reason = None
    if layer.spec.transposed:
        reason = "is a transposed convolution, which LyCORIS cannot adapt"
    elif BIAS_DELTA in layer.tensors and bool(layer.tensors[BIAS_DELTA].ne(0).any()):
        reason = "has a bias delta, for which LoCon has no place"
    if reason:
        raise ConvLoRAError(f"write: no LoCon file holds this adapter: '{path}' {reason}")
