"""What runs the network: a class with `logits(batch)`."""

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
from volseg.execute.cpu import give_back_mapped, is_out_of_memory, physical_cores
from volseg.infer.cuda_graph import Recorded
from volseg.infer.graph import halve_output, live_bytes, split_joined_convolutions, sum_axis_by_axis
from volseg.infer.head import Head, cut_head, take_head
from volseg.inputs import read_json
from volseg.io.files import environment_problem, make_folder, sha256_of, write_json_atomic

if TYPE_CHECKING:
    import openvino

BACKENDS = ("auto", "torch", "openvino")
PRECISIONS = ("auto", "fp32", "fp16", "int8")
EXAMPLE_VOXELS = (32, 64)  # along each axis, of the example to trace: faster than a whole patch
TRACE_TOLERANCE = (
    1e-3  # of the largest logit: a converted network that is further from torch's is not used
)


class Backend(Protocol):
    """One network, ready to run. `logits` must not be called from two threads at once."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides the numbers besides the weights: part of the key of a result."""
        ...

    @property
    def head(self) -> Head | None:
        """The network's last layer where it was taken off: what `logits` gives is then what goes into it."""
        ...

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """(N, channels, …) float32 → (N, classes, …) float32, a new array that is the caller's to change or keep.

        Features, where the head was taken off a network that runs in half precision on a CPU, are float16.
        """
        ...

    def release(self) -> None:
        """Give back what is only needed while a scan is being predicted; the next `logits` takes it again."""
        ...


@runtime_checkable
class TensorBackend(Backend, Protocol):
    """A backend that takes and gives tensors on its own device, where scans can then be resampled and logits blended too."""

    @property
    def device(self) -> torch.device: ...

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        """As `logits`, on `device`; may return before a GPU is done."""
        ...


def device_of(backend: Backend) -> torch.device:
    """Where the backend's logits come out."""
    return backend.device if isinstance(backend, TensorBackend) else torch.device("cpu")


def run_on_device(backend: Backend, batch: torch.Tensor) -> torch.Tensor:
    """(N, channels, …) float32 → (N, classes, …) float32, both on the backend's device."""
    if isinstance(backend, TensorBackend):
        return backend.run(batch)
    return torch.from_numpy(backend.logits(batch.numpy()))


class TorchBackend:
    """A torch module in evaluation mode on one device.

    Args:
        precision: fp32, or fp16 for half precision where the GPU's tensor cores take it (autocast); auto is fp16 on CUDA
            and fp32 elsewhere.
        channels_last: on CUDA, keep images and weights in the layout of the tensor cores.
        head: that was taken off the network.
        may_record: on CUDA, send the work for a batch as one recording where that is faster; the network's weights must stay where they are.
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
        self._recorded = Recorded() if may_record and device.type == "cuda" else None
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
            _out_of_memory_is_the_scans_problem(tuple(batch.shape), str(self.device)),
            torch.no_grad(),
            # Patches are all alike: cuDNN measures once which algorithm is fastest. TF32 is not fp32.
            torch.backends.cudnn.flags(enabled=True, benchmark=on_gpu, allow_tf32=self.half),
            # Each weight is used once, and a recording must not keep casts that somebody else frees.
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
        model: a converted network (see `convert`) or one that was read from a model folder.
        batch_shape: (N, channels, R, A, S); a batch of more patches runs in parts, one of other patches compiles anew.
        precision: fp32, fp16 (bf16 or fp16, whichever the chip has) or int8, for a model that was quantised.
        identity: more of what the numbers depend on.
        head: that was taken off the model.
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
        if (
            self._type == "f32"
        ):  # in half precision what is handed from step to step would be rounded to it
            sum_axis_by_axis(self._model)
        elif head is not None:
            halve_output(self._model)
        name = {"f32": precision, "bf16": "bf16", "f16": "fp16"}[self._type]
        self.identity: Mapping[str, str] = {"backend": "openvino", "precision": name} | dict(
            identity or {}
        )
        self._compile(tuple(batch_shape))

    def logits(self, batch: np.ndarray) -> np.ndarray:
        if batch.shape[1:] != self._shape[1:]:
            self._compile((self._shape[0], *batch.shape[1:]))
        with _out_of_memory_is_the_scans_problem(batch.shape, "cpu"):
            found = self._output(len(batch))
            for start in range(0, len(batch), self._shape[0]):
                self._run(
                    batch[start : start + self._shape[0]], found[start : start + self._shape[0]]
                )
            return found

    @property
    def patch_bytes(self) -> int:
        """Of the tensors alive at the worst moment of one patch's way through the network."""
        return live_bytes(self._model) // self._shape[0]

    def release(self) -> None:
        self._request = self._last = None
        self._compiled.release_memory()

    def _output(self, n: int) -> np.ndarray:
        """An array for the logits of `n` patches: the last one, if nobody holds it any more.

        Of many outputs it is large, and its pages would be asked of the kernel anew for each patch.
        """
        shape = (n, *self._out_shape[1:])
        if (
            self._last is None
            or self._last.shape != shape
            or sys.getrefcount(self._last) > self._alone
        ):
            self._last = np.empty(shape, self._out_type)
            self._alone = sys.getrefcount(self._last)
        return self._last

    def _run(self, patches: np.ndarray, target: np.ndarray) -> None:
        """Logits of at most one batch, written where they belong: OpenVINO reads and writes the arrays themselves."""
        openvino = import_openvino()
        n = len(patches)
        patches = np.ascontiguousarray(patches, np.float32)
        written = target
        if n < self._shape[0]:  # the last patches of a scan do not always fill a batch
            patches = np.concatenate(
                [patches, np.zeros((self._shape[0] - n, *patches.shape[1:]), np.float32)]
            )
            written = np.empty(self._out_shape, self._out_type)
        request = self._request = self._request or self._compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(patches, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(written, shared_memory=True))
        request.infer(share_outputs=True)  # else it hands out a copy too, as large as the output
        if written is not target:
            target[...] = written[:n]

    def _compile(self, shape: tuple[int, ...]) -> None:
        self._model.reshape(list(shape))
        hints = {
            # Else a chip with matrix units for bf16 would compute in bf16 without being asked.
            "INFERENCE_PRECISION_HINT": self._type,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": physical_cores(),
            # Two runs on one machine would else be bound to the same cores; it brings nothing measurable.
            "ENABLE_CPU_PINNING": False,
        }
        self._shape = shape
        self._compiled = core().compile_model(self._model, "CPU", hints)
        output = self._compiled.output(0)
        self._out_shape, self._out_type = tuple(output.shape), output.get_element_type().to_dtype()
        self._request: openvino.InferRequest | None = None
        self._last: np.ndarray | None = None
        self._alone = 0  # references to it when nobody else holds it


class EnsembleBackend:
    """The mean of the logits of several networks, such as those of the folds of one training."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        if not backends:
            raise ValueError("an ensemble needs at least one network")
        self.backends = list(backends)
        self.head: Head | None = None  # each member has its own, so none is taken off

    @property
    def identity(self) -> Mapping[str, str]:
        """As of the members, each different value once."""
        found = {
            name: ",".join(dict.fromkeys(backend.identity[name] for backend in self.backends))
            for name in self.backends[0].identity
        }
        return found | {"networks": str(len(self.backends))}

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
    """The networks of a model as one: a single one is itself."""
    return members[0] if len(members) == 1 else EnsembleBackend(members)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """Which backend runs where and how: nothing left to decide."""

    backend: str
    device: torch.device
    precision: str


def choose_backend(
    backend: str = "auto", device: str = "auto", precision: str = "auto"
) -> BackendChoice:
    """What is there and fits together.

    `auto` takes the GPU where there is one, else OpenVINO where it is installed, else torch (docs/benchmarks.md says why);
    half precision on a GPU and fp32 on a CPU. Never int8, which costs accuracy.

    Raises:
        EnvironmentProblem: something asked for is not on this machine.
        VolsegError: a name is unknown, or the three do not go together.
    """
    for what, value, known in (
        ("backend", backend, BACKENDS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise VolsegError(
                f"{what} {value!r} is unknown",
                fix=f"use {', '.join(known[:-1])} or {known[-1]}",
                code="E_USAGE",
            )
    for_cpus = backend == "openvino" or precision == "int8"
    chosen = choose_device("cpu" if device == "auto" and for_cpus else device)
    if chosen.type == "cuda":
        if for_cpus:
            asked = "backend openvino" if backend == "openvino" else "precision int8"
            raise VolsegError(
                f"{asked} runs on a CPU, not on {device}", fix="use --device cpu", code="E_USAGE"
            )
        return BackendChoice(
            backend="torch", device=chosen, precision="fp16" if precision == "auto" else precision
        )
    precision = "fp32" if precision == "auto" else precision
    if backend == "auto":
        backend = "openvino" if openvino_is_installed() or precision != "fp32" else "torch"
    if backend == "torch" and precision != "fp32":
        raise VolsegError(
            f"precision {precision} on a CPU needs the backend openvino, and torch was asked for",
            fix="use --backend openvino or --precision fp32",
            code="E_USAGE",
        )
    if backend == "openvino":
        import_openvino()
    if precision == "fp16":
        half_type()
    return BackendChoice(backend=backend, device=chosen, precision=precision)


def load_backend(
    bundle: ModelBundle, choice: BackendChoice, *, folder: Path | None = None
) -> Backend:
    """Make the bundle's segmentation network ready to run.

    Args:
        folder: the bundle's own. OpenVINO's files in it are used where they were made from this bundle, else ignored.

    Raises:
        VolsegError: int8 was asked for and the folder has no quantised network, or OpenVINO cannot take the network.
    """
    shape = usual_batch_shape(bundle)
    members: list[Backend] = []
    # The heads of an ensemble cannot be put off: each has its own features. With two classes there is nothing to gain.
    may_cut = len(bundle.members) == 1 and bundle.recipe.data.n_outputs > 2
    for name in bundle.members:
        if choice.backend == "torch":
            network = bundle.member(name).eval()
            head = take_head(network, partial(_example_patch, network, shape)) if may_cut else None
            alone = (
                len(bundle.members) == 1
            )  # the recordings of several would hold their memory all at a time
            members.append(
                TorchBackend(
                    network, choice.device, precision=choice.precision, head=head, may_record=alone
                )
            )
            continue
        stored = "int8" if choice.precision == "int8" else "fp32"
        stem = f"{name}.{stored}"
        model, facts = (None, {}) if folder is None else read_exported(folder, stem, bundle.sha256)
        if model is None and stored == "int8":
            raise VolsegError(
                f"{folder or 'the model'}: has no int8 network that was made from its weights",
                fix="run `volseg quantise MODEL DATASET` first, or use --precision fp32",
                code="E_PRECISION",
            )
        identity = {"network_sha256": facts["files"][f"{stem}.bin"]} if stored == "int8" else None
        if model is None:
            model = convert(bundle.member(name), shape)
        head = cut_head(model) if may_cut else None
        members.append(
            OpenVINOBackend(model, shape, precision=choice.precision, identity=identity, head=head)
        )
        if folder is not None:  # compiled, a network has its weights in an order of its own
            give_back_mapped(folder / EXPORTED / f"{stem}.bin")
    return mean_of(members)


def convert(network: nn.Module, batch_shape: Sequence[int]) -> openvino.Model:
    """A torch module → an OpenVINO model in fp32 of free shape, checked against the module.

    Args:
        batch_shape: (N, channels, R, A, S) of the batches that it will be given.

    Raises:
        VolsegError: OpenVINO cannot take the network, or computes something else.
    """
    openvino = import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    network = network.cpu().eval()
    example, expected = _example(network, batch_shape)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer warns of its own future and of checks of shapes, which hold for every shape that we give.
            warnings.simplefilter("ignore")
            frontend = FrontEndManager().load_by_framework("pytorch")
            unchecked = {"check_trace": False}  # what comes out is compared below
            traced = TorchScriptPythonDecoder(
                network, example_input=example, shared_memory=False, trace_kwargs=unchecked
            )
            model = frontend.convert(frontend.load(traced))
        split_joined_convolutions(model)
        found = OpenVINOBackend(model, example.shape).logits(example.numpy())
        model.reshape(openvino.PartialShape([-1, batch_shape[1], *[-1] * (len(batch_shape) - 2)]))
    except RuntimeError as error:
        raise VolsegError(
            f"OpenVINO cannot take this network ({str(error).strip().splitlines()[-1]})",
            fix="use --backend torch",
            code="E_BACKEND",
        ) from error
    off = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not off <= TRACE_TOLERANCE:
        raise VolsegError(
            f"OpenVINO's logits of this network are off by {off:.2g} of the largest",
            fix="use --backend torch",
            code="E_BACKEND",
        )
    return model


def _example(network: nn.Module, batch_shape: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
    """A batch of one small patch that the network can take, and its logits; a whole patch where it must be."""
    patch = tuple(batch_shape[2:])
    for voxels in (*EXAMPLE_VOXELS, max(patch)):
        shape = (1, batch_shape[1], *(min(voxels, n) for n in patch))
        example = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
        try:
            with torch.inference_mode():
                return example, network(example).numpy()
        except (
            RuntimeError,
            ValueError,
        ):  # too small or not divisible: its deepest level would be without voxels
            if shape[2:] == patch:
                raise
    raise AssertionError("the last example is a whole patch")


def _example_patch(network: nn.Module, batch_shape: Sequence[int]) -> torch.Tensor:
    return _example(network, batch_shape)[0]


def export_bundle(
    bundle: ModelBundle, folder: Path, *, before: Callable[[str], bool] = lambda name: True
) -> None:
    """Put OpenVINO's files of the 3D networks into the bundle's folder, so that inference need not convert them.

    `before` is called with the name of each network; where it says no, this and all others are left to inference.
    Does nothing where OpenVINO is not installed or cannot take the network: inference finds out and says so.
    """
    if not openvino_is_installed():
        return
    with suppress(VolsegError):
        for name in bundle.members:
            if not before(name):
                return
            model = convert(bundle.member(name), usual_batch_shape(bundle))
            write_exported(model, folder, f"{name}.fp32", {"model_sha256": bundle.sha256})
    if bundle.coarse is not None:
        export_bundle(bundle.coarse, folder, before=before)


def usual_batch_shape(bundle: ModelBundle) -> tuple[int, ...]:
    """(N, channels, R, A, S) of the batches of patches that inference gives to the segmentation network."""
    recipe = bundle.recipe
    return (recipe.infer.batch_size, len(recipe.data.channels), *bundle.plan.patch_shape)


def write_exported(
    model: openvino.Model, folder: Path, stem: str, facts: Mapping[str, Any]
) -> None:
    """Write `openvino/<stem>.xml`, `.bin` and, last, `.json` with their hashes and the facts (JSON).

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    openvino = import_openvino()
    target = folder / EXPORTED
    make_folder(target)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target) as temporary:
            made = [Path(temporary) / f"{stem}.{suffix}" for suffix in ("xml", "bin")]
            # Not halved on the disk either: the weights are those that were trained.
            openvino.save_model(model, made[0], compress_to_fp16=False)
            hashes = {path.name: sha256_of(path) for path in made}
            for path in made:
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
    """What `write_exported` wrote, or (None, {}) where it is not there, damaged or of another model."""
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
    """The package openvino.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    if (loaded := sys.modules.get("openvino")) is not None:
        return loaded
    try:
        with without_reports():
            import openvino
    except ImportError as error:
        raise EnvironmentProblem(
            f"openvino {f'cannot be imported ({error})' if openvino_is_installed() else 'is not installed'}",
            fix="pip install 'volseg[cpu]'",
            code="E_BACKEND",
        ) from error
    return openvino


@contextmanager
def without_reports() -> Iterator[None]:
    """Hide `openvino_telemetry` while openvino or nncf is imported.

    With it, the mere import tells its makers over the internet who runs what; without it, as both foresee, it does not.
    """
    name = "openvino_telemetry"
    hidden = {
        key: module for key, module in list(sys.modules.items()) if key.partition(".")[0] == name
    }
    for key in hidden:
        del sys.modules[key]
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(hidden)


@cache
def core() -> openvino.Core:
    """OpenVINO's entrance, one for the process.

    Its CPU plugin gives the process a stack for signal handlers when it is loaded, and of several that overlap the last one to go gives back that of another
    which is no more (2026.4): Ctrl-C then ends in a segmentation fault.
    """
    return import_openvino().Core()


def find_half_type() -> str | None:
    """OpenVINO's name of the half precision in which this CPU computes: bf16 or f16; None where it has none."""
    known = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"BF16": "bf16", "FP16": "f16"}  # bf16 first: more chips have matrix units for it
    return next((name for capability, name in names.items() if capability in known), None)


def half_type() -> str:
    """As `find_half_type`.

    Raises:
        EnvironmentProblem: it has none, so that half precision would only be slower and less exact.
    """
    name = find_half_type()
    if name is None:
        raise EnvironmentProblem(
            f"precision fp16 was asked for, but OpenVINO finds no half precision on {core().get_property('CPU', 'FULL_DEVICE_NAME')}",
            fix="use --precision fp32",
            code="E_PRECISION",
        )
    return name


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device that is there.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not available.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise VolsegError(
            f"device {name!r} is unknown", fix="use auto, cpu or cuda", code="E_USAGE"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "device cuda was asked for, but torch finds no CUDA device",
            fix="install a driver and a CUDA build of torch, or use --device cpu",
            code="E_DEVICE",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _memory_format(images: torch.Tensor) -> torch.memory_format:
    """Channels last: the layout of a GPU's tensor cores."""
    return torch.channels_last_3d if images.ndim == 5 else torch.channels_last


def _channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=_memory_format(parameter))


@contextmanager
def _out_of_memory_is_the_scans_problem(shape: tuple[int, ...], device: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ScanError(
            f"a batch of patches of shape {shape} does not fit into the memory of {device}",
            fix="close other programs, or use --device cpu"
            if "cuda" in device
            else "close other programs",
            code="E_OOM",
        ) from error
