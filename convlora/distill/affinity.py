"""Spatial affinity in blocks: loss and gradient in one pass, without a matrix of all pixel pairs.

With unit vectors `s_p` and `t_p` per pixel the loss is the mean of |D| over all pixel pairs, `D = SᵀS - TᵀT`, and its
gradient `∂/∂S = 2·S·sign(D) / (N·n²)`. D is symmetric and equals `½(AᵀB + BᵀA)` for `A = S + T`, `B = S - T`: so one
product of 2C channels gives a block of D, exactly 0 where the features agree and without cancellation where they
nearly do. Blocks on and above the diagonal suffice, each small enough for a processor's cache, and are forgotten as
soon as their share of loss and gradient is taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convlora.errors import ConvLoRAError

SHORTEST_VECTOR = 1e-12  # a shorter vector has no direction: affinity 0 to every pixel, and no gradient

# Elements of one block over all images. On a CPU by measurement: 1 MiB of float32, the second-level cache. On a GPU by
# reasoning: 64 MiB, large enough that launching the few operations of a block costs nothing.
CACHED, OCCUPYING = 2**18, 2**24


def pairwise_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean |SᵀS - TᵀT| over images and pixel pairs, columns of S and T scaled to unit length.

    Shapes: both `(N, C, n)`, float32 or float64, the same.
    """
    gradients = torch.is_grad_enabled()
    wanted = student.requires_grad and gradients, teacher.requires_grad and gradients
    loss: Tensor = _forward(student, teacher, *wanted)[0]
    return loss


@torch.library.custom_op("convlora::spatial_affinity", mutates_args=())
def _forward(student: Tensor, teacher: Tensor, for_student: bool, for_teacher: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where wanted, its gradients with respect to the features; else tensors of no element."""
    with torch.autocast(student.device.type, enabled=False):
        images, _, pixels = student.shape
        unit_s, length_s = _unit(student)
        unit_t, length_t = _unit(teacher)
        # Unit vectors rounded to float32 would already have lost a small difference, so it is formed before rounding.
        total, differences = (unit_s + unit_t).to(student.dtype), (unit_s - unit_t).to(student.dtype)
        unit_s, unit_t = unit_s.to(student.dtype), unit_t.to(student.dtype)
        rows = torch.cat([total, differences], 1).transpose(1, 2).contiguous()  # (N, n, 2C)
        columns = torch.cat([differences, total], 1)
        del total, differences
        sides = [
            (unit.transpose(1, 2).contiguous(), torch.zeros_like(unit.transpose(1, 2)).contiguous())
            for unit, wanted in ((unit_s, for_student), (unit_t, for_teacher))
            if wanted
        ]
        loss = student.new_zeros((), dtype=torch.float64 if student.device.type == "cpu" else student.dtype)
        side = _block_side(images, pixels, student.device.type)
        for top in range(0, pixels, side):
            i = slice(top, top + side)
            for left in range(top, pixels, side):
                j = slice(left, left + side)
                block = torch.bmm(rows[:, i], columns[:, :, j])  # 2·D
                loss += block.abs().sum() * (0.5 if left == top else 1.0)
                if sides:
                    block.sign_()
                for unit, gradient in sides:
                    gradient[:, i].baddbmm_(block, unit[:, j])
                    if left > top:
                        gradient[:, j].baddbmm_(block.transpose(1, 2), unit[:, i])
        scale = 1 / max(images * pixels**2, 1)
        found = iter(gradient.transpose(1, 2) for _, gradient in sides)
        none = student.new_empty(0)
        return (
            (loss * scale).to(student.dtype),
            _through_unit(next(found), unit_s, length_s, 2 * scale) if for_student else none,
            _through_unit(next(found), unit_t, length_t, -2 * scale) if for_teacher else none.clone(),
        )


def _block_side(images: int, pixels: int, device: str) -> int:
    side = math.isqrt((CACHED if device == "cpu" else OCCUPYING) // max(images, 1))
    return max(32, min(pixels, side // 32 * 32))


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit length in float64, and what they were divided by (infinite for those without a direction)."""
    precise = features if features.device.type == "mps" else features.double()  # mps has no float64
    length = torch.linalg.vector_norm(precise, dim=1, keepdim=True)
    length = length.masked_fill(length <= SHORTEST_VECTOR, torch.inf)
    return precise / length, length.to(features.dtype)


def _through_unit(gradient: Tensor, unit: Tensor, length: Tensor, scale: float) -> Tensor:
    """The gradient with respect to vectors from that with respect to their unit vectors."""
    along = (gradient * unit).sum(1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1).mul_(scale / length).contiguous()


@_forward.register_fake
def _(student: Tensor, teacher: Tensor, for_student: bool, for_teacher: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        student.new_empty(()),
        torch.empty_like(student, memory_format=torch.contiguous_format) if for_student else student.new_empty(0),
        torch.empty_like(teacher, memory_format=torch.contiguous_format) if for_teacher else student.new_empty(0),
    )


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, loss: Tensor | None, *second: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(gradient is not None for gradient in second):
        raise ConvLoRAError("spatial_affinity: no second derivative; channel_affinity has one")
    gradients = (None if g.numel() == 0 or loss is None else loss * g for g in ctx.saved_tensors)
    return *gradients, None, None


_forward.register_autograd(_backward, setup_context=_keep)
