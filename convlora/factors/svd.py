"""The best low-rank approximation of a matrix, and how many components to keep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from convlora.errors import ConvLoRAError

# What the parts beyond the first i components are in float64 once they stand for nothing but rounding, relative to
# the norm of all: far below the rounding of float32 factors (6e-8), far above that of a float64 decomposition.
NOISE = 1e-12

# Of the leading part alone: columns beyond those sought in each block, the share of the squared error that may still be
# to gain when the iteration ends, and what of a squared norm in float64 is nothing but rounding.
BESIDE, TO_GAIN, ROUNDING = 8, 1e-4, 1e-15


class SVD(NamedTuple):
    """Singular values and vectors of a matrix `(m, k)`, all of them or the largest.

    Args:
        u: `(m, n)`, orthonormal columns.
        s: `(n,)`, largest first.
        vh: `(n, k)`, orthonormal rows.
        beyond: the squared Frobenius norm of what `(u * s) @ vh` leaves out.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    beyond: float = 0.0


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


@dataclass(frozen=True)
class ChooseRank:
    """From the squared norms `(components,)` of rank components, largest first, to the number kept; see `rank_chooser`.

    Args:
        rank: at most this many; None: as many as are needed.
        lost: the share of the sum that may be lost.
    """

    rank: int | None
    lost: float

    def __call__(self, squares: Tensor) -> int:
        beyond = _beyond(squares)  # what is lost if i components are kept
        needed = int((beyond > self.lost * beyond[0]).sum()) if bool(beyond[0] > 0) else 1
        return max(1, needed if self.rank is None else min(self.rank, needed))


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
    return ChooseRank(rank, NOISE**2 if energy is None else max(1 - energy, NOISE**2))


def _beyond(squares: Tensor) -> Tensor:
    """`beyond[i] = Σ squares[i:]`, the small ones summed first."""
    return squares.double().flip(0).cumsum(0).flip(0)


def svd(matrix: Tensor) -> SVD:
    """All of a matrix `(m, k)`, in float64: that of the transpose where it is wide, which takes a fraction of the time.

    Example:
        >>> svd(torch.tensor([[0.0, 4.0, 0.0], [3.0, 0.0, 0.0]])).s.tolist()
        [4.0, 3.0]
    """
    rows, columns = matrix.shape
    if rows < columns:
        v, s, uh = torch.linalg.svd(matrix.double().mT, full_matrices=False)
        return SVD(uh.mT, s, v.mT)
    return SVD(*torch.linalg.svd(matrix.double(), full_matrices=False))


def leading_svd(matrix: Tensor, count: int) -> SVD:
    """At least `count` of the largest singular values of a matrix `(m, k)`, in float64.

    Where `count` is far below the dimensions, of a block Krylov space of a random start, the same in every call (Musco
    and Musco 2015, arXiv 1504.05477, algorithm 2). What the best `count` directions in it keep of the squared norm is
    known exactly in every round, and so is the error of the approximation. What a round gains falls like a geometric
    series: the iteration ends once the rest of that series, at the worse of the last two ratios, is less than `TO_GAIN`
    of the squared error, or nothing but rounding is left. Where that takes a space of more than a quarter of the
    dimensions, the spectrum is too flat, and the whole decomposition is taken.

    Example:
        >>> matrix = torch.outer(torch.ones(200), torch.arange(300.0))
        >>> found = leading_svd(matrix, 1)
        >>> len(found.s) < 200, bool((found.u * found.s @ found.vh - matrix).abs().max() < 1e-6)
        (True, True)
    """
    wide = matrix.double()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(matrix.shape[1], count + BESIDE, dtype=torch.float64, generator=generator).to(wide.device)
    space, images = wide.new_empty(matrix.shape[0], 0), wide.new_empty(matrix.shape[1], 0)
    total, kept = float(wide.square().sum()), [0.0]
    while 4 * (space.shape[1] + count + BESIDE) <= min(matrix.shape):
        block = torch.cat([space, wide @ torch.linalg.qr(rows).Q], 1)
        block = torch.linalg.qr(block).Q[:, space.shape[1] :]  # orthonormal also where nothing new is left
        rows = wide.mT @ block
        space, images = torch.cat([space, block], 1), torch.cat([images, rows], 1)  # (m, n) and matrixᵀ @ space, (k, n)
        kept.append(float(torch.linalg.eigvalsh(images.mT @ images)[-count:].sum()))
        if len(kept) > 3 and _is_settled(kept, total):
            return _within(wide, space, images)
    return svd(matrix)


def _is_settled(kept: Sequence[float], total: float) -> bool:
    """Whether further rounds would hardly lower the error, by what the rounds until now have kept."""
    gains = [max(after - before, 0.0) for before, after in itertools.pairwise(kept[-4:])]
    ratio = max(after / before if before > 0 else 0.0 for before, after in itertools.pairwise(gains))
    to_gain = gains[-1] * ratio / (1 - ratio) if ratio < 1 else float("inf")
    left = max(total - kept[-1], 0.0)
    return to_gain <= TO_GAIN * left or left <= ROUNDING * total


def _within(matrix: Tensor, space: Tensor, images: Tensor) -> SVD:
    """What an orthonormal basis `(m, n)` holds of a matrix `(m, k)`; `images` is `matrixᵀ @ space`, `(k, n)`."""
    v, s, uh = torch.linalg.svd(images, full_matrices=False)
    beyond = torch.addmm(matrix, space, images.mT, alpha=-1).square_().sum()  # a difference of norms would be rounding
    return SVD(space @ uh.mT, s, v.mT, float(beyond))


def svd_of_product(left_mr: Tensor, right_rk: Tensor) -> SVD:
    """`svd(left @ right)` without forming the product: QR of both, then an SVD no larger than r × r."""
    q_left, r_left = torch.linalg.qr(left_mr.double())
    q_right, r_right = torch.linalg.qr(right_rk.double().mT)
    u, s, vh, _ = svd(r_left @ r_right.mT)
    return SVD(q_left @ u, s, vh @ q_right.mT)


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
    u, s, vh, left_out = decomposed
    components = -(-len(s) // step)
    squares = torch.nn.functional.pad(s.square(), (0, components * step - len(s)))
    tail = squares.new_tensor([left_out] if left_out else [])
    rank = choose(torch.cat([reduce(squares, "(c s) -> c", "sum", s=step), tail]))
    kept = min(rank * step, len(s))
    root = s[:kept].sqrt()
    fill = rank * step - kept
    left = torch.nn.functional.pad(u[:, :kept] * root, (0, fill))
    right = torch.nn.functional.pad(root[:, None] * vh[:kept], (0, 0, 0, fill))
    beyond = _beyond(torch.cat([squares, tail]))
    lost = float(beyond[kept] / beyond[0]) if kept < len(beyond) and bool(beyond[0] > 0) else 0.0
    return left, right, rank, lost**0.5
