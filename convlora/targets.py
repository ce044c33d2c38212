"""Patterns -> layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convlora.config import Target
from convlora.errors import ConvLoRAError
from convlora.factors.base import PROJECTIONS
from convlora.layer.adapted import CHILD, peek_base_tensor, why_not
from convlora.layer.loading import AdapterTensors
from convlora.layer.projection import Projection
from convlora.support.patterns import NameIndex, checked_match, is_literal, nearest_names


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
    modules, index = dict(named), NameIndex(name for name, _ in named)
    reasons = {id(module): why_not(module) for _, module in named}
    adaptable = {name: module for name, module in named if reasons[id(module)] is None}
    # The modules of a norm or of an adapter are parts of a layer, not what a name without wildcard means.
    parts = {id(part) for module in adaptable.values() for part in module.modules()}
    selected: set[int] = set()
    for target in targets:
        hits = [(name, modules[name]) for name in _selected(target, modules, index, operation)]
        if isinstance(target, str) and is_literal(target):
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
        if isinstance(target, str) and is_literal(target):
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


def describe_target(target: Target) -> str:
    """A target as error messages show it."""
    return repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _selected(target: Target, modules: Mapping[str, nn.Module], index: NameIndex, operation: str) -> list[str]:
    """The names of the modules that a target of any form selects."""
    if isinstance(target, str):
        return index.matching(target, operation)
    return [name for name, module in modules.items() if target_selects(target, name, module, operation)]


def target_selects(target: Target, name: str, module: nn.Module, operation: str) -> bool:
    """Whether a target of any form selects a module."""
    if isinstance(target, str):
        return checked_match(target, name, operation)
    if isinstance(target, type):
        return isinstance(module, target)
    try:
        return bool(target(name, module))
    except Exception as error:
        raise ConvLoRAError(f"{operation}: target {describe_target(target)} fails on '{name}': {error!r}") from error


def _nearest(target: Target, adaptable: Mapping[str, nn.Module]) -> str:
    clause = f"; {nearest_names(target, adaptable)}" if isinstance(target, str) and adaptable else ""
    return f"{len(adaptable)} can be adapted{clause}".replace("; nearest", ", nearest")


def is_part_of_adapter(name: str) -> bool:
    """Whether a module's name is that of something that adapters brought."""
    return f".{CHILD}." in f".{name}."
