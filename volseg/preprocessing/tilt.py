"""Stacks of slices that are not at right angles to them, as with a tilted gantry, for networks.

Each slice is moved within its plane by whole voxels, so that the stack becomes right-angled. No
intensity is interpolated, and the way back is exact. A slice lies up to half a voxel beside its
place; that is all the network sees of it, as measurements are made on the slices of the scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volseg.errors import ScanError
from volseg.volume import MAX_COSINE, Geometry, Volume


@dataclass(frozen=True, slots=True, eq=False)
class Straight:
    """How a tilted stack becomes right-angled.

    Args:
        tilted, geometry: the grid of the scan, and the right-angled one that contains it.
        axis: along which the slices are stacked.
        starts: (K, 2) first voxel of each slice on the right-angled grid, along its two axes.
    """

    tilted: Geometry
    geometry: Geometry
    axis: int
    starts: np.ndarray

    @classmethod
    def of(cls, tilted: Geometry) -> Straight:
        """Find the right-angled grid round a tilted one.

        Raises:
            ScanError: it is sheared within its slices too (`E_SHEAR`).
        """
        axis = _stack_axis(tilted)
        first, second = (other for other in range(3) if other != axis)
        steps = tilted.voxel_steps_mm
        normal = np.cross(steps[:, first], steps[:, second])
        normal /= np.linalg.norm(normal)
        upright = normal * (normal @ steps[:, axis])
        # Move of a slice against the one before, in voxels of its plane.
        plane = steps[:, [first, second]]
        move = np.linalg.lstsq(plane, steps[:, axis] - upright, rcond=None)[0]
        places = np.rint(np.arange(tilted.shape[axis])[:, None] * move).astype(int)
        lowest = places.min(axis=0)
        affine = tilted.affine.copy()
        affine[:3, axis] = upright
        affine[:3, 3] += plane @ lowest
        shape = list(tilted.shape)
        for side, more in zip((first, second), np.ptp(places, axis=0).tolist(), strict=True):
            shape[side] += more
        geometry = Geometry((shape[0], shape[1], shape[2]), affine)
        return cls(tilted, geometry, axis, places - lowest)

    def stack(self, array: np.ndarray, fill: float) -> np.ndarray:
        """Return an array of the tilted grid on the right-angled one, with `fill` beside it."""
        straight = np.full(self.geometry.shape, fill, array.dtype, order="F")
        for number, part in enumerate(self._parts()):
            np.moveaxis(straight, self.axis, 0)[number][part] = np.moveaxis(array, self.axis, 0)[
                number
            ]
        return straight

    def unstack(self, array: np.ndarray) -> np.ndarray:
        """Return an array of the right-angled grid on the tilted one: the inverse of `stack`."""
        tilted = np.empty(self.tilted.shape, array.dtype, order="F")
        for number, part in enumerate(self._parts()):
            np.moveaxis(tilted, self.axis, 0)[number] = np.moveaxis(array, self.axis, 0)[number][
                part
            ]
        return tilted

    def scan(self, volume: Volume) -> Volume:
        """Return a scan on the right-angled grid; beside its slices it has its lowest intensity."""
        stored = volume.array
        finite = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored
        darkest = finite.max() if volume.slope < 0 else finite.min()
        array = self.stack(stored, darkest)
        scale = {"slope": volume.slope, "intercept": volume.intercept}
        return Volume(array, self.geometry, **scale, sha256=volume.sha256, unit=volume.unit)

    def mask(self, volume: Volume) -> Volume:
        """Return a mask on the right-angled grid, with background beside its slices."""
        return Volume(self.stack(volume.array, 0), self.geometry, sha256=volume.sha256)

    def _parts(self) -> list[tuple[slice, slice]]:
        """Return the part of each right-angled slice that the slice of the scan fills."""
        rows, columns = (n for axis, n in enumerate(self.tilted.shape) if axis != self.axis)
        return [
            (slice(row, row + rows), slice(column, column + columns))
            for row, column in self.starts.tolist()
        ]


def _stack_axis(geometry: Geometry) -> int:
    """Return the axis whose slices are right-angled; of two, that of the most distant slices."""
    cosines = np.abs(geometry.directions.T @ geometry.directions)
    usable = [axis for axis in range(3) if cosines[(axis + 1) % 3, (axis + 2) % 3] <= MAX_COSINE]
    if not usable:
        raise ScanError(
            "its slices are sheared too, not only tilted against their stack",
            fix="resample it to a right-angled grid",
            code="E_SHEAR",
        )
    return max(usable, key=lambda axis: (round(geometry.spacing_mm[axis], 6), axis))
