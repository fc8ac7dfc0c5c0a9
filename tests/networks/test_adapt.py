"""Transfer of weights: what fits is taken, and the table says what did not and why."""

from __future__ import annotations

import json
import os
import pickle
from itertools import permutations

import numpy as np
import pytest
import torch
from laws import real_data
from safetensors.torch import save_file
from torch import nn

from volseg.errors import VolsegError
from volseg.networks import architecture, copy_weights, image_network_names, unique_tensors
from volseg.networks.adapt import (
    IMAGENET,
    Scaling,
    Status,
    adapt,
    read_weights,
)
from volseg.networks.image_network import ImageNetwork
from volseg.recipe import Network

NAMES = image_network_names()


def build(name, in_channels=3, out_channels=2, seed=0, **settings) -> ImageNetwork:
    torch.manual_seed(seed)
    network = architecture(Network(name=name, **settings)).build(in_channels, out_channels)
    assert isinstance(network, ImageNetwork)
    return network


def tensors_of(network):
    return {name: tensor.clone() for name, tensor in unique_tensors(network).items()}


def row(adapted, name):
    (single,) = [row for row in adapted.rows if row.tensor == name]
    return single


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_same_network_are_all_loaded(name, tmp_path):
    source, target = build(name, seed=1), build(name, seed=2)
    save_file(tensors_of(source), tmp_path / "a.safetensors")
    adapted = adapt(target, read_weights(tmp_path / "a.safetensors").tensors)
    assert {row.status for row in adapted.rows} == {Status.LOADED}
    copy_weights(target, adapted.weights)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(source.eval()(images), target.eval()(images))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (3, 1),
        pytest.param(3, 2, marks=pytest.mark.slow),
        pytest.param(3, 5, marks=pytest.mark.slow),
        (1, 3),
    ],
)
def test_a_grey_image_in_all_channels_gives_the_same_embedding(name, before, after):
    source, target = build(name, before, seed=1).eval(), build(name, after, 3, seed=2).eval()
    adapted = adapt(target, tensors_of(source))
    copy_weights(target, adapted.weights)
    grey = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():
        expected = source.embed(grey.expand(-1, before, -1, -1))
        embedded = target.embed(grey.expand(-1, after, -1, -1))
    torch.testing.assert_close(embedded, expected, rtol=1e-3, atol=1e-4)
    first = row(adapted, target.first_convolution)
    assert first.status is Status.ADAPTED
    assert first.reason == f"{before} channels in the file, {after} here"
    head = row(adapted, "head.weight")
    assert (head.status, head.reason) == (Status.RANDOM, "2 outputs in the file, 3 here")
    assert torch.equal(adapted.weights["head.weight"], tensors_of(target)["head.weight"])


def test_what_a_file_lacks_or_has_beyond_is_listed():
    network = build("vgg", seed=2)
    tensors = tensors_of(build("vgg", seed=1))
    del tensors["features.7.bias"]
    tensors["classifier.0.weight"] = torch.zeros(4, 4)
    tensors["features.10.weight"] = torch.zeros(3)
    adapted = adapt(network, tensors)
    assert row(adapted, "features.7.bias").reason == "not in the file"
    assert "[3] in the file, [256, 128, 3, 3] here" in row(adapted, "features.10.weight").reason
    assert row(adapted, "classifier.0.weight").status is Status.UNUSED
    assert adapted.count(Status.RANDOM) == 2
    assert adapted.summary == (
        "26 loaded; 2 random (features.7.bias: not in the file); "
        "1 unused (classifier.0.weight: the network has no such tensor)"
    )
    assert adapted.count(Status.UNUSED) == 1
    assert set(adapted.weights) == set(unique_tensors(network))


OTHERS = {  # names of other libraries → ours
    "resnet2d": {"fc.weight": "head.weight", "layer1.0.bn1.bias": "layer1.0.bn1.bias"},
    "efficientnet_lite": {"_fc.bias": "head.bias"},
    "densenet2d": {
        "features.denseblock1.denselayer2.norm1.weight": (
            "features.denseblock1.denselayer2.layers.norm1.weight"
        ),
        "features.denseblock1.denselayer2.conv.2.weight": (
            "features.denseblock1.denselayer2.layers.conv2.weight"
        ),
        "classifier.bias": "head.bias",
        "class_layers.out.weight": "head.weight",
        "features.transition1.norm.weight": "features.transition1.norm.weight",
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_libraries_are_translated(name):
    network = build(name)
    tensors = tensors_of(network)
    for foreign, name_here in OTHERS[name].items():
        renamed = {k: v for k, v in tensors.items() if k != name_here}
        renamed[foreign] = torch.full_like(tensors[name_here], 0.5)
        adapted = adapt(network, renamed)
        assert row(adapted, name_here).status is Status.LOADED, foreign
        assert bool((adapted.weights[name_here] == 0.5).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_another_architecture_is_refused_by_name(name):
    with torch.device("meta"):
        networks = {name: build(name) for name in NAMES}
    tensors = unique_tensors(networks[name])
    for other in NAMES:
        if other == name:
            continue
        with pytest.raises(VolsegError, match=f"another architecture, probably {name} ") as caught:
            adapt(networks[other], tensors)
        assert caught.value.code == "E_CKPT"
    with pytest.raises(VolsegError, match=r"only 0 of the .* another architecture .its first"):
        adapt(networks[name], {"encoder.0.weight": torch.zeros(2, 2)})


def test_another_depth_is_another_architecture():
    with torch.device("meta"):
        networks = {depth: build("vgg", depth=depth) for depth in (11, 13, 16)}
    for target, ttarget in permutations(networks, 2):
        with pytest.raises(VolsegError, match="do not fit"):
            adapt(networks[target], unique_tensors(networks[ttarget]))


WRAPPINGS = {
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": state, "epoch": 3},
    "twice": lambda state: {"model": {"state_dict": state}, "optimizer": {}},
    "parallel": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_torch_checkpoint_is_read_however_it_is_wrapped(wrapping, tmp_path):
    state = tensors_of(build("cnn_small", seed=1))
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "a.pt")
    file = read_weights(tmp_path / "a.pt")
    assert file.source == "a.pt"
    assert set(file.tensors) == set(state)
    for name, tensor in file.tensors.items():
        assert tensor.dtype == state[name].dtype
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-6)


def test_nothing_else_is_unpickled(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(VolsegError, match=r"module\.pt: .*torch\.nn.*Linear") as caught:
        read_weights(tmp_path / "module.pt")
    assert caught.value.code == "E_PICKLE"
    assert "weights_only" not in str(caught.value)


def test_files_without_weights_are_refused_by_name(tmp_path):
    for name, content in {
        "noise.pt": b"\x00\x01noise",
        "noise.safetensors": b"\xff" * 64,
        "empty.pt": b"",
        "empty.safetensors": b"",
        "README.md": b"# Weights\n\nThey are elsewhere.\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolsegError, match=name.replace(".", r"\.")) as caught:
            read_weights(tmp_path / name)
        assert caught.value.code in ("E_CKPT", "E_PICKLE")
        assert "pop from" not in caught.value.problem  # as the unpickler says
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "numbers.pt")
    for name in ("list.pt", "numbers.pt"):
        with pytest.raises(VolsegError, match=r"not a file of weights .* by name"):
            read_weights(tmp_path / name)
    with pytest.raises(VolsegError, match="does not exist"):
        read_weights(tmp_path / "missing.pt")
    with pytest.raises(VolsegError, match="not a model folder"):
        read_weights(tmp_path)
    (tmp_path / "protocol.pt").write_bytes(pickle.dumps({"a": print}, protocol=4))
    with pytest.raises(VolsegError, match=r"protocol\.pt: "):  # no warning of torch
        read_weights(tmp_path / "protocol.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(VolsegError, match=r"is a pipe|cannot be read"):
        read_weights(tmp_path / "pipe.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "a.safetensors")
    with pytest.raises(VolsegError, match=r"a\.safetensors: 1 of the 2 weights of 'a' are NaN"):
        read_weights(tmp_path / "a.safetensors")


def test_a_model_folder_gives_the_weights_of_its_classifier(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "segmentation.safetensors")
    assert set(read_weights(tmp_path).tensors) == {"a"}
    save_file({"b": torch.zeros(1)}, tmp_path / "classifier.safetensors")
    assert set(read_weights(tmp_path).tensors) == {"b"}


def test_the_scaling_comes_from_the_file_or_from_an_imagenet_head(tmp_path):
    path = tmp_path / "a.safetensors"

    def scaling(tensors=None, **metadata):
        save_file(tensors or {"a": torch.zeros(1)}, path, metadata or None)
        return read_weights(path).scaling

    assert scaling() is None
    assert scaling(mean="[0.5]", sd="[0.25]") == Scaling((0.5,), (0.25,))
    for wrong in ({"mean": "[0.5]", "sd": "[0]"}, {"mean": "0.5", "sd": "[1]"}, {"mean": "x"}):
        assert scaling(**{"sd": "[1, 2]"} | wrong) is None
    assert scaling({"fc.bias": torch.zeros(1000)}) == IMAGENET
    assert scaling({"fc.bias": torch.zeros(10)}) is None
    grey = IMAGENET.of_channels(1)
    assert grey.mean == pytest.approx((0.449,), abs=1e-9)
    assert len(IMAGENET.of_channels(4).sd) == 4
    assert IMAGENET.of_channels(3) is IMAGENET


# ---- real weights


def lite0():
    file = read_weights(real_data("pretrained_imagenet/efficientnet_lite0_imagenet.safetensors"))
    network = build("efficientnet_lite", out_channels=1000)
    adapted = adapt(network, file.tensors)
    copy_weights(network, adapted.weights)
    return file, network.eval(), adapted


def scaled(pixels, scaling):
    """Return (1, 3, 224, 224) of a square image (H, W, 3) of bytes, scaled as in training."""
    image = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
    image = nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    mean, sd = (torch.tensor(v).view(1, 3, 1, 1) for v in (scaling.mean, scaling.sd))
    return (image - mean) / sd


def square(image):
    n = min(image.shape[:2])
    top, left = (image.shape[0] - n) // 2, (image.shape[1] - n) // 2
    return image[top : top + n, left : left + n]


def test_all_296_tensors_of_lite0_fit_and_it_knows_a_cat_and_a_coffee():
    skimage_data = pytest.importorskip("skimage.data")
    file, network, adapted = lite0()
    assert len(file.tensors) == 296
    assert adapted.count(Status.LOADED) == 296 == len(adapted.rows)
    assert file.scaling is not None
    tabby, tiger_cat, egyptian, espresso = 281, 282, 285, 967
    with torch.inference_mode():
        cat = network(scaled(square(skimage_data.chelsea()), file.scaling)).softmax(1)[0]
        coffee = network(scaled(square(skimage_data.coffee()), file.scaling)).softmax(1)[0]
    # As the package of the weights predicts; symmetric padding gives other numbers.
    assert float(cat[[tabby, tiger_cat, egyptian]].sum()) == pytest.approx(0.89, abs=0.005)
    assert float(coffee[espresso]) == pytest.approx(0.94, abs=0.005)


def test_lite0_still_sees_a_cat_in_one_grey_channel():
    skimage_data = pytest.importorskip("skimage.data")
    file, _, _ = lite0()
    network = build("efficientnet_lite", 1, 1000)
    copy_weights(network, adapt(network, file.tensors).weights)
    assert file.scaling is not None
    grey = square(skimage_data.chelsea()).mean(2, keepdims=True).repeat(3, 2)
    image = scaled(grey, file.scaling)[:, :1]
    with torch.inference_mode():
        probabilities = network.eval()(image).softmax(1)[0]
    assert float(probabilities[[281, 282, 285]].sum()) > 0.5


def test_vgg16_has_oxfords_first_weight_and_features_that_are_not_noise():
    file = read_weights(real_data("pretrained_imagenet/vgg16_imagenet_conv_fp16.safetensors"))
    network = build("vgg")
    adapted = adapt(network, file.tensors)
    base = [row for row in adapted.rows if not row.tensor.startswith("head.")]
    assert {row.status for row in base} == {Status.LOADED} and len(base) == 26
    assert row(adapted, "head.weight").reason == "not in the file"
    copy_weights(network, adapted.weights)
    weights = unique_tensors(network)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    # Oxford's VGG16, as printed in other people's code: the first bias of its last convolution.
    assert float(weights["features.28.bias"][0]) == pytest.approx(0.18837857, abs=1e-4)
    assert file.scaling == Scaling(
        (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)
    )


def test_the_metadata_are_json_of_strings(tmp_path):
    """What `volseg pretrain` writes is what `--init` reads."""
    mean = json.dumps([0.1, 0.2, 0.3])
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"mean": mean, "sd": "[1, 1, 1]"})
    assert read_weights(tmp_path / "a.safetensors").scaling == Scaling((0.1, 0.2, 0.3), (1, 1, 1))
