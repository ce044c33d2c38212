"""`Adapter`: the factors of one adapter without a model."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convlora.config import AdapterConfig, is_number
from convlora.conv import fuse, is_finite
from convlora.errors import ConvLoRAError, Problems
from convlora.factors import WeightSpec, get_factors

BIAS = "lora_bias"


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer.

    Args:
        tensors: tensor name (`lora_A`, `lora_B`, …) -> values; `lora_bias` `(out,)` where a bias delta was trained.
        spec: the weight that they update.
        rank: number of rank components.
        alpha: numerator of the scale.
        aliases: further paths of the same module, for a module that the model holds at several places.
    """

    tensors: Mapping[str, Tensor]
    spec: WeightSpec
    rank: int
    alpha: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Adapter:
    """The factors of one adapter as a value: no model, no architecture needed.

    Args:
        config: what was adapted and how big.
        layers: layer path -> `LayerFactors`.
        fingerprint: of the base weights that were adapted, if known.

    Raises:
        ConvLoRAError: tensors are missing, unexpected, of other shapes than config and spec say, or non-finite.
            All are listed.

    Example:
        >>> import torch, convlora
        >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> adapter = convlora.adapter(model)
        >>> list(adapter.layers), tuple(adapter.delta("0").shape)
        (['0'], (8, 3, 3, 3))
    """

    config: AdapterConfig
    layers: Mapping[str, LayerFactors]
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        factorization = get_factors(self.config.factors)
        if not self.layers:
            raise ConvLoRAError("Adapter: it has no layer")
        if self.config.init not in factorization.inits:
            raise ConvLoRAError(f"Adapter: {self.config.factors!r} has no init {self.config.init!r}")
        for path, layer in self.layers.items():
            if type(layer.rank) is not int or layer.rank < 1 or not is_number(layer.alpha):
                raise ConvLoRAError(f"Adapter: {path!r} has rank {layer.rank!r}, alpha {layer.alpha!r}")
            shapes = factorization.shapes(layer.spec, layer.rank)
            problems.missing += [key(path, name) for name in shapes if name not in layer.tensors]
            for name, tensor in layer.tensors.items():
                shape = (layer.spec.out_channels,) if name == BIAS else shapes.get(name)
                if shape is None:
                    problems.unexpected.append(key(path, name))
                elif tuple(tensor.shape) != shape:
                    problems.mismatched.append(f"{key(path, name)} {tuple(tensor.shape)} instead of {shape}")
                elif not tensor.is_floating_point():
                    problems.mismatched.append(f"{key(path, name)} {tensor.dtype} instead of floating point")
                elif not is_finite(tensor.to(torch.float32)):
                    problems.non_finite.append(key(path, name))
        problems.raise_if_any("Adapter")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read an adapter file; never unpickles.

        Raises:
            ConvLoRAError: no such file, or one that is truncated, altered, foreign, of a newer format version, or
                holds non-finite values.

        Example:
            >>> import tempfile, torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = convlora.save(model, f"{folder}/rain.safetensors")
            ...     Adapter.read(f"{folder}/rain.safetensors").config.rank
            2
        """
        from convlora.formats import native  # the formats build on this file

        return native.read(path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write an adapter file, atomically: a crash leaves the old file or the new one.

        Raises:
            ConvLoRAError: the file cannot be written there.

        Example:
            >>> import tempfile, torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     convlora.adapter(model).to(torch.float16).write(f"{folder}/rain.safetensors")
        """
        from convlora.formats import native

        native.write(self, path)

    def to(self, dtype: torch.dtype) -> Adapter:
        """The adapter with its tensors in another floating dtype.

        Raises:
            ConvLoRAError: not a floating dtype, or values overflow in it.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> convlora.adapter(model).to(torch.bfloat16).layers["0"].tensors["lora_A"].dtype
            torch.bfloat16
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConvLoRAError(f"Adapter.to: dtype (={dtype}) must be a floating point dtype")
        if dtype.itemsize < 2:
            raise ConvLoRAError(f"Adapter.to: {dtype} is too narrow for factors; use float16 or bfloat16")
        if all(t.dtype == dtype for layer in self.layers.values() for t in layer.tensors.values()):
            return self
        cast = {
            path: LayerFactors(
                {name: t.to(dtype) for name, t in layer.tensors.items()},
                layer.spec, layer.rank, layer.alpha, layer.aliases,
            )
            for path, layer in self.layers.items()
        }  # fmt: skip
        return Adapter(self.config, cast, self.fingerprint)

    def delta(self, layer: str) -> Tensor:
        """ΔW of a layer with its scale, float32 (float64 for float64 factors), shaped as the layer's weight.

        Raises:
            ConvLoRAError: the adapter has no such layer.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> convlora.adapter(model).delta("0").abs().max().item()  # B starts at zero
            0.0
        """
        if layer not in self.layers:
            known = ", ".join(repr(path) for path in self.layers)
            raise ConvLoRAError(f"Adapter.delta: no layer {layer!r}; the adapter has {known}")
        return self._update(self.layers[layer], 1.0)

    def _update(self, layer: LayerFactors, strength: float) -> Tensor:
        wide = {name: _wide(t) for name, t in layer.tensors.items()}
        delta = layer.spec.from_convolution(get_factors(self.config.factors).delta(wide, layer.spec))
        return delta * (strength * self.config.scale(layer.rank, layer.alpha))

    def apply_to(self, state_dict: Mapping[str, Any], strength: float = 1.0) -> dict[str, Any]:
        """A checkpoint with the adapter merged in: key order, dtypes and all other entries stay.

        The values are bitwise those that `convlora.merge` computes. The given state dict is not changed.

        Raises:
            ConvLoRAError: weights are missing or of other shapes; all are listed.

        Example:
            >>> import torch, convlora
            >>> base = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> merged = convlora.adapter(model).apply_to(base.state_dict(), strength=0.5)
            >>> list(merged)
            ['0.weight', '0.bias']
        """
        if not isinstance(state_dict, Mapping):
            raise ConvLoRAError(f"Adapter.apply_to: expected a state dict, got {type(state_dict).__name__}")
        if not is_number(strength):
            raise ConvLoRAError(f"Adapter.apply_to: strength (={strength!r}) must be a finite number")
        problems = Problems()
        merged: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            for kind in ("weight", "bias") if BIAS in layer.tensors else ("weight",):
                name = key(path, kind)
                shape = layer.spec.shape if kind == "weight" else (layer.spec.out_channels,)
                base = state_dict.get(name)
                if not isinstance(base, Tensor):
                    problems.missing.append(name)
                elif tuple(base.shape) != shape:
                    problems.mismatched.append(f"{name} {tuple(base.shape)} instead of {shape}")
                elif not base.is_floating_point() or base.element_size() < 2:
                    problems.mismatched.append(f"{name} {base.dtype} instead of floating point of at least 16 bits")
                elif not problems:
                    bias = layer.tensors.get(BIAS)
                    update = self._update(layer, strength) if kind == "weight" else _wide(bias) * strength  # type: ignore[arg-type]
                    merged[name] = fuse(base.detach(), [update.to(base.device)])
                    merged.update({key(alias, kind): merged[name] for alias in layer.aliases})
                    if not is_finite(merged[name]):
                        problems.non_finite.append(name)
        problems.raise_if_any("Adapter.apply_to")
        result = OrderedDict((name, merged.get(name, value)) for name, value in state_dict.items())
        if hasattr(state_dict, "_metadata"):  # the versions of torch's modules
            result._metadata = state_dict._metadata  # type: ignore[attr-defined]
        return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def key(path: str, name: str) -> str:
    """`<layer path>.<name>`; the model itself has the empty path.

    Example:
        >>> key("body.0", "lora_A"), key("", "weight")
        ('body.0.lora_A', 'weight')
    """
    return f"{path}.{name}" if path else name
