"""Tiles: positions of patches in a volume and the weights with which they blend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def tile_starts(length: int, patch: int, overlap: float) -> list[int]:
    """Return starts of evenly spread patches on an axis: the first at 0, the last ends at `length`.

    Args:
        length: voxels along the axis; up to `patch` voxels need one tile.
        overlap: smallest fraction of a patch shared with its neighbour.
    """
    if length <= patch:
        return [0]
    n = math.ceil((length - patch) / _step(patch, overlap)) + 1
    return [round(index * (length - patch) / (n - 1)) for index in range(n)]


def _step(patch: int, overlap: float) -> float:
    """Return the largest distance in voxels from one tile to the next."""
    return max(1.0, round(patch * (1 - overlap), 9))


def gaussian(patch: int) -> np.ndarray:
    """Return Gaussian weights (patch,) along one axis: 1 at voxel patch // 2, σ = patch / 8.

    A patch is weighted by the product over its three axes.

    Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021).
    """
    offset = (np.arange(patch) - patch // 2) / (patch / 8)
    return np.exp(-0.5 * offset**2)


@dataclass(frozen=True, slots=True, eq=False)
class TiledAxis:
    """The tiles along one axis of a padded volume; padded voxel p is voxel p - `before` of it.

    Args:
        length: voxels of the volume along the axis.
        before: padded voxels before the volume.
        source: (padded length,) volume voxel at each padded voxel, -1 for zero padding: reflect
            padding (edge voxels repeat) of `margin` voxels at each face, then zeros up to the
            length of a patch.
        starts: first padded voxel of each tile.
        weights: (tiles, patch) blending weight of each tile at its voxels: Gaussian, summing to 1
            over the tiles at every voxel. Weights of a volume's tiles are products of these over
            the axes, and sum to 1 too.
    """

    length: int
    patch: int
    before: int
    source: np.ndarray
    starts: tuple[int, ...]
    weights: np.ndarray

    @classmethod
    def of(cls, length: int, patch: int, overlap: float, margin: int = 0) -> TiledAxis:
        """Place tiles over `length` voxels and `margin` voxels of reflect padding at each end."""
        missing = max(0, patch - length - 2 * margin)
        before = missing // 2 + margin
        reflected = np.pad(np.arange(length), margin, mode="symmetric")
        source = np.pad(reflected, (missing // 2, missing - missing // 2), constant_values=-1)
        starts = tile_starts(len(source), patch, overlap)
        total = np.zeros(len(source))
        for start in starts:
            total[start : start + patch] += gaussian(patch)
        weights = np.stack([gaussian(patch) / total[start : start + patch] for start in starts])
        return cls(length, patch, before, source, tuple(starts), weights.astype(np.float32))

    def inside(self, tile: int) -> tuple[slice, slice]:
        """Return the volume's voxels that a tile covers, and where they lie in the tile."""
        start = self.starts[tile] - self.before
        first, last = (min(max(0, end), self.length) for end in (start, start + self.patch))
        return slice(first, last), slice(max(0, first - start), max(0, last - start))

    def real(self, tile: int) -> slice:
        """Return the voxels of a tile that are not zero padding."""
        start = self.starts[tile]
        index = np.flatnonzero(self.source[start : start + self.patch] >= 0)
        return slice(int(index[0]), int(index[-1]) + 1)


def thinnest_axis(shape: tuple[int, int, int], patch_shape: tuple[int, int, int]) -> int:
    """Return the axis along which a layer one patch deep has the fewest voxels; ties: the last."""
    layers = [
        min(patch, n) * int(np.prod(shape)) // n
        for n, patch in zip(shape, patch_shape, strict=True)
    ]
    return max(range(3), key=lambda axis: (-layers[axis], axis))


def widest(
    start: int, stop: int, length: int, patch: int, overlap: float, margin: int = 0
) -> tuple[int, int]:
    """Return the widest interval around [start, stop) that takes no more tiles: free context.

    Args:
        margin: voxels of reflect padding at each end, which tiles cover too.

    >>> widest(40, 140, 300, 64, 0.5)
    (26, 154)
    """
    n = len(tile_starts(stop - start + 2 * margin, patch, overlap))
    covered = patch + math.floor((n - 1) * _step(patch, overlap))
    wide = min(length, max(stop - start, covered - 2 * margin))
    begin = min(max(0, start - (wide - (stop - start)) // 2), length - wide)
    return begin, begin + wide
