import pytest
import torch

from volseg.errors import VolsegError
from volseg.models import build_network, set_weights, weights_of


def small_unet(**changes):
    settings = {"features": (4, 8, 8), "strides": ((1, 1, 1), (2, 2, 1), (2, 2, 1))} | changes
    return build_network("unet3d", in_channels=2, out_channels=3, **settings)


def test_logits_lie_on_the_grid_of_the_patch():
    assert small_unet()(torch.zeros(2, 2, 16, 12, 5)).shape == (2, 3, 16, 12, 5)


def test_each_tensor_is_named_once_and_weights_travel_between_networks():
    first, second = small_unet(), small_unet()
    weights = {name: tensor.clone() for name, tensor in weights_of(first).items()}
    assert len(weights) == len({tensor.data_ptr() for tensor in weights_of(first).values()})
    assert sum(tensor.numel() for tensor in weights.values()) == sum(p.numel() for p in first.parameters())
    patch = torch.randn(1, 2, 8, 8, 4)
    assert not torch.equal(first(patch), second(patch))
    set_weights(second, weights)
    assert torch.equal(first(patch), second(patch))


def test_weights_of_another_shape_are_refused_with_their_names():
    with pytest.raises(VolsegError, match="do not fit") as caught:
        set_weights(small_unet(), weights_of(small_unet(features=(4, 16, 8))))
    assert caught.value.code == "E_CKPT"


def test_an_unknown_name_or_setting_lists_what_there_is():
    with pytest.raises(VolsegError, match="cnn2d, unet3d"):
        build_network("unet4d", in_channels=1, out_channels=2)
    with pytest.raises(VolsegError, match="featurs"):
        build_network("unet3d", in_channels=1, out_channels=2, featurs=(1, 2))
    with pytest.raises(VolsegError, match="one of each per level"):
        small_unet(features=(4, 8))


def test_the_classifier_scores_one_lesion_as_in_a_batch():
    network = build_network("cnn2d", in_channels=2, out_channels=2).eval()
    images = torch.randn(4, 2, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]), atol=1e-5, rtol=1e-5)
