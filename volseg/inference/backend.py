"""Backend: what runs a network, whatever the engine, and the mean of several as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from volseg.errors import ScanError
from volseg.execution.cpu import is_out_of_memory
from volseg.inference.head import Head


class Backend(Protocol):
    """One network, ready to run. `logits` must not be called from two threads at once."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Settings that affect the numbers besides the weights; part of the key of a result."""
        ...

    @property
    def head(self) -> Head | None:
        """The deferred head; if there is one, `logits` returns its input, features."""
        ...

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """Return (N, classes, …) float32 for (N, channels, …) float32; the caller owns the array.

        With a deferred head, a network in half precision on a CPU returns features in float16.
        """
        ...

    def release(self) -> None:
        """Free memory only needed during prediction; the next `logits` allocates it again."""
        ...


@runtime_checkable
class TensorBackend(Backend, Protocol):
    """A backend for tensors on its own device, where scans are resampled and logits blended too."""

    @property
    def device(self) -> torch.device: ...

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        """Return `logits` for tensors on `device`; may return before a GPU is done."""
        ...


def device_of(backend: Backend) -> torch.device:
    """Return the device of the backend's logits."""
    return backend.device if isinstance(backend, TensorBackend) else torch.device("cpu")


def run_on_device(backend: Backend, batch: torch.Tensor) -> torch.Tensor:
    """Return `backend.logits` for a batch, both float32 on the backend's device."""
    if isinstance(backend, TensorBackend):
        return backend.run(batch)
    return torch.from_numpy(backend.logits(batch.numpy()))


def mean_of(members: Sequence[Backend]) -> Backend:
    """Return the networks of a model as one backend: a single member itself, else an ensemble."""
    return members[0] if len(members) == 1 else EnsembleBackend(members)


class EnsembleBackend:
    """The mean of the logits of several networks, such as the folds of one training."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        if not backends:
            raise ValueError("an ensemble needs at least one network")
        self.backends = list(backends)
        self.head: Head | None = None  # each member has its own head, so none is deferred

    @property
    def identity(self) -> Mapping[str, str]:
        """The identities of the members; different values are joined by commas."""
        joined = {
            name: ",".join(dict.fromkeys(backend.identity[name] for backend in self.backends))
            for name in self.backends[0].identity
        }
        return joined | {"networks": str(len(self.backends))}

    @property
    def device(self) -> torch.device:
        return device_of(self.backends[0])

    def logits(self, batch: np.ndarray) -> np.ndarray:
        return self.run(torch.from_numpy(batch).to(self.device)).cpu().numpy()

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        total = run_on_device(self.backends[0], batch)
        for backend in self.backends[1:]:
            total += run_on_device(backend, batch)
        return total.div_(len(self.backends))

    def release(self) -> None:
        for backend in self.backends:
            backend.release()


@contextmanager
def out_of_memory_as_scan_error(shape: tuple[int, ...], device: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ScanError(
            f"a batch of patches of shape {shape} does not fit into the memory of {device}",
            fix="close other programs" + (", or use --device cpu" if "cuda" in device else ""),
            code="E_OOM",
        ) from error
