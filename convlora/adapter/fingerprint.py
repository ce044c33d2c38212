"""Which base an adapter was trained on: a hash that tells the same bits, and a summary that tells how far others are.

The summary is a random projection (Johnson and Lindenstrauss 1984; with signs, Achlioptas 2003, J. Comput. Syst. Sci.
66, 671): `SUMS` sums of all adapted weights with fixed signs. The mean square of the difference of two summaries is
that of the weights, as nearly as `SUMS` numbers tell (within a factor of two in nearly all cases). Each layer is
divided by its norm, so that a small one counts as much as a large one, and its norm's logarithm is summed beside.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.config import is_number
from convlora.support.jsontext import parse_json
from convlora.support.safetensors import tensor_bytes

SUMS = 16
ROUNDING = 1e-4
_COLUMNS, _ROWS = 1024, 256
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # the coarsest first


class Fingerprint(str):
    """The fingerprint of a base, `sha256:…`, and the summary of its weights, where it is known."""

    summary: str | None = None

    def __new__(cls, digest: str, summary: str | None = None) -> Fingerprint:
        made = super().__new__(cls, digest)
        made.summary = summary
        return made

    def __getnewargs__(self) -> tuple[str, str | None]:  # type: ignore[override]
        return str(self), self.summary


class BaseMatch(NamedTuple):
    """What a base is to the one that an adapter was trained on, and the relative difference where it is known.

    `same`: the same bits. `rounding`: values equal up to rounding. `precision`: equal up to the rounding of another
    dtype. `other`: another base.
    """

    kind: Literal["same", "rounding", "precision", "other"]
    difference: float | None = None
    dtype: str = ""
    adapted: str = ""

    def __str__(self) -> str:
        away = "" if self.difference is None else f" (relative difference {self.difference:.1g})"
        if self.kind == "other":
            unknown = ", or on another precision of it" if self.difference is None else away
            return f"another base of the same shapes{unknown}"
        how = {
            "same": "",
            "rounding": f", up to rounding{away}",
            "precision": f", with values of {self.dtype} here and of {self.adapted} there{away}",
        }
        return f"the base that was adapted{how[self.kind]}"


def base_digest(weights: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over name, dtype, shape and CRC-32 of the base weight of each layer path; None while one has no values.

    It tells bases apart, which needs no cryptography: CRC-32 takes a fraction of the time, and one changed element of
    up to 32 bits always changes it.
    """
    digest = hashlib.sha256()
    for path in sorted(weights):
        line = _line(path, weights[path])  # one after the other: they may be read from a file
        if line is None:
            return None
        digest.update(line.encode())
    return f"sha256:{digest.hexdigest()}"


def _line(path: str, weight: Tensor) -> str | None:
    name = f"{path}.weight" if path else "weight"
    described = f"{name}|{weight.dtype}|{tuple(weight.shape)}"
    return None if weight.is_meta else f"{described}|{zlib.crc32(tensor_bytes(weight))}\n"


def base_fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint | None:
    """The digest of the base weight of each layer path, with their summary; None while one has no values.

    Example:
        >>> base_fingerprint({"conv": torch.ones(8, 3, 3, 3)}).startswith("sha256:")
        True
    """
    digest = base_digest(weights)
    return None if digest is None else Fingerprint(digest, _summary(weights))


def compare_bases(adapted: str, weights: Mapping[str, Tensor]) -> BaseMatch:
    """What a base is to the one whose fingerprint an adapter has; without a summary there, `same` or `other`.

    The difference is the root of the mean over the layers of `‖W − W'‖² / ‖W‖²`, estimated. Up to 1e-4 it counts as
    rounding: float32 carries 6e-8, averages of equal values drift further (`a.mul_(d).add_(w, alpha=1 - d)` by 3e-6 at
    d = 0.999 and by 4e-5 at d = 0.9999, measured), and one step of an optimizer that trains moves weights by 1e-3. Of
    values that are held in float16 or bfloat16, here or there, half the dtype's spacing counts as rounding, which no
    single element exceeds: 5e-4 and 4e-3; storing in them moves weights by 2e-4 and 1.6e-3.

    Example:
        >>> weight = torch.linspace(-1, 1, 216).view(8, 3, 3, 3)
        >>> trained_on = base_fingerprint({"conv": weight})
        >>> [compare_bases(trained_on, {"conv": w}).kind for w in (weight, weight / 3 * 3, weight.half(), weight + 0.1)]
        ['same', 'rounding', 'precision', 'other']
    """
    digest = base_digest(weights)
    if adapted == digest:
        return BaseMatch("same")
    known = getattr(adapted, "summary", None)
    ours = None if known is None or digest is None else _summary(weights)
    if known is None or ours is None:
        return BaseMatch("other")
    (there, theirs), (here, sums) = summary_from_json(known), summary_from_json(ours)
    squares = [(a - b) ** 2 for a, b in zip(theirs, sums, strict=True)]
    difference = math.sqrt(sum(squares) / len(squares) / len(weights))
    if difference > max(_tolerance(here), _tolerance(there)):
        return BaseMatch("other", difference)
    return BaseMatch("rounding" if here == there else "precision", difference, here, there)


def summary_from_json(text: str) -> tuple[str, list[float]]:
    """The dtype and the sums of a summary.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none.
    """
    found = parse_json(text)
    dtype, sums = found["dtype"], found["sums"]
    if not isinstance(dtype, str) or len(sums) != SUMS or not all(map(is_number, sums)):
        raise ValueError("the summary of the base is malformed")
    return dtype, sums


def _tolerance(dtype: str) -> float:
    return max(ROUNDING, torch.finfo(_DTYPES[dtype]).eps / 2) if dtype in _DTYPES else ROUNDING


def _summary(weights: Mapping[str, Tensor]) -> str | None:
    """JSON `{"dtype": that of the values, "sums": [SUMS numbers]}`; None for weights that are not finite."""
    folded = torch.zeros(_COLUMNS, dtype=torch.float64, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for path in sorted(weights):
            folded += _folded(zlib.crc32(path.encode()), weights[path].detach().to("cpu", torch.float32).reshape(-1))
        sums = folded @ _signs(_COLUMNS * SUMS, "columns").view(_COLUMNS, SUMS).double()
    if not bool(sums.isfinite().all()):
        return None
    rounded = [float(f"{number:.9g}") for number in sums.tolist()]
    return json.dumps({"dtype": _dtype_of_values(weights), "sums": rounded}, separators=(",", ":"))


def _folded(start: int, values: Tensor) -> Tensor:
    """A layer's values over their norm, in 1,024 sums with signs, and the norm's logarithm; `start` moves the signs.

    Values stand in rows, and each row has a sign. float32 within some hundred rows, float64 beyond; which thread sums
    what depends on columns alone, so that a machine gives the same numbers always, and another one the same six digits.
    """
    signs = _signs(_ROWS, "rows")
    folded = torch.zeros(_COLUMNS, dtype=torch.float64, device="cpu")
    squares = torch.zeros_like(folded)
    for number, part in enumerate(torch.split(values, _COLUMNS * _ROWS)):
        missing = -part.numel() % _COLUMNS
        block = (F.pad(part, (0, missing)) if missing else part).view(-1, _COLUMNS)
        folded += (block * signs.roll((start + number) % _ROWS)[: len(block), None]).sum(0)
        squares += block.square().sum(0)
    norm = max(math.sqrt(float(squares.sum())), 1e-30)
    folded /= norm
    folded[0] += math.log(norm)
    return folded.roll(start % _COLUMNS)


@functools.cache
def _signs(count: int, key: str) -> Tensor:
    """±1, the same on every machine: bits of a hash."""
    bits = torch.frombuffer(bytearray(hashlib.shake_128(key.encode()).digest(count)), dtype=torch.uint8) & 1
    return bits.float() * 2 - 1


def _dtype_of_values(weights: Mapping[str, Tensor]) -> str:
    """The coarsest dtype that holds all values: weights that went through a file in half precision keep its values."""
    for name, dtype in _DTYPES.items():
        if all(_holds(dtype, weights[path].detach()) for path in weights):
            return name
    widest = max((weights[path].dtype for path in weights), key=lambda dtype: dtype.itemsize)
    return str(widest).removeprefix("torch.")


def _holds(dtype: torch.dtype, weight: Tensor) -> bool:
    if weight.dtype == dtype:
        return True
    parts = torch.split(weight.reshape(-1), _COLUMNS * _ROWS)  # the first tells nearly always
    return all(torch.equal(values.to(dtype).to(values.dtype), values) for values in parts)
