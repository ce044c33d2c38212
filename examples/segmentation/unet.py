"""A small U-Net with BatchNorm, and the head that segments from its early features."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

EARLY = 1  # the encoder block whose features the head sees


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU; the first may halve the image."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Images `(n, 1, h, w)` to logits alike; h and w are multiples of 4. Skips are added, as in the paper's network."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [block(1, width), block(width, 2 * width, stride=2), block(2 * width, 4 * width, stride=2)]
        )
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.decoder = nn.ModuleList([block(2 * width, 2 * width), block(width, width)])
        self.out = nn.Conv2d(width, 1, 1)
        self.to(memory_format=torch.channels_last)  # a seventh faster on a CPU

    def forward(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[1]

    def early_features(self, images: Tensor) -> Tensor:
        """What comes out of the encoder's blocks up to `EARLY`."""
        for stage in self.encoder[: EARLY + 1]:
            images = stage(images)
        return images

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(early features, logits), by one pass."""
        features, x = [], images
        for stage in self.encoder:
            x = stage(x)
            features.append(x)
        for up, stage, skip in zip(self.up, self.decoder, reversed(features[:-1]), strict=True):
            x = stage(up(x) + skip)
        return features[EARLY], self.out(x)


def save_network(model: nn.Module, path: Path) -> None:
    """The whole state dict as safetensors."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


class EarlyHead(nn.Sequential):
    """Logits `(n, 1, h, w)` from early features: three small convolutions, as in the paper's code."""

    def __init__(self, inputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return interpolate(super().forward(features), scale_factor=2**EARLY, mode="bilinear")
