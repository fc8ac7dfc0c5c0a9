import numpy as np
import pytest
import torch

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.infer.backends import TorchBackend, choose_device
from volseg.models import build_network


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(
            "unet3d", in_channels=1, out_channels=3, features=(4, 8, 8), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2))
        )


def test_logits_are_float32_and_do_not_depend_on_the_batch():
    backend = TorchBackend(network(), torch.device("cpu"))
    batch = np.random.default_rng(0).normal(size=(3, 1, 16, 16, 16)).astype(np.float32)
    logits = backend.logits(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[1:2], backend.logits(batch[1:2]), atol=1e-4)


def test_an_unknown_device_is_a_wrong_request_and_a_missing_one_the_environments():
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
    batch = np.random.default_rng(0).normal(size=(2, 1, 32, 32, 32)).astype(np.float32)
    cpu, gpu = (TorchBackend(network(), torch.device(name)).logits(batch) for name in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, atol=0.05)
