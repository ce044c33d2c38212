"""The adapters of one layer: `LowRank`, one adapter's factors, and `Slot`, all of them and which act."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.conv import fuse
from convlora.factors import Factorization, WeightSpec, get_factors


class LowRank(nn.Module):
    """The factors of one adapter on one layer; calling it gives the scaled update of `weight` or `bias`."""

    _gain: Tensor
    _bias_gain: Tensor | None
    lora_bias: Tensor | None

    def __init__(
        self,
        config: AdapterConfig,
        spec: WeightSpec,
        *,
        rank: int,
        alpha: float,
        device: torch.device,
        factors: Mapping[str, Tensor] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.rank, self.alpha = config, spec, rank, alpha
        self.strength = 1.0
        self._has_bias = bias  # a plain attribute: asked at every read of a bias
        given = factors or {}
        self._tensors = tuple(self.factorization.shapes(spec, rank))
        for name, shape in self.factorization.shapes(spec, rank).items():
            self._parameters[name] = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self._parameters["lora_bias"] = (
            nn.Parameter(torch.zeros(spec.out_channels, dtype=torch.float32, device=device)) if bias else None
        )
        # The scale is a tensor so that neither another strength nor another alpha recompiles a compiled model.
        gain = torch.empty((), dtype=torch.float32, device=device)
        self.register_buffer("_gain", gain, persistent=False)
        self.register_buffer("_bias_gain", gain.clone() if bias else None, persistent=False)
        if given:
            self.copy_(given)
        elif device.type != "meta":
            self.reset_parameters()
        self.set_strength(1.0)

    @property
    def factorization(self) -> Factorization:
        return get_factors(self.config.factors)

    @property
    def scale(self) -> float:
        return self.config.scale(self.rank, self.alpha)

    def factors(self) -> dict[str, Tensor]:
        """Tensor name -> parameter, `lora_bias` included where there is one."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def reset_parameters(self) -> None:
        """Start again from ΔW = 0."""
        with torch.no_grad():
            self.factorization.init_({name: self._parameters[name] for name in self._tensors}, self.config.init)  # type: ignore[misc]
            if self.lora_bias is not None:
                self.lora_bias.zero_()

    def copy_(self, factors: Mapping[str, Tensor]) -> None:
        """Take the values of other factors of the same shapes, in place."""
        with torch.no_grad():
            for name, parameter in self.factors().items():
                parameter.copy_(factors[name])

    def configure(self, config: AdapterConfig, alpha: float) -> None:
        """Become the adapter of another file with the same shapes."""
        self.config, self.alpha = config, alpha
        self.set_strength(self.strength)

    def set_strength(self, strength: float) -> None:
        self.strength = strength
        with torch.no_grad():
            self._gain.fill_(strength * self.scale)
            if self._bias_gain is not None:
                self._bias_gain.fill_(strength)

    def forward(self, kind: str = "weight", dropout: bool = True) -> Tensor:
        if kind == "bias":
            assert self.lora_bias is not None
            assert self._bias_gain is not None
            return self.lora_bias * self._bias_gain
        factors = {name: getattr(self, name) for name in self._tensors}  # no parameters in DataParallel's replicas
        p = self.config.rank_dropout
        if self.training and p > 0 and dropout:
            kept = torch.rand(self.rank, dtype=torch.float32, device=self._gain.device) >= p
            keep = kept.to(self._gain.dtype) / (1 - p)
            factors = self.factorization.drop(factors, keep)
        return self.spec.from_convolution(self.factorization.delta(factors, self.spec)) * self._gain

    def _follow(self) -> None:
        """Bring the scale to the device of the factors, which `load_state_dict(assign=True)` may have changed."""
        device = getattr(self, self._tensors[0]).device
        if self._gain.device != device:
            self._gain = torch.empty_like(self._gain, device=device)
            if self._bias_gain is not None:
                self._bias_gain = torch.empty_like(self._bias_gain, device=device)
            self.set_strength(self.strength)

    def extra_repr(self) -> str:
        return f"{self.config.factors}, rank={self.rank}, scale={self.scale:g}, strength={self.strength:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved

        was_meta = self._gain.is_meta
        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self._gain.is_meta:  # memory without values: start as a new adapter does
            self.reset_parameters()
        self.set_strength(self.strength)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loading a base checkpoint passes over the adapter; a checkpoint with half an adapter is reported."""
        own = [prefix + name for name in self.factors()]
        passed_over = _loading.of(missing_keys).setdefault(self.config.name, ([], []))
        found, absent = passed_over
        if any(key in state_dict for key in own):
            found.append(prefix)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self._follow()
        else:
            absent.extend(own)
        if found:  # other layers of this adapter are in the checkpoint: then these should be, too
            missing_keys.extend(absent)
            absent.clear()


class _Loading(threading.local):
    """What the running `load_state_dict` call has found of each adapter.

    A call is recognised by its `missing_keys` list, which every module it visits is handed.
    """

    missing_keys: list[str] | None = None
    adapters: dict[str, tuple[list[str], list[str]]]

    def of(self, missing_keys: list[str]) -> dict[str, tuple[list[str], list[str]]]:
        if self.missing_keys is not missing_keys:
            self.missing_keys, self.adapters = missing_keys, {}
        return self.adapters


_loading = _Loading()


class Slot(nn.Module):
    """The adapters of one layer, which of them act, and the fused weight while merged.

    Invariant: a fused tensor is used only while every tensor it was formed from is the same object at the same
    version; otherwise it is formed again. It lives beside the base weight, which merging never touches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged = False
        self._before_merge: dict[str, float] | None = None
        self._fused: dict[str, _Fused | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": {}}

    def low_rank(self, name: str) -> LowRank:
        return self._modules[name]  # type: ignore[return-value]

    def names(self) -> list[str]:
        return list(self._modules)

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Let the named adapters act, those that this layer has."""
        self.active = tuple(name for name in self._modules if strengths.get(name))
        for name in self.active:
            self.low_rank(name).set_strength(strengths[name])
        self._before_merge = None
        self._fused.clear()

    def strengths(self) -> dict[str, float]:
        return {name: self.low_rank(name).strength for name in self.active}

    def merge(self, strengths: Mapping[str, float] | None) -> None:
        """Use one fused weight, of the active adapters or of others until `unmerge`."""
        before = self.strengths() if self._before_merge is None else self._before_merge
        if strengths is not None:
            self.activate(strengths)
            self._before_merge = before
        self.merged = True

    def unmerge(self) -> None:
        self.merged = False
        if self._before_merge is not None:
            self.activate(self._before_merge)
        self._fused.clear()

    def state(self) -> tuple[dict[str, float], bool, dict[str, float] | None]:
        return self.strengths(), self.merged, self._before_merge

    def restore(self, state: tuple[dict[str, float], bool, dict[str, float] | None]) -> None:
        strengths, self.merged, before = state
        self.activate(strengths)
        self._before_merge = before

    def effective(self, base: Tensor, kind: str) -> Tensor:
        """The base weight or bias with the active adapters; `base` itself if none acts on it."""
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
            return self._compose(base, kind, acting)
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
        # outlive them, and inference tensors keep no version.
        if not all(isinstance(tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors):
            with torch.inference_mode(False), torch.no_grad():
                return self._compose(base, kind, acting)
        # Entering inference_mode(False) switches gradients on: no_grad comes after it.
        with torch.inference_mode(False), torch.no_grad():
            fused = self._compose(base, kind, acting)
        self._fused[kind] = _Fused(fused, base, [self.low_rank(name) for name in acting])
        return fused

    def swap(self, name: str, factors: Mapping[str, Tensor], config: AdapterConfig, alpha: float) -> None:
        """Make an adapter that of another file with the same shapes, in place."""
        self.low_rank(name).copy_(factors)
        self.low_rank(name).configure(config, alpha)
        self._fused.clear()

    def _compose(self, base: Tensor, kind: str, acting: list[str]) -> Tensor:
        # Called as modules, so that hooks (FSDP2 unshards in one) run.
        device = base.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return fuse(base, [self._modules[name](kind, not self.merged) for name in acting])  # type: ignore[misc]
        return fuse(base, [self._modules[name](kind, not self.merged) for name in acting])  # type: ignore[misc]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._fused.clear()
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        self._fused.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Fused:
    """A fused weight or bias, and what it was formed from: Parameters, each at an address and a version."""

    __slots__ = ("base", "factors", "value")

    def __init__(self, value: Tensor, base: Tensor, low_ranks: list[LowRank]) -> None:
        self.value = value
        self.base = base, base.data_ptr(), base._version
        self.factors = [
            (low_rank._parameters, name, tensor, tensor.data_ptr(), tensor._version)
            for low_rank in low_ranks
            for name, tensor in low_rank.factors().items()
        ]

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


_NOT_FORMED = _Fused.__new__(_Fused)  # a mark, without values
