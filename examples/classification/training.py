"""The training loop that all methods share, and the outputs that they are judged by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.data import Labelled, Task

WARMUP = 0.1  # of all steps; then the rate falls along a cosine


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all methods have in common in one comparison."""

    steps: int
    batch: int = 32
    seed: int = 0


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    task: Task,
    training: Training,
    rate: float,
    *,
    frozen_statistics: bool = False,
) -> None:
    """Cross-entropy by AdamW, on batches drawn anew; the model is left in eval mode.

    `frozen_statistics`: the model stays in eval mode, so that BatchNorm uses what it knows and learns nothing.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step / training.steps))
    generator = torch.Generator().manual_seed(training.seed)
    model.train(not frozen_statistics)
    for _ in range(training.steps):
        drawn = task.batch(training.batch, generator)
        loss = F.cross_entropy(model(drawn.images), drawn.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _factor(progress: float) -> float:
    if progress < WARMUP:
        return (progress + 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, in batches of 256, in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(256)])


def accuracy(logits: Tensor, truth: Labelled) -> float:
    """The share of images whose largest logit is that of their class."""
    return float((logits.argmax(1) == truth.labels).float().mean())


def equal_states(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order and the same bits."""
    return list(one) == list(other) and all(torch.equal(value, other[key]) for key, value in one.items())
