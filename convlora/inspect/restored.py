"""Running a model without a trace: what a forward changes is put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored(root: nn.Module, *, parameter_values: bool = True) -> Iterator[None]:
    """Restore a module after the block, also after an exception; see `remembered`."""
    put_back = remembered(root, parameter_values=parameter_values)
    try:
        yield
    finally:
        put_back()


def remembered(root: nn.Module, *, parameter_values: bool = True) -> Callable[[], None]:
    """What restores mode, attributes, Parameters and buffers of all modules, their values included, to those of now.

    Args:
        parameter_values: also keep a copy of the values of all Parameters, for a model that may write to them in place
            (through `.data`, too). Without it a Parameter gets its own memory back, should it be given other memory.
    """
    modules = list(root.modules())
    attributes = [dict(module.__dict__) for module in modules]
    tables: list[tuple[dict[str, Any], ...]]
    tables = [(dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in modules]
    kept: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # tensor, its memory, its values
    for parameters, buffers, _ in tables:
        for table, by_value in ((parameters, parameter_values), (buffers, True)):
            for t in table.values():
                if t is not None and id(t) not in kept:
                    kept[id(t)] = t, t.data, t.detach().clone() if by_value else None

    def put_back() -> None:
        for module, saved, saved_tables in zip(modules, attributes, tables, strict=True):
            module.__dict__.clear()
            module.__dict__.update(saved)
            for name, table in zip(("_parameters", "_buffers", "_modules"), saved_tables, strict=True):
                getattr(module, name).clear()
                getattr(module, name).update(table)
        for tensor, data, value in kept.values():
            if tensor.layout == torch.strided and tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            if value is not None and not _same_bits(tensor, value):
                tensor.data.copy_(value)

    return put_back


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or not a.numel():
        return True
    if a.layout != torch.strided:
        return False
    return torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)))
