"""One small ResNet, three label sets: printed letters, handwritten digits, Greek in bad light. Three minutes on a CPU.

    python examples/classify.py

A ResNet-18 of torchvision (a quarter of the channels, a stem for small images) learns printed capital letters. Two
tasks then ask for other classes in another kind of image. `adapt` gives each an adapter: low-rank updates of the
convolutions, a head of its own (`modules_to_save`) and its own BatchNorm statistics (`norm_statistics`), in one file.
`serve` puts both files on one base, switches, merges, and takes them off again: the base is what it was, bit by bit.
Beside it: a linear probe, full fine-tuning, and PEFT (if it is installed: pip install -e '.[examples,peft]'). The
script exits with 1 if an adapter is not what it should be. The data are drawn from what scikit-learn and matplotlib
ship; classification/data.py says how.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from classification.data import Task, digits_task, greek_task, letters_task
from classification.methods import (
    RATES,
    Outcome,
    full_fine_tuning,
    has_peft,
    judge_file,
    linear_probe,
    peft_lora,
    with_new_head,
)
from classification.network import SmallResNet
from classification.report import Shown, report_run, show_progress
from classification.training import Training, equal_states, outputs, train
from promises import check_promises, is_default_run
from safetensors.torch import load_file, save_file
from torch import Tensor

import convlora

CONVOLUTIONS = ["conv?", "downsample.0"]  # all that modules_to_save does not take
IN_FULL = ["fc", "re:conv1"]  # the head, and the stem (not every conv1), whose 144 weights no low rank makes fewer
RANKS = {"locon": 4, "convlora": 2}  # of both factorizations: much the same number of parameters
NAMES = {"locon": "convlora, locon factors", "convlora": "convlora"}  # of both in the table
IN_PEFT = r".*(conv.|downsample\.0)"  # the stem too, for PEFT's modules_to_save would take every conv1
BATCH_NORMS = ["bn1", "bn2", "downsample.1"]
PROMISED = {"digits": 0.05, "greek": 0.3}  # accuracy over the linear probe that a default run reaches
FREE = {"seeds", "threads", "out"}  # options that change no promise


def adapt(
    fresh_base: Callable[[], SmallResNet],
    task: Task,
    training: Training,
    factors: str,
    file: Path,
    *,
    rate: float = RATES["adapter"],
) -> tuple[Outcome, Tensor]:
    """One task's adapter from injection to its file and back; and the logits of the network as trained."""
    torch.manual_seed(training.seed)

    # 1. Inject: low-rank updates of the targets; a copy of its own of every module to save and of all statistics.
    #    The head that is there now is what the adapter's head starts from. It has the task's classes.
    model = with_new_head(fresh_base(), task)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convlora.inject(
        model,
        CONVOLUTIONS,
        rank=RANKS[factors],
        factors=factors,
        modules_to_save=IN_FULL,
        norm_statistics="adapter",
        name=task.name,
    )

    # 2. Parameters: what the adapter trains. Its statistics move in train mode, the base's do not.
    trained = list(convlora.parameters(model))
    train(model, trained, task, training, rate)
    live = outputs(model, task.test.images)

    # 3. Save: one file. It loads onto the base with its own head of 26 classes; while the adapter acts, its head does.
    convlora.save(model, file)
    loaded = convlora.load(fresh_base(), file)
    reloaded = outputs(loaded, task.test.images)

    # 4. Remove: what was there before.
    convlora.remove(model)
    restored = equal_states(model.state_dict(), before)
    return judge_file(NAMES[factors], task, training.seed, live, reloaded, trained, file, restored), live


def serve(
    fresh_base: Callable[[], SmallResNet], letters: Task, files: Mapping[Task, Path], trained: Mapping[Task, Tensor]
) -> tuple[dict[str, bool], dict[Task, Tensor]]:
    """Both files on one base: which promises hold; and the logits of the base, adapters off, for all images.

    `trained`: logits of the networks that the files come from.
    """
    model = fresh_base()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    letters_before = outputs(model, letters.test.images)

    # 5. Load both, and switch there and back: one network, another head, other statistics.
    for file in files.values():
        convlora.load(model, file)
    switched = []
    for task in [*files, *files]:
        convlora.activate(model, task.name)
        switched.append(torch.equal(outputs(model, task.test.images), trained[task]))
    convlora.activate(model, [])
    off = {task: outputs(model, task.test.images) for task in (letters, *files)}

    # 6. Merge: a state dict for a plain network with the task's head, which knows nothing of adapters.
    merged = []
    for task, file in files.items():
        plain = with_new_head(fresh_base(), task)
        plain.load_state_dict(convlora.merged_state_dict(convlora.load(fresh_base(), file)))
        merged.append(torch.equal(outputs(plain, task.test.images), trained[task]))

    # 7. Remove both: the base.
    convlora.remove(model)
    letters_after = outputs(model, letters.test.images)
    promises = {
        "two tasks on one base, switched there and back, bitwise": all(switched),
        "all off: the base's outputs bitwise": torch.equal(off[letters], letters_before),
        "merged into a plain network, bitwise": all(merged),
        "removed: the base's outputs and state dict bitwise": (
            torch.equal(letters_after, letters_before) and equal_states(model.state_dict(), state)
        ),
    }
    return promises, off


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

    # 0. A base: trained here, on printed letters, and kept as a file from which fresh ones are made.
    letters, tasks = letters_task(), [digits_task(), greek_task()]
    torch.manual_seed(0)
    base = SmallResNet(len(letters.classes))
    train(base, base.parameters(), letters, Training(steps=base_steps, batch=64), RATES["base"])
    save_file(base.state_dict(), out / "base.safetensors")
    show_progress("base", started)

    def fresh_base() -> SmallResNet:
        model = SmallResNet(len(letters.classes))
        model.load_state_dict(load_file(out / "base.safetensors"))
        return model.eval()

    # 1 to 4 for each task and factorization, beside the other methods.
    outcomes: list[Outcome] = []
    files: dict[Task, Path] = {}
    live: dict[Task, Tensor] = {}
    for task in tasks:
        for seed in range(seeds):
            training = Training(steps=steps, seed=seed)
            outcomes += run_other_methods(fresh_base, task, training)
            for factors in RANKS:
                file = out / f"{task.name}-{factors}-{seed}.safetensors"
                outcome, logits = adapt(fresh_base, task, training, factors, file)
                outcomes.append(outcome)
                if (factors, seed) == ("convlora", 0):
                    files[task], live[task] = file, logits
            show_progress(f"{task.name}, seed {seed}", started)

    # 5 to 7.
    promises, off = serve(fresh_base, letters, files, live)

    # What came out, and what an adapter promises.
    options = {"steps": steps, "base_steps": base_steps, "seeds": seeds}
    shown = [Shown(letters, off[letters], off[letters], letters.classes)]
    shown += [Shown(task, live[task], off[task], letters.classes) for task in tasks]
    report_run(out, options, outcomes, shown, started)
    ours = [outcome for outcome in outcomes if outcome.method in NAMES.values()]
    promises["a file on a fresh base gives the trained network's outputs bitwise"] = all(
        outcome.difference == 0 for outcome in ours
    )
    promises["each network after its training and removal: its former state dict bitwise"] = all(
        outcome.base_back for outcome in ours
    )
    if is_default_run(context, FREE):
        for task in tasks:
            reached, probe = (
                sum(outcome.reloaded for outcome in outcomes if (outcome.method, outcome.task) == (method, task.name))
                for method in ("convlora", "linear probe")
            )
            gain = PROMISED[task.name]
            promises[f"{task.name}: {100 * gain:.0f} points over the linear probe"] = reached >= probe + seeds * gain
    check_promises(promises)


def run_other_methods(fresh_base: Callable[[], SmallResNet], task: Task, training: Training) -> list[Outcome]:
    """The same task by the methods of classification/methods.py."""
    methods = [linear_probe, full_fine_tuning]
    if has_peft():
        peft = functools.partial(peft_lora, targets=IN_PEFT, rank=RANKS["locon"])
        methods += [
            functools.partial(peft, modules_to_save=["fc"]),
            functools.partial(peft, modules_to_save=["fc", *BATCH_NORMS]),
        ]
    with tempfile.TemporaryDirectory() as folder:
        return [run(fresh_base, task, training, Path(folder) / str(index)) for index, run in enumerate(methods)]


if __name__ == "__main__":
    typer.run(main)
