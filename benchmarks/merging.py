"""Two adapters in one: does a sparse merge beat their weighted sum?

    python benchmarks/merging.py
    python benchmarks/merging.py --photos BSDS/val

The adapters `night` and `jpeg` that are shipped for the SPAN, merged in every way that `Adapter.combine` knows, on
photos that were degraded as either was trained for. Gain in PSNR-Y over the base, in dB.
"""

from __future__ import annotations

import copy
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, Section, facts_of_run, write_results
from sr.data import choose_photos, degraded_pairs, read_folder
from sr.degradations import DEGRADATIONS
from sr.metrics import quality
from sr.models import upscale
from sr.networks import NETWORKS, load_any

import convlora
from convlora import Adapter

TASKS = ("night", "jpeg")
WEIGHTS = Path(__file__).parents[1] / "examples" / "weights"
DENSITIES = (0.2, 0.5, 0.8)


def ways(adapters: list[Adapter]) -> dict[str, Adapter]:
    """Name -> one adapter."""
    found = dict(zip(TASKS, adapters, strict=True))
    for weight in (0.5, 0.7, 1.0):
        found[f"sum, weights {weight}"] = Adapter.combine(adapters, [weight, weight])
    for method in ("magnitude", "dare", "ties"):
        for density in DENSITIES:
            weight = 1.0 if method == "ties" else 0.7
            options: dict[str, Any] = {"method": method, "density": density}
            found[f"{method}, density {density}, weights {weight}"] = Adapter.combine(
                adapters, [weight, weight], **options
            )
    return found


def main(
    photos: Annotated[Path | None, typer.Option(help="Folder of photos, else those of scikit-image.")] = None,
    most: Annotated[int, typer.Option(help="Photos of the folder at most.", min=1)] = 12,
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "merging.json",
) -> None:
    """The two adapters merged in every way, on both degradations."""
    facts = facts_of_run("torch", "convlora", "scikit-image")
    chosen = choose_photos(None, None)[1] if photos is None else read_folder(photos)[:most]
    base, scale = load_any(NETWORKS["span"].weights)
    pairs = {task: degraded_pairs(chosen, DEGRADATIONS[task], scale=scale) for task in TASKS}

    def reached(model: torch.nn.Module, task: str) -> float:
        outputs = [upscale(model, pair.low) for pair in pairs[task]]
        return quality(outputs, [pair.high for pair in pairs[task]], scale).psnr

    plain = {task: reached(base, task) for task in TASKS}
    section = Section(
        "Two adapters of the SPAN in one",
        f"Gain over the base in dB, mean of {len(chosen)} photos; base: "
        + ", ".join(f"{task} {value:.2f} dB" for task, value in plain.items())
        + ".",
        ("one adapter of two", *TASKS, "mean"),
    )
    for name, adapter in ways([Adapter.read(WEIGHTS / f"span_{task}.safetensors") for task in TASKS]).items():
        model = convlora.merge(convlora.load(copy.deepcopy(base), adapter))
        gains = [reached(model, task) - plain[task] for task in TASKS]
        mean = sum(gains) / len(gains)
        section.add(name, *(f"{gain:+.3f}" for gain in (*gains, mean)), way=name, gains=gains)
        print(*section.rows[-1], sep=" | ", flush=True)
    section.show()
    write_results(out, shlex.join(["python", "benchmarks/merging.py", *sys.argv[1:]]), facts, [section])


if __name__ == "__main__":
    typer.run(main)
