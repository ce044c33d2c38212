"""Files of named tensors, `.safetensors` or torch's own, read without executing anything."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from convlora.errors import ConvLoRAError, one_line
from convlora.support.atomic import write_atomically
from convlora.support.safetensors import from_safetensors, read_regular_file, safetensors_header, to_safetensors
from convlora.support.torchfile import from_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; torch's files have none.

    Raises:
        ConvLoRAError: no such file, a damaged one, or one that holds more than named tensors.
    """
    with _readable(path):
        raw = read_regular_file(path)
        if _is_safetensors(path, raw):
            found, metadata = from_safetensors(raw)
            return {name: found[name] for name in sorted(found, key=_natural)}, metadata
        content = from_torch_file(raw)
    if not isinstance(content, dict) or not content:
        raise ConvLoRAError(f"read: '{path}' holds no named tensors, but a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not _is_plain(value):
            kind = f"tensor on {value.device}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise ConvLoRAError(f"read: '{path}' holds more than named, plain tensors: {name!r} is a {kind}")
        if value.nbytes > len(raw):  # a few numbers, seen again and again
            raise ConvLoRAError(f"read: '{path}' claims more than the file holds: {name!r} has {value.nbytes:,} bytes")
    return {name: value.detach() for name, value in content.items()}, {}


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def header(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors of a file, and its metadata; of a `.safetensors` without making the tensors.

    Raises:
        ConvLoRAError: as `load`.
    """
    with _readable(path):
        raw = read_regular_file(path)
        if _is_safetensors(path, raw):
            return safetensors_header(raw)
    tensors, metadata = read_tensors(path)
    return list(tensors), metadata


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever goes wrong in reading a file, as one error."""
    try:
        if not os.path.isfile(path):
            raise ConvLoRAError(f"read: no file '{path}'")
        yield
    except ConvLoRAError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ConvLoRAError(f"read: '{path}' cannot be read ({one_line(error)})") from None


def _is_safetensors(path: str | os.PathLike[str], raw: bytes) -> bool:
    """By the first bytes: the length of a JSON header, then the header."""
    return raw[8:9] == b"{" or Path(path).suffix == ".safetensors"


def _natural(name: str) -> str:
    """Sorts `body.2` before `body.10`."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(6), name)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors, atomically, as the suffix says; torch's own files carry no metadata.

    Raises:
        ConvLoRAError: another suffix, or the file cannot be written there.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        write_atomically(path, to_safetensors(tensors, metadata))
    elif suffix in TORCH_SUFFIXES:
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        write_atomically(path, buffer.getvalue())
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ConvLoRAError(f"write: '{path}' has suffix {suffix!r}; name it one of {known}")
