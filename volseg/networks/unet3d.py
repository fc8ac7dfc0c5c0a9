"""3D U-Net with instance norm, LeakyReLU and per-axis strides: MONAI's DynUNet.

Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021); the layers are MONAI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from monai.networks.nets import DynUNet
from pydantic import Field
from torch import nn

from volseg.errors import VolsegError
from volseg.networks import Count, Levels, Triple
from volseg.sizing import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Levels):
    """Settings of a U-Net of at least three levels.

    In training with deep supervision its logits are (N, depths, out_channels, R, A, S).

    Args:
        residual: residual instead of plain blocks.
        deep_supervision: number of coarser levels with a loss in training, finest first.
        dropout: probability with which a feature is dropped in training.
    """

    features: Annotated[tuple[Count, ...], Field(min_length=3, max_length=16)] = (16, 32, 64, 128)
    strides: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernels: tuple[Triple, ...] | None = None  # None: 3 × 3 × 3 at each level
    residual: bool = False
    deep_supervision: Annotated[int, Field(ge=0)] = 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        self.check_levels()
        if self.deep_supervision > len(self.features) - 2:
            raise VolsegError(
                f"unet3d with {len(self.features)} levels cannot have deep_supervision = "
                f"{self.deep_supervision}",
                fix=f"give 0 to {len(self.features) - 2} for deep_supervision under [network]",
                code="E_RECIPE",
            )

    def build(self, in_channels: int, out_channels: int) -> nn.Module:
        network = DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=[list(kernel) for kernel in self.kernels_per_level],
            strides=[list(stride) for stride in self.strides],
            upsample_kernel_size=[list(stride) for stride in self.strides[1:]],
            filters=list(self.features),
            norm_name=("INSTANCE", {"affine": True}),
            act_name=("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
            res_block=self.residual,
            deep_supervision=self.deep_supervision > 0,
            deep_supr_num=max(1, self.deep_supervision),
            dropout=("DROPOUT", {"p": self.dropout}) if self.dropout else None,
        )
        if self.dropout:  # MONAI would also drop logits
            heads = network.deep_supervision_heads if self.deep_supervision else ()
            for head in (network.output_block, *heads):
                head.get_submodule("conv").add_module("adn", nn.Identity())
        return network

    def size(self, patch_shape: tuple[int, int, int], batch_size: int) -> Size:
        return Size(
            features=self.features,
            strides=self.strides,
            kernels=self.kernels_per_level,
            patch_shape=patch_shape,
            batch_size=batch_size,
            depths=1 + self.deep_supervision,
            residual=self.residual,
            dropout=self.dropout > 0,
        )
