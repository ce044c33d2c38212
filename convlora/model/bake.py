"""How merged values get into plain modules, when `remove` takes the adapters of a merged model away."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.layer.adapted import declare_shape, effective_names, effective_tensor, peek_base_tensor
from convlora.layer.copies import own_tensors
from convlora.model.traversal import base_modules


def plan_baking(root: nn.Module, merged: Sequence[nn.Module]) -> list[Callable[[], None]]:
    """How the merged values get into the plain modules; to be carried out once the modules are plain."""
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
            else:
                steps.append(_bare(module, kind, value))
                baked += 1
    if untied:
        warnings.warn(
            f"remove: {untied} shared Parameters were untied to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    if baked:
        warnings.warn(
            f"remove: the norm of {baked} weights was baked in to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    return [*steps, *(functools.partial(declare_shape, module) for module in resized)]


def _differ(base: Any, value: Tensor) -> bool:
    """Whether a copy is of another shape than the base's tensor, as a head of other classes is."""
    return base is not None and base.shape != value.shape


def _bare(layer: nn.Module, kind: str, value: Tensor) -> Callable[[], None]:
    """A step that takes a norm off a computed weight and leaves a plain Parameter with a value."""
    hooks = {
        type(hook).__name__: hook for hook in layer._forward_pre_hooks.values() if getattr(hook, "name", "") == kind
    }

    def step() -> None:
        if "WeightNorm" in hooks:
            nn.utils.remove_weight_norm(layer, kind)
        elif "SpectralNorm" in hooks:
            nn.utils.remove_spectral_norm(layer, kind)
        else:
            layer.__class__ = _own_class(type(layer))
            parametrize.remove_parametrizations(layer, kind, leave_parametrized=True)
        layer._parameters[kind] = nn.Parameter(value)

    if not (hooks.keys() & {"WeightNorm", "SpectralNorm"} or parametrize.is_parametrized(layer, kind)):
        raise ConvLoRAError(f"remove: {type(layer).__name__} computes its {kind} in an unknown way; unmerge first")
    return step


def _own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A copy of a parametrized layer's class: torch takes properties off the class, which copies of the layer share."""
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, kind.__bases__, body)  # type: ignore[misc, no-any-return]


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
