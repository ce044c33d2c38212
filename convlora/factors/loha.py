"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convlora.factors.base import Shape, WeightSpec


class LoHaFactors:
    """The factorization of LyCORIS's and PEFT's LoHa, which is FedPara's (Hyeon-Woo et al. 2021, arXiv 2108.06098).

    `ΔW = (w1_a @ w1_b) ⊙ (w2_a @ w2_b)` as a matrix `(out, in/groups·k)`, with the a `(out, r)` and the b
    `(r, in/groups·k)`, k the kernel's size: a rank of up to r² from twice the numbers of rank r. Kernels are flat, as
    in PEFT without `use_effective_conv2d`; the Tucker form of LyCORIS (`hada_t1`, `hada_t2`) is not here. It starts as
    in LyCORIS: normal numbers, of standard deviation 0.1 in w1_a, and w2_a zero.

    Example:
        >>> LoHaFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)["hada_w1_b"]
        (4, 144)
    """

    inits: tuple[str, ...] = ("default",)
    forms_again = True
    free_rank = True

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        a, b = (spec.out_channels, rank), (rank, spec.in_channels // spec.groups * math.prod(spec.kernel))
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        nn.init.normal_(factors["hada_w1_a"], std=0.1)
        nn.init.normal_(factors["hada_w1_b"])
        nn.init.zeros_(factors["hada_w2_a"])
        nn.init.normal_(factors["hada_w2_b"])

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        first = factors["hada_w1_a"] @ factors["hada_w1_b"]
        return first * (factors["hada_w2_a"] @ factors["hada_w2_b"])

    def pad(self, factors: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With columns of zeros in both a, since each matrix multiplies the other."""
        more = {name: torch.zeros_like(t) if name.endswith("_a") else t for name, t in more.items()}
        return {name: torch.cat([factors[name], more[name]], dim=1 if name.endswith("_a") else 0) for name in more}

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """Of the first matrix: ΔW is linear in it."""
        return {**factors, "hada_w1_a": factors["hada_w1_a"] * keep}
