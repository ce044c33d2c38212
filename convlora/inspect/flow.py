"""What the output of a forward depends on: marks on tensors, carried on by every operation.

A weight that is read need not act: code may look at its dtype alone, or drop what it computed. So `Flow` watches the
operations themselves, below autograd, where a fused kernel is one as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.layout, torch.memory_format)
_NESTED = (dict, list, tuple, set, frozenset)
CONSTANT = 64  # as many numbers as code may write down itself, `torch.tensor([0.5, 0.5])`


class DataFlow(TorchDispatchMode):
    """Inside the block, whatever is computed from a marked tensor gets its mark.

    Marks are on memory, so that views and writes in place carry them. In doubt everything marked so far counts: for a
    value that leaves torch (`item()`), and for memory that no operation made (NumPy's, a compiled extension's).

    Args:
        known: tensors that are there before and carry no mark: parameters, buffers, inputs.

    Attributes:
        found: tensors that an operation took, neither known nor made by another: those of a closure, a global.

    Example:
        >>> weight, other = torch.ones(3), torch.ones(3)
        >>> with DataFlow([weight, other]) as flow:
        ...     flow.mark(weight, 7)
        ...     y, z = other * 2, other + weight.view(3, 1)
        >>> flow.marks_of([y]), flow.marks_of([z])
        (set(), {7})
    """

    supports_higher_order_operators = True

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bits: dict[int, int] = {}  # memory -> marks, one bit each
        self._held: list[StorageWeakRef] = []  # while there is one, no other memory gets that name
        self._keys: dict[int, int] = {}  # what a bit stands for
        self._left = 0
        self.found: list[Tensor] = []
        self._written: set[int | None] = set()
        for tensor in known:
            self._add(tensor, 0)

    def mark(self, tensor: Tensor, key: int) -> None:
        """Mark a tensor with a key."""
        bit = self._keys.setdefault(key, 1 << len(self._keys))
        if not self._add(tensor, bit):
            self._left |= bit

    def marks_of(self, output: Any) -> set[int]:
        """The keys of all that the tensors of a nested output were computed from."""
        bits = self._left
        for leaf in nested_leaves(output):
            bits |= self._of(leaf) if isinstance(leaf, Tensor) else self._every
        return {key for key, bit in self._keys.items() if bits & bit}

    def wrote_to(self, tensor: Tensor) -> bool:
        """Whether an operation wrote to the memory of a tensor, `.data` or not."""
        return (name := _memory(tensor)) is not None and name in self._written

    @property
    def _every(self) -> int:
        return (1 << len(self._keys)) - 1

    def _of(self, tensor: Tensor) -> int:
        name = _memory(tensor)
        if name is not None and name not in self._bits:
            self.found.append(tensor)
            self._add(tensor, self._every)
        return self._every if name is None else self._bits[name]

    def _add(self, tensor: Tensor, bits: int) -> bool:
        name = _memory(tensor)
        if name is None:
            return False
        if name not in self._bits:
            self._held.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        self._bits[name] = self._bits.get(name, 0) | bits
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in nested_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten.lift_fresh.default and given[0].numel() <= CONSTANT:
            self._add(given[0], 0)
        bits = 0
        for tensor in given:
            bits |= self._of(tensor)
        result = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self._left |= bits
        for tensor in _written(func, args, kwargs):
            self._add(tensor, bits)
            self._written.add(_memory(tensor))
        for tensor in nested_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, bits)
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in nested_leaves(value) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> int | None:
    """A name of the memory that a tensor is a view of; None for one that has none (sparse ones, some subclasses)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def nested_leaves(value: Any) -> Iterator[Any]:
    """The tensors inside a nested value, attributes of objects included, and whatever may hide some: no plain data.

    Example:
        >>> [type(leaf).__name__ for leaf in nested_leaves({"a": [torch.ones(1), 3], "b": "text", "c": range(2)})]
        ['Tensor', 'range']
    """
    seen = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value is None or isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            continue
        parts: list[Any] = []
        if isinstance(value, _NESTED):  # of anything else, going through it might do something
            parts += value.values() if isinstance(value, dict) else value
        parts += getattr(value, "__dict__", {}).values()
        stack += reversed(parts)
        if not isinstance(value, _NESTED) and not hasattr(value, "__dict__"):
            yield value


def leaves_with_gradient(output: Any) -> set[int] | None:
    """The ids of the leaf tensors to which a nested output gives gradients, by its autograd graph, without a backward.

    None if the graph cannot tell: reentrant checkpointing makes a part of it during the backward.

    Example:
        >>> used, cut = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> leaves_with_gradient([used * 2 + cut.detach()]) == {id(used)}
        True
    """
    found = set()
    nodes = [leaf.grad_fn for leaf in nested_leaves(output) if isinstance(leaf, Tensor)]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return None
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return found
