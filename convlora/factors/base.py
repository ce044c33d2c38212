"""The factorizations: factor shapes for a weight, how factors start, how they form ΔW.

Everything else in the library is independent of the factorization: it asks a `Factorization`, found by name.
A factorization sees every weight as a convolution's, `(out, in/groups, *kernel)`; a `Linear` has no kernel
dimensions, and the other memory order of transposed convolutions is dealt with by `WeightSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from convlora.errors import ConvLoRAError

Shape = tuple[int, ...]

# The projections of attention, whose weights a module may hold itself, as `nn.MultiheadAttention` does: the layer
# `attn.in_proj` has the weight `attn.in_proj_weight`.
PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class WeightSpec:
    """The shape of a layer's weight and how to read it.

    Args:
        shape: as the layer stores it: `(out, in/groups, *kernel)`, transposed convolutions `(in, out/groups, *kernel)`.
        groups: channel groups.
        transposed: a transposed convolution.
        in_parent: the weight is a Parameter of the module above the layer, as those of `PROJECTIONS` are. It says
            where the weight is, so specs that differ in it alone are equal.

    Example:
        >>> spec = WeightSpec((8, 3, 5, 5), groups=2, transposed=True)  # ConvTranspose2d(8, 6, 5, groups=2)
        >>> spec.out_channels, spec.in_channels, spec.kernel
        (6, 8, (5, 5))
    """

    shape: Shape
    groups: int = 1
    transposed: bool = False
    in_parent: bool = field(default=False, compare=False, repr=False)

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
        # "(g o) i ... -> (g i) o ...", without einops: a layer's every forward comes here
        out, inner = self.out_channels // self.groups, self.in_channels // self.groups
        grouped = delta.view(self.groups, out, inner, *self.kernel)
        return grouped.transpose(1, 2).reshape(self.shape)

    def to_convolution(self, stored: Tensor) -> Tensor:
        """A weight, or an update, as the layer stores it in convolution order: the inverse of `from_convolution`."""
        if not self.transposed:
            return stored
        # "(g i) o ... -> (g o) i ...": a view where there are no groups
        first, second = self.in_channels // self.groups, self.out_channels // self.groups
        grouped = stored.reshape(self.groups, first, second, *self.kernel)
        return grouped.transpose(1, 2).reshape(self.out_channels, first, *self.kernel)


@runtime_checkable
class Factorization(Protocol):
    """A way to write ΔW with few numbers. Stateless; register an instance or a class with `register_factors`.

    What a class may say beside the methods; all are False where it does not:

    - `needs_weight = True`: the update depends on the base weight W; see `SeesWeight` for the arguments it gets.
    - `forms_again = True`: `delta` makes tensors as large as W that backward needs; it then forms them again.
    - `free_rank = True`: `rank` counts no components of ΔW that could be cut or added one by one, so that ranks cannot
      be allocated, nor an adapter resized.

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


class SeesWeight(Protocol):
    """A factorization whose update depends on the base weight: `needs_weight = True`, and two methods get W.

    `weight` is `(out, in/groups, *kernel)`, in the dtype of the layer. A strength multiplies what `delta` gives.
    """

    inits: tuple[str, ...]
    needs_weight: bool

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, Shape]:
        """As in `Factorization`."""

    def init_(self, factors: Mapping[str, Tensor], method: str, weight: Tensor) -> None:
        """Fill the factors in place so that the change of `weight` is 0. `method` is one of `inits`."""

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec, weight: Tensor, scale: float | Tensor) -> Tensor:
        """The whole change of `weight`, with the scale inside, with its elements in their order."""

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """As in `Factorization`."""


AnyFactorization = Factorization | SeesWeight


def needs_weight(factorization: Factorization) -> bool:
    """Whether the update depends on the base weight: see `SeesWeight`."""
    return bool(getattr(factorization, "needs_weight", False))


def start_factors(
    factorization: Factorization, factors: Mapping[str, Tensor], method: str, spec: WeightSpec, weight: Tensor | None
) -> None:
    """Fill factors in place so that they change nothing; `weight`, as the layer stores it, where they depend on it."""
    if not needs_weight(factorization):
        return factorization.init_(factors, method)
    assert weight is not None
    return cast("SeesWeight", factorization).init_(factors, method, spec.to_convolution(weight))


def gains_of(scale: float, strength: float, sees_weight: bool) -> tuple[float, float]:
    """What multiplies an update, and what does inside of it: the scale of one that depends on the base weight.

    Example:
        >>> gains_of(2.0, 0.5, sees_weight=False), gains_of(2.0, 0.5, sees_weight=True)
        ((1.0, 1.0), (0.5, 2.0))
    """
    return (strength, scale) if sees_weight else (strength * scale, 1.0)


def update_of(
    factorization: Factorization,
    factors: Mapping[str, Tensor],
    spec: WeightSpec,
    inside: float | Tensor = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """ΔW, or the whole change of `weight` with the scale `inside`; in the order of the layer's weight."""
    if not needs_weight(factorization):
        return spec.from_convolution(factorization.delta(factors, spec))
    assert weight is not None
    change = cast("SeesWeight", factorization).delta(factors, spec, spec.to_convolution(weight), inside)
    return spec.from_convolution(change)


_REGISTRY: dict[str, Factorization] = {}  # the shipped ones are registered by the package
_GROWING: dict[str, frozenset[str]] = {}  # of each, the factors that start at zero beside others that do not

# A factor's tensor becomes a parameter of the module that holds the factors: these names it has already.
_RESERVED = frozenset(dir(nn.Module())) | {
    "alpha", "config", "configure", "copy_", "drops", "factorization", "factors", "follow", "in_float64", "is_at_start",
    "lora_bias", "lora_scale", "needs_weight", "rank", "reset_parameters", "scale", "set_strength", "spec", "strength",
    "tensor_names", "updates", "was_loaded",
}  # fmt: skip


def register_factors(name: str, factorization: AnyFactorization | type[AnyFactorization]) -> None:
    """Make a factorization available as `factors=name`. See `Factorization`, or `SeesWeight`, for what it needs.

    Raises:
        ConvLoRAError: the name is taken, or a trial on a small weight fails; nothing is registered then.

    Example:
        >>> from convlora.factors.locon import LoConFactors
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
        growing = _try_out(name, candidate)
    except ConvLoRAError:
        raise
    except Exception as error:
        raise ConvLoRAError(f"register_factors: {name!r} fails on a small weight ({error!r})") from error
    _REGISTRY[name], _GROWING[name] = candidate, growing


def _try_out(name: str, candidate: Factorization) -> frozenset[str]:
    """Check a factorization on a small weight; gives the factors that start at zero beside others that do not."""
    trials = (WeightSpec((4, 2, 3, 3), groups=2), 2), (WeightSpec((16, 16)), 1)
    shapes = [tensor for trial in trials for tensor in candidate.shapes(*trial)]
    if not shapes or any("." in tensor or tensor.startswith("_") or tensor in _RESERVED for tensor in shapes):
        raise ConvLoRAError(f"register_factors: {name!r} has unusable tensor names {sorted({*shapes})}")
    if "default" not in candidate.inits:
        raise ConvLoRAError(f"register_factors: {name!r} needs an init named 'default', it has {candidate.inits!r}")
    growing: set[str] = set()
    for spec, rank in trials:
        factors = {tensor: torch.full(shape, torch.nan) for tensor, shape in candidate.shapes(spec, rank).items()}
        weight = torch.linspace(-1, 1, math.prod(spec.shape)).view(spec.shape)
        start_factors(candidate, factors, "default", spec, weight)
        zero = {tensor for tensor, values in factors.items() if not values.any()}
        delta = update_of(candidate, candidate.drop(factors, torch.ones(rank)), spec, 1.0, weight)
        if delta.numel() != math.prod(spec.shape) or bool(delta.ne(0).any()):
            size = math.prod(spec.shape)
            raise ConvLoRAError(f"register_factors: {name!r} does not start at ΔW = 0 of {size} elements")
        growing |= zero if len(zero) < len(factors) else set()
    return frozenset(growing)


def growing_factors(name: str) -> frozenset[str]:
    """The factors of a factorization that start at zero beside others that do not: B, in ΔW = B A.

    Example:
        >>> growing_factors("locon")
        frozenset({'lora_B'})
    """
    get_factors(name)
    return _GROWING[name]


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
