"""Estimate the duration of a run from the time of one tile, and name options that shorten it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from volseg.inference.backend import Backend
from volseg.inference.stream import Tiling
from volseg.words import duration, format_count

QUICK_SECONDS = 5.0  # a first batch, which also compiles, below this: a second batch is timed
LONG_SECONDS = 600.0  # a longer run without a GPU names the cheapest option first


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The tiles of a run.

    Args:
        shapes: shape of the prepared grid of each scan.
        seconds_per_tile: time of one forward pass over one patch.
    """

    tiling: Tiling
    shapes: Sequence[tuple[int, int, int]]
    seconds_per_tile: float
    on_gpu: bool

    @property
    def n_tiles(self) -> int:
        """Upper limit of the tiles: those of the whole grids, including empty ones."""
        return sum(self.tiling.count(shape) for shape in self.shapes)

    @property
    def n_copies(self) -> int:
        """Forward passes per tile: mirrored copies of test-time augmentation (TTA)."""
        return 2 ** len(self.tiling.tta_axes)

    @property
    def seconds(self) -> float:
        return self.n_tiles * self.n_copies * self.seconds_per_tile

    def options(self) -> Iterator[tuple[str, float]]:
        """Yield the command-line options that shorten the run, each with the seconds it takes."""
        plain = replace(self, tiling=replace(self.tiling, tta_axes=()))
        sparse = replace(self, tiling=replace(self.tiling, overlap=0.0))
        both = replace(plain, tiling=replace(plain.tiling, overlap=0.0))
        if self.n_copies > 1:
            yield "--no-tta", plain.seconds
        if sparse.n_tiles < self.n_tiles:
            yield "--overlap 0", sparse.seconds
        if both.seconds < min(plain.seconds, sparse.seconds):
            yield "--no-tta --overlap 0", both.seconds

    def announcement(self) -> str:
        """Return the expected time and faster options; the cheapest first if a CPU takes long."""
        copies = f" × {self.n_copies} mirrored copies" if self.n_copies > 1 else ""
        scans = f" in {len(self.shapes)} scans" if len(self.shapes) > 1 else ""
        tiles = f"at most {format_count(self.n_tiles, 'tile')}{copies}{scans}"
        tiles += f", about {duration(self.seconds)}"
        options = list(self.options())
        if self.on_gpu or self.seconds <= LONG_SECONDS or not options:
            parts = [tiles, *(f"{name} about {duration(seconds)}" for name, seconds in options)]
            return f"time: {'; '.join(parts)}"
        options.sort(key=lambda option: option[1])
        cheapest, *others = (f"{name} takes about {duration(seconds)}" for name, seconds in options)
        cheapest += " on this CPU, slightly less accurate"
        return f"time: {'; '.join([cheapest, *others, f'as requested: {tiles}'])}"


def seconds_per_tile(backend: Backend, batch_shape: Sequence[int]) -> float:
    """Return the seconds per tile of a blank batch (N, channels, R, A, S); also warms up."""
    batch = np.zeros(batch_shape, np.float32)
    seconds = _seconds(backend, batch)
    if seconds < QUICK_SECONDS:
        seconds = min(seconds, _seconds(backend, batch))
    return seconds / batch_shape[0]


def _seconds(backend: Backend, batch: np.ndarray) -> float:
    started = time.perf_counter()
    backend.logits(batch)
    return time.perf_counter() - started
