"""Scan → network input; `restore` is the inverse.

It works on a few planes at a time, so the network input of a whole scan is never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from volseg.errors import ScanError
from volseg.preprocessing.crop import (
    body_threshold,
    scaled_box,
)
from volseg.preprocessing.lattice import difference
from volseg.preprocessing.resample import (
    CPU,
    Interpolation,
    Kind,
    PlaneReader,
    resample_mask,
    resampled_shape,
)
from volseg.recipe import Normaliser, Preprocess
from volseg.recipe.normalise import ABSENT, Scaling
from volseg.recipe.section import closed
from volseg.volume import AxisOrder, BoundingBox, Geometry, Volume, slabs_of, slowest_axis

SLAB_VOXELS = 524_288  # native voxels per step; keeps each float32 temporary to about 2 MB
SAMPLE_VOXELS = 8_000_000  # sample of a scan for its mean, standard deviation or percentiles


@dataclass(frozen=True, slots=True)
class Trail:
    """What the inverse needs: the scan's grid and axis order, the cropped box, the resampled shape.

    The box, the shape and `separate_axis`, resampled by nearest neighbour, are in prepared axes.
    """

    geometry: Geometry
    order: AxisOrder
    box: BoundingBox
    shape: tuple[int, int, int]
    separate_axis: int | None = None

    @property
    def cropped(self) -> Geometry:
        """The scan's grid inside the box, along the prepared axes."""
        return self.geometry.reordered(self.order).crop(self.box)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Spacing of the prepared grid: the target spacing, adjusted to whole numbers of voxels."""
        grid = self.cropped
        axes = zip(grid.spacing_mm, grid.shape, self.shape, strict=True)
        r, a, s = (mm * n / m for mm, n, m in axes)
        return r, a, s


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Network input `array` (C, R, A, S), contiguous float32, and its `trail` back to the scan.

    `has_body` is False if the recipe crops to the body and finds none; the mask is then background.
    """

    array: np.ndarray
    trail: Trail
    has_body: bool = True


def prepare(
    images: Mapping[str, Volume], settings: Preprocess, absent: Collection[str] = ()
) -> Prepared:
    """Reorder axes, crop to the body, resample and normalise all planes at once.

    Arguments and errors are those of `Preparation`.
    """
    preparation = Preparation(images, settings, absent)
    planes = preparation.planes()
    array = planes.read(0, planes.shape[planes.axis]).numpy()
    return Prepared(np.ascontiguousarray(array), preparation.trail, preparation.has_body)


class Preparation:
    """A scan ready to be prepared plane by plane: its crop, target grid and normalisation.

    Args:
        images: channel name → scan, in the order of the network's input channels; all on one grid.
        settings: of a closed recipe.
        absent: channels that the case lacks; their input is 0.

    Raises:
        ScanError: the channels lie on different grids.
    """

    def __init__(
        self, images: Mapping[str, Volume], settings: Preprocess, absent: Collection[str] = ()
    ) -> None:
        _check_one_grid(images)
        self._settings = settings
        self._normalisers: list[Normaliser | None] = [
            None if name in absent else settings.normaliser_of(name) for name in images
        ]
        self._volumes = list(images.values())
        first = self._volumes[0]
        is_canonical = settings.axes == "canonical"
        order = AxisOrder.of(first.geometry) if is_canonical else AxisOrder.stored()
        order = order.transposed(settings.transpose)
        stored = [order.apply(volume.array) for volume in self._volumes]
        self._above = _stored_threshold(first, stored[0], settings.body_above)
        content_box = self._find_box(stored)
        i, j, k = stored[0].shape
        box = content_box or BoundingBox.whole((i, j, k))
        cropped = first.geometry.reordered(order).crop(box)
        spacing_mm = closed(settings.spacing_mm)
        separate = separate_axis(cropped.spacing_mm, spacing_mm, settings.separate_above)
        shape = resampled_shape(cropped, spacing_mm)
        self.trail = Trail(first.geometry, order, box, shape, separate)
        self.has_body = content_box is not None or settings.crop != "body"
        self._views = [array[box.slices] for array in stored]

    def planes(
        self, axis: int | None = None, part: BoundingBox | None = None, device: torch.device = CPU
    ) -> PreparedPlanes:
        """Return a reader of the network input, or of a part of it, along a prepared axis.

        Args:
            axis: None for the separate axis, else for the slowest one in memory.
            device: where planes are resampled and normalised.
        """
        axis = self.trail.separate_axis if axis is None else axis
        axis = slowest_axis(self._views[0]) if axis is None else axis
        channels = [self._channel(index, axis, device) for index in range(len(self._views))]
        return PreparedPlanes(self.trail.shape, channels, part, device)

    def at(self, spacing_mm: tuple[float, float, float]) -> Preparation:
        """Return the same scan at another spacing, resampled linearly, with this normalisation."""
        _ = self._scalings, self._nonzero  # computed once, on this grid, for both
        other = copy(self)
        changes = {"spacing_mm": spacing_mm, "interpolation": "linear", "separate_above": None}
        other._settings = self._settings.model_copy(update=changes)
        shape = resampled_shape(self.trail.cropped, spacing_mm)
        other.trail = replace(self.trail, shape=shape, separate_axis=None)
        return other

    def body_box(self) -> BoundingBox | None:
        """Return the box of the body on the prepared grid from the first channel, or None."""
        view, trail = self._views[0], self.trail
        box = BoundingBox.where(lambda part: view[part] > self._above, view)
        # The margin puts every voxel of the body between prepared voxels of the box.
        return None if box is None else scaled_box(box, trail.box.shape, trail.shape, (1, 1, 1))

    @property
    def empty_level(self) -> float | None:
        """Body threshold in network input of the first channel, or None.

        None if the recipe does not crop to the body, or if clipping hides the threshold.
        """
        first, scaling = self._volumes[0], self._scalings[0]
        above = self._above * first.slope + first.intercept
        if self._settings.crop != "body" or not scaling.low <= above < scaling.high:
            return None
        return float(scaling(np.array([above], np.float32))[0])

    def _find_box(self, stored: Sequence[np.ndarray]) -> BoundingBox | None:
        if self._settings.crop == "body":
            return BoundingBox.where(lambda part: stored[0][part] > self._above, stored[0])
        if self._settings.crop == "nonzero":
            pairs = list(zip(self._volumes, stored, strict=True))

            def is_nonzero(part: tuple[slice, slice, slice]) -> np.ndarray:
                channels = [volume.intensities(array[part]) != 0 for volume, array in pairs]
                return np.any(channels, axis=0)

            return BoundingBox.where(is_nonzero, stored[0])
        return None

    def _channel(
        self, index: int, axis: int | None, device: torch.device
    ) -> tuple[PlaneReader, Finish]:
        """Return the reader of one channel and the function that finishes its planes in place."""
        volume, scaling = self._volumes[index], self._scalings[index]
        if not self._settings.normalise_first:

            def finish(planes: torch.Tensor) -> torch.Tensor:
                if volume.is_scaled:
                    planes.mul_(volume.slope).add_(volume.intercept)
                return scaling.apply_(planes)

            return self._reader(index, axis, device=device), finish
        nonzero = self._nonzero

        def convert(planes: np.ndarray, indices: slice) -> np.ndarray:
            body = None if nonzero is None else nonzero.transpose(reader.axes)[indices]
            return scaling(_scaled(planes, volume), body)

        reader = self._reader(index, axis, convert, device)
        return reader, lambda planes: planes

    def _reader(
        self,
        index: int,
        axis: int | None,
        convert: Callable[[np.ndarray, slice], np.ndarray] | None = None,
        device: torch.device = CPU,
    ) -> PlaneReader:
        kinds: list[Kind] = [self._settings.interpolation] * 3
        limits: tuple[float, float] | Literal["plane"] | None = None
        if self._settings.clip_overshoot and self._settings.interpolation == "cubic":
            limits = self._range(index, is_converted=convert is not None)
        if self.trail.separate_axis is not None:
            kinds[self.trail.separate_axis] = "nearest"
            limits = "plane" if limits is not None and axis == self.trail.separate_axis else limits
        return PlaneReader(
            self._views[index],
            self.trail.shape,
            Interpolation((kinds[0], kinds[1], kinds[2]), limits),
            axis,
            convert=convert,
            device=device,
        )

    def _range(self, index: int, *, is_converted: bool) -> tuple[float, float]:
        """Return the smallest and largest value of the input of the resampling."""
        view = self._views[index]
        values = np.array([view.min(), view.max()])
        if is_converted:
            values = self._scalings[index](_scaled(values, self._volumes[index]), np.ones(2, bool))
            if self._nonzero is not None:  # normalised voxels outside the body are 0
                values = np.array([min(0, values.min()), max(0, values.max())])
        return float(values.min()), float(values.max())

    @cached_property
    def _nonzero(self) -> np.ndarray | None:
        """(R, A, S) bool of the cropped scan: nonzero in any channel, holes filled.

        None if no normaliser needs it.
        """
        if "nonzero" not in map(self._region, range(len(self._normalisers))):
            return None
        nonzero = np.zeros(self._views[0].shape, bool)
        axis = slowest_axis(self._views[0])
        for index in range(nonzero.shape[axis]):
            plane = tuple(index if n == axis else slice(None) for n in range(3))
            for volume, view in zip(self._volumes, self._views, strict=True):
                nonzero[plane] |= volume.intensities(view[plane]) != 0
        return ndimage.binary_fill_holes(nonzero)

    @cached_property
    def _scalings(self) -> list[Scaling]:
        scalings = []
        for index, normaliser in enumerate(self._normalisers):
            if normaliser is None:
                scalings.append(ABSENT)
                continue
            scaling = None
            if self._settings.normalise_first:
                # These networks were trained with statistics of all voxels; samples miss extremes.
                scaling = normaliser.fit_parts(self._parts(index))
            scalings.append(scaling or normaliser.fit(self._sample(index)))
        return scalings

    def _region(self, index: int) -> str | None:
        normaliser = self._normalisers[index]
        return None if normaliser is None else normaliser.fitted_region

    def _parts(self, index: int) -> Iterator[np.ndarray]:
        """Yield the intensities of the region of a channel's normaliser, on the stored grid."""
        region = self._region(index)
        view = self._views[index]
        for part in slabs_of(view):
            values = _scaled(view[part], self._volumes[index])
            if region == "body":
                yield values[self._views[0][part] > self._above]
            elif region == "nonzero" and self._nonzero is not None:
                yield values[self._nonzero[part]]
            else:
                yield values.ravel()

    def _sample(self, index: int) -> np.ndarray:
        """Return intensities of the region of a channel's normaliser: all, or an even sample."""
        region = self._region(index)
        if region is None:
            return np.empty(0, np.float32)
        sample = self._stored_sample if self._settings.normalise_first else self._resampled_sample
        return _scaled(sample(index, region), self._volumes[index])

    def _stored_sample(self, index: int, region: str) -> np.ndarray:
        """Return stored values in whole planes, so that no copy is larger than the sample."""
        view, axis = self._views[index], slowest_axis(self._views[0])
        spacing = -(-view.size // SAMPLE_VOXELS)
        planes = tuple(slice(None, None, spacing if n == axis else None) for n in range(3))
        body = None
        if region == "body":
            body = self._views[0][planes] > self._above
        elif self._nonzero is not None:
            body = self._nonzero[planes]
        values = view[planes]
        return values[body] if body is not None and body.any() else values.ravel()

    def _resampled_sample(self, index: int, region: str) -> np.ndarray:
        """Return resampled stored values, evenly spaced, from slabs."""
        axis, n = slowest_axis(self._views[0]), int(np.prod(self.trail.shape))
        readers = [self._reader(index, axis)]
        if region == "body" and index:
            readers.append(self._reader(0, axis))  # whose values are compared with the threshold
        spacing, length = -(-n // SAMPLE_VOXELS), self.trail.shape[axis]
        step = max(1, SLAB_VOXELS * length // n)
        inside, outside = [], []
        for start in range(0, length, step):
            stop = min(length, start + step)
            slabs = [np.moveaxis(reader.read(start, stop).numpy(), axis, 0) for reader in readers]
            phase = -(start * (slabs[0].size // (stop - start))) % spacing
            sample, first = (slab.ravel()[phase::spacing] for slab in (slabs[0], slabs[-1]))
            inside.append(sample[first > self._above] if region == "body" else sample)
            if not any(map(len, inside)):
                outside.append(sample)
        sample = np.concatenate(inside)
        return sample if sample.size else np.concatenate(outside)


Finish = Callable[[torch.Tensor], torch.Tensor]


class PreparedPlanes:
    """Network input (C, R, A, S), or a part of it, read a few planes at a time."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[tuple[PlaneReader, Finish]],
        part: BoundingBox | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._part = part or BoundingBox.whole(shape)
        self.shape = self._part.shape
        self.axis = channels[0][0].axis
        self._channels = channels
        self._device = device

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return planes `start` to `stop` along the axis: float32 (C, R, A, S) on the device."""
        shape = tuple(stop - start if axis == self.axis else n for axis, n in enumerate(self.shape))
        first = self._part.start[self.axis]
        across = tuple(
            slice(None) if axis == self.axis else part
            for axis, part in enumerate(self._part.slices)
        )
        if len(self._channels) == 1:  # without a copy
            reader, finish = self._channels[0]
            return finish(reader.read(first + start, first + stop)[across])[None]
        result = torch.empty((len(self._channels), *shape), device=self._device)
        for index, (reader, finish) in enumerate(self._channels):
            result[index] = finish(reader.read(first + start, first + stop)[across])
        return result


def _scaled(stored: np.ndarray, volume: Volume) -> np.ndarray:
    """Convert stored values to intensities, before or after resampling, which is linear."""
    if not volume.is_scaled:
        return stored
    return stored * np.float32(volume.slope) + np.float32(volume.intercept)


def separate_axis(
    scan_mm: tuple[float, float, float], target_mm: tuple[float, float, float], above: float | None
) -> int | None:
    """Return the axis to resample by nearest neighbour, if a single one is much coarser."""
    if above is None:
        return None
    for spacing in (scan_mm, target_mm):
        if max(spacing) / min(spacing) > above:
            coarse = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def prepare_mask(reference: np.ndarray, trail: Trail) -> np.ndarray:
    """Resample a reference mask (I, J, K) on the scan's grid to the prepared grid (R, A, S)."""
    cropped = trail.order.apply(reference)[trail.box.slices]
    return np.ascontiguousarray(resample_mask(cropped, trail.shape))


def _stored_threshold(
    volume: Volume, stored: np.ndarray, above: float | Literal["per_scan"]
) -> float:
    """Return the body threshold in stored units, so that the scan need not be scaled."""
    per_scan = above == "per_scan"
    intensity = body_threshold(stored, volume.slope, volume.intercept) if per_scan else above
    return (intensity - volume.intercept) / volume.slope


def _check_one_grid(images: Mapping[str, Volume]) -> None:
    (first_name, first), *others = images.items()
    for name, volume in others:
        if not first.geometry.matches(volume.geometry):
            problem, _ = difference(volume.geometry, first.geometry)
            raise ScanError(
                f"channel {name!r} is not on the grid of {first_name!r}: {problem}",
                fix=f"resample {name!r} onto the grid of {first_name!r}",
                code="E_PAIR",
            )
