"""A state dict of loralib (microsoft/LoRA) 0.1.2, as `torch.save(loralib.lora_state_dict(model), path)` writes it.

Keys are `<path>.lora_A` and `<path>.lora_B`: for a Linear `(r, in)` and `(out, r)`, for a k×k Conv2d `(r·k, in·k)` and
`(out//groups·k, r·k)`, which is the factorization `"convlora"`. Base weights, if the file has them, are at
`<path>.weight` or `<path>.conv.weight`. The scale is `lora_alpha / r`, and neither is in the file; nor is what tells a
Conv2d from a Linear, or a Linear from an Embedding (refused where the base weight shows it). `.safetensors` files of
this library state it in `__metadata__`, under `convlora.layers`.

To load a written one: build each layer with the adapter's rank as `r` and with `lora_alpha`, then
`model.load_state_dict(..., strict=False)`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import assemble, with_linear_scaling
from convlora.adapter.file import layers_from_json, layers_to_json
from convlora.adapter.parts import BIAS_DELTA, LayerFactors, base_keys, tensor_key
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError, ConvLoRAWarning, Problems
from convlora.factors.base import WeightSpec
from convlora.formats.tensors import read_tensors, write_tensors

LAYERS = "convlora.layers"
_FACTORS = ("lora_A", "lora_B")


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a state dict of loralib."""
    return any(name.rpartition(".")[2] in _FACTORS for name in names)


def read(
    path: str | os.PathLike[str], layers: Mapping[str, WeightSpec] | None, rank: int | None, alpha: float | None
) -> Adapter:
    """Read a loralib state dict; see `convlora.formats.read`."""
    tensors, metadata = read_tensors(path)
    stated = layers_from_json(metadata[LAYERS]) if LAYERS in metadata else {}
    if alpha is None and not stated:
        raise ConvLoRAError("a loralib file does not state lora_alpha; give alpha= (loralib's default is 1)")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConvLoRAError(f"rank (={rank!r}) must be an integer of at least 1")
    if alpha is not None and not is_number(alpha):
        raise ConvLoRAError(f"alpha (={alpha!r}) must be a finite number")
    own, base = _by_layer(tensors)
    if alpha is None and not own.keys() <= stated.keys():
        raise ConvLoRAError(f"{LAYERS} does not state: {', '.join(sorted(own.keys() - stated.keys()))}")
    known = {p: layer.spec for p, layer in stated.items()} if layers is None else layers
    problems = Problems()
    read_layers = {}
    for layer_path, factors in own.items():
        spec = known.get(layer_path)
        if layers is not None and spec is None:
            problems.unexpected.append(layer_path)
            continue
        shape = spec.shape if spec else base.get(layer_path)
        layer = _layer(layer_path, factors, shape, rank)
        if spec and spec.transposed:
            raise ConvLoRAError(f"'{layer_path}' is a transposed convolution in the base; loralib has none")
        if layer_path in stated:
            layer = replace(layer, alpha=stated[layer_path].alpha, aliases=stated[layer_path].aliases)
        read_layers[layer_path] = layer if alpha is None else replace(layer, alpha=alpha)
    problems.raise_if_any("loralib")
    return assemble(Adapter, AdapterConfig(targets="*", factors="convlora"), read_layers)


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """Layer path -> its two factors, and layer path -> shape of its base weight, where the file has it."""
    own: dict[str, dict[str, Tensor]] = {}
    problems = Problems()
    rest = []
    for full, tensor in tensors.items():
        layer_path, _, name = full.rpartition(".")
        if name not in _FACTORS:
            rest.append(full)
        elif tensor.dim() != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
            problems.mismatched.append(f"{full} {tuple(tensor.shape)} {tensor.dtype} instead of a matrix")
        else:
            own.setdefault(layer_path, {})[name] = tensor
    if not problems:
        problems.missing += [
            tensor_key(p, name) for p, factors in own.items() for name in _FACTORS if name not in factors
        ]
    problems.raise_if_any("loralib")
    weights = {p: [*base_keys(p, "weight"), tensor_key(p, "conv.weight")] for p in own}
    base = {p: tuple(tensors[name].shape) for p, names in weights.items() for name in names if name in tensors}
    if rest:
        warnings.warn(
            f"read: {len(rest)} tensors beside the factors (biases, base weights) are no part of an adapter: left out",
            ConvLoRAWarning,
            stacklevel=4,
        )
    return own, base


def _layer(path: str, factors: Mapping[str, Tensor], shape: tuple[int, ...] | None, rank: int | None) -> LayerFactors:
    (inner, columns), (rows, also_inner) = factors["lora_A"].shape, factors["lora_B"].shape
    if inner != also_inner:
        reason = "a MergedLinear's are" if inner % also_inner == 0 else "they are"
        raise ConvLoRAError(f"'{path}' has lora_A {(inner, columns)}, lora_B {(rows, also_inner)}: {reason} no product")
    if shape is None:
        shape = _shape(path, inner, columns, rows, rank)
    if len(shape) == 2 and shape == (columns, rows) != (rows, columns):
        raise ConvLoRAError(f"'{path}' is an Embedding or has fan_in_fan_out, a weight {shape}: no Linear of nn")
    if len(shape) not in (2, 4) or len(set(shape[2:])) > 1:
        raise ConvLoRAError(f"'{path}' has a weight {shape}; loralib has Linear and Conv2d with square kernels")
    k = shape[2] if len(shape) == 4 else 1
    groups, rest = divmod(columns, k * shape[1])
    if inner % k or rest or groups < 1 or rows * groups != shape[0] * k or (len(shape) == 2 and groups > 1):
        raise ConvLoRAError(f"'{path}' has lora_A {(inner, columns)}, lora_B {(rows, inner)}: not of a weight {shape}")
    if rank not in (None, inner // k):
        raise ConvLoRAError(f"'{path}' has rank {inner // k}, not {rank}")
    return LayerFactors(dict(factors), WeightSpec(shape, groups), inner // k, 1.0)


def _shape(path: str, inner: int, columns: int, rows: int, rank: int | None) -> tuple[int, ...]:
    """The shape of a weight by that of its factors and the rank, taken as one of groups=1."""
    if rank is None:
        raise ConvLoRAError(f"the file does not say whether '{path}' is a Linear or a Conv2d; give rank=, or layers=")
    k = inner // rank
    if inner % rank or columns % k or rows % k:
        raise ConvLoRAError(f"'{path}' has lora_A {(inner, columns)}, lora_B {(rows, inner)}: not of rank {rank}")
    return (rows // k, columns // k, k, k) if k > 1 else (rows, columns)


def write(adapter: Adapter, path: str | os.PathLike[str], alpha: float | None) -> None:
    """Write a loralib state dict; see `convlora.formats.write`."""
    if alpha is not None and (not is_number(alpha) or alpha == 0):
        raise ConvLoRAError(f"write: alpha (={alpha!r}) must be a finite number other than 0")
    layers = with_linear_scaling(adapter.refactor("convlora"))
    _check(layers)
    alphas = sorted({layer.alpha for layer in layers.values()})
    if alpha is None and len(alphas) > 1:
        shown = ", ".join(f"{a:g}" for a in alphas)
        raise ConvLoRAError(
            f"write: the layers have alphas {shown}, and a loralib file states none; alpha= rescales all to one"
        )
    tensors: dict[str, Tensor] = {}
    written = {}
    for layer_path, layer in layers.items():
        a, b = layer.tensors["lora_A"], layer.tensors["lora_B"]
        if alpha is not None and layer.alpha != alpha:
            b = (b.double() * (layer.alpha / alpha)).to(b.dtype)
        tensors.update({tensor_key(layer_path, "lora_A"): a, tensor_key(layer_path, "lora_B"): b})
        written[layer_path] = replace(layer, alpha=layer.alpha if alpha is None else alpha)
    write_tensors(path, tensors, {"format": "pt", LAYERS: layers_to_json(written)})


def _check(layers: Mapping[str, LayerFactors]) -> None:
    for path, layer in layers.items():
        kernel = layer.spec.kernel
        reason = None
        if layer.spec.transposed:
            reason = "is a transposed convolution, which loralib lacks"
        elif len(kernel) not in (0, 2) or len(set(kernel)) > 1:
            reason = f"has a kernel {kernel}; loralib has Linear and Conv2d with square kernels"
        elif BIAS_DELTA in layer.tensors and bool(layer.tensors[BIAS_DELTA].ne(0).any()):
            reason = "has a bias delta; loralib stores biases whole"
        if reason:
            raise ConvLoRAError(f"write: no loralib file holds this adapter: '{path}' {reason}")
