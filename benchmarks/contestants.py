"""The ways to train a network that benchmarks compare: each takes a network and the names of its layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import loralib
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import convlora


def floor(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    return model.requires_grad_(False)


def full(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return model


def one_of(names: list[str]) -> str:
    """Names as one regular expression: compared one by one, those of a large network take minutes."""
    return "|".join(map(re.escape, names))


def peft(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=one_of(names)), model)


def lycoris(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    LycorisNetwork.apply_preset({"target_module": [], "target_name": [f"(?:{one_of(names)})$"], "enable_conv": True})
    network = create_lycoris(
        model, 1.0, linear_dim=rank, linear_alpha=rank, conv_dim=rank, conv_alpha=rank, algo="lora"
    )
    network.apply_to()
    model.register_module("lycoris", network)
    return model


def lora(model: nn.Module, names: list[str], rank: int) -> nn.Module:
    """Microsoft's loralib, whose layers take the place of those of the net."""
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        has_bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            new = loralib.Linear(layer.in_features, layer.out_features, r=rank, lora_alpha=rank, bias=has_bias)
        else:
            new = loralib.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size[0], r=rank, lora_alpha=rank, bias=has_bias,
                stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
            )  # fmt: skip
        for parameter in new.parameters():
            parameter.requires_grad_(False)
        for part, parameter in new.named_parameters():
            parameter.requires_grad_("lora_" in part)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    return model


def ours(factors: str) -> Callable[[nn.Module, list[str], int], nn.Module]:
    def put(model: nn.Module, names: list[str], rank: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", convlora.ConvLoRAWarning)  # depthwise: more parameters than the layer
            return convlora.inject(model, f"re:{one_of(names)}", rank=rank, factors=factors)

    return put
