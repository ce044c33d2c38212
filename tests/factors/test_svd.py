"""Decompositions: as near as the whole SVD, whatever the shape and the spectrum."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import convlora
from convlora.factors import svd as module
from convlora.factors.base import WeightSpec, get_factors
from convlora.factors.svd import SVD, leading_svd, rank_chooser, svd, truncate

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {  # of the numbers 1, 2, 3, …
    "flat": torch.ones_like,
    "nearly flat": lambda i: i**-0.1,
    "slow": lambda i: i**-0.3,
    "square root": lambda i: i**-0.5,
    "fast": lambda i: i**-2,
    "geometric": lambda i: 0.97**i,
    "slowly geometric": lambda i: 0.995**i,
    "one large": lambda i: torch.where(i == 1, 1e6, 1.0),
    "low rank": lambda i: (i <= 5).double(),
    "low rank and noise": lambda i: torch.where(i <= 5, 1 / i, 1e-5),
    "low rank, more than sought": lambda i: (i <= 30).double(),
    "a plateau": lambda i: torch.where(i <= 90, 1.0, 0.01),
    "stairs": lambda i: torch.where(i <= 5, 1.0, torch.where(i <= 20, 0.99, 0.98)),
    "tiny": lambda i: 1e-30 / i,
}
SHAPES = [(250, 700), (700, 250), (400, 400)]


def matrix(rows: int, columns: int, spectrum: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A random float64 matrix, and its singular values."""
    n = min(rows, columns)
    values = spectrum(torch.arange(1, n + 1).double())
    left, right = (torch.linalg.qr(torch.randn(size, n).double()).Q for size in (rows, columns))
    return left * values @ right.mT, values.sort(descending=True).values


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 8, 16])
def test_the_leading_part_is_nearly_the_nearest(spectrum: str, shape: tuple[int, int], count: int) -> None:
    values, singular = matrix(*shape, SPECTRA[spectrum])
    left, right, rank, error = truncate(leading_svd(values, count), 1, rank_chooser("test", count, None))
    norm = values.norm()
    least = float(singular[count:].norm() / norm)
    true = float((left @ right - values).norm() / norm)
    assert rank == min(count, 5 if spectrum == "low rank" else count)
    assert true <= least * (1 + 1e-3) + 1e-12
    assert error == pytest.approx(true, rel=1e-6, abs=1e-12)


def test_the_iteration_serves_where_the_spectrum_falls_and_the_whole_svd_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = itertools.count()
    monkeypatch.setattr(module, "svd", lambda values: (next(whole), svd(values))[1])
    for spectrum in ("square root", "fast", "low rank", "low rank and noise", "tiny", "flat", "a plateau"):
        found = leading_svd(matrix(400, 700, SPECTRA[spectrum])[0], 8)
        assert 8 <= len(found.s) <= 400 // 4
    assert next(whole) == 0
    leading_svd(matrix(250, 700, SPECTRA["slowly geometric"])[0], 8)
    assert next(whole) == 2
    leading_svd(matrix(100, 700, SPECTRA["fast"])[0], 20)  # a rank that is not far below the dimensions
    assert next(whole) == 4


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (7, 7), (1, 5), (5, 1)], ids=str)
def test_the_whole_decomposition_is_that_of_either_orientation(shape: tuple[int, int]) -> None:
    values = torch.randn(shape)
    found = svd(values)
    assert [tuple(part.shape) for part in found[:3]] == [
        (shape[0], min(shape)), (min(shape),), (min(shape), shape[1])
    ]  # fmt: skip
    torch.testing.assert_close(found.u * found.s @ found.vh, values.double())
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(min(shape)).double())
    torch.testing.assert_close(found.vh @ found.vh.mT, torch.eye(min(shape)).double())
    assert found.s.equal(found.s.sort(descending=True).values)


def test_the_same_numbers_whatever_the_seed() -> None:
    values, _ = matrix(200, 700, SPECTRA["square root"])
    first = leading_svd(values, 8)
    torch.manual_seed(12)
    before = torch.get_rng_state()
    second = leading_svd(values, 8)
    assert torch.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_have_one_component_and_no_error(shape: tuple[int, int]) -> None:
    left, right, rank, error = truncate(leading_svd(torch.zeros(shape), 8), 1, rank_chooser("test", 8, None))
    assert (rank, error) == (1, 0.0)
    assert not (left @ right).any()


def test_what_a_leading_part_leaves_out_counts_as_lost() -> None:
    whole = svd(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    part = SVD(whole.u[:, :2], whole.s[:2], whole.vh[:2], beyond=5.0)
    for rank in (1, 2):
        choose = rank_chooser("test", rank, None)
        assert truncate(part, 1, choose)[2:] == truncate(whole, 1, choose)[2:]


@pytest.mark.parametrize("factors", ["convlora", "locon"])
@pytest.mark.parametrize("shape", [(96, 160, 3, 3), (160, 96, 3, 3), (256, 640), (640, 256), (150, 150, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extract_is_nearly_the_nearest_in_every_shape_and_dtype(
    factors: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    spec = WeightSpec(shape)
    base = torch.randn(shape) * 0.05
    change = torch.randn(shape[0], 8) @ torch.randn(8, base.numel() // shape[0]) * 0.02
    tuned = (base + change.view(shape) + torch.randn(shape) * 0.004).to(dtype)
    states = {"c.weight": base.to(dtype)}, {"c.weight": tuned}
    adapter = convlora.Adapter.extract(*states, rank=2, factors=factors)
    difference = tuned.double() - states[0]["c.weight"].double()
    a, b = (get_factors(factors).shapes(spec, 2)[name] for name in ("lora_A", "lora_B"))
    singular = torch.linalg.svdvals(difference.reshape(b[0], -1))
    least = float(singular[a[0] :].norm() / singular.norm())
    true = float((adapter.delta("c").double() - difference).norm() / difference.norm())
    assert adapter.layers["c"].rank == 2
    assert least <= adapter.errors["c"] * (1 + 1e-9) <= least * (1 + 1e-3)
    assert true == pytest.approx(adapter.errors["c"], rel=1e-5)


def test_extract_refuses_complex_weights_and_names_complex_biases() -> None:
    base = {"c.weight": torch.zeros(4, 3, dtype=torch.complex64), "c.bias": torch.zeros(4, dtype=torch.complex64)}
    tuned = {name: value + 1j for name, value in base.items()}
    with pytest.raises(convlora.ConvLoRAError, match="no weight of two or more dimensions"):
        convlora.Adapter.extract(base, tuned, rank=1)
    real = {"c.weight": torch.zeros(4, 3)}, {"c.weight": torch.ones(4, 3)}
    with pytest.warns(convlora.ConvLoRAWarning, match=r"cannot express it: c\.bias$"):
        adapter = convlora.Adapter.extract({**base, **real[0]}, {**tuned, **real[1]}, rank=1)
    assert set(adapter.layers["c"].tensors) == {"lora_A", "lora_B"}
