"""Networks: one file per architecture; the file's name is the name in a recipe.

Such a file has a class `Settings`, an `Architecture`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from volseg.errors import VolsegError
from volseg.execution.cpu import total_memory
from volseg.recipe import AUTO, Classify, ClassifyRecipe, Recipe
from volseg.recipe import Network as NetworkSection
from volseg.recipe.classification import SCAN
from volseg.registry import check_keys, check_name, keys_of, make_row
from volseg.sizing import Size
from volseg.words import format_sizes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from volseg.networks.image_network import ImageNetwork

Count = Annotated[int, Field(ge=1, le=4096)]  # channels of a level
Step = Annotated[int, Field(ge=1, le=64)]  # of a stride or kernel along one axis
Triple = tuple[Step, Step, Step]
# Files and folders of this folder that are no architecture.
OTHER_FILES = frozenset({"adapt", "image_network", "scan_network", "sequence"})


class Architecture(ABC):
    """Settings of a network, a frozen dataclass: its fields are the keys under [network]."""

    __slots__ = ()

    @property
    @abstractmethod
    def patch_divisors(self) -> tuple[int, ...]:
        """Numbers of which the edges of a patch (R, A, S; of an image H, W) are multiples."""

    @abstractmethod
    def build(self, in_channels: int, out_channels: int) -> nn.Module:
        """Return a module: (N, in_channels, R, A, S) → logits (N, out_channels, R, A, S)."""

    def size(self, patch_shape: tuple[int, int, int], batch_size: int) -> Size | None:
        """Return what a step of training takes; None if it is not modelled."""
        return None

    def patch_mistakes(self, shape: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Yield (what is wrong, its fix) for a patch that the network cannot be trained on."""
        axes = "RAS" if len(shape) == 3 else "HW"
        for axis, voxels, step in zip(axes, shape, self.patch_divisors, strict=True):
            if voxels % step:
                below, above = voxels // step * step, -(-voxels // step) * step
                nearest = f"{below} or {above}" if below else f"{above}"
                yield (
                    f"has {voxels} voxels along {axis}, which the network divides by {step}",
                    f"make it a multiple of {step}: {nearest}",
                )
        if tuple(shape) == self.patch_divisors and max(shape) > 1:
            yield (
                f"{list(shape)} is a single voxel at the network's coarsest level, which cannot "
                "be normalised",
                "make the patch larger, or remove a level from the network",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels(Architecture):
    """Settings of a 3D U-Net, one entry per level, finest first.

    Args:
        features: channels per level.
        strides: down-sampling (R, A, S) into each level; the first is (1, 1, 1).
        kernels: convolution size (R, A, S) per level, odd.
    """

    features: Annotated[tuple[Count, ...], Field(min_length=2, max_length=16)]
    strides: tuple[Triple, ...]
    kernels: tuple[Triple, ...] | None

    @property
    def patch_divisors(self) -> tuple[int, ...]:
        return tuple(math.prod(steps) for steps in zip(*self.strides, strict=True))

    @property
    def kernels_per_level(self) -> tuple[Triple, ...]:
        return self.kernels if self.kernels is not None else ((3, 3, 3),) * len(self.features)

    def per_level(self, repeats: Sequence[int]) -> Iterator[tuple[int, Triple, Triple, int]]:
        """Yield features, stride, kernel and number of repeats of each level."""
        yield from zip(self.features, self.strides, self.kernels_per_level, repeats, strict=True)

    def check_levels(self, counts: Mapping[str, int] | None = None) -> None:
        """Check that there is one of each per level, and that the grid stays that of the patch.

        Args:
            counts: entries of further settings.

        Raises:
            VolsegError: it does not.
        """
        kernels = self.kernels_per_level
        entries = {"features": len(self.features), "strides": len(self.strides)}
        entries |= {"kernels": len(kernels), **(counts or {})}
        if len(set(entries.values())) > 1:
            listed = ", ".join(f"{n} {key}" for key, n in entries.items())
            problem, fix = f"it has {listed}", "give one of each per level"
        elif any(n % 2 == 0 for kernel in kernels for n in kernel):
            problem, fix = "a kernel of even size shifts the grid", "use odd kernels"
        elif self.strides[0] != (1, 1, 1):
            problem = f"its first stride is {list(self.strides[0])}, so logits lie on another grid"
            fix = "make the first stride [1, 1, 1]"
        else:
            return
        name = type(self).__module__.rpartition(".")[2]
        raise VolsegError(
            f"network {name!r}: {problem}", fix=f"{fix} under [network]", code="E_RECIPE"
        )


def network_names() -> list[str]:
    """Return the names of all architectures."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if name not in OTHER_FILES]


def image_network_names() -> list[str]:
    """Return the names of the architectures of 2D images; it imports all of them."""
    from volseg.networks.image_network import ImageArchitecture

    return [name for name in network_names() if issubclass(settings_type(name), ImageArchitecture)]


def settings_type(name: str) -> type[Architecture]:
    """Return the `Settings` of the architecture with this name.

    Raises:
        VolsegError: there is no such file, or it lacks them.
    """
    check_name("network", name, network_names())
    settings = getattr(importlib.import_module(f"{__name__}.{name}"), "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, Architecture)):
        raise VolsegError(
            f"volseg/networks/{name}.py has no class Settings, a subclass of Architecture",
            fix="write one, as docs/extend.md shows",
            code="E_RECIPE",
        )
    return settings


def architecture(section: NetworkSection) -> Architecture:
    """Return the settings of a network from its section in a recipe.

    Raises:
        VolsegError: there is no file of that name, or it refuses the settings.
    """
    return make_row(f"network {section.name!r}", settings_type(section.name), section.settings)


def build_network(name: str, *, in_channels: int, out_channels: int, **settings: Any) -> nn.Module:
    """Return a torch module with random weights.

    Raises:
        VolsegError: there is no file of that name, it refuses the settings, or the weights do not
            fit into the machine's memory.
    """
    import torch

    section = NetworkSection(name=name, **settings)
    try:
        settings_of = architecture(section)
        with torch.device("meta"):  # names and shapes alone
            tensors = settings_of.build(in_channels, out_channels).state_dict().values()
    except (AssertionError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VolsegError(
            f"network {name!r}: {reason}", fix=f"see volseg/networks/{name}.py", code="E_RECIPE"
        ) from error
    size, memory = sum(t.numel() * t.element_size() for t in tensors), total_memory()
    if size > memory:
        raise VolsegError(
            f"network {name!r} has weights of {size / 2**30:,.0f} GB, and this machine has "
            f"{memory / 2**30:.0f} GB of memory",
            fix="give fewer features or levels under [network]",
            code="E_RAM",
        )
    return settings_of.build(in_channels, out_channels)


def build_segmentation(recipe: Recipe) -> nn.Module:
    """Return the recipe's 3D network: (N, channels, R, A, S) → logits (N, outputs, R, A, S)."""
    return build_network(
        recipe.network.name,
        in_channels=len(recipe.data.channels),
        out_channels=recipe.data.n_outputs,
        **recipe.network.settings,
    )


def build_images(recipe: ClassifyRecipe) -> ImageNetwork:
    """Return what a closed recipe trains: (N, channels, H, W) → logits (N, outputs).

    Of scans it is (N, slices, features + 1) → logits (N, outputs), a `ScanNetwork`.

    Raises:
        VolsegError: as `build_network` and `build_sequence`, or it is no network of images.
    """
    if recipe.data.input == SCAN:
        return _build_scans(recipe)
    return build_slices(recipe)


def _build_scans(recipe: ClassifyRecipe) -> ImageNetwork:
    from volseg.networks.scan_network import ScanNetwork
    from volseg.networks.sequence import build_sequence

    assert recipe.sequence is not None, "the recipe was checked"
    n = slice_features(recipe)
    network = build_sequence(recipe.sequence.name, in_features=n, **recipe.sequence.settings)
    return ScanNetwork(network, n, recipe.data.n_outputs)


def slice_features(recipe: ClassifyRecipe) -> int:
    """Return how many features the network of a closed recipe makes of a slice."""
    import torch

    with torch.device("meta"):
        return build_slices(recipe).head.in_features


def build_slices(recipe: ClassifyRecipe) -> ImageNetwork:
    """Return the 2D network of a closed recipe: (N, channels, H, W) → logits (N, outputs).

    Raises:
        VolsegError: as `build_network`, or it is no network of images.
    """
    from volseg.networks.image_network import ImageNetwork

    network = build_network(
        recipe.network.name,
        in_channels=recipe.in_channels,
        out_channels=recipe.data.n_outputs,
        **recipe.network.settings,
    )
    if not isinstance(network, ImageNetwork):
        raise VolsegError(
            f"network {recipe.network.name!r} is one of volumes, and the recipe is one of images",
            fix="use cnn_small, vgg, resnet2d, densenet2d or efficientnet_lite",
            code="E_RECIPE",
        )
    return network


def build_classifier(settings: Classify) -> nn.Module:
    """Return the recipe's 2D network: (N, 2, pixels, pixels) → logits (N, classes)."""
    return build_network(
        settings.network.name,
        in_channels=2,
        out_channels=len(settings.classes),
        **settings.network.settings,
    )


def check_segmentation(recipe: Recipe, *, section: str = "train") -> None:
    """Check that the recipe's 3D network can be built and trained on its patches.

    Where the recipe leaves layers to the plan, only the names of the other keys are checked.

    Args:
        section: section of the recipe with the patch, for the error message.

    Raises:
        VolsegError: the network cannot be built, does not accept the patch, or a step of training
            does not fit into the memory.
    """
    import torch

    if recipe.leaves_size_open:
        row, settings = settings_type(recipe.network.name), recipe.network.settings
        check_keys(f"network {recipe.network.name!r}", settings, keys_of(row))
        return
    with torch.device("meta"):
        build_segmentation(recipe)
    _check_axes(recipe.network, 3, "scans")
    _check_patch(recipe, section)


def check_classifier(settings: Classify) -> None:
    """Check that the recipe's 2D network can be built.

    Raises:
        VolsegError: it cannot.
    """
    import torch

    with torch.device("meta"):
        build_classifier(settings)
    _check_axes(settings.network, 2, "images")


def _check_axes(section: NetworkSection, n_axes: int, inputs: str) -> None:
    """Check that a network takes inputs with this number of axes."""
    n = len(architecture(section).patch_divisors)
    if n != n_axes:
        images = image_network_names()
        names = images if n_axes == 2 else [n for n in network_names() if n not in images]
        raise VolsegError(
            f"network {section.name!r} is {n}D, and these are {n_axes}D {inputs}",
            fix=f"use one of {', '.join(names)}",
            code="E_RECIPE",
        )


def _check_patch(recipe: Recipe, section: str) -> None:
    """Check that the network accepts the patch, and a batch fits into this machine's memory."""
    import torch

    patch, batch_size = recipe.train.patch_shape, recipe.train.batch_size
    assert patch != AUTO and batch_size != AUTO, "the plan was applied"
    network = architecture(recipe.network)
    mistakes = list(network.patch_mistakes(patch))
    if mistakes:
        problems = "; ".join(f"{section}.patch_shape {problem}" for problem, _ in mistakes)
        fix = "; ".join(fix for _, fix in mistakes)
        raise VolsegError(f"{problems} ({recipe.network.name})", fix=fix, code="E_RECIPE")
    channels, outputs = len(recipe.data.channels), recipe.data.n_outputs
    # patches, logits and their gradients
    least = 4 * batch_size * math.prod(patch) * (channels + 2 * outputs)
    size = network.size(patch, batch_size)
    if size is not None:
        least = max(least, size.training_bytes(channels, outputs, half=True))
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    memory = max(total_memory(), gpu)
    if least > memory:
        raise VolsegError(
            f"{section}: a step with {batch_size} patches of {format_sizes(patch)} voxels "
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
