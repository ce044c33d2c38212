"""The bytes of a file of `torch.save` as plain data."""

from __future__ import annotations

import io
import warnings
import zipfile
from typing import Any

import torch


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
    sizes: set[int] | None = None
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            members = [info.file_size for info in file.infolist()]
        if sum(members) > len(raw):
            raise ValueError("its members claim more bytes than the file has")
        sizes = set(members)

    def on_cpu(storage: Any, _: str) -> Any:
        if sizes is not None and storage.nbytes() not in sizes:
            raise ValueError(f"a tensor of {storage.nbytes()} bytes is cut")
        return storage

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storages: nothing that a user could change
            return torch.load(io.BytesIO(raw), map_location=on_cpu, weights_only=True)
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
