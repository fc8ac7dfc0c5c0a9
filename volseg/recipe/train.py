"""The sections [network] and [train]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from volseg.recipe.section import (
    AUTO,
    Auto,
    BatchSize,
    Degrees,
    Edge,
    Factor,
    Fraction,
    Name,
    NamedSection,
    Positive,
    PositiveInt,
    Repeats,
    Section,
    Weight,
    oversized_patch,
    refuse,
)


class Network(NamedSection):
    """A network: `name` is a file in networks/, all other keys are fields of its `Settings`.

    `features`, `strides` and `kernels` may be "auto".
    """

    largest = 4096
    name: Name


class Augment(Section):
    """Random changes of a training patch; a probability of 0 switches one off."""

    flip_axes: tuple[Literal["R", "A", "S"], ...] = ("R", "A", "S")
    spatial_probability: Fraction = 0.5
    rotation_degrees: tuple[Degrees, Degrees, Degrees] = (15, 15, 15)  # maximum about R, A and S
    scaling: tuple[Factor, Factor] = (0.85, 1.2)
    elastic_probability: Fraction = 0.0
    # Standard deviation of the displacement of a control point; there are 5 along each axis.
    elastic_mm: Annotated[float, Field(gt=0, le=1000)] = 3.0
    noise_probability: Fraction = 0.15
    noise_sd: Weight = 0.1  # of the normalised intensity
    blur_probability: Fraction = 0.1
    blur_sigma: tuple[Factor, Factor] = (0.5, 1.0)  # voxels
    brightness_probability: Fraction = 0.15
    brightness: tuple[Factor, Factor] = (0.85, 1.15)
    contrast_probability: Fraction = 0.15
    contrast: tuple[Factor, Factor] = (0.8, 1.25)
    low_resolution_probability: Fraction = 0.1
    low_resolution: tuple[Factor, Factor] = (0.5, 1.0)  # downsampled by this factor, and back
    gamma_probability: Fraction = 0.1
    gamma: tuple[Factor, Factor] = (0.8, 1.25)
    # Sets a channel (never the first) to 0, for cases in which it is missing.
    channel_drop_probability: Fraction = 0.0


class Loss(NamedSection):
    """An overlap term over the labels plus a voxel-wise term: rows of training/losses.py."""

    largest = 1e15
    overlap: Name = "dice"
    voxel: Name = "cross_entropy"


class Train(Section):
    patch_shape: tuple[Edge, Edge, Edge] | Auto  # voxels of the resampled grid
    batch_size: BatchSize | Auto = 2
    steps_per_epoch: Repeats = 50
    epochs: Repeats = 100
    patience: Repeats = 30  # stop after this many validations without a new best Dice
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: with Nesterov momentum of 0.99
    # how the learning rate falls to 0 at the end of the run, or of --time-budget
    schedule: Literal["cosine", "poly"] = "cosine"
    learning_rate: Positive = 2e-3
    weight_decay: Weight = 1e-3  # L2
    l1: Weight = 0.0  # times the sum of all absolute weights, added to the loss
    max_grad_norm: Positive = 5.0  # gradients are clipped to this norm
    accumulate: PositiveInt = 1  # gradient accumulation: batches per optimiser step
    foreground_fraction: Fraction | Auto = 0.5  # of the patches, centred on a labelled voxel
    # of the averaged weights, which are validated and saved
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validation_cases: Repeats = 20  # validated after each epoch; the final metrics use all
    # of the patients, if the dataset has no `split`
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    # cross-entropy weights of background and labels
    class_weights: tuple[Positive, ...] | None = None
    loss: Loss = Loss()
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _patch_is_not_too_large(self) -> Train:
        refuse(() if self.patch_shape == AUTO else oversized_patch(self.patch_shape))
        return self
