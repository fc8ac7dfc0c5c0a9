"""Separable resampling of a voxel grid to another number of voxels over the same field of view.

Both grids cover the same box from voxel edge to voxel edge, so output voxel o reads at
(o + ½) · n_in / n_out − ½. An axis that keeps its number of voxels is not touched, so resampling to
the original spacing is exactly the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from volseg.volume import Geometry

Kind = Literal["linear", "cubic", "nearest"]
CPU = torch.device("cpu")
SLAB_VALUES = 1_000_000  # float32 values converted at a time: 4 MB, which fit into the cache
NEGLIGIBLE_WEIGHT = 1e-7  # of distant planes in a cubic spline: below float32 rounding


@dataclass(frozen=True, slots=True)
class Interpolation:
    """How values between voxels are computed.

    Args:
        kinds: per axis; `cubic` is the interpolating B-spline of order 3, equal to SciPy's with
            repeated edges.
        limits: the result is clipped to them; `plane`: clip to the range of each source plane
            before planes are combined.
    """

    kinds: tuple[Kind, Kind, Kind]
    limits: tuple[float, float] | Literal["plane"] | None = None


def resampled_shape(
    geometry: Geometry, spacing_mm: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Return the voxels per axis whose spacing is closest to `spacing_mm`."""
    axes = zip(geometry.shape, geometry.spacing_mm, spacing_mm, strict=True)
    i, j, k = (max(1, round(source_mm / target_mm * n)) for n, source_mm, target_mm in axes)
    return i, j, k


def resample(array: np.ndarray, shape: tuple[int, int, int], kind: Kind = "linear") -> np.ndarray:
    """Resample intensities (I, J, K) to `shape` voxels over the same field of view.

    Args:
        array: any real dtype and memory layout; converted to float32 slab by slab.

    Returns:
        float32 (I, J, K); values outside the outermost voxel centres repeat the edge.
    """
    planes = PlaneReader(array, shape, Interpolation((kind, kind, kind)))
    return planes.read(0, shape[planes.axis]).numpy()


class PlaneReader:
    """A reader of a resampled volume, a few planes at a time; fastest in ascending order.

    It keeps the source planes that the next planes need, already resampled in-plane, so its memory
    depends on the number of planes per read, not on the size of the volume.

    Args:
        array, shape: as in `resample`.
        axis: axis across the planes; None for the slowest one in memory.
        convert: applied first to source planes, as (planes, indices) → planes, transposed by
            `axes`.
        device: where planes are resampled, from values transferred as stored.
    """

    def __init__(
        self,
        array: np.ndarray,
        shape: tuple[int, int, int],
        interpolation: Interpolation,
        axis: int | None = None,
        *,
        convert: Callable[[np.ndarray, slice], np.ndarray] | None = None,
        device: torch.device = CPU,
    ) -> None:
        # In memory order a slab is one contiguous read; NIfTI arrays have their last axis slowest.
        order = sorted(range(3), key=lambda n: -abs(array.strides[n]))
        self.axis = order[0] if axis is None else axis
        self.axes = (self.axis, *(n for n in order if n != self.axis))
        self._source = array.transpose(self.axes)
        n, *plane_shape = self._source.shape
        new_n, *new_plane_shape = (shape[axis] for axis in self.axes)
        kinds = interpolation.kinds
        plane_kinds: tuple[Kind, ...] = tuple(kinds[axis] for axis in self.axes[1:])
        self._plane_shape = tuple(new_plane_shape)
        self._resize = plane_resizer(tuple(plane_shape), self._plane_shape, plane_kinds, device)
        self._along = _Along(n, new_n, kinds[self.axis], device)
        self._convert = convert or (lambda planes, indices: planes)
        self._limits = interpolation.limits
        self._device = device
        self._cache = (0, torch.empty((0, *new_plane_shape), device=device))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return planes `start` to `stop` along the axis: float32 (I, J, K) on the device.

        The caller may change them.
        """
        first, last = self._along.needed(start, stop)
        planes = self._along.combine(self._planes(first, last), first, start, stop)
        if isinstance(self._limits, tuple):
            planes.clamp_(*self._limits)
        return planes.permute(*np.argsort(self.axes).tolist())

    def _planes(self, first: int, last: int) -> torch.Tensor:
        """Return source planes, resampled in-plane."""
        cache_first, cache = self._cache
        planes = torch.empty((last - first, *self._plane_shape), device=self._device)
        start, stop = max(first, cache_first), min(last, cache_first + len(cache))
        if start < stop:
            cached = cache[start - cache_first : stop - cache_first]
            planes[start - first : stop - first] = cached
            missing = ((first, start), (stop, last))
        else:
            missing = ((first, last),)
        for begin, end in missing:
            for part in _slabs(begin, end, self._source.shape[1] * self._source.shape[2]):
                slab = tensor_of(self._convert(self._source[part], part), self._device)
                resized = self._resize(slab)
                if self._limits == "plane":
                    low, high = slab.flatten(1).aminmax(dim=1)
                    resized = resized.clamp(low[:, None, None], high[:, None, None])
                planes[part.start - first : part.stop - first] = resized
        if not self._along.is_identity:
            self._cache = (first, planes)
        return planes


class _Along:
    """Interpolation across the planes of a `PlaneReader`."""

    def __init__(self, n: int, new_n: int, kind: Kind, device: torch.device) -> None:
        self.is_identity = n == new_n
        self._matrix = None
        if kind != "cubic" or n == new_n:
            self._lower, self._upper, self._weight = positions(n, new_n, kind)
            return
        matrix = _cubic_matrix(n, new_n)
        self._matrix = matrix.to(device)
        is_used = (matrix.abs() > NEGLIGIBLE_WEIGHT).numpy()
        self._lower, self._upper = is_used.argmax(axis=1), n - 1 - is_used[:, ::-1].argmax(axis=1)

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of source planes for output planes `start` to `stop`."""
        return int(self._lower[start:stop].min()), int(self._upper[start:stop].max()) + 1

    def combine(self, planes: torch.Tensor, first: int, start: int, stop: int) -> torch.Tensor:
        """Interpolate (n, J, I) source planes, from plane `first` on, to (stop - start, J, I)."""
        if self.is_identity:
            return planes
        if self._matrix is not None:
            mixed = self._matrix[start:stop, first : first + len(planes)] @ planes.flatten(1)
            return mixed.reshape(stop - start, *planes.shape[1:])
        result = torch.empty((stop - start, *planes.shape[1:]), device=planes.device)
        for row, index in enumerate(range(start, stop)):
            lower, upper = int(self._lower[index]) - first, int(self._upper[index]) - first
            torch.lerp(planes[lower], planes[upper], float(self._weight[index]), out=result[row])
        return result


def resample_mask(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample label values (I, J, K) to `shape` voxels over the same field of view.

    Axes that gain voxels use the nearest neighbour, so that the result at the old voxel centres is
    the old mask; thresholding interpolated slices would shrink every small lesion. Axes that lose
    voxels use the label with the largest linearly interpolated weight. No new value appears.
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
        weight = resample((mask == value).astype(np.float32), shape)
        if best is None:
            result[...], best = value, weight
        else:
            result[weight > best] = value
            np.maximum(best, weight, out=best)
    return result


def coarsened_mask(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Mark where a mask (I, J, K) has any label: uint8 0 and 1 on a grid of `shape` voxels.

    Both grids cover the same field of view. On axes that lose voxels, a new voxel is 1 if it covers
    any labelled voxel, so that no label is lost; other axes use the nearest neighbour.
    """
    coarse = (mask > 0).astype(np.uint8)
    for axis, (n, m) in enumerate(zip(mask.shape, shape, strict=True)):
        if m >= n:
            coarse = np.take(coarse, ((np.arange(m) + 0.5) * n / m).astype(int), axis=axis)
        else:
            # New voxels reach from edge to edge, so an old voxel may lie in two of them.
            first, last = np.arange(m) * n // m, -(-(np.arange(m) + 1) * n // m)
            padded = np.insert(coarse, 0, 0, axis=axis)
            counts = np.add.accumulate(padded, axis=axis, dtype=np.int32)
            is_labelled = np.take(counts, last, axis=axis) > np.take(counts, first, axis=axis)
            coarse = is_labelled.astype(np.uint8)
    return coarse


def _slabs(first: int, last: int, values_per_plane: int) -> Iterator[slice]:
    step = max(1, SLAB_VALUES // max(1, values_per_plane))
    return (slice(start, min(last, start + step)) for start in range(first, last, step))


def tensor_of(values: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
    """Return a contiguous float32 tensor on a device, which may share the array's memory."""
    # Sending small dtypes to a GPU as stored is faster. `require` copies read-only memory, such as
    # a mapped file, which torch refuses, as it does the other byte order.
    is_small = values.dtype.itemsize <= 4 and values.dtype.isnative
    dtype = values.dtype if device.type == "cuda" and is_small else np.float32
    return send(torch.from_numpy(np.require(values, dtype, ["C", "W"])), device).float()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a host tensor to a device without waiting for the GPU; on the host return it as is."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def plane_resizer(
    shape: tuple[int, ...],
    new_shape: tuple[int, ...],
    kinds: tuple[Kind, ...],
    device: torch.device = CPU,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that resizes (n, *shape) planes to (n, *new_shape) on a device."""
    if shape == new_shape:
        return lambda planes: planes
    if kinds == ("linear", "linear"):
        return lambda planes: torch.nn.functional.interpolate(
            planes[None], size=new_shape, mode="bilinear", align_corners=False
        )[0]
    axes = zip(shape, new_shape, kinds, strict=True)
    first, second = (interpolation_matrix(n, m, kind).to(device) for n, m, kind in axes)
    # The axis that shrinks most goes first, so that the second product is small.
    if new_shape[0] / shape[0] < new_shape[1] / shape[1]:
        return lambda planes: torch.matmul(torch.matmul(first, planes), second.T)
    return lambda planes: torch.matmul(first, torch.matmul(planes, second.T))


def positions(
    n: int, new_n: int, kind: Kind = "linear"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lower and upper input voxel of each output voxel, and the weight of the upper.

    Both are the same voxel where an output voxel lies exactly on it, or outside all centres.
    """
    position = np.clip((np.arange(new_n) + 0.5) * n / new_n - 0.5, 0, n - 1)
    if kind == "nearest":
        position = np.floor(position + 0.5)
    lower = np.floor(position).astype(int)
    return lower, np.ceil(position).astype(int), position - lower


def interpolation_matrix(n: int, new_n: int, kind: Kind) -> torch.Tensor:
    """Return the interpolation along one axis as a (new_n, n) float32 matrix."""
    if kind == "cubic":
        return _cubic_matrix(n, new_n)
    lower, upper, weight = positions(n, new_n, kind)
    matrix = np.zeros((new_n, n), np.float32)
    np.add.at(matrix, (np.arange(new_n), lower), 1 - weight)
    np.add.at(matrix, (np.arange(new_n), upper), weight)
    return torch.from_numpy(matrix)


def _cubic_matrix(n: int, new_n: int) -> torch.Tensor:
    """Return SciPy's order-3 spline along one axis, with prefilter, as a (new_n, n) matrix."""
    if n == new_n:
        return torch.eye(n)
    # The spline is linear and separable, so its response to unit vectors defines it.
    matrix = np.asarray(
        ndimage.zoom(np.eye(n), (new_n / n, 1), order=3, mode="nearest", grid_mode=True)
    )
    # The tails of the spline become subnormal numbers, which make a product 20 times slower.
    matrix[np.abs(matrix) < NEGLIGIBLE_WEIGHT] = 0
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))
