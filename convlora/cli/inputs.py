"""What the commands read, and where they may write."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from convlora import formats
from convlora.adapter.adapter import Adapter
from convlora.adapter.checkpoint import renamings_that_fit, state_dict_misfits
from convlora.adapter.fingerprint import BaseMatch, compare_bases
from convlora.adapter.naming import describe_prefix
from convlora.adapter.parts import base_key
from convlora.adapter.training import take_apart
from convlora.cli.architecture import layers_of, recognise_architecture, with_checkpoint_names
from convlora.config import AdapterConfig, Strength, is_number
from convlora.errors import ConvLoRAError, one_line
from convlora.factors.base import WeightSpec
from convlora.formats import specs_of
from convlora.formats.checkpoints import Checkpoint
from convlora.support.jsontext import parse_json
from convlora.support.patterns import nearest_names
from convlora.support.safetensors import read_regular_file
from convlora.support.tensorfile import RenamedTensors, shapes_of


def read_adapter(
    path: Path,
    base: Checkpoint | None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    name: str | None = None,
    prefix: str = "",
    part: str | None = None,
) -> Adapter:
    """An adapter of any format; of the base come the layers that a foreign file does not describe.

    Args:
        prefix: by which its names differ from the base's, for the formats whose names are read by those of the base.
        part: of the names of one network, in a file that is of several.
    """
    format = formats.detect(path)
    known = layers_of(base.state) if base is not None and format != "convlora" else None
    ways: list[dict[str, WeightSpec] | None] = [] if known is None else [*_by_names_of_the_adapter(known, prefix)]
    if known is None or format == "peft":  # whose names say the paths: others than the base's are looked for later
        ways.append(None)
    refused: list[ConvLoRAError] = []
    for layers in ways:
        try:
            return formats.read(path, format, layers=layers, rank=rank, alpha=alpha, name=name, prefix=part)
        except ConvLoRAError as error:
            refused.append(error)
    if format == "loralib" and rank is None and alpha is None:
        raise ConvLoRAError(f"{refused[0]}; `convlora convert` takes --alpha, --rank and --base") from None
    raise refused[-1 if format == "peft" else 0]


def read_training_checkpoint(path: Path, config: Path, name: str | None, network: str | None = None) -> Adapter:
    """The adapter in a checkpoint that a training wrote of a model with adapters.

    Args:
        config: the `AdapterConfig`, as JSON or as an adapter file has it.
        name: of the adapter, if not the one in the config.
    """
    state = Checkpoint.read(path, network).state
    known = recognise_architecture(take_apart(state).base)
    specs = {} if known is None else specs_of(known.model)
    fitting = {p: spec for p, spec in specs.items() if getattr(state.get(f"{p}.weight"), "shape", ()) == spec.shape}
    stated = read_config(config)
    return Adapter.from_state_dict(state, stated if name is None else stated.replace(name=name), specs=fitting)


def read_config(path: Path) -> AdapterConfig:
    """An `AdapterConfig` as JSON, or that of an adapter file."""
    if path.suffix.lower() != ".json":
        return formats.read(path).config
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvLoRAError(f"read: '{path}' cannot be read ({one_line(error)})") from None
    return AdapterConfig.from_json(text)


def _by_names_of_the_adapter(layers: Mapping[str, WeightSpec], prefix: str) -> list[dict[str, WeightSpec]]:
    """The layers of a base by the names that an adapter may have for them.

    Below the prefix and with it before them; without a prefix as they are, and below what all of them begin with.
    """
    if prefix:
        start = f"{prefix.removesuffix('.')}."
        return [_below(layers, start), {f"{start}{path}": spec for path, spec in layers.items()}]
    parts = next(iter(layers), "").split(".")
    starts = ["".join(f"{part}." for part in parts[:count]) for count in range(1, len(parts))]
    common = [start for start in starts if all(path.startswith(start) for path in layers)]
    return [dict(layers), *(_below(layers, start) for start in common)]


def _below(layers: Mapping[str, WeightSpec], start: str) -> dict[str, WeightSpec]:
    return {path.removeprefix(start): spec for path, spec in layers.items() if path.startswith(start)}


def read_base(path: Path | None, network: str | None = None) -> Checkpoint | None:
    """The checkpoint that an option names, if it does."""
    return None if path is None else Checkpoint.read(path, network)


def fit_to_base(
    adapter: Adapter, state: Mapping[str, Any], file: Path, base: Path, command: str, prefix: str = ""
) -> Adapter:
    """The adapter with the layer names of a checkpoint.

    By its own names, by those that exactly one prefix or the given one makes fit, or by those that loading changes.

    Raises:
        ConvLoRAError: it does not fit, all that is missing or mismatched is listed; or it fits in several ways.
    """
    shapes = shapes_of(state)
    problems = state_dict_misfits(adapter, shapes)
    if not problems and not prefix:
        return adapter
    ways = renamings_that_fit(adapter, shapes, prefix)
    if len(ways) == 1:
        return ways[0][1]
    if ways:
        found = ", ".join(describe_prefix(names) for names, _ in ways)
        raise ConvLoRAError(
            f"{command}: the names of '{file}' fit '{base}' in several ways, {found}; --prefix or --network says which"
        )
    if not problems:
        return adapter
    refused = f"{command}: '{file}' does not fit '{base}'"
    if prefix:
        raise ConvLoRAError(f"{refused} with names that {prefix!r} is added to or taken from: {problems}")
    placed = with_checkpoint_names(adapter, state)
    if problems := state_dict_misfits(placed, shapes):
        remedy = f"; {nearest_names(problems.missing[0], state)}" if problems.missing else ""
        raise ConvLoRAError(f"{refused}: {problems}{remedy}")
    return placed


def match_base(adapter: Adapter, placed: Adapter, state: Mapping[str, Any]) -> BaseMatch | None:
    """What the checkpoint, as stored or read in float32, is to the base that was adapted; None if unknown."""
    if adapter.fingerprint is None:
        return None
    keys = [base_key(path, "weight", state, layer.spec) for path, layer in placed.layers.items()]
    names = dict(zip(adapter.layers, keys, strict=True))
    stored = compare_bases(adapter.fingerprint, RenamedTensors(state, names))
    if stored.kind == "same":
        return stored
    as_read = compare_bases(adapter.fingerprint, RenamedTensors(state, names, torch.float32))
    return as_read if as_read.kind == "same" else stored


def describe_match(match: BaseMatch, file: Path, base: Path) -> str:
    """What a base is to the one that was adapted, in words."""
    return f"'{file}' was trained on {match}" if match.kind == "other" else f"'{base}' is {match}"


def per_adapter(values: Sequence[str], adapters: Sequence[Path], command: str, option: str) -> list[Strength]:
    """One value for each adapter: given once for each, or once for all; 1 by default.

    A value is a number, or a JSON file `{pattern: number}` with one for each layer.
    """
    if len(values) not in (0, 1, len(adapters)):
        raise ConvLoRAError(
            f"{command}: {len(values)} times {option} for {len(adapters)} adapters; give it once, or once for each"
        )
    read = [_strength(value, command, option) for value in values]
    return read if len(read) == len(adapters) else [*read, 1.0][:1] * len(adapters)


def _strength(value: str, command: str, option: str) -> Strength:
    with contextlib.suppress(ValueError):
        return float(value)
    if not value.endswith(".json"):
        raise typer.BadParameter(f"'{value}' is neither a number nor a .json file", param_hint=option)
    try:
        by_pattern = parse_json(read_regular_file(value).decode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConvLoRAError(f"{command}: '{value}' cannot be read ({reason})") from None
    if not isinstance(by_pattern, dict) or not all(is_number(each) for each in by_pattern.values()):
        raise ConvLoRAError(f'{command}: \'{value}\' must hold {{pattern: number}}, as {{"*": 1, "body.*": 0.4}}')
    return by_pattern


def check_rank_or_energy(command: str, rank: int | None, energy: float | None) -> None:
    """Exactly one of two options.

    Raises:
        ConvLoRAError: none or both are given.
    """
    if (rank is None) == (energy is None):
        raise ConvLoRAError(f"{command}: give either --rank or --energy")


def check_output(path: Path, inputs: Sequence[Path | None], force: bool, command: str, suffixes: Sequence[str]) -> None:
    """Refuse an output that would be of another kind than its name says, or would cost a file.

    Raises:
        ConvLoRAError: its suffix is none of `suffixes` (if any are given), its folder does not exist, it is an input
            or would replace a folder around one, or it exists and `force` is false.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConvLoRAError(f"{command}: '{path}' must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ConvLoRAError(f"{command}: '{path}' cannot be written; there is no folder '{path.parent}'")
    for source in inputs:
        if source is not None and source.exists() and _overlap(path, source):
            raise ConvLoRAError(f"{command}: '{path}' is an input ('{source}'); write to another place")
    if not force and (path.exists() or path.is_symlink()):
        raise ConvLoRAError(f"{command}: '{path}' exists; --force overwrites it")


def _overlap(path: Path, source: Path) -> bool:
    """Whether two paths are one, or one of them lies in the other."""
    ours, theirs = path.resolve(), source.resolve()
    same = path.exists() and path.samefile(source)
    return same or ours == theirs or ours in theirs.parents or (source.is_dir() and theirs in ours.parents)


def size_in_bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size
