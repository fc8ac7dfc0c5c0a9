"""Run a network over a volume in overlapping tiles and hand on their blended logits layer by layer.

Tiles are run layer after layer along one axis. Their logits are blended in a ring buffer one patch deep; planes that no later
tile touches are handed on and forgotten. So memory depends on the patch, on the classes and on the size of a plane, but not on
the number of planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product, zip_longest
from typing import Protocol

import numpy as np
import torch

from volseg.infer.backends import Backend, device_of, run_on_device
from volseg.infer.head import BACKGROUND
from volseg.infer.tiles import TiledAxis
from volseg.preprocess.resample import send


class Planes(Protocol):
    """A volume (C, R, A, S) of `shape` (R, A, S) that is read a few planes at a time along `axis`."""

    shape: tuple[int, int, int]
    axis: int

    def read(self, start: int, stop: int) -> np.ndarray | torch.Tensor:
        """float32 (C, R, A, S), but `stop - start` long along the axis; on any device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a volume is cut into tiles.

    Args:
        overlap: smallest fraction of a patch shared with its neighbour, in [0, 1).
        tta_axes: axes among 0, 1, 2 over whose mirrored copies the logits are averaged; each doubles the work.
        batch_size: tiles that go through the network together.
        margin: voxels by which the scan is continued beyond each face with its mirror image. The outermost voxels of a
            patch are those a network sees worst, and at a face of the scan no neighbouring patch makes up for it.
        empty_level: a tile whose first channel is nowhere over it is not run; None runs all.
    """

    patch_shape: tuple[int, int, int]
    overlap: float
    tta_axes: Sequence[int] = ()
    batch_size: int = 1
    margin: int = 0
    empty_level: float | None = None

    def axes(self, shape: tuple[int, int, int]) -> list[TiledAxis]:
        """The tiles along each axis; those of the volume are their product."""
        return [
            TiledAxis.of(n, patch, self.overlap, self.margin)
            for n, patch in zip(shape, self.patch_shape, strict=True)
        ]

    def count(self, shape: tuple[int, int, int]) -> int:
        """The number of tiles over a volume of this shape, empty ones among them."""
        return math.prod(len(each.starts) for each in self.axes(shape))


def predict_slabs(
    planes: Planes,
    backend: Backend,
    tiling: Tiling,
    *,
    n_classes: int,
    dtype: torch.dtype = torch.float32,
    read_ahead: bool | None = None,
    on_tile: Callable[[bool], None] = lambda is_empty: None,
) -> Iterator[torch.Tensor]:
    """Gaussian-weighted mean of the logits of overlapping tiles, slab by slab in the order of the planes.

    All of it happens on the backend's device.

    Args:
        n_classes: of the logits; where the backend's head was taken off, of the features.
        dtype: in which logits are summed; float16 halves the buffer and costs some 1e-3 of their size.
        read_ahead: read the next layer of tiles before planes are handed on, so that a GPU gets it while it is still at this one; a CPU
            would only need more memory. None: on a GPU.
        on_tile: called after each tile with whether it was empty, for progress.

    Yields:
        (classes, R, A, S) but only some planes long along the axis, valid until the next slab is asked for; together they
        are the planes of the volume. Voxels that no tile covers but empty ones are background: 0 for class 0 and
        a logit of -`BACKGROUND` for the others. Of features they are 0, and if any tile may be left out one channel more
        is 1 there.
    """
    axis = planes.axis
    tiled = tiling.axes(planes.shape)
    along = tiled[axis]
    device = device_of(backend)
    ring = _Ring(
        tiled,
        axis,
        n_classes,
        dtype,
        device,
        counts_empty=tiling.empty_level is not None,
        is_logits=backend.head is None,
    )
    window = _Window(planes, tiled, axis, device)
    across = [range(len(each.starts)) if n != axis else (0,) for n, each in enumerate(tiled)]
    for layer, (start, following) in enumerate(zip_longest(along.starts, along.starts[1:])):
        places = [
            tuple(layer if n == axis else p for n, p in enumerate(place))
            for place in product(*across)
        ]
        _run_layer(window.layer(start), places, backend, tiling, ring, on_tile)
        if following is not None and (device.type != "cpu" if read_ahead is None else read_ahead):
            window.layer(following)
        yield from ring.hand_on(len(along.source) if following is None else following)


def predict_logits(
    array: np.ndarray, backend: Backend, tiling: Tiling, *, n_classes: int
) -> np.ndarray:
    """The logits (classes, R, A, S) float32 of a whole array (channels, R, A, S), for arrays that are small enough."""
    head = backend.head
    n = n_classes if head is None else head.n_features
    slabs = predict_slabs(ArrayPlanes(array), backend, tiling, n_classes=n)
    return torch.cat(
        [slab.cpu().clone() if head is None else head(slab).cpu() for slab in slabs], dim=3
    ).numpy()


def _are_empty(tiles: Sequence[torch.Tensor], level: float | None) -> Sequence[bool]:
    """Whether the first channel is nowhere over the level, of each tile (C, r, a, s); asked at once: each answer waits for a GPU."""
    if level is None:
        return [False] * len(tiles)
    return torch.stack([~(tile[0] > level).any() for tile in tiles]).tolist()


class ArrayPlanes:
    """The planes along S of an array (C, R, A, S) in memory."""

    axis = 2

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape = (array.shape[1], array.shape[2], array.shape[3])

    def read(self, start: int, stop: int) -> np.ndarray:
        # A copy of what is mapped from a file: no tensor may be read-only.
        return np.require(self._array[..., start:stop], requirements="W")


class _Window:
    """The input of one layer of tiles: (C, padded R, padded A, padded S) but one patch long along the axis."""

    def __init__(
        self, planes: Planes, tiled: Sequence[TiledAxis], axis: int, device: torch.device
    ) -> None:
        self._planes = planes
        self._tiled = tiled
        self._axis = axis
        self._device = device
        self._start = 0
        self._held: torch.Tensor | None = None

    def layer(self, start: int) -> torch.Tensor:
        """Padded planes from `start` on, until the next layer is asked for; those which the last one held too are not read again."""
        along, axis = self._tiled[self._axis], 1 + self._axis
        if self._held is not None and start == self._start:
            return self._held
        step = along.patch if self._held is None else start - self._start
        shared = max(0, along.patch - step)
        new = self._padded(along.source[start : start + along.patch][shared:])
        if self._held is None:
            self._held = torch.empty(
                new.shape, dtype=new.dtype, device=new.device
            )  # what was read may be somebody's own
        elif shared:
            kept = self._held.narrow(axis, step, shared)
            self._held.narrow(axis, 0, shared).copy_(kept.clone() if step < shared else kept)
        self._held.narrow(axis, shared, along.patch - shared).copy_(new)
        self._start = start
        return self._held

    def _padded(self, sources: np.ndarray) -> torch.Tensor:
        """The planes that stand at these padded places, continued beyond the faces of the plane too."""
        real = sources[sources >= 0]
        first, last = (int(real.min()), int(real.max()) + 1) if real.size else (0, 1)
        block = torch.as_tensor(self._planes.read(first, last)).to(self._device)
        for n, tiled in enumerate(self._tiled):
            block = (
                _at(block, sources - first, 1 + n)
                if n == self._axis
                else _at(block, tiled.source, 1 + n)
            )
        return block


def _at(tensor: torch.Tensor, places: np.ndarray, axis: int) -> torch.Tensor:
    """The tensor at these places along an axis, 0 at negative ones; the tensor itself where that is no change."""
    if np.array_equal(places, np.arange(tensor.shape[axis])):
        return tensor
    taken = tensor.index_select(axis, send(torch.from_numpy(np.maximum(places, 0)), tensor.device))
    if (places < 0).any():
        taken.index_fill_(
            axis, send(torch.from_numpy(np.flatnonzero(places < 0)), tensor.device), 0
        )
    return taken


class _Ring:
    """Blended logits of the planes that tiles still touch; padded plane p stands at p modulo its depth.

    Across the planes it holds the volume alone, not what lies beyond its faces.
    """

    def __init__(
        self,
        tiled: Sequence[TiledAxis],
        axis: int,
        n_classes: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        counts_empty: bool,
        is_logits: bool = True,
    ) -> None:
        self._tiled = tiled
        self._axis = axis
        self._depth = tiled[axis].patch
        shape = [self._depth if n == axis else each.length for n, each in enumerate(tiled)]
        self._n = n_classes
        self._weights = [torch.from_numpy(each.weights).to(device) for each in tiled]
        # Where features come, a last channel more flags voxels without a tile: no value of theirs would say background.
        n_flags = 1 if counts_empty and not is_logits else 0
        self._sum = torch.zeros((n_classes + n_flags, *shape), dtype=dtype, device=device)
        # Shares of the tiles that were run; only needed where some are not, else they sum to 1 by construction.
        self._share = torch.zeros(shape, device=device) if counts_empty else None
        self._any_skipped = False
        self._is_logits = is_logits
        self._done = 0  # padded planes handed on

    def add(self, place: Sequence[int], logits: torch.Tensor) -> None:
        """Logits (classes, *patch) of the tile at this place."""
        share = self._share_of(place)
        for target, part in self._pieces(place):
            box = (slice(self._n), *target)
            weight = share[part]
            if self._sum.dtype == logits.dtype:
                self._sum[box].addcmul_(logits[(slice(None), *part)], weight.to(logits.dtype))
            else:
                for index in range(
                    len(logits)
                ):  # one class at a time: the product is as large as the tile
                    self._sum[(index, *target)] += (logits[(index, *part)] * weight).to(
                        self._sum.dtype
                    )
            if self._share is not None:
                self._share[target] += weight

    def box(self, place: Sequence[int]) -> tuple[slice, ...]:
        """The tile at this place; all that there is along the axis of the layers."""
        return tuple(
            slice(0, each.patch)
            if n == self._axis
            else slice(each.starts[p], each.starts[p] + each.patch)
            for n, (each, p) in enumerate(zip(self._tiled, place, strict=True))
        )

    def real(self, place: Sequence[int]) -> tuple[slice, ...]:
        """The part of the tile at this place that is no padding."""
        return tuple(each.real(p) for each, p in zip(self._tiled, place, strict=True))

    def skip(self) -> None:
        """A tile was left out, so shares no longer sum to 1 everywhere."""
        self._any_skipped = True

    def hand_on(self, until: int) -> Iterator[torch.Tensor]:
        """The planes before padded plane `until`, in order, and forget them."""
        along = self._tiled[self._axis]
        first, last = along.before, along.before + along.length
        start = self._done
        while start < until:
            stop = min(until, (start // self._depth + 1) * self._depth)
            ring = slice(start % self._depth, start % self._depth + stop - start)
            real = slice(max(start, first) - start, min(stop, last) - start)
            if real.start < real.stop:
                yield self._slab(slice(ring.start + real.start, ring.start + real.stop))
            self._sum[self._along(ring, 1)] = 0
            if self._share is not None:
                self._share[self._along(ring, 0)] = 0
            start = stop
        self._done = until

    def _slab(self, ring: slice) -> torch.Tensor:
        inside = tuple(ring if n == self._axis else slice(None) for n in range(3))
        slab = self._sum[(slice(None), *inside)]
        if self._any_skipped and self._share is not None:
            share = self._share[inside]
            slab[: self._n] /= share.clamp(min=1e-6)
            if self._is_logits:
                slab[1:].masked_fill_(share <= 1e-6, -BACKGROUND)
            else:
                slab[-1] = share <= 1e-6
        return slab

    def _along(self, ring: slice, leading: int) -> tuple[slice, ...]:
        return (slice(None),) * (leading + self._axis) + (ring,)

    def _share_of(self, place: Sequence[int]) -> torch.Tensor:
        r, a, s = (weights[p] for weights, p in zip(self._weights, place, strict=True))
        return r[:, None, None] * a[:, None] * s

    def _pieces(
        self, place: Sequence[int]
    ) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(box in the ring, box in the tile), two of them where the tile goes over the ring's end."""
        inside = [each.inside(p) for each, p in zip(self._tiled, place, strict=True)]
        turn = self._tiled[self._axis].starts[place[self._axis]] % self._depth
        for ring, tile in (
            (slice(turn, self._depth), slice(0, self._depth - turn)),
            (slice(0, turn), slice(self._depth - turn, self._depth)),
        ):
            if ring.start < ring.stop:
                yield (
                    tuple(
                        ring if n == self._axis else volume for n, (volume, _) in enumerate(inside)
                    ),
                    tuple(tile if n == self._axis else own for n, (_, own) in enumerate(inside)),
                )


def _run_layer(
    layer_input: torch.Tensor,
    places: Sequence[tuple[int, ...]],
    backend: Backend,
    tiling: Tiling,
    ring: _Ring,
    on_tile: Callable[[bool], None],
) -> None:
    """Run the tiles at these places and blend them."""
    tiles = [layer_input[(slice(None), *ring.box(place))] for place in places]
    waiting: list[tuple[tuple[int, ...], torch.Tensor]] = []
    real = [
        tile[(slice(None), *ring.real(place))] for place, tile in zip(places, tiles, strict=True)
    ]
    for place, tile, is_empty in zip(
        places, tiles, _are_empty(real, tiling.empty_level), strict=True
    ):
        if is_empty:
            ring.skip()
            on_tile(True)
            continue
        waiting.append((place, tile))
        if len(waiting) == tiling.batch_size:
            _run(waiting, backend, tiling, ring, on_tile)
    if waiting:
        _run(waiting, backend, tiling, ring, on_tile)


def _run(
    waiting: list[tuple[tuple[int, ...], torch.Tensor]],
    backend: Backend,
    tiling: Tiling,
    ring: _Ring,
    on_tile: Callable[[bool], None],
) -> None:
    """Run the tiles that wait as one batch and blend them; none waits any more."""
    logits = _mirrored_mean(torch.stack([tile for _, tile in waiting]), backend, tiling.tta_axes)
    for (place, _), tile in zip(waiting, logits, strict=True):
        ring.add(place, tile)
        on_tile(False)
    waiting.clear()


def _mirrored_mean(batch: torch.Tensor, backend: Backend, tta_axes: Sequence[int]) -> torch.Tensor:
    """Mean of the logits over all combinations of mirrored axes, each mirrored back."""
    axes = [axis + 2 for axis in tta_axes]
    flips = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))
    total = run_on_device(backend, batch)
    if len(flips) == 1:
        return total
    for flip in flips[1:]:
        total += run_on_device(backend, batch.flip(flip)).flip(flip)
    return total.div_(len(flips))
