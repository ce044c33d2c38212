"""`LowRank`: the factors of one adapter on one layer, as a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.factors.base import (
    Factorization,
    WeightSpec,
    gains_of,
    get_factors,
    needs_weight,
    start_factors,
    update_of,
)
from convlora.layer.again import forming_again, forms_again
from convlora.layer.loading import AdapterTensors
from convlora.layer.sharded import full_tensor, sharded_like

SCALE = "lora_scale"  # beside the factors in a full checkpoint
_SAME_SCALE = 0.01  # relative: a checkpoint may have been cast to bfloat16, or averaged


class LowRank(AdapterTensors):
    """The factors of one adapter on one layer; calling it gives the scaled update of `weight` or `bias`.

    `base`: the layer's weight without adapters, where the factorization needs it to start (of a shard, the whole one).
    """

    _gain: Tensor
    _scale: Tensor
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
        base: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.rank, self.alpha = config, spec, rank, alpha
        self._factors = config.factors  # apart: a graph of PyTorch 2.7 stands on every field of a config that it reads
        self.strength = 1.0
        self._has_bias = bias  # plain attributes: asked at every read of a bias or weight
        self.needs_weight = needs_weight(self.factorization)
        self._forms_again = bool(getattr(self.factorization, "forms_again", False))
        given = factors or {}
        self._tensors = tuple(self.factorization.shapes(spec, rank))
        for name, shape in self.factorization.shapes(spec, rank).items():
            self._parameters[name] = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self._parameters["lora_bias"] = (
            nn.Parameter(torch.zeros(spec.out_channels, dtype=torch.float32, device=device)) if bias else None
        )
        # Compiled models take the scale as a tensor, so that neither another strength nor another alpha recompiles.
        gain = torch.empty((), dtype=torch.float32, device=device)
        self.register_buffer("_gain", gain, persistent=False)
        self.register_buffer("_scale", gain.clone(), persistent=False)
        self.register_buffer("_bias_gain", gain.clone() if bias else None, persistent=False)
        self.register_buffer(SCALE, None)
        if given:
            self.copy_(given)
        elif device.type != "meta":
            self.reset_parameters(base)
        self.set_strength(1.0)
        self._state_scale()

    @property
    def factorization(self) -> Factorization:
        return get_factors(self._factors)

    def updates(self, kind: str) -> bool:
        """Whether it has an update of the weight, or of the bias."""
        return kind == "weight" or self._has_bias

    def drops(self) -> bool:
        """Whether calling it drops rank components, other ones each time."""
        return self.training and self.config.rank_dropout > 0

    @property
    def scale(self) -> float:
        return self.config.scale(self.rank, self.alpha)

    def factors(self) -> dict[str, Tensor]:
        """Tensor name -> parameter, `lora_bias` included where there is one."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def reset_parameters(self, base: Tensor | None = None) -> None:
        """Start again from ΔW = 0. Factors that depend on a weight without values yet (None) start once it has some."""
        if self.needs_weight and base is None:
            device = getattr(self, self._tensors[0]).device
            base = torch.full(self.spec.shape, torch.nan, device=device)
        factors: dict[str, Tensor] = {name: self._parameters[name] for name in self._tensors}  # type: ignore[misc]
        with torch.no_grad():
            start_factors(self.factorization, factors, self.config.init, self.spec, base)
            if self.lora_bias is not None:
                self.lora_bias.zero_()

    def is_at_start(self, base: Tensor) -> bool:
        """Whether factors that depend on a base weight change nothing yet, or have not started for want of one."""
        with torch.no_grad():
            change = self(dropout=False, strength=1.0, base=base)
        return not bool(change.any()) or bool(change.isnan().any())

    def copy_(self, factors: Mapping[str, Tensor]) -> None:
        """Take the values of other factors of the same shapes, in place."""
        with torch.no_grad():
            for name, parameter in self.factors().items():
                parameter.copy_(sharded_like(factors[name], parameter))

    def configure(self, config: AdapterConfig, alpha: float) -> None:
        """Become the adapter of another file with the same shapes."""
        self.config, self.alpha = config, alpha
        self.set_strength(self.strength)
        self._state_scale()

    def _gains(self, strength: float) -> tuple[float, float]:
        return gains_of(self.scale, strength, self.needs_weight)

    def set_strength(self, strength: float) -> None:
        self.strength = strength
        with torch.no_grad():
            outside, inside = self._gains(strength)
            self._gain.fill_(outside)
            self._scale.fill_(inside)
            if self._bias_gain is not None:
                self._bias_gain.fill_(strength)

    def _state_scale(self) -> None:
        """Have the scale as a buffer, for checkpoints alone: the same factors at another scale are another update."""
        device = getattr(self, self._tensors[0]).device
        with torch.inference_mode(False):  # a new one: `load_state_dict(assign=True)` brings the checkpoint's own
            self._buffers[SCALE] = torch.full((), self.scale, dtype=torch.float32, device=device)

    def _mask(self) -> Tensor:
        """Which rank components a call keeps, drawn anew, each weighed so that the mean stays: `(rank,)`."""
        p = self.config.rank_dropout
        kept = torch.rand(self.rank, dtype=torch.float32, device=self._gain.device) >= p
        return kept.to(self._gain.dtype) / (1 - p)

    def forward(
        self,
        kind: str = "weight",
        dropout: bool | Tensor | None = True,
        strength: float | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """The update at its strength, or at the one given. `dropout` may be a `mask` to use; `base` is for factors that
        need the base weight."""
        # A compiled graph takes strength and scale from tensors and reads no number that a hot swap changes.
        as_tensor = strength is None and torch.compiler.is_compiling()
        if strength is None and not as_tensor:
            strength = self.strength
        if kind == "bias":
            assert self.lora_bias is not None
            assert self._bias_gain is not None
            return self.lora_bias * (self._bias_gain if strength is None else strength)
        factors = {name: getattr(self, name) for name in self._tensors}  # no parameters in DataParallel's replicas
        if isinstance(dropout, Tensor) or (dropout and self.drops()):
            keep = dropout if isinstance(dropout, Tensor) else self._mask()
            factors = self.factorization.drop(factors, keep)
        # Eager ones take the number: a backward that comes after another `activate` must not find the tensor changed.
        outside, inside = (self._gain, self._scale) if strength is None else self._gains(strength)
        if not self._forms_again or torch.compiler.is_compiling() or not forms_again():
            return update_of(self.factorization, factors, self.spec, inside, base) * outside

        def form(*tensors: Tensor) -> Tensor:
            weight = tensors[-1] if self.needs_weight else None
            given = dict(zip(factors, tensors, strict=False))
            return update_of(self.factorization, given, self.spec, inside, weight)

        tensors = [*factors.values(), *([base] if self.needs_weight and base is not None else [])]
        return forming_again(form, *tensors) * outside

    def in_float64(self, kind: str, base: Tensor | None = None) -> Tensor:
        """The scaled update of `weight` or `bias`, computed in float64 and without dropout."""
        wide = {name: p.double() for name, p in self.factors().items()}
        if kind == "bias":
            return wide["lora_bias"] * self.strength
        weight = base.double() if self.needs_weight and base is not None else None
        outside, inside = self._gains(self.strength)
        return update_of(self.factorization, wide, self.spec, inside, weight) * outside

    def tensor_names(self) -> Iterable[str]:
        return self.factors()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Note beside the tensors what they do not tell of the weight, for `Adapter.from_state_dict`."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix[:-1] in (noted := getattr(destination, "_metadata", {})):
            noted[prefix[:-1]].update(groups=self.spec.groups, transposed=self.spec.transposed)

    def follow(self) -> None:
        """Bring the scale to the device of the factors, which `load_state_dict(assign=True)` may have changed."""
        device = getattr(self, self._tensors[0]).device
        if self._gain.device != device:
            self._gain = torch.empty_like(self._gain, device=device)
            self._scale = torch.empty_like(self._scale, device=device)
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
        self._state_scale()
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
        """As all modules do, but factors at another scale are an error; a checkpoint that states none passes."""
        key = prefix + SCALE
        if (stated := _number(state_dict.get(key))) is not None and not self._is_scale(stated):
            alpha = stated * self.rank / self.config.scale(self.rank, self.rank)
            error_msgs.append(
                f"{prefix.removesuffix('.')}: the checkpoint's adapter has scale {stated:g}, the model's {self.scale:g}"
                f" (alpha {self.alpha:g}, rank {self.rank}, {self.config.rank_scaling}); inject with alpha={alpha:g}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)
        self._state_scale()

    def _is_scale(self, stated: float) -> bool:
        return math.isclose(stated, self.scale, rel_tol=_SAME_SCALE, abs_tol=1e-30)


def _number(value: Any) -> float | None:
    """The number in a tensor that has one, of a checkpoint; None for anything else."""
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_meta or type(value).__name__ == "FakeTensor":
        return None
    return float(full_tensor(value))
