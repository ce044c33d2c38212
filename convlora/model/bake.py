"""How merged values get into plain layers, when `remove` takes the adapters of a merged model away."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.layer.adapted import base_tensor, without_side_effects
from convlora.model.traversal import own_parameters


def plan_baking(root: nn.Module, merged_layers: Sequence[nn.Module]) -> list[Callable[[], None]]:
    """How the merged values get into the plain layers; to be carried out once the layers are plain."""
    owners = Counter(id(p) for module in root.modules() for p in own_parameters(module).values())
    steps: list[Callable[[], None]] = []
    untied = baked = 0
    for layer, kind in itertools.product(merged_layers, ("weight", "bias")):
        with without_side_effects(layer):
            base, value = base_tensor(layer, kind), getattr(layer, kind)
        if base is value or value is None:
            continue
        value = value.detach()
        if kind not in layer._parameters:
            steps.append(_bare(layer, kind, value))
            baked += 1
        elif owners[id(base)] > 1:
            steps.append(_set(layer, kind, value, base.requires_grad))
            untied += 1
        else:
            steps.append(_assign(base, value))
    if untied:
        warnings.warn(
            f"remove: {untied} shared Parameters were untied to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    if baked:
        warnings.warn(
            f"remove: the norm of {baked} weights was baked in to keep merged values", ConvLoRAWarning, stacklevel=3
        )
    return steps


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


def _set(layer: nn.Module, kind: str, value: Tensor, requires_grad: bool) -> Callable[[], None]:
    def step() -> None:
        layer._parameters[kind] = nn.Parameter(value, requires_grad)

    return step


def _assign(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    def step() -> None:
        parameter.data = value  # new memory: a state dict taken earlier keeps the base

    return step
