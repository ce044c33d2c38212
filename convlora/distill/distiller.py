"""`Distiller`: a student and a teacher run on one input, and the losses between their features."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convlora.config import Target, is_number
from convlora.distill.losses import Loss, get_loss
from convlora.distill.taps import FeatureTaker, FeatureTap, find_taps, in_eval_mode, matches_parts
from convlora.errors import ConvLoRAError
from convlora.model.switch import disabled
from convlora.model.traversal import adapters, unwrap_model
from convlora.support.patterns import nearest_names

Layers: TypeAlias = "Target | Sequence[Target] | Mapping[str, str]"
V = TypeVar("V")
W = TypeVar("W")
Project: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distilled:
    """What one call of a `Distiller` gives.

    Attributes:
        student: the student's output, as its forward returns it.
        teacher: the teacher's output, without gradient.
        loss: the weighted sum of `terms`, a scalar; 0 where no layer is distilled.
        terms: student layer -> its loss before weighting, a scalar.
    """

    student: Any
    teacher: Any
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Distiller:
    """Distil a teacher's features into a student.

    `out.loss = Σ_layer weight · loss(student feature, teacher feature)`. Without `teacher` the student with its
    adapters off, the frozen base, teaches: no second copy of the weights. The teacher runs first, without gradient and
    in eval mode, whatever its state, which comes back afterwards: BatchNorm statistics, dropout and the random numbers
    that the student draws are untouched. Hooks are in the models during the call only.

    The student may be compiled, wrapped in DDP or run under autocast; `student(x)` alone stays what it is.

    Args:
        student: the model that learns.
        layers: the layers to compare. Patterns, module classes or callables as for `inject`, but over all modules, the
            same names in the teacher; or `{student layer: teacher layer}`. `"block_1[0]"` is an element of a tuple
            output, `"backbone[feat]"` of a mapping. Empty: none, only the outputs.
        teacher: another model, or None for the student's own frozen base.
        loss: `"spatial_affinity"`, `"channel_affinity"`, `"instance_affinity"`, `"attention"`, `"l1"`, `"mse"`, a name
            given to `register_loss`, or any callable `(student feature, teacher feature) -> scalar`.
        weights: one weight, or `{pattern over student layers: weight}`: the last match wins, the others have 1.
        project: `{student layer: module or callable}`, applied to the student's feature first, for shapes that do not
            fit. Its parameters are the caller's to train.
        check_finite: raise at a loss that is not finite. On a GPU this waits for the result.

    Raises:
        ConvLoRAError: a layer that does not exist, or a student that has no adapters and no other teacher.

    Source: DSCLoRA (arXiv 2504.11271), section 3.3: L = λ1·L1(HR) + λ2·L1(teacher) + λ3·affinity.

    Example:
        >>> import convlora
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        >>> distiller = Distiller(convlora.inject(model, "*", rank=1), layers=["0"])
        >>> x, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        >>> out = distiller(x)
        >>> loss = (out.student - target).abs().mean() + (out.student - out.teacher).abs().mean() + out.loss
        >>> loss.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        layers: Layers,
        *,
        teacher: nn.Module | None = None,
        loss: str | Loss = "spatial_affinity",
        weights: float | Mapping[str, float] = 1.0,
        project: Mapping[str, Project] | None = None,
        check_finite: bool = True,
    ) -> None:
        root = unwrap_model(student, "distill")
        if teacher is None and not adapters(root):
            raise ConvLoRAError("distill: the student has no adapters to switch off; inject first, or give a teacher")
        if teacher is not None and unwrap_model(teacher, "distill") is root:
            raise ConvLoRAError("distill: the teacher is the student; leave it out to learn from the frozen base")
        self.student, self.teacher = student, teacher
        self.loss = get_loss(loss)
        self.check_finite = check_finite
        self.pairs = _pairs(root, root if teacher is None else unwrap_model(teacher, "distill"), layers)
        per_pattern = weights if isinstance(weights, Mapping) else {tap.module: weights for tap in self.pairs}
        self.weights = dict.fromkeys(self.pairs, 1.0) | _by_pattern(per_pattern, self.pairs, "weights", _weight)
        self.project = _by_pattern(project or {}, self.pairs, "project", _projection)
        self._take_student = FeatureTaker(student, self.pairs)
        self._take_teacher = FeatureTaker(_without_ddp(student) if teacher is None else teacher, self.pairs.values())

    def __call__(self, x: Any, teacher_input: Any = None) -> Distilled:
        """Run both models; see `Distilled`.

        Args:
            x: the student's input. A tuple is spread over the arguments of its forward, a dict over its keywords.
            teacher_input: the teacher's, of the same form, for instance the clean image of a degraded `x`; else `x`.

        Raises:
            ConvLoRAError: a layer that did not run or gives no tensor, features that the loss cannot compare, or a loss
                that is not a finite scalar. No hook is left then, and the modes and adapters are as before.
        """
        taught, teacher_features = self._teach(x if teacher_input is None else teacher_input)
        output, features = _spread(self._take_student, x)
        terms = {tap: self._term(tap, features[tap], teacher_features[other]) for tap, other in self.pairs.items()}
        loss = sum((self.weights[tap] * term for tap, term in terms.items()), start=torch.zeros(()))
        if self.check_finite and not math.isfinite(value := loss.item()):
            bad = [f"'{tap}' ({term.item()})" for tap, term in terms.items() if not math.isfinite(term.item())]
            raise ConvLoRAError(f"distill: the loss is {value}; not finite: {', '.join(bad) or 'the weighted sum'}")
        return Distilled(output, taught, loss, {str(tap): term for tap, term in terms.items()})

    def __repr__(self) -> str:
        pairs = (str(s) if str(s) == str(t) else f"{s} <- {t}" for s, t in self.pairs.items())
        by = "its frozen base" if self.teacher is None else type(unwrap_model(self.teacher, "distill")).__name__
        name = getattr(self.loss, "__name__", repr(self.loss))
        return (
            f"Distiller({type(unwrap_model(self.student, 'distill')).__name__} by {by}, {name} of {', '.join(pairs)})"
        )

    def _teach(self, x: Any) -> tuple[Any, dict[FeatureTap, list[Tensor]]]:
        model = self.student if self.teacher is None else self.teacher
        root = unwrap_model(model, "distill")
        # A network that scales its input in place must not do so to the student's.
        x = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
        off = disabled(root) if self.teacher is None else contextlib.nullcontext()
        with torch.no_grad(), in_eval_mode(root), off, _same_random_numbers(root):
            return _spread(self._take_teacher, x)

    def _term(self, tap: FeatureTap, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The mean over the times that the layer ran."""
        name, other = str(tap), str(self.pairs[tap])
        if len(student) != len(teacher):
            raise ConvLoRAError(
                f"distill: '{name}' ran {len(student)} times, '{other}' of the teacher {len(teacher)} times"
            )
        project = self.project.get(tap)
        values = []
        for s, t in zip(student, teacher, strict=True):
            try:
                s = s if project is None else project(s)
                value = self.loss(s, t)
            except ConvLoRAError as error:
                raise ConvLoRAError(f"distill: '{name}' <- '{other}': {error}") from None
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                shapes = f"{tuple(s.shape)} and {tuple(t.shape)}"
                raise ConvLoRAError(f"distill: '{name}' <- '{other}': the loss fails on {shapes}: {error}") from error
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConvLoRAError(f"distill: '{name}': the loss must be a scalar tensor, got {got}")
            values.append(value.reshape(()))
        return values[0] if len(values) == 1 else torch.stack(values).mean()


def _spread(take: FeatureTaker, x: Any) -> tuple[Any, dict[FeatureTap, list[Tensor]]]:
    if isinstance(x, Mapping):
        return take(**x)
    return take(*x) if isinstance(x, tuple) else take(x)


def _without_ddp(model: nn.Module) -> nn.Module:
    """The model itself if it is bare or compiled, else what DDP wraps: a pass without gradients is not its business."""
    bare = unwrap_model(model, "distill")
    return model if model is bare or model._modules.get("_orig_mod") is bare else bare


@contextlib.contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside the block, the numbers drawn after it are those that would have come."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng([d.index for d in devices if d.index is not None], device_type=kind):
        yield


def _pairs(student: nn.Module, teacher: nn.Module, layers: Layers) -> dict[FeatureTap, FeatureTap]:
    """Student tap -> teacher tap, in the order of the student's modules."""
    if isinstance(layers, Mapping):
        return {_only(student, "student", s): _only(teacher, "teacher", t) for s, t in layers.items()}
    targets = [layers] if isinstance(layers, str | type) or callable(layers) else list(layers)
    found = {tap for target in targets for tap in find_taps(student, target)}
    order = {name: place for place, (name, _) in enumerate(student.named_modules())}
    taps = sorted(found, key=lambda tap: (order[tap.module], str(tap)))
    if teacher is not student:
        known = dict(teacher.named_modules())
        for tap in taps:
            if tap.module not in known:
                _only(teacher, "teacher", tap.module)
    return {tap: tap for tap in taps}


def _only(model: nn.Module, whose: str, target: str) -> FeatureTap:
    if not isinstance(target, str):
        raise ConvLoRAError(f"distill: {{student layer: teacher layer}} takes names, got {target!r}")
    try:
        taps = find_taps(model, target)
    except ConvLoRAError as error:
        raise ConvLoRAError(f"{error} (the {whose})") from None
    if len(taps) > 1:
        names = ", ".join(map(str, taps[:3]))
        raise ConvLoRAError(f"distill: '{target}' is {len(taps)} layers of the {whose} ({names} ...); name one")
    return taps[0]


def _by_pattern(
    values: Mapping[str, V], taps: Iterable[FeatureTap], field: str, checked: Callable[[str, V], W]
) -> dict[FeatureTap, W]:
    """Student tap -> value by `{pattern: value}`, the last matching pattern wins."""
    taps = list(taps)
    found: dict[FeatureTap, W] = {}
    for pattern, value in values.items():
        hits = [tap for tap in taps if pattern in (str(tap), tap.module)] or [
            tap for tap in taps if matches_parts(pattern, tap.module)
        ]
        if not hits:
            close = nearest_names(pattern, map(str, taps))
            raise ConvLoRAError(f"distill: {field} pattern '{pattern}' matches none of the student's layers; {close}")
        found |= dict.fromkeys(hits, checked(f"distill: {field} of '{pattern}'", value))
    return found


def _weight(what: str, value: Any) -> float:
    if not is_number(value):
        raise ConvLoRAError(f"{what} (={value!r}) must be a finite number")
    return float(value)


def _projection(what: str, value: Any) -> Project:
    if not callable(value):
        raise ConvLoRAError(f"{what} must be callable, got {type(value).__name__}")
    return value  # type: ignore[no-any-return]
