"""Recipes: one frozen model per stage, read from TOML. They hold names and numbers, never code."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from volseg.errors import VolsegError
from volseg.inputs import MAX_NAME, NotAFileError, read_toml, shorten

AUTO = "auto"
Auto = Literal["auto"]
PLANNED_LAYERS = ("features", "strides", "kernels")
Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]
MOST_LABELS = 254  # 255 marks unannotated voxels
MAX_PATCH_VOXELS = 2**28  # 645 along each axis
MAX_PIXELS = 2**28  # in a batch of the classifier
MAX_SETTING, MAX_SETTINGS = 4096, 1000  # largest number under [network], most values
MAX_MISTAKES = 20  # listed in one message

# The bounds lie far beyond sensible values, but within what arrays, float32 and a day of work can
# hold: a recipe may come from a stranger.
Positive = Annotated[float, Field(gt=0, le=1e39)]
PositiveInt = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Intensity = Annotated[float, Field(ge=-1e39, le=1e39)]  # float32 ends at 3.4e38
StandardDeviation = Annotated[float, Field(ge=1e-12, le=1e39)]  # of intensities; a divisor
SpacingMm = Annotated[float, Field(ge=0.01, le=100)]  # the limits for scans, too
Factor = Annotated[float, Field(ge=0.01, le=100)]
Degrees = Annotated[int, Field(ge=0, le=360)]
Millimetres = Annotated[float, Field(ge=0, le=10_000)]
Edge = Annotated[int, Field(ge=1, le=4096)]  # voxels of a patch along one axis
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Repeats = Annotated[int, Field(ge=1, le=1_000_000)]
LabelValue = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # `Data` checks the range of labels
Name = Annotated[str, Field(max_length=MAX_NAME)]

HU, SUV, ARBITRARY = "HU", "SUV", "a.u."
SPELLINGS = {HU: ("hu", "hounsfield", "hounsfieldunit", "hounsfieldunits"), SUV: ("suv",)}
SPELLINGS |= {ARBITRARY: ("au", "arbitrary", "arbitraryunit", "arbitraryunits")}
UNITS = {spelling: unit for unit, spellings in SPELLINGS.items() for spelling in spellings}
MISSPELT = 0.75  # similarity to a long spelling from which a unit counts as misspelt
LONG = 6  # letters; shorter texts, such as SUVR or mHU, may be units of their own


def parse_unit(text: str) -> str:
    """Return HU, SUV or a.u. for any usual spelling of it, else the text itself.

    Raises:
        ValueError: the text looks like a misspelling of one of them.

    >>> parse_unit("Hounsfield units "), parse_unit("Bq/mL")
    ('HU', 'Bq/mL')
    """
    plain = re.sub(r"[\s._-]", "", text.casefold())
    long = [spelling for spelling in UNITS if min(len(spelling), len(plain)) >= LONG]
    near = difflib.get_close_matches(plain, long, n=1, cutoff=MISSPELT)
    if near and plain not in UNITS:
        unit = UNITS[near[0]]
        raise ValueError(f"{shorten(text)!r} is almost the unit {unit}: write {unit}")
    return UNITS.get(plain, text.strip())


IntensityUnit = Annotated[Name, AfterValidator(parse_unit)]
Text = Annotated[str, Field(max_length=20_000)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """The images of a case and the meaning of the mask's values."""

    channels: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)]
    # name = value in the mask; any other value but 0 is an error
    labels: Annotated[dict[Name, LabelValue], Field(min_length=1, max_length=1000)]
    intensity_unit: IntensityUnit  # of the first channel, on which lesions are measured
    # Guessed from the training scans: then no density, mass or calcium score is computed.
    unit_guessed: bool = False
    # Overlapping regions: the mask value of each output channel, written where its sigmoid is over
    # 0.5; later channels overwrite earlier ones. None: channel 0 is the background, the labels
    # follow, and the largest logit wins.
    regions_class_order: Annotated[tuple[LabelValue, ...], Field(max_length=1000)] | None = None
    # To train such regions: name = the mask values it consists of, one entry per output channel.
    regions: Annotated[dict[Name, tuple[LabelValue, ...]], Field(max_length=1000)] | None = None
    # Mask value of unannotated voxels, which are neither trained on nor evaluated.
    ignore: LabelValue | None = None
    # Channels on different grids are an error, or are resampled to the grid of the first by world
    # coordinates; `rigid` also registers them, for patients who moved between the scans.
    grids: Literal["same", "first"] = "same"
    align: Literal["none", "rigid"] = "none"
    # A missing channel is an error, or is 0 after normalisation (`empty`); the first is required.
    missing: Literal["error", "empty"] = "error"

    @model_validator(mode="after")
    def _labels_are_distinct_and_not_background(self) -> Data:
        _refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        values, order = list(self.labels.values()), self.regions_class_order
        if len(set(values)) < len(values):
            yield "two labels share one value"
        if min(values) < 1 or max(values) > 65535:
            yield (
                "label values must be whole numbers from 1 to 65535 (0 is the background), "
                f"got {min(values)} to {max(values)}"
            )
        if self.ignore is not None and self.ignore in (0, *values):
            yield f"ignore = {self.ignore} is also the background or a label: use another value"
        if self.align != "none" and self.grids == "same":
            yield 'align = "rigid" needs grids = "first"'
        if order is not None and sorted(order) != sorted(values):
            yield "regions_class_order must hold the value of each label once"
        if len(values) > MOST_LABELS:
            yield f"{len(values)} labels exceed the {MOST_LABELS} that a prepared mask can hold"
        if self.regions is None:
            return
        if order is None or len(order) != len(self.regions):
            yield "regions need regions_class_order, with one mask value per region"
        used = {value for region in self.regions.values() for value in region}
        if used - set(values) or not all(self.regions.values()):
            yield "every region must consist of the values of one or more labels"

    @property
    def label_names(self) -> dict[int, str]:
        """Label names by ascending mask value, like output channels 1, 2, … without regions."""
        by_value = sorted(self.labels.items(), key=lambda item: item[1])
        return {value: name for name, value in by_value}

    @property
    def region_classes(self) -> tuple[tuple[int, ...], ...] | None:
        """Classes (1 = smallest mask value, …) of each output channel; None without regions."""
        if self.regions is None:
            return None
        index = {value: number for number, value in enumerate(self.label_names, start=1)}
        return tuple(
            tuple(sorted(index[value] for value in values)) for values in self.regions.values()
        )

    @property
    def n_outputs(self) -> int:
        """Number of output channels: one per region, or the background and each label."""
        order = self.regions_class_order
        return 1 + len(self.labels) if order is None else len(order)


class Window(Section):
    """CT normalisation: clip to [low, high], subtract the foreground mean, divide by its SD."""

    method: Literal["window"]
    low: Intensity | Auto = "auto"  # auto: 0.5 percentile of the foreground of the training cases
    high: Intensity | Auto = "auto"  # auto: 99.5 percentile
    mean: Intensity | Auto = "auto"
    sd: StandardDeviation | Auto = "auto"


class ZScore(Section):
    """MRI normalisation: subtract the mean and divide by the standard deviation of the scan."""

    method: Literal["zscore"]
    # Voxels over which the mean and SD are taken; with `nonzero` all other voxels stay 0.
    region: Literal["body", "scan", "nonzero"] = "body"


class Percentile(Section):
    """Scaling that maps two percentiles of the scan to 0 and 1, and clips there."""

    method: Literal["percentile"]
    low_percent: Annotated[float, Field(ge=0, lt=100)] = 1.0
    high_percent: Annotated[float, Field(gt=0, le=100)] = 99.0
    region: Literal["body", "scan"] = "body"


class Scale(Section):
    """Scaling by fixed numbers, for photographs or intensities that are already comparable."""

    method: Literal["scale"]
    subtract: Intensity = 0.0
    divide_by: StandardDeviation = 1.0


Normalise = Annotated[Window | ZScore | Percentile | Scale, Field(discriminator="method")]


class Preprocess(Section):
    # R, A, S; or those of the file, slowest first (K, J, I), unflipped
    axes: Literal["canonical", "stored"] = "canonical"
    # Network axis n is axis transpose[n] of these; spacing and patch are in the network's order.
    transpose: IntTriple = (0, 1, 2)
    # along R, A, S; auto: median of the training cases
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | Auto = "auto"
    interpolation: Literal["linear", "cubic"] = "linear"
    # If the coarsest spacing of the scan, or else of the target, is more than this many times the
    # finest, that axis (if no other is as coarse) takes the nearest slice and only the other two
    # are interpolated, in resampling to the target and back.
    separate_above: Weight | None = None
    # cubic: clip to the range of the scan (of the slice, if an axis is separate)
    clip_overshoot: bool = False
    # outside the box of the body the mask is background by definition
    crop: Literal["body", "nonzero", "none"] = "body"
    # a voxel above this intensity is body; auto: a tenth of the 99th percentile
    body_above: Intensity | Auto = "auto"
    normalise: Normalise
    normalise_channels: dict[Name, Normalise] = {}  # channels that are normalised differently
    normalise_first: bool = False  # normalise before resampling instead of after it

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Preprocess:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(
                f"transpose must hold 0, 1 and 2 once each, got {list(self.transpose)}"
            )
        forms = (self.normalise, *self.normalise_channels.values())
        if self.crop != "nonzero" and any(getattr(f, "region", None) == "nonzero" for f in forms):
            raise ValueError('region = "nonzero" needs crop = "nonzero"')
        return self

    def normaliser_of(self, channel: str) -> Window | ZScore | Percentile | Scale:
        """Return the normalisation of this channel."""
        return self.normalise_channels.get(channel, self.normalise)


class Named(Section):
    """A section with names of files or of rows of a table; all other keys are their settings.

    Only the size of the settings is checked here: their names and types are checked where the file
    or table is (`training/check.py`).
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    largest: ClassVar[float] = 1e15  # number in the settings

    @model_validator(mode="after")
    def _settings_are_plain(self) -> Self:
        _refuse(_oversized(self.settings, self.largest))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Network(Named):
    """A network: `name` is a file in networks/.

    `features`, `strides` and `kernels` may be "auto".
    """

    largest = MAX_SETTING
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


class Loss(Named):
    """An overlap term over the labels plus a voxel-wise term: rows of training/losses.py."""

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
    loss: Loss = Field(default_factory=Loss)
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _patch_is_not_too_large(self) -> Train:
        _refuse(() if self.patch_shape == AUTO else oversized_patch(self.patch_shape))
        return self


class Infer(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5  # fraction of a patch shared with the next
    # Test-time augmentation (TTA): average over flipped copies; each axis doubles the time.
    tta_axes: tuple[Literal["R", "A", "S"], ...] = ()
    batch_size: BatchSize = 1
    # voxels of symmetric padding beyond each face of the scan
    margin: Annotated[int, Field(ge=0, le=1024)] = 0
    # Where tiles are run: in the whole scan, or only in the box of its body, outside which the mask
    # is background. Unlike `crop = "body"` this keeps the grid on which the network sees the scan.
    inside: Literal["scan", "body"] = "scan"


class Step(Named):
    """A post-processing step: a row of postprocessing/steps.py."""

    step: Name


class Classify(Section):
    """A 2D network that scores each lesion from slices through it."""

    column: Name  # of cases.csv: a number per case
    # name = [lowest, highest] value; cases outside all ranges are not used
    classes: Annotated[
        dict[Name, tuple[Intensity, Intensity]], Field(min_length=2, max_length=1000)
    ]
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
        n = self.batch_size * self.pixels**2
        if n > MAX_PIXELS:
            raise ValueError(
                f"batch_size {self.batch_size} × {self.pixels}² pixels must be at most "
                f"{MAX_PIXELS:,} pixels, got {n:,}"
            )
        return self


class Roi(Section):
    """A coarse first pass: a small network finds the region in which the main network is run."""

    # along R, A, S; several times that of [preprocess]
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm]
    margin_mm: Millimetres = 20.0  # added around the box of all labels that it finds
    network: Network
    train: Train  # of this network; its patch_shape counts coarse voxels
    time_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of --time-budget

    @model_validator(mode="after")
    def _weights_are_those_of_two_classes(self) -> Roi:
        weights = self.train.class_weights
        if weights is not None and len(weights) != 2:
            raise ValueError(
                f"train.class_weights has {len(weights)} numbers, but the first pass has "
                "2 classes (with the background)"
            )
        settings = {"train": self.train.model_dump(), "network": self.network.settings}
        open_keys = [
            f"{section}.{key}"
            for section, values in settings.items()
            for key, value in values.items()
            if value == "auto"
        ]
        if open_keys:
            raise ValueError(f"{', '.join(open_keys)} cannot be auto for the first pass")
        return self


class Measure(Section):
    """Facts about the lesions on which the measurements depend."""

    # Label of the organ that contains the lesions. It is not measured as a lesion; `burden` is the
    # fraction of it that is lesion.
    organ: Name | None = None
    lymph_nodes: tuple[Name, ...] = ()  # labels that are measured along their short axis
    max_targets: PositiveInt = 5  # lesions in the sum of diameters
    max_targets_per_label: PositiveInt = 2
    # (HU, g/cm³) points that replace the published ones
    density_g_cm3: (
        Annotated[tuple[tuple[Intensity, Intensity], ...], Field(max_length=1000)] | None
    ) = None
    calcium: bool = False  # Agatston, volume and mass score
    calcium_threshold_hu: Intensity = 130.0
    # of the scanner, from its calibration phantom; without it no mass score
    calcium_mg_per_ml_hu: Positive | None = None

    @model_validator(mode="after")
    def _density_ascends(self) -> Measure:
        hu = [point[0] for point in self.density_g_cm3 or ()]
        if self.density_g_cm3 is not None and (len(hu) < 2 or hu != sorted(set(hu))):
            raise ValueError("density_g_cm3 needs two or more points, in ascending order of HU")
        if any(density < 0 for _, density in self.density_g_cm3 or ()):
            raise ValueError("density_g_cm3 must hold densities ≥ 0 g/cm³")
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
        labels = {self.measure.organ, *self.measure.lymph_nodes} - {None, *self.data.labels}
        if labels:
            yield f"measure names {_join(labels)}, which data.labels lacks"
        weights, n_classes = self.train.class_weights, 1 + len(self.data.labels)
        if weights is not None and len(weights) != n_classes:
            yield (
                f"train.class_weights has {len(weights)} numbers for {n_classes} classes "
                "(with the background)"
            )
        if weights is not None and self.data.regions is not None:
            yield (
                "train.class_weights needs labels that exclude each other: "
                "leave it out with data.regions"
            )
        channels = set(self.preprocess.normalise_channels) - set(self.data.channels)
        if channels:
            names = _join(channels)
            yield f"preprocess.normalise_channels names {names}, which data.channels lacks"
        forms = (self.preprocess.normalise, *self.preprocess.normalise_channels.values())
        for section in (*forms, self.classify):
            low, high = getattr(section, "low", None), getattr(section, "high", None)
            if isinstance(low, float) and isinstance(high, float) and low >= high:
                yield f"the window from {low:g} to {high:g} is empty: low must be less than high"
        open_layers = [name for name in PLANNED_LAYERS if self.network.settings.get(name) == AUTO]
        layers, n = ", ".join(PLANNED_LAYERS), len(PLANNED_LAYERS)
        if open_layers and (self.network.name != "unet3d" or len(open_layers) < n):
            yield (
                f"only the layers of unet3d can be planned, and only {layers} together: "
                f"make all of them {AUTO!r}, or none"
            )
        if not open_layers and AUTO in (self.train.patch_shape, self.train.batch_size):
            yield (
                "train.patch_shape and batch_size cannot be 'auto' if the network is fixed: "
                f"give numbers, or set {layers} under [network] to 'auto' too"
            )
        if self.roi is not None:
            fine = self.preprocess.spacing_mm
            if fine != "auto" and math.prod(self.roi.spacing_mm) <= math.prod(fine):
                yield "roi.spacing_mm must be coarser than preprocess.spacing_mm"
            if self.roi.time_fraction + (self.classify.time_fraction if self.classify else 0) >= 1:
                yield "roi.time_fraction + classify.time_fraction must be less than 1"

    @property
    def coarse(self) -> Recipe | None:
        """Recipe of the first pass: all labels as one, on a coarser grid; None without [roi]."""
        if self.roi is None:
            return None
        data = dict.fromkeys(("regions_class_order", "regions", "ignore"))
        preprocess = {
            "spacing_mm": self.roi.spacing_mm,
            "interpolation": "linear",
            "separate_above": None,
        }
        changes = {
            "name": f"{self.name}_roi",
            "data": self.data.model_copy(update={"labels": {"region": 1}, **data}),
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
        """True if a plan must still fill in part of the network or its patches."""
        values = (self.train.patch_shape, self.train.batch_size, *self.network.settings.values())
        return any(isinstance(value, str) and value == AUTO for value in values)

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of comments and order of keys."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _join(names: Iterable[str | None]) -> str:
    return ", ".join(sorted(map(str, names)))


def _refuse(mistakes: Iterable[str]) -> None:
    """Raise one ValueError with all mistakes, one per line, if there are any."""
    lines = list(mistakes)
    if lines:
        raise ValueError("\n".join(lines))


def oversized_patch(shape: tuple[int, int, int]) -> Iterator[str]:
    """Yield a mistake if a patch has more voxels than any machine can hold."""
    n, edges = math.prod(shape), " × ".join(map(str, shape))
    if n > MAX_PATCH_VOXELS:
        yield f"a patch of {edges} has {n:,} voxels, more than {MAX_PATCH_VOXELS:,}"


def _oversized(settings: dict[str, Any], largest: float) -> Iterator[str]:
    """Yield mistakes for numbers that are too large, and for too many values.

    The names and types of these settings are only checked later.
    """
    values: list[Any] = list(settings.values())
    count = 0
    while values and count <= MAX_SETTINGS:
        value = values.pop()
        count += 1
        if isinstance(value, dict | list | tuple):
            values.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int | float) and not abs(value) <= largest:
            yield f"holds {shorten(str(value))}; the largest number is {largest:g}"
    if values:
        yield f"holds more than {MAX_SETTINGS} values"


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or a shipped one by its name.

    Raises:
        VolsegError: the file is missing, is not TOML, or has mistakes, which are all listed.
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


def as_recipe(recipe: Path | str | Recipe) -> Recipe:
    """Return the recipe itself, or read it from a file or by its name."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def parse_recipe(content: dict[str, Any], *, where: str) -> Recipe:
    """Return the recipe with this parsed content; `where` names it in error messages."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = validation_messages(error)
        raise VolsegError(
            f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}: {listed(mistakes)}",
            fix="correct the recipe; pipelines/README.md explains each key",
            code="E_RECIPE",
        ) from error


def validation_messages(error: ValidationError, model: type[BaseModel] = Recipe) -> list[str]:
    """Return a sentence for each mistake that a model, such as `Recipe`, found in its input."""
    mistakes = error.errors(include_input=False, include_url=False)
    return [text for mistake in mistakes for text in _sentences(mistake, model)]


def listed(mistakes: list[str]) -> str:
    """Join mistakes to one line, with the first `MAX_MISTAKES` in full."""
    more = len(mistakes) - MAX_MISTAKES
    shown = "; ".join(shorten(text, 1000) for text in mistakes[:MAX_MISTAKES])
    return shown + (f"; and {more} more" if more > 0 else "")


def shipped_recipes() -> dict[str, Path]:
    """Return name → file of the shipped recipes, in the package or in pipelines/ of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "pipelines", package.parent / "pipelines"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    path = Path(recipe)
    # A pipe passes: it is refused where it is opened.
    if os.path.exists(path) and not (str(recipe) in shipped and path.is_dir()):
        return path
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise VolsegError(
        f"{recipe}: there is no such recipe",
        fix=f"give a TOML file, or one of {', '.join(shipped)}",
        code="E_RECIPE",
    )


def _sentences(mistake: Any, model: type[BaseModel]) -> list[str]:
    path = ".".join(shorten(str(part)) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        keys = ", ".join(_known_keys(mistake["loc"], model))
        return [f"{path}: unknown key; known keys are {keys}"]
    lines = mistake["msg"].removeprefix("Value error, ").splitlines()
    return [f"{path or model.__name__.strip('_').lower()}: {line.lower()}" for line in lines]


def _known_keys(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys of the section that has an unknown key at this location."""
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
