r"""A PEFT directory: `adapter_model.safetensors` and `adapter_config.json`, as of peft 0.21.

Keys are `base_model.model.<path>.lora_A.weight` and `.lora_B.weight`, with `.lora_B.bias` where `lora_bias` is set; the
prefix is missing in what `inject_adapter_in_model` made, and a raw state dict has the adapter's name before the last
dot. A convolution's A is `(r, in, *kernel)` and its B `(out, r, 1…)`, a Linear's `(r, in)` and `(out, r)`: the
factorization `"locon"`. The scale is in the config: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`;
`rank_pattern` and `alpha_pattern` override r and `lora_alpha`, the first key that matches as `(.*\.)?(key)$` counts.
With `use_dora` there is `.lora_magnitude_vector`, `(out,)` or `(1, out, 1…)`: the factorization `"dora"`. LoHa's
`.hada_w1_a` … and LoKr's `.lokr_w1` … have the config's `alpha / r`; of a convolution they do not say the kernel, so
the layers of the base do. Copies of whole modules have their plain names, `base_model.model.<path>.<tensor>`, and
`modules_to_save` in the config says of which: names, or the ends of names after a dot.

PEFT computes an adapted convolution as two convolutions that know nothing of the base's dilation and `padding_mode`:
such layers fail there, or give another output, whatever wrote the file. It makes both of the base layer's own class,
so subclasses with another constructor fail, too. For `nn.MultiheadAttention` see attention.py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlora.adapter.adapter import Adapter
from convlora.adapter.algebra import assemble, with_linear_scaling
from convlora.adapter.parts import BIAS_DELTA, LayerFactors, is_statistic
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError, Problems, one_line
from convlora.factors.base import WeightSpec
from convlora.formats.attention import attention_of, from_peft, to_peft, why_no_attention, why_not_in_peft
from convlora.formats.patterns import LayerPatterns
from convlora.formats.tensors import read_tensors, write_tensors
from convlora.formats.updates import (
    MAGNITUDE,
    Update,
    in_one_form,
    kind_of,
    missing_parts,
    update_of,
    with_scaled_bias,
)
from convlora.support.atomic import write_folder
from convlora.support.jsontext import parse_json
from convlora.support.safetensors import read_regular_file, to_safetensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

METADATA = "lora_adapter_metadata"  # where diffusers has the config in a file's own metadata

_KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[AB]|lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<kind>weight|bias))?"
)
_PARTS = {("lora_A", "weight"): "lora_down", ("lora_B", "weight"): "lora_up", ("lora_B", "bias"): "lora_bias"}
_OWN = {"lora_down": "lora_A", "lora_up": "lora_B"}
_KINDS = {  # peft_type -> the factorizations that it can be here
    "LORA": ("locon", "dora"),
    "LOHA": ("loha",),
    "LOKR": ("lokr", "dense"),
}
_TYPES = {"locon": "LORA", "dora": "LORA", "loha": "LOHA", "lokr": "LOKR"}  # factorization -> peft_type
WRITTEN = tuple(_TYPES)
WRITTEN_TO_FILE = ("locon", "dora", "lokr")  # diffusers reads no LoHa

# What a config may switch on that an update W + s·B·A of a layer's weight does not express.
_REFUSED = {
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
_LARGEST = 2**31  # rank


def read(path: str | os.PathLike[str], layers: Mapping[str, WeightSpec] | None = None) -> Adapter:
    """Read a PEFT directory; see `convlora.formats.read`."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    values = _settings(folder)
    settings = Settings(values, CONFIG)
    if not os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / PICKLE):
        raise ConvLoRAError(f"{PICKLE} is a pickle, which can run code; save with safe_serialization=True in PEFT")
    saved = _modules_to_save(values)
    tensors, modules = _by_layer(read_tensors(folder / WEIGHTS)[0], saved)
    problems = Problems()
    for layer, parts in tensors.items():
        kind = kind_of(layer, parts)
        absent = missing_parts(parts, kind) if kind else ["lora_down", "lora_up"]
        problems.missing += [f"{layer}.{_OWN.get(part, part)}" for part in absent]
    problems.raise_if_any("PEFT")
    config = AdapterConfig(targets="*", factors="locon", rank_scaling=settings.scaling, modules_to_save=saved)
    updates = {}
    for layer, parts in tensors.items():
        rank, alpha = settings.of_layer(layer, parts)
        if settings.kind == "LORA":
            _check_lora(layer, parts, rank)
        spec = (layers or {}).get(layer) if settings.kind != "LORA" else None
        whole = with_scaled_bias(parts, config, alpha)
        updates[layer] = update_of(layer, whole, spec, alpha, stated_rank=rank, known=spec is not None)
    settings.check_kinds(updates)
    factors, read_layers = in_one_form(updates, layers is not None)
    read_layers = from_peft(read_layers) if factors == "locon" else read_layers
    return assemble(Adapter, config.replace(factors=factors), read_layers, modules=modules)


class Settings:
    """An adapter's config, checked: what it states of ranks and alphas.

    Args:
        values: the fields.
        where: they come from, for messages.

    Raises:
        ConvLoRAError: it is of another method than LoRA, LoHa and LoKr, or switches on what they do not express.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        _refuse(values, where)
        self.kind: str = values["peft_type"]
        self.where = where
        self.scaling = "sqrt" if values.get("use_rslora") and self.kind == "LORA" else "linear"
        self._ranks, self._alphas = (_patterns(values, field, where) for field in ("rank_pattern", "alpha_pattern"))
        self._default = values.get("r", 8), values.get("lora_alpha" if self.kind == "LORA" else "alpha", 8)

    def of_layer(self, layer: str, parts: Mapping[str, Tensor]) -> tuple[int, float]:
        """Rank and alpha of a layer.

        Raises:
            ConvLoRAError: they are no numbers, or the tensors have another rank.
        """
        ranks = self._ranks.values(attention_of(layer)) or [self._default[0]]
        alpha = [*self._alphas.values(attention_of(layer)), self._default[1]][0]
        if not all(type(rank) is int and 0 < rank < _LARGEST for rank in ranks) or not is_number(alpha):
            raise ConvLoRAError(f"{self.where}: '{layer}' has r={ranks[0]!r}, lora_alpha={alpha!r}")
        part = next((part for part in ("lora_down", "hada_w1_b", "lokr_w2_b") if part in parts), None)
        if part is None:
            return ranks[0], alpha
        rank = parts["lokr_t2" if "lokr_t2" in parts else part].shape[0] if parts[part].dim() else 0
        if rank not in ranks:  # saving sorts the patterns, so the first that matches need not be that of training
            name, shape = _OWN.get(part, part), tuple(parts[part].shape)
            raise ConvLoRAError(f"PEFT: mismatched: {layer}.{name} {shape}, {self.where} has r={ranks[0]}")
        return rank, alpha

    def check_kinds(self, updates: Mapping[str, Update]) -> None:
        """That the tensors are of the method that the config states.

        Raises:
            ConvLoRAError: they are not.
        """
        for layer, update in updates.items():
            if update.factors not in _KINDS[self.kind]:
                raise ConvLoRAError(
                    f"{self.where} has peft_type {self.kind!r}, and '{layer}' has {update.factors} factors"
                )


def settings_by_network(text: str) -> dict[str, Settings]:
    """What diffusers states in a file's metadata: name of a network, or the empty one -> its config.

    Raises:
        ConvLoRAError: it is no JSON object, or one that `Settings` refuses.
    """
    try:
        values = parse_json(text)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConvLoRAError(f"{METADATA} is no JSON ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise ConvLoRAError(f"{METADATA} is no JSON object")
    networks: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        network, _, field = key.rpartition(".")
        networks.setdefault(network, {})[field] = value
    return {name: Settings({"peft_type": "LORA", **own}, METADATA) for name, own in networks.items()}


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = parse_json(read_regular_file(folder / CONFIG).decode())
    except (OSError, ValueError) as error:
        raise ConvLoRAError(f"{CONFIG} cannot be read ({one_line(error)})") from None
    if not isinstance(settings, dict):
        raise ConvLoRAError(f"{CONFIG} holds no JSON object")
    return settings


def _refuse(settings: Mapping[str, Any], where: str) -> None:
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConvLoRAError(f"{where}: peft_type is {kind!r}; {', '.join(_KINDS)} are updates of weights that are read")
    for name, reason in _REFUSED.items():
        if settings.get(name):
            raise ConvLoRAError(f"{where} has {name}: {reason}, which no factorization here expresses")
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
        if ".lora_embedding_" in full:
            raise ConvLoRAError(f"'{full}': embeddings are no convolutions or Linear layers")
        match = _KEY.fullmatch(full.removeprefix(prefix))
        name = _part(match) if match else None
        if match is None or name is None:
            path, _, own = full.removeprefix(prefix).rpartition(".")
            whole.setdefault(path, {})[own] = full
            continue
        adapters.add(match["adapter"])
        if not tensor.is_floating_point():
            problems.mismatched.append(f"{full} {tensor.dtype} instead of floating point")
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


def _part(match: re.Match[str]) -> str | None:
    """The part of a layer's update that a key is of, by the names of updates.py."""
    part, kind = match["part"], match["kind"]
    if part in ("lora_A", "lora_B"):
        return _PARTS.get((part, kind))
    return part if kind is None or (part, kind) == ("lora_magnitude_vector", "weight") else None


def _patterns(settings: Mapping[str, Any], field: str, where: str) -> LayerPatterns:
    patterns = settings.get(field) or {}
    if not isinstance(patterns, dict):
        raise ConvLoRAError(f"{where}: {field} is no JSON object")
    return LayerPatterns(patterns, f"{where}: {field}")


def _check_lora(path: str, parts: Mapping[str, Tensor], rank: int) -> None:
    a, b = parts["lora_down"], parts["lora_up"]
    if not 2 <= a.dim() <= 5 or a.dim() != b.dim() or 0 in (*a.shape, *b.shape):
        raise ConvLoRAError(f"'{path}' has factors {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dim() > 2 and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise ConvLoRAError(
            f"'{path}' is a grouped convolution: PEFT's A sees all channels there, so its update is of another shape"
        )


def write(
    adapter: Adapter, path: str | os.PathLike[str], prefix: str | None, base: Mapping[str, Any] | None = None
) -> None:
    """Write a PEFT directory; see `convlora.formats.write`."""
    adapter = _in_form(adapter, WRITTEN)
    attention = adapter.config.factors == "locon"  # for which PEFT has no other method
    _check(adapter, "PEFT adapter", attention, base or ())
    layers = to_peft(adapter.layers, adapter.config.scale, base) if attention else adapter.layers
    start = PREFIX if prefix is None else prefix
    tensors = _tensors(adapter, layers, start)
    for module_path, copies in _whole_modules(adapter, base).items():
        tensors |= {f"{start}{module_path}.{name}": tensor for name, tensor in copies.items()}
    settings = json.dumps(_config(adapter, layers), indent=2, sort_keys=True)
    write_folder(path, {WEIGHTS: to_safetensors(tensors, {"format": "pt"}), CONFIG: settings.encode()})


def write_file(adapter: Adapter, path: str | os.PathLike[str], prefix: str | None) -> None:
    """Write a file of diffusers; see `convlora.formats.write`."""
    if Path(path).suffix != ".safetensors":
        raise ConvLoRAError(f"write: '{path}' must end in .safetensors: a file of diffusers has its config in metadata")
    adapter = _in_form(adapter, WRITTEN_TO_FILE)
    _check(adapter, "file of diffusers", False, ())
    start = f"{prefix.rstrip('.')}." if prefix else ""
    settings = {f"{start}{name}": value for name, value in _config(adapter, adapter.layers).items()}
    metadata = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    write_tensors(path, _tensors(adapter, adapter.layers, start), metadata)


def _in_form(adapter: Adapter, written: Sequence[str]) -> Adapter:
    """The adapter in a factorization that is written, its scales linear where PEFT knows no other."""
    if adapter.config.factors not in written:
        return adapter.refactor("locon")
    if adapter.config.factors in ("loha", "lokr"):
        config = adapter.config.replace(rank_scaling="linear")
        return assemble(Adapter, config, with_linear_scaling(adapter), modules=adapter.modules)
    return adapter


def _tensors(adapter: Adapter, layers: Mapping[str, LayerFactors], start: str) -> dict[str, Tensor]:
    """Key -> values, in PEFT's names and shapes."""
    with_bias = _has_bias(adapter)
    tensors = {}
    for path, layer in layers.items():
        stem, spec = f"{start}{path}", layer.spec
        point = (1,) * len(spec.kernel)
        for name, tensor in layer.tensors.items():
            if name == "lora_A":
                tensors[f"{stem}.lora_A.weight"] = tensor.reshape(layer.rank, *spec.shape[1:])
            elif name == "lora_B":
                tensors[f"{stem}.lora_B.weight"] = tensor.reshape(spec.out_channels, layer.rank, *point)
            elif name == MAGNITUDE:
                tensors[f"{stem}.lora_magnitude_vector"] = tensor.reshape(1, -1, *point) if point else tensor
            elif name != BIAS_DELTA:
                tensors[f"{stem}.{name}"] = tensor
        if with_bias:
            tensors[f"{stem}.lora_B.bias"] = _bias(layer, adapter.config.scale(layer.rank, layer.alpha))
    return tensors


def _has_bias(adapter: Adapter) -> bool:
    """Whether there is a bias to write; those of other methods than LoRA are zero, see `_check`."""
    return adapter.config.factors == "locon" and any(BIAS_DELTA in layer.tensors for layer in adapter.layers.values())


def _check(adapter: Adapter, what: str, attention: bool, base: Container[str]) -> None:
    factors = adapter.config.factors
    lora = factors in ("locon", "dora")
    for path, layer in adapter.layers.items():
        reason = None
        trained_bias = BIAS_DELTA in layer.tensors and bool(layer.tensors[BIAS_DELTA].ne(0).any())
        if layer.spec.transposed:
            reason = "is a transposed convolution, which PEFT cannot adapt"
        elif layer.spec.groups > 1 and lora:
            reason = "is a grouped convolution: PEFT's factors have another form there, and it cannot merge them"
        elif len(layer.spec.kernel) > 2 and not lora:
            reason = f"is a convolution of three dimensions, for which PEFT has no {_TYPES[factors]}"
        elif "lokr_w2" in layer.tensors and len(layer.spec.kernel) == 1:
            reason = "is a Conv1d with a whole lokr_w2, whose product PEFT forms in another order"
        elif layer.aliases:
            reason = f"is one module with {', '.join(map(repr, layer.aliases))}: PEFT adapts only the first of them"
        elif not path:
            reason = "is the model itself, which PEFT cannot adapt"
        elif trained_bias and factors != "locon":
            reason = f"has a bias delta, for which PEFT has no place beside {factors} factors"
        elif trained_bias and layer.alpha == 0:
            reason = "has a bias delta and alpha 0: PEFT scales the bias, too"
        reason = reason or (why_not_in_peft(path, layer) if attention else why_no_attention(path, layer, base))
        if reason:
            raise ConvLoRAError(f"write: no {what} holds this one: '{path}' {reason}")
    if "" in adapter.modules:
        raise ConvLoRAError(f"write: no {what} holds this one: it has tensors of the model itself")


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


def _config(adapter: Adapter, written: Mapping[str, LayerFactors]) -> dict[str, Any]:
    factors = adapter.config.factors
    layers = {path: layer for path, layer in written.items() if path == attention_of(path)}
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    methods: dict[str, dict[str, Any]] = {
        "LORA": {
            "lora_alpha": _number(alpha),
            "lora_dropout": 0.0,
            "use_rslora": adapter.config.rank_scaling == "sqrt",
            "use_dora": factors == "dora",
            "bias": "none",
            "lora_bias": _has_bias(adapter),
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        },
        "LOHA": {"alpha": _number(alpha), "use_effective_conv2d": False},
        "LOKR": {"alpha": _number(alpha), "decompose_both": False, "decompose_factor": -1},
    }
    return {
        "peft_type": _TYPES[factors],
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        **methods[_TYPES[factors]],
        "modules_to_save": list(adapter.modules) or None,
        "target_modules": "|".join(re.escape(path) for path in layers),  # a list would match the ends of names
        "rank_pattern": {f"^{re.escape(p)}": layer.rank for p, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {
            f"^{re.escape(p)}": _number(layer.alpha) for p, layer in layers.items() if layer.alpha != alpha
        },
    }


def _number(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
