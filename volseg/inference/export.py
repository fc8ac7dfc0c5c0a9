"""Export of networks to OpenVINO: converted from torch, written to and read from model folders."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from volseg.bundle import EXPORTED, ModelBundle
from volseg.errors import EnvironmentProblem, VolsegError
from volseg.inference.openvino_backend import (
    OpenVINOBackend,
    core,
    find_half_type,
    import_openvino,
    openvino_is_installed,
    send_signal_again,
)
from volseg.inference.openvino_graph import split_joined_convolutions
from volseg.inputs import read_json
from volseg.io.files import environment_problem, make_folder, sha256_of, write_json_atomic

if TYPE_CHECKING:
    import openvino

EXAMPLE_VOXELS = (32, 64)  # sizes of the example to trace, tried in turn: faster than a patch
# relative to the largest logit; a converted network that differs more from torch is refused
TRACE_TOLERANCE = 1e-3


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
        for name in bundle.segmentation_names:
            if not before(name):
                return
            model = convert(bundle.segmentation_network(name), batch_shape_of(bundle))
            write_exported(model, folder, f"{name}.fp32", {"model_sha256": bundle.sha256})
    if bundle.coarse_bundle is not None:
        export_bundle(bundle.coarse_bundle, folder, before=before)


def half_precision_hint(folder: Path) -> str:
    """Return how to run the exported model of a folder faster on this CPU; empty if it cannot."""
    if not (folder / EXPORTED).is_dir() or find_half_type() is None:
        return ""
    return "on this CPU, `volseg infer --precision fp16` takes about half the time with this model"


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


def convert(
    network: nn.Module, batch_shape: Sequence[int], example: torch.Tensor | None = None
) -> openvino.Model:
    """Convert a torch module to an OpenVINO model in fp32 with a free shape, and compare the two.

    Args:
        batch_shape: (N, channels, R, A, S) of its batches, or (N, channels, H, W).
        example: batch to trace and compare; None takes a random patch, as small as the network
            accepts, so all that the network derives from the size must be traced as an operation.

    Raises:
        VolsegError: OpenVINO does not support the network, or its output differs.
    """
    openvino = import_openvino()
    network = network.cpu().eval()
    if example is None:
        example, expected = _example(network, batch_shape)
    else:
        expected = _run(network, example)
    try:
        model = _traced(network, example)
        split_joined_convolutions(model)
        output = OpenVINOBackend(model, example.shape).logits(example.numpy())
        model.reshape(openvino.PartialShape([-1, batch_shape[1], *[-1] * (len(batch_shape) - 2)]))
    except (RuntimeError, *_failures()) as error:
        send_signal_again(error)
        raise VolsegError(
            f"OpenVINO cannot convert this network ({str(error).strip().splitlines()[-1]})",
            fix="use --backend torch",
            code="E_BACKEND",
        ) from error
    off = float(np.abs(output - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not off <= TRACE_TOLERANCE:
        raise VolsegError(
            f"OpenVINO's output of this network is off by {off:.2g} relative to the largest "
            f"(limit {TRACE_TOLERANCE:g})",
            fix="use --backend torch",
            code="E_BACKEND",
        )
    return model


def _traced(network: nn.Module, example: torch.Tensor) -> openvino.Model:
    """Trace a network with a batch; the caller compares the output."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of its deprecation and of shape checks that hold for all our shapes.
        warnings.simplefilter("ignore")
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(
            network,
            example_input=example,
            shared_memory=False,
            trace_kwargs={"check_trace": False},
        )
        return frontend.convert(frontend.load(decoder))


def _failures() -> list[type[Exception]]:
    """Return what OpenVINO raises for an operation that it cannot convert."""
    from openvino import frontend

    return [frontend.GeneralFailure, frontend.OpConversionFailure, frontend.NotImplementedFailure]


def batch_shape_of(bundle: ModelBundle) -> tuple[int, ...]:
    """Return (N, channels, R, A, S) of the batches that inference feeds the network."""
    recipe = bundle.recipe
    return (recipe.infer.batch_size, len(recipe.data.channels), *recipe.patch_shape)


def example_patch(network: nn.Module, batch_shape: Sequence[int]) -> torch.Tensor:
    return _example(network, batch_shape)[0]


def _example(network: nn.Module, batch_shape: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Return a batch of one patch, as small as the network accepts, and its logits."""
    patch = tuple(batch_shape[2:])
    for voxels in (*EXAMPLE_VOXELS, max(patch)):
        shape = (1, batch_shape[1], *(min(voxels, n) for n in patch))
        example = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
        try:
            return example, _run(network, example)
        # too small or not divisible: the deepest level would have no voxels
        except (RuntimeError, ValueError):
            if shape[2:] == patch:
                raise
    raise AssertionError("the last example is a whole patch")


def _run(network: nn.Module, batch: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return network(batch).numpy()
