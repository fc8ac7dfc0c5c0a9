"""nnU-Net's plain convolutional U-Net in 3D, for the weights of its models.

MONAI's DynUNet (`unet3d`) differs: it has two convolutions per level, all without bias, where
nnU-Net's plans state their number and give them a bias.

Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from volseg.errors import VolsegError

Shapes = Sequence[Sequence[int]]
MAX_LEVELS, MAX_STEPS = 16, 64  # of a network, and convolutions or blocks of a level


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """Settings of all layers: bias of convolutions, instance norm, slope of the leaky ReLU."""

    conv_bias: bool = True
    norm_eps: float = 1e-5
    norm_affine: bool = True
    slope: float = 0.01


def build(
    *,
    in_channels: int,
    out_channels: int,
    features: Sequence[int],
    strides: Shapes,
    kernels: Shapes,
    n_conv_per_stage: Sequence[int],
    n_conv_per_stage_decoder: Sequence[int],
    **settings: Any,
) -> nn.Module:
    """Return a network: (N, in_channels, X, Y, Z) → logits (N, out_channels, X, Y, Z).

    Args:
        features: channels per level, finest first.
        strides: down-sampling into each level, three numbers each; every axis of a patch is a
            multiple of their product.
        kernels: convolution size per level, odd.
        n_conv_per_stage: convolutions per level on the way down.
        n_conv_per_stage_decoder: convolutions per level on the way up, coarsest first, one level
            fewer.
        settings: fields of `LayerSettings`.
    """
    check_levels(
        "nnunet_plain", features, strides, kernels, n_conv_per_stage, n_conv_per_stage_decoder
    )
    layers = LayerSettings(**settings)
    stages, before = [], in_channels
    for width, stride, kernel, n in zip(features, strides, kernels, n_conv_per_stage, strict=True):
        stages.append(convolutions(before, width, n, kernel, layers, stride=stride))
        before = width
    return UNet(
        nn.Identity(),
        stages,
        out_channels,
        features,
        strides,
        kernels,
        n_conv_per_stage_decoder,
        layers,
    )


class UNet(nn.Module):
    """U-Net: stages down, then per level up a transposed convolution, the skip and convolutions."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        out_channels: int,
        features: Sequence[int],
        strides: Shapes,
        kernels: Shapes,
        n_conv_per_stage_decoder: Sequence[int],
        layers: LayerSettings,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = nn.ModuleList(stages)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, n in zip(
            range(len(features) - 2, -1, -1), n_conv_per_stage_decoder, strict=True
        ):
            width, step = features[level], _triple(strides[level + 1])
            self.up.append(
                nn.ConvTranspose3d(features[level + 1], width, step, step, bias=layers.conv_bias)
            )
            self.decoder.append(convolutions(2 * width, width, n, kernels[level], layers))
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
    kernel: Sequence[int],
    layers: LayerSettings,
    *,
    stride: Sequence[int] = (1, 1, 1),
) -> nn.Sequential:
    """Return `n` layers, the first with the stride."""
    first = layer(in_channels, out_channels, kernel, layers, stride=stride)
    return nn.Sequential(
        first, *(layer(out_channels, out_channels, kernel, layers) for _ in range(n - 1))
    )


def layer(
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    layers: LayerSettings,
    *,
    stride: Sequence[int] = (1, 1, 1),
    activate: bool = True,
    bias: bool | None = None,
) -> nn.Sequential:
    """Return convolution, instance norm and leaky ReLU; `bias` None follows the settings."""
    size = _triple(kernel)
    parts = OrderedDict[str, nn.Module](
        conv=nn.Conv3d(
            in_channels,
            out_channels,
            size,
            _triple(stride),
            padding=_triple([(n - 1) // 2 for n in size]),
            bias=layers.conv_bias if bias is None else bias,
        ),
        norm=nn.InstanceNorm3d(out_channels, eps=layers.norm_eps, affine=layers.norm_affine),
    )
    if activate:
        parts["act"] = nn.LeakyReLU(layers.slope, inplace=True)
    return nn.Sequential(parts)


def check_levels(
    name: str,
    features: Sequence[int],
    strides: Shapes,
    kernels: Shapes,
    n_down: Sequence[int],
    n_up: Sequence[int],
) -> None:
    """Check that settings describe the levels of a 3D network.

    Raises:
        VolsegError: they do not.
    """
    dimensions = {len(numbers) for numbers in (*strides, *kernels)}
    if dimensions == {2}:
        raise VolsegError(
            f"{name}: a 2D network; volseg runs 3D ones",
            fix="use the 3D configuration",
            code="E_RECIPE",
        )
    counts = (len(features), len(strides), len(kernels), len(n_down), len(n_up) + 1)
    if (
        dimensions != {3}
        or len(set(counts)) != 1
        or len(features) < 2
        or min(*n_down, *n_up, *features) < 1
    ):
        raise VolsegError(
            f"{name} has {len(features)} features, {len(strides)} strides, {len(kernels)} kernels, "
            f"{len(n_down)} stages down and {len(n_up)} up",
            fix="give one of each per level under [network], three numbers per stride and kernel, "
            "one stage fewer up",
            code="E_RECIPE",
        )
    if len(features) > MAX_LEVELS or max(*n_down, *n_up) > MAX_STEPS:
        raise VolsegError(
            f"{name} has {len(features)} levels with up to {max(*n_down, *n_up)} convolutions or "
            "blocks each",
            fix=f"give at most {MAX_LEVELS} levels with {MAX_STEPS} each under [network]",
            code="E_RECIPE",
        )
    if any(n < 1 for stride in strides for n in stride):
        raise VolsegError(
            f"{name}: a stride is less than 1", fix="use strides of 1 or more", code="E_RECIPE"
        )
    if any(n < 1 or n % 2 == 0 for kernel in kernels for n in kernel):
        raise VolsegError(
            f"{name}: a kernel of even size shifts the grid", fix="use odd kernels", code="E_RECIPE"
        )


def _triple(numbers: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = numbers
    return x, y, z
