"""Numbered lesions of a scan, looked up in another scan of the patient: what overlaps what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from volseg.errors import ScanError
from volseg.postprocessing.pairing import MAX_PAIRS, Pair
from volseg.volume import BoundingBox, Rigid, Volume, slabs_of

SLAB_VOXELS = 2**18  # voxels looked up in the other scan together
# Two lesions overlap from this fraction of the smaller one: neighbours may touch.
MIN_FRACTION = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class NumberedLesions:
    """The lesions of a scan.

    Args:
        ids: (I, J, K) on the grid of the scan; n in the voxels of lesion n, 0 elsewhere.
        labels: label of lesion 1, 2, …, N.
        crumbs: number of a crumb → number of the lesion that it may belong to.
    """

    ids: Volume
    labels: Sequence[Hashable]
    crumbs: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LesionsSeen:
    """Measures of the lesions of one scan and of their places in the other; lesion n at n - 1.

    Args:
        labels: N labels.
        volumes_mm3: (N,).
        centroids_mm: (N, 3) RAS mm.
        covered: (N,) fraction of the voxels in the field of view of the other scan.
        shared_mm3: (lesion, lesion of the other scan) → volume of the first inside the second.
    """

    labels: Sequence[Hashable]
    volumes_mm3: np.ndarray
    centroids_mm: np.ndarray
    covered: np.ndarray
    shared_mm3: Mapping[Pair, float]

    @property
    def numbers(self) -> range:
        return range(1, len(self.labels) + 1)

    def joined(self, crumbs: Mapping[int, int], other_crumbs: Mapping[int, int]) -> LesionsSeen:
        """Return a copy with crumbs added to their lesions; entries of crumbs become invalid."""
        if not crumbs and not other_crumbs:
            return self
        n = len(self.labels)
        wholes = np.array([crumbs.get(n, n) for n in self.numbers], dtype=np.int64) - 1
        volumes_mm3 = np.bincount(wholes, self.volumes_mm3, minlength=n)
        weights = self.volumes_mm3 / np.where(volumes_mm3 > 0, volumes_mm3, 1.0)[wholes]
        centroids_mm, covered = np.zeros_like(self.centroids_mm), np.zeros_like(self.covered)
        np.add.at(centroids_mm, wholes, weights[:, None] * self.centroids_mm)
        np.add.at(covered, wholes, weights * self.covered)
        shared_mm3: dict[Pair, float] = defaultdict(float)
        for (number, other), mm3 in self.shared_mm3.items():
            shared_mm3[crumbs.get(number, number), other_crumbs.get(other, other)] += mm3
        return LesionsSeen(self.labels, volumes_mm3, centroids_mm, covered, shared_mm3)

    def moved(self, transform: Rigid) -> LesionsSeen:
        """Return a copy with the centroids moved."""
        return replace(self, centroids_mm=transform.apply(self.centroids_mm))


def look_up(scan: NumberedLesions, other: NumberedLesions, transform: Rigid) -> LesionsSeen:
    """Look up the voxels of each lesion in the other scan, nearest voxel in world space.

    Args:
        transform: from points of the scan to points of the other.

    Raises:
        ValueError: numbers of lesions and labels do not agree.
        ScanError: E_SPECKS, more lesions overlap than in real masks.
    """
    # In canonical axis order: else a point half-way between two voxels could belong to either.
    ids, other_ids = scan.ids.canonical(), other.ids.canonical()
    numbers, grid, others = ids.array, ids.geometry, other_ids.array
    matrix = grid.index_matrix(other_ids.geometry, transform)
    n, n_other = len(scan.labels), len(other.labels)
    counts, inside, sums = np.zeros(n + 1), np.zeros(n + 1), np.zeros((n + 1, 3))
    overlaps: dict[Pair, int] = defaultdict(int)
    for slab, start in _slabs(numbers):
        index = np.argwhere(slab) + start
        values = numbers[tuple(index.T)].astype(np.int64)
        if values.max() > n:
            raise ValueError(f"lesion ids go up to {values.max()}, but there are {n} labels")
        counts += np.bincount(values, minlength=n + 1)
        for axis in range(3):
            sums[:, axis] += np.bincount(values, weights=index[:, axis], minlength=n + 1)
        positions = np.round(index @ matrix[:3, :3].T + matrix[:3, 3], 6)
        nearest = np.floor(positions + 0.5).astype(np.int64)
        seen = ((nearest >= 0) & (nearest < np.array(others.shape))).all(axis=1)
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
    if not counts[1:].all():
        raise ValueError("lesion ids skip a number: every label needs a lesion with voxels")
    return LesionsSeen(
        labels=scan.labels,
        volumes_mm3=counts[1:] * grid.voxel_volume_mm3,
        centroids_mm=grid.to_world_mm(sums[1:] / counts[1:, None]),
        covered=inside[1:] / counts[1:],
        shared_mm3={pair: count * grid.voxel_volume_mm3 for pair, count in overlaps.items()},
    )


def _slabs(numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of the array that hold all lesions, each with the index of its first voxel."""
    box = BoundingBox.around(numbers)
    if box is None:
        return
    part = numbers[box.slices]
    for slab in slabs_of(part, SLAB_VOXELS):
        if part[slab].any():
            yield part[slab], np.array(box.start) + [side.start for side in slab]


def overlapping(before: LesionsSeen, after: LesionsSeen) -> tuple[dict[Pair, float], list[Pair]]:
    """Return the shared volume in mm³ of overlapping pairs, and pairs with different labels."""
    same, different = {}, []
    for (b, f), volume in shared_mm3(before, after):
        if volume < MIN_FRACTION * min(before.volumes_mm3[b - 1], after.volumes_mm3[f - 1]):
            continue
        if before.labels[b - 1] == after.labels[f - 1]:
            same[b, f] = volume
        else:
            different.append((b, f))
    return same, different


def shared_mm3(before: LesionsSeen, after: LesionsSeen) -> list[tuple[Pair, float]]:
    """Return the shared volume in mm³ of all pairs, of any labels: the mean of both directions."""
    mm3: dict[Pair, float] = defaultdict(float)
    for (b, f), volume in before.shared_mm3.items():
        mm3[b, f] += volume / 2
    for (f, b), volume in after.shared_mm3.items():
        mm3[b, f] += volume / 2
    return sorted(mm3.items())


def confirmed_crumbs(
    before: LesionsSeen, after: LesionsSeen, candidates: tuple[Mapping[int, int], Mapping[int, int]]
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the candidates of each scan that the other scan confirms as crumbs.

    A candidate is a lesion of its own if it overlaps a lesion of the other scan that is not a
    candidate and that its own lesion does not overlap.
    """
    if not any(candidates):
        return {}, {}
    overlaps: tuple[dict[int, set[int]], dict[int, set[int]]] = defaultdict(set), defaultdict(set)
    for b, f in overlapping(before, after)[0]:
        overlaps[0][b].add(f)
        overlaps[1][f].add(b)

    def confirmed(side: int) -> dict[int, int]:
        other_wholes = {
            n: overlaps[side][n] - candidates[1 - side].keys()
            for n in {*candidates[side], *candidates[side].values()}
        }
        return {
            n: whole
            for n, whole in candidates[side].items()
            if other_wholes[n] <= other_wholes[whole]
        }

    return confirmed(0), confirmed(1)
