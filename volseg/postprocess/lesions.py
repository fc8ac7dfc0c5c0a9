"""Mask → numbered lesions, in an order that does not depend on how the scan is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from volseg.errors import VolsegError
from volseg.postprocess.components import component_statistics, label_components
from volseg.volume import BoundingBox, Geometry, slabs_of

Objects = Literal["components", "labels"]
Connectivity = Literal[6, 18, 26]  # neighbours share a face; or an edge; or a corner
CONNECTIVITY: Connectivity = 26  # unless told otherwise
PIECE_VOXELS = 2**22  # looked at together
SAME_PLACE_MM = 1e-3  # over the rounding of float32 affines in file headers, under any distance between two lesions


@dataclass(frozen=True, slots=True, eq=False)
class Lesions:
    """The lesions of a mask; lesion n stands at position n - 1 of each list.

    Args:
        ids: (I, J, K) uint16, uint32 above 65 535 lesions; n in the voxels of lesion n, 0 elsewhere.
        labels: value which the lesion has in the mask.
        n_voxels: size of the lesion.
    """

    ids: np.ndarray
    labels: list[int]
    n_voxels: list[int]


def label_lesions(
    mask: np.ndarray, geometry: Geometry, *, objects: Objects = "components", connectivity: Connectivity = CONNECTIVITY
) -> Lesions:
    """Number the lesions of a mask.

    Args:
        mask: (I, J, K) whole numbers; every value but 0 is a label.
        geometry: grid of the mask.
        objects: `components`: a lesion is a connected component of voxels of one label; 1 is the largest of all
            labels, and equal sizes are ordered by centroid (R, then A, then S in mm), then by label.
            `labels`: a lesion is all voxels of one label; numbered by ascending label.
        connectivity: 6, 18 or 26 neighbours of a voxel; without meaning for `labels`.

    Returns:
        The same lesions under the same numbers for all 48 axis orders of a scan, unless two lesions share size, label
        and centroid to 1e-3 mm. No lesions for an empty mask.

    Raises:
        VolsegError: `objects` or `connectivity` is unknown.
        ValueError: the mask has no whole numbers, or another shape than its geometry.
    """
    _check(mask, geometry, objects, connectivity)
    layout = "F" if mask.flags.f_contiguous else "C"
    box = BoundingBox.around(mask)
    if box is None:
        return Lesions(np.zeros(mask.shape, np.uint16, order=layout), [], [])
    # A copy in one piece and native byte order: components are found in no other, and fastest.
    part = np.array(mask[box.slices], dtype=mask.dtype.newbyteorder("="), order=layout)
    find = _components if objects == "components" else _one_per_label
    lesions, labels, n_voxels = find(part, geometry.crop(box), connectivity, layout)
    part_ids = np.zeros(part.shape, np.uint16 if labels.size <= np.iinfo(np.uint16).max else np.uint32, order=layout)
    flat = part_ids.ravel(order=layout)  # a view
    for piece in _pieces(flat.size):
        flat[piece] = lesions(piece)
    ids = np.zeros(mask.shape, part_ids.dtype, order=layout)
    ids[box.slices] = part_ids
    return Lesions(ids, labels.tolist(), n_voxels.tolist())


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
        raise VolsegError(f"objects = {objects!r} is unknown", fix=f"choose one of {', '.join(get_args(Objects))}")
    if connectivity not in get_args(Connectivity):
        raise VolsegError(f"connectivity = {connectivity} is unknown", fix="choose 6, 18 or 26 neighbours of a voxel")
    if mask.dtype.kind not in "biu":
        raise ValueError(f"label values are whole numbers, got a mask of {mask.dtype}")
    if mask.shape != geometry.shape:
        raise ValueError(f"mask has shape {mask.shape}, its geometry {geometry.shape}")


# A piece of the mask in the order of memory → the numbers of the lesions there.
Numbers = Callable[[slice], np.ndarray]


def _pieces(size: int) -> Iterator[slice]:
    """Of an array in the order of memory: a mask over all of a large scan makes no temporary as large as the scan."""
    return (slice(start, min(start + PIECE_VOXELS, size)) for start in range(0, size, PIECE_VOXELS))


def _components(
    part: np.ndarray, geometry: Geometry, connectivity: Connectivity, layout: Literal["C", "F"]
) -> tuple[Numbers, np.ndarray, np.ndarray]:
    """Number of the component at each voxel; label and size of each component."""
    components, n_found = label_components(part, connectivity)
    statistics = component_statistics(components)
    found, values = components.ravel(order=layout), part.ravel(order=layout)
    labels = np.zeros(n_found + 1, np.int64)
    for piece in _pieces(found.size):
        labels[found[piece]] = values[piece]
    n_voxels = statistics.n_voxels
    ranking = _ranking(n_voxels, geometry.to_world_mm(statistics.centroids), labels[1:])
    number_of_found = np.zeros(n_found + 1, np.uint32)
    number_of_found[ranking + 1] = np.arange(1, n_found + 1)
    return lambda piece: number_of_found[found[piece]], labels[1:][ranking], n_voxels[ranking]


def _one_per_label(
    part: np.ndarray, geometry: Geometry, connectivity: Connectivity, layout: Literal["C", "F"]
) -> tuple[Numbers, np.ndarray, np.ndarray]:
    """Number of the label at each voxel; ascending labels, and their sizes."""
    values = part.ravel(order=layout)
    counts: Counter[int] = Counter()
    for piece in _pieces(values.size):
        found, n = np.unique(values[piece], return_counts=True)
        counts.update(dict(zip(found.tolist(), n.tolist(), strict=True)))
    del counts[0]
    labels = np.array(sorted(counts))

    def numbers(piece: slice) -> np.ndarray:
        return np.where(values[piece] == 0, 0, np.searchsorted(labels, values[piece]) + 1)

    return numbers, labels.astype(np.int64), np.array([counts[label] for label in labels.tolist()])


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
