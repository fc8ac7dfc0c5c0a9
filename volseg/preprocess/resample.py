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

Kind = Literal["linear", "cubic", "nearest"]
Interpolation = Kind | tuple[Kind, Kind, Kind]
CPU = torch.device("cpu")
SLAB_VALUES = 1_000_000  # float32 values converted at a time: 4 MB, which stay in the cache
NEGLIGIBLE_WEIGHT = 1e-7  # of a cubic spline's far planes: under the rounding of float32


def resampled_shape(
    geometry: Geometry, spacing_mm: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Voxels per axis that come nearest to `spacing_mm` over the field of view."""
    i, j, k = (
        max(1, round(own / wanted * n))
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


def resample(
    array: np.ndarray, shape: tuple[int, int, int], interpolation: Interpolation = "linear"
) -> np.ndarray:
    """Intensities (I, J, K) on a grid of `shape` voxels over the same field of view.

    Args:
        array: any real dtype and memory layout; converted to float32 slab by slab.
        interpolation: `linear`, `nearest`, or `cubic` = interpolating B-spline of order 3, equal to scipy's with its edges
            repeated; one for all axes or one per axis.

    Returns:
        float32 (I, J, K); values outside the outermost voxel centres repeat the edge.
    """
    planes = PlaneReader(array, shape, interpolation)
    return planes.read(0, shape[planes.axis]).numpy()


def slowest_axis(array: np.ndarray) -> int:
    """The axis along which neighbours lie furthest apart in memory."""
    return max(range(array.ndim), key=lambda axis: (abs(array.strides[axis]), -axis))


class PlaneReader:
    """The planes of a resampled volume along one axis, some at a time; cheapest when asked for in order.

    Source planes that the next planes need too are kept, already resampled within the plane. So what it holds depends on how
    many planes are asked for at once, not on how many there are.

    Args:
        array, shape, interpolation: as in `resample`.
        axis: along which planes are counted; None for the one that is slowest in memory.
        convert: what happens first to source planes, given as (planes, which), which are transposed by `axes`.
        limits: the result is clipped to them; `plane`: to the range of each source plane, before planes are mixed.
        device: where planes are resampled; the source's own values are what goes there.
    """

    def __init__(
        self,
        array: np.ndarray,
        shape: tuple[int, int, int],
        interpolation: Interpolation = "linear",
        axis: int | None = None,
        *,
        convert: Callable[[np.ndarray, slice], np.ndarray] | None = None,
        limits: tuple[float, float] | Literal["plane"] | None = None,
        device: torch.device = CPU,
    ) -> None:
        # Work in memory order: a NIfTI array has its last axis slowest, and a slab of it is then one contiguous read.
        order = sorted(range(3), key=lambda n: -abs(array.strides[n]))
        self.axis = order[0] if axis is None else axis
        self.axes = (self.axis, *(n for n in order if n != self.axis))
        self._source = array.transpose(self.axes)
        n, *plane = self._source.shape
        wanted, *wanted_plane = (shape[axis] for axis in self.axes)
        kinds = (
            interpolation
            if isinstance(interpolation, tuple)
            else (interpolation, interpolation, interpolation)
        )
        kind, first_kind, second_kind = (
            kinds[self.axes[0]],
            kinds[self.axes[1]],
            kinds[self.axes[2]],
        )
        self._plane_shape = tuple(wanted_plane)
        self._resize = plane_resizer(
            tuple(plane), tuple(wanted_plane), (first_kind, second_kind), device
        )
        self._along = _Along(n, wanted, kind, device)
        self._convert = convert or (lambda planes, which: planes)
        self._limits = limits
        self._device = device
        self._kept = (0, torch.empty((0, *wanted_plane), device=device))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes `start` to `stop`: float32 on the device, (I, J, K) but `stop - start` long along the axis; the caller's to change."""
        first, last = self._along.needed(start, stop)
        planes = self._along.combine(self._planes(first, last), first, start, stop)
        if isinstance(self._limits, tuple):
            planes.clamp_(*self._limits)
        return planes.permute(*np.argsort(self.axes).tolist())

    def _planes(self, first: int, last: int) -> torch.Tensor:
        """Source planes, resampled within the plane."""
        kept_first, kept = self._kept
        planes = torch.empty((last - first, *self._plane_shape), device=self._device)
        known = slice(max(first, kept_first), min(last, kept_first + len(kept)))
        if known.start < known.stop:
            planes[known.start - first : known.stop - first] = kept[
                known.start - kept_first : known.stop - kept_first
            ]
            missing = ((first, known.start), (known.stop, last))
        else:
            missing = ((first, last),)
        for begin, end in missing:
            for part in _slabs(begin, end, self._source.shape[1] * self._source.shape[2]):
                slab = tensor_of(self._convert(self._source[part], part), self._device)
                resized = self._resize(slab)
                if self._limits == "plane":
                    flat = slab.flatten(1)
                    resized = resized.clamp(
                        flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
                    )
                planes[part.start - first : part.stop - first] = resized
        if not self._along.is_identity:
            self._kept = (first, planes)
        return planes


class _Along:
    """Interpolation between planes along the axis in which a `PlaneReader` counts."""

    def __init__(self, n: int, wanted: int, kind: Kind, device: torch.device) -> None:
        self.is_identity = n == wanted
        self._matrix = None
        if kind != "cubic" or n == wanted:
            self._lower, self._upper, self._weight = positions(n, wanted, kind)
            return
        matrix = _cubic_matrix(n, wanted)
        self._matrix = matrix.to(device)
        heavy = (matrix.abs() > NEGLIGIBLE_WEIGHT).numpy()
        self._lower, self._upper = heavy.argmax(axis=1), n - 1 - heavy[:, ::-1].argmax(axis=1)

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """First and one past the last of the source planes for the output planes `start` to `stop`."""
        return int(self._lower[start:stop].min()), int(self._upper[start:stop].max()) + 1

    def combine(self, planes: torch.Tensor, first: int, start: int, stop: int) -> torch.Tensor:
        """(n, J, I) source planes from `first` on → (stop - start, J, I)."""
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


def coarsened_mask(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Where there is any label: uint8 0 and 1 on a grid of `shape` voxels over the same field of view as the mask (I, J, K).

    A voxel of the new grid is 1 where its cell holds a labelled voxel, so that not even the smallest label is lost on a coarse grid;
    an axis that gets more voxels takes the nearest.
    """
    found = (mask > 0).astype(np.uint8)
    for axis, (n, m) in enumerate(zip(mask.shape, shape, strict=True)):
        if m >= n:
            found = np.take(found, ((np.arange(m) + 0.5) * n / m).astype(int), axis=axis)
        else:
            # The cell of a voxel goes from edge to edge; one of the old voxels may lie in two cells.
            first, last = np.arange(m) * n // m, -(-(np.arange(m) + 1) * n // m)
            cells = np.add.accumulate(np.insert(found, 0, 0, axis=axis), axis=axis, dtype=np.int32)
            found = (np.take(cells, last, axis=axis) > np.take(cells, first, axis=axis)).astype(
                np.uint8
            )
    return found


def _slabs(first: int, last: int, values_per_plane: int) -> Iterator[slice]:
    step = max(1, SLAB_VALUES // max(1, values_per_plane))
    return (slice(start, min(last, start + step)) for start in range(first, last, step))


def tensor_of(values: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
    """Real numbers of any dtype and memory layout → float32 on a device, contiguous; may be the array's own memory."""
    # What goes to a GPU goes as stored, which is less. No tensor can be of what is mapped read-only from a file, or of the other byte order.
    is_sent_as_stored = (
        device.type == "cuda" and values.dtype.itemsize <= 4 and values.dtype.isnative
    )
    dtype = values.dtype if is_sent_as_stored else np.float32
    return send(torch.from_numpy(np.require(values, dtype, ["C", "W"])), device).float()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for what a GPU is at; itself where that is the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def plane_resizer(
    size: tuple[int, ...],
    wanted: tuple[int, ...],
    kinds: tuple[Kind, ...],
    device: torch.device = CPU,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function (n, J, I) → (n, *wanted) for planes of `size` on a device."""
    if size == wanted:
        return lambda planes: planes
    if kinds == ("linear", "linear"):
        return lambda planes: torch.nn.functional.interpolate(
            planes[None], size=wanted, mode="bilinear", align_corners=False
        )[0]
    first, second = (
        interpolation_matrix(n, m, kind).to(device)
        for n, m, kind in zip(size, wanted, kinds, strict=True)
    )
    # The axis that shrinks most goes first, so that the second product is small.
    if wanted[0] / size[0] < wanted[1] / size[1]:
        return lambda planes: torch.matmul(torch.matmul(first, planes), second.T)
    return lambda planes: torch.matmul(first, torch.matmul(planes, second.T))


def positions(
    n: int, wanted: int, kind: Kind = "linear"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `wanted` output voxels the two input voxels it lies between, which may be one, and the weight of the upper one."""
    position = np.clip((np.arange(wanted) + 0.5) * n / wanted - 0.5, 0, n - 1)
    if kind == "nearest":
        position = np.floor(position + 0.5)
    lower = np.floor(position).astype(int)
    return lower, np.ceil(position).astype(int), position - lower


def interpolation_matrix(n: int, wanted: int, kind: Kind) -> torch.Tensor:
    """(wanted, n) float32: the interpolation along one axis as one linear map."""
    if kind == "cubic":
        return _cubic_matrix(n, wanted)
    lower, upper, weight = positions(n, wanted, kind)
    matrix = np.zeros((wanted, n), np.float32)
    np.add.at(matrix, (np.arange(wanted), lower), 1 - weight)
    np.add.at(matrix, (np.arange(wanted), upper), weight)
    return torch.from_numpy(matrix)


def _cubic_matrix(n: int, wanted: int) -> torch.Tensor:
    """(wanted, n) float32: prefilter and interpolation of scipy's order-3 spline along one axis, as one linear map."""
    if n == wanted:
        return torch.eye(n)
    # Linear in its input and separable, so its action on unit vectors is all there is to know.
    matrix = np.asarray(
        ndimage.zoom(np.eye(n), (wanted / n, 1), order=3, mode="nearest", grid_mode=True)
    )
    # The tails of the spline become subnormal numbers, with which a product takes twenty times as long.
    matrix[np.abs(matrix) < NEGLIGIBLE_WEIGHT] = 0
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))
