"""Masks and channels of one place: moved onto the grid of the scan, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from volseg.errors import ScanError
from volseg.preprocessing.lattice import AXES, Placement, difference, same_voxels
from volseg.volume import Geometry, Volume
from volseg.words import format_count


@dataclass(frozen=True, slots=True, eq=False)
class PlacedMask:
    """A mask on the grid of its scan, and notes `W_CODE: sentence` on what was done to it."""

    mask: Volume
    notes: tuple[str, ...] = ()


def place_mask(
    mask: Volume, grid: Geometry, *, mask_name: str, grid_name: str, other: str = "scan"
) -> PlacedMask:
    """Return a mask on the grid of its scan.

    A mask of the same voxels in another axis order is reordered; one of fewer or more voxels is
    placed by its affine. Nothing is interpolated, and no labelled voxel is lost.

    Args:
        mask_name, grid_name: the two files, for messages.
        other: what the grid belongs to: `scan` or `reference`.

    Raises:
        ScanError: the mask has other voxels, or labelled ones outside the grid (`E_PAIR`).
    """
    placement = Placement.of(mask.geometry, grid)
    outside = 0 if placement is None else placement.n_outside(mask)
    if placement is not None and not outside:
        return PlacedMask(placement.place(mask), tuple(placement.notes(other)))
    if placement is None:
        problem, fix = difference(mask.geometry, grid, other)
    else:
        problem = f"{format_count(outside, 'labelled voxel')} of it would be lost"
        fix = f"give the mask that belongs to this {other}; if this does, crop it to the {other}"
    overlap = mask.geometry.fraction_inside(grid)
    raise ScanError(
        f"{mask_name}: is not on the grid of its {other} {grid_name}: {problem}; "
        f"{overlap:.0%} of it lies within the {other}",
        fix=fix,
        code="E_PAIR",
    )


def scan_in_order(scan: Volume, grid: Geometry, *, scan_name: str, grid_name: str) -> Volume:
    """Return a view of a scan in the axis order of a grid of the same voxels.

    Raises:
        ScanError: the scan has other voxels (`E_PAIR`).
    """
    placement = same_voxels(scan.geometry, grid)
    if placement is None:
        problem, _ = difference(grid, scan.geometry)
        raise ScanError(
            f"{grid_name}: not on the grid of the scan {scan_name}: {problem}",
            fix="give the scan that was measured",
            code="E_PAIR",
        )
    return placement.view(scan) if placement.is_reordered else scan


def channel_notes(images: Mapping[str, Volume]) -> list[str]:
    """Describe channels that are stored in another axis order than the first."""
    (_, first), *others = images.items()
    return [
        f"{AXES}: channel {name!r} is stored as {volume.geometry.axis_codes}, the first as "
        f"{first.geometry.axis_codes}: its axes were reordered, without interpolation"
        for name, volume in others
        if (placement := same_voxels(volume.geometry, first.geometry)) is not None
        and placement.is_reordered
    ]
