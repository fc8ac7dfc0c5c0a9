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

TRIAL_AFTER = (
    16  # batches of one shape are run as they come before a recording is tried, which takes the time of some ten
)
REPEATS = 3
WORTH = 0.97  # of the time without a recording: it holds its memory, so it has to gain something

Forward = Callable[[torch.Tensor], torch.Tensor]


class CudaGraph:
    """One forward pass of one shape of batch, recorded.

    Args:
        forward: does the same work on every batch of that shape, and waits for no result on the way.
        batch: (N, channels, …) on the GPU. Smaller batches are run as if they were filled up.
    """

    def __init__(self, forward: Forward, batch: torch.Tensor) -> None:
        self._batch = batch.clone()
        # What is set up at a first run, such as cuBLAS's workspace, belongs to the stream and must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on with their copies meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = forward(self._batch)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        n = len(batch)
        self._batch[:n].copy_(batch)
        self._graph.replay()
        return self._logits[:n].clone()


class Recorded:
    """A forward pass that is recorded as soon as that has been measured to be faster, and run as it is until then.

    The numbers are the same: a recording runs the same kernels. Its memory is that of the pass itself, which is given back before: never both at a time, so that a
    budget holds. Where a recording fails, for lack of memory or because the network asks for results on the way, the pass is run as it is.

    Args:
        record: how a pass is recorded from an example of its batch.
        synchronize: waits until everything sent to the device is done.
        empty_cache: gives back the memory that the device's allocator keeps.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        record: Callable[[Forward, torch.Tensor], Forward] = CudaGraph,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
        empty_cache: Callable[[], None] = torch.cuda.empty_cache,
    ) -> None:
        self._forward = forward
        self._record = record
        self._synchronize = synchronize
        self._empty_cache = empty_cache
        self._shape: torch.Size | None = None  # of the batches that come
        self._seen = 0
        self._pays: bool | None = None  # not known yet
        self._recording: Forward | None = None

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        if self._shape is None or batch.shape[1:] != self._shape[1:] or len(batch) > self._shape[0]:
            self._shape, self._seen, self._pays, self._recording = batch.shape, 0, None, None
        if batch.shape == self._shape:
            self._seen += 1
            if self._pays is None and self._seen > TRIAL_AFTER:
                self._try(batch)
            elif self._pays and self._recording is None:
                self._start(batch)
        return (self._recording or self._forward)(batch)

    def release(self) -> None:
        """Give the recording's memory back; what was measured stays known, and the next batch is recorded again."""
        self._recording = None

    def _try(self, batch: torch.Tensor) -> None:
        as_it_is = self._seconds(self._forward, batch)
        self._start(batch)
        if self._recording is None:
            return
        self._pays = self._seconds(self._recording, batch) < WORTH * as_it_is
        if not self._pays:
            self._recording = None
            self._empty_cache()

    def _start(self, batch: torch.Tensor) -> None:
        self._pays = False
        self._empty_cache()
        with suppress(RuntimeError):
            self._recording = self._record(self._forward, batch)
            self._pays = True

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
