"""Files of named tensors, `.safetensors` or torch's own, read without executing anything."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

from convlora.errors import ConvLoRAError, one_line
from convlora.formats.native import serialize, staged, umask, write_atomically, writing

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; torch's files have none, and are read with `weights_only=True`.

    Raises:
        ConvLoRAError: no such file, a damaged one, or one that holds more than named tensors.
    """
    with _readable(path):
        if _is_safetensors(path):
            found = from_bytes(Path(path).read_bytes())  # in random order
            return {name: found[name] for name in sorted(found, key=_natural)}, header(path)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about old files
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise ConvLoRAError(f"read: '{path}' holds no named tensors, but a {type(content).__name__}")
    for name, value in content.items():
        if not _is_plain(value):
            raise ConvLoRAError(f"read: '{path}' holds more than plain tensors: {name!r} is a {type(value).__name__}")
    return {name: value.detach() for name, value in content.items()}, {}


def header(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors of a file, and its metadata; of a `.safetensors` without reading the tensors.

    Raises:
        ConvLoRAError: as `load`.
    """
    with _readable(path):
        if _is_safetensors(path):
            with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
                return list(file.keys()), file.metadata() or {}
    tensors, metadata = load(path)
    return list(tensors), metadata


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever goes wrong in reading a file, as one error."""
    try:
        if not os.path.isfile(path):  # a pipe would block
            raise ConvLoRAError(f"read: no file '{path}'")
        yield
    except ConvLoRAError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        unsafe = "weights_only" in str(error) or "Weights only" in str(error)
        reason = "it is no file of plain tensors; others could run code" if unsafe else one_line(error)
        raise ConvLoRAError(f"read: '{path}' cannot be read ({reason})") from None


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By the first bytes: the length of a JSON header, then the header."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{" or Path(path).suffix == ".safetensors"


def _natural(name: str) -> str:
    """Sorts `body.2` before `body.10`."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(6), name)


def _is_plain(value: object) -> bool:
    """A dense CPU tensor that claims no more elements than the file holds for it."""
    if type(value) not in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return False
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def dump(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors, atomically, as the suffix says; torch's own files carry no metadata.

    Raises:
        ConvLoRAError: another suffix, or the file cannot be written there.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        write_atomically(path, serialize(tensors, metadata))
    elif suffix in TORCH_SUFFIXES:
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        write_atomically(path, buffer.getvalue())
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ConvLoRAError(f"write: '{path}' has suffix {suffix!r}; name it one of {known}")


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write files of one folder. A new folder appears whole.

    In a folder that exists, all are complete beside the old ones before the first is put in place; other files stay.

    Raises:
        ConvLoRAError: they cannot be written there; no temporary file stays behind.
    """
    with writing(path):
        _write_folder(Path(os.path.realpath(path)), files)


def _write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    temporary = None
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError("it is a file, and this format is a folder")
        if target.exists():
            with contextlib.ExitStack() as stack:
                for put_in_place in [stack.enter_context(staged(target / name, files[name])) for name in files]:
                    put_in_place()
            return
        temporary = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        for name, data in files.items():
            write_atomically(Path(temporary, name), data)
        os.chmod(temporary, 0o777 & ~umask())
        os.rename(temporary, target)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
