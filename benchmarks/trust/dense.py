"""The dense oracle of the state machine, and how far rounding can take a fused weight.

The oracle holds base weights, factors and what acts as plain data, and computes in float64. It takes part in nothing
that the library computes: the machine tells it what was done, it says what must hold then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ("stem", "mid", "up", "head")  # each once, in the order of the network
NORM = "norm"  # after the stem, in some networks: keeps statistics
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
ALIASES = {"mid": "again"}
INPUT_SHAPE = (1, 3, 4, 4)
EPS = 1e-5  # of the norm

Apply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
APPLY: tuple[tuple[str, Apply], ...] = (
    ("stem", lambda x, w, b: F.conv2d(x, w, b, padding=1)),
    ("mid", lambda x, w, b: F.conv2d(x, w, b, padding=(0, 1), groups=2)),
    ("mid", lambda x, w, b: F.conv2d(x, w, b, padding=(0, 1), groups=2)),
    ("up", lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2).movedim(1, -1)),
    ("head", F.linear),
)


class OracleNet(nn.Module):
    """A convolution, a grouped one at two places, a transposed one and a Linear; `head.bias` the user has frozen.

    `normed`: with a BatchNorm that is in use.
    """

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if normed else nn.Identity()
        with torch.no_grad():
            for tensor in (*self.norm.parameters(), *self.norm.buffers()):
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
        self.mid = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=2, bias=False)
        self.again = self.mid
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Linear(3, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = torch.tanh(self.again(torch.tanh(self.mid(x))))
        return self.head(torch.tanh(self.up(x)).movedim(1, -1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class UpdateSize:
    """What the rounding of one update depends on: `gain·Σ|b||a|` per element, the number of products, |gain|, dtype."""

    size: Tensor
    terms: int
    gain: float
    dtype: torch.dtype


def rounding_bound(
    weight: Tensor, fused: Tensor, changes: Sequence[UpdateSize], dtype: torch.dtype, exact: bool = False
) -> Tensor:
    """How far the fused weight of the library may be from the exact `fused`, element by element, float64.

    With u the unit roundoff of the factors' dtype and n products per element, a computed update is within
    (n + 3)·u·gain·Σ|b||a| of the exact one (Higham 2002, Accuracy and Stability, section 3.1): n roundings in the
    product, one in the gain, one in the multiplication by it, one to spare for second order terms. Products that
    underflow lose up to half the smallest number each. Each sum adds a rounding, and so does the cast to the weight's
    `dtype`. `exact`: all of it in float64, but for the cast.
    """
    if not changes:
        return torch.zeros_like(fused)
    sums = torch.finfo(torch.promote_types(dtype, torch.float64 if exact else torch.float32))
    bound, magnitude = torch.zeros_like(fused), weight.abs()
    for change in changes:
        unit = torch.finfo(torch.float64 if exact else change.dtype)
        smallest = unit.smallest_normal * unit.eps
        bound = bound + (change.terms + 3) * (unit.eps / 2) * change.size + change.terms * smallest * (1 + change.gain)
        magnitude = magnitude + change.size
    bound = bound + len(changes) * (sums.eps / 2) * magnitude
    info = torch.finfo(dtype)
    return bound + (info.eps / 2) * (fused.abs() + bound) + info.smallest_normal * info.eps / 2


@dataclass
class LayerFactors:
    """An adapter on one layer: its factors as they must be, bit for bit."""

    tensors: dict[str, Tensor]
    scale: float

    def delta(self, layer: str, absolute: bool = False) -> Tensor:
        """ΔW without strength, float64, as the layer stores it; `absolute`: Σ |b||a| in place of Σ b·a."""
        a, b = (self.tensors[name].double().flatten(1) for name in ("lora_A", "lora_B"))
        if absolute:
            a, b = a.abs(), b.abs()
        product = torch.einsum("or,ri->oi", b, a) * (abs(self.scale) if absolute else self.scale)
        return product.view(3, 4, 2, 2).transpose(0, 1) if layer == "up" else product

    @property
    def inner(self) -> int:
        return self.tensors["lora_A"].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["lora_A"].dtype


@dataclass
class Copies:
    """An adapter's own tensors of a module, bit for bit; `freezes`: none, and its statistics do not move."""

    tensors: dict[str, Tensor]
    freezes: bool = False

    @property
    def is_optional(self) -> bool:
        """Whether a file may lack it."""
        return set(self.tensors) <= {*STATISTICS}


Held = dict[str, "LayerFactors | Copies"]  # layer or module -> what an adapter has of it


@dataclass
class Oracle:
    """What the model must be."""

    dtype: torch.dtype = torch.float32
    base: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # layer -> kind -> values in `dtype`
    adapters: dict[str, Held] = field(default_factory=dict)  # by name
    active: dict[str, float] = field(default_factory=dict)  # name -> strength, never 0
    merged: bool = False
    exact: bool = False
    before_merge: dict[str, float] | None = None
    frozen: set[str] = field(default_factory=set)  # `<layer>.<kind>`

    def take_base(self, state: dict[str, Tensor]) -> None:
        kinds = ("weight", "bias", *STATISTICS)
        self.base = {
            layer: {k: state[f"{layer}.{k}"].clone() for k in kinds if f"{layer}.{k}" in state}
            for layer in (*LAYERS, *[NORM] * (f"{NORM}.weight" in state))
        }

    @property
    def normed(self) -> bool:
        return NORM in self.base

    def tensors(self) -> list[tuple[str, str]]:
        """(layer or module, name) of all that the base has."""
        return [(layer, kind) for layer, kinds in self.base.items() for kind in kinds]

    def parameters(self) -> list[str]:
        return [f"{layer}.{kind}" for layer, kind in self.tensors() if kind not in STATISTICS]

    def on(self, layer: str) -> list[str]:
        """The adapters on a layer or module."""
        return [name for name, parts in self.adapters.items() if layer in parts]

    def acting(self, layer: str, kind: str) -> list[tuple[float, LayerFactors]]:
        held = [(self.active[name], self.adapters[name][layer]) for name in self.on(layer) if name in self.active]
        found = [(s, part) for s, part in held if isinstance(part, LayerFactors)]
        return found if kind == "weight" else [(s, part) for s, part in found if "lora_bias" in part.tensors]

    def copies(self, layer: str, kind: str) -> list[tuple[float, Tensor]]:
        """Those that act, by strength."""
        held = [(self.active[name], self.adapters[name][layer]) for name in self.on(layer) if name in self.active]
        return [(s, own.tensors[kind]) for s, own in held if isinstance(own, Copies) and kind in own.tensors]

    def moving(self) -> list[str]:
        """The adapters whose statistics a train step would move."""
        acting = {name: self.adapters[name][NORM] for name in self.on(NORM) if name in self.active}
        frozen = any(isinstance(own, Copies) and own.freezes for own in acting.values())
        return [] if frozen else [name for name, own in acting.items() if own.tensors]

    def least_variance(self) -> float:
        """A mixture of variances may be no variance."""
        return float(self.effective(NORM, "running_var")[0].min()) if self.normed else 1.0

    def activate(self, strengths: dict[str, float]) -> None:
        self.active = {name: s for name, s in strengths.items() if s}
        self.before_merge = None

    def merge(self, strengths: dict[str, float] | None, exact: bool = False) -> None:
        before = self.active if self.before_merge is None else self.before_merge
        if strengths is not None:
            self.activate(strengths)
            self.before_merge = before
        self.merged, self.exact = True, exact

    def unmerge(self) -> None:
        self.merged = self.exact = False
        if self.before_merge is not None:
            self.activate(self.before_merge)

    def to(self, dtype: torch.dtype) -> None:
        wide = torch.promote_types(dtype, torch.float32)

        def cast(tensors: dict[str, Tensor], to: torch.dtype) -> dict[str, Tensor]:
            return {name: t.to(to) if t.is_floating_point() else t for name, t in tensors.items()}

        self.base = {layer: cast(kinds, dtype) for layer, kinds in self.base.items()}
        for parts in self.adapters.values():
            for part in parts.values():
                part.tensors = cast(part.tensors, wide if isinstance(part, LayerFactors) else dtype)
        self.dtype = dtype

    def effective(self, layer: str, kind: str) -> tuple[Tensor, Tensor]:
        """W + Σ strength·ΔW + Σ strength·(copy − W), and how far the library's may be from it; both float64."""
        base = self.base[layer][kind].double()
        copies = self.copies(layer, kind)
        whole = len(copies) == 1 and copies[0][0] == 1 and not self.acting(layer, kind)
        if copies and (whole or not self.base[layer][kind].is_floating_point()):
            return copies[-1][1].double(), torch.zeros_like(base)
        total, changes = base.clone(), []
        for strength, part in self.acting(layer, kind):
            if kind == "weight":
                change, size = part.delta(layer).view_as(base), part.delta(layer, absolute=True).view_as(base)
                changes.append(UpdateSize(abs(strength) * size, part.inner, abs(strength * part.scale), part.dtype))
            else:
                change = part.tensors["lora_bias"].double()
                changes.append(UpdateSize(abs(strength) * change.abs(), 1, abs(strength), part.dtype))
            total = total + strength * change
        for strength, copy in copies:
            size = abs(strength) * (copy.double().abs() + base.abs())
            changes.append(UpdateSize(size, 1, abs(strength), torch.promote_types(self.dtype, torch.float32)))
            total = total + strength * (copy.double() - base)
        return total, rounding_bound(base, total, changes, self.dtype, self.exact)

    def output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the network gives, and how far rounding can take it from that: a running error analysis.

        The error of a layer: that of its input through |W|, that of its weight through |x|, that of its sums of
        products, and one rounding each of its result and of the tanh.
        """
        info, sums = torch.finfo(self.dtype), torch.finfo(torch.promote_types(self.dtype, torch.float32))
        x = x.double()
        error = torch.zeros_like(x)
        for layer, apply in APPLY:
            weight, off = self.effective(layer, "weight")
            bias, bias_off = self.effective(layer, "bias") if "bias" in self.base[layer] else (None, None)
            largest = None if bias is None or bias_off is None else bias.abs() + bias_off
            y = apply(x, weight, bias)
            size = apply(x.abs() + error, weight.abs() + off, largest)
            error = apply(error, weight.abs() + off, None) + apply(x.abs(), off, bias_off)
            error = error + weight.numel() * sums.eps * size + info.eps * size
            if layer == "stem" and self.normed:
                y, error = self._normalised(y, error, info.eps, sums.eps)
            x = y if layer == "head" else torch.tanh(y)
            error = error + 2 * info.eps * x.abs() + info.tiny
            if layer != "head":
                error = error.clamp_max(2)  # of a tanh
        return x, error

    def _normalised(self, x: Tensor, error: Tensor, unit: float, sums: float) -> tuple[Tensor, Tensor]:
        """The BatchNorm of eval mode on values that are `error` off."""
        own = {kind: self.effective(NORM, kind) for kind in self.base[NORM]}
        wide = {kind: (value.view(-1, 1, 1), off.view(-1, 1, 1)) for kind, (value, off) in own.items() if value.dim()}
        (weight, weight_off), (bias, bias_off) = wide["weight"], wide["bias"]
        (mean, mean_off), (variance, variance_off) = wide["running_mean"], wide["running_var"]
        inverse, largest = (variance + EPS).rsqrt(), (variance - variance_off + EPS).clamp_min(EPS).rsqrt()
        y = (x - mean) * inverse * weight + bias
        gain = (weight.abs() + weight_off) * largest
        gain_off = weight_off * largest + weight.abs() * (largest - inverse)
        size = (x.abs() + error + mean.abs() + mean_off) * gain + bias.abs() + bias_off
        return y, (error + mean_off) * gain + (x - mean).abs() * gain_off + bias_off + (16 * sums + unit) * size

    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Mean and variance of what a train step normalises, float64."""
        bias = self.effective("stem", "bias")[0]
        y = APPLY[0][1](x.double(), self.effective("stem", "weight")[0], bias).movedim(1, 0).flatten(1)
        return {"running_mean": y.mean(1), "running_var": y.var(1)}

    def gradients(self, x: Tensor, target: Tensor, training: bool = False) -> dict[tuple[str, str, str], Tensor]:
        """Of the mean squared error, by (adapter, layer, tensor), for what acts; float64.

        `training`: normalised by the statistics of the batch.
        """
        leaves: dict[tuple[str, str, str], Tensor] = {}
        weights = {}
        for name in self.parameters():
            layer, kind = name.split(".")
            total = self.base[layer][kind].double()
            for adapter in (n for n in self.on(layer) if n in self.active):
                part = self.adapters[adapter][layer]
                if isinstance(part, Copies):
                    if kind in part.tensors:
                        leaf = leaves[adapter, layer, kind] = part.tensors[kind].double().requires_grad_()
                        total = total + self.active[adapter] * (leaf - self.base[layer][kind].double())
                    continue
                own = ["lora_A", "lora_B"] if kind == "weight" else ["lora_bias"] if "lora_bias" in part.tensors else []
                wide = {n: part.tensors[n].double().requires_grad_() for n in own}
                leaves |= {(adapter, layer, n): leaf for n, leaf in wide.items()}
                if kind == "weight":
                    change = LayerFactors(wide, part.scale).delta(layer).view_as(total)
                else:
                    change = wide.get("lora_bias", torch.zeros(()))
                total = total + self.active[adapter] * change
            weights[name] = total
        y = x.double()
        for layer, apply in APPLY:
            y = apply(y, weights[f"{layer}.weight"], weights.get(f"{layer}.bias"))
            if layer == "stem" and self.normed:
                mean, variance = (self.effective(NORM, kind)[0] for kind in STATISTICS[:2])
                y = F.batch_norm(y, mean, variance, weights["norm.weight"], weights["norm.bias"], training, 0.0, EPS)
            y = y if layer == "head" else torch.tanh(y)
        loss = (y - target.double()).pow(2).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Every entry that the model's state dict must have."""
        entries: dict[str, Tensor] = {}
        for layer in self.base:
            own: dict[str, Any] = dict(self.base[layer])
            for name in self.on(layer):
                part = self.adapters[name][layer]
                own |= {f"convlora.{name}.{n}": t for n, t in part.tensors.items()}
                if isinstance(part, LayerFactors):
                    own[f"convlora.{name}.lora_scale"] = torch.tensor(part.scale, dtype=torch.float32)
            for path in (layer, *filter(None, [ALIASES.get(layer)])):
                entries |= {f"{path}.{key}": value for key, value in own.items()}
        return entries
