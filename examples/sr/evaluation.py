"""What networks make of held-out photos: their quality, and whether two of them give the same output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from sr.data import Pair, to_image, to_tensor
from sr.degradations import enlarge
from sr.metrics import Quality, quality
from sr.models import predict, upscale

TOLERANCE = 1e-5  # of full scale: what another order of summation may change


@dataclass(frozen=True)
class Evaluation:
    """A way to enlarge the held-out photos: its outputs `(1, 3, h, w)`, their quality, and whose outputs they equal.

    `difference` from those of `equals` is the largest over all values, unrounded, in units of full scale.
    """

    name: str
    quality: Quality
    outputs: list[Tensor]
    equals: str = ""
    difference: float = 0.0

    @property
    def equality(self) -> str:
        """`"adapted, bitwise"` or `"adapted, to 3e-07"`; empty where nothing is claimed."""
        if not self.equals:
            return ""
        return f"{self.equals}, " + ("bitwise" if self.difference == 0 else f"to {self.difference:.0e}")

    def gain_over(self, base: Evaluation) -> float:
        """Mean PSNR-Y (dB) above that of `base`."""
        return self.quality.psnr - base.quality.psnr

    def as_json(self) -> dict[str, object]:
        """The figures without the outputs."""
        reached = self.quality
        facts = {"name": self.name, "psnr_y": reached.psnr, "ssim_y": reached.ssim, "psnr_y_each": reached.psnrs}
        if self.equals:
            facts |= {"equals": self.equals, "largest_difference": self.difference}
        return facts


@dataclass(frozen=True)
class HeldOutSet:
    """Photos that train nothing, each `draws` times in turn with another degradation."""

    pairs: Sequence[Pair]
    scale: int
    draws: int = 1

    def evaluate_bicubic(self) -> Evaluation:
        """Bicubic enlargement, which a network has to beat."""
        return self._evaluated("bicubic", [to_tensor(enlarge(pair.low, self.scale)) for pair in self.pairs])

    def evaluate(self, name: str, model: nn.Module, same: Evaluation | None = None) -> Evaluation:
        """The network as it is now; it should give what `same` gave."""
        return self._evaluated(name, [predict(model, pair.low) for pair in self.pairs], same)

    def psnr(self, model: nn.Module) -> float:
        """Mean PSNR-Y (dB) over one degradation of each photo."""
        firsts = self.pairs[:: self.draws]
        return quality([upscale(model, pair.low) for pair in firsts], [pair.high for pair in firsts], self.scale).psnr

    def _evaluated(self, name: str, outputs: list[Tensor], same: Evaluation | None = None) -> Evaluation:
        images, highs = [to_image(output) for output in outputs], [pair.high for pair in self.pairs]
        reached = quality(images, highs, self.scale)
        if same is None:
            return Evaluation(name, reached, outputs)
        differences = [(one - other).abs().max() for one, other in zip(outputs, same.outputs, strict=True)]
        return Evaluation(name, reached, outputs, same.name, float(torch.stack(differences).max()))


def quality_table(rows: Sequence[Evaluation], base: Evaluation, title: str) -> Table:
    """The rows as a rich table, with what each gains over `base`."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("PSNR-Y (dB)", "SSIM-Y", "over base (dB)"):
        table.add_column(column, justify="right")
    table.add_column("output equals")
    for row in rows:
        reached = row.quality
        gain = "" if row is base else f"{row.gain_over(base):+.3f}"
        table.add_row(row.name, f"{reached.psnr:.3f}", f"{reached.ssim:.4f}", gain, row.equality)
    return table
