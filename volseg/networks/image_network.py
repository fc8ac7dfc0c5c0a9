"""Base of the 2D networks that classify images: what training, transfer and inference rely on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from volseg.networks import Architecture

PLANES_NDIM = 5  # of several images of one case
SCANS_NDIM = 3  # of the embedded slices of scans
HEAD = "head."  # start of the names of the last layer's tensors, in every architecture


class ImageNetwork(nn.Module, ABC):
    """A network of images: (N, in_channels, H, W) → logits (N, out_channels).

    A subclass sets `head`, `dropout` and `stage_prefixes`, and defines `embed`.

    Args:
        renames: (regular expression, replacement) pairs that turn the tensor names of other
            libraries into those of this network, applied in turn.
        stage_prefixes: starts of the parameter names of each stage, from the input to the last
            one before the head.
    """

    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    frozen: frozenset[str] = frozenset()  # names of parameters
    head: nn.Linear
    dropout: nn.Dropout
    stage_prefixes: Sequence[tuple[str, ...]]

    @abstractmethod
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, features): what the head gets, before dropout."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, outputs) of images, or of (N, planes, C, H, W) the mean of planes."""
        if images.ndim == PLANES_NDIM:
            return self(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
        return self.head(self.dropout(self.embed(images)))

    def stages(self) -> list[list[str]]:
        """Return the names of the parameters, grouped from the input to the head.

        A frozen base is all groups but the last; a learning rate per group falls towards the input.
        """
        names = [name for name, _ in self.named_parameters()]
        prefixes = [*self.stage_prefixes, (HEAD,)]
        return [[name for name in names if name.startswith(starts)] for starts in prefixes]

    def freeze(self, n_stages: int) -> None:
        """Stop the first stages from learning, in training too; 0 lets all of them learn again.

        Their batch norms use and keep the statistics that they have, as in inference.
        """
        self.frozen = frozenset(name for stage in self.stages()[:n_stages] for name in stage)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in {name.rpartition(".")[0] for name in self.frozen} if mode else ():
            self.get_submodule(name).eval()
        return self

    @property
    def first_convolution(self) -> str:
        """Name of the weight (out, in_channels, height, width) that the input meets first."""
        modules = self.named_modules()
        return next(name for name, module in modules if isinstance(module, nn.Conv2d)) + ".weight"


class ImageArchitecture(Architecture):
    """Settings of an `ImageNetwork`; an image may have any size from `smallest_pixels` on."""

    __slots__ = ()

    @property
    @abstractmethod
    def smallest_pixels(self) -> int:
        """Least height and width of an image, in pixels."""

    @abstractmethod
    def build(self, in_channels: int, out_channels: int) -> ImageNetwork:
        """Return a network with random weights."""

    @property
    def patch_divisors(self) -> tuple[int, ...]:
        return (1, 1)

    def patch_mistakes(self, shape: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Yield (what is wrong, its fix) for an image (H, W) that the network does not take."""
        least = self.smallest_pixels
        for axis, pixels in zip("HW", shape, strict=True):
            if pixels < least:
                yield (
                    f"has {pixels} pixels along {axis}, and the network needs at least {least}",
                    f"enlarge the images to {least} pixels or more, or use fewer blocks",
                )


class Pool(nn.Module):
    """Pooling of 2 × 2 pixels with stride 2; an axis of a single pixel stays as it is.

    So a network with five poolings takes an image of 16 pixels, where the last has nothing to do.
    """

    def __init__(self, kind: Literal["max", "average"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        size = (min(2, int(maps.shape[-2])), min(2, int(maps.shape[-1])))
        if self.kind == "max":
            return functional.max_pool2d(maps, size)
        return functional.avg_pool2d(maps, size)

    def extra_repr(self) -> str:
        return self.kind


def count_multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image (C, H, W).

    It counts on the network's own device; build it on the device "meta" to count without computing.
    """
    total = 0

    def count(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            per_output = math.prod(module.kernel_size) * module.in_channels // module.groups
            total += output.numel() * per_output
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    was_training, device = network.training, next(network.parameters()).device
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *image_shape, device=device))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return total
