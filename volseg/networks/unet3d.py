"""3D U-Net with instance norm, LeakyReLU and per-axis strides: MONAI's DynUNet.

Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021); the layers are MONAI's.
"""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import DynUNet
from torch import nn

from volseg.errors import VolsegError


def build(
    *,
    in_channels: int,
    out_channels: int,
    features: Sequence[int] = (16, 32, 64, 128),
    strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    kernels: Sequence[Sequence[int]] | None = None,
    residual: bool = False,
    deep_supervision: int = 0,
    dropout: float = 0.0,
) -> nn.Module:
    """Return a network: (N, in_channels, R, A, S) → logits (N, out_channels, R, A, S).

    In training with deep supervision its logits are (N, depths, out_channels, R, A, S).

    Args:
        features: channels per level, finest first.
        strides: down-sampling (R, A, S) into each level; the first is usually (1, 1, 1).
        kernels: convolution size (R, A, S) per level; default 3 × 3 × 3.
        residual: residual instead of plain blocks.
        deep_supervision: number of coarser levels with a loss in training, finest first.
        dropout: probability with which a feature is dropped in training.
    """
    kernels = kernels if kernels is not None else [(3, 3, 3)] * len(features)
    if not 3 <= len(features) == len(strides) == len(kernels):
        raise VolsegError(
            f"unet3d has {len(features)} features, {len(strides)} strides and {len(kernels)} "
            "kernels",
            fix="give one of each per level under [network], for at least three levels",
            code="E_RECIPE",
        )
    if min(*features, *(n for numbers in (*strides, *kernels) for n in numbers)) < 1:
        raise VolsegError(
            "unet3d has features, strides or kernels of less than 1",
            fix="use numbers of 1 or more",
            code="E_RECIPE",
        )
    if not 0 <= deep_supervision <= len(features) - 2:
        raise VolsegError(
            f"unet3d with {len(features)} levels cannot have deep_supervision = {deep_supervision}",
            fix=f"give 0 to {len(features) - 2} for deep_supervision under [network]",
            code="E_RECIPE",
        )
    network = DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[list(kernel) for kernel in kernels],
        strides=[list(stride) for stride in strides],
        upsample_kernel_size=[list(stride) for stride in strides[1:]],
        filters=list(features),
        norm_name=("INSTANCE", {"affine": True}),
        act_name=("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
        res_block=residual,
        deep_supervision=deep_supervision > 0,
        deep_supr_num=max(1, deep_supervision),
        dropout=("DROPOUT", {"p": dropout}) if dropout else None,
    )
    if dropout:  # MONAI would also drop logits
        heads = network.deep_supervision_heads if deep_supervision else ()
        for head in (network.output_block, *heads):
            head.get_submodule("conv").add_module("adn", nn.Identity())
    return network
