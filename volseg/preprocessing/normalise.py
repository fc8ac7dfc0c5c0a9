"""Intensities → network input. A normaliser is a frozen dataclass; `fit` returns a `Scaling`.

`body` (I, J, K) bool marks the voxels of the patient: those above the body threshold or, where the
recipe crops to the nonzero box, those that are nonzero in any channel, with holes filled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isinf, sqrt
from typing import Literal

import numpy as np
import torch

from volseg.errors import VolsegError

Region = Literal["body", "scan", "nonzero"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Clip to [low, high], subtract `shift`, multiply by `factor`.

    It acts on single voxels, so it also applies to a part of a scan. With `inside_only` voxels
    outside the body become 0.
    """

    shift: float
    factor: float
    low: float = -inf
    high: float = inf
    inside_only: bool = False

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        """Return a new float32 array of any shape; without `body` the nonzero voxels are inside."""
        values = torch.from_numpy(array.astype(np.float32))
        inside = None if body is None else torch.from_numpy(np.array(body))
        return self.apply_(values, inside).numpy()

    def apply_(self, values: torch.Tensor, body: torch.Tensor | None = None) -> torch.Tensor:
        """Scale float32 values on any device in place."""
        outside = None
        if self.inside_only:
            outside = values == 0 if body is None else ~body
        if not (isinf(self.low) and isinf(self.high)):
            values.clamp_(self.low, self.high)
        values.sub_(self.shift).mul_(self.factor)
        return values if outside is None else values.masked_fill_(outside, 0)


class Normaliser(ABC):
    """Base class of the mappings from intensities of a channel to network input."""

    __slots__ = ()

    @abstractmethod
    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        """Return the scaling of a scan, from the whole scan."""

    def fit_parts(self, parts: Iterable[np.ndarray]) -> Scaling | None:
        """Return the scaling of the region's voxels, given in parts.

        None if there are no voxels, or if the normaliser needs all of them at once.
        """
        return None

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        """Normalise intensities (I, J, K) to float32 (I, J, K)."""
        return self.fit(array, body)(array, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent(Normaliser):
    """Normaliser of a missing channel: 0, about the mean of normalised intensities."""

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(shift=0.0, factor=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Normaliser):
    """Clip to [low, high], subtract `mean`, divide by `sd`; for CT with data set statistics."""

    low: float
    high: float
    mean: float
    sd: float

    def __post_init__(self) -> None:
        if not self.low < self.high or self.sd <= 0:
            raise VolsegError(
                f"window from {self.low} to {self.high} with standard deviation {self.sd} is empty",
                fix="set low < high and sd > 0 under [preprocess.normalise]",
                code="E_RECIPE",
            )

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(low=self.low, high=self.high, shift=self.mean, factor=1 / self.sd)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZScore(Normaliser):
    """Subtract the mean and divide by the standard deviation of the region's voxels.

    A constant scan becomes 0, and with the region `nonzero` so do the voxels outside the body.
    """

    region: Region = "body"

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        inside = _inside(array, body, self.region)
        mean, sd = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        return self._scaling(mean, sd)

    def fit_parts(self, parts: Iterable[np.ndarray]) -> Scaling | None:
        n, mean, squares = 0, 0.0, 0.0
        for part in parts:
            m = part.size
            if m:
                part_mean = float(part.mean(dtype=np.float64))
                variance, delta = float(part.var(dtype=np.float64)), part_mean - mean
                squares += variance * m + delta**2 * n * m / (n + m)
                n += m
                mean += delta * m / n
        return self._scaling(mean, sqrt(squares / n)) if n else None

    def _scaling(self, mean: float, sd: float) -> Scaling:
        factor = 1 / sd if sd > 0 else 0
        return Scaling(shift=mean, factor=factor, inside_only=self.region == "nonzero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile(Normaliser):
    """Map two percentiles of the region's voxels to 0 and 1 and clip; a constant scan becomes 0."""

    low_percent: float
    high_percent: float
    region: Region = "body"

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        inside = _inside(array, body, self.region)
        low, high = np.percentile(inside, (self.low_percent, self.high_percent)).tolist()
        return self._scaling(low, high)

    def fit_parts(self, parts: Iterable[np.ndarray]) -> Scaling | None:
        if (self.low_percent, self.high_percent) != (0, 100):
            return None
        ranges = [(float(part.min()), float(part.max())) for part in parts if part.size]
        if not ranges:
            return None
        return self._scaling(min(low for low, _ in ranges), max(high for _, high in ranges))

    def _scaling(self, low: float, high: float) -> Scaling:
        return Scaling(low=low, high=high, shift=low, factor=1 / (high - low) if high > low else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Normaliser):
    """Subtract and divide by fixed numbers; 0 and 1 leave the intensities unchanged."""

    subtract: float = 0.0
    divide_by: float = 1.0

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(shift=self.subtract, factor=1 / self.divide_by)


def _inside(array: np.ndarray, body: np.ndarray | None, region: Region) -> np.ndarray:
    """Return the values of the region, or all values if it is empty or not given."""
    if region == "nonzero" and body is None:
        body = array != 0
    return array[body] if region != "scan" and body is not None and body.any() else array


NORMALISERS = {"window": Window, "zscore": ZScore, "percentile": Percentile, "scale": Scale}
