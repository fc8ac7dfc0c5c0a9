"""Numbered lesions of two scans of a patient → matches.

Lesions are matched, merged, split, new or gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.spatial import KDTree

from volseg.errors import ScanError
from volseg.postprocessing.pairing import MAX_PAIRS, Pair, best_pairs
from volseg.volume import BoundingBox, Rigid, Volume, slabs_of

Status = Literal["matched", "merged", "split", "regrouped", "new", "gone", "outside", "crumb"]
How = Literal["overlap", "distance"]

SLAB_VOXELS = 2**18  # voxels looked up in the other scan together
# Two lesions overlap from this fraction of the smaller one: neighbours may touch.
MIN_FRACTION = 0.1
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


def match_lesions(
    baseline: Volume,
    followup: Volume,
    *,
    baseline_labels: Sequence[Hashable],
    followup_labels: Sequence[Hashable],
    baseline_crumbs: Mapping[int, int] | None = None,
    followup_crumbs: Mapping[int, int] | None = None,
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
        baseline, followup: lesion ids (I, J, K) on the grid of each scan; n in the voxels of
            lesion n, 0 elsewhere.
        baseline_labels, followup_labels: label of lesion 1, 2, …, N.
        baseline_crumbs, followup_crumbs: number of a crumb → number of the lesion that it may
            belong to.
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
    labels = (baseline_labels, followup_labels)
    before = _lesions_of(baseline, followup, transform, len(baseline_labels), len(followup_labels))
    after = _lesions_of(followup, baseline, back, len(followup_labels), len(baseline_labels))
    crumbs = _crumbs((before, after), labels, (baseline_crumbs or {}, followup_crumbs or {}))
    pieces = (before, after)
    before, after = before.joined(*crumbs), after.joined(*crumbs[::-1])
    centroids_mm = (before.centroids_mm, back.apply(after.centroids_mm))
    overlap_mm3, relabelled = _overlaps(before, after, labels)
    dice = {
        (b, f): 2 * mm3 / float(before.volumes_mm3[b - 1] + after.volumes_mm3[f - 1])
        for (b, f), mm3 in overlap_mm3.items()
    }
    groups = _groups(best_pairs({pair: value**2 for pair, value in dice.items()}), overlap_mm3)
    used = [{pair[side] for pair in overlap_mm3} | set(crumbs[side]) for side in (0, 1)]
    free = [
        [
            n
            for n in range(1, lesions.n + 1)
            if n not in ids and lesions.covered[n - 1] >= MIN_COVERED
        ]
        for lesions, ids in zip((before, after), used, strict=True)
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
    matches += _alone(matches, before, after, relabelled, crumbs)
    matches += _crumb_matches(matches, pieces, labels, crumbs)
    last = before.n + after.n + 1
    matches.sort(key=lambda match: (match.baseline or last, match.followup or last))
    in_order = dict.fromkeys(match.group for match in matches)
    numbers = {group: n for n, group in enumerate(in_order, start=1)}
    return [replace(match, group=numbers[match.group]) for match in matches]


@dataclass(frozen=True, slots=True, eq=False)
class _Lesions:
    """Measures of the lesions of one scan; lesion n at index n - 1.

    Args:
        volumes_mm3: (N,).
        centroids_mm: (N, 3) RAS mm of their own scan.
        covered: (N,) fraction of the voxels in the field of view of the other scan.
        shared_mm3: (lesion, lesion of the other scan) → volume of the first inside the second.
    """

    n: int
    volumes_mm3: np.ndarray
    centroids_mm: np.ndarray
    covered: np.ndarray
    shared_mm3: Mapping[Pair, float]

    def joined(self, crumbs: Mapping[int, int], other_crumbs: Mapping[int, int]) -> _Lesions:
        """Return a copy with crumbs added to their lesions; entries of crumbs become invalid."""
        if not crumbs and not other_crumbs:
            return self
        wholes = np.array([crumbs.get(n, n) for n in range(1, self.n + 1)], dtype=np.int64) - 1
        volumes_mm3 = np.bincount(wholes, self.volumes_mm3, minlength=self.n)
        weights = self.volumes_mm3 / np.where(volumes_mm3 > 0, volumes_mm3, 1.0)[wholes]
        centroids_mm, covered = np.zeros_like(self.centroids_mm), np.zeros_like(self.covered)
        np.add.at(centroids_mm, wholes, weights[:, None] * self.centroids_mm)
        np.add.at(covered, wholes, weights * self.covered)
        shared_mm3: dict[Pair, float] = defaultdict(float)
        for (n, other), mm3 in self.shared_mm3.items():
            shared_mm3[crumbs.get(n, n), other_crumbs.get(other, other)] += mm3
        return _Lesions(self.n, volumes_mm3, centroids_mm, covered, shared_mm3)


def _lesions_of(ids: Volume, other: Volume, transform: Rigid, n: int, n_other: int) -> _Lesions:
    # In canonical axis order: else a point half-way between two voxels could belong to either.
    ids, other = ids.canonical(), other.canonical()
    numbers, grid = ids.array, ids.geometry
    others, other_grid = other.array, other.geometry
    box = BoundingBox.around(numbers)
    matrix = grid.index_matrix(other_grid, transform)
    counts, inside, sums = np.zeros(n + 1), np.zeros(n + 1), np.zeros((n + 1, 3))
    overlaps: dict[Pair, int] = defaultdict(int)
    for slab, start in () if box is None else _slabs(numbers, box):
        index = np.argwhere(slab) + start
        values = numbers[tuple(index.T)].astype(np.int64)
        if values.max() > n:
            raise ValueError(f"lesion ids go up to {values.max()}, but there are {n} labels")
        counts += np.bincount(values, minlength=n + 1)
        for axis in range(3):
            sums[:, axis] += np.bincount(values, weights=index[:, axis], minlength=n + 1)
        positions = np.round(index @ matrix[:3, :3].T + matrix[:3, 3], 6)
        nearest = np.floor(positions + 0.5).astype(np.int64)
        seen = ((nearest >= 0) & (nearest < np.array(other_grid.shape))).all(axis=1)
        inside += np.bincount(values[seen], minlength=n + 1)
        hits = others[tuple(nearest[seen].T)].astype(np.int64)
        keys = values[seen][hits > 0] * (n_other + 1) + hits[hits > 0]
        keys, voxels = np.unique(keys, return_counts=True)
        for key, count in zip(keys.tolist(), voxels.tolist(), strict=True):
            overlaps[divmod(key, n_other + 1)] += count
        if len(overlaps) > MAX_PAIRS:
            raise ScanError(
                f"over {MAX_PAIRS:,} pairs of lesions overlap: a mask looks like noise",
                fix="correct the masks and measure them again; no response is computed from noise",
                code="E_SPECKS",
            )
    if n and not counts[1:].all():
        raise ValueError("lesion ids skip a number: every label needs a lesion with voxels")
    return _Lesions(
        n=n,
        volumes_mm3=counts[1:] * grid.voxel_volume_mm3,
        centroids_mm=grid.to_world_mm(sums[1:] / counts[1:, None]) if n else np.zeros((0, 3)),
        covered=inside[1:] / counts[1:],
        shared_mm3={pair: count * grid.voxel_volume_mm3 for pair, count in overlaps.items()},
    )


def _slabs(numbers: np.ndarray, box: BoundingBox) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of the array that hold all lesions, each with the index of its first voxel."""
    part = numbers[box.slices]
    for slab in slabs_of(part, SLAB_VOXELS):
        if part[slab].any():
            yield part[slab], np.array(box.start) + [side.start for side in slab]


def _overlaps(
    before: _Lesions, after: _Lesions, labels: tuple[Sequence[Hashable], Sequence[Hashable]]
) -> tuple[dict[Pair, float], list[Pair]]:
    """Return the shared volume in mm³ of overlapping pairs, and pairs with different labels."""
    same, different = {}, []
    for (b, f), volume in _shared_mm3(before, after):
        if volume < MIN_FRACTION * min(before.volumes_mm3[b - 1], after.volumes_mm3[f - 1]):
            continue
        if labels[0][b - 1] == labels[1][f - 1]:
            same[b, f] = volume
        else:
            different.append((b, f))
    return same, different


def _shared_mm3(before: _Lesions, after: _Lesions) -> list[tuple[Pair, float]]:
    """Return the shared volume in mm³ of all pairs, of any labels: the mean of both directions."""
    mm3: dict[Pair, float] = defaultdict(float)
    for (b, f), volume in before.shared_mm3.items():
        mm3[b, f] += volume / 2
    for (f, b), volume in after.shared_mm3.items():
        mm3[b, f] += volume / 2
    return sorted(mm3.items())


def _crumbs(
    sides: tuple[_Lesions, _Lesions],
    labels: tuple[Sequence[Hashable], Sequence[Hashable]],
    candidates: tuple[Mapping[int, int], Mapping[int, int]],
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the candidates that the other scan confirms as crumbs.

    A candidate is a lesion of its own if it overlaps a lesion of the other scan that is not a
    candidate and that its own lesion does not overlap.
    """
    if not any(candidates):
        return {}, {}
    overlaps: tuple[dict[int, set[int]], dict[int, set[int]]] = defaultdict(set), defaultdict(set)
    for b, f in _overlaps(*sides, labels)[0]:
        overlaps[0][b].add(f)
        overlaps[1][f].add(b)
    kept = []
    for side in (0, 1):
        wholes = candidates[side]
        partners = {
            n: overlaps[side][n] - set(candidates[1 - side]) for n in {*wholes, *wholes.values()}
        }
        kept.append({n: whole for n, whole in wholes.items() if partners[n] <= partners[whole]})
    return kept[0], kept[1]


def _crumb_matches(
    matches: Sequence[Match],
    sides: tuple[_Lesions, _Lesions],
    labels: tuple[Sequence[Hashable], Sequence[Hashable]],
    crumbs: tuple[Mapping[int, int], Mapping[int, int]],
) -> list[Match]:
    """Return a match for each crumb, in the group of its lesion.

    Args:
        sides: lesions of both scans, with crumbs as separate entries.
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
    centroids_mm: tuple[np.ndarray, np.ndarray],
    labels: tuple[Sequence[Hashable], Sequence[Hashable]],
    free: Sequence[Sequence[int]],
    limit_mm: float,
) -> list[Pair]:
    """Pair the free lesions of each label one to one, by the distance between their centroids."""
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
                gains[b, f] = max(limit_mm - distance_mm, 1e-9)  # still a pair at the limit
    return best_pairs(gains)


def _alone(
    matches: Sequence[Match],
    before: _Lesions,
    after: _Lesions,
    relabelled: Sequence[Pair],
    crumbs: tuple[Mapping[int, int], Mapping[int, int]],
) -> list[Match]:
    """Return a match for each lesion that has none and is not a crumb."""
    paired = (
        {match.baseline for match in matches} | set(crumbs[0]),
        {match.followup for match in matches} | set(crumbs[1]),
    )
    others: tuple[dict[int, list[int]], dict[int, list[int]]] = defaultdict(list), defaultdict(list)
    for b, f in relabelled:
        others[0][b].append(f)
        others[1][f].append(b)
    singles = []
    group = max((match.group for match in matches), default=0)
    for side, lesions in enumerate((before, after)):
        for n in range(1, lesions.n + 1):
            if n in paired[side]:
                continue
            group += 1
            is_outside = lesions.covered[n - 1] < MIN_COVERED
            singles.append(
                Match(
                    status="outside" if is_outside else "new" if side else "gone",
                    baseline=None if side else n,
                    followup=n if side else None,
                    group=group,
                    relabelled=tuple(others[side][n]),
                )
            )
    return singles
