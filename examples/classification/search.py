"""The learning rate of each method, chosen on a part of the training data that is kept out; the test set takes no part.

    cd examples && python -m classification.search

It needs the base that classify.py has written. For each method and rate: accuracy on both tasks, mean over seeds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from classify import BATCH_NORMS, IN_PEFT, RANKS, adapt
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from classification.data import LATIN, Task, digits_task, greek_task
from classification.methods import Outcome, full_fine_tuning, has_peft, linear_probe, peft_lora
from classification.network import SmallResNet
from classification.training import Training

GRID = {
    "linear probe": (1e-1, 3e-1, 1.0),
    "full fine-tuning": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "PEFT": (5e-3, 1e-2, 2e-2, 4e-2),
    "PEFT, BatchNorms saved": (5e-3, 1e-2, 2e-2, 4e-2),
    "convlora": (5e-3, 1e-2, 2e-2, 4e-2),
    "locon": (5e-3, 1e-2, 2e-2, 4e-2),
}


def main(
    base: Annotated[Path, typer.Option(help="Written by classify.py.")] = Path("runs/classify/base.safetensors"),
    steps: Annotated[int, typer.Option(help="Of each method on each task.", min=1)] = 200,
    seeds: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 2,
    method: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, else all.", min=1)] = None,
) -> None:
    """Try learning rates."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    tasks = [digits_task(searching=True), greek_task(searching=True)]

    def fresh_base() -> SmallResNet:
        model = SmallResNet(len(LATIN))
        model.load_state_dict(load_file(base))
        return model.eval()

    def run(name: str, rate: float, task: Task, training: Training, file: Path) -> Outcome:
        if name == "linear probe":
            return linear_probe(fresh_base, task, training, file, rate=rate)
        if name == "full fine-tuning":
            return full_fine_tuning(fresh_base, task, training, file, rate=rate)
        if name in RANKS:
            return adapt(fresh_base, task, training, name, file, rate=rate)[0]
        saved = ["fc"] if name == "PEFT" else ["fc", *BATCH_NORMS]
        return peft_lora(
            fresh_base, task, training, file, targets=IN_PEFT, rank=RANKS["locon"], modules_to_save=saved, rate=rate
        )

    table = Table("method", "rate", *(task.name for task in tasks), "mean", title="accuracy live (%)")
    with tempfile.TemporaryDirectory() as folder:
        for name, rates in GRID.items():
            if (method and name not in method) or (name.startswith("PEFT") and not has_peft()):
                continue
            for rate in rates:
                reached = [
                    np.mean(
                        [
                            run(name, rate, task, Training(steps=steps, seed=100 + seed), Path(folder) / name).live
                            for seed in range(seeds)
                        ]
                    )
                    for task in tasks
                ]
                table.add_row(name, f"{rate:g}", *(f"{100 * value:.1f}" for value in [*reached, np.mean(reached)]))
                console.print(name, rate, [round(100 * float(value), 1) for value in reached])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
