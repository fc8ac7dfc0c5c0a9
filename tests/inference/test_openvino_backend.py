import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from small_networks import SHAPE, batch, needs_openvino, network, on_openvino, on_torch

from volseg.errors import EnvironmentProblem
from volseg.inference.choose import choose_backend
from volseg.inference.export import convert
from volseg.inference.openvino_backend import OpenVINOBackend, import_openvino


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"residual": True},
        {
            "features": (4, 6, 8, 8),
            "strides": ((1, 1, 1), (1, 2, 1), (2, 2, 2), (2, 2, 2)),
            "kernels": ((3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        },
    ],
)
@needs_openvino
def test_openvino_gives_the_logits_of_torch(settings):
    unet, images = network(**settings), batch()
    expected = on_torch(unet, images)
    backend = on_openvino(unet)
    np.testing.assert_allclose(backend.logits(images), expected, atol=1e-3)
    assert backend.identity == {"backend": "openvino", "precision": "fp32"}


@needs_openvino
def test_batches_of_any_size_and_patches_of_another_shape_run_too():
    unet = network()
    backend = OpenVINOBackend(convert(unet, SHAPE), (2, *SHAPE[1:]))
    for images in (batch(1), batch(2), batch(5), batch(1, (1, 1, 24, 16, 20)), batch(3)):
        np.testing.assert_allclose(backend.logits(images), on_torch(unet, images), atol=1e-3)


@needs_openvino
def test_a_batch_that_is_not_contiguous_gives_the_same_logits():
    unet = network()
    images = np.flip(batch(), axis=3)
    expected = on_torch(unet, images.copy())
    np.testing.assert_allclose(on_openvino(unet).logits(images), expected, atol=1e-3)


@needs_openvino
def test_the_caller_owns_its_logits_and_release_does_not_change_them():
    backend = on_openvino(network())
    first = backend.logits(batch(1))
    kept = first.copy()
    backend.release()
    second = backend.logits(batch(1, seed=1))
    assert not np.array_equal(second, kept)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(backend.logits(batch(1)), kept)


@needs_openvino
def test_the_memory_of_logits_is_reused_only_when_no_caller_holds_them():
    backend = on_openvino(network())
    address = backend.logits(batch(1)).ctypes.data
    part = torch.from_numpy(backend.logits(batch(1)))[0, :, 2:]
    assert part.data_ptr() - address == part.storage_offset() * 4  # the same memory again
    kept = part.clone()
    other = backend.logits(batch(1, seed=1))
    assert other.ctypes.data != address
    assert torch.equal(part, kept)


@needs_openvino
def test_openvino_does_not_copy_the_logits():
    backend, images = on_openvino(network()), batch(1)
    size = backend.logits(images).nbytes
    tracemalloc.start()
    backend.logits(images)  # into the memory of the previous logits, which are no longer held
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2


@pytest.mark.slow
@needs_openvino
def test_a_large_patch_of_constant_air_does_not_blur_the_statistics_of_normalisation():
    unet = network()
    images = np.full((1, 1, 128, 128, 128), -0.7, np.float32)
    noise = np.random.default_rng(0).normal(size=(30, 30, 30)).astype(np.float32)
    images[:, :, 50:80, 50:80, 50:80] += noise
    expected = on_torch(unet, images)
    error = np.abs(on_openvino(unet, images.shape).logits(images) - expected).max()
    assert error < 2e-5 * np.abs(expected).max()


@needs_openvino
def test_fp32_is_fp32_and_half_precision_is_refused_where_the_chip_has_none(monkeypatch):
    openvino = import_openvino()
    unet, images = network(), batch()
    expected = on_torch(unet, images)
    exact = on_openvino(unet)
    assert exact._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    if {"BF16", "FP16"} & set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
        half = on_openvino(unet, precision="fp16")
        error = np.abs(half.logits(images) - expected).max() / np.abs(expected).max()
        assert 1e-5 < error < 0.05
        assert half.identity["precision"] in ("bf16", "fp16")
    monkeypatch.setattr(
        openvino.Core,
        "get_property",
        lambda self, device, name: ["FP32"] if "CAPABILITIES" in name else "Old CPU",
    )
    with pytest.raises(EnvironmentProblem, match="no half precision on Old CPU"):
        choose_backend("openvino", "cpu", "fp16")


@pytest.mark.slow
@needs_openvino
def test_openvino_telemetry_is_not_imported():
    code = """
import sys
from volseg.inference.openvino_backend import import_openvino
from volseg.inference.quantise import import_nncf
import_openvino()
import_nncf()
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


COMPILED_TWICE = """
import gc, signal
import numpy as np
from volseg.inference.export import convert
from volseg.inference.openvino_backend import OpenVINOBackend
from volseg.networks import build_network

strides = ((1,) * 3, (2,) * 3, (2,) * 3)
options = {"in_channels": 1, "out_channels": 2, "features": (2, 4, 4), "strides": strides}
network = build_network("unet3d", **options)
first = OpenVINOBackend(convert(network.eval(), (1, 1, 8, 8, 8)), (1, 1, 8, 8, 8))
second = OpenVINOBackend(convert(network.eval(), (1, 1, 8, 8, 8)), (1, 1, 8, 8, 8))
del first
gc.collect()
del second
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
@needs_openvino
def test_ctrl_c_still_interrupts_after_networks_were_compiled_and_dropped():
    done = subprocess.run([sys.executable, "-c", COMPILED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
