"""Small 2D CNN classifier: four blocks of two convolutions, global pooling, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from torch import nn


def build(
    *,
    in_channels: int,
    out_channels: int,
    features: Sequence[int] = (12, 24, 48, 64),
    dropout: float = 0.3,
) -> nn.Module:
    """Return a classifier: (N, in_channels, H, W) → logits (N, out_channels)."""
    return Cnn2d(in_channels, out_channels, tuple(features), dropout)


class Cnn2d(nn.Module):
    """Convolution blocks, global average and maximum, dropout and a linear layer."""

    def __init__(
        self, in_channels: int, out_channels: int, features: tuple[int, ...], dropout: float
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for previous, width in zip((in_channels, *features), features, strict=False):
            blocks += [
                _convolution(previous, width, strides=1),
                _convolution(width, width, strides=2),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * features[-1], out_channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.blocks(images).flatten(2)
        return self.head(self.dropout(torch.cat([features.mean(2), features.amax(2)], dim=1)))


def _convolution(in_channels: int, out_channels: int, *, strides: int) -> nn.Module:
    # Group norm is independent of the batch size: one lesion at inference, many in training.
    return Convolution(
        2, in_channels, out_channels, strides=strides, act="RELU", norm=("GROUP", {"num_groups": 4})
    )
