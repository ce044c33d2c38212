"""The bytes of a file of `torch.save` as plain data."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from typing import IO, Any

import torch

from convlora.support.safetensors import open_regular_file


def from_torch_file(raw: bytes) -> Any:
    """What a file of `torch.save` holds, read by `torch.load(weights_only=True)`: that runs no code of the file.

    A zip file is refused before it is read if its members claim more bytes than the file has, as compressed ones do. So
    is a tensor that is longer than its member: older versions of PyTorch read on in the memory behind it.

    Raises:
        ValueError, zipfile.BadZipFile: it is none, a damaged one, or one that holds more than tensors and plain data.

    Example:
        >>> buffer = io.BytesIO()
        >>> torch.save({"weight": torch.ones(2)}, buffer)
        >>> from_torch_file(buffer.getvalue())
        {'weight': tensor([1., 1.])}
    """
    return _loaded(io.BytesIO(raw), _member_sizes(io.BytesIO(raw), len(raw)))


def from_torch_path(path: str | os.PathLike[str]) -> Any:
    """What a file of `torch.save` holds, as `from_torch_file` reads it; tensors are mapped into memory, not copied.

    Not those of old files, which are no zip file, nor of a zip file with compressed members.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: as `from_torch_file`, or it cannot be read.
    """
    with open_regular_file(path) as file:
        sizes = _member_sizes(file, os.fstat(file.fileno()).st_size)
        if sizes is None or not _is_stored_plainly(file):
            file.seek(0)
            return from_torch_file(file.read())
    return _loaded(os.fspath(path), sizes, mmap=True)


def _member_sizes(file: IO[bytes], size: int) -> set[int] | None:
    """What the members of a zip file claim to hold; None if it is no zip file.

    Raises:
        ValueError: that is more than it can hold.
    """
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as members:
        sizes = [info.file_size for info in members.infolist()]
    if sum(sizes) > size:
        raise ValueError("its members claim more bytes than the file has")
    return set(sizes)


def _is_stored_plainly(file: IO[bytes]) -> bool:
    with zipfile.ZipFile(file) as members:
        return all(info.compress_type == zipfile.ZIP_STORED for info in members.infolist())


def _loaded(source: Any, sizes: set[int] | None, mmap: bool = False) -> Any:
    def on_cpu(storage: Any, _: str) -> Any:
        if sizes is not None and storage.nbytes() not in sizes:
            raise ValueError(f"a tensor of {storage.nbytes()} bytes is cut")
        return storage

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storages: nothing that a user could change
            return torch.load(source, map_location=on_cpu, weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise ValueError(
                f"it holds more than tensors and plain data, which could run code ({_reason(error)});"
                " save the model's state_dict() alone"
            ) from None
        raise ValueError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """The first sentence of an error; of the unpickler's advice, the cause."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first.partition(". ")[0][:300]
