"""An adapter in another dtype, and what a narrower one costs: values that are too small for it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from convlora.adapter.parts import BIAS_DELTA, AdapterParts, LayerFactors, layer_delta, tensor_key
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.factors.base import get_factors, needs_weight

THRESHOLD = 0.01  # of a Frobenius norm: twice what rounding to bfloat16 can change
A = TypeVar("A", bound=AdapterParts)


def cast_adapter(adapter: A, dtype: torch.dtype, operation: str, stacklevel: int) -> A:
    """See `Adapter.to`."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConvLoRAError(f"{operation}: dtype (={dtype}) must be a floating point dtype")
    if dtype.itemsize < 2:
        raise ConvLoRAError(f"{operation}: {dtype} is too narrow for factors; use float16 or bfloat16")
    layers = {
        path: LayerFactors(
            {name: t.to(dtype) for name, t in layer.tensors.items()}, layer.spec, layer.rank, layer.alpha, layer.aliases
        )
        for path, layer in adapter.layers.items()
    }
    narrow = dtype.itemsize < 4
    modules = {
        path: {n: t.to(dtype) if narrow and t.is_floating_point() else t for n, t in tensors.items()}
        for path, tensors in adapter.modules.items()
    }
    made = replace(adapter, layers=layers, errors={}, modules=modules)
    _warn_of_underflow(
        adapter, made, f"{operation}: values too small for {dtype}".replace("torch.", ""), stacklevel + 1
    )
    return made


def _warn_of_underflow(before: AdapterParts, after: AdapterParts, what: str, stacklevel: int) -> None:
    """One warning with the share of ΔW that was lost, if a layer or a copy has lost more than the threshold."""
    losses = _losses_by_underflow(before, after)
    shares = {path: lost / whole for path, (lost, whole) in losses.items() if whole}
    worst = max(shares, key=lambda path: shares[path], default="")
    if not shares or shares[worst] <= THRESHOLD:
        return
    total = ""
    if not needs_weight(get_factors(before.config.factors)):
        lost = math.hypot(*(losses[path][0] for path in losses if path in before.layers))
        whole = math.hypot(*(_norm(layer_delta(before.config, layer, 1.0)) for layer in before.layers.values()))
        total = f"ΔW by {lost / whole if whole else 0.0:.2%}, "
    warnings.warn(
        f"{what} change {total}'{worst}' by {shares[worst]:.2%} and"
        f" {sum(each > THRESHOLD for each in shares.values())} in all by more than {THRESHOLD:.0%};"
        " bfloat16 has the range of float32",
        ConvLoRAWarning,
        stacklevel=stacklevel + 1,
    )


def _losses_by_underflow(before: AdapterParts, after: AdapterParts) -> dict[str, tuple[float, float]]:
    """Layer path, or name of a copied tensor -> norm of what has changed, and of the whole; where values are too small.

    All others have changed by rounding alone. Of factors whose ΔW depends on the base weight, each tensor is compared.
    """
    losses: dict[str, tuple[float, float]] = {}
    sees_weight = needs_weight(get_factors(before.config.factors))
    for path, layer in before.layers.items():
        narrow = after.layers[path]
        if sees_weight:
            moved = [name for name, tensor in layer.tensors.items() if _has_moved(tensor, narrow.tensors[name])]
            losses |= {tensor_key(path, name): _loss(layer.tensors[name], narrow.tensors[name]) for name in moved}
        elif any(_has_moved(tensor, narrow.tensors[name]) for name, tensor in layer.tensors.items()):
            whole = layer_delta(before.config, layer, 1.0)
            losses[path] = _norm(layer_delta(after.config, narrow, 1.0) - whole), _norm(whole)
            if BIAS_DELTA in layer.tensors:
                losses[tensor_key(path, BIAS_DELTA)] = _loss(layer.tensors[BIAS_DELTA], narrow.tensors[BIAS_DELTA])
    for path, tensors in before.modules.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and _has_moved(tensor, after.modules[path][name]):
                losses[tensor_key(path, name)] = _loss(tensor, after.modules[path][name])
    return losses


def _has_moved(tensor: Tensor, narrow: Tensor) -> bool:
    """Whether any row, column or the like has changed by more than rounding: a quick look, before ΔW is formed."""
    if tensor.dtype == narrow.dtype:
        return False
    if not tensor.dim():
        tensor, narrow = tensor.reshape(1), narrow.reshape(1)
    change = narrow.to(tensor.dtype) - tensor
    for dim in range(tensor.dim()):
        others = [other for other in range(tensor.dim()) if other != dim]
        norms = [torch.linalg.vector_norm(t, dim=others) if others else t.abs() for t in (change, tensor)]
        if bool((norms[0] > THRESHOLD / 4 * norms[1]).any()):
            return True
    return False


def _loss(tensor: Tensor, narrow: Tensor) -> tuple[float, float]:
    return _norm(narrow.to(tensor.dtype) - tensor), _norm(tensor)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
