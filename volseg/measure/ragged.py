"""Sums and percentiles of the voxels of many lesions at once: of thousands of specks, one at a time would mostly be overhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.volume import Volume

SUMMED_TOGETHER = 2**20  # values: a lesion may be all of a scan, and float64 is four times as large

# Some of the values in float64, and at each which lesion it belongs to → what is summed.
Term = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Values of L lesions, one lesion after the other and sorted within each, so that no sum depends on the axis order.

    Args:
        values: (M,) of any real type, as stored; not a number comes last.
        starts: (L,) where those of each lesion begin.
        counts: (L,) how many it has.
        scan: whose scale they carry; they become intensities a few at a time. None: they are what they are.
    """

    values: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    scan: Volume | None = None

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], scan: Volume | None = None) -> Ragged:
        """The (N,) values of each lesion, in any order, which are sorted in place; at least one lesion."""
        falls = scan is not None and scan.slope < 0
        for part in parts:
            part.sort()
            if falls:
                _reverse(part)
        counts = np.array([part.size for part in parts])
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return cls(values, np.cumsum(counts) - counts, counts, scan)

    @property
    def first(self) -> np.ndarray:
        """(L,) the smallest value of each lesion; none may be empty."""
        return self._scaled(self.values[self.starts])

    @property
    def last(self) -> np.ndarray:
        """(L,) the largest value of each lesion; none may be empty."""
        return self._scaled(self.values[self.starts + self.counts - 1])

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return values if self.scan is None else self.scan.intensities(values)

    def sum(self, term: Term = lambda values, lesion: values) -> np.ndarray:
        """(L,) float64 sums over each lesion, 0 of an empty one."""
        totals = np.zeros(len(self.counts))
        filled = np.flatnonzero(self.counts)
        starts = self.starts[filled]
        for at in range(0, self.values.size, SUMMED_TOGETHER):
            part = self._scaled(self.values[at : at + SUMMED_TOGETHER]).astype(np.float64)
            here = slice(
                np.searchsorted(starts, at, "right") - 1, np.searchsorted(starts, at + part.size)
            )
            cuts = np.maximum(starts[here] - at, 0)
            lesion = np.repeat(filled[here], np.diff(cuts, append=part.size))
            totals[filled[here]] += np.add.reduceat(term(part, lesion), cuts)
        return totals

    def mean(self, term: Term = lambda values, lesion: values) -> np.ndarray:
        """(L,) float64; none may be empty."""
        return self.sum(term) / self.counts + 0.0  # which turns -0 into 0

    def percentile(self, percent: float) -> np.ndarray:
        """(L,) float64, linear between neighbouring values; none may be empty."""
        at = percent / 100 * (self.counts - 1)
        below = np.floor(at).astype(np.int64)
        low, high = (
            self._scaled(self.values[self.starts + each]).astype(np.float64)
            for each in (below, np.minimum(below + 1, self.counts - 1))
        )
        return low + (high - low) * (at - below) + 0.0


def _reverse(values: np.ndarray) -> None:
    """Turn (N,) sorted values round in place, but for those that are not a number, which stay last."""
    n = (
        values.size
        if values.dtype.kind != "f"
        else values.size - int(np.count_nonzero(np.isnan(values)))
    )
    low, high = values[: n // 2], values[n - n // 2 : n]
    lowest = low.copy()
    low[:] = high[::-1]
    high[:] = lowest[::-1]
