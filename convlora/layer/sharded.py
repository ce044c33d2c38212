"""A model that several processes hold together: FSDP2's shards, DDP's replicas.

`fully_shard` leaves each process a part of every parameter (a DTensor) and puts the whole ones together for a forward.
After it the whole ones may stay where they are for a while: they can be read then, but what is written to them is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convlora.errors import ConvLoRAError

T = TypeVar("T")


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is this process's part of a larger one."""
    return type(tensor).__name__ == "DTensor"  # by name: torch.distributed.tensor takes long to import


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP, of either version, gathers and scatters the parameters of a module, now whole or not."""
    return bool(module.__dict__.get("_is_fsdp_managed_module"))


def is_shard_root(kind: type) -> bool:
    """Whether `fully_shard` made a class: it puts its own before the module's."""
    return any(base.__name__ == "FSDPModule" for base in kind.__bases__)


def reshard_model(root: nn.Module, operation: str) -> None:
    """Bring all parameters of `fully_shard` back to shards, which are what training writes.

    Raises:
        ConvLoRAError: FSDP manages the model, but from outside (a part of a model) or in another way (FSDP1).
    """
    roots = [module for module in root.modules() if is_shard_root(type(module))]
    for module in roots:
        module.reshard()  # type: ignore[operator]
    managed = (module for module in root.modules() if not roots and is_managed(module))
    if any(not is_sharded(p) for module in managed for p in module.parameters(recurse=False)):
        raise ConvLoRAError(
            f"{operation}: FSDP holds the parameters; give the whole model that fully_shard (FSDP2) got"
        )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of which this process may hold a part; all processes have to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value as this process holds `parameter`; nothing is sent."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    value = value.to(parameter.device, parameter.dtype)
    replica = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replica.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def device_mesh_of(root: nn.Module) -> Any:
    """The DeviceMesh of the processes that hold the parts of a model; None for a whole one."""
    return next((p.device_mesh for p in root.parameters() if is_sharded(p)), None)  # type: ignore[attr-defined]


def is_first_rank(model: nn.Module, mesh: Any) -> bool:
    """Whether this process is the first of those that hold a model, replicated by DDP or in parts."""
    if mesh is not None and any(mesh.get_coordinate()):
        return False
    replicas = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
    return all(ddp.process_group.rank() == 0 for ddp in replicas)


def on_all_ranks(mesh: Any, action: Callable[[], T]) -> T:
    """The result of an action, if it went well in all processes of a mesh.

    Raises:
        ConvLoRAError: that of this process, or the first of the others: none is left waiting for one that failed.
    """
    if mesh is None:
        return action()
    error: ConvLoRAError | None = None
    try:
        result = action()
    except ConvLoRAError as failed:
        error = failed
    message = None if error is None else str(error)
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        messages: list[str | None] = [None] * group.size()
        torch.distributed.all_gather_object(messages, message, group)
        message = next((text for text in messages if text is not None), None)
    if error is not None:
        raise error
    if message is not None:
        raise ConvLoRAError(message)
    return result
