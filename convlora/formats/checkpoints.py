"""Bare checkpoints as files: reading never runs code of the file, writing changes nothing but the given tensors."""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from convlora.adapter.parts import base_keys
from convlora.errors import ConvLoRAError, ConvLoRAWarning, one_line
from convlora.support.atomic import write_atomically
from convlora.support.safetensors import tensor_bytes
from convlora.support.torchfile import from_torch_file

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".ckpt", ".bin")  # all but the first as `torch.save` writes them

# Where training code nests its state dict; of several, spandrel takes the first of this list, too.
NESTED = ("model_state_dict", "state_dict", "params_ema", "params-ema", "params", "model", "net")
WRAPPERS = ("module.", "_orig_mod.", "netG.")  # DataParallel and DDP, torch.compile, some training code


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The file of a state dict.

    Args:
        path: where it was read.
        content: all that the file holds, as it is nested there.
        where: the keys, outermost first, under which the state dict lies in `content`.
        prefix: what all names of the state dict start with and the layers of the network do not.
        raw: the bytes of a `.safetensors` file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"params_ema": {"module.conv.weight": torch.zeros(8, 3, 3, 3)}}, f"{folder}/net.pth")
        ...     checkpoint = Checkpoint.read(f"{folder}/net.pth")
        >>> list(checkpoint.state), checkpoint.where, checkpoint.prefix
        (['conv.weight'], ('params_ema',), 'module.')
    """

    path: Path
    content: Mapping[str, Any]
    where: tuple[str, ...] = ()
    prefix: str = ""
    raw: bytes | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a `.safetensors` file, or one of `torch.save` with `weights_only=True`.

        Raises:
            ConvLoRAError: no such file, one that holds more than tensors and plain data, or one without a state dict.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise ConvLoRAError(f"read: '{path}' is no checkpoint by its name; known are {', '.join(SUFFIXES)}")
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConvLoRAError(f"read: '{path}' cannot be read ({error.strerror})") from None
        content = _in_order(raw, path) if path.suffix.lower() == SAFETENSORS else _of_torch(raw, path)
        where = _where_nested(content)
        state = _inside(content, where)
        if not any(isinstance(value, Tensor) for value in state.values()):
            inside = f" (in '{'.'.join(where)}')" if where else ""
            raise ConvLoRAError(f"read: '{path}' holds no state dict{inside}; save the model's state_dict() alone")
        prefix = ""
        while wrapper := next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in state)), None):
            prefix += wrapper
        return cls(path, content, where, prefix, raw if path.suffix.lower() == SAFETENSORS else None)

    @property
    def state(self) -> dict[str, Any]:
        """The state dict by the names of the network, without nesting and prefix, with what torch notes beside it."""
        skipped, inside = len(self.prefix), _inside(self.content, self.where)
        state = OrderedDict((n[skipped:], v) for n, v in inside.items() if n.startswith(self.prefix))
        noted = getattr(inside, "_metadata", {})
        state._metadata = {path.removeprefix(self.prefix): value for path, value in noted.items()}  # type: ignore[attr-defined]
        return state

    @property
    def beside(self) -> list[str]:
        """Further state dicts at the same place: they are neither read nor changed."""
        holder = _inside(self.content, self.where[:-1]) if self.where else {}
        return [name for name in NESTED if name not in self.where and _is_state_dict(holder.get(name))]

    def fitting(self, layers: Iterable[str]) -> Checkpoint:
        """The checkpoint with the one prefix under which it has all these layers; as it is if there is none.

        Raises:
            ConvLoRAError: the checkpoint has the layers under several prefixes.
        """
        names = set(_inside(self.content, self.where))
        weights = [base_keys(path, "weight") for path in layers]

        def has_all(prefix: str) -> bool:
            return all(any(prefix + key in names for key in keys) for keys in weights)

        if has_all(self.prefix):
            return self
        ends = {n.removesuffix(key) for key in weights[0] for n in names if f".{n}".endswith(f".{key}")}
        prefixes = sorted(filter(has_all, ends))
        if len(prefixes) > 1:
            raise ConvLoRAError(f"read: '{self.path}' has these layers several times: below {', '.join(prefixes)}")
        return replace(self, prefix=prefixes[0]) if prefixes else self

    def write(self, path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        """Write the checkpoint with the values of `state`, which has the names of `self.state`; atomically.

        Nesting, names, key order, dtypes, metadata and all else stay; in `.safetensors` every other byte does.
        From `.safetensors` to a file of `torch.save` and back, what the other cannot hold is named in a warning.

        Raises:
            ConvLoRAError: the file cannot be written there.
        """
        before = self.state
        changed = {self.prefix + name: value for name, value in state.items() if value is not before.get(name)}
        if Path(path).suffix.lower() != SAFETENSORS:
            if self.raw is not None and _metadata(self.raw):
                _warn(f"write: '{path}' cannot hold the metadata of '{self.path}'; it is left out")
            buffer = io.BytesIO()
            torch.save(_replaced(self.content, self.where, changed), buffer)
            data = buffer.getvalue()
        elif self.raw is not None:
            data = _patched(self.raw, changed) if _fit(self.raw, changed) else self._rewritten(changed)
        else:
            data = self._flat({**_inside(self.content, self.where), **changed}, path)
        write_atomically(path, data)

    def _rewritten(self, changed: Mapping[str, Tensor]) -> bytes:
        """The file anew, for tensors of other shapes; its metadata stay."""
        assert self.raw is not None
        tensors = {n: v.detach().clone().contiguous() for n, v in {**self.content, **changed}.items()}
        return to_bytes(tensors, metadata={"format": "pt", **_metadata(self.raw)})

    def _flat(self, state: Mapping[str, Any], path: str | os.PathLike[str]) -> bytes:
        tensors = {n: v.detach().clone().contiguous() for n, v in state.items() if isinstance(v, Tensor)}
        lost = [name for name in state if name not in tensors]
        lost += [name for name in _inside(self.content, self.where[:-1]) if name not in self.where and self.where]
        if lost:
            _warn(f"write: '{path}' holds the state dict alone; left out of '{self.path}': {', '.join(lost)}")
        return to_bytes(tensors, metadata={"format": "pt"})


def _in_order(raw: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file in the order of its header."""
    try:
        tensors = from_bytes(raw)
        return {name: tensors[name] for name in _header(raw)[0]}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConvLoRAError(f"read: '{path}' cannot be read as safetensors ({one_line(error)})") from None


def _of_torch(raw: bytes, path: Path) -> Mapping[str, Any]:
    try:
        content = from_torch_file(raw)
    except Exception as error:
        raise ConvLoRAError(f"read: '{path}' cannot be read as a file of torch.save ({one_line(error)})") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ConvLoRAError(f"read: '{path}' holds a {type(content).__name__}, not a state dict")
    return content


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    """The entries of the tensors in a `.safetensors` file, and where the data start."""
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    entries.pop("__metadata__", None)
    return entries, start


def _metadata(raw: bytes) -> dict[str, str]:
    """The metadata of a `.safetensors` file but for `{"format": "pt"}`, which says nothing."""
    start = 8 + int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8:start]).get("__metadata__") or {}
    return {name: text for name, text in metadata.items() if (name, text) != ("format", "pt")}


def _fit(raw: bytes, changed: Mapping[str, Tensor]) -> bool:
    """Whether tensors take the places of those in a `.safetensors` file."""
    entries, _ = _header(raw)
    return all(name in entries and entries[name]["shape"] == list(value.shape) for name, value in changed.items())


def _patched(raw: bytes, changed: Mapping[str, Tensor]) -> bytes:
    """A `.safetensors` file with other values of some tensors; they have the shapes and dtypes of the old ones."""
    entries, start = _header(raw)
    parts: list[Any] = []
    done = 0
    for first, last, name in sorted((*entries[name]["data_offsets"], name) for name in changed):
        parts += [memoryview(raw)[done : start + first], tensor_bytes(changed[name])]
        done = start + last
    return b"".join([*parts, memoryview(raw)[done:]])


def _where_nested(content: Mapping[str, Any]) -> tuple[str, ...]:
    where: tuple[str, ...] = ()
    while not _is_state_dict(content):
        known = [name for name in NESTED if isinstance(content.get(name), Mapping)]
        only = [name for name in content if len(content) == 1 and isinstance(content[name], Mapping)]
        if not known and not only:
            break
        where = (*where, (known or only)[0])
        content = content[where[-1]]
    return where


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _inside(content: Mapping[str, Any], where: tuple[str, ...]) -> Mapping[str, Any]:
    for name in where:
        content = content[name]
    return content


def _replaced(content: Mapping[str, Any], where: tuple[str, ...], values: Mapping[str, Any]) -> Any:
    """A copy of nested dicts, as deep as needed, with other values."""
    twin: Any = copy.copy(content)
    if hasattr(content, "_metadata"):  # the versions of torch's modules
        twin._metadata = content._metadata
    twin.update({where[0]: _replaced(content[where[0]], where[1:], values)} if where else values)
    return twin


def _warn(message: str) -> None:
    warnings.warn(message, ConvLoRAWarning, stacklevel=3)
