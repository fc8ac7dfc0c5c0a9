"""EfficientNet-Lite0 for images: inverted residuals with ReLU6, without squeeze-and-excitation.

Sources: Tan & Le, EfficientNet, ICML 2019; Liu, EfficientNet-Lite, TensorFlow blog, 2020. The names
are those of the package efficientnet_pytorch, and so is the padding, which is TensorFlow's: what a
stride needs beyond the image is added at the bottom and on the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from volseg.networks.image_network import ImageArchitecture, ImageNetwork

STEM, LAST = 32, 1280  # channels
# (number of blocks, kernel, stride of the first, expansion, channels) of each group
GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SMALLEST = 16  # pixels: the last blocks have one


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageArchitecture):
    """Settings of a classifier: (N, in_channels, H, W) → (N, out_channels).

    Args:
        dropout: probability with which a feature is dropped before the linear layer in training.
    """

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @property
    def smallest_pixels(self) -> int:
        return SMALLEST

    def build(self, in_channels: int, out_channels: int) -> ImageNetwork:
        return EfficientNetLite(in_channels, out_channels, self)


class EfficientNetLite(ImageNetwork):
    """Stem, inverted residuals, a 1 × 1 convolution, global average, dropout, a linear layer."""

    renames = ((r"^_fc\.", "head."),)

    def __init__(self, in_channels: int, out_channels: int, settings: Settings) -> None:
        super().__init__()
        self._conv_stem = _Convolution(in_channels, STEM, 3, stride=2)
        self._bn0 = _norm(STEM)
        blocks, prefixes, width = [], [], STEM
        for repeats, kernel, first_stride, expansion, channels in GROUPS:
            indices = range(len(blocks), len(blocks) + repeats)
            prefixes.append(tuple(f"_blocks.{index}." for index in indices))
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks.append(_Block(width, channels, kernel, stride, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _Convolution(width, LAST, 1)
        self._bn1 = _norm(LAST)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(LAST, out_channels)
        self.stage_prefixes = [("_conv_stem.", "_bn0."), *prefixes, ("_conv_head.", "_bn1.")]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's Kaiming ignores the groups
                fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        maps = functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            maps = block(maps)
        return functional.relu6(self._bn1(self._conv_head(maps))).mean((2, 3))


class _Block(nn.Module):
    """An inverted residual: expand, filter each channel, project; add the input if it fits."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.is_residual = stride == 1 and width == channels
        self.is_expanded = expansion > 1
        if self.is_expanded:
            self._expand_conv = _Convolution(width, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _Convolution(inner, inner, kernel, stride=stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = _Convolution(inner, channels, 1)
        self._bn2 = _norm(channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        inner = maps
        if self.is_expanded:
            inner = functional.relu6(self._bn0(self._expand_conv(maps)))
        inner = functional.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return maps + inner if self.is_residual else inner


class _Convolution(nn.Conv2d):
    """A convolution without bias whose output has ⌈size / stride⌉ pixels along each axis."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        sizes = (int(input.shape[-1]), int(input.shape[-2]))
        missing = [max(0, ((n - 1) // stride) * stride + kernel - n) for n in sizes]
        padding = [pixels for n in missing for pixels in (n // 2, n - n // 2)]
        return super().forward(functional.pad(input, padding) if any(padding) else input)


def _norm(channels: int) -> nn.Module:
    # Not the momentum 0.01 of the package: statistics that follow so slowly are still those of
    # ImageNet after a short fine-tuning, when the weights no longer are.
    return nn.BatchNorm2d(channels, eps=1e-3)
