"""File formats: one module a format, each between a file and an `Adapter`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convlora.adapter.adapter import Adapter
from convlora.adapter.checkpoint import specs_from_checkpoint as specs_from_checkpoint
from convlora.adapter.file import FORMAT, read_adapter, write_adapter
from convlora.config import CHILD
from convlora.errors import ConvLoRAError, Problems, one_line
from convlora.factors.base import WeightSpec
from convlora.formats import locon, loralib, peft, tensors
from convlora.model.traversal import specs_of as specs_of

FORMATS = ("convlora", "peft", "locon", "loralib", "diffusers")
HELD: dict[str, tuple[str, ...]] = {  # the factorizations that a format holds as they are; others become the first
    "peft": peft.WRITTEN,
    "locon": locon.WRITTEN,
    "loralib": ("convlora",),
    "diffusers": peft.WRITTEN_TO_FILE,
}


def detect(path: str | os.PathLike[str]) -> str:
    """Which of `FORMATS` a file or folder is of, by its names and keys alone.

    Raises:
        ConvLoRAError: no such file, or one of no known format.

    Example:
        >>> import tempfile, torch, convlora
        >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(convlora.adapter(model), f"{folder}/rain", "peft")
        ...     detect(f"{folder}/rain")
        'peft'
    """
    place = _path("detect", path)
    if os.path.isdir(place):
        if os.path.isfile(place / peft.CONFIG):
            return "peft"
        if file := locon.in_folder(place):
            return detect(file)
        inner = sorted(p.parent.name for p in place.glob(f"*/{peft.CONFIG}"))
        hint = f"; those in it do: {', '.join(inner)}" if inner else ""
        raise ConvLoRAError(f"read: the folder '{path}' has no {peft.CONFIG}, so it is no PEFT adapter{hint}")
    if place.name in (peft.CONFIG, peft.WEIGHTS) and os.path.isfile(place.with_name(peft.CONFIG)):
        return "peft"
    names, metadata = tensors.header(place)
    if metadata.get("format") == FORMAT:
        return "convlora"
    if any(f".{CHILD}." in f".{name}" for name in names):
        raise ConvLoRAError(
            f"read: '{path}' is a checkpoint of a model with adapters; Adapter.from_state_dict takes one out, and so"
            " does `convlora convert --config`"
        )
    if kind := locon.recognises(names, metadata):
        return kind
    if loralib.recognises(names):
        return "loralib"
    raise ConvLoRAError(f"read: '{path}' is no adapter of a known format ({', '.join(FORMATS)})")


def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    layers: Mapping[str, WeightSpec] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    name: str | None = None,
    prefix: str | None = None,
) -> Adapter:
    """Read an adapter of any of `FORMATS`; `None` detects which. Nothing in a file is ever executed.

    Args:
        path: a file, or the folder of a PEFT adapter.
        format: one of `FORMATS`.
        layers: those of the base, by `specs_of(model)` or `specs_from_checkpoint(state_dict)`. The adapter is checked
            against them, and they say what some files do not: the layer paths of a LoCon file, which of a loralib
            file's layers are convolutions, the kernels of LoHa and LoKr, groups.
        rank: of a loralib file, where neither `layers` nor the file tell.
        alpha: `lora_alpha` of the training, where the file states none: of loralib, and of diffusers and kohya files
            without; the scale of a layer is alpha over its rank.
        name: of the adapter; by default the one that a file of this library states, else `"default"`.
        prefix: of the names of one network, in a file that is of several: `"lora_unet"`, `"unet"`; names that do not
            begin with it are left out. By default the prefix is found.

    Raises:
        ConvLoRAError: the file is damaged, of no known format, or holds what no factorization expresses (OFT, IA3, …);
            it does not fit `layers`, or does not say enough.

    Example:
        >>> import tempfile, torch, convlora
        >>> base = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> model = convlora.inject(base, targets="*", rank=2, factors="locon")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(convlora.adapter(model), f"{folder}/rain.safetensors", "locon")
        ...     read(f"{folder}/rain.safetensors", layers=specs_of(base), name="rain").config.rank
        2
    """
    place = _path("read", path)
    kind = detect(place) if format is None else _known("read", format)
    in_one_file = kind in ("locon", "diffusers")
    if (rank is not None and kind != "loralib") or (alpha is not None and kind in ("convlora", "peft")):
        raise ConvLoRAError(f"read: rank= and alpha= are for files that do not state them; '{path}' ({kind}) does")
    if prefix is not None and not (in_one_file and isinstance(prefix, str)):
        raise ConvLoRAError(f"read: prefix (={prefix!r}) must be a string, for locon or diffusers files")
    if in_one_file and os.path.isdir(place):
        place = locon.in_folder(place) or place
    if layers is not None and not (isinstance(layers, Mapping) and all(map(_is_spec, layers.values()))):
        raise ConvLoRAError("read: layers= must be {layer path: WeightSpec}; see specs_of and specs_from_checkpoint")
    if kind == "convlora":
        adapter = read_adapter(Adapter, place)
    else:
        try:
            if kind == "peft":
                adapter = peft.read(place, layers)
            elif in_one_file:
                adapter = locon.read(place, layers, alpha, prefix)
            else:
                adapter = loralib.read(place, layers, rank, alpha)
        except ConvLoRAError as error:
            message = str(error)
            raise ConvLoRAError(message if message.startswith("read: ") else f"read: '{path}': {message}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ConvLoRAError(f"read: '{path}' is malformed ({one_line(error)})") from None
    if layers is not None:
        _check(adapter, layers, path)
        adapter = _placed(adapter, layers)
    return adapter if name is None else replace(adapter, config=adapter.config.replace(name=name))


def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "convlora",
    *,
    prefix: str | None = None,
    alpha: float | None = None,
    base: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write an adapter in any of `FORMATS`, atomically.

    PEFT, LoCon and diffusers files hold the factorization `"locon"`, loralib ones `"convlora"`; an adapter of another
    one is brought to it by `Adapter.refactor`: without loss but for rounding, at the rank that this needs. PEFT has
    places for `"dora"`, `"loha"` and `"lokr"` as they are, diffusers for `"dora"` and `"lokr"`, LoCon files, as LyCORIS
    writes them, for all of these, `"dora_in"` and `"dense"`. What other libraries then compute is theirs: PEFT ignores
    a convolution's dilation and `padding_mode`. Copies of modules go to PEFT (`modules_to_save`). Fingerprints stay
    here.

    Args:
        adapter: what to write.
        path: the file (`.safetensors`, or `.pt` for LoCon and loralib), or the folder of a PEFT adapter. diffusers
            looks for `pytorch_lora_weights.safetensors` in a folder.
        format: one of `FORMATS`.
        prefix: of the keys, for PEFT (`base_model.model.`; `""` as `inject_adapter_in_model` has it), LoCon
            (`lycoris`; kohya's scripts: `lora_unet`, …) and diffusers (none; for a pipeline `unet`, …).
        alpha: for loralib, the one `lora_alpha` that all layers are to be built with; factors are rescaled to it.
        base: the state dict of the base, for PEFT, which saves whole modules: running statistics without the weight
            and bias beside them get those of the base. PEFT adapts `nn.MultiheadAttention` as a whole: it also tells
            that a layer `out_proj` is of one, where the adapter has no `in_proj` beside it.
        overwrite: whether to replace what is there.

    Raises:
        ConvLoRAError: the format cannot express a layer (each names which and why), or the file cannot be written.

    Example:
        >>> import tempfile, torch, convlora
        >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(convlora.adapter(model), f"{folder}/rain.pt", "loralib")
        ...     read(f"{folder}/rain.pt", rank=2, alpha=2).config.factors
        'convlora'
    """
    if not isinstance(adapter, Adapter):
        raise ConvLoRAError(f"write: expected an Adapter, got {type(adapter).__name__}; see convlora.adapter(model)")
    place, kind = _path("write", path), _known("write", format)
    if prefix is not None and (kind not in ("peft", "locon", "diffusers") or not isinstance(prefix, str)):
        raise ConvLoRAError(f"write: prefix (={prefix!r}) must be a string, for peft, locon or diffusers files")
    if alpha is not None and kind != "loralib":
        raise ConvLoRAError(f"write: alpha= is for loralib files; {kind} states that of each layer")
    if base is not None and (kind != "peft" or not isinstance(base, Mapping)):
        raise ConvLoRAError("write: base= must be the base's state dict, for peft directories")
    if not overwrite and (any(place.iterdir()) if os.path.isdir(place) else os.path.lexists(place)):
        raise ConvLoRAError(f"write: '{path}' exists; overwrite=True replaces it")
    if adapter.modules and kind in ("locon", "loralib", "diffusers"):
        raise ConvLoRAError(
            f"write: a {kind} file holds no copies of modules, and the adapter has some of {len(adapter.modules)}"
            f" (first: '{next(iter(adapter.modules))}'); write convlora or peft"
        )
    if kind == "convlora":
        write_adapter(adapter, place)
    elif kind == "peft":
        peft.write(adapter, place, prefix, base)
    elif kind == "locon":
        locon.write(adapter, place, prefix)
    elif kind == "diffusers":
        peft.write_file(adapter, place, prefix)
    else:
        loralib.write(adapter, place, alpha)


def _path(operation: str, path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ConvLoRAError(f"{operation}: path (={path!r}) must be a string or a path")
    return Path(path)


def _is_spec(value: object) -> bool:
    return isinstance(value, WeightSpec)


def _known(operation: str, format: str) -> str:
    if format not in FORMATS:
        raise ConvLoRAError(f"{operation}: format (={format!r}) must be one of {', '.join(FORMATS)}")
    return format


def _placed(adapter: Adapter, layers: Mapping[str, WeightSpec]) -> Adapter:
    """The adapter with what the base says of where its weights are: most files do not say it."""
    placed = {
        path: replace(layer, spec=replace(layer.spec, in_parent=layers[path].in_parent))
        for path, layer in adapter.layers.items()
    }
    return replace(adapter, layers=placed)


def _check(adapter: Adapter, layers: Mapping[str, WeightSpec], path: str | os.PathLike[str]) -> None:
    """That the base has the layers of an adapter; of bare checkpoints, groups and transposition are guesses."""
    problems = Problems()
    for layer_path, layer in adapter.layers.items():
        spec = layers.get(layer_path)
        if spec is None:
            problems.unexpected.append(layer_path)
        elif spec.shape != layer.spec.shape:
            problems.mismatched.append(f"{layer_path} {layer.spec.shape}, the base has {spec.shape}")
    problems.raise_if_any(f"read: '{path}' is not for this base")
