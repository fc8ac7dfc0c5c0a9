"""What the data are (fingerprint) and what follows from them and the recipe (plan). Pure; JSON round trip."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import ndimage

from volseg.errors import VolsegError
from volseg.measure.units import looks_like_ct
from volseg.postprocess.lesions import label_lesions
from volseg.preprocess.crop import AxisOrder, canonical_geometry
from volseg.preprocess.normalise import NORMALISERS, Absent, Normaliser
from volseg.preprocess.prepare import PrepareSettings
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
    Size,
    choose_size,
)
from volseg.volume import Volume

SAMPLES_PER_CASE = (
    10_000  # foreground intensities kept per case: percentiles of a dataset need no more
)
ANISOTROPY = 3.0  # an axis this many times coarser than the finest is resampled to a low percentile, not the median
LESIONS_PER_CASE = 1000  # of which the extent is kept: the largest of a case
CRUMB_SHARE = 0.01  # of the largest lesion of a case, under which a component says nothing of the size of lesions
SMALLEST_PATCH = (
    16  # voxels along an axis of a patch that is chosen, or all of the scan: less shows no context
)
LARGEST_LESION = 128**3  # voxels of a patch that lesions may ask for: organs are seen part by part
FEW_SLICES = 8  # of the median scan along its shortest axis: hardly a volume
SMALL_SHARE = 0.1  # of the median scan in a patch, under which context is missing
RARITY = (
    (0.001, 0.67),
    (0.05, 0.5),
    (1.0, 0.34),
)  # labelled share of the voxels up to which so many patches are centred on them
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
    """Of the labelled voxels of the training cases, one channel."""

    mean: Intensity
    sd: Intensity
    p00_5: Intensity
    median: Intensity
    p99_5: Intensity


class DatasetFingerprint(_Json):
    """Spacings (mm) and shapes of the scans along R, A, S, voxels per label, intensities under the labels."""

    n_cases: Count
    spacings_mm: tuple[tuple[Length, Length, Length], ...]
    shapes: tuple[tuple[ScanEdge, ScanEdge, ScanEdge], ...]
    label_voxels: dict[int, Count]
    foreground: dict[str, IntensityStatistics]
    empty_masks: tuple[str, ...] = ()  # cases whose mask holds no labelled voxel
    n_ct_like: dict[
        str, int
    ] = {}  # channel → scans that look like a CT in HU; a fingerprint that did not look has none
    doubted_units: dict[
        str, str
    ] = {}  # cases whose first channel contradicts the recipe's unit → why
    # The median length of the lesions along R, A, S; None in what was written before it was measured.
    lesion_extent_mm: tuple[float, float, float] | None = None


class CaseFingerprint(_Json):
    """One case's share of the fingerprint.

    `samples` are intensities under the labels, per channel; `lesion_extents_mm` the lengths along R, A, S of each
    connected component of a label, without crumbs.
    """

    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    label_voxels: dict[int, int]
    samples: dict[str, tuple[float, ...]]
    is_ct_like: dict[str, bool] = {}
    unit_doubt: str = ""  # why its first channel cannot be in the recipe's unit
    lesion_extents_mm: tuple[tuple[float, float, float], ...] = ()


class Line(_Json):
    """One decision of a plan, for people."""

    setting: Text
    value: Text
    reason: Text


class Layers(_Json):
    """Of a U-Net, per level, finest first: what [network] in a recipe leaves open."""

    features: Annotated[tuple[Feature, ...], Field(max_length=16)]
    strides: Annotated[tuple[tuple[Step, Step, Step], ...], Field(max_length=16)]
    kernels: Annotated[tuple[tuple[Step, Step, Step], ...], Field(max_length=16)]

    @model_validator(mode="after")
    def _one_of_each_per_level(self) -> Layers:
        if not LEAST_LEVELS <= len(self.features) == len(self.strides) == len(self.kernels):
            raise ValueError(
                f"features, strides and kernels need one entry per level, for {LEAST_LEVELS} levels or more"
            )
        return self


class Plan(_Json):
    """The numbers that training and inference share."""

    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm]
    patch_shape: tuple[Edge, Edge, Edge]
    batch_size: BatchSize
    windows: dict[str, Window]  # of the channels that have one, every number resolved
    foreground_fraction: Fraction | None = (
        None  # None: the recipe states it, as with the settings of the network
    )
    network: Layers | None = None
    lines: tuple[Line, ...] = ()

    @model_validator(mode="after")
    def _patch_is_not_too_large(self) -> Plan:
        for mistake in oversized_patch(self.patch_shape):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _windows_are_resolved(self) -> Plan:
        opened = [
            name for name, window in self.windows.items() if AUTO in window.model_dump().values()
        ]
        if opened:
            raise ValueError(
                f"the windows of {', '.join(opened)} hold {AUTO!r} in place of a number"
            )
        return self

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with this plan's numbers where it says "auto".

        Raises:
            VolsegError: the plan has none for one of them.
        """
        train = {
            "patch_shape": self.patch_shape,
            "batch_size": self.batch_size,
            "foreground_fraction": self.foreground_fraction,
        }
        settings = recipe.network.settings
        changes = {
            name: value for name, value in train.items() if getattr(recipe.train, name) == "auto"
        }
        layers = {
            name: getattr(self.network, name, None)
            for name, value in settings.items()
            if value == "auto"
        }
        missing = [name for name, value in (changes | layers).items() if value is None]
        if missing:
            raise VolsegError(
                f"the plan says nothing of {', '.join(missing)}, which recipe {recipe.name!r} leaves to it",
                fix="state it in the recipe, or make the plan anew with `volseg plan`",
                code="E_PLAN",
            )
        network = Network(name=recipe.network.name, **(settings | layers))
        return recipe.model_copy(
            update={"train": recipe.train.model_copy(update=changes), "network": network}
        )

    def overruled_by(self, recipe: Recipe) -> Plan:
        """This plan, made for another recipe or edited, with what the recipe states; its lines say what is so, and why.

        Raises:
            VolsegError: the recipe leaves an intensity window to the plan, which has none for that channel.
        """
        spacing, train = recipe.preprocess.spacing_mm, recipe.train
        changes: dict[str, Any] = {
            "spacing_mm": self.spacing_mm if spacing == AUTO else spacing,
            "patch_shape": self.patch_shape if train.patch_shape == AUTO else train.patch_shape,
            "batch_size": self.batch_size if train.batch_size == AUTO else train.batch_size,
            "foreground_fraction": self.foreground_fraction
            if train.foreground_fraction == AUTO
            else train.foreground_fraction,
            "network": self.network if recipe.network.settings.get("features") == AUTO else None,
            "windows": {
                name: self._window(name, form)
                for name in recipe.data.channels
                if isinstance(form := recipe.preprocess.normalise_of(name), Window)
            },
        }
        found = self.model_copy(update=changes)
        return found.model_copy(update={"lines": found._lines_for(recipe)})

    def _window(self, channel: str, form: Window) -> Window:
        """The recipe's numbers, and this plan's for those that it leaves open."""
        opened = [key for key, value in form.model_dump().items() if value == AUTO]
        own = self.windows.get(channel)
        if opened and own is None:
            raise VolsegError(
                f"the plan has no intensity window for channel {channel!r}, of which the recipe leaves {', '.join(opened)} to it",
                fix="state them in the recipe, or make the plan anew with `volseg plan`",
                code="E_PLAN",
            )
        return form.model_copy(update={key: getattr(own, key) for key in opened})

    def _lines_for(self, recipe: Recipe) -> tuple[Line, ...]:
        """The lines, each with the value that is so; where that is another than it was, with the reason why."""
        states = recipe.train.model_dump() | {"spacing_mm": recipe.preprocess.spacing_mm}
        values = {
            "spacing": (f"{_times(self.spacing_mm)} mm", "spacing_mm"),
            "patch": (f"{_times(self.patch_shape)} voxels", "patch_shape"),
            "batch": (str(self.batch_size), "batch_size"),
        }
        if self.foreground_fraction is not None:
            values["patches on labels"] = (f"{self.foreground_fraction:.0%}", "foreground_fraction")
        said = {
            setting: Line(
                setting=setting, value=value, reason=EDITED if states[key] == AUTO else STATED
            )
            for setting, (value, key) in values.items()
        }
        for name in recipe.data.channels:
            line = _normalisation(name, recipe, self.windows.get(name))
            said[line.setting] = line
        if self.network is not None:
            said |= {
                line.setting: line.model_copy(update={"reason": EDITED})
                for line in _layer_lines(self.network)
            }
        else:
            said["network"] = Line(setting="network", value=recipe.network.name, reason=STATED)
        kept = {
            line.setting: line
            for line in self.lines
            if line.setting in said or line.setting in ("dimensions", "median lesion")
        }
        changed = {
            setting: line
            for setting, line in said.items()
            if setting not in kept or kept[setting].value != line.value
        }
        return tuple((kept | changed).values())

    def prepare_settings(
        self, preprocess: Preprocess, channels: Sequence[str], absent: Collection[str] = ()
    ) -> PrepareSettings:
        """The settings of `prepare` for scans with these channels, some of which a case may be without."""
        return PrepareSettings(
            spacing_mm=self.spacing_mm,
            normalisers=tuple(
                Absent() if name in absent else normaliser
                for name, normaliser in zip(
                    channels, self.normalisers(preprocess, channels), strict=True
                )
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
        """What happens to the intensities of each channel."""
        forms = [
            self.windows.get(channel, preprocess.normalise_of(channel)).model_dump()
            for channel in channels
        ]
        return tuple(NORMALISERS[form.pop("method")](**form) for form in forms)

    def coarse(self, roi: Roi) -> Plan:
        """The plan of the first pass, on the coarse grid."""
        train = roi.train
        return self.model_copy(
            update={
                "spacing_mm": roi.spacing_mm,
                "patch_shape": train.patch_shape,
                "batch_size": train.batch_size,
            }
        )


def fingerprint_case(
    images: Mapping[str, Volume], reference: Volume, rng: np.random.Generator
) -> CaseFingerprint:
    """Header facts and a sample of the intensities under the labels of one case."""
    geometry = next(iter(images.values())).geometry
    canonical = canonical_geometry(geometry, AxisOrder.of(geometry))
    values, counts = np.unique(reference.array[reference.array > 0], return_counts=True)
    foreground = np.flatnonzero(reference.array.ravel(order="K") > 0)
    if foreground.size > SAMPLES_PER_CASE:
        foreground = np.sort(rng.choice(foreground, SAMPLES_PER_CASE, replace=False))
    index = np.unravel_index(
        foreground, reference.array.shape, order="F" if reference.array.flags.f_contiguous else "C"
    )
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
    """Lengths along R, A, S of the largest lesions of a mask."""
    lesions = label_lesions(reference.array, reference.geometry)
    smallest = CRUMB_SHARE * max(lesions.n_voxels, default=0)
    n = min(LESIONS_PER_CASE, sum(size >= smallest for size in lesions.n_voxels))
    order, spacing = AxisOrder.of(reference.geometry), reference.geometry.spacing_mm
    extents = []
    for box in ndimage.find_objects(lesions.ids, max_label=n) if n else ():
        r, a, s = ((box[axis].stop - box[axis].start) * spacing[axis] for axis in order.axes)
        extents.append((round(r, 4), round(a, 4), round(s, 4)))
    return tuple(extents)


def combine_fingerprints(cases: Sequence[CaseFingerprint]) -> DatasetFingerprint:
    """The dataset's fingerprint from its cases'.

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
    """Resolve every `auto` of the recipe with the data's fingerprint; what the recipe states stays.

    Raises:
        VolsegError: the recipe is one that can only be run, not trained, or nothing fits the budget.
    """
    preprocess = recipe.preprocess
    if recipe.data.regions_class_order is not None and recipe.data.regions is None:
        raise VolsegError(
            f"recipe {recipe.name!r} has overlapping regions, but does not say of which labels they are made",
            fix="add data.regions, such as { tumour = [1, 2], core = [2] }, or leave out data.regions_class_order",
            code="E_RECIPE",
        )
    if preprocess.spacing_mm == "auto" and (preprocess.axes, preprocess.transpose) != (
        "canonical",
        (0, 1, 2),
    ):
        raise VolsegError(
            f"recipe {recipe.name!r} has other axes than R, A, S, in which the fingerprint's spacings are",
            fix="state preprocess.spacing_mm in the order of its axes",
            code="E_RECIPE",
        )
    spacing, why_spacing = (
        _spacing(fingerprint)
        if preprocess.spacing_mm == "auto"
        else (preprocess.spacing_mm, STATED)
    )
    windows = {
        name: _window(name, form, fingerprint)
        for name in recipe.data.channels
        if isinstance(form := preprocess.normalise_of(name), Window)
    }
    median = _median_shape(fingerprint, spacing)
    lines = [Line(setting="spacing", value=f"{_times(spacing)} mm", reason=why_spacing)]
    lines += [_normalisation(name, recipe, windows.get(name)) for name in recipe.data.channels]
    size, layers, size_lines = _size(fingerprint, recipe, spacing, median, budget)
    share, why_share = _foreground_share(fingerprint)
    if recipe.train.foreground_fraction != "auto":
        share, why_share = recipe.train.foreground_fraction, STATED
    lines += size_lines
    lines.append(Line(setting="patches on labels", value=f"{share:.0%}", reason=why_share))
    lines.append(_dimensions(median, size.patch_shape))
    return Plan(
        spacing_mm=spacing,
        patch_shape=size.patch_shape,
        batch_size=size.batch_size,
        windows=windows,
        foreground_fraction=share,
        network=layers,
        lines=tuple(lines),
    )


def check_budget(plan: Plan, recipe: Recipe, budget: Budget) -> None:
    """See that a step of training fits into the budget's memory, by the model of `Size.training_bytes`.

    Other networks than unet3d with stated layers are not modelled and pass.

    Raises:
        VolsegError: it does not; it says which number to change, and to what.
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
    number = f"batch_size {smaller[-1]}" if smaller else "a smaller patch_shape"
    raise VolsegError(
        f"a step with patch {_times(size.patch_shape)}, batch {size.batch_size} and features {', '.join(map(str, size.features))} takes about "
        f"{needed / 2**30:.2f} GB, and the budget is {budget.memory / 2**30:.2f} GB",
        fix=f"give --vram {math.ceil(needed / 2**30 * 10) / 10:g}G, or {number} in the plan or recipe",
        code="E_BUDGET",
    )


def size_of(plan: Plan, recipe: Recipe) -> Size | None:
    """The network and batches of a plan; None for other networks than unet3d with stated layers."""
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
    """Patch, batch and network: what the recipe leaves open is chosen."""
    train, settings = recipe.train, recipe.network.settings
    patch = None if train.patch_shape == "auto" else train.patch_shape
    batch = None if train.batch_size == "auto" else train.batch_size
    channels, outputs = len(recipe.data.channels), recipe.data.n_outputs
    if settings.get("features") != AUTO:
        assert patch is not None and batch is not None, "the recipe was checked"
        size = Size(features=(), strides=(), kernels=(), patch_shape=patch, batch_size=batch)
        lines = [
            ("patch", f"{_times(patch)} voxels"),
            ("batch", str(batch)),
            ("network", recipe.network.name),
        ]
        return size, None, [Line(setting=name, value=value, reason=STATED) for name, value in lines]
    lesion = lesion_shape(fingerprint, spacing)
    size = choose_size(
        median,
        spacing,
        smallest_patch=_smallest_patch(lesion, median),
        channels=channels,
        outputs=outputs,
        n_cases=fingerprint.n_cases,
        budget=budget,
        patch_shape=patch,
        batch_size=batch,
    )
    needed = size.training_bytes(channels, outputs, half=budget.half) / 2**30
    limit = f"a step takes about {needed:.2f} of the {budget.memory / 2**30:.1f} GB"
    if budget.flops is not None:
        steps = budget.flops / size.step_flops(channels, outputs)
        limit += f" and the time allows about {steps:.0f} steps ({STEPS} are wanted)"
    seen = math.prod(size.patch_shape) / math.prod(median)
    covers = f"{min(1.0, seen):.0%} of the median scan of {_times(round(n) for n in median)} voxels; {limit}"
    layers = Layers(features=size.features, strides=size.strides, kernels=size.kernels)
    return (
        size,
        layers,
        [
            Line(
                setting="patch",
                value=f"{_times(size.patch_shape)} voxels",
                reason=STATED if patch else covers,
            ),
            Line(
                setting="batch",
                value=str(size.batch_size),
                reason=STATED if batch else f"what fits; {limit}",
            ),
            *_layer_lines(layers),
            *([] if lesion is None else [_lesion_line(lesion, size.patch_shape)]),
        ],
    )


def lesion_shape(
    fingerprint: DatasetFingerprint, spacing: tuple[float, float, float]
) -> tuple[int, int, int] | None:
    """The median lesion in voxels of a grid of this spacing; None where the fingerprint does not say."""
    if fingerprint.lesion_extent_mm is None:
        return None
    lengths = zip(fingerprint.lesion_extent_mm, spacing, strict=True)
    r, a, s = (max(1, math.ceil(length / mm - 1e-3)) for length, mm in lengths)
    return r, a, s


def _smallest_patch(
    lesion: tuple[int, int, int] | None, median: tuple[float, float, float]
) -> tuple[int, int, int]:
    """The smallest patch in which a network can learn what a lesion looks like."""
    edges = [max(n, SMALLEST_PATCH) for n in lesion or (1, 1, 1)]
    shrink = max(1.0, math.prod(edges) / LARGEST_LESION) ** (1 / 3)
    r, a, s = (
        max(1, min(math.ceil(edge / shrink), math.ceil(n)))
        for edge, n in zip(edges, median, strict=True)
    )
    return r, a, s


def _lesion_line(lesion: tuple[int, int, int], patch_shape: tuple[int, int, int]) -> Line:
    cut = any(p < n for p, n in zip(patch_shape, lesion, strict=True))
    return Line(
        setting="median lesion",
        value=f"{_times(lesion)} voxels",
        reason="larger than a patch, so it is seen part by part"
        if cut
        else "a patch holds all of it",
    )


def _layer_lines(layers: Layers) -> list[Line]:
    """What is said of the layers that were chosen."""
    flat = [f"level {n}" for n, kernel in enumerate(layers.kernels) if 1 in kernel]
    depth = f"each axis halved while it keeps {SMALLEST_EDGE} voxels and is not {ANISOTROPIC:g} times coarser than another"
    width = f"doubled per level up to {MOST_FEATURES}; the widest of {', '.join(map(str, WIDTHS))} that fits with this patch"
    return [
        Line(setting="levels", value=str(len(layers.strides)), reason=depth),
        Line(
            setting="strides",
            value="; ".join(_times(stride) for stride in layers.strides),
            reason="finest level first",
        ),
        Line(
            setting="kernels",
            value="3 × 3 × 3" if not flat else f"flat at {', '.join(flat)}",
            reason="flat along an axis until it is no coarser than the others",
        ),
        Line(setting="features", value=", ".join(map(str, layers.features)), reason=width),
    ]


def _median_shape(
    fingerprint: DatasetFingerprint, spacing: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Of the scans on a grid of this spacing."""
    extents = np.array(fingerprint.shapes) * np.array(fingerprint.spacings_mm)
    r, a, s = (float(n) for n in np.median(extents / np.array(spacing), axis=0))
    return max(1.0, r), max(1.0, a), max(1.0, s)


def _foreground_share(fingerprint: DatasetFingerprint) -> tuple[float, str]:
    """The rarer the labels, the more patches are centred on them."""
    labelled = sum(fingerprint.label_voxels.values()) / sum(
        math.prod(shape) for shape in fingerprint.shapes
    )
    share = next(share for most, share in RARITY if labelled <= most)
    return (
        share,
        f"{labelled:.2%} of the voxels are labelled; the rarer, the more patches are centred on a label",
    )


def _dimensions(median: tuple[float, float, float], patch_shape: tuple[int, int, int]) -> Line:
    """Whether patches of slices, of volumes, or a coarse pass before them suit the data."""
    if min(median) < FEW_SLICES:
        return Line(
            setting="dimensions",
            value="3D",
            reason=f"with {min(median):.0f} slices nearly 2D: a patch holds all of them and kernels are flat where slices are thick",
        )
    seen = math.prod(min(n, p) for n, p in zip(median, patch_shape, strict=True)) / math.prod(
        median
    )
    if seen < SMALL_SHARE:
        return Line(
            setting="dimensions",
            value="3D",
            reason=f"a patch sees {seen:.0%} of a scan; a coarse first pass ([roi] in the recipe) would give it context",
        )
    return Line(
        setting="dimensions",
        value="3D",
        reason=f"a patch sees {seen:.0%} of a scan, so no coarser pass is needed",
    )


def _normalisation(channel: str, recipe: Recipe, window: Window | None) -> Line:
    form = recipe.preprocess.normalise_of(channel)
    if window is None:
        return Line(
            setting=f"intensities of {channel}",
            value=form.method,
            reason="per scan, as the recipe states",
        )
    value = f"{window.low:g} to {window.high:g}, less {window.mean:g}, by {window.sd:g}"
    is_open = "auto" in (form.model_dump().values())
    why = (
        "0.5 and 99.5 percentiles, mean and deviation under the training labels"
        if is_open
        else STATED
    )
    return Line(setting=f"intensities of {channel}", value=value, reason=why)


def _times(numbers: Iterable[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)


def _spacing(fingerprint: DatasetFingerprint) -> tuple[tuple[float, float, float], str]:
    """Median per axis; on a strongly anisotropic axis the 10th percentile, so that thin-sliced scans keep detail."""
    spacings = np.array(fingerprint.spacings_mm)
    spacing, why = np.median(spacings, axis=0), "the median of the training scans"
    coarse = int(np.argmax(spacing))
    if spacing[coarse] > ANISOTROPY * spacing.min():
        finer = max(
            float(np.percentile(spacings[:, coarse], 10)), float(np.delete(spacing, coarse).max())
        )
        why += f"; along {'RAS'[coarse]}, {spacing[coarse] / spacing.min():.1f} times coarser, the 10th percentile"
        spacing[coarse] = finer
    r, a, s = (round(float(value), 4) for value in spacing)
    return (r, a, s), why


def _window(channel: str, window: Window, fingerprint: DatasetFingerprint) -> Window:
    opened = [key for key, value in window.model_dump().items() if value == AUTO]
    if not opened:
        return window
    if channel not in fingerprint.foreground:
        raise VolsegError(
            f"no training case has channel {channel!r}, so its intensity window cannot be found",
            fix="add cases with it, or leave it out of data.channels",
            code="E_DATASET",
        )
    statistics = fingerprint.foreground[channel]
    found = {
        "low": statistics.p00_5,
        "high": statistics.p99_5,
        "mean": statistics.mean,
        "sd": statistics.sd,
    }
    return window.model_copy(update={key: found[key] for key in opened})


def _statistics(values: np.ndarray) -> IntensityStatistics:
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return IntensityStatistics(
        mean=float(values.mean()),
        sd=float(max(values.std(), 1e-6)),
        p00_5=float(low),
        median=float(median),
        p99_5=float(high),
    )
