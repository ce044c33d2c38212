"""Adapt the small SPAN in several processes: DDP or FSDP2, with gradient accumulation, an average, and checkpoints.

    torchrun --nproc_per_node 2 examples/distributed.py
    torchrun --nproc_per_node 2 examples/distributed.py --resume --steps 400

Each process reads patches of its own; a step follows the mean of all gradients. `accelerate launch` starts it on GPUs,
too (for CPUs it needs MPI), plain `python` in one process. The loop, and what a checkpoint holds, is in
examples/sr/training.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from sr.data import InputError, Patches, bundled_photos, degraded_pairs, read_folder
from sr.degradations import DEGRADATIONS
from sr.evaluation import HeldOutSet
from sr.models import SPAN_TARGETS, SPAN_WEIGHTS, load_span
from sr.report import one_line_errors, training_bar
from sr.training import Checkpoint, Schedule, set_up_run, train
from torch import nn
from torch.distributed.fsdp import fully_shard

import convlora


@one_line_errors
def main(
    photos: Annotated[Path | None, typer.Option(help="Folder to train on, else five photos of dependencies.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Folder to judge by, else three of dependencies.")] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the model (FSDP2) instead of replicating it.")] = False,
    accumulate: Annotated[int, typer.Option(help="Batches of each process in a step.", min=1)] = 1,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the adapter.", min=0, max=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
    steps: Annotated[int, typer.Option(help="Steps.", min=1)] = 200,
    lr: Annotated[float, typer.Option(help="Highest learning rate.", min=0)] = 5e-3,
    batch: Annotated[int, typer.Option(help="Patches of each process in a batch.", min=1)] = 4,
    patch: Annotated[int, typer.Option(help="Side of a low-resolution patch, pixels.", min=8)] = 48,
    rank_dropout: Annotated[float, typer.Option(help="Share of rank components that a step drops.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of adapter and patches.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for adapter and checkpoint.")] = Path("runs/distributed"),
) -> None:
    """Adapt a SPAN to degraded photos in several processes."""
    accelerator = set_up_run(out, seed=seed)  # one seed: the same adapter to begin with in every process
    if fsdp and accelerator.num_processes == 1:
        raise InputError("--fsdp: one process only; start it by torchrun --nproc_per_node 2")
    console = Console(quiet=not accelerator.is_main_process)

    # 1. Photos, the network, and an adapter: always before the model is wrapped or sharded.
    training = read_folder(photos) if photos else bundled_photos()[0]
    judging = read_folder(held_out) if held_out else bundled_photos()[1]
    camera = DEGRADATIONS["camera"]
    model, scale = load_span(SPAN_WEIGHTS)
    pairs = degraded_pairs(training, camera, scale=scale, draws=4, least=patch * scale)
    tests = HeldOutSet(degraded_pairs(judging, camera, scale=scale, seed=10**9), scale)
    convlora.inject(model, SPAN_TARGETS, rank=1, rank_dropout=rank_dropout)
    model.to(accelerator.device)
    if fsdp:
        shard(model, accelerator.device)

    # 2. Training. The model is forwarded in every process to measure, since a sharded one needs them all.
    with training_bar(console) as on_step:
        trained = train(
            model,
            convlora.parameters(model),
            Patches(pairs, patch=patch, batch=batch, seed=seed),
            Schedule(steps=steps, seconds=float("inf"), rate=lr, warmup=min(20, steps // 4)),
            accelerator,
            measure=lambda: tests.psnr(model),
            on_step=on_step,
            accumulate=accumulate,
            average=ema,
            checkpoint=Checkpoint(out / "checkpoint.pt", every, resume),
        )

    # 3. The adapter. A sharded model is gathered from all processes, and the first one writes.
    if fsdp or accelerator.is_main_process:
        convlora.save(model, out / "adapter.safetensors")
    (_, before), (_, after) = trained.measured[0], trained.measured[-1]
    console.print(
        f"{len(trained.losses)} steps of {accelerator.num_processes} x {accumulate} x {batch} patches: "
        f"{before:.3f} -> {after:.3f} dB on {len(tests.pairs)} held-out photos; wrote {out}/adapter.safetensors"
    )
    accelerator.end_training()


def shard(model: nn.Module, device: torch.device) -> None:
    """FSDP2 as PyTorch has it: each block and the rest are gathered when they run."""
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name, block in model.named_children():
        if name.startswith("block_"):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    typer.run(main)
