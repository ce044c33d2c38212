r"""A PEFT directory: `adapter_model.safetensors` and `adapter_config.json`, as of peft 0.21.

Keys are `base_model.model.<path>.lora_A.weight` and `.lora_B.weight`, with `.lora_B.bias` where `lora_bias` is set; the
prefix is missing in what `inject_adapter_in_model` made, and a raw state dict has the adapter's name before the last
dot. A convolution's A is `(r, in, *kernel)` and its B `(out, r, 1…)`, a Linear's `(r, in)` and `(out, r)`: the
factorization `"locon"`. The scale is in the config: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`;
`rank_pattern` and `alpha_pattern` override r and `lora_alpha`, the first key that matches as `(.*\.)?(key)$` counts.
Copies of whole modules have their plain names, `base_model.model.<path>.<tensor>`, and `modules_to_save` in the config
says of which: names, or the ends of names after a dot.

PEFT computes an adapted convolution as two convolutions that know nothing of the base's dilation and `padding_mode`:
such layers fail there, or give another output, whatever wrote the file. It makes both of the base layer's own class,
so subclasses with another constructor fail, too. For `nn.MultiheadAttention` see attention.py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import assemble
from convlora.adapter.parts import BIAS_DELTA, LayerFactors, is_statistic
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError, Problems, one_line
from convlora.factors.base import WeightSpec
from convlora.formats.attention import attention_of, from_peft, to_peft, why_not_in_peft
from convlora.formats.patterns import LayerPatterns
from convlora.formats.tensors import read_tensors
from convlora.support.atomic import write_folder
from convlora.support.jsontext import parse_json
from convlora.support.safetensors import read_regular_file, to_safetensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))??\.(?P<kind>weight|bias)")
_NAMES = {("A", "weight"): "lora_A", ("B", "weight"): "lora_B", ("B", "bias"): BIAS_DELTA}

# What a config may switch on that an update W + s·B·A of a layer's weight does not express.
_REFUSED = {
    "use_dora": "DoRA rescales the whole weight",
    "fan_in_fan_out": "its base weights are stored transposed",
    "target_parameters": "it adapts bare parameters, which are no layers",
    "trainable_token_indices": "it holds rows of embeddings",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow chooses among adapters for each token",
    "kasa_config": "KaSA changes the base and has a diagonal of its own",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QALoRA pools its input",
}
_LOOK, _MOST_LOOKED = 100, 200_000_000  # characters: what starting a search costs, and what all may cost, about 0.1 s
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights
_TENSORS = {
    "lora_magnitude_vector": "DoRA rescales the whole weight",
    "lora_embedding_": "embeddings are no convolutions or Linear layers",
}


def read(path: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT directory; see `convlora.formats.read`."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    settings = _settings(folder)
    _refuse(settings)
    if not os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / PICKLE):
        raise ConvLoRAError(f"{PICKLE} is a pickle, which can run code; save with safe_serialization=True in PEFT")
    saved = _modules_to_save(settings)
    tensors, modules = _by_layer(read_tensors(folder / WEIGHTS)[0], saved)
    scaling = "sqrt" if settings.get("use_rslora") else "linear"
    config = AdapterConfig(targets="*", factors="locon", rank_scaling=scaling, modules_to_save=saved)
    ranks, alphas = (_patterns(settings, field) for field in ("rank_pattern", "alpha_pattern"))
    problems = Problems()
    layers = {}
    for layer, own in tensors.items():
        stated = ranks.values(attention_of(layer)) or [settings.get("r", 8)]
        alpha = [*alphas.values(attention_of(layer)), settings.get("lora_alpha", 8)][0]
        missing = [f"{layer}.{name}" for name in ("lora_A", "lora_B") if name not in own]
        problems.missing += missing
        if missing:
            continue
        rank = own["lora_A"].shape[0] if own["lora_A"].dim() else 0
        if not all(type(r) is int and r > 0 for r in stated) or not is_number(alpha):
            raise ConvLoRAError(f"{CONFIG}: '{layer}' has r={stated[0]!r}, lora_alpha={alpha!r}")
        if rank not in stated:  # saving sorts the patterns, so the first that matches need not be that of training
            problems.mismatched.append(f"{layer}.lora_A {tuple(own['lora_A'].shape)}, {CONFIG} has r={stated[0]}")
            continue
        layers[layer] = _layer(layer, own, rank, alpha, config.scale(rank, alpha))
    problems.raise_if_any("PEFT")
    return assemble(Adapter, config, from_peft(layers), modules=modules)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = parse_json(read_regular_file(folder / CONFIG).decode())
    except (OSError, ValueError) as error:
        raise ConvLoRAError(f"{CONFIG} cannot be read ({one_line(error)})") from None
    if not isinstance(settings, dict):
        raise ConvLoRAError(f"{CONFIG} holds no JSON object")
    return settings


def _refuse(settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConvLoRAError(f"peft_type is {kind!r}; only LORA is a low-rank update of weights")
    for name, reason in _REFUSED.items():
        if settings.get(name):
            raise ConvLoRAError(f"{CONFIG} has {name}: {reason}, which no low-rank update of a weight expresses")
    if settings.get("bias", "none") != "none":
        raise ConvLoRAError(f"bias is {settings['bias']!r}: PEFT stores the base's biases then, not what changed")
    init = settings.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise ConvLoRAError(
            f"init_lora_weights is {init!r}, which changes the base's weights; "
            "in PEFT, save with path_initial_model_for_weight_conversion="
        )


def _modules_to_save(settings: Mapping[str, Any]) -> list[str]:
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ConvLoRAError(f"{CONFIG}: modules_to_save is no list of names")
    return saved


def _saved_among(paths: Iterable[str], saved: Sequence[str]) -> set[str]:
    """The modules that are among those that are saved, or inside of one.

    Raises:
        ConvLoRAError: so many names and paths that the search would take long.
    """
    names, paths = set(saved), set(paths)
    found = paths & names
    others = paths - names
    if len(names) * sum(len(path) + _LOOK for path in others) > _MOST_LOOKED:
        raise ConvLoRAError(f"{CONFIG}: modules_to_save has too many names to be searched for in {len(others):,} paths")
    return found | {path for path in others if any(f".{name}." in f".{path}." for name in names)}


def _by_layer(
    tensors: Mapping[str, Tensor], saved: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Layer path -> tensor name of the library -> values; and the same of the modules that are saved."""
    prefix = PREFIX if all(name.startswith(PREFIX) for name in tensors) else ""
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, str]] = {}
    adapters = set()
    problems = Problems()
    for full, tensor in tensors.items():
        for part, reason in _TENSORS.items():
            if part in full:
                raise ConvLoRAError(f"'{full}': {reason}, which no low-rank update of a weight expresses")
        match = _KEY.fullmatch(full.removeprefix(prefix))
        name = _NAMES.get((match["factor"], match["kind"])) if match else None
        if match is None or name is None:
            path, _, own = full.removeprefix(prefix).rpartition(".")
            whole.setdefault(path, {})[own] = full
            continue
        adapters.add(match["adapter"])
        layers.setdefault(match["path"], {})[name] = tensor
    known = _saved_among(whole, saved)
    problems.unexpected += [full for path, own in whole.items() if path not in known for full in own.values()]
    problems.raise_if_any("PEFT")
    modules = {
        path: {name: tensors[full] for name, full in own.items()} for path, own in whole.items() if path in known
    }
    if len(adapters) > 1:
        raise ConvLoRAError(f"{WEIGHTS} holds several adapters: {', '.join(sorted(map(str, adapters)))}")
    return layers, modules


def _patterns(settings: Mapping[str, Any], field: str) -> LayerPatterns:
    patterns = settings.get(field) or {}
    if not isinstance(patterns, dict):
        raise ConvLoRAError(f"{CONFIG}: {field} is no JSON object")
    return LayerPatterns(patterns, f"{CONFIG}: {field}")


def _layer(path: str, own: Mapping[str, Tensor], rank: int, alpha: float, scale: float) -> LayerFactors:
    a, b = own["lora_A"], own["lora_B"]
    if not 2 <= a.dim() <= 5 or a.dim() != b.dim() or 0 in (*a.shape, *b.shape):
        raise ConvLoRAError(f"'{path}' has factors {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dim() > 2 and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise ConvLoRAError(
            f"'{path}' is a grouped convolution: PEFT's A sees all channels there, so its update is of another shape"
        )
    tensors = {"lora_A": a, "lora_B": b}
    if a[0, 0].numel() == 1:
        tensors = {name: tensor.flatten(1) for name, tensor in tensors.items()}
    if BIAS_DELTA in own and bool(
        own[BIAS_DELTA].ne(0).any()
    ):  # PEFT has one for all layers or none, zero where there is no bias
        tensors[BIAS_DELTA] = (own[BIAS_DELTA].double() * scale).to(own[BIAS_DELTA].dtype)
    return LayerFactors(tensors, WeightSpec((b.shape[0], *a.shape[1:])), rank, alpha)


def write(
    adapter: Adapter, path: str | os.PathLike[str], prefix: str | None, base: Mapping[str, Any] | None = None
) -> None:
    """Write a PEFT directory; see `convlora.formats.write`."""
    adapter = adapter.refactor("locon")
    _check(adapter)
    with_bias = any(BIAS_DELTA in layer.tensors for layer in adapter.layers.values())
    layers = to_peft(adapter.layers, adapter.config.scale, base)
    tensors = {}
    for layer_path, layer in layers.items():
        stem = f"{PREFIX if prefix is None else prefix}{layer_path}"
        point = (1,) * (len(layer.spec.shape) - 2)
        tensors[f"{stem}.lora_A.weight"] = layer.tensors["lora_A"].reshape(layer.rank, *layer.spec.shape[1:])
        tensors[f"{stem}.lora_B.weight"] = layer.tensors["lora_B"].reshape(layer.spec.out_channels, layer.rank, *point)
        if with_bias:
            tensors[f"{stem}.lora_B.bias"] = _bias(layer, adapter.config.scale(layer.rank, layer.alpha))
    start = PREFIX if prefix is None else prefix
    for module_path, copies in _whole_modules(adapter, base).items():
        tensors |= {f"{start}{module_path}.{name}": tensor for name, tensor in copies.items()}
    settings = json.dumps(_config(adapter, layers, with_bias), indent=2, sort_keys=True)
    write_folder(path, {WEIGHTS: to_safetensors(tensors, {"format": "pt"}), CONFIG: settings.encode()})


def _check(adapter: Adapter) -> None:
    for path, layer in adapter.layers.items():
        reason = None
        if layer.spec.transposed:
            reason = "is a transposed convolution, which PEFT cannot adapt"
        elif layer.spec.groups > 1:
            reason = "is a grouped convolution: PEFT's factors have another form there, and it cannot merge them"
        elif layer.aliases:
            reason = f"is one module with {', '.join(map(repr, layer.aliases))}: PEFT adapts only the first of them"
        elif not path:
            reason = "is the model itself, which PEFT cannot adapt"
        elif BIAS_DELTA in layer.tensors and layer.alpha == 0 and bool(layer.tensors[BIAS_DELTA].ne(0).any()):
            reason = "has a bias delta and alpha 0: PEFT scales the bias, too"
        reason = reason or why_not_in_peft(path, layer)
        if reason:
            raise ConvLoRAError(f"write: no PEFT adapter holds this one: '{path}' {reason}")
    if "" in adapter.modules:
        raise ConvLoRAError("write: no PEFT adapter holds this one: it has tensors of the model itself")


def _whole_modules(adapter: Adapter, base: Mapping[str, Any] | None) -> dict[str, dict[str, Tensor]]:
    """The copies with all that their modules hold beside statistics, as PEFT has them."""
    whole = {path: dict(tensors) for path, tensors in adapter.modules.items()}
    alone = [path for path, tensors in whole.items() if all(map(is_statistic, tensors))]
    if alone and base is None:
        raise ConvLoRAError(
            f"write: PEFT saves whole modules, and of {len(alone)} (first: '{alone[0]}') the adapter has running"
            " statistics only; give the rest by base=, the base's state dict, or name them in modules_to_save"
        )
    for path in alone:
        beside = {n.removeprefix(f"{path}."): t for n, t in (base or {}).items() if n.startswith(f"{path}.")}
        rest = {n: t.detach().cpu() for n, t in beside.items() if "." not in n and isinstance(t, Tensor)}
        whole[path] = {**rest, **whole[path]}
    return whole


def _bias(layer: LayerFactors, scale: float) -> Tensor:
    if BIAS_DELTA not in layer.tensors or layer.alpha == 0:
        return torch.zeros(layer.spec.out_channels, dtype=layer.tensors["lora_B"].dtype)
    bias = layer.tensors[BIAS_DELTA]
    return (bias.double() / scale).to(bias.dtype)


def _config(adapter: Adapter, written: Mapping[str, LayerFactors], with_bias: bool) -> dict[str, Any]:
    layers = {path: layer for path, layer in written.items() if path == attention_of(path)}
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "use_rslora": adapter.config.rank_scaling == "sqrt",
        "use_dora": False,
        "bias": "none",
        "lora_bias": with_bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": list(adapter.modules) or None,
        "target_modules": "|".join(re.escape(path) for path in layers),  # a list would match the ends of names
        "rank_pattern": {f"^{re.escape(p)}": layer.rank for p, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {
            f"^{re.escape(p)}": _number(layer.alpha) for p, layer in layers.items() if layer.alpha != alpha
        },
    }


def _number(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
