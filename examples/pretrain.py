"""Train the small networks that the examples adapt: SPAN, SwinIR or RRDBNet, x4, clean bicubic input.

    python examples/pretrain.py --images BSDS/train --test Set5/HR --exclude 302003 --compile
    python examples/pretrain.py --network swinir --images BSDS/train --test Set5/HR --exclude 302003
    python examples/pretrain.py --network rrdb --images BSDS/train --test Set5/HR --exclude 302003

Adam on L1 over patches of the photos and of the photos at 0.7 of their size, turned and mirrored;
the learning rate falls along a cosine over the minutes given, and what is saved is an exponential
average of the weights. The last quarter of the time sees larger patches.

Three things make less than an hour on one core enough. The network starts as bicubic interpolation,
along its own skip past the body; its random weights are scaled so that every layer is heard; and
what enters the first random layers is near 1. SPAN therefore trains with its input times 4 instead
of 255, and the file holds `conv_1` divided accordingly, the same function for code that multiplies
by 255.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from spandrel.architectures.SPAN import SPAN
from sr.data import Image, Pair, Patches, Photo, crop_photos, crop_to_multiple, read_folder, to_image, to_tensor
from sr.degradations import clean, resize
from sr.metrics import quality
from sr.models import new_span, save_weights, upscale
from sr.networks import new_rrdb, new_swinir
from sr.report import one_line_errors
from sr.starts import balance_layers, balance_span, start_rrdb, start_span, start_swinir
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

RANGE = 4.0  # what the input, less its mean, is multiplied by during training
FACTORS = (1.0, 0.7)  # sizes of the photos
WARMUP = 200  # steps


@dataclass(frozen=True)
class Recipe:
    """How one network is made and trained.

    `start(width, low)` builds it, as bicubic interpolation and balanced on a batch `low` `(n, 3, h, w)`; `patches` are
    (from this share of the time on, side of a low patch in pixels).
    """

    architecture: str
    start: Callable[[int, Tensor], nn.Module]
    width: int
    patches: tuple[tuple[float, int], ...]
    remark: str = ""


RECIPES = {
    "span": Recipe(
        "SPAN x4, {} channels, Conv3XC collapsed to 3x3",
        lambda width, low: balance_span(start_span(new_span(width, img_range=RANGE)), low),
        width=26,
        patches=((0.0, 32), (0.75, 48)),
        remark=f", input range {RANGE}",
    ),
    "swinir": Recipe(
        "SwinIR x4, {} channels, depths (4, 4), 2 heads, windows 8x8, MLP ratio 2, pixelshuffledirect",
        lambda width, low: balance_layers(start_swinir(new_swinir(width)), low),
        width=36,
        patches=((0.0, 24), (0.75, 32)),
    ),
    "rrdb": Recipe(
        "RRDBNet x4, {} channels, growth 32, 1 block of 3 dense ones",
        lambda width, low: balance_layers(start_rrdb(new_rrdb(width)), low),
        width=16,
        patches=((0.0, 24), (0.75, 32)),
    ),
}


def shrunk(image: Image, factor: float) -> Image:
    """The photo resized by `factor`."""
    height, width = (round(side * factor) for side in image.shape[:2])
    return image if factor == 1 else to_image(resize(to_tensor(image), height, width))


def clean_pairs(photos: list[Photo], factors: tuple[float, ...]) -> list[Pair]:
    """Every photo at every factor, with its clean low-resolution input."""
    pairs = []
    for photo in photos:
        for factor in factors:
            high = crop_to_multiple(shrunk(photo.pixels, factor), 4)
            pairs.append(Pair(photo.name, clean(high), high))
    return pairs


def learning_rate(progress: float, step: int, peak: float) -> float:
    """A linear warm-up, then a cosine from `peak` to a thousandth of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / WARMUP) * (0.001 + 0.999 * cosine)


def save(model: nn.Module, path: Path, facts: dict[str, object]) -> None:
    """Write the weights; those of a SPAN as it has them, for an input times 255."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if isinstance(model, SPAN):
        state["conv_1.weight"] *= model.img_range / 255
    save_weights(state, path, facts)


@one_line_errors
def main(
    images: Annotated[Path, typer.Option(help="Folder of training photos.")],
    test: Annotated[Path | None, typer.Option(help="Folder of test photos (Set5's HR).")] = None,
    network: Annotated[Literal["span", "swinir", "rrdb"], typer.Option(help="What to train.")] = "span",
    out: Annotated[
        Path | None, typer.Option(help="Weights to write, else span_x4_c26.safetensors or the like.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Photo to leave out, by stem.")] = None,
    minutes: Annotated[float, typer.Option(help="Length of the training.")] = 39.0,
    peak: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Patches in a step.")] = 8,
    channels: Annotated[int | None, typer.Option(help="Width, else 26 (SPAN), 36 (SwinIR) or 16 (RRDBNet).")] = None,
    average: Annotated[float, typer.Option(help="Decay of the weight average.")] = 0.999,
    seed: Annotated[int, typer.Option(help="Seed of the weights and patches.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    every: Annotated[int, typer.Option(help="Steps between two saved checkpoints.")] = 500,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the network.")] = False,
) -> None:
    """Train a network x4 from random weights and write it as safetensors."""
    recipe = RECIPES[network]
    width = channels or recipe.width
    out = out or Path(f"{network}_x4_c{width}.safetensors")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    photos = [photo for photo in read_folder(images) if photo.name not in set(exclude or [])]
    least = math.ceil(4 * max(patch for _, patch in recipe.patches) / min(FACTORS)) + 4
    pairs = clean_pairs(crop_photos(photos, 4, least), FACTORS)
    tests = clean_pairs(read_folder(test), (1.0,)) if test else []
    print(f"{len(photos)} photos, {len(pairs)} pairs, {len(tests)} test photos", flush=True)

    first = next(iter(Patches(pairs, patch=recipe.patches[0][1], batch=batch, seed=seed)))[0]
    model = recipe.start(width, first)
    model.to(memory_format=torch.channels_last)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average))
    optimizer = torch.optim.Adam(model.parameters(), lr=peak, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    streams = [(share, iter(Patches(pairs, patch=patch, batch=batch, seed=seed))) for share, patch in recipe.patches]

    start, step, recent, progress = time.monotonic(), 0, [], 0.0
    while progress < 1:
        low, high = next([stream for share, stream in streams if share <= progress][-1])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, peak)
        loss = F.l1_loss(forward(low.contiguous(memory_format=torch.channels_last)), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
        recent.append(loss.item())
        step += 1
        progress = (time.monotonic() - start) / (60 * minutes)
        if step % every == 0 or progress >= 1:
            facts = {
                "architecture": recipe.architecture.format(width),
                "data": f"{images.parent.name}/{images.name}: {len(photos)} photos at {FACTORS}",
                "excluded": exclude or [],
                "input": "bicubic x1/4, antialiased, rounded to uint8",
                "recipe": f"L1, Adam, lr {peak} cosine, batch {batch}, LR patch {recipe.patches}, weight "
                f"average {average}, start as bicubic, balanced{recipe.remark}, seed {seed}",
                "steps": step,
                "minutes": round(progress * minutes, 1),
                "torch": torch.__version__,
            }
            save(averaged.module, out, facts)
            outputs = [upscale(averaged.module, pair.low) for pair in tests]
            reached = quality(outputs, [p.high for p in tests]).psnr if tests else float("nan")
            model.train()
            print(
                f"{step:6d}  {60 * minutes * progress:5.0f} s  lr {group['lr']:.2e}  "
                f"loss {sum(recent) / len(recent):.5f}  test {reached:.3f} dB",
                flush=True,
            )
            recent.clear()


if __name__ == "__main__":
    typer.run(main)
