import pytest
import torch
from laws import assert_is_a_row

from volseg.errors import VolsegError
from volseg.networks import (
    architecture,
    build_network,
    copy_weights,
    network_names,
    settings_type,
    unique_tensors,
)
from volseg.networks.image_network import ImageArchitecture
from volseg.recipe import Network


def small_unet(**changes):
    settings = {"features": (4, 8, 8), "strides": ((1, 1, 1), (2, 2, 1), (2, 2, 1))} | changes
    return build_network("unet3d", in_channels=2, out_channels=3, **settings)


def test_logits_lie_on_the_grid_of_the_patch():
    assert small_unet()(torch.zeros(2, 2, 16, 12, 5)).shape == (2, 3, 16, 12, 5)


def test_each_tensor_is_named_once_and_weights_travel_between_networks():
    first, second = small_unet(), small_unet()
    weights = {name: tensor.clone() for name, tensor in unique_tensors(first).items()}
    assert len(weights) == len({tensor.data_ptr() for tensor in unique_tensors(first).values()})
    assert sum(tensor.numel() for tensor in weights.values()) == sum(
        p.numel() for p in first.parameters()
    )
    patch = torch.randn(1, 2, 8, 8, 4)
    assert not torch.equal(first(patch), second(patch))
    copy_weights(second, weights)
    assert torch.equal(first(patch), second(patch))


def test_weights_of_another_shape_are_refused_with_their_names():
    with pytest.raises(VolsegError, match="do not fit") as caught:
        copy_weights(small_unet(), unique_tensors(small_unet(features=(4, 16, 8))))
    assert caught.value.code == "E_CKPT"


def test_an_unknown_name_or_setting_lists_what_there_is():
    with pytest.raises(VolsegError, match=r"cnn2d, .*nnunet_plain, .*unet3d"):
        build_network("unet4d", in_channels=1, out_channels=2)
    with pytest.raises(VolsegError, match="featurs"):
        build_network("unet3d", in_channels=1, out_channels=2, featurs=(1, 2))
    with pytest.raises(VolsegError, match="one of each per level"):
        small_unet(features=(4, 8, 8, 8))


def test_the_classifier_scores_one_lesion_as_in_a_batch():
    network = build_network("cnn2d", in_channels=2, out_channels=2).eval()
    images = torch.randn(4, 2, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]), atol=1e-5, rtol=1e-5)


NNUNETS = {"nnunet_plain": "n_conv_per_stage", "nnunet_residual": "n_blocks_per_stage"}
NNUNET = {
    "features": (4, 6, 8),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "n_conv_per_stage_decoder": (1, 2),
}
# Settings of each architecture to test; without an entry, its defaults.
EXAMPLES = {name: NNUNET | {n_down: (1, 2, 3)} for name, n_down in NNUNETS.items()}
EXAMPLES["unet3d"] = {"features": (4, 8, 8), "strides": ((1, 1, 1), (2, 2, 1), (3, 2, 2))}


@pytest.mark.parametrize("name", network_names())
def test_laws_of_every_architecture(name):
    """Any file in networks/: with defaults for its settings, its author need not touch this one."""
    assert_is_a_row(settings_type(name))
    settings = architecture(Network(name=name, **EXAMPLES.get(name, {})))
    divisors = settings.patch_divisors
    least = settings.smallest_pixels if isinstance(settings, ImageArchitecture) else 1
    patches = [
        tuple(least * (2 * n if axis == doubled else n) for axis, n in enumerate(divisors))
        for doubled in range(len(divisors))
    ]
    network = settings.build(2, 3)
    for patch in patches:
        assert not list(settings.patch_mistakes(patch))
        logits = network(torch.randn(2, 2, *patch))
        assert logits.shape == (2, 3, *(patch if len(patch) == 3 else ()))
        assert bool(logits.isfinite().all())
    for axis, step in enumerate(divisors):
        edges = [3 * n * least for n in divisors]
        wrong = tuple(n + (axis == other and step > 1) for other, n in enumerate(edges))
        mistakes = list(settings.patch_mistakes(wrong))
        assert len(mistakes) == (step > 1)
        for problem, fix in mistakes:
            assert f"{wrong[axis]} voxels along {'RAS'[axis]}" in problem
            assert f"{3 * step} or {4 * step}" in fix
    if max(divisors) > 1:
        assert "single voxel" in dict(settings.patch_mistakes(divisors)).popitem()[0]


def nnunet(name, **changes):
    return build_network(name, in_channels=2, out_channels=5, **EXAMPLES[name] | changes).eval()


@pytest.mark.parametrize("name", NNUNETS)
def test_the_nnunets_treat_each_patch_of_a_batch_alone_and_leave_it_as_it_is(name):
    """They activate and add in place."""
    network, patches = nnunet(name), torch.randn(2, 2, 8, 16, 16)
    before = patches.clone()
    with torch.inference_mode():
        both, alone = network(patches), network(patches[1:])
    assert torch.equal(patches, before)
    assert both.shape == (2, 5, 8, 16, 16)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NNUNETS)
def test_the_nnunets_refuse_2d_and_levels_that_do_not_match(name):
    flat = {"strides": ((1, 1), (2, 2), (2, 2)), "kernels": ((3, 3),) * 3}
    with pytest.raises(VolsegError, match=r"strides\.0\.2 is missing"):
        nnunet(name, **flat)
    with pytest.raises(
        VolsegError, match="3 features, 3 strides, 3 kernels, 2 stages down, 3 stages up"
    ):
        nnunet(name, **{NNUNETS[name]: (1, 2)})
    with pytest.raises(VolsegError, match="2 strides"):
        nnunet(name, strides=((1, 1, 1), (2, 2, 2)))
    with pytest.raises(VolsegError, match="even size"):
        nnunet(name, kernels=((2, 2, 2),) * 3)
    with pytest.raises(VolsegError, match="bias_of_convs"):
        nnunet(name, bias_of_convs=True)


def test_a_residual_block_with_dead_convolutions_passes_its_input_on():
    network = nnunet("nnunet_residual", n_blocks_per_stage=(1, 2, 3))
    block = network.encoder[2][1]  # neither stride nor projection
    with torch.no_grad():
        block.conv2.norm.weight.zero_()
        block.conv2.norm.bias.zero_()
        features = torch.rand(1, 8, 4, 4, 4)
        assert torch.equal(block(features), features)
