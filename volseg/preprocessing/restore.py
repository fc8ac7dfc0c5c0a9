"""Logits → mask on the scan's grid: the inverse of `prepare`.

It works on a few planes at a time, so the logits of a whole scan are never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch

from volseg.execution.cpu import lazy_zeros
from volseg.preprocessing.prepare import Trail
from volseg.preprocessing.reductions import LargestWins, Regions, constant_tile
from volseg.preprocessing.segments import BLOCK, AxisMap, Segment
from volseg.volume import BoundingBox

TILE_VALUES = 1_000_000  # logits of a tile, all classes: 4 MB of float32 fit into the cache
LARGEST_TILE = 32  # prepared voxels per edge


class MaskRestorer:
    """Streaming inverse of `prepare`: logits of prepared planes, in order → the scan's mask.

    Each tile of logits is interpolated linearly to native voxels and reduced to label and
    confidence at once, so an array of classes × native voxels never exists.

    Args:
        values: mask value of the classes 1, 2, …; class 0 is the background and the largest logit
            wins. With `regions`: mask value of the classes 0, 1, …, each present where its logit
            is > 0; later classes overwrite earlier ones.
        axis: prepared axis along which planes arrive.
        part: part of the prepared grid that has logits, None for all of it; native voxels that
            cannot be interpolated from it are background.
        head: deferred head, a voxelwise (features, r, a, s) → (classes, r, a, s), if `add` receives
            features instead of logits.

    Raises:
        ScanError: `add` received logits that are not finite.
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
        # Called with the logits of each tile, before they are reduced.
        self.on_logits: Callable[[torch.Tensor, Sequence[Segment]], None] | None = None
        self._max_voxels = TILE_VALUES // (len(values) + 1)
        self._table = np.array([0, *values], np.uint8 if max(values) < 256 else np.uint16)
        self._reduction = Regions(len(values)) if regions else LargestWins(len(values) + 1)
        self._mask = lazy_zeros(trail.geometry.shape, self._table.dtype)
        self._confidence = lazy_zeros(trail.geometry.shape, np.uint8)
        views = (
            trail.order.apply(array)[trail.box.slices] for array in (self._mask, self._confidence)
        )
        self._mask_view, self._confidence_view = views
        self._axis = axis
        part = part or BoundingBox.whole(trail.shape)
        sizes = zip(trail.shape, self._mask_view.shape, part.start, part.stop, strict=True)
        self._axes = [
            AxisMap(n, native, "nearest" if dim == trail.separate_axis else "linear", start, stop)
            for dim, (n, native, start, stop) in enumerate(sizes)
        ]
        # The last planes received, which the next native plane may need.
        self._cache: torch.Tensor | None = None
        self._first = 0  # prepared plane with which they begin
        self._done = 0  # native planes

    def add(self, logits: np.ndarray | torch.Tensor) -> None:
        """Add the next prepared planes: logits or features (n, R, A, S), which are not modified."""
        planes = torch.as_tensor(logits)
        axis_map, along = self._axes[self._axis], 1 + self._axis
        begin = self._first + (0 if self._cache is None else self._cache.shape[along])
        available = begin + planes.shape[along]
        stop = max(self._done, int(np.searchsorted(axis_map.upper, available)))
        for tile in product(*self._segments(slice(self._done, stop))):
            box = [slice(segment.first, segment.last) for segment in tile]
            self._restore(self._window(planes, begin, box), tile)
        self._done = stop
        is_last = stop >= len(axis_map.lower)
        first = available if is_last else min(available, int(axis_map.lower[stop]))
        box = [slice(None) if axis != self._axis else slice(first, available) for axis in range(3)]
        self._cache, self._first = self._window(planes, begin, box).clone(), first

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mask and confidence, both (I, J, K).

        The mask is uint8 or uint16 label values, 0 outside the box. The confidence is uint8, 255 ×
        the probability of the label; in the background that of any label, or 0 if it is less than
        `DOUBT` in the whole tile.
        """
        return self._mask, self._confidence

    def _segments(self, planes: slice) -> list[list[Segment]]:
        """Divide each axis into segments, whose products are tiles that are close to cubes."""
        native = [
            planes if n == self._axis else slice(0, len(axis_map.lower))
            for n, axis_map in enumerate(self._axes)
        ]
        # The finer of the two grids determines the number of voxels of a tile.
        room = self._max_voxels * math.prod(min(1.0, m.n / m.n_native) for m in self._axes)
        segments: list[list[Segment]] = [[], [], []]
        by_length = sorted(range(3), key=lambda n: self._axes[n].cells(native[n]))
        # The shortest axis first: longer ones use the voxels that it leaves.
        for n_axes, axis in zip((3, 2, 1), by_length, strict=True):
            edge = min(LARGEST_TILE, max(BLOCK, int(room ** (1 / n_axes))))
            segments[axis] = self._axes[axis].segments(native[axis], edge)
            room /= max((segment.last - segment.first for segment in segments[axis]), default=1)
        return segments

    def _window(self, planes: torch.Tensor, begin: int, box: Sequence[slice]) -> torch.Tensor:
        """Return a box of prepared voxels from the cached and the new planes; it may be a view.

        Args:
            begin: index of the first new plane.
        """
        start, stop = box[self._axis].start, box[self._axis].stop

        def cut(source: torch.Tensor, origin: int) -> torch.Tensor:
            slices = [slice(None), *box]
            slices[1 + self._axis] = slice(max(0, start - origin), max(0, stop - origin))
            return source[tuple(slices)]

        new = cut(planes, begin)
        if self._cache is None or start >= begin:
            return new
        return torch.cat([cut(self._cache, self._first).to(new.dtype), new], dim=1 + self._axis)

    def _restore(self, planes: torch.Tensor, tile: Sequence[Segment]) -> None:
        """Write the native voxels of a tile from its prepared ones."""
        logits = planes.to(torch.float32) if self._head is None else self._head(planes)
        if self.on_logits is not None:
            self.on_logits(logits, tile)
        label = self._reduction.certain(logits)
        if label is None:
            is_shared = logits.data_ptr() == planes.data_ptr()
            reduced = self._reduction(logits.clone() if is_shared else logits, tile)
        else:
            reduced = constant_tile(tile, label)
        if reduced is None:
            return
        winner, confidence = (values.cpu().numpy() for values in reduced)
        native = tuple(segment.native for segment in tile)
        for view, values in (
            (self._mask_view, self._table.take(winner)),
            (self._confidence_view, confidence),
        ):
            # The arrays are zero already; writing more zeros would allocate their pages.
            box = BoundingBox.around(values)
            if box is not None:
                view[native][box.slices] = values[box.slices]
