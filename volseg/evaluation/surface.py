"""Distances between the surfaces of two masks, in millimetres."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from volseg.volume import BoundingBox, Geometry

PERCENTILE = 95
NEAR_VOXELS = 200  # nearest grid points tried one by one before a k-d tree is queried
LOOKED_UP_TOGETHER = 2**20  # border voxels per chunk: a noisy mask is all border
TREE_POINTS, ASKED_TOGETHER = 2**19, 2**18  # points per k-d tree, and per query of it
# Measured with benchmarks/noise.py.
WORKING = 110  # bytes per border voxel of a chunk
SLABS = 16 << 20  # bytes of mask slabs while borders are extracted
# above the rounding of float32 affines: a distance equal to the tolerance lies within it
SAME_DISTANCE_MM = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class SurfaceDistances:
    """Distances of one label from each border voxel of a mask to the other mask's border, in mm.

    Args:
        from_reference, from_predicted: (N,) and (M,), ascending; empty if the mask lacks the label,
            NaN if the other mask lacks it.
    """

    from_reference: np.ndarray
    from_predicted: np.ndarray

    @property
    def hd95_mm(self) -> float:
        """95th percentile Hausdorff distance, larger of both directions; NaN if a mask is empty."""
        if not self.from_reference.size or not self.from_predicted.size:
            return math.nan
        directions = (self.from_reference, self.from_predicted)
        return max(float(np.percentile(distances, PERCENTILE)) for distances in directions)

    @property
    def mean_mm(self) -> float:
        """Mean distance over the border voxels of both masks; NaN if a mask is empty."""
        n = self.from_reference.size + self.from_predicted.size
        return float(self.from_reference.sum() + self.from_predicted.sum()) / n if n else math.nan

    def nsd(self, tolerance_mm: float) -> float:
        """Return the normalised surface Dice (NSD) at a tolerance.

        It is the fraction of the border voxels of both masks that lie within the tolerance of the
        other border.

        Returns:
            From 0 to 1; 0 if one mask is empty; NaN if both are.

        Source: Nikolov et al., J Med Internet Res 23:e26151 (2021), with border voxels in place of
            surface elements.
        """
        n = self.from_reference.size + self.from_predicted.size
        limit_mm = tolerance_mm + SAME_DISTANCE_MM
        directions = (self.from_reference, self.from_predicted)
        n_within = sum(int(np.count_nonzero(distances <= limit_mm)) for distances in directions)
        return n_within / n if n else math.nan


NOWHERE = SurfaceDistances(np.empty(0), np.empty(0))  # for a label that neither mask has


def surface_distances(
    reference: np.ndarray, predicted: np.ndarray, geometry: Geometry
) -> dict[int, SurfaceDistances]:
    """Return the distances between the surfaces of two masks, for every label of either.

    A border voxel has a face neighbour that does not have its label; beyond the array no voxel
    does, except above and below a single slice. Distances are between voxel centres in world
    millimetres, rounded to 1e-9 mm. They use the whole affine, so they are right on oblique and
    sheared grids too.

    Args:
        reference, predicted: (I, J, K) label values, 0 is background, on the grid of `geometry`.

    Returns:
        Label → its distances; {} for two empty masks.
    """
    if reference.shape != predicted.shape or reference.shape != geometry.shape:
        raise ValueError(
            f"reference {reference.shape}, predicted {predicted.shape} and grid {geometry.shape} "
            "must have one shape"
        )
    masks = _cropped(reference, predicted, geometry)
    if masks is None:
        return {}
    truth, guess, to_mm, flat = masks
    steps, steps_mm = _nearest_steps(to_mm)
    margin = _margin(to_mm)
    true_border, guess_border = (_Border.of(mask, margin, flat) for mask in (truth, guess))
    forward_mm = _nearest_mm(true_border, guess_border, steps, steps_mm, to_mm)
    forward = _sorted_by_label(true_border.labels, forward_mm)
    del forward_mm
    backward_mm = _nearest_mm(guess_border, true_border, steps, steps_mm, to_mm)
    backward = _sorted_by_label(guess_border.labels, backward_mm)
    nothing = np.empty(0)
    return {
        label: SurfaceDistances(forward.get(label, nothing), backward.get(label, nothing))
        for label in sorted(forward.keys() | backward.keys())
    }


def surface_bytes(reference: np.ndarray, predicted: np.ndarray, geometry: Geometry) -> int:
    """Return an upper bound in bytes of what `surface_distances` needs beside these masks."""
    masks = _cropped(reference, predicted, geometry)
    if masks is None:
        return 0
    truth, guess, to_mm, flat = masks
    n_border = [
        sum(int(np.count_nonzero(part)) for _, part in _border_parts(mask, flat))
        for mask in (truth, guess)
    ]
    itemsizes = (truth.itemsize, guess.itemsize)
    return _bytes_of(truth.shape, _margin(to_mm), n_border, itemsizes)


def most_surface_bytes(geometry: Geometry, itemsize: int) -> int:
    """Return `surface_bytes` in the worst case, all voxels border; `itemsize`: bytes of a label."""
    n = math.prod(geometry.shape)
    return _bytes_of(geometry.shape, _margin(geometry.voxel_steps_mm), (n, n), (itemsize, itemsize))


def _bytes_of(
    shape: tuple[int, ...], margin: np.ndarray, n_border: Sequence[int], itemsizes: Sequence[int]
) -> int:
    """Return the peak in bytes: both borders, their distances, and a copy of these to sort them."""
    lattice = math.prod((np.array(shape) + 2 * margin).tolist())
    position = 4 if lattice < 2**31 else 8
    borders = sum(
        itemsize * lattice + (position + itemsize) * n
        for n, itemsize in zip(n_border, itemsizes, strict=True)
    )
    distances = 2 * 8 * sum(n_border)
    return borders + distances + WORKING * min(max(n_border), LOOKED_UP_TOGETHER) + SLABS


def _cropped(
    reference: np.ndarray, predicted: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int | None] | None:
    """Crop both masks to their common box, slowest axis in memory first; None if both are empty.

    The third array is (3, 3) voxel → mm, its columns in the same order of axes. The last value is
    the axis along which the grid has a single slice, if any.
    """
    box = _common_box(reference, predicted)
    if box is None:
        return None
    to_mm = geometry.voxel_steps_mm
    truth, guess = reference[box], predicted[box]
    flat = reference.shape.index(1) if 1 in reference.shape else None
    if not truth.flags.c_contiguous and truth.strides[0] < truth.strides[2]:
        return truth.T, guess.T, to_mm[:, ::-1], None if flat is None else 2 - flat
    return truth, guess, to_mm, flat


def _sorted_by_label(labels: np.ndarray, distances_mm: np.ndarray) -> dict[int, np.ndarray]:
    """Return the distances of each label, sorted so that sums do not depend on the voxel order."""
    by_label = {}
    for label in np.unique(labels).tolist():
        by_label[label] = distances_mm[labels == label]
        by_label[label].sort()
    return by_label


def _common_box(*masks: np.ndarray) -> tuple[slice, ...] | None:
    """Return the smallest box outside which all masks are 0; None if they are empty."""
    boxes = [box for box in map(BoundingBox.around, masks) if box is not None]
    if not boxes:
        return None
    start = np.min([box.start for box in boxes], axis=0)
    stop = np.max([box.stop for box in boxes], axis=0)
    return tuple(slice(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True))


def _margin(to_mm: np.ndarray) -> np.ndarray:
    """Return (3,) voxels of margin around a box that no step of `_nearest_steps` leaves."""
    return np.maximum(np.abs(_nearest_steps(to_mm)[0]).max(axis=0), 1)


def _nearest_steps(to_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (S, 3) index steps to the about 200 nearest grid points, and (S,) distances in mm."""
    radius_mm = (3 * NEAR_VOXELS * abs(np.linalg.det(to_mm)) / (4 * math.pi)) ** (1 / 3)
    reach = np.floor(np.linalg.norm(np.linalg.inv(to_mm), axis=1) * radius_mm).astype(int)
    offsets = np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij")
    steps = np.stack(offsets, axis=-1).reshape(-1, 3)
    distances_mm = np.round(np.linalg.norm(steps @ to_mm.T, axis=1), 9)
    near = np.flatnonzero(distances_mm <= radius_mm)
    order = near[np.argsort(distances_mm[near], kind="stable")]
    return steps[order], distances_mm[order]


@dataclass(frozen=True, slots=True, eq=False)
class _Border:
    """The border voxels of a mask inside a box with a margin.

    Args:
        shape: of the box with its margin.
        lattice: its voxels in C order: the label of border voxels, 0 elsewhere.
        positions, labels: (N,) index in the lattice and label of each border voxel.
    """

    shape: tuple[int, ...]
    lattice: np.ndarray
    positions: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, margin: np.ndarray, flat: int | None) -> _Border:
        shape = tuple((np.array(mask.shape) + 2 * margin).tolist())
        lattice = np.zeros(math.prod(shape), mask.dtype)
        box = tuple(slice(m, m + n) for m, n in zip(margin.tolist(), mask.shape, strict=True))
        inner = lattice.reshape(shape)[box]
        for part, is_border in _border_parts(mask, flat):
            np.copyto(inner[part], mask[part], where=is_border)
        dtype = np.int32 if lattice.size < 2**31 else np.int64
        positions = np.empty(np.count_nonzero(lattice), dtype)
        filled = 0
        for piece in _pieces(lattice.size, LOOKED_UP_TOGETHER):
            index = np.flatnonzero(lattice[piece])
            positions[filled : filled + index.size] = index + piece.start
            filled += index.size
        return cls(shape, lattice, positions, lattice[positions])

    def points_mm(self, index: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
        """Return (N, 3) mm of the border voxels at `index`, from the corner of the lattice."""
        # (3, 3) @ (3, N) takes a fortieth of the time of (N, 3) @ (3, 3).
        voxels = np.array(np.unravel_index(self.positions[index], self.shape), dtype=np.float64)
        return (to_mm @ voxels).T


def _border_parts(mask: np.ndarray, flat: int | None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slabs along the first axis and (n, J, K) bool: voxels whose face neighbour differs.

    Args:
        flat: axis along which the grid has a single slice, so that voxels have no neighbours.
    """
    inner = [slice(None) if axis == flat else slice(1, -1) for axis in (1, 2)]
    step = max(1, LOOKED_UP_TOGETHER // max(1, mask[0].size))
    for start in range(0, len(mask), step):
        part = slice(start, min(start + step, len(mask)))
        slab = mask[part]
        is_core = np.zeros(slab.shape, bool)
        low, high = max(1 - start, 0), min(len(mask) - 1 - start, len(slab))
        if flat == 0:
            low, high = 0, len(slab)
        is_core[low:high, inner[0], inner[1]] = True
        for axis in (1, 2):
            along = [slice(None)] * 3
            before, after = along.copy(), along.copy()
            before[axis], after[axis] = slice(None, -1), slice(1, None)
            is_same = slab[tuple(before)] == slab[tuple(after)]
            is_core[tuple(before)] &= is_same
            is_core[tuple(after)] &= is_same
        if flat != 0:
            is_core[low:] &= slab[low:] == mask[start + low - 1 : part.stop - 1]
            is_core[:high] &= slab[:high] == mask[start + 1 : start + high + 1]
        yield part, (slab != 0) & ~is_core


def _strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[1] * shape[2], shape[2], 1


def _nearest_mm(
    source: _Border, target: _Border, steps: np.ndarray, steps_mm: np.ndarray, to_mm: np.ndarray
) -> np.ndarray:
    """Return (N,) distances from `source` to the nearest `target` voxel of the label, else NaN.

    Good masks lie within a few voxels of each other, where stepping through the grid finds the
    nearest voxel several times as fast as a tree. The others are left to a tree per label.
    """
    nearest_mm = np.full(source.positions.size, np.nan)
    strides = np.array(_strides(source.shape))
    shells = list(_shells(steps @ strides, steps_mm))
    both, far_labels = np.intersect1d(source.labels, target.labels), set()
    for piece in _pieces(source.positions.size, LOOKED_UP_TOGETHER):
        waiting = np.flatnonzero(np.isin(source.labels[piece], both)) + piece.start
        positions, labels = source.positions[waiting].astype(np.int64), source.labels[waiting]
        for shell, distance_mm in shells:
            if not waiting.size:
                break
            is_met = np.zeros(waiting.size, bool)
            for step in shell:
                is_met |= target.lattice[positions + step] == labels
            nearest_mm[waiting[is_met]] = distance_mm
            waiting, positions, labels = waiting[~is_met], positions[~is_met], labels[~is_met]
        far_labels.update(labels.tolist())
    for label in sorted(far_labels):
        far = np.flatnonzero(np.isnan(nearest_mm) & (source.labels == label))
        nearest_mm[far] = np.inf
        of_label = np.flatnonzero(target.labels == label)
        for part in _pieces(of_label.size, TREE_POINTS):
            # For one round of queries, balancing and tight boxes cost more than they save.
            tree = KDTree(
                target.points_mm(of_label[part], to_mm), balanced_tree=False, compact_nodes=False
            )
            for piece in _pieces(far.size, ASKED_TOGETHER):
                queried = far[piece]
                apart_mm = np.round(tree.query(source.points_mm(queried, to_mm))[0], 9)
                nearest_mm[queried] = np.minimum(nearest_mm[queried], apart_mm)
    return nearest_mm


def _pieces(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _shells(steps: np.ndarray, distances_mm: np.ndarray) -> Iterator[tuple[list[int], float]]:
    """Yield the steps of each length together, shortest first."""
    ends = np.append(np.flatnonzero(np.diff(distances_mm)) + 1, len(steps))
    start = 0
    for end in ends.tolist():
        yield steps[start:end].tolist(), float(distances_mm[start])
        start = end
