"""Shape of a lesion in its box, independent of its position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from volseg.measurement.recist import Diameters, diameters
from volseg.measurement.shape import (
    axes_mm,
    core,
    grown,
    mesh,
    outermost_points,
    sphericity,
    surface_points,
    widest_pair,
)

SMALL_VOXELS = 125  # of a box whose shape is cached
EXPECTED_REACH = 2  # voxels round a lesion that count for its expected volume


@dataclass(frozen=True, eq=False)
class Form:
    """Shape of a lesion: points are in mm from the centre of its box's first voxel.

    Args:
        inside: (R, A, S) bool of the box.
        matrix: (3, 3) voxel → mm.
        together: voxels processed at once; a larger box is processed in slabs.
    """

    inside: np.ndarray
    matrix: np.ndarray
    together: int

    @property
    def is_large(self) -> bool:
        """True if arrays of the size of the box must be processed in slabs."""
        return self.inside.size > self.together

    def slabs(self, array: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield start and stop of slabs of an array along its first axis."""
        step = max(1, self.together // array[0].size)
        return ((start, min(start + step, len(array))) for start in range(0, len(array), step))

    @cached_property
    def columns(self) -> Mapping[str, float]:
        """Columns of lesions.csv that depend on the shape alone."""
        volume_mm3, area_mm2 = mesh(self.inside, self.matrix)
        major, minor, least = axes_mm(self.inside, self.matrix)
        roundness = sphericity(volume_mm3, area_mm2)
        return {
            "volume_mesh_mm3": volume_mm3,
            "surface_area_mm2": area_mm2,
            "sphericity": roundness,
            "compactness": roundness**3,
            "major_axis_mm": major,
            "minor_axis_mm": minor,
            "least_axis_mm": least,
            "elongation": minor / major,
            "flatness": least / major,
            "max3d_diameter_mm": widest_pair(outermost_points(self.inside), self.matrix)[0],
        }

    @cached_property
    def diameters(self) -> Diameters:
        """Long and short axis."""
        return diameters(self.inside, self.matrix)

    @cached_property
    def axes_mm(self) -> np.ndarray:
        """Ends (4, 3) of the long axis, then of the short axis."""
        axes = self.diameters
        return np.concatenate([axes.long_ends, axes.short_ends]) @ self.matrix.T

    @cached_property
    def extent_mm(self) -> np.ndarray:
        """Lowest and highest R, A, S (2, 3), edges of voxels included."""
        centres = outermost_points(self.inside, axes=(0,)) @ self.matrix.T
        # Along the first axis, the points already lie half a voxel beyond the centres.
        reach = np.abs(self.matrix[:, 1:]).sum(axis=1) / 2
        return np.stack([centres.min(axis=0) - reach, centres.max(axis=0) + reach])

    @cached_property
    def n_surface(self) -> int:
        """Number of surface points."""
        if not self.is_large:
            return len(self.surface_mm)
        n = 0
        for axis in range(3):
            planes = np.moveaxis(self.inside, axis, 0)
            n += int(np.count_nonzero(planes[0])) + int(np.count_nonzero(planes[-1]))
            for start, stop in self.slabs(planes):
                part = planes[start : stop + 1]
                n += int(np.count_nonzero(part[1:] != part[:-1]))
        return n

    @cached_property
    def surface_mm(self) -> np.ndarray:
        """All surface points (N, 3)."""
        return surface_points(self.inside) @ self.matrix.T

    @cached_property
    def core(self) -> np.ndarray:
        """(R, A, S) bool, true where a voxel and its six neighbours lie in the lesion."""
        return core(self.inside)

    @cached_property
    def has_core(self) -> bool:
        return bool(self.core.any())

    @cached_property
    def halo(self) -> np.ndarray:
        """(R, A, S) bool of the lesion grown by `EXPECTED_REACH` voxels.

        It covers the box and `EXPECTED_REACH` voxels on every side.
        """
        return grown(np.pad(self.inside, EXPECTED_REACH), EXPECTED_REACH)


class Forms:
    """Shapes of the lesions of a scan; small ones, often equal in a noisy mask, are cached."""

    def __init__(self, matrix: np.ndarray, together: int) -> None:
        self._matrix, self._together = matrix, together
        self._cache: dict[tuple[tuple[int, ...], bytes], Form] = {}

    def of(self, inside: np.ndarray) -> Form:
        if inside.size > SMALL_VOXELS:
            return Form(inside, self._matrix, self._together)
        key = (inside.shape, inside.tobytes())
        if key not in self._cache:
            self._cache[key] = Form(inside, self._matrix, self._together)
        return self._cache[key]
