"""Taps: features taken out of a model's forward while it runs, and only then."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import Target
from convlora.errors import ConvLoRAError
from convlora.layer.adapted import Adapted, slot_of
from convlora.layer.projection import projections_on
from convlora.model.traversal import unwrap_model
from convlora.support.patterns import nearest_names
from convlora.targets import describe_target, target_selects

_ELEMENT = re.compile(r"(.+)\[(-?\w+)\]", re.DOTALL)
_BEFORE = r"\1"


@dataclass(frozen=True)
class FeatureTap:
    """A module by its name, and the way into its output: `("block_1", (0,))` is the first of `block_1`'s tuple."""

    module: str
    path: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        return self.module + "".join(f"[{step}]" for step in self.path)


def find_taps(model: nn.Module, target: Target) -> list[FeatureTap]:
    """The taps that a target means, in model order.

    Modules nest, so a `*` stays within one part of a dotted name, unlike for `inject`: `"block_*"` is the blocks and
    not what is inside them. A pattern still matches from any dot on. A trailing `[0]`, `[-1]` or `[key]` takes an
    element of a tuple or mapping if what stands before it selects a module; otherwise it is part of the glob.

    Raises:
        ConvLoRAError: no module of that name.
    """
    names = dict(_modules(model))
    taps = _find(names, target)
    if not taps:
        clause = (
            f"; {nearest_names(_ELEMENT.sub(_BEFORE, target), filter(None, names))}" if isinstance(target, str) else ""
        )
        raise ConvLoRAError(
            f"distill: layer {describe_target(target)} selects no module of {type(model).__name__}{clause}"
        )
    return taps


def _find(names: Mapping[str, nn.Module], target: Target) -> list[FeatureTap]:
    if isinstance(target, str):
        if element := _ELEMENT.fullmatch(target):
            step = int(element[2]) if re.fullmatch(r"-?\d+", element[2]) else element[2]
            if outer := _find(names, element[1]):
                return [FeatureTap(tap.module, (*tap.path, step)) for tap in outer]
        if target in names:
            return [FeatureTap(target)]
        if not target.startswith("re:"):
            return [FeatureTap(name) for name in names if name and matches_parts(target, name)]
    return [
        FeatureTap(name) for name, module in names.items() if name and target_selects(target, name, module, "distill")
    ]


def matches_parts(pattern: str, name: str) -> bool:
    """Whether a glob selects a dotted name, part by part, from any dot on.

    Example:
        >>> matches_parts("block_*", "body.block_1"), matches_parts("block_*", "block_1.conv")
        (True, False)
    """
    parts, globs = name.split("."), pattern.split(".")
    tail = parts[-len(globs) :]
    return len(tail) == len(globs) and all(map(fnmatchcase, tail, globs))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by their first name, but for those that adapters have brought."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, Adapted):
            brought = (slot_of(module), *projections_on(module))
            inside |= {id(part) for inner in brought for part in inner.modules()}
        yield name, module


class FeatureTaker:
    """Runs a model and takes features on the way.

    Hooks are there during the call only. A feature is a copy, so that an in-place activation behind the layer does not
    change it.
    """

    def __init__(self, model: nn.Module, taps: Iterable[FeatureTap]) -> None:
        self.model = model
        self.taps = list(dict.fromkeys(taps))
        self._seen: list[list[Tensor | str]] = [[] for _ in self.taps]
        # A graph that was compiled without hooks never runs them. So for a compiled model a function of our own is
        # compiled in the same way: every graph of it is made while the hooks are there.
        inner = model._modules.get("_orig_mod")
        self._run: Callable[..., Any] = _runner(inner or model, self._seen)
        if inner is not None:
            self._run = model.dynamo_ctx(self._run)  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[FeatureTap, list[Tensor]]]:
        """The model's output, and per tap one feature for each time that the layer ran.

        Raises:
            ConvLoRAError: a layer did not run, or its output is no tensor.
        """
        root = unwrap_model(self.model, "distill")
        handles = []
        try:
            for tap, seen in zip(self.taps, self._seen, strict=True):
                hook = _hook(tap.path, seen, torch.is_grad_enabled())
                handles.append(root.get_submodule(tap.module).register_forward_hook(hook))
            output, found = self._run(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            for seen in self._seen:
                seen.clear()
        return output, {tap: _checked(tap, features) for tap, features in zip(self.taps, found, strict=True)}


def _runner(model: nn.Module, seen: list[list[Tensor | str]]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        output = model(*args, **kwargs)
        return output, [list(features) for features in seen]

    return run


def _hook(path: Sequence[int | str], seen: list[Tensor | str], wants_gradient: bool) -> Callable[..., None]:
    """A forward hook that keeps a copy, or the reason why it cannot (raising inside a compiled graph breaks it)."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        for step in path:
            if not _has(output, step):
                seen.append(f"its output, {_kind(output)}, has no element [{step}]")
                return
            output = output[step]
        if not isinstance(output, Tensor):
            seen.append(f"it returns {_kind(output)}; say which element")
        elif wants_gradient and not torch.is_grad_enabled():
            seen.append("it runs without gradients inside the model; checkpoint with use_reentrant=False")
        else:
            seen.append(output.clone())

    return keep


def _has(output: Any, step: int | str) -> bool:
    if isinstance(output, Mapping):
        return step in output
    # Not `tuple | list`, which PyTorch 2.8 cannot compile.
    return isinstance(output, (tuple, list)) and isinstance(step, int) and -len(output) <= step < len(output)


def _kind(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a mapping with the keys {list(output)}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def _checked(tap: FeatureTap, features: list[Tensor | str]) -> list[Tensor]:
    if not features:
        raise ConvLoRAError(
            f"distill: '{tap}' did not run in this forward; tap a layer that does (of a model compiled in parts or in "
            "place, tap before compiling or compile the whole by torch.compile)"
        )
    for feature in features:
        if isinstance(feature, str):
            raise ConvLoRAError(f"distill: '{tap}': {feature}")
    return features  # type: ignore[return-value]


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside the block, flag by flag, so that no method of the model's own is called."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
