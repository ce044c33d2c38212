"""What one caller, a thread or an asyncio task, computes with: the adapters that `using` and `per_sample` choose."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch

from convlora.errors import ConvLoRAError
from convlora.layer.rows import SampleRows

COMPILED = "using: a compiled model computes with what activate says; call the model that is not compiled"


class Chosen(Protocol):
    """What callers choose for: the slot of a layer."""

    choices: int  # how many of them have


class Choice(NamedTuple):
    """What acts for a caller: adapters by strength, or those of the samples in a batch."""

    strengths: Mapping[str, float]
    rows: SampleRows | None = None


# The slots of all models that the caller has chosen for. A slot counts its choices by all callers: without one, which
# is the rule, it asks nothing.
_choices: ContextVar[Mapping[Chosen, Choice] | None] = ContextVar("convlora_choices", default=None)
_counting = threading.Lock()
_GRAPHS_READ_CONTEXT = torch.__version__ >= "2.14"  # compares as versions do


@contextlib.contextmanager
def choosing(slots: Iterable[Chosen], choice: Choice) -> Iterator[None]:
    """Inside the block this caller, and what it starts, computes with the choice in these slots."""
    with choosing_each(dict.fromkeys(slots, choice)):
        yield


@contextlib.contextmanager
def choosing_each(choices: Mapping[Chosen, Choice]) -> Iterator[None]:
    """The same, with a choice for each slot."""
    _count(choices, 1)
    token = _choices.set({**(_choices.get() or {}), **choices})
    try:
        yield
    finally:
        _choices.reset(token)
        _count(choices, -1)


def _count(slots: Iterable[Chosen], step: int) -> None:
    with _counting:
        for slot in slots:
            slot.choices += step


def chosen(slot: Chosen) -> Choice | None:
    """What the caller has chosen for a slot, if it has."""
    choices = _choices.get()
    return None if choices is None else choices.get(slot)


def refuse_choice_in_graph(slot: Chosen) -> None:
    """A compiled graph has the adapters that were active when it was made: it cannot follow each caller's choice.

    PyTorch before 2.14 cannot compile the reading of a `ContextVar`. There a choice of anybody is refused.

    Raises:
        ConvLoRAError: a graph is being made, or made again, for a caller with a choice.
    """
    refused = _choices.get() is not None if _GRAPHS_READ_CONTEXT else slot.choices > 0
    if refused:
        raise ConvLoRAError(COMPILED)
