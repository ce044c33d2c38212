"""The commands that look at files: info, diff, layers, verify."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from convlora import formats
from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import dense_delta
from convlora.adapter.checkpoint import plan_merge
from convlora.adapter.naming import other_prefixes
from convlora.adapter.parts import BIAS_DELTA, LayerFactors, base_key, refuse_weight, tensor_key
from convlora.cli.architecture import recognise_architecture
from convlora.cli.console import emit, progress
from convlora.cli.inputs import describe_match, fit_to_base, match_base, read_adapter, read_base, size_in_bytes
from convlora.cli.options import Alpha, BaseOption, File, Json, Network, Part, Prefix
from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.factors.base import WeightSpec, get_factors, needs_weight
from convlora.formats import specs_from_checkpoint, specs_of
from convlora.formats.checkpoints import Checkpoint
from convlora.support.patterns import nearest_names, values_by_layer
from convlora.support.progress import counted_steps
from convlora.support.table import text_table
from convlora.targets import select_layers


def info(
    file: File,
    base: BaseOption = None,
    part: Part = None,
    alpha: Alpha = None,
    network: Network = None,
    as_json: Json = False,
) -> None:
    """Show what is in an adapter.

    Config, layers, ranks, sizes, the Frobenius norm of each ΔW, and the fingerprint of the base. Reading checks the
    file: one that is damaged is an error.

    \b
    Examples:
      convlora info rain.safetensors
      convlora info rain.safetensors --json | jq '.layers | map_values(.rank)'
    """
    checkpoint = read_base(base, network)
    adapter = read_adapter(file, checkpoint, alpha=alpha, part=part)
    format = formats.detect(file)
    with progress("norms"):
        layers = {
            path: _describe(adapter.config, layer, _weight(adapter, path, checkpoint))
            for path, layer in counted_steps(adapter.layers.items())
        }
    report = {
        "file": str(file),
        "format": format,
        "bytes": size_in_bytes(file),
        "checksum": "ok" if format == "convlora" else None,
        "fingerprint": adapter.fingerprint,
        "name": adapter.config.name,
        "factors": adapter.config.factors,
        "config": json.loads(adapter.config.to_json()),
        "dtypes": sorted({str(t.dtype) for layer in adapter.layers.values() for t in layer.tensors.values()}),
        "parameters": sum(layer["parameters"] for layer in layers.values()),
        "layers": layers,
        "modules": {p: {n: list(t.shape) for n, t in tensors.items()} for p, tensors in adapter.modules.items()},
    }
    rows = [
        [path, _show(layer.spec), str(layer.rank), f"{layer.alpha:g}", f"{d['scale']:g}", f"{d['parameters']:,}",
         "–" if d["norm"] is None else f"{d['norm']:.4g}"]
        for (path, layer), d in zip(adapter.layers.items(), layers.values(), strict=True)
    ]  # fmt: skip
    facts = {
        "file": f"{file}, {report['bytes']:,} bytes",
        "format": f"{format}, checksum {report['checksum'] or 'none'}",
        "base": adapter.fingerprint or "fingerprint unknown",
        "config": adapter.config.to_json(),
        "dtype": ", ".join(report["dtypes"]).replace("torch.", ""),
    }
    head = "\n".join(f"{name:8}{text}" for name, text in facts.items())
    columns = ["layer", "weight", "rank", "alpha", "scale", "parameters", "‖ΔW‖"]
    foot = f"{len(layers)} layers, {report['parameters']:,} parameters"
    copied = [
        [path, "  ".join(f"{name} {'×'.join(map(str, t.shape)) or '1'}" for name, t in tensors.items())]
        for path, tensors in adapter.modules.items()
    ]
    copies = f"\n\n{text_table(['copy of', 'tensors'], copied)}\n{len(copied)} modules" if copied else ""
    emit(report, f"{head}\n\n{text_table(columns, rows, right=5)}\n{foot}{copies}", as_json)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Adapter of any format.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Adapter of any format, also another.")],
    base: BaseOption = None,
    prefix: Annotated[
        str,
        typer.Option(
            "--prefix", metavar="TEXT", help="What the names of A or of B begin with and those of the other do not."
        ),
    ] = "",
    part: Part = None,
    alpha: Alpha = None,
    network: Network = None,
    as_json: Json = False,
) -> None:
    """Compare what two adapters do, layer by layer.

    The distance is the Frobenius norm of the difference of both ΔW, relative to the larger of their norms: 0 for the
    same update, whatever its factors, and at most 2. Formats may differ, and names by a prefix.

    \b
    Example:
      convlora diff rain.safetensors rain-small.safetensors
    """
    checkpoint = read_base(base, network)
    ours, theirs = (read_adapter(file, checkpoint, alpha=alpha, part=part) for file in (a, b))
    theirs = _with_names_of(ours, theirs, a, b, prefix)
    both = [path for path in ours.layers if path in theirs.layers]
    other = [path for path in both if ours.layers[path].spec != theirs.layers[path].spec]
    with progress("distances"):
        layers = {
            path: _compare(
                (ours.config, ours.layers[path], _weight(ours, path, checkpoint)),
                (theirs.config, theirs.layers[path], _weight(theirs, path, checkpoint)),
            )
            for path in counted_steps(both)
            if path not in other
        }
    report: dict[str, Any] = {
        "a": str(a),
        "b": str(b),
        "same_layers": set(ours.layers) == set(theirs.layers) and not other,
        "only_a": [path for path in ours.layers if path not in theirs.layers],
        "only_b": [path for path in theirs.layers if path not in ours.layers],
        "other_weights": other,
        "largest_distance": max((d for each in layers.values() for d in each["distance"].values()), default=None),
        "layers": layers,
        "modules": _compare_copies(ours, theirs),
    }
    rows = [
        [path, *map(str, each["rank"]), *(f"{norm:.4g}" for norm in each["norm"]),
         "  ".join(f"{d:.3g}" + (" (bias)" if kind == "bias" else "") for kind, d in each["distance"].items())]
        for path, each in layers.items()
    ]  # fmt: skip
    lines = [text_table(["layer", "rank A", "rank B", "‖ΔW‖ A", "‖ΔW‖ B", "distance"], rows, right=5)] if rows else []
    for what, paths in (("only in A", report["only_a"]), ("only in B", report["only_b"]), ("other weights", other)):
        lines += [f"{what}: {', '.join(paths)}"] if paths else []
    copies = report["modules"]
    if copies:
        shown = [[name, "–" if each is None else f"{each:.3g}"] for name, each in copies.items()]
        lines += [text_table(["copy of", "distance"], shown, right=1)]
    distance = report["largest_distance"]
    lines += [f"{len(layers)} layers in both" + ("" if distance is None else f", largest distance {distance:.3g}")]
    emit(report, "\n".join(lines), as_json)


def _with_names_of(ours: Adapter, theirs: Adapter, a: Path, b: Path, prefix: str) -> Adapter:
    """The adapter B by the names of A, where they differ by a prefix: the one that is given, or the only one."""
    if not prefix and any(path in ours.layers for path in theirs.layers):
        return theirs
    mine, other = ([*adapter.layers, *adapter.modules] for adapter in (ours, theirs))
    ways = other_prefixes(theirs, mine, prefix)
    ways = ways or [{new: old} for names in other_prefixes(ours, other, prefix) for old, new in names.items()]
    if len(ways) == 1:
        return theirs.rename(ways[0])
    if prefix:
        raise ConvLoRAError(f"diff: the names of '{a}' and '{b}' do not differ by {prefix!r}")
    return theirs


def layers(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights of a network.")],
    patterns: Annotated[list[str] | None, typer.Argument(metavar="PATTERN", help="Targets, as `inject`'s.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="What PATTERN must not select; repeatable.")
    ] = None,
    network: Network = None,
    as_json: Json = False,
) -> None:
    """Show the layers that patterns select.

    Without a pattern, all that can be adapted. With spandrel installed, of the network that it recognises in the
    checkpoint: with module classes and groups, and under the names that `convlora.inject` sees. Otherwise of the bare
    weights, each as of an ungrouped layer.

    \b
    Examples:
      convlora layers RealESRGAN_x4plus.pth
      convlora layers RealESRGAN_x4plus.pth "*.conv[12].0" --exclude "*.RDB3.*"
    """
    state = Checkpoint.read(checkpoint, network).state
    known = recognise_architecture(state)
    every = specs_of(known.model) if known else specs_from_checkpoint(state)
    if not every:
        raise ConvLoRAError(f"layers: '{checkpoint}' has no layer that can be adapted")
    wanted, unwanted = patterns or ["*"], exclude or []
    if known:
        found, idle = select_layers(known.model, wanted, unwanted, "layers")
        if idle:
            raise ConvLoRAError(f"layers: --exclude {idle[0]!r} selects no layer; {nearest_names(str(idle[0]), every)}")
        kinds: dict[str, str | None] = {path: type(layer).__name__ for path, layer in found.items()}
    else:
        verdicts = values_by_layer(
            {**dict.fromkeys(wanted, True), **dict.fromkeys(unwanted, False)}, False, every, "layers", "target"
        )
        kinds = {path: None for path, selected in verdicts.items() if selected}
        if not kinds:
            raise ConvLoRAError("layers: --exclude leaves no layer of those that the patterns select")
    report = {
        "checkpoint": str(checkpoint),
        "architecture": known.name if known else None,
        "adaptable": len(every),
        "selected": len(kinds),
        "weights": sum(math.prod(every[path].shape) for path in kinds),
        "layers": {
            path: {"type": kind, "shape": list(every[path].shape), "groups": every[path].groups,
                   "transposed": every[path].transposed}
            for path, kind in kinds.items()
        },
    }  # fmt: skip
    rows = [
        [path, kind or "–", _show(every[path]), str(every[path].groups), f"{math.prod(every[path].shape):,}"]
        for path, kind in kinds.items()
    ]
    of = known.name if known else "the bare checkpoint, groups unknown"
    foot = f"{len(kinds)} of {len(every)} layers of {of}; {report['weights']:,} weights"
    text = text_table(["layer", "type", "weight", "groups", "weights"], rows, right=2)
    emit(report, f"{text}\n{foot}", as_json)


def verify(
    file: File,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="CHECKPOINT", help="Also check that it fits, and was adapted.")
    ] = None,
    prefix: Prefix = "",
    part: Part = None,
    alpha: Alpha = None,
    network: Network = None,
    as_json: Json = False,
) -> None:
    """Check that an adapter is sound and fits.

    Checksum and finite values; with --base also that it fits the checkpoint and that this base was adapted, be it in
    another precision. Exit code 1 if anything is wrong, with the report on stdout all the same.

    \b
    Example:
      convlora verify rain.safetensors --base span.safetensors
    """
    checkpoint = read_base(base, network)
    report: dict[str, Any] = {"file": str(file), "base": str(base) if base else None, "ok": True, "checks": {}}
    checks = report["checks"]
    try:
        adapter = read_adapter(file, checkpoint, prefix=prefix, alpha=alpha, part=part)
    except ConvLoRAError as error:
        checks["file"] = {"ok": False, "what": _cause(error)}
    else:
        checksum = "checksum right" if formats.detect(file) == "convlora" else "the format has no checksum"
        copies = f" and copies of {len(adapter.modules)} modules" if adapter.modules else ""
        checks["file"] = {"ok": True, "what": f"{len(adapter.layers)} layers{copies}, {checksum}, all values finite"}
        if checkpoint is not None and base is not None:
            checks.update(_against(adapter, file, checkpoint, base, prefix))
    failed = [name for name, check in checks.items() if check["ok"] is False]
    report["ok"] = not failed
    words = {True: "ok", False: "FAILED", None: "unknown"}
    rows = [[name, words[check["ok"]], check["what"]] for name, check in checks.items()]
    emit(report, text_table(["check", "result", "what"], rows), as_json)
    if failed:
        raise ConvLoRAError(f"verify: {'; '.join(checks[name]['what'] for name in failed)}")


def _against(
    adapter: Adapter, file: Path, checkpoint: Checkpoint, base: Path, prefix: str
) -> dict[str, dict[str, Any]]:
    """What becomes of an adapter on a base: whether it fits, and whether the base is the one that was adapted."""
    state = checkpoint.state
    try:
        placed = fit_to_base(adapter, state, file, base, "verify", prefix)
        plan = plan_merge([(placed, 1.0)], state)
        with progress("merging"):
            for entry in counted_steps({id(entry): entry for entry in plan.entries.values()}.values()):
                collections.deque(entry.blocks(), maxlen=0)  # which names what is not finite
        plan.refuse_problems()
    except ConvLoRAError as error:
        return {"fits": {"ok": False, "what": _cause(error)}}
    match = match_base(adapter, placed, state)
    return {
        "fits": {"ok": True, "what": f"on '{base}', merged values finite"},
        "fingerprint": {
            "ok": match and match.kind != "other",
            "what": "the file names no base" if match is None else describe_match(match, file, base),
        },
    }


def _cause(error: ConvLoRAError) -> str:
    """Its message without the operation."""
    return str(error).partition(": ")[2]


def _weight(adapter: Adapter, path: str, checkpoint: Checkpoint | None) -> Tensor | None:
    """The base weight of a layer, where its ΔW depends on it and it is known."""
    if checkpoint is None or not needs_weight(get_factors(adapter.config.factors)):
        return None
    spec = adapter.layers[path].spec
    name = base_key(path, "weight", checkpoint.state, spec)
    weight = checkpoint.state.get(name)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != spec.shape:
        raise ConvLoRAError(f"--base: it has no '{name}' of shape {spec.shape}, on which ΔW depends")
    return weight


def _describe(config: AdapterConfig, layer: LayerFactors, weight: Tensor | None) -> dict[str, Any]:
    known = weight is not None or not needs_weight(get_factors(config.factors))
    return {
        "shape": list(layer.spec.shape),
        "groups": layer.spec.groups,
        "transposed": layer.spec.transposed,
        "rank": layer.rank,
        "alpha": layer.alpha,
        "scale": config.scale(layer.rank, layer.alpha),
        "parameters": sum(t.numel() for t in layer.tensors.values()),
        "norm": float(dense_delta(config, layer, weight).norm()) if known else None,
        "bias_norm": float(layer.tensors[BIAS_DELTA].double().norm()) if BIAS_DELTA in layer.tensors else None,
        "aliases": list(layer.aliases),
    }


Described = tuple[AdapterConfig, LayerFactors, "Tensor | None"]


def _compare(one: Described, two: Described) -> dict[str, Any]:
    for config, _, weight in (one, two):
        if weight is None:
            refuse_weight(config.factors, "diff without --base")
    (_, ours, _), (_, theirs, _) = one, two
    return _compare_layers(ours, theirs, dense_delta(*one), dense_delta(*two))


def _compare_layers(ours: LayerFactors, theirs: LayerFactors, one: Tensor, two: Tensor) -> dict[str, Any]:
    distance = {"weight": _distance(one, two)}
    if BIAS_DELTA in ours.tensors or BIAS_DELTA in theirs.tensors:
        biases = [
            layer.tensors[BIAS_DELTA].double() if BIAS_DELTA in layer.tensors else None for layer in (ours, theirs)
        ]
        known = next(bias for bias in biases if bias is not None)
        distance["bias"] = _distance(*(known.new_zeros(known.shape) if bias is None else bias for bias in biases))
    return {"rank": [ours.rank, theirs.rank], "norm": [float(one.norm()), float(two.norm())], "distance": distance}


def _compare_copies(ours: Adapter, theirs: Adapter) -> dict[str, float | None]:
    """Tensor -> distance of both copies; None where one adapter has none, or one of another shape."""
    mine, other = (
        {tensor_key(p, n): t.double() for p, tensors in adapter.modules.items() for n, t in tensors.items()}
        for adapter in (ours, theirs)
    )
    return {
        name: _distance(mine[name], other[name])
        if name in mine and name in other and mine[name].shape == other[name].shape
        else None
        for name in {**mine, **other}
    }


def _distance(one: Any, two: Any) -> float:
    """‖one - two‖ relative to the larger norm; 0 for two zeros."""
    larger = max(float(one.norm()), float(two.norm()))
    return float((one - two).norm()) / larger if larger else 0.0


def _show(spec: WeightSpec) -> str:
    return "×".join(map(str, spec.shape)) + (" transposed" if spec.transposed else "")
