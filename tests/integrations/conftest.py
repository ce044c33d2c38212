"""What trainers need: no network, no settings of the person who tests, and a few images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Read when ultralytics is imported.
_settings = tempfile.TemporaryDirectory()
os.environ.update(YOLO_OFFLINE="true", YOLO_VERBOSE="false", YOLO_CONFIG_DIR=_settings.name)


@pytest.fixture(autouse=True, scope="module")
def _as_before() -> Iterator[None]:
    """Trainers set threads and determinism for the whole process: other tests have them as they were."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.fixture(scope="session")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The description of four images with one box each, for training, and of as many for validation.

    Of two shapes: with `rect` a trainer then takes them in their order, which a resumed run shuffles anew otherwise.
    """
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("detection")
    (Path(_settings.name) / "Arial.ttf").touch()  # asked for, and not used, since nothing is plotted
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 255, (64, 64 if i < 2 else 32, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            (folder / "labels" / split / f"{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.4 0.4\n")
    description = folder / "data.yaml"
    description.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: a, 1: b}}\n")
    return description
