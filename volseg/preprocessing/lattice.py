"""Grids of the same voxels in another axis order or extent: a volume is moved, not interpolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from volseg.volume import (
    LPS_TO_RAS,
    SAME_GRID_TOLERANCE_VOXELS,
    AxisOrder,
    BoundingBox,
    Geometry,
    Volume,
    slabs_of,
)
from volseg.words import format_sizes

SPACING_TOLERANCE = 0.005  # relative difference of two spacings that a reader would call equal
TILT_DEG = 0.05  # angle between two axes that a reader would call parallel
IN_ORDER = AxisOrder((0, 1, 2), (False, False, False))
AXES, EXTENT = "W_AXES", "W_EXTENT"  # codes of the notes


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the voxels of one grid lie on another that has the same voxels.

    Args:
        source, target: the two grids.
        order: the axes of the source, in the order of the target.
        start: index on the target of the first voxel of the reordered source.
    """

    source: Geometry
    target: Geometry
    order: AxisOrder
    start: tuple[int, int, int]

    @classmethod
    def of(cls, source: Geometry, target: Geometry) -> Placement | None:
        """Return the placement; None unless each voxel of the source is one of the target's.

        Along each axis one grid must hold the other: a grid that is shifted reaches beyond the
        other on one side and falls short of it on the opposite one.
        """
        order = order_towards(source, target)
        reordered = source.reordered(order)
        corners = reordered.corners()
        mapped = target.to_index(reordered.to_world_mm(corners))
        start = np.rint(mapped[0])
        if np.abs(mapped - corners - start).max() >= SAME_GRID_TOLERANCE_VOXELS:
            return None
        for first, n, n_target in zip(start, reordered.shape, target.shape, strict=True):
            is_within = first >= 0 and first + n <= n_target
            if not is_within and not (first <= 0 and first + n >= n_target):
                return None
        i, j, k = (int(index) for index in start)
        return cls(source, target, order, (i, j, k))

    @property
    def is_reordered(self) -> bool:
        """True if the axes of the source are stored in another order or direction."""
        return self.order != IN_ORDER

    @property
    def is_whole(self) -> bool:
        """True if both grids hold the same voxels."""
        return self.start == (0, 0, 0) and self._shape == self.target.shape

    @property
    def _shape(self) -> tuple[int, int, int]:
        i, j, k = (self.source.shape[axis] for axis in self.order.axes)
        return i, j, k

    @property
    def _boxes(self) -> tuple[BoundingBox, BoundingBox]:
        """The voxels in both grids: their box on the target and on the reordered source."""
        first = np.maximum(self.start, 0)
        last = np.minimum(np.add(self.start, self._shape), self.target.shape)
        on_target = BoundingBox.of([slice(a, b) for a, b in zip(first, last, strict=True)])
        return on_target, on_target.shifted([-index for index in self.start])

    def view(self, volume: Volume) -> Volume:
        """Return a volume that covers all voxels of the target, as a view on its grid."""
        assert self.is_whole
        return replace(volume, array=self.order.apply(volume.array), geometry=self.target)

    def place(self, volume: Volume) -> Volume:
        """Return a mask on the target, 0 outside the source: a copy only if it must be moved."""
        if self.is_whole and not self.is_reordered:
            return volume
        array = np.zeros(self.target.shape, volume.array.dtype, order="F")
        on_target, on_source = self._boxes
        array[on_target.slices] = self.order.apply(volume.array)[on_source.slices]
        return replace(volume, array=array, geometry=self.target)

    def n_outside(self, mask: Volume) -> int:
        """Count the labelled voxels of a mask that lie outside the target."""
        _, on_source = self._boxes
        if on_source.shape == self._shape:
            return 0
        inside = self.order.apply(mask.array)[on_source.slices]
        return _count(mask.array) - _count(inside)

    def notes(self, other: str = "scan") -> list[str]:
        """Describe what was done to a mask, each as `W_CODE: sentence`.

        Args:
            other: what the target is the grid of.
        """
        notes = []
        if self.is_reordered:
            notes.append(
                f"{AXES}: the mask is stored as {self.source.axis_codes}, the {other} as "
                f"{self.target.axis_codes}: its axes were reordered, without interpolation"
            )
        if not self.is_whole:
            mask, grid = format_sizes(self._shape), format_sizes(self.target.shape)
            notes.append(
                f"{EXTENT}: the mask has {mask} voxels, the {other} {grid}: it was placed by its "
                "affine, with background around it"
            )
        return notes


def same_voxels(source: Geometry, target: Geometry) -> Placement | None:
    """Return the placement of a grid with the same voxels as another; None if it has others."""
    placement = Placement.of(source, target)
    return placement if placement is not None and placement.is_whole else None


def order_towards(source: Geometry, target: Geometry) -> AxisOrder:
    """Return the order of the axes of the source that is nearest to that of the target."""
    cosines = target.directions.T @ source.directions
    i, j, k = max(
        permutations(range(3)),
        key=lambda axes: sum(abs(cosines[n, axis]) for n, axis in enumerate(axes)),
    )
    flipped = tuple(bool(cosines[n, axis] < 0) for n, axis in enumerate((i, j, k)))
    return AxisOrder((i, j, k), (flipped[0], flipped[1], flipped[2]))


def difference(mask: Geometry, scan: Geometry, other: str = "scan") -> tuple[str, str]:
    """Return how the grid of a mask differs from that of its scan, and what to do about it.

    Axis orders are compared first, so that the displacement is that of the same corner.

    Args:
        other: what `scan` is the grid of, for messages.
    """
    order = order_towards(mask, scan)
    reordered = mask.reordered(order)
    problem, give = _off(reordered, scan), f"give the mask that belongs to this {other}"
    copy = f"copy the {other}'s affine"
    if lost := _lost_position(mask, scan, other):
        check = f"if its voxels are in the order of the {other}, {copy}; else that mirrors it"
        return f"{lost}; {problem}", f"{give}; {check}"
    lengths = reordered.spacing_mm, scan.spacing_mm
    if np.abs(np.divide(*lengths) - 1).max() > SPACING_TOLERANCE:
        of_mask, of_scan = map(_lengths, lengths)
        problem = f"its voxels measure {of_mask} mm, those of the {other} {of_scan} mm; {problem}"
        resample = f", or resample it to the grid of the {other} with nearest neighbour"
        return problem, give + (resample if mask.fraction_inside(scan) else "")
    cosines = np.clip((reordered.directions * scan.directions).sum(axis=0), -1, 1)
    tilt = float(np.degrees(np.arccos(cosines)).max())
    if tilt > TILT_DEG:
        fix = f"{give}; a mask of another {other} must be registered and resampled to this one"
        return f"its axes are rotated by {tilt:.3g}°; {problem}", fix
    save_again = f"{give}, or save it again with this {other} as the reference volume"
    if reordered.shape != scan.shape:
        of_mask, of_scan = format_sizes(reordered.shape), format_sizes(scan.shape)
        where = _off_lattice(reordered, scan, other)
        return f"it has {of_mask} voxels, the {other} {of_scan}; {where}", save_again
    if order != IN_ORDER:
        stored = f"it is stored as {mask.axis_codes}, the {other} as {scan.axis_codes}"
        fix = f"{save_again}; do not {copy}, which would mirror it"
        return f"{problem}; {stored}", f"{fix} unless its voxels are in the order of the {other}"
    return problem, f"{give}; if it was drawn on this one and lost its position, {copy}"


def _lost_position(mask: Geometry, scan: Geometry, other: str) -> str:
    """Describe an affine that a tool made up for the voxels of the scan; empty if it is none."""
    if mask.shape != scan.shape:
        return ""
    if Geometry(scan.shape, LPS_TO_RAS @ scan.affine).matches(mask):
        return f"its affine is that of the {other} in LPS, but NIfTI means RAS"
    lengths = np.abs(np.diag(mask.voxel_steps_mm))
    is_diagonal = np.array_equal(np.diag(lengths), np.abs(mask.voxel_steps_mm))
    is_at_origin = not mask.affine[:3, 3].any()
    is_usual = any(np.allclose(lengths, usual, rtol=1e-4) for usual in (1, scan.spacing_mm))
    if is_diagonal and is_at_origin and is_usual:
        return f"its affine holds only the spacing {_lengths(mask.spacing_mm)} mm, no position"
    return ""


def _off_lattice(reordered: Geometry, scan: Geometry, other: str) -> str:
    """Describe how a part of a scan, or more than it, does not lie on the scan's voxels."""
    mapped = scan.to_index(reordered.to_world_mm(reordered.corners()))
    offsets = mapped - np.rint(mapped)
    furthest = offsets[np.abs(offsets).max(axis=1).argmax()]
    voxels = np.abs(furthest).max()
    if voxels < SAME_GRID_TOLERANCE_VOXELS:
        return f"it reaches beyond the {other} on one side and ends short of it on the other"
    mm = np.linalg.norm(scan.voxel_steps_mm @ furthest)
    return f"its voxels lie {voxels:.2g} voxels ({mm:.3g} mm) off those of the {other}"


def _off(reordered: Geometry, scan: Geometry) -> str:
    """Describe the displacement of the corner that is furthest off, in mm along R, A and S."""
    offsets = reordered.to_world_mm(reordered.corners()) - scan.to_world_mm(scan.corners())
    furthest = offsets[np.linalg.norm(offsets, axis=1).argmax()]
    parts = [
        (f"{abs(mm):.3g} mm", "RAS"[axis] if mm > 0 else "LPI"[axis])
        for axis, mm in enumerate(furthest)
        if abs(mm) >= 0.005
    ]
    steps = np.abs(scan.to_index(scan.affine[:3, 3] + furthest[None]))[0]
    text = f"a corner is off by {steps.max():.3g} voxels ({np.linalg.norm(furthest):.3g} mm)"
    if len(parts) < 2:
        return f"{text} to {parts[0][1]}" if parts else text
    *others, last = (f"{length} to {side}" for length, side in parts)
    return f"{text}, {', '.join(others)} and {last}"


def _lengths(values: Sequence[float]) -> str:
    """Return lengths such as `0.5 × 0.5 × 1`."""
    return " × ".join(f"{value:.3g}" for value in values)


def _count(array: np.ndarray) -> int:
    return sum(int(np.count_nonzero(array[part])) for part in slabs_of(array))
