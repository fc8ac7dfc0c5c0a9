import numpy as np
import pytest
import torch
from small_networks import batch, network

from volseg.inference.backend import EnsembleBackend
from volseg.inference.torch_backend import TorchBackend


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
