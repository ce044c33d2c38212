"""What trainers have in common: what a checkpoint can leave out, and what is left behind at the end."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError, one_line
from convlora.layer.sharded import device_mesh_of
from convlora.model.inject import inject
from convlora.model.outside import changed
from convlora.model.storage import merged_state_dict, save
from convlora.model.traversal import adapters, unwrap_model
from convlora.support.atomic import write_atomically
from convlora.support.safetensors import to_safetensors
from convlora.targets import is_part_of_adapter

M = TypeVar("M", bound=nn.Module)


class MissingPackageError(ConvLoRAError, ImportError):
    """The package of a trainer cannot be imported."""

    def __init__(self, extra: str, error: ImportError) -> None:
        super().__init__(f"convlora.integrations.{extra}: {one_line(error)}; pip install 'convlora[{extra}]'")


def ensure_adapters(model: M, config: AdapterConfig | None, operation: str) -> M:
    """Inject the adapter of a config unless it is there; without a config the model has to have one.

    Raises:
        ConvLoRAError: no adapter and no config to make one from, or what `inject` refuses.
    """
    known = adapters(model)
    if config is not None and config.name not in known:
        return inject(model, config=config)
    if not known:
        raise ConvLoRAError(f"{operation}: the model has no adapters; give config=, or inject before")
    return model


def untouched_keys(model: nn.Module) -> list[str]:
    """The keys of a model's state dict that are as before `inject`: neither of an adapter, nor changed since.

    Example:
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> untouched_keys(model)
        ['0.weight', '0.bias']
    """
    root = unwrap_model(model, "untouched_keys")
    moved = set(changed(root))
    return [key for key in root.state_dict() if not is_part_of_adapter(key) and key not in moved]


def takes_part(model: nn.Module, is_main: bool) -> bool:
    """Whether this process takes part in saving: the main one, and all of those that hold parts of a model."""
    return is_main or device_mesh_of(model) is not None


def write_results(
    model: nn.Module, adapter: str | os.PathLike[str], merged: str | os.PathLike[str] | None, name: str | None = None
) -> None:
    """Write an adapter file, and the merged checkpoint with the base's keys. Folders are made.

    Args:
        adapter: of the adapter file.
        merged: of the checkpoint: `.safetensors`, else as `torch.save` writes it; None for none.
        name: of the adapter, where the model has several.
    """
    for path in (adapter, merged):
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(model, adapter, name)
    if merged is not None:
        write_checkpoint(merged, merged_state_dict(model))


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write a state dict, by its suffix as `.safetensors` or as `torch.save` does; atomically."""
    if Path(path).suffix.lower() == ".safetensors":
        flat = {key: value.contiguous() for key, value in state.items()}
        write_atomically(path, to_safetensors(flat, {"format": "pt"}))
    else:
        write_torch_file(path, state)


def write_torch_file(path: str | os.PathLike[str], content: Any) -> None:
    """`torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())
