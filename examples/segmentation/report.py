"""What segment.py shows and writes: a table, a picture, results.json, and which promises hold."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

import convlora
from segmentation.cells import Cells
from segmentation.training import dice

console = Console()
FOUND, MISSED, WRONG = (255, 255, 255), (0, 114, 178), (230, 120, 0)  # told apart by the colour-blind, too


@dataclass(frozen=True)
class Method:
    """A way to adapt: what it says of the judged images, how much it trains, and what has to be kept of it."""

    name: str
    logits: Tensor
    masks: Tensor
    parameters: int = 0
    file: Path | None = None

    @property
    def dice(self) -> float:
        return dice(self.logits, self.masks)


@dataclass(frozen=True)
class Comparison:
    """What came out with one seed."""

    seed: int
    source_images: Tensor  # the tissue of the judged images, under the source microscope
    judged: Cells
    methods: list[Method]
    promises: dict[str, bool]


def report(
    comparisons: Sequence[Comparison], options: Mapping[str, object], seconds: float, out: Path
) -> dict[str, float]:
    """Print the table, write picture and results.json, and give the mean Dice of each method."""
    lines = list(zip(*(comparison.methods for comparison in comparisons), strict=True))
    means = {line[0].name: mean(method.dice for method in line) for line in lines}
    count = len(comparisons[0].judged.images)
    table = Table(
        title=f"{count} {options['judge']} target images for each of {len(comparisons)} seeds", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for column in ("trained", "file (kB)", "Dice", "over base"):
        table.add_column(column, justify="right")
    table.add_column("each seed")
    rows = []
    for line in lines:
        first, figures = line[0], [method.dice for method in line]
        size = None if first.file is None else first.file.stat().st_size
        kept = ["", ""] if size is None else [f"{first.parameters:,}", f"{size / 1000:.1f}"]
        gain = "" if first.name == "base" else f"{means[first.name] - means['base']:+.3f}"
        table.add_row(first.name, *kept, f"{mean(figures):.3f}", gain, " ".join(f"{figure:.3f}" for figure in figures))
        rows.append({"name": first.name, "trained_parameters": first.parameters, "bytes": size, "dice": figures})
    console.print(table)
    shown = [m for m in comparisons[0].methods if m.name in ("base", "AdaBN", "ConvLoRA + AdaBN")]
    save_picture(out / "segment.png", comparisons[0], shown)
    results = {"options": dict(options), "seconds": round(seconds, 1), "machine": machine(), "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{seconds:.0f} s; wrote bases, adapters, segment.png and results.json to {out}")
    return means


def paint(logits: Tensor, mask: Tensor) -> NDArray[np.uint8]:
    """A prediction `(1, h, w)` beside the truth: what was found, missed, and wrongly called a nucleus."""
    predicted, true = logits[0].numpy() > 0, mask[0].numpy() > 0
    colours = np.zeros((*true.shape, 3), np.uint8)
    for places, colour in ((predicted & true, FOUND), (~predicted & true, MISSED), (predicted & ~true, WRONG)):
        colours[places] = colour
    return colours


def save_picture(path: Path, comparison: Comparison, methods: Sequence[Method], lines: int = 3) -> None:
    """The first judged images under both microscopes, what methods make of them, and the truth."""
    titles = ["source microscope", "target microscope", *(method.name for method in methods), "truth"]
    figure = Figure(figsize=(1.75 * len(titles), 1.95 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, len(titles), squeeze=False)
    for place, title in zip(grid[0], titles, strict=True):
        place.set_title(title, fontsize=9)
    for line, axes in enumerate(grid):
        mask = comparison.judged.masks[line]
        pictures = [comparison.source_images[line, 0].numpy(), comparison.judged.images[line, 0].numpy()]
        pictures += [paint(method.logits[line], mask) for method in methods] + [paint(mask - 0.5, mask)]
        figures = [f"Dice {dice(method.logits[line][None], mask[None]):.2f}" for method in methods]
        for place, picture, below in zip(axes, pictures, ["", "", *figures, ""], strict=True):
            place.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set_xlabel(below, fontsize=8)
            place.set_xticks([])
            place.set_yticks([])
    figure.supxlabel("white: found    blue: missed    orange: no nucleus", fontsize=9)
    figure.savefig(path, dpi=100)


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "convlora": convlora.__version__,
    }
