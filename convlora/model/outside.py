"""What no adapter holds: frozen by `inject`, and told by `changed` if it has moved or trains since."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from convlora.adapter.parts import tensor_key
from convlora.errors import ConvLoRAWarning
from convlora.layer.adapted import CHILD, Adapted
from convlora.layer.copies import own_tensors, sums_of_bits, version
from convlora.layer.loading import AdapterTensors
from convlora.layer.slot import Slot
from convlora.model.traversal import adapter_slots, base_modules, require_adapters, unwrap_model

M = TypeVar("M", bound=nn.Module)
SHOWN = 5  # names in a warning
_RECORDS = "_convlora_outside"  # on a module while adapters are there: tensor name -> what it was at `inject`


class Record(NamedTuple):
    """A Parameter or buffer as it was when the first adapter came."""

    trained: bool  # it required a gradient, so `inject` froze it
    identity: int
    version: int
    dtype: torch.dtype
    bits: int | None  # the sum of its values taken for integers: exact, and the same on every device


def freeze_base(root: nn.Module) -> None:
    """Freeze and record what has no record yet: what a user unfroze since the first adapter stays as it is."""
    root._load_state_dict_post_hooks[_RECORDS] = _base_loaded  # type: ignore[index]
    new = [(m, n, t) for _, m in base_modules(root) if _RECORDS not in m.__dict__ for n, t in own_tensors(m).items()]
    trained = {id(tensor) for _, _, tensor in new if tensor.requires_grad}
    for (module, name, tensor), bits in zip(new, sums_of_bits([tensor for _, _, tensor in new]), strict=True):
        record = Record(id(tensor) in trained, id(tensor), version(tensor), tensor.dtype, bits)
        module.__dict__.setdefault(_RECORDS, {})[name] = record
    for _, _, tensor in new:
        if tensor.requires_grad:
            _set_requires_grad(tensor, False)


def thaw_base(root: nn.Module, released: Iterable[nn.Module]) -> None:
    """Make trainable again what `inject` froze: everything with the last adapter, else the released modules."""
    if not adapter_slots(root):
        for module in root.modules():
            module._load_state_dict_post_hooks.pop(_RECORDS, None)  # type: ignore[call-overload]
    held = {id(p) for _, m in base_modules(root) if isinstance(m, Adapted) for p in m._parameters.values()}
    for module in released if adapter_slots(root) else list(root.modules()):
        for name, record in module.__dict__.pop(_RECORDS, {}).items():
            p = own_tensors(module).get(name)
            if record.trained and p is not None and id(p) not in held:
                _set_requires_grad(p, True)


def _base_loaded(root: nn.Module, _: object) -> None:
    """Once a checkpoint without adapters was loaded into the model, that is the base: it is recorded anew."""
    if any(entry.was_loaded for slot in adapter_slots(root) for entry in slot.entries()):
        return
    known = [
        (m, n, t) for _, m in base_modules(root) for n, t in own_tensors(m).items() if n in m.__dict__.get(_RECORDS, {})
    ]
    for (module, name, tensor), bits in zip(known, sums_of_bits([tensor for _, _, tensor in known]), strict=True):
        trained = module.__dict__[_RECORDS][name].trained
        module.__dict__[_RECORDS][name] = Record(trained, id(tensor), version(tensor), tensor.dtype, bits)


def is_frozen(root: nn.Module) -> bool:
    """Whether `inject` froze something that is not thawed."""
    return any(_RECORDS in module.__dict__ for module in root.modules())


def freeze(model: M) -> M:
    """Make trainable exactly what adapters train and nothing else: for trainers that unfreeze everything.

    Raises:
        ConvLoRAError: the model has no adapters.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)), targets="0", rank=1)
        >>> _ = model.requires_grad_(True)  # as some trainers do
        >>> [name for name, p in freeze(model).named_parameters() if p.requires_grad]
        ['0.convlora.default.lora_A', '0.convlora.default.lora_B']
    """
    root = require_adapters(model, "freeze")
    for _, module in base_modules(root):
        for p in module._parameters.values():
            if p is not None:
                _set_requires_grad(p, False)
    for slot in adapter_slots(root):
        for p in slot.parameters():
            _set_requires_grad(p, p.is_floating_point() or p.is_complex())
    return model


def changed(model: nn.Module) -> list[str]:
    """The names of Parameters and buffers that no adapter holds and that have changed since `inject`, or train.

    An adapter's file does not have them: `modules_to_save` and `norm_statistics` of `inject` are for what is to travel.
    Told by PyTorch's count of writes, then by the values: what was only moved, copied or written with its own values
    has not changed. Parameters that were frozen before `inject` are the model's own to write; what reaches `p.data`
    alone is not seen. Empty for a model without adapters.

    Example:
        >>> import convlora, torch
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)), targets="0", rank=1)
        >>> changed(model)
        []
        >>> with torch.no_grad():
        ...     _ = model[1].bias.add_(1)
        >>> changed(model)
        ['1.bias']
    """
    root = unwrap_model(model, "changed")
    if not adapter_slots(root):
        return []
    found: dict[str, None] = {}
    written: list[tuple[str, Tensor, Record]] = []
    for path, module in base_modules(root):
        if isinstance(module, Slot | AdapterTensors):
            continue  # of a module that was replaced
        records = module.__dict__.get(_RECORDS, {})
        # `convert_sync_batchnorm` makes another module, to which it hands what acts, and the adapters as a child.
        replaced = not isinstance(module, Adapted) and isinstance(dict(module.named_children()).get(CHILD), Slot)
        for name, tensor in own_tensors(module).items():
            record = records.get(name)
            if tensor.requires_grad or replaced:
                found[tensor_key(path, name)] = None
            elif record is not None and (record.trained or not isinstance(tensor, nn.Parameter)):
                # Norms write their statistics uncounted.
                counted = isinstance(tensor, nn.Parameter)
                same = counted and (id(tensor), version(tensor)) == (record.identity, record.version)
                if not same and tensor.dtype == record.dtype and record.bits is not None:
                    written.append((tensor_key(path, name), tensor, record))
    sums = sums_of_bits([tensor for _, tensor, _ in written])
    for (name, _, record), bits in zip(written, sums, strict=True):
        if bits is not None and bits != record.bits:
            found[name] = None
    return [name for name, _ in _named_tensors(root) if name in found]


def warn_of_changed(root: nn.Module, operation: str, stacklevel: int) -> None:
    """One warning that names what has changed and no adapter holds."""
    if names := changed(root):
        more = ", …" if len(names) > SHOWN else ""
        warnings.warn(
            f"{operation}: {len(names)} Parameters or buffers outside the adapter have changed since inject, or train,"
            f" and are not in it: {', '.join(names[:SHOWN])}{more}; inject with modules_to_save= for what is to travel,"
            " convlora.freeze for what is not to train, convlora.changed names all",
            ConvLoRAWarning,
            stacklevel=stacklevel + 1,
        )


def _named_tensors(root: nn.Module) -> list[tuple[str, Tensor]]:
    return [(tensor_key(path, n), t) for path, module in base_modules(root) for n, t in own_tensors(module).items()]


def _set_requires_grad(parameter: Tensor, value: bool) -> None:
    # The flag of an inference tensor is set in inference mode only; lazy parameters know neither question nor method.
    with torch.inference_mode(not nn.parameter.is_lazy(parameter) and parameter.is_inference()):
        parameter.requires_grad = value
