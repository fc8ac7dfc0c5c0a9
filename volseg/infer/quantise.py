"""A network in fp32 → the same in int8, by looking at what flows through it on patches of training cases."""

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
from volseg.infer.backends import (
    Backend,
    OpenVINOBackend,
    convert,
    import_openvino,
    mean_of,
    usual_batch_shape,
    without_reports,
)

if TYPE_CHECKING:
    import openvino

    from volseg.bundle import ModelBundle


def quantise(model: openvino.Model, patches: Sequence[np.ndarray]) -> openvino.Model:
    """Post-training quantisation of the convolutions; normalisation and the rest stay in fp32.

    Args:
        model: as `convert` gives it; left as it is but for its shape, which becomes that of the patches.
        patches: (1, channels, R, A, S) float32 each, all of one shape, prepared like those of training.

    Raises:
        EnvironmentProblem: nncf is not installed.
    """
    import_openvino()  # before nncf, which would import it too
    nncf = import_nncf()
    model.reshape(list(patches[0].shape))
    with _quiet():
        # Asymmetric activations: after a leaky ReLU nearly all of the range is on one side of 0.
        return nncf.quantize(
            model,
            nncf.Dataset(list(patches)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(patches),
        )


def in_each_precision(
    bundle: ModelBundle, quantised: Sequence[openvino.Model]
) -> dict[str, Backend]:
    """Precision → what runs the bundle's network or ensemble in it: fp32, int8, and half precision where the chip has it."""
    shape = usual_batch_shape(bundle)

    def exact(precision: str) -> Backend:
        return mean_of(
            [
                OpenVINOBackend(convert(bundle.member(name), shape), shape, precision=precision)
                for name in bundle.members
            ]
        )

    int8 = mean_of([OpenVINOBackend(network, shape, precision="int8") for network in quantised])
    found = {"fp32": exact("fp32"), "int8": int8}
    with suppress(EnvironmentProblem):
        half = exact("fp16")
        found[half.identity["precision"]] = half
    return found


def import_nncf() -> ModuleType:
    """The package nncf.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        with without_reports(), _quiet():
            import nncf
    except ImportError as error:
        raise EnvironmentProblem(
            "nncf is not installed", fix="pip install 'volseg[cpu]'", code="E_BACKEND"
        ) from error
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """Without nncf's progress bars and warnings, which say nothing that a user of volseg could act on."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
