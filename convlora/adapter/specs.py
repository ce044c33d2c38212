"""The weights of a bare checkpoint, as `WeightSpec`s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from convlora.adapter.parts import base_key, tensor_key
from convlora.errors import ConvLoRAError
from convlora.factors.base import PROJECTIONS, WeightSpec


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
