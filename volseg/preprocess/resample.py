"""Separable resampling of a voxel grid onto another number of voxels over the same field of view.

Both grids cover the same box, voxel edge to voxel edge, so output voxel o reads at (o + ½) · n_in / n_out − ½. An axis whose
number of voxels stays is not touched, which makes resampling to the own spacing exactly the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from volseg.volume import Geometry

Interpolation = Literal["linear", "cubic"]
SLAB_VALUES = 8_000_000  # float32 values converted at a time: 32 MB, which stays near the cache and bounds the peak


def resampled_shape(geometry: Geometry, spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Voxels per axis that come nearest to `spacing_mm` over the field of view."""
    i, j, k = (
        max(1, round(n * own / wanted))
        for n, own, wanted in zip(geometry.shape, geometry.spacing_mm, spacing_mm, strict=True)
    )
    return i, j, k


def resampled_geometry(geometry: Geometry, shape: tuple[int, int, int]) -> Geometry:
    """The grid of `shape` voxels over the same field of view."""
    scale = np.array(geometry.shape) / np.array(shape)
    affine = geometry.affine.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] += geometry.affine[:3, :3] @ ((scale - 1) / 2)
    return Geometry(shape, affine)


def resample(array: np.ndarray, shape: tuple[int, int, int], interpolation: Interpolation = "linear") -> np.ndarray:
    """Intensities (I, J, K) on a grid of `shape` voxels over the same field of view.

    Args:
        array: any real dtype and memory layout; converted to float32 slab by slab.
        interpolation: `linear`, or `cubic` = interpolating B-spline of order 3, equal to scipy's with its edges repeated.

    Returns:
        float32 (I, J, K); values outside the outermost voxel centres repeat the edge.
    """
    # Work in memory order: a NIfTI array has its last axis slowest, and a slab of it is then one contiguous read.
    axes = np.argsort([-abs(stride) for stride in array.strides], kind="stable")
    source = array.transpose(axes)
    slow, middle, fast = (shape[axis] for axis in axes)
    planes = np.empty((source.shape[0], middle, fast), np.float32)
    resize = _plane_resizer(source.shape[1:], (middle, fast), interpolation)
    for part in _slabs(source.shape[0], source.shape[1] * source.shape[2]):
        slab = torch.from_numpy(np.ascontiguousarray(source[part], dtype=np.float32))
        planes[part] = resize(slab).numpy()
    result = _resize_first_axis(planes, slow, interpolation)
    return result.transpose(np.argsort(axes))


def resample_mask(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Label values (I, J, K) on a grid of `shape` voxels over the same field of view.

    Where an axis gets more voxels each takes the value of the nearest one, so that reading the result at the old voxel
    centres gives the mask back; a threshold between interpolated slices would shrink every small lesion. Where an axis gets
    fewer voxels the label with the largest linearly interpolated share wins. No value appears that was not there.
    """
    finer = [max(n, m) for n, m in zip(mask.shape, shape, strict=True)]
    for axis, (n, m) in enumerate(zip(mask.shape, finer, strict=True)):
        if m > n:
            mask = np.take(mask, ((np.arange(m) + 0.5) * n / m).astype(int), axis=axis)
    if mask.shape == tuple(shape):
        return mask.copy()
    result = np.zeros(shape, mask.dtype)
    best = None
    for value in np.unique(mask):
        share = resample((mask == value).astype(np.float32), shape)
        if best is None:
            result[...], best = value, share
        else:
            wins = share > best
            result[wins] = value
            np.maximum(best, share, out=best)
    return result


def _slabs(length: int, values_per_plane: int) -> Iterator[slice]:
    step = max(1, SLAB_VALUES // max(1, values_per_plane))
    return (slice(start, min(length, start + step)) for start in range(0, length, step))


def _plane_resizer(
    size: tuple[int, ...], wanted: tuple[int, int], interpolation: Interpolation
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function (n, J, I) → (n, *wanted) for planes of `size`."""
    if tuple(size) == wanted:
        return lambda planes: planes
    if interpolation == "linear":
        return lambda planes: torch.nn.functional.interpolate(
            planes[None], size=wanted, mode="bilinear", align_corners=False
        )[0]
    first, second = (_cubic_matrix(n, m) for n, m in zip(size, wanted, strict=True))
    # The axis that shrinks most goes first, so that the second product is small.
    if wanted[0] / size[0] < wanted[1] / size[1]:
        return lambda planes: torch.matmul(torch.matmul(first, planes), second.T)
    return lambda planes: torch.matmul(first, torch.matmul(planes, second.T))


def _resize_first_axis(planes: np.ndarray, wanted: int, interpolation: Interpolation) -> np.ndarray:
    """(n, J, I) → (wanted, J, I)."""
    n = planes.shape[0]
    if n == wanted:
        return planes
    flat = torch.from_numpy(planes.reshape(n, -1))
    result = np.empty((wanted, *planes.shape[1:]), np.float32)
    out = torch.from_numpy(result.reshape(wanted, -1))
    if interpolation == "cubic":
        torch.matmul(_cubic_matrix(n, wanted), flat, out=out)
        return result
    lower, upper, weight = linear_positions(n, wanted)
    for index in range(wanted):
        torch.lerp(flat[int(lower[index])], flat[int(upper[index])], float(weight[index]), out=out[index])
    return result


def linear_positions(n: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `wanted` output voxels the two input voxels it lies between and the weight of the upper one."""
    position = np.clip((np.arange(wanted) + 0.5) * n / wanted - 0.5, 0, n - 1)
    lower = np.floor(position).astype(int)
    return lower, np.minimum(lower + 1, n - 1), position - lower


def _cubic_matrix(n: int, wanted: int) -> torch.Tensor:
    """(wanted, n) float32: prefilter and interpolation of scipy's order-3 spline along one axis, as one linear map."""
    if n == wanted:
        return torch.eye(n)
    # Linear in its input and separable, so its action on unit vectors is all there is to know.
    matrix = ndimage.zoom(np.eye(n), (wanted / n, 1), order=3, mode="nearest", grid_mode=True)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))
