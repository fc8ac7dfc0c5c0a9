"""Backends that run a network: torch, OpenVINO, and ensembles of them."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from volseg.bundle import EXPORTED, ModelBundle
from volseg.errors import EnvironmentProblem, ScanError, VolsegError
from volseg.execution.cpu import drop_mapped_pages, is_out_of_memory, physical_cores
from volseg.inference.cuda_graph import RecordedPass
from volseg.inference.graph import (
    halve_output,
    live_bytes,
    split_joined_convolutions,
    sum_axis_by_axis,
)
from volseg.inference.head import Head, cut_openvino_head, cut_torch_head
from volseg.inputs import read_json
from volseg.io.files import environment_problem, make_folder, sha256_of, write_json_atomic

if TYPE_CHECKING:
    import openvino

BACKENDS = ("auto", "torch", "openvino")
PRECISIONS = ("auto", "fp32", "fp16", "int8")
EXAMPLE_VOXELS = (32, 64)  # sizes of the example to trace, tried in turn: faster than a patch
# relative to the largest logit; a converted network that differs more from torch is refused
TRACE_TOLERANCE = 1e-3


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


class TorchBackend:
    """A torch module in evaluation mode on one device.

    Args:
        precision: fp32, or fp16 for autocast on a GPU; auto is fp16 on CUDA and fp32 elsewhere.
        channels_last: on CUDA, keep images and weights in the layout of the tensor cores.
        head: the head that was cut off the network, if it is deferred.
        may_record: on CUDA, replay a CUDA graph if that is faster; the network's weights must stay
            at their addresses.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        precision: str = "auto",
        channels_last: bool = True,
        head: Head | None = None,
        may_record: bool = False,
    ) -> None:
        self.device = device
        self.head = None if head is None else head.to(device)
        self.half = device.type == "cuda" and precision in ("auto", "fp16")
        self.channels_last = channels_last and device.type == "cuda"
        self.network = network.to(device).eval()
        if self.channels_last:
            _channels_last(self.network)
        self._recorded = RecordedPass() if may_record and device.type == "cuda" else None
        if device.type == "cpu" and torch.get_num_threads() > physical_cores():
            torch.set_num_threads(physical_cores())

    @property
    def identity(self) -> Mapping[str, str]:
        return {"backend": "torch", "precision": "fp16" if self.half else "fp32"}

    def logits(self, batch: np.ndarray) -> np.ndarray:
        return self.run(torch.from_numpy(batch).to(self.device)).cpu().numpy()

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        with (
            _out_of_memory_as_scan_error(tuple(batch.shape), str(self.device)),
            torch.no_grad(),
            # All patches have one shape: cuDNN measures once which algorithm is fastest. TF32 is
            # not fp32.
            torch.backends.cudnn.flags(enabled=True, benchmark=on_gpu, allow_tf32=self.half),
            # Each weight is used once, and a CUDA graph must not use casts that autocast frees.
            torch.autocast("cuda", torch.float16, enabled=self.half, cache_enabled=False),
        ):
            if self.channels_last:
                batch = batch.contiguous(memory_format=_memory_format(batch))
            if self._recorded is None:
                return self._forward(batch)
            return self._recorded.run(self._forward, batch)

    def release(self) -> None:
        if self._recorded is not None:
            self._recorded.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.network(batch).float()


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
        with _out_of_memory_as_scan_error(batch.shape, "cpu"):
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


def mean_of(members: Sequence[Backend]) -> Backend:
    """Return the networks of a model as one backend: a single member itself, else an ensemble."""
    return members[0] if len(members) == 1 else EnsembleBackend(members)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """The chosen backend, device and precision, without any "auto"."""

    backend: str
    device: torch.device
    precision: str


def choose_backend(
    backend: str = "auto", device: str = "auto", precision: str = "auto"
) -> BackendChoice:
    """Choose an available backend, device and precision that work together.

    `auto` takes the GPU if there is one, else OpenVINO if it is installed, else torch
    (docs/benchmarks.md says why), in half precision on a GPU and fp32 on a CPU. It never takes
    int8, which costs accuracy.

    Raises:
        EnvironmentProblem: the requested backend, device or precision is not available.
        VolsegError: a name is unknown, or the three cannot be combined.
    """
    for option, value, supported in (
        ("backend", backend, BACKENDS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in supported:
            raise VolsegError(
                f"{option} {value!r} is unknown",
                fix=f"use {', '.join(supported[:-1])} or {supported[-1]}",
                code="E_USAGE",
            )
    for_cpus = backend == "openvino" or precision == "int8"
    place = choose_device("cpu" if device == "auto" and for_cpus else device)
    if place.type == "cuda":
        if for_cpus:
            option = "backend openvino" if backend == "openvino" else "precision int8"
            raise VolsegError(
                f"{option} runs on a CPU, not on {device}", fix="use --device cpu", code="E_USAGE"
            )
        precision = "fp16" if precision == "auto" else precision
        return BackendChoice(backend="torch", device=place, precision=precision)
    precision = "fp32" if precision == "auto" else precision
    if backend == "auto":
        backend = "openvino" if openvino_is_installed() or precision != "fp32" else "torch"
    if backend == "torch" and precision != "fp32":
        raise VolsegError(
            f"precision {precision} on a CPU needs the backend openvino, got torch",
            fix="use --backend openvino or --precision fp32",
            code="E_USAGE",
        )
    if backend == "openvino":
        import_openvino()
    if precision == "fp16":
        half_type()
    return BackendChoice(backend=backend, device=place, precision=precision)


def load_backend(
    bundle: ModelBundle, choice: BackendChoice, *, folder: Path | None = None
) -> Backend:
    """Load the bundle's segmentation network, ready to run.

    Args:
        folder: the bundle's folder. Its OpenVINO files are used if they were made from this bundle.

    Raises:
        VolsegError: the folder has no quantised network for int8, or OpenVINO does not support the
            network.
    """
    shape = batch_shape_of(bundle)
    members: list[Backend] = []
    is_single = len(bundle.members) == 1
    # The heads of an ensemble cannot be deferred, each has its own features. Two classes gain
    # nothing.
    may_cut = is_single and bundle.recipe.data.n_outputs > 2
    for name in bundle.members:
        if choice.backend == "torch":
            network = bundle.member(name).eval()
            head = (
                cut_torch_head(network, partial(_example_patch, network, shape))
                if may_cut
                else None
            )
            # CUDA graphs of several members would hold their memory at the same time
            members.append(
                TorchBackend(
                    network,
                    choice.device,
                    precision=choice.precision,
                    head=head,
                    may_record=is_single,
                )
            )
            continue
        stored = "int8" if choice.precision == "int8" else "fp32"
        stem = f"{name}.{stored}"
        model, facts = (None, {}) if folder is None else read_exported(folder, stem, bundle.sha256)
        if model is None and stored == "int8":
            raise VolsegError(
                f"{folder or 'the model'}: has no int8 network made from its weights",
                fix="run `volseg quantise MODEL DATASET` first, or use --precision fp32",
                code="E_PRECISION",
            )
        identity = {"network_sha256": facts["files"][f"{stem}.bin"]} if stored == "int8" else None
        if model is None:
            model = convert(bundle.member(name), shape)
        head = cut_openvino_head(model) if may_cut else None
        members.append(
            OpenVINOBackend(model, shape, precision=choice.precision, identity=identity, head=head)
        )
        if folder is not None:  # the compiled network has its own copy of the weights
            drop_mapped_pages(folder / EXPORTED / f"{stem}.bin")
    return mean_of(members)


def convert(network: nn.Module, batch_shape: Sequence[int]) -> openvino.Model:
    """Convert a torch module to an OpenVINO model in fp32 with a free shape, and compare the two.

    Args:
        batch_shape: (N, channels, R, A, S) of its batches.

    Raises:
        VolsegError: OpenVINO does not support the network, or its logits differ.
    """
    openvino = import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    network = network.cpu().eval()
    example, expected = _example(network, batch_shape)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer warns of its deprecation and of shape checks that hold for all our shapes.
            warnings.simplefilter("ignore")
            frontend = FrontEndManager().load_by_framework("pytorch")
            unchecked = {"check_trace": False}  # the logits are compared below
            traced = TorchScriptPythonDecoder(
                network, example_input=example, shared_memory=False, trace_kwargs=unchecked
            )
            model = frontend.convert(frontend.load(traced))
        split_joined_convolutions(model)
        logits = OpenVINOBackend(model, example.shape).logits(example.numpy())
        model.reshape(openvino.PartialShape([-1, batch_shape[1], *[-1] * (len(batch_shape) - 2)]))
    except RuntimeError as error:
        raise VolsegError(
            f"OpenVINO cannot convert this network ({str(error).strip().splitlines()[-1]})",
            fix="use --backend torch",
            code="E_BACKEND",
        ) from error
    off = float(np.abs(logits - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not off <= TRACE_TOLERANCE:
        raise VolsegError(
            f"OpenVINO's logits of this network are off by {off:.2g} relative to the largest "
            f"(limit {TRACE_TOLERANCE:g})",
            fix="use --backend torch",
            code="E_BACKEND",
        )
    return model


def _example(network: nn.Module, batch_shape: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Return a batch of one patch, as small as the network accepts, and its logits."""
    patch = tuple(batch_shape[2:])
    for voxels in (*EXAMPLE_VOXELS, max(patch)):
        shape = (1, batch_shape[1], *(min(voxels, n) for n in patch))
        example = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
        try:
            with torch.inference_mode():
                return example, network(example).numpy()
        # too small or not divisible: the deepest level would have no voxels
        except (RuntimeError, ValueError):
            if shape[2:] == patch:
                raise
    raise AssertionError("the last example is a whole patch")


def _example_patch(network: nn.Module, batch_shape: Sequence[int]) -> torch.Tensor:
    return _example(network, batch_shape)[0]


def export_bundle(
    bundle: ModelBundle, folder: Path, *, before: Callable[[str], bool] = lambda name: True
) -> None:
    """Write OpenVINO files of the 3D networks to the folder, so that inference need not convert.

    `before` is called with the name of each network; if it returns False, this network and the
    following ones are not converted. Does nothing if OpenVINO is not installed or does not support
    a network: inference reports that.
    """
    if not openvino_is_installed():
        return
    with suppress(VolsegError):
        for name in bundle.members:
            if not before(name):
                return
            model = convert(bundle.member(name), batch_shape_of(bundle))
            write_exported(model, folder, f"{name}.fp32", {"model_sha256": bundle.sha256})
    if bundle.coarse is not None:
        export_bundle(bundle.coarse, folder, before=before)


def batch_shape_of(bundle: ModelBundle) -> tuple[int, ...]:
    """Return (N, channels, R, A, S) of the batches that inference feeds the network."""
    recipe = bundle.recipe
    return (recipe.infer.batch_size, len(recipe.data.channels), *bundle.plan.patch_shape)


def write_exported(
    model: openvino.Model, folder: Path, stem: str, facts: Mapping[str, Any]
) -> None:
    """Write `openvino/<stem>.xml`, `.bin` and last `.json`, with their hashes and `facts` (JSON).

    Raises:
        EnvironmentProblem: the folder is not writable, or the disk is full.
    """
    openvino = import_openvino()
    target = folder / EXPORTED
    make_folder(target)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target) as temporary:
            paths = [Path(temporary) / f"{stem}.{suffix}" for suffix in ("xml", "bin")]
            # not compressed: the weights stay those that were trained
            openvino.save_model(model, paths[0], compress_to_fp16=False)
            hashes = {path.name: sha256_of(path) for path in paths}
            for path in paths:
                os.replace(path, target / path.name)
    except OSError as error:
        raise environment_problem(target, error) from error
    except RuntimeError as error:
        raise EnvironmentProblem(
            f"{target}: cannot be written ({str(error).strip().splitlines()[-1]})",
            fix="free some space, or make the model folder writable",
            code="E_DISK",
        ) from error
    write_json_atomic(target / f"{stem}.json", dict(facts) | {"files": hashes})


def read_exported(
    folder: Path, stem: str, model_sha256: str
) -> tuple[openvino.Model | None, dict[str, Any]]:
    """Read what `write_exported` wrote; (None, {}) if missing, damaged or of another model."""
    import_openvino()
    target = folder / EXPORTED
    try:
        facts = read_json(target / f"{stem}.json")
        if facts["model_sha256"] != model_sha256:
            return None, {}
        hashes = {name: sha256_of(target / name) for name in (f"{stem}.xml", f"{stem}.bin")}
        if hashes != facts["files"]:
            return None, {}
        return core().read_model(target / f"{stem}.xml"), facts
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None, {}


def openvino_is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


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
        broken = f"cannot be imported ({error})"
        raise EnvironmentProblem(
            f"openvino {broken if openvino_is_installed() else 'is not installed'}",
            fix="pip install 'volseg[cpu]'",
            code="E_BACKEND",
        ) from error
    return openvino


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


@cache
def core() -> openvino.Core:
    """Return the one OpenVINO Core of this process.

    The CPU plugin installs an alternate signal stack. Destroying one of several Cores frees a stack
    still in use, and Ctrl-C then ends in a segmentation fault (OpenVINO 2026.4).
    """
    return import_openvino().Core()


def find_half_type() -> str | None:
    """Return OpenVINO's name of this CPU's half precision, bf16 or f16; None if it has none."""
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"BF16": "bf16", "FP16": "f16"}  # bf16 first: more CPUs have matrix units for it
    return next((name for capability, name in names.items() if capability in capabilities), None)


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


def choose_device(name: str) -> torch.device:
    """Return the torch device for `auto`, `cpu` or `cuda`.

    Raises:
        EnvironmentProblem: CUDA was requested and is not available.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise VolsegError(
            f"device {name!r} is unknown", fix="use auto, cpu or cuda", code="E_USAGE"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "device cuda was requested, but torch finds no CUDA device",
            fix="install a driver and a CUDA build of torch, or use --device cpu",
            code="E_DEVICE",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _memory_format(images: torch.Tensor) -> torch.memory_format:
    """Return the channels-last format, the layout of a GPU's tensor cores."""
    return torch.channels_last_3d if images.ndim == 5 else torch.channels_last


def _channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=_memory_format(parameter))


@contextmanager
def _out_of_memory_as_scan_error(shape: tuple[int, ...], device: str) -> Iterator[None]:
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
