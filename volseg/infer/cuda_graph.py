"""The work of a network on a GPU, recorded once and sent again as a whole (CUDA graphs).

Of a small patch most of the time goes into launching kernels one by one; of a large one next to nothing. Which of the two it is depends on the network, the patch
and the GPU, so it is measured where it runs, and nobody needs to ask for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch

TRIAL_AFTER = 16  # batches of one shape in a row before a recording is tried, which takes the time of some ten
AGAIN_AFTER = 4  # of the next scan, before what is known to pay is recorded again, which takes the time of two
REPEATS = 3
WORTH = 0.97  # of the time without a recording: it holds its memory, so it has to gain something

Forward = Callable[[torch.Tensor], torch.Tensor]


class CudaGraph:
    """One forward pass of one shape of batch, recorded.

    Args:
        forward: does the same work on every batch of that shape, and waits for no result on the way.
        batch: (N, channels, …) on the GPU.

    Raises:
        RuntimeError: it cannot be recorded, or there is no memory for it; nothing is left behind.
    """

    def __init__(self, forward: Forward, batch: torch.Tensor) -> None:
        self._batch = batch.clone()
        own, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            # What is set up at a first run, such as cuBLAS's workspace, belongs to the stream and must not be recorded.
            stream.wait_stream(own)
            with torch.cuda.stream(stream):
                forward(self._batch)
            own.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on with their copies meanwhile.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = forward(self._batch)
        finally:
            torch.cuda.set_stream(own)  # which a capture that fails does not do

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self._batch.copy_(batch)
        self._graph.replay()
        return self._logits.clone()


class Recorded:
    """Runs a forward pass as it is until a recording of it has been measured to be faster.

    The numbers are the same: a recording runs the same kernels. Its memory is that of the pass itself, which is given back before, so that never both are held.
    It is of one shape, and dropped when another comes. Where a recording fails, for lack of memory or because the network asks for results on the way, the pass is run as it is.

    Args:
        record: how a pass is recorded from an example of its batch.
        synchronize: waits until everything sent to the device is done.
        empty_cache: gives back the memory that the device's allocator keeps.
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
        self._seen = 0  # in a row
        self._pays: dict[torch.Size, bool] = {}
        self._recording: Forward | None = None

    def run(self, forward: Forward, batch: torch.Tensor) -> torch.Tensor:
        """What `forward` gives for the batch; it must be the same one at each call."""
        if batch.shape != self._shape:
            if self._recording is not None:
                self._drop()
            self._shape, self._seen = batch.shape, 0
        self._seen += 1
        if self._recording is None:
            pays = self._pays.get(batch.shape)
            if pays is None and self._seen > TRIAL_AFTER:
                self._try(forward, batch)
            elif pays and self._seen > AGAIN_AFTER:
                self._start(forward, batch)
        return (self._recording or forward)(batch)

    def release(self) -> None:
        """Give the recording's memory back; what was measured stays known."""
        self._recording = self._shape = None

    def _try(self, forward: Forward, batch: torch.Tensor) -> None:
        as_it_is = self._seconds(forward, batch)
        self._start(forward, batch)
        if self._recording is None:
            return
        self._pays[batch.shape] = self._seconds(self._recording, batch) < WORTH * as_it_is
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
        """Of the typical one of some runs, from sent to done."""
        found = []
        for _ in range(REPEATS):
            self._synchronize()
            started = time.perf_counter()
            run(batch)
            self._synchronize()
            found.append(time.perf_counter() - started)
        return statistics.median(found)
