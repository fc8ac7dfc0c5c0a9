"""Resample scans and lesion ids onto another grid, by world position rather than index."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from volseg.volume import Geometry, Rigid, Volume


def resample_to_grid(volume: Volume, grid: Geometry, transform: Rigid | None = None) -> Volume:
    """Resample a scan linearly onto another grid, as float32 intensities.

    Outside its field of view, which ends at the outer faces of its voxels, the scan has its
    smallest intensity. Within half a voxel of these faces the outermost voxel is repeated.

    Args:
        transform: from points of the grid to points of the scan; None: the same points.
    """
    mapping = _mapping(volume.geometry, grid, transform)
    values = volume.intensities(volume.array).astype(np.float32, copy=False)
    array = ndimage.affine_transform(values, **mapping, output=np.float32, order=1, mode="nearest")
    # Inside the field of view the nearest voxel centre is at most half a voxel away.
    ones = np.ones(values.shape, np.uint8)
    inside = ndimage.affine_transform(
        ones, **mapping, output=np.uint8, order=0, mode="grid-constant", cval=0
    )
    array[inside == 0] = values.min()
    return Volume(array, grid)


def ids_on_grid(ids: Volume, grid: Geometry, transform: Rigid | None = None) -> Volume:
    """Return the id of the nearest voxel for each voxel of another grid, 0 outside.

    Args:
        transform: from points of the grid to points of `ids`; None: the same points.
    """
    mapping = _mapping(ids.geometry, grid, transform)
    return Volume(ndimage.affine_transform(ids.array, **mapping, order=0, mode="constant"), grid)


def _mapping(source: Geometry, grid: Geometry, transform: Rigid | None) -> dict[str, Any]:
    """Return how SciPy's `affine_transform` finds the index in the source of a voxel of a grid."""
    matrix = grid.index_matrix(source, transform)
    return {"matrix": matrix[:3, :3], "offset": matrix[:3, 3], "output_shape": grid.shape}
