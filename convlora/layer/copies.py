"""`TensorCopies`: one adapter's own copies of a module's Parameters and buffers, trained in full or moved by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.layer.loading import AdapterTensors

_GAIN = "_convlora_gain"
BLOCK = 2**18  # elements that are summed at once
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class TensorCopies(AdapterTensors):
    """One adapter's own copies of tensors of one module, by their names there.

    Parameters stay Parameters, buffers stay buffers. While the adapter acts, the module reads them in place of its own.

    Args:
        config: of the adapter.
        tensors: name -> Parameter or buffer to hold; see `copied`.
        freezes: the module's statistics stay the base's in train mode, too, and nothing is copied.
        trained: the values come from a training, not from the base; a base checkpoint does not change them.
    """

    def __init__(
        self, config: AdapterConfig, tensors: Mapping[str, Tensor], *, freezes: bool = False, trained: bool = False
    ) -> None:
        super().__init__()
        self.config, self.freezes = config, freezes
        self.strength = 1.0
        # All of the adapter's modules: which of several adapters trains decides whose statistics move.
        self.adapter_modules: list[nn.Module] = [self]
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self.register_buffer(name, tensor)
        self._made: dict[str, tuple[int, int | None]] | None = None if trained else self._state()
        # The strength as a tensor, for compiled models: another one makes no graph anew.
        self.register_buffer(_GAIN, None, persistent=False)
        self.follow()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a copy of the model does not know whether it was trained before

    def _state(self) -> dict[str, tuple[int, int | None]]:
        """What tells of a write: PyTorch's count, and the bits of buffers, which norms write uncounted."""
        sums = sums_of_bits([t if n in self._buffers else None for n, t in self.tensors().items()])
        return {n: (version(t), bits) for (n, t), bits in zip(self.tensors().items(), sums, strict=True)}

    @property
    def gain(self) -> Tensor:
        return self._buffers[_GAIN]  # type: ignore[return-value]

    def tensors(self) -> dict[str, Tensor]:
        """Tensor name -> copy."""
        return {name: self.tensor(name) for name in self._names}

    def holds(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str) -> Tensor:
        return self._parameters[name] if name in self._parameters else self._buffers[name]  # type: ignore[return-value]

    def set_strength(self, strength: float) -> None:
        self.strength = strength
        with torch.no_grad():
            self.gain.fill_(strength)

    def copy_(self, values: Mapping[str, Tensor]) -> None:
        """Take other values of the same shapes, in place."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if name in values:
                    tensor.copy_(values[name])

    def swap(self, values: Mapping[str, Tensor], config: AdapterConfig) -> None:
        """Become those of another file, or of the base, in place."""
        self.copy_(values)
        self.config = config

    def equal(self, others: Mapping[str, Tensor]) -> bool:
        """Whether all copies have the values, shapes included, that tensors of the same names have."""
        return all(name in others and torch.equal(t, others[name]) for name, t in self.tensors().items())

    def follow_base(self, base: Mapping[str, Tensor]) -> None:
        """Start as the base does, which has other values now, while nothing was trained yet."""
        if self._made is None or self._made != self._state():
            return
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if name in base and base[name].shape == tensor.shape and not (tensor.is_meta or base[name].is_meta):
                    tensor.copy_(base[name])
        self._made = self._state()

    def trains(self) -> bool:
        """Whether any Parameter of the adapter does, here or in another module."""
        return any(p.requires_grad for module in self.adapter_modules for p in module.parameters(recurse=False))

    def tensor_names(self) -> Iterable[str]:
        return self._names

    def follow(self) -> None:
        """Have the strength as a tensor where the copies are; `load_state_dict(assign=True)` moves them."""
        device = self.tensor(self._names[0]).device if self._names else None
        with torch.inference_mode(False):
            self._buffers[_GAIN] = torch.full((), self.strength, dtype=torch.float32, device=device)

    def extra_repr(self) -> str:
        held = ", ".join(self._names) or "statistics frozen"
        return f"{held}, strength={self.strength:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorCopies:
        # Memory that replaces the meta device's has no values: the base's are still to come.
        untrained = any(t.is_meta for t in self.tensors().values()) or self._made == self._state()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._made = self._state() if untrained else None
        self.follow()
        return self


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> Parameter or persistent buffer that a module holds itself, in the order of its state dict."""
    buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def statistics_names(module: nn.Module) -> list[str]:
    """The buffers in which a module keeps running statistics, and their counter; none for most modules.

    They are told by the names that PyTorch gives them, whatever the class: persistent buffers `running_*`.
    """
    named = [name for name in own_tensors(module) if name in module._buffers]
    running = [name for name in named if name.startswith("running_")]
    return [name for name in named if name in running or name == "num_batches_tracked"] if running else []


def copied(module: nn.Module, name: str, made: dict[int, Tensor], values: Tensor | None = None) -> Tensor:
    """An adapter's copy of a tensor of a module, with its values or others; of a shared tensor one for all.

    Args:
        made: id of a tensor -> its copy, of this adapter.
        values: in the place of the base's, of another shape perhaps; the dtype and the device are the base's.
    """
    own = module._parameters.get(name, module._buffers.get(name))
    if own is not None and id(own) in made:
        return made[id(own)]
    beside = next(iter(own_tensors(module).values())) if own is None else own  # a bias that the base lacks
    source = beside if values is None else values.to(beside.device, beside.dtype)
    copy = source.detach().clone(memory_format=torch.preserve_format)
    if name in module._parameters:
        copy = nn.Parameter(copy, copy.is_floating_point() or copy.is_complex())
    if own is not None:
        made[id(own)] = copy
    return copy


def sums_of_bits(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """The values of each tensor, taken for integers and summed; one wait for each device. None where there are none."""
    sums = [None if tensor is None else _sum_of_bits(tensor) for tensor in tensors]
    result: list[int | None] = [None] * len(tensors)
    for device in {s.device for s in sums if s is not None}:
        places = [place for place, s in enumerate(sums) if s is not None and s.device == device]
        for place, value in zip(places, torch.stack([sums[p] for p in places]).tolist(), strict=True):  # type: ignore[misc]
            result[place] = value
    return result


def _sum_of_bits(tensor: Tensor) -> Tensor | None:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not plain or tensor.is_quantized:
        return None
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = values.contiguous().view(-1).view(_INTEGERS[values.element_size()])
    if bits.device.type != "cpu" or len(bits) <= BLOCK:
        return bits.sum(dtype=torch.int64)
    # A CPU widens all that it sums first: in blocks, that stays in the cache and takes no memory.
    return torch.stack([block.sum(dtype=torch.int64) for block in torch.split(bits, BLOCK)]).sum()


def version(tensor: Tensor) -> int:
    """PyTorch's count of the writes to a tensor; -1 where it has none."""
    return -1 if nn.parameter.is_lazy(tensor) or tensor.is_inference() else tensor._version
