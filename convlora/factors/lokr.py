"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convlora.factors.base import Shape, WeightSpec


class LoKrFactors:
    """The factorization of LyCORIS's and PEFT's LoKr (Yeh et al. 2023, arXiv 2309.14859).

    `ΔW = w1 ⊗ w2`, the Kronecker product of w1 `(a, c)` and w2 `(b, d, *kernel)`: `out = a·b` and `in/groups = c·d`,
    each split as near to its root as it divides, the smaller number to w1. w2 is the product of w2_a `(b, r)` and w2_b
    `(r, d·k)`, k the kernel's size; from `r = max(b, d) / 2` on it is whole, `lokr_w2`, and r says nothing more. It
    starts as in LyCORIS: w1 and w2_a Kaiming-uniform, w2_b (or w2) zero.

    Args:
        factor: the largest divisor for w1; -1 is no limit. LyCORIS's `factor`, PEFT's `decompose_factor`.

    Example:
        >>> LoKrFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=2)
        {'lokr_w1': (6, 4), 'lokr_w2_a': (8, 2), 'lokr_w2_b': (2, 36)}
        >>> LoKrFactors(factor=2).shapes(WeightSpec((48, 16)), rank=12)
        {'lokr_w1': (2, 2), 'lokr_w2': (24, 8)}
    """

    inits: tuple[str, ...] = ("default",)
    free_rank = True

    def __init__(self, factor: int = -1) -> None:
        self._factor = factor

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        (a, b), (c, d) = (split(n, self._factor) for n in (spec.out_channels, spec.in_channels // spec.groups))
        if 2 * rank >= max(b, d):
            return {"lokr_w1": (a, c), "lokr_w2": (b, d, *spec.kernel)}
        return {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(spec.kernel))}

    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        nn.init.kaiming_uniform_(factors["lokr_w1"], a=math.sqrt(5))
        if "lokr_w2" in factors:
            nn.init.zeros_(factors["lokr_w2"])
        else:
            nn.init.kaiming_uniform_(factors["lokr_w2_a"], a=math.sqrt(5))
            nn.init.zeros_(factors["lokr_w2_b"])

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        w1, w2 = factors["lokr_w1"], factors.get("lokr_w2")
        if w2 is None:
            w2 = (factors["lokr_w2_a"] @ factors["lokr_w2_b"]).view(factors["lokr_w2_a"].shape[0], -1, *spec.kernel)
        # torch.kron, which exporters do not know: every element of w1 times all of w2
        (a, c), (b, d, *kernel) = w1.shape, w2.shape
        blocks = w1.view(a, 1, c, 1, *[1] * len(kernel)) * w2.view(1, b, 1, d, *kernel)
        return blocks.view(a * b, c * d, *kernel)

    def pad(self, factors: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
        w2 = {name: torch.cat([factors[name], more[name]], dim) for dim, name in ((1, "lokr_w2_a"), (0, "lokr_w2_b"))}
        return {**factors, **w2}

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """Of w2; a whole one is one component."""
        if "lokr_w2" in factors:
            return {**factors, "lokr_w2": factors["lokr_w2"] * keep[0]}
        return {**factors, "lokr_w2_a": factors["lokr_w2_a"] * keep}


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """The two divisors of a number nearest to its root, the smaller first and at most `factor` if that is positive.

    A factor that divides the number is taken as it is, as LyCORIS does.

    Example:
        >>> split(128), split(250), split(127), split(512, 4), split(360, 7)
        ((8, 16), (10, 25), (1, 127), (4, 128), (6, 60))
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor <= 0 else min(math.isqrt(size), factor)
    small = next(n for n in range(limit, 0, -1) if size % n == 0)
    return small, size // small
