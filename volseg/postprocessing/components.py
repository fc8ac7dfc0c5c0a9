"""Connected components: the only file that calls cc3d, so that its bugs are fixed in one place.

cc3d takes up to 13 bytes per voxel if every voxel is its own component. `find_components` calls it
for one slab of the mask at a time and joins components across slabs, so that memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import cc3d
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components as connected_nodes

from volseg.errors import ScanError
from volseg.execution.cpu import lazy_zeros
from volseg.volume import AxisOrder, BoundingBox, Geometry, slabs_of

SLAB_VOXELS = 2**22  # voxels of the mask per step
PIECE = 2**20  # table entries per step
VOXELS_PER_COMPONENT = 5  # a mask with more components is noise
ALWAYS_ALLOWED = 2**20  # components, however small the grid

# Measured with benchmarks/noise.py: bytes per entry of a piece; per component, to find and sort it.
PIECE_BYTES, COMPONENT_BYTES = 64, 21

InPlane = Literal[4, 8]  # neighbours share an edge; or a corner
Connectivity = Literal[6, 18, 26]  # neighbours share a face; or an edge; or a corner
# Axes along which neighbours may differ: one for a face, two for an edge, three for a corner.
N_AXES = {6: 1, 18: 2, 26: 3}


@dataclass(frozen=True, slots=True, eq=False)
class ComponentStatistics:
    """Size and position of N components; component n is at index n - 1.

    Args:
        n_voxels: (N,) int64. centroids: (N, 3) float64 indices.
        first, last: (N, 3) lowest and highest voxel index on each axis.
    """

    n_voxels: np.ndarray
    centroids: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def boxes(self) -> list[tuple[slice, slice, slice]]:
        """Return the slices around component 1, 2, …, N."""
        first, stop = self.first.tolist(), (self.last + 1).tolist()
        return [
            (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
            for low, high in zip(first, stop, strict=True)
        ]


def label_components(
    values: np.ndarray, connectivity: InPlane | Connectivity
) -> tuple[np.ndarray, int]:
    """Number the connected components of equal values other than 0.

    Args:
        values: (I, J) or (I, J, K) bool or whole numbers, in native byte order.
        connectivity: 4 or 8 neighbours in a plane; 6, 18 or 26 in space.

    Returns:
        Whole numbers of the same shape, n in component n and 0 in the background; and the number
        of components.

    Raises:
        ValueError: the values are not whole numbers, or the connectivity does not fit their
            dimensions.
    """
    if values.dtype.kind not in "biu":
        raise ValueError(f"values must be whole numbers, got {values.dtype}")
    if connectivity not in {2: (4, 8), 3: (6, 18, 26)}.get(values.ndim, ()):
        raise ValueError(f"{connectivity} neighbours do not exist in {values.ndim} dimensions")
    # cc3d has a separate algorithm for bool, which processes blocks of pixels. It fails where an
    # axis has an odd length: it labels background, and other pixels in every call.
    #
    #     row = np.array([[0, 0, 0, 1, 1, 1, 0]], bool)
    #     cc3d.connected_components(row, connectivity=8)  # in 4.1.1
    #     → [[0, 1, 0, 1, 1, 1, 0]], or six pixels, instead of [[0, 0, 0, 1, 1, 1, 0]]
    #
    #     cc3d.connected_components(np.array([[[1, 0, 1]]], bool), connectivity=26)
    #     → "maximum length exception" instead of [[[1, 0, 2]]]
    #
    # With 8 neighbours 3.29.0, 4.0.0, 4.1.0 and 4.1.1 (the newest) are wrong, 3.24.0 is correct.
    # With 26 neighbours 4.1.0 and 4.1.1 raise, with 4 neighbours 3.29.0 and 4.0.0. The same bytes
    # as uint8 use the other algorithm, correct in all of them (tests/postprocessing/
    # test_components.py). To be reported to github.com/seung-lab/connected-components-3d; its
    # issue 70 was similar.
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    # A reversed view, such as np.array([[[1]], [[0]]])[::-1], has no component in 4.1.1.
    if not (values.flags.c_contiguous or values.flags.f_contiguous):
        values = np.array(values)
    return cc3d.connected_components(values, connectivity=connectivity, return_N=True)


def component_statistics(ids: np.ndarray) -> ComponentStatistics:
    """Measure components 1, 2, …, N of (I, J, K) unsigned numbers, where 0 is the background.

    Raises:
        ValueError: the numbers have a gap.
    """
    measured = cc3d.statistics(ids, no_slice_conversion=True)
    ends = measured["bounding_boxes"][1:].astype(np.int64).reshape(-1, 3, 2)
    n_voxels = measured["voxel_counts"][1:].astype(np.int64)
    if not n_voxels.all():
        raise ValueError(f"ids must not skip a number: {1 + int(np.argmin(n_voxels))} is missing")
    return ComponentStatistics(
        n_voxels=n_voxels,
        centroids=measured["centroids"][1:],
        first=ends[:, :, 0],
        last=ends[:, :, 1],
    )


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The components of a mask, numbered from 1 in the order of their first voxel in the patient.

    Args:
        ids: (I, J, K) uint32, in the memory layout of the mask: provisional numbers, 0 in the
            background.
        number: (M + 1,) uint32: component number of each provisional number; 0 for 0.
        values: (N + 1,) mask value of each component. sizes: (N + 1,) its voxels; both 0 for 0.
    """

    ids: np.ndarray
    number: np.ndarray
    values: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes) - 1


def find_components(
    mask: np.ndarray,
    geometry: Geometry,
    *,
    connectivity: Connectivity,
    box: BoundingBox | None = None,
    most: int | None = None,
    slab_voxels: int = SLAB_VOXELS,
) -> Components:
    """Find the connected components of equal values other than 0.

    The numbers are the same for all 48 axis orders of a scan.

    Args:
        mask: (I, J, K) whole numbers. box: encloses all values other than 0; None: whole mask.
        connectivity: 6, 18 or 26 neighbours of a voxel.
        most: maximal number of components; None: one per five voxels, but at least 2²⁰.
        slab_voxels: voxels per step.

    Raises:
        ScanError: E_SPECKS, there are more components than `most`.

    Memory: 4 bytes per voxel of the box for `ids` + about 60 MB + about 17 bytes per component.
    """
    most = most_components(mask.size) if most is None else most
    ids = _like(mask, np.uint32)
    box = BoundingBox.whole(geometry.shape) if box is None else box
    order = AxisOrder.of(geometry)
    views = (order.apply(array[box.slices]) for array in (mask, ids))
    part, part_ids = _longest_last(*views)
    sizes, values = [np.zeros(1, np.uint32)], [np.zeros(1, part.dtype)]
    joints, n_provisional = [], 0
    for start, stop in _slabs(part.shape, slab_voxels):
        slab = np.array(part[..., start:stop], part.dtype.newbyteorder("="), order="F")
        slab_ids, n = label_components(slab, connectivity)
        flat, flat_values = slab_ids.ravel(order="F"), slab.ravel(order="F")
        size = np.zeros(n + 1, np.uint32)
        np.add.at(size, flat, np.uint32(1))
        value = np.zeros(n + 1, slab.dtype)
        value[flat] = flat_values
        sizes.append(size[1:])
        values.append(value[1:])
        offset, target = np.uint32(n_provisional), part_ids[..., start:stop]
        np.add(slab_ids, offset, out=target, where=slab_ids > 0, dtype=np.uint32)
        if start:
            joints.append(_joined(part, part_ids, start, connectivity))
        n_provisional += n
        if n_provisional - sum(map(len, joints)) > most:  # a lower bound of the components
            raise _too_many(most, mask.size, is_least=True)
    number, n = _numbers(n_provisional, joints)
    if n > most:
        raise _too_many(n, mask.size)
    return Components(ids, number, *_of_components(number, n, sizes, values))


def most_components(voxels: int) -> int:
    """Return the maximal number of components of a mask with this number of voxels."""
    return min(voxels, max(voxels // VOXELS_PER_COMPONENT, ALWAYS_ALLOWED))


def runs_of(*masks: np.ndarray) -> int:
    """Count the runs along an axis in which every mask keeps a value other than 0.

    A mask has at most as many components as runs, with any connectivity; two masks have at most as
    many pairs of overlapping components.
    """
    n = 0
    for part in slabs_of(masks[0], PIECE):
        slabs = [mask[part] for mask in masks]
        along = int(np.argmin(np.abs(slabs[0].strides)))
        starts = np.ones(slabs[0].shape, bool)
        whole = (slice(None),) * along
        after, before = (*whole, slice(1, None)), (*whole, slice(None, -1))
        starts[after] = np.any([slab[after] != slab[before] for slab in slabs], axis=0)
        for slab in slabs:
            starts &= slab != 0
        n += int(np.count_nonzero(starts))
    return n


def finding_bytes(voxels: int, n_components: int) -> int:
    """Return the bytes to find and sort up to `n_components`, without the mask and its ids."""
    n = min(n_components, most_components(voxels))
    return PIECE_BYTES * min(voxels, PIECE) + COMPONENT_BYTES * n


def _too_many(n: int, n_voxels: int, *, is_least: bool = False) -> ScanError:
    return ScanError(
        f"{'over ' if is_least else ''}{n:,} components in {n_voxels:,} voxels: this mask is noise",
        fix="view the mask: is the model trained, and for such scans? is the file a mask at all?",
        code="E_SPECKS",
    )


def _like(mask: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return zeros in the layout of the mask, whose memory is allocated on writing."""
    if mask.flags.f_contiguous:
        return lazy_zeros(mask.shape, dtype)
    return lazy_zeros(mask.shape[::-1], dtype).transpose()


def _longest_last(*arrays: np.ndarray) -> list[np.ndarray]:
    """Return views with the longest axis last, so that slabs are as small as possible."""
    axis = int(np.argmax(arrays[0].shape[::-1]))  # the last of equal ones
    return [np.moveaxis(array, 2 - axis, 2) for array in arrays]


def _slabs(shape: tuple[int, ...], slab_voxels: int) -> Iterator[tuple[int, int]]:
    step = max(1, slab_voxels // max(1, shape[0] * shape[1]))
    return ((start, min(start + step, shape[2])) for start in range(0, shape[2], step))


def _joined(part: np.ndarray, ids: np.ndarray, start: int, connectivity: int) -> np.ndarray:
    """Join components across the face before plane `start`; return `_rooted` pairs of numbers."""
    pairs = []
    for steps in product((-1, 0, 1), repeat=2):
        if sum(map(abs, steps)) + 1 > N_AXES[connectivity]:
            continue
        before, after = (
            tuple(
                slice(max(0, sign * step), n + min(0, sign * step))
                for step, n in zip(steps, part.shape)
            )
            for sign in (1, -1)
        )
        low, high = part[(*before, start - 1)], part[(*after, start)]
        is_same = (low == high) & (low != 0)
        ends = [ids[(*before, start - 1)][is_same], ids[(*after, start)][is_same]]
        pairs.append(np.stack(ends, axis=1).astype(np.uint32))
    return _rooted(np.unique(np.concatenate(pairs), axis=0))


def _rooted(pairs: np.ndarray) -> np.ndarray:
    """Turn (P, 2) connected numbers into (Q, 2): each number and the lowest of its group.

    The lowest numbers themselves are left out.
    """
    if not len(pairs):
        return pairs
    nodes, indices = np.unique(pairs, return_inverse=True)
    rows, columns = indices.reshape(-1, 2).T
    n = len(nodes)
    edges = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(n, n))
    n_groups, groups = connected_nodes(edges, directed=False)
    lowest = np.full(n_groups, np.iinfo(np.uint32).max, np.uint32)
    np.minimum.at(lowest, groups, nodes)
    rooted = np.stack([nodes, lowest[groups]], axis=1)
    return rooted[rooted[:, 0] != rooted[:, 1]]


def _numbers(n_provisional: int, joints: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return the component number of each provisional number, (M + 1,), and their count.

    Components are in the order of their lowest provisional numbers.
    """
    is_first = np.ones(n_provisional + 1, bool)
    roots = _rooted(np.concatenate(joints)) if joints else np.empty((0, 2), np.uint32)
    is_first[roots[:, 0]] = False
    is_first[0] = False
    number = np.cumsum(is_first, dtype=np.uint32)
    number[roots[:, 0]] = number[roots[:, 1]]
    return number, int(np.count_nonzero(is_first))


def _of_components(
    number: np.ndarray, n: int, sizes: list[np.ndarray], values: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Combine values and sizes of provisional components, slab by slab, to those of components."""
    value, size, start = np.zeros(n + 1, values[0].dtype), np.zeros(n + 1, np.uint32), 0
    for slab_sizes, slab_values in zip(sizes, values, strict=True):
        target = number[start : start + len(slab_sizes)]
        np.add.at(size, target, slab_sizes)
        value[target] = slab_values
        start += len(slab_sizes)
    return value, size


def relabel(
    components: Components, table: np.ndarray, dtype: type[np.unsignedinteger]
) -> np.ndarray:
    """Return (I, J, K) with `table[n]` in the voxels of component n.

    It overwrites `components.number`, and also `components.ids` if the dtype is the same.

    Args:
        table: (N + 1,) new number of each component; 0 for 0.
    """
    for start in range(0, len(components.number), PIECE):
        piece = slice(start, start + PIECE)
        components.number[piece] = table[components.number[piece]]
    ids, order = components.ids, "F" if components.ids.flags.f_contiguous else "C"
    flat = ids.ravel(order=order)
    result = ids if ids.dtype == dtype else _like(ids, dtype)
    target = result.ravel(order=order)
    assert np.shares_memory(flat, ids) and np.shares_memory(target, result)
    for start in range(0, flat.size, PIECE):
        piece = slice(start, start + PIECE)
        if flat[piece].any():
            target[piece] = components.number[flat[piece]]
    return result


def by_size(sizes: np.ndarray) -> np.ndarray:
    """Return the rank (N + 1,) uint32 of each component by size, 1 for the largest; 0 for 0.

    Equal sizes keep their order. A counting sort: there are few sizes, but maybe millions of
    components.
    """
    distinct = np.unique(sizes[1:])
    numbers, counts = np.zeros(len(sizes), np.uint32), np.zeros(len(distinct), np.int64)
    for _, indices in _size_indices(sizes, distinct):
        counts += np.bincount(indices, minlength=len(distinct))
    # Next rank of each size, after all larger components.
    following = np.concatenate([np.cumsum(counts[::-1])[::-1][1:], [0]]) + 1
    for piece, indices in _size_indices(sizes, distinct):
        order = np.argsort(indices, kind="stable")
        _, starts, n_equal = np.unique(indices[order], return_index=True, return_counts=True)
        within = np.arange(len(indices)) - np.repeat(starts, n_equal)
        numbers[piece][order] = following[indices[order]] + within
        following += np.bincount(indices, minlength=len(distinct))
    return numbers


def _size_indices(sizes: np.ndarray, distinct: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield pieces of the sizes, from component 1 on, and their indices among the distinct ones."""
    for start in range(1, len(sizes), PIECE):
        piece = slice(start, start + PIECE)
        yield piece, np.searchsorted(distinct, sizes[piece])
