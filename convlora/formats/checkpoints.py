"""Bare checkpoints as files: reading never runs code of the file, writing changes nothing but the given tensors."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from convlora.adapter.checkpoint import MergedEntry
from convlora.errors import ConvLoRAError, ConvLoRAWarning, one_line
from convlora.support.atomic import write_atomically
from convlora.support.progress import counted_steps
from convlora.support.safetensors import tensor_bytes
from convlora.support.tensorfile import TensorFile, shapes_of, stored_blocks, write_tensors
from convlora.support.torchfile import from_torch_path

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".ckpt", ".bin")  # all but the first as `torch.save` writes them

# Where training code nests its state dict; of several, spandrel takes the first of this list, too.
NESTED = ("model_state_dict", "state_dict", "params_ema", "params-ema", "params", "model", "net")
_DEEPEST = 8  # levels of nesting that are looked into
_SHOWN = 12  # names in an error message
WRAPPERS = ("module.", "_orig_mod.", "netG.")  # DataParallel and DDP, torch.compile, some training code


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The file of a state dict.

    Args:
        path: where it was read.
        content: all that the file holds, as it is nested there.
        where: the keys, outermost first, under which the state dict lies in `content`.
        prefix: what all names of the state dict start with and the layers of the network do not.

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

    @classmethod
    def read(cls, path: str | os.PathLike[str], network: str | None = None) -> Checkpoint:
        """Read a `.safetensors` file, or one of `torch.save` with `weights_only=True`.

        Of the former only the header: its tensors are read as they are asked for, and it stays open. The latter's
        tensors are mapped into memory where its zip allows.

        `network`: which of several state dicts, by its key or the dotted keys that lead to it, or by what all its names
        begin with; by default the first of `NESTED`, or the only one.

        Raises:
            ConvLoRAError: no such file, one that holds more than tensors and plain data, or one without a state dict,
                with none of this name, or with several and no name.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise ConvLoRAError(f"read: '{path}' is no checkpoint by its name; known are {', '.join(SUFFIXES)}")
        content = _opened(path) if path.suffix.lower() == SAFETENSORS else _of_torch(path)
        where, prefix = _where_nested(content, path) if network is None else _where_named(content, network, path)
        names = [name for name in _inside(content, where) if name.startswith(prefix)]
        while wrapper := next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), None):
            prefix += wrapper
        return cls(path, content, where, prefix)

    @property
    def state(self) -> Mapping[str, Any]:
        """The state dict by the names of the network, without nesting and prefix, with what torch notes beside it."""
        if isinstance(self.content, TensorFile):
            return self.content.below(self.prefix)
        skipped, inside = len(self.prefix), _inside(self.content, self.where)
        state = OrderedDict((n[skipped:], v) for n, v in inside.items() if n.startswith(self.prefix))
        noted = getattr(inside, "_metadata", {})
        state._metadata = {path.removeprefix(self.prefix): value for path, value in noted.items()}  # type: ignore[attr-defined]
        return state

    @property
    def beside(self) -> list[str]:
        """Further state dicts at the same place: they are neither read nor changed."""
        holder = _inside(self.content, self.where[:-1]) if self.where else {}
        return [name for name, value in holder.items() if name not in self.where and _is_state_dict(value)]

    def write(
        self,
        path: str | os.PathLike[str],
        values: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the checkpoint with other values of some entries, by the names of `self.state`; atomically.

        Nesting, names, key order, dtypes, metadata and all else stay; in `.safetensors` every other byte does. From
        there to there no more than a block of a tensor is in memory. From `.safetensors` to a file of `torch.save` and
        back, what the other cannot hold is named in a warning.

        `values`: Tensors or `MergedEntry`s; `check` is called once all of them are computed, and before anything is in
        its place: if it raises, nothing is.

        Raises:
            ConvLoRAError: the file cannot be written there, or the one that is read has been written into since.
        """
        changed = {self.prefix + name: value for name, value in values.items()}
        file = self.content if isinstance(self.content, TensorFile) else None
        if Path(path).suffix.lower() != SAFETENSORS:
            if file is not None and _metadata(file):
                _warn(f"write: '{path}' cannot hold the metadata of '{self.path}'; it is left out")
            content = self.content if file is None else dict(file)
            whole = {n: v.whole() if isinstance(v, MergedEntry) else v for n, v in counted_steps(changed.items())}
            check()
            buffer = io.BytesIO()
            torch.save(_replaced(content, self.where, whole), buffer)
            write_atomically(path, lambda out: _all_written(out, buffer.getbuffer()))
            return
        if file is not None and _fit(file, changed):
            write_atomically(path, lambda out: _patched(out, file, changed, check))
            return
        kept = self._flat(path) if file is None else file
        metadata = {"format": "pt", **({} if file is None else _metadata(file))}
        write_atomically(path, lambda out: _rewritten(out, kept, changed, metadata, check))

    def _flat(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """The tensors of the state dict alone."""
        state = _inside(self.content, self.where)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        lost = [name for name in state if name not in tensors]
        lost += [name for name in _inside(self.content, self.where[:-1]) if name not in self.where and self.where]
        if sparse := [name for name, value in tensors.items() if value.layout is not torch.strided or value.is_meta]:
            raise ConvLoRAError(f"write: '{path}' cannot hold tensors that are sparse or have no values: {sparse}")
        if lost:
            _warn(f"write: '{path}' holds the state dict alone; left out of '{self.path}': {', '.join(lost)}")
        return tensors


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile.open(path)
    except OSError as error:
        raise ConvLoRAError(f"read: '{path}' cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConvLoRAError):
            raise
        raise ConvLoRAError(f"read: '{path}' cannot be read as safetensors ({one_line(error)})") from None


def _of_torch(path: Path) -> Mapping[str, Any]:
    try:
        content = from_torch_path(path)
    except OSError as error:
        raise ConvLoRAError(f"read: '{path}' cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise ConvLoRAError(f"read: '{path}' cannot be read as a file of torch.save ({one_line(error)})") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ConvLoRAError(f"read: '{path}' holds a {type(content).__name__}, not a state dict")
    return content


def _metadata(file: TensorFile) -> dict[str, str]:
    """The metadata of a `.safetensors` file but for `{"format": "pt"}`, which says nothing."""
    return {name: text for name, text in file.metadata.items() if (name, text) != ("format", "pt")}


def _fit(file: TensorFile, changed: Mapping[str, Any]) -> bool:
    """Whether tensors take the places of those in a `.safetensors` file."""
    places = file.stored
    return all(
        name in places and (places[name].shape, places[name].dtype) == (tuple(value.shape), value.dtype)
        for name, value in changed.items()
    )


def _patched(out: BinaryIO, file: TensorFile, changed: Mapping[str, Any], check: Callable[[], None]) -> None:
    """A `.safetensors` file with other values of some tensors, which have the shapes and dtypes of the old ones."""
    out.write(file.head)
    done = 0
    for name in counted_steps(sorted(changed, key=lambda name: (file.stored[name].start, name))):
        file.copy_bytes(done, file.stored[name].start, out)
        for block in _blocks(changed[name]):
            out.write(tensor_bytes(block))
        done = file.stored[name].stop
    file.copy_bytes(done, max((place.stop for place in file.stored.values()), default=0), out)
    file.refuse_changed()
    check()


def _rewritten(
    out: BinaryIO,
    kept: Mapping[str, Tensor],
    changed: Mapping[str, Any],
    metadata: Mapping[str, str],
    check: Callable[[], None],
) -> None:
    """A `.safetensors` file anew, for tensors of other shapes, or of a file of another kind."""
    new = {name: value for name, value in changed.items() if isinstance(value, Tensor | MergedEntry)}
    blocks = {name: _Lazily(kept, new, name) for name in {**kept, **new}}
    write_tensors(out, {**shapes_of(kept), **new}, blocks, metadata)
    if isinstance(kept, TensorFile):
        kept.refuse_changed()
    check()


@dataclass(frozen=True)
class _Lazily(Iterable[Tensor]):
    """The blocks of an entry of one of two mappings, read when they are asked for."""

    kept: Mapping[str, Tensor]
    new: Mapping[str, Any]
    name: str

    def __iter__(self) -> Iterator[Tensor]:
        if self.name in self.new:
            return iter(_blocks(self.new[self.name]))
        return stored_blocks(self.kept, self.name)


def _blocks(value: Any) -> Iterable[Tensor]:
    return value.blocks() if isinstance(value, MergedEntry) else [value]


def _all_written(out: BinaryIO, data: Any) -> None:
    out.write(data)


def _where_nested(content: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], str]:
    """The keys that lead to the state dict that is meant where nobody says which, and no prefix."""
    where = _where_meant(content)
    if _is_state_dict(_inside(content, where)):
        return where, ""
    networks = list(_networks(content))
    if len(networks) == 1:
        return networks[0], ""
    if networks:
        raise ConvLoRAError(f"read: '{path}' holds {_several(networks)}; say which by network=")
    inside = f" (in '{'.'.join(where)}')" if where else ""
    raise ConvLoRAError(f"read: '{path}' holds no state dict{inside}; save the model's state_dict() alone")


def _where_named(content: Mapping[str, Any], network: str, path: Path) -> tuple[tuple[str, ...], str]:
    """The keys that lead to a state dict of this name, or the prefix of its names in the one that is meant else."""
    networks = {".".join(where): where for where in _networks(content)}
    if network in networks:
        return networks[network], ""
    found = [where for name, where in networks.items() if name.endswith(f".{network}")]
    if len(found) == 1:
        return found[0], ""
    if found:
        raise ConvLoRAError(f"read: '{path}' holds {_several(found)}; say which by network=")
    where = _where_meant(content)
    names = [name for name, value in shapes_of(_inside(content, where)).items() if isinstance(value, Tensor)]
    if any(name.startswith(f"{network}.") for name in names):
        return where, f"{network}."
    known: Sequence[Sequence[str]] = [keys for keys in networks.values() if keys]
    known = known or [(head,) for head in dict.fromkeys(name.partition(".")[0] for name in names)]
    raise ConvLoRAError(f"read: '{path}' holds no network {network!r}; it has {_several(known) or 'none'}")


def _where_meant(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead to the first of `NESTED`, as far as they go."""
    where: tuple[str, ...] = ()
    inner: Any = content
    while not _is_state_dict(inner) and len(where) < _DEEPEST:
        known = [name for name in NESTED if isinstance(inner.get(name), Mapping)]
        only = [name for name in inner if len(inner) == 1 and isinstance(inner[name], Mapping)]
        if not known and not only:
            break
        where = (*where, (known or only)[0])
        inner = inner[where[-1]]
    return where


def _networks(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each state dict, a part of another one, too."""
    ahead: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen = set()  # a file can hold a dict at many places, in itself, too
    for where, inner in ahead:
        if _is_state_dict(inner):
            yield where
        if isinstance(inner, Mapping) and id(inner) not in seen and len(where) < _DEEPEST:
            seen.add(id(inner))
            ahead += [((*where, name), value) for name, value in shapes_of(inner).items() if isinstance(name, str)]


def _several(networks: Sequence[Sequence[str]]) -> str:
    shown = [".".join(where) for where in networks]
    return ", ".join(shown[:_SHOWN]) + (f", … ({len(shown)})" if len(shown) > _SHOWN else "")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in shapes_of(value).values())


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
