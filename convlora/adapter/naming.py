"""Other names for the layers of an adapter: what is behind `Adapter.rename`, and the prefix by which names differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias, TypeVar

from convlora.adapter.algebra import assemble
from convlora.adapter.parts import AdapterParts, is_statistic
from convlora.errors import ConvLoRAError
from convlora.support.patterns import nearest_names

A = TypeVar("A", bound=AdapterParts)
Names: TypeAlias = "Mapping[str, str] | Callable[[str], str]"
OPERATION = "Adapter.rename"


def rename_layers(adapter: A, names: Names) -> A:
    """See `Adapter.rename`."""
    paths = [
        *adapter.layers,
        *adapter.modules,
        *(alias for layer in adapter.layers.values() for alias in layer.aliases),
    ]
    new = _new_names(dict.fromkeys(paths), names)
    if all(old == now for old, now in new.items()):
        return adapter
    layers = {
        new[path]: replace(layer, aliases=tuple(new[alias] for alias in layer.aliases))
        for path, layer in adapter.layers.items()
    }
    # By what they hold, not by the config's patterns, which come from a file and may take for ever to match.
    saved = (path for path, tensors in adapter.modules.items() if not all(map(is_statistic, tensors)))
    return assemble(
        type(adapter),
        adapter.config.replace(modules_to_save=tuple(f"re:{re.escape(new[path])}" for path in saved)),
        layers,
        errors={new[path]: error for path, error in adapter.errors.items()},
        modules={new[path]: tensors for path, tensors in adapter.modules.items()},
    )


def _new_names(paths: Iterable[str], names: Names) -> dict[str, str]:
    if isinstance(names, Mapping):
        new = _mapped(list(paths), names)
    elif callable(names):
        new = {path: names(path) for path in paths}
    else:
        raise ConvLoRAError(f"{OPERATION}: expected {{path: path}} or a function of a path, got {names!r}")
    wrong = {path: now for path, now in new.items() if not isinstance(now, str) or (now and "" in now.split("."))}
    if wrong:
        path, now = next(iter(wrong.items()))
        raise ConvLoRAError(f"{OPERATION}: the new name of {path!r} (={now!r}) must be a dotted path")
    several = sorted(now for now, count in Counter(new.values()).items() if count > 1)
    if several:
        of = ", ".join(repr(path) for path, now in new.items() if now == several[0])
        raise ConvLoRAError(f"{OPERATION}: {of} would all be named {several[0]!r}")
    return new


def _mapped(paths: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """Names by a mapping of paths; the longest one that a path begins with says what takes its place."""
    if not all(isinstance(text, str) for pair in names.items() for text in pair):
        raise ConvLoRAError(f"{OPERATION}: expected {{path: path}}, both strings, got {names!r}")
    names = {old.removesuffix("."): new.removesuffix(".") for old, new in names.items()}  # written as a prefix
    new, used = {}, set()
    for path in paths:
        parts = path.split(".") if path else []
        heads = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
        head = next((head for head in heads if head in names), None)
        rest = path if not head else path[len(head) + 1 :]
        new[path] = path if head is None else ".".join(part for part in (names[head], rest) if part)
        used.add(head)
    if unused := [head for head in names if head not in used]:
        raise ConvLoRAError(f"{OPERATION}: the adapter has nothing at {unused[0]!r}; {nearest_names(unused[0], paths)}")
    return new


def other_prefixes(adapter: AdapterParts, known: Iterable[str], prefix: str = "") -> list[dict[str, str]]:
    """The renamings by which all paths of an adapter are known, each a prefix that is added or taken away.

    Args:
        known: all paths that there are.
        prefix: this one alone.

    Example:
        >>> import torch, convlora
        >>> from torch import nn
        >>> lit = nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(3, 8, 3))})
        >>> adapter = convlora.adapter(convlora.inject(lit, targets="*", rank=1))
        >>> other_prefixes(adapter, ["0"]), other_prefixes(adapter, ["model", "model.net", "model.net.0"])
        ([{'net': ''}], [{'': 'model'}])
    """
    paths = list(dict.fromkeys([*adapter.layers, *adapter.modules]))
    first = paths[0].split(".") if paths[0] else []
    known, wanted = dict.fromkeys(known), prefix.removesuffix(".")
    if wanted:
        taken, added = [wanted], [wanted]
    else:
        taken = [".".join(first[:count]) for count in range(1, len(first) + 1)]
        end = f".{paths[0]}" if paths[0] else ""
        added = [name.removesuffix(end) for name in known if name.endswith(end) and name != paths[0]]
    found = []
    for head in taken:
        inside = [path[len(head) + 1 :] for path in paths if path == head or path.startswith(f"{head}.")]
        if len(inside) == len(paths) and all(path in known for path in inside):
            found.append({head: ""})
    found += [{"": head} for head in added if all((f"{head}.{path}" if path else head) in known for path in paths)]
    return found


def describe_prefix(names: Mapping[str, str]) -> str:
    """A renaming of `other_prefixes` in words.

    Example:
        >>> describe_prefix({"net": ""}), describe_prefix({"": "net"})
        ("without 'net.'", "with 'net.' before them")
    """
    ((old, new),) = names.items()
    return f"without '{old}.'" if old else f"with '{new}.' before them"
