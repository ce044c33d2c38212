"""PSNR and SSIM of a SPAN, with or without an adapter, on folders of photos.

    python examples/evaluate.py Set5/HR BSDS/val
    python examples/evaluate.py BSDS/val --degradation camera --adapter runs/span/adapter.safetensors

Each photo is cropped to a multiple of the scale and degraded once, the n-th with seed n; PSNR and
SSIM are of luma, without the outermost pixels (as many as the scale), as papers report them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from sr.data import Image, Pair, degraded_pairs, prepare, read_folder
from sr.degradations import DEGRADATIONS, enlarge
from sr.metrics import quality
from sr.models import SPAN_WEIGHTS, load_span, upscale
from sr.report import one_line_errors

import convlora


@one_line_errors
def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of photos, each one line of the table.")],
    base: Annotated[Path, typer.Option(help="SPAN checkpoint, in train form or collapsed.")] = SPAN_WEIGHTS,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to put on it.")] = None,
    degradation: Annotated[Literal["clean", "camera", "night"], typer.Option(help="What photos suffer.")] = "clean",
    threads: Annotated[int | None, typer.Option(help="CPU threads, else all.", min=1)] = None,
) -> None:
    """Measure a SPAN, and an adapter on it, on folders of photos."""
    if threads:
        torch.set_num_threads(threads)
    model, scale = load_span(base)
    enlargers: dict[str, Callable[[Pair], Image]] = {
        "bicubic": lambda pair: enlarge(pair.low, scale),
        base.stem: lambda pair: upscale(model, pair.low),
    }
    if adapter is not None:
        adapted = convlora.merge(convlora.load(load_span(base)[0], adapter))
        enlargers[adapter.stem] = lambda pair: upscale(adapted, pair.low)

    table = Table(title=f"PSNR-Y (dB) / SSIM-Y, input: {degradation}", title_justify="left")
    for column in ("", "photos", *enlargers):
        table.add_column(column, justify="right" if column else "left")
    for folder in folders:
        photos = prepare(read_folder(folder), scale, least=64)
        pairs = degraded_pairs(photos, DEGRADATIONS[degradation], scale=scale, draws=1, seed=0)
        cells = [measure(pairs, [enlarger(pair) for pair in pairs], scale) for enlarger in enlargers.values()]
        table.add_row("/".join(folder.parts[-2:]), str(len(pairs)), *cells)
    Console().print(table)


def measure(pairs: list[Pair], outputs: list[Image], scale: int) -> str:
    """`"31.74 / 0.889"`: the means over the photos."""
    reached = quality(outputs, [pair.high for pair in pairs], scale)
    return f"{reached.psnr:.3f} / {reached.ssim:.4f}"


if __name__ == "__main__":
    typer.run(main)
