"""The bytes of a `.safetensors` file as tensors and plain data, and back.

Reading believes nothing: what a file claims costs neither memory that the file does not fill nor time before it is
checked.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from io import FileIO
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor

from convlora.errors import ConvLoRAError
from convlora.support.jsontext import parse_json

TENSORS = 2**14  # of a file of no size; a tensor takes 2 kB beside its values

# In the order in which the safetensors library puts them into a file: wide ones first, so that all of them are aligned.
DTYPES: dict[torch.dtype, str] = {
    getattr(torch, dtype): code
    for dtype, code in {
        "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
        "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
        "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e8m0fnu": "F8_E8M0",
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    }.items()
    if hasattr(torch, dtype)
}  # fmt: skip
_OF_ADAPTERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}  # fmt: skip


def open_regular_file(path: str | os.PathLike[str]) -> FileIO:
    """A file, open for reading.

    Raises:
        OSError, TypeError, ValueError: it cannot be read, or is none: a pipe would block, a device never end.
    """
    file = FileIO(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no file")
    return file


def read_regular_file(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file; raises as `open_regular_file`."""
    with open_regular_file(path) as file:
        return file.read()


def from_safetensors(raw: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a `.safetensors` file.

    Raises:
        Exception: of whatever sort, if it is none, or a damaged one.
    """
    names, metadata = safetensors_header(raw)
    found = from_bytes(raw)  # several times as fast as one by one, and in random order
    return {name: found[name] for name in names}, metadata


def safetensors_header(raw: bytes) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors of a `.safetensors` file, and its metadata.

    Raises:
        ValueError, AttributeError: as `from_safetensors`, as far as the header tells.
    """
    end = 8 + int.from_bytes(raw[:8], "little")
    if not 8 < end <= len(raw):
        raise ValueError("its header is cut short")
    if raw.count(b'"data_offsets"', 8, end) > TENSORS + len(raw) // 1024:
        raise ValueError("it has more tensors than an adapter of its size can have")
    entries = parse_json(raw[8:end].decode(), len(raw))
    metadata = entries.pop("__metadata__", None) or {}
    return list(entries), metadata


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: header length, JSON header, tensors, wide dtypes first so that all of them are aligned.

    Put together here since safetensors writes the metadata in random order, and in several times the time.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _OF_ADAPTERS:
            raise ConvLoRAError(f"write: adapter files have no {tensor.dtype} (of '{name}'); use .to(torch.float32)")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sizes = {name: tensors[name].nbytes for name in order}
    head = safetensors_head({name: tensors[name] for name in order}, sizes, metadata)
    return b"".join([head, *(tensor_bytes(tensors[name]) for name in order)])


def safetensors_head(shapes: Mapping[str, Any], sizes: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: the length of the header and the header, of tensors of given bytes in order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, value in shapes.items():
        start, end = end, end + sizes[name]
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes in C order, as a buffer."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
