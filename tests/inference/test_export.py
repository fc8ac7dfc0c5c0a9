import json
import signal
import sys

import numpy as np
import pytest
import torch
from small_networks import SHAPE, batch, needs_openvino, network, on_openvino, on_torch

from volseg.bundle import load_bundle
from volseg.errors import VolsegError
from volseg.inference import choose, openvino_backend
from volseg.inference.choose import choose_backend, load_backend
from volseg.inference.export import convert, read_exported, write_exported
from volseg.inference.openvino_backend import OpenVINOBackend, import_openvino


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
    monkeypatch.setattr(choose, "convert", None)  # must not be needed
    exported = load_backend(bundle, choice, folder=model)
    np.testing.assert_allclose(exported.logits(images), expected, atol=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        "segmentation.fp32.bin",
        pytest.param("segmentation.fp32.xml", marks=pytest.mark.slow),
        pytest.param("segmentation.fp32.json", marks=pytest.mark.slow),
    ],
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
@pytest.mark.parametrize("name", ["KeyboardInterrupt", "_TerminatedError"])
def test_a_signal_during_the_conversion_is_not_taken_for_an_unfit_network(name):
    """The tracer turns exceptions of its callbacks into RuntimeErrors that name them."""

    class Stopped(Exception):
        pass

    class Interrupted(torch.nn.Module):
        def forward(self, images):
            if torch.jit.is_tracing():
                raise RuntimeError(f"{name}: \n\nAt:\n  <frozen runpy>(198): _run_module")
            return images

    def stop(number, frame):
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises((KeyboardInterrupt, Stopped)):
            convert(Interrupted(), SHAPE, torch.zeros(SHAPE))
    finally:
        signal.signal(signal.SIGTERM, before)


@needs_openvino
def test_a_signal_during_the_import_is_not_taken_for_a_broken_installation(monkeypatch):
    def interrupted(*arguments):
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(openvino_backend, "without_telemetry", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_openvino()


@needs_openvino
def test_an_operation_without_a_counterpart_is_an_unfit_network():
    class Bessel(torch.nn.Module):
        def forward(self, images):
            return torch.special.bessel_j1(images)

    with pytest.raises(VolsegError, match="OpenVINO cannot convert this network") as error:
        convert(Bessel(), SHAPE, torch.zeros(SHAPE))
    assert error.value.code == "E_BACKEND" and "\n" not in error.value.problem
