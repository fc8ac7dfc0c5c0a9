"""The recipe of a model that classifies 2D images, or predicts a number from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from volseg.recipe.images import Images
from volseg.recipe.section import (
    AUTO,
    Auto,
    BatchSize,
    Degrees,
    Factor,
    Fraction,
    Intensity,
    Name,
    NamedSection,
    Positive,
    PositiveInt,
    Repeats,
    Section,
    Text,
    Weight,
    closed,
    open_keys,
    refuse,
)
from volseg.recipe.train import Network

CLASSES, LABELS, NUMBER = "classes", "labels", "number"
SCAN, LESION = "scan", "lesion"  # inputs of several images each
SEPARATOR = "|"  # between the names of several labels in a cell
Kind = Literal["classes", "labels", "number"]
MAX_CLASSES = 1000
Range = tuple[Intensity, Intensity]


def split_names(cell: str) -> list[str]:
    """Return the classes or labels in a cell of several.

    >>> split_names("benign | malignant"), split_names("|")
    (['benign', 'malignant'], [])
    """
    return [name.strip() for name in cell.split(SEPARATOR) if name.strip()]


class Target(Section):
    """What an image is, and what is predicted from it."""

    # A 2D file, an axial slice of a volume, the slices through a lesion, or all slices of a scan.
    input: Literal["image", "slice", "lesion", "scan"] = "image"
    target: Name  # column of the table of cases
    # One class of several; several labels at once, separated by |, which alone is none of them;
    # or a number.
    kind: Kind | Auto = AUTO
    # Names in the order of the outputs, or name = [lowest, highest] number.
    classes: (
        Annotated[tuple[Name, ...], Field(max_length=MAX_CLASSES)]
        | Annotated[dict[Name, Range], Field(max_length=MAX_CLASSES)]
        | Auto
    ) = AUTO
    # Mean and standard deviation of a number in training, with which the network's output is
    # scaled.
    mean: Intensity | Auto = AUTO
    sd: Positive | Auto = AUTO

    @model_validator(mode="after")
    def _classes_fit_the_kind(self) -> Target:
        refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.classes == AUTO:
            return
        if self.kind == NUMBER and self.classes:
            yield 'kind = "number" has no classes'
        if self.kind == CLASSES and len(self.classes) < 2:
            yield 'kind = "classes" needs two or more classes'
        if self.kind == LABELS and (isinstance(self.classes, Mapping) or not self.classes):
            yield 'kind = "labels" needs a list of one or more names'
        if len({name.casefold() for name in self.classes}) < len(self.classes):
            yield "two classes have one name"
        for name in self.classes:
            if SEPARATOR in name:
                yield f"the class name {name!r} contains {SEPARATOR!r}, which separates labels"
        if isinstance(self.classes, Mapping):
            for name, (low, high) in self.classes.items():
                if low > high:
                    yield f"the range of {name} is empty: {low:g} to {high:g}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes of a closed recipe, in the order of the outputs."""
        return () if self.classes == AUTO else tuple(self.classes)

    @property
    def n_outputs(self) -> int:
        return 1 if self.kind == NUMBER else len(self.names)


class Sequence(NamedSection):
    """What makes a scan of its slices: a file in networks/sequence/, with its `Settings`.

    The slices themselves go through [network], whose weights are given and not trained.
    """

    largest = 4096
    name: Name = "attention"


class ImageAugment(Section):
    """Random changes of a training image; a probability of 0 switches one off."""

    flip_axes: tuple[Literal["horizontal", "vertical"], ...] = ("horizontal",)
    spatial_probability: Fraction = 0.7  # of rotation, shift, shear and zoom together
    rotation_degrees: Degrees = 15
    shift: Fraction = 0.08  # largest, of the image's edge
    shear_degrees: Annotated[int, Field(ge=0, le=45)] = 5
    zoom: tuple[Factor, Factor] = (0.85, 1.15)
    brightness_probability: Fraction = 0.3
    brightness: Weight = 0.2  # largest shift, in standard deviations of the image
    contrast_probability: Fraction = 0.3
    contrast: tuple[Factor, Factor] = (0.8, 1.25)
    noise_probability: Fraction = 0.15
    noise_sd: Weight = 0.1  # in standard deviations of the image
    cutout_probability: Fraction = 0.0
    cutout: Fraction = 0.3  # edge of the square that is set to the image's mean, of its edge
    # Of lesions with a mask channel: largest distance by which the outline grows or shrinks, and by
    # which the mask is moved, as predicted masks differ from the reference.
    mask_jitter_mm: Annotated[float, Field(ge=0, le=100)] = 0.0
    mixup: Weight = 0.0  # parameter of the Beta distribution that draws the proportions; 0: none


class ImageLoss(NamedSection):
    """The loss: a row of training/image_losses.py."""

    largest = 1e15
    name: Name | Auto = AUTO


class ImageTrain(Section):
    """How the network of a classifier is trained."""

    batch_size: BatchSize | Auto = AUTO
    steps_per_epoch: Repeats | Auto = AUTO
    epochs: Repeats | Auto = AUTO
    patience: Repeats = 20  # stop after this many epochs without a new best score
    # Score of the validation images that selects the best epoch: a row of evaluation.
    monitor: Name | Auto = AUTO
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "poly"] = "cosine"
    learning_rate: Positive | Auto = AUTO
    weight_decay: Weight = 1e-2  # L2
    l1: Weight = 0.0
    max_grad_norm: Positive = 5.0
    accumulate: PositiveInt = 1
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    # Rare classes: weighted in the loss, drawn as often as the others, or left as they are.
    balance: Literal["none", "weights", "sampling"] | Auto = AUTO
    # With --init: epochs in which only the head is trained, and the factor by which the learning
    # rate falls from one stage of the network to the one before it.
    freeze_epochs: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Simple classifiers of simple features, to compare with; at most this part of a time budget.
    baselines: bool = True
    baseline_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    loss: ImageLoss = ImageLoss()
    augment: ImageAugment = ImageAugment()


class ImageInfer(Section):
    tta_axes: tuple[Literal["horizontal", "vertical"], ...] = ()
    batch_size: BatchSize = 32
    coverage: Annotated[float, Field(gt=0, lt=1)] = 0.9  # of confidence sets and intervals
    top_k: Annotated[int, Field(ge=1, le=MAX_CLASSES)] = 3  # classes that a row lists by rank


class FusionOfMeasurements(Section):
    """A logistic regression on the image's score with measurements of the lesion."""

    # columns of lesions.csv, such as equiv_sphere_diameter_mm
    measurements: Annotated[tuple[Name, ...], Field(min_length=1, max_length=100)]
    l2: Positive = 1.0  # penalty on the weights of the standardised inputs


class ClassifyRecipe(Section):
    """How a model that classifies images is trained and run.

    It is closed if no value is "auto": `volseg.planning.close_images` fills them in.
    """

    model_config = ConfigDict(title="recipe")
    task: Literal["classify"] = "classify"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=200)]
    description: Text
    intended_use: Text = ""
    limits: Text = ""
    data_source: Text = ""
    data: Target
    images: Images = Images()
    network: Network
    sequence: Sequence | None = None  # of scans, and of nothing else
    train: ImageTrain = ImageTrain()
    infer: ImageInfer = ImageInfer()
    fusion: FusionOfMeasurements | None = None

    @model_validator(mode="after")
    def _each_input_has_what_is_its_own(self) -> ClassifyRecipe:
        refuse([*self._mistakes_of_lesions(), *self._mistakes_of_scans()])
        return self

    def _mistakes_of_lesions(self) -> Iterator[str]:
        is_of_lesions, data = self.data.input == LESION, self.data
        has_mask = is_of_lesions and self.images.mask_channel
        if self.train.augment.mask_jitter_mm and not has_mask:
            yield 'train.augment.mask_jitter_mm needs input = "lesion" and a mask_channel'
        if self.fusion is None:
            return
        if not is_of_lesions:
            yield 'fusion needs input = "lesion", as lesions are what is measured'
        if data.kind not in (CLASSES, AUTO) or (data.classes != AUTO and len(data.names) != 2):
            yield "fusion needs two classes"

    def _mistakes_of_scans(self) -> Iterator[str]:
        is_scan = self.data.input == SCAN
        if is_scan and self.sequence is None:
            yield 'input = "scan" needs a section [sequence], such as name = "attention"'
        if self.sequence is not None and not is_scan:
            yield f'[sequence] is of scans, and input is "{self.data.input}"'
        if is_scan and self.train.augment.mixup:
            yield "train.augment.mixup mixes images, and scans have different numbers of slices"
        if is_scan and self.infer.tta_axes:
            yield "infer.tta_axes flips images, and the slices of a scan are embedded once"

    @property
    def in_channels(self) -> int:
        """Channels of an image, slice or plane as input of the network of a closed recipe."""
        if self.data.input == LESION:
            return self.images.lesion_channels
        return closed(self.images.channels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an image or slice as network input: (C, H, W); (planes, C, H, W) of a lesion."""
        edge = closed(self.images.pixels)
        planes = (len(self.images.planes),) if self.data.input == LESION else ()
        return (*planes, self.in_channels, edge, edge)

    @property
    def mask_pixel_mm(self) -> float | None:
        """Edge of a pixel if the last channel of the input is a lesion's mask; None if not."""
        if self.data.input != LESION or not self.images.mask_channel:
            return None
        return self.images.field_of_view_mm / closed(self.images.pixels)

    @property
    def open_keys(self) -> list[str]:
        """Keys whose value is "auto", such as `train.batch_size`."""
        names = ("data", "images", "network", "train")
        return list(open_keys({name: self._content(name) for name in names}))

    def _content(self, name: str) -> dict[str, Any]:
        return getattr(self, name).model_dump()

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of comments and order of keys."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
