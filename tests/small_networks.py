"""Shared test helpers: a small network with random weights on each backend, and its batches."""

import numpy as np
import pytest
import torch

from volseg.inference.export import convert
from volseg.inference.openvino_backend import OpenVINOBackend, openvino_is_installed
from volseg.inference.torch_backend import TorchBackend
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
