"""Where patches lie in a volume and how their overlaps are weighted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def tile_starts(length: int, patch: int, overlap: float) -> list[int]:
    """Starts of evenly spread patches along one axis: the first at 0, the last ending at `length`.

    Args:
        length: voxels along the axis, at least `patch`.
        overlap: smallest fraction of a patch shared with its neighbour.
    """
    if length <= patch:
        return [0]
    n = math.ceil((length - patch) / _step(patch, overlap)) + 1
    return [round(index * (length - patch) / (n - 1)) for index in range(n)]


def _step(patch: int, overlap: float) -> float:
    """Voxels from one tile to the next at the most."""
    return max(1.0, round(patch * (1 - overlap), 9))


def gaussian(patch: int) -> np.ndarray:
    """Weights (patch,) along one axis, 1 at voxel patch // 2, σ = patch / 8; a patch is weighted by the product of three.

    Source: Isensee et al., nnU-Net, Nature Methods 18:203 (2021).
    """
    offset = (np.arange(patch) - patch // 2) / (patch / 8)
    return np.exp(-0.5 * offset**2)


@dataclass(frozen=True, slots=True, eq=False)
class TiledAxis:
    """The tiles along one axis of a volume that is continued beyond its faces.

    Tiles are counted in padded voxels; padded voxel p is voxel p - `before` of the volume.

    Args:
        source: (padded length,) voxel that stands at each padded one, -1 for 0: the volume, mirrored over `margin` voxels beyond its
            faces, then 0 up to the length of a patch.
        starts: first padded voxel of each tile.
        weights: (tiles, patch) share of each tile at its voxels: Gaussian, and summing to 1 over the tiles at every voxel. As
            the tiles of a volume are the product of those along its axes, so are the shares, and they sum to 1 there too.
    """

    length: int
    patch: int
    before: int
    source: np.ndarray
    starts: tuple[int, ...]
    weights: np.ndarray

    @classmethod
    def of(cls, length: int, patch: int, overlap: float, margin: int = 0) -> TiledAxis:
        """Tiles of `patch` voxels over `length` voxels and `margin` mirrored ones beyond each end."""
        missing = max(0, patch - length - 2 * margin)
        before = missing // 2 + margin
        mirrored = np.pad(np.arange(length), margin, mode="symmetric")
        source = np.pad(mirrored, (missing // 2, missing - missing // 2), constant_values=-1)
        starts = tile_starts(len(source), patch, overlap)
        total = np.zeros(len(source))
        for start in starts:
            total[start : start + patch] += gaussian(patch)
        weights = np.stack([gaussian(patch) / total[start : start + patch] for start in starts])
        return cls(length, patch, before, source, tuple(starts), weights.astype(np.float32))

    def inside(self, tile: int) -> tuple[slice, slice]:
        """The voxels of the volume that a tile covers, none where it lies beyond a face, and where they are in the tile."""
        start = self.starts[tile] - self.before
        first, last = (min(max(0, end), self.length) for end in (start, start + self.patch))
        return slice(first, last), slice(max(0, first - start), max(0, last - start))

    def real(self, tile: int) -> slice:
        """The voxels of a tile at which the volume stands, or its mirror image."""
        places = np.flatnonzero(
            self.source[self.starts[tile] : self.starts[tile] + self.patch] >= 0
        )
        return slice(int(places[0]), int(places[-1]) + 1)


def thinnest_axis(shape: tuple[int, int, int], patch_shape: tuple[int, int, int]) -> int:
    """The axis along which a layer one patch deep holds the fewest voxels; the last of equal ones."""
    layers = [
        min(patch, n) * int(np.prod(shape)) // n
        for n, patch in zip(shape, patch_shape, strict=True)
    ]
    return max(range(3), key=lambda axis: (-layers[axis], axis))


def widest(
    start: int, stop: int, length: int, patch: int, overlap: float, margin: int = 0
) -> tuple[int, int]:
    """The widest interval of an axis around [start, stop) that takes no more tiles than it: context that costs nothing.

    Args:
        margin: mirrored voxels beyond each end, which tiles cover too.

    >>> widest(40, 140, 300, 64, 0.5)
    (26, 154)
    """
    n = len(tile_starts(stop - start + 2 * margin, patch, overlap))
    covered = patch + math.floor((n - 1) * _step(patch, overlap))
    wide = min(length, max(stop - start, covered - 2 * margin))
    begin = min(max(0, start - (wide - (stop - start)) // 2), length - wide)
    return begin, begin + wide
