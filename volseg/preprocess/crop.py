"""Canonical axes and boxes: views of the scan, with their way back beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.volume import BoundingBox, Geometry, slabs_of

BODY_SUBSAMPLING = (
    4  # the automatic threshold is a percentile: every fourth voxel of each axis gives the same
)


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """How stored axes become prepared ones: `axes[n]` is the stored axis that prepared axis n is, `flipped[n]` if it runs backwards."""

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry) -> AxisOrder:
        """Canonical: prepared axis n is the stored one that grows most along world axis n (R, A, S)."""
        codes = geometry.axis_codes
        axes = [
            next(n for n, code in enumerate(codes) if code in pair) for pair in ("RL", "AP", "SI")
        ]
        flipped = [codes[axis] in "LPI" for axis in axes]
        return cls((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))

    @classmethod
    def stored(cls) -> AxisOrder:
        """As in the file, the slowest axis first: what networks see that know nothing of orientation."""
        return cls((2, 1, 0), (False, False, False))

    def transposed(self, transpose: tuple[int, int, int]) -> AxisOrder:
        """Axis n is axis `transpose[n]` of this order."""
        r, a, s = transpose
        axes, flipped = self.axes, self.flipped
        return AxisOrder((axes[r], axes[a], axes[s]), (flipped[r], flipped[a], flipped[s]))


def to_canonical(array: np.ndarray, order: AxisOrder) -> np.ndarray:
    """(I, J, K) as stored → the prepared axes, (R, A, S) growing to their names unless the order is another; a view."""
    array = array.transpose(order.axes)
    return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in order.flipped)]


def from_canonical(array: np.ndarray, order: AxisOrder) -> np.ndarray:
    """Inverse of `to_canonical`; a view."""
    array = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in order.flipped)]
    return array.transpose(np.argsort(order.axes))


def canonical_geometry(geometry: Geometry, order: AxisOrder) -> Geometry:
    """The grid of `to_canonical(array)`: other indices, the same points in the patient."""
    affine = geometry.affine.copy()
    affine[:, :3] = geometry.affine[:, list(order.axes)]
    shape = tuple(geometry.shape[axis] for axis in order.axes)
    for axis, flip in enumerate(order.flipped):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
            affine[:3, axis] *= -1
    return Geometry((shape[0], shape[1], shape[2]), affine)


def crop(array: np.ndarray, box: BoundingBox) -> np.ndarray:
    """The part of (I, J, K) inside the box; a view."""
    return array[box.slices]


def uncrop(
    array: np.ndarray, box: BoundingBox, shape: tuple[int, int, int], fill: float = 0
) -> np.ndarray:
    """Inverse of `crop`: (I, J, K) of `shape` with `array` at the box and `fill` elsewhere."""
    full = np.full(shape, fill, array.dtype)
    full[box.slices] = array
    return full


def body_threshold(stored: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> float:
    """A tenth of the 99th percentile of the intensities: MRI air is noise near 0, whatever the scanner's scale."""
    sample = stored[
        tuple(slice(None, None, min(BODY_SUBSAMPLING, max(1, n // 8))) for n in stored.shape)
    ]
    return (float(np.percentile(sample, 99)) * slope + intercept) / 10


def box_where(
    test: Callable[[tuple[slice, slice, slice]], np.ndarray], array: np.ndarray
) -> BoundingBox | None:
    """Smallest box of the voxels of (I, J, K) for which `test(part)` is true, looked at slab by slab; None where there is none.

    Args:
        test: a part of the array → bool of that part's shape.
    """
    filled = [np.zeros(n, bool) for n in array.shape]
    for part in slabs_of(array):
        inside = test(part)
        for axis, slab in enumerate(part):
            filled[axis][slab] |= inside.any(
                axis=tuple(other for other in range(3) if other != axis)
            )
    if not filled[0].any():
        return None
    (i, i_last), (j, j_last), (k, k_last) = (
        np.flatnonzero(each)[[0, -1]].tolist() for each in filled
    )
    return BoundingBox((i, j, k), (i_last + 1, j_last + 1, k_last + 1))


def scaled_box(
    box: BoundingBox,
    shape: Sequence[int],
    wanted: Sequence[int],
    margin_voxels: Sequence[float] = (0, 0, 0),
) -> BoundingBox:
    """A box of a grid of `shape` voxels on one of `wanted` voxels over the same field of view, with a margin round it.

    Both grids reach from edge to edge of the field of view. The box goes out to whole voxels and ends with the grid.

    Args:
        margin_voxels: of the wanted grid, along each axis.
    """
    ends = [
        (max(0, math.floor(start * m / n - margin)), min(m, math.ceil(stop * m / n + margin)))
        for start, stop, n, m, margin in zip(
            box.start, box.stop, shape, wanted, margin_voxels, strict=True
        )
    ]
    (r, r_stop), (a, a_stop), (s, s_stop) = ends
    return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))
