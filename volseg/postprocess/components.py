"""Connected components: the one file that calls cc3d, so that its faults are mended once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np

InPlane = Literal[4, 8]  # neighbours share an edge; or a corner
InSpace = Literal[6, 18, 26]  # neighbours share a face; or an edge; or a corner


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


def label_components(values: np.ndarray, connectivity: InPlane | InSpace) -> tuple[np.ndarray, int]:
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
