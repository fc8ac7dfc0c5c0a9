"""A scan → network input, and the network's logits → a mask on the scan's own grid.

Both ways work a few planes at a time, so that neither the network input nor the logits of a whole scan need to exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from volseg.errors import ScanError
from volseg.preprocess.crop import AxisOrder, body_threshold, box_where, canonical_geometry, crop, to_canonical
from volseg.preprocess.normalise import Normaliser, Scaling
from volseg.preprocess.resample import (
    CPU,
    Kind,
    PlaneReader,
    positions,
    resample_mask,
    resampled_shape,
    slowest_axis,
)
from volseg.volume import BoundingBox, Geometry, Volume

SLAB_VOXELS = 524_288  # native voxels looked at together; bounds the float32 temporaries to some 2 MB each
SAMPLE_VOXELS = 8_000_000  # of a scan, from which its own mean, deviation or percentiles are taken
LARGEST_EXPONENT = 80.0  # exp of it is still a float32
CERTAIN = 255  # confidence of a probability of 1
TILE_VALUES = 1_000_000  # logits of a tile on its way back to the scan's grid, all classes: float32 temporaries of 4 MB stay in the cache
LARGEST_TILE = 32  # prepared voxels along an edge
BLOCK = 4  # prepared voxels along an edge, over which is judged which classes are needed
NEGLIGIBLE = 2.0**-10  # of a probability: a quarter of one count of the confidence


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
    separate_axis: int | None = None  # of the prepared axes: takes the nearest plane instead of interpolating

    @property
    def cropped(self) -> Geometry:
        """The scan's own grid inside the box, along the prepared axes."""
        return canonical_geometry(self.geometry, self.order).crop(self.box)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of the prepared grid along its axes: what was asked for, but for a whole number of voxels."""
        own = self.cropped
        r, a, s = (mm * n / m for mm, n, m in zip(own.spacing_mm, own.shape, self.shape, strict=True))
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
    return Prepared(array, preparation.trail, preparation.has_body)


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
        order = (AxisOrder.of(first.geometry) if is_canonical else AxisOrder.stored()).transposed(settings.transpose)
        stored = [to_canonical(volume.array, order) for volume in self._volumes]
        self._above = _stored_threshold(first, stored[0], settings.body_above)
        found = self._find_box(stored)
        box = found or BoundingBox.whole((stored[0].shape[0], stored[0].shape[1], stored[0].shape[2]))
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
        other._settings = replace(self._settings, spacing_mm=spacing_mm, interpolation="linear", separate_above=None)
        shape = resampled_shape(self.trail.cropped, spacing_mm)
        other.trail = replace(self.trail, shape=shape, separate_axis=None)
        return other

    def body_box(self) -> BoundingBox | None:
        """The box of the body on the prepared grid, by the first channel; None where there is none."""
        view, trail = self._views[0], self.trail
        box = box_where(lambda part: view[part] > self._above, view)
        if box is None:
            return None
        scale = [n / m for n, m in zip(trail.shape, trail.box.shape, strict=True)]
        # One voxel more, so that every voxel of the body lies between prepared ones of the box.
        r, a, s = (max(0, int(start * f) - 1) for start, f in zip(box.start, scale, strict=True))
        r_stop, a_stop, s_stop = (
            min(n, math.ceil(stop * f) + 1) for stop, f, n in zip(box.stop, scale, trail.shape, strict=True)
        )
        return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))

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
                lambda part: np.any([volume.intensities(array[part]) != 0 for volume, array in pairs], axis=0),
                stored[0],
            )
        return None

    def _channel(self, index: int, axis: int | None, device: torch.device) -> tuple[PlaneReader, Finish]:
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
        if all(getattr(normaliser, "region", "") != "nonzero" for normaliser in self._settings.normalisers):
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
        return [normaliser.fit(self._sample(index)) for index, normaliser in enumerate(self._settings.normalisers)]

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
            every = tuple(slice(None, None, -(-view.size // SAMPLE_VOXELS) if n == axis else None) for n in range(3))
            body = None
            if region == "body":
                body = self._views[0][every] > self._above
            elif self._nonzero is not None:
                body = self._nonzero[every]
            values = view[every]
            return _scaled(values.ravel() if body is None or not body.any() else values[body], volume)
        reader = self._reader(index, axis)
        first = self._reader(0, axis) if region == "body" and index else reader
        every = -(-int(np.prod(self.trail.shape)) // SAMPLE_VOXELS)
        inside, outside = [], []
        length = self.trail.shape[axis]
        step = max(1, SLAB_VOXELS * length // int(np.prod(self.trail.shape)))
        for start in range(0, length, step):
            stop = min(length, start + step)
            values = np.moveaxis(reader.read(start, stop).numpy(), axis, 0).ravel()
            others = values if first is reader else np.moveaxis(first.read(start, stop).numpy(), axis, 0).ravel()
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
        across = tuple(slice(None) if axis == self.axis else each for axis, each in enumerate(self._part.slices))
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
    return np.ascontiguousarray(resample_mask(crop(to_canonical(reference, trail.order), trail.box), trail.shape))


def restore_mask(
    logits: np.ndarray, trail: Trail, values: Sequence[int], *, regions: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The way back of `prepare`, for logits (classes, R, A, S) of the whole prepared grid; see `MaskRestorer`."""
    restorer = MaskRestorer(trail, values, axis=2, regions=regions)
    restorer.add(logits)
    return restorer.result()


class MaskRestorer:
    """Logits of the prepared planes, given in order → the mask on the scan's own grid: the way back of `prepare`.

    `add` raises ScanError where logits are not finite.

    Logits are interpolated linearly on the native voxels and reduced to a label and a confidence at once, one tile of the grid at
    a time, so nothing of classes × native voxels exists. Interpolation is a mean of the corners, which tells much beforehand: a
    tile at all of whose prepared voxels one label is certain has that label everywhere, and of the others only the classes are
    interpolated that can make a difference. What is left out moves a probability by `NEGLIGIBLE` at most.

    Args:
        values: mask value of the classes 1, 2, …; class 0 is the background and the largest logit wins. With `regions`: of the
            classes 0, 1, …, each of which is there where its logit is over 0, a later one over an earlier one.
        axis: the prepared axis along which planes come.
        part: of the prepared grid, for which logits come; what cannot be interpolated from it is background. None: all.
        head: makes logits of what comes instead, (features, r, a, s) → (classes, r, a, s), voxel by voxel; None where logits come.
    """

    def __init__(
        self,
        trail: Trail,
        values: Sequence[int],
        *,
        axis: int,
        regions: bool = False,
        part: BoundingBox | None = None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._head = head
        self._most = TILE_VALUES // (len(values) + 1)
        self._table = np.array([0, *values], np.uint8 if max(values) < 256 else np.uint16)
        self._reduction = _Regions(len(values)) if regions else _LargestWins(len(values) + 1)
        # Pages that are never written cost no memory, so only what is foreground is ever written.
        self._mask = np.zeros(trail.geometry.shape, self._table.dtype, order="F")
        self._confidence = np.zeros(trail.geometry.shape, np.uint8, order="F")
        views = (crop(to_canonical(array, trail.order), trail.box) for array in (self._mask, self._confidence))
        self._mask_view, self._confidence_view = views
        self._axis = axis
        part = part or BoundingBox.whole(trail.shape)
        self._ways = [
            _WayBack(n, native, "nearest" if other == trail.separate_axis else "linear", start, stop)
            for other, (n, native, start, stop) in enumerate(
                zip(trail.shape, self._mask_view.shape, part.start, part.stop, strict=True)
            )
        ]
        self._kept: torch.Tensor | None = None  # the last planes that were given, which the next native plane may need
        self._first = 0  # prepared plane with which they begin
        self._done = 0  # native planes

    def add(self, logits: np.ndarray | torch.Tensor) -> None:
        """The next prepared planes: logits or features (n, R, A, S), any number of planes along the axis; not kept, not changed."""
        planes = torch.as_tensor(logits)
        way, along = self._ways[self._axis], 1 + self._axis
        begin = self._first + (0 if self._kept is None else self._kept.shape[along])
        available = begin + planes.shape[along]
        stop = max(self._done, int(np.searchsorted(way.upper, available)))
        for tile in product(*self._segments(slice(self._done, stop))):
            box = [slice(each.first, each.last) for each in tile]
            self._restore(self._window(planes, begin, box), tile)
        self._done = stop
        first = min(available, int(way.lower[stop])) if stop < len(way.lower) else available
        box = [slice(None) if axis != self._axis else slice(first, available) for axis in range(3)]
        self._kept, self._first = self._window(planes, begin, box), first

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mask (I, J, K), uint8 or uint16 label values, 0 outside the box;
        confidence (I, J, K) uint8: 255 × the probability of the label, 0 where the mask is background.
        """
        return self._mask, self._confidence

    def _segments(self, planes: slice) -> list[list[_Segment]]:
        """The pieces of each axis whose products are the tiles: as near to cubes as it goes."""
        native = [planes if n == self._axis else slice(0, len(way.lower)) for n, way in enumerate(self._ways)]
        # A tile has many voxels where the finer of the two grids has.
        room = self._most * math.prod(min(1.0, way.n / way.n_native) for way in self._ways)
        segments: list[list[_Segment]] = [[], [], []]
        by_length = sorted(range(3), key=lambda n: self._ways[n].cells(native[n]))
        for left, axis in zip((3, 2, 1), by_length, strict=True):  # what a thin axis does not use up is for the others
            edge = min(LARGEST_TILE, max(BLOCK, int(room ** (1 / left))))
            segments[axis] = self._ways[axis].segments(native[axis], edge)
            room /= max((each.last - each.first for each in segments[axis]), default=1)
        return segments

    def _window(self, planes: torch.Tensor, begin: int, box: Sequence[slice]) -> torch.Tensor:
        """A box of the prepared voxels, from the planes kept and those just given, which begin with `begin`: a copy."""
        wanted = box[self._axis]

        def cut(source: torch.Tensor, origin: int) -> torch.Tensor:
            own = slice(max(0, wanted.start - origin), max(0, wanted.stop - origin))
            return source[(slice(None), *(own if n == self._axis else each for n, each in enumerate(box)))]

        new = cut(planes, begin)
        old = new.narrow(1 + self._axis, 0, 0) if self._kept is None else cut(self._kept, self._first)
        return torch.cat([old.to(new.dtype), new], dim=1 + self._axis)

    def _restore(self, planes: torch.Tensor, tile: Sequence[_Segment]) -> None:
        """The native voxels of a tile, from its prepared ones."""
        logits = planes.float() if self._head is None else self._head(planes)
        found = self._reduction(logits, tile)
        if found is None:
            return
        winner, confidence = (each.cpu().numpy() for each in found)
        native = tuple(each.native for each in tile)
        box = BoundingBox.around(winner > 0)
        if box is None:
            return
        winner, confidence = winner[box.slices], confidence[box.slices]
        self._mask_view[native][box.slices] = self._table.take(winner)
        self._confidence_view[native][box.slices] = confidence * (winner > 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """A piece of one axis: the native voxels `native` lie between the prepared ones `first` to `last`."""

    native: slice
    first: int
    last: int
    lower: np.ndarray  # of each native voxel: the prepared one below it, counted from `first`
    weight: np.ndarray  # and how much of the one above it there is

    def interpolate(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """(classes, r, a, s) with prepared voxels along the axis → with native ones."""
        n = values.shape[axis]
        if not self.weight.any():
            is_same = np.array_equal(self.lower, np.arange(n))
            return values if is_same else values.index_select(axis, torch.from_numpy(self.lower).to(values.device))
        matrix = np.zeros((len(self.lower), n), np.float32)
        rows = np.arange(len(self.lower))
        matrix[rows, self.lower] = 1 - self.weight
        matrix[rows, np.minimum(self.lower + 1, n - 1)] += self.weight
        weights = torch.from_numpy(matrix).to(values.device)
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        if not after:
            return torch.matmul(values, weights.T)
        flat = values.reshape(math.prod(before), n, math.prod(after))
        return torch.bmm(weights.expand(len(flat), -1, -1), flat).reshape(*before, len(matrix), *after)


class _WayBack:
    """One axis: which native voxels lie between the prepared ones from `start` to `stop`, and where between them."""

    def __init__(self, n: int, n_native: int, kind: Kind, start: int, stop: int) -> None:
        self.n, self.n_native = n, n_native
        lower, upper, weight = positions(n, n_native, kind)
        inside = np.flatnonzero((lower >= start) & (upper < stop))
        self._offset = int(inside[0]) if inside.size else 0
        self.lower, self.upper, self._weight = lower[inside] - start, upper[inside] - start, weight[inside]

    def cells(self, native: slice) -> int:
        """Prepared voxels from the first to the last that these native ones lie between."""
        return int(self.upper[native][-1] - self.lower[native][0]) + 1 if self.lower[native].size else 0

    def segments(self, native: slice, edge: int) -> list[_Segment]:
        """Pieces of equal length, of whole blocks and of some `edge` prepared voxels at most."""
        lower, upper = self.lower[native], self.upper[native]
        if not lower.size:
            return []
        cells = int(lower[-1] - lower[0]) + 1
        pieces = -(-cells // edge)
        step = -(-cells // (pieces * BLOCK)) * BLOCK
        found = []
        for first in range(int(lower[0]), int(lower[-1]) + 1, step):
            start, stop = (int(each) for each in np.searchsorted(lower, (first, first + step)))
            if start < stop:
                last = int(upper[stop - 1]) + 1
                begin = native.start + start + self._offset
                found.append(
                    _Segment(
                        slice(begin, begin + stop - start),
                        first,
                        last,
                        lower[start:stop] - first,
                        self._weight[native][start:stop],
                    )
                )
        return found


def _interpolate(values: torch.Tensor, tile: Sequence[_Segment]) -> torch.Tensor:
    """(classes, r, a, s) on prepared voxels → on native ones."""
    for axis in sorted(range(3), key=lambda n: len(tile[n].lower) / values.shape[1 + n]):
        values = tile[axis].interpolate(values, 1 + axis)
    return values


def _constant(tile: Sequence[_Segment], label: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A tile with one certain label; None for background."""
    if label == 0:
        return None
    shape = [len(each.lower) for each in tile]
    return torch.tensor(label).expand(shape), torch.tensor(CERTAIN, dtype=torch.uint8).expand(shape)


def _check_finite(largest: torch.Tensor) -> None:
    """Of the logits at each voxel: NaN, which no mask can be made of, is larger than all."""
    if not bool(largest.isfinite().all()):
        raise ScanError(
            "the network answers with numbers that are not finite",
            fix="use --precision fp32; if it still does, this model cannot take the intensities of this scan",
            code="E_LOGITS",
        )


def _rank_dtype(n: int) -> torch.dtype:
    return torch.uint8 if n < 256 else torch.int16 if n < 32768 else torch.int32


class _LargestWins:
    """Classes that exclude each other: 0 is the background."""

    def __init__(self, n_classes: int) -> None:
        # Falling, so that of classes with the same logit the first one has the largest rank and wins.
        self._rank = torch.arange(n_classes, 0, -1).to(_rank_dtype(n_classes))[:, None, None, None]

    def __call__(self, logits: torch.Tensor, tile: Sequence[_Segment]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (classes, r, a, s) on prepared voxels → winner, confidence on native ones; None where all is background."""
        rank = self._rank = self._rank.to(logits.device)
        best = logits.amax(0)
        _check_finite(best)
        top = ((logits == best) * rank).amax(0)
        share = torch.sub(logits, best).clamp_(min=-LARGEST_EXPONENT).exp_()  # of each class, beside the winner's 1
        is_certain = (top == len(rank)) | (share.sum(0) <= 1 + NEGLIGIBLE)
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return _constant(tile, len(rank) - first)
        needed = self._needed(logits, best, share, top, is_certain)
        values = _interpolate(logits if needed is None else logits[needed], tile)
        best = values.amax(0)
        winner = len(rank) - ((values == best) * (rank if needed is None else rank[needed])).amax(0)
        total = values.sub_(best).clamp_(min=-LARGEST_EXPONENT).exp_().sum(0)
        return winner, total.reciprocal_().mul_(CERTAIN).round_().to(torch.uint8)

    def _needed(
        self, logits: torch.Tensor, best: torch.Tensor, share: torch.Tensor, top: torch.Tensor, is_certain: torch.Tensor
    ) -> torch.Tensor | None:
        """The classes that have to be interpolated, so that no probability in the tile changes by more than `NEGLIGIBLE`; None: all.

        Let M be the largest logit at each prepared voxel and R the mean of the logits of those classes that win somewhere in a
        block. At a native voxel x no class has more than its largest share at a corner × exp(M(x)), and the winner no less than
        exp(R(x)). So their ratio is at most that share × exp of the largest M - R at a corner.
        """
        if len(logits) <= 2:
            return None
        ranks = top.float()[None]
        is_open = (_pooled(ranks) != -_pooled(-ranks)) | (_pooled((~is_certain).float()[None]) > 0)
        is_open = is_open.flatten()
        share = _pooled(share).flatten(1)[:, is_open]
        if 2 * len(_not_negligible(share)) > len(share):
            return None
        wins = share >= 1
        winners = wins.any(1).nonzero().flatten()
        weights = wins[winners].float()
        weights /= weights.sum(0)
        corners = _corners(torch.cat([best[None], logits[winners]]))[:, is_open]
        gap = corners[0] - (weights[..., None] * corners[1:]).sum(0)
        return _not_negligible(share * gap.amax(1).clamp_(max=LARGEST_EXPONENT).exp_())


def _not_negligible(bound: torch.Tensor) -> torch.Tensor:
    """Indices of the classes, given a bound of each one's share (classes, blocks), of which the others together have little."""
    falling = bound.amax(1).sort()
    return falling.indices[falling.values.cumsum(0) > NEGLIGIBLE].sort().values


class _Regions:
    """Classes that may overlap: each is there where its logit is over 0, and a later one lies over an earlier one."""

    def __init__(self, n_classes: int) -> None:
        self._rank = torch.arange(1, n_classes + 1).to(_rank_dtype(n_classes))[:, None, None, None]

    def __call__(self, logits: torch.Tensor, tile: Sequence[_Segment]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (classes, r, a, s) on prepared voxels → winner, confidence on native ones; None where all is background."""
        rank = self._rank = self._rank.to(logits.device)
        _check_finite(logits.amax(0))
        top = ((logits > 0) * rank).amax(0)
        is_certain = ((logits > -math.log(NEGLIGIBLE)) * rank).amax(0) == top
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return _constant(tile, first)
        needed = (logits.flatten(1).amax(1) > 0).nonzero().flatten()
        values = _interpolate(logits[needed], tile)
        winner = ((values > 0) * rank[needed]).amax(0)
        logit = (values * (rank[needed] == winner)).sum(0)
        return winner, logit.sigmoid_().mul_(CERTAIN).round_().to(torch.uint8)


def _whole_blocks(values: torch.Tensor) -> torch.Tensor:
    """(classes, r, a, s), continued with its last voxels so that each axis is blocks and one voxel more."""
    ends = [end for n in reversed(values.shape[1:]) for end in (0, (1 - n) % BLOCK if n > 1 else BLOCK)]
    return torch.nn.functional.pad(values[None], ends, mode="replicate")[0] if any(ends) else values


def _pooled(values: torch.Tensor) -> torch.Tensor:
    """(n, r, a, s) → (n, blocks, blocks, blocks): the largest value at the voxels of each block, its far faces included."""
    values = _whole_blocks(values)
    for axis in (1, 2, 3):
        values = values.unfold(axis, BLOCK + 1, BLOCK).amax(-1)
    return values


def _corners(values: torch.Tensor) -> torch.Tensor:
    """(n, r, a, s) → (n, blocks, voxels of a block, its far faces included), blocks in the order of `_pooled`."""
    values = _whole_blocks(values)
    for axis in (1, 2, 3):
        values = values.unfold(axis, BLOCK + 1, BLOCK)
    return values.flatten(4).flatten(1, 3)


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
