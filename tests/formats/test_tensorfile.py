"""Files of any size, by tensors and blocks: what the safetensors library reads and writes, byte for byte."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from convlora import ConvLoRAError
from convlora.support import tensorfile
from convlora.support.safetensors import DTYPES
from convlora.support.tensorfile import TensorFile, shapes_of, stored_blocks, write_tensors
from convlora.support.torchfile import from_torch_path

# safetensors 0.5.3 reads integers without a sign, and writes none but the smallest.
KNOWN = [dtype for dtype in DTYPES if dtype in safetensors.torch._SIZE]


def one_of_each_dtype() -> dict[str, Tensor]:
    numbers = torch.arange(6).view(2, 3)
    tensors = {f"{place}.{dtype}": numbers.to(dtype, copy=True) for dtype in KNOWN for place in ("b", "a")}
    odd = {"number": torch.tensor(2.5), "nothing": torch.zeros(0, 4), 'ü"\\\x01\x7f': torch.ones(2)}
    return {**tensors, **odd}


def written(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    blocks = {name: [*stored_blocks(tensors, name)] for name in tensors}
    write_tensors(buffer, tensors, blocks, metadata)
    return buffer.getvalue()


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_written_is_what_the_library_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = one_of_each_dtype()
    for block in (2**18, 4, 1):
        monkeypatch.setattr(tensorfile, "BLOCK", block)
        assert written(tensors, {"format": "pt"}) == save(tensors, metadata={"format": "pt"})


def test_what_is_read_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = one_of_each_dtype()
    save_file(tensors, tmp_path / "all.safetensors", metadata={"author": "Müller"})
    file = TensorFile.open(tmp_path / "all.safetensors")
    assert (dict(file.metadata), set(file), len(file)) == ({"author": "Müller"}, set(tensors), len(tensors))
    for name, tensor in tensors.items():
        shape = file.shapes()[name]
        assert (shape.shape, shape.dtype, shape.is_meta) == (tensor.shape, tensor.dtype, True)
        assert (file[name].shape, file[name].dtype, bits(file[name])) == (tensor.shape, tensor.dtype, bits(tensor))
        flat = tensor.reshape(-1)
        first = min(1, len(flat))
        assert bits(file.part(name, first, len(flat))) == bits(flat[first:])
    with pytest.raises(KeyError):
        file["other"]


def test_tensors_below_a_prefix(tmp_path: Path) -> None:
    save_file({"net.a": torch.ones(2), "net.b.c": torch.zeros(1), "other": torch.ones(1)}, tmp_path / "a.safetensors")
    below = TensorFile.open(tmp_path / "a.safetensors").below("net.")
    assert list(below) == ["a", "b.c"]
    assert below["a"].tolist() == [1, 1]
    assert list(shapes_of(below)) == ["a", "b.c"]


def test_a_file_that_is_replaced_stays_as_it_was_and_one_that_is_written_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path)
    file = TensorFile.open(path)
    save_file({"a": torch.zeros(2)}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", path)
    assert file["a"].tolist() == [1, 1]
    file.refuse_changed()
    file = TensorFile.open(path)
    with open(path, "ab") as again:
        again.write(b"x")
    with pytest.raises(ConvLoRAError, match="was written while it was read"):
        file.refuse_changed()
    os.truncate(path, 70)
    with pytest.raises(ConvLoRAError, match="was cut while it was read"):
        file["a"]


def header(raw: bytes) -> dict[str, Any]:
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_header(raw: bytes, text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :]


GOOD = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(0)})
DAMAGED: dict[str, Any] = {
    "a hole": lambda entries: entries["b"].update(data_offsets=[28, 36]),
    "two at one place": lambda entries: entries["b"].update(data_offsets=[0, 8]),
    "shape": lambda entries: entries["a"].update(shape=[2, 2]),
    "negative": lambda entries: entries["a"].update(shape=[-2, -3]),
    "bool": lambda entries: entries["b"].update(shape=[4, True]),
    "fraction": lambda entries: entries["b"].update(shape=[4.0]),
    "huge": lambda entries: entries["a"].update(shape=[2**40, 2**40, 0]) or entries["a"].update(shape=[2**70]),
    "no shape": lambda entries: entries["a"].pop("shape"),
    "more": lambda entries: entries["a"].update(extra=1),
    "dtype": lambda entries: entries["a"].update(dtype="F31"),
    "three offsets": lambda entries: entries["a"].update(data_offsets=[0, 24, 24]),
    "backwards": lambda entries: entries["c"].update(data_offsets=[24, 20]),
    "metadata": lambda entries: entries.update(__metadata__={"a": 1}),
    "a list": lambda entries: entries.update(a=[1]),
    "not all": lambda entries: entries.pop("b"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_refused(damage: str, tmp_path: Path) -> None:
    entries = header(GOOD)
    DAMAGED[damage](entries)
    (tmp_path / "a.safetensors").write_bytes(with_header(GOOD, json.dumps(entries).encode()))
    with pytest.raises(ValueError, match=r"."):
        TensorFile.open(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "raw", [b"", b"\x01", GOOD[:-1], GOOD + b"x", GOOD[:40], b"\xff" * 8 + GOOD[8:], with_header(GOOD, b"[1]")]
)
def test_a_cut_or_padded_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"."):
        TensorFile.open(tmp_path / "a.safetensors")


def test_what_is_taken_of_altered_files_the_library_takes_and_reads_alike(tmp_path: Path) -> None:
    draw = random.Random(0)
    end = 8 + int.from_bytes(GOOD[:8], "little")
    taken = refused = 0
    for _ in range(1500):
        raw = bytearray(GOOD)
        for _ in range(draw.choice([1, 1, 2, 3])):
            raw[draw.randrange(end)] = draw.choice(b'0123456789{}[]",: abF\x00\xff')
        (tmp_path / "a.safetensors").write_bytes(raw)
        try:
            file = TensorFile.open(tmp_path / "a.safetensors")
        except ValueError:
            refused += 1
            continue
        taken += 1
        found = load(bytes(raw))
        assert {n: (t.dtype, bits(t)) for n, t in found.items()} == {n: (t.dtype, bits(t)) for n, t in file.items()}
    assert min(taken, refused) > 20
    with pytest.raises(SafetensorError):
        load(GOOD[:-1])


def test_a_zip_of_torch_is_mapped_and_not_copied(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save({"params": tensors, "epoch": 3}, tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = from_torch_path(tmp_path / "new.pth")
    assert found["epoch"] == 3
    assert all(torch.equal(found["params"][name], tensor) for name, tensor in tensors.items())
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "new.pth") in maps.read_text()
    assert all(torch.equal(from_torch_path(tmp_path / "old.pth")[name], tensor) for name, tensor in tensors.items())
    found["params"]["a"].zero_()
    assert from_torch_path(tmp_path / "new.pth")["params"]["a"].tolist() == tensors["a"].tolist()
