"""How far the surfaces of two masks lie apart, in millimetres."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from volseg.volume import BoundingBox, Geometry

PERCENTILE = 95
NEAR_VOXELS = 200  # nearest grid points that are looked at one by one before a k-d tree is asked
LOOKED_UP_TOGETHER = 2**20  # border voxels: a noisy mask is all border
TREE_POINTS, ASKED_TOGETHER = 2**19, 2**18  # points of a k-d tree, and of those that ask it
# Measured with benchmarks/noise.py.
WORKING = 110  # bytes per border voxel of those that are looked up together
SLABS = 16 << 20  # of the masks, while their borders are found
SAME_DISTANCE_MM = (
    1e-4  # over the rounding of float32 affines: a distance that is the tolerance lies within it
)


@dataclass(frozen=True, slots=True, eq=False)
class SurfaceDistances:
    """Of one label: from each border voxel of a mask to the nearest border voxel of the other one, in mm.

    Args:
        from_reference, from_predicted: (N,) and (M,), ascending; empty where the mask lacks the label, NaN where the other mask does.
    """

    from_reference: np.ndarray
    from_predicted: np.ndarray

    @property
    def hd95_mm(self) -> float:
        """95th percentile Hausdorff distance: the larger of the 95th percentiles of the two directions; NaN if a mask is empty."""
        if not self.from_reference.size or not self.from_predicted.size:
            return math.nan
        return max(
            float(np.percentile(each, PERCENTILE))
            for each in (self.from_reference, self.from_predicted)
        )

    @property
    def mean_mm(self) -> float:
        """Mean over the border voxels of both masks; NaN if a mask is empty."""
        n = self.from_reference.size + self.from_predicted.size
        return float(self.from_reference.sum() + self.from_predicted.sum()) / n if n else math.nan

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: share of the border voxels of both masks that lie within the tolerance of the other border.

        Returns:
            From 0 to 1; 0 if one mask is empty, since nothing of the other one's border is then near; NaN if both are.

        Source: Nikolov et al., J Med Internet Res 23:e26151 (2021), with border voxels in place of their surface elements.
        """
        n = self.from_reference.size + self.from_predicted.size
        within = sum(
            int(np.count_nonzero(each <= tolerance_mm + SAME_DISTANCE_MM))
            for each in (self.from_reference, self.from_predicted)
        )
        return within / n if n else math.nan


NOWHERE = SurfaceDistances(np.empty(0), np.empty(0))  # of a label that neither mask has


def surface_distances(
    reference: np.ndarray, predicted: np.ndarray, geometry: Geometry
) -> dict[int, SurfaceDistances]:
    """Distances between the surfaces of two masks, for every label of either.

    A border voxel is a voxel of the label with a neighbour across a face that is not of it; outside of the array nothing
    is of it. Distances go from voxel centre to voxel centre in world millimetres, to 1e-9 mm: through the whole affine, so
    that they are right on oblique and sheared grids too.

    Args:
        reference, predicted: (I, J, K) label values, 0 is background, on the grid of `geometry`.

    Returns:
        Label → its distances; {} for two empty masks.
    """
    if reference.shape != predicted.shape or reference.shape != geometry.shape:
        raise ValueError(
            f"shapes differ: {reference.shape}, {predicted.shape}, and {geometry.shape} of the grid"
        )
    masks = _cropped(reference, predicted, geometry)
    if masks is None:
        return {}
    first, second, to_mm = masks
    steps, steps_mm = _nearest_steps(to_mm)
    margin = _margin(to_mm)
    one, other = _Border.of(first, margin), _Border.of(second, margin)
    there = _sorted_by_label(one.labels, _nearest_mm(one, other, steps, steps_mm, to_mm))
    back = _sorted_by_label(other.labels, _nearest_mm(other, one, steps, steps_mm, to_mm))
    nothing = np.empty(0)
    return {
        label: SurfaceDistances(there.get(label, nothing), back.get(label, nothing))
        for label in sorted(there.keys() | back.keys())
    }


def surface_bytes(reference: np.ndarray, predicted: np.ndarray, geometry: Geometry) -> int:
    """Most memory that `surface_distances` of these masks takes beside them: from the number of their border voxels."""
    masks = _cropped(reference, predicted, geometry)
    if masks is None:
        return 0
    first, second, to_mm = masks
    n_first, n_second = (
        sum(int(np.count_nonzero(part)) for _, part in _border_parts(mask))
        for mask in (first, second)
    )
    return _bytes_of(
        first.shape, _margin(to_mm), (n_first, n_second), (first.itemsize, second.itemsize)
    )


def most_surface_bytes(geometry: Geometry, itemsize: int) -> int:
    """The same for any two masks on a grid: all their voxels may be border. `itemsize`: of a label, in bytes."""
    n = math.prod(geometry.shape)
    return _bytes_of(geometry.shape, _margin(geometry.affine[:3, :3]), (n, n), (itemsize, itemsize))


def _bytes_of(
    shape: tuple[int, ...],
    margin: np.ndarray,
    n_border: tuple[int, int],
    itemsizes: tuple[int, int],
) -> int:
    """Peak in bytes: lattices, positions and labels of both borders; distances, and as much again to sort them or where they are far."""
    lattice = math.prod((np.array(shape) + 2 * margin).tolist())
    position = 4 if lattice < 2**31 else 8
    held = sum(
        itemsize * lattice + (position + itemsize) * n
        for n, itemsize in zip(n_border, itemsizes, strict=True)
    )
    distances = 2 * 8 * sum(n_border)
    return held + distances + WORKING * min(max(n_border), LOOKED_UP_TOGETHER) + SLABS


def _cropped(
    reference: np.ndarray, predicted: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Both masks where either is not 0, slowest axis first as they lie in memory, and (3, 3) voxel → mm; None for empty ones."""
    box = _box_round(reference, predicted)
    if box is None:
        return None
    to_mm = geometry.affine[:3, :3]
    first, second = reference[box], predicted[box]
    if not first.flags.c_contiguous and first.strides[0] < first.strides[2]:
        return first.T, second.T, to_mm[:, ::-1]
    return first, second, to_mm


def _sorted_by_label(labels: np.ndarray, distances_mm: np.ndarray) -> dict[int, np.ndarray]:
    """Label → its distances, ascending, so that sums do not depend on the order in which the voxels are stored."""
    found = {}
    for label in np.unique(labels).tolist():
        found[label] = distances_mm[labels == label]
        found[label].sort()
    return found


def _box_round(*masks: np.ndarray) -> tuple[slice, ...] | None:
    """Where any mask is not 0: nothing else is looked at."""
    boxes = [box for box in map(BoundingBox.around, masks) if box is not None]
    if not boxes:
        return None
    start = np.min([box.start for box in boxes], axis=0)
    stop = np.max([box.stop for box in boxes], axis=0)
    return tuple(slice(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True))


def _margin(to_mm: np.ndarray) -> np.ndarray:
    """(3,) voxels round a box that no step of `_nearest_steps` leaves."""
    return np.maximum(np.abs(_nearest_steps(to_mm)[0]).max(axis=0), 1)


def _nearest_steps(to_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S, 3) index steps to the grid points nearest to one, about 200 in order of their distance, and (S,) that distance in mm."""
    radius_mm = (3 * NEAR_VOXELS * abs(np.linalg.det(to_mm)) / (4 * math.pi)) ** (1 / 3)
    reach = np.floor(np.linalg.norm(np.linalg.inv(to_mm), axis=1) * radius_mm).astype(int)
    steps = np.stack(
        np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    distances_mm = np.round(np.linalg.norm(steps @ to_mm.T, axis=1), 9)
    near = np.flatnonzero(distances_mm <= radius_mm)
    order = near[np.argsort(distances_mm[near], kind="stable")]
    return steps[order], distances_mm[order]


@dataclass(frozen=True, slots=True, eq=False)
class _Border:
    """The border voxels of a mask inside a box with a margin.

    Args:
        shape: of the box with its margin. lattice: its voxels in C order: the label in a border voxel, 0 elsewhere.
        positions, labels: (N,) of the border voxels, in the lattice.
    """

    shape: tuple[int, ...]
    lattice: np.ndarray
    positions: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, margin: np.ndarray) -> _Border:
        shape = tuple((np.array(mask.shape) + 2 * margin).tolist())
        lattice = np.zeros(math.prod(shape), mask.dtype)
        inner = lattice.reshape(shape)[
            tuple(slice(m, m + n) for m, n in zip(margin.tolist(), mask.shape, strict=True))
        ]
        for part, is_border in _border_parts(mask):
            np.copyto(inner[part], mask[part], where=is_border)
        positions = np.empty(
            np.count_nonzero(lattice), np.int32 if lattice.size < 2**31 else np.int64
        )
        filled = 0
        for piece in _pieces(lattice.size, LOOKED_UP_TOGETHER):
            some = np.flatnonzero(lattice[piece])
            positions[filled : filled + some.size] = some + piece.start
            filled += some.size
        return cls(shape, lattice, positions, lattice[positions])

    def points_mm(self, chosen: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
        """(N, 3) mm from the corner of the lattice."""
        # (3, 3) @ (3, N) takes a fortieth of the time of (N, 3) @ (3, 3).
        return (
            to_mm @ np.array(np.unravel_index(self.positions[chosen], self.shape), dtype=np.float64)
        ).T


def _border_parts(mask: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slabs along the first axis, each with (n, J, K) bool: where the mask has a label that a neighbour across a face has not."""
    step = max(1, LOOKED_UP_TOGETHER // max(1, mask[0].size))
    for start in range(0, len(mask), step):
        part = slice(start, min(start + step, len(mask)))
        slab = mask[part]
        is_core = np.zeros(slab.shape, bool)
        low, high = max(1 - start, 0), min(len(mask) - 1 - start, len(slab))
        is_core[low:high, 1:-1, 1:-1] = True
        for axis in (1, 2):
            along = [slice(None)] * 3
            before, after = along.copy(), along.copy()
            before[axis], after[axis] = slice(None, -1), slice(1, None)
            is_same = slab[tuple(before)] == slab[tuple(after)]
            is_core[tuple(before)] &= is_same
            is_core[tuple(after)] &= is_same
        is_core[low:] &= slab[low:] == mask[start + low - 1 : part.stop - 1]
        is_core[:high] &= slab[:high] == mask[start + 1 : start + high + 1]
        yield part, (slab != 0) & ~is_core


def _strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[1] * shape[2], shape[2], 1


def _nearest_mm(
    one: _Border, other: _Border, steps: np.ndarray, steps_mm: np.ndarray, to_mm: np.ndarray
) -> np.ndarray:
    """(N,) distance of each border voxel of `one` to the nearest of its label in `other`; NaN where that has none.

    Two good masks lie within a few voxels of each other, where stepping through the grid finds the nearest voxel several
    times as fast as a tree; what is farther away is left to a tree per label.
    """
    nearest_mm = np.full(one.positions.size, np.nan)
    strides = np.array(_strides(one.shape))
    shells = list(_shells(steps @ strides, steps_mm))
    both, far_away = np.intersect1d(one.labels, other.labels), set()
    for piece in _pieces(one.positions.size, LOOKED_UP_TOGETHER):
        waiting = np.flatnonzero(np.isin(one.labels[piece], both)) + piece.start
        positions, labels = one.positions[waiting].astype(np.int64), one.labels[waiting]
        for shell, distance_mm in shells:
            if not waiting.size:
                break
            is_met = np.zeros(waiting.size, bool)
            for step in shell:
                is_met |= other.lattice[positions + step] == labels
            nearest_mm[waiting[is_met]] = distance_mm
            waiting, positions, labels = waiting[~is_met], positions[~is_met], labels[~is_met]
        far_away.update(labels.tolist())
    for label in sorted(far_away):
        far = np.flatnonzero(np.isnan(nearest_mm) & (one.labels == label))
        nearest_mm[far] = np.inf
        theirs = np.flatnonzero(other.labels == label)
        for part in _pieces(theirs.size, TREE_POINTS):
            # Neither a balanced tree nor tight boxes repay what they cost to make for one round of questions.
            tree = KDTree(
                other.points_mm(theirs[part], to_mm), balanced_tree=False, compact_nodes=False
            )
            for piece in _pieces(far.size, ASKED_TOGETHER):
                some = far[piece]
                apart_mm = np.round(tree.query(one.points_mm(some, to_mm))[0], 9)
                nearest_mm[some] = np.minimum(nearest_mm[some], apart_mm)
    return nearest_mm


def _pieces(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _shells(steps: np.ndarray, distances_mm: np.ndarray) -> Iterator[tuple[list[int], float]]:
    """The steps of one length together, from the shortest."""
    ends = np.append(np.flatnonzero(np.diff(distances_mm)) + 1, len(steps))
    start = 0
    for end in ends.tolist():
        yield steps[start:end].tolist(), float(distances_mm[start])
        start = end
