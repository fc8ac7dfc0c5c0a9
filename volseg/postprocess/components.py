"""Connected components: the one file that calls cc3d, so that its faults are mended once.

cc3d takes up to 13 bytes per voxel where every voxel is a component of its own. `find_components` gives it one slab of the
mask at a time and joins components that go on in the next slab, so that it takes little memory however many there are.
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
from volseg.execute.cpu import untouched_zeros
from volseg.preprocess.crop import AxisOrder, to_canonical
from volseg.volume import BoundingBox, Geometry, slabs_of

SLAB_VOXELS = 2**22  # of the mask, looked at together
PIECE = 2**20  # entries of a table, worked on together
MOST_SHARE = 5  # one component per so many voxels: more are no objects
ALWAYS_ALLOWED = 2**20  # components, in a grid however small

# Measured with benchmarks/noise.py: bytes per entry of a piece, and per component while they are found and put in order.
PIECE_BYTES, COMPONENT_BYTES = 64, 21

InPlane = Literal[4, 8]  # neighbours share an edge; or a corner
Connectivity = Literal[6, 18, 26]  # neighbours share a face; or an edge; or a corner
# What two voxels may differ by along the axes and still be neighbours: one axis for a face, two for an edge, three for a corner.
N_AXES = {6: 1, 18: 2, 26: 3}


@dataclass(frozen=True, slots=True, eq=False)
class ComponentStatistics:
    """Size and place of N components; component n stands at position n - 1.

    Args:
        n_voxels: (N,) int64. centroids: (N, 3) float64 indices.
        first, last: (N, 3) lowest and highest index of a voxel on each axis.
    """

    n_voxels: np.ndarray
    centroids: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def boxes(self) -> list[tuple[slice, slice, slice]]:
        """The slices that hold component 1, 2, …, N."""
        first, stop = self.first.tolist(), (self.last + 1).tolist()
        return [
            (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
            for low, high in zip(first, stop, strict=True)
        ]


def label_components(
    values: np.ndarray, connectivity: InPlane | Connectivity
) -> tuple[np.ndarray, int]:
    """Number the components of neighbours that have the same value other than 0.

    Args:
        values: (I, J) or (I, J, K) bool or whole numbers, in native byte order.
        connectivity: 4 or 8 neighbours in a plane; 6, 18 or 26 in space.

    Returns:
        Whole numbers of the same shape, n in component n and 0 in the background; and how many
        components there are.

    Raises:
        ValueError: the values are no whole numbers, or the connectivity is not of their dimensions.
    """
    if values.dtype.kind not in "biu":
        raise ValueError(f"components are of whole numbers, got {values.dtype}")
    if connectivity not in {2: (4, 8), 3: (6, 18, 26)}.get(values.ndim, ()):
        raise ValueError(f"{connectivity} neighbours do not exist in {values.ndim} dimensions")
    # cc3d has an algorithm of its own for bool, which looks at blocks of pixels. It is wrong where an
    # axis has an odd length: it labels background, and not the same pixels in every call.
    #
    #     row = np.array([[0, 0, 0, 1, 1, 1, 0]], bool)
    #     cc3d.connected_components(row, connectivity=8)  # in 4.1.1
    #     → [[0, 1, 0, 1, 1, 1, 0]], or six pixels, in place of [[0, 0, 0, 1, 1, 1, 0]]
    #
    #     cc3d.connected_components(np.array([[[1, 0, 1]]], bool), connectivity=26)
    #     → "maximum length exception" in place of [[[1, 0, 2]]]
    #
    # With 8 neighbours 3.29.0, 4.0.0, 4.1.0 and 4.1.1 are wrong, the newest there is; 3.24.0 is right.
    # With 26 neighbours 4.1.0 and 4.1.1 raise, with 4 neighbours 3.29.0 and 4.0.0. The same bytes as
    # uint8 take the other algorithm, which is right in all of them (tests/postprocess/
    # test_components.py). To be reported to github.com/seung-lab/connected-components-3d; issue 70
    # there was of the same kind.
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    # A view that runs backwards, such as np.array([[[1]], [[0]]])[::-1], has no component in 4.1.1.
    if not (values.flags.c_contiguous or values.flags.f_contiguous):
        values = np.array(values)
    return cc3d.connected_components(values, connectivity=connectivity, return_N=True)


def component_statistics(ids: np.ndarray) -> ComponentStatistics:
    """Measure components 1, 2, …, N of (I, J, K) unsigned numbers, where 0 is the background.

    Raises:
        ValueError: a number is skipped.
    """
    measured = cc3d.statistics(ids, no_slice_conversion=True)
    ends = measured["bounding_boxes"][1:].astype(np.int64).reshape(-1, 3, 2)
    n_voxels = measured["voxel_counts"][1:].astype(np.int64)
    if not n_voxels.all():
        raise ValueError(f"the numbers skip a number: {1 + int(np.argmin(n_voxels))}")
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
        ids: (I, J, K) uint32, in the memory layout of the mask; provisional numbers, 0 outside of all components.
        number: (M + 1,) uint32, number of the component of each provisional one; 0 for 0.
        values: (N + 1,) value of each component in the mask. sizes: (N + 1,) its voxels; both 0 for 0.
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
    """Connected components of equal values other than 0; the same numbers for all 48 axis orders of a scan.

    Args:
        mask: (I, J, K) whole numbers. box: where it is not 0; None: anywhere.
        connectivity: 6, 18 or 26 neighbours of a voxel.
        most: components; None: one per five voxels of the mask, or a million if that is more.
        slab_voxels: looked at together.

    Raises:
        ScanError: E_SPECKS, there are more components than `most`.

    Memory: 4 bytes per voxel of the box for `ids`, some 60 MB, and about 17 bytes per component.
    """
    most = most_components(mask.size) if most is None else most
    ids = _like(mask, np.uint32)
    box = BoundingBox.whole(geometry.shape) if box is None else box
    order = AxisOrder.of(geometry)
    views = (to_canonical(array[box.slices], order) for array in (mask, ids))
    part, part_ids = _longest_last(*views)
    sizes, values, joints, n_provisional = (
        [np.zeros(1, np.uint32)],
        [np.zeros(1, part.dtype)],
        [],
        0,
    )
    for start, stop in _slabs(part.shape, slab_voxels):
        slab = np.array(part[..., start:stop], part.dtype.newbyteorder("="), order="F")
        found, n_found = label_components(slab, connectivity)
        flat, flat_values = found.ravel(order="F"), slab.ravel(order="F")
        size = np.zeros(n_found + 1, np.uint32)
        np.add.at(size, flat, np.uint32(1))
        value = np.zeros(n_found + 1, slab.dtype)
        value[flat] = flat_values
        sizes.append(size[1:])
        values.append(value[1:])
        np.add(
            found,
            np.uint32(n_provisional),
            out=part_ids[..., start:stop],
            where=found > 0,
            dtype=np.uint32,
        )
        if start:
            joints.append(_joined(part, part_ids, start, connectivity))
        n_provisional += n_found
        if (
            n_provisional - sum(len(each) for each in joints) > most
        ):  # joined, that is the least there are
            raise _too_many(most, mask.size, is_least=True)
    number, n = _numbers(n_provisional, joints)
    if n > most:
        raise _too_many(n, mask.size)
    return Components(ids, number, *_of_components(number, n, sizes, values))


def most_components(voxels: int) -> int:
    """How many components a mask of so many voxels may have; one of more is refused."""
    return min(voxels, max(voxels // MOST_SHARE, ALWAYS_ALLOWED))


def runs_of(*masks: np.ndarray) -> int:
    """Number of runs along an axis in which every mask keeps a value other than 0.

    A mask has no more components than runs, of whatever connectivity; two masks no more pairs of components that overlap.
    """
    n = 0
    for part in slabs_of(masks[0], PIECE):
        slabs = [mask[part] for mask in masks]
        along = int(np.argmin(np.abs(slabs[0].strides)))
        starts = np.ones(slabs[0].shape, bool)
        after, before = (
            (slice(None),) * along + (side,) for side in (slice(1, None), slice(None, -1))
        )
        starts[after] = np.any([slab[after] != slab[before] for slab in slabs], axis=0)
        for slab in slabs:
            starts &= slab != 0
        n += int(np.count_nonzero(starts))
    return n


def finding_bytes(voxels: int, n_components: int) -> int:
    """Bytes for finding at most so many components and putting them in order, beside the mask and its ids."""
    return PIECE_BYTES * min(voxels, PIECE) + COMPONENT_BYTES * min(
        n_components, most_components(voxels)
    )


def _too_many(n: int, n_voxels: int, *, is_least: bool = False) -> ScanError:
    return ScanError(
        f"{'over ' if is_least else ''}{n:,} components in {n_voxels:,} voxels: this mask is noise",
        fix="look at the mask: was the model trained, is it for such scans, is it a mask at all?",
        code="E_SPECKS",
    )


def _like(mask: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Zeros in the layout of the mask that take memory only where they are written."""
    if mask.flags.f_contiguous:
        return untouched_zeros(mask.shape, dtype)
    return untouched_zeros(mask.shape[::-1], dtype).transpose()


def _longest_last(*arrays: np.ndarray) -> list[np.ndarray]:
    """Views whose last axis is the longest, so that a slab is as small as it can be."""
    axis = int(np.argmax(arrays[0].shape[::-1]))  # of equal ones the last
    return [np.moveaxis(array, 2 - axis, 2) for array in arrays]


def _slabs(shape: tuple[int, ...], slab_voxels: int) -> Iterator[tuple[int, int]]:
    step = max(1, slab_voxels // max(1, shape[0] * shape[1]))
    return ((start, min(start + step, shape[2])) for start in range(0, shape[2], step))


def _joined(part: np.ndarray, ids: np.ndarray, start: int, connectivity: int) -> np.ndarray:
    """(P, 2) provisional numbers of components that go on across the face before plane `start`, each with the lowest it is joined to."""
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
        pairs.append(
            np.stack(
                [ids[(*before, start - 1)][is_same], ids[(*after, start)][is_same]], axis=1
            ).astype(np.uint32)
        )
    return _rooted(np.unique(np.concatenate(pairs), axis=0))


def _rooted(pairs: np.ndarray) -> np.ndarray:
    """(P, 2) numbers that belong together → (Q, 2) each of them that is not the lowest of its group, and that lowest one."""
    if not len(pairs):
        return pairs
    nodes, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    edges = coo_array(
        (np.ones(len(places), np.int8), (places[:, 0], places[:, 1])),
        shape=(len(nodes), len(nodes)),
    )
    n_groups, groups = connected_nodes(edges, directed=False)
    lowest = np.full(n_groups, np.iinfo(np.uint32).max, np.uint32)
    np.minimum.at(lowest, groups, nodes)
    rooted = np.stack([nodes, lowest[groups]], axis=1)
    return rooted[rooted[:, 0] != rooted[:, 1]]


def _numbers(n_provisional: int, joints: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """(M + 1,) number of the component of each provisional one, in the order of the lowest of each; how many there are."""
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
    """Value and size of each component from those of the provisional ones, slab by slab."""
    value, size, start = np.zeros(n + 1, values[0].dtype), np.zeros(n + 1, np.uint32), 0
    for some_sizes, some_values in zip(sizes, values, strict=True):
        target = number[start : start + len(some_sizes)]
        np.add.at(size, target, some_sizes)
        value[target] = some_values
        start += len(some_sizes)
    return value, size


def relabel(
    components: Components, table: np.ndarray, dtype: type[np.unsignedinteger]
) -> np.ndarray:
    """(I, J, K) of this dtype: entry `table[n]` in the voxels of component n; in the memory of `components.ids` where it fits.

    Args:
        table: (N + 1,).
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
    """(N + 1,) uint32: the place of each component from the largest, 1, on; equal ones in their order. 0 for 0.

    A counting sort: sizes are few, and numbers may be millions.
    """
    distinct = np.unique(sizes[1:])
    numbers, counts = np.zeros(len(sizes), np.uint32), np.zeros(len(distinct), np.int64)
    for _, kinds in _kinds(sizes, distinct):
        counts += np.bincount(kinds, minlength=len(distinct))
    following = (
        np.concatenate([np.cumsum(counts[::-1])[::-1][1:], [0]]) + 1
    )  # after all that are larger
    for piece, kinds in _kinds(sizes, distinct):
        order = np.argsort(kinds, kind="stable")
        _, starts, n_alike = np.unique(kinds[order], return_index=True, return_counts=True)
        within = np.arange(len(kinds)) - np.repeat(starts, n_alike)
        numbers[piece][order] = following[kinds[order]] + within
        following += np.bincount(kinds, minlength=len(distinct))
    return numbers


def _kinds(sizes: np.ndarray, distinct: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Pieces of the sizes from the first component on, and at which place of the distinct ones each stands."""
    for start in range(1, len(sizes), PIECE):
        piece = slice(start, start + PIECE)
        yield piece, np.searchsorted(distinct, sizes[piece])
