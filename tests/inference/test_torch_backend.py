import numpy as np
import pytest
import torch
from small_networks import batch, network, on_torch

from volseg.errors import ScanError
from volseg.inference.torch_backend import TorchBackend


def test_logits_are_float32_and_do_not_depend_on_the_batch():
    backend = TorchBackend(network(), torch.device("cpu"))
    logits = backend.logits(batch())
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[1:2], backend.logits(batch()[1:2]), atol=1e-4)


class Greedy(torch.nn.Module):
    def forward(self, images):
        return images.new_empty(2**60)


def test_a_batch_that_does_not_fit_into_memory_fails_the_scan_not_the_run():
    message = r"\(3, 1, 16, 24, 16\) does not fit into the memory of cpu"
    with pytest.raises(ScanError, match=message) as caught:
        on_torch(Greedy(), batch())
    assert caught.value.code == "E_OOM"


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
