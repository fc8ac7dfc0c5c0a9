"""Normalisation: intensities of a channel → network input.

A normaliser is one class: the keys that a recipe writes, and `fit`, which returns a `Scaling`.
`body` (I, J, K) bool marks the voxels of the patient: those above the body threshold or, where the
recipe crops to the nonzero box, those that are nonzero in any channel, with holes filled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isinf, sqrt
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
from pydantic import Field, model_validator

from volseg.recipe.section import (
    AUTO,
    Auto,
    Intensity,
    Section,
    StandardDeviation,
    closed,
    refuse_empty_window,
)

if TYPE_CHECKING:  # torch takes seconds to import; reading a recipe does not need it
    import torch


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
        import torch

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalising(Scaling):
    """Map intensities to the fraction of voxels that are darker, linear between known points.

    Args:
        intensities: rising, at least two; all float32.
        levels: the mapped value at each of them, rising; constant beyond both ends.
    """

    intensities: tuple[float, ...]
    levels: tuple[float, ...]

    def apply_(self, values: torch.Tensor, body: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        points = torch.tensor(self.intensities, dtype=torch.float32, device=values.device)
        levels = torch.tensor(self.levels, dtype=torch.float32, device=values.device)
        values.clamp_(points[0], points[-1])
        after = torch.searchsorted(points, values.contiguous()).clamp_(1, len(points) - 1)
        start, level = points[after - 1], levels[after - 1]
        # A fraction, not a slope: the slope between two close float32 can exceed float32.
        values.sub_(start).div_(points[after] - start)
        return values.mul_(levels[after] - level).add_(level)


def equalising(values: np.ndarray, bins: int) -> Scaling:
    """Return the scaling that spreads these intensities evenly over 0 to 1.

    The lowest intensity becomes 0, which leaves out an empty background, and the highest 1. With at
    most `bins` distinct intensities it is exact; else it is linear between `bins` quantiles.
    Without contrast everything becomes 0.

    Args:
        values: intensities of any shape, at least one.

    Source: Gonzalez & Woods, Digital Image Processing, 3.3.1; scaled as OpenCV does.
    """
    points, counts = np.unique(values.astype(np.float32), return_counts=True)
    shares = np.cumsum(counts) / counts.sum()
    if len(points) > bins:
        quantiles = np.unique(np.searchsorted(shares, np.linspace(shares[0], 1, bins)))
        points, shares = points[quantiles], shares[quantiles]
    if len(points) == 1:
        return Scaling(shift=float(points[0]), factor=0.0)
    levels = (shares - shares[0]) / (shares[-1] - shares[0])
    return Equalising(
        shift=0.0,
        factor=1.0,
        low=float(points[0]),
        high=float(points[-1]),
        intensities=tuple(points.tolist()),
        levels=tuple(levels.tolist()),
    )


ABSENT = Scaling(shift=0.0, factor=0.0)  # a missing channel: about the mean of the others


class Normaliser(Section, ABC):
    """Base class of the mappings from intensities of a channel to network input."""

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

    @property
    def fitted_region(self) -> str | None:
        """Voxels whose intensities `fit` needs: `body`, `scan` or `nonzero`; None for none."""
        return getattr(self, "region", None)

    @property
    def shown(self) -> str:
        """What people read of it in a plan."""
        return str(getattr(self, "method", ""))

    @property
    def why(self) -> str:
        """What speaks for it in a plan, if it leaves nothing to the plan; empty: nothing known."""
        return ""

    @property
    def open_keys(self) -> list[str]:
        """Keys that are "auto" and for a plan to fill in."""
        return [key for key, value in self if value == AUTO]


class Window(Normaliser):
    """CT normalisation: clip to [low, high], subtract the foreground mean, divide by its SD."""

    method: Literal["window"] = "window"
    low: Intensity | Auto = AUTO  # auto: 0.5 percentile of the foreground of the training cases
    high: Intensity | Auto = AUTO  # auto: 99.5 percentile
    mean: Intensity | Auto = AUTO
    sd: StandardDeviation | Auto = AUTO

    @model_validator(mode="after")
    def _is_not_empty(self) -> Window:
        refuse_empty_window(self.low, self.high)
        return self

    @property
    def shown(self) -> str:
        return (
            f"clip to {self.low:g} … {self.high:g}, subtract {self.mean:g}, divide by {self.sd:g}"
        )

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(
            low=closed(self.low),
            high=closed(self.high),
            shift=closed(self.mean),
            factor=1 / closed(self.sd),
        )


class ZScore(Normaliser):
    """MRI normalisation: subtract the mean and divide by the standard deviation of the scan.

    A constant scan becomes 0, and with the region `nonzero` so do the voxels outside the body.
    """

    method: Literal["zscore"] = "zscore"
    # Voxels over which the mean and SD are taken; with `nonzero` all other voxels stay 0.
    region: Literal["body", "scan", "nonzero"] = "body"

    @property
    def why(self) -> str:
        return "each scan by its own mean and standard deviation, which needs no fixed unit"

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


class Percentile(Normaliser):
    """Scaling that maps two percentiles of the scan to 0 and 1, and clips there.

    A constant scan becomes 0.
    """

    method: Literal["percentile"] = "percentile"
    low_percent: Annotated[float, Field(ge=0, lt=100)] = 1.0
    high_percent: Annotated[float, Field(gt=0, le=100)] = 99.0
    region: Literal["body", "scan"] = "body"

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


class Histogram(Normaliser):
    """Uniform normalisation by histogram equalisation: equally many voxels at each level, 0 to 1.

    A constant scan becomes 0.
    """

    method: Literal["histogram"] = "histogram"
    bins: Annotated[int, Field(ge=2, le=65_536)] = 256  # levels, if more intensities are distinct
    region: Literal["body", "scan"] = "body"

    @property
    def why(self) -> str:
        return "each scan by its own histogram, which any rising change of intensities leaves"

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return equalising(_inside(array, body, self.region), self.bins)


class Scale(Normaliser):
    """Scaling by fixed numbers, for photographs or intensities that are already comparable."""

    method: Literal["scale"] = "scale"
    subtract: Intensity = 0.0
    divide_by: StandardDeviation = 1.0

    def fit(self, array: np.ndarray, body: np.ndarray | None = None) -> Scaling:
        return Scaling(shift=self.subtract, factor=1 / self.divide_by)


def _inside(array: np.ndarray, body: np.ndarray | None, region: str) -> np.ndarray:
    """Return the values of the region, or all values if it is empty or not given."""
    if region == "nonzero" and body is None:
        body = array != 0
    return array[body] if region != "scan" and body is not None and body.any() else array


# What `method` may be under [preprocess.normalise].
Normalise = Annotated[
    Window | ZScore | Percentile | Histogram | Scale, Field(discriminator="method")
]
NORMALISERS: tuple[type[Normaliser], ...] = get_args(get_args(Normalise)[0])
