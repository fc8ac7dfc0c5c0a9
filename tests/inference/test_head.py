from importlib.util import find_spec

import numpy as np
import pytest
import torch
from laws import oblique

from volseg.inference.export import convert
from volseg.inference.head import BACKGROUND, Head, cut_openvino_head, cut_torch_head
from volseg.inference.openvino_backend import OpenVINOBackend, find_half_type
from volseg.inference.stream import ArrayPlanes, Tiling, predict_slabs
from volseg.inference.torch_backend import TorchBackend
from volseg.networks import build_network
from volseg.preprocessing.prepare import Trail
from volseg.preprocessing.restore import MaskRestorer
from volseg.volume import AxisOrder, BoundingBox, Geometry

CPU = torch.device("cpu")
PATCH = (8, 16, 8)
N_CLASSES, FEATURES = 11, 4


def network(seed=0, n_classes=N_CLASSES, features=FEATURES):
    torch.manual_seed(seed)
    unet = build_network(
        "nnunet_plain", in_channels=1, out_channels=n_classes, features=[features, 8], **PLAIN
    ).eval()
    with torch.no_grad():
        unet.head.weight *= 20  # so that classes are clearly apart
        unet.head.bias += torch.randn(n_classes)
    return unet


PLAIN = {
    "kernels": [[3, 3, 3]] * 2,
    "strides": [[1, 1, 1], [2, 2, 2]],
    "n_conv_per_stage": [1, 1],
    "n_conv_per_stage_decoder": [1],
}


def restored(backend, *, regions, empty_level, tta_axes, dtype=torch.float32):
    """Return mask and confidence of a scan with air at one end, restored to an oblique grid."""
    array = np.random.default_rng(0).normal(size=(1, 14, 20, 40)).astype(np.float32)
    array[..., 22:] = -3
    geometry = Geometry((20, 31, 30), oblique((0.9, 0.8, 1.6)))
    trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(geometry.shape), (14, 20, 40))
    values = list(range(1, N_CLASSES + (1 if regions else 0)))
    restorer = MaskRestorer(trail, values, axis=2, regions=regions, head=backend.head)
    settings = {"empty_level": empty_level, "tta_axes": tta_axes, "dtype": dtype}
    tiling = Tiling(patch_shape=PATCH, overlap=0.5, **settings)
    for slab in predict_slabs(ArrayPlanes(array), backend, tiling, n_classes=N_CLASSES):
        restorer.add(slab)
    return restorer.result()


@pytest.mark.parametrize("kind", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("regions", "empty_level", "tta_axes"),
    [(False, None, (0, 2)), (False, -2.0, ()), (True, None, ())],
)
def test_a_deferred_head_gives_the_same_mask(kind, regions, empty_level, tta_axes):
    if kind == "openvino" and not find_spec("openvino"):
        pytest.skip("openvino is not installed")
    shape = (1, 1, *PATCH)
    if kind == "torch":
        whole, cut = TorchBackend(network(), CPU), network()
        head = cut_torch_head(cut, lambda: torch.randn(shape))
        deferred = TorchBackend(cut, CPU, head=head)
    else:
        whole, cut = OpenVINOBackend(convert(network(), shape), shape), convert(network(), shape)
        head = cut_openvino_head(cut)
        deferred = OpenVINOBackend(cut, shape, head=head)
    assert head is not None
    assert deferred.logits(np.zeros(shape, np.float32)).shape[1] == FEATURES
    options = {"regions": regions, "empty_level": empty_level, "tta_axes": tta_axes}
    expected, expected_confidence = restored(whole, **options)
    mask, confidence = restored(deferred, **options)
    assert len(np.unique(expected)) > 3
    assert (mask == expected).mean() > 0.9999
    same = mask == expected
    np.testing.assert_allclose(confidence[same].astype(int), expected_confidence[same], atol=1)


@pytest.mark.skipif(not find_spec("openvino") or not find_half_type(), reason="no half precision")
def test_in_half_precision_features_take_two_bytes_and_the_mask_hardly_changes():
    shape = (1, 1, *PATCH)
    cut = convert(network(), shape)
    head = cut_openvino_head(cut)
    deferred = OpenVINOBackend(cut, shape, precision="fp16", head=head)
    assert deferred.logits(np.zeros(shape, np.float32)).dtype == np.float16
    whole = OpenVINOBackend(convert(network(), shape), shape, precision="fp16")
    options = {"regions": False, "empty_level": None, "tta_axes": (0,)}
    mask, confidence = restored(deferred, **options, dtype=torch.float16)
    expected, expected_confidence = restored(whole, **options)
    assert (mask == expected).mean() > 0.99
    same = mask == expected
    assert np.abs(confidence[same].astype(int) - expected_confidence[same]).mean() < 2


def test_voxels_without_a_tile_are_background_whatever_the_bias():
    head = Head(torch.randn(5, 3), torch.tensor([-9.0, 1, 2, 3, 99]))
    features = torch.zeros(4, 1, 1, 2)
    features[-1, 0, 0, 1] = 1
    logits = head(features)
    torch.testing.assert_close(logits[:, 0, 0, 0], head.bias)
    assert logits[:, 0, 0, 1].tolist() == [0] + [-BACKGROUND] * 4


def test_a_head_of_few_classes_is_not_cut_off():
    few = network(n_classes=3)
    example = torch.randn(1, 1, *PATCH)
    before = few(example)
    assert cut_torch_head(few, lambda: example) is None
    torch.testing.assert_close(few(example), before)


class Softened(torch.nn.Module):
    """A network whose last convolution is not its last layer."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, patches):
        return self.network(patches).tanh()


def test_a_convolution_that_is_not_the_last_layer_is_not_cut_off():
    soft, example = Softened(), torch.randn(1, 1, *PATCH)
    before = soft(example)
    assert cut_torch_head(soft, lambda: example) is None
    torch.testing.assert_close(soft(example), before)
    if find_spec("openvino"):
        model = convert(soft, example.shape)
        assert cut_openvino_head(model) is None
        assert model.output(0).get_partial_shape()[1].get_length() == N_CLASSES


def test_the_head_of_a_monai_network_can_be_deferred_too():
    torch.manual_seed(0)
    options = {"features": [4, 8, 8], "strides": [(1, 1, 1), (2, 2, 2), (2, 2, 2)]}
    unet = build_network("unet3d", in_channels=1, out_channels=N_CLASSES, **options).eval()
    example = torch.randn(1, 1, *PATCH)
    with torch.inference_mode():
        expected = unet(example)[0]
    head = cut_torch_head(unet, lambda: example)
    assert head is not None
    with torch.inference_mode():
        torch.testing.assert_close(head(unet(example)[0]), expected, atol=1e-4, rtol=1e-4)
