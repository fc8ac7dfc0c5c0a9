import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from volseg.bundle import load_bundle
from volseg.errors import EnvironmentProblem, ScanError, VolsegError
from volseg.inference import backends
from volseg.inference.backends import (
    EnsembleBackend,
    OpenVINOBackend,
    TorchBackend,
    choose_backend,
    choose_device,
    convert,
    import_openvino,
    load_backend,
    openvino_is_installed,
    read_exported,
    write_exported,
)
from volseg.networks import build_network

SHAPE = (1, 1, 16, 24, 16)
needs_openvino = pytest.mark.skipif(not openvino_is_installed(), reason="openvino is not installed")


def network(seed=0, **settings):
    """Make a small U-Net with random weights, also in norms: a scale of 1 would hide a lost one."""
    options = {"features": (4, 8, 8), "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_network("unet3d", in_channels=1, out_channels=3, **options)
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
    return unet.eval()


def batch(n=3, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape[1:])).astype(np.float32)


def on_torch(module, images):
    return TorchBackend(module, torch.device("cpu")).logits(images)


def on_openvino(module, shape=SHAPE, **options):
    return OpenVINOBackend(convert(module, shape), shape, **options)


def test_logits_are_float32_and_do_not_depend_on_the_batch():
    backend = TorchBackend(network(), torch.device("cpu"))
    logits = backend.logits(batch())
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[1:2], backend.logits(batch()[1:2]), atol=1e-4)


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


def test_an_ensemble_is_the_mean_of_its_members():
    members = [TorchBackend(network(seed), torch.device("cpu")) for seed in range(3)]
    images = batch()
    expected = np.mean([member.logits(images) for member in members], axis=0)
    ensemble = EnsembleBackend(members)
    np.testing.assert_allclose(ensemble.logits(images), expected, atol=1e-5)
    assert ensemble.identity == {"backend": "torch", "precision": "fp32", "networks": "3"}
    with pytest.raises(ValueError, match="at least one"):
        EnsembleBackend([])


def test_the_members_of_an_ensemble_are_all_named():
    class Stored:
        def __init__(self, digest):
            self.identity = {"backend": "openvino", "network_sha256": digest}

    identity = EnsembleBackend([Stored("a"), Stored("b")]).identity
    assert identity == {"backend": "openvino", "network_sha256": "a,b", "networks": "2"}


class Greedy(torch.nn.Module):
    def forward(self, images):
        return images.new_empty(2**60)


def test_a_batch_that_does_not_fit_into_memory_fails_the_scan_not_the_run():
    message = r"\(3, 1, 16, 24, 16\) does not fit into the memory of cpu"
    with pytest.raises(ScanError, match=message) as caught:
        on_torch(Greedy(), batch())
    assert caught.value.code == "E_OOM"


@needs_openvino
def test_training_leaves_openvinos_files_and_only_those_of_the_same_model_are_used(
    model, tmp_path, monkeypatch
):
    bundle = load_bundle(model)
    assert read_exported(model, "segmentation.fp32", bundle.sha256)[0] is not None
    assert read_exported(model, "segmentation.fp32", "0" * 64) == (None, {})
    choice = choose_backend("openvino", "cpu", "fp32")
    images = batch(2, (1, 1, 16, 16, 16))
    expected = on_torch(bundle.segmentation_network(), images)
    np.testing.assert_allclose(load_backend(bundle, choice).logits(images), expected, atol=1e-3)
    monkeypatch.setattr(backends, "convert", None)  # must not be needed
    exported = load_backend(bundle, choice, folder=model)
    np.testing.assert_allclose(exported.logits(images), expected, atol=1e-3)


@pytest.mark.parametrize(
    "damage", ["segmentation.fp32.bin", "segmentation.fp32.xml", "segmentation.fp32.json"]
)
@needs_openvino
def test_a_damaged_file_is_never_used(damage, tmp_path):
    write_exported(convert(network(), SHAPE), tmp_path, "segmentation.fp32", {"model_sha256": "a"})
    folder = tmp_path / "openvino"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"segmentation.fp32.{suffix}" for suffix in ("bin", "json", "xml")
    ]
    exported, facts = read_exported(tmp_path, "segmentation.fp32", "a")
    backend, expected = OpenVINOBackend(exported, SHAPE), on_openvino(network())
    np.testing.assert_array_equal(backend.logits(batch()), expected.logits(batch()))
    stored = json.loads((folder / "segmentation.fp32.json").read_text())
    assert sorted(stored["files"]) == sorted(facts["files"])
    content = bytearray((folder / damage).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / damage).write_bytes(content)
    assert read_exported(tmp_path, "segmentation.fp32", "a") == (None, {})
    (folder / damage).unlink()
    assert read_exported(tmp_path, "segmentation.fp32", "a") == (None, {})


@needs_openvino
def test_a_file_in_the_way_of_an_exported_network_is_named(tmp_path):
    (tmp_path / "openvino").write_text("in the way")
    model = convert(network(), SHAPE)
    with pytest.raises(VolsegError, match="openvino: is not a folder"):
        write_exported(model, tmp_path, "segmentation.fp32", {"model_sha256": "a"})


class Wrong(torch.nn.Module):
    """A module that computes other values when it is traced."""

    def forward(self, images):
        return images * (2 if torch.jit.is_tracing() else 1)


@needs_openvino
def test_a_wrongly_converted_network_is_refused():
    with pytest.raises(VolsegError, match="off by"):
        convert(Wrong(), SHAPE)


@needs_openvino
def test_auto_takes_what_is_installed_and_never_int8(monkeypatch):
    choice = choose_backend("auto", "cpu")
    assert (choice.backend, choice.precision) == ("openvino", "fp32")
    monkeypatch.setitem(sys.modules, "openvino", None)
    choice = choose_backend("auto", "cpu")
    assert (choice.backend, choice.precision) == ("torch", "fp32")


def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for arguments in (("openvino", "cpu"), ("auto", "cpu", "int8"), ("auto", "cpu", "fp16")):
        with pytest.raises(EnvironmentProblem, match="openvino is not installed") as caught:
            choose_backend(*arguments)
        assert caught.value.fix == "pip install 'volseg[cpu]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tensorrt", "cpu"), "'tensorrt' is unknown; to fix: use auto, torch or openvino"),
        (("auto", "cpu", "fp8"), "'fp8' is unknown; to fix: use auto, fp32, fp16 or int8"),
        (("torch", "cpu", "fp16"), "needs the backend openvino"),
        (("torch", "cpu", "int8"), "needs the backend openvino"),
        (("openvino", "tpu"), "auto, cpu or cuda"),
    ],
)
def test_options_that_cannot_be_combined_are_refused_in_one_line(arguments, message):
    with pytest.raises(VolsegError) as caught:
        choose_backend(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_openvino
def test_int8_without_a_quantised_network_says_how_to_make_one(model):
    with pytest.raises(VolsegError, match="volseg quantise MODEL DATASET"):
        load_backend(load_bundle(model), choose_backend("auto", "cpu", "int8"), folder=model)


@needs_openvino
def test_openvino_telemetry_is_not_imported():
    code = """
import sys
from volseg.inference.backends import import_openvino
from volseg.inference.quantise import import_nncf
import_openvino()
import_nncf()
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_device_and_a_missing_one_are_refused():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(VolsegError, match="auto, cpu or cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(EnvironmentProblem):
            choose_device("cuda")


@pytest.mark.gpu
def test_the_gpu_gives_the_logits_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    images = batch(2, (1, 1, 32, 32, 32))
    expected = on_torch(network(), images)
    half = TorchBackend(network(), torch.device("cuda"))
    assert half.identity["precision"] == "fp16"
    first = half.logits(images)
    kept = first.copy()
    np.testing.assert_allclose(first, expected, atol=0.05)
    half.release()
    half.logits(images[::-1].copy())
    np.testing.assert_array_equal(first, kept)
    exact = TorchBackend(network(), torch.device("cuda"), precision="fp32")
    np.testing.assert_allclose(exact.logits(images), expected, atol=1e-3)


@pytest.mark.gpu
def test_auto_takes_the_gpu_and_openvino_is_refused_there():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    assert choose_backend().device.type == "cuda"
    with pytest.raises(VolsegError, match="use --device cpu"):
        choose_backend("openvino", "cuda")
    assert choose_backend("openvino", "auto").device.type == "cpu"


COMPILED_TWICE = """
import gc, signal
import numpy as np
from volseg.inference.backends import OpenVINOBackend, convert
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


@needs_openvino
def test_ctrl_c_still_interrupts_after_networks_were_compiled_and_dropped():
    done = subprocess.run([sys.executable, "-c", COMPILED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
