"""What classify.py shows and writes: progress, a table of all methods, a picture, results.json."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from classification.data import Task
from classification.methods import Outcome, has_peft
from classification.training import accuracy

LIVE, GREY = "#0b6e4f", "#9aa5b1"  # as trained, from the file
WRONG = "#ff2d55"
SHOWN = 10  # images of each data set in the picture

console = Console()


@dataclass(frozen=True)
class Shown:
    """A data set, and what the network says to its held-out images: with the adapter for it, and with none."""

    task: Task
    adapted: Tensor  # logits; for the base's own data those of the base
    base: Tensor
    base_classes: Sequence[str]

    @property
    def is_own(self) -> bool:
        """Whether the data are the base's own."""
        return self.adapted is self.base


def show_progress(what: str, started: float) -> None:
    """What is done, and when."""
    console.print(f"{what}: done after {time.perf_counter() - started:.0f} s")


def report_run(
    out: Path, options: Mapping[str, int], outcomes: Sequence[Outcome], shown: Sequence[Shown], started: float
) -> None:
    """The table on the screen; the picture and results.json in a folder."""
    base, *others = shown
    tasks = [data.task for data in others]
    base_accuracy = accuracy(base.base, base.task.test)
    lines = lines_of(outcomes)
    console.print(f"base: {base_accuracy:.1%} of {len(base.task.test.labels)} letters in fonts that it has not seen")
    console.print(table_of(lines, tasks, "Accuracy on held-out images (%), live and of the file on a fresh base"))
    if not has_peft():
        console.print("no rows of PEFT: it is not installed (pip install -e '.[examples,peft]')")
    save_picture(out / "classify.png", lines, shown)
    seconds = time.perf_counter() - started
    packages = ["torch", "torchvision", "convlora", *(["peft"] if has_peft() else [])]
    results = {
        "options": dict(options),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "seconds": round(seconds, 1),
        "base_accuracy": base_accuracy,
        "images": {data.task.name: [len(data.task.originals.labels), len(data.task.test.labels)] for data in shown},
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{seconds:.0f} s; wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")


@dataclass(frozen=True)
class Line:
    """One method over both tasks: the outcomes of all seeds."""

    method: str
    outcomes: Sequence[Outcome]

    def accuracies(self, task: str, which: str) -> list[float]:
        """`which`: `"live"` or `"reloaded"`; one for each seed."""
        return [getattr(reached, which) for reached in self.outcomes if reached.task == task]

    def largest(self, task: str, which: str) -> int:
        """`which`: `"trained"` or `"file_bytes"`."""
        return max(getattr(reached, which) for reached in self.outcomes if reached.task == task)

    @property
    def base_back(self) -> bool:
        """In every run."""
        return all(reached.base_back for reached in self.outcomes)


def lines_of(outcomes: Sequence[Outcome]) -> list[Line]:
    """The outcomes by method, in the order in which the methods first appear."""
    methods = dict.fromkeys(reached.method for reached in outcomes)
    return [Line(method, [reached for reached in outcomes if reached.method == method]) for method in methods]


def percent(values: Sequence[float]) -> str:
    """`"96.7"`, or `"96.7 ± 0.3"` (the standard deviation) of several."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def table_of(lines: Sequence[Line], tasks: Sequence[Task], title: str) -> Table:
    """Accuracy live and from the file for each task, what was trained and how large the file is."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for task in tasks:
        table.add_column(f"{task.name}, live", justify="right")
        table.add_column("file", justify="right")
    table.add_column("trained", justify="right")
    table.add_column("kB", justify="right")
    table.add_column("base back")
    for line in lines:
        reached = [percent(line.accuracies(task.name, which)) for task in tasks for which in ("live", "reloaded")]
        trained = max(line.largest(task.name, "trained") for task in tasks)
        kilobytes = max(line.largest(task.name, "file_bytes") for task in tasks) / 1000
        table.add_row(line.method, *reached, f"{trained:,}", f"{kilobytes:,.0f}", "bitwise" if line.base_back else "no")
    return table


def save_picture(path: Path, lines: Sequence[Line], shown: Sequence[Shown]) -> None:
    """Above, held-out images and what one network says to them, switched; below, all methods as bars."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    above.suptitle("One network, three label sets: held-out images, its answers, and the truth if wrong", fontsize=11)
    for row, data in zip(above.subplots(len(shown), SHOWN, squeeze=False), shown, strict=True):
        for axes, index in zip(row, examples(data.task), strict=True):
            draw_example(axes, data, index)
        row[0].set_ylabel("no adapter" if data.is_own else f"adapter\n“{data.task.name}”", fontsize=9)
    judged = [data.task for data in shown if not data.is_own]
    grid = below.subplots(1, len(judged), squeeze=False)[0]
    for axes, task in zip(grid, judged, strict=True):
        draw_bars(axes, lines, task)
    below.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def examples(task: Task) -> list[int]:
    """Random held-out images of `SHOWN` classes."""
    labels = task.test.labels.numpy()
    rng = np.random.default_rng(0)
    classes = rng.choice(len(task.classes), SHOWN, replace=False)
    return [int(rng.choice(np.flatnonzero(labels == label))) for label in classes]


def draw_example(axes: Axes, data: Shown, index: int) -> None:
    """An image; above it what the network says, below what it says with the adapter off."""
    axes.imshow(data.task.test.images[index, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    answer, truth = int(data.adapted[index].argmax()), int(data.task.test.labels[index])
    text = data.task.classes[answer] + ("" if answer == truth else f" (is {data.task.classes[truth]})")
    axes.set_title(text, fontsize=11, pad=5, color=LIVE if answer == truth else WRONG)
    if not data.is_own:
        axes.set_xlabel(f"off: {data.base_classes[int(data.base[index].argmax())]}", fontsize=8, color="#5f6b7a")


def draw_bars(axes: Axes, lines: Sequence[Line], task: Task) -> None:
    """Accuracy of each method on one task, live and from its file."""
    places = np.arange(len(lines))[::-1]
    series = (0.2, "live", LIVE, "as trained"), (-0.2, "reloaded", GREY, "its file on a fresh base")
    for shift, which, colour, label in series:
        values = [100 * float(np.mean(line.accuracies(task.name, which))) for line in lines]
        bars = axes.barh(places + shift, values, height=0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    names = [f"{line.method}\n{line.largest(task.name, 'file_bytes') / 1000:,.0f} kB" for line in lines]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy on held-out images (%)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{task.name}: {len(task.classes)} classes", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
