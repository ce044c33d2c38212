"""Looking at a model: its adapted layers, its adapters, and what stands in the way of changing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.factors.base import WeightSpec
from convlora.layer.adapted import Adapted, is_stacked, slot_of, weight_spec, why_not
from convlora.layer.projection import Projection, projections_on
from convlora.layer.sharded import is_managed, is_sharded
from convlora.layer.slot import Slot
from convlora.model.places import departed_modules, shown_names
from convlora.targets import named_layers


def unwrap_model(model: Any, operation: str) -> nn.Module:
    """The module inside wrappers (`torch.compile`, DDP, DataParallel, AveragedModel): names are the bare model's."""
    if not isinstance(model, nn.Module):
        raise ConvLoRAError(f"{operation}: expected an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule
            model = model._modules["_orig_mod"]
        else:
            return model  # type: ignore[no-any-return]


def is_compiled(module: nn.Module) -> bool:
    """Whether calling a module runs a graph of `torch.compile`, which wrapped it or compiled it in place."""
    return "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module name -> module with adapters, factors or copies, each once, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def brought_paths(model: nn.Module) -> list[str]:
    """The names of all modules that adapters have brought; several for one that is registered several times."""
    every = model.named_modules(remove_duplicate=False)
    return [name for name, m in every if isinstance(m, Slot | Projection)]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layer name -> layer with factors, each once, in model order."""
    return {name: module for name, module in adapted_modules(model).items() if slot_of(module).low_ranks()}


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the model without what adapters hold, each module once, in model order."""
    found, seen = [], set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        inner = [(key, child) for key, child in module._modules.items() if child is not None]
        if isinstance(module, Adapted):
            brought = {slot_of(module), *projections_on(module)}
            inner = [(key, child) for key, child in inner if child not in brought]
        ahead += [(f"{name}.{key}" if name else key, child) for key, child in reversed(inner)]
    return found


def adapter_slots(model: nn.Module) -> list[Slot]:
    """The slots of all modules with adapters, each once, in model order; quick, since every switch asks."""
    found, seen, ahead = [], set(), [model]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        children = list(module._modules.values())
        if isinstance(module, Adapted):
            found.append(slot_of(module))
            children.remove(found[-1])
        ahead += [child for child in reversed(children) if child is not None]
    return found


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """`{name: AdapterConfig}` of what is injected, in order of injection; empty for a plain model.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> adapters(model)["default"].rank
        2
    """
    found = adapter_slots(unwrap_model(model, "adapters"))
    return {name: slot.entry(name).config for slot in found for name in slot.names()}


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable adapter parameters, of all adapters or of one: factors, and copies of `modules_to_save`.

    Raises:
        ConvLoRAError: the model has no adapter, or none of that name.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> [tuple(p.shape) for p in parameters(model)]
        [(6, 9), (24, 6)]
    """
    found = adapter_slots(require_adapters(model, "parameters", [name] if name is not None else []))
    chosen = (slot.entry(n) for slot in found for n in slot.names() if name in (None, n))
    return list(dict.fromkeys(p for entry in chosen for p in entry.parameters() if p.requires_grad))


def only_adapter_name(model: nn.Module, name: str | None, operation: str) -> str:
    """The adapter that a call means: the named one, or the only one."""
    root = require_adapters(model, operation, [name] if name is not None else [])
    refuse_stacked(root, operation)
    known = adapters(root)
    if name is None and len(known) > 1:
        raise ConvLoRAError(f"{operation}: the model has adapters {sorted(known)}; say which by name=")
    return next(iter(known)) if name is None else name


def require_adapters(model: nn.Module, operation: str, names: Iterable[str] = ()) -> nn.Module:
    """The bare model, which has the named adapters, or at least one."""
    return model_and_slots(model, operation, names)[0]


def model_and_slots(model: nn.Module, operation: str, names: Iterable[str] = ()) -> tuple[nn.Module, list[Slot]]:
    """The same, and the slots of its adapted layers, of which there is at least one."""
    root = unwrap_model(model, operation)
    found = adapter_slots(root)
    known = {name for slot in found for name in slot._modules}
    if not known and (departed := departed_modules(root)):
        raise ConvLoRAError(
            f"{operation}: the model has no adapters any more; {shown_names(departed)}, which had them, left it since"
            " inject (replaced or deleted)"
        )
    if not known:
        raise ConvLoRAError(f"{operation}: the model has no adapters; inject or load one first")
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ConvLoRAError(f"{operation}: no adapter {name!r}; the model has {sorted(known)}")
    return root, found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The Parameters that a module holds itself."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def refuse_wrapped(model: Any, operation: str) -> None:
    if not isinstance(model, nn.Module):
        return
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.parallel.DistributedDataParallel) or kind == "FullyShardedDataParallel":
            raise ConvLoRAError(f"{operation}: the model is wrapped in {kind}; {operation} before wrapping")
    refuse_sharded(model, operation)


def refuse_sharded(model: nn.Module, operation: str) -> None:
    for module in model.modules():
        if is_managed(module) or any(is_sharded(p) for p in module._parameters.values()):
            raise ConvLoRAError(f"{operation}: the model is sharded (FSDP or DTensor); {operation} before sharding")


def refuse_stacked(root: nn.Module, operation: str) -> None:
    for path, layer in adapted_modules(root).items():
        if is_stacked(layer):
            raise ConvLoRAError(
                f"{operation}: '{path}' was parametrized after inject ({type(layer).__name__});"
                " remove that parametrization first"
            )


def specs_of(model: nn.Module) -> dict[str, WeightSpec]:
    """Layer path -> weight, for every layer that can be adapted, each once, in model order.

    Example:
        >>> specs_of(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()))
        {'0': WeightSpec(shape=(8, 2, 3, 3), groups=2, transposed=False)}
    """
    first = {layer: path for path, layer in reversed(list(named_layers(unwrap_model(model, "specs_of"))))}
    return {path: weight_spec(layer) for layer, path in reversed(first.items()) if why_not(layer) is None}
