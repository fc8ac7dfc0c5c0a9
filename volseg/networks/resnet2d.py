"""ResNet-18 and ResNet-50 for images; the layers are MONAI's, the names torchvision's.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from monai.networks.nets.resnet import ResNet
from pydantic import Field
from torch import nn

from volseg.networks.image_network import ImageArchitecture, ImageNetwork

WIDTHS = [64, 128, 256, 512]  # channels of a block in each group
# Layers with weights → kind and number of the blocks of each group.
BLOCKS = {18: ("basic", [2, 2, 2, 2]), 50: ("bottleneck", [3, 4, 6, 3])}
SMALLEST = 16  # pixels: the last group of blocks has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageArchitecture):
    """Settings of a classifier: (N, in_channels, H, W) → (N, out_channels).

    Args:
        depth: 18 or 50 as in the paper.
        dropout: probability with which a feature is dropped before the linear layer in training.
    """

    depth: Literal[18, 50] = 18
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @property
    def smallest_pixels(self) -> int:
        return SMALLEST

    def build(self, in_channels: int, out_channels: int) -> ImageNetwork:
        return ResNet2d(in_channels, out_channels, self)


class ResNet2d(ImageNetwork):
    """Residual blocks in four groups, global average, dropout and a linear layer."""

    renames = ((r"^fc\.", "head."),)

    def __init__(self, in_channels: int, out_channels: int, settings: Settings) -> None:
        super().__init__()
        kind, counts = BLOCKS[settings.depth]
        layers = ResNet(
            kind,
            counts,
            WIDTHS,
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_stride=2,
            num_classes=out_channels,
            bias_downsample=False,  # as torchvision's
        )
        self.conv1, self.bn1, self.act = layers.conv1, layers.bn1, layers.act
        self.maxpool = layers.maxpool
        self.layer1, self.layer2 = layers.layer1, layers.layer2
        self.layer3, self.layer4 = layers.layer3, layers.layer4
        self.dropout = nn.Dropout(settings.dropout)
        assert layers.fc is not None
        self.head = layers.fc
        self.stage_prefixes = [("conv1.", "bn1."), *((f"layer{n}.",) for n in (1, 2, 3, 4))]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.maxpool(self.act(self.bn1(self.conv1(images))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return maps.mean((2, 3))
