"""Small 2D CNN classifier: four blocks of two convolutions, global pooling, one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from monai.networks.blocks import Convolution
from pydantic import Field
from torch import nn

from volseg.networks.image_network import ImageArchitecture, ImageNetwork

GROUPS = 4  # of channels that are normalised together


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageArchitecture):
    """Settings of a classifier of images of any size: (N, in_channels, H, W) → (N, out_channels).

    Args:
        features: channels per block, multiples of 4.
        dropout: probability with which a feature is dropped in training.
    """

    features: Annotated[
        tuple[Annotated[int, Field(ge=GROUPS, multiple_of=GROUPS)], ...], Field(min_length=1)
    ] = (12, 24, 48, 64)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3

    @property
    def smallest_pixels(self) -> int:
        return 1

    def build(self, in_channels: int, out_channels: int) -> ImageNetwork:
        return Cnn2d(in_channels, out_channels, self)


class Cnn2d(ImageNetwork):
    """Convolution blocks, global average and maximum, dropout and a linear layer."""

    def __init__(self, in_channels: int, out_channels: int, settings: Settings) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        features = settings.features
        for previous, width in zip((in_channels, *features), features, strict=False):
            blocks += [
                _convolution(previous, width, strides=1),
                _convolution(width, width, strides=2),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(2 * features[-1], out_channels)
        pairs = range(0, len(blocks), 2)
        self.stage_prefixes = [(f"blocks.{index}.", f"blocks.{index + 1}.") for index in pairs]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        features = self.blocks(images).flatten(2)
        return torch.cat([features.mean(2), features.amax(2)], dim=1)


def _convolution(in_channels: int, out_channels: int, *, strides: int) -> nn.Module:
    # Group norm is independent of the batch size: one lesion at inference, many in training.
    return Convolution(
        2,
        in_channels,
        out_channels,
        strides=strides,
        act="RELU",
        norm=("GROUP", {"num_groups": GROUPS}),
    )
