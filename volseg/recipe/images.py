"""The section [images]: images, slices of volumes or slices through lesions → network input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field, model_validator

from volseg.errors import VolsegError
from volseg.recipe.normalise import Scaling, equalising
from volseg.recipe.section import (
    AUTO,
    Auto,
    Intensity,
    Positive,
    Section,
    StandardDeviation,
    closed,
    refuse_empty_window,
)

MOST_CHANNELS = 64
PlaneName = Literal["axial", "coronal", "sagittal"]


class ImageNormaliser(Section, ABC):
    """Base class of the mappings from intensities of an image to network input."""

    @abstractmethod
    def fit(self, values: np.ndarray, largest: float | None) -> Scaling:
        """Return the scaling of an image from the intensities of all its channels.

        Args:
            values: of any shape, at least one, finite.
            largest: what white is in the file; None if the file does not say.

        Raises:
            VolsegError: as `check`.
        """

    def check(self, largest: float | None) -> None:
        """Check that what an image says of itself suffices.

        Raises:
            VolsegError: it needs to know what white is.
        """

    @property
    def n_channels(self) -> int | None:
        """Number of channels for which it has numbers of their own; None for any number."""
        return None

    def standardise(self, array: np.ndarray) -> np.ndarray:
        """Return scaled channels (C, H, W) in the range that the network expects."""
        return array


class UnitNormaliser(ImageNormaliser):
    """Scaling to 0 … 1, then to the mean and standard deviation of other images.

    Networks that were trained before, as on ImageNet, expect this of the numbers of their training.
    """

    # Subtracted from, and dividing, the channels after scaling; one number holds for all channels.
    mean: Annotated[tuple[Intensity, ...], Field(max_length=MOST_CHANNELS)] = ()
    sd: Annotated[tuple[StandardDeviation, ...], Field(max_length=MOST_CHANNELS)] = ()

    @model_validator(mode="after")
    def _each_mean_has_an_sd(self) -> UnitNormaliser:
        if len(self.mean) != len(self.sd):
            raise ValueError(
                f"mean has {len(self.mean)} numbers and sd {len(self.sd)}: give one each per "
                "channel, or one for all channels"
            )
        return self

    @property
    def n_channels(self) -> int | None:
        return len(self.mean) if len(self.mean) > 1 else None

    def standardise(self, array: np.ndarray) -> np.ndarray:
        if not self.mean:
            return array
        return (array - _per_channel(self.mean)) / _per_channel(self.sd)


def _per_channel(numbers: tuple[float, ...]) -> np.ndarray:
    """Return (C, 1, 1) float32."""
    return np.array(numbers, np.float32)[:, None, None]


class ScaleImage(UnitNormaliser):
    """Scaling of white to 1, for files whose intensities are already comparable."""

    method: Literal["scale"] = "scale"
    divide_by: Positive | Literal["white"] = "white"  # white: largest value of the file's type

    def check(self, largest: float | None) -> None:
        self._divisor(largest)

    def fit(self, values: np.ndarray, largest: float | None) -> Scaling:
        return Scaling(shift=0.0, factor=1 / self._divisor(largest))

    def _divisor(self, largest: float | None) -> float:
        divisor = largest if self.divide_by == "white" else self.divide_by
        if divisor is None:
            raise VolsegError(
                "the file does not say which intensity is white, so it cannot be scaled to 1",
                fix='give divide_by a number, or choose method = "percentile" or "window"',
                code="E_SCALE",
            )
        return divisor


class WindowImage(UnitNormaliser):
    """Clipping to [low, high], which become 0 and 1; for CT in HU."""

    method: Literal["window"] = "window"
    low: Intensity | Auto = AUTO  # auto: 0.5 percentile of the training images
    high: Intensity | Auto = AUTO  # auto: 99.5 percentile

    @model_validator(mode="after")
    def _is_not_empty(self) -> WindowImage:
        refuse_empty_window(self.low, self.high)
        return self

    def fit(self, values: np.ndarray, largest: float | None) -> Scaling:
        low, high = closed(self.low), closed(self.high)
        return Scaling(low=low, high=high, shift=low, factor=1 / (high - low))


class PercentileImage(UnitNormaliser):
    """Scaling that maps two percentiles of the image to 0 and 1, and clips there."""

    method: Literal["percentile"] = "percentile"
    low_percent: Annotated[float, Field(ge=0, lt=100)] = 1.0
    high_percent: Annotated[float, Field(gt=0, le=100)] = 99.0

    @model_validator(mode="after")
    def _is_not_empty(self) -> PercentileImage:
        if self.low_percent >= self.high_percent:
            raise ValueError(
                f"low_percent {self.low_percent:g} must be less than high_percent "
                f"{self.high_percent:g}"
            )
        return self

    def fit(self, values: np.ndarray, largest: float | None) -> Scaling:
        low, high = np.percentile(values, (self.low_percent, self.high_percent)).tolist()
        if high == low:  # nearly all pixels are of one intensity, as in a small bright lesion
            low, high = float(values.min()), float(values.max())
        return Scaling(low=low, high=high, shift=low, factor=1 / (high - low) if high > low else 0)


class HistogramImage(UnitNormaliser):
    """Uniform normalisation by histogram equalisation: equally many pixels at each level."""

    method: Literal["histogram"] = "histogram"
    bins: Annotated[int, Field(ge=2, le=65_536)] = 256  # levels, if more intensities are distinct

    def fit(self, values: np.ndarray, largest: float | None) -> Scaling:
        return equalising(values, self.bins)


class ZScoreImage(ImageNormaliser):
    """Subtraction of the mean of the image and division by its standard deviation."""

    method: Literal["zscore"] = "zscore"

    def fit(self, values: np.ndarray, largest: float | None) -> Scaling:
        mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        return Scaling(shift=mean, factor=1 / sd if sd > 0 else 0)


# What `method` may be under [images.normalise].
ImageNormalise = Annotated[
    ScaleImage | ZScoreImage | PercentileImage | WindowImage | HistogramImage,
    Field(discriminator="method"),
]
IMAGE_NORMALISERS: tuple[type[ImageNormaliser], ...] = get_args(get_args(ImageNormalise)[0])


class Images(Section):
    """What the network sees of an image, of a slice, or of a lesion."""

    pixels: Annotated[int, Field(ge=8, le=1024)] | Auto = AUTO  # edge of the square input
    # of images and slices; grey fills three channels, colour becomes grey by its luminance
    channels: Literal[1, 3] | Auto = AUTO
    # pad: the whole image, with margins; crop: the middle, without; stretch: the aspect is lost
    fit: Literal["pad", "crop", "stretch"] = "pad"
    normalise: ImageNormalise | Auto = AUTO
    slice_axis: Literal["axial"] = "axial"  # of the slices of volumes

    # ---- lesions only
    field_of_view_mm: Annotated[float, Field(gt=0, le=10_000)] = 48.0  # edge of the square input
    # slices through the centroid; the probabilities of several planes are averaged
    planes: Annotated[tuple[PlaneName, ...], Field(min_length=1)] = get_args(PlaneName)
    neighbours: Annotated[int, Field(ge=0, le=16)] = 0  # slices on either side, as more channels
    neighbour_mm: Annotated[float, Field(gt=0, le=1000)] = 2.5  # from one slice to the next
    mask_channel: bool = True  # the last channel is the part of each pixel that is lesion

    @model_validator(mode="after")
    def _planes_differ(self) -> Images:
        if len(set(self.planes)) < len(self.planes):
            raise ValueError(f"planes must differ, got {', '.join(self.planes)}")
        return self

    @model_validator(mode="after")
    def _normaliser_fits_the_channels(self) -> Images:
        if self.normalise == AUTO:
            return self
        n = closed(self.normalise).n_channels
        if n is not None and self.channels not in (n, AUTO):
            raise ValueError(
                f"normalise.mean holds {n} numbers for {self.channels} channels: give one per "
                "channel, or one for all"
            )
        return self

    @property
    def lesion_channels(self) -> int:
        """Channels of the input of a lesion."""
        return 1 + 2 * self.neighbours + self.mask_channel
