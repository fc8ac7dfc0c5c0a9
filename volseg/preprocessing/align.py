"""Resample channels onto the grid of the first, by world position rather than index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from scipy import ndimage

from volseg.errors import ScanError
from volseg.volume import Geometry, Volume, slabs_of

ALIGNMENT_LEVELS = (4, 2, 1)  # shrink factors, coarse to fine
ALIGNMENT_FRACTION = 0.2  # of the voxels, sampled for the metric
MIN_AXIS_VOXELS = 8  # voxels that every axis keeps at the coarsest level
HISTOGRAM_BINS = 50
CONVERTED_TOGETHER = 2**20  # voxels
SEED = 1  # jitters the sample points within their voxels
MIN_COVERED = 0.5  # fraction of the first channel's grid that every other channel must cover


def completed(images: Mapping[str, Volume], channels: Sequence[str]) -> dict[str, Volume]:
    """Return all channels in this order; a missing one is zeros on the grid of the first."""
    grid = images[channels[0]].geometry
    return {
        name: images[name]
        if name in images
        else Volume(np.zeros(grid.shape, np.uint8, order="F"), grid)
        for name in channels
    }


def to_first_grid(images: Mapping[str, Volume], *, align: bool = False) -> dict[str, Volume]:
    """Resample channels onto the grid of the first; those already on it are returned unchanged.

    Outside its field of view a channel has its smallest intensity: air, or no uptake.

    Args:
        align: first register each channel rigidly to the first (mutual information), for patients
            who moved between the scans.

    Raises:
        ScanError: a channel covers less than half of the first one's grid.
    """
    (first_name, first), *others = images.items()
    volumes = {first_name: first}
    for name, volume in others:
        if first.geometry.matches(volume.geometry) and not align:
            volumes[name] = volume
            continue
        transform = rigid_transform(first, volume) if align else np.eye(4)
        fraction = covered(first.geometry, volume.geometry, transform)
        if fraction < MIN_COVERED:
            raise ScanError(
                f"channel {name!r} covers {fraction:.0%} of the grid of {first_name!r}",
                fix="check that both scans show the same part of the same patient, "
                f"or leave {name!r} out",
                code="E_PAIR",
            )
        volumes[name] = resample_to_grid(volume, first.geometry, transform)
    return volumes


def resample_to_grid(volume: Volume, grid: Geometry, transform: np.ndarray | None = None) -> Volume:
    """Resample a scan linearly onto another grid, as float32 intensities.

    Outside its field of view, which ends at the outer faces of its voxels, the scan has its
    smallest intensity. Within half a voxel of these faces the outermost voxel is repeated.

    Args:
        transform: (4, 4) rigid transform in RAS mm, from points of the grid to points of the scan.
    """
    matrix = index_matrix(grid, volume.geometry, transform)
    values = volume.intensities(volume.array).astype(np.float32, copy=False)
    offset: Any = matrix[:3, 3]  # SciPy accepts a sequence, its type stubs do not
    mapping = {"output_shape": grid.shape, "matrix": matrix[:3, :3], "offset": offset}
    array = ndimage.affine_transform(values, **mapping, output=np.float32, order=1, mode="nearest")
    # Inside the field of view the nearest voxel centre is at most half a voxel away.
    ones = np.ones(values.shape, np.uint8)
    inside = ndimage.affine_transform(
        ones, **mapping, output=np.uint8, order=0, mode="grid-constant", cval=0
    )
    array[inside == 0] = values.min()
    return Volume(array, grid)


def rigid_transform(fixed: Volume, moving: Volume) -> np.ndarray:
    """Register two scans: return (4, 4) in RAS mm, from points of `fixed` to those of `moving`.

    Maximises Mattes mutual information, which needs no common intensity scale, from coarse to
    fine, starting at the positions in the headers.

    Raises:
        ScanError: the scans do not overlap, or cannot be compared.
    """
    import SimpleITK as sitk  # takes memory that only this needs

    registration = sitk.ImageRegistrationMethod()
    registration.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    registration.SetMetricSamplingStrategy(registration.REGULAR)
    registration.SetMetricSamplingPercentage(ALIGNMENT_FRACTION, SEED)
    registration.SetInterpolator(sitk.sitkLinear)
    registration.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-4, numberOfIterations=200, relaxationFactor=0.6
    )
    registration.SetOptimizerScalesFromPhysicalShift()
    shortest = min(*fixed.geometry.shape, *moving.geometry.shape)
    levels = [min(level, max(1, shortest // MIN_AXIS_VOXELS)) for level in ALIGNMENT_LEVELS]
    registration.SetShrinkFactorsPerLevel(levels)
    registration.SetSmoothingSigmasPerLevel([level / 2 for level in levels])
    registration.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    start = sitk.Euler3DTransform()
    start.SetCenter(_centre(fixed.geometry).tolist())
    registration.SetInitialTransform(start, inPlace=False)
    try:
        transform = registration.Execute(itk_image(sitk, fixed), itk_image(sitk, moving))
    except RuntimeError as error:
        raise ScanError(
            f"two channels could not be aligned ({str(error).strip().splitlines()[-1]})",
            fix="check that they show the same part of the same patient, "
            'or set align = "none" under [data] in the recipe',
            code="E_PAIR",
        ) from error
    return rigid_matrix(euler_transform(sitk, transform))


def index_matrix(
    grid: Geometry, source: Geometry, transform: np.ndarray | None = None
) -> np.ndarray:
    """Return (4, 4): index on the grid → index in the source; see `resample_to_grid`."""
    transform = np.eye(4) if transform is None else transform
    return np.linalg.inv(source.affine) @ transform @ grid.affine


def covered(grid: Geometry, source: Geometry, transform: np.ndarray) -> float:
    """Estimate the fraction of the grid's voxels inside the source's field of view."""
    steps = [np.linspace(0, n - 1, min(n, 24)) for n in grid.shape]
    indices = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    matrix = index_matrix(grid, source, transform)
    mapped = indices @ matrix[:3, :3].T + matrix[:3, 3]
    inside = (mapped >= -0.5) & (mapped <= np.array(source.shape) - 0.5)
    return float(inside.all(axis=1).mean())


def _centre(geometry: Geometry) -> np.ndarray:
    return geometry.to_world_mm((np.array(geometry.shape) - 1) / 2)


def itk_image(sitk: ModuleType, volume: Volume) -> Any:
    """Convert a volume to a SimpleITK image in RAS, so that transforms are in RAS too."""
    array = volume.array
    if volume.is_scaled or array.dtype != np.float32:
        array = np.empty(volume.array.shape, np.float32, order="F")
        for slab in slabs_of(volume.array, CONVERTED_TOGETHER):  # scaling makes float64 temporaries
            array[slab] = volume.intensities(volume.array[slab])
    image = sitk.GetImageFromArray(array.T)
    spacing = np.array(volume.geometry.spacing_mm)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(volume.geometry.affine[:3, 3].tolist())
    image.SetDirection((volume.geometry.affine[:3, :3] / spacing).ravel().tolist())
    return image


def euler_transform(sitk: ModuleType, transform: Any) -> Any:
    """Return the rigid transform in the result of a registration."""
    return sitk.Euler3DTransform(
        transform.GetNthTransform(0) if hasattr(transform, "GetNthTransform") else transform
    )


def rigid_matrix(euler: Any) -> np.ndarray:
    """Return the (4, 4) matrix of a rigid transform about a centre."""
    rotation = np.array(euler.GetMatrix()).reshape(3, 3)
    centre, shift = np.array(euler.GetCenter()), np.array(euler.GetTranslation())
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = centre + shift - rotation @ centre
    return matrix
