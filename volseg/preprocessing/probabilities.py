"""Logits → the probability of every label on the scan's grid, kept in files instead of memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from volseg.errors import EnvironmentProblem
from volseg.preprocessing.prepare import Trail
from volseg.preprocessing.segments import Segment, interpolate
from volseg.volume import BoundingBox

LEVELS = 255  # a stored value is the probability times this
HALF_LEVEL = 0.5 / LEVELS  # a smaller probability is stored as 0


class ProbabilityMaps:
    """A temporary file per label with its probability in every native voxel, 255 for 1.

    A tile of logits is interpolated like that of the mask and written at once; pages that were
    written are handed to the operating system, so the process never holds a whole map.

    Args:
        values: mask value of each label, in the order of the network's outputs.
        regions: the outputs are overlapping regions, without a background class.
        folder: where the files are; they have no name and vanish when they are closed.
    """

    def __init__(self, values: Sequence[int], folder: Path, *, regions: bool = False) -> None:
        self.values = tuple(values)
        self._folder, self._first = folder, 0 if regions else 1
        self._regions = regions
        self._files: list[BinaryIO] = []
        self._maps: list[mmap.mmap] = []
        self._views: list[np.ndarray] = []

    def begin(self, trail: Trail) -> None:
        """Make the files for a scan, with the probability 0 everywhere.

        Raises:
            EnvironmentProblem: there is no room for them on the disk.
        """
        shape = trail.geometry.shape
        try:
            for _ in self.values:
                file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 closed in `close`
                self._files.append(file)
                _reserve(file, math.prod(shape))
                self._maps.append(mmap.mmap(file.fileno(), 0))
                array = np.ndarray(shape, np.uint8, self._maps[-1], order="F")
                self._views.append(trail.order.apply(array)[trail.box.slices])
        except OSError as error:
            self.close()
            raise EnvironmentProblem(
                f"{self._folder}: no room for the probabilities ({error.strerror or error})",
                fix="free some space, or leave out --probabilities",
            ) from error

    def add(self, logits: torch.Tensor, tile: Sequence[Segment]) -> None:
        """Write the native voxels of a tile of logits (classes, R, A, S), which stay as are."""
        if self._is_nothing(logits):
            return
        probabilities = self._probabilities(interpolate(logits, tile))[self._first :]
        levels = probabilities.mul(LEVELS).round_().to(torch.uint8).cpu().numpy()
        native = tuple(segment.native for segment in tile)
        for view, pages, label in zip(self._views, self._maps, levels, strict=True):
            box = BoundingBox.around(label)
            if box is not None:
                view[native][box.slices] = label[box.slices]
                if hasattr(mmap, "MADV_DONTNEED"):  # the file keeps what was written
                    pages.madvise(mmap.MADV_DONTNEED)

    def file_of(self, value: int) -> BinaryIO:
        """Return the voxels of a label, in Fortran order."""
        return self._files[self.values.index(value)]

    def close(self) -> None:
        """Delete the files."""
        self._views.clear()
        for item in (*self._maps, *self._files):
            item.close()
        self._maps.clear()
        self._files.clear()

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.to(torch.float32)
        return logits.sigmoid() if self._regions else logits.softmax(0)

    def _is_nothing(self, logits: torch.Tensor) -> bool:
        """Return whether every label is less probable than half a level in the whole tile.

        An interpolated logit is a mean of those around it, so that no label can become likelier
        than in the likeliest voxel.
        """
        if self._regions:
            return float(logits.amax()) < math.log(HALF_LEVEL / (1 - HALF_LEVEL))
        others = logits[1:] - logits[:1]
        return float(others.amax()) + math.log(len(others)) < math.log(HALF_LEVEL)


def _reserve(file: BinaryIO, n_bytes: int) -> None:
    """Make a file of zeros; on a full disk this fails, not a later write into its memory map."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    else:
        file.truncate(n_bytes)
