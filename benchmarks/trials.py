"""Many small trainings that share their data: carried out once each, kept in a file, several at a time.

A trial is a frozen dataclass that holds everything its result depends on. Results are JSON, one line each, written as
soon as they are there; what the file has is not repeated, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from sr.data import Pair, Patches, crop_photos, degraded_pairs, read_folder
from sr.degradations import DEGRADATIONS
from sr.metrics import quality
from sr.models import upscale
from sr.training import Schedule, Trained, make_accelerator, train
from torch import nn

EXCLUDED = "302003"  # the photo of BSDS that is also Set5's woman
KEPT_OUT = 20  # every 20th training photo chooses settings and trains nothing

Result = dict[str, Any]
Trial = TypeVar("Trial")


def key(trial: Any) -> str:
    return json.dumps(dataclasses.asdict(trial), sort_keys=True)


def results_of_all(
    trials: Iterable[Trial], carry_out: Callable[[Trial], Result], kept: Path, jobs: int
) -> dict[Trial, Result]:
    """The results of all trials; those that `kept` does not have are carried out, `jobs` at a time.

    `carry_out` runs in other processes, so it must be a function of a module or a partial of one.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = kept.read_text().splitlines() if kept.exists() else []
    known = {json.dumps(found["trial"], sort_keys=True): found for found in map(json.loads, lines)}
    wanted = list(dict.fromkeys(trials))
    todo = [trial for trial in wanted if key(trial) not in known]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool, kept.open("a") as file:
        futures = {pool.submit(carry_out, trial): trial for trial in todo}
        for done, future in enumerate(as_completed(futures), 1):
            trial = futures[future]
            known[key(trial)] = {"trial": dataclasses.asdict(trial), **future.result()}  # type: ignore[call-overload]
            line = json.dumps(known[key(trial)])
            file.write(line + "\n")
            file.flush()
            print(f"{time.strftime('%H:%M:%S')} {done}/{len(todo)} {line}", flush=True)
    return {trial: known[key(trial)] for trial in wanted}


@functools.cache
def photo_pairs(data: Path, name: str, degradation: str, draws: int = 1) -> list[Pair]:
    """The pairs of `"train"`, `"kept out"`, `"set5"` or `"val"`, x4."""
    folder = data / {"set5": "set5/HR", "val": "bsds/val"}.get(name, "bsds/train")
    found = [photo for photo in crop_photos(read_folder(folder), 4, 64) if photo.name != EXCLUDED]
    if name == "kept out":
        found = found[::KEPT_OUT]
    if name == "train":
        found = [photo for index, photo in enumerate(found) if index % KEPT_OUT]
    seed = 10**6 if name == "train" else 0
    return degraded_pairs(found, DEGRADATIONS[degradation], scale=4, draws=draws, seed=seed)


def set_up_training(seed: int) -> None:
    """What comes before a training: the same numbers at every run, on one thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)


def train_for(
    steps: int, rate: float, model: nn.Module, parameters: Sequence[nn.Parameter], patches: Patches, **options: Any
) -> Trained:
    """A training of so many steps, with 20 of warm-up, on the CPU."""
    schedule = Schedule(steps=steps, seconds=float("inf"), rate=rate, warmup=20)
    return train(model, parameters, patches, schedule, make_accelerator("cpu"), **options)


def named_paths(texts: Iterable[str]) -> dict[str, Path]:
    """Of `NAME=path`, each."""
    return {name: Path(path) for name, _, path in (text.partition("=") for text in texts)}


def psnr_and_ssim(model: nn.Module, pairs: Sequence[Pair]) -> list[float]:
    """[PSNR-Y, SSIM-Y]."""
    reached = quality([upscale(model, pair.low) for pair in pairs], [pair.high for pair in pairs], 4)
    return [reached.psnr, reached.ssim]


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def mean_and_deviation(values: Sequence[float], form: str = "+.3f") -> str:
    """`"+0.412 ± 0.006"`; a single value without deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"
