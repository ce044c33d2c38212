"""The network of a bare checkpoint, where spandrel is installed and knows it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convlora.adapter.adapter import Adapter
from convlora.adapter.checkpoint import layer_of_weight
from convlora.adapter.parts import LayerFactors
from convlora.factors.base import WeightSpec
from convlora.formats import specs_from_checkpoint, specs_of
from convlora.support.tensorfile import shapes_of
from convlora.targets import named_layers


class Architecture(NamedTuple):
    """A network with the weights of a checkpoint, and what spandrel calls it."""

    name: str
    model: nn.Module


def recognise_architecture(state: Mapping[str, Any]) -> Architecture | None:
    """The network of a state dict; None without spandrel, or if it knows none."""
    if importlib.util.find_spec("spandrel") is None:
        return None
    spandrel = importlib.import_module("spandrel")
    try:
        loader = spandrel.ModelLoader(device="cpu")
        shapes = spandrel.canonicalize_state_dict(dict(shapes_of(state)))  # a large file is read only if it is known
        if not any(support.detect(shapes) for support in loader.registry.architectures("detection")):
            return None
        descriptor = loader.load_from_state_dict(dict(state))
    except Exception:  # each architecture raises its own for weights that only look like it
        return None
    return Architecture(descriptor.architecture.name, descriptor.model)


def layers_of(state: Mapping[str, Any]) -> dict[str, WeightSpec]:
    """The layers of a checkpoint, and those of its network where it is known: their names may differ."""
    known = recognise_architecture(state)
    return {**specs_from_checkpoint(shapes_of(state)), **(specs_of(known.model) if known else {})}


def with_checkpoint_names(adapter: Adapter, state: Mapping[str, Any]) -> Adapter:
    """The adapter of a network with the layer names of its checkpoint, where loading changes them.

    spandrel's ESRGAN, for one, names layers in one way whatever the file does. A layer is found by its weight's values.
    The adapter comes back as it is where the network is unknown or a layer is not found exactly once.
    """
    known = recognise_architecture(state)
    if known is None:
        return adapter
    stored = {p: v for n, v in state.items() if (p := layer_of_weight(n)) is not None and _is_floating(v)}
    modules = dict(named_layers(known.model))
    layers: dict[str, LayerFactors] = {}
    for path, layer in adapter.layers.items():
        weight = getattr(modules.get(path), "weight", None)
        found = [name for name, value in stored.items() if isinstance(weight, Tensor) and _same(value, weight)]
        if len(found) != 1:
            return adapter
        layers[found[0]] = LayerFactors(layer.tensors, layer.spec, layer.rank, layer.alpha)
    copies: dict[str, Mapping[str, Tensor]] = {}
    for path, tensors in adapter.modules.items():
        module = modules.get(path)
        loaded = {n: t for n, t in (module.state_dict() if module is not None else {}).items() if n in tensors}
        last = next(iter(loaded), "")
        stems = [n.removesuffix(f".{last}") for n in state if n.endswith(f".{last}")] if loaded else []
        found = [s for s in stems if all(_same(state[f"{s}.{n}"], t) for n, t in loaded.items() if f"{s}.{n}" in state)]
        if len(found) != 1:
            return adapter
        copies[found[0]] = tensors
    complete = len(layers) == len(adapter.layers) and len(copies) == len(adapter.modules)
    return Adapter(adapter.config, layers, adapter.fingerprint, modules=copies) if complete else adapter


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _same(stored: Tensor, loaded: Tensor) -> bool:
    return stored.shape == loaded.shape and torch.equal(stored.to(loaded.dtype), loaded)
