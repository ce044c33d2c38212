"""Where adapters were put: an adapted layer that leaves the model later, replaced or deleted, is missed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from convlora.adapter.parts import tensor_key
from convlora.errors import ConvLoRAWarning
from convlora.layer.adapted import Adapted, slot_of
from convlora.layer.loading import AdapterTensors

SHOWN = 5  # names in a message
_PLACES = "_convlora_places"  # on the module that was injected: adapter name -> the paths of its modules there


def record_places(root: nn.Module, name: str, entries: Mapping[str, AdapterTensors]) -> None:
    """Note which modules got an adapter. The record and what the modules hold share one dict, copied and pickled so."""
    places = dict.fromkeys(entries)
    root.__dict__.setdefault(_PLACES, {})[name] = places
    for path, entry in entries.items():
        entry._place = places, path


def vacate_place(entry: AdapterTensors) -> None:
    """An adapter is taken from a module on purpose, be it by a part of the model that knows no record."""
    if entry._place is not None:
        places, path = entry._place
        places.pop(path, None)


def forget_places(root: nn.Module, name: str | None) -> None:
    """Of one adapter, or of all: it is no more in the model."""
    for module in root.modules():
        records = module.__dict__.get(_PLACES, {})
        for known in [each for each in records if name in (None, each)]:
            del records[known]
        if not records:
            module.__dict__.pop(_PLACES, None)


def departed_modules(root: nn.Module, name: str | None = None) -> list[str]:
    """The paths at which modules had an adapter, and that are no more in the model, in the order of `inject`.

    A module that was moved is still there, and so is one in whose place a copy of it stands.
    """
    known = [module._place for module in root.modules() if isinstance(module, AdapterTensors) and module._place]
    present = {(id(places), place) for places, place in known}
    return [
        tensor_key(path, place)
        for path, module in root.named_modules()
        for adapter, places in module.__dict__.get(_PLACES, {}).items()
        for place in places
        if name in (None, adapter) and (id(places), place) not in present and not _has(module, place, adapter)
    ]


def _has(root: nn.Module, path: str, adapter: str) -> bool:
    module = dict(root.named_modules()).get(path)
    return isinstance(module, Adapted) and adapter in slot_of(module).names()


def warn_of_departed(root: nn.Module, name: str | None, operation: str, stacklevel: int) -> None:
    """One warning that names the adapted modules that have left the model."""
    if names := departed_modules(root, name):
        warnings.warn(
            f"{operation}: {shown_names(names)} had an adapter and left the model since inject (replaced or deleted);"
            " its part for what was there is lost. convlora.remove(layer) before a layer is taken out says that it is"
            " meant",
            ConvLoRAWarning,
            stacklevel=stacklevel + 1,
        )


def shown_names(names: list[str]) -> str:
    """The first names of a list, and how many there are beside.

    Example:
        >>> shown_names(["a", "b"]), shown_names(list("abcdefgh"))
        ("'a', 'b'", "'a', 'b', 'c', 'd', 'e' and 3 more")
    """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
