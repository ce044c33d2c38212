"""A `.safetensors` file of any size, read tensor by tensor and written block by block.

A model of several gigabytes need not be in memory to have some of its tensors changed.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from convlora.errors import ConvLoRAError
from convlora.support.jsontext import parse_json
from convlora.support.safetensors import DTYPES, open_regular_file, safetensors_head, tensor_bytes

BLOCK = 2**16  # elements that are in memory at once where a tensor goes by in blocks
LONGEST_HEADER = 10**8  # bytes, the format's own bound

Blocks = Iterable[Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file: bytes `start` to `stop` behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class OpenFile:
    """A file that is open for reading, as long as somebody holds this."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self._file = open_regular_file(path)
        weakref.finalize(self, self._file.close)
        self.size, self._written = self._state()

    def filled(self, start: int, buffer: Any) -> Any:
        """A buffer with the bytes from `start` on."""
        self._file.seek(start)
        view, done = memoryview(buffer), 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise ConvLoRAError(f"read: '{self.path}' was cut while it was read; try again")
            done += count
        return buffer

    def refuse_changed(self) -> None:
        """
        Raises:
            ConvLoRAError: the file has been written into since it was opened.
        """
        if self._state() != (self.size, self._written):
            raise ConvLoRAError(f"read: '{self.path}' was written while it was read; try again")

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a `.safetensors` file, in the order of its header; each is read anew when it is asked for.

    The whole header is checked when the file is opened: names, dtypes, and that the tensors fill the file, none of
    them twice. The file stays open, so that one that replaces it changes nothing. What is written into it is noticed:
    see `refuse_changed`.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"conv.weight": torch.arange(6.0).view(2, 3)}, f"{folder}/net.safetensors")
        ...     file = TensorFile.open(f"{folder}/net.safetensors")
        ...     file["conv.weight"].tolist(), file.part("conv.weight", 4, 6).tolist()
        ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [4.0, 5.0])
    """

    def __init__(self, file: OpenFile, head: bytes, stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]):
        self.head, self.stored, self.metadata = head, stored, metadata
        self._file = file

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TensorFile:
        """Open a file and check its header.

        Raises:
            OSError, ValueError: it cannot be read, or is none or a damaged one.
        """
        file = OpenFile(path)
        length = int.from_bytes(file.filled(0, bytearray(min(8, file.size))), "little")
        if not 0 < length <= min(file.size - 8, LONGEST_HEADER):
            raise ValueError("its header is cut short")
        head = bytes(file.filled(0, bytearray(8 + length)))
        return cls(file, head, *_parsed(head[8:], file.size - len(head), file.size))

    def below(self, prefix: str) -> TensorFile:
        """The tensors whose names start with a prefix, by the rest of their names; of the same open file."""
        if not prefix:
            return self
        chosen = {name[len(prefix) :]: place for name, place in self.stored.items() if name.startswith(prefix)}
        return TensorFile(self._file, self.head, chosen, self.metadata)

    def __getitem__(self, name: str) -> Tensor:
        place = self.stored[name]
        return self._read(place, place.start, place.stop).view(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor, in C order, `(stop - start,)`."""
        place = self.stored[name]
        first, size = place.start, place.dtype.itemsize
        return self._read(place, first + start * size, first + stop * size)

    def shapes(self) -> dict[str, Tensor]:
        """The tensors without values (meta device): names, shapes and dtypes."""
        return {n: torch.empty(place.shape, dtype=place.dtype, device="meta") for n, place in self.stored.items()}

    def copy_bytes(self, start: int, stop: int, to: BinaryIO) -> None:
        """Append bytes `start` to `stop` behind the header to another file."""
        buffer = bytearray(min(stop - start, 4 * BLOCK))
        for first in range(start, stop, len(buffer) or 1):
            view = memoryview(buffer)[: stop - first]
            to.write(self._file.filled(len(self.head) + first, view))

    def refuse_changed(self) -> None:
        """
        Raises:
            ConvLoRAError: the file has been written into since it was opened.
        """
        self._file.refuse_changed()

    def _read(self, place: StoredTensor, start: int, stop: int) -> Tensor:
        found = torch.empty(stop - start, dtype=torch.uint8)
        self._file.filled(len(self.head) + start, found.numpy())
        return found.view(place.dtype)


@dataclass(frozen=True)
class RenamedTensors(Mapping[str, Tensor]):
    """Tensors of a state dict by other names, each read when it is asked for; in another dtype if one is given.

    Example:
        >>> RenamedTensors({"body.0.weight": torch.ones(1)}, {"body.0": "body.0.weight"}, torch.float64)["body.0"]
        tensor([1.], dtype=torch.float64)
    """

    state: Mapping[str, Any]
    names: Mapping[str, str]
    dtype: torch.dtype | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.state[self.names[name]]
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def shapes_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict of which only names, shapes and dtypes are asked: nothing of a file is read then.

    Example:
        >>> shapes_of({"bias": torch.ones(2)})
        {'bias': tensor([1., 1.])}
    """
    return state.shapes() if isinstance(state, TensorFile) else state


def flat_parts(state: Mapping[str, Any], name: str) -> Callable[[int, int], Tensor]:
    """What gives elements `start` to `stop` of a tensor, in C order; of a file, no others are read.

    Example:
        >>> flat_parts({"weight": torch.arange(6).view(2, 3)}, "weight")(2, 4)
        tensor([2, 3])
    """
    if isinstance(state, TensorFile):
        return partial(state.part, name)
    flat: Tensor = state[name].detach().reshape(-1)
    return lambda start, stop: flat[start:stop]


def stored_blocks(state: Mapping[str, Any], name: str) -> Iterator[Tensor]:
    """The elements of a tensor in C order, `BLOCK` of them at a time.

    Example:
        >>> [len(block) for block in stored_blocks({"weight": torch.zeros(1000, 100)}, "weight")]
        [65536, 34464]
    """
    shape = state.stored[name].shape if isinstance(state, TensorFile) else state[name].shape
    part, count = flat_parts(state, name), math.prod(shape)
    return (part(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def write_tensors(
    file: BinaryIO, shapes: Mapping[str, Any], blocks: Mapping[str, Blocks], metadata: Mapping[str, str]
) -> None:
    """Write a `.safetensors` file of tensors that come in blocks, byte for byte as the safetensors library does.

    `shapes`: for each name something of a `dtype` and a `shape`; `blocks`: its elements in C order, asked for in turn.
    Several metadata are sorted (the library's order is random).

    Raises:
        ConvLoRAError: the format has no such dtype.
    """
    for name, value in shapes.items():
        if value.dtype not in DTYPES:
            raise ConvLoRAError(f"write: safetensors files have no {value.dtype} (of '{name}')")
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    order = sorted(shapes, key=lambda name: (ranks[shapes[name].dtype], name))
    sizes = {name: math.prod(shapes[name].shape) * shapes[name].dtype.itemsize for name in order}
    file.write(safetensors_head({name: shapes[name] for name in order}, sizes, metadata))
    for name in order:
        for block in blocks[name]:
            file.write(tensor_bytes(block))


def _parsed(text: bytes, data: int, size: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Name -> where its tensor lies among `data` bytes, and the metadata, of the header of a file of `size` bytes."""
    entries = parse_json(text.decode(), size) if text[:1] == b"{" else None
    if type(entries) is not dict:
        raise ValueError("its header is no JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata are not texts by name")
    codes = {code: dtype for dtype, code in DTYPES.items()}
    stored = {name: _placed(name, entry, codes) for name, entry in entries.items()}
    end = 0
    for name, place in sorted(stored.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if place.start != end:
            raise ValueError(f"'{name}' does not start where another tensor ends")
        end = place.stop
    if end != data:
        raise ValueError(f"its tensors fill {end} bytes, and it has {data}")
    return stored, metadata


def _placed(name: str, entry: Any, codes: Mapping[str, torch.dtype]) -> StoredTensor:
    if type(entry) is not dict or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' has another description than dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if type(shape) is type(offsets) is list else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(offsets) != 2:
        raise ValueError(f"'{name}' has shape {shape!r} at {offsets!r}")
    if type(code) is not str or code not in codes:
        raise ValueError(f"'{name}' has the dtype {code!r}, which PyTorch has not")
    start, stop = offsets
    if stop - start != math.prod(shape) * codes[code].itemsize:
        raise ValueError(f"'{name}' of {code} and shape {shape} does not fill {stop - start} bytes")
    return StoredTensor(codes[code], tuple(shape), start, stop)
