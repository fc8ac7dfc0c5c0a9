"""Intensities → network input. A normaliser is a frozen dataclass whose `__call__` is the maths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from volseg.errors import VolsegError

Normaliser = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Clip to [low, high], subtract `mean`, divide by `sd`; for CT in HU with statistics of the dataset."""

    low: float
    high: float
    mean: float
    sd: float

    def __post_init__(self) -> None:
        if not self.low < self.high or self.sd <= 0:
            raise VolsegError(
                f"window from {self.low} to {self.high} with deviation {self.sd} is empty",
                fix="set low < high and sd > 0 under [preprocess.normalise]",
                code="E_RECIPE",
            )

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        result = np.clip(array, np.float32(self.low), np.float32(self.high)).astype(np.float32, copy=False)
        result -= np.float32(self.mean)
        result *= np.float32(1 / self.sd)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class ZScore:
    """Subtract the mean and divide by the deviation of the voxels in `body`; 0 everywhere for a constant scan."""

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        inside = _inside(array, body)
        mean, sd = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        return ((array - np.float32(mean)) * np.float32(1 / sd if sd > 0 else 0)).astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """Map two percentiles of the voxels in `body` to 0 and 1 and clip there; 0 everywhere for a constant scan."""

    low_percent: float
    high_percent: float

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        low, high = np.percentile(_inside(array, body), (self.low_percent, self.high_percent))
        width = high - low
        scaled = (array - np.float32(low)) * np.float32(1 / width if width > 0 else 0)
        return np.clip(scaled, 0, 1).astype(np.float32, copy=False)


def _inside(array: np.ndarray, body: np.ndarray | None) -> np.ndarray:
    """Values in the body, or all of them where it is empty or not given."""
    return array[body] if body is not None and body.any() else array


NORMALISERS = {"window": Window, "zscore": ZScore, "percentile": Percentile}
