"""SwinIR and RRDBNet that enlarge like bicubic interpolation before any training, and in which every layer is heard.

Three feature channels carry the image itself past the body and out of the network; the others start random and end in
zeros, so that training only adds detail. `sr/models.py` does the same for SPAN.
"""

from __future__ import annotations

import torch
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn

from sr.models import bicubic_taps

# An image sharpened by the taps (a, 1 - 2a, a), then twice doubled by repetition and smoothed, has the impulse response
# of cubic interpolation (a = -0.5) to 2% of its norm: these sides are the least-squares fit. Plain bilinear: 23%.
SHARPEN, SMOOTH = -0.12303, (0.20541, 0.28510)


@torch.no_grad()
def pass_colours(conv: nn.Conv2d, side: float = 0.0) -> None:
    """Let the first three outputs be the first three inputs, smoothed by the taps (side, 1 - 2·side, side)."""
    taps = torch.tensor([side, 1 - 2 * side, side])
    conv.weight[:3] = 0
    conv.bias[:3] = 0
    for colour in range(3):
        conv.weight[colour, colour] = torch.outer(taps, taps)


@torch.no_grad()
def start_swinir(model: SwinIR) -> SwinIR:
    """Make a SwinIR with `pixelshuffledirect` start as bicubic interpolation, in place.

    The skip past the body carries the image to the pixel shuffle, whose weights are bicubic ones cut to 3x3.
    """
    shuffle = model.upsample[0]
    pass_colours(model.conv_first)
    for silent in (model.conv_after_body.weight[:3], model.conv_after_body.bias[:3], shuffle.weight, shuffle.bias):
        silent.zero_()
    taps = bicubic_taps(model.upscale)
    taps /= taps.sum((1, 2), keepdim=True)  # what was cut off must not darken
    for colour in range(3):
        shuffle.weight[colour * len(taps) : (colour + 1) * len(taps), colour] = taps
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


@torch.no_grad()
def balance_layers(model: nn.Module, low: Tensor) -> nn.Module:
    """Scale the random weights, layer by layer, so that each layer's output has mean 0 and standard deviation 1.

    Layer-sequential unit variance (Mishkin and Matas 2015, arXiv 1511.06422) on a batch `low` `(n, 3, h, w)`, in place,
    for all convolutions and linear layers but the last, in the order of the forward pass. Outputs that carry the image,
    or that are zero, stay as they are: those of one input, or none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1]:
        random = layer.weight.reshape(*layer.weight.shape[:2], -1).any(2).sum(1) > 1
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.clone()))
        model(low)
        hook.remove()
        channels = seen[0].movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1)[random]
        means = channels.mean(1)
        deviation = (channels - means[:, None]).std()
        layer.weight[random] /= deviation
        layer.bias[random] = (layer.bias[random] - means) / deviation
    return model
