"""Crumbs: small pieces cut off from a lesion by missing voxels, numbered as lesions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from volseg.comparison.label_names import label_of
from volseg.comparison.targets import none_if_nan
from volseg.measurement.rows import LesionMeasurement
from volseg.volume import BoundingBox, slabs_of

# Between a crumb and its lesion, two voxels may be missing along an axis if they are at most 3 mm,
# and one voxel of any size.
GAP_VOXELS, GAP_MM = 2, 3.0
CRUMB_FRACTION = 0.1  # largest volume of a short crumb, as a fraction of its lesion's
CRUMB_MM = 10.0  # a piece with a shorter long axis is short: not measurable by RECIST
THIN_FRACTION = 1 / 3  # the same for a thin crumb: nowhere three voxels thick
ROUNDS = 2  # a crumb of a crumb belongs to the lesion, and so does the next
VOXELS_AT_ONCE, SLAB_VOXELS = 2**13, 2**20


def find_crumbs(
    ids: np.ndarray,
    lesions: Sequence[LesionMeasurement],
    spacing_mm: Sequence[float],
    *,
    voxels_at_once: int = VOXELS_AT_ONCE,
) -> dict[int, int]:
    """Find the lesions of a scan that are crumbs of a larger lesion.

    A crumb has the label of its lesion and lies beside it: along each axis, at most two voxels
    and 3 mm are missing between them, or one voxel of any size. It has at most a tenth of the
    lesion's volume and a long axis under 10 mm; or at most a third if it is nowhere three voxels
    thick. If several lesions qualify, it belongs to the largest. Pieces beside a crumb belong to
    the same lesion by the same rules.

    Args:
        ids: (I, J, K) lesion ids; n in the voxels of lesion n, 0 elsewhere.
        lesions: 1, 2, …, N.
        spacing_mm: voxel size along each axis of `ids`.
        voxels_at_once: voxels whose neighbours are looked up together; bounds the memory.

    Returns:
        Number of each crumb → number of its lesion.
    """
    sizes = np.array([0, *(lesion.n_voxels for lesion in lesions)], dtype=float)
    names = {name: n for n, name in enumerate(dict.fromkeys(map(label_of, lesions)))}
    labels = np.array([-1, *(names[label_of(lesion)] for lesion in lesions)])
    largest = np.zeros(len(names))
    np.maximum.at(largest, labels[1:], sizes[1:])
    is_small = np.zeros(len(sizes), bool)
    is_small[1:] = sizes[1:] <= THIN_FRACTION * largest[labels[1:]]
    if not is_small.any():
        return {}
    neighbours, is_thin = _neighbours(ids, is_small, _reach(spacing_mm), voxels_at_once)
    neighbours = neighbours[labels[neighbours[:, 0]] == labels[neighbours[:, 1]]]
    lengths_mm = np.array([0.0, *map(_length_mm, lesions)])
    limits = np.where(lengths_mm < CRUMB_MM, CRUMB_FRACTION, 0.0)
    limits[is_thin] = THIN_FRACTION
    parents = np.zeros(len(sizes), dtype=np.int64)
    crumbs_beside, wholes_beside = neighbours.T
    for _ in range(1 + ROUNDS):
        crumbs, wholes = crumbs_beside, wholes_beside
        roots = _roots(parents)[wholes]
        fits = (parents[crumbs] == 0) & (roots != crumbs)
        fits &= sizes[crumbs] <= limits[crumbs] * sizes[roots]
        crumbs, roots = crumbs[fits], roots[fits]
        order = np.lexsort((-roots, sizes[roots]))  # largest last; of equals, the first
        parents[crumbs[order]] = roots[order]
    roots = _roots(parents)
    return {n: int(roots[n]) for n in np.flatnonzero(parents).tolist()}


def _length_mm(lesion: LesionMeasurement) -> float:
    """Return the long axis, or if unknown, the diameter of a ball of the lesion's volume."""
    length_mm = none_if_nan(lesion.long_axis_mm)
    return length_mm if length_mm is not None else (6 * lesion.volume_mm3 / np.pi) ** (1 / 3)


def _reach(spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Return the largest offset in voxels of a neighbour along each axis."""
    i, j, k = (2 if GAP_VOXELS * mm > GAP_MM else 1 + GAP_VOXELS for mm in spacing_mm)
    return i, j, k


def _roots(parents: np.ndarray) -> np.ndarray:
    """Return (N + 1,) the last ancestor of each lesion; parents are always larger."""
    roots = np.arange(len(parents))
    while True:
        higher = np.where(parents[roots] > 0, parents[roots], roots)
        if np.array_equal(higher, roots):
            return roots
        roots = higher


def _neighbours(
    ids: np.ndarray, is_small: np.ndarray, reach: tuple[int, int, int], voxels_at_once: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the neighbours of small lesions, and the thin ones among these.

    Returns:
        (P, 2) pairs of a small lesion and one beside it; (N + 1,) bool, true for thin ones.
    """
    n, has_core = len(is_small), np.zeros(len(is_small), bool)
    keys: list[np.ndarray] = []
    for part in _parts(ids, reach):
        steps = np.array(part.strides) // part.itemsize
        values = part.ravel()
        inner = tuple(slice(margin, -margin) for margin in reach)
        index = np.argwhere(is_small[part[inner]]) + reach
        positions = index @ steps
        offsets = np.array(list(product(*(range(-m, m + 1) for m in reach)))) @ steps
        for start in range(0, len(positions), voxels_at_once):
            chunk = positions[start : start + voxels_at_once]
            numbers = values[chunk].astype(np.int64)
            is_inside = np.ones(len(chunk), bool)
            for step in (*steps, *-steps):
                is_inside &= values[chunk + step] == numbers
            has_core[numbers[is_inside]] = True
            chunk_keys = []
            for offset in offsets:
                others = values[chunk + offset].astype(np.int64)
                is_beside = (others > 0) & (others != numbers)
                chunk_keys.append(numbers[is_beside] * n + others[is_beside])
            keys.append(_distinct(chunk_keys))
    pairs = _distinct([*keys, np.zeros(0, dtype=np.int64)])
    return np.stack(np.divmod(pairs, n), axis=1), is_small & ~has_core


def _distinct(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sorted unique keys, ten times faster than `np.unique`, which hashes integers."""
    values = np.concatenate(keys)
    values.sort()
    is_first = np.ones(len(values), bool)
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def _parts(ids: np.ndarray, reach: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Yield slabs that hold all lesions, each with a margin of `reach`, 0 outside the scan."""
    box = BoundingBox.around(ids)
    if box is None:
        return
    boxed = ids[box.slices]
    for slab in slabs_of(boxed, SLAB_VOXELS):
        sides = list(zip(slab, reach, boxed.shape, strict=True))
        inner = tuple(slice(max(0, side.start - m), side.stop + m) for side, m, _ in sides)
        outer = [(max(0, m - side.start), max(0, side.stop + m - n)) for side, m, n in sides]
        yield np.ascontiguousarray(np.pad(boxed[inner], outer))
