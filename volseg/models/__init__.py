"""Networks: one file per architecture; the file's name is the name in a recipe."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from volseg.errors import VolsegError
from volseg.recipe import Classify, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn


def build_network(name: str, *, in_channels: int, out_channels: int, **settings: Any) -> nn.Module:
    """A torch module with random weights.

    Raises:
        VolsegError: no file of that name, or settings which its `build` does not take.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise VolsegError(f"network {name!r} is unknown", fix=f"use one of {', '.join(known)}", code="E_RECIPE")
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        return module.build(in_channels=in_channels, out_channels=out_channels, **settings)
    except (TypeError, ValueError) as error:
        raise VolsegError(f"network {name!r}: {error}", fix=f"see volseg/models/{name}.py", code="E_RECIPE") from error


def build_segmentation(recipe: Recipe) -> nn.Module:
    """The recipe's 3D network: (N, channels, R, A, S) → logits (N, outputs, R, A, S)."""
    return build_network(
        recipe.network.name,
        in_channels=len(recipe.data.channels),
        out_channels=recipe.data.n_outputs,
        **recipe.network.settings,
    )


def build_classifier(settings: Classify) -> nn.Module:
    """The recipe's 2D network: (N, 2, pixels, pixels) → logits (N, classes)."""
    return build_network(
        settings.network.name, in_channels=2, out_channels=len(settings.classes), **settings.network.settings
    )


def check_networks(recipe: Recipe, *, section: str = "train") -> None:
    """Build the recipe's networks once and see that the patch can be halved as often as the 3D one halves it.

    Args:
        section: where the patch stands, for the error message.

    Raises:
        VolsegError: a network cannot be built, or the patch does not fit its strides.
    """
    build_segmentation(recipe)
    strides = recipe.network.settings.get("strides", ())
    divisors = [math.prod(steps) for steps in zip(*strides, strict=True)]
    for axis, (voxels, divisor) in enumerate(zip(recipe.train.patch_shape, divisors, strict=False)):
        if voxels % divisor:
            raise VolsegError(
                f"{section}.patch_shape has {voxels} voxels along {'RAS'[axis]}, which the strides divide by {divisor}",
                fix=f"make it a multiple of {divisor}",
                code="E_RECIPE",
            )
    if list(recipe.train.patch_shape) == divisors:
        raise VolsegError(
            f"{section}.patch_shape {recipe.train.patch_shape} is a single voxel at the network's coarsest level, which cannot be normalised",
            fix="make the patch larger, or take a level off the network",
            code="E_RECIPE",
        )
    if recipe.classify is not None:
        build_classifier(recipe.classify)
    if recipe.coarse is not None:
        check_networks(recipe.coarse, section="roi.train")


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's tensors, each once: a state_dict names a tensor again for every module through which it is reached."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def set_weights(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy what `weights_of` gave into a network of the same architecture, and return it.

    Raises:
        VolsegError: tensors are missing or of another shape.
    """
    wanted = weights_of(network)
    misfits = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    if misfits:
        raise VolsegError(
            f"the weights do not fit the network: {len(misfits)} tensors are missing or of another shape, first {misfits[:5]}",
            fix="use the recipe with which the weights were trained",
            code="E_CKPT",
        )
    for name, tensor in wanted.items():
        tensor.copy_(weights[name])
    return network
