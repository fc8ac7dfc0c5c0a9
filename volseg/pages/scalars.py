"""Training curves for TensorBoard, if it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Scalars:
    """Writer of curves for `tensorboard --logdir`; without TensorBoard it writes nothing.

    Each run has a subfolder. `close` flushes what is still buffered.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def add(self, run: str, step: int, values: Mapping[str, float]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        if run not in self._writers:
            self._writers[run] = SummaryWriter(str(self._folder / run))
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, step)
        self._writers[run].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
