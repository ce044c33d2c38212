"""What an example shows and writes: errors on one line, a progress bar, figures, pictures, and which checks hold."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import convlora
from sr.data import Image, InputError, Photo, to_image
from sr.evaluation import Evaluation, HeldOutSet, quality_table
from sr.metrics import luma, psnr_y
from sr.training import Trained

if TYPE_CHECKING:
    from sr.command import Options

console = Console()


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says in one line what the user gave wrong, and then exits with 1."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except (InputError, convlora.ConvLoRAError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return wrapped


@contextmanager
def training_bar(console: Console = console) -> Iterator[Callable[[float, float], None]]:
    """A bar that goes from 0 to 1 and shows the loss; gives what `train` takes as `on_step`."""
    columns = (
        TextColumn("training"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0, loss=float("nan"))
        yield lambda progress, loss: bar.update(task, completed=progress, loss=loss)


def show_sizes(model: nn.Module, photos: str, device: torch.device) -> dict[str, int]:
    """Print how much of an adapted model trains, on which photos and where; the sizes as results.json has them."""
    size = convlora.summary(model)
    console.print(
        f"[bold]{len(size.layers)}[/] layers adapted, [bold]{size.trainable:,}[/] parameters to train beside "
        f"{size.base:,} frozen ({size.trainable / size.base:.1%}); {photos}; {device_name(device)}"
    )
    return {"layers": len(size.layers), "trained_parameters": size.trainable, "base_parameters": size.base}


def report_run(
    stem: str,
    options: Options,
    device: torch.device,
    sizes: Mapping[str, int],
    photos: Sequence[Photo],
    held_out: HeldOutSet,
    trained: Trained,
    rows: Sequence[Evaluation],
) -> None:
    """Print the table of rows, the first of which are bicubic, base and adapted; write pictures and results.json."""
    out, (bicubic, base, adapted) = options.out, rows[:3]
    count = len(held_out.pairs) // held_out.draws
    title = f"{count} held-out photos, {held_out.draws} draws of '{options.degradation}' each"
    figures = run_figures(sizes, trained, out / "adapter.safetensors", rows)
    console.print(quality_table(rows, base, title))
    console.print(
        f"{len(trained.losses)} steps in {trained.seconds:.0f} s; adapter file {figures['adapter_bytes']:,} bytes, "
        f"{figures['adapter_bytes'] / options.base.stat().st_size:.1%} of the base's"
    )
    save_comparison(out / f"{stem}.png", held_out, [bicubic, base, adapted])
    save_curve(out / f"{stem}_curve.png", trained)
    results = {
        "options": options.as_json(),
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "convlora": convlora.__version__},
        "training_photos": [photo.name for photo in photos],
        "held_out_photos": [pair.name for pair in held_out.pairs],  # in the order of each row's figures
        "training_seconds": round(trained.seconds, 1),
        "gain_db": adapted.gain_over(base),
    }
    (out / "results.json").write_text(json.dumps(results | figures, indent=1) + "\n")
    console.print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")


def run_figures(
    sizes: Mapping[str, int], trained: Trained, adapter: Path, rows: Sequence[Evaluation]
) -> dict[str, object]:
    """What results.json says of every run."""
    return {
        **sizes,
        "steps": len(trained.losses),
        "adapter_bytes": adapter.stat().st_size,
        "rows": [row.as_json() for row in rows],
        "curve": trained.measured,
    }


def strongest_change(one: Image, other: Image, size: int) -> tuple[int, int]:
    """The corner (top, left) of the `size` x `size` square where two photos differ most in luma."""
    sums = np.pad(np.abs(luma(one) - luma(other)).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    squares = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    top, left = np.unravel_index(squares.argmax(), squares.shape)
    return int(top), int(left)


def save_comparison(path: Path, held_out: HeldOutSet, columns: Sequence[Evaluation], crop: int = 96) -> None:
    """A picture with a line per photo, as its first degradation left it: the whole, a square by each column, the truth.

    The square is where the last two columns differ most. The figures are PSNR-Y of the whole photo.
    """
    pairs = held_out.pairs[:: held_out.draws]
    figure = Figure(figsize=(2.1 * (len(columns) + 2), 2.35 * len(pairs)), layout="constrained")
    grid = figure.subplots(len(pairs), len(columns) + 2, squeeze=False)
    for line, (pair, axes) in enumerate(zip(pairs, grid, strict=True)):
        images = [to_image(column.outputs[line * held_out.draws]) for column in columns]
        size = min(crop, *pair.high.shape[:2])
        top, left = strongest_change(*images[-2:], size)
        show_image(axes[0], pair.high, below=pair.name, interpolation="antialiased")
        axes[0].add_patch(Rectangle((left, top), size, size, fill=False, edgecolor="#ff2d55", linewidth=1.5))
        figures = [f"{psnr_y(image, pair.high, held_out.scale):.2f} dB" for image in images]
        for place, image, text in zip(axes[1:], [*images, pair.high], [*figures, ""], strict=True):
            show_image(place, image[top : top + size, left : left + size], below=text)
    for place, title in zip(grid[0], ["photo", *(column.name for column in columns), "ground truth"], strict=True):
        place.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def show_image(axes: Axes, image: Image, *, above: str = "", below: str = "", interpolation: str = "nearest") -> None:
    """A photo without ticks, with a line of text above or below."""
    axes.imshow(image, interpolation=interpolation)
    axes.set_title(above, fontsize=8)
    axes.set_xlabel(below, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def save_curve(path: Path, trained: Trained, smooth: int = 25) -> None:
    """The training loss (a running mean over `smooth` steps) and the PSNR that was measured on the way."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left = figure.subplots()
    width = min(smooth, len(trained.losses))
    mean = np.convolve(trained.losses, np.ones(width) / width, mode="valid")
    left.plot(np.arange(len(mean)) + width, mean, color="#9aa5b1", linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("training loss, mean |error|", color="#5f6b7a")
    right = left.twinx()
    right.plot(*zip(*trained.measured, strict=True), color="#0b6e4f", marker="o", markersize=3)
    right.set_ylabel("held-out PSNR-Y (dB)", color="#0b6e4f")
    figure.savefig(path, dpi=100)


def device_name(device: torch.device) -> str:
    """`"cpu, 2 threads"` or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
