"""Switching adapters while other threads run the model: each call of it computes with one state, the old or the new.

A switch (`activate`, `merge`, a hot swap, …) goes from layer to layer. While it does, a call that another thread begins
waits at the first adapted layer, and before it does, the switch waits for the calls that had begun. Which those are is
read off the stacks of the threads: the library is never told of a call, since it puts no hook on a model.

A call is one of a module (`model(x)`, not `model.forward(x)`) that runs eagerly: what `torch.compile` made asks nobody.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from torch import nn

from convlora.errors import ConvLoRAError

PATIENCE = 60.0  # seconds that a switch waits for a call, or for another switch, before it is refused

_CALL = nn.Module.__call__.__code__
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_LOOKS = 1000  # at a stack that ends in a generator; only threads that something other than Python made have such
_lock = threading.RLock()
current: Switch | None = None  # the one that goes on


class Switch:
    """A switch of one model, of one thread."""

    def __init__(self, root: nn.Module, operation: str) -> None:
        self.operation, self.thread = operation, threading.get_ident()
        self.modules: set[int] = {id(module) for module in root.modules()}
        self.counted, self.over = threading.Event(), threading.Event()
        self.begun: set[FrameType] = set()

    def wait_for_calls(self) -> None:
        """Let the calls that have begun come to their end.

        Raises:
            ConvLoRAError: one of them takes longer than `PATIENCE`.
        """
        # Reads wait from here on until the calls are counted: a call that is not on a stack now has read nothing.
        self.begun = self._calls()
        self.counted.set()
        end, pause = time.monotonic() + PATIENCE, 1e-4
        while self.begun & self._calls():
            if time.monotonic() > end:
                raise _busy(self.operation, "is running the model")
            time.sleep(pause)
            pause = min(2 * pause, 5e-3)

    def _calls(self) -> set[FrameType]:
        """The outermost call of the model in every other thread that is in one."""
        calls = (self._call_of(thread) for thread in sys._current_frames() if thread != self.thread)
        return {call for call in calls if call is not None}

    def _call_of(self, thread: int) -> FrameType | None:
        """The outermost call of the model in a thread, which goes on while its stack is read.

        A function that has returned meanwhile still knows its caller, a generator that has yielded does not: a stack
        that ends in one was cut off there, and is read again.
        """
        call = None
        for _ in range(_LOOKS):
            call, last = self._outermost(sys._current_frames().get(thread))
            if last is None or not last.f_code.co_flags & _GENERATOR:
                break
        return call

    def _outermost(self, frame: FrameType | None) -> tuple[FrameType | None, FrameType | None]:
        """The outermost call of the model among a frame and its callers, and the outermost of them all."""
        call = last = None
        while frame is not None:
            if frame.f_code is _CALL:
                children = frame.f_locals["self"]._modules
                wrapped = children.get("_orig_mod", children.get("module"))  # torch.compile, DDP and the like
                if not {id(frame.f_locals["self"]), id(wrapped)}.isdisjoint(self.modules):
                    call = frame
            last, frame = frame, frame.f_back
        return call, last

    def hold_back(self, layer: nn.Module) -> None:
        """Wait at a read of a layer's weight if it belongs to a call that began after the switch."""
        if threading.get_ident() == self.thread or id(layer) not in self.modules:
            return
        self.counted.wait()
        if self._outermost(sys._getframe(1))[0] not in self.begun:
            self.over.wait()


@contextlib.contextmanager
def switching(root: nn.Module, operation: str) -> Iterator[None]:
    """The block changes which adapters act, or their values; calls of the model in other threads see all of it or none.

    Raises:
        ConvLoRAError: a call, or a switch of another thread, does not come to its end; the block did not begin.
    """
    global current
    with steady(operation):
        if current is not None or not in_threads():  # part of a larger switch; nobody else is there
            yield
            return
        switch = current = Switch(root, operation)
        try:
            switch.wait_for_calls()
            yield
        finally:
            current = None
            switch.counted.set()
            switch.over.set()
            switch.begun.clear()


@contextlib.contextmanager
def steady(operation: str) -> Iterator[None]:
    """No other thread switches meanwhile.

    Raises:
        ConvLoRAError: one does, for longer than `PATIENCE`.
    """
    if not _lock.acquire(timeout=PATIENCE):
        raise _busy(operation, "is switching adapters")
    try:
        yield
    finally:
        _lock.release()


def in_threads() -> bool:
    """Whether the process has more threads than this one that run Python."""
    return len(sys._current_frames()) > 1


def _busy(operation: str, does: str) -> ConvLoRAError:
    return ConvLoRAError(f"{operation}: another thread {does}, for {PATIENCE:g} s by now; wait until it has ended")


def _after_fork() -> None:
    global _lock, current
    _lock, current = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
