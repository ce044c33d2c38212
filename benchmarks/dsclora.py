"""DSCLoRA on SPAN: does ConvLoRA with distillation beat the network it starts from, at the same inference graph?

    python benchmarks/dsclora.py DATA --base span_x4_c26=examples/weights/span_x4_c26.safetensors --base ...

Four questions, every answer from runs of equal length on the same patches:

1. The paper's table (arXiv 2504.11271) by our means, clean x4: base; all weights fine-tuned; ConvLoRA on L1; with L1 to
   the teacher; with spatial affinity. Several seeds, Set5 and BSDS val.
2. The regime: one thing changed at a time (learning rate, steps, patch, weights of the loss), one seed, judged on
   photos kept out of training and on Set5.
3. Robust: degraded input for the student, the clean image for the teacher. Does affinity help there?
4. Another teacher: a network trained less far learns from one trained further. Does affinity help there?

And what is left at inference: parameters, operations and time of the merged network beside the base's. DATA holds
`bsds/train`, `bsds/val` and `set5/HR` (photos as BSDS500 and Set5 have them). Every run is written to `--runs` when it
ends and not repeated if the file has it, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, Section, TimedCase, facts_of_run, time_interleaved, write_results
from sr.data import Patches
from sr.distillation import Distillation, inject_dsclora
from sr.models import load_span
from torch.utils.flop_counter import FlopCounterMode
from trials import (
    Result,
    count_parameters,
    mean_and_deviation,
    named_paths,
    photo_pairs,
    psnr_and_ssim,
    results_of_all,
    set_up_training,
    train_for,
)  # fmt: skip

import convlora

JUDGED = {"set5": "Set5", "val": "BSDS val", "kept out": "kept out"}


@dataclass(frozen=True)
class Run:
    """One training: everything that its result depends on."""

    base: str
    high: float = 1.0  # λ1
    teacher: float = 0.0  # λ2
    affinity: float = 0.0  # λ3
    full: bool = False
    rate: float = 1e-3
    steps: int = 300
    patch: int = 32
    batch: int = 8
    seed: int = 0
    degradation: str = "clean"
    clean_teacher: bool = False
    by: str = ""  # the teacher, else the base itself
    judged: tuple[str, ...] = ("set5", "val")


METHODS: dict[str, dict[str, float | bool]] = {
    "all weights, L1": {"full": True, "rate": 5e-5},
    "ConvLoRA, L1": {},
    "+ L1 to the teacher": {"teacher": 0.2},
    "+ affinity": {"teacher": 0.2, "affinity": 0.02},
}
BETTER: dict[str, dict[str, float | bool]] = {
    "ConvLoRA, L1": {},
    "+ L1 to the teacher": {"teacher": 1.0},
    "+ affinity 0.1": {"affinity": 0.1},
    "+ affinity 1": {"affinity": 1.0},
    "+ both": {"teacher": 1.0, "affinity": 0.1},
}
SWEEPS: dict[str, dict[str, list[float]]] = {
    "rate": {"rate": [3e-4, 1e-3, 3e-3]},
    "steps": {"steps": [150, 300, 600]},
    "patch": {"patch": [24, 32, 48]},
    "teacher": {"teacher": [0.05, 0.1, 0.2, 0.5]},
    "affinity": {"affinity": [0.02, 0.1, 1.0]},
}
ROBUST: dict[str, dict[str, float | bool]] = {
    "ConvLoRA, L1": {},
    "+ affinity 0.02, teacher sees the clean image": {"affinity": 0.02, "clean_teacher": True},
    "+ affinity 0.1, teacher sees the clean image": {"affinity": 0.1, "clean_teacher": True},
    "+ affinity 0.1, teacher sees the same": {"affinity": 0.1},
}


# --- one run --------------------------------------------------------------------------------------------------------


def carry_out(run: Run, data: Path, bases: dict[str, Path]) -> Result:
    """Train, merge, remove, judge."""
    set_up_training(run.seed)
    model, _ = load_span(bases[run.base])
    teacher = load_span(bases[run.by])[0].requires_grad_(False) if run.by else None
    result: Result = {"base_parameters": count_parameters(model.parameters())}
    parameters = list(model.parameters()) if run.full else convlora.parameters(inject_dsclora(model))
    if run.steps:
        patches = Patches(photo_pairs(data, "train", run.degradation), patch=run.patch, batch=run.batch, seed=run.seed)
        loss = Distillation(run.high, run.teacher, run.affinity, run.clean_teacher, teacher)
        result["seconds"] = train_for(run.steps, run.rate, model, parameters, patches, make_loss=loss).seconds
    if not run.full:
        convlora.remove(convlora.merge(model))
    result |= {
        "trained_parameters": count_parameters(parameters),
        "merged_parameters": count_parameters(model.parameters()),
    }
    return result | {name: psnr_and_ssim(model, photo_pairs(data, name, run.degradation)) for name in run.judged}


# --- the tables -------------------------------------------------------------------------------------------------------


def base_run(base: str, run: Run) -> Run:
    """The base itself: the run without a step."""
    return Run(base, full=True, steps=0, degradation=run.degradation, judged=run.judged)


def table(title: str, note: str, rows: dict[tuple[str, str], list[Run]], found: dict[Run, Result]) -> Section:
    """One line per (base, method), means over seeds with their standard deviation, and the gain over the base."""
    judged = next(iter(rows.values()))[0].judged
    columns = [f"{JUDGED[name]} {what}" for name in judged for what in ("PSNR-Y", "gain", "SSIM-Y")]
    section = Section(title, note, ("base", "method", "trained", *columns))
    for (base, method), runs in rows.items():
        results = [found[run] for run in runs]
        unchanged = found[base_run(base, runs[0])]
        cells, data = [], {"base": base, "method": method, "runs": [dataclasses.asdict(run) for run in runs]}
        for name in judged:
            psnr, ssim = zip(*(result[name] for result in results), strict=True)
            gains = [value - unchanged[name][0] for value in psnr]
            cells += [f"{statistics.mean(psnr):.3f}", mean_and_deviation(gains) if runs[0].steps else ""]
            cells += [f"{statistics.mean(ssim):.4f}"]
            data |= {f"{name} psnr": psnr, f"{name} ssim": ssim, f"{name} gain": statistics.mean(gains)}
        first = results[0]
        trained = first["trained_parameters"] if runs[0].steps else 0
        share = f"{trained:,} ({trained / first['base_parameters']:.0%})" if trained else ""
        data |= {"trained_parameters": trained, "seconds": [result.get("seconds") for result in results]}
        section.add(base, method, share, *cells, **data)
    return section


def with_bases(rows: dict[tuple[str, str], list[Run]]) -> dict[tuple[str, str], list[Run]]:
    """The rows, each base before those that start from it."""
    result: dict[tuple[str, str], list[Run]] = {}
    for (base, method), runs in rows.items():
        result.setdefault((base, "base"), [base_run(base, runs[0])])
        result[base, method] = runs
    return result


def rows_of(
    methods: Mapping[str, Mapping[str, Any]], base: str, seeds: int, **common: Any
) -> dict[tuple[str, str], list[Run]]:
    """One row for each method, with a run for each seed."""
    return {
        (base, name): [Run(base, seed=seed, **common, **method) for seed in range(seeds)]
        for name, method in methods.items()
    }


def sweep_rows(base: str) -> dict[tuple[str, str], list[Run]]:
    """ConvLoRA with L1 to the teacher and without, one setting changed at a time."""
    rows = {}
    for sweep in SWEEPS.values():
        for setting, values in sweep.items():
            for value in values:
                weights = [{}] if setting in ("teacher", "affinity") else [{}, {"teacher": 0.2}]
                for weight in weights:
                    name = f"{setting} {value:g}" + (", L1 to the teacher 0.2" if weight else "")
                    run = Run(base, **{**weight, setting: value}, judged=("kept out", "set5"))  # type: ignore[arg-type]
                    rows[base, name] = [run]
    everything = Run(base, teacher=1.0, affinity=1.0, judged=("kept out", "set5"))
    return rows | {(base, "all three weights 1"): [everything]}


def inference(bases: dict[str, Path], rounds: int) -> Section:
    """Parameters, operations and time of the merged network beside the base's."""
    section = Section(
        "What is left at inference",
        "Input 1x3x96x128, one thread. Operations: multiplications and additions, by PyTorch's counter. Time: merged "
        "and removed over base, median of the rounds' ratios.",
        ("base", "parameters", "merged", "GFLOP", "merged", "ms", "merged / base"),
    )
    x = torch.rand(1, 3, 96, 128)
    for name, path in bases.items():
        base, adapted = load_span(path)[0].eval(), inject_dsclora(load_span(path)[0]).eval()
        with torch.no_grad():
            for parameter in convlora.parameters(adapted):
                parameter.normal_(std=0.01)
        models = {"base": base, "merged": convlora.remove(convlora.merge(adapted))}
        operations = {}
        for kind, model in models.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x)
            operations[kind] = counter.get_total_flops()
        cases = [TimedCase(kind, torch.no_grad()(lambda _, m=m: m(x)), calls=4) for kind, m in models.items()]
        times = time_interleaved(name, cases, rounds)
        ratio = times["merged"].over(times["base"])
        sizes = {kind: count_parameters(model.parameters()) for kind, model in models.items()}
        section.add(
            name, f"{sizes['base']:,}", f"{sizes['merged']:,}",
            *(f"{operations[kind] / 1e9:.3f}" for kind in ("base", "merged")),
            f"{times['base'].median * 1e3:.1f}", f"{ratio.wall:.3f} (CPU {ratio.cpu:.3f})",
            base=name, parameters=sizes, flop=operations, ratio=vars(ratio),
        )  # fmt: skip
    return section


def main(
    data: Annotated[Path, typer.Argument(help="Folder with bsds/train, bsds/val and set5/HR.", exists=True)],
    base: Annotated[list[str], typer.Option(help="NAME=checkpoint; may be repeated, the first is swept.")],
    seeds: Annotated[int, typer.Option(help="Seeds of the table.", min=1)] = 3,
    sweep: Annotated[list[str] | None, typer.Option(help="Bases to sweep, else the first.")] = None,
    robust: Annotated[str | None, typer.Option(help="Base of the robust variant, else the first.")] = None,
    better: Annotated[str | None, typer.Option(help="STUDENT=TEACHER, of the bases, else last=first.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 2,
    runs: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path("runs/dsclora/runs.jsonl"),
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "dsclora.json",
) -> None:
    """DSCLoRA on SPAN: the table of the paper, the regime, the robust variant."""
    torch.set_num_threads(1)
    bases = named_paths(base)
    first = next(iter(bases))
    paper = with_bases({place: runs for name in bases for place, runs in rows_of(METHODS, name, seeds).items()})
    regimes = {name: with_bases(sweep_rows(name)) for name in sweep or [first]}
    robustness = with_bases(rows_of(ROBUST, robust or first, seeds, degradation="camera"))
    student, _, teacher = (better or f"{list(bases)[-1]}={first}").partition("=")
    others = with_bases(rows_of(BETTER, student, seeds, by=teacher))
    facts = facts_of_run("torch", "spandrel", "convlora")
    carry = functools.partial(carry_out, data=data, bases=bases)
    found: dict[Run, Result] = {}
    for rows in (paper, robustness, others, *regimes.values()):
        found |= results_of_all((run for line in rows.values() for run in line), carry, runs, jobs)
    defaults = Run("")
    recipe = (
        f"{defaults.steps} steps, Adam, cosine, batch {defaults.batch}, LR patch {defaults.patch}, turned and "
        f"mirrored, rate {defaults.rate:g} (all weights: 5e-5); ranks 2 and 8 as the released code has them. "
    )
    sections = [
        table("The paper's table: clean x4", f"{recipe}Gain: mean over {seeds} seeds ± standard deviation, in dB.",
              paper, found),
        inference(bases, rounds=15),
        table("Robust: degradation 'camera'", f"{recipe}Gain: mean over {seeds} seeds ± standard deviation.",
              robustness, found),
        table(f"Another teacher: {teacher}", f"{recipe}Gain: mean over {seeds} seeds ± standard deviation.",
              others, found),
        *(table(f"The regime: {name}", f"One seed; {recipe}One setting changed at a time.", rows, found)
          for name, rows in regimes.items()),
    ]  # fmt: skip
    for section in sections:
        section.show()
    command = f"python benchmarks/dsclora.py DATA --seeds {seeds} --jobs {jobs} " + " ".join(
        f"--base {name}={path.name}" for name, path in bases.items()
    )
    write_results(out, command, facts, sections)


if __name__ == "__main__":
    typer.run(main)
