"""DSCLoRA (arXiv 2504.11271) for a collapsed SPAN: where the adapters are, their ranks, and the loss.

The paper puts ConvLoRA into the convolutions of SPAN's blocks (its SConvLB), into the one before the upsampler and the
one of the pixel shuffle. It trains with `L = λ1·L1(HR) + λ2·L1(teacher) + λ3·affinity`: the teacher is the SPAN before
adaptation, the affinity the mean over its blocks' outputs. Ranks are those of the released code, alpha twice the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import convlora
from convlora.distill import Distiller
from sr.training import Loss, absolute_error

TARGETS = ["block_*.c?_r", "conv_2", "upsampler.0"]
RANK = 2
RANKS = {"conv_2": 8, "upsampler.0": 8}
BLOCKS = [f"block_{block}[0]" for block in range(1, 7)]  # a block returns its output, a feature and its attention


def inject_dsclora(model: nn.Module) -> nn.Module:
    """Put DSCLoRA's adapters on a SPAN, in place."""
    alphas = {layer: 2.0 * rank for layer, rank in RANKS.items()}
    return convlora.inject(model, TARGETS, rank=RANK, alpha=2.0 * RANK, ranks=RANKS, alphas=alphas)


@dataclass(frozen=True)
class Distillation:
    """The weights of the loss: `high` is λ1, `teacher` λ2, `affinity` λ3. With the last two 0 there is no teacher.

    `clean_teacher` shows the teacher the clean low resolution of the same patch, whatever the student gets; `by` is
    another teacher than the SPAN before adaptation, itself a collapsed SPAN of any width.
    """

    high: float = 1.0
    teacher: float = 1.0
    affinity: float = 1.0
    clean_teacher: bool = False
    by: nn.Module | None = None

    def __call__(self, model: nn.Module) -> Loss:
        """The loss of a batch `(low, high)` for a SPAN with adapters."""
        if not self.teacher and not self.affinity:
            return absolute_error(model)
        layers = BLOCKS if self.affinity else []
        distiller = Distiller(model, layers, teacher=self.by, weights=self.affinity / len(BLOCKS))

        def loss(low: Tensor, high: Tensor) -> Tensor:
            out = distiller(low, reduced(high, low) if self.clean_teacher else None)
            error, distance = F.l1_loss(out.student, high), F.l1_loss(out.student, out.teacher)
            return self.high * error + self.teacher * distance + out.loss

        return loss


def reduced(high: Tensor, low: Tensor) -> Tensor:
    """The clean low resolution of patches `(n, 3, h·scale, w·scale)`, as large as `low`, at 8 bits like a photo's."""
    clean = F.interpolate(high, size=low.shape[-2:], mode="bicubic", antialias=True)
    return clean.clamp(0, 1).mul(255).round() / 255
