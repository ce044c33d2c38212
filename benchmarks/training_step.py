"""What a training step costs with adapters: against the frozen net, full fine-tuning, PEFT, LyCORIS and loralib.

    python benchmarks/training_step.py

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
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, inject_adapter_in_model
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from sr.models import new_span
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

import convlora
from convlora.layer import forms

Layers = nn.Conv2d | nn.Linear


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


def floor(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    return model.requires_grad_(False)


def full(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return model


def peft(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)


def lycoris(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    LycorisNetwork.apply_preset({"target_module": [], "target_name": names, "enable_conv": True})
    network = create_lycoris(
        model, 1.0, linear_dim=rank, linear_alpha=rank, conv_dim=rank, conv_alpha=rank, algo="lora"
    )
    network.apply_to()
    model.register_module("lycoris", network)
    return model


def lora(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    """Microsoft's loralib, whose layers take the place of those of the net."""
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        has_bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            new = loralib.Linear(layer.in_features, layer.out_features, r=rank, lora_alpha=rank, bias=has_bias)
        else:
            new = loralib.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size[0], r=rank, lora_alpha=rank, bias=has_bias,
                stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
            )  # fmt: skip
        for parameter in new.parameters():
            parameter.requires_grad_(False)
        for part, parameter in new.named_parameters():
            parameter.requires_grad_("lora_" in part)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    return model


def ours(factors: str) -> Callable[[nn.Module, list[str], int], nn.Module]:
    def put(model: nn.Module, names: list[str], rank: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", convlora.ConvLoRAWarning)  # depthwise: more parameters than the layer
            return convlora.inject(model, [f"re:{name}" for name in names], rank=rank, factors=factors)

    return put


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


def step_of(name: str, contestant: str, rank: int) -> tuple[Callable[[], None], nn.Module, Tensor]:
    """A step of forward and backward, its model, and its input."""
    net = NETS[name]
    model = net.build()
    names = net.layers(model)
    model = {**FIXED, **RANKED}[contestant](model, names, rank).eval()
    x = torch.rand(net.shape, requires_grad=True)
    for layer in model.modules():
        if isinstance(layer, loralib.LoRALayer):
            layer.train()  # in eval mode they are merged, and get no gradient
    if contestant in ("convlora", "composite", "locon"):
        for parameter in convlora.parameters(model):
            nn.init.normal_(parameter, std=0.01)

    def run() -> None:
        with form_of(contestant):
            model.zero_grad(set_to_none=True)
            x.grad = None
            model(x).square().mean().backward()

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


def kept_bytes(model: nn.Module, x: Tensor, contestant: str) -> int:
    """Bytes of all that autograd keeps for the backward, parameters and buffers apart, shared memory once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # or the memory of one is given to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), form_of(contestant):
        model(x)
    return sum(found.values())


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


def main(
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; may be repeated, else 1 and 2.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.", min=1)] = 7,
    net: Annotated[list[str] | None, typer.Option(help="Networks, else all.")] = None,
    ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "2,4,8,16",
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS
    / "training_step.json",
    measure: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """A training step with adapters beside the frozen net and other libraries."""
    if measure:
        settle((threads or [1])[0])
        name, contestant, rank = measure.split("|")
        print(peak_memory(step_of(name, contestant, int(rank))[0]))
        return
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
