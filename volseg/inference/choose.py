"""Choice of backend, device and precision, and the bundle's network on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from volseg.bundle import EXPORTED, ModelBundle, shipped_bundle
from volseg.errors import EnvironmentProblem, VolsegError
from volseg.execution.cpu import drop_mapped_pages
from volseg.inference.backend import Backend, mean_of
from volseg.inference.export import batch_shape_of, convert, example_patch, read_exported
from volseg.inference.head import Head, cut_openvino_head, cut_torch_head
from volseg.inference.openvino_backend import (
    OpenVINOBackend,
    half_type,
    import_openvino,
    openvino_is_installed,
)
from volseg.inference.torch_backend import TorchBackend

if TYPE_CHECKING:
    import openvino


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
        VolsegError: the three cannot be combined.
    """
    for_cpus = backend == "openvino" or precision == "int8"
    place = choose_device("cpu" if device == "auto" and for_cpus else device)
    if place.type == "cpu":
        return _choose_on_cpu(backend, precision, place)
    if for_cpus:
        option = "backend openvino" if backend == "openvino" else "precision int8"
        raise VolsegError(
            f"{option} runs on a CPU, not on {device}", fix="use --device cpu", code="E_USAGE"
        )
    precision = "fp16" if precision == "auto" else precision
    return BackendChoice(backend="torch", device=place, precision=precision)


def _choose_on_cpu(backend: str, precision: str, cpu: torch.device) -> BackendChoice:
    precision = "fp32" if precision == "auto" else precision
    if backend == "auto":
        backend = "openvino" if openvino_is_installed() or precision != "fp32" else "torch"
    if backend == "openvino":
        import_openvino()
    elif precision != "fp32":
        raise VolsegError(
            f"precision {precision} on a CPU needs the backend openvino, got torch",
            fix="use --backend openvino or --precision fp32",
            code="E_USAGE",
        )
    if precision == "fp16":
        half_type()
    return BackendChoice(backend=backend, device=cpu, precision=precision)


def choose_device(name: str) -> torch.device:
    """Return the torch device for `auto`, `cpu` or `cuda`.

    Raises:
        EnvironmentProblem: CUDA was requested and is not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "device cuda was requested, but torch finds no CUDA device",
            fix="install a driver and a CUDA build of torch, or use --device cpu",
            code="E_DEVICE",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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
    names = bundle.segmentation_names
    if choice.backend == "torch":
        return mean_of([_torch_member(bundle, name, choice) for name in names])
    return mean_of([_openvino_member(bundle, name, choice, folder) for name in names])


def _torch_member(bundle: ModelBundle, name: str, choice: BackendChoice) -> TorchBackend:
    network, head = bundle.segmentation_network(name).eval(), None
    if _may_defer_head(bundle):
        head = cut_torch_head(network, partial(example_patch, network, batch_shape_of(bundle)))
    # CUDA graphs of several members would hold their memory at the same time
    return TorchBackend(
        network,
        choice.device,
        precision=choice.precision,
        head=head,
        may_record=len(bundle.segmentation_names) == 1,
    )


def _openvino_member(
    bundle: ModelBundle, name: str, choice: BackendChoice, folder: Path | None
) -> OpenVINOBackend:
    shape = batch_shape_of(bundle)
    source = NetworkSource(
        folder=folder,
        name=name,
        model_sha256=bundle.sha256,
        convert=lambda: convert(bundle.segmentation_network(name), shape),
        cut_head=cut_openvino_head if _may_defer_head(bundle) else None,
    )
    return source.backend(shape, choice.precision)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkSource:
    """Where a network of a model comes from when it runs with OpenVINO.

    Args:
        folder: of the model; its OpenVINO files are used if they were made from this model.
        name: of the network. model_sha256: hash of the model.
        convert: converts the trained network; called where there is no file.
        cut_head: cuts off the head to defer; None to keep it.
    """

    folder: Path | None
    name: str
    model_sha256: str
    convert: Callable[[], openvino.Model]
    cut_head: Callable[[openvino.Model], Head | None] | None = None

    def backend(self, batch_shape: Sequence[int], precision: str) -> OpenVINOBackend:
        """Return the network, compiled for a shape of batch.

        Raises:
            VolsegError: the folder has no quantised network for int8, or OpenVINO does not support
                the network.
        """
        is_int8, folder = precision == "int8", self.folder
        stem = f"{self.name}.{'int8' if is_int8 else 'fp32'}"
        model, facts = None, {}
        if folder is not None:
            model, facts = read_exported(folder, stem, self.model_sha256)
        if model is None and is_int8:
            raise VolsegError(
                f"{folder or 'the model'}: has no int8 network made from its weights",
                fix=_how_to_quantise(folder),
                code="E_PRECISION",
            )
        model = self.convert() if model is None else model
        backend = OpenVINOBackend(
            model,
            batch_shape,
            precision=precision,
            identity={"network_sha256": facts["files"][f"{stem}.bin"]} if is_int8 else None,
            head=None if self.cut_head is None else self.cut_head(model),
        )
        if folder is not None:  # the compiled network has its own copy of the weights
            drop_mapped_pages(folder / EXPORTED / f"{stem}.bin")
        return backend


def _how_to_quantise(folder: Path | None) -> str:
    if folder == shipped_bundle():
        return (
            "use --precision fp32, as quantising needs the training dataset, which does not come "
            "with this model; for a model of your own, run `volseg quantise MODEL DATASET`"
        )
    return "run `volseg quantise MODEL DATASET` first, or use --precision fp32"


def _may_defer_head(bundle: ModelBundle) -> bool:
    """Check whether the head may be deferred: each member of an ensemble has its own features.

    Two classes gain nothing.
    """
    return len(bundle.segmentation_names) == 1 and bundle.recipe.data.n_outputs > 2
