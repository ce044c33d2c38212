"""`nn.MultiheadAttention` in a PEFT directory: one adapter of the whole module, as of peft 0.21.

PEFT adapts the input projection and `out_proj` together, at one rank and one alpha. Of an attention `attn` the keys are
`attn.lora_A`, `attn.lora_B` `(3·embed, r)` and `attn.base_layer.out_proj.lora_A`, `.lora_B`, and both follow the
patterns of `attn`. Two things are otherwise than for other layers, and a file means what PEFT computes with it:

- the update of `out_proj.weight` is added twice, live and merged, once by the attention and once by `out_proj` itself;
- `lora_bias` of the input projection is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.adapter.parts import BIAS_DELTA, LayerFactors
from convlora.errors import ConvLoRAError
from convlora.factors.base import WeightSpec

OUT, IN = "out_proj", "in_proj"
INNER = f".base_layer.{OUT}"  # of an attention's output projection in PEFT
TIMES = 2  # that PEFT adds the update of the output projection


def attention_of(path: str) -> str:
    """The path by which PEFT states rank and alpha of a layer: that of the attention for its output projection."""
    return path.removesuffix(INNER)


def from_peft(layers: Mapping[str, LayerFactors]) -> dict[str, LayerFactors]:
    """The layers of this library for those of PEFT.

    Raises:
        ConvLoRAError: two of them would be one.
    """
    attentions = {attention_of(path) for path in layers if path.endswith(INNER)}
    placed: dict[str, LayerFactors] = {}
    for path, layer in layers.items():
        attention = attention_of(path)
        if path != attention:
            place, layer = f"{attention}.{OUT}", replace(layer, alpha=layer.alpha * TIMES)
        elif path in attentions:
            tensors = {name: tensor for name, tensor in layer.tensors.items() if name != BIAS_DELTA}
            spec = replace(layer.spec, in_parent=True)
            place, layer = f"{path}.{IN}", replace(layer, tensors=tensors, spec=spec)
        else:
            place = path
        if place in placed:
            raise ConvLoRAError(f"'{place}' has factors of its own and, of '{attention}', those of an attention")
        placed[place] = layer
    return placed


def why_not_in_peft(path: str, layer: LayerFactors) -> str | None:
    """Why PEFT has no place for a projection of attention; None if it has."""
    if not layer.spec.in_parent:
        return None
    if path.rpartition(".")[2] != IN:
        return "is a projection of an attention with separate weights, which PEFT cannot adapt"
    if path == IN:
        return "is of the model itself, which PEFT cannot adapt"
    if BIAS_DELTA in layer.tensors and bool(layer.tensors[BIAS_DELTA].ne(0).any()):
        return "has a bias delta, which PEFT leaves out of an attention's input projection"
    return None


def why_no_attention(path: str, layer: LayerFactors, base: Container[str]) -> str | None:
    """Why there is no place for a projection of attention where the whole module cannot be adapted; None for others."""
    parent, _, last = path.rpartition(".")
    if layer.spec.in_parent or (last == OUT and f"{parent}.{IN}_weight" in base):
        return "is a projection of an attention, which only LoRA of PEFT adapts, as a whole"
    return None


def to_peft(
    layers: Mapping[str, LayerFactors], scale: Callable[[int, float], float], base: Iterable[str] | None
) -> dict[str, LayerFactors]:
    """The layers of PEFT for those of this library, the two of an attention at one rank and one alpha.

    An attention of which the adapter has one projection alone gets an update of zero for the other one. That a layer
    `attn.out_proj` is an attention's is told by `attn.in_proj` beside it, or by the names of the base's state dict.
    """
    names = set(base or ())
    attentions = {path.rpartition(".")[0] for path, layer in layers.items() if layer.spec.in_parent}
    parents = (path.rpartition(".")[0] for path in layers if path.endswith(f".{OUT}"))
    attentions |= {parent for parent in parents if f"{parent}.{IN}_weight" in names}
    placed: dict[str, LayerFactors] = {}
    for path, layer in layers.items():
        parent, _, last = path.rpartition(".")
        if parent not in attentions or last not in (IN, OUT):
            placed[path] = layer
        elif parent not in placed:
            inner, outer = (layers.get(f"{parent}.{name}") for name in (IN, OUT))
            width = layer.spec.shape[1]
            inner = inner or _idle(layer, (3 * width, width))
            outer = outer or _idle(layer, (width, width))
            placed[parent], placed[f"{parent}{INNER}"] = _at_one_rank(inner, outer, scale)
    return placed


def _idle(beside: LayerFactors, shape: tuple[int, int]) -> LayerFactors:
    """An update of zero, of the size of another layer's."""
    a, b = beside.tensors["lora_A"], beside.tensors["lora_B"]
    tensors = {"lora_A": torch.zeros_like(a), "lora_B": b.new_zeros(shape[0], beside.rank)}
    return LayerFactors(tensors, WeightSpec(shape), beside.rank, beside.alpha)


def _at_one_rank(
    inner: LayerFactors, outer: LayerFactors, scale: Callable[[int, float], float]
) -> tuple[LayerFactors, LayerFactors]:
    """The two projections with the larger of their ranks and one alpha: zeros are added, and B takes the rest."""
    rank = max(inner.rank, outer.rank)
    alpha = (inner.alpha if inner.rank == rank else outer.alpha / TIMES) or float(rank)
    pair = []
    for layer, times in ((inner, 1), (outer, TIMES)):
        gain = scale(layer.rank, layer.alpha) / (times * scale(rank, alpha))
        b = layer.tensors["lora_B"]
        added = rank - layer.rank
        tensors: dict[str, Tensor] = {
            **layer.tensors,
            "lora_A": F.pad(layer.tensors["lora_A"], (0, 0, 0, added)),
            "lora_B": F.pad((b.double() * gain).to(b.dtype) if gain != 1 else b, (0, added)),
        }
        pair.append(replace(layer, tensors=tensors, rank=rank, alpha=alpha))
    return pair[0], pair[1]
