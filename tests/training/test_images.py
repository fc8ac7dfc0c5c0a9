"""Laws of the training of 2D classifiers: augmentation, mixing, losses, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from volseg.errors import VolsegError
from volseg.io.prepared_images import ImageSet, PreparedImage
from volseg.recipe.classification import ClassifyRecipe, ImageAugment, ImageLoss
from volseg.training.image_augment import augment_images, jitter_mask, mix_up
from volseg.training.image_batches import ImageBatches, class_weights
from volseg.training.image_losses import LOSSES, ImageCriterion, make_loss
from volseg.training.images import ImageObjective, Taught

NONE = ImageAugment(
    flip_axes=(),
    spatial_probability=0,
    brightness_probability=0,
    contrast_probability=0,
    noise_probability=0,
)
ALL = ImageAugment(
    flip_axes=("horizontal", "vertical"),
    spatial_probability=1,
    brightness_probability=1,
    contrast_probability=1,
    noise_probability=1,
    cutout_probability=1,
)


def images(n=6, channels=1, edge=20, seed=0):
    return torch.rand(n, channels, edge, edge, generator=torch.Generator().manual_seed(seed))


def image_set(targets, edge=8):
    rng = np.random.default_rng(0)
    cases = [
        PreparedImage(id=str(n), patient=str(n), group=str(n), split="train", target=t, cells={})
        for n, t in enumerate(targets)
    ]
    return ImageSet(rng.normal(size=(len(cases), 1, edge, edge)).astype(np.float32), cases)


def recipe(**train):
    content = {
        "task": "classify",
        "name": "r",
        "description": "",
        "data": {"target": "t", "kind": "classes", "classes": ["a", "b"], "mean": 0, "sd": 1},
        "images": {"pixels": 8, "channels": 1},
        "network": {"name": "cnn_small", "features": (4, 8)},
        "train": {
            "batch_size": 4,
            "steps_per_epoch": 3,
            "epochs": 2,
            "learning_rate": 0.01,
            "balance": "none",
            "monitor": "auc",
            "loss": {"name": "cross_entropy"},
        }
        | train,
    }
    return ClassifyRecipe.model_validate(content)


# ---- augmentation


def test_without_changes_an_image_stays_and_with_all_of_them_it_does_not():
    batch = images()
    seeds = [(0, 0, n) for n in range(len(batch))]
    assert torch.equal(augment_images(batch, NONE, seeds), batch)
    changed = augment_images(batch, ALL, seeds)
    assert not any(torch.equal(a, b) for a, b in zip(changed, batch, strict=True))
    assert torch.isfinite(changed).all()


def test_an_image_depends_on_its_own_seed_alone():
    batch = images()
    seeds = [(7, 3, n) for n in range(len(batch))]
    together = augment_images(batch, ALL, seeds)
    alone = torch.cat([augment_images(batch[n : n + 1], ALL, [seeds[n]]) for n in range(6)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_a_rotation_turns_a_square_on_an_image_that_is_not_square_without_changing_its_area():
    settings = NONE.model_copy(
        update={
            "spatial_probability": 1.0,
            "rotation_degrees": 45,
            "shift": 0.0,
            "shear_degrees": 0,
            "zoom": (1.0, 1.0),
        }
    )
    image = torch.zeros(1, 1, 60, 120)
    image[..., 20:40, 50:70] = 1
    for seed in range(8):
        turned = augment_images(image, settings, [(seed,)])
        assert float(turned.sum()) == pytest.approx(400, rel=0.02)


def test_each_axis_is_flipped_for_half_of_the_images():
    settings = NONE.model_copy(update={"flip_axes": ("vertical",)})
    batch = images(200, edge=4)
    flipped = augment_images(batch, settings, [(0, 0, n) for n in range(200)])
    is_flipped = [torch.equal(a, b.flip(1)) for a, b in zip(flipped, batch, strict=True)]
    is_same = [torch.equal(a, b) for a, b in zip(flipped, batch, strict=True)]
    assert all(a != b for a, b in zip(is_flipped, is_same, strict=True))
    assert 70 < sum(is_flipped) < 130


def test_mixing_blends_images_and_targets_alike():
    batch, targets = images(8), torch.eye(8)
    mixed, blended = mix_up(batch, targets, 0.4, (1, 2))
    assert torch.allclose(blended.sum(1), torch.ones(8))
    assert torch.allclose(mixed.flatten(1), blended @ batch.flatten(1), atol=1e-6)
    same, unchanged = mix_up(batch, targets, 0.0, (1, 2))
    assert torch.equal(same, batch) and torch.equal(unchanged, targets)


# ---- losses


def test_cross_entropy_is_that_of_torch_with_smoothing_and_weights():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 3, generator=generator)
    classes = torch.randint(3, (30,), generator=generator)
    targets = functional.one_hot(classes, 3).float()
    weights = [0.5, 1.0, 2.5]
    for smoothing in (0.0, 0.1):
        settings = ImageLoss.model_validate({"name": "cross_entropy", "label_smoothing": smoothing})
        ours = ImageCriterion(make_loss(settings, "classes"))(logits, targets)
        theirs = functional.cross_entropy(logits, classes, label_smoothing=smoothing)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    settings = ImageLoss(name="cross_entropy")
    ours = ImageCriterion(make_loss(settings, "classes"), weights)(logits, targets)
    theirs = nn.CrossEntropyLoss(torch.tensor(weights))(logits, classes)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_binary_cross_entropy_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator)
    targets = (torch.rand(20, 4, generator=generator) < 0.3).float()
    settings = ImageLoss(name="binary_cross_entropy")
    ours = ImageCriterion(make_loss(settings, "labels"))(logits, targets)
    theirs = functional.binary_cross_entropy_with_logits(logits, targets)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_least_for_right_outputs_and_has_a_finite_gradient(name):
    kind = LOSSES[name].kinds[0]
    criterion = ImageCriterion(make_loss(ImageLoss(name=name), kind))
    targets = torch.tensor([[1.0], [-2.0]]) if kind == "number" else torch.eye(2)
    right = targets.clone() if kind == "number" else 1000 * (2 * targets - 1)
    assert float(criterion(right, targets)) == pytest.approx(0, abs=1e-6)
    outputs = (-right).requires_grad_()
    loss = criterion(outputs, targets)
    loss.backward()
    assert float(loss.detach()) > 0 and torch.isfinite(outputs.grad).all()


def test_focal_loss_down_weights_what_is_right_already():
    settings = ImageLoss.model_validate({"name": "cross_entropy", "focal_gamma": 2.0})
    focal, plain = (
        make_loss(settings, "classes"),
        make_loss(ImageLoss(name="cross_entropy"), "classes"),
    )
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # one right, one wrong
    ratio = focal.per_output(logits, targets).sum(1) / plain.per_output(logits, targets).sum(1)
    p = float(logits.softmax(1)[0, 0])
    assert ratio.tolist() == pytest.approx([(1 - p) ** 2, p**2], rel=1e-5)


def test_a_loss_that_does_not_fit_the_target_is_refused_by_name():
    with pytest.raises(VolsegError, match="does not fit a target of kind 'number'"):
        make_loss(ImageLoss(name="cross_entropy"), "number")
    with pytest.raises(VolsegError, match="cros_entropy"):
        make_loss(ImageLoss(name="cros_entropy"), "classes")


# ---- batches


def test_a_pass_draws_every_image_once_and_a_batch_depends_on_its_step_alone():
    data = image_set([n % 2 for n in range(10)])
    targets = np.eye(2, dtype=np.float32)[[n % 2 for n in range(10)]]
    batches = ImageBatches(data, targets, recipe(), seed=3, device=torch.device("cpu"))
    drawn = np.concatenate([batches.indices(number) for number in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    again = ImageBatches(data, targets, recipe(), seed=3, device=torch.device("cpu"))
    for (a, b), (c, d) in zip(batches.at(4), again.at(4), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_balanced_sampling_draws_all_classes_equally_often():
    classes = [0] * 18 + [1] * 2
    data, targets = image_set(classes), np.eye(2, dtype=np.float32)[classes]
    settings = recipe(balance="sampling")
    batches = ImageBatches(data, targets, settings, seed=0, device=torch.device("cpu"))
    drawn = np.concatenate([batches.indices(number) for number in range(250)])
    assert targets[drawn].mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.05)
    weights = np.array(class_weights(targets))
    assert weights @ targets.sum(axis=0) == pytest.approx(20)
    assert weights[1] / weights[0] == pytest.approx(9)


# ---- the objective


def test_the_learning_rate_falls_from_the_head_to_the_input_and_the_base_is_frozen_at_first():
    data = image_set([0, 1, 0, 1])
    settings = recipe(layer_decay=0.5, freeze_epochs=2)
    objective = ImageObjective(data, data, settings, starts_trained=True)
    network = objective.network()
    groups = objective.groups(network)
    assert [group.factor for group in groups] == [0.5**depth for depth in range(len(groups))]
    assert set(groups[0].names) == {"head.weight", "head.bias"}
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    for step, n_trained in ((0, 2), (5, 2), (6, len(names))):
        objective.prepare(network, step)
        assert sum(parameter.requires_grad for parameter in network.parameters()) == n_trained
    untrained = ImageObjective(data, data, settings)
    assert {group.factor for group in untrained.groups(network)} == {1.0}


@pytest.mark.parametrize("balance", ["none", "sampling"])
def test_each_image_is_followed_by_what_the_teacher_said_of_it(balance):
    targets = [0, 1, 1, 1, 1, 0]
    data, settings = image_set(targets), recipe(balance=balance)
    answers = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    objective = ImageObjective(data, data, settings, taught=Taught(answers, "teacher"))
    plain = ImageObjective(data, data, settings)
    assert objective.identity() != plain.identity()
    both = [o.batches(0, torch.device("cpu")) for o in (objective, plain)]
    for step in range(4):
        (images, rows), (same_images, same_rows) = (batches.at(step)[0] for batches in both)
        assert torch.equal(images, same_images) and torch.equal(rows[:, :2], same_rows)
        np.testing.assert_array_equal(rows[:, 2:], answers[both[0].indices(step)])
    # With the teacher's own outputs, what is left of the loss is that of the targets.
    rows = torch.cat([torch.eye(2)[targets], torch.from_numpy(answers)], dim=1)
    outputs = [torch.from_numpy(answers), -torch.from_numpy(answers)]
    imitating, opposing = (objective.loss(None)(output, rows) for output in outputs)
    assert imitating < opposing


DISC = (np.hypot(*(np.indices((40, 40)) - 19.5)) <= 9).astype(np.float32)


def test_a_jittered_mask_stays_within_the_stated_distance_of_its_outline():
    """Witness: all discs of radius 9 ± 2·2 pixels, as a shift of √2·2 adds to a growth of 2."""
    most, radius = 2.0, np.hypot(*(np.indices((40, 40)) - 19.5))
    areas = []
    for seed in range(40):
        jittered = jitter_mask(DISC, most, np.random.default_rng(seed))
        reach = most + most * 2**0.5 + 1
        assert (jittered[radius < 9 - reach] == 1).all()
        assert (jittered[radius > 9 + reach] == 0).all()
        areas.append(jittered.sum())
        rows, columns = np.indices(jittered.shape) - 19.5
        centre = [(axis * jittered).sum() / jittered.sum() for axis in (rows, columns)]
        assert np.abs(centre).max() <= most + 0.1
    assert min(areas) < 0.75 * DISC.sum() < DISC.sum() < 1.25 * DISC.sum() < max(areas)


def test_a_mask_that_would_vanish_and_one_that_is_empty_stay():
    dot = np.zeros((20, 20), np.float32)
    dot[9, 9] = 1
    for seed in range(20):
        assert jitter_mask(dot, 3.0, np.random.default_rng(seed)).max() >= 0.5
    empty = np.zeros((20, 20), np.float32)
    assert jitter_mask(empty, 3.0, np.random.default_rng(0)) is empty


def test_jitter_changes_only_the_mask_and_is_seeded():
    batch = torch.from_numpy(np.stack([[DISC * 3, DISC]] * 4))
    settings = NONE.model_copy(update={"mask_jitter_mm": 4.0})
    seeds = [(0, 0, n) for n in range(4)]
    first, again = (augment_images(batch, settings, seeds, mask_pixel_mm=2.0) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, 0], batch[:, 0])
    assert len({image[1].numpy().tobytes() for image in first}) == 4
    direct = jitter_mask(DISC, 2.0, np.random.default_rng([0, 0, 2, 5]))
    np.testing.assert_array_equal(first[2, 1].numpy(), direct)


def test_intensities_change_but_not_the_values_of_a_mask():
    batch = torch.from_numpy(np.stack([[DISC * 3, DISC]] * 8))
    settings = NONE.model_copy(
        update={
            "brightness_probability": 1.0,
            "contrast_probability": 1.0,
            "noise_probability": 1.0,
        }
    )
    changed = augment_images(batch, settings, [(n,) for n in range(8)], mask_pixel_mm=1.0)
    assert torch.equal(changed[:, 1], batch[:, 1])
    assert not torch.equal(changed[:, 0], batch[:, 0])
