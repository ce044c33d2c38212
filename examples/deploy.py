"""From an adapter to a network that runs without PyTorch: train, merge, remove, export, compare.

    python examples/deploy.py

A small SPAN learns a little from degraded photos (or takes `--adapter`). Then the base, the adapted network as it
trained (live) and the merged one go through `torch.export`, ONNX and `torch.jit.trace`. Each file is loaded and run,
the ONNX one by onnxruntime, on a photo of another size than it was exported with. The merged ones must equal the live
network and have the base's graph: the same operators in the same order, and as many parameters. The script exits with 1
if they do not.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx
import onnxruntime
import torch
import typer
from rich.table import Table
from sr.data import Patches, bundled_photos, degraded_pairs, to_tensor
from sr.degradations import DEGRADATIONS
from sr.evaluation import TOLERANCE
from sr.models import SPAN_TARGETS, SPAN_WEIGHTS, load_span
from sr.report import console, one_line_errors
from sr.training import Schedule, set_up_run, train
from torch import Tensor, nn

import convlora

SIZES = (48, 64), (80, 56)  # the input at export, and another one


@dataclass(frozen=True)
class Exported:
    """A file that holds a network, loaded again."""

    run: Callable[[Tensor], Tensor]
    operators: list[str]  # in the order in which they run
    parameters: int
    size: int  # bytes


def by_export(model: nn.Module, x: Tensor, path: Path, dynamic: bool = False) -> Exported:
    """Through `torch.export`; with `dynamic` for images of any height and width."""
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=_any_size(dynamic)), path)
    program = torch.export.load(path)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    held = sum(program.state_dict[name].numel() for name in program.graph_signature.parameters)
    return Exported(program.module(), operators, held, path.stat().st_size)


def by_onnx(model: nn.Module, x: Tensor, path: Path, dynamic: bool = False) -> Exported:
    """Through ONNX, run by onnxruntime on the CPU."""
    with _quiet():
        torch.onnx.export(
            model, (x,), path, dynamo=True, dynamic_shapes=_any_size(dynamic), external_data=False, verbose=False
        )
    file = onnx.load(path)
    onnx.checker.check_model(file)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Exported(
        lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]),
        [node.op_type for node in file.graph.node],
        sum(onnx.numpy_helper.to_array(tensor).size for tensor in file.graph.initializer),
        path.stat().st_size,
    )


def by_trace(model: nn.Module, x: Tensor, path: Path, dynamic: bool = False) -> Exported:
    """Through `torch.jit.trace`, which fits any size as far as the network's code asks for none."""
    with torch.no_grad(), _quiet():
        torch.jit.trace(model, (x,)).save(path)
        traced = torch.jit.load(path)
    operators = [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("aten::")]
    return Exported(traced, operators, sum(p.numel() for p in traced.parameters()), path.stat().st_size)


WAYS: dict[str, tuple[Callable[..., Exported], str]] = {
    "torch.export": (by_export, ".pt2"),
    "ONNX": (by_onnx, ".onnx"),
    "torch.jit.trace": (by_trace, ".pt"),
}


def _any_size(dynamic: bool) -> Any:
    return ({2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)},) if dynamic else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporters say about themselves."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        yield


@one_line_errors
def main(
    adapter: Annotated[Path | None, typer.Option(help="Adapter of the shipped SPAN, else one is trained.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 30,
    out: Annotated[Path, typer.Option(help="Folder for the exported networks.")] = Path("runs/deploy"),
) -> None:
    """Export a merged network in three ways and compare it with the live one and the base."""
    accelerator = set_up_run(out, device="cpu")
    model, scale = load_span(SPAN_WEIGHTS)
    base = copy.deepcopy(model).eval()

    # 1. An adapter.
    photos, held_out = bundled_photos()
    if adapter is None:
        pairs = degraded_pairs(photos, DEGRADATIONS["camera"], scale=scale, least=96)
        convlora.inject(model, SPAN_TARGETS, rank=1)
        train(
            model,
            convlora.parameters(model),
            Patches(pairs, patch=24, batch=4, seed=0),
            Schedule(steps=steps, seconds=60.0, rate=5e-3, warmup=5),
            accelerator,
        )
    else:
        convlora.load(model, adapter)
    model.eval()

    # 2. Merged and removed: a plain network with the adapted weights.
    plain = convlora.remove(convlora.merge(copy.deepcopy(model)))

    # 3. Each network in each way, run on an image of another size.
    photo = to_tensor(held_out[0].pixels)
    first, other = (photo[..., :height, :width].contiguous() for height, width in SIZES)
    with torch.no_grad():
        live_output = model(other)
    table = Table("", "network", "|difference|", "operators", "parameters", "bytes", title_justify="left")
    table.title = "difference: the largest from the live network, in PyTorch, of full scale"
    broken = []
    for way, (export, suffix) in WAYS.items():
        rows: dict[str, Exported] = {}
        for name, network in (("base", base), ("live", model), ("merged", plain)):
            rows[name] = row = export(network, first, out / f"span_{name}{suffix}", dynamic=True)
            with torch.no_grad():
                difference = float((row.run(other) - live_output).abs().max())
            table.add_row(
                way, name, f"{difference:.0e}", f"{len(row.operators)}", f"{row.parameters:,}", f"{row.size:,}"
            )
            if name != "base" and difference > TOLERANCE:
                broken.append(f"{way}: {name} differs by {difference:.0e}")
        if (rows["merged"].operators, rows["merged"].parameters) != (rows["base"].operators, rows["base"].parameters):
            broken.append(f"{way}: merged has not the base's graph")
    console.print(table)
    if broken:
        typer.echo(f"failed: {'; '.join(broken)}", err=True)
        raise typer.Exit(1)
    console.print(f"[green]merged is the live network in the base's graph, {len(WAYS)} times[/]; files in {out}")


if __name__ == "__main__":
    typer.run(main)
