"""DoRA: a direction with a LoCon update, and a magnitude of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convlora.factors.base import Shape, WeightSpec
from convlora.factors.locon import LoConFactors

# A magnitude that differs from the norm by no more than this share of it is the norm. It was the norm at the start, in
# float32; on another device, in another dtype or in a compiled graph the sum of squares is rounded otherwise.
ROUNDING = 16 * torch.finfo(torch.float32).eps

_LOCON = LoConFactors()


class DoRAFactors:
    """The factorization of DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5), which depends on the base weight W.

    `W' = m · V / ‖V‖` with `V = W + scale · B∘A`: A and B are those of LoCon, `lora_magnitude` m is `(out,)`, and the
    norm is that of each output channel, over `(in/groups, *kernel)`, as in PEFT. m starts as `‖W‖`. The norm counts as
    constant in backward (section 4.3 of the paper), as in PEFT. A channel of zeros starts as one and can be trained.
    A strength s acts on the whole change: `W + s · (W' - W)`.

    Args:
        per_input: the norm of each input channel instead, over `(out, *kernel)`, and m `(in/groups,)`: what LyCORIS
            has with `wd_on_out=False`.

    Example:
        >>> DoRAFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)
        {'lora_A': (4, 16, 3, 3), 'lora_B': (48, 4, 1, 1), 'lora_magnitude': (48,)}
    """

    inits: tuple[str, ...] = LoConFactors.inits
    needs_weight = True

    def __init__(self, per_input: bool = False) -> None:
        self._side = 1 if per_input else 0

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        sides = spec.out_channels, spec.in_channels // spec.groups
        return {**_LOCON.shapes(spec, rank), "lora_magnitude": (sides[self._side],)}

    def init_(self, factors: Mapping[str, Tensor], method: str, weight: Tensor) -> None:
        _LOCON.init_(factors, method)
        factors["lora_magnitude"].copy_(self._norms(weight))

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec, weight: Tensor, scale: float | Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(weight.dtype, factors["lora_A"].dtype), torch.float32)
        a, b, magnitude = (factors[name].to(wide) for name in ("lora_A", "lora_B", "lora_magnitude"))
        with torch.no_grad():
            update = _LOCON.delta({"lora_A": a, "lora_B": b}, spec).view(weight.shape)
            norms = self._norms(weight + scale * update)
        # The ratio goes to the factors: of their product, which is as large as W, backward keeps nothing.
        ratio = _ratio(magnitude, norms)
        sides = [b * ratio.view(-1, *[1] * (b.dim() - 1)), a] if self._side == 0 else [b, a * self._along(ratio, a)]
        update = _LOCON.delta({"lora_A": sides[1], "lora_B": sides[0]}, spec).view(weight.shape)
        return (self._along(ratio, weight) - 1) * weight + scale * update

    def pad(self, factors: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**factors, **_LOCON.join([factors, more])}

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        return _LOCON.drop(factors, keep)

    def _norms(self, weight: Tensor) -> Tensor:
        others = [dim for dim in range(weight.dim()) if dim != self._side]
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(weight, dim=others, dtype=wide)
        return norms

    def _along(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values of channels, for each element of a weight."""
        return values.view([-1 if dim == self._side else 1 for dim in range(weight.dim())])


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`m / ‖V‖`, and exactly 1 where they are equal up to rounding, both zero included; the gradient is 1 / ‖V‖."""
    ratio = magnitude / norms.where(norms > 0, 1)
    rest = ((magnitude - norms).abs() <= ROUNDING * norms) * (1 - ratio)
    return ratio + rest.detach()
