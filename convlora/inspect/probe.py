"""The gradient of a loss with respect to the update of each layer, from a model that is left as it was.

A probe takes the place of the adapter that is to come: an adapter whose update is zero, and whose gradient is asked
for. So gradients are those that factors would be given, for tied Parameters, layers that are used twice, computed
weights (weight norm), code that reads `.weight` itself and half precision; no flag and no `.grad` of the base is
touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.factors.fuse import is_finite
from convlora.inspect.restored import restored
from convlora.layer.adapted import adapt, peek_base_tensor, release, weight_spec
from convlora.layer.lowrank import LowRank
from convlora.model.inject import check_adaptable


class _Probe(LowRank):
    zero: Tensor

    def arm(self) -> Tensor:
        """A new zero for the next batch. It has one element in memory."""
        zero = torch.zeros((), dtype=torch.float32, device=self._gain.device)
        self.zero = zero.expand(self.spec.shape).requires_grad_()
        return self.zero

    def forward(
        self,
        kind: str = "weight",
        dropout: bool | Tensor | None = True,
        strength: float | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        return self.zero


@contextlib.contextmanager
def _probing(layers: Mapping[str, nn.Module], config: AdapterConfig) -> Iterator[dict[str, _Probe]]:
    probes: dict[str, _Probe] = {}
    try:
        for path, layer in layers.items():
            check_adaptable(path, layer, config.name)
            probe = _Probe(
                config, weight_spec(layer), rank=1, alpha=1.0, device=peek_base_tensor(layer, "weight").device
            )
            adapt(layer, config.name, probe)
            probes[path] = probe
        yield probes
    finally:
        for path in probes:
            release(layers[path], config.name)


def measure_gradients(
    root: nn.Module,
    layers: Mapping[str, nn.Module],
    config: AdapterConfig,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, tuple[Tensor, float]]:
    """Layer name -> sums over the batches of the gradient, as the layer stores its weight, and of its squared norm.

    The probes are adapters of this config, so its name is that of the operation. Torch's state of random numbers and
    the model come back as they were, except for Parameters that the loss writes to in place.

    Raises:
        ConvLoRAError: no batch; a loss that is no finite scalar; a gradient that is not finite, or zero everywhere.
    """
    devices = sorted({p.device.index for p in root.parameters() if p.device.type == "cuda"})
    sums = {path: (torch.zeros(()), 0.0) for path in layers}
    number = 0
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        restored(root, parameter_values=False),
        _probing(layers, config) as probes,
    ):
        for number, batch in enumerate(batches, 1):
            zeros = [probe.arm() for probe in probes.values()]
            value = loss(root, batch)
            _check_loss(value, number, config.name)
            gradients = torch.autograd.grad(value, zeros, allow_unused=True)
            for path, gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    total, power = sums[path]
                    sums[path] = total + gradient, power + float(gradient.double().square().sum())
    if not number:
        raise ConvLoRAError(f"{config.name}: batches is empty; give at least one (an iterator can be used only once)")
    for path, (total, power) in sums.items():
        if not (math.isfinite(power) and is_finite(total)):
            raise ConvLoRAError(f"{config.name}: the gradient of '{path}' is not finite; scale the loss down")
    if not any(power for _, power in sums.values()):
        raise ConvLoRAError(f"{config.name}: the loss has no gradient in any of the {len(layers)} selected layers")
    return sums


def _check_loss(value: Any, number: int, operation: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConvLoRAError(f"{operation}: loss must return a scalar tensor of floating point, got {got}")
    if not value.requires_grad:
        raise ConvLoRAError(f"{operation}: the loss has no gradient; it must come from the model, without no_grad")
    if not math.isfinite(value.item()):
        raise ConvLoRAError(f"{operation}: the loss of batch {number} is {value.item()}; it must be finite")
