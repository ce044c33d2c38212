"""Several adapters in one batch: which row of a layer's input gets which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from convlora.errors import ConvLoRAError


class SampleRows:
    """The adapter of each sample; None is the base alone. Samples of one adapter go through a layer together."""

    def __init__(self, names: Sequence[str | None], folded: bool) -> None:
        self.names, self.folded = tuple(names), folded
        self.order = sorted(range(len(names)), key=lambda sample: names[sample] or "")
        self.inverse = sorted(range(len(names)), key=lambda place: self.order[place])
        self.runs = [(name, len(list(run))) for name, run in groupby(names[sample] for sample in self.order)]

    def through(self, call: Callable[[str | None, Tensor], Tensor], x: Tensor, least_dims: int) -> Tensor:
        """`call(name, rows)` for each adapter, with its rows of `x`; the outputs in the order of `x`.

        Raises:
            ConvLoRAError: `x` has no row for each sample, or several and `folded` does not say so.
        """
        samples = len(self.names)
        each, rest = divmod(len(x), samples) if x.dim() >= least_dims else (0, 0)
        if not each or rest or (each > 1 and not self.folded):
            remedy = "; if those of a sample are adjacent, say folded=True" if each > 1 and not rest else ""
            raise ConvLoRAError(f"per_sample: {samples} names for a layer input of shape {tuple(x.shape)}{remedy}")
        if len(self.runs) == 1:
            return call(self.runs[0][0], x)
        parts = torch.split(self._pick(x, each, self.order), [count * each for _, count in self.runs])
        y = torch.cat([call(name, part) for (name, _), part in zip(self.runs, parts, strict=True)])
        return self._pick(y, each, self.inverse)

    def _pick(self, x: Tensor, each: int, order: list[int]) -> Tensor:
        if order == list(range(len(order))):
            return x
        return x.view(len(order), each, *x.shape[1:])[order].flatten(0, 1)
