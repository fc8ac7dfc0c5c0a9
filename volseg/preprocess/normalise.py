"""Intensities → network input. A normaliser is a frozen dataclass: `fit` looks at a scan, what it returns is applied to it.

`body` (I, J, K) bool says which voxels are the patient: those over the body threshold, or, where the recipe crops to the nonzero box,
those that are not 0 in some channel, with their holes filled.
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
    """Clip to [low, high], subtract `shift`, multiply by `factor`. Voxel by voxel, so it can be applied to a part of a scan.

    With `inside_only` voxels outside the body become 0 instead.
    """

    shift: float
    factor: float
    low: float = -inf
    high: float = inf
    inside_only: bool = False

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        """Real numbers of any shape → float32, a new array; without `body` the nonzero voxels are inside."""
        values = torch.from_numpy(array.astype(np.float32))
        return self.apply_(
            values, None if body is None else torch.from_numpy(np.array(body))
        ).numpy()

    def apply_(self, values: torch.Tensor, body: torch.Tensor | None = None) -> torch.Tensor:
        """The same for float32 values on any device, in place."""
        outside = None
        if self.inside_only:
            outside = values == 0 if body is None else ~body
        if not (isinf(self.low) and isinf(self.high)):
            values.clamp_(self.low, self.high)
        values.sub_(self.shift).mul_(self.factor)
        return values if outside is None else values.masked_fill_(outside, 0)


class Normaliser(ABC):
    """How the intensities of a channel become network input."""

    __slots__ = ()

    @abstractmethod
    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        """What happens to the voxels of this scan; a slab of it is not enough to know."""

    def fit_parts(self, parts: Iterable[np.ndarray]) -> Scaling | None:
        """As `fit`, from all voxels of the region, some at a time; None where there are none, or all would be needed at once."""
        return None

    def __call__(self, array: np.ndarray, body: np.ndarray | None = None) -> np.ndarray:
        """Intensities (I, J, K) → float32 (I, J, K)."""
        return self.fit(array, body)(array, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent(Normaliser):
    """Of a channel that a case does not have: 0, which is about the mean of the others."""

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(shift=0.0, factor=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Normaliser):
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

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(low=self.low, high=self.high, shift=self.mean, factor=1 / self.sd)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZScore(Normaliser):
    """Subtract the mean and divide by the deviation of the region's voxels; 0 everywhere for a constant scan.

    With the region `nonzero` the voxels outside the body become 0.
    """

    region: Region = "body"

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        inside = _inside(array, body, self.region)
        return self._scaling(
            float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        )

    def fit_parts(self, parts: Iterable[np.ndarray]) -> Scaling | None:
        n, mean, squares = 0, 0.0, 0.0
        for part in parts:
            if part.size:
                own = float(part.mean(dtype=np.float64))
                squares += float(part.var(dtype=np.float64)) * part.size + (
                    own - mean
                ) ** 2 * n * part.size / (n + part.size)
                n += part.size
                mean += (own - mean) * part.size / n
        return self._scaling(mean, sqrt(squares / n)) if n else None

    def _scaling(self, mean: float, sd: float) -> Scaling:
        return Scaling(
            shift=mean, factor=1 / sd if sd > 0 else 0, inside_only=self.region == "nonzero"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile(Normaliser):
    """Map two percentiles of the region's voxels to 0 and 1 and clip there; 0 everywhere for a constant scan."""

    low_percent: float
    high_percent: float
    region: Region = "body"

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        inside = _inside(array, body, self.region)
        low, high = (
            float(value) for value in np.percentile(inside, (self.low_percent, self.high_percent))
        )
        return self._scaling(low, high)

    def fit_parts(self, parts: Iterable[np.ndarray]) -> Scaling | None:
        if (self.low_percent, self.high_percent) != (0, 100):
            return None
        ends = [(float(part.min()), float(part.max())) for part in parts if part.size]
        return (
            self._scaling(min(low for low, _ in ends), max(high for _, high in ends))
            if ends
            else None
        )

    def _scaling(self, low: float, high: float) -> Scaling:
        return Scaling(low=low, high=high, shift=low, factor=1 / (high - low) if high > low else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Normaliser):
    """Subtract and divide by numbers that are known beforehand; 0 and 1 leave the intensities as they are."""

    subtract: float = 0.0
    divide_by: float = 1.0

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(shift=self.subtract, factor=1 / self.divide_by)


def _inside(array: np.ndarray, body: np.ndarray | None, region: Region) -> np.ndarray:
    """Values of the region, or all of them where it is empty or not given."""
    if region == "nonzero" and body is None:
        body = array != 0
    return array[body] if region != "scan" and body is not None and body.any() else array


NORMALISERS = {"window": Window, "zscore": ZScore, "percentile": Percentile, "scale": Scale}
