"""Where patches lie in a volume and how their overlaps are weighted."""

from __future__ import annotations

from itertools import product

import numpy as np


def tile_starts(length: int, patch: int, overlap: float) -> list[int]:
    """Starts of evenly spread patches along one axis: the first at 0, the last ending at `length`.

    Args:
        length: voxels along the axis, at least `patch`.
        overlap: smallest fraction of a patch shared with its neighbour.
    """
    if length <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    n = -(-(length - patch) // step) + 1
    return [round(index * (length - patch) / (n - 1)) for index in range(n)]


def tile_boxes(
    shape: tuple[int, int, int], patch_shape: tuple[int, int, int], overlap: float
) -> list[tuple[slice, slice, slice]]:
    """Boxes of all tiles of a volume that is nowhere smaller than a patch, S slowest."""
    r, a, s = (tile_starts(n, p, overlap) for n, p in zip(shape, patch_shape, strict=True))
    i, j, k = patch_shape
    return [(slice(x, x + i), slice(y, y + j), slice(z, z + k)) for z, y, x in product(s, a, r)]


def gaussian_window(patch_shape: tuple[int, int, int]) -> np.ndarray:
    """Weights (R, A, S) float32, 1 in the centre, σ = patch / 8 per axis, never 0.

    Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021).
    """
    axes = []
    for n in patch_shape:
        offset = (np.arange(n) - (n - 1) / 2) / (n / 8)
        axes.append(np.exp(-0.5 * offset**2))
    window = np.einsum("i,j,k->ijk", *axes)
    # In the corners of a patch the product underflows in half precision and in float32 sums; keep it countable.
    return np.maximum(window / window.max(), 1e-4).astype(np.float32)
