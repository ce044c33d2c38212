"""What the benchmarks share: interleaved timing, facts about the machine, tables, results as JSON and Markdown.

Times are compared only within one run. All cases of a question run once a round, in an order drawn anew each round,
so that whatever else the machine does hits all of them alike and none always runs on caches that it filled itself.
A ratio is the median of the rounds' ratios, which slow drift leaves alone. CPU time (of the process, all threads) is
taken beside wall time: it does not count the time in which other programs hold the core.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for `sr`: networks, photos and training of the examples

RESULTS = Path(__file__).parent / "results"
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class TimedCase:
    """One thing to time: `run(prepare())`, of which only `run` is timed, `calls` times in a row; `after` tidies up."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    after: Callable[[Any], Any] = lambda prepared: None
    calls: int = 1


@dataclass
class Times:
    """Seconds per call, one entry a round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def iqr(self) -> float:
        return interquartile_range(self.wall)

    def __str__(self) -> str:
        """Milliseconds: median (interquartile range)."""
        return f"{milliseconds(self.median)} ({milliseconds(self.iqr)})"

    def over(self, other: Times) -> Ratio:
        return Ratio(
            statistics.median(pairs := [a / b for a, b in zip(self.wall, other.wall, strict=True)]),
            interquartile_range(pairs),
            statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=True)),
            min(self.wall) / min(other.wall),
        )

    def facts(self) -> dict[str, float]:
        values = {"median_s": self.median, "iqr_s": self.iqr, "min_s": min(self.wall)}
        return {**values, "cpu_median_s": statistics.median(self.cpu), "rounds": len(self.wall)}


@dataclass(frozen=True)
class Ratio:
    """One case over another: median and IQR of the rounds' ratios of wall time, median of CPU time, ratio of minima."""

    wall: float
    iqr: float
    cpu: float
    minima: float

    def __str__(self) -> str:
        """Wall time: median (interquartile range)."""
        return f"{self.wall:.3f} ({self.iqr:.3f})"


def interquartile_range(values: Sequence[float]) -> float:
    """The interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def time_interleaved(title: str, cases: Sequence[TimedCase], rounds: int) -> dict[str, Times]:
    """Time all cases once a round, in random order; one round more, the first, is not counted.

    Garbage is collected before each timing and not during it.
    """
    order = random.Random(0)
    times = {case.name: Times() for case in cases}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for i in progress.track(range(rounds + 1), description=title):
            for case in order.sample(cases, len(cases)):
                wall, cpu = _once(case)
                if i > 0:
                    times[case.name].wall.append(wall)
                    times[case.name].cpu.append(cpu)
    return times


def _once(case: TimedCase) -> tuple[float, float]:
    prepared = case.prepare()
    gc.collect(0 if case.calls > 1 else 2)
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(case.calls):
            case.run(prepared)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        gc.enable()
    case.after(prepared)
    return wall / case.calls, cpu / case.calls


def calls_that_take(run: Callable[[], Any], seconds: float) -> int:
    """How many calls in a row take about this long."""
    run()
    start = time.perf_counter()
    run()
    return max(1, round(seconds / (time.perf_counter() - start)))


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that the process had at most while `run()` ran, above what it had before.

    Read every half millisecond. For a figure of its own, call it once in a fresh process: freed memory is not always
    given back.
    """
    before = peak = _resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.0005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
        peak = max(peak, _resident())
    finally:
        over.set()
        watcher.join()
    return peak - before


def in_new_process(script: str, *options: str) -> list[str]:
    """The words that another run of a script prints in its last line."""
    done = subprocess.run([sys.executable, script, *options], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1].split()


def _resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def facts_of_run(*packages: str) -> dict[str, Any]:
    """What the figures depend on: date, machine, and the versions of Python and of packages."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": now, "machine": _machine(), "versions": _versions(packages)}


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = str(getattr(__import__(package), "__version__", "unknown"))
    return found


@dataclass
class Section:
    """A question, its answer as a table, and the same as data."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)

    def add(self, *cells: str, **data: Any) -> None:
        """One row, as it is shown and as data."""
        self.rows.append(cells)
        self.data.append(data)

    def show(self) -> None:
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self.note, "", _line(self.columns)]
        lines += ["|---|" + "---:|" * (len(self.columns) - 1), *map(_line, self.rows)]
        return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_results(path: Path, command: str, facts: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """`path` as JSON, and beside it the same tables as Markdown; `facts` are those of `facts_of_run`, and more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {section.title: {"note": section.note, "rows": section.data} for section in sections}
    path.write_text(json.dumps({"command": command, **facts, "results": named}, indent=1) + "\n")
    m, v = facts["machine"], facts["versions"]
    head = (
        f"`{command}`, {facts['date']}: {m['cpu']}, {m['cores']} cores, {m['torch_threads']} torch threads, "
        f"load {m['load_at_start']} at the start; " + ", ".join(f"{name} {version}" for name, version in v.items())
    )
    path.with_suffix(".md").write_text("\n\n".join([head + ".", *(s.markdown() for s in sections)]) + "\n")
    console.print(f"written: {path} and {path.with_suffix('.md')}")


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
