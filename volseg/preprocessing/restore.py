"""Logits → mask on the scan's grid: the inverse of `prepare`.

It works on a few planes at a time, so the logits of a whole scan are never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from volseg.errors import ScanError
from volseg.execution.cpu import lazy_zeros
from volseg.preprocessing.prepare import Trail
from volseg.preprocessing.resample import Kind, positions
from volseg.volume import BoundingBox

LARGEST_EXPONENT = 80.0  # its exponential still fits into float32
CERTAIN = 255  # confidence of a probability of 1
TILE_VALUES = 1_000_000  # logits of a tile, all classes: 4 MB of float32 fit into the cache
LARGEST_TILE = 32  # prepared voxels per edge
BLOCK = 4  # prepared voxels per edge of the blocks in which classes are selected
DOUBT = 0.1  # background tiles in which any label is less probable are skipped
NEGLIGIBLE = 2.0**-10  # error of a probability: a quarter of one count of the confidence


def restore_mask(
    logits: np.ndarray, trail: Trail, values: Sequence[int], *, regions: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Invert `prepare` for logits (classes, R, A, S) of the whole grid; see `MaskRestorer`."""
    restorer = MaskRestorer(trail, values, axis=2, regions=regions)
    restorer.add(logits)
    return restorer.result()


class MaskRestorer:
    """Streaming inverse of `prepare`: logits of prepared planes, in order → the scan's mask.

    Each tile of logits is interpolated linearly to native voxels and reduced to label and
    confidence at once, so an array of classes × native voxels never exists. An interpolated logit
    is a mean of those around it, which saves most of the work: a tile whose prepared voxels all
    have the same certain label needs no interpolation; other tiles interpolate only the classes
    that matter. This changes a probability by at most `NEGLIGIBLE`.

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
        self._max_voxels = TILE_VALUES // (len(values) + 1)
        self._table = np.array([0, *values], np.uint8 if max(values) < 256 else np.uint16)
        self._reduction = _Regions(len(values)) if regions else _LargestWins(len(values) + 1)
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
            _AxisMap(n, native, "nearest" if dim == trail.separate_axis else "linear", start, stop)
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

    def _segments(self, planes: slice) -> list[list[_Segment]]:
        """Divide each axis into segments, whose products are tiles that are close to cubes."""
        native = [
            planes if n == self._axis else slice(0, len(axis_map.lower))
            for n, axis_map in enumerate(self._axes)
        ]
        # The finer of the two grids determines the number of voxels of a tile.
        room = self._max_voxels * math.prod(min(1.0, m.n / m.n_native) for m in self._axes)
        segments: list[list[_Segment]] = [[], [], []]
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

    def _restore(self, planes: torch.Tensor, tile: Sequence[_Segment]) -> None:
        """Write the native voxels of a tile from its prepared ones."""
        logits = planes.to(torch.float32) if self._head is None else self._head(planes)
        label = self._reduction.certain(logits)
        if label is None:
            is_shared = logits.data_ptr() == planes.data_ptr()
            reduced = self._reduction(logits.clone() if is_shared else logits, tile)
        else:
            reduced = _constant(tile, label)
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


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """A piece of one axis: native voxels `native`, between prepared voxels `first` to `last`."""

    native: slice
    first: int
    last: int
    lower: np.ndarray  # prepared voxel below each native one, counted from `first`
    weight: np.ndarray  # weight of the prepared voxel above

    def interpolate(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Interpolate (classes, r, a, s) from prepared to native voxels along an axis."""
        n = values.shape[axis]
        if not self.weight.any():
            if np.array_equal(self.lower, np.arange(n)):
                return values
            return values.index_select(axis, torch.from_numpy(self.lower).to(values.device))
        matrix = np.zeros((len(self.lower), n), np.float32)
        rows = np.arange(len(self.lower))
        matrix[rows, self.lower] = 1 - self.weight
        matrix[rows, np.minimum(self.lower + 1, n - 1)] += self.weight
        weights = torch.from_numpy(matrix).to(values.device)
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        if not after:
            return torch.matmul(values, weights.T)
        flat = values.reshape(math.prod(before), n, math.prod(after))
        result = torch.bmm(weights.expand(len(flat), -1, -1), flat)
        return result.reshape(*before, len(matrix), *after)


class _AxisMap:
    """One axis: the native voxels between prepared voxels `start` to `stop`, with their weights."""

    def __init__(self, n: int, n_native: int, kind: Kind, start: int, stop: int) -> None:
        self.n, self.n_native = n, n_native
        lower, upper, weight = positions(n, n_native, kind)
        inside = np.flatnonzero((lower >= start) & (upper < stop))
        self._offset = int(inside[0]) if inside.size else 0
        self.lower, self.upper = lower[inside] - start, upper[inside] - start
        self._weight = weight[inside]

    def cells(self, native: slice) -> int:
        """Return the number of prepared voxels that these native voxels are interpolated from."""
        if not self.lower[native].size:
            return 0
        return int(self.upper[native][-1] - self.lower[native][0]) + 1

    def segments(self, native: slice, edge: int) -> list[_Segment]:
        """Divide native voxels into equal segments of whole blocks, about `edge` voxels at most."""
        lower, upper = self.lower[native], self.upper[native]
        if not lower.size:
            return []
        cells = int(lower[-1] - lower[0]) + 1
        pieces = -(-cells // edge)
        step = -(-cells // (pieces * BLOCK)) * BLOCK
        segments = []
        for first in range(int(lower[0]), int(lower[-1]) + 1, step):
            start, stop = np.searchsorted(lower, (first, first + step)).tolist()
            if start < stop:
                last = int(upper[stop - 1]) + 1
                begin = native.start + start + self._offset
                voxels = slice(begin, begin + stop - start)
                weight = self._weight[native][start:stop]
                segments.append(_Segment(voxels, first, last, lower[start:stop] - first, weight))
        return segments


def _interpolate(values: torch.Tensor, tile: Sequence[_Segment]) -> torch.Tensor:
    """Interpolate (classes, r, a, s) from prepared to native voxels."""
    for axis in sorted(range(3), key=lambda n: len(tile[n].lower) / values.shape[1 + n]):
        values = tile[axis].interpolate(values, 1 + axis)
    return values


def _constant(tile: Sequence[_Segment], label: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return winner and confidence of a tile with one certain label; None for background."""
    if label == 0:
        return None
    shape = [len(segment.lower) for segment in tile]
    return torch.tensor(label).expand(shape), torch.tensor(CERTAIN, dtype=torch.uint8).expand(shape)


def _check_finite(largest: torch.Tensor) -> None:
    """Refuse logits that are not finite; `largest` is the maximum per voxel, NaN if one is NaN."""
    if not bool(largest.isfinite().all()):
        raise ScanError(
            "the output of the network is not finite",
            fix="use --precision fp32; if that fails too, the model does not suit this scan's "
            "intensities",
            code="E_LOGITS",
        )


def _rank_dtype(n: int) -> torch.dtype:
    return torch.uint8 if n < 256 else torch.int16 if n < 32768 else torch.int32


class _LargestWins:
    """Reduction of exclusive classes to the largest logit; class 0 is the background."""

    def __init__(self, n_classes: int) -> None:
        # Descending, so that the first of several classes with equal logits wins.
        self._rank = torch.arange(n_classes, 0, -1).to(_rank_dtype(n_classes))[:, None, None, None]

    def certain(self, logits: torch.Tensor) -> int | None:
        """Return the label that a tile certainly has, by a quick test of its logits, or None."""
        first = int(logits[:, 0, 0, 0].argmax())
        others = [part.amax(0) for part in (logits[:first], logits[first + 1 :]) if len(part)]
        runner_up = others[0] if len(others) == 1 else torch.maximum(*others)
        low, high = (logits[first] - runner_up).aminmax()
        # Maximal probability of all other classes together, relative to the winner.
        doubt = DOUBT / (1 - DOUBT) if first == 0 else NEGLIGIBLE
        is_certain = math.log((len(logits) - 1) / doubt) <= float(low) <= float(high) < math.inf
        return first if is_certain else None

    def __call__(
        self, logits: torch.Tensor, tile: Sequence[_Segment]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Reduce logits on prepared voxels to winner and confidence on native ones.

        None if all voxels are background.
        """
        rank = self._rank = self._rank.to(logits.device)
        best = logits.amax(0)
        _check_finite(best)
        top = ((logits == best) * rank).amax(0)
        # Probability of each class relative to the winner.
        ratio = torch.sub(logits, best).clamp_(min=-LARGEST_EXPONENT).exp_()
        total = ratio.sum(0)
        is_certain = (total <= 1 + NEGLIGIBLE) | ((top == len(rank)) & (total <= 1 / (1 - DOUBT)))
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return _constant(tile, len(rank) - first)
        needed = self._needed(logits, best, ratio, top, is_certain)
        values = _interpolate(logits if needed is None else logits[needed], tile)
        best = values.amax(0)
        winner = len(rank) - ((values == best) * (rank if needed is None else rank[needed])).amax(0)
        won = values.sub_(best).clamp_(min=-LARGEST_EXPONENT).exp_().sum(0).reciprocal_()
        return winner, torch.where(winner == 0, 1 - won, won).mul_(CERTAIN).round_().to(torch.uint8)

    def _needed(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        ratio: torch.Tensor,
        top: torch.Tensor,
        is_certain: torch.Tensor,
    ) -> torch.Tensor | None:
        """Return the classes to interpolate, None for all.

        Omitting the others changes no probability in the tile by more than `NEGLIGIBLE`: let M be
        the largest logit at each prepared voxel, and R the mean logit of the classes that win
        anywhere in a block. At a native voxel x, exp(logit) of a class is at most its largest ratio
        at a corner × exp(M(x)), and that of the winner at least exp(R(x)). So their quotient is at
        most that ratio × exp of the largest M - R at a corner.
        """
        if len(logits) <= 2:
            return None
        ranks = top.float()[None]
        is_open = (_pooled(ranks) != -_pooled(-ranks)) | (_pooled((~is_certain).float()[None]) > 0)
        is_open = is_open.flatten()
        ratio = _pooled(ratio).flatten(1)[:, is_open]
        if 2 * len(_not_negligible(ratio)) > len(ratio):
            return None
        wins = ratio >= 1
        winners = wins.any(1).nonzero().flatten()
        weights = wins[winners].float()
        weights /= weights.sum(0)
        corners = _corners(torch.cat([best[None], logits[winners]]))[:, is_open]
        gap = corners[0] - (weights[..., None] * corners[1:]).sum(0)
        return _not_negligible(ratio * gap.amax(1).clamp_(max=LARGEST_EXPONENT).exp_())


def _not_negligible(bound: torch.Tensor) -> torch.Tensor:
    """Return the indices of the classes without which the sum of the rest is negligible.

    Args:
        bound: (classes, blocks) upper bound of the ratio of each class.
    """
    ascending = bound.amax(1).sort()
    return ascending.indices[ascending.values.cumsum(0) > NEGLIGIBLE].sort().values


class _Regions:
    """Reduction of overlapping classes, present where their logit is > 0; the last one wins."""

    def __init__(self, n_classes: int) -> None:
        self._rank = torch.arange(1, n_classes + 1).to(_rank_dtype(n_classes))[:, None, None, None]

    def certain(self, logits: torch.Tensor) -> int | None:
        """Return 0 (background) if no class is likely at any voxel of the tile, or None."""
        low, high = logits.amax(0).aminmax()
        is_background = -math.inf < float(low) <= float(high) <= math.log(DOUBT / (1 - DOUBT))
        return 0 if is_background else None

    def __call__(
        self, logits: torch.Tensor, tile: Sequence[_Segment]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Reduce logits on prepared voxels to winner and confidence on native ones.

        None if all voxels are background.
        """
        rank = self._rank = self._rank.to(logits.device)
        _check_finite(logits.amax(0))
        top = ((logits > 0) * rank).amax(0)
        doubtful = math.log(DOUBT / (1 - DOUBT))
        is_certain = ((logits > -math.log(NEGLIGIBLE)) * rank).amax(0) == top
        is_certain &= (top > 0) | (logits.amax(0) <= doubtful)
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return _constant(tile, first)
        needed = (logits.flatten(1).amax(1) > doubtful).nonzero().flatten()
        values = _interpolate(logits[needed], tile)
        winner = ((values > 0) * rank[needed]).amax(0)
        logit = torch.where(winner == 0, values.amax(0), (values * (rank[needed] == winner)).sum(0))
        return winner, logit.sigmoid_().mul_(CERTAIN).round_().to(torch.uint8)


def _whole_blocks(values: torch.Tensor) -> torch.Tensor:
    """Repeat the last voxels of (classes, r, a, s) until each axis has whole blocks plus one."""
    pads = [(0, (1 - n) % BLOCK if n > 1 else BLOCK) for n in reversed(values.shape[1:])]
    padding = [n for pair in pads for n in pair]
    if not any(padding):
        return values
    return torch.nn.functional.pad(values[None], padding, mode="replicate")[0]


def _pooled(values: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each block, including its far faces: (n, blocks, blocks, blocks)."""
    values = _whole_blocks(values)
    for axis in (1, 2, 3):
        values = values.unfold(axis, BLOCK + 1, BLOCK).amax(-1)
    return values


def _corners(values: torch.Tensor) -> torch.Tensor:
    """Return the voxels of each block, including its far faces: (n, blocks, voxels)."""
    values = _whole_blocks(values)
    for axis in (1, 2, 3):
        values = values.unfold(axis, BLOCK + 1, BLOCK)
    return values.flatten(4).flatten(1, 3)
