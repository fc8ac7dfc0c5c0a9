"""How long a run will take, from the time of one tile, and which options would make it shorter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from volseg.infer.backends import Backend
from volseg.infer.stream import Tiling
from volseg.words import duration

QUICK_SECONDS = 5.0  # of a first batch, which also compiles; if it took less a second is timed
LONG_SECONDS = 600.0  # ahead without a GPU, from which on the cheapest option is named first


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The tiles of a run.

    Args:
        shapes: of the prepared grid of each scan.
        seconds_per_tile: of one run of the network over one patch.
    """

    tiling: Tiling
    shapes: Sequence[tuple[int, int, int]]
    seconds_per_tile: float
    on_gpu: bool

    @property
    def n_tiles(self) -> int:
        """Tiles at most: those of the whole grids, empty ones among them."""
        return sum(self.tiling.count(shape) for shape in self.shapes)

    @property
    def n_copies(self) -> int:
        """How often the network is run over each of them."""
        return 2 ** len(self.tiling.tta_axes)

    @property
    def seconds(self) -> float:
        return self.n_tiles * self.n_copies * self.seconds_per_tile

    def options(self) -> Iterator[tuple[str, float]]:
        """What would take less time, as it is written on the command line, and seconds with it."""
        plain = replace(self, tiling=replace(self.tiling, tta_axes=()))
        coarse = replace(self, tiling=replace(self.tiling, overlap=0.0))
        both = replace(plain, tiling=replace(plain.tiling, overlap=0.0))
        names = ("--no-tta", "--overlap 0", "--no-tta --overlap 0")
        is_open = (
            self.n_copies > 1,
            coarse.n_tiles < self.n_tiles,
            both.seconds < min(plain.seconds, coarse.seconds),
        )
        for name, work, applies in zip(names, (plain, coarse, both), is_open, strict=True):
            if applies:
                yield name, work.seconds

    def announcement(self) -> str:
        """The time ahead and what would be quicker; the cheapest first where a CPU needs long."""
        copies = f" × {self.n_copies} mirrored copies" if self.n_copies > 1 else ""
        scans = f" in {len(self.shapes)} scans" if len(self.shapes) > 1 else ""
        asked = f"at most {self.n_tiles} tiles{copies}{scans}, about {duration(self.seconds)}"
        options = list(self.options())
        if self.on_gpu or self.seconds <= LONG_SECONDS or not options:
            return "time: " + "; ".join(
                [asked, *(f"{name} about {duration(seconds)}" for name, seconds in options)]
            )
        options.sort(key=lambda option: option[1])
        cheapest, *others = (f"{name} takes about {duration(seconds)}" for name, seconds in options)
        return f"time: {'; '.join([f'{cheapest} on this CPU, slightly less accurate', *others, f'as asked: {asked}'])}"


def seconds_per_tile(backend: Backend, batch_shape: Sequence[int]) -> float:
    """Time the network over a blank batch (N, channels, R, A, S), which warms it up too."""
    batch = np.zeros(batch_shape, np.float32)
    seconds = _seconds(backend, batch)
    if seconds < QUICK_SECONDS:
        seconds = min(seconds, _seconds(backend, batch))
    return seconds / batch_shape[0]


def _seconds(backend: Backend, batch: np.ndarray) -> float:
    started = time.perf_counter()
    backend.logits(batch)
    return time.perf_counter() - started
