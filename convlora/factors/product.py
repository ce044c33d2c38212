"""What factorizations share whose ΔW is one matrix product, `B @ A`, with its elements in an order of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from convlora.factors.base import Shape, WeightSpec
from convlora.factors.svd import SVD, ChooseRank, Fit, leading_svd, svd, svd_of_product, truncate


class ProductFactors:
    """A starts random, B zero; ΔW is the matrix product `B @ A`, in an order of its own."""

    inits: tuple[str, ...] = ("default", "gaussian")

    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        a = factors["lora_A"]
        if method == "gaussian":  # as in PEFT: standard deviation 1/rank
            nn.init.normal_(a, std=1 / max(a.shape[0], 1))
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(factors["lora_B"])

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        b = factors["lora_B"]
        per_component = keep.repeat_interleave(b.shape[1] // keep.shape[0])
        return {**factors, "lora_B": b * per_component.view(1, -1, *[1] * (b.dim() - 2))}

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts], dim) for dim, name in enumerate(("lora_A", "lora_B"))}

    def fit(self, delta: Tensor, spec: WeightSpec, choose: ChooseRank) -> Fit:
        step, rows = self.shapes(spec, 1)["lora_A"][0], self.shapes(spec, 1)["lora_B"][0]
        matrix = delta.reshape(rows, -1)
        most = getattr(choose, "rank", None)  # any function will do
        return self._fit(svd(matrix) if most is None else leading_svd(matrix, most * step), spec, choose)

    def shrink(self, factors: Mapping[str, Tensor], spec: WeightSpec, choose: ChooseRank) -> Fit:
        return self._fit(svd_of_product(factors["lora_B"].flatten(1), factors["lora_A"].flatten(1)), spec, choose)

    def _fit(self, decomposed: SVD, spec: WeightSpec, choose: ChooseRank) -> Fit:
        left, right, rank, error = truncate(decomposed, self.shapes(spec, 1)["lora_A"][0], choose)
        shapes = self.shapes(spec, rank)
        return Fit({"lora_A": right.reshape(shapes["lora_A"]), "lora_B": left.reshape(shapes["lora_B"])}, rank, error)

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        raise NotImplementedError


def as_layer_weights(factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """The factors as weights of layers of the spec's kind; those of pointwise convolutions have no kernel."""
    a, b = factors["lora_A"], factors["lora_B"]
    ones = [1] * (len(spec.kernel) + 2 - a.dim())
    return a.view(*a.shape, *ones), b.view(*b.shape, *ones)
