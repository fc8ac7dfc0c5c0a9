"""Methods find the evidence of a network whose evidence is known, and their checks find frauds."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, is_dataclass
from functools import partial

import bright_squares
import numpy as np
import pytest
import torch

from volseg.errors import EnvironmentProblem
from volseg.evaluation.saliency import evidence, map_similarity, pointing
from volseg.evaluation.saliency_rows import doubts_of
from volseg.inference.explain import (
    METHODS,
    Lime,
    Method,
    Ridge,
    Score,
    feature_layers,
    load_captum,
    superpixels,
    without_detail,
)
from volseg.inference.explain_checks import Checker, Explained, randomised_networks, with_noise
from volseg.networks import build_images, build_network
from volseg.networks.image_network import HEAD
from volseg.recipe.classification import Target

DATA = bright_squares.recipe().data
QUICK = {"lime": {"samples": 256, "superpixels": 32}}
ROWS = [pytest.param(name, id=name) for name in METHODS]


def method_named(name):
    return METHODS[name](**QUICK.get(name, {}))


def image_of(pixels):
    return torch.from_numpy(pixels[None].astype(np.float32) / 255)


def score_of(*networks, index=1):
    return Score(networks or [bright_squares.network()], DATA, index)


@pytest.mark.parametrize("name", ROWS)
def test_a_method_is_a_frozen_row_with_named_settings(name):
    assert is_dataclass(METHODS[name]) and METHODS[name].__dataclass_params__.frozen
    assert all(field.kw_only for field in fields(METHODS[name]))


@pytest.mark.parametrize("corner", [(4, 20), (21, 3), (12, 12)])
@pytest.mark.parametrize("name", ROWS)
def test_every_method_points_into_the_bright_square_and_not_into_the_dim_one(name, corner):
    pixels, inside = bright_squares.picture(corner=corner, dim_corner=(22, 22))
    saliency = method_named(name)(score_of(), image_of(pixels), seed=0)
    assert saliency.shape == pixels.shape and saliency.dtype == np.float32
    assert pointing(evidence(saliency), inside) > 0.9
    dim = np.zeros_like(inside)
    dim[22:30, 22:30] = True
    dim &= ~inside
    assert saliency[dim].mean() < 0.2 * saliency[inside].mean()


@pytest.mark.parametrize("name", ROWS)
def test_what_speaks_for_one_of_two_classes_speaks_against_the_other(name):
    pixels, inside = bright_squares.picture()
    saliency = method_named(name)(score_of(index=0), image_of(pixels), seed=0)
    shown = evidence(saliency)
    assert shown[inside].mean() <= shown[~inside].mean() + 1e-9


@pytest.mark.parametrize("name", ROWS)
def test_a_network_that_looks_at_nothing_has_empty_maps(name):
    constant = score_of(bright_squares.network(gain=0.0))
    saliency = method_named(name)(constant, image_of(bright_squares.picture()[0]), seed=0)
    assert not evidence(saliency).any()


@pytest.mark.parametrize("name", ROWS)
def test_a_seed_repeats_a_map_and_draws_from_nothing_else(name):
    image = image_of(bright_squares.picture()[0])
    score = score_of()
    before = torch.random.get_rng_state()
    one, other = (method_named(name)(score, image, seed=7) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_integrated_gradients_add_up_to_the_change_of_the_log_odds():
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            score = score_of(build_images(bright_squares.recipe()).eval())
        image = image_of(bright_squares.picture(seed=seed)[0])
        total = METHODS["gradients"](steps=200)(score, image, 0).sum(dtype=np.float64)
        with torch.no_grad():
            change = score(image[None]) - score(without_detail(image)[None])
        assert total == pytest.approx(float(change), rel=0.02, abs=1e-4)


def test_an_occluded_linear_score_falls_by_what_the_square_covers():
    """Each pixel gets the mean fall of the squares over it; here, computed one by one."""
    image = image_of(bright_squares.picture((24, 24), corner=(4, 12), dim_corner=None)[0])
    score, blank, edge = score_of(), without_detail(image), 3
    falls, counts = np.zeros((24, 24)), np.zeros((24, 24))
    with torch.no_grad():
        whole = float(score(image[None]))
        for row in range(0, 22):
            for column in range(0, 22):
                changed = image.clone()
                part = np.s_[..., row : row + edge, column : column + edge]
                changed[part] = blank[part]
                falls[part] += whole - float(score(changed[None]))
                counts[part] += 1
    saliency = METHODS["occlusion"](window=1 / 8)(score, image, 0)
    np.testing.assert_allclose(saliency, falls / counts, rtol=1e-3, atol=1e-3)


def test_the_linear_model_is_that_of_the_normal_equations():
    rng = np.random.default_rng(0)
    rows, weights = rng.integers(0, 2, (200, 5)), rng.random(200)
    targets = rows @ [3.0, -1.0, 0.0, 0.5, 2.0] + 4
    model = Ridge(1e-9)
    parts = [torch.from_numpy(part).float() for part in (rows, targets, weights)]
    model.fit([tuple(part[:120] for part in parts), tuple(part[120:] for part in parts)])
    np.testing.assert_allclose(model.representation()[0], [3, -1, 0, 0.5, 2], atol=1e-4)


def test_superpixels_cover_the_image_and_follow_its_edges():
    pixels, inside = bright_squares.picture()
    segments = superpixels(pixels[None].astype(np.float32), 32)
    numbers = np.unique(segments)
    assert segments.shape == pixels.shape and list(numbers) == list(range(len(numbers)))
    fractions = [inside[segments == number].mean() for number in numbers]
    mixed = [n for n, part in zip(numbers, fractions, strict=True) if 0.1 < part < 0.9]
    assert np.isin(segments, mixed).mean() < 0.1


# ---- networks


def test_the_score_is_the_log_odds_of_the_softmax_and_of_the_sigmoid():
    outputs = torch.tensor([[1.0, -2.0, 0.5]])

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return outputs.expand(len(images), -1)

    names = ("a", "b", "c")
    for kind in ("classes", "labels", "number"):
        data = Target(target="x", kind=kind, classes=() if kind == "number" else names)
        for index in range(3 if data.names else 1):
            value = float(Score([Fixed()], data, index)(torch.zeros(1, 1, 4, 4)))
            p = outputs.softmax(1) if kind == "classes" else outputs.sigmoid()
            expected = outputs[0, 0] if kind == "number" else torch.logit(p)[0, index]
            assert value == pytest.approx(float(expected), abs=1e-5)


NETWORKS = {
    "cnn_small": {"features": (8, 16, 32)},
    "cnn2d": {},
    "vgg": {"depth": 11},
    "resnet2d": {},
    "densenet2d": {},
    "efficientnet_lite": {},
}
SOME_NETWORKS = [
    pytest.param(name, marks=[] if name == "cnn_small" else pytest.mark.slow) for name in NETWORKS
]


@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_grad_cam_takes_maps_through_which_all_evidence_passes(name):
    """With these maps replaced by others, the output does not depend on the image any more."""
    network = build_network(name, in_channels=1, out_channels=2, **NETWORKS[name]).eval()
    one, other = torch.randn(2, 1, 1, 64, 64).unbind()
    layers = feature_layers(network, one, least_pixels=1)
    assert len(layers) == len(set(layers)) == len(network.stage_prefixes)
    maps = []
    with torch.no_grad():
        for layer in layers:
            module = network.get_submodule(layer)
            taken = module.register_forward_hook(lambda _, __, output: maps.append(output.clone()))
            expected = network(one)
            taken.remove()
            replacing = module.register_forward_hook(lambda _, __, ___: maps[-1].clone())
            replaced = network(other)
            replacing.remove()
            assert torch.equal(replaced, expected) and not torch.equal(network(other), expected)
    assert feature_layers(network, one, least_pixels=10**6) == layers[:1]


@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_layers_become_random_from_the_head_on_until_nothing_is_left(name):
    build = partial(build_network, name, in_channels=1, out_channels=2, **NETWORKS[name])
    trained = build().eval()
    for module in trained.modules():  # batch norms as if trained
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(0.3)
            module.bias.data.fill_(0.2)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    changed_before, is_head = set(), True
    for _, (network,) in randomised_networks([trained], build, seed=3):
        state = network.state_dict()
        changed = {name for name in state if not torch.equal(state[name], before[name])}
        assert changed > changed_before
        if is_head:
            assert all(name.startswith(HEAD) for name in changed)
        changed_before, is_head = changed, False
    weights = {name for name, tensor in before.items() if tensor.ndim == 4}
    assert weights <= changed_before
    assert all(torch.equal(before[name], t) for name, t in trained.state_dict().items())


# ---- checks


@dataclass(frozen=True, slots=True, kw_only=True)
class Brightness(Method):
    """A fraud that never asks the network."""

    def __call__(self, score, image, seed):
        return image[0].numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice(Method):
    """A fraud that draws its maps."""

    def __call__(self, score, image, seed):
        return np.random.default_rng(seed).random(image.shape[-2:]).astype(np.float32)


def checked(methods, *networks):
    """Return the checks of the methods on a picture."""
    networks = list(networks or [bright_squares.network()])
    image = image_of(bright_squares.picture()[0])
    maps = {name: method(Score(networks, DATA, 1), image, 0) for name, method in methods.items()}
    checker = Checker(
        networks=networks,
        build=partial(build_images, bright_squares.recipe()),
        data=DATA,
        methods=methods,
        seed=0,
        progress=lambda fraction: None,
    )
    return checker.check([Explained(image.numpy(), 1, maps)])[0]


def doubts(check):
    return doubts_of(check.by_layer, check.seeds)


def test_a_map_that_ignores_the_network_and_one_that_is_drawn_are_found_out():
    checks = checked({"brightness": Brightness(), "dice": Dice()})
    assert [layer for layer, _ in checks["brightness"].by_layer] == ["head", "blocks.0"]
    assert all(ssim == pytest.approx(1) for _, ssim in checks["brightness"].by_layer)
    assert "all layers are random" in doubts(checks["brightness"])
    assert checks["brightness"].seeds > 0.9
    assert "between seeds" in doubts(checks["dice"])


def test_random_weights_change_the_map_of_every_method_and_other_seeds_do_not():
    checks = checked({name: method_named(name) for name in METHODS})
    for name, check in checks.items():
        ssim = [value for _, value in check.by_layer]
        assert min(value for value in ssim if value is not None) < 0.9, name
        assert check.seeds > 0.5 and check.networks is None, name


def test_equal_networks_of_an_ensemble_agree_and_others_do_not():
    methods = {"gradcam": method_named("gradcam")}
    one = bright_squares.network()
    assert checked(methods, one, one)["gradcam"].networks == pytest.approx(1)
    other = bright_squares.network()
    with torch.no_grad():
        other.get_submodule("head").weight[1] = 0
        other.get_submodule("head").weight[1, 1] = 100.0  # a channel that is zero
        other.get_submodule("blocks.0.1").bias[1] = 1.0  # but for its bias
    assert checked(methods, one, other)["gradcam"].networks < 0.9


def test_the_noise_is_small_and_its_seed_repeats_it():
    image = image_of(bright_squares.picture()[0])
    noise = with_noise(image, 5) - image
    assert float(noise.std()) == pytest.approx(0.01 * float(image.std()), rel=0.1)
    assert torch.equal(with_noise(image, 5), with_noise(image, 5))
    assert not torch.equal(with_noise(image, 5), with_noise(image, 6))


def test_more_samples_make_lime_more_repeatable():
    image, score = image_of(bright_squares.picture()[0]), score_of()

    def repeatability(samples):
        lime = Lime(superpixels=32, samples=samples)
        first, second = (lime(score, image, seed) for seed in (1, 2))
        return map_similarity(first, second)

    assert repeatability(400) > repeatability(40)


def test_without_captum_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(EnvironmentProblem, match="captum") as refused:
        load_captum()
    assert "volseg[explain]" in refused.value.fix and "\n" not in str(refused.value)
