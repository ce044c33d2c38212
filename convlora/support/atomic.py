"""Files that are there whole or not at all: written beside their place, then renamed.

A writer holds a lock (`flock`) on what it is writing. A writer that is killed leaves its temporary file or folder, but
not the lock; the next writer to the same place removes what nobody holds.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from convlora.errors import ConvLoRAError, one_line

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where what a killed writer left stays
    fcntl = None


Content = bytes | Callable[[BinaryIO], None]


def write_atomically(path: str | os.PathLike[str], data: Content) -> None:
    """Write through a temporary file in the same folder, so that `path` is never half written.

    `data`: the bytes, or a function that writes them into an open file; if it raises, nothing has happened to `path`.

    Raises:
        ConvLoRAError: it cannot be written; no temporary file stays behind.
    """
    with writing(path), staged(path, data) as put_in_place:
        put_in_place()


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write files of one folder. A new folder appears whole.

    In a folder that exists, all are complete beside the old ones before the first is put in place; other files stay.

    Raises:
        ConvLoRAError: they cannot be written there; no temporary file stays behind.
    """
    with writing(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise NotADirectoryError("it is a file, and this format is a folder")
        if target.exists():
            with contextlib.ExitStack() as stack:
                for put_in_place in [stack.enter_context(staged(target / name, files[name])) for name in files]:
                    put_in_place()
            return
        with _temporary(target, Path.mkdir) as folder:
            for name, data in files.items():
                write_atomically(folder / name, data)
            os.rename(folder, target)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever goes wrong in writing a file or folder, as one error."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, ConvLoRAError):
            raise
        raise ConvLoRAError(f"write: '{path}' cannot be written ({one_line(error)})") from None


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], data: Content) -> Iterator[Callable[[], None]]:
    """A complete temporary file beside `path`, and the function that renames it to `path`; see `write_atomically`."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    if target.is_symlink():
        raise OSError("it is a link to itself")
    if target.exists() and not target.is_file():
        raise IsADirectoryError("it is a folder or a device")
    mode = target.stat().st_mode & 0o777 if target.exists() else None

    def make(file: Path) -> None:  # with the mode that the system gives new files: asking for it would change it
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode | 0o200))

    with _temporary(target, make) as temporary:
        with open(temporary, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        yield lambda: os.replace(temporary, target)


@contextlib.contextmanager
def _temporary(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `target`, locked; what is still there at the end is removed."""
    _sweep(target)
    temporary, lock = _made(target, make)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _made(target: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        make(temporary)
        lock = _lock(temporary, wait=True)
        if os.path.lexists(temporary):  # else another writer swept it before it was locked
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _sweep(target: Path) -> None:
    """Remove what killed writers of `target` have left."""
    left = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError):
        for name in filter(left.fullmatch, os.listdir(target.parent)):
            lock = _lock(target.with_name(name), wait=False)
            if lock is not None:
                _remove(target.with_name(name))
                os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """An open descriptor with the lock; None if somebody has it, or where there are no locks."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
