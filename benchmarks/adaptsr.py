"""AdaptSR: bicubic-trained networks adapted to degraded photos, beside full fine-tuning and beside PEFT.

    python benchmarks/adaptsr.py DATA --base span=examples/weights/span_x4_c26.safetensors --base ...

AdaptSR (arXiv 2503.07748) claims that low-rank updates of convolutions, attention and MLP match full fine-tuning with
92 % fewer trained parameters. Here all convolutions and linear layers of each base are adapted, at two budgets (8 % of
the base's parameters, and a richer one), with one rank for all layers, the largest that fits, and with the ranks of
`convlora.allocate_ranks` for the same number of parameters. All methods train for equal steps on the same patches. The
learning rate of each method, budget, base and degradation is the best on training photos that are kept out (one
seed): of three rates, and of one more at an end for as long as the best is at that end. The table is BSDS val, three
seeds, one for the richer budget.

DATA holds `bsds/train` and `bsds/val` (photos as BSDS500 has them). Every training is written to `--trials` when it
ends and not repeated.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from common import (
    RESULTS,
    Section,
    TimedCase,
    facts_of_run,
    in_new_process,
    peak_memory,
    time_interleaved,
    write_results,
)
from safetensors.torch import save_file
from sr.data import Patches
from sr.degradations import enlarge
from sr.metrics import quality
from sr.networks import load_any
from torch import Tensor, nn
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

BUDGETS = (0.08, 0.24)  # of the base's parameters
DEGRADED = ("camera", "night")
BATCHES = 16  # that the allocation of ranks looks at
RATES = {"full": (4e-4, 8e-4, 1.6e-3), "else": (5e-3, 1e-2, 2e-2)}
Setting = tuple[str, str, float]  # degradation, method, budget
Rates = dict[Setting, float]
METHODS = {
    "PEFT": "PEFT LoRA, one rank",
    "locon": "locon, one rank",
    "locon allocated": "locon, allocated ranks",
    "convlora": "convlora, one rank",
    "convlora allocated": "convlora, allocated ranks",
}


@dataclass(frozen=True)
class Trial:
    """One training: everything that its result depends on. `rate` 0: the base as it is."""

    base: str
    degradation: str
    method: str
    budget: float = 0.0
    rate: float = 0.0
    seed: int = 0
    steps: int = 200
    patch: int = 24
    batch: int = 8
    judged: str = "val"  # or "kept out"


Searches = dict[Setting, list[Trial]]  # a trial for each rate, rising


# --- the methods ------------------------------------------------------------------------------------------------------


def prepare_method(model: nn.Module, trial: Trial, batches: Iterable[Any]) -> list[nn.Parameter]:
    """Put the method's adapters in; what it trains."""
    if trial.method == "full":
        return list(model.parameters())
    kind, _, variant = trial.method.partition(" ")
    factors = "convlora" if kind == "convlora" else "locon"
    rank = largest_rank(model, trial.budget, factors)
    if kind == "PEFT":
        from peft import LoraConfig, inject_adapter_in_model

        names = [layer.name for layer in convlora.summary(convlora.inject(copy.deepcopy(model), "*")).layers]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = None
    if variant == "allocated":
        budget = spending(model, rank, factors)
        ranks = convlora.allocate_ranks(
            model, "*", budget=budget, batches=batches, loss=absolute_error, factors=factors
        )
    convlora.inject(model, "*", rank=rank, ranks=ranks, factors=factors)
    return convlora.parameters(model)


def absolute_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.l1_loss(model(batch[0]), batch[1])


def spending(model: nn.Module, rank: int, factors: str) -> int:
    """The parameters of adapters of one rank on every layer."""
    return convlora.summary(convlora.inject(copy.deepcopy(model), "*", rank=rank, factors=factors)).trainable


def largest_rank(model: nn.Module, budget: float, factors: str) -> int:
    """The largest rank of which adapters on every layer stay within the budget."""
    allowed, rank = budget * count_parameters(model.parameters()), 0
    while spending(model, rank + 1, factors) <= allowed:
        rank += 1
    if not rank:
        raise SystemExit(f"a budget of {budget:.0%} pays for no {factors} of rank 1 on every layer")
    return rank


# --- one training ---------------------------------------------------------------------------------------------------


def carry_out(trial: Trial, data: Path, bases: Mapping[str, Path]) -> Result:
    """Train and judge; the first seed also on clean input, with adapters switched off where they can be."""
    set_up_training(trial.seed)
    model, scale = load_any(bases[trial.base])
    pairs = photo_pairs(data, trial.judged, trial.degradation)
    if trial.method == "bicubic":
        reached = quality([enlarge(pair.low, scale) for pair in pairs], [pair.high for pair in pairs], scale)
        return {"judged": [reached.psnr, reached.ssim]}
    result: Result = {"base_parameters": count_parameters(model.parameters())}
    if trial.rate:
        training = photo_pairs(data, "train", trial.degradation, draws=2)
        patches, others = (
            Patches(training, patch=trial.patch, batch=trial.batch, seed=seed)
            for seed in (trial.seed, 10**6 + trial.seed)
        )
        parameters = prepare_method(model, trial, itertools.islice(others, BATCHES))
        trained = train_for(trial.steps, trial.rate, model, parameters, patches)
        result |= {
            "parameters": count_parameters(parameters),
            "bytes": file_size(model, trial),
            "seconds": trained.seconds,
        }
        if trial.method.endswith("allocated"):
            result["ranks"] = {layer.name: layer.rank for layer in convlora.summary(model).layers}
    result["judged"] = psnr_and_ssim(model, pairs)
    if trial.judged == "val" and trial.seed == 0:
        switch_off(model, trial)
        result["clean"] = psnr_and_ssim(model, photo_pairs(data, "val", "clean"))
    return result


def switch_off(model: nn.Module, trial: Trial) -> None:
    if trial.method == "PEFT":
        for module in model.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
    elif trial.method.startswith(("locon", "convlora")):
        convlora.activate(model, [])


def file_size(model: nn.Module, trial: Trial) -> int:
    """Bytes of what would be shipped: the adapter, else all weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shipped.safetensors"
        if trial.method == "full":
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
        elif trial.method == "PEFT":
            from peft import get_peft_model_state_dict

            save_file(get_peft_model_state_dict(model), path)
        else:
            convlora.save(model, path)
        return path.stat().st_size


# --- which trainings --------------------------------------------------------------------------------------------------


def searches(base: str, richer: bool) -> Searches:
    """One trial for each learning rate; allocated ranks take the rate of one rank."""
    settings = [("full", 0.0)]
    settings += [(method, budget) for budget in BUDGETS[: 1 + richer] for method in ("PEFT", "locon", "convlora")]
    return {
        (degradation, method, budget): [
            Trial(base, degradation, method, budget, rate, judged="kept out")
            for rate in RATES["full" if method == "full" else "else"]
        ]
        for degradation in DEGRADED
        for method, budget in settings
    }


def best(trials: Iterable[Trial], found: Mapping[Trial, Result]) -> Trial:
    return max(trials, key=lambda trial: (found[trial]["judged"][0] > 0, found[trial]["judged"][0]))  # NaN is last


def widened(searched: Searches, found: Mapping[Trial, Result]) -> Searches:
    """The searches whose best so far is their lowest or highest rate, with half that or twice that besides."""
    wider = {}
    for setting, trials in searched.items():
        first, last = trials[0], trials[-1]
        if best(trials, found) is last:
            wider[setting] = [*trials, replace(last, rate=2 * last.rate)]
        elif best(trials, found) is first:
            wider[setting] = [replace(first, rate=first.rate / 2), *trials]
    return wider


def table_trials(base: str, degradation: str, rates: Rates, seeds: int, richer: bool) -> dict[str, list[Trial]]:
    """Row of the table -> its trials, one for each seed."""
    rows = {"bicubic": [Trial(base, degradation, "bicubic")], "base, frozen": [Trial(base, degradation, "base")]}
    settings = [("full", 0.0), *((method, budget) for budget in BUDGETS[: 1 + richer] for method in METHODS)]
    for method, budget in settings:
        rate = rates[degradation, method.partition(" ")[0], budget]
        name = f"{METHODS[method]}, at most {budget:.0%}" if budget else "all weights"
        count = 1 if budget == BUDGETS[1] else seeds
        rows[name] = [Trial(base, degradation, method, budget, rate, seed) for seed in range(count)]
    return rows


# --- the tables -------------------------------------------------------------------------------------------------------


def table(base: str, degradation: str, rows: Mapping[str, list[Trial]], found: Mapping[Trial, Result]) -> Section:
    first, seeds = next(iter(rows["all weights"])), len(rows["all weights"])
    section = Section(
        f"{base}, {degradation}",
        f"{first.steps} steps, Adam, cosine, 20 steps of warm-up, batch {first.batch}, LR patch {first.patch}; BSDS "
        f"val, 100 images; mean over {seeds} seeds ± standard deviation, or one seed. Clean: PSNR-Y on "
        "clean bicubic input against the base, adapters switched off, first seed.",
        ("method", "rate", "trained", "file, kB", "PSNR-Y", "gain, dB", "SSIM-Y", "over all weights", "clean"),
    )
    frozen, full = (found[rows[name][0]] for name in ("base, frozen", "all weights"))
    level = statistics.mean(found[trial]["judged"][0] for trial in rows["all weights"])
    for name, trials in rows.items():
        results = [found[trial] for trial in trials]
        psnr, ssim = zip(*(result["judged"] for result in results), strict=True)
        gains = [value - frozen["judged"][0] for value in psnr]
        is_trained = trials[0].rate > 0
        parameters = results[0].get("parameters", 0)
        clean = f"{results[0]['clean'][0] - frozen['clean'][0]:+.3f}" if is_trained else ""
        section.add(
            name, f"{trials[0].rate:g}" if is_trained else "",
            f"{parameters:,} ({parameters / full['base_parameters']:.1%})" if is_trained else "",
            f"{results[0]['bytes'] / 1000:.0f}" if is_trained else "",
            f"{statistics.mean(psnr):.3f}", mean_and_deviation(gains) if is_trained else "",
            f"{statistics.mean(ssim):.4f}", f"{statistics.mean(psnr) - level:+.3f}" if is_trained else "", clean,
            method=name, psnr=psnr, ssim=ssim, **results[0],
        )  # fmt: skip
    return section


def goals(rows: Mapping[tuple[str, str], Mapping[str, list[Trial]]], found: Mapping[Trial, Result]) -> Section:
    """What was to be reached, one line per base and degradation."""
    least, share = BUDGETS[0], f"at most {BUDGETS[0]:.0%}"
    section = Section(
        "Goals",
        f"Best convlora or locon adapter of {share} of the parameters over all weights, dB (goal: above -0.03); "
        "allocated ranks over one rank for the same number of parameters, paired by seed, mean ± standard deviation "
        "(goal: above 0).",
        ("base, degradation", "best of 8% over all weights", *(f"{factors}, {budget:.0%}: allocated over one rank"
         for budget in BUDGETS for factors in ("locon", "convlora"))),
    )  # fmt: skip
    for (base, degradation), table in rows.items():
        by_method = {(t[0].method, t[0].budget): [found[trial]["judged"][0] for trial in t] for t in table.values()}
        full = statistics.mean(by_method["full", 0.0])
        best = max(
            statistics.mean(psnr)
            for (method, budget), psnr in by_method.items()
            if budget == least and method != "PEFT"
        )
        pairs = [
            (by_method.get((f"{factors} allocated", budget), ()), by_method.get((factors, budget), ()))
            for budget in BUDGETS
            for factors in ("locon", "convlora")
        ]
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
        verdict = "met" if best - full > -0.03 else "missed"
        section.add(
            f"{base}, {degradation}", f"{best - full:+.3f} ({verdict})",
            *(mean_and_deviation(values) if values else "" for values in differences),
            base=base, degradation=degradation, over_full=best - full, allocated=differences,
        )  # fmt: skip
    return section


# --- what a step costs ------------------------------------------------------------------------------------------------


def one_step(base: Path, method: str, patch: int) -> Callable[[], None]:
    """A training step of the method on a fixed batch, at the smaller budget."""
    torch.manual_seed(0)
    model, scale = load_any(base)
    low, high = torch.rand(8, 3, patch, patch), torch.rand(8, 3, patch * scale, patch * scale)
    little = low[..., :8, :8], high[..., : 8 * scale, : 8 * scale]  # allocating ranks must leave no memory to the step
    parameters = prepare_method(model.train(), Trial("", "", method, BUDGETS[0]), [little] * 2)
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def step() -> None:
        loss = F.l1_loss(model(low), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


COSTS = ("full", "PEFT", "locon", "locon allocated", "convlora", "convlora allocated")


def costs(bases: Mapping[str, Path], rounds: int) -> Section:
    patch = Trial("", "", "").patch
    section = Section(
        "A training step",
        f"Batch 8, LR patch {patch}, one thread, at most {BUDGETS[0]:.0%} trained. Milliseconds: median of {rounds} "
        "interleaved rounds (interquartile range); ratio to all weights: median of the rounds' ratios. Memory: peak of "
        "the first step above what the process had before, in a process of its own, MiB.",
        ("base", "method", "ms", "over all weights", "peak memory, MiB"),
    )
    for name, path in bases.items():
        steps = {method: one_step(path, method, patch) for method in COSTS}
        cases = [TimedCase(method, lambda _, step=step: step()) for method, step in steps.items()]
        times = time_interleaved(name, cases, rounds)
        for method in COSTS:
            memory = int(*in_new_process(__file__, ".", "--base", f"{name}={path}", "--measure", method))
            ratio = times[method].over(times["full"])
            section.add(
                name, METHODS.get(method, "all weights"), str(times[method]), f"{ratio.wall:.2f}",
                f"{memory / 2**20:.0f}",
                base=name, method=method, **times[method].facts(), over_full=vars(ratio), peak_bytes=memory,
            )  # fmt: skip
    return section


def main(
    data: Annotated[Path, typer.Argument(help="Folder with bsds/train and bsds/val.", exists=True)],
    base: Annotated[list[str], typer.Option(help="NAME=checkpoint of a SPAN, SwinIR or RRDBNet; may be repeated.")],
    seeds: Annotated[int, typer.Option(help="Seeds of the table.", min=1)] = 3,
    richer: Annotated[list[str] | None, typer.Option(help="Bases with rows of the larger budget, else all.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time, one thread each.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of timing a step.", min=1)] = 15,
    trials: Annotated[Path, typer.Option(help="Where finished trainings are kept.")] = Path(
        "runs/adaptsr/trials.jsonl"
    ),
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "adaptsr.json",
    measure: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """AdaptSR: low-rank adaptation to degraded photos beside full fine-tuning."""
    torch.set_num_threads(1)
    bases = named_paths(base)
    if measure:
        path = next(iter(bases.values()))
        one_step(path, measure, 8)()  # what is made once, at the first call, does not count
        print(peak_memory(one_step(path, measure, Trial("", "", "").patch)))
        return
    facts = facts_of_run("torch", "peft", "spandrel", "convlora")
    carry = functools.partial(carry_out, data=data, bases=bases)
    rows: dict[tuple[str, str], dict[str, list[Trial]]] = {}
    found: dict[Trial, Result] = {}
    for name in bases:
        is_richer = not richer or name in richer
        searched = searches(name, is_richer)
        unsettled = searched
        while unsettled:
            found |= results_of_all([trial for choice in unsettled.values() for trial in choice], carry, trials, jobs)
            unsettled = widened(unsettled, found)
            searched |= unsettled
        rates = {setting: best(choice, found).rate for setting, choice in searched.items()}
        rows |= {(name, d): table_trials(name, d, rates, seeds, is_richer) for d in DEGRADED}
        wanted = [trial for d in DEGRADED for row in rows[name, d].values() for trial in row]
        found |= results_of_all(wanted, carry, trials, jobs)
    sections = [goals(rows, found), *(table(*place, row, found) for place, row in rows.items()), costs(bases, rounds)]
    for section in sections:
        section.show()
    command = f"python benchmarks/adaptsr.py DATA --seeds {seeds} " + " ".join(
        [f"--base {name}={path.name}" for name, path in bases.items()] + [f"--richer {name}" for name in richer or []]
    )
    write_results(out, command, facts, sections)


if __name__ == "__main__":
    typer.run(main)
