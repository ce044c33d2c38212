"""What an adapter costs besides training: put in, merge, save, load, switch, and what is left when it is off.

    python benchmarks/lifecycle.py

Three questions, each answered side by side in one process (see `common.py` for how time is taken):

1. The verbs on an ESRGAN (spandrel's RRDBNet: 23 blocks, 64 features, 16.7 M parameters, 351 convolutions) at rank 4,
   against PEFT's counterparts. Goal: each faster.
2. A layer whose adapter is switched off, against the stock layer. Goal: at most 3 % over.
3. Whole models merged, merged and removed, removed, against the base. Goal: 1.00 ± 0.02.

And what `import convlora` adds to `import torch`. Goal: at most 0.2 s.
"""

from __future__ import annotations

import copy
import functools
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    Section,
    TimedCase,
    Times,
    calls_that_take,
    facts_of_run,
    milliseconds,
    time_interleaved,
    write_results,
)
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet
from spandrel.architectures.SPAN.__arch.span import SPAN
from torch import nn

import convlora

RANK = 4
FACTORS = ("convlora", "locon")
# The convolutions of RRDBNet as one expression: PEFT goes through a list of names for every module, which takes longer.
PEFT_TARGETS = r"model\.(0|3|6|8|10|1\.sub\.23|1\.sub\.\d+\.RDB\d\.conv\d\.0)"

# --- 1. the verbs -----------------------------------------------------------------------------------------------


def esrgan() -> nn.Module:
    torch.manual_seed(0)
    return RRDBNet(num_filters=64, num_blocks=23, scale=4).eval()


def randomize(model: nn.Module, key: str = "lora_") -> nn.Module:
    """Factors as after training: not zero."""
    for name, parameter in model.named_parameters():
        if key in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def peft_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PEFT_TARGETS)


def verbs(rounds: int) -> Section:
    base = esrgan()
    with tempfile.TemporaryDirectory() as folder:
        times = {verb: time_interleaved(verb, cases, rounds) for verb, cases in _verb_cases(base, Path(folder))}
    section = Section(
        f"Verbs on an ESRGAN, rank {RANK}",
        "Milliseconds: median (interquartile range). Ratios: PEFT over convlora, above 1 convlora is faster; wall time"
        " (CPU time in brackets). Goal: above 1.",
        ("verb", "PEFT's counterpart", "PEFT", *FACTORS, *(f"PEFT / {f}" for f in FACTORS), "goal"),
    )
    for verb, of in times.items():
        *ours, peft = of
        ratios = [of[peft].over(of[name]) for name in ours]
        section.add(
            verb, f"`{peft}`", str(of[peft]), *(str(of[name]) for name in ours),
            *(f"{r.wall:.2f} ({r.cpu:.2f})" for r in ratios), "met" if all(r.wall > 1 for r in ratios) else "missed",
            verb=verb, times={name: times.facts() for name, times in of.items()},
            ratios=dict(zip(ours, map(vars, ratios), strict=True)),
        )  # fmt: skip
    return section


def _verb_cases(base: nn.Module, folder: Path) -> Iterator[tuple[str, list[TimedCase]]]:
    """Per verb the cases of the two factorizations, then PEFT's; factors are random, as after training.

    A generator, since later verbs change the models that earlier ones are timed on.
    """

    def fresh() -> nn.Module:
        return copy.deepcopy(base)

    def adapted(factors: str, name: str = "default") -> nn.Module:
        return randomize(convlora.inject(fresh(), "*", rank=RANK, factors=factors, name=name))

    def file(factors: str) -> Path:
        return folder / f"{factors}.safetensors"

    ours = {factors: adapted(factors) for factors in FACTORS}
    theirs = randomize(get_peft_model(fresh(), peft_config()))

    def cases(run: Any, prepare: Callable[[str], Any], *peft: Any, after: Any = lambda model: None) -> list[TimedCase]:
        """Those of the two factorizations, `run(factors, prepare(factors))`, and PEFT's."""
        ours = [TimedCase(f, functools.partial(run, f), functools.partial(prepare, f), after) for f in FACTORS]
        return [*ours, TimedCase(*peft)]

    def plain(factors: str) -> nn.Module:
        return fresh()

    def merged_peft() -> Any:
        theirs.merge_adapter()
        return theirs

    yield "inject", cases(
        lambda f, m: convlora.inject(m, "*", rank=RANK, factors=f), plain,
        "inject_adapter_in_model", lambda m: inject_adapter_in_model(peft_config(), m), fresh,
    )  # fmt: skip
    for verb, peft_verb, options in (  # convlora refuses non-finite weights by default, PEFT does not look
        ("merge", "merge_adapter", {}), ("merge, both checked", "merge_adapter(safe_merge=True)", {"safe_merge": True}),
    ):  # fmt: skip
        yield verb, cases(
            lambda f, m: convlora.merge(m), ours.get,
            peft_verb, lambda m, options=options: m.merge_adapter(**options), lambda: theirs,
            lambda m: m.unmerge_adapter(), after=convlora.unmerge,
        )  # fmt: skip
    yield "unmerge", cases(
        lambda f, m: convlora.unmerge(m), lambda f: convlora.merge(ours[f]),
        "unmerge_adapter", lambda m: m.unmerge_adapter(), merged_peft,
    )  # fmt: skip
    yield "save", cases(  # with checksum, fingerprint of the base and fsync; PEFT writes tensors and config
        lambda f, m: convlora.save(m, file(f)), ours.get,
        "save_pretrained", lambda m: m.save_pretrained(folder / "peft"), lambda: theirs,
    )  # fmt: skip
    for factors, model in ours.items():  # also where no round of "save" ran
        convlora.save(model, file(factors))
    theirs.save_pretrained(folder / "peft")
    yield "load into a plain model", cases(
        lambda f, m: convlora.load(m, file(f)), plain,
        "from_pretrained", lambda m: PeftModel.from_pretrained(m, folder / "peft"), fresh,
    )  # fmt: skip
    yield "load over an adapter", cases(
        lambda f, m: convlora.load(m, file(f)), ours.get,
        "hotswap_adapter", lambda m: hotswap_adapter(m, str(folder / "peft"), "default"), lambda: theirs,
    )  # fmt: skip
    for factors, model in ours.items():
        convlora.inject(model, "*", rank=RANK, factors=factors, name="second")
    theirs.add_adapter("second", peft_config())

    def switched_peft() -> Any:
        theirs.set_adapter("default")
        return theirs

    yield "activate the other of two", cases(
        lambda f, m: convlora.activate(m, "second"), lambda f: convlora.activate(ours[f], "default"),
        "set_adapter", lambda m: m.set_adapter("second"), switched_peft,
    )  # fmt: skip


# --- 2. one layer, 3. whole models ------------------------------------------------------------------------------


def forwards(
    title: str,
    note: str,
    variants: dict[str, nn.Module],
    x: torch.Tensor,
    rounds: int,
    goals: dict[str, tuple[float, float]],
) -> Section:
    """Forward times of variants over the first of them; `goals`: between which bounds CPU time is to be."""
    section = Section(title, note, ("variant", "ms", "CPU time", "wall time", "IQR of wall", "minima", "goal"))
    first, *_ = variants
    with torch.no_grad():
        calls = calls_that_take(lambda: variants[first](x), seconds=0.02)
        cases = [TimedCase(name, model, lambda: x, calls=calls) for name, model in variants.items()]
        times = time_interleaved(title, cases, rounds)
    for name, of in times.items():
        ratio = of.over(times[first])
        goal = "" if name not in goals else "met" if goals[name][0] <= ratio.cpu <= goals[name][1] else "missed"
        figures = (f"{value:.3f}" for value in (ratio.cpu, ratio.wall, ratio.iqr, ratio.minima))
        data = {"variant": name, "calls_per_round": calls, **of.facts(), "ratio": vars(ratio)}
        section.add(name, milliseconds(of.median), *figures, goal, **data)
    return section


def layer(batch: int, rounds: int) -> Section:
    torch.manual_seed(0)
    stock = nn.Conv2d(64, 64, 3, padding=1).eval()
    variants: dict[str, nn.Module] = {"stock layer": stock, "stock layer, a copy": copy.deepcopy(stock)}
    for state in ("off", "one active"):
        for factors in FACTORS:
            adapted = randomize(convlora.inject(copy.deepcopy(stock), "*", rank=RANK, factors=factors))
            variants[f"{factors}, {state}"] = convlora.activate(adapted, "default" if state == "one active" else [])
    for state in ("off", "one active"):
        wrapped = nn.Sequential(copy.deepcopy(stock))
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), wrapped)
        randomize(wrapped)[0].enable_adapters(state == "one active")
        variants[f"PEFT, {state}"] = wrapped[0].eval()
    return forwards(
        f"A 3×3 layer, 64 channels, 48×48, batch {batch}",
        "Ratios to the first row. Goal: switched off at most 1.03 of its CPU time. The copy shows the noise; active"
        " adapters and PEFT are for information.",
        variants, torch.randn(batch, 64, 48, 48), rounds, {f"{f}, off": (0.0, 1.03) for f in FACTORS},
    )  # fmt: skip


def whole(name: str, base: nn.Module, x: torch.Tensor, rounds: int, exclude: tuple[str, ...] = ()) -> Section:
    def adapted(factors: str) -> nn.Module:
        return randomize(convlora.inject(copy.deepcopy(base), "*", rank=RANK, factors=factors, exclude=exclude))

    variants = {"base": base, "base, a copy": copy.deepcopy(base)}
    variants |= {f"merged ({factors})": convlora.merge(adapted(factors)) for factors in FACTORS}
    variants["merged and removed"] = convlora.remove(convlora.merge(adapted(FACTORS[0])))
    variants["removed"] = convlora.remove(adapted(FACTORS[0]))
    goals = dict.fromkeys(list(variants)[2:], (0.98, 1.02))
    return forwards(
        f"{name}, input {'×'.join(map(str, x.shape))}",
        "Ratios to the first row. Goal: 1.00 ± 0.02 of its CPU time. The copy shows the noise.",
        variants, x, rounds, goals,
    )  # fmt: skip


# --- import -----------------------------------------------------------------------------------------------------

_IMPORT = (
    "import time, torch; w, c = time.perf_counter(), time.process_time(); import convlora;"
    "print(time.perf_counter() - w, time.process_time() - c)"
)


def import_time(rounds: int) -> Section:
    times = Times()
    for i in range(rounds + 1):
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        wall, cpu = map(float, done.stdout.split())
        if i > 0:  # the first writes bytecode
            times.wall.append(wall)
            times.cpu.append(cpu)
    section = Section(
        "`import convlora` after `import torch`", "Milliseconds, each in a fresh interpreter. Goal: at most 200.",
        ("", "median", "IQR", "CPU time", "goal"),
    )  # fmt: skip
    figures = (times.median, times.iqr, statistics.median(times.cpu))
    goal = "met" if times.median <= 0.2 else "missed"
    section.add("import", *map(milliseconds, figures), goal, **times.facts())
    return section


# --- the program ------------------------------------------------------------------------------------------------


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each verb; forwards get more.", min=1)] = 11,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, to see that it runs; writes nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "lifecycle.json",
    threads: Annotated[int, typer.Option(help="Threads of torch; 1 is the most stable.", min=1)] = 1,
) -> None:
    """What an adapter costs besides training, next to PEFT."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # adapters larger than their layer, the first and the last here, are no news
    rounds = 3 if quick else rounds
    facts = facts_of_run("convlora", "torch", "peft", "spandrel", "safetensors")
    questions: list[Callable[[], Section]] = [
        lambda: verbs(rounds),
        lambda: layer(1, rounds * 10),
        lambda: layer(4, rounds * 10),
        lambda: whole("ESRGAN", esrgan(), torch.rand(1, 3, 32, 32), rounds * 2),
        lambda: whole(
            "SPAN", SPAN(num_in_ch=3, num_out_ch=3).eval(), torch.rand(1, 3, 32, 32), rounds * 10, ("*eval_conv",)
        ),
        lambda: import_time(min(rounds, 10)),
    ]
    sections = []
    for question in questions:
        sections.append(question())
        sections[-1].show()
    if not quick:
        options = [f"--rounds {rounds}"] * (rounds != 11) + [f"--threads {threads}"] * (threads != 1)
        write_results(out, " ".join(["python benchmarks/lifecycle.py", *options]), facts, sections)


if __name__ == "__main__":
    typer.run(main)
