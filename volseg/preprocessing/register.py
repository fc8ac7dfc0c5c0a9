"""Register two scans of one patient rigidly: rotation and translation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from volseg.errors import ScanError
from volseg.preprocessing.align import (
    HISTOGRAM_BINS,
    SEED,
    covered,
    euler_transform,
    itk_image,
    rigid_matrix,
)
from volseg.volume import Geometry, Volume

LEVELS_MM = (8.0, 4.0, 2.0)  # approximate voxel sizes; the fit is accurate to a fraction of a voxel
MIN_AXIS_VOXELS = 16  # voxels kept at every level, so that thin scans are not averaged further
MAX_SAMPLES = 60_000  # sample points of the metric; bounds the time
CLIPPED_PERCENT = 1.0  # at either end, where metal and padding would take most histogram bins
SAME_START_MM = 10.0  # about a voxel of the coarsest level
# Measured: bytes per voxel of a scan while its pyramid is made, and per voxel of the finest level
# during the fit.
MAKING_BYTES, FITTING_BYTES, SAMPLE, FITTING = 9, 36, 48 << 20, 80 << 20
MIN_COVERED = 0.25  # fraction of the smaller field of view that the other one must cover


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """The rigid transform between two scans and its uncertainty.

    Args:
        moved: (4, 4) in RAS mm, from a point of the first scan to the same point of the patient in
            the second.
        other: the transform estimated in the other direction, inverted; None if either direction
            failed.
        similarity_before: mutual information in nats at the positions in the headers; None if the
            scans do not overlap there.
        similarity_after: mutual information in nats at `moved`.
    """

    moved: np.ndarray
    other: np.ndarray | None
    similarity_before: float | None
    similarity_after: float | None

    @property
    def turned_deg(self) -> float:
        """Angle of the rotation in degrees."""
        cosine = (np.trace(self.moved[:3, :3]) - 1) / 2
        return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))

    @property
    def is_better(self) -> bool:
        """True if the scans are more similar at `moved` than at the positions in their headers."""
        if self.similarity_after is None:
            return False
        return self.similarity_before is None or self.similarity_after > self.similarity_before

    def shift_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Return the displacement (N,) of each of the points (N, 3) of the first scan."""
        return np.linalg.norm(transform_points(self.moved, points_mm) - points_mm, axis=1)

    def disagreement_mm(self, points_mm: np.ndarray) -> np.ndarray | None:
        """Return the distance (N,) between the results of both directions for (N, 3) points.

        None if only one direction succeeded.
        """
        if self.other is None:
            return None
        difference = transform_points(self.moved, points_mm) - transform_points(
            self.other, points_mm
        )
        return np.linalg.norm(difference, axis=1)

    def plane_disagreement_deg(self, normal: np.ndarray) -> float | None:
        """Return the angle between the results of both directions for planes with a (3,) normal.

        None if only one direction succeeded.
        """
        if self.other is None:
            return None
        first, second = (matrix[:3, :3] @ normal for matrix in (self.moved, self.other))
        sine = float(np.linalg.norm(np.cross(first, second)))
        return math.degrees(math.atan2(sine, float(first @ second)))


def transform_points(matrix: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """Transform (N, 3) points by a (4, 4) matrix."""
    return points_mm @ matrix[:3, :3].T + matrix[:3, 3]


def register(first: Volume, second: Volume) -> Registration:
    """Register two scans of one patient rigidly.

    Maximises Mattes mutual information, which needs no common intensity scale, from coarse to fine.
    Scans of different days may have unrelated coordinates, so the search has three starts: the
    positions in the headers, matched centres of the fields of view, and matched centres of mass.
    It continues from the best of them at the second level. It is run in both directions; the
    result with the higher similarity is kept, and the distance between the two measures its
    uncertainty.

    Raises:
        ScanError: no position was found where the scans overlap and can be compared.
    """
    import SimpleITK as sitk  # takes memory that only this needs

    scans = (first, second)
    pairs = list(zip(*(_pyramid(sitk, scan) for scan in scans), strict=True))
    images = pairs[-2]  # for the similarity, for which ITK uses every voxel
    forward = _search(sitk, scans, pairs)
    backward = _search(sitk, scans[::-1], [pair[::-1] for pair in pairs])
    transforms = [] if forward is None else [forward]
    transforms += [] if backward is None else [np.linalg.inv(backward)]
    similarities = [_similarity(sitk, images, matrix) for matrix in transforms]
    ranking = sorted((value, n) for n, value in enumerate(similarities) if value is not None)
    if not ranking:
        raise ScanError(
            "could not register the two scans: they do not overlap or do not resemble each other",
            fix="check that both show the same part of the same patient, or give --no-registration",
            code="E_PAIR",
        )
    similarity, best = ranking[-1]
    other = transforms[1 - best] if len(transforms) == 2 else None
    return Registration(transforms[best], other, _similarity(sitk, images, np.eye(4)), similarity)


def _pyramid(sitk: ModuleType, scan: Volume) -> list[Any]:
    """Return the scan at each level, coarse to fine, with clipped intensities."""
    step = _step(scan)
    sample = scan.intensities(scan.array[::step, ::step, ::step])
    low, high = np.percentile(sample, (CLIPPED_PERCENT, 100 - CLIPPED_PERCENT))
    image = itk_image(sitk, scan)
    if low < high:
        image = sitk.Clamp(image, sitk.sitkFloat32, float(low), float(high))
    images = []
    for level_mm in reversed(LEVELS_MM):  # each level from the previous, smaller one
        factors = _factors(level_mm, image.GetSpacing(), image.GetSize())
        image = sitk.BinShrink(image, factors) if max(factors) > 1 else image
        images.append(image)
    return images[::-1]


def _factors(level_mm: float, spacing_mm: Sequence[float], shape: Sequence[int]) -> list[int]:
    """Return the shrink factor of each axis."""
    return [
        max(1, min(int(level_mm / mm), n // MIN_AXIS_VOXELS))
        for mm, n in zip(spacing_mm, shape, strict=True)
    ]


def registering_bytes(first: Geometry, second: Geometry) -> int:
    """Return the peak memory of `register` for scans on these grids, without the scans."""
    pyramids, making, finest = 0, 0, 0
    for geometry in (first, second):
        levels = _level_voxels(geometry)
        making = max(making, pyramids + MAKING_BYTES * math.prod(geometry.shape))
        pyramids += 4 * sum(levels)
        finest = max(finest, *levels)
    return max(making + SAMPLE, pyramids + FITTING_BYTES * finest + FITTING)


def _level_voxels(geometry: Geometry) -> list[int]:
    """Return the number of voxels of each image of `_pyramid`, finest first."""
    spacing_mm, shape, voxels = list(geometry.spacing_mm), list(geometry.shape), []
    for level_mm in reversed(LEVELS_MM):
        factors = _factors(level_mm, spacing_mm, shape)
        shape = [n // factor for n, factor in zip(shape, factors, strict=True)]
        spacing_mm = [mm * factor for mm, factor in zip(spacing_mm, factors, strict=True)]
        voxels.append(math.prod(shape))
    return voxels


def _step(scan: Volume) -> int:
    """Return the step along each axis that samples about a million voxels."""
    return max(1, round((scan.array.size / 1e6) ** (1 / 3)))


def _search(
    sitk: ModuleType, scans: Sequence[Volume], pairs: Sequence[Sequence[Any]]
) -> np.ndarray | None:
    """Return (4, 4) from the first scan to the second, or None if they cannot be registered.

    Args:
        pairs: images of both scans at the three levels, coarse to fine.
    """
    grids = [scan.geometry for scan in scans]
    fits = []
    for shift in _starts(scans):
        start = sitk.Euler3DTransform()
        start.SetCenter(_centre(grids[0]).tolist())
        start.SetTranslation(shift.tolist())
        fit = _fit(sitk, pairs[0], start)
        fit = None if fit is None else _fit(sitk, pairs[1], fit[1])
        if fit is not None and _overlap(grids[0], grids[1], rigid_matrix(fit[1])):
            fits.append(fit)
    best = _fit(sitk, pairs[2], min(fits, key=lambda fit: fit[0])[1]) if fits else None
    matrix = None if best is None else rigid_matrix(best[1])
    return matrix if matrix is not None and _overlap(grids[0], grids[1], matrix) else None


def _starts(scans: Sequence[Volume]) -> list[np.ndarray]:
    """Return the initial translations in mm, without near duplicates."""
    centres = [_centre(scan.geometry) for scan in scans]
    masses = [_centre_of_mass(scan) for scan in scans]
    starts = [np.zeros(3)]
    for shift in (centres[1] - centres[0], masses[1] - masses[0]):
        if min(np.linalg.norm(shift - start) for start in starts) > SAME_START_MM:
            starts.append(shift)
    return starts


def _centre(geometry: Geometry) -> np.ndarray:
    return geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]


def _centre_of_mass(scan: Volume) -> np.ndarray:
    """Return (3,) RAS mm from a sample of voxels, weighted by intensity above the minimum.

    For a constant scan, the centre of its field of view.
    """
    step = _step(scan)
    values = scan.intensities(scan.array[::step, ::step, ::step]).astype(np.float64)
    weights = values - values.min()
    total = weights.sum()
    if total == 0:
        return _centre(scan.geometry)
    index = []
    for axis, n in enumerate(scan.array.shape):
        profile = weights.sum(axis=tuple(other for other in range(3) if other != axis))
        index.append(float((profile * np.arange(0, n, step)).sum() / total))
    return scan.geometry.to_world_mm(np.array([index]))[0]


def _overlap(first: Geometry, second: Geometry, transform: np.ndarray) -> bool:
    """Check whether one of the two fields of view covers enough of the other."""
    forward = covered(first, second, transform)
    backward = covered(second, first, np.linalg.inv(transform))
    return max(forward, backward) >= MIN_COVERED


def _method(sitk: ModuleType, fixed: Any) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(min(1.0, MAX_SAMPLES / math.prod(fixed.GetSize())), SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-2, numberOfIterations=100, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    return method


def _fit(sitk: ModuleType, images: Sequence[Any], start: Any) -> tuple[float, Any] | None:
    """Return metric (lower is better) and transform of a fit, or None if there is no overlap."""
    method = _method(sitk, images[0])
    method.SetInitialTransform(sitk.Euler3DTransform(start), inPlace=False)
    try:
        transform = method.Execute(*images)
    except RuntimeError:  # ITK: no sample lies in both images, or all samples are equal
        return None
    return float(method.GetMetricValue()), euler_transform(sitk, transform)


def _similarity(sitk: ModuleType, images: Sequence[Any], matrix: np.ndarray) -> float | None:
    """Return the mutual information in nats, mean of both directions, or None if unknown."""
    values = []
    for (fixed, moving), affine in ((images, matrix), (images[::-1], np.linalg.inv(matrix))):
        transform = sitk.AffineTransform(3)
        transform.SetMatrix(affine[:3, :3].ravel().tolist())
        transform.SetTranslation(affine[:3, 3].tolist())
        method = _method(sitk, fixed)
        method.SetInitialTransform(transform)
        try:
            values.append(-float(method.MetricEvaluate(fixed, moving)))
        except RuntimeError:
            return None
    return sum(values) / 2
