"""Which adapters act, and whether as one fused weight: activate, disabled, per_sample, merge, unmerge, merged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from convlora.adapter.parts import tensor_key
from convlora.config import Strength, check_strength, strengths_by_layer
from convlora.errors import ConvLoRAError
from convlora.factors.fuse import is_finite
from convlora.layer.adapted import effective_names, effective_tensor, slot_of
from convlora.layer.context import COMPILED, Choice, SampleRows, choosing, choosing_each
from convlora.layer.copies import own_tensors
from convlora.layer.slot import Slot
from convlora.model.traversal import (
    adapted_modules,
    adapter_slots,
    is_compiled,
    model_and_slots,
    refuse_sharded,
    refuse_stacked,
    require_adapters,
)

M = TypeVar("M", bound=nn.Module)
Names = str | Iterable[str] | Mapping[str, Strength]


def activate(model: M, names: Names) -> M:
    """Say which adapters act: a name, a list, or `{name: strength}`; `[]` switches all off.

    Strengths add up: ΔW = Σ strength·scale·ΔWᵢ. One may be `{pattern: strength}` by layer, with patterns as targets
    have them: the last that matches wins, and layers that none matches have strength 1. A merged model stays merged,
    with the new weights. It changes the model for everybody: nobody may be running it meanwhile; `using` is for one
    caller alone.

    Raises:
        ConvLoRAError: no such adapter, a strength that is no finite number, or a pattern that matches no layer of its
            adapter. Nothing is changed then.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1, name="rain")
        >>> _ = activate(model, {"rain": 0.5})
        >>> _ = activate(model, {"rain": {"*": 1.0, "0": 0.4}})
    """
    strengths = _strengths(names, "activate")
    root, found = model_and_slots(model, "activate", strengths)
    by_slot = _by_slot(root, found, strengths, "activate")
    for slot, own in by_slot.items():
        slot.activate(own)
    return model


@contextlib.contextmanager
def disabled(model: M) -> Iterator[M]:
    """Switch all adapters off inside the block; the former state comes back, also after an exception.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> with disabled(model):
        ...     model[0].weight is dict(model.named_parameters())["0.weight"]
        True
    """
    with _restored(require_adapters(model, "disabled")):
        activate(model, [])
        yield model


@contextlib.contextmanager
def using(model: M, names: Names) -> Iterator[M]:
    """Inside the block the caller computes with these adapters: this thread or asyncio task alone.

    `names` as for `activate`; `[]` is the base. What others do to the model meanwhile, or compute with it in blocks of
    their own, is not seen inside: several threads can serve requests for several adapters with one model. Blocks nest.
    A merged model computes live inside. What the block itself starts (tasks, `asyncio.to_thread`) inherits it; other
    threads, those in which autograd runs a backward on a GPU included, do not: gradient checkpointing, which runs the
    forward again there, needs `activate`.

    Raises:
        ConvLoRAError: no such adapter, or a strength that is no finite number; a compiled model, whose graph has the
            adapters that `activate` says.

    Example:
        >>> import convlora, torch
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1, name="rain")
        >>> with using(model, {"rain": 0.5}):
        ...     y = model(torch.ones(1, 3, 8, 8))
    """
    strengths = _strengths(names, "using")
    root, found = model_and_slots(model, "using", strengths)
    if is_compiled(model) or any(map(is_compiled, root.modules())):
        raise ConvLoRAError(COMPILED)
    by_slot = _by_slot(root, found, strengths, "using")
    with choosing_each({slot: Choice(own) for slot, own in by_slot.items()}):
        yield model


@contextlib.contextmanager
def per_sample(model: M, names: Sequence[str | None], *, folded: bool = False) -> Iterator[M]:
    """Inside the block, sample i of every batch has the adapter `names[i]`, or none (None).

    One forward serves requests for several adapters, each with its own fused weight. The samples are the rows of the
    first dimension of each adapted layer's input; networks that fold windows or frames into it, the rows of a sample
    next to each other (SwinIR), need `folded=True`. Each named adapter acts at strength 1, active or not; what
    `activate` has set comes back after the block. Like `using`, it is for the calling thread or asyncio task alone.

    Raises:
        ConvLoRAError: no names, no such adapter, or a merged model; in a forward, a layer input without a row for each
            sample, or a weight that is read by other code than its layer's own forward.

    Example:
        >>> import convlora, torch
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1, name="rain")
        >>> with per_sample(model, ["rain", None, "rain"]):
        ...     y = model(torch.ones(3, 3, 8, 8))
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConvLoRAError(
            f"per_sample: expected a list with an adapter's name or None for each sample, got {names!r}"
        )
    named = _strengths([name for name in names if name is not None], "per_sample")
    root, found = model_and_slots(model, "per_sample", named)
    if any(slot.merged for slot in found):
        raise ConvLoRAError("per_sample: the model is merged, one weight for all samples; unmerge first")
    if moved := sorted(name for name in named if any(_has_moved(m, name) for m in adapted_modules(root).values())):
        raise ConvLoRAError(f"per_sample: {moved} have whole modules of their own; give each its own call, in `using`")
    with choosing(found, Choice({}, SampleRows(names, folded))):
        yield model


def _has_moved(module: nn.Module, name: str) -> bool:
    """Whether an adapter's copies of a module's tensors differ from the base's."""
    copies = slot_of(module).copies().get(name)
    return copies is not None and not copies.equal(own_tensors(module))


def _by_slot(
    root: nn.Module, found: Sequence[Slot], strengths: Mapping[str, Strength], operation: str
) -> dict[Slot, dict[str, float]]:
    """The strengths of each slot, by adapter.

    Raises:
        ConvLoRAError: a pattern matches no layer of its adapter, or tensors of different shapes would be mixed.
    """
    same = {name: float(s) for name, s in strengths.items() if not isinstance(s, Mapping)}
    by_slot = dict.fromkeys(found, same)
    if len(same) < len(strengths):
        slots = {path: slot_of(module) for path, module in adapted_modules(root).items()}
        by_slot = {slot: {} for slot in found}
        for name, strength in strengths.items():
            paths = [path for path, slot in slots.items() if name in slot.names()]
            for path, each in strengths_by_layer(strength, paths, operation, f"strength of {name!r}").items():
                by_slot[slots[path]][name] = each
    _check_copies(root, by_slot, operation)
    return by_slot


def _check_copies(root: nn.Module, by_slot: Mapping[Slot, Mapping[str, float]], operation: str) -> None:
    """Refuse to mix tensors of different shapes: a copy of another shape than the base's acts whole or not at all."""
    distinct = {id(strengths): strengths for strengths in by_slot.values()}.values()
    if all([s for s in strengths.values() if s] in ([], [1.0]) for strengths in distinct):
        return
    for path, module in adapted_modules(root).items():
        base, slot = own_tensors(module), slot_of(module)
        acting = {name: strength for name, strength in by_slot[slot].items() if strength}
        for name, copies in slot.copies().items():
            for kind, copy in copies.tensors().items() if name in acting else ():
                alone = acting[name] == 1.0 and sum(n in acting for n in slot.names()) == 1
                if not alone and (kind not in base or base[kind].shape != copy.shape):
                    raise ConvLoRAError(
                        f"{operation}: {name!r} has '{tensor_key(path, kind)}' in another shape than the base:"
                        " it acts at strength 1 and alone there"
                    )


def _strengths(names: Names, operation: str) -> dict[str, Strength]:
    if isinstance(names, str):
        names = [names]
    try:
        pairs = names.items() if isinstance(names, Mapping) else ((name, 1.0) for name in names)
        strengths: dict[str, Strength] = dict(pairs)
    except TypeError:
        raise ConvLoRAError(
            f"{operation}: expected a name, a list of names or {{name: strength}}, got {names!r}"
        ) from None
    for name, strength in strengths.items():
        check_strength(strength, operation, f"strength of {name!r}")
    return strengths


@contextlib.contextmanager
def _restored(root: nn.Module) -> Iterator[None]:
    before = [(slot, slot.state()) for slot in adapter_slots(root)]
    try:
        yield
    finally:
        for slot, state in before:
            slot.restore(state)


def merge(model: M, names: Names | None = None, *, check_finite: bool = True, exact: bool = False) -> M:
    """From now on each layer computes with one fused weight, formed from the active (or the named) adapters.

    The fused weight lies beside the base Parameter, which is never written: `state_dict()` stays the same, and
    `unmerge` is exact in every dtype. While merged, no gradient reaches the factors. It changes the model for
    everybody: nobody may be running it meanwhile.

    By default the fused weight is bitwise the one that the unmerged layer computes with. That one is formed in float32,
    so last bits of it are off, more of them where W and ΔW cancel. `exact=True` forms it in float64 instead: each
    element is the nearest value of the weight's dtype, and the output moves by as much. (On devices with float64; a
    compiled graph goes on forming it in float32.)

    Raises:
        ConvLoRAError: no such adapter, or a fused weight with a non-finite value (`check_finite`), naming the
            layers; a sharded model (FSDP). The model is unchanged then.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> merge(model)[0].weight.requires_grad
        False
    """
    strengths = None if names is None else _strengths(names, "merge")
    root, found = model_and_slots(model, "merge", strengths or ())
    refuse_sharded(root, "merge")
    refuse_stacked(root, "merge")
    by_slot = None if strengths is None else _by_slot(root, found, strengths, "merge")
    _merge(root, by_slot, check_finite, exact)
    return model


def _merge(
    root: nn.Module, by_slot: Mapping[Slot, Mapping[str, float]] | None, check_finite: bool, exact: bool
) -> None:
    before = [(slot, slot.state()) for slot in adapter_slots(root)]
    bad = []
    try:
        for path, module in adapted_modules(root).items():
            slot_of(module).merge(None if by_slot is None else by_slot[slot_of(module)], exact)
            for kind in effective_names(module) if check_finite else ():
                value = effective_tensor(module, kind)
                if isinstance(value, Tensor) and value.is_floating_point() and not is_finite(value):
                    bad.append(f"'{tensor_key(path, kind)}'")
        if bad:
            raise ConvLoRAError(
                f"merge: non-finite values in {', '.join(bad)}; check the adapter, or check_finite=False"
            )
    except BaseException:
        for slot, state in before:
            slot.restore(state)
        raise


def unmerge(model: M) -> M:
    """Compute with base and adapters apart again, bitwise as before `merge`.

    Example:
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> unmerge(merge(model))[0].weight.requires_grad
        True
    """
    root = require_adapters(model, "unmerge")
    for slot in adapter_slots(root):
        slot.unmerge()
    return model


@contextlib.contextmanager
def merged(model: M) -> Iterator[M]:
    """Merge inside the block; the former state comes back, also after an exception.

    Example:
        >>> import torch
        >>> import convlora
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> with merged(model):
        ...     y = model(torch.ones(1, 3, 8, 8))
    """
    with _restored(require_adapters(model, "merged")):
        merge(model)
        yield model
