"""Dense: ΔW itself, as one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from convlora.factors.base import Shape, WeightSpec
from convlora.factors.svd import ChooseRank, Fit


class DenseFactors:
    """ΔW as it is, `diff` `(out, in/groups, *kernel)`: full fine-tuning of the layer, as an adapter.

    What LyCORIS calls `full` and files hold as `diff`. It counts as one component whatever the rank, so rank says
    nothing but in the scale `alpha / rank`, which is 1 where alpha is not given; dropping it drops ΔW. Starts zero.

    Example:
        >>> DenseFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)
        {'diff': (48, 16, 3, 3)}
    """

    inits: tuple[str, ...] = ("default",)
    free_rank = True

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        return {"diff": (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)}

    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        nn.init.zeros_(factors["diff"])

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        return factors["diff"]

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        return {**factors, "diff": factors["diff"] * keep[0]}

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {"diff": torch.stack([part["diff"] for part in parts]).sum(0)}

    def fit(self, delta: Tensor, spec: WeightSpec, choose: ChooseRank) -> Fit:
        return Fit({"diff": delta.reshape(self.shapes(spec, 1)["diff"])}, 1, 0.0)
