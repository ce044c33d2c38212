"""PSNR and SSIM of a SPAN, SwinIR or RRDBNet, with or without an adapter, on folders of photos.

    python examples/evaluate.py Set5/HR BSDS/val
    python examples/evaluate.py BSDS/val --degradation camera --adapter runs/span/adapter.safetensors
    python examples/evaluate.py Set5/HR --base RealESRGAN_x4plus.pth

Each photo is cropped to a multiple of the scale and degraded once, the n-th with seed n; PSNR and
SSIM are of luma, without the outermost pixels (as many as the scale), as papers report them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from sr import degradations
from sr.data import Image, Pair, degraded_pairs, read_folder
from sr.degradations import DEGRADATIONS, enlarge
from sr.metrics import quality
from sr.models import upscale
from sr.networks import NETWORKS, load_any
from sr.report import one_line_errors

import convlora

WEIGHTS = NETWORKS["span"].weights


@one_line_errors
def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of photos, each one line of the table.")],
    base: Annotated[Path, typer.Option(help="Checkpoint of one of the three networks.")] = WEIGHTS,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to put on it.")] = None,
    degradation: Annotated[degradations.Name, typer.Option(help="What photos suffer.")] = "clean",
    threads: Annotated[int | None, typer.Option(help="CPU threads, else all.", min=1)] = None,
) -> None:
    """Measure a network, and an adapter on it, on folders of photos."""
    if threads:
        torch.set_num_threads(threads)
    model, scale = load_any(base)
    enlargers: dict[str, Callable[[Pair], Image]] = {
        "bicubic": lambda pair: enlarge(pair.low, scale),
        base.stem: lambda pair: upscale(model, pair.low),
    }
    if adapter is not None:
        adapted = convlora.merge(convlora.load(load_any(base)[0], adapter))
        enlargers[adapter.stem] = lambda pair: upscale(adapted, pair.low)

    table = Table(title=f"PSNR-Y (dB) / SSIM-Y, input: {degradation}", title_justify="left")
    for column in ("", "photos", *enlargers):
        table.add_column(column, justify="right" if column else "left")
    for folder in folders:
        pairs = degraded_pairs(read_folder(folder), DEGRADATIONS[degradation], scale=scale)
        cells = [measure(pairs, [enlarger(pair) for pair in pairs], scale) for enlarger in enlargers.values()]
        table.add_row("/".join(folder.parts[-2:]), str(len(pairs)), *cells)
    Console().print(table)


def measure(pairs: list[Pair], outputs: list[Image], scale: int) -> str:
    """`"31.74 / 0.889"`: the means over the photos."""
    reached = quality(outputs, [pair.high for pair in pairs], scale)
    return f"{reached.psnr:.3f} / {reached.ssim:.4f}"


if __name__ == "__main__":
    typer.run(main)
