"""VGG for images: 3 × 3 convolutions and ReLU in five groups, a pooling after each.

Source: Simonyan & Zisserman, Very Deep Convolutional Networks, ICLR 2015, without batch norm. The
convolutions have torchvision's names (`features.0.weight`). The three linear layers of 124 million
weights are replaced by a global average and one linear layer, so that an image of any size fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from volseg.errors import VolsegError
from volseg.networks import Count
from volseg.networks.image_network import ImageArchitecture, ImageNetwork, Pool

GROUP_WIDTHS = (64, 128, 256, 512, 512)  # channels
# Number of layers with weights, the three linear ones of the original included → convolutions.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
SMALLEST = 16  # pixels: four poolings leave one pixel, and the fifth leaves it as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageArchitecture):
    """Settings of a classifier: (N, in_channels, H, W) → (N, out_channels).

    Args:
        depth: 11, 13 or 16 as in the paper.
        widths: channels of each convolution, as pruning leaves them; None: those of the paper.
        dropout: probability with which a feature is dropped before the linear layer in training.
    """

    depth: Literal[11, 13, 16] = 16
    widths: Annotated[tuple[Count, ...], Field(min_length=8, max_length=13)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        n = sum(CONVOLUTIONS[self.depth])
        if self.widths is not None and len(self.widths) != n:
            raise VolsegError(
                f"vgg of depth {self.depth} has {n} convolutions, and widths has "
                f"{len(self.widths)} entries",
                fix="give one width per convolution under [network]",
                code="E_RECIPE",
            )

    @property
    def smallest_pixels(self) -> int:
        return SMALLEST

    @property
    def group_widths(self) -> list[tuple[int, ...]]:
        """Channels of each convolution of each of the five groups."""
        counts = CONVOLUTIONS[self.depth]
        if self.widths is None:
            return [(width,) * n for width, n in zip(GROUP_WIDTHS, counts, strict=True)]
        ends = [sum(counts[: group + 1]) for group in range(len(counts))]
        return [self.widths[end - n : end] for n, end in zip(counts, ends, strict=True)]

    def build(self, in_channels: int, out_channels: int) -> ImageNetwork:
        return Vgg(in_channels, out_channels, self)


class Vgg(ImageNetwork):
    """Convolutions, global average, dropout and a linear layer."""

    def __init__(self, in_channels: int, out_channels: int, settings: Settings) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.stage_prefixes = []
        previous = in_channels
        for widths in settings.group_widths:
            first = len(layers)
            for width in widths:
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU(inplace=True)]
                previous = width
            indices = range(first, len(layers), 2)
            self.stage_prefixes.append(tuple(f"features.{index}." for index in indices))
            layers.append(Pool("max"))
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(previous, out_channels)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(torch.as_tensor(layer.bias))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images).mean((2, 3))
