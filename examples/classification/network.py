"""A ResNet-18 of torchvision, narrow, for small grey images."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

WIDTH = 16  # channels of the first stage; torchvision's has 64


class SmallResNet(ResNet):
    """torchvision's ResNet-18 with a quarter of the channels and the stem for small images: 3×3, no pooling.

    Names, blocks and `forward` are torchvision's. 703,242 parameters with 26 classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        self.conv1 = nn.Conv2d(1, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * WIDTH, classes)

    def _make_layer(
        self, block: type[BasicBlock], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = WIDTH
        return super()._make_layer(block, planes * WIDTH // 64, blocks, stride, dilate)
