"""How an adapter's costs grow: from 10 to 1,000 adapted layers, and from rank 1 to 64.

    python benchmarks/scale.py

Chains of 3x3 convolutions with LoCon factors. For each: inject, save, load into a plain net, a training step (forward
and backward) over that of the frozen net (forward and input gradient), the adapter's file, and what the adapter and one
step add to the memory of a process of its own. Beside the table a plot, `results/scale.png`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    Section,
    TimedCase,
    facts_of_run,
    in_new_process,
    milliseconds,
    peak_memory,
    time_interleaved,
    write_results,
)  # fmt: skip
from matplotlib.figure import Figure
from torch import Tensor, nn

import convlora


@dataclass(frozen=True)
class Size:
    """A chain of layers and an input for it."""

    layers: int
    rank: int
    channels: int
    side: int

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in range(self.layers)))

    def input(self) -> Tensor:
        return torch.rand(4, self.channels, self.side, self.side, requires_grad=True)

    def inject(self, model: nn.Module) -> nn.Module:
        return convlora.inject(model, "*", rank=self.rank, factors="locon")


BY_LAYERS = [Size(layers, 4, 32, 24) for layers in (10, 30, 100, 300, 1000)]
BY_RANK = [Size(20, rank, 64, 32) for rank in (1, 2, 4, 8, 16, 32, 64)]
VERBS = ("inject", "save", "load")


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).square().mean().backward()

    return run


def measure(size: Size, rounds: int) -> tuple[dict[str, Any], Any]:
    """Facts of one size, and its step's ratio to the floor."""
    plain, x = size.net(), size.input()
    frozen, model = copy.deepcopy(plain).requires_grad_(False), size.inject(copy.deepcopy(plain))
    floor, trained = step(frozen, x), step(model, x)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path = place / "a.safetensors"
        convlora.save(model, path)

        def copied() -> nn.Module:
            return copy.deepcopy(plain)

        cases = [
            TimedCase("inject", size.inject, prepare=copied),
            TimedCase("save", lambda _: convlora.save(model, place / "b.safetensors")),
            TimedCase("load", lambda net: convlora.load(net, path), prepare=copied),
            TimedCase("floor", lambda _: floor()),
            TimedCase("step", lambda _: trained()),
        ]
        times = time_interleaved(f"{size.layers} layers, rank {size.rank}", cases, rounds)
        facts: dict[str, Any] = {name: times[name].facts() for name in times} | {
            "layers": size.layers, "rank": size.rank, "channels": size.channels, "side": size.side,
            "parameters": convlora.summary(model).trainable, "bytes": path.stat().st_size,
        }  # fmt: skip
    for part in ("adapter", "step", "frozen step"):
        numbers = f"{size.layers}|{size.rank}|{size.channels}|{size.side}"
        facts[f"{part} memory"] = int(*in_new_process(__file__, "--part", f"{part}|{numbers}"))
    return facts, times["step"].over(times["floor"])


def memory_of(part: str) -> int:
    """Bytes that an adapter, or a step with or without it, adds to this process."""
    what, *numbers = part.split("|")
    size = Size(*map(int, numbers))
    model, x = size.net().requires_grad_(False), size.input()
    if what == "adapter":
        size.inject(Size(1, 1, 8, 8).net())  # what the first call loads does not count
        return peak_memory(lambda: size.inject(model))
    if what == "step":
        size.inject(model)
    return peak_memory(step(model, x))


def table(title: str, sizes: list[Size], rounds: int) -> Section:
    first = sizes[0]
    section = Section(
        title,
        f"{first.channels} channels, input 4x{first.channels}x{first.side}x{first.side}; milliseconds, median of "
        f"{rounds} rounds; step over floor: median of the rounds' ratios (interquartile range); memory in MiB.",
        ("layers", "rank", "parameters", "file, kB", *VERBS, "step over floor", "ms a layer above the floor",
         "adapter", "a step", "a frozen step"),
    )  # fmt: skip
    for size in sizes:
        facts, ratio = measure(size, rounds)
        memory = [f"{facts[f'{part} memory'] / 2**20:.1f}" for part in ("adapter", "step", "frozen step")]
        above = (facts["step"]["median_s"] - facts["floor"]["median_s"]) / size.layers
        section.add(
            str(size.layers), str(size.rank), f"{facts['parameters']:,}", f"{facts['bytes'] / 1000:.0f}",
            *(milliseconds(facts[verb]["median_s"]) for verb in VERBS), f"{ratio.wall:.2f} ({ratio.iqr:.2f})",
            f"{above * 1e3:.2f}", *memory, **facts, over_floor=vars(ratio),
        )  # fmt: skip
        print(*section.rows[-1], sep=" | ", flush=True)
    return section


def plot(path: Path, by_layers: Section, by_rank: Section) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [row["layers"] for row in by_layers.data]
    for verb in (*VERBS, "step"):
        left.loglog(counts, [row[verb]["median_s"] * 1e3 for row in by_layers.data], marker="o", label=verb)
    left.set(xlabel="adapted layers (rank 4)", ylabel="milliseconds")
    left.legend()
    ranks = [row["rank"] for row in by_rank.data]
    right.semilogx(ranks, [row["over_floor"]["wall"] for row in by_rank.data], marker="o")
    right.set(xlabel="rank (20 layers of 64 channels)", ylabel="training step / frozen step", ylim=(1, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of timing.", min=1)] = 7,
    out: Annotated[Path, typer.Option(help="Results as JSON; Markdown and plot beside it.")] = RESULTS / "scale.json",
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Costs of an adapter by number of layers and by rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if part:
        print(memory_of(part))
        return
    facts = facts_of_run("torch", "convlora")
    sections = [table("By number of layers", BY_LAYERS, rounds), table("By rank", BY_RANK, rounds)]
    for section in sections:
        section.show()
    write_results(out, "python benchmarks/scale.py", facts, sections)
    plot(out.with_suffix(".png"), *sections)


if __name__ == "__main__":
    typer.run(main)
