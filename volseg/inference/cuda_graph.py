"""CUDA graphs: record the kernels of a forward pass once and replay them as a whole.

With a small patch, launching kernels one by one takes most of the time; with a large one, next to
none. It depends on network, patch and GPU, so a trial at run time decides; there is no option.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch

# batches of one shape in a row before a recording is tried; a trial takes the time of about ten
TRIAL_AFTER = 16
# batches of the next scan before a graph known to be faster is recorded again, the time of two
AGAIN_AFTER = 4
REPEATS = 3
# largest replay time, relative to the plain pass: a recording holds memory, so it must gain time
WORTH = 0.97

Forward = Callable[[torch.Tensor], torch.Tensor]


class CudaGraph:
    """A recorded forward pass for one batch shape.

    Args:
        forward: runs the same kernels for every batch of that shape, without synchronising.
        batch: (N, channels, …) on the GPU.

    Raises:
        RuntimeError: the pass cannot be recorded, or memory is short; no state is left behind.
    """

    def __init__(self, forward: Forward, batch: torch.Tensor) -> None:
        self._batch = batch.clone()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            # Warm up: the first run sets up per-stream state, such as cuBLAS's workspace, which
            # must not be recorded.
            side.wait_stream(current)
            with torch.cuda.stream(side):
                forward(self._batch)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on copying
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._logits = forward(self._batch)
        finally:
            torch.cuda.set_stream(current)  # a failed capture does not restore it

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self._batch.copy_(batch)
        self._graph.replay()
        return self._logits.clone()


class RecordedPass:
    """A forward pass that is replayed from a recording once that is measured to be faster.

    The numbers are the same: a recording runs the same kernels. It needs the memory of the pass,
    which is freed before, so both are never held together. It is valid for one batch shape and
    dropped if another comes. If recording fails, because memory is short or the network
    synchronises, the plain pass is run.

    Args:
        record: records a pass, given an example of its batch.
        synchronize: waits until all work sent to the device is done.
        empty_cache: frees the memory cached by the device's allocator.
    """

    def __init__(
        self,
        *,
        record: Callable[[Forward, torch.Tensor], Forward] = CudaGraph,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
        empty_cache: Callable[[], None] = torch.cuda.empty_cache,
    ) -> None:
        self._record = record
        self._synchronize = synchronize
        self._empty_cache = empty_cache
        self._shape: torch.Size | None = None  # of the last batch
        self._n_in_row = 0  # batches of that shape
        self._pays: dict[torch.Size, bool] = {}
        self._recording: Forward | None = None

    def run(self, forward: Forward, batch: torch.Tensor) -> torch.Tensor:
        """Return `forward(batch)`; `forward` must be the same function in every call."""
        if batch.shape != self._shape:
            if self._recording is not None:
                self._drop()
            self._shape, self._n_in_row = batch.shape, 0
        self._n_in_row += 1
        if self._recording is None:
            pays = self._pays.get(batch.shape)
            if pays is None and self._n_in_row > TRIAL_AFTER:
                self._try(forward, batch)
            elif pays and self._n_in_row > AGAIN_AFTER:
                self._start(forward, batch)
        return (self._recording or forward)(batch)

    def release(self) -> None:
        """Free the recording's memory; the results of trials are kept."""
        self._recording = self._shape = None

    def _try(self, forward: Forward, batch: torch.Tensor) -> None:
        plain_seconds = self._seconds(forward, batch)
        self._start(forward, batch)
        if self._recording is None:
            return
        self._pays[batch.shape] = self._seconds(self._recording, batch) < WORTH * plain_seconds
        if not self._pays[batch.shape]:
            self._drop()

    def _start(self, forward: Forward, batch: torch.Tensor) -> None:
        self._empty_cache()
        self._pays[batch.shape] = False
        with suppress(RuntimeError):
            self._recording = self._record(forward, batch)
            self._pays[batch.shape] = True

    def _drop(self) -> None:
        self._recording = None
        self._empty_cache()

    def _seconds(self, run: Forward, batch: torch.Tensor) -> float:
        """Return the median time of some runs, from launch to completion."""
        seconds = []
        for _ in range(REPEATS):
            self._synchronize()
            started = time.perf_counter()
            run(batch)
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
