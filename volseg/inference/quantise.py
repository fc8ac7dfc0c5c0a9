"""Post-training quantisation of a network to int8, calibrated on patches of training cases."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from volseg.errors import EnvironmentProblem
from volseg.inference.backend import Backend, mean_of
from volseg.inference.export import batch_shape_of, convert
from volseg.inference.openvino_backend import OpenVINOBackend, import_openvino, without_telemetry

if TYPE_CHECKING:
    import openvino

    from volseg.bundle import ModelBundle


def quantise_network(model: openvino.Model, patches: Sequence[np.ndarray]) -> openvino.Model:
    """Quantise the convolutions to int8; normalisation and all else stay in fp32.

    Args:
        model: from `convert`; only its shape is changed, to that of the patches.
        patches: (1, channels, R, A, S) float32, all of one shape, prepared as for training.

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

    def converted(precision: str) -> Backend:
        names = bundle.segmentation_names
        models = (convert(bundle.segmentation_network(name), shape) for name in names)
        return mean_of([OpenVINOBackend(model, shape, precision=precision) for model in models])

    int8 = mean_of([OpenVINOBackend(network, shape, precision="int8") for network in quantised])
    backends = {"fp32": converted("fp32"), "int8": int8}
    with suppress(EnvironmentProblem):
        half = converted("fp16")
        backends[half.identity["precision"]] = half
    return backends


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
