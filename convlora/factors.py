"""The factorizations: factor shapes for a weight, how factors start, how they form ΔW.

Everything else in the library is independent of the factorization: it asks a `Factorization`, found by name.
A factorization sees every weight as a convolution's, `(out, in/groups, *kernel)`; a `Linear` has no kernel
dimensions, and the other memory order of transposed convolutions is dealt with by `WeightSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from convlora.errors import ConvLoRAError
from convlora.truncate import SVD, Choose, Fit, svd, svd_of_product, truncate

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightSpec:
    """The shape of a layer's weight and how to read it.

    Args:
        shape: as the layer stores it: `(out, in/groups, *kernel)`, transposed convolutions `(in, out/groups, *kernel)`.
        groups: channel groups.
        transposed: a transposed convolution.

    Example:
        >>> spec = WeightSpec((8, 3, 5, 5), groups=2, transposed=True)  # ConvTranspose2d(8, 6, 5, groups=2)
        >>> spec.out_channels, spec.in_channels, spec.kernel
        (6, 8, (5, 5))
    """

    shape: Shape
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        sizes = (*self.shape, self.groups)
        known = 2 <= len(self.shape) <= 5 and all(type(n) is int and 0 < n < 2**31 for n in sizes)
        if not known or self.shape[0] % self.groups:
            raise ConvLoRAError(f"WeightSpec: no weight has shape {self.shape} with groups={self.groups}")

    @property
    def out_channels(self) -> int:
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def in_channels(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def kernel(self) -> Shape:
        return self.shape[2:]

    def from_convolution(self, delta: Tensor) -> Tensor:
        """An update in convolution order, `(out, in/groups, *kernel)`, in the order of the layer's weight."""
        if not self.transposed:
            return delta.view(self.shape)
        out, inner = self.out_channels // self.groups, self.in_channels // self.groups
        grouped = delta.view(self.groups, out, inner, *self.kernel)
        return grouped.transpose(1, 2).reshape(self.shape)

    def to_convolution(self, delta: Tensor) -> Tensor:
        """An update in the order of the layer's weight in convolution order: the inverse of `from_convolution`."""
        if not self.transposed:
            return delta
        out, inner = self.out_channels // self.groups, self.in_channels // self.groups
        grouped = delta.reshape(self.groups, inner, out, *self.kernel)
        return grouped.transpose(1, 2).reshape(self.out_channels, inner, *self.kernel)


@runtime_checkable
class Factorization(Protocol):
    """A way to write ΔW with few numbers. Stateless; register an instance or a class with `register_factors`.

    Example:
        >>> import torch, convlora
        >>> class Diagonal:                       # one gain per output channel and input channel: rank one
        ...     inits = ("default",)
        ...     def shapes(self, spec, rank):
        ...         return {"gain": (spec.shape[0], rank), "mix": (rank, math.prod(spec.shape[1:]))}
        ...     def init_(self, factors, method):
        ...         torch.nn.init.normal_(factors["mix"]); torch.nn.init.zeros_(factors["gain"])
        ...     def delta(self, factors, spec):
        ...         return factors["gain"] @ factors["mix"]
        ...     def drop(self, factors, keep):
        ...         return {**factors, "gain": factors["gain"] * keep}
        >>> register_factors("doc-diagonal", Diagonal)
        >>> _ = convlora.inject(torch.nn.Conv2d(3, 8, 3), targets="*", rank=1, factors="doc-diagonal")
    """

    inits: tuple[str, ...]

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        """Tensor name -> shape. The names are the tensor names in files."""

    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        """Fill the factors in place so that ΔW = 0. `method` is one of `inits`."""

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        """ΔW, unscaled, with the elements of `(out, in/groups, *kernel)` in that order."""

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """The factors with rank component i multiplied by `keep[i]`; `keep` is `(rank,)`."""


class _TwoFactors:
    """A starts random, B zero; ΔW is the matrix product `B @ A`, in an order of its own."""

    inits: tuple[str, ...] = ("default", "gaussian")

    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        a = factors["lora_A"]
        if method == "gaussian":  # as in PEFT: standard deviation 1/rank
            nn.init.normal_(a, std=1 / max(a.shape[0], 1))
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(factors["lora_B"])

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        b = factors["lora_B"]
        per_component = keep.repeat_interleave(b.shape[1] // keep.shape[0])
        return {**factors, "lora_B": b * per_component.view(1, -1, *[1] * (b.dim() - 2))}

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts], dim) for dim, name in enumerate(("lora_A", "lora_B"))}

    def fit(self, delta: Tensor, spec: WeightSpec, choose: Choose) -> Fit:
        rows = self.shapes(spec, 1)["lora_B"][0]
        return self._fit(svd(delta.reshape(rows, -1)), spec, choose)

    def shrink(self, factors: Mapping[str, Tensor], spec: WeightSpec, choose: Choose) -> Fit:
        return self._fit(svd_of_product(factors["lora_B"].flatten(1), factors["lora_A"].flatten(1)), spec, choose)

    def _fit(self, decomposed: SVD, spec: WeightSpec, choose: Choose) -> Fit:
        left, right, rank, error = truncate(decomposed, self.shapes(spec, 1)["lora_A"][0], choose)
        shapes = self.shapes(spec, rank)
        return Fit({"lora_A": right.reshape(shapes["lora_A"]), "lora_B": left.reshape(shapes["lora_B"])}, rank, error)

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        raise NotImplementedError


class ConvLoRAFactors(_TwoFactors):
    """The factorization of ConvLoRA (Aleem et al. 2024, arXiv 2402.04964) and of microsoft/LoRA's `ConvLoRA`.

    `ΔW = (B @ A).view(W.shape)` with A `(r·k, in·k)` and B `(out//groups·k, r·k)` for a k×k kernel.
    For other kernels the first half of the kernel dimensions (rounded down) goes to the rows, the rest to the
    columns: with `k_row` and `k_col` their sizes, A is `(r·m, in·k_col)`, B is `(out//groups·k_row, r·m)`,
    `m = min(k_row, k_col)`. So kh×kw kernels have `k_row = kh`, `k_col = kw`; 1d kernels 1 and k; k×k×k kernels
    k and k². `Linear` and 1×1 convolutions are plain LoRA, A `(r, in)` and B `(out//groups, r)`.

    Example:
        >>> ConvLoRAFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)
        {'lora_A': (12, 48), 'lora_B': (144, 12)}
    """

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        half = len(spec.kernel) // 2
        k_row, k_col = math.prod(spec.kernel[:half]), math.prod(spec.kernel[half:])
        inner = rank * min(k_row, k_col)
        return {
            "lora_A": (inner, spec.in_channels * k_col),
            "lora_B": (spec.out_channels // spec.groups * k_row, inner),
        }

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        return factors["lora_B"] @ factors["lora_A"]

    def chain(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor] | None:
        if math.prod(spec.kernel) > 1 or spec.groups > 1 or spec.transposed:
            return None
        return _with_kernel(factors, spec)


class LoConFactors(_TwoFactors):
    """The factorization of PEFT and LyCORIS (LoCon): a thin convolution, then a 1×1 convolution.

    `ΔW[o] = Σ_r B[o, r] · A[r]` with A `(r, in/groups, *kernel)` and B `(out, r, 1…)`.
    `Linear` and 1×1 convolutions are plain LoRA, A `(r, in/groups)` and B `(out, r)`.

    Example:
        >>> LoConFactors().shapes(WeightSpec((48, 16, 3, 3)), rank=4)
        {'lora_A': (4, 16, 3, 3), 'lora_B': (48, 4, 1, 1)}
    """

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        kernel = spec.kernel if math.prod(spec.kernel) > 1 else ()
        return {
            "lora_A": (rank, spec.in_channels // spec.groups, *kernel),
            "lora_B": (spec.out_channels, rank, *[1] * len(kernel)),
        }

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        return factors["lora_B"].flatten(1) @ factors["lora_A"].flatten(1)

    def chain(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor] | None:
        if spec.groups > 1 or spec.transposed:
            return None
        return _with_kernel(factors, spec)


def _with_kernel(factors: Mapping[str, Tensor], spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """The factors as weights of layers of the spec's kind; those of pointwise convolutions have no kernel."""
    a, b = factors["lora_A"], factors["lora_B"]
    ones = [1] * (len(spec.kernel) + 2 - a.dim())
    return a.view(*a.shape, *ones), b.view(*b.shape, *ones)


_REGISTRY: dict[str, Factorization] = {"convlora": ConvLoRAFactors(), "locon": LoConFactors()}

# A factor's tensor becomes a parameter of the module that holds the factors: these names it has already.
_RESERVED = frozenset(dir(nn.Module())) | {
    "alpha", "config", "configure", "copy_", "factorization", "factors", "in_float64", "lora_bias", "rank",
    "reset_parameters", "scale", "set_strength", "spec", "strength",
}  # fmt: skip


def register_factors(name: str, factorization: Factorization | type[Factorization]) -> None:
    """Make a factorization available as `factors=name`. See `Factorization` for what it needs.

    Raises:
        ConvLoRAError: the name is taken, or a trial on a small weight fails; nothing is registered then.

    Example:
        >>> register_factors("doc-locon-too", LoConFactors)
        >>> "doc-locon-too" in known_factors()
        True
    """
    if not isinstance(name, str) or not name:
        raise ConvLoRAError(f"register_factors: name (={name!r}) must be a non-empty string")
    if name in _REGISTRY:
        raise ConvLoRAError(f"register_factors: {name!r} is taken; choose another name")
    try:
        candidate = factorization() if isinstance(factorization, type) else factorization
        if not isinstance(candidate, Factorization):
            raise ConvLoRAError(f"register_factors: {name!r} needs inits, shapes, init_, delta and drop")
        _try_out(name, candidate)
    except ConvLoRAError:
        raise
    except Exception as error:
        raise ConvLoRAError(f"register_factors: {name!r} fails on a small weight ({error!r})") from error
    _REGISTRY[name] = candidate


def _try_out(name: str, candidate: Factorization) -> None:
    spec = WeightSpec((4, 2, 3, 3), groups=2)
    shapes = candidate.shapes(spec, 2)
    if not shapes or any("." in tensor or tensor.startswith("_") or tensor in _RESERVED for tensor in shapes):
        raise ConvLoRAError(f"register_factors: {name!r} has unusable tensor names {sorted(shapes)}")
    if "default" not in candidate.inits:
        raise ConvLoRAError(f"register_factors: {name!r} needs an init named 'default', it has {candidate.inits!r}")
    factors = {tensor: torch.full(shape, torch.nan) for tensor, shape in shapes.items()}
    candidate.init_(factors, "default")
    delta = candidate.delta(candidate.drop(factors, torch.ones(2)), spec)
    if delta.numel() != math.prod(spec.shape) or bool(delta.ne(0).any()):
        raise ConvLoRAError(f"register_factors: {name!r} does not start at ΔW = 0 of {math.prod(spec.shape)} elements")


def known_factors() -> list[str]:
    """The names that `factors=` takes."""
    return sorted(_REGISTRY)


def get_factors(name: str) -> Factorization:
    """The factorization registered under a name."""
    try:
        return _REGISTRY[name]
    except KeyError:
        known = ", ".join(known_factors())
        raise ConvLoRAError(f"factors: {name!r} is not registered; known: {known}") from None
