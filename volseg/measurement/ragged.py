"""Sums and percentiles of the voxels of many lesions at once.

One lesion at a time would be mostly overhead in a mask of thousands of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.volume import Volume

# Values converted to float64 at a time: a lesion may fill the scan, and float64 quadruples it.
SUMMED_TOGETHER = 2**20

# (N,) values in float64 and the lesion of each → the terms to sum.
Term = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Values of L lesions, one lesion after the other, sorted within each lesion.

    Sorting makes sums independent of the axis order of the scan.

    Args:
        values: (M,) of any real type, as stored; NaN comes last.
        starts: (L,) index of the first value of each lesion.
        counts: (L,) number of values of each lesion.
        scan: its scale turns stored values into intensities, in chunks; None: values are used
            as they are.
    """

    values: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    scan: Volume | None = None

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], scan: Volume | None = None) -> Ragged:
        """Join the values (N,) of one or more lesions; `parts` are sorted in place."""
        is_falling = scan is not None and scan.slope < 0
        for part in parts:
            part.sort()
            if is_falling:
                _reverse(part)
        counts = np.array([part.size for part in parts])
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return cls(values, np.cumsum(counts) - counts, counts, scan)

    @property
    def first(self) -> np.ndarray:
        """Smallest value (L,) of each lesion; no lesion may be empty."""
        return self._scaled(self.values[self.starts])

    @property
    def last(self) -> np.ndarray:
        """Largest value (L,) of each lesion; no lesion may be empty."""
        return self._scaled(self.values[self.starts + self.counts - 1])

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return values if self.scan is None else self.scan.intensities(values)

    def sum(self, term: Term = lambda values, lesion: values) -> np.ndarray:
        """Return the float64 sum (L,) over each lesion; 0 for an empty one."""
        totals = np.zeros(len(self.counts))
        filled = np.flatnonzero(self.counts)
        starts = self.starts[filled]
        for start in range(0, self.values.size, SUMMED_TOGETHER):
            part = self._scaled(self.values[start : start + SUMMED_TOGETHER]).astype(np.float64)
            first = np.searchsorted(starts, start, "right") - 1
            lesions = slice(first, np.searchsorted(starts, start + part.size))
            cuts = np.maximum(starts[lesions] - start, 0)
            lesion = np.repeat(filled[lesions], np.diff(cuts, append=part.size))
            totals[filled[lesions]] += np.add.reduceat(term(part, lesion), cuts)
        return totals

    def mean(self, term: Term = lambda values, lesion: values) -> np.ndarray:
        """Return the float64 mean (L,) of each lesion; no lesion may be empty."""
        return self.sum(term) / self.counts + 0.0  # + 0.0 turns -0 into 0

    def percentile(self, percent: float) -> np.ndarray:
        """Return the float64 percentile (L,), linear between values; no lesion may be empty."""
        rank = percent / 100 * (self.counts - 1)
        below = np.floor(rank).astype(np.int64)
        low, high = (
            self._scaled(self.values[self.starts + index]).astype(np.float64)
            for index in (below, np.minimum(below + 1, self.counts - 1))
        )
        return low + (high - low) * (rank - below) + 0.0


def _reverse(values: np.ndarray) -> None:
    """Reverse sorted values (N,) in place; NaN stays last."""
    n = values.size
    if values.dtype.kind == "f":
        n -= int(np.count_nonzero(np.isnan(values)))
    low, high = values[: n // 2], values[n - n // 2 : n]
    lowest = low.copy()
    low[:] = high[::-1]
    high[:] = lowest[::-1]
