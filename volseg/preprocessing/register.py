"""Register two scans of one patient rigidly: rotation and translation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.errors import ScanError
from volseg.volume import Geometry, Rigid, Volume, angle_deg, slabs_of

LEVELS_MM = (8.0, 4.0, 2.0)  # approximate voxel sizes; the fit is accurate to a fraction of a voxel
MIN_AXIS_VOXELS = 16  # voxels kept at every level, so that thin scans are not averaged further
CLIPPED_PERCENT = 1.0  # at either end, where metal and padding would take most histogram bins
SAME_START_MM = 10.0  # about a voxel of the coarsest level
# Measured: bytes per voxel of a scan while its pyramid is made, and per voxel of the finest level
# during the fit.
MAKING_BYTES, FITTING_BYTES, SAMPLE, FITTING = 9, 36, 48 << 20, 80 << 20
MIN_COVERED = 0.25  # fraction of the smaller field of view that the other one must cover
CHANNEL_LEVELS = (4, 2, 1)  # shrink factors, coarse to fine
MIN_CHANNEL_VOXELS = 8  # that every axis of two channels keeps at the coarsest level
HISTOGRAM_BINS = 50
CONVERTED_TOGETHER = 2**20  # voxels
SEED = 1  # jitters the sample points within their voxels


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Settings of a fit by gradient descent.

    Args:
        step, min_step: largest and smallest step, in physical units.
        iterations: at most.
        fraction, max_samples: of the voxels, sampled for the metric; bounds the time.
    """

    step: float
    min_step: float
    iterations: int
    fraction: float = 1.0
    max_samples: float = math.inf


BETWEEN_DAYS = Descent(step=2.0, min_step=1e-2, iterations=100, max_samples=60_000)
BETWEEN_CHANNELS = Descent(step=1.0, min_step=1e-4, iterations=200, fraction=0.2)


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """The rigid transform between two scans and its uncertainty.

    Args:
        transform: from a point of the first scan to the same point of the patient in the second.
        other: the transform estimated in the other direction, inverted; None if either direction
            failed.
        similarity_before: mutual information in nats at the positions in the headers; None if the
            scans do not overlap there.
        similarity_after: mutual information in nats at `transform`.
    """

    transform: Rigid
    other: Rigid | None
    similarity_before: float | None
    similarity_after: float | None

    @property
    def is_better(self) -> bool:
        """True if `transform` makes the scans more similar than the positions in their headers."""
        if self.similarity_after is None:
            return False
        return self.similarity_before is None or self.similarity_after > self.similarity_before

    def shift_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Return the displacement (N,) of each of the points (N, 3) of the first scan."""
        return np.linalg.norm(self.transform.apply(points_mm) - points_mm, axis=1)

    def disagreement_mm(self, points_mm: np.ndarray) -> np.ndarray | None:
        """Return the distance (N,) between the results of both directions for (N, 3) points.

        None if only one direction succeeded.
        """
        if self.other is None:
            return None
        difference = self.transform.apply(points_mm) - self.other.apply(points_mm)
        return np.linalg.norm(difference, axis=1)

    def plane_disagreement_deg(self, normal: np.ndarray) -> float | None:
        """Return the angle between the results of both directions for planes with a (3,) normal.

        None if only one direction succeeded.
        """
        if self.other is None:
            return None
        first, second = (rigid.rotation @ normal for rigid in (self.transform, self.other))
        return angle_deg(first, second)


def register(first: Volume, second: Volume) -> Registration:
    """Register two scans of one patient of different days.

    Maximises Mattes mutual information, which needs no common intensity scale, from coarse to fine.
    Scans of different days may have unrelated coordinates, so the search has three starts: the
    positions in the headers, matched centres of the fields of view, and matched centres of mass.
    It continues from the best of them at the second level. It is run in both directions; the
    result with the higher similarity is kept, and the distance between the two measures its
    uncertainty.

    Raises:
        ScanError: no position was found where the scans overlap and can be compared.
    """
    scans = (first, second)
    pairs = list(zip(*map(_pyramid, scans), strict=True))
    images = pairs[-2]  # for the similarity, for which ITK uses every voxel
    forward = _search(scans, pairs)
    backward = _search(scans[::-1], [pair[::-1] for pair in pairs])
    transforms = [] if forward is None else [forward]
    transforms += [] if backward is None else [backward.inverse()]
    similarities = [_similarity(images, transform) for transform in transforms]
    ranking = sorted((value, n) for n, value in enumerate(similarities) if value is not None)
    if not ranking:
        raise ScanError(
            "could not register the two scans: they do not overlap or do not resemble each other",
            fix="check that both show the same part of the same patient, or give --no-registration",
            code="E_PAIR",
        )
    similarity, best = ranking[-1]
    other = transforms[1 - best] if len(transforms) == 2 else None
    return Registration(transforms[best], other, _similarity(images, Rigid.identity()), similarity)


def align_channels(fixed: Volume, moving: Volume) -> Rigid:
    """Register two channels of one session: return the transform from `fixed` to `moving`.

    Maximises Mattes mutual information from coarse to fine, starting at the positions in the
    headers.

    Raises:
        ScanError: the scans do not overlap, or cannot be compared.
    """
    shortest = min(*fixed.geometry.shape, *moving.geometry.shape)
    levels = [min(level, max(1, shortest // MIN_CHANNEL_VOXELS)) for level in CHANNEL_LEVELS]
    images = (_image(fixed), _image(moving))
    try:
        _, euler = _fit(images, _start(fixed.geometry, np.zeros(3)), BETWEEN_CHANNELS, levels)
    except RuntimeError as error:
        raise ScanError(
            f"two channels could not be aligned ({str(error).strip().splitlines()[-1]})",
            fix="check that they show the same part of the same patient, "
            'or set align = "none" under [data] in the recipe',
            code="E_PAIR",
        ) from error
    return _rigid(euler)


def _pyramid(scan: Volume) -> list[Any]:
    """Return the scan at each level, coarse to fine, with clipped intensities."""
    import SimpleITK as sitk  # here and below: takes memory that only a registration needs

    step = _step(scan)
    sample = scan.intensities(scan.array[::step, ::step, ::step])
    low, high = np.percentile(sample, (CLIPPED_PERCENT, 100 - CLIPPED_PERCENT))
    image = _image(scan)
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


def _search(scans: Sequence[Volume], pairs: Sequence[Sequence[Any]]) -> Rigid | None:
    """Return the transform from the first scan to the second, or None if they do not register.

    Args:
        pairs: images of both scans at the three levels, coarse to fine.
    """
    first, second = (scan.geometry for scan in scans)
    fits = []
    for shift in _starts(scans):
        fit = _fit_days(pairs[0], _start(first, shift))
        fit = None if fit is None else _fit_days(pairs[1], fit[1])
        if fit is not None and _overlap(first, second, _rigid(fit[1])):
            fits.append(fit)
    best = _fit_days(pairs[2], min(fits, key=lambda fit: fit[0])[1]) if fits else None
    transform = None if best is None else _rigid(best[1])
    return transform if transform is not None and _overlap(first, second, transform) else None


def _starts(scans: Sequence[Volume]) -> list[np.ndarray]:
    """Return the initial translations in mm, without near duplicates."""
    centres = [scan.geometry.centre_mm for scan in scans]
    masses = [_centre_of_mass(scan) for scan in scans]
    starts = [np.zeros(3)]
    for shift in (centres[1] - centres[0], masses[1] - masses[0]):
        if min(np.linalg.norm(shift - start) for start in starts) > SAME_START_MM:
            starts.append(shift)
    return starts


def _centre_of_mass(scan: Volume) -> np.ndarray:
    """Return (3,) RAS mm from a sample of voxels, weighted by intensity above the minimum.

    For a constant scan, the centre of its field of view.
    """
    step = _step(scan)
    values = scan.intensities(scan.array[::step, ::step, ::step]).astype(np.float64)
    weights = values - values.min()
    total = weights.sum()
    if total == 0:
        return scan.geometry.centre_mm
    index = []
    for axis, n in enumerate(scan.array.shape):
        profile = weights.sum(axis=tuple(other for other in range(3) if other != axis))
        index.append(float((profile * np.arange(0, n, step)).sum() / total))
    return scan.geometry.to_world_mm(np.array([index]))[0]


def _overlap(first: Geometry, second: Geometry, transform: Rigid) -> bool:
    """Check whether one of the two fields of view covers enough of the other."""
    forward = first.fraction_inside(second, transform)
    backward = second.fraction_inside(first, transform.inverse())
    return max(forward, backward) >= MIN_COVERED


def _fit_days(images: Sequence[Any], start: Any) -> tuple[float, Any] | None:
    try:
        return _fit(images, start, BETWEEN_DAYS)
    except RuntimeError:  # ITK: no sample lies in both images, or all samples are equal
        return None


def _similarity(images: Sequence[Any], transform: Rigid) -> float | None:
    """Return the mutual information in nats, mean of both directions, or None if unknown."""
    import SimpleITK as sitk

    values = []
    for (fixed, moving), rigid in ((images, transform), (images[::-1], transform.inverse())):
        affine = sitk.AffineTransform(3)
        affine.SetMatrix(rigid.rotation.ravel().tolist())
        affine.SetTranslation(rigid.matrix[:3, 3].tolist())
        method = _method(fixed, BETWEEN_DAYS)
        method.SetInitialTransform(affine)
        try:
            values.append(-float(method.MetricEvaluate(fixed, moving)))
        except RuntimeError:
            return None
    return sum(values) / 2


# ---- SimpleITK


def _fit(
    images: Sequence[Any], start: Any, descent: Descent, levels: Sequence[int] = ()
) -> tuple[float, Any]:
    """Fit a rigid transform from the first image to the second; return it with the metric.

    The lower the metric, the better.

    Args:
        levels: shrink factors, coarse to fine; () uses the images as they are.

    Raises:
        RuntimeError: the images do not overlap, or cannot be compared.
    """
    import SimpleITK as sitk

    method = _method(images[0], descent)
    if levels:
        method.SetShrinkFactorsPerLevel(levels)
        method.SetSmoothingSigmasPerLevel([level / 2 for level in levels])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(sitk.Euler3DTransform(start), inPlace=False)
    transform = method.Execute(*images)
    if hasattr(transform, "GetNthTransform"):
        transform = transform.GetNthTransform(0)
    return float(method.GetMetricValue()), sitk.Euler3DTransform(transform)


def _method(fixed: Any, descent: Descent) -> Any:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    fraction = min(descent.fraction, descent.max_samples / math.prod(fixed.GetSize()))
    method.SetMetricSamplingPercentage(fraction, SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=descent.step,
        minStep=descent.min_step,
        numberOfIterations=descent.iterations,
        relaxationFactor=0.6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    return method


def _start(grid: Geometry, shift_mm: np.ndarray) -> Any:
    """Return a rigid transform about the centre of a grid: no rotation, and this shift."""
    import SimpleITK as sitk

    start = sitk.Euler3DTransform()
    start.SetCenter(grid.centre_mm.tolist())
    start.SetTranslation(shift_mm.tolist())
    return start


def _rigid(euler: Any) -> Rigid:
    rotation = np.array(euler.GetMatrix()).reshape(3, 3)
    return Rigid.about(np.array(euler.GetCenter()), rotation, np.array(euler.GetTranslation()))


def _image(volume: Volume) -> Any:
    """Convert a volume to a SimpleITK image in RAS, so that transforms are in RAS too."""
    import SimpleITK as sitk

    array = volume.array
    if volume.is_scaled or array.dtype != np.float32:
        array = np.empty(volume.array.shape, np.float32, order="F")
        for slab in slabs_of(volume.array, CONVERTED_TOGETHER):  # scaling makes float64 temporaries
            array[slab] = volume.intensities(volume.array[slab])
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing(volume.geometry.spacing_mm)
    image.SetOrigin(volume.geometry.affine[:3, 3].tolist())
    image.SetDirection(volume.geometry.directions.ravel().tolist())
    return image
