"""SPAN, SwinIR and RRDBNet that enlarge like bicubic interpolation before any training, every layer of them heard.

Three feature channels carry the image itself past the body and out of the network; the others start random and end in
zeros, so that training only adds detail.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SPAN.__arch.span import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn

# An image sharpened by the taps (a, 1 - 2a, a), then twice doubled by repetition and smoothed, has the impulse response
# of cubic interpolation (a = -0.5) to 2% of its norm: these sides are the least-squares fit. Plain bilinear: 23%.
SHARPEN, SMOOTH = -0.12303, (0.20541, 0.28510)


@torch.no_grad()
def pass_colours(conv: nn.Conv2d, side: float = 0.0) -> None:
    """Let the first three outputs be the first three inputs, smoothed by the taps (side, 1 - 2·side, side)."""
    taps = torch.tensor([side, 1 - 2 * side, side] if conv.kernel_size == (3, 3) else [1.0])
    conv.weight[:3] = 0
    conv.bias[:3] = 0
    for colour in range(3):
        conv.weight[colour, colour] = torch.outer(taps, taps)


@torch.no_grad()
def enlarge_colours(shuffled: nn.Conv2d, taps: Tensor) -> None:
    """Let a convolution before a pixel shuffle enlarge its first three inputs by `taps` `(scale², 3, 3)`."""
    nn.init.zeros_(shuffled.weight)
    nn.init.zeros_(shuffled.bias)
    each = torch.einsum("oi,syx->osiyx", torch.eye(3), taps)
    shuffled.weight[:, :3] = rearrange(each, "o s i y x -> (o s) i y x")


def bicubic_taps(scale: int) -> Tensor:
    """`(scale², 3, 3)`: bicubic enlargement before a pixel shuffle, cut to the 3x3 neighbourhood."""
    impulses = rearrange(torch.eye(9), "tap (y x) -> tap 1 y x", y=3)
    wide = F.interpolate(F.pad(impulses, (2, 2, 2, 2)), scale_factor=scale, mode="bicubic")
    middle = slice(3 * scale, 4 * scale)
    return rearrange(wide[..., middle, middle], "(dy dx) 1 y x -> (y x) dy dx", dy=3)


@torch.no_grad()
def start_span(model: SPAN) -> SPAN:
    """Make a collapsed SPAN start as bicubic interpolation, in place.

    `conv_1` and `conv_cat` hand the image itself through, the pixel shuffle's weights are bicubic ones cut to 3x3.
    """
    pass_colours(model.conv_1)
    pass_colours(model.conv_cat)
    shuffled = model.upsampler[0]
    pixels = shuffled.out_channels // 3
    enlarge_colours(shuffled, bicubic_taps(math.isqrt(pixels)) / model.img_range)
    shuffled.bias.copy_(repeat(model.mean, "1 c 1 1 -> (c s)", s=pixels))
    return model


@torch.no_grad()
def start_swinir(model: SwinIR) -> SwinIR:
    """Make a SwinIR with `pixelshuffledirect` start as bicubic interpolation, in place.

    The skip past the body carries the image to the pixel shuffle, whose weights are bicubic ones cut to 3x3.
    """
    pass_colours(model.conv_first)
    for silent in (model.conv_after_body.weight[:3], model.conv_after_body.bias[:3]):
        silent.zero_()
    taps = bicubic_taps(model.upscale)
    enlarge_colours(model.upsample[0], taps / taps.sum((1, 2), keepdim=True))  # what was cut off must not darken
    return model


@torch.no_grad()
def start_rrdb(model: ESRGAN) -> ESRGAN:
    """Make an RRDBNet x4 start as bicubic interpolation, in place.

    The skip past the body carries the sharpened image to the upsampler, which doubles by repetition twice, with a 3x3
    convolution after each. Leaky units leave it unchanged where it is positive.
    """
    first, body, once, twice, high, last = rrdb_frame(model)
    for conv, side in ((first, SHARPEN), (once, SMOOTH[0]), (twice, SMOOTH[1]), (high, 0.0)):
        pass_colours(conv, side)
    for silent in (body.weight[:3], body.bias[:3], last.weight):
        silent.zero_()
    pass_colours(last)
    return model


def rrdb_frame(model: ESRGAN) -> list[nn.Conv2d]:
    """What of an RRDBNet is outside its dense blocks: first, end of body, one after each doubling, and the two last."""
    return [conv for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and ".RDB" not in name]


def output_of(layer: nn.Module, model: nn.Module, low: Tensor) -> Tensor:
    """What a layer gives when the model enlarges the batch `low`."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    model(low)
    hook.remove()
    return seen[0]


@torch.no_grad()
def balance_span(model: SPAN, low: Tensor, attention: float = 2.5) -> SPAN:
    """Scale a collapsed SPAN's random weights, layer by layer, so that every block is heard.

    As `balance_layers`, less the means; but the third convolution of a block, whose sigmoid less one half multiplies
    the block's output, has standard deviation `attention`. With PyTorch's own scale that factor is near 0 and the
    signal is gone after two of the six blocks.
    """
    blocks = [f"block_{block}.c{conv}_r" for block in range(1, 7) for conv in (1, 2, 3)]
    for name in ("conv_1", *blocks, "conv_2"):
        conv = model.get_submodule(name)
        random = slice(3, None) if name == "conv_1" else slice(None)  # start_span sets three
        wanted = attention if name.endswith("c3_r") else 1.0
        factor = wanted / output_of(conv, model, low)[:, random].std()
        conv.weight[random] *= factor
        conv.bias[random] *= factor
    return model


@torch.no_grad()
def balance_layers(model: nn.Module, low: Tensor) -> nn.Module:
    """Scale the random weights, layer by layer, so that each layer's output has mean 0 and standard deviation 1.

    Layer-sequential unit variance (Mishkin and Matas 2015, arXiv 1511.06422) on a batch `low` `(n, 3, h, w)`, in place,
    for all convolutions and linear layers but the last, in the order of the forward pass. Outputs that carry the image,
    or that are zero, stay as they are: those of one input, or none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1]:
        random = rearrange(layer.weight, "o i ... -> o i (...)").any(2).sum(1) > 1
        channels_first = "n c h w -> c (n h w)" if isinstance(layer, nn.Conv2d) else "... c -> c (...)"
        channels = rearrange(output_of(layer, model, low), channels_first)[random]
        means = channels.mean(1)
        deviation = (channels - means[:, None]).std()
        layer.weight[random] /= deviation
        layer.bias[random] = (layer.bias[random] - means) / deviation
    return model
