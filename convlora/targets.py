"""Patterns -> layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from convlora.config import Target
from convlora.errors import ConvLoRAError
from convlora.layer.adapted import CHILD, why_not

V = TypeVar("V")
_COMPARED = 60  # characters of a name, the last, that `nearest` looks at


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a pattern selects a dotted name: a glob, from any dot on, or `re:` and a full-match expression.

    Example:
        >>> pattern_matches("conv1", "layer2.0.conv1"), pattern_matches("block_*.c?_r", "block_1.c3_r")
        (True, True)
        >>> pattern_matches(r"re:b\\d", "b12")
        False
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if _is_literal(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


class NameIndex:
    """Dotted names by what selects them: thousands of patterns without wildcard, as a file states, take linear time.

    Example:
        >>> index = NameIndex(["stem.conv", "body.0.conv", "body.1"])
        >>> index.matching("conv"), index.matching(r"re:body\\.1"), index.matching("body.*")
        (['stem.conv', 'body.0.conv'], ['body.1'], ['body.0.conv', 'body.1'])
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._whole = set(self.names)
        self._tails: dict[str, list[str]] = {}
        for name in self.names:
            parts = name.split(".")
            for i in range(len(parts)):
                self._tails.setdefault(".".join(parts[i:]), []).append(name)

    def matching(self, pattern: str) -> list[str]:
        """The names that a pattern selects, in their order; raises `re.error`. See `pattern_matches`."""
        if pattern.startswith("re:"):
            text = re.sub(r"\\(.)", r"\1", pattern[3:], flags=re.DOTALL)
            if re.escape(text) == pattern[3:]:  # one name and no other
                return [text] if text in self._whole else []
        elif _is_literal(pattern):
            return self._tails.get(pattern, [])
        return [name for name in self.names if pattern_matches(pattern, name)]


def select_layers(
    model: nn.Module, targets: Sequence[Target], exclude: Sequence[Target], operation: str
) -> tuple[dict[str, nn.Module], list[Target]]:
    """The layers that targets select, by their first name, in model order; and the excludes that select none.

    Raises:
        ConvLoRAError: a target selects nothing, or names by a pattern without wildcard what cannot be adapted.
    """
    named = list(model.named_modules(remove_duplicate=False))
    modules, index = dict(named), NameIndex(name for name, _ in named)
    reasons = {id(module): why_not(module) for _, module in named}
    adaptable = {name: module for name, module in named if reasons[id(module)] is None}
    # The modules of a norm or of an adapter are parts of a layer, not what a name without wildcard means.
    parts = {id(part) for module in adaptable.values() for part in module.modules()}
    selected: set[int] = set()
    for target in targets:
        hits = [(name, modules[name]) for name in _selected(target, modules, index, operation)]
        if isinstance(target, str) and _is_literal(target):
            meant = [hit for hit in hits if hit[0] == target] or hits  # a full name means that layer first
            for name, module in meant:
                if (reason := reasons[id(module)]) and id(module) not in parts:
                    inside = (
                        f"; for the layers inside: '{target + '.*' if target else '*'}'"
                        if any(name != CHILD for name, _ in module.named_children())
                        else ""
                    )
                    raise ConvLoRAError(f"{operation}: target '{target}' names '{name}': {reason}{inside}")
        found = {id(module) for _, module in hits if reasons[id(module)] is None}
        if not found:
            raise ConvLoRAError(
                f"{operation}: target {describe_target(target)} selects no layer; {_nearest(target, adaptable)}"
            )
        selected |= found
    idle: list[Target] = []
    for target in exclude:
        names = _selected(target, modules, index, operation)
        found = {id(modules[name]) for name in names if name in adaptable}
        if not found:
            idle.append(target)
        selected -= found
    layers: dict[str, nn.Module] = {}
    for name, module in named:
        if id(module) in selected:
            selected.discard(id(module))
            layers[name] = module
    if not layers:
        raise ConvLoRAError(f"{operation}: exclude leaves no layer of those that the targets select")
    return layers, idle


def select_modules(model: nn.Module, targets: Sequence[Target], operation: str, field: str) -> dict[str, nn.Module]:
    """The modules of any kind that targets select, by their first name, in model order; not what is inside them.

    Raises:
        ConvLoRAError: a target selects nothing.
    """
    named = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if not is_part_of_adapter(name)]
    by_name, index = dict(named), NameIndex(name for name, _ in named)
    selected: set[int] = set()
    for target in targets:
        hits = [(name, by_name[name]) for name in _selected(target, by_name, index, operation)]
        if isinstance(target, str) and _is_literal(target):
            hits = [hit for hit in hits if hit[0] == target] or hits  # a full name means that module first
        if not hits:
            close = f"; {nearest_names(target, [n for n, _ in named if n])}" if isinstance(target, str) else ""
            raise ConvLoRAError(f"{operation}: {field} {describe_target(target)} selects no module{close}")
        selected |= {id(m) for _, m in hits}
    modules: dict[str, nn.Module] = {}
    for name, module in named:
        if id(module) in selected:
            selected.discard(id(module))
            modules[name] = module
    return modules


def values_by_layer(
    values: Mapping[str, V] | None, default: V, names: Iterable[str], operation: str, field: str
) -> dict[str, V]:
    """Layer name -> value by `{pattern: value}`, the last matching pattern wins."""
    names = list(names)
    index = NameIndex(names)
    result = dict.fromkeys(names, default)
    for pattern, value in (values or {}).items():
        hits = _matching(index, pattern, operation)
        if not hits:
            close = nearest_names(pattern, names)
            raise ConvLoRAError(
                f"{operation}: {field} pattern '{pattern}' matches none of the selected layers; {close}"
            )
        result.update(dict.fromkeys(hits, value))
    return result


def nearest_names(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the known names most like a wrong one.

    Example:
        >>> nearest_names("conv_lsat", ["conv_1", "conv_last"])
        "nearest: 'conv_last', 'conv_1'"
    """
    known = list(known)[:2000]  # comparing takes the square of the length, and names can come from a hostile file
    # A pattern is compared with as many trailing parts of each name as it has itself.
    parts = name.count(".") + 1
    tails = {full: ".".join(full.split(".")[-parts:])[-_COMPARED:] for full in known}
    matcher = difflib.SequenceMatcher(None, b=name[-_COMPARED:])
    ratio = {}
    for full, tail in tails.items():
        matcher.set_seq1(tail)
        ratio[full] = matcher.ratio()
    best = sorted(known, key=lambda full: -ratio[full])[:3]
    return "nearest: " + ", ".join(repr(full) for full in best) if best else "there is none"


def describe_target(target: Target) -> str:
    """A target as error messages show it."""
    return repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _selected(target: Target, modules: Mapping[str, nn.Module], index: NameIndex, operation: str) -> list[str]:
    """The names of the modules that a target of any form selects."""
    if isinstance(target, str):
        return _matching(index, target, operation)
    return [name for name, module in modules.items() if target_selects(target, name, module, operation)]


def _matching(index: NameIndex, pattern: str, operation: str) -> list[str]:
    try:
        return index.matching(pattern)
    except re.error as error:
        raise ConvLoRAError(f"{operation}: '{pattern}' is no regular expression ({error})") from None


def target_selects(target: Target, name: str, module: nn.Module, operation: str) -> bool:
    """Whether a target of any form selects a module."""
    if isinstance(target, str):
        return _guard(pattern_matches, target, name, operation)
    if isinstance(target, type):
        return isinstance(module, target)
    try:
        return bool(target(name, module))
    except Exception as error:
        raise ConvLoRAError(f"{operation}: target {describe_target(target)} fails on '{name}': {error!r}") from error


def _guard(match: Any, pattern: str, name: str, operation: str) -> bool:
    try:
        return bool(match(pattern, name))
    except re.error as error:
        raise ConvLoRAError(f"{operation}: '{pattern}' is no regular expression ({error})") from None


def _is_literal(pattern: str) -> bool:
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def _nearest(target: Target, adaptable: Mapping[str, nn.Module]) -> str:
    clause = f"; {nearest_names(target, adaptable)}" if isinstance(target, str) and adaptable else ""
    return f"{len(adaptable)} can be adapted{clause}".replace("; nearest", ", nearest")


def is_part_of_adapter(name: str) -> bool:
    """Whether a module's name is that of something that adapters brought."""
    return f".{CHILD}." in f".{name}."
