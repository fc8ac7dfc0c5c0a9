"""Fingerprint: facts about the training cases. It converts to JSON and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from volseg.errors import VolsegError
from volseg.measurement.units import looks_like_ct
from volseg.postprocessing.lesions import label_lesions
from volseg.recipe import Intensity
from volseg.volume import AxisOrder, Volume

# Foreground intensities kept per case: percentiles of a dataset need no more.
SAMPLES_PER_CASE = 10_000
LESIONS_PER_CASE = 1000  # whose extent is kept: the largest of a case
CRUMB_FRACTION = 0.01  # of the largest lesion of a case; smaller components do not count as lesions

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
    """Facts about the training cases; spacings (mm) and shapes are along R, A, S.

    Empty masks and notes on grids are those of the validation cases too.
    """

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
    # cases with a mask or channel in another axis order or extent → notes `W_CODE: sentence`
    grid_notes: dict[str, tuple[str, ...]] = {}
    # Median extent of the lesions along R, A, S; None if it is unknown, as of an imported model.
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
    grid_notes: tuple[str, ...] = ()  # as `W_CODE: sentence`
    lesion_extents_mm: tuple[tuple[float, float, float], ...] = ()


def fingerprint_case(
    images: Mapping[str, Volume], reference: Volume, rng: np.random.Generator
) -> CaseFingerprint:
    """Return header facts of one case and a sample of the intensities under its labels."""
    geometry = next(iter(images.values())).geometry
    canonical = geometry.canonical()
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
    voxels = sum((Counter(case.label_voxels) for case in cases), Counter[int]())
    if not voxels:
        raise VolsegError(
            "no training mask holds a labelled voxel", fix="check the masks", code="E_LABELS"
        )
    channels = dict.fromkeys(name for case in cases for name in case.samples)
    return DatasetFingerprint(
        n_cases=len(cases),
        spacings_mm=tuple(case.spacing_mm for case in cases),
        shapes=tuple(case.shape for case in cases),
        label_voxels=dict(sorted(voxels.items())),
        foreground={name: _statistics(_pooled(cases, name)) for name in channels},
        n_ct_like={
            name: sum(case.is_ct_like.get(name, False) for case in cases) for name in channels
        },
        lesion_extent_mm=_median_extent_mm(cases),
    )


def _median_extent_mm(cases: Sequence[CaseFingerprint]) -> tuple[float, float, float] | None:
    extents = [extent for case in cases for extent in case.lesion_extents_mm]
    if not extents:
        return None
    r, a, s = np.median(extents, axis=0).tolist()
    return r, a, s


def _pooled(cases: Sequence[CaseFingerprint], channel: str) -> np.ndarray:
    """Return the intensities under the labels of all cases with this channel."""
    return np.concatenate([case.samples[channel] for case in cases if channel in case.samples])


def _statistics(values: np.ndarray) -> IntensityStatistics:
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return IntensityStatistics(
        mean=float(values.mean()),
        sd=float(max(values.std(), 1e-6)),
        p00_5=float(low),
        median=float(median),
        p99_5=float(high),
    )
