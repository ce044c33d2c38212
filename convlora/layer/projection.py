"""A projection of attention as a layer: `nn.MultiheadAttention` holds its weight as a bare Parameter, `in_proj_weight`.

`Projection` is the layer that is missing there, without a tensor of its own: the Parameter stays where it is, so base
keys, checkpoints and optimizers see nothing of it. With an adapter it is the attention's child `in_proj` (`q_proj`, …),
so the factors are `<attention>.in_proj.convlora.<adapter>.lora_A` in a full checkpoint, and the attention itself reads
the effective weight: see adapted.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from convlora.factors.base import PROJECTIONS

# Tensor of an attention -> the projection whose tensor it is, and what it is there. The bias of separate projections
# is one Parameter for the three of them, so it is none of theirs.
PROJECTED = {f"{name}_weight": (name, "weight") for name in PROJECTIONS} | {"in_proj_bias": ("in_proj", "bias")}
_NAMES = {place: name for name, place in PROJECTED.items()}


class Projection(nn.Linear):
    """One projection of an attention: its `weight` and `bias` are the attention's, read and never held.

    Args:
        owner: the attention.
        name: one of `PROJECTIONS`.
        shape: of the weight, `(out, in)`.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, name: str, shape: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # no child: it is the parent
        self.name = name
        self.out_features, self.in_features = shape
        self.training = owner.training

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return getattr(self.owner, f"{self.name}_weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        name = self.held_name("bias")
        return None if name is None else getattr(self.owner, name)

    def held_name(self, kind: str) -> str | None:
        """The name that the owner has for the weight or bias; None for a bias that is not of this projection alone."""
        return _NAMES.get((self.name, kind))

    def held_names(self) -> Iterable[str]:
        """The names of the owner's tensors that are this projection's."""
        return (name for name, (projection, _) in PROJECTED.items() if projection == self.name)

    def reset_parameters(self) -> None:
        """Nothing: the owner starts its own Parameters."""


def projections_on(module: nn.Module) -> list[Projection]:
    """The projections of an attention that have adapters: those that are its children."""
    return [child for child in module._modules.values() if isinstance(child, Projection)]


def home_of(layer: nn.Module, kind: str) -> tuple[nn.Module, str | None]:
    """The module that has a tensor of a layer, and the tensor's name there."""
    return (layer.owner, layer.held_name(kind)) if isinstance(layer, Projection) else (layer, kind)


def base_parameter(layer: nn.Module, kind: str) -> Tensor | None:
    """The Parameter that a tensor of a layer is without adapters; None for one that is computed, or is not there."""
    module, name = home_of(layer, kind)
    return module._parameters.get(name)  # type: ignore[arg-type]
