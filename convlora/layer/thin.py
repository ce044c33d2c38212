"""Training one low-rank update of a frozen layer without the gradient of its whole weight.

For a weight `W + s·B∘A`, where A is a convolution to r channels and B a 1×1 convolution after it, the plain composite
forms `∂L/∂W`, as large as W and half as much work as the frozen layer itself, only to multiply it by A and by B. Here

    gz = (s·B)ᵀ·gy,    ∂L/∂A = gz ⋆ x,    z = s·A∗x,    ∂L/∂B = gy·zᵀ

which is r/out + r/(in·k²) as much work as the frozen layer's forward and input gradient. The forward is one
convolution with the effective weight, bitwise the composite's, and keeps x alone; z and the weight are formed again.

Convolutions of few channels are slow on a CPU, so A's part is one matrix product per image, over the k² shifts of the r
channels rather than of the `in` ones. One image at a time keeps what is between in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.factors.fuse import fuse_weight

Pair = tuple[int, int]


class LowRankUpdate(NamedTuple):
    """A low-rank update as two layers, one after the other: `a (r, in, *kernel)`, `b (out, r, 1…)`, times `gain`."""

    a: Tensor
    b: Tensor
    gain: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The composite's weight, bitwise. Where nothing is differentiated it is formed in place: it may be large."""
        update = (self.b.flatten(1) @ self.a.flatten(1)).view(weight.shape)
        if torch.is_grad_enabled():
            return fuse_weight(weight, [update * self.gain])
        return torch.add(weight, update.mul_(self.gain), out=update if weight.is_contiguous() else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, update: LowRankUpdate) -> Tensor:
    """`F.linear` with the updated weight. Shapes: x `(*, in)`, weight `(out, in)`."""
    return _Linear.apply(x, weight, bias, *update)  # type: ignore[no-any-return]


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: LowRankUpdate, padding: Pair, dilation: Pair
) -> Tensor:
    """`F.conv2d` with the updated weight, of stride 1 and one group. Shapes: x `(n, in, h, w)`."""
    return _Conv2d.apply(x, weight, bias, *update, padding, dilation)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias, a, b)
        ctx.gain = gain
        return F.linear(x, LowRankUpdate(a, b, gain).added_to(weight), bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = outputs
        x, weight, bias, a, b = ctx.saved_tensors
        update = LowRankUpdate(a, b, ctx.gain)
        if torch.is_grad_enabled():
            y = F.linear(x, update.added_to(weight), bias)
            return *_differentiable(y, (x, None, bias, a, b), gy, ctx.needs_input_grad), None
        for_x, _, for_bias, for_a, for_b, _ = ctx.needs_input_grad
        gx = gy @ update.added_to(weight) if for_x else None
        rows, gy = x.flatten(0, -2), gy.flatten(0, -2)
        ga = (gy @ (b * ctx.gain)).T @ rows if for_a else None
        gb = gy.T @ (rows @ (a * ctx.gain).T) if for_b else None
        return gx, None, gy.sum(0) if for_bias else None, ga, gb, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        gain: float,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, a, b)
        ctx.gain, ctx.padding, ctx.dilation = gain, padding, dilation
        return F.conv2d(x, LowRankUpdate(a, b, gain).added_to(weight), bias, 1, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = outputs
        x, weight, bias, a, b = ctx.saved_tensors
        padding, dilation = ctx.padding, ctx.dilation
        updated = LowRankUpdate(a, b, ctx.gain).added_to(weight)
        if torch.is_grad_enabled():
            y = F.conv2d(x, updated, bias, 1, padding, dilation)
            return *_differentiable(y, (x, None, bias, a, b), gy, ctx.needs_input_grad), None, None, None
        for_x, _, for_bias, for_a, for_b, *_ = ctx.needs_input_grad
        gx = None
        if for_x:
            gx, _, _ = torch.ops.aten.convolution_backward(
                gy, x, updated, None, (1, 1), padding, dilation, False, (0, 0), 1, (True, False, False)
            )
        ga, gb = _thin_gradients(x, gy, a, b.flatten(1) * ctx.gain, padding, dilation, for_a, for_b)
        if gb is not None:
            gb = (gb * ctx.gain).view_as(b)
        return gx, None, gy.sum((0, 2, 3)) if for_bias else None, ga, gb, None, None, None


def _differentiable(
    y: Tensor, inputs: Sequence[Tensor | None], gy: Tensor, needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The gradients of the plain composite, which can be differentiated again."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=False) if need and tensor is not None]
    gradients = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
    return (next(gradients) if need else None for _, need in zip(inputs, needed, strict=False))


def _thin_gradients(
    x: Tensor, gy: Tensor, a: Tensor, b: Tensor, padding: Pair, dilation: Pair, for_a: bool, for_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `a (r, in, kh, kw)` and of `b (out, r)` for `y = b·(a ∗ x)`; that of b for unscaled a.

    Both go over the shifts of r channels: of gz for a, and of `u`, a's products with x tap by tap, for b. In `u` an
    image is one line of pixels, with zeros around, in which tap (i, j) is an offset; columns that an offset would carry
    into the next line of the image are zeroed.
    """
    (rank, inner, rows, columns), (height, width), (high, wide) = a.shape, x.shape[2:], gy.shape[2:]
    pixels, down, right = height * width, *dilation
    first = padding[0] * width + padding[1]
    length = first + pixels + padding[0] * width + right * (columns - 1) - padding[1]

    # gz, placed so that the window at tap (i, j), counted from the last, shows it as x at that tap meets it.
    around = x.new_zeros(rank, height + down * (rows - 1), width + right * (columns - 1))
    top, left = down * (rows - 1) - padding[0], right * (columns - 1) - padding[1]
    place = around[:, top : top + high, left : left + wide]
    line = around.stride(1)
    windows = around.as_strided((rank, rows, columns, height, width), (around.stride(0), down * line, right, line, 1))
    shifted = x.new_empty(rank, rows, columns, height, width)

    u = x.new_zeros(rank * rows * columns, length)
    products = u[:, first : first + pixels]
    by_column = products.view(rank * rows, columns, height, width)
    offsets = [tap * right - padding[1] for tap in range(columns)]
    carried = [by_column[:, tap, :, slice(offset) if offset > 0 else slice(offset, None)]
               for tap, offset in enumerate(offsets) if offset]  # fmt: skip
    met = u.as_strided(
        (rank, rows, columns, high * width),
        (rows * columns * length, columns * length + down * width, length + right, 1),
    )

    back = x.new_zeros(rank * rows * columns, inner) if for_a else None
    gb = x.new_zeros(rank, len(b)) if for_b else None
    by_tap = a.permute(0, 2, 3, 1).reshape(rank * rows * columns, inner)
    b = b.T
    # One image after the other: what lies between stays in the cache. All in one batch was slower, on two threads, too.
    for image, gradient in zip(x.flatten(2), gy.flatten(2), strict=True):
        if back is not None:
            place.copy_((b @ gradient).view(rank, high, wide))
            back.addmm_(shifted.copy_(windows).view(len(back), pixels), image.T)
        if gb is not None:
            torch.mm(by_tap, image, out=products)
            for columns_of_a_tap in carried:
                columns_of_a_tap.zero_()
            z = met.sum(2).sum(1).view(rank, high, width)[..., :wide]
            gb.addmm_(z.reshape(rank, high * wide), gradient.T)
    ga = None if back is None else back.view(rank, rows, columns, inner).flip((1, 2)).permute(0, 3, 1, 2)
    return ga, gb.T if gb is not None else None
