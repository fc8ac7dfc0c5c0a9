"""Canonical axes and boxes: views of the scan, with their way back beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volseg.volume import BoundingBox, Geometry

BODY_SUBSAMPLING = 4  # the automatic threshold is a percentile: every fourth voxel of each axis gives the same


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """How stored axes become canonical ones: `axes[n]` is the stored axis that grows most along world axis n (R, A, S)."""

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry) -> AxisOrder:
        codes = geometry.axis_codes
        axes = [next(n for n, code in enumerate(codes) if code in pair) for pair in ("RL", "AP", "SI")]
        flipped = [codes[axis] in "LPI" for axis in axes]
        return cls((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))


def to_canonical(array: np.ndarray, order: AxisOrder) -> np.ndarray:
    """(I, J, K) as stored → (R, A, S), each axis growing to its name; a view."""
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


def uncrop(array: np.ndarray, box: BoundingBox, shape: tuple[int, int, int], fill: float = 0) -> np.ndarray:
    """Inverse of `crop`: (I, J, K) of `shape` with `array` at the box and `fill` elsewhere."""
    full = np.full(shape, fill, array.dtype)
    full[box.slices] = array
    return full


def body_threshold(intensities: np.ndarray) -> float:
    """A tenth of the 99th percentile: MRI air is noise near 0, whatever the scanner's scale."""
    sample = intensities[tuple(slice(None, None, min(BODY_SUBSAMPLING, max(1, n // 8))) for n in intensities.shape)]
    return float(np.percentile(sample, 99)) / 10


def body_box(stored: np.ndarray, above: float) -> BoundingBox | None:
    """Smallest box of the voxels over `above`, in stored units; None where there is no body."""
    return BoundingBox.around(stored > above)
