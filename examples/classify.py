"""One small ResNet, three label sets: printed letters, handwritten digits, Greek in bad light. Three minutes on a CPU.

    python examples/classify.py

A ResNet-18 of torchvision (a quarter of the channels, a stem for small images) learns printed capital letters. Two
tasks then ask for other classes in another kind of image. Each gets an adapter: low-rank updates of all convolutions, a
head of its own (`modules_to_save`) and its own BatchNorm statistics (`norm_statistics`), in one file. Both files go
onto one base and are switched; removed, they leave the base as it was. Beside it: a linear probe, full fine-tuning, and
PEFT (if it is installed: pip install -e '.[examples,peft]'). The script exits with 1 if an adapter is not what it
should be. The data are drawn from what scikit-learn and matplotlib ship: see classification/data.py.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torchvision
import typer
from classification import data
from classification.data import Task
from classification.methods import (
    RATES,
    Outcome,
    count,
    full_fine_tuning,
    has_peft,
    linear_probe,
    outcome,
    peft_lora,
    with_new_head,
)
from classification.network import SmallResNet
from classification.report import Shown, lines_of, save_picture, table_of
from classification.training import Training, accuracy, outputs, train
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import convlora

CONVOLUTIONS = ["layer*.conv?", "layer*.downsample.0"]  # all but the stem
IN_FULL = ["fc", "re:conv1"]  # the head, and the stem, whose 144 weights no low rank makes fewer
OURS = {"locon": "convlora, locon factors", "convlora": "convlora"}  # what the table calls them
RANKS = {"locon": 4, "convlora": 2}  # much the same number of parameters; PEFT factorizes like locon
IN_PEFT = r".*(conv.|downsample\.0)"  # all of them, the stem by a low rank, too
BATCH_NORMS = ["bn1", "bn2", "downsample.1"]
PROMISED = {"digits": 0.05, "greek": 0.3}  # accuracy over the linear probe that a default run reaches
FREE = {"seeds", "threads", "out"}  # options that change no promise

console = Console()


def main(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Of each method on each task.", min=1)] = 200,
    base_steps: Annotated[int, typer.Option(help="Of the base, on letters.", min=1)] = 400,
    seeds: Annotated[int, typer.Option(help="Runs of each method, with other heads, factors and batches.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads, else all.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for what the run writes.")] = Path("runs/classify"),
) -> None:
    """Adapt a classifier to other images and other classes, twice, on one base; compare with other methods."""
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    # 1. A base: trained here, on printed letters, and kept as a file from which fresh ones are made.
    letters, tasks = data.letters(), [data.digits(), data.greek()]
    torch.manual_seed(0)
    base = SmallResNet(len(letters.classes))
    train(base, base.parameters(), letters, Training(steps=base_steps, batch=64), RATES["base"])
    base_says = outputs(base, letters.test.images)
    save_file(base.state_dict(), out / "base.safetensors")
    console.print(
        f"base: [bold]{accuracy(base_says, letters.test):.1%}[/] of {len(letters.test.labels)} letters in fonts that "
        f"it has not seen, {count(base.parameters()):,} parameters, {time.perf_counter() - started:.0f} s"
    )

    def fresh() -> SmallResNet:
        model = SmallResNet(len(letters.classes))
        model.load_state_dict(load_file(out / "base.safetensors"))
        return model.eval()

    # 2. Both tasks by all methods, the adapters last. Each adapter is a file.
    outcomes: list[Outcome] = []
    live: dict[str, Tensor] = {}  # by file: logits of the adapted networks as trained
    for task in tasks:
        for seed in range(seeds):
            training = Training(steps=steps, seed=seed)
            outcomes += others(fresh, task, training)
            for factors in RANKS:
                file = out / f"{task.name}-{factors}-{seed}.safetensors"
                reached, live[file.stem] = adapt(fresh, task, training, factors, file)
                outcomes.append(reached)
            console.print(f"{task.name}, seed {seed}: done after {time.perf_counter() - started:.0f} s")
    files = {task.name: out / f"{task.name}-convlora-0.safetensors" for task in tasks}
    says = {task.name: live[files[task.name].stem] for task in tasks}

    # 3. Both files on one base, switched there and back, then all off, and removed.
    served = fresh()
    for file in files.values():
        convlora.load(served, file)
    switched = []
    for task in [*tasks, *tasks]:
        convlora.activate(served, task.name)
        switched.append(torch.equal(outputs(served, task.test.images), says[task.name]))
    convlora.activate(served, [])
    off = {task.name: outputs(served, task.test.images) for task in [letters, *tasks]}
    convlora.remove(served)
    removed = outputs(served, letters.test.images)

    # 4. One task merged into a plain network, for programs that know nothing of adapters.
    plain = with_new_head(fresh(), tasks[0])
    plain.load_state_dict(convlora.merged_state_dict(convlora.load(fresh(), files["digits"])))
    merged = outputs(plain, tasks[0].test.images)

    # 5. What came out.
    lines = lines_of(outcomes)
    console.print(table_of(lines, tasks, "Held-out images: accuracy as trained, and of the file on a fresh base"))
    if not has_peft():
        console.print("no rows of PEFT: it is not installed (pip install -e '.[examples,peft]')")
    shown = [Shown(letters, None, base_says, letters.classes)]
    shown += [Shown(task, says[task.name], off[task.name], letters.classes) for task in tasks]
    save_picture(out / "classify.png", lines, shown)
    seconds = time.perf_counter() - started

    # 6. What an adapter promises.
    ours = [reached for reached in outcomes if reached.method in OURS.values()]
    checks = {
        "the file on a fresh base gives the trained network's outputs bitwise": all(
            reached.difference == 0 for reached in ours
        ),
        "two tasks on one base, switched there and back, bitwise": all(switched),
        "all off: the base's outputs bitwise": torch.equal(off["letters"], base_says),
        "removed: the base's outputs and state dict bitwise": (
            torch.equal(removed, base_says)
            and same(served.state_dict(), base.state_dict())
            and all(reached.base_back for reached in ours)
        ),
        "merged into a plain network, bitwise": torch.equal(merged, says["digits"]),
    }
    if is_default_run(context):
        for task, gain in PROMISED.items():
            means = {line.method: np.mean(line.accuracies(task, "reloaded")) for line in lines}
            checks[f"{task}: {100 * gain:.0f} points over the linear probe"] = bool(
                means["convlora"] >= means["linear probe"] + gain
            )
    results = {
        "options": {"steps": steps, "base_steps": base_steps, "seeds": seeds},
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": versions(),
        "seconds": round(seconds, 1),
        "base_accuracy": accuracy(base_says, letters.test),
        "base_parameters": count(base.parameters()),
        "images": {task.name: [len(task.originals.labels), len(task.test.labels)] for task in [letters, *tasks]},
        "outcomes": [asdict(reached) for reached in outcomes],
        "checks": checks,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{seconds:.0f} s; wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")
    broken = [check for check, holds in checks.items() if not holds]
    if broken:
        typer.echo(f"failed: {'; '.join(broken)}", err=True)
        raise typer.Exit(1)
    console.print(f"[green]{len(checks)} checks hold[/]: {'; '.join(checks)}")


def adapt(
    fresh: Callable[[], SmallResNet],
    task: Task,
    training: Training,
    factors: str,
    file: Path,
    *,
    rate: float = RATES["adapter"],
) -> tuple[Outcome, Tensor]:
    """One task's adapter, from injection to its file and back; and the logits of the network as trained."""
    model = with_new_head(fresh(), task)  # the head that the adapter starts from; the file brings it to other bases
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convlora.inject(
        model,
        CONVOLUTIONS,
        rank=RANKS[factors],
        factors=factors,
        modules_to_save=IN_FULL,  # a copy of the adapter's own
        norm_statistics="adapter",  # every BatchNorm's running statistics likewise; the base's stay
        name=task.name,
    )
    trained = list(convlora.parameters(model))
    train(model, trained, task, training, rate)
    live = outputs(model, task.test.images)
    convlora.save(model, file)
    loaded = convlora.load(fresh(), file)  # the base's head has 26 classes; while the adapter acts, its own does
    reloaded = outputs(loaded, task.test.images)
    convlora.remove(model)
    reached = outcome(
        OURS[factors],
        task,
        training.seed,
        live=live,
        reloaded=reloaded,
        trained=count(trained),
        file=file,
        base_back=same(model.state_dict(), before),
    )
    return reached, live


def others(fresh: Callable[[], SmallResNet], task: Task, training: Training) -> list[Outcome]:
    """The same task by the methods of classification/methods.py."""
    runs = [linear_probe, full_fine_tuning]
    if has_peft():
        peft = functools.partial(peft_lora, targets=IN_PEFT, rank=RANKS["locon"])
        runs += [
            functools.partial(peft, modules_to_save=["fc"]),
            functools.partial(peft, modules_to_save=["fc", *BATCH_NORMS]),
        ]
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for index, run in enumerate(runs):
            torch.manual_seed(training.seed)
            outcomes.append(run(fresh, task, training, Path(folder) / str(index)))
    return outcomes


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order and the same bits."""
    return list(one) == list(other) and all(torch.equal(value, other[key]) for key, value in one.items())


def is_default_run(context: typer.Context) -> bool:
    """Whether no option was given that changes what is learned."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return all(name in FREE or source is None or source.name == "DEFAULT" for name, source in sources.items())


def versions() -> dict[str, str]:
    """Of what computes."""
    known = {"torch": torch.__version__, "torchvision": torchvision.__version__, "convlora": convlora.__version__}
    return known | ({"peft": importlib.metadata.version("peft")} if has_peft() else {})


if __name__ == "__main__":
    typer.run(main)
