"""What one caller, a thread or an asyncio task, computes with: the adapters that `using` and `per_sample` choose."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from convlora.errors import ConvLoRAError

COMPILED = "using: a compiled model computes with what activate says; call the model that is not compiled"


class Chosen(Protocol):
    """What callers choose for: the slot of a layer."""

    choices: int  # how many of them have


class SampleRows:
    """The adapter of each sample; None is the base alone. Samples of one adapter go through a layer together."""

    def __init__(self, names: Sequence[str | None], folded: bool) -> None:
        self.names, self.folded = tuple(names), folded
        self.order = sorted(range(len(names)), key=lambda sample: names[sample] or "")
        self.inverse = sorted(range(len(names)), key=lambda place: self.order[place])
        self.runs = [(name, len(list(run))) for name, run in groupby(names[sample] for sample in self.order)]

    def through(self, call: Callable[[str | None, Tensor], Tensor], x: Tensor, least_dims: int) -> Tensor:
        """`call(name, rows)` for each adapter, with its rows of `x`; the outputs in the order of `x`.

        Raises:
            ConvLoRAError: `x` has no row for each sample, or several and `folded` does not say so.
        """
        samples = len(self.names)
        each, rest = divmod(len(x), samples) if x.dim() >= least_dims else (0, 0)
        if not each or rest or (each > 1 and not self.folded):
            remedy = "; if those of a sample are adjacent, say folded=True" if each > 1 and not rest else ""
            raise ConvLoRAError(f"per_sample: {samples} names for a layer input of shape {tuple(x.shape)}{remedy}")
        if len(self.runs) == 1:
            return call(self.runs[0][0], x)
        parts = torch.split(self._pick(x, each, self.order), [count * each for _, count in self.runs])
        y = torch.cat([call(name, part) for (name, _), part in zip(self.runs, parts, strict=True)])
        return self._pick(y, each, self.inverse)

    def _pick(self, x: Tensor, each: int, order: list[int]) -> Tensor:
        if order == list(range(len(order))):
            return x
        return x.view(len(order), each, *x.shape[1:])[order].flatten(0, 1)


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
