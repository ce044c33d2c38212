"""Hostile files from good ones: a seeded mutator that knows the structure of what it damages.

A case is a dict of file names and bytes; every function takes a `random.Random`, so a seed gives the same case again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convlora.adapter.file import checksum

Files = dict[str, bytes]

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "I8", "U8", "U64", "BOOL",
          "C64", "F128", "", "f32")  # fmt: skip
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
         "F8_E5M2": 1}  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, 1.5,
           -0.0, 1e18, 1e308)  # fmt: skip
NAMES = (
    "", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "a\0b", "a\nb", "\x1b[31mred",
    "\ud800", "é", "e\u0301", "\u202egnp", "stem", "stem.", ".stem", "stem..lora_A", "body", "body.0.0", "stem.weight",
    "__class__",
    "stem.convlora", "stem.convlora.default.lora_A", "__metadata__", "lora_A", ".lora_A", "x" * 3000, "a." * 3000, "*",
    "stem.lora_A", "head.lora_B", "head.lora_bias", "re:(a+)+$", "%s%n", "{0.__class__}", "weight", "default.lora_A",
    "norm", "norm.running_mean", "norm.num_batches_tracked", "classes", "classes.weight", "classes.lora_A",
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, *NUMBERS, float("nan"), float("inf"), "", "x", "\ud800", "a\nb", [], [1], [[]], {}, {"": 0},
    {"x": {"y": [1]}}, ["x"] * 50, "x" * 5000, "locon", "convlora", "[" * 2000, "re:(a*)*b", [2**62, 2**62], [2] * 400,
)  # fmt: skip


# --- bytes -----------------------------------------------------------------------------------------------------------


def flip(rng: random.Random, raw: bytes) -> bytes:
    """1 to 8 bits."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(rng: random.Random, raw: bytes) -> bytes:
    """A stretch left out, doubled, moved, zeroed or replaced by noise."""
    start, stop = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    stop = min(stop, start + rng.choice((1, 2, 8, 64, 4096)))
    piece, at = raw[start:stop], rng.randrange(len(raw) + 1)
    return rng.choice(
        [
            raw[:start] + raw[stop:],
            raw[:stop] + piece + raw[stop:],
            raw[:at] + piece + raw[at:],
            raw[:start] + bytes(len(piece)) + raw[stop:],
            raw[:start] + rng.randbytes(len(piece)) + raw[stop:],
            raw + rng.randbytes(rng.choice((1, 8, 1000))),
        ]
    )


def cut(rng: random.Random, raw: bytes, boundaries: list[int]) -> bytes:
    """The file up to a structural boundary, or one byte beside it."""
    return raw[: max(0, rng.choice([0, 1, len(raw), *boundaries]) + rng.choice((-1, 0, 1)))]


# --- JSON ------------------------------------------------------------------------------------------------------------


def damaged_json(rng: random.Random, text: str) -> str:
    """Another text: junk for one value, a key twice, lost or renamed, nesting without end, or damaged as bytes."""
    way = rng.randrange(8)
    if way == 0:
        depth = rng.choice((50, 200, 2000, 100_000))
        return rng.choice(("[", '{"a":', "[" * 7 + "{}", "[[],")) * depth
    if way == 1:
        return flip(rng, text.encode()).decode("utf-8", "replace")
    if way == 2:
        return text.replace("{", '{"rank":3,"r":2,"targets":["x"],', 1)  # keys twice
    if way == 3:
        return json.dumps(rng.choice(JUNK))
    try:
        value = json.loads(text)
    except ValueError:
        return text
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _replaced(rng, value)
    return json.dumps(value, separators=(",", ":"))


def _replaced(rng: random.Random, value: Any) -> Any:
    """JSON data with one value somewhere in it replaced, left out or put under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        way = rng.randrange(6)
        if way == 0:
            return {k: v for k, v in value.items() if k != name}
        if way == 1:
            return {rng.choice(NAMES) if k == name else k: v for k, v in value.items()}
        return {**value, name: _replaced(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], *([] if rng.random() < 0.2 else [_replaced(rng, value[at])]), *value[at + 1 :]]
    return rng.choice(JUNK)


# --- safetensors -----------------------------------------------------------------------------------------------------


@dataclass
class SafetensorsParts:
    """A safetensors file in parts: entries and metadata as lists, since hostile ones have keys twice."""

    entries: list[tuple[str, dict[str, Any]]]
    metadata: list[tuple[str, Any]]
    data: bytes

    @classmethod
    def of(cls, raw: bytes) -> SafetensorsParts:
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        metadata = list(header.pop("__metadata__", {}).items())
        return cls(list(header.items()), metadata, raw[start:])

    def pack(self) -> bytes:
        pairs = [(name, json.dumps(entry)) for name, entry in self.entries]
        if self.metadata:
            inner = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in self.metadata)
            pairs.insert(0, ("__metadata__", f"{{{inner}}}"))
        text = ("{" + ",".join(f"{json.dumps(name)}:{entry}" for name, entry in pairs) + "}").encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + self.data

    def boundaries(self) -> list[int]:
        start = len(self.pack()) - len(self.data)
        ends = [end for _, entry in self.entries for end in entry["data_offsets"]]
        return [4, 8, 9, start - 1, start, *(start + end for end in ends)]


def _offsets(rng: random.Random, packed: SafetensorsParts) -> None:
    _, entry = rng.choice(packed.entries)
    first, last = entry["data_offsets"]
    other = rng.choice(packed.entries)[1]["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [
            [last, first], [first, last + 1], [first + 1, last], [0, len(packed.data)], list(other), [first],
            [rng.choice(NUMBERS), last], [first, rng.choice(NUMBERS)], [], [first, last, last], "0", None, [0, 0],
        ]
    )  # fmt: skip


def _dtype(rng: random.Random, packed: SafetensorsParts) -> None:
    for _, entry in rng.sample(packed.entries, rng.choice((1, len(packed.entries)))):
        entry["dtype"] = rng.choice([*DTYPES, None, 3])


def _shape(rng: random.Random, packed: SafetensorsParts) -> None:
    _, entry = rng.choice(packed.entries)
    shape = list(entry["shape"])
    at = rng.randrange(len(shape)) if shape else 0
    entry["shape"] = rng.choice(
        [
            shape[::-1], [*shape, 1], [1, *shape], [0, *shape], [*shape[:at], rng.choice(NUMBERS), *shape[at + 1 :]],
            [], [2**62, 2**62], [0, 2**62, 2**62], [-1, *shape[1:]], [math.prod(shape)], None, "3", [1] * 70,
            [*shape[:at], *shape[at + 1 :]],
        ]
    )  # fmt: skip


def _rename(rng: random.Random, packed: SafetensorsParts) -> None:
    at = rng.randrange(len(packed.entries))
    name, entry = packed.entries[at]
    other = rng.choice(packed.entries)[0]
    head, _, tail = name.rpartition(".")
    odd = rng.choice(NAMES)
    packed.entries[at] = rng.choice([odd, other, f"{odd}.{tail}", f"{head}.{odd}", name.upper()]), entry


def _twice(rng: random.Random, packed: SafetensorsParts) -> None:
    name, entry = rng.choice(packed.entries)
    if rng.random() < 0.5:
        packed.entries.insert(rng.randrange(len(packed.entries) + 1), (name, dict(entry)))
    elif packed.metadata:
        key = rng.choice(packed.metadata)[0]
        packed.metadata.append((key, rng.choice(packed.metadata)[1]))


def _fewer(rng: random.Random, packed: SafetensorsParts) -> None:
    """A tensor left out, with or without its bytes."""
    at = rng.randrange(len(packed.entries))
    if rng.random() < 0.7:
        _without(packed, at)
    else:
        del packed.entries[at]


def _more(rng: random.Random, packed: SafetensorsParts) -> None:
    """A tensor more, at the end of the data."""
    name = rng.choice([rng.choice(NAMES), rng.choice(packed.entries)[0] + rng.choice(("x", ".weight", ".alpha"))])
    dtype = rng.choice(tuple(SIZES))
    shape = rng.choice(([], [0], [0, 3], [1], [2, 3], [4, 0, 3, 3], [1, 1, 1, 1, 1, 1, 1], [2**40, 0]))
    size = SIZES[dtype] * int(torch.tensor(shape, dtype=torch.int64).prod())
    start = len(packed.data)
    packed.entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}))
    packed.data += rng.randbytes(size)


def _empty(rng: random.Random, packed: SafetensorsParts) -> None:
    """A tensor of no elements in place of one of some."""
    at = rng.randrange(len(packed.entries))
    name, entry = packed.entries[at]
    _without(packed, at)
    shape = list(entry["shape"]) or [1]
    shape[rng.randrange(len(shape))] = 0
    packed.entries.append((name, {**entry, "shape": shape, "data_offsets": [len(packed.data)] * 2}))


def _without(packed: SafetensorsParts, at: int) -> None:
    first, last = packed.entries.pop(at)[1]["data_offsets"]
    packed.data = packed.data[:first] + packed.data[last:]
    for _, other in packed.entries:
        if other["data_offsets"][0] >= last:
            other["data_offsets"] = [place - (last - first) for place in other["data_offsets"]]


def _values(rng: random.Random, packed: SafetensorsParts) -> None:
    """NaN, infinity, the largest and the smallest numbers."""
    _, entry = rng.choice(packed.entries)
    first, last = entry["data_offsets"]
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    dtype = kinds.get(entry["dtype"], torch.float32)
    most = torch.finfo(dtype).max
    value = rng.choice((float("nan"), float("inf"), -float("inf"), most, -most, torch.finfo(dtype).smallest_normal / 4))
    piece = torch.tensor([value], dtype=torch.float64).to(dtype).view(torch.uint8).numpy().tobytes()
    if last - first >= len(piece):
        at = first + len(piece) * rng.randrange((last - first) // len(piece))
        packed.data = packed.data[:at] + piece + packed.data[at + len(piece) :]


def _metadata(rng: random.Random, packed: SafetensorsParts) -> None:
    if not packed.metadata or rng.random() < 0.1:
        packed.metadata.append(
            (rng.choice(("format", "convlora.layers", *NAMES)), rng.choice(("pt", "convlora", "{}")))
        )
        return
    at = rng.randrange(len(packed.metadata))
    key, value = packed.metadata[at]
    way = rng.randrange(8)
    if way == 0:
        del packed.metadata[at]
    elif way == 1:
        packed.metadata[at] = key, rng.choice(JUNK)
    elif way == 2:
        packed.metadata[at] = rng.choice(NAMES), value
    elif isinstance(value, str):
        packed.metadata[at] = key, damaged_json(rng, value)


def _shuffle(rng: random.Random, packed: SafetensorsParts) -> None:
    rng.shuffle(packed.entries)


STRUCTURAL: tuple[Callable[[random.Random, SafetensorsParts], None], ...] = (
    _offsets, _dtype, _shape, _rename, _twice, _fewer, _more, _empty, _values, _metadata, _metadata, _metadata,
    _shuffle,
)  # fmt: skip


def repair_checksum(packed: SafetensorsParts) -> None:
    """The checksum of a native file made right, as by somebody who knows the format."""
    from safetensors.torch import load

    tensors = load(packed.pack())
    kept = [(k, v) for k, v in packed.metadata if k != "checksum"]
    packed.metadata = [*kept, ("checksum", checksum(tensors, dict(kept)))]


def damaged_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with something wrong: as bytes, in its header, in its metadata or in its values."""
    way = rng.random()
    packed = SafetensorsParts.of(raw)
    if way < 0.08:
        return flip(rng, raw)
    if way < 0.12:
        return splice(rng, raw)
    if way < 0.22:
        return cut(rng, raw, packed.boundaries())
    if way < 0.28:
        length = rng.choice(
            (0, 1, 2, len(raw), len(raw) - 8, 2**27, 2**30, 2**32, 2**63, 2**64 - 1, rng.randrange(len(raw)))
        )
        return struct.pack("<Q", length) + raw[8:]
    if way < 0.31:  # a header of another form
        text = rng.choice(
            ("[" * 100_000, "{" * 300, '{"a":' * 50_000, "{}", "[]", "null", "{}" + " " * 5000, '{"a":{}}')
        )
        return struct.pack("<Q", len(text)) + text.encode() + packed.data
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(Exception):  # what a former one has damaged
            rng.choice(STRUCTURAL)(rng, packed)
    if any(k == "checksum" for k, _ in packed.metadata) and rng.random() < 0.8:
        try:
            repair_checksum(packed)
        except Exception:  # not a file with tensors any more
            return packed.pack()
    return packed.pack()


# --- pickles ---------------------------------------------------------------------------------------------------------


class _Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def _doubled(levels: int) -> bytes:
    """A tuple of twice the same tuple of twice …: few bytes, 2^levels leaves for whoever walks through it."""
    code = b"\x80\x02)"
    for i in range(levels):
        code += b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86"
    return code


def hostile_pickles(sentinel: Path) -> dict[str, bytes]:
    """Pickles that do harm where they are believed; those that run code make the folder `sentinel`.

    Two are not among them, since `torch.load` itself falls for them, as SECURITY.md says: `bytearray(2**32)` takes its
    4 GiB, and a tuple of twice the same tuple of twice … as a key of a dict is hashed for years.
    """
    from os import mkdir

    def dumped(value: Any, protocol: int = 2) -> bytes:
        return pickle.dumps(value, protocol)

    run = _Call(mkdir, str(sentinel))
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\x00\x00\x00\x7ftQ"
    )
    return {
        "code": dumped({"stem.lora_A": run}),
        "code at the top": dumped(run),
        "code, protocol 0": dumped(run, 0),
        "code, protocol 5": dumped({"a": run}, 5),
        "code as a key": b"\x80\x02}" + dumped(run)[2:-1] + b"K\x01s.",
        "a huge tensor": b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\nM\xff\xffM\xff\xff\x86Rs.",
        "a huge new tensor": b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\nM\xff\xffM\xff\xff\x86\x81s.",
        "a huge storage": b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage
        + b"K\x00J\x00\x00\x00\x7f\x85K\x01\x85\x89}tRs.",
        "a tuple of tuples": b"\x80\x02}X\x01\x00\x00\x00a" + _doubled(60)[2:] + b"s.",
        "a tuple of tuples at the top": _doubled(60) + b".",
        "a tuple of tuples as a storage": b"\x80\x02" + _doubled(60)[2:] + b"Q.",
        "lists in lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "tuples in tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "a list in itself": b"\x80\x02]q\x00h\x00a.",
        "a huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a huge string": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "an ordered dict with other methods": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        "a counter": b"\x80\x02ccollections\nCounter\n)R.",
        "sets": b"\x80\x02cbuiltins\nset\n]\x85R.",
        "an empty stack": b"\x80\x02.",
        "pops": b"\x80\x02000.",
        "nothing": b"",
        "no end": b"\x80\x02}",
        "numbers": dumped({"a.lora_A": 3, "a.lora_B": 1.5}),
        "numbers for names": dumped({3: 4}),
        "nested": dumped({"state_dict": {"a": 1}}),
        "no dict": dumped([1, 2]),
        "a dict of nothing": dumped({}),
    }  # fmt: skip


def zip_file(records: list[tuple[str, bytes]], compress: bool = False) -> bytes:
    """A zip file as `torch.save` lays it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in records:  # as `ZipInfo`, whose date is always the same: a case must not depend on the time
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return buffer.getvalue()


def zip_members(raw: bytes) -> list[tuple[str, bytes]]:
    """What a zip file holds."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        return [(info.filename, file.read(info)) for info in file.infolist()]


def damaged_pickle(rng: random.Random, raw: bytes, sentinel: Path) -> bytes:
    """A file of `torch.save` with something wrong: as bytes, as a zip file, in its pickle, or in its values."""
    way = rng.random()
    if not raw.startswith(b"PK"):  # the form of before 2020: pickles one after the other, then the values
        if way < 0.3:
            return cut(rng, raw, list(range(0, len(raw), 16)))
        if way < 0.4:
            hostile = rng.choice(list(hostile_pickles(sentinel).values()))
            return raw[: raw.index(b".", 200)] + hostile if way < 0.35 else hostile
        return flip(rng, raw) if way < 0.7 else splice(rng, raw)
    if way < 0.1:
        return flip(rng, raw)
    if way < 0.15:
        return splice(rng, raw)
    if way < 0.25:
        marks = [at for mark in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06") for at in _places(raw, mark)]
        return cut(rng, raw, [*marks, *(mark + 30 for mark in marks)])
    if way < 0.32:  # the directory at the end of the file
        end = raw.rindex(b"PK\x05\x06")
        at = end + rng.choice((8, 10, 12, 16, 20))
        return raw[:at] + rng.choice((b"\0\0", b"\xff\xff", rng.randbytes(2))) + raw[at + 2 :]
    if way < 0.4:  # sizes and offsets of one file in the directory
        at = rng.choice(_places(raw, b"PK\x01\x02")) + rng.choice((10, 16, 20, 24, 28, 30, 42))
        return (
            raw[:at] + rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\x40", b"\0\0\0\0", rng.randbytes(4))) + raw[at + 4 :]
        )
    parts = zip_members(raw)
    at = rng.randrange(len(parts))
    name, data = parts[at]
    pickled = next(i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
    if way < 0.5:
        return zip_file(parts, compress=True)
    if way < 0.53:  # some megabytes of zeros in some kilobytes
        return zip_file([(n, d if i == pickled else bytes(20 << 20)) for i, (n, d) in enumerate(parts)], compress=True)
    if way < 0.6:
        parts[at] = rng.choice(NAMES).encode("ascii", "replace").decode() or "x", data
    elif way < 0.65:
        del parts[at]
    elif way < 0.7:
        parts[at] = name, rng.choice((b"", data + data, data[:-1], rng.randbytes(len(data)), b"big"))
    elif way < 0.8:
        parts[pickled] = parts[pickled][0], rng.choice(list(hostile_pickles(sentinel).values()))
    elif way < 0.9:
        parts[pickled] = parts[pickled][0], flip(rng, parts[pickled][1])
    else:
        parts[pickled] = parts[pickled][0], splice(rng, parts[pickled][1])
    return zip_file(parts)


def _places(raw: bytes, mark: bytes) -> list[int]:
    found, at = [], raw.find(mark)
    while at >= 0:
        found.append(at)
        at = raw.find(mark, at + 1)
    return found


# --- whole cases -----------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, files: Files, sentinel: Path) -> Files:
    """A case: the files of one adapter, one of them damaged, or both of two."""
    changed = dict(files)
    for name in [rng.choice(list(files))] if rng.random() < 0.9 else list(files):
        raw = files[name]
        if name.endswith(".json"):
            changed[name] = _config(rng, raw)
        elif name.endswith(".safetensors"):
            changed[name] = damaged_safetensors(rng, raw)
        else:
            changed[name] = damaged_pickle(rng, raw, sentinel)
    if len(changed) > 1 and rng.random() < 0.03:
        del changed[rng.choice(list(changed))]
    return changed


PATTERNS = (
    "(a+)+$", "(.*)*x", "(a|a)" * 30 + "b", "a?" * 40 + "a" * 40, ".*.*.*.*x", ".*" * 20, "[", "(?P<x>", "\\", "^", "$",
    "", "(?:.?){40}x", "(.|.)" * 25 + "x", "stem|head", ".*stem", r"body\.[0-9]+", "^stem", "(?i)STEM", "(.)\\1",
    "x{1,99999}",
)  # fmt: skip


def _config(rng: random.Random, raw: bytes) -> bytes:
    """PEFT's config: damaged JSON, or patterns that take for ever."""
    if rng.random() < 0.3:
        config = json.loads(raw)
        field = rng.choice(("rank_pattern", "alpha_pattern"))
        config[field] = {rng.choice(PATTERNS): rng.choice((1, 2, 3, *JUNK)) for _ in range(rng.choice((1, 2, 20)))}
        return json.dumps(config).encode()
    if rng.random() < 0.2:
        return rng.choice((flip, splice))(rng, raw)
    return damaged_json(rng, raw.decode()).encode("utf-8", "surrogatepass")
