"""How far a long computation is, told to whoever watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Tell = Callable[[int, int], None]  # how many of how many steps are done

_tell: ContextVar[Tell | None] = ContextVar("convlora_progress", default=None)


def counted_steps(items: Collection[T]) -> Iterator[T]:
    """The items one by one, each of them a step of a long computation.

    Example:
        >>> with watching_steps(lambda done, total: print(f"{done}/{total}", end=" ")):
        ...     sum(counted_steps([1, 2, 3]))
        0/3 1/3 2/3 3/3 6
    """
    tell = _tell.get()
    if tell is None:
        yield from items
        return
    for done, item in enumerate(items):
        tell(done, len(items))
        yield item
    tell(len(items), len(items))


@contextlib.contextmanager
def watching_steps(tell: Tell) -> Iterator[None]:
    """Call `tell(done, total)` at every step of what runs inside."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)
