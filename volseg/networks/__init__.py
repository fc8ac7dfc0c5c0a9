"""Networks: one file per architecture; the file's name is the name in a recipe."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from volseg.errors import VolsegError
from volseg.execution.cpu import total_memory
from volseg.recipe import AUTO, Classify, Recipe
from volseg.sizing import Size

if TYPE_CHECKING:
    import torch
    from torch import nn


def build_network(name: str, *, in_channels: int, out_channels: int, **settings: Any) -> nn.Module:
    """Return a torch module with random weights.

    Raises:
        VolsegError: there is no file of that name, or its `build` refuses the settings.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in names:
        raise VolsegError(
            f"network {name!r} is unknown", fix=f"use one of {', '.join(names)}", code="E_RECIPE"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    build = partial(module.build, in_channels=in_channels, out_channels=out_channels, **settings)
    try:
        _check_size(name, build)
        return build()
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
        IndexError,
        AttributeError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VolsegError(
            f"network {name!r}: {reason}", fix=f"see volseg/networks/{name}.py", code="E_RECIPE"
        ) from error


def _check_size(name: str, build: Callable[[], nn.Module]) -> None:
    """Check that a network's weights fit into the machine's memory, before allocating them.

    Raises:
        VolsegError: they do not fit.
    """
    import torch

    with torch.device("meta"):  # names and shapes alone
        tensors = build().state_dict().values()
    size, memory = sum(t.numel() * t.element_size() for t in tensors), total_memory()
    if size > memory:
        raise VolsegError(
            f"network {name!r} has weights of {size / 2**30:,.0f} GB, and this machine has "
            f"{memory / 2**30:.0f} GB of memory",
            fix="give fewer features or levels under [network]",
            code="E_RAM",
        )


def build_segmentation(recipe: Recipe) -> nn.Module:
    """Return the recipe's 3D network: (N, channels, R, A, S) → logits (N, outputs, R, A, S)."""
    return build_network(
        recipe.network.name,
        in_channels=len(recipe.data.channels),
        out_channels=recipe.data.n_outputs,
        **recipe.network.settings,
    )


def build_classifier(settings: Classify) -> nn.Module:
    """Return the recipe's 2D network: (N, 2, pixels, pixels) → logits (N, classes)."""
    return build_network(
        settings.network.name,
        in_channels=2,
        out_channels=len(settings.classes),
        **settings.network.settings,
    )


def check_networks(recipe: Recipe, *, section: str = "train") -> None:
    """Build the recipe's networks once, and check that patches fit their strides and the memory.

    Args:
        section: section of the recipe with the patch, for the error message.

    Raises:
        VolsegError: a network cannot be built, the patch does not fit its strides, or a step of
            training does not fit into the memory.
    """
    build_segmentation(recipe)
    strides = recipe.network.settings.get("strides", ())
    divisors = [math.prod(steps) for steps in zip(*strides, strict=True)]
    for axis, (voxels, divisor) in enumerate(zip(recipe.train.patch_shape, divisors, strict=False)):
        if voxels % divisor:
            raise VolsegError(
                f"{section}.patch_shape has {voxels} voxels along {'RAS'[axis]}, which the strides "
                f"divide by {divisor}",
                fix=f"make it a multiple of {divisor}",
                code="E_RECIPE",
            )
    if list(recipe.train.patch_shape) == divisors:
        raise VolsegError(
            f"{section}.patch_shape {recipe.train.patch_shape} is a single voxel at the network's "
            "coarsest level, which cannot be normalised",
            fix="make the patch larger, or remove a level from the network",
            code="E_RECIPE",
        )
    _check_step(recipe, section)
    if recipe.classify is not None:
        build_classifier(recipe.classify)
    if recipe.coarse is not None:
        check_networks(recipe.coarse, section="roi.train")


def _check_step(recipe: Recipe, section: str) -> None:
    """Check that a batch of patches fits into the memory of this machine or its GPU."""
    import torch

    patch, batch_size = recipe.train.patch_shape, recipe.train.batch_size
    settings = recipe.network.settings
    assert patch != AUTO and batch_size != AUTO, "the plan was applied"
    channels, outputs = len(recipe.data.channels), recipe.data.n_outputs
    # patches, logits and their gradients
    least = 4 * batch_size * math.prod(patch) * (channels + 2 * outputs)
    features, strides = settings.get("features"), settings.get("strides")
    if recipe.network.name == "unet3d" and features and strides:
        size = Size(
            features=tuple(features),
            strides=tuple(strides),
            kernels=tuple(settings.get("kernels") or [(3, 3, 3)] * len(features)),
            patch_shape=patch,
            batch_size=batch_size,
        )
        least = max(least, size.training_bytes(channels, outputs, half=True))
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    memory = max(total_memory(), gpu)
    if least > memory:
        raise VolsegError(
            f"{section}: a step with {batch_size} patches of {' × '.join(map(str, patch))} voxels "
            f"takes at least {least / 2**30:,.0f} GB, and this machine has "
            f"{memory / 2**30:.0f} GB of memory",
            fix=f"lower {section}.batch_size or {section}.patch_shape",
            code="E_BUDGET",
        )


def unique_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return each tensor of a network once; a state_dict repeats those of shared modules."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors}


def copy_weights(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy weights, as from `unique_tensors`, into a network of the same architecture; return it.

    Raises:
        VolsegError: tensors are missing or of another shape, or hold NaN or infinity.
    """
    targets = unique_tensors(network)
    misfits = [
        name
        for name, tensor in targets.items()
        if name not in weights or weights[name].shape != tensor.shape
    ]
    if misfits:
        raise VolsegError(
            f"the weights do not fit the network: {len(misfits)} tensors are missing or of another "
            f"shape, first {misfits[:5]}",
            fix="use the recipe with which the weights were trained",
            code="E_CKPT",
        )
    check_finite(weights)
    for name, tensor in targets.items():
        tensor.copy_(weights[name])
    return network


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Check that no weight is NaN or infinite: the masks would be wrong without an error.

    Raises:
        VolsegError: a weight is; it names the first such tensor.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel() and not bool(tensor.isfinite().all()):
            n = int((~tensor.isfinite()).sum())
            raise VolsegError(
                f"{n:,} of the {tensor.numel():,} weights of {name!r} are NaN or infinite",
                fix="copy the model again, or take a checkpoint from before its training diverged",
                code="E_CKPT",
            )
