"""nnU-Net's plain convolutional U-Net in 3D, for the weights of its models.

MONAI's DynUNet (`unet3d`) differs: it has two convolutions per level, all without bias, where
nnU-Net's plans state their number and give them a bias.

Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from volseg.networks import Levels, Triple

Repeats = tuple[Annotated[int, Field(ge=1, le=64)], ...]  # convolutions or blocks per level


@dataclass(frozen=True, slots=True, kw_only=True)
class NnUNet(Levels):
    """Settings that the plain and the residual network share.

    Args:
        n_conv_per_stage_decoder: convolutions per level on the way up, coarsest first, one level
            fewer.
        conv_bias, norm_eps, norm_affine, slope: of all convolutions, instance norms and leaky
            ReLUs.
    """

    kernels: tuple[Triple, ...]
    n_conv_per_stage_decoder: Repeats
    conv_bias: bool = True
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    norm_affine: bool = True
    slope: float = 0.01

    @property
    @abstractmethod
    def n_down(self) -> Repeats:
        """Convolutions or blocks per level on the way down."""

    def __post_init__(self) -> None:
        n_up = len(self.n_conv_per_stage_decoder)
        self.check_levels(
            {"stages down": len(self.n_down), "stages up (with the coarsest)": n_up + 1}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(NnUNet):
    """Settings of the plain network.

    Args:
        n_conv_per_stage: convolutions per level on the way down.
    """

    n_conv_per_stage: Repeats

    @property
    def n_down(self) -> Repeats:
        return self.n_conv_per_stage

    def build(self, in_channels: int, out_channels: int) -> nn.Module:
        stages, before = [], in_channels
        for width, stride, kernel, n in self.per_level(self.n_down):
            stages.append(convolutions(before, width, n, kernel, self, stride=stride))
            before = width
        return UNet(nn.Identity(), stages, out_channels, self)


class UNet(nn.Module):
    """U-Net: stages down, then per level up a transposed convolution, the skip and convolutions."""

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], out_channels: int, settings: NnUNet
    ) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = nn.ModuleList(stages)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        features, bias = settings.features, settings.conv_bias
        levels = range(len(features) - 2, -1, -1)
        for level, n in zip(levels, settings.n_conv_per_stage_decoder, strict=True):
            width, step = features[level], settings.strides[level + 1]
            self.up.append(nn.ConvTranspose3d(features[level + 1], width, step, step, bias=bias))
            kernel = settings.kernels[level]
            self.decoder.append(convolutions(2 * width, width, n, kernel, settings))
        self.head = nn.Conv3d(features[0], out_channels, 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        features, skips = self.stem(patches), []
        for stage in self.encoder:
            features = stage(features)
            skips.append(features)
        skips.pop()
        for up, stage in zip(self.up, self.decoder, strict=True):
            features = stage(torch.cat([up(features), skips.pop()], 1))
        return self.head(features)


def convolutions(
    in_channels: int,
    out_channels: int,
    n: int,
    kernel: Triple,
    settings: NnUNet,
    *,
    stride: Triple = (1, 1, 1),
) -> nn.Sequential:
    """Return `n` layers, the first with the stride."""
    first = layer(in_channels, out_channels, kernel, settings, stride=stride)
    return nn.Sequential(
        first, *(layer(out_channels, out_channels, kernel, settings) for _ in range(n - 1))
    )


def layer(
    in_channels: int,
    out_channels: int,
    kernel: Triple,
    settings: NnUNet,
    *,
    stride: Triple = (1, 1, 1),
    activate: bool = True,
) -> nn.Sequential:
    """Return convolution, instance norm and, unless `activate` is False, leaky ReLU."""
    x, y, z = ((n - 1) // 2 for n in kernel)
    bias, eps, affine = settings.conv_bias, settings.norm_eps, settings.norm_affine
    parts = OrderedDict[str, nn.Module](
        conv=nn.Conv3d(in_channels, out_channels, kernel, stride, padding=(x, y, z), bias=bias),
        norm=nn.InstanceNorm3d(out_channels, eps=eps, affine=affine),
    )
    if activate:
        parts["act"] = nn.LeakyReLU(settings.slope, inplace=True)
    return nn.Sequential(parts)
