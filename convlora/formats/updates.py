"""The tensors of one layer, by the names of PEFT and LyCORIS, as factors of this library; the values stay.

| parts | update, before its scale | factorization |
|---|---|---|
| `lora_down`, `lora_up` | `up @ down` | `locon` |
| and `lora_mid` (Tucker) | `einsum('or,rskl,si->oikl', up, mid, down)` | `locon`, down and mid as one |
| and `dora_scale` or `lora_magnitude_vector` | DoRA of that | `dora`; `dora_in` for a norm by input channel |
| `hada_w1_a`, `_w1_b`, `_w2_a`, `_w2_b` | `(w1_a @ w1_b) * (w2_a @ w2_b)` | `loha` |
| and `hada_t1`, `hada_t2` (Tucker) | the same of `einsum('rskl,si->rikl', t, w_b)` | `loha`, w_b and t as one |
| `lokr_w1`, `lokr_w2`, or each as `_a @ _b` | `kron(w1, w2)` | `lokr`; `dense` for other divisions of the channels |
| `diff` | itself | `dense` |
| `diff_b` | of the bias | `lora_bias` beside any of them |

The scale is alpha over the rank r, and 1 for `diff`. LyCORIS leaves it out where w1 and w2 of LoKr both are whole; what
its `rs_lora` would make of it there, a file does not say. Its LoHa applies it once in the network, which counts here,
and twice in `merge_to`.

An adapter has one factorization. Layers of a file that differ in theirs are all brought to `locon`, exactly: an update
is the product of itself and an identity matrix. DoRA beside another kind is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlora.adapter.algebra import dense_delta
from convlora.adapter.parts import BIAS_DELTA, LayerFactors
from convlora.config import AdapterConfig, is_number
from convlora.errors import ConvLoRAError
from convlora.factors.base import Shape, WeightSpec, get_factors

MAGNITUDE = "lora_magnitude"
_LARGER = 64  # what is formed of a layer's tensors, over their size, where no base says the shape of its weight

_KINDS = {"lora_": "locon", "hada_": "loha", "lokr_": "lokr", "diff": "dense"}
_BESIDE = ("alpha", "dora_scale", "lora_magnitude_vector", "lora_bias", "diff_b")  # another part, which says the kind
_NEEDED = {
    "locon": ("lora_down", "lora_up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w2"),
    "dense": ("diff",),
}


@dataclass(frozen=True)
class Update:
    """The update of a layer, and the factorization that it is written in."""

    factors: str
    layer: LayerFactors


def kind_of(name: str, parts: Mapping[str, Tensor]) -> str | None:
    """The factorization of a layer's parts; None where they are of its bias alone.

    Raises:
        ConvLoRAError: they are of several.
    """
    kinds = {kind for part in parts if part not in _BESIDE for start, kind in _KINDS.items() if part.startswith(start)}
    if len(kinds) > 1:
        raise ConvLoRAError(f"'{name}' has parts of several kinds: {', '.join(sorted(kinds))}")
    return next(iter(kinds), None)


def missing_parts(parts: Mapping[str, Tensor], kind: str) -> list[str]:
    """The parts without which a layer of this kind has no update."""
    halves = {"lokr_w1": ("lokr_w1_a", "lokr_w1_b"), "lokr_w2": ("lokr_w2_a", "lokr_w2_b")}
    missing = []
    for part in _NEEDED[kind]:
        both = halves.get(part, ())
        if part not in parts and not (both and all(half in parts for half in both)):
            missing += [half for half in both if half not in parts] if any(h in parts for h in both) else [part]
    if kind == "loha" and ("hada_t1" in parts) != ("hada_t2" in parts):
        missing.append("hada_t1" if "hada_t2" in parts else "hada_t2")
    return missing


def update_of(
    name: str,
    parts: Mapping[str, Tensor],
    spec: WeightSpec | None,
    alpha: float | None,
    *,
    stated_rank: int | None = None,
    known: bool = False,
) -> Update:
    """The update that the parts of a layer write.

    Args:
        name: of the layer, for messages.
        parts: part -> values, by the names of the table above; none is missing.
        spec: the weight, if it is known.
        alpha: the scale times the rank; `None` means a scale of 1.
        stated_rank: the rank that a config states, for LoKr factors that do not show it.
        known: whether `spec` is that of a base, and not of the file itself.

    Raises:
        ConvLoRAError: shapes that do not fit together, or not to the weight.
    """
    if spec is not None and spec.transposed:
        raise ConvLoRAError(f"'{name}' is a transposed convolution in the base, for which the format has no factors")
    kind = kind_of(name, parts)
    if kind is None:
        update = _of_bias_alone(name, spec)
    elif kind == "locon":
        update = _locon(name, parts, spec, alpha)
    elif kind == "loha":
        update = _loha(name, parts, spec, alpha)
    elif kind == "lokr":
        update = _lokr(name, parts, spec, alpha, stated_rank, known)
    else:
        update = _dense(name, parts["diff"], spec)
    if "dora_scale" in parts or "lora_magnitude_vector" in parts:
        update = _decomposed(name, update, parts, known)
    return _with_bias(name, update, parts)


def _locon(name: str, parts: Mapping[str, Tensor], spec: WeightSpec | None, alpha: float | None) -> Update:
    up, down = parts["lora_up"], parts["lora_down"]
    rank = up.shape[1] if up.dim() > 1 else 0
    if "lora_mid" in parts:
        down = _folded(name, parts["lora_mid"], down)
    fits = rank and 2 <= down.dim() <= 5 and 0 not in (*up.shape, *down.shape)
    if not fits or up[0].numel() != rank or down.shape[0] != rank:
        raise _do_not_fit(name, parts, "lora_")
    spec = spec or WeightSpec((up.shape[0], *down.shape[1:]))
    point = math.prod(down.shape[2:]) == 1
    tensors = {
        "lora_A": down.flatten(1) if point else down,
        "lora_B": up.reshape(-1, rank, *[1] * (0 if point else down.dim() - 2)),
    }
    return Update("locon", LayerFactors(tensors, spec, rank, float(rank) if alpha is None else alpha))


def _folded(name: str, mid: Tensor, down: Tensor) -> Tensor:
    """A down of the whole kernel, `(r, in, *kernel)`, of Tucker's mid `(r, s, *kernel)` and down `(s, in, 1…)`."""
    shapes = f"'{name}' has a mid {tuple(mid.shape)} and a down {tuple(down.shape)}"
    if not 3 <= mid.dim() <= 5 or mid.shape[1] != down.shape[0] or down.dim() < 2 or down[0].numel() != down.shape[1]:
        raise ConvLoRAError(shapes)
    if mid.shape[0] * down.shape[1] * math.prod(mid.shape[2:]) > _LARGER * (mid.numel() + down.numel()):
        raise ConvLoRAError(f"{shapes}, which make a factor of more than {_LARGER} times their size")
    folded = torch.einsum("rs...,si->ri...", mid.double(), down.flatten(1).double())
    return folded.to(torch.promote_types(down.dtype, torch.float32))


def _loha(name: str, parts: Mapping[str, Tensor], spec: WeightSpec | None, alpha: float | None) -> Update:
    kernel: Shape = ()
    halves: dict[str, Tensor] = {}
    for n in (1, 2):
        a, b, core = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")
        if a.dim() != 2 or b.dim() != 2 or (core is not None and core.dim() < 3):
            raise _do_not_fit(name, parts, "hada_")
        if core is not None:  # both are (r, channels), and the core (r, r, *kernel)
            kernel = tuple(core.shape[2:])
            a, b = a.mT.contiguous(), _folded(name, core, b).flatten(1)
        halves |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b}
    (out, rank), columns = halves["hada_w1_a"].shape, halves["hada_w1_b"].shape[1]
    shapes = {
        "hada_w1_a": (out, rank),
        "hada_w2_a": (out, rank),
        "hada_w1_b": (rank, columns),
        "hada_w2_b": (rank, columns),
    }
    if any(tuple(halves[part].shape) != shape for part, shape in shapes.items()) or 0 in (out, rank, columns):
        raise _do_not_fit(name, parts, "hada_")
    spec = spec or WeightSpec((out, columns // math.prod(kernel), *kernel) if kernel else (out, columns))
    _check_fit(name, parts, "hada_", spec, (out, columns))
    return Update("loha", LayerFactors(halves, spec, rank, float(rank) if alpha is None else alpha))


def _lokr(
    name: str,
    parts: Mapping[str, Tensor],
    spec: WeightSpec | None,
    alpha: float | None,
    stated_rank: int | None,
    known: bool,
) -> Update:
    w1, rank = _lokr_w1(name, parts)
    if "lokr_w2" in parts:
        w2: dict[str, Tensor] = {"lokr_w2": parts["lokr_w2"]}
        rows, columns = w2["lokr_w2"].shape[0] if w2["lokr_w2"].dim() else 0, math.prod(w2["lokr_w2"].shape[1:])
        kernel = tuple(w2["lokr_w2"].shape[2:])
    else:
        w2, kernel = _lokr_halves(name, parts)
        rank, rows, columns = w2["lokr_w2_a"].shape[1], w2["lokr_w2_a"].shape[0], w2["lokr_w2_b"].shape[1]
    whole = "lokr_w2" in w2
    if w1.dim() != 2 or 0 in (*w1.shape, rows, columns, rank) or (whole and w2["lokr_w2"].dim() < 2):
        raise _do_not_fit(name, parts, "lokr_")
    total = (w1.shape[0] * rows, w1.shape[1] * columns)
    guessed = spec is None
    spec = spec or WeightSpec((total[0], total[1] // math.prod(kernel), *kernel) if kernel else total)
    _check_fit(name, parts, "lokr_", spec, total)
    # LyCORIS leaves the scale out where both are whole; PEFT states the rank and never does.
    rank = stated_rank or rank or 1
    scale = 1.0 if alpha is None or (stated_rank is None and whole and "lokr_w1" in parts) else alpha / rank
    if whole:
        w2 = {"lokr_w2": w2["lokr_w2"].reshape(rows, -1, *spec.kernel)}
        rank = max(rank, -(-max(w2["lokr_w2"].shape[:2]) // 2))  # so much that w2 is whole here, too
    tensors = {"lokr_w1": w1, **w2}
    in_its_order = stated_rank is None or not whole or len(spec.kernel) != 1
    if in_its_order and {n: tuple(t.shape) for n, t in tensors.items()} == get_factors("lokr").shapes(spec, rank):
        return Update("lokr", LayerFactors(tensors, spec, rank, scale * rank))
    if guessed:
        raise ConvLoRAError(
            f"'{name}' is of a convolution, or divides its channels otherwise than this library: layers= of the base"
            " says its weight"
        )
    _check_size(name, math.prod(total), parts, known)
    second = w2["lokr_w2"] if whole else w2["lokr_w2_a"].double() @ w2["lokr_w2_b"].double()
    # PEFT takes w1 (a, c) by the last axes of a Conv1d's w2 (b, d, k): that is what was trained.
    delta = torch.kron(w1.double(), (second.flatten(1) if in_its_order else second).double()) * scale
    wide = torch.promote_types(w1.dtype, torch.float32)
    return Update("dense", LayerFactors({"diff": delta.reshape(_convolution_shape(spec)).to(wide)}, spec, 1, 1.0))


def _lokr_w1(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """w1 `(a, c)`, formed where it is a product, and the rank that it shows: 1 where it shows none."""
    if "lokr_w1" in parts:
        return parts["lokr_w1"], 1
    a, b = parts["lokr_w1_a"], parts["lokr_w1_b"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise _do_not_fit(name, parts, "lokr_w1")
    if a.shape[0] * b.shape[1] > _LARGER * (a.numel() + b.numel()):
        raise ConvLoRAError(f"'{name}' has a lokr_w1 of more than {_LARGER} times the size of its factors")
    return (a.double() @ b.double()).to(torch.promote_types(a.dtype, torch.float32)), a.shape[1]


def _lokr_halves(name: str, parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Shape]:
    """w2 as `(b, r)` and `(r, d·k)`, and the kernel as far as they show it."""
    a, b, core = parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2")
    if a.dim() != 2 or b.dim() != 2:
        raise _do_not_fit(name, parts, "lokr_")
    kernel: Shape = ()
    if core is not None:
        a, b, kernel = a.mT.contiguous(), _folded(name, core, b).flatten(1), tuple(core.shape[2:])
    if a.shape[1] != b.shape[0]:
        raise _do_not_fit(name, parts, "lokr_")
    return {"lokr_w2_a": a, "lokr_w2_b": b}, kernel


def _dense(name: str, diff: Tensor, spec: WeightSpec | None) -> Update:
    if diff.dim() < 2 and (spec is None or diff.numel() != math.prod(spec.shape)):
        raise ConvLoRAError(f"'{name}.diff' has the shape {tuple(diff.shape)}, as that of a norm, which is no layer")
    spec = spec or WeightSpec(tuple(diff.shape))
    if diff.numel() != math.prod(spec.shape):
        raise ConvLoRAError(f"'{name}.diff' has the shape {tuple(diff.shape)}, its weight {spec.shape}")
    return Update("dense", LayerFactors({"diff": diff.reshape(_convolution_shape(spec))}, spec, 1, 1.0))


def _of_bias_alone(name: str, spec: WeightSpec | None) -> Update:
    """An update that is zero, for a layer of which the file has the bias only."""
    if spec is None:
        raise ConvLoRAError(f"'{name}' has a bias and no update of its weight: layers= of the base says its shape")
    tensors = {part: torch.zeros(shape) for part, shape in get_factors("locon").shapes(spec, 1).items()}
    return Update("locon", LayerFactors(tensors, spec, 1, 1.0))


def _decomposed(name: str, update: Update, parts: Mapping[str, Tensor], known: bool) -> Update:
    """DoRA of an update: PEFT's magnitudes are by output channel, LyCORIS's `(out, 1…)` or `(1, in, 1…)`."""
    layer = _as_locon(name, update, known)
    magnitude = parts["lora_magnitude_vector" if "lora_magnitude_vector" in parts else "dora_scale"]
    (out, inner), sides = layer.spec.shape[:2], tuple(magnitude.shape[:2])
    of_input = "dora_scale" in parts and sides == (1, inner) and sides != (out, 1)
    if magnitude.numel() != (inner if of_input else out):
        raise ConvLoRAError(f"'{name}' has magnitudes {tuple(magnitude.shape)} for a weight {layer.spec.shape}")
    tensors = {**layer.tensors, MAGNITUDE: magnitude.flatten()}
    return Update("dora_in" if of_input else "dora", replace(layer, tensors=tensors))


def _with_bias(name: str, update: Update, parts: Mapping[str, Tensor]) -> Update:
    layer = update.layer
    if "diff_b" not in parts:
        return update
    bias = parts["diff_b"]
    if tuple(bias.shape) != (layer.spec.out_channels,):
        raise ConvLoRAError(f"'{name}' has a bias {tuple(bias.shape)} for {layer.spec.out_channels} channels")
    return replace(update, layer=replace(layer, tensors={**layer.tensors, BIAS_DELTA: bias}))


def with_scaled_bias(parts: Mapping[str, Tensor], config: AdapterConfig, alpha: float | None) -> Mapping[str, Tensor]:
    """PEFT's bias of the up factor, which the layer's scale multiplies, as the change of the bias.

    PEFT has one for all layers or none, and it is zero where the layer has no bias.
    """
    if "lora_bias" not in parts:
        return parts
    bias, up = parts["lora_bias"], parts.get("lora_up")
    rest = {part: tensor for part, tensor in parts.items() if part != "lora_bias"}
    if not bool(bias.ne(0).any()) or up is None or up.dim() < 2:
        return rest
    if "lora_magnitude_vector" in parts:
        raise ConvLoRAError("a bias of lora_B beside magnitudes: PEFT's DoRA makes it a part of the weight's update")
    scale = 1.0 if alpha is None else config.scale(max(up.shape[1], 1), alpha)
    return {**rest, "diff_b": (bias.double() * scale).to(bias.dtype)}


def _convolution_shape(spec: WeightSpec) -> Shape:
    return (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)


def _check_fit(name: str, parts: Mapping[str, Tensor], start: str, spec: WeightSpec, matrix: tuple[int, int]) -> None:
    """That factors of a matrix `(out, in·k)` are of a weight."""
    if matrix != (spec.out_channels, math.prod(_convolution_shape(spec)[1:])):
        raise ConvLoRAError(f"{_do_not_fit(name, parts, start)}, nor to a weight {spec.shape}")


def _do_not_fit(name: str, parts: Mapping[str, Tensor], start: str) -> ConvLoRAError:
    shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in parts.items() if part.startswith(start))
    return ConvLoRAError(f"'{name}' has {shapes}, which do not fit together")


# --- the layers of one adapter -----------------------------------------------------------------------------------


def in_one_form(updates: Mapping[str, Update], known: bool) -> tuple[str, dict[str, LayerFactors]]:
    """The factorization of all layers and the layers in it; `known` as in `update_of`.

    Raises:
        ConvLoRAError: some are DoRA's and some are not; or an update would be many times the size of its factors.
    """
    kinds = {update.factors: path for path, update in updates.items()}
    if len(kinds) == 1:
        return next(iter(kinds)), {path: update.layer for path, update in updates.items()}
    decomposed = [kind for kind in kinds if kind.startswith("dora")]
    if decomposed:
        other = next(kind for kind in kinds if kind != decomposed[0])
        raise ConvLoRAError(
            f"'{kinds[decomposed[0]]}' is DoRA ({decomposed[0]}) and '{kinds[other]}' is {other}: an adapter has one"
            " factorization, and DoRA has no other form"
        )
    if "locon" in kinds:
        return "locon", {path: _as_locon(path, update, known) for path, update in updates.items()}
    return "dense", {path: _as_dense(path, update, known) for path, update in updates.items()}


def _as_locon(name: str, update: Update, known: bool) -> LayerFactors:
    """The same update in LoCon's factors: its own are kept, another is the product of itself and an identity matrix."""
    if update.factors == "locon":
        return update.layer
    layer = _as_dense(name, update, known)
    delta = layer.tensors["diff"].flatten(1)
    rank = min(delta.shape)
    one = torch.eye(rank, dtype=delta.dtype)
    pair = (delta, one) if rank == delta.shape[0] else (one, delta)
    shapes = get_factors("locon").shapes(layer.spec, rank)
    tensors = {part: tensor.reshape(shapes[part]) for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)}
    rest = {part: tensor for part, tensor in layer.tensors.items() if part != "diff"}
    return replace(layer, tensors={**tensors, **rest}, rank=rank, alpha=float(rank))


def _as_dense(name: str, update: Update, known: bool) -> LayerFactors:
    """The same update, formed."""
    layer = update.layer
    if update.factors == "dense":
        return layer
    _check_size(name, math.prod(layer.spec.shape), layer.tensors, known)
    delta = dense_delta(AdapterConfig(targets="*", factors=update.factors), layer)
    wide = any(tensor.dtype == torch.float64 for tensor in layer.tensors.values())
    tensors = {"diff": delta if wide else delta.to(torch.float32)}
    if BIAS_DELTA in layer.tensors:
        tensors[BIAS_DELTA] = layer.tensors[BIAS_DELTA]
    return replace(layer, tensors=tensors, rank=1, alpha=1.0)


def _check_size(name: str, numbers: int, parts: Mapping[str, Tensor], known: bool) -> None:
    """That forming an update takes no more memory than its file, or its base, lets expect."""
    if not known and numbers > _LARGER * sum(part.numel() for part in parts.values()):
        raise ConvLoRAError(
            f"'{name}' has an update that has to be formed, of more than {_LARGER} times the size of its factors:"
            " layers= of the base says that its weight is as large"
        )


def stated_alpha(name: str, alpha: Tensor | None) -> float | None:
    """The number that an alpha of a file is; None where there is none, or where it is 0, which means the rank there.

    Raises:
        ConvLoRAError: it is not one finite number.
    """
    if alpha is None:
        return None
    value = alpha.item() if alpha.numel() == 1 and not alpha.is_complex() else None
    if not is_number(value):
        stated = f"a tensor {tuple(alpha.shape)}" if alpha.numel() != 1 else alpha.item()
        raise ConvLoRAError(f"'{name}' is {stated} instead of one finite number")
    return float(value) or None  # type: ignore[arg-type]
