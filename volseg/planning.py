"""Fingerprint (facts about a dataset) and plan (settings derived from it and the recipe).

Pure functions; both types convert to JSON and back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import ndimage

from volseg.errors import VolsegError
from volseg.measurement.units import looks_like_ct
from volseg.postprocessing.lesions import label_lesions
from volseg.preprocessing.crop import AxisOrder, canonical_geometry
from volseg.preprocessing.normalise import NORMALISERS, Absent, Normaliser
from volseg.preprocessing.prepare import PrepareSettings
from volseg.recipe import (
    AUTO,
    BatchSize,
    Edge,
    Fraction,
    Intensity,
    Network,
    Preprocess,
    Recipe,
    Roi,
    SpacingMm,
    Text,
    Window,
    oversized_patch,
)
from volseg.sizing import (
    ANISOTROPIC,
    LEAST_LEVELS,
    MOST_FEATURES,
    SMALLEST_EDGE,
    STEPS,
    WIDTHS,
    Budget,
    Scans,
    Size,
    choose_size,
)
from volseg.volume import Volume

# Foreground intensities kept per case: percentiles of a dataset need no more.
SAMPLES_PER_CASE = 10_000
# An axis this many times coarser than the finest is resampled to a low percentile, not the median.
ANISOTROPY = 3.0
LESIONS_PER_CASE = 1000  # whose extent is kept: the largest of a case
CRUMB_FRACTION = 0.01  # of the largest lesion of a case; smaller components do not count as lesions
SMALLEST_PATCH = 16  # voxels along an axis, or the whole scan: less shows no context
LARGEST_LESION = 128**3  # voxels of a patch that lesions may ask for: organs are seen part by part
FEW_SLICES = 8  # of the median scan along its shortest axis: hardly a volume
SMALL_FRACTION = 0.1  # of the median scan in a patch, below which context is missing
# (labelled fraction of the voxels up to which it holds, fraction of patches centred on a label)
RARITY = ((0.001, 0.67), (0.05, 0.5), (1.0, 0.34))
DEFAULT_BUDGET = Budget(memory=8 << 30)
STATED = "stated by the recipe"
EDITED = "from the plan that was given"

Feature = Annotated[int, Field(ge=1, le=4096)]  # channels of a level
Step = Annotated[int, Field(ge=1, le=64)]  # of a stride or a kernel along one axis
Count = Annotated[int, Field(ge=0, le=2**62)]
Length = Annotated[float, Field(gt=0, le=1e6)]  # mm
ScanEdge = Annotated[int, Field(ge=1, le=2**31)]  # voxels


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class IntensityStatistics(_Json):
    """Statistics of one channel under the labels of the training cases."""

    mean: Intensity
    sd: Intensity
    p00_5: Intensity
    median: Intensity
    p99_5: Intensity


class DatasetFingerprint(_Json):
    """Facts about the training cases; spacings (mm) and shapes are along R, A, S."""

    n_cases: Count
    spacings_mm: tuple[tuple[Length, Length, Length], ...]
    shapes: tuple[tuple[ScanEdge, ScanEdge, ScanEdge], ...]
    label_voxels: dict[int, Count]
    foreground: dict[str, IntensityStatistics]  # per channel, under the labels
    empty_masks: tuple[str, ...] = ()  # cases without a labelled voxel
    # channel → number of scans that look like a CT in HU; empty if this was not checked
    n_ct_like: dict[str, int] = {}
    # cases whose first channel contradicts the recipe's unit → why
    doubted_units: dict[str, str] = {}
    # Median extent of the lesions along R, A, S; None in older fingerprints.
    lesion_extent_mm: tuple[float, float, float] | None = None


class CaseFingerprint(_Json):
    """Fingerprint of one case.

    `samples` holds intensities under the labels, per channel; `lesion_extents_mm` the extent along
    R, A, S of each connected component of a label, without crumbs.
    """

    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    label_voxels: dict[int, int]
    samples: dict[str, tuple[float, ...]]
    is_ct_like: dict[str, bool] = {}
    unit_doubt: str = ""  # why the first channel cannot be in the recipe's unit
    lesion_extents_mm: tuple[tuple[float, float, float], ...] = ()


class Line(_Json):
    """One decision of a plan, with its reason, for people."""

    setting: Text
    value: Text
    reason: Text


class Layers(_Json):
    """Layers of a U-Net per level, finest first, which a recipe can leave open."""

    features: Annotated[tuple[Feature, ...], Field(max_length=16)]
    strides: Annotated[tuple[tuple[Step, Step, Step], ...], Field(max_length=16)]
    kernels: Annotated[tuple[tuple[Step, Step, Step], ...], Field(max_length=16)]

    @model_validator(mode="after")
    def _one_of_each_per_level(self) -> Layers:
        if not LEAST_LEVELS <= len(self.features) == len(self.strides) == len(self.kernels):
            raise ValueError(
                "features, strides and kernels need one entry per level, "
                f"for {LEAST_LEVELS} levels or more"
            )
        return self


class Plan(_Json):
    """Numbers that training and inference share."""

    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm]
    patch_shape: tuple[Edge, Edge, Edge]
    batch_size: BatchSize
    windows: dict[str, Window]  # per channel that has one; no number is "auto"
    # None: the recipe states it
    foreground_fraction: Fraction | None = None
    network: Layers | None = None
    lines: tuple[Line, ...] = ()

    @model_validator(mode="after")
    def _patch_is_not_too_large(self) -> Plan:
        for mistake in oversized_patch(self.patch_shape):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _windows_are_resolved(self) -> Plan:
        channels = [name for name, window in self.windows.items() if _open_keys(window)]
        if channels:
            raise ValueError(f"the windows of {', '.join(channels)} hold {AUTO!r}, not a number")
        return self

    def complete(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this plan's numbers in place of each "auto".

        Raises:
            VolsegError: the plan lacks one of them.
        """
        train = {
            "patch_shape": self.patch_shape,
            "batch_size": self.batch_size,
            "foreground_fraction": self.foreground_fraction,
        }
        settings = recipe.network.settings
        changes = {name: n for name, n in train.items() if getattr(recipe.train, name) == "auto"}
        open_layers = [name for name, value in settings.items() if value == "auto"]
        layers = {name: getattr(self.network, name, None) for name in open_layers}
        missing = [name for name, value in (changes | layers).items() if value is None]
        if missing:
            raise VolsegError(
                f"the plan has no value for {', '.join(missing)}, which recipe {recipe.name!r} "
                "leaves open",
                fix="state it in the recipe, or make a new plan with `volseg plan`",
                code="E_PLAN",
            )
        network = Network(name=recipe.network.name, **(settings | layers))
        return recipe.model_copy(
            update={"train": recipe.train.model_copy(update=changes), "network": network}
        )

    def overruled_by(self, recipe: Recipe) -> Plan:
        """Return this plan, edited or made for another recipe, with the numbers of the recipe.

        Its lines give the new values, and the reason of each that changed.

        Raises:
            VolsegError: the recipe leaves a window to the plan, which has none for that channel.
        """
        spacing, train = recipe.preprocess.spacing_mm, recipe.train
        fraction = train.foreground_fraction
        fraction = self.foreground_fraction if fraction == AUTO else fraction
        changes: dict[str, Any] = {
            "spacing_mm": self.spacing_mm if spacing == AUTO else spacing,
            "patch_shape": self.patch_shape if train.patch_shape == AUTO else train.patch_shape,
            "batch_size": self.batch_size if train.batch_size == AUTO else train.batch_size,
            "foreground_fraction": fraction,
            "network": self.network if recipe.network.settings.get("features") == AUTO else None,
            "windows": {
                name: self._window(name, form)
                for name in recipe.data.channels
                if isinstance(form := recipe.preprocess.normaliser_of(name), Window)
            },
        }
        plan = self.model_copy(update=changes)
        return plan.model_copy(update={"lines": plan._lines_for(recipe)})

    def _window(self, channel: str, form: Window) -> Window:
        """Return the recipe's window with this plan's numbers in place of each "auto"."""
        keys, planned = _open_keys(form), self.windows.get(channel)
        if keys and planned is None:
            raise VolsegError(
                f"the plan has no intensity window for channel {channel!r}, but the recipe leaves "
                f"{', '.join(keys)} to it",
                fix="state them in the recipe, or make a new plan with `volseg plan`",
                code="E_PLAN",
            )
        return form.model_copy(update={key: getattr(planned, key) for key in keys})

    def _lines_for(self, recipe: Recipe) -> tuple[Line, ...]:
        """Return the lines with the current values, and a new reason for each that changed."""
        states = recipe.train.model_dump() | {"spacing_mm": recipe.preprocess.spacing_mm}
        values = {
            "spacing": (f"{_times(self.spacing_mm)} mm", "spacing_mm"),
            "patch": (f"{_times(self.patch_shape)} voxels", "patch_shape"),
            "batch": (str(self.batch_size), "batch_size"),
        }
        if self.foreground_fraction is not None:
            values["patches on labels"] = (f"{self.foreground_fraction:.0%}", "foreground_fraction")
        lines: dict[str, Line] = {}
        for setting, (value, key) in values.items():
            reason = EDITED if states[key] == AUTO else STATED
            lines[setting] = Line(setting=setting, value=value, reason=reason)
        for name in recipe.data.channels:
            line = _normalisation(name, recipe, self.windows.get(name))
            lines[line.setting] = line
        if self.network is not None:
            for line in _layer_lines(self.network):
                lines[line.setting] = line.model_copy(update={"reason": EDITED})
        else:
            lines["network"] = Line(setting="network", value=recipe.network.name, reason=STATED)
        kept = {
            line.setting: line
            for line in self.lines
            if line.setting in lines or line.setting in ("dimensions", "median lesion")
        }
        changed = {
            setting: line
            for setting, line in lines.items()
            if setting not in kept or kept[setting].value != line.value
        }
        return tuple((kept | changed).values())

    def prepare_settings(
        self, preprocess: Preprocess, channels: Sequence[str], absent: Collection[str] = ()
    ) -> PrepareSettings:
        """Return the settings of `prepare` for scans with these channels; a case lacks `absent`."""
        normalisers = zip(channels, self.normalisers(preprocess, channels), strict=True)
        return PrepareSettings(
            spacing_mm=self.spacing_mm,
            normalisers=tuple(
                Absent() if name in absent else normaliser for name, normaliser in normalisers
            ),
            interpolation=preprocess.interpolation,
            crop=preprocess.crop,
            body_above=None if preprocess.body_above == "auto" else preprocess.body_above,
            axes=preprocess.axes,
            transpose=preprocess.transpose,
            separate_above=preprocess.separate_above,
            clip_overshoot=preprocess.clip_overshoot,
            normalise_first=preprocess.normalise_first,
        )

    def normalisers(
        self, preprocess: Preprocess, channels: Sequence[str]
    ) -> tuple[Normaliser, ...]:
        """Return the normaliser of each channel."""
        forms = [
            self.windows.get(channel, preprocess.normaliser_of(channel)).model_dump()
            for channel in channels
        ]
        return tuple(NORMALISERS[form.pop("method")](**form) for form in forms)

    def coarse(self, roi: Roi) -> Plan:
        """Return the plan of the first pass, on the coarse grid."""
        train = {"patch_shape": roi.train.patch_shape, "batch_size": roi.train.batch_size}
        return self.model_copy(update={"spacing_mm": roi.spacing_mm, **train})


def fingerprint_case(
    images: Mapping[str, Volume], reference: Volume, rng: np.random.Generator
) -> CaseFingerprint:
    """Return header facts of one case and a sample of the intensities under its labels."""
    geometry = next(iter(images.values())).geometry
    canonical = canonical_geometry(geometry, AxisOrder.of(geometry))
    values, counts = np.unique(reference.array[reference.array > 0], return_counts=True)
    foreground = np.flatnonzero(reference.array.ravel(order="K") > 0)
    if foreground.size > SAMPLES_PER_CASE:
        foreground = np.sort(rng.choice(foreground, SAMPLES_PER_CASE, replace=False))
    memory_order = "F" if reference.array.flags.f_contiguous else "C"
    index = np.unravel_index(foreground, reference.array.shape, order=memory_order)
    samples = {
        name: tuple(volume.intensities(volume.array[index]).astype(float))
        for name, volume in images.items()
    }
    return CaseFingerprint(
        spacing_mm=canonical.spacing_mm,
        shape=canonical.shape,
        label_voxels={int(value): int(count) for value, count in zip(values, counts, strict=True)},
        samples=samples,
        is_ct_like={name: looks_like_ct(volume) for name, volume in images.items()},
        lesion_extents_mm=_lesion_extents_mm(reference),
    )


def _lesion_extents_mm(reference: Volume) -> tuple[tuple[float, float, float], ...]:
    """Return the extents along R, A, S of the largest lesions of a mask."""
    lesions = label_lesions(reference.array, reference.geometry)
    smallest = CRUMB_FRACTION * max(lesions.n_voxels, default=0)
    n = min(LESIONS_PER_CASE, sum(size >= smallest for size in lesions.n_voxels))
    order, spacing = AxisOrder.of(reference.geometry), reference.geometry.spacing_mm
    extents = []
    for box in ndimage.find_objects(lesions.ids, max_label=n) if n else ():
        r, a, s = ((box[axis].stop - box[axis].start) * spacing[axis] for axis in order.axes)
        extents.append((round(r, 4), round(a, 4), round(s, 4)))
    return tuple(extents)


def combine_fingerprints(cases: Sequence[CaseFingerprint]) -> DatasetFingerprint:
    """Return the fingerprint of a dataset from those of its cases.

    Raises:
        VolsegError: no voxel of any case is labelled.
    """
    voxels: dict[int, int] = {}
    for case in cases:
        for value, count in case.label_voxels.items():
            voxels[value] = voxels.get(value, 0) + count
    if not voxels:
        raise VolsegError(
            "no training mask holds a labelled voxel", fix="check the masks", code="E_LABELS"
        )
    extents = [extent for case in cases for extent in case.lesion_extents_mm]
    r, a, s = np.median(extents, axis=0).tolist() if extents else (0.0, 0.0, 0.0)
    channels = dict.fromkeys(name for case in cases for name in case.samples)
    pooled = {
        name: np.concatenate(
            [np.asarray(case.samples[name]) for case in cases if name in case.samples]
        )
        for name in channels
    }
    return DatasetFingerprint(
        n_cases=len(cases),
        spacings_mm=tuple(case.spacing_mm for case in cases),
        shapes=tuple(case.shape for case in cases),
        label_voxels=dict(sorted(voxels.items())),
        foreground={name: _statistics(values) for name, values in pooled.items()},
        n_ct_like={
            name: sum(case.is_ct_like.get(name, False) for case in cases) for name in channels
        },
        lesion_extent_mm=(r, a, s) if extents else None,
    )


def make_plan(
    fingerprint: DatasetFingerprint, recipe: Recipe, budget: Budget = DEFAULT_BUDGET
) -> Plan:
    """Resolve every "auto" of the recipe from the fingerprint; stated numbers stay as they are.

    Raises:
        VolsegError: the recipe can only be run, not trained, or nothing fits the budget.
    """
    preprocess = recipe.preprocess
    if recipe.data.regions_class_order is not None and recipe.data.regions is None:
        raise VolsegError(
            f"recipe {recipe.name!r} has overlapping regions, but does not say of which labels "
            "they consist",
            fix="add data.regions, such as { tumour = [1, 2], core = [2] }, or leave out "
            "data.regions_class_order",
            code="E_RECIPE",
        )
    if preprocess.spacing_mm != "auto":
        spacing, why_spacing = preprocess.spacing_mm, STATED
    elif (preprocess.axes, preprocess.transpose) == ("canonical", (0, 1, 2)):
        spacing, why_spacing = _spacing(fingerprint)
    else:
        raise VolsegError(
            f"recipe {recipe.name!r} has other axes than R, A, S, so its spacing cannot be planned",
            fix="state preprocess.spacing_mm in the order of its axes",
            code="E_RECIPE",
        )
    windows = {
        name: _window(name, form, fingerprint)
        for name in recipe.data.channels
        if isinstance(form := preprocess.normaliser_of(name), Window)
    }
    median = _median_shape(fingerprint, spacing)
    lines = [Line(setting="spacing", value=f"{_times(spacing)} mm", reason=why_spacing)]
    lines += [_normalisation(name, recipe, windows.get(name)) for name in recipe.data.channels]
    size, layers, size_lines = _size(fingerprint, recipe, spacing, median, budget)
    fraction, why_fraction = _foreground_fraction(fingerprint)
    if recipe.train.foreground_fraction != "auto":
        fraction, why_fraction = recipe.train.foreground_fraction, STATED
    lines += size_lines
    lines.append(Line(setting="patches on labels", value=f"{fraction:.0%}", reason=why_fraction))
    lines.append(_dimensions(median, size.patch_shape))
    return Plan(
        spacing_mm=spacing,
        patch_shape=size.patch_shape,
        batch_size=size.batch_size,
        windows=windows,
        foreground_fraction=fraction,
        network=layers,
        lines=tuple(lines),
    )


def check_budget(plan: Plan, recipe: Recipe, budget: Budget) -> None:
    """Check that a step of training fits into the budget's memory.

    Memory is modelled by `Size.training_bytes`, for unet3d alone; other networks pass.

    Raises:
        VolsegError: it does not; the fix names a number that would fit.
    """
    size = size_of(plan, recipe)
    if size is None:
        return
    channels, outputs = len(recipe.data.channels), recipe.data.n_outputs
    needed = size.training_bytes(channels, outputs, half=budget.half)
    if needed <= budget.memory:
        return
    smaller = [
        batch
        for batch in range(1, size.batch_size)
        if replace(size, batch_size=batch).training_bytes(channels, outputs, half=budget.half)
        <= budget.memory
    ]
    enough = math.ceil(needed / 2**30 * 10) / 10
    number = f"batch_size {smaller[-1]}" if smaller else "a smaller patch_shape"
    raise VolsegError(
        f"a step with patch {_times(size.patch_shape)}, batch {size.batch_size} and features "
        f"{', '.join(map(str, size.features))} takes about {needed / 2**30:.2f} GB, and the budget "
        f"is {budget.memory / 2**30:.2f} GB",
        fix=f"give --vram {enough:g}G, or {number} in the plan or recipe",
        code="E_BUDGET",
    )


def size_of(plan: Plan, recipe: Recipe) -> Size | None:
    """Return the network and batches of a plan; None unless it is unet3d with stated layers."""
    network = plan.complete(recipe).network
    features, strides = (network.settings.get(name) for name in ("features", "strides"))
    if network.name != "unet3d" or not features or not strides or len(features) != len(strides):
        return None
    return Size(
        features=tuple(features),
        strides=tuple(strides),
        kernels=tuple(network.settings.get("kernels") or [(3, 3, 3)] * len(features)),
        patch_shape=plan.patch_shape,
        batch_size=plan.batch_size,
        depths=1 + int(network.settings.get("deep_supervision", 0)),
        residual=bool(network.settings.get("residual", False)),
        dropout=bool(network.settings.get("dropout", 0)),
    )


def _size(
    fingerprint: DatasetFingerprint,
    recipe: Recipe,
    spacing: tuple[float, float, float],
    median: tuple[float, float, float],
    budget: Budget,
) -> tuple[Size, Layers | None, list[Line]]:
    """Choose patch, batch and network where the recipe leaves them open."""
    train, settings = recipe.train, recipe.network.settings
    patch = None if train.patch_shape == "auto" else train.patch_shape
    batch = None if train.batch_size == "auto" else train.batch_size
    channels, outputs = len(recipe.data.channels), recipe.data.n_outputs
    if settings.get("features") != AUTO:
        assert patch is not None and batch is not None, "`Recipe` refuses this"
        size = Size(features=(), strides=(), kernels=(), patch_shape=patch, batch_size=batch)
        lines = [
            ("patch", f"{_times(patch)} voxels"),
            ("batch", str(batch)),
            ("network", recipe.network.name),
        ]
        return size, None, [Line(setting=name, value=value, reason=STATED) for name, value in lines]
    lesion = lesion_shape(fingerprint, spacing)
    scans = Scans(
        shape=median,
        spacing_mm=spacing,
        n_cases=fingerprint.n_cases,
        channels=channels,
        outputs=outputs,
    )
    size = choose_size(
        scans,
        budget,
        patch_shape=patch,
        batch_size=batch,
        smallest_patch=_smallest_patch(lesion, median),
    )
    needed = size.training_bytes(channels, outputs, half=budget.half) / 2**30
    limit = f"a step takes about {needed:.2f} of the {budget.memory / 2**30:.1f} GB"
    if budget.flops is not None:
        steps = budget.flops / size.step_flops(channels, outputs)
        limit += f" and the time allows about {steps:.0f} steps (the target is {STEPS})"
    seen = min(1.0, math.prod(size.patch_shape) / math.prod(median))
    scan = _times(round(n) for n in median)
    covers = f"covers {seen:.0%} of the median scan ({scan} voxels); {limit}"
    layers = Layers(features=size.features, strides=size.strides, kernels=size.kernels)
    fits = f"fits the budget: {limit}"
    lines = [
        ("patch", f"{_times(size.patch_shape)} voxels", STATED if patch else covers),
        ("batch", str(size.batch_size), STATED if batch else fits),
    ]
    return (
        size,
        layers,
        [
            *(Line(setting=name, value=value, reason=reason) for name, value, reason in lines),
            *_layer_lines(layers),
            *([] if lesion is None else [_lesion_line(lesion, size.patch_shape)]),
        ],
    )


def lesion_shape(
    fingerprint: DatasetFingerprint, spacing: tuple[float, float, float]
) -> tuple[int, int, int] | None:
    """Return the extent of the median lesion in voxels of this spacing; None if it is unknown."""
    if fingerprint.lesion_extent_mm is None:
        return None
    lengths = zip(fingerprint.lesion_extent_mm, spacing, strict=True)
    r, a, s = (max(1, math.ceil(length / mm - 1e-3)) for length, mm in lengths)
    return r, a, s


def _smallest_patch(
    lesion: tuple[int, int, int] | None, median: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Return the smallest patch in which a network can learn what a lesion looks like."""
    edges = [max(n, SMALLEST_PATCH) for n in lesion or (1, 1, 1)]
    shrink = max(1.0, math.prod(edges) / LARGEST_LESION) ** (1 / 3)
    pairs = zip(edges, median, strict=True)
    r, a, s = (max(1, min(math.ceil(edge / shrink), math.ceil(n))) for edge, n in pairs)
    return r, a, s


def _lesion_line(lesion: tuple[int, int, int], patch_shape: tuple[int, int, int]) -> Line:
    cut = any(p < n for p, n in zip(patch_shape, lesion, strict=True))
    reason = "larger than a patch, so seen part by part" if cut else "fits into a patch"
    return Line(setting="median lesion", value=f"{_times(lesion)} voxels", reason=reason)


def _layer_lines(layers: Layers) -> list[Line]:
    """Return the lines of a plan that describe these layers."""
    flat = [f"level {n}" for n, kernel in enumerate(layers.kernels) if 1 in kernel]
    depth = (
        f"an axis is halved while {SMALLEST_EDGE} voxels remain and it is less than "
        f"{ANISOTROPIC:g} times coarser than the finest"
    )
    width = (
        f"doubled per level up to {MOST_FEATURES}; the widest of {', '.join(map(str, WIDTHS))} "
        "that fits with this patch"
    )
    kernels = f"flat at {', '.join(flat)}" if flat else "3 × 3 × 3"
    lines = [
        ("levels", str(len(layers.strides)), depth),
        ("strides", "; ".join(map(_times, layers.strides)), "finest level first"),
        ("kernels", kernels, "flat along an axis while it is coarser than the others"),
        ("features", ", ".join(map(str, layers.features)), width),
    ]
    return [Line(setting=name, value=value, reason=reason) for name, value, reason in lines]


def _median_shape(
    fingerprint: DatasetFingerprint, spacing: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the median shape of the scans on a grid of this spacing."""
    extents = np.array(fingerprint.shapes) * np.array(fingerprint.spacings_mm)
    r, a, s = (float(n) for n in np.median(extents / np.array(spacing), axis=0))
    return max(1.0, r), max(1.0, a), max(1.0, s)


def _foreground_fraction(fingerprint: DatasetFingerprint) -> tuple[float, str]:
    """Return the fraction of patches centred on a label, larger for rarer labels, and why."""
    n_voxels = sum(math.prod(shape) for shape in fingerprint.shapes)
    labelled = sum(fingerprint.label_voxels.values()) / n_voxels
    fraction = next(fraction for most, fraction in RARITY if labelled <= most)
    why = f"{labelled:.2%} of the voxels are labelled; the rarer, the more patches on labels"
    return fraction, why


def _dimensions(median: tuple[float, float, float], patch_shape: tuple[int, int, int]) -> Line:
    """Return the line that compares a patch with a scan: too thin, too small or large enough."""
    pairs = zip(median, patch_shape, strict=True)
    seen = math.prod(min(n, p) for n, p in pairs) / math.prod(median)
    if min(median) < FEW_SLICES:
        reason = (
            f"nearly 2D, with {min(median):.0f} slices: a patch holds all of them, and kernels are "
            "flat where slices are thick"
        )
    elif seen < SMALL_FRACTION:
        reason = (
            f"a patch covers {seen:.0%} of a scan; a coarse first pass ([roi] in the recipe) "
            "would give it context"
        )
    else:
        reason = f"a patch covers {seen:.0%} of a scan, so no coarse first pass is needed"
    return Line(setting="dimensions", value="3D", reason=reason)


def _normalisation(channel: str, recipe: Recipe, window: Window | None) -> Line:
    setting, form = f"intensities of {channel}", recipe.preprocess.normaliser_of(channel)
    if window is None:
        reason = "per scan, as the recipe states"
        return Line(setting=setting, value=form.method, reason=reason)
    value = f"{window.low:g} to {window.high:g}, less {window.mean:g}, by {window.sd:g}"
    planned = "0.5 and 99.5 percentiles, mean and standard deviation under the training labels"
    return Line(setting=setting, value=value, reason=planned if _open_keys(form) else STATED)


def _open_keys(form: BaseModel) -> list[str]:
    """Return the keys whose value is "auto"."""
    return [key for key, value in form.model_dump().items() if value == AUTO]


def _times(numbers: Iterable[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)


def _spacing(fingerprint: DatasetFingerprint) -> tuple[tuple[float, float, float], str]:
    """Return the median spacing per axis, and why.

    A strongly anisotropic axis takes the 10th percentile, so scans with thin slices keep detail.
    """
    spacings = np.array(fingerprint.spacings_mm)
    spacing, why = np.median(spacings, axis=0), "the median of the training scans"
    coarse = int(np.argmax(spacing))
    if spacing[coarse] > ANISOTROPY * spacing.min():
        finer = max(
            float(np.percentile(spacings[:, coarse], 10)), float(np.delete(spacing, coarse).max())
        )
        ratio = spacing[coarse] / spacing.min()
        why += f"; along {'RAS'[coarse]} ({ratio:.1f} times coarser) the 10th percentile"
        spacing[coarse] = finer
    r, a, s = (round(float(value), 4) for value in spacing)
    return (r, a, s), why


def _window(channel: str, window: Window, fingerprint: DatasetFingerprint) -> Window:
    keys = _open_keys(window)
    if not keys:
        return window
    if channel not in fingerprint.foreground:
        raise VolsegError(
            f"no training case has channel {channel!r}, so its intensity window cannot be planned",
            fix="add cases with this channel, or leave it out of data.channels",
            code="E_DATASET",
        )
    statistics = fingerprint.foreground[channel]
    fields = {"low": "p00_5", "high": "p99_5", "mean": "mean", "sd": "sd"}
    return window.model_copy(update={key: getattr(statistics, fields[key]) for key in keys})


def _statistics(values: np.ndarray) -> IntensityStatistics:
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return IntensityStatistics(
        mean=float(values.mean()),
        sd=float(max(values.std(), 1e-6)),
        p00_5=float(low),
        median=float(median),
        p99_5=float(high),
    )
