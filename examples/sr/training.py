"""The training loop of the examples: Adam on accelerate, L1 or another loss, ended by steps or by time.

It runs in one process or, under `accelerate launch` or `torchrun`, in several (DDP, or a model that `fully_shard` has
sharded): each has patches of its own, and a step follows the mean gradient of all.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule

from sr.data import InputError, Patches

MEASUREMENTS = 10  # how often a run looks at the held-out photos

Loss = Callable[[Tensor, Tensor], Tensor]  # of a batch (low, high), forward pass included
State = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: at most `steps` and at most `seconds`, whichever ends first.

    The learning rate rises over `warmup` steps to `rate` and falls along a cosine to zero.
    """

    steps: int
    seconds: float
    rate: float
    warmup: int

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the run that is over. Time counts only where it would end the run first."""
        return max(step / self.steps, elapsed / self.seconds)

    def factor(self, step: int, progress: float) -> float:
        """The learning rate at a step, as a share of `rate`."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return min(1.0, (step + 1) / (self.warmup + 1)) * cosine


@dataclass(frozen=True)
class Checkpoint:
    """A file with all that a run needs to go on, written after every `every` steps and after the last.

    With `resume` the run goes on from that file, to the same bits as if it had never stopped (unless `seconds` of the
    schedule ends it). The file holds trained parameters, their average, Adam's moments, step, time, losses and random
    states; it is replaced as a whole, so a crash leaves the old one.
    """

    path: Path
    every: int = 100
    resume: bool = False


@dataclass(frozen=True)
class Trained:
    """What a run did: the loss of every step, and (step, value) of what was measured on the way."""

    losses: list[float]
    measured: list[tuple[int, float]]
    seconds: float


def make_accelerator(device: str) -> Accelerator:
    """Accelerate's engine on `"auto"` (its own choice), `"cpu"` or `"cuda"`.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: no CUDA device is available; use --device cpu or auto")
    # Without a GPU several processes find each other only if accelerate is told so.
    return Accelerator(cpu=device == "cpu" or not torch.accelerator.is_available())


def set_up_run(out: Path, *, device: str = "auto", seed: int = 0, threads: int | None = None) -> Accelerator:
    """Set seed and CPU threads, make the folder of a run, and give accelerate's engine, as `make_accelerator` does."""
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    accelerator = make_accelerator(device)
    out.mkdir(parents=True, exist_ok=True)
    return accelerator


def absolute_error(model: nn.Module) -> Loss:
    """The loss that super-resolution networks train on."""
    return lambda low, high: F.l1_loss(model(low), high)


def train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    patches: Patches,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    measure: Callable[[], float] = lambda: math.nan,
    on_step: Callable[[float, float], None] = lambda progress, loss: None,
    make_loss: Callable[[nn.Module], Loss] = absolute_error,
    accumulate: int = 1,
    average: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Minimise a loss, the mean absolute error of `model(low)` to `high` unless told, over `parameters`.

    `make_loss` gets the model as it trains (wrapped, where there are several processes). `measure()` is called before,
    after and at even distances between, in every process; `on_step(progress, loss)` after each step, in the first
    process only. Time spent measuring does not count as training.

    `accumulate`: batches of each process in a step, whose gradients are averaged. `average`: the decay of an
    exponential moving average of the parameters, which is what `measure` sees and what they are in the end.

    Raises:
        InputError: the checkpoint to resume from is missing, damaged, or of a run that read other patches.
    """
    optimizer = torch.optim.Adam(parameters, lr=schedule.rate)
    if isinstance(model, FSDPModule):
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    mean = Average(model, optimizer, 0.0 if average is None else average)
    run = Run(model, optimizer.optimizer, mean, accelerator, _patches_read(patches, accelerator, accumulate))
    loss_of = make_loss(model)
    losses: list[float] = []
    measured: list[tuple[int, float]] = []
    elapsed = 0.0

    def look() -> None:
        with mean.in_place():
            measured.append((len(losses), float(measure())))

    if checkpoint is not None and checkpoint.resume:
        losses, measured, elapsed = run.read(checkpoint.path)
    else:
        look()
    stream = islice(_own(patches, accelerator.process_index), len(losses) * accumulate, None)
    progress = schedule.progress(len(losses), elapsed)
    due = math.floor(progress * MEASUREMENTS) + 1
    while progress < 1:
        batches = list(islice(stream, accumulate))
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.factor(len(losses), progress)
        model.train()
        optimizer.zero_grad()
        loss = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches, start=1):
            low, high = (tensor.to(accelerator.device) for tensor in batch)
            with accelerator.no_sync(model) if number < accumulate else contextlib.nullcontext():
                part = loss_of(low, high) / accumulate
                accelerator.backward(part)
            loss += part.detach()
        optimizer.step()
        mean.update(len(losses))
        value, elapsed = _agree(accelerator, loss.item(), elapsed + time.monotonic() - start)
        losses.append(value)
        progress = schedule.progress(len(losses), elapsed)
        if accelerator.is_main_process:
            on_step(progress, value)
        if progress >= due / MEASUREMENTS:
            look()
            due = math.floor(progress * MEASUREMENTS) + 1
        if checkpoint is not None and (progress >= 1 or len(losses) % checkpoint.every == 0):
            run.write(checkpoint.path, losses, measured, elapsed)
    mean.settle()
    return Trained(losses, measured, elapsed)


def _own(patches: Patches, process: int) -> Patches:
    """The patches of one process: the first one's are those of a single process."""
    if process == 0:
        return patches
    other = copy.copy(patches)
    other.seed = (patches.seed, process)
    return other


def _patches_read(patches: Patches, accelerator: Accelerator, accumulate: int) -> dict[str, int]:
    """What says which patches a step reads."""
    return {
        "processes": accelerator.num_processes, "accumulate": accumulate, "batch": patches.batch,
        "patch": patches.patch, "seed": patches.seed, "pairs": len(patches.pairs),
    }  # fmt: skip


def _agree(accelerator: Accelerator, *values: float) -> list[float]:
    """The means over the processes, so that all of them have the same rate and end together."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, device=accelerator.device), "mean").tolist()


class Average:
    """An exponential moving average of what an optimizer trains; of shards, shard by shard. Decay 0 is none.

    Early on it forgets faster, with decay `(1 + step) / (10 + step)`, lest it remember the start for long.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]] if decay else []
        self.values = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are the average inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self) -> None:
        """The parameters become the average."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self.shards:  # parameters that are still gathered would keep the old values
            module.reshard()
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


@dataclass(frozen=True)
class Run:
    """A run as far as a checkpoint is concerned; all processes call both methods, and the first one writes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mean: Average
    accelerator: Accelerator
    reads: dict[str, int]

    def write(self, path: Path, losses: list[float], measured: list[tuple[int, float]], elapsed: float) -> None:
        whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        trained = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = {
            "trained": dcp.get_model_state_dict(self.model, options=trained),
            "optimizer": dcp.get_optimizer_state_dict(self.model, self.optimizer, options=whole),
            "losses": losses, "measured": measured, "elapsed": elapsed, "reads": self.reads,
        }  # fmt: skip
        with self.mean.in_place():
            average = dcp.get_model_state_dict(self.model, options=trained) if self.mean.values else {}
            state["average"] = {name: tensor.clone() for name, tensor in average.items()}  # out of reach of the swap
        # Last: to look for a layer's parameters is to read its effective weight, and rank dropout draws there.
        state["random"] = gather_object([_random_state()])
        if self.accelerator.is_main_process:
            beside = path.with_name(path.name + ".part")
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        self.accelerator.wait_for_everyone()

    def read(self, path: Path) -> tuple[list[float], list[tuple[int, float]], float]:
        """(losses, measured, elapsed) of the run so far; model, average, optimizer and random state become its."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            reads, trained, average = state["reads"], state["trained"], state["average"]
        except FileNotFoundError:
            raise InputError(f"resume: no checkpoint {path}; start without --resume") from None
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"resume: {path} cannot be read ({type(error).__name__}: {reason})") from None
        for name, now in self.reads.items():
            if reads.get(name) != now:
                raise InputError(f"resume: {path} is of a run with {name} {reads.get(name)}, this one has {now}")
        if bool(average) != bool(self.mean.values):
            raise InputError(f"resume: {path} is of a run {'with' if average else 'without'} an average of parameters")
        options = dcp.StateDictOptions(full_state_dict=True, strict=False)
        if average:
            with self.mean.in_place():
                dcp.set_model_state_dict(self.model, average, options=options)
        dcp.set_model_state_dict(self.model, trained, options=options)
        dcp.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        _set_random_state(state["random"][self.accelerator.process_index])
        return state["losses"], state["measured"], state["elapsed"]


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
