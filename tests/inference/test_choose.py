import sys

import pytest
import torch
from small_networks import needs_openvino

from volseg.bundle import load_bundle
from volseg.errors import EnvironmentProblem, VolsegError
from volseg.inference.choose import choose_backend, choose_device, load_backend


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
        (("torch", "cpu", "fp16"), "needs the backend openvino"),
        (("torch", "cpu", "int8"), "needs the backend openvino"),
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


def test_a_missing_device_is_refused():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(EnvironmentProblem):
            choose_device("cuda")


@pytest.mark.gpu
def test_auto_takes_the_gpu_and_openvino_is_refused_there():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    assert choose_backend().device.type == "cuda"
    with pytest.raises(VolsegError, match="use --device cpu"):
        choose_backend("openvino", "cuda")
    assert choose_backend("openvino", "auto").device.type == "cpu"
