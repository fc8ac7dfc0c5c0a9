"""Self-supervision: views keep the image's content, and the loss cannot be had by collapsing."""

from __future__ import annotations

import math

import pytest
import torch

from volseg.networks.cnn_small import Settings
from volseg.training.pretrain import SimSiam, Views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def method(seed=0, **settings) -> SimSiam:
    torch.manual_seed(seed)
    small = {"features": (8, 16), "convolutions": 1, "block_dropout": 0.0} | settings
    return SimSiam(Settings(**small).build(1, 2), width=32)


def blobs(n=32, pixels=16, seed=0):
    """Images (n, 1, pixels, pixels) with one bright disc each, of its own size and brightness."""
    numbers = torch.rand(2, n, 1, 1, 1, generator=generator(seed))
    axis = torch.arange(pixels) - (pixels - 1) / 2
    distance = torch.hypot(axis[:, None], axis[None, :])
    return (distance < 2 + 5 * numbers[0]) * (1 + 2 * numbers[1]) - 0.5


UNCHANGED = {"crop": 1.0, "rotation_degrees": 0.0, "mirror": False, "contrast": 1.0}
UNCHANGED |= {"brightness": 0.0, "blur_probability": 0.0, "noise_sd": 0.0}


def test_views_without_a_change_are_the_images():
    images = torch.randn(3, 2, 12, 18)
    views = Views(**UNCHANGED)(images, generator())
    torch.testing.assert_close(views, images, atol=1e-5, rtol=1e-5)


def test_views_depend_on_the_seed_alone_and_leave_the_images():
    images = torch.randn(4, 1, 16, 16)
    before = images.clone()
    first, again, other = (Views()(images, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(images, before)
    assert torch.equal(first, again)
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in zip(first, other, strict=True))
    assert first.shape == images.shape and bool(first.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        ({"mirror": True}, lambda view, image: image.flip(-1)),
        ({"brightness": 2.0}, lambda view, image: image + (view - image).mean()),
        (
            {"contrast": 3.0},
            lambda view, image: image * (view * image).sum() / image.square().sum(),
        ),
    ],
)
def test_each_change_does_what_its_name_says(settings, law):
    image = torch.randn(1, 1, 8, 8, generator=generator())
    changed = 0
    for seed in range(12):
        view = Views(**UNCHANGED | settings)(image, generator(seed))
        if not torch.allclose(view, image, atol=1e-4):
            torch.testing.assert_close(view, law(view, image), atol=1e-4, rtol=1e-4)
            changed += 1
    assert changed >= 3


def test_a_rotated_disc_is_the_same_disc_and_a_crop_enlarges_it():
    disc = blobs(1, 33)
    inside = float((disc > 0).float().mean())
    for seed in range(5):
        turned = Views(**UNCHANGED | {"rotation_degrees": 90.0})(disc, generator(seed))
        assert float((turned - disc).abs().mean()) < 0.15
        enlarged = Views(**UNCHANGED | {"crop": 0.8})(disc, generator(seed))
        assert inside * 0.99 <= float((enlarged > 0.25).float().mean()) <= inside / 0.8**2 * 1.3


def test_the_loss_is_symmetric_bounded_and_blind_to_the_order_of_images():
    module = method()
    first, second = (Views()(blobs(), generator(seed)) for seed in (0, 1))
    loss = module(first, second)
    assert -1 <= float(loss.detach()) <= 1
    torch.testing.assert_close(module(second, first), loss)
    order = torch.randperm(len(first))
    torch.testing.assert_close(module(first[order], second[order]), loss)


def test_the_base_learns_and_the_head_does_not():
    module = method()
    module(*(Views()(blobs(), generator(seed)) for seed in (0, 1))).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == name.startswith("network.head."), name


def test_training_brings_views_together_and_keeps_images_apart():
    module, images = method(), blobs(64)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    views, numbers, losses = Views(), generator(), []
    for _ in range(40):
        loss = module(views(images, numbers), views(images, numbers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert module.spread(images) > 0.3


def test_spread_is_0_for_equal_embeddings_and_1_for_random_directions():
    module = method().eval()
    assert module.spread(blobs(1).expand(8, -1, -1, -1)) == pytest.approx(0, abs=1e-5)
    module.network.embed = lambda images: images
    module.projector = torch.nn.Identity()
    directions = torch.randn(4000, 16, generator=generator())
    assert module.spread(directions) == pytest.approx(1, abs=0.02)
    assert math.isfinite(module.spread(directions[:2]))


def test_the_gradient_reaches_the_predicting_side_alone():
    """Both projections are constants where they are predicted, so each has half of the gradient."""
    module = method()
    module.network.embed = lambda views: views
    module.projector = module.predictor = torch.nn.Identity()
    first, second = torch.randn(2, 6, 4, generator=generator()).unbind()
    first.requires_grad_()
    module(first, second).backward()
    alone = first.detach().clone().requires_grad_()
    (-0.5 * torch.nn.functional.cosine_similarity(alone, second).mean()).backward()
    torch.testing.assert_close(first.grad, alone.grad)
