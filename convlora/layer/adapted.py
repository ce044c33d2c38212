"""One module becomes an adapted one, and back.

Its class changes to a cached subclass of its own class, with a property for each tensor that adapters change: `weight`
and `bias` of a layer with factors read as the effective weight, `W + Σ ΔW`; a tensor of which an adapter has a copy
reads as that copy. The module's `__dict__` stays as it was, but for one child module that holds the adapters. So base
keys, `isinstance`, user subclasses with their own forward and code that reads `.weight` all keep working, code that
writes into what it has read (BatchNorm's statistics) writes into the copy, and taking the child away restores the
module exactly.

An attention that holds its projections' weights itself becomes adapted with them: it reads `in_proj_weight` as what the
factors of its child `in_proj` (projection.py) make of it.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from convlora.config import CHILD as CHILD
from convlora.errors import ConvLoRAError
from convlora.factors.base import WeightSpec
from convlora.layer.again import computing, derived, forms_again, without_keeping
from convlora.layer.context import Choice, choosing
from convlora.layer.copies import own_tensors
from convlora.layer.forms import training_form_of
from convlora.layer.loading import AdapterTensors
from convlora.layer.projection import PROJECTED, Projection, base_parameter, home_of, projections_on
from convlora.layer.sharded import is_managed, is_shard_root, is_sharded
from convlora.layer.slot import Slot

_FACTORED = ("bias", "weight")  # what factors update

_BASES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_STOCK = {base.forward for base in _BASES}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# --- what can be adapted -----------------------------------------------------------------------------------------


def class_name(module: nn.Module) -> str:
    """The name of a module's class, of an adapted one that of its own."""
    kind: type = getattr(type(module), "_convlora_base", type(module))
    return kind.__name__


def why_not(layer: nn.Module) -> str | None:
    """Why a module cannot be adapted; None if it can."""
    if not isinstance(layer, _BASES):
        return f"{class_name(layer)} is no convolution or Linear"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"{class_name(layer)} has no shape yet (run one batch through the model first)"
    try:
        weight = peek_base_tensor(layer, "weight")
    except Exception as error:
        return f"its weight cannot be read ({error})"
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is {getattr(weight, 'dtype', type(weight).__name__)}, not floating point"
    if tuple(weight.shape) != _declared_shape(layer):
        return f"its weight has shape {tuple(weight.shape)}, its attributes say {_declared_shape(layer)}"
    if has_child_name(home_of(layer, "weight")[0]):
        return f"{'the module around it' if isinstance(layer, Projection) else 'it'} has an attribute named {CHILD!r}"
    return None


def has_child_name(module: nn.Module) -> bool:
    """Whether the name of the child that holds adapters is taken by something else."""
    return not isinstance(module, Adapted) and (CHILD in module.__dict__ or CHILD in module._modules)


def _declared_shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return int(layer.out_features), int(layer.in_features)
    pair = (layer.out_channels, layer.in_channels)
    first, second = reversed(pair) if isinstance(layer, _TRANSPOSED) else pair
    return int(first), int(second // layer.groups), *map(int, layer.kernel_size)


def declare_shape(module: nn.Module) -> None:
    """Let the attributes of a layer say the shape that its weight has; of another module there are none to tell."""
    layer: Any = module
    if isinstance(module, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(module, _BASES):
        first, second, *kernel = layer.weight.shape
        pair = (first, second * layer.groups)
        layer.out_channels, layer.in_channels = reversed(pair) if isinstance(module, _TRANSPOSED) else pair
        layer.kernel_size = tuple(kernel)


def weight_spec(layer: Any) -> WeightSpec:
    """The shape of a layer's weight and how to read it."""
    groups, in_parent = int(getattr(layer, "groups", 1)), isinstance(layer, Projection)
    return WeightSpec(_declared_shape(layer), groups, isinstance(layer, _TRANSPOSED), in_parent)


# --- the adapted layer -------------------------------------------------------------------------------------------

_on_read: Callable[[nn.Module, str, Tensor], None] | None = None


@contextlib.contextmanager
def watching_reads(on_read: Callable[[nn.Module, str, Tensor], None]) -> Iterator[None]:
    """Inside the block, call `on_read(module, name, tensor)` whenever an effective tensor of an adapted one is read."""
    global _on_read
    before, _on_read = _on_read, on_read
    try:
        yield
    finally:
        _on_read = before


class Adapted(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """What every adapted layer is an instance of, behind its own class."""

    __slots__ = ()
    _convlora_base: type[nn.Module]
    _convlora_shape: Shape


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle and copy: the class is made at run time, so name its base."""
    reduced = self._convlora_base.__reduce_ex__(self, max(int(protocol), 2))
    if not isinstance(reduced, tuple):
        return reduced
    rebuild, args, *state = reduced
    if rebuild is copyreg.__newobj__:  # type: ignore[attr-defined]
        return _rebuild, (self._convlora_base, self._convlora_shape, *args[1:]), *state
    # the class has a way of its own
    return _rebuild_by, (self._convlora_base, self._convlora_shape, rebuild, *args), *state


def _reset_parameters(self: Any) -> None:
    """Reset the base layer: its own method writes to `weight`, which is a temporary while an adapter acts."""
    _reset_base(self, self._convlora_base.reset_parameters)


def _reset_attention(self: Any) -> None:
    """The same for `nn.MultiheadAttention`, whose method has this name."""
    _reset_base(self, self._convlora_base._reset_parameters)


def _reset_base(self: Any, reset: Callable[[Any], None]) -> None:
    before = [(slot_of(module), slot_of(module).active) for module in self.modules() if isinstance(module, Adapted)]
    for slot, _ in before:
        slot.active = ()
    try:
        with _restarting(self):
            reset(self)
    finally:
        for slot, active in before:
            slot.active = active


_UNDER_FSDP = "under FSDP the effective weight cannot be formed; shard by fully_shard (FSDP2)"


class _MissingError(AttributeError):
    """The base has no such attribute (now), so `hasattr` is to say no."""


def _property(kind: str) -> property:
    is_projected = kind in PROJECTED

    def read(self: Any) -> Any:
        try:
            slot, base = slot_of(self), base_tensor(self, kind)
            if (base is None and not slot.has_copies) or is_sharded(base):  # sharded: whole only inside FSDP2's forward
                return base
            value = _effective(self, kind, base, self.training)
            if _on_read is not None:
                if (projection := _projection_of(self, kind)) is not None:
                    _on_read(projection, PROJECTED[kind][1], value)
                _on_read(self, kind, value)
            slots = _slots_of(self, kind) if is_projected else (slot,)
            acts = slot.active or slot.choices or (is_projected and any(s.active or s.choices for s in slots))
            if not acts or torch.compiler.is_compiling():
                return value
            if slot in computing.slots:  # the layer itself
                return value if computing.formed is None else _as_computed(self, value)
            slot._last_read[kind] = base
            # what others write into it does not act
            return value.clone() if any(s._keeps(value) for s in slots) else value
        except _MissingError:
            raise
        except AttributeError as error:
            # nn.Module.__getattr__ would swallow it and return the base weight.
            raise RuntimeError(f"{type(self).__name__}.{kind} cannot be formed: {error}") from error
        except RuntimeError as error:
            if is_managed(self):  # FSDP1, which sets the parameters of a module by other ways than its attributes
                raise ConvLoRAError(f"{type(self).__name__}.{kind}: {_UNDER_FSDP}") from error
            raise

    def write(self: Any, value: Any) -> None:
        own = getattr(self._convlora_base, kind, None)
        if isinstance(own, property):
            own.__set__(self, value)
        else:
            self.__dict__[kind] = value

    def delete(self: Any) -> None:
        del self.__dict__[kind]

    return property(read, write, delete, f"The effective {kind}: the base's with the active adapters.")


def _effective(module: Any, kind: str, base: Any, training: bool = False) -> Any:
    """A tensor of a module with what its own adapters have of it, and those of the projection that it belongs to."""
    value = slot_of(module).effective(base, kind, training)
    projection = _projection_of(module, kind)
    if projection is not None and value is not None:
        value = slot_of(projection).effective(value, PROJECTED[kind][1], training)
    return _pruned(module, kind, base, value)


def _projection_of(module: Any, kind: str) -> Projection | None:
    """The child of an attention that has factors for a tensor of it."""
    if kind not in PROJECTED:
        return None
    child = module._modules.get(PROJECTED[kind][0])
    return child if isinstance(child, Projection) else None


def _slots_of(module: Any, kind: str) -> tuple[Slot, ...]:
    """The slots with what adapters have for a tensor of a module."""
    projection = _projection_of(module, kind)
    return (slot_of(module),) if projection is None else (slot_of(module), slot_of(projection))


def base_tensor(layer: nn.Module, kind: str) -> Any:
    """A tensor without adapters: a Parameter, a buffer, or what the layer computes (weight or spectral norm)."""
    if isinstance(layer, Projection):
        name = layer.held_name(kind)
        return None if name is None else base_tensor(layer.owner, name)
    if kind in layer._parameters:
        return layer._parameters[kind]
    if kind in layer._buffers:
        return layer._buffers[kind]
    if kind in layer.__dict__:
        return layer.__dict__[kind]
    own = getattr(getattr(layer, "_convlora_base", type(layer)), kind, None)
    if isinstance(own, property):
        return own.__get__(layer)
    raise _MissingError(f"{type(layer).__name__} has no {kind}")


@contextlib.contextmanager
def without_side_effects(layer: nn.Module, kind: str) -> Iterator[None]:
    """Look at a layer's weight without effects: in train mode, reading a spectrally normed one moves its buffers."""
    home, name = home_of(layer, kind)
    is_held = name is None or name in home._parameters or name in home._buffers
    modes = [] if is_held else [(module, module.training) for module in home.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def peek_base_tensor(layer: nn.Module, kind: str) -> Any:
    """The weight or bias without adapters, looked at without effects."""
    with without_side_effects(layer, kind):
        return base_tensor(layer, kind)


def effective_names(module: Any) -> tuple[str, ...]:
    """The names of the tensors of an adapted module that adapters may change."""
    return module._convlora_shape[0]  # type: ignore[no-any-return]


def effective_tensor(module: nn.Module, kind: str) -> Any:
    """A tensor with the adapters that act for the caller, as in eval mode, looked at without effects."""
    with without_side_effects(module, kind):
        return _effective(module, kind, base_tensor(module, kind))


def _pruned(module: nn.Module, kind: str, base: Any, value: Any) -> Any:
    """The zeros of a mask of `torch.nn.utils.prune` stay zero."""
    if value is base or kind not in module.__dict__ or pruning_of(module, kind) is None:
        return value
    mask: Any = module._buffers[f"{kind}_mask"]
    return derived(value, lambda dense: dense * mask)


def pruning_of(module: nn.Module, kind: str) -> BasePruningMethod | None:
    """How a tensor is pruned; None if it is not."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == kind:
            return hook
    return None


def slot_of(layer: Any) -> Slot:
    return layer._modules[CHILD]  # type: ignore[no-any-return]


Shape = tuple[tuple[str, ...], bool]  # of a class: the tensors that are properties, and whether `training` is one


def adapted_class(base: type[nn.Module], shape: Shape = (_FACTORED, False)) -> type[nn.Module]:
    """The adapted subclass of a module class, made once and kept in the class itself, so both die together."""
    made = base.__dict__.get("_convlora_adapted", {}).get(shape)
    if made is None:
        names, freezes = shape
        body: dict[str, Any] = {
            "__module__": base.__module__,  # fx takes a module for a leaf if its class comes from torch.nn
            "__doc__": base.__doc__,
            "__new__": _new,
            "__reduce_ex__": _reduce_ex,
            "__setattr__": _setattr,
            "__delattr__": _delattr,
            "__prepare_scriptable__": _refuse_script,
            "register_parameter": _register_parameter,
            "_load_from_state_dict": _load_from_state_dict,
            **{name: _property(name) for name in names},
            "_convlora_base": base,
            "_convlora_shape": shape,
        }
        if not set(names) - {*_FACTORED, *PROJECTED}:
            del body["__setattr__"]  # FSDP2 has a quick path for modules without
        if hasattr(base, "reset_parameters"):
            body["reset_parameters"] = _reset_parameters
        if hasattr(base, "_reset_parameters"):
            body["_reset_parameters"] = _reset_attention
        if freezes:
            body["training"] = property(_reads_training, _writes_training)
        if base.forward in _STOCK:
            body["forward"] = _forward(base)
        elif base.forward is nn.MultiheadAttention.forward or not PROJECTED.keys().isdisjoint(names):
            body["forward"] = _attention_forward(base)
        elif issubclass(base, _BASES):
            body["forward"] = _own_forward(base)
        made = type(base)(  # type: ignore[misc]
            f"Adapted{base.__name__}", (base, Adapted), body
        )  # base first: it decides the memory layout
        if "_convlora_adapted" not in base.__dict__:
            base._convlora_adapted = {}  # type: ignore[attr-defined]
        base._convlora_adapted[shape] = made  # type: ignore[attr-defined]
    return made  # type: ignore[no-any-return]


def _load_from_state_dict(self: Any, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A base checkpoint that comes after `inject` reaches the copies, too, while nothing was trained."""
    slot = slot_of(self)
    slots = [slot, *(slot_of(projection) for projection in projections_on(self))]
    with _restarting(self, state_dict, prefix), choosing(slots, Choice({})):  # what `assign=True` assigns is the base's
        self._convlora_base._load_from_state_dict(self, state_dict, prefix, *rest)
    for name, copies in slot.copies().items():
        if not any(key.startswith(f"{prefix}{CHILD}.{name}.") for key in state_dict):
            copies.follow_base(own_tensors(self))


@contextlib.contextmanager
def _restarting(module: Any, keys: Iterable[str] = (), prefix: str = "") -> Iterator[None]:
    """Factors that depend on the base weight start anew on the one that the block brings, while nothing was trained.

    `keys`: of a checkpoint that comes, in which those of the module begin with `prefix`; with factors in it they go on.
    """
    layers = [(prefix, module), *((f"{prefix}{layer.name}.", layer) for layer in projections_on(module))]
    found = [
        (base_parameter(layer, "weight"), layer, low_rank)
        for start, layer in layers
        for name, low_rank in slot_of(layer).low_ranks().items()
        if low_rank.needs_weight and not any(key.startswith(f"{start}{CHILD}.{name}.") for key in keys)
    ]
    started = []
    for weight, layer, low_rank in found:
        sharded = any(map(is_sharded, (weight, *low_rank.parameters())))
        if weight is not None and not sharded and (weight.is_meta or low_rank.is_at_start(weight)):
            started.append((layer, low_rank))
    yield
    for layer, low_rank in started:
        weight = base_parameter(layer, "weight")
        if weight is not None and not any(tensor.is_meta for tensor in (weight, *low_rank.parameters())):
            low_rank.reset_parameters(weight)


def _register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
    """Assignment ends here. What acts on a tensor would act on the new one again if that was made from what is read."""
    for kind in effective_names(self):
        if name == kind or name.startswith(f"{kind}_"):  # `weight_g` and the like come with a norm
            _refuse_to_replace(self, kind, name, param)
    self._convlora_base.register_parameter(self, name, param)


def _delattr(self: Any, name: str) -> None:
    if name in effective_names(self) and name in self._parameters:
        _refuse_to_replace(self, name, name, None)
    self._convlora_base.__delattr__(self, name)


def _refuse_to_replace(self: Any, kind: str, name: str, value: Any) -> None:
    if not any(slot.acting() for slot in _slots_of(self, kind)):
        return
    if kind in self._parameters:
        present = self._parameters[kind]
        if is_sharded(present) or is_sharded(value):  # by FSDP2
            return
    elif name == kind or kind in self.__dict__:
        return  # a norm is taken off, and leaves the base's value
    elif (base := slot_of(self)._last_read.get(kind)) is not None:
        self._parameters[kind] = base  # a norm that is put on has deleted it
    if is_managed(self):
        raise ConvLoRAError(f"{class_name(self)}.{name}: {_UNDER_FSDP}")
    raise ConvLoRAError(
        f"{class_name(self)}.{name} cannot be set while adapters act on the layer, since they would count twice:"
        " merge(model) and remove(model) first, or activate(model, []) to change the base"
    )


def _refuse_script(self: Any) -> Any:
    raise ConvLoRAError(
        "torch.jit.script takes plain layers: merge(model) and remove(model) first (torch.jit.trace takes adapted ones)"
    )


def _setattr(self: Any, name: str, value: Any) -> None:
    """A module that assigns a buffer, rather than writing into it, moves the copy, too."""
    buffers = self.__dict__.get("_buffers", ())  # PyTorch 2.6 exports modules that are made empty
    if name in buffers and isinstance(value, Tensor) and (copies := slot_of(self).own_buffer(name)) is not None:
        copies._buffers[name] = value
    else:
        self._convlora_base.__setattr__(self, name, value)


def _reads_training(self: Any) -> bool:
    """Eval mode for a module whose statistics are frozen: it normalises with them."""
    return bool(self.__dict__["training"]) and not slot_of(self).freezes_statistics()


def _writes_training(self: Any, value: bool) -> None:
    self.__dict__["training"] = value


def _forward(base: type[nn.Module]) -> Callable[[Any, Tensor], Any]:
    """A stock layer's forward: in training a form of equal values that is faster, and each sample's own adapter."""
    plain, form = base.forward, training_form_of(base)

    def forward(self: Any, input: Tensor, *more: Any) -> Any:
        slot = slot_of(self)
        if slot.choices and not torch.compiler.is_compiling() and (rows := slot.sample_rows()) is not None:
            least_dims = 2 if isinstance(self, nn.Linear) else len(self.kernel_size) + 2
            return slot.by_rows(rows, lambda part: plain(self, part, *more), input, least_dims)
        if torch.compiler.is_compiling() or not (slot.active or slot.choices):
            return plain(self, input, *more)
        if form is not None and torch.is_grad_enabled() and _on_read is None:
            output = form(self, slot, input)
            if output is not None:
                return output
        if forms_again() and not slot.merged:
            return without_keeping((slot,), lambda: plain(self, input, *more))
        before, computing.slots = computing.slots, (slot,)
        try:
            return plain(self, input, *more)
        finally:
            computing.slots = before

    return functools.wraps(plain)(forward)


def _own_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class of the user's: autograd keeps no weight that was formed for it."""
    plain = base.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        slot = slot_of(self)
        if torch.compiler.is_compiling() or slot.merged or not (slot.active or slot.choices) or not forms_again():
            return plain(self, *arguments, **keywords)
        return without_keeping((slot,), lambda: plain(self, *arguments, **keywords))

    return functools.wraps(plain)(forward)


def _attention_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a module that computes with tensors of projections, and with those of an `out_proj` of its own."""
    plain, is_stock = base.forward, base.forward is nn.MultiheadAttention.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        slot, out = slot_of(self), self._modules.get("out_proj")
        slots = (slot, *map(slot_of, (*projections_on(self), *([out] if isinstance(out, Adapted) else []))))
        if torch.compiler.is_compiling() or not any(slot.active or slot.choices for slot in slots):
            return plain(self, *arguments, **keywords)
        if forms_again() and not slot.merged:
            return without_keeping(slots, lambda: plain(self, *arguments, **keywords))
        before, computing.slots = computing.slots, slots if is_stock else computing.slots
        try:
            return plain(self, *arguments, **keywords)
        finally:
            computing.slots = before

    return functools.wraps(plain)(forward)


def _as_computed(layer: Any, value: Tensor) -> Tensor:
    """As autocast is going to cast it, so that it is known which tensor autograd is given to keep."""
    device = value.device.type
    if device == "meta" or value.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return value
    if layer._convlora_base.forward not in (*_STOCK, nn.MultiheadAttention.forward):
        return value
    return derived(value, lambda wide: wide.to(torch.get_autocast_dtype(device)))


def _new(kind: Any, *args: Any, **keywords: Any) -> nn.Module:
    """`type(layer)(3, 8, 1)`, in code that makes layers of the same sort, gives a stock layer: it has no adapter."""
    if args or keywords:
        return kind._convlora_base(*args, **keywords)  # type: ignore[no-any-return]
    return kind._convlora_base.__new__(kind)  # type: ignore[no-any-return]


def _rebuild(base: type[nn.Module], shape: Shape, *args: Any) -> nn.Module:
    return base.__new__(adapted_class(base, shape), *args)


def _rebuild_by(base: type[nn.Module], shape: Shape, rebuild: Any, *args: Any) -> nn.Module:
    layer: nn.Module = rebuild(*args)
    if type(layer) is base:
        layer.__class__ = adapted_class(base, shape)
        layer._modules.setdefault(CHILD, Slot())  # until the state brings the real one
    return layer


def is_stacked(layer: nn.Module) -> bool:
    """Whether something (a parametrization) has put a class of its own on top of the adapted one."""
    kind = type(layer).__bases__[1] if is_shard_root(type(layer)) else type(layer)
    return isinstance(layer, Adapted) and "_convlora_base" not in kind.__dict__


def adapt(module: nn.Module, name: str, entry: AdapterTensors) -> None:
    """Put what an adapter has for a module, factors or copies, on it, acting at strength 1."""
    _open(module)
    if isinstance(module, Projection):  # the attention reads the effective tensors
        _open(module.owner)
        module.owner._modules[module.name] = module
        _fit_class(module.owner)
    slot = slot_of(module)
    slot._modules[name] = entry.train(module.__dict__["training"])
    slot.active = (*slot.active, name)
    _fit_class(module)


def release(module: nn.Module, name: str) -> None:
    """Take what an adapter has from a module; with the last one the module is what it was."""
    slot = slot_of(module)
    del slot._modules[name]
    slot.active = tuple(other for other in slot.active if other != name)
    _close_or_fit(module)
    if isinstance(module, Projection) and not slot._modules:
        del module.owner._modules[module.name]
        _close_or_fit(module.owner)


def _open(module: nn.Module) -> None:
    if not isinstance(module, Adapted):
        module._modules[CHILD] = Slot().train(module.training)
        module.__class__ = adapted_class(type(module), ((), False))


def _close_or_fit(module: Any) -> None:
    if slot_of(module)._modules or projections_on(module):
        _fit_class(module)
    else:
        slot_of(module)._fused.clear()
        del module._modules[CHILD]
        module.__class__ = module._convlora_base


def _fit_class(module: Any) -> None:
    """Give a module the class for what adapters hold of it: a property for each tensor that they change."""
    slot = slot_of(module)
    slot._fused.clear()
    slot.has_copies = bool(slot.copies())
    copies = slot.copies().values()
    factored = _FACTORED if slot.low_ranks() and not isinstance(module, Projection) else ()
    projected = (name for projection in projections_on(module) for name in projection.held_names())
    names = {*factored, *projected, *(name for entry in copies for name in entry.tensor_names())}
    shape = tuple(sorted(names)), any(entry.freezes for entry in copies)
    if shape != module._convlora_shape:
        module.__class__ = adapted_class(module._convlora_base, shape)
