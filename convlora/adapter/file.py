"""The library's own file: one `.safetensors` with factors, config, checksum and fingerprint.

Tensor keys are `<layer path>.lora_A`, `<layer path>.lora_B` (`.lora_bias`), or the names of another factorization, and
`<module path>.<tensor name>` for copies. `__metadata__` holds, all as text:

- `format`: `convlora`, and `convlora.format_version`: `1`, or `2` where version 1 could not say what the adapter is;
- `config`: the `AdapterConfig` as JSON;
- `layers`: JSON `{path: [rank, alpha, weight shape, groups, transposed, [alias paths], in parent]}`, trailing defaults
  left out; the last from version 2 on: the weight is a Parameter of the module above (`WeightSpec.in_parent`);
- `modules`, from version 2 on: JSON `{module path: [tensor names]}` of the copies;
- `fingerprint`: of the base weights that were adapted, if known;
- `base_summary`: a few sums of them, JSON, which tell a rounded base from another one; other releases may pass over it;
- `checksum`: SHA-256 over all of the above and over names, dtypes, shapes and bytes of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from convlora.adapter.fingerprint import Fingerprint, summary_from_json
from convlora.adapter.parts import AdapterParts, LayerFactors, tensor_key
from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError, Problems, one_line
from convlora.factors.base import WeightSpec
from convlora.support.atomic import write_atomically
from convlora.support.jsontext import parse_json
from convlora.support.safetensors import from_safetensors, read_regular_file, tensor_bytes, to_safetensors

FORMAT, VERSIONS = "convlora", ("1", "2")
A = TypeVar("A", bound=AdapterParts)
OTHERS = "convlora.formats.read reads those of PEFT, LyCORIS, diffusers and loralib"


def write_adapter(adapter: AdapterParts, path: str | os.PathLike[str]) -> None:
    """Write an adapter; see `Adapter.write`."""
    tensors = {
        tensor_key(layer_path, name): tensor.detach().cpu().contiguous()
        for layer_path, layer in adapter.layers.items()
        for name, tensor in layer.tensors.items()
    }
    for path_, copies in adapter.modules.items():
        tensors |= {tensor_key(path_, name): tensor.detach().cpu().contiguous() for name, tensor in copies.items()}
    known_to_first = not adapter.modules and adapter.config.norm_statistics == "adapter"
    known_to_first &= not any(layer.spec.in_parent for layer in adapter.layers.values())
    metadata = {
        "format": FORMAT,
        "convlora.format_version": VERSIONS[0]
        if known_to_first and not adapter.config.modules_to_save
        else VERSIONS[1],
        "config": adapter.config.to_json(),
        "layers": layers_to_json(adapter.layers),
    }
    if adapter.modules:
        metadata["modules"] = json.dumps(
            {p: list(copies) for p, copies in adapter.modules.items()}, separators=(",", ":")
        )
    if adapter.fingerprint is not None:
        metadata["fingerprint"] = str(adapter.fingerprint)
    if (summary := getattr(adapter.fingerprint, "summary", None)) is not None:
        metadata["base_summary"] = summary
    metadata["checksum"] = checksum(tensors, metadata)
    write_atomically(path, to_safetensors(tensors, metadata))


def read_adapter(make: type[A], path: str | os.PathLike[str]) -> A:
    """Read an adapter, of the class `make`; see `Adapter.read`."""
    try:
        raw = read_regular_file(path)  # once: another process may be replacing the file
        tensors, metadata = from_safetensors(raw)
    except Exception as error:  # a damaged file can raise anything
        others = "" if isinstance(error, FileNotFoundError) else f"; {OTHERS}"
        raise ConvLoRAError(f"read: '{path}' cannot be read as an adapter file ({one_line(error)}){others}") from None
    if metadata.get("format") != FORMAT:
        raise ConvLoRAError(f"read: '{path}' is a safetensors file, but no convlora adapter; {OTHERS}")
    version = metadata.get("convlora.format_version", "")
    if version not in VERSIONS:
        raise ConvLoRAError(
            f"read: '{path}' has format version {version!r}, this release reads {VERSIONS[-1]}; update convlora"
        )
    if metadata.get("checksum") != checksum(tensors, metadata):
        raise ConvLoRAError(f"read: '{path}' was altered: its checksum does not match; fetch it again")
    try:
        config = AdapterConfig.from_json(metadata["config"])
        layers, modules = _placed(metadata["layers"], metadata.get("modules", "{}"), tensors)
        return make(config, layers, _fingerprint(metadata), modules=modules)
    except ConvLoRAError as error:
        raise ConvLoRAError(f"read: '{path}': {error}") from None
    except Exception as error:
        raise ConvLoRAError(f"read: '{path}' has malformed metadata ({one_line(error)})") from None


def _fingerprint(metadata: Mapping[str, str]) -> str | None:
    """The fingerprint with its summary; without one that this release does not know."""
    digest, summary = metadata.get("fingerprint"), metadata.get("base_summary")
    if digest is None or summary is None:
        return digest
    try:
        summary_from_json(summary)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return digest
    return Fingerprint(digest, summary)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata (but the checksum itself) and the tensors, independent of their order in the file."""
    digest = hashlib.sha256()
    digest.update(json.dumps(sorted((k, v) for k, v in metadata.items() if k != "checksum")).encode())
    for name in sorted(tensors):
        update(digest, name, tensors[name])
    return f"sha256:{digest.hexdigest()}"


def update(digest: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, dtype, shape and bytes to a hash."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor_bytes(tensor))


def _entry(layer: LayerFactors) -> list[Any]:
    spec = layer.spec
    alpha = int(layer.alpha) if float(layer.alpha).is_integer() else layer.alpha
    entry = [layer.rank, alpha, list(spec.shape), spec.groups, int(spec.transposed), list(layer.aliases)]
    entry.append(int(spec.in_parent))
    defaults: tuple[Any, ...] = (0, [], 0, 1)
    for default in defaults:
        if entry[-1] != default:
            break
        entry.pop()
    return entry


def layers_to_json(layers: Mapping[str, LayerFactors]) -> str:
    """JSON `{path: [rank, alpha, weight shape, groups, transposed, [alias paths], in parent]}`; shortened."""
    return json.dumps({path: _entry(layer) for path, layer in layers.items()}, separators=(",", ":"))


def layers_from_json(text: str) -> dict[str, LayerFactors]:
    """The layers that `describe` wrote, without tensors.

    Raises:
        ConvLoRAError, LookupError, TypeError, ValueError, AttributeError, RecursionError: it did not write this.
    """
    entries: dict[str, list[Any]] = parse_json(text)
    layers = {}
    for path, entry in entries.items():
        defaults: list[Any] = [1, 0, [], 0]
        rank, alpha, shape, groups, transposed, aliases, in_parent = [*entry, *defaults[len(entry) - 3 :]]
        flags = (transposed, in_parent)
        if type(shape) is not list or type(aliases) is not list or any(flag not in (0, 1) for flag in flags):
            raise ValueError(f"layer {path!r} is described by {entry!r}")
        spec = WeightSpec(tuple(shape), groups, bool(transposed), bool(in_parent))
        layers[path] = LayerFactors({}, spec, rank, alpha, tuple(map(str, aliases)))
    return layers


def _placed(
    layers_text: str, modules_text: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, LayerFactors], dict[str, dict[str, Tensor]]]:
    """The layers and the copies of a file with the tensors that are theirs."""
    layers = layers_from_json(layers_text)
    own: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    modules: dict[str, dict[str, Tensor]] = {}
    problems = Problems()
    stated = parse_json(modules_text)
    if type(stated) is not dict or not all(type(names) is list for names in stated.values()):
        raise ValueError("modules are described by another thing than {path: [names]}")
    copies = {tensor_key(path, str(name)): (path, str(name)) for path, names in stated.items() for name in names}
    for full, (path, name) in copies.items():
        if full in tensors:
            modules.setdefault(path, {})[name] = tensors[full]
        else:
            problems.missing.append(full)
    for full, tensor in tensors.items():
        path, _, name = full.rpartition(".")
        if full in copies:
            continue
        if path in own:
            own[path][name] = tensor
        else:
            problems.unexpected.append(full)
    if problems:
        raise ConvLoRAError(str(problems))
    return {path: replace(layer, tensors=own[path]) for path, layer in layers.items()}, modules
