"""nnU-Net's U-Net with a residual encoder in 3D ("ResEnc" plans), for the weights of its models.

The way up is that of the plain U-Net. On the way down every block adds its input, average-pooled if
the block has a stride and projected if the number of channels changes.

Source: Isensee et al., nnU-Net Revisited, MICCAI 2024; He et al., Bag of Tricks for Image
Classification, CVPR 2019 (the pooled skip).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from volseg.networks.nnunet_plain import (
    LayerSettings,
    Shapes,
    UNet,
    check_levels,
    convolutions,
    layer,
)


def build(
    *,
    in_channels: int,
    out_channels: int,
    features: Sequence[int],
    strides: Shapes,
    kernels: Shapes,
    n_blocks_per_stage: Sequence[int],
    n_conv_per_stage_decoder: Sequence[int],
    stem_channels: int | None = None,
    **settings: Any,
) -> nn.Module:
    """Return a network: (N, in_channels, X, Y, Z) → logits (N, out_channels, X, Y, Z).

    Args:
        features: channels per level, finest first.
        strides: down-sampling into each level, three numbers each; every axis of a patch is a
            multiple of their product.
        kernels: convolution size per level, odd.
        n_blocks_per_stage: residual blocks per level on the way down.
        n_conv_per_stage_decoder: convolutions per level on the way up, coarsest first, one level
            fewer.
        stem_channels: of the convolution before the first level; None: as many as that level.
        settings: fields of `LayerSettings`.
    """
    check_levels(
        "nnunet_residual", features, strides, kernels, n_blocks_per_stage, n_conv_per_stage_decoder
    )
    layers = LayerSettings(**settings)
    before = features[0] if stem_channels is None else stem_channels
    stem, stages = convolutions(in_channels, before, 1, kernels[0], layers), []
    for width, stride, kernel, n in zip(
        features, strides, kernels, n_blocks_per_stage, strict=True
    ):
        first = ResidualBlock(before, width, kernel, stride, layers)
        others = (ResidualBlock(width, width, kernel, (1, 1, 1), layers) for _ in range(n - 1))
        stages.append(nn.Sequential(first, *others))
        before = width
    return UNet(
        stem, stages, out_channels, features, strides, kernels, n_conv_per_stage_decoder, layers
    )


class ResidualBlock(nn.Module):
    """Block of two convolutions with norms, plus the input; the last activation follows the sum."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        layers: LayerSettings,
    ) -> None:
        super().__init__()
        self.conv1 = layer(in_channels, out_channels, kernel, layers, stride=stride)
        self.conv2 = layer(out_channels, out_channels, kernel, layers, activate=False)
        skip: list[nn.Module] = []
        if math.prod(stride) != 1:
            x, y, z = stride
            skip.append(nn.AvgPool3d((x, y, z), (x, y, z)))
        if in_channels != out_channels:
            skip.append(
                layer(in_channels, out_channels, (1, 1, 1), layers, activate=False, bias=False)
            )
        self.skip = nn.Sequential(*skip)
        self.act = nn.LeakyReLU(layers.slope, inplace=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.conv1(features)).add_(self.skip(features)))
