"""Files of `torch.save`: the tensors that torch saved, or one clear refusal."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convlora import ConvLoRAError
from convlora.formats.tensors import read_tensors
from convlora.support.torchfile import from_torch_file


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


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tensors_are_those_that_were_saved(kind: Any, legacy: bool, protocol: int) -> None:
    raw = saved(kind(TENSORS), _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    found = from_torch_file(raw)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_state_dicts_of_modules_are_read() -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    assert hasattr(state, "_metadata")
    found = from_torch_file(saved(state))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_is_no_tensor_comes_back_as_plain_data() -> None:
    assert from_torch_file(saved({"epoch": 3, "rate": 0.5, "names": ["a", None], "pair": (True, False)})) == {
        "epoch": 3, "rate": 0.5, "names": ["a", None], "pair": (True, False)
    }  # fmt: skip


class Other:
    pass


REFUSED = {
    "an object": Other(),
    "a module": nn.Conv2d(1, 1, 1),
    "sparse": {"a": torch.eye(2).to_sparse()},
    "no values": {"a": torch.ones(2, device="meta")},
    "numbers for names": {3: torch.ones(2)},
    "a set": {"a": {1}},
    "plain data": {"a": torch.ones(2), "epoch": 3},
    "a list": [torch.ones(2)],
    "nothing": {},
    "a repeated number": {"a": torch.ones(1).expand(10**6, 10**6)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_named_tensors_is_one_error(case: str, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(saved(REFUSED[case]))
    with pytest.raises(ConvLoRAError) as caught:
        read_tensors(tmp_path / "net.pth")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def repacked(raw: bytes, change: Any, **options: Any) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, data in change(records):
            file.writestr(name, data)
    return buffer.getvalue()


def swapped(records: dict[str, bytes], name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(key, data if key.endswith(name) else value) for key, value in records.items()]


ZIPS = {
    "short": lambda records: swapped(records, "data/0", b"1234"),
    "empty": lambda records: swapped(records, "data.pkl", b""),
    "code": lambda records: swapped(records, "data.pkl", pickle.dumps(print)),
    "marks": lambda records: swapped(records, "data.pkl", b"\x80\x02" + 200_000 * b"("),
}


@pytest.mark.parametrize("case", ZIPS)
def test_damaged_and_hostile_zip_files_are_one_error(case: str, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(repacked(saved({"a": torch.ones(5, 5)}), ZIPS[case]))
    with pytest.raises(ConvLoRAError, match=r"net\.pth' cannot be read"):
        read_tensors(tmp_path / "net.pth")


def test_a_zip_whose_members_claim_more_than_the_file_has_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = repacked(
        saved({"a": torch.zeros(1000, 1000)}), lambda records: records.items(), compression=zipfile.ZIP_DEFLATED
    )
    assert len(raw) < 100_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="claim more bytes than the file has"):
        from_torch_file(raw)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    for name in ("net.pth", "legacy.pth"):
        raw = saved({"a": torch.ones(2), "b": Tell(tmp_path / "ran")}, _use_new_zipfile_serialization=name == "net.pth")
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ConvLoRAError):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()


class Tell:
    """Pickled code that would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_thousands_of_tensors_are_read() -> None:
    many = {f"layer{i}.weight": torch.full((1,), float(i)) for i in range(3_000)}
    found = from_torch_file(saved({"state": many, "steps": list(range(20_000))}))
    assert all(torch.equal(found["state"][name], tensor) for name, tensor in many.items())
    assert found["steps"] == list(range(20_000))
