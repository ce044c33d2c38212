"""ConvLoRA: factors of the matrix `(out·k, in·k)`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from convlora.factors.base import Shape, WeightSpec
from convlora.factors.product import ProductFactors, as_layer_weights


class ConvLoRAFactors(ProductFactors):
    """The factorization of ConvLoRA (Aleem et al. 2024, arXiv 2402.04964) and of microsoft/LoRA's `ConvLoRA`.

    `ΔW = (B @ A).view(W.shape)` with A `(r·k, in·k)` and B `(out//groups·k, r·k)` for a k×k kernel.
    For other kernels the first half of the kernel dimensions (rounded down) goes to the rows, the rest to the
    columns: with `k_row` and `k_col` their sizes, A is `(r·m, in·k_col)`, B is `(out//groups·k_row, r·m)`,
    `m = min(k_row, k_col)`. So kh×kw kernels have `k_row = kh`, `k_col = kw`; 1d kernels 1 and k; k×k×k kernels
    k and k². `Linear` and 1×1 convolutions are plain LoRA, A `(r, in)` and B `(out//groups, r)`.

    Example:
        >>> ConvLoRAFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)
        {'lora_A': (12, 48), 'lora_B': (144, 12)}
    """

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        half = len(spec.kernel) // 2
        k_row, k_col = math.prod(spec.kernel[:half]), math.prod(spec.kernel[half:])
        inner = rank * min(k_row, k_col)
        return {
            "lora_A": (inner, spec.in_channels * k_col),
            "lora_B": (spec.out_channels // spec.groups * k_row, inner),
        }

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        return factors["lora_B"] @ factors["lora_A"]

    def chain(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor] | None:
        if math.prod(spec.kernel) > 1 or spec.groups > 1:
            return None
        return as_layer_weights(factors, spec)

    def on_patches(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor, int]:
        """A, B and k_row such that the update of a patch `(in·k_row·k_col,)` is `B · (A on each of its k_row blocks)`.

        Row `(o, i)` of `B @ A` is block i of output o, for one group. Shapes: A `(r·m, in·k_col)`,
        B `(out, k_row·r·m)`.
        """
        blocks = math.prod(spec.kernel[: len(spec.kernel) // 2])
        return factors["lora_A"], factors["lora_B"].reshape(spec.out_channels, -1), blocks
