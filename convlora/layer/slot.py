"""`Slot`: the adapters of one layer, which of them act, and the fused weight while merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.factors.fuse import fuse_weight, fuse_weight_exactly
from convlora.layer.lowrank import LowRank
from convlora.layer.rows import SampleRows

State = tuple[dict[str, float], bool, bool, "dict[str, float] | None"]


class Slot(nn.Module):
    """The adapters of one layer, which of them act, and the fused weight while merged.

    Invariant: a fused tensor is used only while every tensor it was formed from is the same object at the same
    version; otherwise it is formed again. It lives beside the base weight, which merging never touches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged = False
        self._exact = False
        self._before_merge: dict[str, float] | None = None
        self._fused: dict[str, _Fused | None] = {}

    _rows: SampleRows | None = None  # while `per_sample`
    _row: str | None = ""  # the adapter of the rows at hand

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": {}, "_rows": None}

    def low_rank(self, name: str) -> LowRank:
        return self._modules[name]  # type: ignore[return-value]

    def names(self) -> list[str]:
        return list(self._modules)

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Let the named adapters act, those that this layer has."""
        self.active = tuple(name for name in self._modules if strengths.get(name))
        for name in self.active:
            if self.low_rank(name).strength != strengths[name]:  # a write could come between a forward and its backward
                self.low_rank(name).set_strength(strengths[name])
        self._before_merge = None
        if self.merged or not self.active:
            self._fused.clear()  # else what was kept is replaced by the next forward: to free it here takes time

    def strengths(self) -> dict[str, float]:
        return {name: self.low_rank(name).strength for name in self.active}

    def merge(self, strengths: Mapping[str, float] | None, exact: bool) -> None:
        """Use one fused weight, of the active adapters or of others until `unmerge`; `exact`: formed in float64."""
        before = self.strengths() if self._before_merge is None else self._before_merge
        self._fused.clear()
        if strengths is not None:
            self.activate(strengths)
            self._before_merge = before
        self.merged, self._exact = True, exact

    def unmerge(self) -> None:
        self.merged = self._exact = False
        if self._before_merge is not None:
            self.activate(self._before_merge)
        self._fused.clear()

    def state(self) -> State:
        return self.strengths(), self.merged, self._exact, self._before_merge

    def restore(self, state: State) -> None:
        strengths, self.merged, self._exact, before = state
        self._fused.clear()
        self.activate(strengths)
        self._before_merge = before

    def effective(self, base: Tensor, kind: str) -> Tensor:
        """The base weight or bias with the active adapters; `base` itself if none acts on it."""
        if self._rows is not None:
            return self._of_row(base, kind)
        if self.merged and not torch.compiler.is_compiling():
            # First, since a merged net reads hundreds of weights in each forward. None: no adapter acts on this kind.
            formed = self._fused.get(kind, _NOT_FORMED)
            if formed is None:
                return base
            if formed is not _NOT_FORMED and formed.stands_on(base):
                return formed.value
        acting = [name for name in self.active if kind == "weight" or self.low_rank(name)._has_bias]
        if not acting:
            if self.merged and not torch.compiler.is_compiling():
                self._fused[kind] = None
            return base
        if not self.merged:
            return self._live(base, kind, kind, acting)
        # A compiled graph cannot see a tensor change, so it forms the weight itself; an exported one is a snapshot.
        exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        formed = self._fused.get(kind) if exporting else None
        if formed is not None and formed.is_fresh():
            return formed.value
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self._compose(base, kind, acting)
        tensors = [base, *(t for name in acting for t in self.low_rank(name).factors().values())]
        # A weight that the layer computes may differ at every read, functional transforms bring tensors that must not
        # outlive them, inference tensors keep no version, and the fake ones of an export (PyTorch 2.6) no address.
        if not all(isinstance(tensor, nn.Parameter) and _is_lasting(tensor) for tensor in tensors):
            with torch.inference_mode(False), torch.no_grad():
                return self._compose(base, kind, acting)
        return self._form(base, kind, kind, acting).value

    def _by_rows(self, call: Callable[[Tensor], Tensor], x: Tensor, least_dims: int) -> Tensor:
        """A layer's forward, `call`, in which each sample's rows have the adapter of `per_sample`."""
        assert self._rows is not None

        def with_adapter(name: str | None, part: Tensor) -> Tensor:
            self._row = name
            try:
                return call(part)
            finally:
                self._row = ""

        return self._rows.through(with_adapter, x, least_dims)

    def _of_row(self, base: Tensor, kind: str) -> Tensor:
        name = self._row
        if name == "":
            raise ConvLoRAError("per_sample: a weight is read by something else than its layer; run the samples apart")
        if name is None or name not in self._modules or not (kind == "weight" or self.low_rank(name)._has_bias):
            return base
        return self._live(base, f"{kind} {name}", kind, [name], strength=1.0)

    def _live(self, base: Tensor, key: str, kind: str, acting: list[str], strength: float | None = None) -> Tensor:
        """The effective tensor of adapters that may be training; kept from one call to the next while nothing can.

        On a CPU only: factors are compared by value, since averages of weights are often written through `p.data`,
        which leaves no trace; elsewhere the comparison would wait for the device.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self._compose(base, kind, acting, strength)
        if torch.is_grad_enabled():
            self._fused.clear()
            return self._compose(base, kind, acting, strength)
        formed = self._fused.get(key)
        low_ranks = [self.low_rank(name) for name in acting]
        if formed is not None and formed.stands_on(base) and formed.is_of(low_ranks) and formed.has_values():
            return formed.value
        keeps_version = isinstance(base, nn.Parameter) and not base.is_inference()
        if base.device.type != "cpu" or not keeps_version or not all(map(_is_still, low_ranks)):
            return self._compose(base, kind, acting, strength)
        return self._form(base, key, kind, acting, strength).value

    def _form(self, base: Tensor, key: str, kind: str, acting: list[str], strength: float | None = None) -> _Fused:
        # Entering inference_mode(False) switches gradients on: no_grad comes after it.
        with torch.inference_mode(False), torch.no_grad():
            fused = self._compose(base, kind, acting, strength)
        formed = _Fused(fused, base, [self.low_rank(name) for name in acting], keep_values=not self.merged)
        if type(fused) is Tensor:  # not one of a mode that only pretends to compute
            self._fused[key] = formed
        return formed

    def swap(self, name: str, factors: Mapping[str, Tensor], config: AdapterConfig, alpha: float) -> None:
        """Make an adapter that of another file with the same shapes, in place."""
        self.low_rank(name).copy_(factors)
        self.low_rank(name).configure(config, alpha)
        self._fused.clear()

    def _compose(self, base: Tensor, kind: str, acting: list[str], strength: float | None = None) -> Tensor:
        if self._exact and not torch.compiler.is_compiling():
            return fuse_weight_exactly(base, [self.low_rank(name).in_float64(kind) for name in acting])
        # Called as modules, so that hooks (FSDP2 unshards in one) run.
        device = base.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return fuse_weight(base, [self._modules[name](kind, not self.merged, strength) for name in acting])  # type: ignore[misc]
        return fuse_weight(base, [self._modules[name](kind, not self.merged, strength) for name in acting])  # type: ignore[misc]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._fused.clear()
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        self._fused.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _is_lasting(tensor: Tensor) -> bool:
    return not tensor.is_inference() and type(tensor).__name__ != "FakeTensor"


class _Fused:
    """A fused weight or bias, and what it was formed from: Parameters, each at an address and a version."""

    __slots__ = ("base", "factors", "low_ranks", "value", "values")

    def __init__(self, value: Tensor, base: Tensor, low_ranks: list[LowRank], keep_values: bool) -> None:
        self.value = value
        self.base = base, base.data_ptr(), base._version
        self.factors = [
            (low_rank._parameters, name, tensor, tensor.data_ptr(), tensor._version)
            for low_rank in low_ranks
            for name, tensor in low_rank.factors().items()
        ]
        self.low_ranks = [(low_rank, low_rank.strength) for low_rank in low_ranks]
        self.values = [tensor.detach().clone() for _, _, tensor, _, _ in self.factors] if keep_values else []

    def is_of(self, low_ranks: list[LowRank]) -> bool:
        """Whether it was formed from these, at the strengths that they have."""
        return self.low_ranks == [(low_rank, low_rank.strength) for low_rank in low_ranks]

    def has_values(self) -> bool:
        """Whether every factor holds the values of then."""
        return all(torch.equal(factor[2], value) for factor, value in zip(self.factors, self.values, strict=False))

    def stands_on(self, base: Tensor) -> bool:
        """Whether the Parameters are those of then and `is_fresh`; plain code, since every read of a weight asks."""
        if base is not self.base[0]:
            return False
        for parameters, name, tensor, _, _ in self.factors:
            if parameters.get(name) is not tensor:
                return False
        return self.is_fresh()

    def is_fresh(self) -> bool:
        """Whether no Parameter was written to, or given other memory (`p.data = …`), since."""
        base, address, version = self.base
        if base._version != version or base.data_ptr() != address:
            return False
        for _, _, tensor, address, version in self.factors:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        return True


def _is_still(low_rank: LowRank) -> bool:
    """Whether calling the module twice gives the same, and does nothing else: no dropout, no hooks."""
    dropping = low_rank.training and low_rank.config.rank_dropout > 0
    hooked = low_rank._forward_pre_hooks or low_rank._forward_hooks
    parameters = all(isinstance(p, nn.Parameter) and not p.is_inference() for p in low_rank.factors().values())
    return type(low_rank) is LowRank and parameters and not (dropping or hooked)


_NOT_FORMED = _Fused.__new__(_Fused)  # a mark, without values
