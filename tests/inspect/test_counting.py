"""What `benchmarks/counting.py` counts, against sums on paper; and that the program on top of it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convlora
from benchmarks.counting import count_step, saved_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_and_memory_of_a_frozen_and_of_a_trained_layer(device: str) -> None:
    layer = nn.Conv2d(6, 10, 3, padding=1, device=device)
    x = torch.ones(2, 6, 8, 8, device=device, requires_grad=True)
    product = 2 * (2 * 8 * 8) * (10 * 6 * 9)

    def loss() -> Tensor:
        return layer(x.clone()).square().mean()

    trained = count_step(layer, loss)
    assert (trained.flops, trained.trained, trained.optimizer) == (3 * product, 550, 2 * 4 * 550)
    output, scalar = 4 * 2 * 10 * 64, 4
    assert trained.kept == 4 * x.numel() + output + scalar
    layer.requires_grad_(False)
    frozen = count_step(layer, loss)
    assert (frozen.flops, frozen.trained, frozen.optimizer) == (2 * product, 0, 0)


def test_views_are_no_kernels() -> None:
    x = torch.ones(4, 6, device="meta", requires_grad=True)
    plain = count_step(nn.Identity(), lambda: x.sum())
    viewed = count_step(nn.Identity(), lambda: x.view(2, 12).t().reshape(24, 1).squeeze().unsqueeze(0).sum())
    assert plain.kernels + 1 == viewed.kernels  # `reshape` of a transposed copies


def test_what_is_held_behind_the_back_of_autograd_is_seen() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.held = x * 2  # type: ignore[attr-defined]
            return x * 3

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * ctx.held  # type: ignore[attr-defined,no-any-return]

    x = torch.ones(1000, device="meta", requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda: Hidden.apply(x).sum()) == 0
    assert count_step(nn.Identity(), lambda: Hidden.apply(x).sum()).kept == 4000 + 4


def test_both_ways_to_count_memory_agree_on_an_adapted_chain() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 8))
    x = torch.ones(2, 8, 8, 8, device="meta", requires_grad=True)
    model.requires_grad_(False)
    frozen = count_step(model, lambda: model(x).square().sum())
    assert frozen.kept == saved_bytes(model, lambda: model(x).square().sum()) + 4 - x.nbytes
    convlora.inject(model, "*", rank=2, factors="locon")
    adapted = count_step(model, lambda: model(x).square().sum())
    assert adapted.flops > frozen.flops
    assert adapted.kept >= frozen.kept
    assert adapted.trained == sum(p.numel() for p in convlora.parameters(model))


def test_the_table_of_costs_runs() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("lycoris")
    done = subprocess.run(
        [sys.executable, "benchmarks/cost.py", "--quick", "--net", "SPAN-48"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("float32 | SPAN-48")]
    assert [row[3] for row in rows] == [
        "frozen", "full", "PEFT", "LyCORIS", "loralib", "convlora, LoCon factors", "convlora, ConvLoRA factors"
    ]  # fmt: skip
    assert [row[5] for row in rows][:2] == ["1.000", "1.500"]
