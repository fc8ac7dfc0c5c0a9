"""DenseNet-121 for images; the layers are MONAI's, the names convertible from torchvision's.

Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from monai.networks.nets.densenet import DenseNet
from pydantic import Field
from torch import nn

from volseg.networks.image_network import ImageArchitecture, ImageNetwork, Pool

LAYERS = (6, 12, 24, 16)  # of each block
SMALLEST = 16  # pixels: the last block has one


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
        return DenseNet2d(in_channels, out_channels, self)


class DenseNet2d(ImageNetwork):
    """Dense blocks, global average, dropout and a linear layer."""

    renames = (
        (r"(denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3."),  # torchvision's
        (r"^(?:classifier|class_layers\.out)\.", "head."),  # torchvision's, MONAI's
    )

    def __init__(self, in_channels: int, out_channels: int, settings: Settings) -> None:
        super().__init__()
        layers = DenseNet(2, in_channels, out_channels, block_config=LAYERS)
        self.features = layers.features
        transitions = range(1, len(LAYERS))
        for n in transitions:  # MONAI's pooling refuses a map of one pixel
            self.features.get_submodule(f"transition{n}").add_module("pool", Pool("average"))
        self.dropout = nn.Dropout(settings.dropout)
        head = layers.class_layers.get_submodule("out")
        assert isinstance(head, nn.Linear)
        self.head = head
        blocks = [(f"features.denseblock{n}.", f"features.transition{n}.") for n in transitions]
        stem = ("features.conv0.", "features.norm0.")
        last = (f"features.denseblock{len(LAYERS)}.", "features.norm5.")
        self.stage_prefixes = [stem, *blocks, last]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.features(images)).mean((2, 3))
