"""What the keys of a file with one adapter say: which layer, and which part of its update.

Trainers spell the same tensors in several ways: `lora_unet_body_0.lora_down.weight` (kohya's scripts, LyCORIS),
`diffusion_model.body.0.lora_A.weight` (ComfyUI), `unet.body.0.lora.down.weight` (older diffusers). All are a name of a
layer and, behind a dot, a part. The name is the layer's path behind a prefix: with its dots, or flat, with `_` for each
dot, and then it does not say the path; the layers of the base do.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.factors.base import WeightSpec
from convlora.support.patterns import nearest_names

PREFIXES = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lora")
DOTTED = ("base_model.model", "diffusion_model", "model.diffusion_model", "transformer", "unet", "lora_unet",
          "text_encoder", "text_encoder_2", "text_encoder_3", "lycoris")  # fmt: skip
_WRAPPERS = ("base_model.model",)  # never of a layer's own path

_SPELLINGS = {  # part -> how it ends a key
    "lora_down": ("lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight", "lora_A.weight"),
    "lora_up": ("lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_B.weight"),
    "lora_mid": ("lora_mid.weight",),
    "lora_bias": ("lora_B.bias",),  # with the scale of the layer
    "lora_magnitude_vector": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    **{
        name: (name,)
        for name in (
            "alpha", "dora_scale", "diff", "diff_b",
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        )
    },
}  # fmt: skip
_PARTS = {spelling: part for part, spellings in _SPELLINGS.items() for spelling in spellings}
_OF_PEFT = ("lora_A", "lora_B", "lora_magnitude_vector")  # have the adapter's name behind them in raw state dicts

_OFT, _IA3 = "OFT rotates the weight", "IA3 multiplies channels of the weight"
_GLORA = "GLoRA multiplies the weight, too"
_TLORA = "T-LoRA takes another rank at each step of diffusion"
_NORM = "it is of a norm, which has no layer's weight; train norms by modules_to_save"
REFUSED = {  # how a key ends -> why no factorization of this library holds it
    "oft_blocks": _OFT, "oft_diag": _OFT, "oft_R": _OFT, "boft_R": _OFT, "boft_s": _OFT,
    "on_input": _IA3, "ia3_l": _IA3,
    "a1.weight": _GLORA, "a2.weight": _GLORA, "b1.weight": _GLORA, "b2.weight": _GLORA, "bm.weight": _GLORA,
    "lambda_layer": _TLORA, "p_layer.weight": _TLORA, "q_layer.weight": _TLORA,
    "w_norm": _NORM, "b_norm": _NORM,
    "lora_embedding_A": "embeddings are no convolutions or Linear layers",
    "lora_embedding_B": "embeddings are no convolutions or Linear layers",
}  # fmt: skip


def split_key(key: str) -> tuple[str, str] | None:
    """The name of a layer and the part of its update; None for what is no part.

    Example:
        >>> split_key("lora_unet_body_0.lora_down.weight"), split_key("unet.to_q.lora_B.default.weight")
        (('lora_unet_body_0', 'lora_down'), ('unet.to_q', 'lora_up'))
        >>> split_key("body.attn1.processor.to_out_lora.up.weight"), split_key("body.0.weight")
        (('body.attn1.to_out.0', 'lora_up'), None)
    """
    pieces = key.rsplit(".", 3)
    for count in (1, 2, 3):
        part = _PARTS.get(".".join(pieces[-count:]))
        if part is not None and len(key) > (end := sum(map(len, pieces[-count:])) + count):
            return key[:-end].replace(".processor.", "."), part
    if len(pieces) == 4 and pieces[1] in _OF_PEFT:  # …lora_A.<adapter>.weight
        part = _PARTS.get(f"{pieces[1]}.{pieces[3]}")
        return (pieces[0], part) if part else None
    if len(pieces) >= 3 and pieces[-3].endswith("_lora"):  # …attn1.processor.to_q_lora.down.weight
        part = _PARTS.get(f"lora.{pieces[-2]}.{pieces[-1]}")
        name = key[: -len(f"_lora.{pieces[-2]}.{pieces[-1]}")].replace(".processor.", ".")
        return (f"{name}.0" if name.endswith(".to_out") else name, part) if part and name else None
    return None


def why_refused(key: str) -> str | None:
    """Why a tensor of this name is no part of an adapter of this library; None if nothing is known of it.

    Example:
        >>> why_refused("lycoris_0.on_input")
        'IA3 multiplies channels of the weight'
    """
    pieces = key.rsplit(".", 2)
    found = (REFUSED.get(".".join(pieces[-count:])) for count in (1, 2))
    return next((reason for reason in found if reason), None) if len(pieces) > 1 else None


def other_key(key: str, wanted: str) -> str:
    """The key of another part of the layer that a key is of, in the same spelling where it has several.

    Example:
        >>> other_key("unet.to_q.lora_B.weight", "lora_down"), other_key("unet_to_q.hada_w1_a", "hada_w1_b")
        ('unet.to_q.lora_A.weight', 'unet_to_q.hada_w1_b')
    """
    pairs = (("lora_down", "lora_up"), ("lora_A", "lora_B"), (".down", ".up"))
    for pair in pairs:
        old, new = pair if wanted == "lora_up" else pair[::-1]
        head, found, tail = key.rpartition(old)
        if wanted in ("lora_down", "lora_up") and found:
            return f"{head}{new}{tail}"
    name, _ = split_key(key) or (key, "")
    return f"{name}.{_SPELLINGS[wanted][0]}"


# --- the keys of one network -------------------------------------------------------------------------------------


def within(keys: Iterable[str], prefix: str) -> dict[str, str]:
    """The keys that begin with a prefix, up to a dot or `_` -> what is left of them.

    Raises:
        ConvLoRAError: there are none.

    Example:
        >>> within(["lora_unet_conv.alpha", "lora_te_fc.alpha"], "lora_unet")
        {'lora_unet_conv.alpha': 'conv.alpha'}
    """
    start = prefix.rstrip("._")
    keys = list(keys)
    found = {key: key[len(start) + 1 :] for key in keys if key.startswith((f"{start}.", f"{start}_"))} if start else {}
    if start and not found:
        heads = ", ".join(repr(head) for head in networks_of(keys)) or f"'{next(iter(keys), '')}', …"
        raise ConvLoRAError(f"no name begins with prefix {prefix!r}; the file has {heads}")
    return found if start else {key: key for key in keys}


def networks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Known prefix -> the names that begin with it, of the longest prefix each; other names are left out.

    Example:
        >>> networks_of(["lora_te1_fc", "lora_unet_conv", "unet.conv", "conv"])
        {'lora_te1': ['lora_te1_fc'], 'lora_unet': ['lora_unet_conv'], 'unet': ['unet.conv']}
    """
    starts = [*((p, f"{p}_") for p in PREFIXES), *((p, f"{p}.") for p in DOTTED)]
    starts.sort(key=lambda pair: -len(pair[1]))
    found: dict[str, list[str]] = {}
    for name in names:
        known = next((prefix for prefix, start in starts if name.startswith(start)), None)
        if known is not None:
            found.setdefault(known, []).append(name)
    return found


# --- names and paths ---------------------------------------------------------------------------------------------


def flat(path: str, prefix: str) -> str:
    """The name of a layer in a file of kohya's scripts.

    Example:
        >>> flat("body.0.conv", "lycoris")
        'lycoris_body_0_conv'
    """
    return f"{prefix}_{path}".replace(".", "_") if prefix else path.replace(".", "_")


def resolve(names: Collection[str], layers: Mapping[str, WeightSpec]) -> dict[str, str]:
    """Name -> layer path, by the one prefix with which all names are those of layers.

    Raises:
        ConvLoRAError: some names are of no layer, or of several.
    """
    dotted = any("." in name for name in names)
    if dotted and all(name in layers for name in names):
        return {name: name for name in names}
    mark, known_prefixes = (".", DOTTED) if dotted else ("_", PREFIXES)
    paths: dict[str, list[str]] = {}
    for path in layers:
        paths.setdefault(path if dotted else flat(path, ""), []).append(path)
    first = next(iter(names), "")
    prefixes = [first[: len(first) - len(f)] for f in paths if first.endswith(f)]
    prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith(mark)]
    fitting = [prefix for prefix in prefixes if all(_rest(name, prefix) in paths for name in names)]
    known = [prefix for prefix in fitting if prefix[:-1] in known_prefixes]
    if not fitting:
        raise ConvLoRAError(_no_such_layers(names, paths, [*prefixes, *(f"{p}{mark}" for p in known_prefixes)]))
    if len(known or fitting) > 1:
        readings = " or ".join(repr(paths[first.removeprefix(prefix)][0]) for prefix in known or fitting)
        raise ConvLoRAError(
            f"the prefix of the names is ambiguous: '{first}' can be {readings}; prefix= says which, or rename the keys"
        )
    prefix = (known or fitting)[0]
    for name in names:
        if len(paths[name.removeprefix(prefix)]) > 1:
            alike = " and ".join(map(repr, paths[name.removeprefix(prefix)]))
            raise ConvLoRAError(f"'{name}' is the name of {alike}: a LoCon file cannot tell them apart")
    return {name: paths[name.removeprefix(prefix)][0] for name in names}


def _rest(name: str, prefix: str) -> str | None:
    return name[len(prefix) :] if name.startswith(prefix) else None


def _no_such_layers(names: Collection[str], paths: Collection[str], prefixes: Iterable[str]) -> str:
    closest = max(prefixes, key=lambda p: sum(_rest(n, p) in paths for n in names))
    unknown = sorted(name for name in names if _rest(name, closest) not in paths)
    message = f"no layer of the base has these names: {', '.join(unknown)}; "
    networks = networks_of(names)
    if len(networks) > 1:
        heads = ", ".join(f"{prefix!r} ({len(own)})" for prefix, own in networks.items())
        return f"{message}the file is of several networks, {heads}: prefix= reads one of them"
    return message + nearest_names(unknown[0].removeprefix(closest), paths)


def without_prefix(names: Collection[str], taken: bool) -> dict[str, str]:
    """Name -> what is left without a known prefix: the layer path, but for its dots where the name is flat.

    `taken`: whether the names are without their prefix already.

    Raises:
        ConvLoRAError: the names are of several networks.
    """
    networks = {} if taken else networks_of(names)
    if len(networks) > 1 and sum(map(len, networks.values())) == len(names):
        heads = ", ".join(f"{prefix!r} ({len(own)})" for prefix, own in networks.items())
        raise ConvLoRAError(f"the file is of several networks, {heads}: prefix= reads one of them")
    if any("." in name for name in names):
        starts = [f"{wrapper}." for wrapper in _WRAPPERS if all(name.startswith(f"{wrapper}.") for name in names)]
        return {name: name.removeprefix(next(iter(starts), "")) for name in names}
    prefixes = sorted((f"{prefix}_" for prefix in PREFIXES), key=len, reverse=True)
    if taken:
        prefixes = []
    paths = {name: name.removeprefix(next(filter(name.startswith, prefixes), "")) for name in names}
    if len(set(paths.values())) < len(paths):
        paths = {name: name for name in names}
    if any("_" in path for path in paths.values()):
        warnings.warn(
            "read: a LoCon file does not say where the dots of its layer paths are; layers= of the base does",
            ConvLoRAWarning,
            stacklevel=5,
        )
    return paths
