"""Pruning and distillation: what must not change, and what must become smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from volseg.commands.image_start import Start
from volseg.errors import VolsegError
from volseg.networks import build_network, copy_weights, unique_tensors
from volseg.networks.image_network import count_multiply_adds
from volseg.networks.vgg import Settings, Vgg
from volseg.recipe.train import Network
from volseg.training.compress import (
    Distillation,
    apply_masks,
    magnitude_masks,
    prune_channels,
)

SMALL = Settings(depth=11, widths=(8, 8, 12, 12, 16, 16, 16, 16))


def vgg() -> Vgg:
    torch.manual_seed(0)
    network = SMALL.build(1, 3)
    assert isinstance(network, Vgg)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, -0.1, 0.1)
    return network.eval()


def logits(network, images):
    with torch.inference_mode():
        return network(images)


# ---- pruning


@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 0.9])
def test_the_smallest_weights_of_the_whole_network_are_zeroed(fraction):
    network = build_network("cnn_small", in_channels=1, out_channels=2, features=(8, 16))
    masks = magnitude_masks(network, fraction)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    removed = torch.cat([before[name][~mask].abs() for name, mask in masks.items()])
    kept = torch.cat([before[name][mask].abs() for name, mask in masks.items()])
    n = len(removed) + len(kept)
    assert len(removed) == int(fraction * n)
    assert not len(removed) or float(removed.max()) <= float(kept.min())
    apply_masks(network, masks)
    for name, parameter in network.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter.detach(), before[name] * mask)
    assert not any(name.startswith("head.") for name in masks)


def test_masked_weights_stay_zero_while_the_others_learn():
    network = vgg().train()
    masks = magnitude_masks(network, 0.5)
    apply_masks(network, masks)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(3):
        network(torch.randn(4, 1, 16, 16)).square().sum().backward()
        optimizer.step()
        apply_masks(network, masks)
    for name, parameter in network.named_parameters():
        if name in masks:
            assert not parameter.detach()[~masks[name]].any()
            assert not torch.equal(parameter.detach(), before[name])


def test_channels_that_give_nothing_are_removed_without_a_difference():
    """Half of each convolution's filters and biases are zero: without them, nothing changes."""
    network = vgg()
    images = torch.randn(2, 1, 32, 32)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            dead = torch.randperm(module.out_channels)[: module.out_channels // 2]
            with torch.no_grad():
                module.weight[dead] = 0
                module.bias[dead] = 0
    pruned = prune_channels(network, SMALL, 0.5)
    assert pruned.settings.widths == tuple(width // 2 for width in (8, 8, 12, 12, 16, 16, 16, 16))
    smaller = copy_weights(pruned.settings.build(1, 3).eval(), pruned.weights)
    torch.testing.assert_close(logits(smaller, images), logits(network, images))


def test_pruned_channels_are_those_of_the_smallest_filters():
    network = vgg()
    first = network.features[0]
    assert isinstance(first, nn.Conv2d)
    norms = first.weight.detach().abs().sum((1, 2, 3))
    kept = sorted(norms.topk(6).indices.tolist())
    pruned = prune_channels(network, SMALL, 0.25)
    assert torch.equal(pruned.weights["features.0.weight"], first.weight.detach()[kept])
    assert pruned.weights["head.weight"].shape == (3, 12)
    unpruned = prune_channels(network, SMALL, 0)
    for name, parameter in network.named_parameters():
        assert torch.equal(unpruned.weights[name], parameter.detach())


def test_half_of_the_channels_are_a_quarter_of_the_operations_of_vgg16():
    counts = []
    for fraction in (0, 0.5):
        network = Settings().build(3, 2)
        assert isinstance(network, Vgg)
        settings = prune_channels(network, Settings(), fraction).settings
        with torch.device("meta"):
            counts.append(count_multiply_adds(settings.build(3, 2), (3, 64, 64)))
    assert counts[1] / counts[0] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_a_whole_network_cannot_be_pruned_away(fraction):
    for prune in (magnitude_masks, lambda n, f: prune_channels(n, SMALL, f)):
        with pytest.raises(VolsegError, match="cannot be pruned"):
            prune(vgg(), fraction)


# ---- distillation

CLASSES = torch.tensor([0, 2, 1, 1])
STUDENT, TEACHER = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()


def test_with_weight_0_the_teacher_does_not_matter_and_with_1_the_targets_do_not():
    supervised = Distillation(weight=0)(STUDENT, TEACHER, CLASSES)
    assert supervised == functional.cross_entropy(STUDENT, CLASSES)
    imitation = Distillation(weight=1)
    assert imitation(STUDENT, TEACHER, CLASSES) == imitation(STUDENT, TEACHER, CLASSES.flip(0))
    half = Distillation(weight=0.5)(STUDENT, TEACHER, CLASSES)
    torch.testing.assert_close(half, (supervised + imitation.imitate(STUDENT, TEACHER)) / 2)


@pytest.mark.parametrize("kind", ["classes", "labels", "number"])
def test_a_student_that_imitates_perfectly_has_no_loss_and_any_other_has(kind):
    loss = Distillation(kind=kind)
    assert abs(float(loss.imitate(TEACHER, TEACHER))) < 1e-6
    shifted = TEACHER + torch.tensor([0.5, -0.5, 0.0])
    assert float(loss.imitate(shifted, TEACHER)) > 1e-3
    student = STUDENT.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss.imitate(student, TEACHER).backward()
        optimizer.step()
    output = {"classes": lambda z: z.softmax(1), "labels": torch.sigmoid, "number": lambda z: z}
    torch.testing.assert_close(
        output[kind](student.detach()), output[kind](TEACHER), atol=0.01, rtol=0
    )


def test_the_divergence_is_that_of_its_definition():
    for t in (1.0, 3.0):
        p, q = (TEACHER / t).softmax(1), (STUDENT / t).softmax(1)
        expected = t**2 * (p * (p / q).log()).sum(1).mean()
        computed = Distillation(temperature=t).imitate(STUDENT, TEACHER)
        torch.testing.assert_close(computed, expected)
        p, q = (TEACHER / t).sigmoid(), (STUDENT / t).sigmoid()
        expected = t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        computed = Distillation(temperature=t, kind="labels").imitate(STUDENT, TEACHER)
        torch.testing.assert_close(computed, expected)


def test_two_labels_of_opposite_logits_are_two_classes():
    """A yes/no label at logit z is a pair of classes at ± z / 2."""
    z_student, z_teacher = STUDENT[:, :1], TEACHER[:, :1]
    pairs = [torch.cat([z / 2, -z / 2], dim=1) for z in (z_student, z_teacher)]
    torch.testing.assert_close(
        Distillation(kind="labels").imitate(z_student, z_teacher), Distillation().imitate(*pairs)
    )


def test_the_teacher_gets_no_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    Distillation()(student, teacher, CLASSES).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"weight": -0.1}, {"weight": 1.1}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(VolsegError, match="distillation with temperature"):
        Distillation(**wrong)


def test_a_pruned_start_keeps_the_colours_of_the_first_layer_whatever_the_order_of_the_file():
    widths = [8, 8, 12, 12, 16, 16, 16, 16]
    section = Network.model_validate({"name": "vgg", "depth": 11, "widths": widths})
    network = build_network("vgg", in_channels=3, out_channels=3, depth=11, widths=widths)
    tensors = dict(reversed(list(unique_tensors(network).items())))
    start = Start(Path("vgg.safetensors"), tensors, network=section)
    kept = start.pruned(0.0).tensors["features.0.weight"]
    assert torch.equal(kept, tensors["features.0.weight"])
