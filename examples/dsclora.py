"""Distil a small super-resolution network into itself: DSCLoRA (arXiv 2504.11271) in two minutes on a CPU.

    python examples/dsclora.py

ConvLoRA adapters on the blocks, the convolution before the upsampler and the pixel shuffle of a SPAN learn from photos
while the network without them, the frozen base, teaches: `L = λ1·L1(HR) + λ2·L1(teacher) + λ3·affinity`. There is one
set of weights in memory. Afterwards the adapter is merged: the same graph and size as the base. The script exits with 1
if the merged network is not what was trained, or differs from the base in size.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from promises import check_promises
from sr.data import Image, Patches, bundled_photos, degraded_pairs, read_folder, to_tensor
from sr.degradations import DEGRADATIONS
from sr.distillation import Distillation, inject_dsclora
from sr.evaluation import TOLERANCE, HeldOutSet, quality_table
from sr.models import SPAN_WEIGHTS, load_span, save_span
from sr.report import console, one_line_errors, run_figures, save_curve, show_sizes, training_bar
from sr.training import Schedule, set_up_run, train
from torch import Tensor, nn

import convlora
from convlora.distill import Distiller

SHOWN = "block_6[0]"  # the feature whose affinities the picture shows
Map = NDArray[np.float64]  # (h, w)


@one_line_errors
def main(
    base: Annotated[Path, typer.Option(help="SPAN checkpoint, in train form or collapsed.")] = SPAN_WEIGHTS,
    photos: Annotated[Path | None, typer.Option(help="Folder to train on, else five photos of dependencies.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Folder to judge by, else three of dependencies.")] = None,
    high: Annotated[float, typer.Option(help="λ1, the weight of L1 to the photo.", min=0)] = 1.0,
    teacher: Annotated[float, typer.Option(help="λ2, the weight of L1 to the base's output.", min=0)] = 0.2,
    affinity: Annotated[float, typer.Option(help="λ3, the weight of the spatial affinity.", min=0)] = 0.02,
    steps: Annotated[int, typer.Option(help="Steps at most.", min=1)] = 300,
    minutes: Annotated[float, typer.Option(help="Minutes at most; the schedule then shrinks to fit.", min=0.01)] = 3.0,
    lr: Annotated[float, typer.Option(help="Highest learning rate.", min=0)] = 1e-3,
    batch: Annotated[int, typer.Option(help="Patches in a step.", min=1)] = 8,
    patch: Annotated[int, typer.Option(help="Side of a low-resolution patch, pixels.", min=8)] = 32,
    seed: Annotated[int, typer.Option(help="Of adapter and patches.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads, else all.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for what the run writes.")] = Path("runs/dsclora"),
) -> None:
    """Adapt a SPAN to photos, clean x4, with its frozen base as the teacher."""
    accelerator = set_up_run(out, seed=seed, threads=threads)

    # 1. The network, the photos, and ConvLoRA where the paper has it.
    model, scale = load_span(base)
    model.to(accelerator.device)
    training = read_folder(photos) if photos else bundled_photos()[0]
    judging = read_folder(held_out) if held_out else bundled_photos()[1]
    pairs = degraded_pairs(training, DEGRADATIONS["clean"], scale=scale, least=patch * scale)
    tests = HeldOutSet(degraded_pairs(judging, DEGRADATIONS["clean"], scale=scale), scale)
    bicubic = tests.evaluate_bicubic()
    teaching = tests.evaluate("base, the teacher", model)
    inject_dsclora(model)
    sizes = show_sizes(model, f"{len(training)} photos", accelerator.device)

    # 2. Training; examples/sr/distillation.py has the loss.
    with training_bar(console) as on_step:
        trained = train(
            model,
            convlora.parameters(model),
            Patches(pairs, patch=patch, batch=batch, seed=seed),
            Schedule(steps=steps, seconds=60 * minutes, rate=lr, warmup=20),
            accelerator,
            measure=lambda: tests.psnr(model),
            on_step=on_step,
            make_loss=Distillation(high, teacher, affinity),
        )
    adapted = tests.evaluate("adapted", model)
    save_affinity(out / "affinity.png", model, tests.pairs[0].low)

    # 3. Merged: what is deployed.
    convlora.save(model, out / "adapter.safetensors")
    plain = convlora.remove(convlora.merge(copy.deepcopy(model)))
    save_span(plain, out / "span_merged.safetensors")
    merged = tests.evaluate("merged", plain, same=adapted)

    # 4. What came out.
    rows = [bicubic, teaching, adapted, merged]
    console.print(quality_table(rows, teaching, f"{len(tests.pairs)} held-out photos, clean"))
    save_curve(out / "curve.png", trained)
    results = {
        "weights": {"high": high, "teacher": teacher, "affinity": affinity},
        "seconds": round(trained.seconds, 1),
        **run_figures(sizes, trained, out / "adapter.safetensors", rows),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(
        f"{len(trained.losses)} steps in {trained.seconds:.0f} s; wrote {len(list(out.iterdir()))} files to {out}"
    )
    check_promises(
        {
            f"merged equals adapted to {TOLERANCE}": merged.difference <= TOLERANCE,
            "merged has the base's size": sum(p.numel() for p in plain.parameters()) == sizes["base_parameters"],
        }
    )


def affinity_maps(model: nn.Module, low: Tensor, pixel: tuple[int, int]) -> tuple[Map, Map]:
    """Affinity of one pixel to all others, `(h, w)` each: the student's and the teacher's."""
    maps: list[Map] = []

    def look(*features: Tensor) -> Tensor:
        for feature in features:
            unit = F.normalize(feature[0].double(), dim=0)  # (c, h, w)
            maps.append(torch.einsum("chw,c->hw", unit, unit[:, pixel[0], pixel[1]]).cpu().numpy())
        return torch.zeros(())

    with torch.no_grad():
        Distiller(model.eval(), [SHOWN], loss=look)(low)
    return maps[0], maps[1]


def save_affinity(path: Path, model: nn.Module, low: Image) -> None:
    """A picture: the photo and a pixel in it, that pixel's affinities by teacher and student, and their difference."""
    pixel = low.shape[0] // 2, low.shape[1] // 2
    device = next(model.parameters()).device
    student, teacher = affinity_maps(model, to_tensor(low).to(device), pixel)
    change = student - teacher
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    photo, left, middle, right = figure.subplots(1, 4)
    photo.imshow(low)
    photo.set_title("photo and pixel", fontsize=9)
    for axes, title, values in ((left, "teacher", teacher), (middle, "student", student)):
        figure.colorbar(axes.imshow(values, cmap="magma", vmin=float(teacher.min()), vmax=1), ax=axes, shrink=0.7)
        axes.set_title(f"affinity to it: {title}", fontsize=9)
    most = float(np.abs(change).max()) or 1.0
    figure.colorbar(right.imshow(change, cmap="RdBu", vmin=-most, vmax=most), ax=right, shrink=0.7)
    right.set_title("student - teacher", fontsize=9)
    for axes in (photo, left, middle, right):
        axes.plot(pixel[1], pixel[0], "+", color="#00d1ff", markersize=9, markeredgewidth=1.5)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
