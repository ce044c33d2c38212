"""LoCon: a thin convolution and a 1×1 convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from convlora.factors.base import Shape, WeightSpec
from convlora.factors.product import ProductFactors, as_layer_weights


class LoConFactors(ProductFactors):
    """The factorization of PEFT and LyCORIS (LoCon): a thin convolution, then a 1×1 convolution.

    `ΔW[o] = Σ_r B[o, r] · A[r]` with A `(r, in/groups, *kernel)` and B `(out, r, 1…)`.
    `Linear` and 1×1 convolutions are plain LoRA, A `(r, in/groups)` and B `(out, r)`.

    Example:
        >>> LoConFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)
        {'lora_A': (4, 16, 3, 3), 'lora_B': (48, 4, 1, 1)}
    """

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        kernel = spec.kernel if math.prod(spec.kernel) > 1 else ()
        return {
            "lora_A": (rank, spec.in_channels // spec.groups, *kernel),
            "lora_B": (spec.out_channels, rank, *[1] * len(kernel)),
        }

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        return factors["lora_B"].flatten(1) @ factors["lora_A"].flatten(1)

    def chain(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor] | None:
        if spec.groups > 1:
            return None
        return as_layer_weights(factors, spec)
