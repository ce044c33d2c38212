"""The training loop of the examples: Adam on accelerate, L1 or another loss, ended by steps or by time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sr.data import InputError, Patches

MEASUREMENTS = 10  # how often a run looks at the held-out photos

Loss = Callable[[Tensor, Tensor], Tensor]  # of a batch (low, high), forward pass included


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
    return Accelerator(cpu=device == "cpu")


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
    measure: Callable[[], float],
    on_step: Callable[[float, float], None],
    make_loss: Callable[[nn.Module], Loss] = absolute_error,
) -> Trained:
    """Minimise a loss, the mean absolute error of `model(low)` to `high` unless told, over `parameters`.

    `make_loss` gets the model as it trains (wrapped, where there are several processes). `measure()` is called before,
    after and at even distances between; `on_step(progress, loss)` after each step. Time spent measuring does not count
    as training.
    """
    optimizer = torch.optim.Adam(parameters, lr=schedule.rate)
    loader = DataLoader(patches, batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_of = make_loss(model)
    losses: list[float] = []
    measured = [(0, measure())]
    due, elapsed = 1, 0.0
    for low, high in loader:
        start = time.monotonic()
        progress = schedule.progress(len(losses), elapsed)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.factor(len(losses), progress)
        model.train()
        loss = loss_of(low, high)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        elapsed += time.monotonic() - start
        progress = schedule.progress(len(losses), elapsed)
        on_step(progress, losses[-1])
        if progress >= due / MEASUREMENTS:
            measured.append((len(losses), measure()))
            due = math.floor(progress * MEASUREMENTS) + 1
        if progress >= 1:
            break
    return Trained(losses, measured, elapsed)
