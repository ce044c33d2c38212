"""A network in training and a trainer's average of it (EMA): what trainers round or leave out, kept exactly."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convlora.errors import ConvLoRAError
from convlora.integrations.common import untouched_keys, write_torch_file
from convlora.model.inject import remove
from convlora.model.storage import load
from convlora.model.switch import merge
from convlora.model.traversal import adapters, require_adapters, unwrap_model


def take_base(average: nn.Module, model: nn.Module) -> None:
    """Give the average of an adapted model the base itself: an average of what stays the same is off by rounding.

    Raises:
        ConvLoRAError: the model has no adapters.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> take_base(average, model)
    """
    root = require_adapters(model, "take_base")
    base, state = untouched_keys(root), root.state_dict()
    unwrap_model(average, "take_base").load_state_dict({key: state[key] for key in base}, strict=False)


def write_training_state(path: str | os.PathLike[str], model: nn.Module, average: nn.Module, optimizer: Any) -> None:
    """Keep what is adapted in a model and in its average, the optimizer, and what of the base is no half precision."""
    model = unwrap_model(model, "write_training_state")
    base, state = set(untouched_keys(model)), model.state_dict()
    rounded = {k: v for k, v in state.items() if k in base and not torch.equal(v, v.half().to(v.dtype))}
    moved = {k: v for k, v in state.items() if k not in base}
    averaged = {k: v for k, v in average.state_dict().items() if k not in base}
    write_torch_file(path, {"base": rounded, "model": moved, "average": averaged, "optimizer": optimizer.state_dict()})


def read_training_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_training_state` has kept, on the CPU.

    Raises:
        ConvLoRAError: no such file.
    """
    if not os.path.exists(path):
        raise ConvLoRAError(f"resume: '{path}' is missing, which a run keeps beside its weights while it lasts")
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def restore_training_state(path: str | os.PathLike[str], model: nn.Module, average: nn.Module, optimizer: Any) -> None:
    """Bring back what `write_training_state` has kept, in place."""
    state = read_training_state(path)
    unwrap_model(model, "restore_training_state").load_state_dict({**state["base"], **state["model"]}, strict=False)
    take_base(average, model)
    average.load_state_dict(state["average"], strict=False)
    optimizer.load_state_dict(state["optimizer"])


def merged_copy(average: nn.Module, adapter: str | os.PathLike[str]) -> nn.Module:
    """A plain network: the average's base with an adapter of the same layers merged into it, from a file."""
    return remove(merge(load(copy.deepcopy(average), adapter)))


def merge_in_file(weights: Path, average: nn.Module) -> None:
    """Let a trainer's own pickled checkpoint hold its average (`"ema"`) plain, the adapter file beside it merged."""
    checkpoint = torch.load(weights, map_location="cpu", weights_only=False)
    if checkpoint.get("ema") is not None and adapters(checkpoint["ema"]):
        plain = merged_copy(average, weights.with_suffix(".safetensors")).half()
        plain.criterion = None  # type: ignore[assignment]  # of a training
        torch.save({**checkpoint, "ema": plain}, weights)
