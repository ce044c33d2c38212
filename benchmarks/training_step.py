"""What a training step costs with adapters: against the frozen net, full fine-tuning, PEFT, LyCORIS and loralib.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda            # every mode, into training_step_cuda.md
    python benchmarks/training_step.py --device cuda --dry-run  # each path once on a small net, on any machine

A step is forward and backward to the adapters and to the input. The floor is the frozen net, forward and input gradient
alone; everything else is a ratio to it. An adapter of LoCon factors needs r/out + r/(in·k²) of a layer's forward and
input gradient besides (convlora/thin.py says why): summed over the net that is the bound of its row. Forming the
gradient of whole weights, as full fine-tuning must, costs 1.5 at any rank.

All cases of a net run once a round, interleaved (see `common.py`), each net in a process of its own. Kept: bytes that
a forward keeps for its backward, besides parameters. Peak: what one step adds to the memory of a process.
"""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import loralib
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
from contestants import floor, full, lora, lycoris, ours, peft
from counting import saved_bytes
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from sr.models import new_span
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

import convlora
from convlora.layer import forms

Layers = nn.Conv2d | nn.Linear


MODES = ("float32", "tf32", "bfloat16", "channels_last", "compiled", "graphs")


@dataclass(frozen=True)
class Setting:
    """Where and how a step runs.

    Args:
        device: "cpu" or "cuda".
        mode: "float32"; "tf32", its products; "bfloat16", by autocast; "channels_last"; "compiled"; "graphs": compiled,
            and replayed as CUDA graphs.
        dry: compile without generating code, so that each path runs once on any machine.
    """

    device: str = "cpu"
    mode: str = "float32"
    dry: bool = False

    def put(self, model: nn.Module, x: Tensor) -> tuple[Any, nn.Module, Tensor]:
        """What is called, the model, and the input that gets a gradient."""
        last = {"memory_format": torch.channels_last} if self.mode == "channels_last" else {}
        model, x = model.to(self.device, **last), x.to(self.device, **last).requires_grad_()
        if self.mode not in ("compiled", "graphs"):
            return model, model, x
        torch.compiler.reset()
        how = {"backend": "aot_eager"} if self.dry else {"mode": "reduce-overhead" if self.mode == "graphs" else None}
        return torch.compile(model, **how), model, x

    def __enter__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.mode == "tf32"

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.mode == "bfloat16")


@dataclass(frozen=True)
class Net:
    """A network, an input, the layer types that are adapted, and the ranks that are tried."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kinds: type[nn.Module] | Any = Layers
    ranks: tuple[int, ...] | None = None  # of a large net not all

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # spandrel's SwinIR calls meshgrid the old way
            model = self.make().eval()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        return model

    def layers(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if isinstance(module, self.kinds)]


def swinir(channels: int, depths: tuple[int, ...]) -> nn.Module:
    return SwinIR(
        img_size=48, embed_dim=channels, depths=depths, num_heads=[6] * len(depths), window_size=8, mlp_ratio=2.0,
        upscale=4, upsampler="pixelshuffledirect",
    )  # fmt: skip


NETS = {
    "SPAN-26": Net(lambda: new_span(26), (4, 3, 48, 48)),
    "SPAN-48": Net(lambda: new_span(48), (4, 3, 48, 48)),
    "RRDB, 3 blocks": Net(lambda: ESRGAN(num_filters=64, num_blocks=3), (2, 3, 32, 32)),
    "RRDB, 23 blocks": Net(lambda: ESRGAN(num_filters=64, num_blocks=23), (1, 3, 32, 32), ranks=(4, 8)),
    "SwinIR-60, convs": Net(lambda: swinir(60, (6, 6)), (1, 3, 48, 48), nn.Conv2d),
    "SwinIR-60, all": Net(lambda: swinir(60, (6, 6)), (1, 3, 48, 48)),
    "SwinIR-180, convs": Net(lambda: swinir(180, (6,)), (1, 3, 48, 48), nn.Conv2d, (4, 8)),
    "SwinIR-180, all": Net(lambda: swinir(180, (6,)), (1, 3, 48, 48), ranks=(4, 8)),
    "ResNet-50": Net(resnet50, (4, 3, 96, 96)),
    "MobileNet-v2": Net(mobilenet_v2, (4, 3, 96, 96)),
}


WEIGHED = ("SPAN-48", "RRDB, 3 blocks", "SwinIR-60, all")  # whose memory is measured, at rank 4


# --- the contestants ----------------------------------------------------------------------------------------------


def form_of(contestant: str) -> AbstractContextManager[Any]:
    """A block in which the library takes the plain composite for every layer, if that is the contestant."""
    if contestant != "composite":
        return nullcontext()
    return mock.patch.multiple(forms, **dict.fromkeys(("LEAST_WORK", "HEAVY", "WIDE", "FEW_PATCHES"), float("inf")))


FIXED = {"floor": floor, "full": full}
RANKED: dict[str, Callable[[nn.Module, list[str], int], nn.Module]] = {
    "PEFT": peft,
    "LyCORIS": lycoris,
    "loralib": lora,
    "convlora": ours("convlora"),
    "composite": ours("locon"),
    "locon": ours("locon"),
}


def step_of(
    name: str, contestant: str, rank: int, setting: Setting = Setting()
) -> tuple[Callable[[], None], nn.Module, Tensor]:
    """A step of forward and backward, its model, and its input."""
    net = NETS[name]
    model = net.build()
    names = net.layers(model)
    model = {**FIXED, **RANKED}[contestant](model, names, rank).eval()
    for layer in model.modules():
        if isinstance(layer, loralib.LoRALayer):
            layer.train()  # in eval mode they are merged, and get no gradient
    if contestant in ("convlora", "composite", "locon"):
        for parameter in convlora.parameters(model):
            nn.init.normal_(parameter, std=0.01)
    called, model, x = setting.put(model, torch.rand(net.shape))

    def run() -> None:
        with setting, form_of(contestant):
            model.zero_grad(set_to_none=True)
            x.grad = None
            with setting.autocast():
                y = called(x)
            y.float().square().mean().backward()

    return run, model, x


# --- bound and memory ---------------------------------------------------------------------------------------------


def bound(name: str, rank: int) -> float:
    """Multiplications of the adapters' gradients over those of all layers' forward and input gradient, plus 1."""
    model, net = NETS[name].build(), NETS[name]
    chosen = set(net.layers(model))
    works: list[tuple[float, float]] = []

    def note(layer: Any, inputs: Any, output: Tensor, adapted: bool) -> None:
        out, inner = len(layer.weight), layer.weight[0].numel()
        channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
        work = output.numel() / channels * out * inner
        works.append((work, work * (rank / out + rank / inner) if adapted else 0.0))

    for path, layer in model.named_modules():
        if isinstance(layer, Layers):
            layer.register_forward_hook(lambda *given, adapted=path in chosen: note(*given, adapted=adapted))
    with torch.no_grad():
        model(torch.rand(net.shape))
    return 1 + sum(extra for _, extra in works) / sum(work for work, _ in works)


def peak_on_gpu(run: Callable[[], None]) -> int:
    """Bytes of GPU memory that a step takes at most, above what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def kept_bytes(model: nn.Module, x: Tensor, contestant: str) -> int:
    """Bytes that autograd keeps for the backward, see `counting.saved_bytes`."""
    with form_of(contestant):
        return saved_bytes(model, lambda: model(x))


def peak_of(name: str, contestant: str, rank: int, threads: int) -> int:
    return int(*in_new_process(__file__, "--threads", str(threads), "--measure", f"{name}|{contestant}|{rank}"))


# --- the table ----------------------------------------------------------------------------------------------------


def settle(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)


def measure_net(name: str, ranks: list[int], rounds: int, threads: int, memory: bool) -> tuple[list[Any], list[Any]]:
    settle(threads)
    wanted = [("floor", 0), ("full", 0), *((contestant, rank) for rank in ranks for contestant in RANKED)]
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    kept: dict[tuple[str, int], int] = {}
    failures: dict[tuple[str, int], str] = {}
    for contestant, rank in wanted:
        try:
            run, model, x = step_of(name, contestant, rank)
            run()
            kept[contestant, rank] = kept_bytes(model, x, contestant)
            steps[contestant, rank] = run
        except Exception as error:
            if contestant in ("floor", "full", "convlora", "composite", "locon"):
                raise
            failures[contestant, rank] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    cases = [TimedCase(f"{contestant}|{rank}", lambda _, run=run: run()) for (contestant, rank), run in steps.items()]
    times = time_interleaved(name, cases, rounds)
    base = times["floor|0"]
    rows, data = [], []
    full_over = times["full|0"].over(base)
    for rank in ranks:
        over = {c: times[f"{c}|{rank}"].over(base) for c in RANKED if (c, rank) in steps}
        least = bound(name, rank)
        to_peft = times[f"PEFT|{rank}"].over(times[f"locon|{rank}"]).wall if ("PEFT", rank) in steps else None
        rows.append((
            name, str(rank), milliseconds(base.median), f"{full_over.wall:.2f}",
            *(f"{over[c].wall:.2f}" if c in over else "fails" for c in RANKED),
            f"{over['locon'].iqr:.2f}", f"{least:.3f}", f"{over['locon'].wall / least:.2f}",
            f"{to_peft:.2f}" if to_peft else "",
        ))  # fmt: skip
        data.append({
            "net": name, "rank": rank, "threads": threads, "floor": base.facts(), "full": vars(full_over),
            "over_floor": {c: vars(ratio) for c, ratio in over.items()}, "bound": least,
            "failures": {c: text for (c, r), text in failures.items() if r == rank},
        })  # fmt: skip
    memories = []
    if memory:
        rank = 4
        for contestant in ("floor", "full", "PEFT", "LyCORIS", "loralib", "convlora", "composite", "locon"):
            key = (contestant, 0 if contestant in FIXED else rank)
            if key in kept:
                memories.append((name, *key, kept[key], peak_of(name, *key, threads)))
    return [rows, data], memories


def on_gpu(modes: list[str], nets: list[str], ranks: list[int], rounds: int, dry: bool, out: Path | None) -> None:
    """The table of every mode on a GPU; dry, one round of a small net, and nothing is written."""
    settle(torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not dry:
        raise SystemExit("no GPU; --dry-run runs every path on a CPU")
    facts = facts_of_run("torch", "convlora", "peft", "lycoris-lora", "loralib", "spandrel", "torchvision")
    facts["gpu"] = torch.cuda.get_device_name() if device == "cuda" else None
    if dry:
        nets, ranks, rounds = ["SPAN-26"], ranks[:1], 1
    columns = ("net", "rank", "floor, ms", "full", *RANKED, "peak MiB: floor", "full", *RANKED)
    notes = (
        f"Medians of {rounds} interleaved rounds over the floor's; peak memory of a step above weights and adapters."
    )
    sections = [Section(f"A training step on a GPU, {mode}", notes, columns) for mode in modes]
    for mode, section in zip(modes, sections, strict=True):
        for name in nets:
            for rank in ranks if NETS[name].ranks is None else [r for r in ranks if r in NETS[name].ranks]:
                section.rows.append(gpu_row(name, rank, Setting(device, mode, dry), rounds))
                print(mode, *section.rows[-1], sep=" | ", flush=True)
                if not dry:
                    command = shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
                    written = [part for part in sections if part.rows]
                    write_results(out or RESULTS / "training_step_cuda.json", command, facts, written)


def gpu_row(name: str, rank: int, setting: Setting, rounds: int) -> tuple[str, ...]:
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for contestant in (*FIXED, *RANKED):
        try:
            run, _, _ = step_of(name, contestant, rank, setting)
            run()
            peaks[contestant] = peak_on_gpu(run) if setting.device == "cuda" else 0
            steps[contestant] = run
        except Exception:
            if contestant in ("floor", "full", "convlora", "composite", "locon"):
                raise
    cases = [TimedCase(contestant, lambda _, run=run: run()) for contestant, run in steps.items()]
    times = time_interleaved(f"{name}, {setting.mode}", cases, rounds)
    base = times["floor"]
    over = [f"{times[c].over(base).wall:.2f}" if c in times else "fails" for c in ("full", *RANKED)]
    memory = [f"{peaks[c] / 2**20:.0f}" if c in peaks else "" for c in (*FIXED, *RANKED)]
    return name, str(rank), milliseconds(base.median), *over, *memory


def main(
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; may be repeated, else 1 and 2.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.", min=1)] = 7,
    net: Annotated[list[str] | None, typer.Option(help="Networks, else all.")] = None,
    ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "2,4,8,16",
    out: Annotated[Path | None, typer.Option(help="Results as JSON, and beside it as Markdown.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: every mode, memory of the GPU.")] = "cpu",
    mode: Annotated[list[str] | None, typer.Option(help=f"On a GPU, of {', '.join(MODES)}; else all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Each path once, on a small net; no results.")] = False,
    measure: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """A training step with adapters beside the frozen net and other libraries."""
    if measure:
        settle((threads or [1])[0])
        name, contestant, rank = measure.split("|")
        print(peak_memory(step_of(name, contestant, int(rank))[0]))
        return
    if device != "cpu" or dry_run:
        on_gpu(mode or list(MODES), net or list(NETS), [int(rank) for rank in ranks.split(",")], rounds, dry_run, out)
        return
    out = out or RESULTS / "training_step.json"
    facts = facts_of_run("torch", "convlora", "peft", "lycoris-lora", "loralib", "spandrel", "torchvision")
    command = shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
    chosen = [int(rank) for rank in ranks.split(",")]
    counts = threads or [1, 2]
    times = [step_section(count, rounds) for count in counts]
    memory = Section(
        "Memory",
        "MiB that a forward keeps for its backward (parameters apart), and that one step adds to a process.",
        ("net", "contestant", "rank", "kept", "peak"),
    )
    sections = [*times, memory]
    for count, section in zip(counts, times, strict=True):
        for name in net or NETS:
            tried = [rank for rank in chosen if rank in (NETS[name].ranks or chosen)]
            if count > counts[0]:
                tried = [rank for rank in tried if rank in (4, 8)]
            weigh = count == counts[0] and name in WEIGHED and 4 in tried
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                (rows, data), weights = process.submit(measure_net, name, tried, rounds, count, weigh).result()
            section.rows += rows
            section.data += data
            for net_name, contestant, rank, kept, peak in weights:
                memory.add(
                    net_name, contestant, str(rank or ""), f"{kept / 2**20:.1f}", f"{peak / 2**20:.0f}",
                    net=net_name, contestant=contestant, rank=rank, kept=kept, peak=peak,
                )  # fmt: skip
            for row in rows:
                print(*row, sep=" | ", flush=True)
            write_results(out, command, facts, [part for part in sections if part.rows])
    for section in sections:
        if section.rows:
            section.show()


def step_section(threads: int, rounds: int) -> Section:
    return Section(
        f"A training step, {threads} thread{'s' if threads > 1 else ''}",
        f"Medians of {rounds} interleaved rounds. Times over the floor's (ms, the frozen net): all weights, PEFT, "
        "LyCORIS, loralib and convlora factors (the same ones), LoCon factors as the plain composite, and as they "
        "are (with the interquartile range of the ratio). Goal of the last but one column: 1.15 up to rank 8.",
        ("net", "rank", "floor, ms", "full", *(c if c != "locon" else "**locon**" for c in RANKED), "±", "bound",
         "locon / bound", "PEFT / locon"),
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
