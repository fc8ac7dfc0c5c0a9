"""Small CNN: blocks of convolution, batch norm, ReLU, pooling and dropout, then a linear layer.

It is for images of 28 to 224 pixels: `features_for` gives the depth that an image allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from volseg.networks import Count
from volseg.networks.image_network import ImageArchitecture, ImageNetwork, Pool

SMALLEST_MAP = 3  # pixels that are left after the last block, so that its kernels see an image
WIDEST = 256  # channels of a block that `features_for` gives at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageArchitecture):
    """Settings of a classifier: (N, in_channels, H, W) → (N, out_channels).

    Args:
        features: channels per block; each block halves the image.
        convolutions: of 3 × 3 pixels in a block.
        block_dropout: probability with which a channel is dropped after a block in training.
        dropout: probability with which a feature is dropped before the linear layer in training.
    """

    features: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (32, 64, 128)
    convolutions: Annotated[int, Field(ge=1, le=4)] = 2
    block_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3

    @property
    def smallest_pixels(self) -> int:
        return 2 ** len(self.features)

    def build(self, in_channels: int, out_channels: int) -> ImageNetwork:
        return CnnSmall(in_channels, out_channels, self)


class CnnSmall(ImageNetwork):
    """Blocks, global average, dropout and a linear layer."""

    def __init__(self, in_channels: int, out_channels: int, settings: Settings) -> None:
        super().__init__()
        widths = (in_channels, *settings.features)
        self.blocks = nn.Sequential(
            *(_block(previous, width, settings) for previous, width in pairwise(widths))
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(widths[-1], out_channels)
        self.stage_prefixes = [(f"blocks.{index}.",) for index in range(len(self.blocks))]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(images).mean((2, 3))


def features_for(pixels: int, *, first: int = 32) -> tuple[int, ...]:
    """Return channels per block for square images: as many blocks as leave a map of 3 × 3 pixels.

    Args:
        pixels: edge of the images; `first`: channels of the first block, doubled from block to
            block up to 256.

    >>> features_for(28), features_for(224)
    ((32, 64, 128), (32, 64, 128, 256, 256, 256))
    """
    n_blocks = max(1, (pixels // SMALLEST_MAP).bit_length() - 1)
    return tuple(max(first, min(first * 2**block, WIDEST)) for block in range(n_blocks))


def _block(in_channels: int, out_channels: int, settings: Settings) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(settings.convolutions):
        previous = out_channels if index else in_channels
        layers += [
            nn.Conv2d(previous, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, Pool("max"), nn.Dropout2d(settings.block_dropout))
