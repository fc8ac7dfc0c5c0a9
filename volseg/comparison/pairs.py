"""Measured lesions of two scans → a pair of scans whose lesions can be compared.

Crumbs are joined with their lesions, lesions are matched, and diameters are measured in the same
orientation: the axial planes of the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from volseg.comparison.changes import ScanPair
from volseg.comparison.crumbs import find_crumbs
from volseg.comparison.matching import MAX_DISTANCE_MM, MIN_FRACTION, Match, match_lesions
from volseg.comparison.targets import label_of, none_if_nan
from volseg.measurement.recist import diameters
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.sections import axial_normal, section_bytes, section_diameters, tilt_deg
from volseg.postprocessing.pairing import MAX_PAIRS, PAIR_BYTES
from volseg.volume import Rigid, Volume, slabs_of

SLAB_VOXELS = 2**20
# Measured: bytes for looking up neighbours and overlaps, per voxel of a lesion whose diameters are
# measured, and per lesion.
MATCHING, DIAMETER_BYTES, LESION_BYTES = 110 << 20, 6, 5000
SAME_PLANE_DEG = 2.0  # below it, measuring diameters again gains nothing (benchmarks.md)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredScan:
    """A scan of one time point: `ids` (I, J, K), n in the voxels of lesion n, lesions 1 to N."""

    case: str
    ids: Volume
    lesions: Sequence[LesionMeasurement]

    @property
    def labels(self) -> list[str]:
        return [label_of(lesion) for lesion in self.lesions]

    def crumbs(self) -> dict[int, int]:
        return find_crumbs(self.ids.array, self.lesions, self.ids.geometry.spacing_mm)


def pair_scans(
    baseline: MeasuredScan,
    followup: MeasuredScan,
    *,
    moved: Rigid,
    doubt: str = "",
    max_distance_mm: float = MAX_DISTANCE_MM,
) -> ScanPair:
    """Match the lesions of two scans of a patient, and make their sizes comparable.

    Args:
        moved: from points of the baseline to points of the follow-up.
        doubt: why `moved` cannot be trusted; diameters are then those of each scan's own slices.
    """
    matches = match_lesions(
        baseline.ids,
        followup.ids,
        baseline_labels=baseline.labels,
        followup_labels=followup.labels,
        baseline_crumbs=baseline.crumbs(),
        followup_crumbs=followup.crumbs(),
        transform=moved,
        max_distance_mm=max_distance_mm,
    )
    angle = None if doubt else tilt_deg(baseline.ids.geometry, followup.ids.geometry, moved)
    is_tilted = angle is not None and angle >= SAME_PLANE_DEG
    normal = moved.rotation @ axial_normal(baseline.ids.geometry) if is_tilted else None
    crumbs = _crumbs_of(matches)
    spanned = _spanned(matches, (baseline, followup))
    before, crumbs_before = wholes_of(baseline, crumbs[0], spanned=spanned[0])
    after, crumbs_after = wholes_of(followup, crumbs[1], spanned=spanned[1], normal=normal)
    return ScanPair(
        baseline_case=baseline.case,
        followup_case=followup.case,
        baseline=before,
        followup=after,
        matches=matches,
        doubt=doubt,
        baseline_crumbs=crumbs_before,
        followup_crumbs=crumbs_after,
        tilt_deg=angle,
        is_remeasured=is_tilted,
    )


def unpaired_scan(baseline: MeasuredScan | None, followup: MeasuredScan | None) -> ScanPair:
    """Return the pair of a scan without one at the other time: all its lesions are `outside`."""
    matches: list[Match] = []
    wholes: list[tuple[list[LesionMeasurement], list[LesionMeasurement]]] = []
    for side, scan in enumerate((baseline, followup)):
        crumbs = {} if scan is None else scan.crumbs()
        wholes.append(([], []) if scan is None else wholes_of(scan, crumbs))
        for lesion in () if scan is None else scan.lesions:
            number = lesion.lesion_id
            whole = crumbs.get(number)
            matches.append(
                Match(
                    status="outside" if whole is None else "crumb",
                    baseline=None if side else number,
                    followup=number if side else None,
                    group=whole or number,
                    is_first=whole is None,
                    whole=whole,
                )
            )
    (before, crumbs_before), (after, crumbs_after) = wholes
    return ScanPair(
        baseline_case=baseline and baseline.case,
        followup_case=followup and followup.case,
        baseline=before,
        followup=after,
        matches=matches,
        baseline_crumbs=crumbs_before,
        followup_crumbs=crumbs_after,
    )


def wholes_of(
    scan: MeasuredScan,
    crumbs: Mapping[int, int],
    *,
    spanned: Collection[int] = (),
    normal: np.ndarray | None = None,
) -> tuple[list[LesionMeasurement], list[LesionMeasurement]]:
    """Return the lesions of a scan, with their crumbs included, and the crumbs.

    Args:
        crumbs: number of a crumb → number of its lesion, to which its volume is added.
        spanned: crumbs that are also included in the diameters of their lesions.
        normal: (3,) normal of the planes in which all diameters are measured again; None: only
            lesions with spanned crumbs, in the axial slices. Unknown diameters stay unknown.
    """
    members = {
        lesion.lesion_id: [lesion] for lesion in scan.lesions if lesion.lesion_id not in crumbs
    }
    for crumb, whole in sorted(crumbs.items()):
        members[whole].append(scan.lesions[crumb - 1])
    remeasured = {}
    for number, (lesion, *pieces) in members.items():
        numbers = [number, *(piece.lesion_id for piece in pieces if piece.lesion_id in spanned)]
        if none_if_nan(lesion.long_axis_mm) is not None and (
            normal is not None or len(numbers) > 1
        ):
            remeasured[number] = numbers
    axes = dict(zip(remeasured, _axes(scan.ids, list(remeasured.values()), normal), strict=True))
    wholes = [
        replace(pieces[0], **_joined(pieces), **axes.get(number, {}))
        for number, pieces in members.items()
    ]
    return wholes, [scan.lesions[crumb - 1] for crumb in sorted(crumbs)]


def _crumbs_of(matches: Iterable[Match]) -> tuple[dict[int, int], dict[int, int]]:
    """Return number of a crumb → number of its lesion, for the baseline and for the follow-up."""
    crumbs: tuple[dict[int, int], dict[int, int]] = {}, {}
    for match in matches:
        for numbers, number in zip(crumbs, (match.baseline, match.followup), strict=True):
            if match.whole is not None and number is not None:
                numbers[number] = match.whole
    return crumbs


def _spanned(
    matches: Iterable[Match], scans: tuple[MeasuredScan, MeasuredScan]
) -> tuple[set[int], set[int]]:
    """Return the crumbs of each scan that lie where the other scan shows the lesion.

    These are certainly parts of the lesion. Other crumbs may be new, so only their volume counts.
    """
    spanned: tuple[set[int], set[int]] = set(), set()
    for match in matches:
        for side, number in enumerate((match.baseline, match.followup)):
            if match.status == "crumb" and number is not None:
                volume_mm3 = scans[side].lesions[number - 1].volume_mm3
                if (match.overlap_mm3 or 0.0) >= MIN_FRACTION * volume_mm3:
                    spanned[side].add(number)
    return spanned


def _joined(pieces: Sequence[LesionMeasurement]) -> dict[str, Any]:
    """Return the columns used in a comparison, for a lesion together with its crumbs."""
    if len(pieces) == 1:
        return {}
    n_voxels = np.array([piece.n_voxels for piece in pieces])

    def mean(name: str) -> float:
        values = [none_if_nan(getattr(piece, name)) for piece in pieces]
        return float(np.average([np.nan if x is None else x for x in values], weights=n_voxels))

    return {
        "n_voxels": int(n_voxels.sum()),
        "volume_mm3": sum(piece.volume_mm3 for piece in pieces),
        "volume_ml": sum(piece.volume_ml for piece in pieces),
        "touches_border": any(piece.touches_border for piece in pieces),
        **{f"centroid_{axis}_mm": mean(f"centroid_{axis}_mm") for axis in "ras"},
        "intensity_mean": mean("intensity_mean"),
    }


def _axes(
    ids: Volume, groups: Sequence[Sequence[int]], normal: np.ndarray | None
) -> list[dict[str, Any]]:
    """Measure long and short axis of groups of numbers; the ends of the axes become unknown."""
    if not groups:
        return []
    ids = ids.canonical()
    numbers, matrix = ids.array, ids.geometry.affine[:3, :3]
    boxes = ndimage.find_objects(numbers)
    measured = []
    for members in groups:
        sides = zip(*(boxes[number - 1] for number in members), strict=True)
        box = tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides)
        inside = _inside(numbers[box], members)
        if normal is None:
            sizes = diameters(inside, matrix)
            long_mm, short_mm = sizes.long_mm, sizes.short_mm
        else:
            long_mm, short_mm = section_diameters(inside, matrix, normal)
        ends = (f"{axis}_axis_p{n}_ras" for axis in ("long", "short") for n in (0, 1))
        sizes_mm = {"long_axis_mm": long_mm, "short_axis_mm": short_mm}
        measured.append(dict.fromkeys(("axis_slice", *ends)) | sizes_mm)
    return measured


def _inside(numbers: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Return (I, J, K) bool, true for `members`; `np.isin` would take ten bytes per voxel."""
    is_member = np.zeros(max(int(numbers.max()), *members) + 1, bool)
    is_member[list(members)] = True
    inside = np.empty(numbers.shape, bool)
    for slab in slabs_of(numbers, SLAB_VOXELS):
        inside[slab] = is_member[numbers[slab]]
    return inside


def pairing_bytes(shapes: Sequence[tuple[int, int, int]], n_lesions: Sequence[int]) -> int:
    """Return the most bytes that `pair_scans` needs for two scans, beside their lesion ids."""
    largest = max(map(math.prod, shapes))
    matching = MATCHING + PAIR_BYTES * min(math.prod(n_lesions), MAX_PAIRS)
    remeasuring = largest + max(DIAMETER_BYTES * largest, *map(section_bytes, shapes))
    return max(matching, remeasuring) + LESION_BYTES * sum(n_lesions)
