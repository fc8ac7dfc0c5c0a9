"""nnU-Net's U-Net with a residual encoder in 3D ("ResEnc" plans), for the weights of its models.

The way up is that of the plain U-Net. On the way down every block adds its input, average-pooled if
the block has a stride and projected if the number of channels changes.

Source: Isensee et al., nnU-Net Revisited, MICCAI 2024; He et al., Bag of Tricks for Image
Classification, CVPR 2019 (the pooled skip).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from volseg.networks import Count, Triple
from volseg.networks.nnunet_plain import NnUNet, Repeats, UNet, convolutions, layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(NnUNet):
    """Settings of the residual network.

    Args:
        n_blocks_per_stage: residual blocks per level on the way down.
        stem_channels: of the convolution before the first level; None: as many as that level.
    """

    n_blocks_per_stage: Repeats
    stem_channels: Count | None = None

    @property
    def n_down(self) -> Repeats:
        return self.n_blocks_per_stage

    def build(self, in_channels: int, out_channels: int) -> nn.Module:
        before = self.features[0] if self.stem_channels is None else self.stem_channels
        stem, stages = convolutions(in_channels, before, 1, self.kernels[0], self), []
        for width, stride, kernel, n in self.per_level(self.n_down):
            first = ResidualBlock(before, width, kernel, self, stride=stride)
            others = (ResidualBlock(width, width, kernel, self) for _ in range(n - 1))
            stages.append(nn.Sequential(first, *others))
            before = width
        return UNet(stem, stages, out_channels, self)


class ResidualBlock(nn.Module):
    """Block of two convolutions with norms, plus the input; the last activation follows the sum."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        settings: NnUNet,
        *,
        stride: Triple = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.conv1 = layer(in_channels, out_channels, kernel, settings, stride=stride)
        self.conv2 = layer(out_channels, out_channels, kernel, settings, activate=False)
        skip: list[nn.Module] = []
        if math.prod(stride) != 1:
            skip.append(nn.AvgPool3d(stride, stride))
        if in_channels != out_channels:
            no_bias = replace(settings, conv_bias=False)
            skip.append(layer(in_channels, out_channels, (1, 1, 1), no_bias, activate=False))
        self.skip = nn.Sequential(*skip)
        self.act = nn.LeakyReLU(settings.slope, inplace=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.conv1(features)).add_(self.skip(features)))
