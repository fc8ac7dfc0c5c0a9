"""Backend that runs a network with OpenVINO on a CPU, and the import of OpenVINO."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from volseg.errors import EnvironmentProblem
from volseg.execution.cpu import physical_cores
from volseg.inference.backend import out_of_memory_as_scan_error
from volseg.inference.head import Head
from volseg.inference.openvino_graph import halve_output, live_bytes, sum_axis_by_axis

if TYPE_CHECKING:
    import openvino


class OpenVINOBackend:
    """A network compiled by OpenVINO for this CPU and one shape of batch, on all physical cores.

    Args:
        model: a converted network (see `convert`) or one read from a model folder.
        batch_shape: (N, channels, R, A, S); larger batches run in parts, other patch shapes are
            compiled when they come.
        precision: fp32, fp16 (bf16 or fp16, whichever the CPU supports), or int8 for a quantised
            model.
        identity: further settings that affect the numbers.
        head: the head that was cut off the model, if it is deferred.
    """

    def __init__(
        self,
        model: openvino.Model,
        batch_shape: Sequence[int],
        *,
        precision: str = "fp32",
        identity: Mapping[str, str] | None = None,
        head: Head | None = None,
    ) -> None:
        self.head = head
        self._type = half_type() if precision == "fp16" else "f32"
        self._model = model.clone()
        # in half precision the partial sums would be rounded from step to step
        if self._type == "f32":
            sum_axis_by_axis(self._model)
        elif head is not None:
            halve_output(self._model)
        name = {"f32": precision, "bf16": "bf16", "f16": "fp16"}[self._type]
        self.identity: Mapping[str, str] = {"backend": "openvino", "precision": name}
        self.identity |= dict(identity or {})
        self._compile(tuple(batch_shape))

    def logits(self, batch: np.ndarray) -> np.ndarray:
        if batch.shape[1:] != self._shape[1:]:
            self._compile((self._shape[0], *batch.shape[1:]))
        with out_of_memory_as_scan_error(batch.shape, "cpu"):
            logits = self._output(len(batch))
            for start in range(0, len(batch), self._shape[0]):
                part = slice(start, start + self._shape[0])
                self._run(batch[part], logits[part])
            return logits

    @property
    def patch_bytes(self) -> int:
        """Peak bytes of live tensors while one patch passes through the network."""
        return live_bytes(self._model) // self._shape[0]

    def release(self) -> None:
        self._request = self._last = None
        self._compiled.release_memory()

    def _output(self, n: int) -> np.ndarray:
        """Return an array for the logits of `n` patches: the last one if no caller still holds it.

        With many classes it is large; a new array would fault in fresh pages for every patch.
        """
        shape = (n, *self._out_shape[1:])
        if (
            self._last is None
            or self._last.shape != shape
            or sys.getrefcount(self._last) > self._unshared
        ):
            self._last = np.empty(shape, self._out_type)
            self._unshared = sys.getrefcount(self._last)
        return self._last

    def _run(self, patches: np.ndarray, target: np.ndarray) -> None:
        """Write the logits of at most one batch into `target`, without copies by OpenVINO."""
        openvino = import_openvino()
        n = len(patches)
        patches = np.ascontiguousarray(patches, np.float32)
        output = target
        if n < self._shape[0]:  # the last patches of a scan do not always fill a batch
            padding = np.zeros((self._shape[0] - n, *patches.shape[1:]), np.float32)
            patches = np.concatenate([patches, padding])
            output = np.empty(self._out_shape, self._out_type)
        request = self._request = self._request or self._compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(patches, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(output, shared_memory=True))
        request.infer(share_outputs=True)  # else it also returns a copy as large as the output
        if output is not target:
            target[...] = output[:n]

    def _compile(self, shape: tuple[int, ...]) -> None:
        self._model.reshape(list(shape))
        hints = {
            # By default a CPU with matrix units for bf16 computes in bf16.
            "INFERENCE_PRECISION_HINT": self._type,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": physical_cores(),
            # Pinning binds two runs on one machine to the same cores, and gains nothing measurable.
            "ENABLE_CPU_PINNING": False,
        }
        self._shape = shape
        self._compiled = core().compile_model(self._model, "CPU", hints)
        output = self._compiled.output(0)
        self._out_shape, self._out_type = tuple(output.shape), output.get_element_type().to_dtype()
        self._request: openvino.InferRequest | None = None
        self._last: np.ndarray | None = None
        self._unshared = 0  # its reference count while no caller holds it


def half_type() -> str:
    """Return `find_half_type()`, or refuse a CPU without half precision.

    Raises:
        EnvironmentProblem: the CPU has none: fp16 would only be slower and less exact.
    """
    name = find_half_type()
    if name is None:
        cpu = core().get_property("CPU", "FULL_DEVICE_NAME")
        raise EnvironmentProblem(
            f"precision fp16 was requested, but OpenVINO finds no half precision on {cpu}",
            fix="use --precision fp32",
            code="E_PRECISION",
        )
    return name


def find_half_type() -> str | None:
    """Return OpenVINO's name of this CPU's half precision, bf16 or f16; None if it has none."""
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"BF16": "bf16", "FP16": "f16"}  # bf16 first: more CPUs have matrix units for it
    return next((name for capability, name in names.items() if capability in capabilities), None)


@cache
def core() -> openvino.Core:
    """Return the one OpenVINO Core of this process.

    The CPU plugin installs an alternate signal stack. Destroying one of several Cores frees a stack
    still in use, and Ctrl-C then ends in a segmentation fault (OpenVINO 2026.4).
    """
    return import_openvino().Core()


def import_openvino() -> ModuleType:
    """Return the package openvino.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    if (loaded := sys.modules.get("openvino")) is not None:
        return loaded
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        send_signal_again(error)
        broken = f"cannot be imported ({error})"
        raise EnvironmentProblem(
            f"openvino {broken if openvino_is_installed() else 'is not installed'}",
            fix="pip install 'volseg[cpu]'",
            code="E_BACKEND",
        ) from error
    return openvino


def send_signal_again(error: BaseException) -> None:
    """Send a signal again whose exception OpenVINO's C++ turned into an error of its own."""
    link: BaseException | None = error
    while link is not None:
        text = f"{type(link).__name__}: {link}"
        if "KeyboardInterrupt" in text:
            raise KeyboardInterrupt from error
        if "_TerminatedError" in text:  # what the command line raises for SIGTERM
            signal.raise_signal(signal.SIGTERM)
        link = link.__cause__ or link.__context__


def openvino_is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide `openvino_telemetry` while openvino or nncf is imported.

    With it, a mere import reports usage over the internet; both packages also work without it.
    """
    name = "openvino_telemetry"
    names = [module for module in list(sys.modules) if module.partition(".")[0] == name]
    hidden = {module: sys.modules.pop(module) for module in names}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(hidden)
