"""Linear interpolation from prepared to native voxels, in tiles that are close to cubes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from volseg.preprocessing.resample import Kind, positions

BLOCK = 4  # prepared voxels per edge of the blocks in which classes are selected


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A piece of one axis: native voxels `native`, between prepared voxels `first` to `last`."""

    native: slice
    first: int
    last: int
    lower: np.ndarray  # prepared voxel below each native one, counted from `first`
    weight: np.ndarray  # weight of the prepared voxel above

    def interpolate(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Interpolate (classes, r, a, s) from prepared to native voxels along an axis."""
        n = values.shape[axis]
        if not self.weight.any():
            if np.array_equal(self.lower, np.arange(n)):
                return values
            return values.index_select(axis, torch.from_numpy(self.lower).to(values.device))
        matrix = np.zeros((len(self.lower), n), np.float32)
        rows = np.arange(len(self.lower))
        matrix[rows, self.lower] = 1 - self.weight
        matrix[rows, np.minimum(self.lower + 1, n - 1)] += self.weight
        weights = torch.from_numpy(matrix).to(values.device)
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        if not after:
            return torch.matmul(values, weights.T)
        flat = values.reshape(math.prod(before), n, math.prod(after))
        result = torch.bmm(weights.expand(len(flat), -1, -1), flat)
        return result.reshape(*before, len(matrix), *after)


class AxisMap:
    """One axis: the native voxels between prepared voxels `start` to `stop`, with their weights."""

    def __init__(self, n: int, n_native: int, kind: Kind, start: int, stop: int) -> None:
        self.n, self.n_native = n, n_native
        lower, upper, weight = positions(n, n_native, kind)
        inside = np.flatnonzero((lower >= start) & (upper < stop))
        self._offset = int(inside[0]) if inside.size else 0
        self.lower, self.upper = lower[inside] - start, upper[inside] - start
        self._weight = weight[inside]

    def cells(self, native: slice) -> int:
        """Return the number of prepared voxels that these native voxels are interpolated from."""
        if not self.lower[native].size:
            return 0
        return int(self.upper[native][-1] - self.lower[native][0]) + 1

    def segments(self, native: slice, edge: int) -> list[Segment]:
        """Divide native voxels into equal segments of whole blocks, about `edge` voxels at most."""
        lower, upper = self.lower[native], self.upper[native]
        if not lower.size:
            return []
        cells = int(lower[-1] - lower[0]) + 1
        pieces = -(-cells // edge)
        step = -(-cells // (pieces * BLOCK)) * BLOCK
        segments = []
        for first in range(int(lower[0]), int(lower[-1]) + 1, step):
            start, stop = np.searchsorted(lower, (first, first + step)).tolist()
            if start < stop:
                last = int(upper[stop - 1]) + 1
                begin = native.start + start + self._offset
                voxels = slice(begin, begin + stop - start)
                weight = self._weight[native][start:stop]
                segments.append(Segment(voxels, first, last, lower[start:stop] - first, weight))
        return segments


def interpolate(values: torch.Tensor, tile: Sequence[Segment]) -> torch.Tensor:
    """Interpolate (classes, r, a, s) from prepared to native voxels."""
    for axis in sorted(range(3), key=lambda n: len(tile[n].lower) / values.shape[1 + n]):
        values = tile[axis].interpolate(values, 1 + axis)
    return values
