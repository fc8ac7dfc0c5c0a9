"""Mask → numbered lesions, in an order that does not depend on how the scan is stored."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from volseg.errors import VolsegError
from volseg.postprocess.components import (
    PIECE,
    Components,
    Connectivity,
    by_size,
    find_components,
    relabel,
)
from volseg.volume import BoundingBox, Geometry, slabs_of

Objects = Literal["components", "labels"]
CONNECTIVITY: Connectivity = 26  # unless told otherwise
MANY = 10_000  # lesions of one scan, over which a mask looks like noise
SUMMED_VOXELS = 2**20  # of a slab whose indices are summed
SAME_PLACE_MM = 1e-3  # over the rounding of float32 affines in file headers, under any distance between two lesions


@dataclass(frozen=True, slots=True, eq=False)
class Lesions:
    """The lesions of a mask; lesion n stands at position n - 1 of each list.

    Args:
        ids: (I, J, K) uint16, uint32 above 65 535 lesions; n in the voxels of lesion n, 0 elsewhere.
        labels: value which the lesion has in the mask; a list, or of many lesions an `array`.
        n_voxels: size of the lesion; as `labels`.
    """

    ids: np.ndarray
    labels: Sequence[int]
    n_voxels: Sequence[int]


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
        objects: `components`: a lesion is a connected component of voxels of one label; 1 is the largest of all
            labels, and equal sizes are ordered by centroid (R, then A, then S in mm), then by label.
            `labels`: a lesion is all voxels of one label; numbered by ascending label.
        connectivity: 6, 18 or 26 neighbours of a voxel; without meaning for `labels`.
        many: of more lesions those of equal size are ordered by their first voxel in the patient, not by centroid.

    Returns:
        The same lesions under the same numbers for all 48 axis orders of a scan, unless two lesions share size, label
        and centroid to 1e-3 mm. No lesions for an empty mask.

    Raises:
        VolsegError: `objects` or `connectivity` is unknown; there are more components than one per five voxels (E_SPECKS).
        ValueError: the mask has no whole numbers, or another shape than its geometry.

    Memory: 4 bytes per voxel of the box of all lesions, some 60 MB, and about 17 bytes per component.
    """
    _check(mask, geometry, objects, connectivity)
    layout = "F" if mask.flags.f_contiguous else "C"
    box = BoundingBox.around(mask)
    if box is None:
        return Lesions(np.zeros(mask.shape, np.uint16, order=layout), [], [])
    if objects == "labels":
        return _one_per_label(mask, box, layout, many)
    components = find_components(mask, geometry, connectivity=connectivity, box=box)
    n = len(components)
    dtype = np.uint16 if n <= np.iinfo(np.uint16).max else np.uint32
    table = by_size(components.sizes) if n > many else _by_centroid(components, geometry, box)
    labels, n_voxels = (
        _listed(_placed(values[1:], table), many)
        for values in (components.values, components.sizes)
    )
    return Lesions(relabel(components, table, dtype), labels, n_voxels)


def _placed(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The value of each component at the place of its number."""
    placed = np.empty_like(values)
    placed[table[1:] - 1] = values
    return placed


def _listed(placed: np.ndarray, many: int) -> Sequence[int]:
    """As a list, or of many as an `array`, whose numbers take 4 or 8 bytes each."""
    if len(placed) <= many:
        return placed.tolist()
    fits = placed.min() >= np.iinfo(np.int32).min and placed.max() <= np.iinfo(np.int32).max
    listed = array("i" if fits else "q")
    for start in range(0, len(placed), PIECE):
        listed.frombytes(
            placed[start : start + PIECE].astype(np.int32 if fits else np.int64).tobytes()
        )
    return listed


def without_organ(mask: np.ndarray, organ: int) -> tuple[np.ndarray, int]:
    """The mask without the label of the organ in which the lesions lie, and the number of its voxels."""
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
        raise ValueError(f"label values are whole numbers, got a mask of {mask.dtype}")
    if mask.shape != geometry.shape:
        raise ValueError(f"mask has shape {mask.shape}, its geometry {geometry.shape}")


def _by_centroid(components: Components, geometry: Geometry, box: BoundingBox) -> np.ndarray:
    """(N + 1,) number of each component: the largest first, then by place in the patient, then by label."""
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
    """A lesion per value of the mask, by ascending value."""
    part = mask[box.slices]
    labels, n_voxels = _counted(part)
    ids = np.zeros(
        mask.shape, np.uint16 if labels.size <= np.iinfo(np.uint16).max else np.uint32, order=layout
    )
    part_ids = ids[box.slices]
    for slab in slabs_of(part, SUMMED_VOXELS):
        values = part[slab]
        part_ids[slab] = np.where(values == 0, 0, np.searchsorted(labels, values) + 1)
    return Lesions(ids, _listed(labels, many), _listed(n_voxels, many))


def _counted(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a mask but 0, ascending, and the voxels of each."""
    labels, n_voxels = np.empty(0, part.dtype), np.empty(0, np.int64)
    for slab in slabs_of(part, SUMMED_VOXELS):
        values, counts = np.unique(part[slab], return_counts=True)
        at = np.searchsorted(labels, values)
        is_known = at < len(labels)
        is_known[is_known] = labels[at[is_known]] == values[is_known]
        n_voxels[at[is_known]] += counts[is_known]
        is_new = ~is_known & (values != 0)
        labels = np.insert(labels, at[is_new], values[is_new])
        n_voxels = np.insert(n_voxels, at[is_new], counts[is_new])
    return labels, n_voxels


def _ranking(n_voxels: np.ndarray, centroids_mm: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Positions of the lesions from first to last: largest, then by place in the patient, then by label."""
    r, a, s = (_steps(coordinate) for coordinate in centroids_mm.T)
    return np.lexsort((labels, s, a, r, -n_voxels))


def _steps(values: np.ndarray) -> np.ndarray:
    """Rank of each value, where values that follow each other within 1e-3 mm share one.

    Rounding to 1e-3 mm would not do: where equal values lie at half a step, their last bits, which differ between axis
    orders, would part them.
    """
    order = np.argsort(values)
    ranks = np.empty(values.size, np.int64)
    ranks[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > SAME_PLACE_MM)])
    return ranks
