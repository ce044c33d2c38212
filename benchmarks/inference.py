"""Inference with live adapters: what they cost, how fast one takes the place of another, several in one batch.

    python benchmarks/inference.py

1. A forward with an adapter that is neither merged nor training, against the base. The effective weights are formed
   once and kept; beside it, formed in every call.
2. Switching between two adapters on an ESRGAN of 16.7 M parameters (goal: below 5 ms), the forward after it, and how
   often a compiled model is compiled again when a file is loaded over its adapter (goal: never).
3. Four samples with four adapters in one forward (`per_sample`), against switching and running each alone (goal: less).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    Section,
    TimedCase,
    calls_that_take,
    facts_of_run,
    milliseconds,
    time_interleaved,
    write_results,
)
from spandrel.architectures.ESRGAN import ESRGAN
from sr.models import new_span
from torch import Tensor, nn

import convlora
from convlora.layer.adapted import slot_of
from convlora.model.traversal import adapted_layers

RANK = 4
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SPAN-26": (lambda: new_span(26), (1, 3, 48, 48)),
    "ESRGAN, 23 blocks": (lambda: ESRGAN(num_filters=64, num_blocks=23), (1, 3, 16, 16)),
}


def adapted(make: Callable[[], nn.Module], names: list[str], factors: str = "locon") -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for name in names:
        convlora.inject(model, "*", rank=RANK, factors=factors, name=name)
        for parameter in convlora.parameters(model, name):
            nn.init.normal_(parameter, std=0.01)
    return convlora.activate(model, names[0]) if names else model


@torch.no_grad()
def live(rounds: int) -> Section:
    section = Section(
        "A forward with a live adapter",
        f"LoCon factors of rank {RANK} on every convolution; over the base's forward: median of {rounds} rounds "
        "(interquartile range).",
        ("net", "base, ms", "a second copy of the base", "merged", "live", "live, formed in every call"),
    )
    for name, (make, shape) in NETS.items():
        x = torch.rand(shape)
        models = {
            "base": adapted(make, []), "copy": adapted(make, []), "merged": convlora.merge(adapted(make, ["a"])),
            "live": adapted(make, ["a"]), "formed": adapted(make, ["a"]),
        }  # fmt: skip
        slots = [slot_of(layer) for layer in adapted_layers(models["formed"]).values()]

        def formed(_: Any, x: Tensor = x, model: nn.Module = models["formed"], slots: list[Any] = slots) -> None:
            for slot in slots:
                slot._fused.clear()
            model(x)

        calls = calls_that_take(lambda x=x, model=models["base"]: model(x), 0.1)
        cases = [
            TimedCase(key, formed if key == "formed" else lambda _, x=x, model=model: model(x), calls=calls)
            for key, model in models.items()
        ]
        times = time_interleaved(name, cases, rounds)
        over = {key: times[key].over(times["base"]) for key in models if key != "base"}
        section.add(
            name, milliseconds(times["base"].median), *map(str, over.values()),
            net=name, base=times["base"].facts(), **{key: vars(ratio) for key, ratio in over.items()},
        )  # fmt: skip
    return section


@torch.no_grad()
def switching(rounds: int) -> Section:
    section = Section(
        "Switching on an ESRGAN of 16.7 M parameters, 351 layers",
        f"Milliseconds, median of {rounds} rounds (interquartile range); input {NETS['ESRGAN, 23 blocks'][1]}.",
        ("step", "ms"),
    )
    make, shape = NETS["ESRGAN, 23 blocks"]
    model, x = adapted(make, ["a", "b"]), torch.rand(shape)
    names = itertools.cycle(["b", "a"])

    def switch() -> None:
        convlora.activate(model, next(names))

    cases = [
        TimedCase("activate the other adapter", lambda _: switch()),
        TimedCase("the first forward after it", lambda _: model(x), prepare=switch),
        TimedCase("a later forward", lambda _: model(x), prepare=lambda: model(x)),
    ]
    times = time_interleaved("switching", cases, rounds)
    for case in cases:
        section.add(case.name, str(times[case.name]), step=case.name, **times[case.name].facts())
    again, what = recompilations(), "compilations again after loading a file over the adapter of a compiled SPAN"
    section.add(what, str(again), step="recompilations", count=again)
    return section


def recompilations() -> int:
    """How often a compiled model is compiled again by three hot swaps and changes of strength."""
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch.compiler.reset()
    model, x = adapted(lambda: new_span(8), ["a"]), torch.rand(1, 3, 16, 16)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "a.safetensors"
        convlora.save(model, path)
        fast(x)
        first = compiled
        for strength in (1.0, 0.5, 0.25):
            convlora.load(model, path)
            convlora.activate(model, {"a": strength})
            fast(x)
    return compiled - first


@torch.no_grad()
def several(rounds: int) -> Section:
    names = ["a", "b", "c", "d"]
    section = Section(
        "Four samples, four adapters",
        f"SPAN, 4x3x48x48, LoCon factors of rank {RANK}; medians of {rounds} rounds. Over per_sample: median of the "
        "rounds' ratios (interquartile range). Each alone: activate one, run its sample, and so on; batch of one "
        "adapter: all four samples with the same.",
        ("net", "per_sample, ms", "each alone", "batch of one adapter", "largest difference"),
    )
    for channels in (26, 48):
        model, x = adapted(lambda channels=channels: new_span(channels), names), torch.rand(4, 3, 48, 48)

        def alone(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return torch.cat([convlora.activate(model, name)(row[None]) for name, row in zip(names, x, strict=True)])

        def together(model: nn.Module = model, x: Tensor = x) -> Tensor:
            with convlora.per_sample(model, names):
                return model(x)  # type: ignore[no-any-return]

        same = adapted(lambda channels=channels: new_span(channels), names)
        difference = float((alone() - together()).abs().max())
        cases = [
            TimedCase("together", lambda _, run=together: run()),
            TimedCase("alone", lambda _, run=alone: run()),
            TimedCase("same", lambda _, model=same, x=x: model(x)),
        ]
        times = time_interleaved(f"SPAN-{channels}", cases, rounds)
        over = {key: times[key].over(times["together"]) for key in ("alone", "same")}
        section.add(
            f"SPAN-{channels}", milliseconds(times["together"].median),
            *(f"{r.wall:.2f} ({r.iqr:.2f})" for r in over.values()), f"{difference:.0e}",
            net=f"SPAN-{channels}", together=times["together"].facts(), difference=difference,
            **{key: vars(ratio) for key, ratio in over.items()},
        )  # fmt: skip
    return section


def main(
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.", min=1)] = 25,
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "inference.json",
) -> None:
    """Inference with live adapters."""
    torch.set_num_threads(threads)
    start = time.monotonic()
    facts = facts_of_run("torch", "convlora", "spandrel")
    sections = [live(rounds), switching(rounds), several(rounds)]
    for section in sections:
        section.show()
    print(f"{time.monotonic() - start:.0f} s")
    write_results(out, f"python benchmarks/inference.py --threads {threads}", facts, sections)


if __name__ == "__main__":
    typer.run(main)
