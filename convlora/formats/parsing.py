"""Bytes of a file as tensors and plain data, believing nothing that they say.

What a file claims costs nothing before it is checked: neither memory that the file does not fill, nor time.
"""

from __future__ import annotations

import os
import stat

from safetensors.torch import load as from_bytes
from torch import Tensor

from convlora.jsontext import parse

TENSORS = 2**14  # of a file of no size; a tensor takes 2 kB beside its values


def contents(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file.

    Raises:
        OSError, TypeError, ValueError: it cannot be read, or is none: a pipe would block, a device never end.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no file")
        return file.read()


def unpack(raw: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a `.safetensors` file.

    Raises:
        Exception: of whatever sort, if it is none, or a damaged one.
    """
    names, metadata = described(raw)
    found = from_bytes(raw)  # several times as fast as one by one, and in random order
    return {name: found[name] for name in names}, metadata


def described(raw: bytes) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors of a `.safetensors` file, and its metadata.

    Raises:
        ValueError, AttributeError: as `unpack`, as far as the header tells.
    """
    end = 8 + int.from_bytes(raw[:8], "little")
    if not 8 < end <= len(raw):
        raise ValueError("its header is cut short")
    if raw.count(b'"data_offsets"', 8, end) > TENSORS + len(raw) // 1024:
        raise ValueError("it has more tensors than an adapter of its size can have")
    entries = parse(raw[8:end].decode(), len(raw))
    metadata = entries.pop("__metadata__", None) or {}
    return list(entries), metadata
