"""The commands that make files: merge, extract, resize, combine, convert."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from convlora import formats
from convlora.adapter.adapter import Adapter
from convlora.adapter.checkpoint import plan_merge
from convlora.adapter.parts import base_key
from convlora.cli.architecture import layers_of
from convlora.cli.console import emit, progress
from convlora.cli.inputs import (
    check_output,
    check_rank_or_energy,
    describe_match,
    fit_to_base,
    match_base,
    per_adapter,
    read_adapter,
    read_base,
    read_training_checkpoint,
    size_in_bytes,
)
from convlora.cli.options import (
    Adapters,
    Alpha,
    Base,
    BaseOption,
    Energy,
    File,
    Force,
    Form,
    Json,
    Name,
    Network,
    Out,
    Part,
    Prefix,
    Rank,
)
from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.formats.checkpoints import SAFETENSORS, SUFFIXES, Checkpoint
from convlora.support.table import text_table
from convlora.support.tensorfile import shapes_of

ROUNDING = 1e-6  # of float32 factors: an error below it is none


def merge(
    base: Base,
    adapters: Adapters,
    out: Out,
    strength: Annotated[
        list[str] | None,
        typer.Option(
            "--strength",
            "-s",
            metavar="X",
            help="Of each adapter in turn, or one for all: a number, or a .json file {pattern: number} by layer,"
            " of which the last that matches wins. Default: 1.",
        ),
    ] = None,
    prefix: Prefix = "",
    part: Part = None,
    alpha: Alpha = None,
    network: Network = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a checkpoint.

    The result is for every program that loads the base. Works on the bare weights, no network needed; key order,
    dtypes, nesting, metadata and all other weights stay. Where a file holds `params_ema` and `params`, the former is
    adapted, unless --network says otherwise. A base other than the one that was adapted, or another precision of it,
    gives a warning: for a fine-tuned base that is meant.

    \b
    Examples:
      convlora merge span.safetensors rain.safetensors -o rainy.safetensors
      convlora merge span.safetensors rain.safetensors snow.safetensors -s 0.7 -s 0.3 -o both.safetensors
      convlora merge span.safetensors rain.safetensors --strength night.json -o softer.safetensors
    """
    check_output(out, [base, *adapters], force, "merge", SUFFIXES)
    strengths = per_adapter(strength or [], adapters, "merge", "--strength")
    checkpoint = Checkpoint.read(base, network)
    loaded = [read_adapter(file, checkpoint, prefix=prefix, alpha=alpha, part=part) for file in adapters]
    state = checkpoint.state
    placed = [
        fit_to_base(adapter, state, file, base, "merge", prefix) for adapter, file in zip(loaded, adapters, strict=True)
    ]
    plan = plan_merge(list(zip(placed, strengths, strict=True)), state)
    matches = [match_base(adapter, there, state) for adapter, there in zip(loaded, placed, strict=True)]
    with progress("merging"):
        checkpoint.write(out, plan.entries, check=plan.refuse_problems)
    for file, match in zip(adapters, matches, strict=True):
        if match is not None and match.kind in ("precision", "other"):
            _warn(f"merge: {describe_match(match, file, base)}")
    if checkpoint.beside:
        _warn(f"merge: '{checkpoint.where[-1]}' is adapted; {', '.join(checkpoint.beside)} beside it stays as it was")
    changed = sum(name in plan.entries for name in state)
    report = {
        "output": str(out),
        "bytes": out.stat().st_size,
        "base": str(base),
        "tensors": len(state),
        "changed": changed,
        "adapters": [
            {
                "file": str(file),
                "strength": each,
                "layers": len(adapter.layers),
                "same_base": match and match.kind != "other",
            }
            for file, each, adapter, match in zip(adapters, strengths, loaded, matches, strict=True)
        ],
    }
    emit(report, f"{out}: {changed} of {len(state)} tensors adapted, {report['bytes']:,} bytes", as_json)


def extract(
    base: Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Checkpoint of the same network, fine-tuned.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    factors: Annotated[Form, typer.Option("--factors", help="Factorization.")] = "convlora",
    name: Name = None,
    network: Network = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of two checkpoints.

    It turns one into the other, as nearly as its rank allows. The error of a layer is what the rank leaves out,
    relative to the whole difference in the Frobenius norm. Layers have the names of the checkpoint; groups come from
    spandrel where it is installed and knows the network.

    \b
    Example:
      convlora extract span.safetensors tuned.safetensors -o tuned-lora.safetensors --energy 0.9
    """
    check_output(out, [base, tuned], force, "extract", [SAFETENSORS])
    check_rank_or_energy("extract", rank, energy)
    before, after = Checkpoint.read(base, network).state, Checkpoint.read(tuned, network).state
    shapes = shapes_of(before)
    if not set(before) & set(after):
        raise ConvLoRAError(f"extract: '{base}' and '{tuned}' have no name in common; are they of one network?")
    specs = {
        path: spec
        for path, spec in layers_of(before).items()
        if tuple(getattr(shapes.get(base_key(path, "weight", shapes, spec)), "shape", ())) == spec.shape
    }
    with progress("extracting"):
        adapter = Adapter.extract(
            before, after, rank=rank, energy=energy, factors=factors, name=name or "default", specs=specs
        )
    _write(adapter, out, as_json)


def resize(
    file: File,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    base: BaseOption = None,
    part: Part = None,
    alpha: Alpha = None,
    network: Network = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make the nearest adapter of lower rank.

    The error of a layer is what is lost, relative to its ΔW in the Frobenius norm.

    \b
    Examples:
      convlora resize rain.safetensors -o small.safetensors --rank 1
      convlora resize rain.safetensors -o small.safetensors --energy 0.95
    """
    check_output(out, [file, base], force, "resize", [SAFETENSORS])
    check_rank_or_energy("resize", rank, energy)
    adapter = read_adapter(file, read_base(base, network), alpha=alpha, part=part)
    with progress("resizing"):
        small = adapter.resize(rank=rank, energy=energy)
    _write(small, out, as_json)


def combine(
    adapters: Adapters,
    out: Out,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            "-w",
            metavar="X",
            help="Of each adapter in turn, or one for all: a number, or a .json file {pattern: number} by layer."
            " Default: 1.",
        ),
    ] = None,
    factors: Annotated[Form | None, typer.Option("--factors", help="Bring all to this factorization first.")] = None,
    name: Name = None,
    base: BaseOption = None,
    part: Part = None,
    alpha: Alpha = None,
    network: Network = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several.

    It is the weighted sum of their ΔW. Exact; ranks add up, and `resize` lowers them.

    \b
    Example:
      convlora combine rain.safetensors snow.safetensors -o both.safetensors --weight 0.7 --weight 0.3
    """
    check_output(out, [*adapters, base], force, "combine", [SAFETENSORS])
    weights = per_adapter(weight or [], adapters, "combine", "--weight")
    checkpoint = read_base(base, network)
    loaded = [read_adapter(file, checkpoint, name=name, alpha=alpha, part=part) for file in adapters]
    if factors is not None:
        with progress("refactoring"):
            loaded = [adapter.refactor(factors) for adapter in loaded]
    kinds = {adapter.config.factors for adapter in loaded}
    if len(kinds) > 1:
        raise ConvLoRAError(
            f"combine: the factorizations differ ({', '.join(sorted(kinds))}); --factors brings all to one"
        )
    _write(Adapter.combine(loaded, weights), out, as_json)


def convert(
    file: File,
    out: Out,
    to: Annotated[
        Literal["convlora", "peft", "locon", "loralib", "diffusers"], typer.Option("--to", help="Format of OUT.")
    ],
    factors: Annotated[
        Form | None,
        typer.Option("--factors", help="Other factorization, where the format holds it; --to convlora holds all."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option("--dtype", help="Of the tensors in OUT.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", metavar="TEXT", help="Of the keys in OUT; default: the format's own.")
    ] = None,
    name: Name = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Of a loralib FILE, which has none.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="X", help="`lora_alpha` of a FILE that states none, or of a loralib OUT."),
    ] = None,
    part: Part = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="JSON", help="Of a training checkpoint FILE: its AdapterConfig, or an adapter."
        ),
    ] = None,
    base: BaseOption = None,
    network: Network = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format.

    Or in another factorization or dtype. The update stays the same but for rounding. peft: a folder that PEFT's
    `PeftModel.from_pretrained` loads. locon: one file, as kohya and LyCORIS write it. loralib: a state dict of
    microsoft/LoRA. diffusers: what its `load_lora_adapter` loads, with --prefix unet its pipelines. DoRA, LoHa and LoKr
    stay what they are where the format has them. From `convlora` factors to PEFT's, a k×k layer of rank r needs up to
    k²·r ranks; `resize` lowers them.

    FILE may be a training checkpoint of a whole model with adapters, too. --config says what `inject` was given: the
    JSON of `AdapterConfig.to_json`, or an adapter of the same config; --name says which adapter, if not the one there.

    \b
    Examples:
      convlora convert rain.safetensors --to locon -o rain-locon.safetensors
      convlora convert rain-locon.safetensors --to convlora --base span.safetensors -o again.safetensors
      convlora convert rain.safetensors --to convlora --dtype float16 -o half.safetensors
      convlora convert rain-locon.safetensors --to diffusers --base span.safetensors -o rain-diffusers.safetensors
      convlora convert last.ckpt --config config.json --to convlora -o last.safetensors
    """
    check_output(out, [file, base, config], force, "convert", [] if to == "peft" else _suffixes(to))
    checkpoint = read_base(base, network)
    reading = formats.detect(file) if config is None else "checkpoint"
    silent = reading == "loralib" or (reading in ("locon", "diffusers") and to != "loralib")  # may state no alpha
    if config is None:
        adapter = read_adapter(file, checkpoint, rank=rank, alpha=alpha if silent else None, name=name, part=part)
    elif rank is not None:
        raise ConvLoRAError("convert: --rank is for loralib files; of a training checkpoint --config says the ranks")
    else:
        adapter = read_training_checkpoint(file, config, name, network)
    form = factors or adapter.config.factors
    held = formats.HELD.get(to, (form,))
    if factors not in (None, *held):
        raise ConvLoRAError(
            f"convert: {to} files hold {' and '.join(map(repr, held))} factors only; leave --factors out"
        )
    form = form if form in held else held[0]
    with progress("refactoring"):
        adapter = adapter.refactor(form)
    errors = adapter.errors
    if dtype is not None:
        adapter = adapter.to(getattr(torch, dtype))
    alpha_of_file = None if silent else alpha
    beside = checkpoint.state if checkpoint is not None and to == "peft" else None
    formats.write(adapter, out, to, prefix=prefix, alpha=alpha_of_file, base=beside, overwrite=force)
    _report(adapter, errors, out, to, as_json)


def _write(adapter: Adapter, out: Path, as_json: bool) -> None:
    adapter.write(out)
    _report(adapter, adapter.errors, out, "convlora", as_json)


def _report(adapter: Adapter, errors: Mapping[str, float], out: Path, format: str, as_json: bool) -> None:
    """The size of what was written, the ranks, and per layer what the command left out."""
    parameters = sum(t.numel() for layer in adapter.layers.values() for t in layer.tensors.values())
    report = {
        "output": str(out),
        "bytes": size_in_bytes(out),
        "format": format,
        "factors": adapter.config.factors,
        "parameters": parameters,
        "largest_error": max(errors.values(), default=0.0),
        "layers": {
            path: {"rank": layer.rank, "error": errors.get(path, 0.0)} for path, layer in adapter.layers.items()
        },
    }
    lossy = [[path, str(layer.rank), f"{errors[path]:.3g}"] for path, layer in adapter.layers.items()
             if errors.get(path, 0.0) > ROUNDING]  # fmt: skip
    lines = [text_table(["layer", "rank", "error"], lossy, right=2)] if lossy else []
    lines += [f"{out}: {len(adapter.layers)} layers, {parameters:,} parameters, {report['bytes']:,} bytes"]
    emit(report, "\n".join(lines), as_json)


def _suffixes(format: str) -> Sequence[str]:
    return [SAFETENSORS] if format == "convlora" else SUFFIXES


def _warn(message: str) -> None:
    warnings.warn(message, ConvLoRAWarning, stacklevel=2)
