"""Numbered lesions of two scans of a patient → which of them are the same: pairs, new and gone ones, merged and split ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.spatial import KDTree

from volseg.errors import ScanError
from volseg.postprocess.pairing import MOST_PAIRS, Pair, best_pairs
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.volume import BoundingBox, Geometry, Volume, slabs_of

Status = Literal["matched", "merged", "split", "regrouped", "new", "gone", "outside", "crumb"]
How = Literal["overlap", "distance"]

SLAB_VOXELS = 2**18  # whose places in the other scan are looked up together
MIN_SHARE = 0.1  # of the smaller lesion that lies in the other one, from which the two overlap: neighbours may touch
MAX_DISTANCE_MM = (
    10.0  # between the centroids of two lesions that do not overlap and are still the same one
)
MIN_COVERED = 0.5  # of a lesion that lies in the field of view of the other scan, from which it would be seen there


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A lesion of the baseline, one of the follow-up, or one of each that belong together.

    Args:
        status: `matched`: one of each. `merged`: the follow-up lesion holds several of the baseline, of which this is one. `split`: the
            baseline lesion lies in several of the follow-up, of which this is one. `regrouped`: both. `new`, `gone`: only at one time.
            `outside`: only at one time, but the other scan does not reach there. `crumb`: a small piece beside a lesion of its own
            scan, counted as a part of that one, whose group it has.
        baseline, followup: numbers of the lesions; None where there is none.
        group: from 1 in the order of the matches; pairs that merged or split together share it.
        is_first: the best pair of its group, or the only one. What is said of the whole group is said there.
        how: what the pair was found by; None without a pair.
        overlap_mm3, dice: of the two lesions; 0 for a pair that was found by distance. Of a crumb the overlap with all
            lesions of the other scan that have its label.
        distance_mm: between their centroids.
        relabelled: numbers of lesions of the other scan that overlap this one under another label, where it has no partner.
        whole: of a crumb the number of its lesion, in its own scan; None of every other lesion.
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


def match_lesions(
    baseline: Volume,
    followup: Volume,
    *,
    baseline_labels: Sequence[Hashable],
    followup_labels: Sequence[Hashable],
    baseline_crumbs: Mapping[int, int] | None = None,
    followup_crumbs: Mapping[int, int] | None = None,
    moved: np.ndarray | None = None,
    max_distance_mm: float = MAX_DISTANCE_MM,
) -> list[Match]:
    """Every lesion of both scans in at least one match, those of the baseline first, in the order of their numbers.

    First by overlap: the voxels of each lesion are looked up in the other scan, nearest voxel in world space, in both directions; the mean of
    the two volumes is the overlap. Of lesions that overlap, those are paired one to one whose Dice coefficients have the largest sum of
    squares (Hungarian method), and what is left over joins the pair that it overlaps most: it merged into it or split from it. Then by
    distance: lesions that overlap none are paired so that the sum of the distances of their centroids is smallest, where a lesion
    without partner costs as much as half of the largest distance allowed. A lesion is never paired with one of another label.
    A crumb is a part of its lesion in all this, unless it overlaps a lesion that is no crumb and that its own lesion does not overlap.

    Args:
        baseline, followup: lesion ids (I, J, K) on the grid of each scan; n in the voxels of lesion n, 0 elsewhere.
        baseline_labels, followup_labels: label of lesion 1, 2, …, N.
        baseline_crumbs, followup_crumbs: number of a crumb → number of the lesion that it may be a part of.
        moved: (4, 4) rigid, in RAS mm, from a point of the baseline to the same point of the patient in the follow-up; None: the same.
        max_distance_mm: between the centroids of a pair that does not overlap.

    Returns:
        The same matches for all axis orders of either scan, and, with roles exchanged, for exchanged scans.

    Raises:
        ValueError: numbers of lesions and labels do not agree.
        ScanError: E_SPECKS, more lesions overlap than those of real masks do.
    """
    moved = np.eye(4) if moved is None else moved
    back = np.linalg.inv(moved)
    labels = (baseline_labels, followup_labels)
    here = _lesions_of(baseline, followup, moved, len(baseline_labels), len(followup_labels))
    there = _lesions_of(followup, baseline, back, len(followup_labels), len(baseline_labels))
    crumbs = _crumbs((here, there), labels, (baseline_crumbs or {}, followup_crumbs or {}))
    pieces = (here, there)
    here, there = here.joined(*crumbs), there.joined(*crumbs[::-1])
    centroids_mm = (here.centroids_mm, there.centroids_mm @ back[:3, :3].T + back[:3, 3])
    overlap_mm3, relabelled = _overlaps(here, there, labels)
    dice = {
        (b, f): 2 * mm3 / float(here.volumes_mm3[b - 1] + there.volumes_mm3[f - 1])
        for (b, f), mm3 in overlap_mm3.items()
    }
    groups = _groups(best_pairs({pair: value**2 for pair, value in dice.items()}), overlap_mm3)
    free = [
        [n for n in range(1, side.n + 1) if n not in used and side.covered[n - 1] >= MIN_COVERED]
        for side, used in (
            (here, {b for b, _ in overlap_mm3} | set(crumbs[0])),
            (there, {f for _, f in overlap_mm3} | set(crumbs[1])),
        )
    ]
    groups += [[pair] for pair in _near_pairs(centroids_mm, labels, free, max_distance_mm)]
    matches = [
        Match(
            status=_status(pairs),
            baseline=b,
            followup=f,
            group=number,
            is_first=n == 0,
            how="overlap" if (b, f) in dice else "distance",
            overlap_mm3=overlap_mm3.get((b, f), 0.0),
            dice=dice.get((b, f), 0.0),
            distance_mm=float(np.linalg.norm(centroids_mm[0][b - 1] - centroids_mm[1][f - 1])),
        )
        for number, pairs in enumerate(sorted(groups, key=min), start=1)
        for n, (b, f) in enumerate(pairs)
    ]
    matches += _alone(matches, here, there, relabelled, crumbs)
    matches += _crumb_matches(matches, pieces, labels, crumbs)
    last = here.n + there.n + 1
    matches.sort(key=lambda match: (match.baseline or last, match.followup or last))
    numbers = {
        group: n for n, group in enumerate(dict.fromkeys(match.group for match in matches), start=1)
    }
    return [replace(match, group=numbers[match.group]) for match in matches]


@dataclass(frozen=True, slots=True, eq=False)
class _Lesions:
    """What is known of the lesions of one scan; lesion n at position n - 1.

    Args:
        volumes_mm3: (N,). centroids_mm: (N, 3) RAS mm of their own scan.
        covered: (N,) share of the voxels that lie in the field of view of the other scan.
        found_mm3: (lesion, lesion of the other scan) → volume of the voxels of the first that lie in the second.
    """

    n: int
    volumes_mm3: np.ndarray
    centroids_mm: np.ndarray
    covered: np.ndarray
    found_mm3: Mapping[Pair, float]

    def joined(self, crumbs: Mapping[int, int], other_crumbs: Mapping[int, int]) -> _Lesions:
        """The same with every crumb as a part of its lesion; what is left in its own place is not to be looked at."""
        if not crumbs and not other_crumbs:
            return self
        wholes = np.array([crumbs.get(n, n) for n in range(1, self.n + 1)], dtype=np.int64) - 1
        volumes_mm3 = np.bincount(wholes, self.volumes_mm3, minlength=self.n)
        weights = self.volumes_mm3 / np.where(volumes_mm3 > 0, volumes_mm3, 1.0)[wholes]
        centroids_mm, covered = np.zeros_like(self.centroids_mm), np.zeros_like(self.covered)
        np.add.at(centroids_mm, wholes, weights[:, None] * self.centroids_mm)
        np.add.at(covered, wholes, weights * self.covered)
        shared_mm3: dict[Pair, float] = defaultdict(float)
        for (n, other), mm3 in self.found_mm3.items():
            shared_mm3[crumbs.get(n, n), other_crumbs.get(other, other)] += mm3
        return replace(
            self,
            volumes_mm3=volumes_mm3,
            centroids_mm=centroids_mm,
            covered=covered,
            found_mm3=shared_mm3,
        )


def _lesions_of(ids: Volume, other: Volume, moved: np.ndarray, n: int, n_other: int) -> _Lesions:
    # In the same axis order, whatever the files have: else a point half-way between two voxels belongs to either.
    numbers, grid = _canonical(ids)
    others, other_grid = _canonical(other)
    box = BoundingBox.around(numbers)
    matrix = np.linalg.inv(other_grid.affine) @ moved @ grid.affine
    counts, inside, sums = np.zeros(n + 1), np.zeros(n + 1), np.zeros((n + 1, 3))
    found: dict[Pair, int] = defaultdict(int)
    for slab, start in () if box is None else _slabs(numbers, box):
        index = np.argwhere(slab) + start
        values = numbers[tuple(index.T)].astype(np.int64)
        if values.max() > n:
            raise ValueError(f"lesion ids go up to {values.max()}, but there are {n} labels")
        counts += np.bincount(values, minlength=n + 1)
        for axis in range(3):
            sums[:, axis] += np.bincount(values, weights=index[:, axis], minlength=n + 1)
        nearest = np.floor(np.round(index @ matrix[:3, :3].T + matrix[:3, 3], 6) + 0.5).astype(
            np.int64
        )
        seen = ((nearest >= 0) & (nearest < np.array(other_grid.shape))).all(axis=1)
        inside += np.bincount(values[seen], minlength=n + 1)
        hits = others[tuple(nearest[seen].T)].astype(np.int64)
        keys, voxels = np.unique(
            values[seen][hits > 0] * (n_other + 1) + hits[hits > 0], return_counts=True
        )
        for key, count in zip(keys.tolist(), voxels.tolist(), strict=True):
            found[divmod(key, n_other + 1)] += count
        if len(found) > MOST_PAIRS:
            raise ScanError(
                f"over {MOST_PAIRS:,} pairs of lesions of the two scans overlap: a mask looks like noise",
                fix="correct the masks and measure them again; noise has no response",
                code="E_SPECKS",
            )
    if n and not counts[1:].all():
        raise ValueError("lesion ids skip a number: every label needs a lesion with voxels")
    return _Lesions(
        n=n,
        volumes_mm3=counts[1:] * grid.voxel_volume_mm3,
        centroids_mm=grid.to_world_mm(sums[1:] / counts[1:, None]) if n else np.zeros((0, 3)),
        covered=inside[1:] / counts[1:],
        found_mm3={pair: count * grid.voxel_volume_mm3 for pair, count in found.items()},
    )


def _canonical(ids: Volume) -> tuple[np.ndarray, Geometry]:
    order = AxisOrder.of(ids.geometry)
    return to_canonical(ids.array, order), canonical_geometry(ids.geometry, order)


def _slabs(numbers: np.ndarray, box: BoundingBox) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of the array that hold all lesions, each with the index at which it begins."""
    part = numbers[box.slices]
    for slab in slabs_of(part, SLAB_VOXELS):
        if part[slab].any():
            yield part[slab], np.array(box.start) + [each.start for each in slab]


def _overlaps(
    here: _Lesions, there: _Lesions, labels: tuple[Sequence[Hashable], Sequence[Hashable]]
) -> tuple[dict[Pair, float], list[Pair]]:
    """Volume in mm³ that two lesions of one label share, where it is enough of the smaller one; such pairs of different labels."""
    same, different = {}, []
    for (b, f), volume in _shared_mm3(here, there):
        if volume < MIN_SHARE * min(here.volumes_mm3[b - 1], there.volumes_mm3[f - 1]):
            continue
        if labels[0][b - 1] == labels[1][f - 1]:
            same[b, f] = volume
        else:
            different.append((b, f))
    return same, different


def _shared_mm3(here: _Lesions, there: _Lesions) -> list[tuple[Pair, float]]:
    """Volume in mm³ that two lesions share, whatever their labels: the mean of both directions."""
    mm3: dict[Pair, float] = defaultdict(float)
    for (b, f), volume in here.found_mm3.items():
        mm3[b, f] += volume / 2
    for (f, b), volume in there.found_mm3.items():
        mm3[b, f] += volume / 2
    return sorted(mm3.items())


def _crumbs(
    sides: tuple[_Lesions, _Lesions],
    labels: tuple[Sequence[Hashable], Sequence[Hashable]],
    candidates: tuple[Mapping[int, int], Mapping[int, int]],
) -> tuple[dict[int, int], dict[int, int]]:
    """The candidates that are parts of their lesions by what the other scan shows.

    One that overlaps a lesion there which is no candidate, and which its own lesion does not overlap, is a lesion by itself.
    """
    if not any(candidates):
        return {}, {}
    overlaps: tuple[dict[int, set[int]], dict[int, set[int]]] = defaultdict(set), defaultdict(set)
    for b, f in _overlaps(*sides, labels)[0]:
        overlaps[0][b].add(f)
        overlaps[1][f].add(b)
    kept = []
    for side in (0, 1):
        at_other = {
            n: overlaps[side][n] - set(candidates[1 - side])
            for n in {*candidates[side], *candidates[side].values()}
        }
        kept.append(
            {n: whole for n, whole in candidates[side].items() if at_other[n] <= at_other[whole]}
        )
    return kept[0], kept[1]


def _crumb_matches(
    matches: Sequence[Match],
    sides: tuple[_Lesions, _Lesions],
    labels: tuple[Sequence[Hashable], Sequence[Hashable]],
    crumbs: tuple[Mapping[int, int], Mapping[int, int]],
) -> list[Match]:
    """A match for each crumb, in the group of its lesion.

    Args:
        sides: crumbs and lesions each by itself.
    """
    groups = (
        {match.baseline: match.group for match in matches},
        {match.followup: match.group for match in matches},
    )
    shared_mm3: tuple[dict[int, float], dict[int, float]] = defaultdict(float), defaultdict(float)
    for (b, f), mm3 in _shared_mm3(*sides) if any(crumbs) else ():
        if labels[0][b - 1] == labels[1][f - 1]:
            shared_mm3[0][b] += mm3
            shared_mm3[1][f] += mm3
    return [
        Match(
            status="crumb",
            baseline=None if side else n,
            followup=n if side else None,
            group=groups[side][whole],
            is_first=False,
            overlap_mm3=shared_mm3[side][n],
            whole=whole,
        )
        for side in (0, 1)
        for n, whole in crumbs[side].items()
    ]


def _groups(firsts: Sequence[Pair], overlap_mm3: Mapping[Pair, float]) -> list[list[Pair]]:
    """Each pair with those that join it: a lesion without partner goes with the lesion that it overlaps most, and its partner."""
    first_of_b, first_of_f = {pair[0]: pair for pair in firsts}, {pair[1]: pair for pair in firsts}
    best: dict[tuple[str, int], Pair] = {}
    for pair in overlap_mm3:
        # Where one of the two has no partner the other has: else they would have been paired.
        key = (
            ("b", pair[0])
            if pair[0] not in first_of_b
            else ("f", pair[1])
            if pair[1] not in first_of_f
            else None
        )
        if key is not None and (key not in best or overlap_mm3[pair] > overlap_mm3[best[key]]):
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
    centroids_mm: tuple[np.ndarray, np.ndarray],
    labels: tuple[Sequence[Hashable], Sequence[Hashable]],
    free: Sequence[Sequence[int]],
    limit_mm: float,
) -> list[Pair]:
    """Pairs of the free lesions of one label, one to one, by the distance of their centroids."""
    gains: dict[Pair, float] = {}
    for label in {labels[0][n - 1] for n in free[0]} & {labels[1][n - 1] for n in free[1]}:
        befores, afters = (
            [n for n in free[side] if labels[side][n - 1] == label] for side in (0, 1)
        )
        near = KDTree(centroids_mm[0][np.array(befores) - 1]).query_ball_tree(
            KDTree(centroids_mm[1][np.array(afters) - 1]), limit_mm
        )
        for b, candidates in zip(befores, near, strict=True):
            for f in (afters[j] for j in candidates):
                distance_mm = float(np.linalg.norm(centroids_mm[0][b - 1] - centroids_mm[1][f - 1]))
                gains[b, f] = max(limit_mm - distance_mm, 1e-9)  # at the limit it is still a pair
    return best_pairs(gains)


def _alone(
    matches: Sequence[Match],
    here: _Lesions,
    there: _Lesions,
    relabelled: Sequence[Pair],
    crumbs: tuple[Mapping[int, int], Mapping[int, int]],
) -> list[Match]:
    """A match for each lesion that is in none, and is no crumb."""
    paired = (
        {match.baseline for match in matches} | set(crumbs[0]),
        {match.followup for match in matches} | set(crumbs[1]),
    )
    others: tuple[dict[int, list[int]], dict[int, list[int]]] = defaultdict(list), defaultdict(list)
    for b, f in relabelled:
        others[0][b].append(f)
        others[1][f].append(b)
    found = []
    group = max((match.group for match in matches), default=0)
    for side, lesions in enumerate((here, there)):
        for n in range(1, lesions.n + 1):
            if n in paired[side]:
                continue
            group += 1
            found.append(
                Match(
                    status="outside"
                    if lesions.covered[n - 1] < MIN_COVERED
                    else "new"
                    if side
                    else "gone",
                    baseline=None if side else n,
                    followup=n if side else None,
                    group=group,
                    relabelled=tuple(others[side][n]),
                )
            )
    return found
