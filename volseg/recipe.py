"""What to do, as data: one frozen model per stage, read from TOML. Names and numbers, never code."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from volseg.errors import VolsegError
from volseg.inputs import MAX_NAME, NotAFileError, read_toml, shortened

AUTO = "auto"
Auto = Literal["auto"]
PLANNED_LAYERS = ("features", "strides", "kernels")
Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]
MOST_LABELS = 254  # 255 marks voxels of which nobody knows what they are
MAX_PATCH_VOXELS = 2**28  # 645 along each axis
MAX_PIXELS = 2**28  # of a batch of the classifier
MAX_SETTING, MAX_SETTINGS = (
    4096,
    1000,
)  # the largest number under [network], and how many there may be
MOST_MISTAKES = 20  # written out in one message

# Bounds far beyond what is sensible, but within what arrays, float32 and a day of work can hold: a recipe is a stranger's file.
Positive = Annotated[float, Field(gt=0, le=1e39)]
PositiveInt = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Intensity = Annotated[float, Field(ge=-1e39, le=1e39)]  # float32 ends at 3.4e38
StandardDeviation = Annotated[
    float, Field(ge=1e-12, le=1e39)
]  # of intensities, which are divided by it
SpacingMm = Annotated[float, Field(ge=0.01, le=100)]  # as of the scans that are read
Factor = Annotated[float, Field(ge=0.01, le=100)]
Degrees = Annotated[int, Field(ge=0, le=360)]
Millimetres = Annotated[float, Field(ge=0, le=10_000)]
Edge = Annotated[int, Field(ge=1, le=4096)]  # voxels of a patch along one axis
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Repeats = Annotated[int, Field(ge=1, le=1_000_000)]
LabelValue = Annotated[
    int, Field(ge=-(2**31), lt=2**31)
]  # the rule about label values has its own words
Name = Annotated[str, Field(max_length=MAX_NAME)]

HU, SUV, ARBITRARY = "HU", "SUV", "a.u."
SPELLINGS = {HU: ("hu", "hounsfield", "hounsfieldunit", "hounsfieldunits"), SUV: ("suv",)}
SPELLINGS |= {ARBITRARY: ("au", "arbitrary", "arbitraryunit", "arbitraryunits")}
UNITS = {spelling: unit for unit, spellings in SPELLINGS.items() for spelling in spellings}
MISSPELT = (
    0.75  # similarity to a long spelling, from which on a unit is taken for a slip of the pen
)
LONG = 6  # letters: a few, such as SUVR or mHU, may be a unit of their own


def unit_named(text: str) -> str:
    """The unit of intensities that a text means: HU, SUV or a.u. in any usual spelling, else the text.

    Raises:
        ValueError: it is almost one of these.

    >>> unit_named("Hounsfield units "), unit_named("Bq/mL")
    ('HU', 'Bq/mL')
    """
    plain = re.sub(r"[\s._-]", "", text.casefold())
    long = [spelling for spelling in UNITS if min(len(spelling), len(plain)) >= LONG]
    near = difflib.get_close_matches(plain, long, n=1, cutoff=MISSPELT)
    if near and plain not in UNITS:
        raise ValueError(
            f"{shortened(text)!r} is almost the unit {UNITS[near[0]]}: write {UNITS[near[0]]}"
        )
    return UNITS.get(plain, text.strip())


IntensityUnit = Annotated[Name, AfterValidator(unit_named)]
Text = Annotated[str, Field(max_length=20_000)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which images a case has and what the mask's values mean."""

    channels: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)]
    labels: Annotated[
        dict[Name, LabelValue], Field(min_length=1, max_length=1000)
    ]  # name = value in the mask; every other value but 0 is an error
    intensity_unit: (
        IntensityUnit  # of the first channel, in which lesions are measured: HU, a.u., SUV
    )
    # Nobody stated that unit: it was guessed from the training scans, so no density, mass or calcium score is made with it.
    unit_guessed: bool = False
    # Overlapping regions: the mask value that each output channel of the network writes where its sigmoid is over 0.5; a later
    # channel overwrites an earlier one. None: channel 0 is the background, then the labels, and the largest wins.
    regions_class_order: Annotated[tuple[LabelValue, ...], Field(max_length=1000)] | None = None
    # To train such regions: name = the mask values that it is made of, one per output channel.
    regions: Annotated[dict[Name, tuple[LabelValue, ...]], Field(max_length=1000)] | None = None
    ignore: LabelValue | None = (
        None  # mask value of voxels of which nobody says what they are: neither trained on nor judged
    )
    # Channels on grids of their own are an error, or are brought to the grid of the first one by where they are in the world;
    # `rigid` also moves them there until they fit, for scans between which the patient moved.
    grids: Literal["same", "first"] = "same"
    align: Literal["none", "rigid"] = "none"
    # A case without one of the channels but the first is an error, or has a channel of 0 after normalisation (`empty`).
    missing: Literal["error", "empty"] = "error"

    @model_validator(mode="after")
    def _labels_are_distinct_and_not_background(self) -> Data:
        _refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        values = list(self.labels.values())
        if len(set(values)) < len(values):
            yield "two labels share one value"
        if min(values) < 1 or max(values) > 65535:
            yield "label values are whole numbers from 1 to 65535; 0 is the background"
        if self.ignore is not None and self.ignore in (0, *values):
            yield f"ignore = {self.ignore} is the background or a label"
        if self.align != "none" and self.grids == "same":
            yield 'align = "rigid" needs grids = "first"'
        if self.regions_class_order is not None and sorted(self.regions_class_order) != sorted(
            values
        ):
            yield "regions_class_order must hold the value of each label once"
        if len(values) > MOST_LABELS:
            yield f"{len(values)} labels are more than the {MOST_LABELS} that a prepared mask can hold"
        if self.regions is None:
            return
        if self.regions_class_order is None or len(self.regions_class_order) != len(self.regions):
            yield "regions need regions_class_order, with the mask value that each of them writes"
        unknown = {value for values in self.regions.values() for value in values} - set(
            self.labels.values()
        )
        if unknown or not all(self.regions.values()):
            yield "every region is made of the values of one or more labels"

    @property
    def label_names(self) -> dict[int, str]:
        """Mask value → name by ascending value: the order of the output channels 1, 2, … unless there are regions."""
        return {
            value: name for name, value in sorted(self.labels.items(), key=lambda item: item[1])
        }

    @property
    def region_classes(self) -> tuple[tuple[int, ...], ...] | None:
        """Per output channel the classes (1 for the smallest mask value, …) of its region; None where nothing overlaps."""
        if self.regions is None:
            return None
        index = {value: number for number, value in enumerate(self.label_names, start=1)}
        return tuple(
            tuple(sorted(index[value] for value in values)) for values in self.regions.values()
        )

    @property
    def n_outputs(self) -> int:
        """Output channels of the network: the background and the labels, or one per region."""
        return (
            1 + len(self.labels)
            if self.regions_class_order is None
            else len(self.regions_class_order)
        )


class Window(Section):
    """CT: clip to [low, high], subtract the dataset's foreground mean, divide by its deviation."""

    method: Literal["window"]
    low: Intensity | Auto = "auto"  # auto: 0.5 percentile of the foreground of the training cases
    high: Intensity | Auto = "auto"  # auto: 99.5 percentile
    mean: Intensity | Auto = "auto"
    sd: StandardDeviation | Auto = "auto"


class ZScore(Section):
    """MRI: subtract the mean and divide by the deviation of the scan's own body."""

    method: Literal["zscore"]
    # Whose mean and deviation: the body's, the whole (cropped) scan's, or the nonzero voxels', and then the others stay 0.
    region: Literal["body", "scan", "nonzero"] = "body"


class Percentile(Section):
    """Scale so that two percentiles of the scan's own body become 0 and 1, and clip there."""

    method: Literal["percentile"]
    low_percent: Annotated[float, Field(ge=0, lt=100)] = 1.0
    high_percent: Annotated[float, Field(gt=0, le=100)] = 99.0
    region: Literal["body", "scan"] = "body"


class Scale(Section):
    """Subtract and divide by stated numbers, whatever the scan: photographs, or intensities that are right already."""

    method: Literal["scale"]
    subtract: Intensity = 0.0
    divide_by: StandardDeviation = 1.0


Normalise = Annotated[Window | ZScore | Percentile | Scale, Field(discriminator="method")]


class Preprocess(Section):
    axes: Literal["canonical", "stored"] = (
        "canonical"  # R, A, S; or those of the file, slowest first (K, J, I), unflipped
    )
    transpose: IntTriple = (
        0,
        1,
        2,
    )  # then: network axis n is axis transpose[n] of these; spacing and patch are in its order
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | Auto = (
        "auto"  # along R, A, S; auto: median of the training cases
    )
    interpolation: Literal["linear", "cubic"] = "linear"
    # Where the coarsest spacing of the scan, or else the target's, is more than this many times the finest, that axis (if it is
    # the only one so coarse) takes the nearest slice and only the other two interpolate, on the way there and back.
    separate_above: Weight | None = None
    clip_overshoot: bool = (
        False  # cubic: no value beyond those of the scan (of the slice, where an axis is separate)
    )
    crop: Literal["body", "nonzero", "none"] = (
        "body"  # outside the box of the body the mask is background by definition
    )
    body_above: Intensity | Auto = (
        "auto"  # intensity over which a voxel is body; auto: a tenth of the 99th percentile
    )
    normalise: Normalise
    normalise_channels: dict[Name, Normalise] = {}  # the channels for which it is another one
    normalise_first: bool = (
        False  # normalise the scan's own voxels before they are resampled, not what comes out
    )

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Preprocess:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(
                f"transpose must hold 0, 1 and 2 once each, not {list(self.transpose)}"
            )
        regions = {
            getattr(form, "region", None)
            for form in (self.normalise, *self.normalise_channels.values())
        }
        if "nonzero" in regions and self.crop != "nonzero":
            raise ValueError('region = "nonzero" needs crop = "nonzero"')
        return self

    def normalise_of(self, channel: str) -> Window | ZScore | Percentile | Scale:
        """How this channel is normalised."""
        return self.normalise_channels.get(channel, self.normalise)


class Network(Section):
    """`name` is a file in models/; every other key goes to its `build` function. `features`, `strides` and `kernels` may be "auto"."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Name

    @model_validator(mode="after")
    def _settings_are_of_a_network_that_can_be_built(self) -> Network:
        _refuse(_oversized(self.settings, MAX_SETTING))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Augment(Section):
    """Random changes of a training patch; a probability of 0 switches one off."""

    flip_axes: tuple[Literal["R", "A", "S"], ...] = ("R", "A", "S")
    spatial_probability: Fraction = 0.5
    rotation_degrees: tuple[Degrees, Degrees, Degrees] = (
        15,
        15,
        15,
    )  # largest angle about R, A and S
    scaling: tuple[Factor, Factor] = (0.85, 1.2)
    elastic_probability: Fraction = 0.0
    elastic_mm: Annotated[float, Field(gt=0, le=1000)] = (
        3.0  # standard deviation of the displacement of a control point; there are 5 along each axis
    )
    noise_probability: Fraction = 0.15
    noise_sd: Weight = 0.1  # of the normalised intensity
    blur_probability: Fraction = 0.1
    blur_sigma: tuple[Factor, Factor] = (0.5, 1.0)  # voxels
    brightness_probability: Fraction = 0.15
    brightness: tuple[Factor, Factor] = (0.85, 1.15)
    contrast_probability: Fraction = 0.15
    contrast: tuple[Factor, Factor] = (0.8, 1.25)
    low_resolution_probability: Fraction = 0.1
    low_resolution: tuple[Factor, Factor] = (
        0.5,
        1.0,
    )  # voxels this much coarser, and interpolated back
    gamma_probability: Fraction = 0.1
    gamma: tuple[Factor, Factor] = (0.8, 1.25)
    channel_drop_probability: Fraction = (
        0.0  # that a channel but the first is 0, for cases in which it is missing
    )


class Loss(Section):
    """An overlap term over the labels plus cross-entropy voxel by voxel."""

    overlap: Literal["dice", "generalised_dice", "tversky", "none"] = "dice"
    tversky_fp_weight: Positive = (
        0.3  # cost of voxels that only the network has; Dice is 0.5 and 0.5
    )
    tversky_fn_weight: Positive = 0.7  # and of those that it missed
    focal_gamma: Annotated[float, Field(ge=0, le=100)] = (
        0.0  # over 0, cross-entropy turns its back on voxels that are right already
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class Train(Section):
    patch_shape: tuple[Edge, Edge, Edge] | Auto  # voxels of the resampled grid
    batch_size: BatchSize | Auto = 2
    steps_per_epoch: Repeats = 50
    epochs: Repeats = 100
    patience: Repeats = 30  # epochs without a better validation Dice before training stops
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: with Nesterov momentum of 0.99
    schedule: Literal["cosine", "poly"] = (
        "cosine"  # how the learning rate falls to 0 at the end of the run, or of --time-budget
    )
    learning_rate: Positive = 2e-3
    weight_decay: Weight = 1e-3  # L2
    l1: Weight = 0.0  # times the sum of all absolute weights, added to the loss
    max_grad_norm: Positive = 5.0  # longer gradients are shortened to it
    accumulate: PositiveInt = (
        1  # batches whose gradients make one step: a larger batch in the same memory
    )
    foreground_fraction: Fraction | Auto = (
        0.5  # of the patches that are centred on a labelled voxel
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = (
        0.99  # the averaged weights are validated and kept
    )
    validation_cases: Repeats = 20  # looked at after each epoch; the final metrics use all
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = (
        0.2  # of the patients, where the dataset has no `split`
    )
    class_weights: tuple[Positive, ...] | None = (
        None  # cross-entropy weights of background and labels
    )
    loss: Loss = Loss()
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _patch_is_not_too_large(self) -> Train:
        _refuse(() if self.patch_shape == AUTO else oversized_patch(self.patch_shape))
        return self


class Infer(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = (
        0.5  # fraction of a patch shared with its neighbour
    )
    tta_axes: tuple[
        Literal["R", "A", "S"], ...
    ] = ()  # average over mirrored copies: each axis doubles the time
    batch_size: BatchSize = 1
    margin: Annotated[int, Field(ge=0, le=1024)] = (
        0  # voxels by which the scan is continued by its mirror image beyond each face
    )

    # Where tiles are run: on the whole scan, or only on the box of its body, outside which the mask is then background by
    # definition. Unlike `crop = "body"` it leaves the grid on which the network sees the scan as it is.
    inside: Literal["scan", "body"] = "scan"


class Step(Section):
    """`step` is a row of the table in postprocess/steps.py; every other key goes to it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    step: Name

    @model_validator(mode="after")
    def _settings_are_plain(self) -> Step:
        _refuse(_oversized(self.settings, 1e15))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Classify(Section):
    """A 2D network that scores each lesion from slices through it."""

    column: Name  # of cases.csv: a number per case
    classes: Annotated[
        dict[Name, tuple[Intensity, Intensity]], Field(min_length=2, max_length=1000)
    ]  # name = [lowest, highest] value; others are not used
    network: Network
    field_of_view_mm: Annotated[float, Field(gt=0, le=10_000)] = 48.0
    pixels: Annotated[int, Field(ge=8, le=4096)] = 64
    low: Intensity  # intensity window of the slices
    high: Intensity
    batch_size: BatchSize = 32
    epochs: Repeats = 60
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 1e-2
    time_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of --time-budget

    @model_validator(mode="after")
    def _batch_is_not_too_large(self) -> Classify:
        if self.batch_size * self.pixels**2 > MAX_PIXELS:
            raise ValueError(
                f"batch_size {self.batch_size} × {self.pixels}² pixels are more than {MAX_PIXELS:,} pixels"
            )
        return self


class Roi(Section):
    """A coarse first pass: a small network finds where the labels are, and the recipe's own is run only there."""

    spacing_mm: tuple[
        SpacingMm, SpacingMm, SpacingMm
    ]  # along R, A, S; several times that of [preprocess]
    margin_mm: Millimetres = 20.0  # by which the region goes beyond the box of what was found
    network: Network
    train: Train  # of this network; its patch_shape counts coarse voxels
    time_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of --time-budget

    @model_validator(mode="after")
    def _weights_are_those_of_two_classes(self) -> Roi:
        weights = self.train.class_weights
        if weights is not None and len(weights) != 2:
            raise ValueError(
                f"train.class_weights has {len(weights)} numbers; here are two classes, with background"
            )
        settings = {"train": self.train.model_dump(), "network": self.network.settings}
        open_ = [
            f"{part}.{key}"
            for part, keys in settings.items()
            for key, value in keys.items()
            if value == "auto"
        ]
        if open_:
            raise ValueError(f"{', '.join(open_)} cannot be auto for the first pass")
        return self


class Measure(Section):
    """What the lesions are, where the numbers depend on it."""

    # A label that is the organ in which the others lie: it is no lesion, and `burden` is their share of it.
    organ: Name | None = None
    lymph_nodes: tuple[Name, ...] = ()  # labels that are measured along their short axis
    max_targets: PositiveInt = 5  # lesions in the sum of diameters
    max_targets_per_label: PositiveInt = 2
    density_g_cm3: (
        Annotated[tuple[tuple[Intensity, Intensity], ...], Field(max_length=1000)] | None
    ) = None  # (HU, g/cm³) points in place of the published ones
    calcium: bool = False  # Agatston, volume and mass score
    calcium_threshold_hu: Intensity = 130.0
    calcium_mg_per_ml_hu: Positive | None = (
        None  # of the scanner, from its calibration phantom; without it no mass
    )

    @model_validator(mode="after")
    def _density_ascends(self) -> Measure:
        at = [hu for hu, _ in self.density_g_cm3 or ()]
        if self.density_g_cm3 is not None and (len(at) < 2 or at != sorted(set(at))):
            raise ValueError("density_g_cm3 needs two or more points of ascending HU")
        if any(density < 0 for _, density in self.density_g_cm3 or ()):
            raise ValueError("density_g_cm3 holds a density below 0")
        return self


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=200)]
    description: Text
    intended_use: Text = ""
    limits: Text = ""
    data_source: Text = ""  # attribution that the model card repeats
    data: Data
    preprocess: Preprocess
    network: Network
    train: Train
    infer: Infer = Infer()
    postprocess: Annotated[tuple[Step, ...], Field(max_length=100)] = ()
    classify: Classify | None = None
    roi: Roi | None = None
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _numbers_fit_together(self) -> Recipe:
        _refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        strange = {self.measure.organ, *self.measure.lymph_nodes} - {None, *self.data.labels}
        if strange:
            yield f"measure names {', '.join(sorted(map(str, strange)))}, which data.labels does not"
        weights, n_classes = self.train.class_weights, 1 + len(self.data.labels)
        if weights is not None and len(weights) != n_classes:
            yield f"train.class_weights has {len(weights)} numbers for {n_classes} classes with background"
        if weights is not None and self.data.regions is not None:
            yield "train.class_weights are those of labels that exclude each other; leave them out with data.regions"
        unknown = sorted(set(self.preprocess.normalise_channels) - set(self.data.channels))
        if unknown:
            yield f"preprocess.normalise_channels names {', '.join(unknown)}, which data.channels does not"
        forms = (self.preprocess.normalise, *self.preprocess.normalise_channels.values())
        for section in (*forms, self.classify):
            low, high = getattr(section, "low", None), getattr(section, "high", None)
            if isinstance(low, float) and isinstance(high, float) and low >= high:
                yield f"the window from {low:g} to {high:g} is empty"
        opened = [name for name in PLANNED_LAYERS if self.network.settings.get(name) == AUTO]
        if opened and (self.network.name != "unet3d" or len(opened) < len(PLANNED_LAYERS)):
            yield (
                f"only unet3d plans its layers, and {', '.join(PLANNED_LAYERS)} together: make all of them {AUTO!r}, or none"
            )
        if not opened and AUTO in (self.train.patch_shape, self.train.batch_size):
            yield (
                "train.patch_shape and batch_size cannot be 'auto' for a network that is stated: "
                f"state them, or make {', '.join(PLANNED_LAYERS)} under [network] 'auto' too"
            )
        if self.roi is not None:
            fine = self.preprocess.spacing_mm
            if fine != "auto" and math.prod(self.roi.spacing_mm) <= math.prod(fine):
                yield "roi.spacing_mm is no coarser than preprocess.spacing_mm, so the first pass saves nothing"
            if self.roi.time_fraction + (self.classify.time_fraction if self.classify else 0) >= 1:
                yield "roi.time_fraction and classify.time_fraction leave no time for the network itself"

    @property
    def coarse(self) -> Recipe | None:
        """The recipe of the first pass: any label against the background, on a coarser grid; None where there is none."""
        if self.roi is None:
            return None
        data = {
            "labels": {"region": 1},
            "regions_class_order": None,
            "regions": None,
            "ignore": None,
        }
        preprocess = {
            "spacing_mm": self.roi.spacing_mm,
            "interpolation": "linear",
            "separate_above": None,
        }
        changes = {
            "name": f"{self.name}_roi",
            "data": self.data.model_copy(update=data),
            "preprocess": self.preprocess.model_copy(update=preprocess),
            "network": self.roi.network,
            "train": self.roi.train,
            "infer": Infer(),
            "postprocess": (),
            "classify": None,
            "roi": None,
        }
        return self.model_copy(update=changes)

    @property
    def is_open(self) -> bool:
        """Whether something of the network or its patches is left to the plan."""
        stated = (self.train.patch_shape, self.train.batch_size, *self.network.settings.values())
        return any(isinstance(value, str) and value == AUTO for value in stated)

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of comments and order of keys."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _refuse(mistakes: Iterable[str]) -> None:
    """Raise one ValueError that names all of them, a line each; none if there is none."""
    found = list(mistakes)
    if found:
        raise ValueError("\n".join(found))


def oversized_patch(shape: tuple[int, int, int]) -> Iterator[str]:
    """The mistake of a patch that no machine holds."""
    voxels = math.prod(shape)
    if voxels > MAX_PATCH_VOXELS:
        yield f"a patch of {' × '.join(map(str, shape))} has {voxels:,} voxels, more than {MAX_PATCH_VOXELS:,}"


def _oversized(settings: dict[str, Any], largest: float) -> Iterator[str]:
    """The mistakes of settings whose names and kinds are not known yet: numbers that are too large, or too many of them."""
    values: list[Any] = list(settings.values())
    count = 0
    while values and count <= MAX_SETTINGS:
        value = values.pop()
        count += 1
        if isinstance(value, dict | list | tuple):
            values.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int | float) and not abs(value) <= largest:
            yield f"holds {shortened(str(value))}; the largest number is {largest:g}"
    if values:
        yield f"holds more than {MAX_SETTINGS} values"


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or one that ships with volseg by its name.

    Raises:
        VolsegError: the file is not there, is not TOML, or has mistakes; all of them are named at once.
    """
    path = _find(recipe)
    try:
        content = read_toml(path)
    except NotAFileError as error:
        raise VolsegError(
            f"{path}: {error.strerror}", fix="give a TOML file", code="E_NOTFILE"
        ) from error
    except OSError as error:
        raise VolsegError(
            f"{path}: cannot be read ({error.strerror})", fix="check its permissions", code="E_PERM"
        ) from error
    except ValueError as error:
        raise VolsegError(
            f"{path}: not a TOML file ({error})", fix="correct that line", code="E_RECIPE"
        ) from error
    return parse_recipe(content, where=str(path))


def parse_recipe(content: dict[str, Any], *, where: str) -> Recipe:
    """A recipe from its parsed content; `where` names it in error messages."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = mistakes_of(error)
        raise VolsegError(
            f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}: {listed(mistakes)}",
            fix="correct the recipe; pipelines/README.md explains each key",
            code="E_RECIPE",
        ) from error


def mistakes_of(error: ValidationError, model: type[BaseModel] = Recipe) -> list[str]:
    """A sentence for each mistake that a model, such as `Recipe`, found in a stranger's content."""
    mistakes = error.errors(include_input=False, include_url=False)
    return [text for mistake in mistakes for text in _sentences(mistake, model)]


def listed(mistakes: list[str]) -> str:
    """The mistakes for one message; of very many the first."""
    more = len(mistakes) - MOST_MISTAKES
    shown = "; ".join(shortened(text, 1000) for text in mistakes[:MOST_MISTAKES])
    return shown + (f"; and {more} more" if more > 0 else "")


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that come with volseg: inside an installed package, or in pipelines/ of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "pipelines", package.parent / "pipelines"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    path = Path(recipe)
    if os.path.exists(path) and not (
        str(recipe) in shipped and path.is_dir()
    ):  # a pipe is refused where it is opened
        return path
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise VolsegError(
        f"{recipe}: there is no such recipe",
        fix=f"give a TOML file, or one of {', '.join(shipped)}",
        code="E_RECIPE",
    )


def _sentences(mistake: Any, model: type[BaseModel]) -> list[str]:
    path = ".".join(shortened(str(part)) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return [f"{path}: unknown key; known are {', '.join(_known_keys(mistake['loc'], model))}"]
    lines = mistake["msg"].removeprefix("Value error, ").splitlines()
    return [f"{path or model.__name__.strip('_').lower()}: {line.lower()}" for line in lines]


def _known_keys(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Keys of the section in which an unknown key was found."""
    candidates: list[type[BaseModel]] = [model]
    for part in location[:-1]:
        field = candidates[0].model_fields.get(str(part))
        if field is not None:
            candidates = _models_in(field.annotation)
        else:  # the tag of a union, such as `window` in preprocess.normalise.window.hihg
            tagged = [
                candidate
                for candidate in candidates
                if (tag := candidate.model_fields.get("method")) is not None
                and part in get_args(tag.annotation)
            ]
            candidates = tagged or candidates
    return list(candidates[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
