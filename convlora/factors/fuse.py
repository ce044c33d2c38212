"""One weight with low-rank updates: pure functions.

This is the plain composite, the reference for every faster form of the same layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def fuse_weight(weight: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """`W + Σ ΔWᵢ`, summed in float32 (float64 for a float64 weight) and rounded once to the dtype of W.

    Shapes: all as the weight. The memory format is the weight's, so that the layer picks the same kernels.

    Example:
        >>> fuse_weight(torch.ones(2), [torch.full((2,), 0.5)]).tolist()
        [1.5, 1.5]
    """
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for update in updates:
        total = total + update
    return total.to(weight.dtype)


def fuse_weight_exactly(weight: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """`W + Σ ΔWᵢ` of float64 updates, summed in float64: the nearest value of W's dtype.

    Shapes: all as the weight.

    Example:
        >>> fuse_weight_exactly(torch.ones(1), [torch.full((1,), 0.5 + 2**-40, dtype=torch.float64)]).item()
        1.5
    """
    total = weight.double()
    for update in updates:
        total = total + update
    return rounded_once(total, weight.dtype)


def mixture(base: Tensor, copies: Sequence[tuple[Tensor, float]], exact: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Where `base + Σ strength·(copy − base)` starts, and what is added.

    It starts from the first copy of strength 1, if there is one: a copy that acts whole stays bitwise what it is beside
    updates that are zero.

    Example:
        >>> start, updates = mixture(torch.zeros(1), [(torch.ones(1) / 3, 1.0), (torch.zeros(1), 1.0)])
        >>> fuse_weight(start, updates).equal(torch.ones(1) / 3)
        True
    """
    start, updates = base, []
    for copy, strength in copies:
        if strength == 1 and start is base:
            start = copy
        else:
            updates.append(difference(base, copy, strength, exact))
    return start, updates


def difference(base: Tensor, copy: Tensor, strength: float, exact: bool = False) -> Tensor:
    """`strength · (copy − base)`, the update by which a copy of a tensor acts at a strength; shapes as the base's.

    In float32 (float64 for float64 tensors or `exact`).

    Example:
        >>> difference(torch.ones(2), torch.full((2,), 3.0), 0.5).tolist()
        [1.0, 1.0]
    """
    dtype = torch.float64 if exact else torch.promote_types(base.dtype, torch.float32)
    return (copy.to(dtype) - base.to(dtype)) * strength


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded once to a narrower dtype, ties to even.

    `.to` rounds twice on the way to 16 bits, first to float32. Rounding to odd there keeps the second one right
    (Boldo and Melquiond 2008, IEEE Transactions on Computers 57, 462).

    Example:
        >>> just_above_a_tie = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)
        >>> just_above_a_tie.to(torch.bfloat16).item(), rounded_once(just_above_a_tie, torch.bfloat16).item()
        (1.0, 1.0078125)
    """
    if dtype.itemsize > 2:
        return values.to(dtype)
    single = values.to(torch.float32)
    to_even = (single != values) & (single.view(torch.int32) % 2 == 0)
    towards = torch.where(values > single, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(to_even, torch.nextafter(single, towards), single).to(dtype)


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
