"""Laws of every architecture of images; a new file in networks/ is tested without a change here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from volseg.errors import VolsegError
from volseg.networks import architecture, build_network, check_classifier, image_network_names
from volseg.networks.cnn_small import features_for
from volseg.networks.image_network import ImageArchitecture, Pool, count_multiply_adds
from volseg.networks.vgg import Settings as Vgg
from volseg.recipe import Classify, Network

NAMES = image_network_names()
OTHER_SETTINGS = [("vgg", {"depth": 11}), ("vgg", {"depth": 13}), ("resnet2d", {"depth": 50})]
ALL = [(name, {}) for name in NAMES] + OTHER_SETTINGS


def settings_of(name, **settings) -> ImageArchitecture:
    row = architecture(Network(name=name, **settings))
    assert isinstance(row, ImageArchitecture)
    return row


def build(name, in_channels=3, out_channels=4, **settings):
    torch.manual_seed(0)
    return settings_of(name, **settings).build(in_channels, out_channels)


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_every_parameter_learns_and_stands_in_one_stage(name, settings):
    network = build(name, **settings)
    images = torch.randn(2, 3, 32, 32)
    logits = network(images)
    assert logits.shape == (2, 4)
    logits.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, value in gradients.items() if value is None] == []
    assert all(bool(value.isfinite().all()) for value in gradients.values())
    assert sum(int(bool((value != 0).any())) for value in gradients.values()) > 0.9 * len(gradients)
    stages = network.stages()
    assert sorted(name for stage in stages for name in stage) == sorted(gradients)
    assert all(stages) and len(stages) >= 2
    assert stages[-1] == ["head.weight", "head.bias"]
    assert network.first_convolution == stages[0][0]


@pytest.mark.parametrize("name", NAMES)
def test_the_stages_run_from_the_input_to_the_head(name):
    """Without the first stage, the input reaches nothing; each stage depends on those before."""
    network = build(name).eval()
    calls = []
    owners = dict(network.named_modules())
    for index, stage in enumerate(network.stages()):
        for module in {parameter.rpartition(".")[0] for parameter in stage}:
            owners[module].register_forward_hook(lambda *_, index=index: calls.append(index))
    with torch.inference_mode():
        network(torch.randn(1, 3, 32, 32))
    assert calls == sorted(calls)
    assert set(calls) == set(range(len(network.stages())))


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_an_image_is_classified_alone_as_in_a_batch(name, settings):
    network = build(name, **settings).eval()
    images = torch.randn(3, 3, 40, 32)
    with torch.inference_mode():
        together = network(images)
        torch.testing.assert_close(network(images[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(images.flip(0)).flip(0), together, rtol=1e-4, atol=1e-5)
        assert bool(network(images.flip(3)).isfinite().all())
        embedded = network.embed(images)
        assert embedded.shape == (3, network.head.in_features)
        torch.testing.assert_close(network.head(embedded), together)


@pytest.mark.parametrize(("name", "settings"), ALL)
@pytest.mark.parametrize("pixels", [28, pytest.param(224, marks=pytest.mark.slow), None])
def test_small_and_large_images_are_taken(name, settings, pixels):
    least = settings_of(name, **settings).smallest_pixels
    assert least <= 28
    network = build(name, in_channels=1, **settings).eval()
    with torch.inference_mode():
        logits = network(torch.rand(1, 1, pixels or least, pixels or least))
        assert bool(logits.isfinite().all())
        assert not torch.equal(logits, network(torch.rand(1, 1, pixels or least, pixels or least)))


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_base_keeps_its_weights_and_statistics_until_it_is_released(name):
    network = build(name).train()
    n_stages = len(network.stages())

    def step():
        """Return the names of the tensors that a step of training changes."""
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, weight_decay=0.1)
        optimizer.zero_grad()
        network(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        after = network.state_dict()
        return {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}

    network.freeze(n_stages - 1)
    assert step() == {"head.weight", "head.bias"}
    network.eval().train()
    assert step() == {"head.weight", "head.bias"}
    network.freeze(1)
    changed = step()
    assert not changed & set(network.stages()[0])
    assert {key for stage in network.stages()[1:] for key in stage} <= changed
    assert not any("running" in key for key in changed & _of_first_stage(network))
    network.freeze(0)
    assert set(network.stages()[0]) <= step()


def _of_first_stage(network):
    owners = {key.rpartition(".")[0] for key in network.stages()[0]}
    return {key for key in network.state_dict() if key.rpartition(".")[0] in owners}


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_too_small_are_refused_with_both_numbers(name):
    settings = settings_of(name)
    least = settings.smallest_pixels
    assert not list(settings.patch_mistakes((least, 7 * least)))
    for shape, axis in (((least - 1, least), "H"), ((least, least - 1), "W")):
        (problem, fix), *others = settings.patch_mistakes(shape)
        assert not others
        assert f"{least - 1} pixels along {axis}" in problem and str(least) in fix


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_names_and_shapes_are_known_without_memory(name, settings):
    with torch.device("meta"):
        skeleton = settings_of(name, **settings).build(2, 5)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    shapes = {key: tensor.shape for key, tensor in skeleton.state_dict().items()}
    network = build(name, 2, 5, **settings)
    assert {key: tensor.shape for key, tensor in network.state_dict().items()} == shapes


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_halves_each_axis_until_one_pixel_is_left(kind):
    plain = nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2)
    for height, width in ((8, 6), (7, 5), (2, 3)):
        maps = torch.randn(2, 3, height, width)
        assert torch.equal(Pool(kind)(maps), plain(maps))
    column = torch.randn(2, 3, 5, 1)
    assert Pool(kind)(column).shape == (2, 3, 2, 1)
    assert torch.equal(Pool(kind)(column[..., :1, :]), column[..., :1, :])


def test_the_depth_of_the_small_cnn_is_the_largest_that_leaves_three_pixels():
    for pixels in range(6, 300):
        n = len(features_for(pixels))
        assert pixels // 2**n >= 3 > pixels // 2 ** (n + 1)
    assert features_for(28) == (32, 64, 128)
    assert max(features_for(224)) == 256
    assert features_for(1) == (32,)


def test_vgg_is_what_the_paper_says():
    """13 convolutions with 14,714,688 weights; 15.3 thousand million multiply-adds at 224²."""
    with torch.device("meta"):
        network = settings_of("vgg").build(3, 1000)
    base = [p for key, p in network.named_parameters() if not key.startswith("head.")]
    assert sum(p.numel() for p in base) == 14_714_688
    n = count_multiply_adds(network, (3, 224, 224)) - 512 * 1000
    assert n == pytest.approx(15.35e9, rel=0.001)
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # as in torchvision
    expected = [f"features.{i}.{kind}" for i in indices for kind in ("weight", "bias")]
    assert [key for key, _ in network.named_parameters()][:-2] == expected


def test_the_sizes_of_the_other_networks_are_published():
    """With 1000 classes, as torchvision's documentation and TensorFlow's blog give them."""
    published = {
        "resnet2d": (11_689_512, 1.814e9),
        "densenet2d": (7_978_856, 2.83e9),
        "efficientnet_lite": (4_652_008, 0.385e9),
    }
    for name, (n_parameters, n_multiply_adds) in published.items():
        with torch.device("meta"):
            network = settings_of(name).build(3, 1000)
        assert sum(p.numel() for p in network.parameters()) == n_parameters
        assert count_multiply_adds(network, (3, 224, 224)) == pytest.approx(
            n_multiply_adds, rel=0.02
        )


def test_operations_are_counted_as_a_convolution_needs_them():
    network = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 9, 2)).train()
    assert count_multiply_adds(network, (4, 5, 5)) == 9 * 6 * 9 * 2 + 54 * 2
    assert network.training
    assert not network[0]._forward_hooks


def test_the_widths_of_vgg_are_one_per_convolution():
    widths = (8, 8, 16, 16, 24, 24, 24, 32, 32, 32, 32, 32, 40)
    network = Vgg(widths=widths).build(1, 2)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert tuple(m.out_channels for m in convolutions) == widths
    with pytest.raises(VolsegError, match="13 convolutions, and widths has 8"):
        build_network("vgg", in_channels=1, out_channels=2, widths=list(widths[:8]))


def test_a_network_of_scans_is_no_classifier_of_images():
    settings = Classify(
        column="x", classes={"a": (0, 1), "b": (2, 3)}, network={"name": "unet3d"}, low=0, high=1
    )
    with pytest.raises(VolsegError, match=r"'unet3d' is 3D, .*use one of cnn2d, .*vgg$"):
        check_classifier(settings)


def test_the_first_pixel_matters_as_much_as_the_last():
    """Padding may not hide an edge of the image: Lite0 pads its right edge alone."""
    for name in NAMES:
        network = build(name, in_channels=1).eval()
        image = torch.zeros(1, 1, 32, 32)
        for edge in (0, -1):
            spotted = image.clone()
            spotted[..., edge, edge] = 10
            with torch.inference_mode():
                assert not torch.allclose(network(spotted), network(image), atol=0, rtol=0), name


def test_a_small_network_overfits_a_few_images():
    """Training mode, both batch norm and dropout on: the loss falls to nearly nothing."""
    settings = {"features": [8, 16], "dropout": 0.0, "block_dropout": 0.0}
    network = build("cnn_small", in_channels=1, out_channels=2, **settings)
    images, targets = torch.randn(16, 1, 12, 12), torch.arange(16) % 2
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(30):
        loss = functional.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
