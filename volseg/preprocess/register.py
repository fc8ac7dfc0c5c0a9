"""Two scans of one patient → how the patient lies in the second compared with the first: a rotation and a shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from volseg.errors import ScanError
from volseg.preprocess.align import (
    HISTOGRAM_BINS,
    SEED,
    covered,
    euler_of,
    itk_image,
    matrix_of,
    simpleitk,
)
from volseg.volume import Geometry, Volume

LEVELS_MM = (
    8.0,
    4.0,
    2.0,
)  # voxels are averaged to about that; a rigid movement is found to a fraction of a voxel
LEAST_VOXELS = 16  # that an axis keeps at the coarsest level: thin scans stay as fine along their thin axis as they are
MAX_SAMPLES = 60_000  # places at which the scans are compared, which bounds the time
CLIPPED_PERCENT = (
    1.0  # of the intensities at either end: metal and padding would take most bins of the histogram
)
SAME_START_MM = 10.0  # about a voxel of the coarsest level
# Measured: bytes per voxel of a scan while its images are made, and per voxel of the finest while movements are tried.
MAKING_BYTES, FITTING_BYTES, SAMPLE, FITTING = 9, 36, 48 << 20, 80 << 20
LEAST_COVERED = 0.25  # of the smaller field of view that the other one must reach over


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """Where things went between two scans, and how well that is known.

    Args:
        moved: (4, 4) in RAS mm, from a point of the first scan to the same point of the patient in the second.
        other: the same, as found in the other direction; None where nothing was found in one of the two.
        similarity_before: mutual information where the headers place the scans, in nats; None where they do not overlap there.
        similarity_after: the same at `moved`.
    """

    moved: np.ndarray
    other: np.ndarray | None
    similarity_before: float | None
    similarity_after: float | None

    @property
    def turned_deg(self) -> float:
        """Angle of the rotation."""
        cosine = (np.trace(self.moved[:3, :3]) - 1) / 2
        return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))

    @property
    def is_better(self) -> bool:
        """Whether the scans are more alike at `moved` than where their headers place them."""
        if self.similarity_after is None:
            return False
        return self.similarity_before is None or self.similarity_after > self.similarity_before

    def shift_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """(N,) mm that each of the points (N, 3) of the first scan moved."""
        return np.linalg.norm(transformed(self.moved, points_mm) - points_mm, axis=1)

    def disagreement_mm(self, points_mm: np.ndarray) -> np.ndarray | None:
        """(N,) mm between where the two directions put each of the points (N, 3) of the first scan."""
        if self.other is None:
            return None
        return np.linalg.norm(
            transformed(self.moved, points_mm) - transformed(self.other, points_mm), axis=1
        )

    def plane_disagreement_deg(self, normal: np.ndarray) -> float | None:
        """Angle between where the two directions put the planes with this (3,) normal of the first scan."""
        if self.other is None:
            return None
        one, other = (matrix[:3, :3] @ normal for matrix in (self.moved, self.other))
        return math.degrees(
            math.atan2(float(np.linalg.norm(np.cross(one, other))), float(one @ other))
        )


def transformed(matrix: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """(N, 3) points, moved by a (4, 4) matrix."""
    return points_mm @ matrix[:3, :3].T + matrix[:3, 3]


def register(first: Volume, second: Volume) -> Registration:
    """The rigid movement between two scans of one patient.

    Mattes mutual information, which needs no common scale of intensities, from coarse to fine. Scans of different days may have nothing in
    common in their coordinates, so it begins three times, where the headers place the scans, with the middles of the fields of view and with
    the centres of mass on each other, and goes on from what fits best at the second level. All this is done in both directions; the one at
    which the scans are more alike is taken, and how far the two lie apart tells how sure it is.

    Raises:
        ScanError: there is no place at which the two overlap and can be compared.
        EnvironmentProblem: SimpleITK is not installed.
    """
    itk = simpleitk("registration", otherwise="give --no-registration")
    scans = (first, second)
    pairs = list(zip(*(_pyramid(itk, scan) for scan in scans), strict=True))
    images = pairs[-2]  # to rate what was found; ITK takes every voxel for that
    forward = _search(itk, scans, pairs)
    backward = _search(itk, scans[::-1], [pair[::-1] for pair in pairs])
    found = [] if forward is None else [forward]
    found += [] if backward is None else [np.linalg.inv(backward)]
    rated = [(_similarity(itk, images, matrix), matrix) for matrix in found]
    known = sorted(
        (similarity, n) for n, (similarity, _) in enumerate(rated) if similarity is not None
    )
    if not known:
        raise ScanError(
            "the two scans could not be registered: nowhere do they overlap and resemble each other",
            fix="check that both are scans of the same part of the same patient, or give --no-registration",
            code="E_PAIR",
        )
    similarity, best = known[-1]
    other = found[1 - best] if len(found) == 2 else None
    return Registration(found[best], other, _similarity(itk, images, np.eye(4)), similarity)


def _pyramid(itk: ModuleType, scan: Volume) -> list[Any]:
    """The scan as images of coarser and finer voxels, intensities clipped at their outermost percentiles."""
    step = _step(scan)
    sample = scan.intensities(scan.array[::step, ::step, ::step])
    low, high = np.percentile(sample, (CLIPPED_PERCENT, 100 - CLIPPED_PERCENT))
    image = itk_image(itk, scan)
    if low < high:
        image = itk.Clamp(image, itk.sitkFloat32, float(low), float(high))
    images = []
    for level_mm in reversed(LEVELS_MM):  # each from the one before, which is smaller
        factors = _factors(level_mm, image.GetSpacing(), image.GetSize())
        image = itk.BinShrink(image, factors) if max(factors) > 1 else image
        images.append(image)
    return images[::-1]


def _factors(level_mm: float, spacing_mm: Sequence[float], shape: Sequence[int]) -> list[int]:
    """Voxels that become one along each axis."""
    return [
        max(1, min(int(level_mm / mm), n // LEAST_VOXELS))
        for mm, n in zip(spacing_mm, shape, strict=True)
    ]


def registering_bytes(first: Geometry, second: Geometry) -> int:
    """Most memory that `register` takes for two scans on these grids, beside them."""
    held, making, finest = 0, 0, 0
    for geometry in (first, second):
        levels = _level_voxels(geometry)
        making = max(making, held + MAKING_BYTES * math.prod(geometry.shape))
        held += 4 * sum(levels)
        finest = max(finest, *levels)
    return max(making + SAMPLE, held + FITTING_BYTES * finest + FITTING)


def _level_voxels(geometry: Geometry) -> list[int]:
    """Voxels of the images of `_pyramid`."""
    spacing_mm, shape, voxels = list(geometry.spacing_mm), list(geometry.shape), []
    for level_mm in reversed(LEVELS_MM):
        factors = _factors(level_mm, spacing_mm, shape)
        shape = [n // factor for n, factor in zip(shape, factors, strict=True)]
        spacing_mm = [mm * factor for mm, factor in zip(spacing_mm, factors, strict=True)]
        voxels.append(math.prod(shape))
    return voxels


def _step(scan: Volume) -> int:
    """Every how many voxels of each axis give about a million."""
    return max(1, round((scan.array.size / 1e6) ** (1 / 3)))


def _search(
    itk: ModuleType, scans: Sequence[Volume], pairs: Sequence[Sequence[Any]]
) -> np.ndarray | None:
    """(4, 4) from the first of two scans to the second; None where they do not overlap or cannot be compared.

    Args:
        pairs: images of both at the three levels, from coarse to fine.
    """
    grids = [scan.geometry for scan in scans]
    found = []
    for shift in _starts(scans):
        start = itk.Euler3DTransform()
        start.SetCenter(_middle(grids[0]).tolist())
        start.SetTranslation(shift.tolist())
        fit = _fit(itk, pairs[0], start)
        fit = None if fit is None else _fit(itk, pairs[1], fit[1])
        if fit is not None and _overlap(grids[0], grids[1], matrix_of(fit[1])):
            found.append(fit)
    best = _fit(itk, pairs[2], min(found, key=lambda fit: fit[0])[1]) if found else None
    return (
        None
        if best is None or not _overlap(grids[0], grids[1], matrix_of(best[1]))
        else matrix_of(best[1])
    )


def _starts(scans: Sequence[Volume]) -> list[np.ndarray]:
    """Shifts in mm to begin with; one near an earlier one would lead to the same place."""
    middles, masses = (
        [_middle(scan.geometry) for scan in scans],
        [_centre_of_mass(scan) for scan in scans],
    )
    starts = [np.zeros(3)]
    for shift in (middles[1] - middles[0], masses[1] - masses[0]):
        if min(np.linalg.norm(shift - start) for start in starts) > SAME_START_MM:
            starts.append(shift)
    return starts


def _middle(geometry: Geometry) -> np.ndarray:
    return geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]


def _centre_of_mass(scan: Volume) -> np.ndarray:
    """(3,) RAS mm, intensities above the lowest as weights; from every few voxels. The middle of a scan of one value."""
    step = _step(scan)
    values = scan.intensities(scan.array[::step, ::step, ::step]).astype(np.float64)
    weights = values - values.min()
    total = weights.sum()
    if total == 0:
        return _middle(scan.geometry)
    index = []
    for axis, n in enumerate(scan.array.shape):
        profile = weights.sum(axis=tuple(other for other in range(3) if other != axis))
        index.append(float((profile * np.arange(0, n, step)).sum() / total))
    return scan.geometry.to_world_mm(np.array([index]))[0]


def _overlap(first: Geometry, second: Geometry, moved: np.ndarray) -> bool:
    """Whether one of the two fields of view reaches over enough of the other."""
    return (
        max(covered(first, second, moved), covered(second, first, np.linalg.inv(moved)))
        >= LEAST_COVERED
    )


def _method(itk: ModuleType, fixed: Any) -> Any:
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(min(1.0, MAX_SAMPLES / math.prod(fixed.GetSize())), SEED)
    method.SetInterpolator(itk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-2, numberOfIterations=100, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    return method


def _fit(itk: ModuleType, images: Sequence[Any], start: Any) -> tuple[float, Any] | None:
    """Metric (less is better) and transform that are found from `start`; None where the scans do not overlap there."""
    method = _method(itk, images[0])
    method.SetInitialTransform(itk.Euler3DTransform(start), inPlace=False)
    try:
        transform = method.Execute(*images)
    except (
        RuntimeError
    ):  # ITK's only way to say that no sample lies in both, or that all of them have one value
        return None
    return float(method.GetMetricValue()), euler_of(itk, transform)


def _similarity(itk: ModuleType, images: Sequence[Any], matrix: np.ndarray) -> float | None:
    """Mutual information in nats where `matrix` puts the first scan in the second, mean of both directions; None if unknown."""
    values = []
    for (fixed, moving), way in ((images, matrix), (images[::-1], np.linalg.inv(matrix))):
        transform = itk.AffineTransform(3)
        transform.SetMatrix(way[:3, :3].ravel().tolist())
        transform.SetTranslation(way[:3, 3].tolist())
        method = _method(itk, fixed)
        method.SetInitialTransform(transform)
        try:
            values.append(-float(method.MetricEvaluate(fixed, moving)))
        except RuntimeError:
            return None
    return sum(values) / 2
