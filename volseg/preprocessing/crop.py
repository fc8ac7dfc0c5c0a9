"""Canonical axes and boxes: views of the scan, each with its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.volume import BoundingBox, Geometry, slabs_of

BODY_SUBSAMPLING = 4  # every fourth voxel per axis suffices for the percentile of the threshold


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """Prepared axes in terms of stored ones: axis n is `axes[n]`, reversed where `flipped[n]`."""

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry) -> AxisOrder:
        """Return the canonical order: axis n is the stored one nearest world axis n (R, A, S)."""
        codes = geometry.axis_codes
        axes = [
            next(n for n, code in enumerate(codes) if code in pair) for pair in ("RL", "AP", "SI")
        ]
        flipped = [codes[axis] in "LPI" for axis in axes]
        return cls((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))

    @classmethod
    def stored(cls) -> AxisOrder:
        """Return the file order, slowest axis first, for networks that ignore orientation."""
        return cls((2, 1, 0), (False, False, False))

    def transposed(self, transpose: tuple[int, int, int]) -> AxisOrder:
        """Return the order whose axis n is axis `transpose[n]` of this one."""
        r, a, s = transpose
        axes, flipped = self.axes, self.flipped
        return AxisOrder((axes[r], axes[a], axes[s]), (flipped[r], flipped[a], flipped[s]))


def to_canonical(array: np.ndarray, order: AxisOrder) -> np.ndarray:
    """Return a view of the stored (I, J, K) in this order; (R, A, S) for a canonical one."""
    array = array.transpose(order.axes)
    return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in order.flipped)]


def from_canonical(array: np.ndarray, order: AxisOrder) -> np.ndarray:
    """Invert `to_canonical`; return a view."""
    array = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in order.flipped)]
    return array.transpose(np.argsort(order.axes))


def canonical_geometry(geometry: Geometry, order: AxisOrder) -> Geometry:
    """Return the grid of `to_canonical(array)`: other indices, the same points in the patient."""
    affine = geometry.affine.copy()
    affine[:, :3] = geometry.affine[:, list(order.axes)]
    shape = tuple(geometry.shape[axis] for axis in order.axes)
    for axis, flip in enumerate(order.flipped):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
            affine[:3, axis] *= -1
    return Geometry((shape[0], shape[1], shape[2]), affine)


def crop(array: np.ndarray, box: BoundingBox) -> np.ndarray:
    """Return the part of (I, J, K) inside the box, as a view."""
    return array[box.slices]


def uncrop(
    array: np.ndarray, box: BoundingBox, shape: tuple[int, int, int], fill: float = 0
) -> np.ndarray:
    """Invert `crop`: return (I, J, K) of `shape` with `array` in the box and `fill` elsewhere."""
    full = np.full(shape, fill, array.dtype)
    full[box.slices] = array
    return full


def body_threshold(stored: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> float:
    """Return a tenth of the 99th percentile of the intensities.

    It separates the body from MRI air, which is noise near 0 at any intensity scale.
    """
    steps = [min(BODY_SUBSAMPLING, max(1, n // 8)) for n in stored.shape]
    sample = stored[tuple(slice(None, None, step) for step in steps)]
    return (float(np.percentile(sample, 99)) * slope + intercept) / 10


def box_where(
    test: Callable[[tuple[slice, slice, slice]], np.ndarray], array: np.ndarray
) -> BoundingBox | None:
    """Return the smallest box of the voxels of (I, J, K) that pass a test, or None.

    Args:
        test: slices of one slab of the array → bool of the shape of that slab.
    """
    profiles = [np.zeros(n, bool) for n in array.shape]
    for part in slabs_of(array):
        inside = test(part)
        for axis, slab in enumerate(part):
            others = tuple(other for other in range(3) if other != axis)
            profiles[axis][slab] |= inside.any(axis=others)
    if not profiles[0].any():
        return None
    ends = (np.flatnonzero(profile)[[0, -1]].tolist() for profile in profiles)
    (i, i_last), (j, j_last), (k, k_last) = ends
    return BoundingBox((i, j, k), (i_last + 1, j_last + 1, k_last + 1))


def scaled_box(
    box: BoundingBox,
    shape: Sequence[int],
    new_shape: Sequence[int],
    margin_voxels: Sequence[float] = (0, 0, 0),
) -> BoundingBox:
    """Transfer a box, with a margin, between two grids over the same field of view.

    Both grids reach from edge to edge of the field of view. The box is rounded outwards to whole
    voxels and clipped to the grid.

    Args:
        shape, new_shape: voxels of the old and the new grid.
        margin_voxels: margin along each axis, in voxels of the new grid.
    """
    axes = zip(box.start, box.stop, shape, new_shape, margin_voxels, strict=True)
    ends = [
        (max(0, math.floor(start * m / n - margin)), min(m, math.ceil(stop * m / n + margin)))
        for start, stop, n, m, margin in axes
    ]
    (r, r_stop), (a, a_stop), (s, s_stop) = ends
    return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))
