"""The weights of a model or of a bare checkpoint, as `WeightSpec`s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from convlora.adapter import key
from convlora.errors import ConvLoRAError
from convlora.factors.base import WeightSpec
from convlora.layer import weight_spec, why_not
from convlora.walk import unwrap


def specs_of(model: nn.Module) -> dict[str, WeightSpec]:
    """Layer path -> weight, for every layer that can be adapted, each once, in model order.

    Example:
        >>> specs_of(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()))
        {'0': WeightSpec(shape=(8, 2, 3, 3), groups=2, transposed=False)}
    """
    named = unwrap(model, "specs_of").named_modules()
    return {path: weight_spec(layer) for path, layer in named if why_not(layer) is None}


def specs_from_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, WeightSpec]:
    """Layer path -> weight, for every floating `.weight` of two or more dimensions, in the order of the checkpoint.

    A bare checkpoint tells neither groups nor transposed layers: see `guess`.

    Example:
        >>> specs_from_checkpoint(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).state_dict())
        {'0': WeightSpec(shape=(8, 4, 3, 3), groups=1, transposed=False)}
    """
    if not isinstance(state_dict, Mapping):
        raise ConvLoRAError(f"specs_from_checkpoint: expected a state dict, got {type(state_dict).__name__}")
    specs = {}
    for name, weight in state_dict.items():
        path, _, last = str(name).rpartition(".")
        if last == "weight" and is_weight(weight):
            specs[path] = guess(tuple(weight.shape), state_dict.get(key(path, "bias")))
    return specs


def is_weight(value: Any) -> bool:
    """Whether an entry of a checkpoint named `weight` can be that of a convolution or Linear.

    Example:
        >>> import torch
        >>> is_weight(torch.zeros(8, 4, 3, 3)), is_weight(torch.zeros(8)), is_weight(None)
        (True, False, False)
    """
    return isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point() and value.numel() > 0


def guess(shape: tuple[int, ...], bias: Any) -> WeightSpec:
    """groups=1, but for a bias that has the length of a transposed convolution's `(in, out/groups, *kernel)` alone.

    Example:
        >>> import torch
        >>> guess((8, 4, 2, 2), torch.zeros(4))
        WeightSpec(shape=(8, 4, 2, 2), groups=1, transposed=True)
    """
    length = bias.numel() if isinstance(bias, Tensor) else shape[0]
    groups, rest = divmod(length, shape[1])
    if length == shape[0] or len(shape) < 3 or rest or not groups or shape[0] % groups:
        return WeightSpec(shape)
    return WeightSpec(shape, groups, transposed=True)
