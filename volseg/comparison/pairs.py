"""Measured lesions of two scans → a pair of scans whose lesions can be compared.

Crumbs are joined with their lesions, lesions are matched, and diameters are measured in the same
orientation: the axial planes of the baseline.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from volseg.comparison.crumbs import find_crumbs
from volseg.comparison.groups import ScanLesions, ScanPair
from volseg.comparison.label_names import label_of
from volseg.comparison.matching import MAX_DISTANCE_MM, Match, match_lesions
from volseg.comparison.overlap import MIN_FRACTION, NumberedLesions
from volseg.comparison.targets import none_if_nan
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
    """A scan of one time point.

    Args:
        ids: (I, J, K), n in the voxels of lesion n.
        lesions: by ascending number; numbers may be missing, of lesions that were left out.
        unit_doubt: why the unit of its intensities is in doubt; empty if it is not.
    """

    case: str
    ids: Volume
    lesions: Sequence[LesionMeasurement]
    unit_doubt: str = ""

    @property
    def numbers(self) -> list[int]:
        return [lesion.lesion_id for lesion in self.lesions]

    def crumbs(self) -> dict[int, int]:
        """Return number of a crumb → number of the lesion that it may belong to."""
        numbers = self.numbers
        return {
            numbers[crumb - 1]: numbers[whole - 1]
            for crumb, whole in self._crumbs(self._counted()).items()
        }

    def numbered(self) -> NumberedLesions:
        """Return the lesions numbered 1, 2, …, N, without gaps."""
        ids = self._counted()
        return NumberedLesions(ids, [label_of(x) for x in self.lesions], self._crumbs(ids))

    def _crumbs(self, ids: Volume) -> dict[int, int]:
        return find_crumbs(ids.array, self.lesions, ids.geometry.spacing_mm)

    def _counted(self) -> Volume:
        """Return lesion ids without gaps: n in the voxels of the n-th lesion."""
        numbers = self.numbers
        if numbers == list(range(1, len(numbers) + 1)):
            return self.ids
        ids = self.ids.array
        table = np.zeros(int(ids.max(initial=0)) + 1, ids.dtype)
        table[numbers] = np.arange(1, len(numbers) + 1)
        counted = np.empty_like(ids)
        for slab in slabs_of(ids, SLAB_VOXELS):
            counted[slab] = table[ids[slab]]
        return self.ids.with_array(counted)


def pair_scans(
    baseline: MeasuredScan,
    followup: MeasuredScan,
    *,
    transform: Rigid,
    doubt: str = "",
    max_distance_mm: float = MAX_DISTANCE_MM,
) -> ScanPair:
    """Match the lesions of two scans of a patient, and make their sizes comparable.

    Args:
        transform: from points of the baseline to points of the follow-up.
        doubt: why it cannot be trusted; diameters are then those of each scan's own slices.
    """
    matches = match_lesions(
        baseline.numbered(),
        followup.numbered(),
        transform=transform,
        max_distance_mm=max_distance_mm,
    )
    matches = [_with_numbers(match, baseline.numbers, followup.numbers) for match in matches]
    angle = None if doubt else tilt_deg(baseline.ids.geometry, followup.ids.geometry, transform)
    is_tilted = angle is not None and angle >= SAME_PLANE_DEG
    normal = transform.rotation @ axial_normal(baseline.ids.geometry) if is_tilted else None
    return ScanPair(
        baseline=_with_crumbs(baseline, 0, matches),
        followup=_with_crumbs(followup, 1, matches, normal=normal),
        matches=matches,
        doubt=doubt,
        tilt_deg=angle,
        is_remeasured=is_tilted,
    )


def _with_numbers(match: Match, baseline: Sequence[int], followup: Sequence[int]) -> Match:
    """Return a match of the n-th lesions with the numbers of these lesions."""
    ids, other_ids = (followup, baseline) if match.baseline is None else (baseline, followup)
    return replace(
        match,
        baseline=None if match.baseline is None else baseline[match.baseline - 1],
        followup=None if match.followup is None else followup[match.followup - 1],
        relabelled=tuple(other_ids[n - 1] for n in match.relabelled),
        whole=None if match.whole is None else ids[match.whole - 1],
    )


def unpaired_scan(baseline: MeasuredScan | None, followup: MeasuredScan | None) -> ScanPair:
    """Return the pair of the one scan that there is: all its lesions are `outside`."""
    side, scan = (1, followup) if baseline is None else (0, baseline)
    assert scan is not None
    crumbs = scan.crumbs()
    matches = [
        Match(
            status="crumb" if number in crumbs else "outside",
            baseline=None if side else number,
            followup=number if side else None,
            group=crumbs.get(number, number),
            is_first=number not in crumbs,
            whole=crumbs.get(number),
        )
        for number in (lesion.lesion_id for lesion in scan.lesions)
    ]
    lesions, nothing = _with_crumbs(scan, side, matches), ScanLesions()
    before, after = (nothing, lesions) if side else (lesions, nothing)
    return ScanPair(baseline=before, followup=after, matches=matches)


def _with_crumbs(
    scan: MeasuredScan, side: int, matches: Sequence[Match], *, normal: np.ndarray | None = None
) -> ScanLesions:
    """Return the lesions of a scan, with their crumbs included, and the crumbs.

    Crumbs that lie where the other scan shows the lesion are certainly parts of it, and included in
    its diameters. Others may be new, so only their volume is added.

    Args:
        side: 0 for baseline, 1 for follow-up.
        normal: (3,) normal of the planes in which all diameters are measured again; None: only
            those of lesions with more parts, in the axial slices. Unknown diameters stay unknown.
    """
    crumbs = {match.numbers[side]: match for match in matches if match.status == "crumb"}
    pieces = {x.lesion_id: [x] for x in scan.lesions if x.lesion_id not in crumbs}
    spanned: dict[int, list[int]] = defaultdict(list)  # crumbs in the diameters of a lesion
    crumb_lesions = [lesion for lesion in scan.lesions if lesion.lesion_id in crumbs]
    for crumb in crumb_lesions:
        match = crumbs[crumb.lesion_id]
        assert match.whole is not None
        pieces[match.whole].append(crumb)
        if (match.overlap_mm3 or 0.0) >= MIN_FRACTION * crumb.volume_mm3:
            spanned[match.whole].append(crumb.lesion_id)
    axes = _axes(scan.ids, _remeasured(pieces, spanned, normal), normal)
    lesions = [
        replace(of_lesion[0], **_joined(of_lesion), **axes.get(n, {}))
        for n, of_lesion in pieces.items()
    ]
    return ScanLesions(scan.case, lesions, crumb_lesions, scan.unit_doubt)


def _remeasured(
    pieces: Mapping[int, Sequence[LesionMeasurement]],
    spanned: Mapping[int, Sequence[int]],
    normal: np.ndarray | None,
) -> dict[int, list[int]]:
    """Return the lesions, with their parts, whose diameters are measured again."""
    numbers = pieces if normal is not None else [n for n in pieces if n in spanned]
    measured = [n for n in numbers if none_if_nan(pieces[n][0].long_axis_mm) is not None]
    return {n: [n, *spanned.get(n, ())] for n in measured}


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
    ids: Volume, parts: Mapping[int, Sequence[int]], normal: np.ndarray | None
) -> dict[int, dict[str, Any]]:
    """Measure long and short axis of lesions in parts; the ends of the axes become unknown."""
    if not parts:
        return {}
    ids = ids.canonical()
    numbers, matrix = ids.array, ids.geometry.voxel_steps_mm
    boxes = ndimage.find_objects(numbers)
    ends = (
        f"{axis}_axis_p{n}_{side}_mm"
        for axis in ("long", "short")
        for n in (0, 1)
        for side in "ras"
    )
    unknown = dict.fromkeys(("axis_slice", *ends))
    measured = {}
    for lesion, members in parts.items():
        sides = zip(*(boxes[number - 1] for number in members), strict=True)
        box = tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides)
        inside = _inside(numbers[box], members)
        if normal is None:
            sizes = diameters(inside, matrix)
            long_mm, short_mm = sizes.long_mm, sizes.short_mm
        else:
            long_mm, short_mm = section_diameters(inside, matrix, normal)
        measured[lesion] = unknown | {"long_axis_mm": long_mm, "short_axis_mm": short_mm}
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
