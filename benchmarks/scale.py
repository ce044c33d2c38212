"""How an adapter's costs grow: from 10 to 1,000 adapted layers, from rank 1 to 64, and to models of gigabytes.

    python benchmarks/scale.py

Chains of 3x3 convolutions with LoCon factors. For each: inject, save, load into a plain net, a training step (forward
and backward) over that of the frozen net (forward and input gradient), the adapter's file, and what the adapter and one
step add to the memory of a process of its own. Beside the table a plot, `results/scale.png`.

Then the UNet of Stable Diffusion XL in bfloat16 (5 GB; `--skip unet` leaves it out), and the command's `merge` on a
generated checkpoint of 2 GB: time, and what each adds to the memory of a process (`--skip file`).
"""

from __future__ import annotations

import copy
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
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
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import convlora
from convlora.cli.app import app


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
VERBS = ("inject", "save", "load", "merge")


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
            TimedCase("merge", lambda _: convlora.merge(model), after=lambda _: convlora.unmerge(model)),
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


# --- models and files of gigabytes ----------------------------------------------------------------------------------

LARGE = (1280, 24, 100)  # channels, 3x3 convolutions and Linear layers of the generated checkpoint: 2 GB in float32


def run_command(*words: str) -> None:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    if result.exit_code:
        raise RuntimeError(result.output)


def make_files(folder: Path, channels: int, convolutions: int, linears: int) -> list[str]:
    """A float32 checkpoint with large layers, an adapter of rank 16 for it, and where the merged one is to be."""
    folder.mkdir()
    net = nn.Sequential(
        *(nn.Conv2d(channels, channels, 3, device="meta") for _ in range(convolutions)),
        *(nn.Linear(channels, channels, device="meta") for _ in range(linears)),
    ).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    paths = [str(folder / f"{name}.safetensors") for name in ("base", "adapter", "merged")]
    save_file(net.state_dict(), paths[0])
    convlora.inject(net, "*", rank=16, factors="locon")
    for parameter in convlora.parameters(net):
        nn.init.normal_(parameter, std=0.02)
    convlora.save(net, paths[1])
    return paths


def merge_file(folder: Path) -> dict[str, float]:
    """The command's merge in this process: seconds, and bytes above what the process had."""
    base, adapter, out = make_files(folder / "small", 8, 1, 1)
    run_command("merge", base, adapter, "-o", out)  # what the first call loads does not count
    base, adapter, out = (str(folder / "large" / f"{name}.safetensors") for name in ("base", "adapter", "merged"))
    start = time.perf_counter()
    peak = peak_memory(lambda: run_command("merge", base, adapter, "-o", out))
    return {"seconds": time.perf_counter() - start, "peak": peak}


def file_section() -> Section:
    channels, convolutions, linears = LARGE
    largest = 4 * channels * channels * 9
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # whose memory is given back
            base, adapter, _ = process.submit(make_files, folder / "large", *LARGE).result()
        sizes = {"file": Path(base).stat().st_size, "adapter": Path(adapter).stat().st_size, "largest": largest}
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            measured = process.submit(merge_file, folder).result()
    section = Section(
        "The command's merge of a large file",
        f"A float32 checkpoint of {convolutions} convolutions of {channels} channels, 3x3, and {linears} Linear layers,"
        " an adapter of rank 16 on all of them. MiB; peak: what the command adds to the memory of a process that has"
        " merged before; bound: 1.3 times the largest tensor and the adapter.",
        ("file", "adapter", "largest tensor", "peak", "bound", "seconds"),
    )
    bound = 1.3 * largest + sizes["adapter"]
    figures = [*sizes.values(), measured["peak"], bound]
    section.add(*(f"{f / 2**20:,.1f}" for f in figures), f"{measured['seconds']:.1f}", **sizes, **measured, bound=bound)
    return section


def unet_section() -> Section:
    """What the verbs cost on a UNet of 2.6 billion parameters."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        rows, layers, size = process.submit(measure_unet).result()
    section = Section(
        "The UNet of Stable Diffusion XL",
        f"bfloat16, 2.6 billion parameters; LoCon factors of rank 16 on its {layers} convolutions and Linear layers,"
        f" {size / 1e6:.0f} MB in the file. Seconds of one call; MiB that it adds to the memory of the process at most."
        " Merged, a model holds its fused weights beside those of the base.",
        ("", "seconds", "peak"),
    )
    for verb, (seconds, peak) in rows.items():
        section.add(verb, f"{seconds:.2f}", f"{peak / 2**20:,.0f}", verb=verb, seconds=seconds, peak=peak)
    return section


def measure_unet() -> tuple[dict[str, tuple[float, int]], int, int]:
    from cost import sdxl

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = sdxl().to(torch.bfloat16)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, 0.01)
    rows: dict[str, tuple[float, int]] = {}

    def call(verb: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        peak = peak_memory(run)
        rows[verb] = time.perf_counter() - start, peak

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        call("inject", lambda: convlora.inject(model, "*", rank=16, factors="locon"))
        layers = len(convlora.summary(model).layers)
        call("save", lambda: convlora.save(model, path))
        call("load over it (hot swap)", lambda: convlora.load(model, path))
        call("remove", lambda: convlora.remove(model))
        call("load", lambda: convlora.load(model, path))
        call("merge", lambda: convlora.merge(model))
        call("unmerge", lambda: convlora.unmerge(model))
        return rows, layers, path.stat().st_size


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
    skip: Annotated[list[str] | None, typer.Option(help="Parts to leave out: sizes, unet, file.")] = None,
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Costs of an adapter by number of layers and by rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if part:
        print(memory_of(part))
        return
    left_out = set(skip or [])
    facts = facts_of_run("torch", "convlora", *(() if "unet" in left_out else ("diffusers",)))
    sections = [] if "unet" in left_out else [unet_section()]
    sections += [] if "file" in left_out else [file_section()]
    if "sizes" not in left_out:
        by_size = [table("By number of layers", BY_LAYERS, rounds), table("By rank", BY_RANK, rounds)]
        plot(out.with_suffix(".png"), *by_size)
        sections = [*by_size, *sections]
    for section in sections:
        section.show()
    write_results(out, shlex.join(["python", "benchmarks/scale.py", *sys.argv[1:]]), facts, sections)


if __name__ == "__main__":
    typer.run(main)
