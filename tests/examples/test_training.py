"""The training loop of the examples: accumulation, the average, checkpoints, and two processes under DDP and FSDP2."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("spandrel")
pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from PIL import Image as PilImage
from processes import in_processes
from sr.data import InputError, Pair, Patches
from sr.degradations import clean
from sr.models import new_span
from sr.training import Checkpoint, Schedule, Trained, absolute_error, make_accelerator, train
from torch.distributed.fsdp import fully_shard

import convlora


class Stopped(Exception):
    """As if the machine had gone."""


def patches(seed: int = 0) -> Patches:
    rng = np.random.default_rng(0)
    highs = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2)]
    return Patches([Pair("", clean(high), high) for high in highs], patch=8, batch=2, seed=seed)


def network(seed: int = 0) -> nn.Module:
    """A tiny SPAN; `seed` is of its adapter, the base is always the same."""
    torch.manual_seed(0)
    model = new_span(8)
    torch.manual_seed(seed)
    return convlora.inject(model, "block_*.c?_r", rank=2, rank_dropout=0.3)


def run(model: nn.Module, steps: int = 6, *, stop: int | None = None, **options: Any) -> Trained:
    """Train; with `stop`, until the measurement after that step fails."""
    seen: list[float] = []

    def measure() -> float:
        if stop is not None and len(seen) > stop:
            raise Stopped
        seen.append(sum(p.detach().sum().item() for p in whole(model).values()))
        return seen[-1]

    return train(
        model, convlora.parameters(model), patches(), Schedule(steps, float("inf"), 0.01, 2), make_accelerator("cpu"),
        measure=measure, on_step=lambda progress, loss: None, **options,
    )  # fmt: skip


def whole(model: nn.Module) -> dict[str, Tensor]:
    layers = convlora.adapter(model).layers
    return {f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.tensors.items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, whole(one).values(), whole(other).values()))


# --- one process ---------------------------------------------------------------------------------------------------


def test_accumulated_batches_count_as_one() -> None:
    model, seen = network(), []

    def make_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda low, high: seen.append((low, high)) or absolute_error(model)(low, high)  # type: ignore[func-returns-value]

    for module in model.modules():  # no dropped components: masks differ between one batch and two
        if hasattr(module, "rank"):
            module.config = module.config.replace(rank_dropout=0.0)
    gradients: list[Tensor] = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
        for p in convlora.parameters(model)[1:2]  # lora_B; the gradient of lora_A is zero at first
    ]
    before = whole(model)
    trained = run(model, 1, make_loss=make_loss, accumulate=3)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    stream = iter(patches())
    assert all(torch.equal(low, next(stream)[0]) for low, _ in seen)
    with torch.no_grad():
        for parameter, value in zip(convlora.parameters(model), before.values(), strict=True):
            parameter.copy_(value)
            parameter.grad = None
    loss = absolute_error(model.train())(*(torch.cat(tensors) for tensors in zip(*seen, strict=True)))
    loss.backward()
    assert trained.losses == [pytest.approx(loss.item(), rel=1e-5)]
    torch.testing.assert_close(gradients[-1], convlora.parameters(model)[1].grad, rtol=1e-4, atol=1e-8)
    assert bool(gradients[-1].any())


def test_the_average_is_what_is_measured_and_what_stays() -> None:
    plain, averaged = network(), network()
    values: list[dict[str, Tensor]] = []
    train(
        plain, convlora.parameters(plain), patches(), Schedule(4, float("inf"), 0.01, 2), make_accelerator("cpu"),
        measure=lambda: values.append(whole(plain)) or 0.0, on_step=lambda progress, loss: None,
    )  # fmt: skip
    torch.manual_seed(0)
    averaged = network()
    trained = run(averaged, 4, average=0.2)
    expected = values[0]
    for step, value in enumerate(values[1:]):
        decay = min(0.2, (1 + step) / (10 + step))
        expected = {name: decay * tensor + (1 - decay) * value[name] for name, tensor in expected.items()}
        total = sum(t.sum().item() for t in expected.values())
        assert trained.measured[step + 1][1] == pytest.approx(total, rel=1e-4, abs=1e-4)
    for name, tensor in whole(averaged).items():
        torch.testing.assert_close(tensor, expected[name])
    assert not same(plain, averaged)


@pytest.mark.parametrize("options", [{}, {"average": 0.9, "accumulate": 2}])
def test_a_stopped_run_goes_on_bitwise(options: dict[str, Any], tmp_path: Path) -> None:
    model = network()
    trained = run(model, checkpoint=Checkpoint(tmp_path / "whole.pt", 2), **options)
    with pytest.raises(Stopped):
        run(network(), stop=4, checkpoint=Checkpoint(tmp_path / "run.pt", 2), **options)
    again = network(seed=5)
    resumed = run(again, checkpoint=Checkpoint(tmp_path / "run.pt", 2, resume=True), **options)
    assert same(model, again)
    assert resumed.losses == trained.losses
    assert resumed.measured == trained.measured
    finished = network(seed=6)
    over = run(finished, checkpoint=Checkpoint(tmp_path / "run.pt", 2, resume=True), **options)
    assert over.losses == trained.losses
    assert same(model, finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "whole.pt"]


def test_a_checkpoint_that_does_not_fit_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(network(), 1, checkpoint=Checkpoint(path))
    (tmp_path / "broken.pt").write_bytes(path.read_bytes()[:1000])
    cases: dict[str, tuple[Path, dict[str, Any]]] = {
        "no checkpoint": (tmp_path / "none.pt", {}),
        "cannot be read": (tmp_path / "broken.pt", {}),
        "of a run with accumulate 1, this one has 2": (path, {"accumulate": 2}),
        "of a run without an average": (path, {"average": 0.9}),
    }
    for message, (place, options) in cases.items():
        model = network()
        before = whole(model)
        with pytest.raises(InputError, match=message):
            run(model, checkpoint=Checkpoint(place, resume=True), **options)
        assert all(map(torch.equal, before.values(), whole(model).values()))


# --- two processes -------------------------------------------------------------------------------------------------


def _of_each(rank: int, folder: str) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"average": 0.9, "accumulate": 2}
    for kind in ("ddp", "fsdp"):

        def made(seed: int = 0, kind: str = kind) -> nn.Module:
            model = network(seed)
            return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,))) if kind == "fsdp" else model

        model = made()
        trained = run(model, 4, checkpoint=Checkpoint(Path(folder, f"{kind}-whole.pt"), 2), **options)
        path = Path(folder, f"{kind}.pt")
        with pytest.raises(Stopped):
            run(made(), 4, stop=2, checkpoint=Checkpoint(path, 2), **options)
        again = made(seed=5 + rank if kind == "ddp" else 5)
        resumed = run(again, 4, checkpoint=Checkpoint(path, 2, resume=True), **options)
        found[kind] = trained, resumed, whole(model), whole(again)
    return found


def test_two_processes_share_each_step_and_resume_bitwise(tmp_path: Path) -> None:
    two = in_processes(tmp_path, _of_each, str(tmp_path))
    for kind in ("ddp", "fsdp"):
        for trained, resumed, adapter, again in (found[kind] for found in two):
            assert resumed.losses == trained.losses == two[0][kind][0].losses
            assert resumed.measured == trained.measured
            for name, tensor in adapter.items():
                assert torch.equal(tensor, two[0][kind][2][name])
                assert torch.equal(tensor, again[name])
    # Up to the first checkpoint; writing one draws random numbers where weights are whole (rank dropout).
    assert two[0]["ddp"][0].losses[:2] == pytest.approx(two[0]["fsdp"][0].losses[:2], rel=1e-4)
    other = patches()
    other.seed = (0, 1)
    streams = [iter(patches()), iter(other)]
    batches = [next(stream) for stream in streams for _ in range(2)]
    assert not torch.equal(batches[0][0], batches[2][0])
    model = network()  # its update is still zero, so that dropped components change no loss
    losses = [absolute_error(model)(*batch).item() for batch in batches]
    assert two[0]["ddp"][0].losses[0] == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("options", [["--fsdp", "--accumulate", "2", "--ema", "0.9"]])
def test_distributed_py_as_a_user_starts_it(tmp_path: Path, options: list[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        PilImage.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / f"photos/{name}.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1", str(ROOT / "examples/distributed.py")]
    folders = ["--photos", str(tmp_path / "photos"), "--held-out", str(tmp_path / "photos")]
    command += [*folders, "--patch", "16", "--batch", "2", "--steps", "2", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 steps of 2 x 2 x 2 patches") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter.safetensors", "checkpoint.pt"]
    adapter = convlora.Adapter.read(tmp_path / "out/adapter.safetensors")
    assert len(adapter.layers) == 22
    assert all(bool(layer.tensors["lora_B"].any()) for layer in adapter.layers.values())
