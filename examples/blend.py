"""Three adapters on one network: switch between them, and blend them by strength, on one photo.

    python examples/blend.py
    python examples/blend.py --photo holiday.jpg --strength night=0.6 --strength jpeg=0.4

The SPAN of the other examples carries three adapters of some 45 kB, each trained for one degradation: `camera`, `night`
and `jpeg`. `convlora.activate` says which of them act and how strongly; no weight is copied and none is lost. Without
`--photo` a photograph is degraded in four ways, the last between `night` and `jpeg`, and the table shows what each
adapter and each blend makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sr.data import Image, InputError, bundled_photos, crop_to_multiple, read_image
from sr.degradations import DEGRADATIONS, Camera, enlarge
from sr.metrics import psnr_y
from sr.models import load_span, upscale
from sr.report import one_line_errors
from torch import nn

import convlora

WEIGHTS = Path(__file__).parent / "weights"
BASE = WEIGHTS / "span_x4_c26.safetensors"
NAMES = ("camera", "night", "jpeg")
MIXED = Camera(noise=(10.0, 12.0), quality=(25, 30))  # between `night` and `jpeg`
SEED = 10**9  # no training photo was degraded with it
Strengths = Mapping[str, float]

console = Console()


def load_with_adapters(base: Path = BASE, folder: Path = WEIGHTS) -> tuple[nn.Module, int]:
    """The network with all adapters on it, none of them acting, and its scale."""
    model, scale = load_span(base)
    for name in NAMES:
        convlora.load(model, folder / f"span_{name}.safetensors", name=name)
    return convlora.activate(model, []).eval(), scale


def label(strengths: Strengths) -> str:
    """`"0.6 night + 0.4 jpeg"`; the base where none acts."""
    parts = (name if strength == 1 else f"{strength:g} {name}" for name, strength in strengths.items())
    return " + ".join(parts) or "base"


def parse(texts: list[str]) -> dict[str, float]:
    """`["night=0.6", "jpeg"]` as strengths."""
    strengths = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            strengths[name] = float(value or 1)
        except ValueError:
            raise InputError(f"strength {text}: expected NAME or NAME=NUMBER") from None
    return strengths


@one_line_errors
def main(
    photo: Annotated[Path | None, typer.Option(help="A small photo to enlarge, else one of dependencies.")] = None,
    strength: Annotated[list[str] | None, typer.Option(help="NAME or NAME=NUMBER; may be repeated.")] = None,
    base: Annotated[Path, typer.Option(help="The network that the adapters were trained on.")] = BASE,
    out: Annotated[Path, typer.Option(help="Folder for what the run writes.")] = Path("runs/blend"),
) -> None:
    """Enlarge a photo with adapters switched and blended."""
    model, scale = load_with_adapters(base)
    out.mkdir(parents=True, exist_ok=True)
    chosen = parse(strength or ["night=0.5", "jpeg=0.5"])
    blends: list[Strengths] = [{}, *({name: 1.0} for name in NAMES), chosen]
    if photo is not None:
        low = read_image(photo)
        convlora.activate(model, chosen)
        save_pictures(out / "blend.png", {label(chosen): upscale(model, low), "bicubic": enlarge(low, scale)})
        console.print(f"wrote {out / 'blend.png'}: {photo.name} with {label(chosen)}")
        return

    high = crop_to_multiple(bundled_photos()[1][1].pixels, scale)
    inputs = {name: DEGRADATIONS[name](high, SEED, scale) for name in NAMES} | {"mixed": MIXED(high, SEED, scale)}
    table = Table(title="PSNR-Y (dB) of one photo", title_justify="left")
    table.add_column("acting adapters")
    for name in inputs:
        table.add_column(f"input: {name}", justify="right")
    table.add_row("bicubic", *(f"{psnr_y(enlarge(low, scale), high, scale):.2f}" for low in inputs.values()))
    pictures = {"truth": high, "bicubic": enlarge(inputs["mixed"], scale)}
    for strengths in blends:
        convlora.activate(model, strengths)
        outputs = {name: upscale(model, low) for name, low in inputs.items()}
        table.add_row(label(strengths), *(f"{psnr_y(output, high, scale):.2f}" for output in outputs.values()))
        pictures[label(strengths)] = outputs["mixed"]
    console.print(table)
    save_pictures(out / "blend.png", pictures)
    console.print(f"wrote {out / 'blend.png'}")


def save_pictures(path: Path, pictures: Mapping[str, Image], side: int = 160) -> None:
    """The middle of each picture side by side."""
    figure = Figure(figsize=(2.1 * len(pictures), 2.4), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True):
        top, left = ((length - min(side, length)) // 2 for length in image.shape[:2])
        axes.imshow(image[top : top + side, left : left + side], interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
