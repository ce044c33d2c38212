"""Three adapters on one network: switch between them, and blend them by strength, on one photo.

    python examples/blend.py
    python examples/blend.py --photo holiday.jpg --strength night=0.6 --strength jpeg=0.4

The SPAN of the other examples carries three adapters of some 45 kB, each trained for one degradation: `camera`, `night`
and `jpeg`. `convlora.activate` says which of them act and how strongly; no weight is copied and none is lost. Without
`--photo` one photograph is degraded in four ways, the last between `night` and `jpeg`, and the table shows what each
adapter and the blend make of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from PIL import Image as PilImage
from rich.table import Table
from sr.data import Image, InputError, bundled_photos, crop_to_multiple, read_image
from sr.degradations import DEGRADATIONS, Camera, enlarge
from sr.metrics import quality
from sr.models import upscale
from sr.networks import NETWORKS, load_any
from sr.report import console, one_line_errors, show_image
from torch import nn

import convlora

BASE = NETWORKS["span"].weights
NAMES = ("camera", "night", "jpeg")
BETWEEN = Camera(width=(0.4, 1.0), noise=(8.0, 12.0), quality=(20, 40))  # `night` and `jpeg`
INPUTS = {name: DEGRADATIONS[name] for name in NAMES} | {"between": BETWEEN}
SEED = 10**9  # no training photo was degraded with it
DRAWS = 4
Strengths = Mapping[str, float]


def load_with_adapters(base: Path = BASE) -> tuple[nn.Module, int]:
    """The network with all adapters on it, none of them acting, and its scale."""
    model, scale = load_any(base)
    for name in NAMES:
        convlora.load(model, BASE.with_name(f"span_{name}.safetensors"), name=name)
    return convlora.activate(model, []), scale


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
    strength: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=NUMBER, may be repeated; else night=0.6 and jpeg=0.4.")
    ] = None,
    base: Annotated[Path, typer.Option(help="The network that the adapters were trained on.")] = BASE,
    out: Annotated[Path, typer.Option(help="Folder for what the run writes.")] = Path("runs/blend"),
) -> None:
    """Enlarge a photo with adapters switched and blended."""
    model, scale = load_with_adapters(base)
    out.mkdir(parents=True, exist_ok=True)
    chosen = parse(strength or ["night=0.6", "jpeg=0.4"])
    convlora.activate(model, chosen)
    if photo is None:
        compare(model, scale, chosen, out / "blend.png")
    else:
        file = out / f"{photo.stem}_x{scale}.png"
        PilImage.fromarray(upscale(model, read_image(photo))).save(file)
        console.print(f"wrote {file}: {label(chosen)}")


def compare(model: nn.Module, scale: int, chosen: Strengths, picture: Path) -> None:
    """Print what each adapter and the blend make of each degradation of a photo, and draw the last of them."""
    high = crop_to_multiple(bundled_photos()[1][1].pixels, scale)
    inputs = {name: [degrade(high, SEED + draw, scale) for draw in range(DRAWS)] for name, degrade in INPUTS.items()}
    table = Table(title=f"PSNR-Y (dB) of one photo by what it suffered, mean of {DRAWS} draws", title_justify="left")
    table.add_column("acting adapters", no_wrap=True)
    for name in inputs:
        table.add_column(name, justify="right")

    def add_row(name: str, outputs: Mapping[str, list[Image]]) -> None:
        reached = (quality(images, [high] * DRAWS, scale).psnr for images in outputs.values())
        table.add_row(name, *(f"{psnr:.2f}" for psnr in reached))
        pictures[name] = outputs["between"][0]

    pictures: dict[str, Image] = {}
    add_row("bicubic", {name: [enlarge(low, scale) for low in lows] for name, lows in inputs.items()})
    for strengths in ({}, *({name: 1.0} for name in NAMES), chosen):
        convlora.activate(model, strengths)
        add_row(label(strengths), {name: [upscale(model, low) for low in lows] for name, lows in inputs.items()})
    console.print(table)
    save_pictures(picture, pictures | {"ground truth": high})
    console.print(f"wrote {picture}")


def save_pictures(path: Path, pictures: Mapping[str, Image], side: int = 150) -> None:
    """The middle of each picture, side by side."""
    figure = Figure(figsize=(2 * len(pictures), 2.3), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        top, left = ((length - side) // 2 for length in image.shape[:2])
        show_image(axes, image[top : top + side, left : left + side], above=title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
