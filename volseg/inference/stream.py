"""Run a network over a volume in overlapping tiles and yield the blended logits slab by slab.

Tiles are run in layers along one axis. Their logits are blended in a ring buffer one patch deep;
planes that no later tile touches are yielded and cleared. So memory depends on the patch, the
classes and the size of a plane, but not on the number of planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product, zip_longest
from typing import Protocol

import numpy as np
import torch

from volseg.inference.backend import Backend, device_of, run_on_device
from volseg.inference.head import BACKGROUND
from volseg.inference.tiles import TiledAxis
from volseg.preprocessing.resample import send
from volseg.recipe import Recipe
from volseg.volume import WORLD_AXES


class Planes(Protocol):
    """A volume (C, R, A, S) of `shape` (R, A, S), read a few planes at a time along `axis`."""

    shape: tuple[int, int, int]
    axis: int

    def read(self, start: int, stop: int) -> np.ndarray | torch.Tensor:
        """Return float32 (C, R, A, S) with `stop - start` planes along the axis, on any device."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class KeptPlanes:
    """The planes of a volume that are worth a tile: `is_kept` (n,) bool along `axis`."""

    axis: int
    is_kept: np.ndarray

    def is_in(self, inside: Sequence[slice]) -> bool:
        """Tell whether the part of the volume that a tile covers has any of them."""
        return bool(self.is_kept[inside[self.axis]].any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Settings for cutting a volume into tiles and running a network on them.

    Args:
        overlap: smallest fraction of a patch shared with its neighbour, in [0, 1).
        tta_axes: axes among 0, 1, 2 of test-time augmentation by mirroring; each doubles the work.
        batch_size: tiles per forward pass.
        margin: voxels of reflect padding at each face of the scan. A network is least accurate at
            the border of a patch, and at a face no neighbouring patch corrects it.
        empty_level: a tile whose first channel never exceeds it is not run; None runs all.
        kept_planes: a tile without any of them is not run; None runs all.
        dtype: of the blended sums; float16 halves the buffer, with a relative error of about 1e-3.
    """

    patch_shape: tuple[int, int, int]
    overlap: float
    tta_axes: Sequence[int] = ()
    batch_size: int = 1
    margin: int = 0
    empty_level: float | None = None
    kept_planes: KeptPlanes | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, recipe: Recipe) -> Tiling:
        """Return the tiling that a recipe prescribes for inference."""
        infer = recipe.infer
        return cls(
            patch_shape=recipe.patch_shape,
            overlap=infer.overlap,
            tta_axes=[WORLD_AXES[name] for name in infer.tta_axes],
            batch_size=infer.batch_size,
            margin=infer.margin,
        )

    def axes(self, shape: tuple[int, int, int]) -> list[TiledAxis]:
        """Return the tiles along each axis; a volume's tiles are their product."""
        return [
            TiledAxis.of(n, patch, self.overlap, self.margin)
            for n, patch in zip(shape, self.patch_shape, strict=True)
        ]

    def count(self, shape: tuple[int, int, int]) -> int:
        """Return the number of tiles over a volume of this shape, including empty ones."""
        return math.prod(len(tiled.starts) for tiled in self.axes(shape))

    def count_skipped(self, shape: tuple[int, int, int]) -> int:
        """Return how many of them have none of the kept planes."""
        if self.kept_planes is None:
            return 0
        axes = self.axes(shape)
        tiled = axes[self.kept_planes.axis]
        covered = [tiled.inside(tile)[0] for tile in range(len(tiled.starts))]
        n_skipped = sum(not self.kept_planes.is_kept[part].any() for part in covered)
        return n_skipped * self.count(shape) // len(tiled.starts)

    @property
    def may_skip(self) -> bool:
        """Whether some tiles may not be run."""
        return self.empty_level is not None or self.kept_planes is not None


def predict_slabs(
    planes: Planes,
    backend: Backend,
    tiling: Tiling,
    *,
    n_classes: int,
    read_ahead: bool | None = None,
    on_tile: Callable[[bool], None] = lambda is_empty: None,
) -> Iterator[torch.Tensor]:
    """Yield the Gaussian-weighted mean of the logits of overlapping tiles, slab by slab.

    It is computed on the backend's device.

    Args:
        n_classes: channels of the logits.
        read_ahead: read the next layer of tiles before planes are yielded, so that a GPU receives
            it while it is still busy; a CPU would only need more memory. None: on a GPU.
        on_tile: called after each tile with whether it was skipped, for progress.

    Yields:
        (classes, R, A, S) with a few planes along the axis, valid until the next slab; together
        they are the planes of the volume in order. Voxels covered only by empty tiles are
        background: a logit of 0 for class 0 and -`BACKGROUND` for the others. With a deferred head
        it yields its features instead: 0 there, and if tiles may be skipped an extra channel is 1.
    """
    axis = planes.axis
    tiled = tiling.axes(planes.shape)
    along = tiled[axis]
    device = device_of(backend)
    ring = _Ring(tiled, axis, backend, tiling, n_classes)
    window = _Window(planes, tiled, axis, device)
    read_ahead = device.type != "cpu" if read_ahead is None else read_ahead
    numbers = [range(len(tiles.starts)) for tiles in tiled]
    for layer, (start, following) in enumerate(zip_longest(along.starts, along.starts[1:])):
        numbers[axis] = range(layer, layer + 1)
        places = list(product(*numbers))
        _run_layer(window.layer(start), places, backend, tiling, ring, on_tile)
        if following is not None and read_ahead:
            window.layer(following)
        yield from ring.flush(len(along.source) if following is None else following)


def predict_logits(
    array: np.ndarray, backend: Backend, tiling: Tiling, *, n_classes: int
) -> np.ndarray:
    """Return logits (classes, R, A, S) float32 of a small array (channels, R, A, S) in memory."""
    head = backend.head
    slabs = predict_slabs(ArrayPlanes(array), backend, tiling, n_classes=n_classes)
    logits = [slab.cpu().clone() if head is None else head(slab).cpu() for slab in slabs]
    return torch.cat(logits, dim=3).numpy()


def _are_empty(tiles: Sequence[torch.Tensor], level: float | None) -> Sequence[bool]:
    """Check which tiles (C, r, a, s) never exceed the level; one query, as each waits for a GPU."""
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
        # Copies a read-only memory map: a tensor must be writable.
        return np.require(self._array[..., start:stop], requirements="W")


class _Window:
    """The input of one layer of tiles: (C, R, A, S) padded, and one patch deep along the axis."""

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
        """Return padded planes from `start` on, valid until the next call; read only new planes."""
        along, axis = self._tiled[self._axis], 1 + self._axis
        if self._held is not None and start == self._start:
            return self._held
        step = along.patch if self._held is None else start - self._start
        shared = max(0, along.patch - step)
        new = self._padded(along.source[start : start + along.patch][shared:])
        if self._held is None:  # a new tensor: the one read may belong to the source
            self._held = torch.empty(new.shape, dtype=new.dtype, device=new.device)
        elif shared:
            kept = self._held.narrow(axis, step, shared)
            self._held.narrow(axis, 0, shared).copy_(kept.clone() if step < shared else kept)
        self._held.narrow(axis, shared, along.patch - shared).copy_(new)
        self._start = start
        return self._held

    def _padded(self, sources: np.ndarray) -> torch.Tensor:
        """Return the padded planes of these source planes, -1 for zeros."""
        real = sources[sources >= 0]
        first, last = (int(real.min()), int(real.max()) + 1) if real.size else (0, 1)
        block = torch.as_tensor(self._planes.read(first, last)).to(self._device)
        for n, tiled in enumerate(self._tiled):
            index = sources - first if n == self._axis else tiled.source
            block = _take(block, index, 1 + n)
        return block


def _take(tensor: torch.Tensor, index: np.ndarray, axis: int) -> torch.Tensor:
    """Index a tensor along an axis, with 0 at negative indices; the tensor itself if unchanged."""
    if np.array_equal(index, np.arange(tensor.shape[axis])):
        return tensor
    taken = tensor.index_select(axis, send(torch.from_numpy(np.maximum(index, 0)), tensor.device))
    if (index < 0).any():
        zeros = torch.from_numpy(np.flatnonzero(index < 0))
        taken.index_fill_(axis, send(zeros, tensor.device), 0)
    return taken


class _Ring:
    """Blended logits of the planes that tiles still touch; padded plane p is at p modulo the depth.

    In-plane it covers the volume without its padding.
    """

    def __init__(
        self,
        tiled: Sequence[TiledAxis],
        axis: int,
        backend: Backend,
        tiling: Tiling,
        n_classes: int,
    ) -> None:
        head, device, may_skip = backend.head, device_of(backend), tiling.may_skip
        self._tiled = tiled
        self._axis = axis
        self._depth = tiled[axis].patch
        self._is_logits = head is None
        self._n = n_classes if head is None else head.n_features
        shape = [self._depth if n == axis else tiles.length for n, tiles in enumerate(tiled)]
        self._weights = [torch.from_numpy(tiles.weights).to(device) for tiles in tiled]
        # Features have no value that means background: a last channel flags voxels without a tile.
        n_flags = 1 if may_skip and head is not None else 0
        self._sum = torch.zeros((self._n + n_flags, *shape), dtype=tiling.dtype, device=device)
        # Sum of the weights of the tiles that were run; 1 by construction if none is skipped.
        self._weight = torch.zeros(shape, device=device) if may_skip else None
        self._any_skipped = False
        self._done = 0  # padded planes yielded

    def add(self, place: Sequence[int], logits: torch.Tensor) -> None:
        """Add the logits (classes, *patch) of the tile at this place."""
        tile_weight = self._weight_of(place)
        for target, part in self._pieces(place):
            box = (slice(self._n), *target)
            weight = tile_weight[part]
            if self._sum.dtype == logits.dtype:
                self._sum[box].addcmul_(logits[(slice(None), *part)], weight.to(logits.dtype))
            else:  # one class at a time: the product is as large as the tile
                dtype = self._sum.dtype
                for n in range(len(logits)):
                    self._sum[(n, *target)] += (logits[(n, *part)] * weight).to(dtype)
            if self._weight is not None:
                self._weight[target] += weight

    def box(self, place: Sequence[int]) -> tuple[slice, ...]:
        """Return the tile at this place in its layer, which is one patch deep along the axis."""
        starts = [
            0 if n == self._axis else tiles.starts[p]
            for n, (tiles, p) in enumerate(zip(self._tiled, place, strict=True))
        ]
        return tuple(slice(a, a + t.patch) for a, t in zip(starts, self._tiled, strict=True))

    def inside(self, place: Sequence[int]) -> tuple[slice, ...]:
        """Return the part of the volume that the tile at this place covers."""
        return tuple(tiles.inside(p)[0] for tiles, p in zip(self._tiled, place, strict=True))

    def real(self, place: Sequence[int]) -> tuple[slice, ...]:
        """Return the part of the tile at this place that is not zero padding."""
        return tuple(tiles.real(p) for tiles, p in zip(self._tiled, place, strict=True))

    def skip(self) -> None:
        """Note that a tile was skipped, so weights no longer sum to 1 everywhere."""
        self._any_skipped = True

    def flush(self, until: int) -> Iterator[torch.Tensor]:
        """Yield the planes before padded plane `until` in order, and clear them."""
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
            if self._weight is not None:
                self._weight[self._along(ring, 0)] = 0
            start = stop
        self._done = until

    def _slab(self, ring: slice) -> torch.Tensor:
        inside = tuple(ring if n == self._axis else slice(None) for n in range(3))
        slab = self._sum[(slice(None), *inside)]
        if self._any_skipped and self._weight is not None:
            weight = self._weight[inside]
            slab[: self._n] /= weight.clamp(min=1e-6)
            if self._is_logits:
                slab[1:].masked_fill_(weight <= 1e-6, -BACKGROUND)
            else:
                slab[-1] = weight <= 1e-6
        return slab

    def _along(self, ring: slice, leading: int) -> tuple[slice, ...]:
        return (slice(None),) * (leading + self._axis) + (ring,)

    def _weight_of(self, place: Sequence[int]) -> torch.Tensor:
        r, a, s = (weights[p] for weights, p in zip(self._weights, place, strict=True))
        return r[:, None, None] * a[:, None] * s

    def _pieces(
        self, place: Sequence[int]
    ) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Yield (box in the ring, box in the tile); two if the tile wraps around the ring's end."""
        inside = [tiles.inside(p) for tiles, p in zip(self._tiled, place, strict=True)]
        in_ring, in_tile = [part for part, _ in inside], [part for _, part in inside]
        turn = self._tiled[self._axis].starts[place[self._axis]] % self._depth
        for ring, tile in (
            (slice(turn, self._depth), slice(0, self._depth - turn)),
            (slice(0, turn), slice(self._depth - turn, self._depth)),
        ):
            if ring.start < ring.stop:
                in_ring[self._axis], in_tile[self._axis] = ring, tile
                yield tuple(in_ring), tuple(in_tile)


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
    real = [
        tile[(slice(None), *ring.real(place))] for place, tile in zip(places, tiles, strict=True)
    ]
    are_empty = _are_empty(real, tiling.empty_level)
    if tiling.kept_planes is not None:
        skipped = [not tiling.kept_planes.is_in(ring.inside(place)) for place in places]
        are_empty = [a or b for a, b in zip(are_empty, skipped, strict=True)]
    pending = []
    for place, tile, is_empty in zip(places, tiles, are_empty, strict=True):
        if is_empty:
            ring.skip()
            on_tile(True)
        else:
            pending.append((place, tile))
    for start in range(0, len(pending), tiling.batch_size):
        _run(pending[start : start + tiling.batch_size], backend, tiling, ring, on_tile)


def _run(
    batch: Sequence[tuple[tuple[int, ...], torch.Tensor]],
    backend: Backend,
    tiling: Tiling,
    ring: _Ring,
    on_tile: Callable[[bool], None],
) -> None:
    """Run tiles as one batch and blend their logits, which are freed before the next batch."""
    logits = _tta_mean(torch.stack([tile for _, tile in batch]), backend, tiling.tta_axes)
    for (place, _), tile in zip(batch, logits, strict=True):
        ring.add(place, tile)
        on_tile(False)


def _tta_mean(batch: torch.Tensor, backend: Backend, tta_axes: Sequence[int]) -> torch.Tensor:
    """Return the mean logits over all combinations of flipped axes, each flipped back (TTA)."""
    axes = [axis + 2 for axis in tta_axes]
    flips = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))
    total = run_on_device(backend, batch)
    if len(flips) == 1:
        return total
    for flip in flips[1:]:
        total += run_on_device(backend, batch.flip(flip)).flip(flip)
    return total.div_(len(flips))
