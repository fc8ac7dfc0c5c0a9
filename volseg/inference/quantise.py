"""Post-training quantisation of a network to int8, calibrated on patches of training cases."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from volseg.errors import EnvironmentProblem
from volseg.inference.backend import Backend, mean_of
from volseg.inference.export import batch_shape_of, convert
from volseg.inference.openvino_backend import OpenVINOBackend, import_openvino, without_telemetry

if TYPE_CHECKING:
    import openvino

    from volseg.bundle import ModelBundle

TIMED_RUNS = 10


class Identified(Protocol):
    """What runs networks, and says with which backend and precision."""

    @property
    def identity(self) -> Mapping[str, str]: ...


T = TypeVar("T", bound=Identified)


def quantise_network(model: openvino.Model, patches: Sequence[np.ndarray]) -> openvino.Model:
    """Quantise the convolutions to int8; normalisation and all else stay in fp32.

    Args:
        model: from `convert`; only its shape is changed, to that of the patches.
        patches: (1, channels, R, A, S) or (1, channels, H, W) float32, all of one shape, prepared
            as for training.

    Raises:
        EnvironmentProblem: nncf is not installed.
    """
    import_openvino()  # before nncf, which would import it too
    nncf = import_nncf()
    model.reshape(list(patches[0].shape))
    with _quiet():
        # Asymmetric activations: after a leaky ReLU nearly all of the range is on one side of 0.
        mixed, dataset = nncf.QuantizationPreset.MIXED, nncf.Dataset(list(patches))
        return nncf.quantize(model, dataset, preset=mixed, subset_size=len(patches))


def backends_by_precision(
    bundle: ModelBundle, quantised: Sequence[openvino.Model]
) -> dict[str, Backend]:
    """Return the bundle's backend in fp32, int8 and, if the CPU supports it, half precision."""
    shape = batch_shape_of(bundle)

    def member(precision: str) -> Backend:
        names = bundle.segmentation_names
        converted = (convert(bundle.segmentation_network(name), shape) for name in names)
        models = quantised if precision == "int8" else converted
        return mean_of([OpenVINOBackend(model, shape, precision=precision) for model in models])

    return by_precision(member)


def by_precision(make: Callable[[str], T]) -> dict[str, T]:
    """Return what `make` gives for fp32, int8 and, if the CPU supports it, half precision."""
    made = {"fp32": make("fp32"), "int8": make("int8")}
    with suppress(EnvironmentProblem):
        half = make("fp16")
        made[half.identity["precision"]] = half
    return made


def median_seconds(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each function over alternating runs."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED_RUNS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that make an int8 network."""
    return {name: metadata.version(name) for name in ("openvino", "nncf")}


def import_nncf() -> ModuleType:
    """Return the package nncf.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        with without_telemetry(), _quiet():
            import nncf
    except ImportError as error:
        raise EnvironmentProblem(
            "nncf is not installed", fix="pip install 'volseg[cpu]'", code="E_BACKEND"
        ) from error
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress nncf's progress bars and warnings, on which a user of volseg could not act."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
