"""One weight with low-rank updates: pure functions.

This is the plain composite, the reference for every faster form of the same layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def fuse(weight: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """`W + Σ ΔWᵢ`, summed in float32 (float64 for a float64 weight) and rounded once to the dtype of W.

    Shapes: all as the weight. The memory format is the weight's, so that the layer picks the same kernels.

    Example:
        >>> fuse(torch.ones(2), [torch.full((2,), 0.5)]).tolist()
        [1.5, 1.5]
    """
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for update in updates:
        total = total + update
    return total.to(weight.dtype)


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; true of a tensor without values (meta device).

    Example:
        >>> is_finite(torch.full((2,), 3e38)), is_finite(torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    if values.is_meta:
        return True
    # One pass; a sum can overflow though every term is finite, so a doubt is looked into.
    return math.isfinite(values.detach().sum(dtype=torch.float32)) or bool(values.isfinite().all())
