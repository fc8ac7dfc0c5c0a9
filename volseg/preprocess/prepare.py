"""A scan → network input; `restore` is the way back.

It works a few planes at a time, so that the network input of a whole scan need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from volseg.errors import ScanError
from volseg.preprocess.crop import (
    AxisOrder,
    body_threshold,
    box_where,
    canonical_geometry,
    crop,
    scaled_box,
    to_canonical,
)
from volseg.preprocess.normalise import Normaliser, Scaling
from volseg.preprocess.resample import (
    CPU,
    Kind,
    PlaneReader,
    resample_mask,
    resampled_shape,
    slowest_axis,
)
from volseg.volume import BoundingBox, Geometry, Volume, slabs_of

SLAB_VOXELS = (
    524_288  # native voxels looked at together; bounds the float32 temporaries to some 2 MB each
)
SAMPLE_VOXELS = 8_000_000  # of a scan, from which its own mean, deviation or percentiles are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """How scans become network input: spacing along the prepared axes in mm, one normaliser per channel.

    Args:
        crop: `body`: to the box of the body, outside which the mask is background by definition; `nonzero`: to the box of the
            voxels that are not 0 in some channel; `none`.
        body_above: intensity over which a voxel is body; None: a tenth of the 99th percentile of the first channel.
        axes: `canonical`: R, A, S; `stored`: as in the file, the slowest first.
        transpose: applied after that: prepared axis n is axis `transpose[n]` of those.
        separate_above: where the coarsest spacing, of the scan or else of the target, is more than this many times the finest,
            the nearest plane is taken along that axis and only the two others are interpolated, on both ways.
        clip_overshoot: cubic only: nothing beyond the range of the scan, or of the slice where an axis is separate.
        normalise_first: normalise the scan's own voxels before they are resampled, instead of what comes out.
    """

    spacing_mm: tuple[float, float, float]
    normalisers: tuple[Normaliser, ...]
    interpolation: Literal["linear", "cubic"] = "linear"
    crop: Literal["body", "nonzero", "none"] = "body"
    body_above: float | None = None
    axes: Literal["canonical", "stored"] = "canonical"
    transpose: tuple[int, int, int] = (0, 1, 2)
    separate_above: float | None = None
    clip_overshoot: bool = False
    normalise_first: bool = False


@dataclass(frozen=True, slots=True)
class Trail:
    """The way back: the scan's grid, its axis order, the box kept (prepared axes), the resampled shape."""

    geometry: Geometry
    order: AxisOrder
    box: BoundingBox
    shape: tuple[int, int, int]
    separate_axis: int | None = (
        None  # of the prepared axes: takes the nearest plane instead of interpolating
    )

    @property
    def cropped(self) -> Geometry:
        """The scan's own grid inside the box, along the prepared axes."""
        return canonical_geometry(self.geometry, self.order).crop(self.box)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of the prepared grid along its axes: what was asked for, but for a whole number of voxels."""
        own = self.cropped
        r, a, s = (
            mm * n / m for mm, n, m in zip(own.spacing_mm, own.shape, self.shape, strict=True)
        )
        return r, a, s


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`array` (C, R, A, S) float32, contiguous, and the way back to the scan.

    `has_body` is False where the recipe crops to the body and there is none: the mask is then background by definition.
    """

    array: np.ndarray
    trail: Trail
    has_body: bool = True


def prepare(images: Mapping[str, Volume], settings: PrepareSettings) -> Prepared:
    """Canonical axes → crop to the body → resample → normalise, all planes at once.

    Raises:
        ScanError: the channels lie on different grids.
    """
    preparation = Preparation(images, settings)
    planes = preparation.planes()
    array = planes.read(0, planes.shape[planes.axis]).numpy()
    return Prepared(np.ascontiguousarray(array), preparation.trail, preparation.has_body)


class Preparation:
    """What has to be known of a scan before its planes can be prepared one by one.

    Args:
        images: channel name → scan, in the order of the network's input channels; all on one grid.

    Raises:
        ScanError: the channels lie on different grids.
    """

    def __init__(self, images: Mapping[str, Volume], settings: PrepareSettings) -> None:
        _check_one_grid(images)
        self._settings = settings
        self._volumes = list(images.values())
        first = self._volumes[0]
        is_canonical = settings.axes == "canonical"
        order = (AxisOrder.of(first.geometry) if is_canonical else AxisOrder.stored()).transposed(
            settings.transpose
        )
        stored = [to_canonical(volume.array, order) for volume in self._volumes]
        self._above = _stored_threshold(first, stored[0], settings.body_above)
        found = self._find_box(stored)
        box = found or BoundingBox.whole(
            (stored[0].shape[0], stored[0].shape[1], stored[0].shape[2])
        )
        cropped = canonical_geometry(first.geometry, order).crop(box)
        separate = separate_axis(cropped.spacing_mm, settings.spacing_mm, settings.separate_above)
        shape = resampled_shape(cropped, settings.spacing_mm)
        self.trail = Trail(first.geometry, order, box, shape, separate)
        self.has_body = found is not None or settings.crop != "body"
        self._views = [crop(array, box) for array in stored]

    def planes(
        self, axis: int | None = None, part: BoundingBox | None = None, device: torch.device = CPU
    ) -> PreparedPlanes:
        """The network input, or a part of the prepared grid, to be read plane by plane along a prepared axis.

        Args:
            axis: None for the one that is slowest in memory.
            device: where planes are resampled and normalised.
        """
        axis = self.trail.separate_axis if axis is None else axis
        axis = slowest_axis(self._views[0]) if axis is None else axis
        channels = [self._channel(index, axis, device) for index in range(len(self._views))]
        return PreparedPlanes(self.trail.shape, channels, part, device)

    def at(self, spacing_mm: tuple[float, float, float]) -> Preparation:
        """The same scan on a grid of another spacing, resampled linearly; box and normalisation stay those of this one."""
        _ = self._scalings, self._nonzero  # looked for once, on this grid, for both
        other = copy(self)
        other._settings = replace(
            self._settings, spacing_mm=spacing_mm, interpolation="linear", separate_above=None
        )
        shape = resampled_shape(self.trail.cropped, spacing_mm)
        other.trail = replace(self.trail, shape=shape, separate_axis=None)
        return other

    def body_box(self) -> BoundingBox | None:
        """The box of the body on the prepared grid, by the first channel; None where there is none."""
        view, trail = self._views[0], self.trail
        box = box_where(lambda part: view[part] > self._above, view)
        # One voxel more, so that every voxel of the body lies between prepared ones of the box.
        return None if box is None else scaled_box(box, trail.box.shape, trail.shape, (1, 1, 1))

    @property
    def empty_level(self) -> float | None:
        """Network input of the first channel up to which a voxel lies outside the body; None where that cannot be told from it."""
        first, scaling = self._volumes[0], self._scalings[0]
        above = self._above * first.slope + first.intercept
        if self._settings.crop != "body" or not scaling.low <= above < scaling.high:
            return None  # a clipped intensity does not say on which side of the threshold it was
        return float(scaling(np.array([above], np.float32))[0])

    def _find_box(self, stored: Sequence[np.ndarray]) -> BoundingBox | None:
        if self._settings.crop == "body":
            return box_where(lambda part: stored[0][part] > self._above, stored[0])
        if self._settings.crop == "nonzero":
            pairs = list(zip(self._volumes, stored, strict=True))
            return box_where(
                lambda part: np.any(
                    [volume.intensities(array[part]) != 0 for volume, array in pairs], axis=0
                ),
                stored[0],
            )
        return None

    def _channel(
        self, index: int, axis: int | None, device: torch.device
    ) -> tuple[PlaneReader, Finish]:
        """The planes of one channel, and what is left to be done to them, in place, once they are resampled."""
        volume, scaling = self._volumes[index], self._scalings[index]
        if not self._settings.normalise_first:

            def finish(planes: torch.Tensor) -> torch.Tensor:
                if volume.is_scaled:
                    planes.mul_(volume.slope).add_(volume.intercept)
                return scaling.apply_(planes)

            return self._reader(index, axis, device=device), finish
        nonzero = self._nonzero

        def convert(planes: np.ndarray, which: slice) -> np.ndarray:
            body = None if nonzero is None else nonzero.transpose(reader.axes)[which]
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
            (kinds[0], kinds[1], kinds[2]),
            axis,
            convert=convert,
            limits=limits,
            device=device,
        )

    def _range(self, index: int, *, is_converted: bool) -> tuple[float, float]:
        """Smallest and largest value that goes into the resampling."""
        view = self._views[index]
        ends = np.array([view.min(), view.max()])
        if is_converted:
            ends = self._scalings[index](_scaled(ends, self._volumes[index]), np.ones(2, bool))
            if self._nonzero is not None:  # outside the body the normaliser puts 0
                ends = np.array([min(0, ends.min()), max(0, ends.max())])
        return float(ends.min()), float(ends.max())

    @cached_property
    def _nonzero(self) -> np.ndarray | None:
        """(R, A, S) bool of the cropped scan where a normaliser asks for it: not 0 in some channel, holes filled."""
        if all(
            getattr(normaliser, "region", "") != "nonzero"
            for normaliser in self._settings.normalisers
        ):
            return None
        found = np.zeros(self._views[0].shape, bool)
        axis = slowest_axis(self._views[0])
        for index in range(found.shape[axis]):
            plane = tuple(index if n == axis else slice(None) for n in range(3))
            for volume, view in zip(self._volumes, self._views, strict=True):
                found[plane] |= volume.intensities(view[plane]) != 0
        return ndimage.binary_fill_holes(found)

    @cached_property
    def _scalings(self) -> list[Scaling]:
        found = []
        for index, normaliser in enumerate(self._settings.normalisers):
            # What is normalised as it is stored was trained on statistics of every voxel, and extremes are in no sample.
            exact = (
                normaliser.fit_parts(self._parts(index)) if self._settings.normalise_first else None
            )
            found.append(exact or normaliser.fit(self._sample(index)))
        return found

    def _parts(self, index: int) -> Iterator[np.ndarray]:
        """The intensities as stored, of the region of which the channel's normaliser wants to know."""
        region, view = (
            getattr(self._settings.normalisers[index], "region", None),
            self._views[index],
        )
        for part in slabs_of(view):
            values = _scaled(view[part], self._volumes[index])
            if region == "body":
                yield values[self._views[0][part] > self._above]
            else:
                yield (
                    values.ravel()
                    if self._nonzero is None or region != "nonzero"
                    else values[self._nonzero[part]]
                )

    def _sample(self, index: int) -> np.ndarray:
        """Intensities of the region of which the channel's normaliser wants to know: all, or evenly spread ones of many."""
        region = getattr(self._settings.normalisers[index], "region", None)
        if region is None:
            return np.empty(0, np.float32)
        volume = self._volumes[index]
        axis = slowest_axis(self._views[0])
        if self._settings.normalise_first:
            view = self._views[index]
            # Whole planes of the scan as stored, so that no copy is larger than the sample.
            every = tuple(
                slice(None, None, -(-view.size // SAMPLE_VOXELS) if n == axis else None)
                for n in range(3)
            )
            body = None
            if region == "body":
                body = self._views[0][every] > self._above
            elif self._nonzero is not None:
                body = self._nonzero[every]
            values = view[every]
            return _scaled(
                values.ravel() if body is None or not body.any() else values[body], volume
            )
        reader = self._reader(index, axis)
        first = self._reader(0, axis) if region == "body" and index else reader
        every = -(-int(np.prod(self.trail.shape)) // SAMPLE_VOXELS)
        inside, outside = [], []
        length = self.trail.shape[axis]
        step = max(1, SLAB_VOXELS * length // int(np.prod(self.trail.shape)))
        for start in range(0, length, step):
            stop = min(length, start + step)
            values = np.moveaxis(reader.read(start, stop).numpy(), axis, 0).ravel()
            others = (
                values
                if first is reader
                else np.moveaxis(first.read(start, stop).numpy(), axis, 0).ravel()
            )
            phase = -(start * (values.size // (stop - start))) % every
            chosen = slice(phase, None, every)
            body = others[chosen] > self._above if region == "body" else None
            inside.append(values[chosen] if body is None else values[chosen][body])
            if not any(map(len, inside)):
                outside.append(values[chosen])
        found = np.concatenate(inside)
        return _scaled(found if found.size else np.concatenate(outside), volume)


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
        """Planes `start` to `stop`: float32 (C, R, A, S) on the device, but `stop - start` long along the axis."""
        shape = tuple(stop - start if axis == self.axis else n for axis, n in enumerate(self.shape))
        first = self._part.start[self.axis]
        across = tuple(
            slice(None) if axis == self.axis else each
            for axis, each in enumerate(self._part.slices)
        )
        if len(self._channels) == 1:  # which nothing has to stand beside
            reader, finish = self._channels[0]
            return finish(reader.read(first + start, first + stop)[across])[None]
        result = torch.empty((len(self._channels), *shape), device=self._device)
        for index, (reader, finish) in enumerate(self._channels):
            result[index] = finish(reader.read(first + start, first + stop)[across])
        return result


def _scaled(stored: np.ndarray, volume: Volume) -> np.ndarray:
    """Stored values or what resampling made of them → intensities: resampling is linear, so the scale may follow it."""
    if not volume.is_scaled:
        return stored
    return stored * np.float32(volume.slope) + np.float32(volume.intercept)


def separate_axis(
    own_mm: tuple[float, float, float], wanted_mm: tuple[float, float, float], above: float | None
) -> int | None:
    """The axis along which the nearest plane is taken, if one alone is so coarse."""
    if above is None:
        return None
    for spacing in (own_mm, wanted_mm):
        if max(spacing) / min(spacing) > above:
            coarse = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def prepare_mask(reference: np.ndarray, trail: Trail) -> np.ndarray:
    """A reference mask (I, J, K) on the scan's grid → label values on the prepared grid (R, A, S), contiguous."""
    return np.ascontiguousarray(
        resample_mask(crop(to_canonical(reference, trail.order), trail.box), trail.shape)
    )


def _stored_threshold(volume: Volume, stored: np.ndarray, above: float | None) -> float:
    """The body threshold in stored units, where the comparison is made without scaling the scan."""
    intensity = body_threshold(stored, volume.slope, volume.intercept) if above is None else above
    return (intensity - volume.intercept) / volume.slope


def _check_one_grid(images: Mapping[str, Volume]) -> None:
    (first_name, first), *others = images.items()
    for name, volume in others:
        difference = first.geometry.difference(volume.geometry)
        if difference:
            raise ScanError(
                f"channel {name!r} is not on the grid of {first_name!r}: {difference}",
                fix=f"resample {name!r} onto the grid of {first_name!r}",
                code="E_PAIR",
            )
