"""Layers that compute their weight, by a norm, a parametrization or a mask: how such a layer takes merged values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.weight_norm import WeightNorm

from convlora.errors import ConvLoRAError
from convlora.layer.adapted import class_name, pruning_of

Step = Callable[[], None]


def plain_step(layer: nn.Module, kind: str, value: Tensor) -> Step:
    """A step that takes off what computes a tensor and leaves a Parameter with a value.

    Raises:
        ConvLoRAError: it is computed in a way that is not known here.
    """
    hooks = {type(hook).__name__ for hook in layer._forward_pre_hooks.values() if getattr(hook, "name", "") == kind}
    if pruning_of(layer, kind) is not None:
        take_off: Callable[[], object] = functools.partial(prune.remove, layer, kind)
    elif "WeightNorm" in hooks:
        take_off = functools.partial(nn.utils.remove_weight_norm, layer, kind)
    elif "SpectralNorm" in hooks:
        take_off = functools.partial(nn.utils.remove_spectral_norm, layer, kind)
    elif parametrize.is_parametrized(layer, kind):
        take_off = functools.partial(_unparametrize, layer, kind)
    else:
        raise ConvLoRAError(f"remove: {class_name(layer)} computes its {kind} in an unknown way; unmerge first")

    def step() -> None:
        take_off()
        layer._parameters[kind] = nn.Parameter(value)

    return step


def _unparametrize(layer: nn.Module, kind: str) -> None:
    layer.__class__ = _own_class(type(layer))
    parametrize.remove_parametrizations(layer, kind, leave_parametrized=True)


def _own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A copy of a parametrized layer's class: torch takes properties off the class, which copies of the layer share."""
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, kind.__bases__, body)  # type: ignore[misc, no-any-return]


@torch.no_grad()
def keeping_step(layer: nn.Module, kind: str, value: Tensor) -> Step | None:
    """A step after which a layer computes exactly this value as it did before; None if it cannot.

    A weight norm does with `v = W` and `g = ‖W‖`, a mask where it is zero or the value is, a parametrization where
    its `right_inverse` is one.
    """
    hook = next((hook for hook in layer._forward_pre_hooks.values() if getattr(hook, "name", "") == kind), None)
    if pruning_of(layer, kind) is not None:
        return functools.partial(_write, layer, {f"{kind}_orig": value}, kind, value)
    if isinstance(hook, WeightNorm):
        g = _magnitudes(value, hook.dim)
        return g if g is None else functools.partial(_write, layer, {f"{kind}_g": g, f"{kind}_v": value}, kind, value)
    if parametrize.is_parametrized(layer, kind):
        return _through_parametrization(layer.parametrizations[kind], value)  # type: ignore[index]
    return None


def _write(layer: nn.Module, parameters: dict[str, Tensor], kind: str, value: Tensor) -> None:
    for name, tensor in parameters.items():
        layer._parameters[name].data = tensor  # type: ignore[union-attr]
    layer.__dict__[kind] = value.clone()  # until the next forward computes it


def _through_parametrization(parametrizations: Any, value: Tensor) -> Step | None:
    trial = copy.deepcopy(parametrizations).eval()
    try:
        trial.right_inverse(value)
        if not torch.equal(trial(), value) and type(trial[0]).__name__ == "_WeightNorm" and len(trial) == 1:
            g = _magnitudes(value, trial[0].dim)
            if g is not None:
                trial.original0.copy_(g)
        if not torch.equal(trial(), value):
            return None
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError):
        return None  # it has no inverse, or not for this value

    def step() -> None:
        for ours, theirs in zip(parametrizations.parameters(), trial.parameters(), strict=True):
            ours.data = theirs.data

    return step


def _magnitudes(value: Tensor, dim: int) -> Tensor | None:
    """The g with which `weight_norm` of `v = value` gives exactly the value; None if no g of its dtype does."""
    g = torch.norm_except_dim(value, 2, dim)
    if not torch.equal(torch._weight_norm(value, g, dim), value) and dim in (0, value.dim() - 1):
        # The kernel sums in another order than `norm_except_dim`; this is its own norm.
        g = torch._weight_norm_interface(value, g, dim)[1].view_as(g).to(value.dtype)
    return g if torch.equal(torch._weight_norm(value, g, dim), value) else None
