"""File formats: one module a format, each between a file and an `Adapter`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from convlora.adapter import Adapter
from convlora.factors import WeightSpec
from convlora.specs import specs_from_checkpoint as specs_from_checkpoint
from convlora.specs import specs_of as specs_of

FORMATS = ("convlora", "peft", "locon", "loralib")


def detect(path: str | os.PathLike[str]) -> str:
    """Which of `FORMATS` a file or folder is of."""
    raise NotImplementedError


def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    layers: Mapping[str, WeightSpec] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    name: str | None = None,
) -> Adapter:
    """Read an adapter of any format. `format=None`: detect it.

    `layers`: the base's, by `specs_of` or `specs_from_checkpoint`. `rank`, `alpha`: of a loralib file, which states none.
    """
    raise NotImplementedError


def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "convlora",
    *,
    prefix: str | None = None,
    alpha: float | None = None,
    overwrite: bool = True,
) -> None:
    """Write an adapter in any format, atomically.

    `prefix`: of the keys; None is each format's own (`base_model.model.`, `lycoris`, none). `alpha`: loralib only,
    rescales so that this `lora_alpha` is right in every layer.
    """
    raise NotImplementedError
