"""Crumbs: small pieces of a lesion that missing voxels cut off, numbered as lesions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from volseg.measure.rows import LesionMeasurement
from volseg.measure.targets import known, label_of
from volseg.volume import BoundingBox, slabs_of

GAP_VOXELS = 2  # that may be missing along an axis between a crumb and its lesion,
GAP_MM = 3.0  # if they are no more than this; one voxel may always be missing
CRUMB_SHARE = 0.1  # of the lesion's volume, up to which a short piece is a crumb of it
CRUMB_MM = 10.0  # long axis from which a piece is not short: that of a measurable lesion
THIN_SHARE = 1 / 3  # the same share for a thin piece: one that is nowhere three voxels thick
ROUNDS = 2  # a crumb of a crumb is one of the lesion, and so is the next
VOXELS_AT_ONCE, SLAB_VOXELS = 2**13, 2**20


def find_crumbs(
    ids: np.ndarray,
    lesions: Sequence[LesionMeasurement],
    spacing_mm: Sequence[float],
    *,
    voxels_at_once: int = VOXELS_AT_ONCE,
) -> dict[int, int]:
    """Find the lesions of a scan that are crumbs of another one, and of which.

    A crumb has the label of its lesion and lies beside it: along each axis at most two voxels
    and 3 mm are missing between them, or one voxel of whatever size. It has at most a tenth of
    the lesion's volume and a long axis under 10 mm, or it is nowhere three voxels thick and has
    at most a third. Of several such lesions it belongs to the largest. What lies beside a crumb
    in the same way belongs to the same lesion.

    Args:
        ids: (I, J, K) lesion ids; n in the voxels of lesion n, 0 elsewhere.
        lesions: 1, 2, …, N.
        spacing_mm: distance of voxels along each axis of `ids`.
        voxels_at_once: whose neighbours are looked up together, which bounds the memory.
    """
    sizes = np.array([0, *(lesion.n_voxels for lesion in lesions)], dtype=float)
    names = {name: n for n, name in enumerate(dict.fromkeys(map(label_of, lesions)))}
    labels = np.array([-1, *(names[label_of(lesion)] for lesion in lesions)])
    largest = np.zeros(len(names))
    np.maximum.at(largest, labels[1:], sizes[1:])
    is_small = np.zeros(len(sizes), bool)
    is_small[1:] = sizes[1:] <= THIN_SHARE * largest[labels[1:]]
    if not is_small.any():
        return {}
    neighbours, is_thin = _neighbours(ids, is_small, _reach(spacing_mm), voxels_at_once)
    neighbours = neighbours[labels[neighbours[:, 0]] == labels[neighbours[:, 1]]]
    lengths_mm = np.array([0.0, *map(_length_mm, lesions)])
    limits = np.where(lengths_mm < CRUMB_MM, CRUMB_SHARE, 0.0)
    limits[is_thin] = THIN_SHARE
    parents = np.zeros(len(sizes), dtype=np.int64)
    crumbs_beside, wholes_beside = neighbours.T
    for _ in range(1 + ROUNDS):
        crumbs, wholes = crumbs_beside, wholes_beside
        roots = _roots(parents)[wholes]
        fits = (parents[crumbs] == 0) & (roots != crumbs)
        fits &= sizes[crumbs] <= limits[crumbs] * sizes[roots]
        crumbs, roots = crumbs[fits], roots[fits]
        order = np.lexsort((-roots, sizes[roots]))  # the largest last, and of equals the first
        parents[crumbs[order]] = roots[order]
    roots = _roots(parents)
    return {n: int(roots[n]) for n in np.flatnonzero(parents).tolist()}


def _length_mm(lesion: LesionMeasurement) -> float:
    """The long axis; of a lesion that has none the diameter of the ball of its volume."""
    length_mm = known(lesion.long_axis_mm)
    return length_mm if length_mm is not None else (6 * lesion.volume_mm3 / np.pi) ** (1 / 3)


def _reach(spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """How many voxels off along each axis a neighbour may lie."""
    i, j, k = (2 if GAP_VOXELS * mm > GAP_MM else 1 + GAP_VOXELS for mm in spacing_mm)
    return i, j, k


def _roots(parents: np.ndarray) -> np.ndarray:
    """(N + 1,) for each lesion the one at the end of its chain; parents are always larger."""
    roots = np.arange(len(parents))
    while True:
        higher = np.where(parents[roots] > 0, parents[roots], roots)
        if np.array_equal(higher, roots):
            return roots
        roots = higher


def _neighbours(
    ids: np.ndarray,
    is_small: np.ndarray,
    reach: tuple[int, int, int],
    voxels_at_once: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(P, 2) small lesions with each lesion that lies beside them, and (N + 1,) bool, which of
    the small ones are thin."""
    n, has_core = len(is_small), np.zeros(len(is_small), bool)
    keys: list[np.ndarray] = []
    for part in _parts(ids, reach):
        steps = np.array(part.strides) // part.itemsize
        values = part.ravel()
        inner = tuple(slice(by, -by) for by in reach)
        index = np.argwhere(is_small[part[inner]]) + reach
        places = index @ steps
        offsets = np.array(list(product(*(range(-by, by + 1) for by in reach)))) @ steps
        for start in range(0, len(places), voxels_at_once):
            some = places[start : start + voxels_at_once]
            numbers = values[some].astype(np.int64)
            is_inside = np.ones(len(some), bool)
            for step in (*steps, *-steps):
                is_inside &= values[some + step] == numbers
            has_core[numbers[is_inside]] = True
            together = []
            for offset in offsets:
                others = values[some + offset].astype(np.int64)
                beside = (others > 0) & (others != numbers)
                together.append(numbers[beside] * n + others[beside])
            keys.append(_distinct(together))
    pairs = _distinct([*keys, np.zeros(0, dtype=np.int64)])
    return np.stack(np.divmod(pairs, n), axis=1), is_small & ~has_core


def _distinct(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Sorted, each once; NumPy's `unique` hashes whole numbers, which takes ten times as long."""
    values = np.concatenate(keys)
    values.sort()
    is_first = np.ones(len(values), bool)
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def _parts(ids: np.ndarray, reach: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Slabs that hold all lesions, each with a rim of its surroundings; zeros beyond the scan."""
    box = BoundingBox.around(ids)
    if box is None:
        return
    held = ids[box.slices]
    for slab in slabs_of(held, SLAB_VOXELS):
        starts = [side.start - by for side, by in zip(slab, reach, strict=True)]
        stops = [side.stop + by for side, by in zip(slab, reach, strict=True)]
        part = np.zeros(
            [stop - start for start, stop in zip(starts, stops, strict=True)], ids.dtype
        )
        source, target = [], []
        for start, stop, size in zip(starts, stops, held.shape, strict=True):
            low, high = max(0, start), min(stop, size)
            source.append(slice(low, high))
            target.append(slice(low - start, high - start))
        part[tuple(target)] = held[tuple(source)]
        yield part
