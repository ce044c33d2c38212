"""Patterns -> layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convlora.config import Target
from convlora.errors import ConvLoRAError
from convlora.factors.base import PROJECTIONS
from convlora.layer.adapted import CHILD, peek_base_tensor, why_not
from convlora.layer.loading import AdapterTensors
from convlora.layer.projection import Projection

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


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by all of their names, in model order, and the projections of each attention after it.

    An attention's projections that no adapter is on are made here, and leave no trace on it.
    """
    made: dict[int, list[Projection]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Projection):
            continue
        yield name, module
        if id(module) not in made:
            made[id(module)] = _projections_of(module)
        for projection in made[id(module)]:
            yield f"{name}.{projection.name}" if name else projection.name, projection


def _projections_of(module: nn.Module) -> list[Projection]:
    found: list[Projection] = []
    if isinstance(module, torch.jit.ScriptModule | AdapterTensors):
        return found
    for name in PROJECTIONS:
        held, there = f"{name}_weight", module._modules.get(name)
        if isinstance(there, Projection):
            found.append(there)
        elif (
            (held in module._parameters or held in module.__dict__ or parametrize.is_parametrized(module, held))
            and not hasattr(module, name)
            and isinstance(weight := peek_base_tensor(module, held), Tensor)
            and weight.dim() == 2
        ):
            found.append(Projection(module, name, (weight.shape[0], weight.shape[1])))
    return found


def select_layers(
    model: nn.Module, targets: Sequence[Target], exclude: Sequence[Target], operation: str
) -> tuple[dict[str, nn.Module], list[Target]]:
    """The layers that targets select, by their first name, in model order; and the excludes that select none.

    Raises:
        ConvLoRAError: a target selects nothing, or names by a pattern without wildcard what cannot be adapted.
    """
    named = list(named_layers(model))
    reasons = {id(module): why_not(module) for _, module in named}
    adaptable = {name: module for name, module in named if reasons[id(module)] is None}
    # The modules of a norm or of an adapter are parts of a layer, not what a name without wildcard means.
    parts = {id(part) for module in adaptable.values() for part in module.modules()}
    selected: set[int] = set()
    for target in targets:
        hits = [(name, module) for name, module in named if target_selects(target, name, module, operation)]
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
        found = {id(module) for name, module in adaptable.items() if target_selects(target, name, module, operation)}
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
    selected: set[int] = set()
    for target in targets:
        hits = [(name, m) for name, m in named if target_selects(target, name, m, operation)]
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
    result = dict.fromkeys(names, default)
    for pattern, value in (values or {}).items():
        hits = [name for name in names if _guard(pattern_matches, pattern, name, operation)]
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
