"""What a training step costs, counted instead of timed: operations, memory and kernels, on any device.

On the meta device nothing is computed and no memory is needed, so that networks of any size can be counted; layers take
the path there that they take on every device but the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StepCost:
    """What one step costs, forward and backward.

    Args:
        flops: floating-point operations of matrix products, convolutions and attention; a multiplication and its
            addition are two.
        kept: bytes that are in memory between forward and backward, beside the Parameters and buffers of the model:
            each storage once, also those that are held in another way than by `save_for_backward`.
        kernels: operations that compute something: those that only look at memory in another way do not count.
        trained: numbers that are trained.
        optimizer: bytes of Adam's two numbers for each of them, in their dtype.
    """

    flops: int
    kept: int
    kernels: int
    trained: int
    optimizer: int


class _Watch(TorchDispatchMode):
    """Counts kernels, and remembers every storage that comes out of one."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kernels += not _only_looks(func)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, apart: Iterable[Tensor]) -> int:
        """Bytes of the storages that are still held, but for those of some tensors."""
        own = {tensor.untyped_storage()._cdata for tensor in apart}
        return sum(size for key, (ref, size) in self.storages.items() if key not in own and not ref.expired())


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def _only_looks(func: Any) -> bool:
    """Whether an operation gives a view of its argument, or memory without values."""
    name = func._schema.name
    if name.startswith(("aten::empty", "aten::new_empty")) or name == "aten::_unsafe_view":
        return True
    returned = [given.alias_info for given in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def count_step(model: nn.Module, loss: Callable[[], Tensor]) -> StepCost:
    """Count a step: `loss()` runs the model forward and gives a scalar.

    Of what there is before, nothing counts as kept: to see whether an input is, let `loss` make or copy it.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> cost = count_step(layer, lambda: layer(torch.ones(2, 8)).sum())
        >>> cost.flops, cost.kept, cost.trained, cost.optimizer  # 2·(2·8·4) forward and as many for the weight
        (256, 68, 36, 288)
    """
    model.zero_grad(set_to_none=True)
    watch, counter = _Watch(), FlopCounterMode(display=False)
    with counter, watch:
        value = loss()
        kept = watch.alive([*model.parameters(), *model.buffers()])
        value.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    numbers = sum(p.numel() for p in trained)
    optimizer = sum(2 * p.numel() * p.element_size() for p in trained)
    return StepCost(counter.get_total_flops(), kept, watch.kernels, numbers, optimizer)


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd is told to save, by `saved_tensors_hooks`, beside Parameters and buffers: storages once.

    What a layer packs by hooks of its own, or holds in another way, is not seen: see `StepCost.kept`.
    """
    return bytes_saved(loss, {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]})


def bytes_saved(call: Callable[[], Any], owned: Collection[int]) -> int:
    """The same of any call, beside the storages that are given, by `_cdata`."""
    found: dict[int, int] = {}
    held: list[Tensor] = []  # or the address of one is given to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            found[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(found.values())
