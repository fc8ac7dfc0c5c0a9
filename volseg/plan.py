"""What the data are (fingerprint) and what follows from them and the recipe (plan). Pure; JSON round trip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from volseg.errors import VolsegError
from volseg.preprocess.crop import AxisOrder, canonical_geometry
from volseg.preprocess.normalise import NORMALISERS, Normaliser
from volseg.preprocess.prepare import PrepareSettings
from volseg.recipe import Preprocess, Recipe, Roi, Window
from volseg.volume import Volume

SAMPLES_PER_CASE = 10_000  # foreground intensities kept per case: percentiles of a dataset need no more
ANISOTROPY = 3.0  # an axis this many times coarser than the finest is resampled to a low percentile, not the median


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IntensityStatistics(_Json):
    """Of the labelled voxels of the training cases, one channel."""

    mean: float
    sd: float
    p00_5: float
    median: float
    p99_5: float


class DatasetFingerprint(_Json):
    """Spacings (mm) and shapes of the scans along R, A, S, voxels per label, intensities under the labels."""

    n_cases: int
    spacings_mm: tuple[tuple[float, float, float], ...]
    shapes: tuple[tuple[int, int, int], ...]
    label_voxels: dict[int, int]
    foreground: dict[str, IntensityStatistics]


class CaseFingerprint(_Json):
    """One case's share of the fingerprint; `samples` are intensities under the labels, per channel."""

    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    label_voxels: dict[int, int]
    samples: dict[str, tuple[float, ...]]


class Plan(_Json):
    """The numbers that training and inference share."""

    spacing_mm: tuple[float, float, float]
    patch_shape: tuple[int, int, int]
    batch_size: int
    windows: dict[str, Window]  # of the channels that have one, every number resolved

    def prepare_settings(self, preprocess: Preprocess, channels: Sequence[str]) -> PrepareSettings:
        """The settings of `prepare` for scans with these channels."""
        return PrepareSettings(
            spacing_mm=self.spacing_mm,
            normalisers=self.normalisers(preprocess, channels),
            interpolation=preprocess.interpolation,
            crop=preprocess.crop,
            body_above=None if preprocess.body_above == "auto" else preprocess.body_above,
            axes=preprocess.axes,
            transpose=preprocess.transpose,
            separate_above=preprocess.separate_above,
            clip_overshoot=preprocess.clip_overshoot,
            normalise_first=preprocess.normalise_first,
        )

    def normalisers(self, preprocess: Preprocess, channels: Sequence[str]) -> tuple[Normaliser, ...]:
        """What happens to the intensities of each channel."""
        forms = [self.windows.get(channel, preprocess.normalise_of(channel)).model_dump() for channel in channels]
        return tuple(NORMALISERS[form.pop("method")](**form) for form in forms)

    def coarse(self, roi: Roi) -> Plan:
        """The plan of the first pass, on the coarse grid."""
        train = roi.train
        return self.model_copy(
            update={"spacing_mm": roi.spacing_mm, "patch_shape": train.patch_shape, "batch_size": train.batch_size}
        )


def fingerprint_case(images: Mapping[str, Volume], reference: Volume, rng: np.random.Generator) -> CaseFingerprint:
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
    samples = {name: tuple(volume.intensities(volume.array[index]).astype(float)) for name, volume in images.items()}
    return CaseFingerprint(
        spacing_mm=canonical.spacing_mm,
        shape=canonical.shape,
        label_voxels={int(value): int(count) for value, count in zip(values, counts, strict=True)},
        samples=samples,
    )


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
        raise VolsegError("no training mask holds a labelled voxel", fix="check the masks", code="E_LABELS")
    channels = list(cases[0].samples)
    pooled = {name: np.concatenate([np.asarray(case.samples[name]) for case in cases]) for name in channels}
    return DatasetFingerprint(
        n_cases=len(cases),
        spacings_mm=tuple(case.spacing_mm for case in cases),
        shapes=tuple(case.shape for case in cases),
        label_voxels=dict(sorted(voxels.items())),
        foreground={name: _statistics(values) for name, values in pooled.items()},
    )


def make_plan(fingerprint: DatasetFingerprint, recipe: Recipe) -> Plan:
    """Resolve every `auto` of the recipe with the data's fingerprint; what the recipe states stays.

    Raises:
        VolsegError: the recipe is one that can only be run, not trained.
    """
    preprocess = recipe.preprocess
    if recipe.data.regions_class_order is not None:
        raise VolsegError(
            f"recipe {recipe.name!r} has overlapping regions, which volseg runs but does not train",
            fix="leave out data.regions_class_order and give every voxel one label",
            code="E_RECIPE",
        )
    if preprocess.spacing_mm == "auto" and (preprocess.axes, preprocess.transpose) != ("canonical", (0, 1, 2)):
        raise VolsegError(
            f"recipe {recipe.name!r} has other axes than R, A, S, in which the fingerprint's spacings are",
            fix="state preprocess.spacing_mm in the order of its axes",
            code="E_RECIPE",
        )
    spacing = _spacing(fingerprint) if preprocess.spacing_mm == "auto" else preprocess.spacing_mm
    windows = {
        name: _window(form, fingerprint.foreground[name])
        for name in recipe.data.channels
        if isinstance(form := preprocess.normalise_of(name), Window)
    }
    return Plan(
        spacing_mm=spacing,
        patch_shape=recipe.train.patch_shape,
        batch_size=recipe.train.batch_size,
        windows=windows,
    )


def _spacing(fingerprint: DatasetFingerprint) -> tuple[float, float, float]:
    """Median per axis; on a strongly anisotropic axis the 10th percentile, so that thin-sliced scans keep detail."""
    spacings = np.array(fingerprint.spacings_mm)
    spacing = np.median(spacings, axis=0)
    coarse = int(np.argmax(spacing))
    if spacing[coarse] > ANISOTROPY * spacing.min():
        finer = max(float(np.percentile(spacings[:, coarse], 10)), float(np.delete(spacing, coarse).max()))
        spacing[coarse] = finer
    r, a, s = (round(float(value), 4) for value in spacing)
    return r, a, s


def _window(window: Window, statistics: IntensityStatistics) -> Window:
    found = {"low": statistics.p00_5, "high": statistics.p99_5, "mean": statistics.mean, "sd": statistics.sd}
    return window.model_copy(update={key: value for key, value in found.items() if getattr(window, key) == "auto"})


def _statistics(values: np.ndarray) -> IntensityStatistics:
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return IntensityStatistics(
        mean=float(values.mean()),
        sd=float(max(values.std(), 1e-6)),
        p00_5=float(low),
        median=float(median),
        p99_5=float(high),
    )
