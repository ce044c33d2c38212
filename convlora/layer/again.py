"""What a layer's forward forms, its backward forms again: an effective weight is as large as the weight itself.

Autograd keeps for backward what an operation needs, for a convolution its input and its weight. The weight of an
adapted layer is a tensor made for this call, so keeping it means a second copy of the network. Hooks of autograd on
what is saved (`torch.autograd.graph.saved_tensors_hooks`) keep in its place how it was formed; the values, and the
derivatives of first and second order, are bitwise those of the plain composite.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Form = Callable[[], Tensor]


class _Computing(threading.local):
    """In whose own forward a thread is, and what that has formed so far: tensors, and how to form each again."""

    slots: Sequence[object] = ()  # of the layer, or of all whose tensors the forward computes with
    formed: list[tuple[Tensor, Form]] | None = None


computing = _Computing()


def note_formed(slot: object, value: Tensor, form: Form, tensors: Sequence[Tensor]) -> None:
    """A layer's own forward has formed a tensor out of others."""
    if slot in computing.slots and computing.formed is not None:
        computing.formed.append((value, _Unchanged(form, tensors)))


def derived(value: Tensor, derive: Callable[[Tensor], Tensor]) -> Tensor:
    """`derive(value)`, noted as formed if the value was."""
    new = derive(value)
    formed = computing.formed
    if formed and formed[-1][0] is value:
        form = formed[-1][1]
        formed.append((new, lambda: derive(form())))
    return new


def forming_again(form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`form(*tensors)`, of which autograd keeps the tensors alone and not what comes in between, which it forms again.

    Example:
        >>> gain = torch.ones(2, requires_grad=True)
        >>> forming_again(lambda gain, mix: (gain * mix).exp(), gain, torch.zeros(2)).sum().backward()
        >>> gain.grad.tolist()
        [0.0, 0.0]
    """
    return _FormingAgain.apply(form, *tensors)  # type: ignore[no-any-return]


class _FormingAgain(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        context.form = form
        context.save_for_backward(*tensors)
        return form(*tensors)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        tensors, needed = context.saved_tensors, context.needs_input_grad[1:]
        twice = torch.is_grad_enabled()  # a second derivative is wanted: it goes through the tensors themselves
        if not twice:
            tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(context.form(*tensors), wanted, grad, create_graph=twice))
        return None, *(next(found) if need else None for need in needed)


def forms_again() -> bool:
    """Whether backward can be had form things again: there is one, and nothing looks into the operations."""
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


def keeps_for_backward() -> bool:
    """Whether a graph that is being compiled has a backward, for which it may keep what the forward forms.

    A compiler decides itself what it keeps; a checkpoint around the forming tells it to form again.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)  # from PyTorch 2.7 on
    return (
        torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled() and not (exporting is not None and exporting())
    )


def without_keeping(slots: Sequence[object], call: Callable[[], Any]) -> Any:
    """A layer's own forward, of which autograd keeps no tensor that was formed for it."""
    formed: list[tuple[Tensor, Form]] = []
    outer = _outer_hooks()

    def pack(tensor: Tensor) -> Any:
        for value, form in formed:
            if tensor is value or _is_view(tensor, value):
                return _Formed(form, tensor)
        return tensor if outer is None else outer[0](tensor)

    def unpack(packed: Any) -> Any:
        if isinstance(packed, _Formed):
            return packed.tensor()
        return packed if outer is None else outer[1](packed)

    before = computing.slots, computing.formed
    computing.slots, computing.formed = slots, formed
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return call()
    finally:
        computing.slots, computing.formed = before
        formed.clear()  # autograd keeps the hooks


def _outer_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Hooks that are there already (of a checkpoint, say) and get everything else. PyTorch 2.6 does not tell them."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


def _is_view(tensor: Tensor, value: Tensor) -> bool:
    same = tensor.dtype == value.dtype and tensor.layout == value.layout == torch.strided
    return same and tensor.untyped_storage()._cdata == value.untyped_storage()._cdata


class _Formed:
    """A tensor that was not kept, or a view of one."""

    __slots__ = ("form", "view")

    def __init__(self, form: Form, tensor: Tensor) -> None:
        self.form = form
        self.view = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        with torch.no_grad():
            return self.form().as_strided(*self.view)


class _Unchanged:
    """Forms a tensor out of others that are as they were."""

    __slots__ = ("form", "tensors", "versions")

    def __init__(self, form: Form, tensors: Sequence[Tensor]) -> None:
        self.form, self.tensors = form, tensors
        self.versions = [_version(tensor) for tensor in tensors]

    def __call__(self) -> Tensor:
        if self.versions != [_version(tensor) for tensor in self.tensors]:
            raise RuntimeError(
                "a weight or a factor needed for gradient computation has been modified by an inplace operation"
                " between forward and backward"
            )
        return self.form()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
