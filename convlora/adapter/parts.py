"""What an adapter consists of, as plain data, and what follows from it for one layer."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convlora.config import AdapterConfig, Strength, is_number, strengths_by_layer
from convlora.errors import ConvLoRAError, Problems
from convlora.factors.base import PROJECTIONS, WeightSpec, gains_of, get_factors, needs_weight, update_of
from convlora.factors.fuse import is_finite

BIAS_DELTA = "lora_bias"


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
class AdapterParts:
    """The data of an `Adapter`, checked; for its arguments see there. What works on it gives the class it was given."""

    config: AdapterConfig
    layers: Mapping[str, LayerFactors]
    fingerprint: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

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
            problems.missing += [tensor_key(path, name) for name in shapes if name not in layer.tensors]
            for name, tensor in layer.tensors.items():
                shape = (layer.spec.out_channels,) if name == BIAS_DELTA else shapes.get(name)
                if shape is None:
                    problems.unexpected.append(tensor_key(path, name))
                elif tuple(tensor.shape) != shape:
                    problems.mismatched.append(f"{tensor_key(path, name)} {tuple(tensor.shape)} instead of {shape}")
                elif not tensor.is_floating_point():
                    problems.mismatched.append(f"{tensor_key(path, name)} {tensor.dtype} instead of floating point")
                elif not is_finite(tensor.to(torch.float32)):
                    problems.non_finite.append(tensor_key(path, name))
        for path, tensors in self.modules.items():
            if path in self.layers:
                problems.mismatched.append(f"{path} has factors and copies")
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not is_finite(tensor.to(torch.float32)):
                    problems.non_finite.append(tensor_key(path, name))
        problems.raise_if_any("Adapter")


def strengths_of(adapter: AdapterParts, strength: Strength, operation: str, what: str = "strength") -> dict[str, float]:
    """Path -> strength, of all layers and copied modules; see `strengths_by_layer`."""
    return strengths_by_layer(strength, dict.fromkeys([*adapter.layers, *adapter.modules]), operation, what)


def layer_delta(
    config: AdapterConfig, layer: LayerFactors, strength: float, exact: bool = False, base: Tensor | None = None
) -> Tensor:
    """ΔW of a layer with its scale and a strength, in the computation and the order of an adapted layer.

    `base`: the base weight, for factors that depend on it.
    """
    delta, gain = delta_and_gain(config, layer, strength, exact, base)
    return delta * gain


def delta_and_gain(
    config: AdapterConfig, layer: LayerFactors, strength: float, exact: bool = False, base: Tensor | None = None
) -> tuple[Tensor, float]:
    """What `layer_delta` multiplies."""
    factors = {name: t.double() if exact else at_least_float32(t) for name, t in layer.tensors.items()}
    factorization = get_factors(config.factors)
    scale = config.scale(layer.rank, layer.alpha)
    outside, inside = gains_of(scale, strength, needs_weight(factorization))
    weight = base.detach().double() if base is not None and exact else base
    return update_of(factorization, factors, layer.spec, inside, weight), outside


def refuse_weight(factors: str, operation: str) -> None:
    """Refuse what needs an update that is the same on every base.

    Raises:
        ConvLoRAError: the factorization's update depends on the base weight.
    """
    if needs_weight(get_factors(factors)):
        raise ConvLoRAError(
            f"{operation}: the update of {factors!r} factors depends on the base's weights, which are not at hand;"
            " Adapter.apply_to gives merged ones, and Adapter.extract(base, merged) their difference as an adapter"
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def is_statistic(name: str) -> bool:
    """Whether PyTorch names running statistics, or their counter, like this.

    Example:
        >>> is_statistic("running_mean"), is_statistic("weight")
        (True, False)
    """
    return name.startswith(("running_", "num_batches_tracked"))


def tensor_key(path: str, name: str) -> str:
    """`<layer path>.<name>`; the model itself has the empty path.

    Example:
        >>> tensor_key("body.0", "lora_A"), tensor_key("", "weight")
        ('body.0.lora_A', 'weight')
    """
    return f"{path}.{name}" if path else name


def base_key(path: str, kind: str, state_dict: Container[str], spec: WeightSpec | None = None) -> str:
    """The name that the weight or bias of a layer has, or would have, in a checkpoint.

    Example:
        >>> base_key("body.0", "weight", {}), base_key("attn.in_proj", "bias", {"attn.in_proj_bias": ...})
        ('body.0.weight', 'attn.in_proj_bias')
    """
    names = base_keys(path, kind, spec)
    return next((name for name in names if name in state_dict), names[0])


def base_keys(path: str, kind: str, spec: WeightSpec | None = None) -> list[str]:
    """The names that the weight or bias of a layer can have in a checkpoint: two for a projection of attention.

    Example:
        >>> base_keys("body.0", "weight"), base_keys("attn.in_proj", "weight")
        (['body.0.weight'], ['attn.in_proj.weight', 'attn.in_proj_weight'])
    """
    names = [tensor_key(path, kind)]
    if path.rpartition(".")[2] in PROJECTIONS:
        names.insert(0 if spec is not None and spec.in_parent else 1, f"{path}_{kind}")
    return names
