"""The best low-rank approximation of a matrix, and how many components to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from convlora.errors import ConvLoRAError

# What the parts beyond the first i components are in float64 once they stand for nothing but rounding, relative to
# the norm of all: far below the rounding of float32 factors (6e-8), far above that of a float64 decomposition.
NOISE = 1e-12

ChooseRank = Callable[[Tensor], int]
SVD = tuple[Tensor, Tensor, Tensor]


class Fit(NamedTuple):
    """Factors that approximate an update.

    Args:
        factors: tensor name -> values.
        rank: how many rank components they have.
        error: `‖ΔW - approximation‖ / ‖ΔW‖` in the Frobenius norm, 0 for ΔW = 0.
    """

    factors: dict[str, Tensor]
    rank: int
    error: float


def rank_chooser(operation: str, rank: int | None, energy: float | None) -> ChooseRank:
    """A function from the squared norms `(components,)` of rank components, largest first, to the number kept.

    At most `rank`, or the fewest that keep the share `energy` of the sum; at least one, and none that stands for
    nothing but rounding.

    Raises:
        ConvLoRAError: not exactly one of the two is given, or it is out of range.

    Example:
        >>> squares = torch.tensor([6.0, 3.0, 1.0, 0.0])
        >>> [rank_chooser("doc", None, energy)(squares) for energy in (0.5, 0.8, 1.0)]
        [1, 2, 3]
        >>> rank_chooser("doc", 2, None)(squares)
        2
    """
    if (rank is None) == (energy is None):
        raise ConvLoRAError(f"{operation}: give either rank= or energy=, got rank={rank!r}, energy={energy!r}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConvLoRAError(f"{operation}: rank (={rank!r}) must be an integer of at least 1")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise ConvLoRAError(f"{operation}: energy (={energy!r}) must be a share of the squared norm in (0, 1]")
    lost = NOISE**2 if energy is None else max(1 - energy, NOISE**2)

    def choose(squares: Tensor) -> int:
        beyond = _beyond(squares)  # what is lost if i components are kept
        needed = int((beyond > lost * beyond[0]).sum()) if bool(beyond[0] > 0) else 1
        return max(1, needed if rank is None else min(rank, needed))

    return choose


def _beyond(squares: Tensor) -> Tensor:
    """`beyond[i] = Σ squares[i:]`, the small ones summed first."""
    return squares.double().flip(0).cumsum(0).flip(0)


def svd(matrix: Tensor) -> SVD:
    """U `(m, n)`, singular values `(n,)` largest first, Vᴴ `(n, k)` of a matrix `(m, k)`, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, vh


def svd_of_product(left_mr: Tensor, right_rk: Tensor) -> SVD:
    """`svd(left @ right)` without forming the product: QR of both, then an SVD no larger than r × r."""
    q_left, r_left = torch.linalg.qr(left_mr.double())
    q_right, r_right = torch.linalg.qr(right_rk.double().mT)
    u, s, vh = svd(r_left @ r_right.mT)
    return q_left @ u, s, vh @ q_right.mT


def truncate(decomposed: SVD, step: int, choose: ChooseRank) -> tuple[Tensor, Tensor, int, float]:
    """The best approximation `left @ right` by rank components of `step` singular values each.

    By Eckart and Young (1936) no other of that rank is closer in the Frobenius norm. The root of a singular value goes
    to each side.

    Returns:
        left `(m, rank·step)` and right `(rank·step, k)`, filled up with zeros; the rank; the relative error.

    Example:
        >>> decomposed = svd(torch.diag(torch.tensor([4.0, 3.0])))
        >>> left, right, rank, error = truncate(decomposed, 1, rank_chooser("doc", 1, None))
        >>> (left @ right).round().tolist(), rank, error
        ([[4.0, 0.0], [0.0, 0.0]], 1, 0.6)
    """
    u, s, vh = decomposed
    components = -(-len(s) // step)
    squares = torch.nn.functional.pad(s.square(), (0, components * step - len(s)))
    rank = choose(reduce(squares, "(c s) -> c", "sum", s=step))
    kept = min(rank * step, len(s))
    root = s[:kept].sqrt()
    fill = rank * step - kept
    left = torch.nn.functional.pad(u[:, :kept] * root, (0, fill))
    right = torch.nn.functional.pad(root[:, None] * vh[:kept], (0, 0, 0, fill))
    beyond = _beyond(squares)
    lost = float(beyond[kept] / beyond[0]) if kept < len(s) and bool(beyond[0] > 0) else 0.0
    return left, right, rank, lost**0.5
