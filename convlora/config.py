"""`AdapterConfig`: what to adapt and how big. Plain data, JSON both ways."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from torch import nn

from convlora.errors import ConvLoRAError
from convlora.support.jsontext import parse_json
from convlora.support.patterns import values_by_layer

Target: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"
Targets: TypeAlias = "Target | Sequence[Target]"
Strength: TypeAlias = "float | Mapping[str, float]"  # one for all layers, or by pattern

CHILD = "convlora"  # the child module's name, so `<layer>.convlora.<adapter>.lora_A` in a full checkpoint

SCALINGS = ("linear", "sqrt")
STATISTICS = ("adapter", "frozen", "base")
LARGEST = 1e18  # of an alpha or a strength: products stay within float32

_PATTERNS = ("targets", "exclude", "modules_to_save")

# An adapter's name becomes that of a submodule: it cannot be that of an attribute of the module that holds adapters.
_RESERVED = frozenset(dir(nn.Module())) | {
    "acting", "activate", "active", "by_rows", "choices", "copies", "effective", "entries", "entry",
    "freezes_statistics", "has_copies", "low_rank", "low_ranks", "merge", "merged", "names", "only_acting",
    "own_buffer", "restore", "sample_rows", "state", "strengths", "swap", "unmerge",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r"""What one adapter adapts, and how big it is.

    The update of a layer is `strength * scale * ΔW` with `scale = alpha / rank`
    (`rank_scaling="linear"`, Hu et al. 2021, arXiv 2106.09685, section 4.1) or
    `alpha / sqrt(rank)` (`"sqrt"`, rsLoRA, Kalajdzievski 2023, arXiv 2312.03732, eq. 5).

    Args:
        targets: which layers: a glob over dotted names (it also matches from any dot on), `re:<regex>`
            (full match), a module class, a callable `(name, module) -> bool`, or a list of these.
        rank: number of rank components per layer; 0 leaves every layer out that `ranks` does not name.
        alpha: numerator of the scale; `None` means the layer's rank, so a scale of 1 (linear).
        factors: name of the factorization: `"convlora"`, `"locon"`, `"dora"` (LoCon with a magnitude for each output
            channel; its update depends on the base weight), `"loha"`, `"lokr"`, `"dense"` (ΔW whole, of no rank), or a
            registered one.
        name: name of the adapter on the model.
        exclude: what `targets` must not select; same forms.
        ranks: `{pattern: rank}` per layer, the last matching pattern wins; 0 leaves the layer out, and may be said of
            a layer that `targets` do not select.
        alphas: `{pattern: alpha}` per layer, likewise.
        rank_scaling: `"linear"` or `"sqrt"`.
        init: how the factors start, with ΔW = 0; `"default"` is Kaiming-uniform A and zero B, where there are such.
        bias: also train a delta of the bias, in every selected layer that has one.
        rank_dropout: probability, in [0, 1), that training drops a rank component; the rest is scaled up.
        modules_to_save: modules, with all below them, that are trained in full: the adapter has its own copy of their
            Parameters and buffers. Same forms as `targets`, which leave them out; PEFT's name and meaning.
        norm_statistics: whose running statistics move in train mode, for every module that keeps some (BatchNorm and
            the like): `"adapter"`, a copy of its own, which starts as the base's; `"frozen"`, nobody's, and the module
            normalises with the base's in train mode, too; `"base"`, the base's own, as PyTorch does it.

    Raises:
        ConvLoRAError: a value is out of range or of the wrong type.

    Example:
        >>> config = AdapterConfig(targets=["body.*"], rank=2, alphas={"conv_last": 16})
        >>> AdapterConfig.from_json(config.to_json()) == config
        True
        >>> config.scale(rank=2, alpha=16)
        8.0
    """

    targets: Targets
    rank: int = 4
    alpha: float | None = None
    factors: str = "convlora"
    name: str = "default"
    exclude: Targets = ()
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    rank_scaling: str = "linear"
    init: str = "default"
    bias: bool = False
    rank_dropout: float = 0.0
    modules_to_save: Targets = ()
    norm_statistics: str = "adapter"

    def __post_init__(self) -> None:
        for field in _PATTERNS:
            object.__setattr__(self, field, _as_tuple(field, getattr(self, field)))
        if not self.targets:
            raise ConvLoRAError("AdapterConfig: targets is empty; name at least one layer or pattern")
        for field in ("factors", "name", "init", "rank_scaling", "norm_statistics"):
            _check_text(field, getattr(self, field))
        if not self.name or "." in self.name or self.name.startswith("_") or self.name in _RESERVED:
            _fail(
                "name",
                self.name,
                "a non-empty name without dots and leading underscore that is no attribute of a module",
            )
        if self.rank_scaling not in SCALINGS:
            _fail("rank_scaling", self.rank_scaling, f"one of {', '.join(SCALINGS)}")
        if self.norm_statistics not in STATISTICS:
            _fail("norm_statistics", self.norm_statistics, f"one of {', '.join(STATISTICS)}")
        if not isinstance(self.bias, int) or self.bias not in (True, False):
            _fail("bias", self.bias, "True or False")
        if not is_number(self.rank_dropout) or not 0 <= self.rank_dropout < 1:
            _fail("rank_dropout", self.rank_dropout, "a probability in [0, 1)")
        object.__setattr__(self, "rank", _rank("rank", self.rank))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", _alpha("alpha", self.alpha))
        for field, check in (("ranks", _rank), ("alphas", _alpha)):
            mapping = getattr(self, field)
            if mapping is None:
                continue
            if not isinstance(mapping, Mapping):
                _fail(field, mapping, "a mapping {pattern: value}")
            for pattern in mapping:
                _check_text(f"{field} pattern", pattern)
            checked = {pattern: check(f"{field}[{pattern!r}]", value) for pattern, value in mapping.items()}
            object.__setattr__(self, field, checked or None)

    def scale(self, rank: int, alpha: float) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` with `rank_scaling="sqrt"`.

        Example:
            >>> AdapterConfig(targets="*", rank_scaling="sqrt").scale(rank=4, alpha=8)
            4.0
        """
        return alpha / (rank if self.rank_scaling == "linear" else math.sqrt(rank))

    def replace(self, **changes: Any) -> AdapterConfig:
        """The same config with some fields changed, checked again.

        Example:
            >>> AdapterConfig(targets="*").replace(name="rain").name
            'rain'
        """
        return replace(self, **changes)

    def to_json(self) -> str:
        """Compact JSON without the fields that have their default value.

        Raises:
            ConvLoRAError: a target is a class or a callable (`inject` stores the names these select).

        Example:
            >>> AdapterConfig(targets="*", rank=2).to_json()
            '{"targets":["*"],"rank":2}'
        """
        for target in (target for field in _PATTERNS for target in getattr(self, field)):
            if not isinstance(target, str):
                raise ConvLoRAError(f"AdapterConfig: target {target!r} has no JSON form; use patterns (strings)")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {f.name for f in fields(self) if f.name == "targets" or values[f.name] != f.default}
        return json.dumps({key: value for key, value in values.items() if key in kept}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """The config that `to_json` wrote.

        Raises:
            ConvLoRAError: not a JSON object, an unknown field, or a value out of range.

        Example:
            >>> AdapterConfig.from_json('{"targets":["*"],"rank":2}').rank
            2
        """
        try:
            values = parse_json(text)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConvLoRAError(f"AdapterConfig: not JSON ({error})") from None
        if not isinstance(values, dict) or "targets" not in values:
            raise ConvLoRAError("AdapterConfig: not a JSON object with targets")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConvLoRAError(f"AdapterConfig: unknown fields {unknown}; written by a newer version?")
        return cls(**values)


def _as_tuple(field: str, value: Any) -> tuple[Target, ...]:
    items = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for item in items:
        module_class = isinstance(item, type) and issubclass(item, nn.Module)
        if isinstance(item, type | nn.Module) and not module_class:
            _fail(field, item, "made of strings, nn.Module subclasses or callables (name, module) -> bool")
        if not (isinstance(item, str) or callable(item)):
            _fail(field, item, "made of strings, nn.Module subclasses or callables (name, module) -> bool")
    return items


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds, also once multiplied with another such number."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and bool(-LARGEST <= value <= LARGEST)  # type: ignore[operator]


def strengths_by_layer(strength: Strength, paths: Iterable[str], operation: str, what: str) -> dict[str, float]:
    """Layer path -> strength: one for all, or `{pattern: strength}`, of which the last that matches wins; else 1.

    Raises:
        ConvLoRAError: no finite number, or a pattern that matches none of the paths.

    Example:
        >>> strengths_by_layer({"*": 0.5, "body.*": 0.0}, ["head", "body.0"], "activate", "strength")
        {'head': 0.5, 'body.0': 0.0}
    """
    check_strength(strength, operation, what)
    if not isinstance(strength, Mapping):
        return dict.fromkeys(paths, float(strength))
    floats = {pattern: float(value) for pattern, value in strength.items()}
    return values_by_layer(floats, 1.0, paths, operation, what)


def check_strength(strength: Any, operation: str, what: str) -> None:
    """Refuse what is no strength."""
    by_pattern = strength.items() if isinstance(strength, Mapping) else [("", strength)]
    for pattern, value in by_pattern:
        if not isinstance(pattern, str) or not is_number(value):
            where = f" for {pattern!r}" if isinstance(strength, Mapping) else ""
            must_be = f"a finite number up to {LARGEST:g}"
            raise ConvLoRAError(f"{operation}: {what}{where} (={value!r}) must be {must_be}, or {{pattern: number}}")


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        _fail(field, value, "a string")


def _rank(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        _fail(field, value, "an integer of at least 0")
    return int(value)


def _alpha(field: str, value: Any) -> float:
    if not is_number(value):
        _fail(field, value, f"a finite number of magnitude at most {LARGEST:g}")
    return value if isinstance(value, int) else float(value)


def _fail(field: str, value: Any, must_be: str) -> None:
    raise ConvLoRAError(f"AdapterConfig: {field} (={value!r}) must be {must_be}")
