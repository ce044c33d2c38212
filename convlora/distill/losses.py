"""Losses between a student's and a teacher's features, and the register of their names.

A feature is `(N, C, *spatial)`; where the channels lie elsewhere (tokens `(N, L, C)`), say `channel_dim=-1`, for
instance by `functools.partial`. All are computed in float32 (float64 for float64 features), under autocast too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from convlora.distill.affinity import SHORTEST_VECTOR, pairwise_l1
from convlora.errors import ConvLoRAError

Loss = Callable[[Tensor, Tensor], Tensor]

_losses: dict[str, Loss] = {}


def register_loss(name: str, loss: Loss) -> Loss:
    """Give a loss `(student feature, teacher feature) -> scalar` a name for `Distiller(loss=name)`.

    Raises:
        ConvLoRAError: the name is taken by another loss, or `loss` cannot be called.

    Example:
        >>> huber = register_loss("huber", F.smooth_l1_loss)
        >>> huber(torch.zeros(2), torch.ones(2)).item()
        0.5
    """
    if not isinstance(name, str) or not name:
        raise ConvLoRAError(f"register_loss: name (={name!r}) must be a non-empty string")
    if not callable(loss):
        raise ConvLoRAError(f"register_loss: {name!r} must be callable, got {type(loss).__name__}")
    if _losses.get(name, loss) is not loss:
        raise ConvLoRAError(f"register_loss: {name!r} is taken; choose another name")
    _losses[name] = loss
    return loss


def get_loss(loss: str | Loss) -> Loss:
    """The loss of a name; a callable is handed through."""
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in _losses:
        raise ConvLoRAError(f"distill: no loss {loss!r}; there are {', '.join(sorted(_losses))}, or give a callable")
    return _losses[loss]


def spatial_affinity(student: Tensor, teacher: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Mean absolute difference of the affinities between all pixels of an image.

    `A = F̃ᵀF̃` of `(HW, HW)`, where F̃ `(C, HW)` has a unit vector per pixel; the mean of |A_S - A_T| over images and
    pixel pairs. The number of channels may differ. Neither forward nor backward ever holds an `(HW, HW)` matrix. A
    pixel whose channels are all zero has affinity 0 and gets no gradient.

    Shapes: `(N, C, *spatial)` both, the same N and spatial; the loss is between 0 and 2.

    Raises:
        ConvLoRAError: shapes that do not fit, or a second derivative.

    Source: He et al., FAKD (ICIP 2020), spatial affinity and its loss L_AD; used by DSCLoRA (arXiv 2504.11271).

    Example:
        >>> feature = torch.rand(1, 8, 6, 6)
        >>> spatial_affinity(feature, 3 * feature).item() < 1e-6  # the length of a pixel's vector does not count
        True
    """
    s, t = _channels_first("spatial_affinity", student, teacher, channel_dim, least_dims=3)
    if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
        raise ConvLoRAError(f"spatial_affinity: {_unequal(student, teacher)}: images and pixels must be the same")
    channels = max(s.shape[1], t.shape[1])
    vectors = (rearrange(f, "b c ... -> b c (...)") for f in (s, t))
    s, t = (F.pad(f, (0, 0, 0, channels - f.shape[1])) if f.shape[1] < channels else f for f in vectors)
    return pairwise_l1(s, t)


def channel_affinity(student: Tensor, teacher: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Mean absolute difference of the affinities between all channels of an image.

    `A = F̃F̃ᵀ` of `(C, C)`, where F̃ `(C, HW)` has a unit vector per channel; the mean of |A_S - A_T| over images and
    channel pairs. The spatial size may differ.

    Shapes: `(N, C, *spatial)` both, the same N and C.

    Source: He et al., FAKD (ICIP 2020), channel affinity.

    Example:
        >>> feature = torch.rand(1, 8, 6, 6)
        >>> channel_affinity(feature, feature.flip(-1)).item() < 1e-6  # where in the image does not count
        True
    """
    s, t = _channels_first("channel_affinity", student, teacher, channel_dim, least_dims=3)
    if s.shape[:2] != t.shape[:2]:
        raise ConvLoRAError(f"channel_affinity: {_unequal(student, teacher)}: images and channels must be the same")
    return _affinity_l1(*(rearrange(f, "b c ... -> b c (...)") for f in (s, t)))


def instance_affinity(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the affinities between all images of a batch.

    `A = F̃F̃ᵀ` of `(N, N)`, where F̃ `(N, C·HW)` has a unit vector per image; the mean of |A_S - A_T|. Channels and
    spatial size may differ; a batch of one image gives 0.

    Shapes: `(N, ...)` both, the same N.

    Source: He et al., FAKD (ICIP 2020), instance affinity; after Tung and Mori (ICCV 2019).

    Example:
        >>> feature = torch.rand(4, 8, 6, 6)
        >>> instance_affinity(feature, feature.roll(1, 0)).item() > 0
        True
    """
    s, t = _channels_first("instance_affinity", student, teacher, 1, least_dims=2)
    if s.shape[0] != t.shape[0]:
        raise ConvLoRAError(f"instance_affinity: {_unequal(student, teacher)}: the number of images must be the same")
    return _affinity_l1(*(rearrange(f, "b ... -> 1 b (...)") for f in (s, t)))


def attention(student: Tensor, teacher: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Mean squared difference of attention maps.

    The map of an image is `Q = Σ_c F_c²` over its channels, as a vector of HW values scaled to unit length; the mean
    of (Q_S - Q_T)² over images and pixels. The number of channels may differ.

    Shapes: `(N, C, *spatial)` both, the same N and spatial.

    Source: Zagoruyko and Komodakis (ICLR 2017, arXiv 1612.03928), activation-based attention transfer with p = 2, the
    mean of squares as in the released code.

    Example:
        >>> feature = torch.rand(1, 8, 6, 6)
        >>> attention(feature, -feature).item()
        0.0
    """
    s, t = _channels_first("attention", student, teacher, channel_dim, least_dims=3)
    if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
        raise ConvLoRAError(f"attention: {_unequal(student, teacher)}: images and pixels must be the same")
    with torch.autocast(s.device.type, enabled=False):
        of_student, of_teacher = (_unit(reduce(f.square(), "b c ... -> b (...)", "sum")) for f in (s, t))
        return F.mse_loss(of_student, of_teacher)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of features of one shape.

    Example:
        >>> l1(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)).item()
        1.0
    """
    return F.l1_loss(*_alike("l1", student, teacher))


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features of one shape.

    Example:
        >>> mse(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 2.0)).item()
        4.0
    """
    return F.mse_loss(*_alike("mse", student, teacher))


for _loss in (spatial_affinity, channel_affinity, instance_affinity, attention, l1, mse):
    register_loss(_loss.__name__, _loss)


def _channels_first(
    loss: str, student: Tensor, teacher: Tensor, channel_dim: int, least_dims: int
) -> tuple[Tensor, Tensor]:
    s, t = _same_dtype(loss, student, teacher)
    if min(s.dim(), t.dim()) < least_dims or not all(-f.dim() <= channel_dim < f.dim() for f in (s, t)):
        shape = "(N, C, *spatial)" if least_dims == 3 else "(N, ...)"
        raise ConvLoRAError(f"{loss}: features must be {shape}, got {tuple(s.shape)} and {tuple(t.shape)}")
    return s.movedim(channel_dim, 1), t.movedim(channel_dim, 1)


def _same_dtype(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the loss is computed in."""
    if not student.is_floating_point() or not teacher.is_floating_point():
        raise ConvLoRAError(f"{loss}: features must be floating point, got {student.dtype} and {teacher.dtype}")
    dtype = functools.reduce(torch.promote_types, (student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _alike(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ConvLoRAError(f"{loss}: {_unequal(student, teacher)}: they must be the same")
    return _same_dtype(loss, student, teacher)


def _unequal(student: Tensor, teacher: Tensor) -> str:
    return f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"


def _affinity_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean |S̃S̃ᵀ - T̃T̃ᵀ| of rows `(B, rows, n)` scaled to unit length."""
    with torch.autocast(student.device.type, enabled=False):
        s, t = _unit(student), _unit(teacher)
        return F.l1_loss(s @ s.mT, t @ t.mT)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors along the last dimension at length 1; one without a direction becomes 0, with gradient 0."""
    squares = vectors.square().sum(-1, keepdim=True)
    short = squares <= SHORTEST_VECTOR**2
    return vectors / squares.masked_fill(short, math.inf).sqrt()
