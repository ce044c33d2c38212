"""How merged values get into plain modules, when `remove` takes the adapters of a merged model away."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convlora.adapter.parts import tensor_key
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.layer.adapted import declare_shape, effective_names, effective_tensor, peek_base_tensor, pruning_of
from convlora.layer.copies import own_tensors
from convlora.model.norms import keeping_step, plain_step
from convlora.model.traversal import base_modules


def plan_baking(root: nn.Module, merged: Sequence[nn.Module], norms: str = "bake") -> list[Callable[[], None]]:
    """How the merged values get into the plain modules; to be carried out once the modules are plain.

    `norms`: those that compute a weight go ("bake"), or stay and are to give the merged values ("keep").
    """
    owners = Counter(id(t) for _, module in base_modules(root) for t in own_tensors(module).values())
    values: dict[int, list[tuple[nn.Module, str, Any, Tensor]]] = {}  # by base tensor
    for module in merged:
        for kind in effective_names(module):
            base, value = peek_base_tensor(module, kind), effective_tensor(module, kind)
            if value is not None and value is not base:
                values.setdefault(id(base), []).append((module, kind, base, value.detach()))
    steps: list[Callable[[], None]] = []
    untied = baked = 0
    resized = [m for placed in values.values() for m, kind, base, v in placed if kind == "weight" and _differ(base, v)]
    for placed in values.values():
        _, _, base, value = placed[0]
        if isinstance(base, nn.Parameter) and len(placed) == owners[id(base)] and _is_one([v for *_, v in placed]):
            steps.append(_assign(base, value))
            continue
        for module, kind, base, value in placed:
            if kind in module._buffers:
                steps.append(_set_buffer(module, kind, value))
            elif kind in module._parameters:
                steps.append(_set(module, kind, value, base is not None and base.requires_grad))
                untied += base is not None
            elif norms == "keep":
                steps.append(_keep_norm(root, module, kind, value))
            else:
                steps.append(plain_step(module, kind, value))
                baked += pruning_of(module, kind) is None
    if untied:
        warnings.warn(
            f"remove: {untied} shared Parameters were untied to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    if baked:
        warnings.warn(
            f"remove: the norm of {baked} weights was baked in to keep merged values; norms='keep' leaves it there",
            ConvLoRAWarning,
            stacklevel=3,
        )
    return [*steps, *(functools.partial(declare_shape, module) for module in resized)]


def _keep_norm(root: nn.Module, module: nn.Module, kind: str, value: Tensor) -> Callable[[], None]:
    step = keeping_step(module, kind, value)
    if step is None:
        path = next(path for path, other in base_modules(root) if other is module)
        raise ConvLoRAError(
            f"remove: what computes '{tensor_key(path, kind)}' cannot give the merged values exactly; norms='bake'"
        )
    return step


def _differ(base: Any, value: Tensor) -> bool:
    """Whether a copy is of another shape than the base's tensor, as a head of other classes is."""
    return base is not None and base.shape != value.shape


def _is_one(values: Sequence[Tensor]) -> bool:
    """Whether tensors that were merged apart hold the same, as those of tied modules with tied copies do."""
    first = values[0]
    return all(v is first or (v.dtype == first.dtype and torch.equal(v, first)) for v in values)


def _set_buffer(module: nn.Module, kind: str, value: Tensor) -> Callable[[], None]:
    def step() -> None:
        module._buffers[kind] = value

    return step


def _set(layer: nn.Module, kind: str, value: Tensor, requires_grad: bool) -> Callable[[], None]:
    def step() -> None:
        layer._parameters[kind] = nn.Parameter(value, requires_grad)

    return step


def _assign(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    def step() -> None:
        parameter.data = value  # new memory: a state dict taken earlier keeps the base

    return step
