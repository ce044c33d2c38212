"""What an example shows: errors on one line, a progress bar, a table, two pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from convlora import ConvLoRAError
from sr.data import Image, InputError, to_image
from sr.metrics import Quality, luma, psnr_y, quality
from sr.training import Trained


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says in one line what the user gave wrong, and then exits with 1."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except (InputError, ConvLoRAError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return wrapped


@contextmanager
def training_bar(console: Console) -> Iterator[Callable[[float, float], None]]:
    """A bar that goes from 0 to 1 and shows the loss; gives what `train` takes as `on_step`."""
    columns = (
        TextColumn("training"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0, loss=float("nan"))
        yield lambda progress, loss: bar.update(task, completed=progress, loss=loss)


@dataclass(frozen=True)
class Row:
    """One line of the table: a way to enlarge, its quality, and the line it must reproduce."""

    name: str
    quality: Quality
    outputs: list[Tensor]
    equals: str = ""
    difference: float = 0.0

    @property
    def equality(self) -> str:
        """`"adapted, bitwise"` or `"adapted, to 3e-07"`; empty where nothing is claimed."""
        if not self.equals:
            return ""
        return f"{self.equals}, " + ("bitwise" if self.difference == 0 else f"to {self.difference:.0e}")

    def as_json(self) -> dict[str, object]:
        """The figures without the outputs."""
        reached = self.quality
        facts = {"name": self.name, "psnr_y": reached.psnr, "ssim_y": reached.ssim, "psnr_y_each": reached.psnrs}
        if self.equals:
            facts |= {"equals": self.equals, "largest_difference": self.difference}
        return facts


def make_row(name: str, outputs: Sequence[Tensor], truths: Sequence[Image], shave: int, same: Row | None = None) -> Row:
    """The quality of outputs `(1, 3, h, w)`, and how far they are from those of the row `same`.

    The difference is the largest over all values of all outputs, unrounded, in units of full scale.
    """
    reached = quality([to_image(output) for output in outputs], truths, shave)
    difference = 0.0
    if same is not None:
        pairs = zip(outputs, same.outputs, strict=True)
        difference = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
    return Row(name, reached, list(outputs), same.name if same else "", difference)


def quality_table(rows: Sequence[Row], base: Row, title: str) -> Table:
    """The rows as a rich table, with what each gains over `base`."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("PSNR-Y (dB)", "SSIM-Y", "over base (dB)"):
        table.add_column(column, justify="right")
    table.add_column("output equals")
    for row in rows:
        reached = row.quality
        gain = "" if row is base else f"{reached.psnr - base.quality.psnr:+.3f}"
        table.add_row(row.name, f"{reached.psnr:.3f}", f"{reached.ssim:.4f}", gain, row.equality)
    return table


def strongest_change(one: Image, other: Image, size: int) -> tuple[int, int]:
    """The corner (top, left) of the `size` x `size` square where two photos differ most in luma."""
    sums = np.pad(np.abs(luma(one) - luma(other)).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    squares = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    top, left = np.unravel_index(squares.argmax(), squares.shape)
    return int(top), int(left)


def save_comparison(
    path: Path,
    truths: Sequence[tuple[str, Image]],
    columns: Sequence[tuple[str, Sequence[Image]]],
    shave: int,
    crop: int = 96,
) -> None:
    """A picture with a line per photo: the whole, then one square of it by each column, and the truth.

    The square is where the last two columns differ most. The figures are PSNR-Y of the whole photo.
    """
    figure = Figure(figsize=(2.1 * (len(columns) + 2), 2.35 * len(truths)), layout="constrained")
    grid = figure.subplots(len(truths), len(columns) + 2, squeeze=False)
    for line, (name, truth) in enumerate(truths):
        size = min(crop, *truth.shape[:2])
        top, left = strongest_change(columns[-2][1][line], columns[-1][1][line], size)
        window = (slice(top, top + size), slice(left, left + size))
        frame = Rectangle((left, top), size, size, fill=False, edgecolor="#ff2d55", linewidth=1.5)
        grid[line, 0].imshow(truth, interpolation="antialiased")
        grid[line, 0].add_patch(frame)
        grid[line, 0].set_xlabel(name, fontsize=8)
        for place, (_, outputs) in enumerate(columns, start=1):
            grid[line, place].imshow(outputs[line][window], interpolation="nearest")
            grid[line, place].set_xlabel(f"{psnr_y(outputs[line], truth, shave):.2f} dB", fontsize=8)
        grid[line, -1].imshow(truth[window], interpolation="nearest")
    for place, title in enumerate(["photo", *(title for title, _ in columns), "ground truth"]):
        grid[0, place].set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=100)


def save_curve(path: Path, trained: Trained, what: str, smooth: int = 25) -> None:
    """The training loss (a running mean over `smooth` steps) and what was measured on the way."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left = figure.subplots()
    width = min(smooth, len(trained.losses))
    mean = np.convolve(trained.losses, np.ones(width) / width, mode="valid")
    left.plot(np.arange(len(mean)) + width, mean, color="#9aa5b1", linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("training loss, mean |error|", color="#5f6b7a")
    right = left.twinx()
    right.plot(*zip(*trained.measured, strict=True), color="#0b6e4f", marker="o", markersize=3)
    right.set_ylabel(what, color="#0b6e4f")
    figure.savefig(path, dpi=100)


def device_name(device: torch.device) -> str:
    """`"cpu, 2 threads"` or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
