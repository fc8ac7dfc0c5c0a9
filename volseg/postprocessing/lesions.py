"""Mask → numbered lesions, in an order independent of how the scan is stored."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from volseg.errors import VolsegError
from volseg.postprocessing.components import (
    PIECE,
    Components,
    Connectivity,
    by_size,
    find_components,
    relabel,
)
from volseg.volume import BoundingBox, Geometry, slabs_of

Objects = Literal["components", "labels"]
CONNECTIVITY: Connectivity = 26  # default
MANY = 10_000  # a mask with more lesions looks like noise
SUMMED_VOXELS = 2**20  # voxels per step
# Above the rounding of float32 affines in headers, below any distance between two lesions.
SAME_PLACE_MM = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Lesions:
    """The lesions of a mask; lesion n is at index n - 1 of each list.

    Args:
        ids: (I, J, K) uint16, or uint32 above 65 535 lesions; n in the voxels of lesion n, else 0.
        labels: mask value of each lesion; a list, or for many lesions an `array`.
        n_voxels: size of each lesion, in the same type.
        connectivity: neighbours of a voxel in a lesion; None if it is all voxels of a label.
    """

    ids: np.ndarray
    labels: Sequence[int]
    n_voxels: Sequence[int]
    connectivity: Connectivity | None = None


def label_lesions(
    mask: np.ndarray,
    geometry: Geometry,
    *,
    objects: Objects = "components",
    connectivity: Connectivity = CONNECTIVITY,
    many: int = MANY,
) -> Lesions:
    """Number the lesions of a mask.

    Args:
        mask: (I, J, K) whole numbers; every value but 0 is a label.
        geometry: grid of the mask.
        objects: `components`: a lesion is a connected component of voxels of one label; 1 is the
            largest of all labels, and equal sizes are ordered by centroid (R, then A, then S in
            mm), then by label. `labels`: a lesion is all voxels of one label, in ascending order.
        connectivity: 6, 18 or 26 neighbours of a voxel; ignored for `labels`.
        many: above this number, lesions of equal size are ordered by their first voxel in the
            patient instead of their centroid.

    Returns:
        The same numbers for all 48 axis orders of a scan, unless two lesions have the same size,
        label and centroid to 1e-3 mm. No lesions for an empty mask.

    Raises:
        VolsegError: `objects` or `connectivity` is unknown; there is more than one component per
            five voxels (E_SPECKS).
        ValueError: the mask is not of whole numbers, or its shape differs from its geometry.

    Memory: 4 bytes per voxel of the box of all lesions + 60 MB + about 17 bytes per component.
    """
    _check(mask, geometry, objects, connectivity)
    layout = "F" if mask.flags.f_contiguous else "C"
    box = BoundingBox.around(mask)
    if box is None:
        ids = np.zeros(mask.shape, np.uint16, order=layout)
        return Lesions(ids, [], [], connectivity if objects == "components" else None)
    if objects == "labels":
        return _one_per_label(mask, box, layout, many)
    components = find_components(mask, geometry, connectivity=connectivity, box=box)
    n = len(components)
    dtype = np.uint16 if n <= np.iinfo(np.uint16).max else np.uint32
    table = by_size(components.sizes) if n > many else _by_centroid(components, geometry, box)
    labels, n_voxels = (
        _listed(_reordered(values[1:], table), many)
        for values in (components.values, components.sizes)
    )
    return Lesions(relabel(components, table, dtype), labels, n_voxels, connectivity)


def _reordered(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the values of components in the order of their new numbers."""
    reordered = np.empty_like(values)
    reordered[table[1:] - 1] = values
    return reordered


def _listed(values: np.ndarray, many: int) -> Sequence[int]:
    """Return a list, or for many values an `array`, which takes 4 or 8 bytes per value."""
    if len(values) <= many:
        return values.tolist()
    fits = values.min() >= np.iinfo(np.int32).min and values.max() <= np.iinfo(np.int32).max
    listed, dtype = array("i" if fits else "q"), np.int32 if fits else np.int64
    for start in range(0, len(values), PIECE):
        listed.frombytes(values[start : start + PIECE].astype(dtype).tobytes())
    return listed


def stable_voxel_mm3(geometry: Geometry) -> float:
    """Return the voxel volume to 12 digits, since |det A| differs in its last bit by axis order."""
    return float(f"{geometry.voxel_volume_mm3:.12g}")


def centres_mm(indices: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Convert mean voxel indices (N, 3) to RAS mm (N, 3), rounded to 1e-9 mm.

    The last bits differ between axis orders. Without rounding they would decide the last printed
    digit of a centroid such as 0.24415 mm, and the sign of a centroid at 0.
    """
    return np.round(geometry.to_world_mm(indices), 9) + 0.0


def equivalent_diameter_mm(volume_mm3: float) -> float:
    """Return the diameter in mm of the ball with the given volume: V = π d³ / 6.

    >>> round(equivalent_diameter_mm(523.6), 2)
    10.0
    """
    return (6 * volume_mm3 / np.pi) ** (1 / 3)


def remove_organ(mask: np.ndarray, organ: int) -> tuple[np.ndarray, int]:
    """Return the mask without the label of the organ around the lesions, and its voxel count."""
    lesions, n_organ = mask.copy(order="K"), 0
    for part in slabs_of(mask):
        is_organ = mask[part] == organ
        lesions[part][is_organ] = 0
        n_organ += int(np.count_nonzero(is_organ))
    return lesions, n_organ


def _check(mask: np.ndarray, geometry: Geometry, objects: str, connectivity: int) -> None:
    if objects not in get_args(Objects):
        raise VolsegError(
            f"objects = {objects!r} is unknown", fix=f"choose one of {', '.join(get_args(Objects))}"
        )
    if connectivity not in get_args(Connectivity):
        raise VolsegError(
            f"connectivity = {connectivity} is unknown",
            fix="choose 6, 18 or 26 neighbours of a voxel",
        )
    if mask.dtype.kind not in "biu":
        raise ValueError(f"mask must have whole numbers, got {mask.dtype}")
    if mask.shape != geometry.shape:
        raise ValueError(f"mask has shape {mask.shape}, its geometry {geometry.shape}")


def _by_centroid(components: Components, geometry: Geometry, box: BoundingBox) -> np.ndarray:
    """Return the number (N + 1,) of each component: by size, then centroid, then label."""
    n = len(components)
    part = components.ids[box.slices]
    sums = np.zeros((3, n + 1))
    for slab in slabs_of(part, SUMMED_VOXELS):
        numbers = components.number[part[slab]]
        index = np.nonzero(numbers)
        inside = numbers[index]
        for axis in range(3):
            sums[axis] += np.bincount(inside, index[axis] + slab[axis].start, minlength=n + 1)
    centroids = (sums[:, 1:] / components.sizes[1:]).T
    values = components.values[1:].astype(np.int64)
    sizes = components.sizes[1:].astype(np.int64)
    ranking = _ranking(sizes, geometry.crop(box).to_world_mm(centroids), values)
    table = np.zeros(n + 1, np.uint32)
    table[ranking + 1] = np.arange(1, n + 1)
    return table


def _one_per_label(
    mask: np.ndarray, box: BoundingBox, layout: Literal["C", "F"], many: int
) -> Lesions:
    """Return one lesion per mask value, in ascending order."""
    part = mask[box.slices]
    labels, n_voxels = _counted(part)
    dtype = np.uint16 if labels.size <= np.iinfo(np.uint16).max else np.uint32
    ids = np.zeros(mask.shape, dtype, order=layout)
    part_ids = ids[box.slices]
    for slab in slabs_of(part, SUMMED_VOXELS):
        values = part[slab]
        part_ids[slab] = np.where(values == 0, 0, np.searchsorted(labels, values) + 1)
    return Lesions(ids, _listed(labels, many), _listed(n_voxels, many))


def _counted(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending values of a mask other than 0, and the voxels of each."""
    labels, n_voxels = np.empty(0, part.dtype), np.empty(0, np.int64)
    for slab in slabs_of(part, SUMMED_VOXELS):
        values, counts = np.unique(part[slab], return_counts=True)
        index = np.searchsorted(labels, values)
        is_old = index < len(labels)
        is_old[is_old] = labels[index[is_old]] == values[is_old]
        n_voxels[index[is_old]] += counts[is_old]
        is_new = ~is_old & (values != 0)
        labels = np.insert(labels, index[is_new], values[is_new])
        n_voxels = np.insert(n_voxels, index[is_new], counts[is_new])
    return labels, n_voxels


def _ranking(n_voxels: np.ndarray, centroids_mm: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the indices of the lesions sorted by descending size, then centroid, then label."""
    r, a, s = (_rank(coordinate) for coordinate in centroids_mm.T)
    return np.lexsort((labels, s, a, r, -n_voxels))


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value; successive values within 1e-3 mm have the same rank.

    Rounding to 1e-3 mm would not do: it would separate equal values near half a step, whose last
    bits differ between axis orders.
    """
    order = np.argsort(values)
    ranks = np.empty(values.size, np.int64)
    ranks[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > SAME_PLACE_MM)])
    return ranks
