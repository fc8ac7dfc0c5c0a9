"""Channels on grids of their own → the first channel's grid, by where they are in the world, not by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from scipy import ndimage

from volseg.errors import EnvironmentProblem, ScanError
from volseg.volume import Geometry, Volume, slabs_of

ALIGNMENT_LEVELS = (4, 2, 1)  # voxels that count as one, coarse to fine
ALIGNMENT_SHARE = 0.2  # of the voxels at which images are compared
SHORTEST_AXIS = 8  # voxels that it keeps at the coarsest level
HISTOGRAM_BINS = 50
CONVERTED_TOGETHER = 2**20  # voxels
SEED = 1  # of the places within the voxels at which images are compared
LEAST_COVERED = 0.5  # of the first channel's grid that another one must reach over


def completed(images: Mapping[str, Volume], channels: Sequence[str]) -> dict[str, Volume]:
    """All channels in this order; those that are not there hold zeros on the grid of the first."""
    grid = images[channels[0]].geometry
    return {
        name: images[name]
        if name in images
        else Volume(np.zeros(grid.shape, np.uint8, order="F"), grid)
        for name in channels
    }


def on_one_grid(images: Mapping[str, Volume], *, align: bool = False) -> dict[str, Volume]:
    """The images with all channels on the grid of the first; those that are already on it are returned as they are.

    Where a channel does not reach, it has its smallest intensity: air, or no uptake.

    Args:
        align: first move a channel rigidly so that it fits the first one (mutual information), for scans between which the patient
            moved.

    Raises:
        ScanError: a channel covers less than half of the first one's grid.
        EnvironmentProblem: alignment was asked for and SimpleITK is not installed.
    """
    (first_name, first), *others = images.items()
    found = {first_name: first}
    for name, volume in others:
        if first.geometry.matches(volume.geometry) and not align:
            found[name] = volume
            continue
        moved = rigid_transform(first, volume) if align else np.eye(4)
        share = covered(first.geometry, volume.geometry, moved)
        if share < LEAST_COVERED:
            raise ScanError(
                f"channel {name!r} covers {share:.0%} of the grid of {first_name!r}",
                fix=f"check that both are scans of the same part of the same patient, or leave {name!r} out",
                code="E_PAIR",
            )
        found[name] = resampled_onto(volume, first.geometry, moved)
    return found


def resampled_onto(volume: Volume, grid: Geometry, moved: np.ndarray | None = None) -> Volume:
    """A scan on another grid: linear in world space, float32 intensities; its smallest intensity where it does not reach.

    It reaches to the outer faces of its outermost voxels, which within half a voxel of them are all there is.

    Args:
        moved: (4, 4) rigid transform in RAS mm, from points of the grid to those of the scan that belong there.
    """
    matrix = index_matrix(grid, volume.geometry, moved)
    values = volume.intensities(volume.array).astype(np.float32, copy=False)
    offset: Any = matrix[:3, 3]  # a sequence, which SciPy takes and its types do not name
    places = {"output_shape": grid.shape, "matrix": matrix[:3, :3], "offset": offset}
    array = ndimage.affine_transform(values, **places, output=np.float32, order=1, mode="nearest")
    # The nearest voxel's centre is half a voxel away at most.
    there = np.ones(values.shape, np.uint8)
    inside = ndimage.affine_transform(
        there, **places, output=np.uint8, order=0, mode="grid-constant", cval=0
    )
    array[inside == 0] = values.min()
    return Volume(array, grid)


def rigid_transform(fixed: Volume, moving: Volume) -> np.ndarray:
    """(4, 4) in RAS mm: where in `moving` that is what lies at a point of `fixed`.

    Mattes mutual information, which needs no common scale of intensities, from coarse to fine, beginning with the two scans' positions as
    their headers state them.

    Raises:
        ScanError: the two do not overlap, or nothing in them can be compared.
        EnvironmentProblem: SimpleITK is not installed.
    """
    itk = simpleitk(
        "alignment of channels",
        otherwise='set align = "none" under [data] in the recipe',
    )
    registration = itk.ImageRegistrationMethod()
    registration.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    registration.SetMetricSamplingStrategy(registration.REGULAR)
    registration.SetMetricSamplingPercentage(ALIGNMENT_SHARE, SEED)
    registration.SetInterpolator(itk.sitkLinear)
    registration.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-4, numberOfIterations=200, relaxationFactor=0.6
    )
    registration.SetOptimizerScalesFromPhysicalShift()
    shortest = min(*fixed.geometry.shape, *moving.geometry.shape)
    levels = [min(level, max(1, shortest // SHORTEST_AXIS)) for level in ALIGNMENT_LEVELS]
    registration.SetShrinkFactorsPerLevel(levels)
    registration.SetSmoothingSigmasPerLevel([level / 2 for level in levels])
    registration.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    start = itk.Euler3DTransform()
    start.SetCenter(_centre(fixed.geometry).tolist())
    registration.SetInitialTransform(start, inPlace=False)
    try:
        found = registration.Execute(itk_image(itk, fixed), itk_image(itk, moving))
    except RuntimeError as error:
        raise ScanError(
            f"two channels could not be aligned ({str(error).strip().splitlines()[-1]})",
            fix='check that they are scans of the same part of the same patient, or set align = "none" under [data] in the recipe',
            code="E_PAIR",
        ) from error
    return matrix_of(euler_of(itk, found))


def index_matrix(grid: Geometry, source: Geometry, moved: np.ndarray | None = None) -> np.ndarray:
    """(4, 4): index on the grid → index in the source. `moved` as in `resampled_onto`."""
    return np.linalg.inv(source.affine) @ (np.eye(4) if moved is None else moved) @ grid.affine


def covered(grid: Geometry, source: Geometry, moved: np.ndarray) -> float:
    """Share of the grid's voxels that lie within the source's field of view, from a sample of them."""
    steps = [np.linspace(0, n - 1, min(n, 24)) for n in grid.shape]
    indices = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    matrix = index_matrix(grid, source, moved)
    places = indices @ matrix[:3, :3].T + matrix[:3, 3]
    inside = (places >= -0.5) & (places <= np.array(source.shape) - 0.5)
    return float(inside.all(axis=1).mean())


def _centre(geometry: Geometry) -> np.ndarray:
    return geometry.to_world_mm((np.array(geometry.shape) - 1) / 2)


def itk_image(itk: ModuleType, volume: Volume) -> Any:
    """In RAS throughout: both images get the same convention, so the transform is in it too."""
    array = volume.array
    if volume.is_scaled or array.dtype != np.float32:
        array = np.empty(volume.array.shape, np.float32, order="F")
        for slab in slabs_of(volume.array, CONVERTED_TOGETHER):  # scaled ones are in float64 before
            array[slab] = volume.intensities(volume.array[slab])
    image = itk.GetImageFromArray(array.T)
    spacing = np.array(volume.geometry.spacing_mm)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(volume.geometry.affine[:3, 3].tolist())
    image.SetDirection((volume.geometry.affine[:3, :3] / spacing).ravel().tolist())
    return image


def euler_of(itk: ModuleType, transform: Any) -> Any:
    """The rigid transform within what a registration returns."""
    return itk.Euler3DTransform(
        transform.GetNthTransform(0) if hasattr(transform, "GetNthTransform") else transform
    )


def matrix_of(euler: Any) -> np.ndarray:
    """(4, 4) of a rigid transform about a centre."""
    rotation = np.array(euler.GetMatrix()).reshape(3, 3)
    centre, shift = np.array(euler.GetCenter()), np.array(euler.GetTranslation())
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = centre + shift - rotation @ centre
    return matrix


def simpleitk(what: str, *, otherwise: str) -> ModuleType:
    """The library, which is optional.

    Args:
        what: what needs it. otherwise: what to do without it.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise EnvironmentProblem(
            f"{what} needs SimpleITK, which is not installed",
            fix=f"pip install 'volseg[dicom]', or {otherwise}",
            code="E_BACKEND",
        ) from error
    return SimpleITK
