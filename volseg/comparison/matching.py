"""Numbered lesions of two scans of a patient → matches.

Lesions are matched, merged, split, new or gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
from scipy.spatial import KDTree

from volseg.comparison.overlap import (
    LesionsSeen,
    NumberedLesions,
    confirmed_crumbs,
    look_up,
    overlapping,
    shared_mm3,
)
from volseg.postprocessing.pairing import Pair, best_pairs
from volseg.volume import Rigid

Status = Literal["matched", "merged", "split", "regrouped", "new", "gone", "outside", "crumb"]
How = Literal["overlap", "distance"]

MAX_DISTANCE_MM = 10.0  # between the centroids of a pair without overlap
# From this fraction of a lesion in the field of view of the other scan, it would be seen there.
MIN_COVERED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A pair of a baseline and a follow-up lesion, or a lesion without a partner.

    Args:
        status: `matched`: one of each. `merged`: the follow-up lesion covers several baseline
            lesions, this being one. `split`: the baseline lesion lies in several follow-up
            lesions, this being one. `regrouped`: both. `new`, `gone`: seen at one time only.
            `outside`: seen at one time only, and outside the field of view of the other scan.
            `crumb`: a small piece beside a lesion of its own scan, counted with that lesion, whose
            group it has.
        baseline, followup: numbers of the lesions; None where there is none.
        group: from 1 in the order of the matches; shared by pairs that merged or split together.
        is_first: the best or only pair of its group, whose row describes the whole group.
        how: how the pair was matched; None without a pair.
        overlap_mm3, dice: of the two lesions; 0 for a pair matched by distance. For a crumb, the
            overlap with all lesions of its label in the other scan.
        distance_mm: between their centroids.
        relabelled: for a lesion without partner, numbers of the lesions of the other scan that
            overlap it under another label.
        whole: for a crumb, the number of its lesion in its own scan; else None.
    """

    status: Status
    baseline: int | None
    followup: int | None
    group: int
    is_first: bool = True
    how: How | None = None
    overlap_mm3: float | None = None
    dice: float | None = None
    distance_mm: float | None = None
    relabelled: tuple[int, ...] = ()
    whole: int | None = None

    @property
    def numbers(self) -> tuple[int | None, int | None]:
        """Numbers of the baseline and the follow-up lesion."""
        return self.baseline, self.followup


def match_lesions(
    baseline: NumberedLesions,
    followup: NumberedLesions,
    *,
    transform: Rigid | None = None,
    max_distance_mm: float = MAX_DISTANCE_MM,
) -> list[Match]:
    """Match the lesions of two scans, by overlap and then by distance.

    Overlap: the voxels of each lesion are looked up in the other scan, nearest voxel in world
    space, in both directions; the overlap is the mean of the two volumes. Overlapping lesions are
    paired one to one so that the sum of squared Dice coefficients is largest (Hungarian method). A
    lesion left over joins the pair that it overlaps most: it merged into it or split from it.

    Distance: lesions without any overlap are paired so that the sum of the distances between their
    centroids is smallest, where an unpaired lesion costs half of `max_distance_mm`.

    Lesions with different labels are never paired. A crumb counts as a part of its lesion, unless
    it overlaps a lesion that is not a crumb and that its own lesion does not overlap.

    Args:
        transform: from points of the baseline to points of the follow-up; None: identity.
        max_distance_mm: between the centroids of a pair without overlap.

    Returns:
        Each lesion in at least one match, baseline lesions first, by ascending number. The matches
        are the same for all axis orders, and for exchanged scans except for the exchanged roles.

    Raises:
        ValueError: numbers of lesions and labels do not agree.
        ScanError: E_SPECKS, more lesions overlap than in real masks.
    """
    transform = transform or Rigid.identity()
    back = transform.inverse()
    pieces = look_up(baseline, followup, transform), look_up(followup, baseline, back)
    crumbs = confirmed_crumbs(*pieces, (baseline.crumbs, followup.crumbs))
    before, after = pieces[0].joined(*crumbs), pieces[1].joined(*crumbs[::-1]).moved(back)
    overlap_mm3, relabelled = overlapping(before, after)
    matches = _pairs(before, after, crumbs, overlap_mm3, max_distance_mm)
    matches += _alone(matches, (before, after), relabelled, crumbs)
    matches += _crumb_matches(matches, pieces, crumbs)
    last = len(baseline.labels) + len(followup.labels) + 1
    matches.sort(key=lambda match: (match.baseline or last, match.followup or last))
    in_order = dict.fromkeys(match.group for match in matches)
    numbers = {group: n for n, group in enumerate(in_order, start=1)}
    return [replace(match, group=numbers[match.group]) for match in matches]


_Crumbs = tuple[Mapping[int, int], Mapping[int, int]]  # of each scan: crumb → lesion


def _pairs(
    before: LesionsSeen,
    after: LesionsSeen,
    crumbs: _Crumbs,
    overlap_mm3: Mapping[Pair, float],
    max_distance_mm: float,
) -> list[Match]:
    """Return the pairs by overlap and by distance, those that merged or split in one group."""
    dice = {
        (b, f): 2 * mm3 / float(before.volumes_mm3[b - 1] + after.volumes_mm3[f - 1])
        for (b, f), mm3 in overlap_mm3.items()
    }
    groups = _groups(best_pairs({pair: value**2 for pair, value in dice.items()}), overlap_mm3)
    free = [
        _free(lesions, {pair[side] for pair in overlap_mm3} | crumbs[side].keys())
        for side, lesions in enumerate((before, after))
    ]
    groups += [[pair] for pair in _near_pairs(before, after, free, max_distance_mm)]
    return [
        Match(
            status=_status(pairs),
            baseline=b,
            followup=f,
            group=number,
            is_first=n == 0,
            how="overlap" if (b, f) in dice else "distance",
            overlap_mm3=overlap_mm3.get((b, f), 0.0),
            dice=dice.get((b, f), 0.0),
            distance_mm=_distance_mm(before, after, (b, f)),
        )
        for number, pairs in enumerate(sorted(groups, key=min), start=1)
        for n, (b, f) in enumerate(pairs)
    ]


def _free(lesions: LesionsSeen, taken: Set[int]) -> list[int]:
    """Return the lesions that may be paired by distance: not taken, and visible in both scans."""
    return [n for n in lesions.numbers if n not in taken and lesions.covered[n - 1] >= MIN_COVERED]


def _distance_mm(before: LesionsSeen, after: LesionsSeen, pair: Pair) -> float:
    b, f = pair
    return float(np.linalg.norm(before.centroids_mm[b - 1] - after.centroids_mm[f - 1]))


def _groups(firsts: Sequence[Pair], overlap_mm3: Mapping[Pair, float]) -> list[list[Pair]]:
    """Group each pair with the pairs that join it.

    A lesion without partner joins the lesion that it overlaps most, and that lesion's partner.
    """
    first_of_b, first_of_f = {pair[0]: pair for pair in firsts}, {pair[1]: pair for pair in firsts}
    best: dict[tuple[str, int], Pair] = {}
    for pair in overlap_mm3:
        # If one of the two has no partner, the other has one: else they would have been paired.
        if pair[0] not in first_of_b:
            key = ("b", pair[0])
        elif pair[1] not in first_of_f:
            key = ("f", pair[1])
        else:
            continue
        if key not in best or overlap_mm3[pair] > overlap_mm3[best[key]]:
            best[key] = pair
    groups = {pair: [pair] for pair in firsts}
    for pair in sorted(best.values()):
        groups[first_of_b.get(pair[0]) or first_of_f[pair[1]]].append(pair)
    return list(groups.values())


def _status(pairs: Sequence[Pair]) -> Status:
    n_baseline, n_followup = (len({pair[side] for pair in pairs}) for side in (0, 1))
    if n_baseline > 1 and n_followup > 1:
        return "regrouped"
    return "merged" if n_baseline > 1 else "split" if n_followup > 1 else "matched"


def _near_pairs(
    before: LesionsSeen, after: LesionsSeen, free: Sequence[Sequence[int]], limit_mm: float
) -> list[Pair]:
    """Pair the free lesions of each label one to one, by the distance between their centroids."""
    gains: dict[Pair, float] = {}
    by_label = [defaultdict(list), defaultdict(list)]
    for lesions, numbers, of_label in zip((before, after), free, by_label, strict=True):
        for n in numbers:
            of_label[lesions.labels[n - 1]].append(n)
    for label in by_label[0].keys() & by_label[1].keys():
        befores, afters = by_label[0][label], by_label[1][label]
        near = KDTree(before.centroids_mm[np.array(befores) - 1]).query_ball_tree(
            KDTree(after.centroids_mm[np.array(afters) - 1]), limit_mm
        )
        for b, candidates in zip(befores, near, strict=True):
            for f in (afters[j] for j in candidates):
                distance_mm = _distance_mm(before, after, (b, f))
                gains[b, f] = max(limit_mm - distance_mm, 1e-9)  # still a pair at the limit
    return best_pairs(gains)


def _alone(
    matches: Sequence[Match],
    scans: tuple[LesionsSeen, LesionsSeen],
    relabelled: Sequence[Pair],
    crumbs: _Crumbs,
) -> list[Match]:
    """Return a match for each lesion that has none and is not a crumb."""
    others: dict[tuple[int, int], list[int]] = defaultdict(list)  # (side, lesion) → the other side
    for b, f in relabelled:
        others[0, b].append(f)
        others[1, f].append(b)
    new_group = count(1 + max((match.group for match in matches), default=0))
    paired = [{match.numbers[side] for match in matches} | crumbs[side].keys() for side in (0, 1)]
    return [
        Match(
            status="outside" if lesions.covered[n - 1] < MIN_COVERED else status,
            baseline=None if side else n,
            followup=n if side else None,
            group=next(new_group),
            relabelled=tuple(others[side, n]),
        )
        for side, (lesions, status) in enumerate(zip(scans, ("gone", "new"), strict=True))
        for n in lesions.numbers
        if n not in paired[side]
    ]


def _crumb_matches(
    matches: Sequence[Match], pieces: tuple[LesionsSeen, LesionsSeen], crumbs: _Crumbs
) -> list[Match]:
    """Return a match for each crumb, in the group of its lesion.

    Args:
        pieces: lesions of both scans, with crumbs as separate entries.
    """
    if not any(crumbs):
        return []
    groups = {(side, match.numbers[side]): match.group for match in matches for side in (0, 1)}
    overlap_mm3: dict[tuple[int, int], float] = defaultdict(float)
    for (b, f), mm3 in shared_mm3(*pieces):
        if pieces[0].labels[b - 1] == pieces[1].labels[f - 1]:
            overlap_mm3[0, b] += mm3
            overlap_mm3[1, f] += mm3
    return [
        Match(
            status="crumb",
            baseline=None if side else n,
            followup=n if side else None,
            group=groups[side, whole],
            is_first=False,
            overlap_mm3=overlap_mm3[side, n],
            whole=whole,
        )
        for side in (0, 1)
        for n, whole in crumbs[side].items()
    ]
