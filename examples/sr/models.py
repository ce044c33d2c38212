"""Spandrel's SPAN with each `Conv3XC` collapsed to the plain 3x3 convolution it stands for, and back.

Released small SPANs (NTIRE's DSCF, for one) are collapsed; a `Conv3XC` fuses itself again at every
evaluation and would drop what an adapter adds to the fused weight. Files go back in train form,
since that is what `spandrel.ModelLoader`, and with it chaiNNer and ComfyUI, recognises.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from spandrel import ModelLoader
from spandrel.architectures.SPAN.__arch.span import SPAN, Conv3XC, conv_layer
from torch import Tensor, nn

from sr.data import Image, InputError, to_image, to_tensor

State = dict[str, Tensor]

SPAN_WEIGHTS = Path(__file__).parents[1] / "weights" / "span_x4_c26.safetensors"  # the base that examples adapt
SPAN_TARGETS = ["conv_1", "block_*.c?_r", "conv_2", "conv_cat", "upsampler.0"]  # every convolution, collapsed


def new_span(channels: int = 26, scale: int = 4, img_range: float = 255.0) -> SPAN:
    """A collapsed SPAN (Wan et al. 2023) with random weights: RGB in [0, 1] in and out.

    `img_range` multiplies the input, less its mean; 255 is what every released checkpoint assumes.
    """
    options = {"feature_channels": channels, "upscale": scale, "img_range": img_range}
    return collapse(SPAN(num_in_ch=3, num_out_ch=3, **options))


def collapse(model: SPAN) -> SPAN:
    """Put each train-form `Conv3XC` (1x1, 3x3, 1x1 plus 1x1 skip) in its fused 3x3 form, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv3XC):
            module.update_params()
            fused = module.eval_conv.requires_grad_(True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, fused)
    return model


def expand(collapsed: Mapping[str, Tensor]) -> State:
    """The train form of a collapsed SPAN's state dict: each 3x3 as the `Conv3XC` that fuses to it.

    Identity 1x1 into the first channels, the 3x3 in the first block, identity 1x1 out, skip zero:
    every product is with 0 or 1, so the fused weight is the 3x3 again. A `conv_cat` with fewer
    outputs than the network has channels is filled up with zeros, as is the upsampler's input.
    """
    state: State = {}
    channels = collapsed["conv_1.weight"].shape[0]
    for key, tensor in collapsed.items():
        layer, _, kind = key.rpartition(".")
        if layer == "conv_cat":
            state[key] = _padded(tensor, channels, 0)
        elif layer == "upsampler.0":
            state[key] = _padded(tensor, channels, 1) if kind == "weight" else tensor.clone()
        elif kind == "weight":
            state |= _expanded_conv(layer, tensor, collapsed[f"{layer}.bias"])
    return state


def _expanded_conv(layer: str, weight: Tensor, bias: Tensor, gain: int = 2) -> State:
    """One 3x3 convolution `(o, i, 3, 3)` as the tensors of a `Conv3XC` of that gain."""
    outputs, inputs = weight.shape[:2]
    into = weight.new_zeros(inputs * gain, inputs, 1, 1)
    middle = weight.new_zeros(outputs * gain, inputs * gain, 3, 3)
    out = weight.new_zeros(outputs, outputs * gain, 1, 1)
    into[:inputs, :, 0, 0] = torch.eye(inputs)
    middle[:outputs, :inputs] = weight
    out[:, :outputs, 0, 0] = torch.eye(outputs)
    parts = {
        "sk": (weight.new_zeros(outputs, inputs, 1, 1), torch.zeros_like(bias)),
        "conv.0": (into, weight.new_zeros(inputs * gain)),
        "conv.1": (middle, torch.cat([bias, bias.new_zeros(outputs * (gain - 1))])),
        "conv.2": (out, torch.zeros_like(bias)),
        "eval_conv": (weight.clone(), bias.clone()),
    }
    return {
        f"{layer}.{part}.{kind}": tensor
        for part, pair in parts.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """The tensor with zeros after it along `dim`, up to `size`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def read_state(path: Path) -> State:
    """The tensors of a `.safetensors` or `.pth` file.

    Raises:
        InputError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise InputError(f"base {path}: no such file")
    try:
        return ModelLoader().load_state_dict_from_file(path)
    except Exception as error:
        raise InputError(f"base {path}: cannot be read ({type(error).__name__}: {error})") from None


def equal_states(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order, and the same values."""
    return list(state) == list(other) and all(torch.equal(state[key], value) for key, value in other.items())


def load_span(path: Path) -> tuple[SPAN, int]:
    """A SPAN of any width from a `.safetensors` or `.pth` file, collapsed, and its scale.

    Takes train-form checkpoints (everything spandrel's loader takes), collapsed ones, and those
    with their fused weights under `eval_conv`.

    Raises:
        InputError: no such file, or not a SPAN.
    """
    state = read_state(path)
    try:
        if any(".sk." in key for key in state):
            descriptor = ModelLoader().load_from_state_dict(state)
            if not isinstance(descriptor.model, SPAN):
                raise InputError(f"base {path}: a {descriptor.architecture.name}, not a SPAN")
            return collapse(descriptor.model), descriptor.scale
        return _load_collapsed(state)
    except (KeyError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"base {path}: not a SPAN checkpoint ({reason})") from None


def _load_collapsed(state: State) -> tuple[SPAN, int]:
    state = {key.replace(".eval_conv.", "."): value.float() for key, value in state.items()}
    channels, joined = state["conv_1.weight"].shape[0], state["conv_cat.weight"].shape[0]
    scale = math.isqrt(state["upsampler.0.weight"].shape[0] // 3)
    model = new_span(channels, scale)
    if joined != channels:  # NTIRE's 28-channel SPAN joins its features into 20
        model.conv_cat = conv_layer(channels * 4, joined, kernel_size=1)
        model.upsampler[0] = conv_layer(joined, 3 * scale**2, kernel_size=3)
    model.load_state_dict(state)
    return model, scale


def save_span(model: SPAN, path: Path) -> None:
    """Write a collapsed SPAN in train form, so that `spandrel.ModelLoader` loads it."""
    save_weights(expand(model.state_dict()), path, {"architecture": "SPAN, Conv3XC in train form"})


def save_weights(state: State, path: Path, facts: Mapping[str, object]) -> None:
    """Write tensors as safetensors, whole or not at all; `facts` go into its metadata as JSON."""
    beside = path.with_name(path.name + ".part")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = {"format": "pt", "provenance": json.dumps(facts, sort_keys=True)}
    beside.write_bytes(save(tensors, metadata=metadata))
    os.replace(beside, path)


def provenance(path: Path) -> dict[str, object]:
    """The facts that `save_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("provenance", "{}"))


@torch.no_grad()
def predict(model: nn.Module, low: Image) -> Tensor:
    """The network's output `(1, 3, h·scale, w·scale)` for one photo, in eval mode, on the CPU."""
    device = next(model.parameters()).device
    return model.eval()(to_tensor(low).to(device)).cpu()


def upscale(model: nn.Module, low: Image) -> Image:
    """The same as a uint8 photo."""
    return to_image(predict(model, low))
