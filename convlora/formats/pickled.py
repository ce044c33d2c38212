"""Named tensors as `torch.save` writes them, read without unpickling.

Such a file holds a program of the pickle machine that builds a dict. `_Machine` carries out the instructions that a
dict of tensors needs, on plain data: it imports nothing and calls nothing, and a file that asks for more is refused.
Tensors are views of bytes that are in the file. So no file runs code, and none takes more memory than it has bytes, as
compressed files and functions that allocate would. (`torch.load(weights_only=True)` runs no code either, but inflates,
allocates what a file asks for, and hashes whatever is a key.)

Both forms are read, that of a zip file and, from before 2020, that of pickles one after the other.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STEPS = 2**18  # instructions in a file of no size
RECORDS = 2**13  # tensors likewise
STACK = 2**13  # values at a time: a pickle fills a dict by a thousand entries
UNSAFE = "it is no file of plain tensors; others could run code"

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


_ORDERED, _PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_parameter"
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_FUNCTIONS = (_ORDERED, _PARAMETER, *_TENSORS)


class _Name(str):
    """A function or class that a file names; what it stands for is known here alone."""


class _Mark:
    """Where the items of a dict or tuple begin on the stack."""


_MARK = _Mark()


def unpickle(raw: bytes) -> Any:
    """What a file of `torch.save` holds: a dict of tensors, if it is one of plain tensors.

    Raises:
        ValueError, LookupError, TypeError, struct.error, zipfile.BadZipFile: it is damaged, or holds more.
    """
    return _of_zip(raw) if raw.startswith(b"PK\x03\x04") else _of_pickles(raw)


def _of_zip(raw: bytes) -> Any:
    if raw.count(b"PK\x01\x02") > RECORDS + len(raw) // 1024:
        raise ValueError("it has more tensors than an adapter of its size can have")
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        infos = {info.filename: info for info in file.infolist()}
        if len(infos) < len(file.infolist()):
            raise ValueError("it has files of the same name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos.values()):
            raise ValueError("it is compressed, which torch.save does not do")
        if sum(info.file_size for info in infos.values()) > len(raw):
            raise ValueError("it claims to hold more than it does")
        top = next(iter(infos), "").partition("/")[0]
        order = file.read(f"{top}/byteorder") if f"{top}/byteorder" in infos else b"little"
        if order != sys.byteorder.encode():
            raise ValueError("its numbers are of another byte order")
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            if key not in storages:
                storages[key] = _flat(dtype, file.read(f"{top}/data/{key}"), numel)
            return storages[key]

        return _Machine(file.read(f"{top}/data.pkl"), 0, len(raw), storage).run()


def _of_pickles(raw: bytes) -> Any:
    """Magic number, version, facts about the machine, the dict, the keys of its storages; then their values."""

    def unexpected(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        raise ValueError(UNSAFE)

    at = 0
    for known in (_MAGIC, 1001, None):
        machine = _Machine(raw, at, len(raw), unexpected)
        value = machine.run()
        if known is not None and (type(value) is not int or value != known):
            raise ValueError(UNSAFE)
        at = machine.at
    if type(value) is not dict or value.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError("its numbers are of another byte order")
    # The values come after the dict: a first run finds what it needs and where it ends, a second one has them.
    wanted: dict[str, tuple[torch.dtype, int]] = {}

    def note(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        wanted[key] = dtype, numel
        return torch.empty(0, dtype=dtype)

    machine = _Machine(raw, at, len(raw), note, check=False)
    machine.run()
    listing = _Machine(raw, machine.at, len(raw), unexpected)
    keys = listing.run()
    end = listing.at
    storages = {}
    for key in keys if type(keys) is list else []:
        if type(key) is not str:
            raise ValueError(UNSAFE)
        dtype, numel = wanted[key]
        size = numel * dtype.itemsize
        if struct.unpack_from("<q", raw, end)[0] != numel:
            raise ValueError("it is damaged")
        storages[key] = _flat(dtype, raw[end + 8 : end + 8 + size], numel)
        end += 8 + size
    return _Machine(raw, at, len(raw), lambda dtype, key, numel: storages[key]).run()


def _flat(dtype: torch.dtype, data: bytes, numel: int) -> Tensor:
    if numel < 0 or numel * dtype.itemsize != len(data):
        raise ValueError("it is cut short")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


class _Machine:
    """Carries out one pickle, `raw[at:]`, and stands behind it then.

    Args:
        size: of the whole file: a larger one may have more instructions.
        storage: the values of a dtype, a key and a number of elements.
        check: whether tensors have to lie inside their storage.
    """

    def __init__(
        self, raw: bytes, at: int, size: int, storage: Callable[[torch.dtype, str, int], Tensor], check: bool = True
    ) -> None:
        self.raw, self.at, self.storage, self.check = raw, at, storage, check
        self.steps, self.containers = STEPS + size // 64, 4 * RECORDS + size // 256
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(self.steps):
            code = self._take(1)
            if code == b".":
                return self.stack.pop()
            act = _ACTS.get(code)
            if act is None:
                raise ValueError(UNSAFE)
            act(self)
            if len(self.stack) > STACK:
                raise ValueError("it has more parts than an adapter can have")
        raise ValueError("it has more instructions than an adapter of its size can have")

    # --- reading and the stack

    def _take(self, count: int) -> bytes:
        piece = self.raw[self.at : self.at + count]
        if len(piece) < count:
            raise ValueError("it is cut short")
        self.at += count
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.raw.find(b"\n", self.at, self.at + 200)
        if end < 0:
            raise ValueError(UNSAFE)
        return self._take(end + 1 - self.at)[:-1].decode()

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # IndexError: there is none
            at -= 1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    # --- instructions

    def _new(self, container: Any) -> None:
        self.containers -= 1
        if self.containers < 0:
            raise ValueError("it has more parts than an adapter of its size can have")
        self.stack.append(container)

    def _push_number(self, form: str) -> None:
        self.stack.append(self._number(form))

    def _push_text(self, form: str) -> None:
        self.stack.append(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _push_integer(self) -> None:
        self.stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _tuple(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) < count:
            raise ValueError("it is damaged")
        del self.stack[len(self.stack) - count :]
        self._new(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise ValueError(UNSAFE)  # other keys would have to be hashed
        target.update(zip(items[::2], items[1::2], strict=True))

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError(UNSAFE)
        self.stack[-1].extend(items)

    def _last(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError(UNSAFE)
        full = _Name(f"{module}.{name}")
        if full not in _FUNCTIONS and full.removeprefix("torch.") not in _DTYPES:
            raise ValueError(UNSAFE)
        self.stack.append(full)

    def _build(self) -> None:
        """The state of a dict, as modules give it to theirs (versions), is no part of its tensors."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError(UNSAFE)

    def _persistent(self) -> None:
        tag = self.stack.pop()
        if type(tag) is not tuple or len(tag) not in (5, 6) or [type(part) for part in tag[:5]] != _TAG:
            raise ValueError(UNSAFE)
        kind, storage, key, _, numel = tag[:5]
        dtype = _DTYPES.get(storage.removeprefix("torch."))
        if kind != "storage" or dtype is None or (len(tag) == 6 and tag[5] is not None):
            raise ValueError(UNSAFE)
        self.stack.append(self.storage(dtype, key, numel))

    def _call(self) -> None:
        """The few functions that a dict of tensors is built with."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(arguments) is not tuple:
            raise ValueError(UNSAFE)
        if name == _ORDERED and not arguments:
            self._new({})
        elif name in _TENSORS and 4 <= len(arguments) <= 7:
            self.stack.append(self._view(*arguments[:4]))
        elif name == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            self.stack.append(arguments[0])
        else:
            raise ValueError(UNSAFE)

    def _view(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        """A tensor in its storage, of no more elements than that has: none is a number repeated for ever."""
        if not isinstance(storage, Tensor) or type(size) is not tuple or type(stride) is not tuple:
            raise ValueError(UNSAFE)
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ValueError("it has a tensor of no shape")
        if not self.check:
            return storage
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) > storage.numel() or (math.prod(size) and last >= storage.numel()):
            raise ValueError("it has a tensor that claims more than the file holds")
        return torch.as_strided(storage, size, stride, offset)


_TAG = [str, _Name, str, str, int]
_ACTS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._take(1),  # the version
    b"\x95": lambda m: m._take(8),  # the length of a part
    b"}": lambda m: m._new({}),
    b"]": lambda m: m._new([]),
    b")": lambda m: m.stack.append(()),
    b"(": lambda m: m.stack.append(_MARK),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"J": lambda m: m._push_number("<i"),
    b"K": lambda m: m._push_number("<B"),
    b"M": lambda m: m._push_number("<H"),
    b"G": lambda m: m._push_number(">d"),
    b"\x8a": lambda m: m._push_integer(),
    b"X": lambda m: m._push_text("<I"),
    b"\x8c": lambda m: m._push_text("<B"),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"\x94": lambda m: m._put(len(m.memo)),
    b"h": lambda m: m.stack.append(m.memo[m._number("<B")]),
    b"j": lambda m: m.stack.append(m.memo[m._number("<I")]),
    b"t": lambda m: m._new(tuple(m._since_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"s": lambda m: m._set(m._last(2)),
    b"u": lambda m: m._set(m._since_mark()),
    b"a": lambda m: m._extend(m._last(1)),
    b"e": lambda m: m._extend(m._since_mark()),
    b"c": lambda m: m._global(m._line(), m._line()),
    b"\x93": lambda m: m._global(*m._last(2)),
    b"b": lambda m: m._build(),
    b"Q": lambda m: m._persistent(),
    b"R": lambda m: m._call(),
}
