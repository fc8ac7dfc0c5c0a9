"""The network's logits → a mask on the scan's own grid: the way back of `prepare`.

It works a few planes at a time, so that the logits of a whole scan need not exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from volseg.errors import ScanError
from volseg.execute.cpu import untouched_zeros
from volseg.preprocess.crop import crop, to_canonical
from volseg.preprocess.prepare import Trail
from volseg.preprocess.resample import Kind, positions
from volseg.volume import BoundingBox

LARGEST_EXPONENT = 80.0  # exp of it is still a float32
CERTAIN = 255  # confidence of a probability of 1
TILE_VALUES = 1_000_000  # logits of a tile on its way back to the scan's grid, all classes: float32 temporaries of 4 MB stay in the cache
LARGEST_TILE = 32  # prepared voxels along an edge
BLOCK = 4  # prepared voxels along an edge, over which is judged which classes are needed
DOUBT = 0.1  # of any label where the background wins: below it, tiles of background alone are not looked at
NEGLIGIBLE = 2.0**-10  # of a probability: a quarter of one count of the confidence


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
        self._mask = untouched_zeros(trail.geometry.shape, self._table.dtype)
        self._confidence = untouched_zeros(trail.geometry.shape, np.uint8)
        views = (
            crop(to_canonical(array, trail.order), trail.box)
            for array in (self._mask, self._confidence)
        )
        self._mask_view, self._confidence_view = views
        self._axis = axis
        part = part or BoundingBox.whole(trail.shape)
        self._ways = [
            _WayBack(
                n, native, "nearest" if other == trail.separate_axis else "linear", start, stop
            )
            for other, (n, native, start, stop) in enumerate(
                zip(trail.shape, self._mask_view.shape, part.start, part.stop, strict=True)
            )
        ]
        self._kept: torch.Tensor | None = (
            None  # the last planes that were given, which the next native plane may need
        )
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
        self._kept, self._first = self._window(planes, begin, box).clone(), first

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mask (I, J, K), uint8 or uint16 label values, 0 outside the box;
        confidence (I, J, K) uint8: 255 × the probability of the label; where the mask is background that of any label, or 0 if it is
        less than `DOUBT` all around.
        """
        return self._mask, self._confidence

    def _segments(self, planes: slice) -> list[list[_Segment]]:
        """The pieces of each axis whose products are the tiles: as near to cubes as it goes."""
        native = [
            planes if n == self._axis else slice(0, len(way.lower))
            for n, way in enumerate(self._ways)
        ]
        # A tile has many voxels where the finer of the two grids has.
        room = self._most * math.prod(min(1.0, way.n / way.n_native) for way in self._ways)
        segments: list[list[_Segment]] = [[], [], []]
        by_length = sorted(range(3), key=lambda n: self._ways[n].cells(native[n]))
        for left, axis in zip(
            (3, 2, 1), by_length, strict=True
        ):  # what a thin axis does not use up is for the others
            edge = min(LARGEST_TILE, max(BLOCK, int(room ** (1 / left))))
            segments[axis] = self._ways[axis].segments(native[axis], edge)
            room /= max((each.last - each.first for each in segments[axis]), default=1)
        return segments

    def _window(self, planes: torch.Tensor, begin: int, box: Sequence[slice]) -> torch.Tensor:
        """A box of the prepared voxels, from the planes kept and those just given, which begin with `begin`; may be a view."""
        wanted = box[self._axis]

        def cut(source: torch.Tensor, origin: int) -> torch.Tensor:
            own = slice(max(0, wanted.start - origin), max(0, wanted.stop - origin))
            return source[
                (slice(None), *(own if n == self._axis else each for n, each in enumerate(box)))
            ]

        new = cut(planes, begin)
        if self._kept is None or wanted.start >= begin:
            return new
        return torch.cat([cut(self._kept, self._first).to(new.dtype), new], dim=1 + self._axis)

    def _restore(self, planes: torch.Tensor, tile: Sequence[_Segment]) -> None:
        """The native voxels of a tile, from its prepared ones."""
        logits = planes.to(torch.float32) if self._head is None else self._head(planes)
        label = self._reduction.certain(logits)
        if label is None:
            found = self._reduction(
                logits.clone() if logits.data_ptr() == planes.data_ptr() else logits, tile
            )
        else:
            found = _constant(tile, label)
        if found is None:
            return
        winner, confidence = (each.cpu().numpy() for each in found)
        native = tuple(each.native for each in tile)
        for view, values in (
            (self._mask_view, self._table.take(winner)),
            (self._confidence_view, confidence),
        ):
            # Zeros are there already, and their pages cost memory once they are written.
            box = BoundingBox.around(values)
            if box is not None:
                view[native][box.slices] = values[box.slices]


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
            return (
                values
                if is_same
                else values.index_select(axis, torch.from_numpy(self.lower).to(values.device))
            )
        matrix = np.zeros((len(self.lower), n), np.float32)
        rows = np.arange(len(self.lower))
        matrix[rows, self.lower] = 1 - self.weight
        matrix[rows, np.minimum(self.lower + 1, n - 1)] += self.weight
        weights = torch.from_numpy(matrix).to(values.device)
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        if not after:
            return torch.matmul(values, weights.T)
        flat = values.reshape(math.prod(before), n, math.prod(after))
        return torch.bmm(weights.expand(len(flat), -1, -1), flat).reshape(
            *before, len(matrix), *after
        )


class _WayBack:
    """One axis: which native voxels lie between the prepared ones from `start` to `stop`, and where between them."""

    def __init__(self, n: int, n_native: int, kind: Kind, start: int, stop: int) -> None:
        self.n, self.n_native = n, n_native
        lower, upper, weight = positions(n, n_native, kind)
        inside = np.flatnonzero((lower >= start) & (upper < stop))
        self._offset = int(inside[0]) if inside.size else 0
        self.lower, self.upper, self._weight = (
            lower[inside] - start,
            upper[inside] - start,
            weight[inside],
        )

    def cells(self, native: slice) -> int:
        """Prepared voxels from the first to the last that these native ones lie between."""
        return (
            int(self.upper[native][-1] - self.lower[native][0]) + 1
            if self.lower[native].size
            else 0
        )

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

    def certain(self, logits: torch.Tensor) -> int | None:
        """The label that all of the tile certainly has, as far as one look at the logits (classes, r, a, s) can tell; None: look closer."""
        first = int(logits[:, 0, 0, 0].argmax())
        others = [part.amax(0) for part in (logits[:first], logits[first + 1 :]) if len(part)]
        least, most = (
            logits[first] - (others[0] if len(others) == 1 else torch.maximum(*others))
        ).aminmax()
        share = (
            DOUBT / (1 - DOUBT) if first == 0 else NEGLIGIBLE
        )  # of all others together, beside the winner's 1
        return (
            first
            if math.log((len(logits) - 1) / share) <= float(least) <= float(most) < math.inf
            else None
        )

    def __call__(
        self, logits: torch.Tensor, tile: Sequence[_Segment]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (classes, r, a, s) on prepared voxels → winner, confidence on native ones; None where all is background."""
        rank = self._rank = self._rank.to(logits.device)
        best = logits.amax(0)
        _check_finite(best)
        top = ((logits == best) * rank).amax(0)
        share = (
            torch.sub(logits, best).clamp_(min=-LARGEST_EXPONENT).exp_()
        )  # of each class, beside the winner's 1
        total = share.sum(0)
        is_certain = (total <= 1 + NEGLIGIBLE) | ((top == len(rank)) & (total <= 1 / (1 - DOUBT)))
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return _constant(tile, len(rank) - first)
        needed = self._needed(logits, best, share, top, is_certain)
        values = _interpolate(logits if needed is None else logits[needed], tile)
        best = values.amax(0)
        winner = len(rank) - ((values == best) * (rank if needed is None else rank[needed])).amax(0)
        won = values.sub_(best).clamp_(min=-LARGEST_EXPONENT).exp_().sum(0).reciprocal_()
        return winner, torch.where(winner == 0, 1 - won, won).mul_(CERTAIN).round_().to(torch.uint8)

    def _needed(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        share: torch.Tensor,
        top: torch.Tensor,
        is_certain: torch.Tensor,
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

    def certain(self, logits: torch.Tensor) -> int | None:
        """Background, where no class is likely at any prepared voxel of the tile; None: look closer."""
        least, most = logits.amax(0).aminmax()
        return (
            0 if -math.inf < float(least) <= float(most) <= math.log(DOUBT / (1 - DOUBT)) else None
        )

    def __call__(
        self, logits: torch.Tensor, tile: Sequence[_Segment]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (classes, r, a, s) on prepared voxels → winner, confidence on native ones; None where all is background."""
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
    """(classes, r, a, s), continued with its last voxels so that each axis is blocks and one voxel more."""
    ends = [
        end for n in reversed(values.shape[1:]) for end in (0, (1 - n) % BLOCK if n > 1 else BLOCK)
    ]
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
