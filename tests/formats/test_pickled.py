"""Files of `torch.save`, read without unpickling: as torch reads them, or refused."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from convlora.formats.pickled import unpickle


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


BASE = torch.randn(6, 8)
TENSORS = {
    "whole": BASE,
    "a view": BASE[1:3, ::2],
    "transposed": BASE.T,
    "another of the same memory": BASE.view(2, 3, 8),
    "a number": torch.tensor(3.5),
    "nothing": torch.empty(0, 3),
    "a parameter": nn.Parameter(torch.randn(3)),
    "an integer": torch.arange(5),
    "true": torch.tensor([True, False]),
    **{str(dtype): torch.randn(3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tensors_are_those_that_were_saved(kind: Any, legacy: bool, protocol: int) -> None:
    raw = saved(kind(TENSORS), _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    found = unpickle(raw)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert not found[name].requires_grad


def test_state_dicts_of_modules_are_read() -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    assert hasattr(state, "_metadata")
    found = unpickle(saved(state))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_is_no_tensor_comes_back_as_plain_data() -> None:
    assert unpickle(saved({"epoch": 3, "rate": 0.5, "names": ["a", None], "pair": (True, False)})) == {
        "epoch": 3, "rate": 0.5, "names": ["a", None], "pair": (True, False)
    }  # fmt: skip


class Other:
    pass


REFUSED = {
    "an object": Other(),
    "a module": nn.Conv2d(1, 1, 1),
    "sparse": {"a": torch.eye(2).to_sparse()},
    "no values": {"a": torch.ones(2, device="meta")},
    "quantized": {"a": torch.ones(2).to(torch.float8_e4m3fn)},
    "numbers for names": {3: torch.ones(2)},
    "a set": {"a": {1}},
    "a repeated number": {"a": torch.ones(1).expand(10**6, 10**6)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"others could run code|claims more than the file holds"):
        unpickle(saved(REFUSED[case]))


def repacked(raw: bytes, change: Any, **options: Any) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names twice
        for name, data in change(records):
            file.writestr(name, data)
    return buffer.getvalue()


def swapped(records: dict[str, bytes], name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(key, data if key.endswith(name) else value) for key, value in records.items()]


ZIPS = {
    "compressed": (lambda records: records.items(), "compressed"),
    "twice": (lambda records: [*records.items(), *records.items()], "same name"),
    "big": (lambda records: swapped(records, "byteorder", b"big"), "byte order"),
    "short": (lambda records: swapped(records, "data/0", b"1234"), "cut short"),
    "long": (lambda records: swapped(records, "data/0", bytes(400)), "cut short"),
    "empty": (lambda records: swapped(records, "data.pkl", b""), "cut short"),
    "code": (lambda records: swapped(records, "data.pkl", pickle.dumps(print)), "could run code"),
    "marks": (lambda records: swapped(records, "data.pkl", b"\x80\x02" + 200_000 * b"("), "more parts"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_zip_files_of_another_sort_are_refused(case: str) -> None:
    change, message = ZIPS[case]
    options = {"compression": zipfile.ZIP_DEFLATED} if case == "compressed" else {}
    with pytest.raises(ValueError, match=message):
        unpickle(repacked(saved({"a": torch.ones(5, 5)}), change, **options))


def test_thousands_of_tensors_are_read() -> None:
    many = {f"layer{i}.weight": torch.full((1,), float(i)) for i in range(3_000)}
    found = unpickle(saved({"state": many, "steps": list(range(20_000))}))
    assert all(torch.equal(found["state"][name], tensor) for name, tensor in many.items())
    assert found["steps"] == list(range(20_000))


def test_a_flipped_bit_among_the_values_is_noticed() -> None:
    raw = bytearray(saved({"a": torch.full((50,), 0.1)}))
    raw[raw.index(torch.full((50,), 0.1).numpy().tobytes()) + 17] ^= 4
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        unpickle(bytes(raw))
