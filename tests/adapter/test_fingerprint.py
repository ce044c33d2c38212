"""Fingerprints: the same bits, the same up to rounding, another precision, or another base."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convlora.adapter.fingerprint import Fingerprint, base_fingerprint, compare_bases, summary_from_json

Weights = dict[str, Tensor]


def weights(layers: int = 12) -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 8, 3, 3), (40, 30), (8, 4, 5)]
    return {f"body.{i}": torch.randn(shapes[i % 3], generator=generator) * 10.0 ** -(i % 4) for i in range(layers)}


def each(change: Callable[[Tensor], Tensor]) -> Weights:
    return {path: change(weight) for path, weight in weights().items()}


def averaged(weight: Tensor) -> Tensor:
    average = weight.clone()
    for _ in range(3000):
        average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)
    return average


def swapped() -> Weights:
    found = weights()
    return {**found, "body.0": found["body.3"], "body.3": found["body.0"]}


def with_one(change: Callable[[Tensor], Tensor]) -> Weights:
    """One of twelve layers, the one with the smallest weights."""
    return {**weights(), "body.3": change(weights()["body.3"])}


def trained(weight: Tensor) -> Tensor:
    return weight * (1 + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))


KINDS: dict[str, tuple[Callable[[], Weights], str]] = {
    "itself": (weights, "same"),
    "in another order": (lambda: dict(reversed(weights().items())), "same"),
    "times three, by three": (lambda: each(lambda w: w * 3 / 3), "rounding"),
    "one step of rounding in one element": (lambda: with_one(lambda w: w.nextafter(w * 2)), "rounding"),
    "an average of equal values": (lambda: each(averaged), "rounding"),
    "wider": (lambda: each(Tensor.double), "rounding"),
    "float16": (lambda: each(Tensor.half), "precision"),
    "bfloat16": (lambda: each(Tensor.bfloat16), "precision"),
    "through a file in float16": (lambda: each(lambda w: w.half().float()), "precision"),
    "through a file in bfloat16": (lambda: each(lambda w: w.bfloat16().float()), "precision"),
    "trained a little": (lambda: each(trained), "other"),
    "one layer scaled": (lambda: with_one(lambda w: w * 1.01), "other"),
    "one layer negated": (lambda: with_one(lambda w: -w), "other"),
    "one layer of zeros": (lambda: with_one(torch.zeros_like), "other"),
    "two layers swapped": (swapped, "other"),
    "one layer not finite": (lambda: with_one(lambda w: w / 0), "other"),
    "on the meta device": (lambda: each(lambda w: w.to("meta")), "other"),
}


@pytest.mark.parametrize("what", KINDS)
def test_a_base_is_told_from_another(what: str) -> None:
    make, kind = KINDS[what]
    known = base_fingerprint(weights())
    assert known is not None
    assert compare_bases(known, make()).kind == kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_of_a_half_precision_base_knows_the_wider_one(dtype: torch.dtype) -> None:
    known = base_fingerprint(each(lambda w: w.to(dtype)))
    assert known is not None
    match = compare_bases(known, weights())
    assert (match.kind, match.dtype, match.adapted) == ("precision", "float32", str(dtype).removeprefix("torch."))
    assert compare_bases(known, each(lambda w: w.to(dtype).float())).kind == "rounding"
    assert compare_bases(known, each(lambda w: w * 1.1)).kind == "other"


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2])
def test_the_difference_is_estimated_within_a_factor_of_two(scale: float) -> None:
    known = base_fingerprint(weights(60))
    assert known is not None
    generator = torch.Generator().manual_seed(5)
    moved, squares = {}, []
    for path, weight in weights(60).items():
        change = torch.randn(weight.shape, generator=generator) * weight.norm() * scale / weight.numel() ** 0.5
        moved[path] = weight + change
        squares.append(float(change.norm() / weight.norm()) ** 2)
    difference = (sum(squares) / len(squares)) ** 0.5
    found = compare_bases(known, moved).difference
    assert found is not None
    assert difference / 2 < found < difference * 2


def naive_sums(path: str, weight: Tensor) -> list[float]:
    """Sums with the signs that hashes give, one number after the other."""
    columns = [1 - 2 * (1 - (byte & 1)) for byte in hashlib.shake_128(b"columns").digest(1024 * 16)]
    rows = [1 - 2 * (1 - (byte & 1)) for byte in hashlib.shake_128(b"rows").digest(256)]
    values = weight.double().flatten().tolist()
    norm = math.sqrt(sum(value * value for value in values))
    start = zlib.crc32(path.encode())
    sums = [columns[start % 1024 * 16 + j] * math.log(norm) for j in range(16)]
    for i, value in enumerate(values):
        row, column = divmod(i, 1024)
        sign = rows[(row % 256 - start - row // 256) % 256]
        for j in range(16):
            sums[j] += sign * columns[(column + start) % 1024 * 16 + j] * value / norm
    return sums


def test_the_summary_is_the_same_on_every_machine_and_small() -> None:
    weight = torch.linspace(-1, 1, 270_000).view(600, 450)
    known = base_fingerprint({"a": weight})
    assert known is not None
    assert known.summary is not None
    dtype, sums = summary_from_json(known.summary)
    assert dtype == "float32"
    assert sums == pytest.approx(naive_sums("a", weight), rel=1e-6, abs=1e-6)
    assert len(known.summary) < 300
    for number in (0.5, float("inf")):
        with pytest.raises(ValueError, match="malformed"):
            summary_from_json(json.dumps({"dtype": "float32", "sums": [number]}))


def test_order_of_summing_and_state_of_torch_do_not_show() -> None:
    known = base_fingerprint(weights())
    assert known is not None
    big = {"wide": torch.randn(1200, 1000, generator=torch.Generator().manual_seed(2))}
    one, small = base_fingerprint(big), weights()
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(1 if threads > 1 else 2)
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert base_fingerprint(small).summary == known.summary  # type: ignore[union-attr]
        other = base_fingerprint(big)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)
    assert one is not None
    assert other is not None
    ours, theirs = summary_from_json(str(one.summary))[1], summary_from_json(str(other.summary))[1]
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_a_fingerprint_is_copied_with_its_summary() -> None:
    known = base_fingerprint(weights())
    assert known is not None
    for copied in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert type(copied) is Fingerprint
        assert (copied, copied.summary) == (known, known.summary)
