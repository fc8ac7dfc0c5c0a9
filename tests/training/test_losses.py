import re

import pytest
import torch
from laws import assert_is_a_row
from monai.losses import DiceCELoss, GeneralizedDiceLoss, TverskyLoss

from volseg.errors import VolsegError
from volseg.recipe import Loss
from volseg.training.losses import (
    IGNORED,
    OVERLAPS,
    VOXEL_TERMS,
    SegmentationLoss,
    make_terms,
)

SHAPE = (6, 7, 8)
MONAI = {"to_onehot_y": True, "softmax": True, "include_background": False, "batch": True}


def problem(n=2, classes=4, seed=0):
    """Return random logits, and class indices with one label only in the first patch."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((n, classes, *SHAPE), generator=generator)
    target = torch.randint(0, classes, (n, *SHAPE), generator=generator)
    target[1:][target[1:] == classes - 1] = 0
    return logits, target.to(torch.uint8)


def confident(target, classes, size=20.0):
    return (
        torch.nn.functional.one_hot(target.long(), classes).movedim(-1, 1).float() * 2 - 1
    ) * size


def loss_of(logits, target, **settings):
    names = [name for name in ("class_weights", "regions") if name in settings]
    data = {name: settings.pop(name) for name in names}
    return SegmentationLoss(Loss(**settings), **data)(logits, target)


TERMS = [
    {"overlap": overlap, "voxel": voxel}
    for overlap in OVERLAPS
    for voxel in VOXEL_TERMS
    if (overlap, voxel) != ("none", "none")
]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms.values()))
@pytest.mark.parametrize("regions", [None, [(1, 2, 3), (2, 3), (3,)]])
def test_laws_of_every_loss(terms, regions):
    """Any two terms of the tables: their author need not touch this file."""
    classes = 4 if regions is None else 3
    logits, target = problem(classes=4)
    logits = logits[:, :classes].clone().requires_grad_()
    loss = loss_of(logits, target, regions=regions, **terms)
    loss.backward()
    loss = loss.detach()
    assert loss.ndim == 0 and float(loss) >= 0
    assert bool(logits.grad.isfinite().all()) and float(logits.grad.abs().max()) > 0
    if regions is None:
        right = confident(target, 4)
    else:
        inside = [torch.isin(target, torch.tensor(region)) for region in regions]
        right = torch.stack(inside, dim=1).float() * 40 - 20
    best, worst = (float(loss_of(x, target, regions=regions, **terms)) for x in (right, -right))
    assert 0 <= best < float(loss) < worst
    order = torch.randperm(target[0].numel(), generator=torch.Generator().manual_seed(0))
    voxels = logits.detach().flatten(2)[:, :, order].reshape(logits.shape)
    labels = target.flatten(1)[:, order].reshape(target.shape)
    again = float(loss_of(voxels, labels, regions=regions, **terms))
    assert again == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("name, row", [*OVERLAPS.items(), *VOXEL_TERMS.items()])
def test_every_term_is_a_frozen_dataclass(name, row):
    assert_is_a_row(row)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"overlap": "dise"}, "did you mean 'dice'?"),
        ({"voxel": "focal"}, "cross_entropy"),
        ({"tversky_fp": 0.3}, "tversky_fp_weight"),
        ({"overlap": "tversky", "tversky_fp_weight": 0}, "greater than 0"),
        ({"focal_gamma": "2"}, "valid number"),
        ({"overlap": "none", "voxel": "none"}, "neither"),
    ],
)
def test_a_misspelt_term_or_setting_is_refused_with_the_known_ones(settings, expected):
    with pytest.raises(VolsegError, match=re.escape(expected)) as caught:
        make_terms(Loss(**settings))
    assert caught.value.code == "E_RECIPE" and "train.loss" in caught.value.problem


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_confident_correct_logits_cost_nothing_and_wrong_ones_much(overlap, focal_gamma):
    _, target = problem()
    right = confident(target, 4)
    assert float(loss_of(right, target, overlap=overlap, focal_gamma=focal_gamma)) == pytest.approx(
        0, abs=1e-3
    )
    assert float(loss_of(-right, target, overlap=overlap, focal_gamma=focal_gamma)) > 5


def test_dice_and_cross_entropy_are_those_of_monai():
    logits, target = problem()
    weights = [0.5, 1.0, 2.0, 3.0]
    expected = DiceCELoss(**MONAI, weight=torch.tensor(weights))(logits, target[:, None])
    assert float(loss_of(logits, target, class_weights=weights)) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_tversky_and_generalised_dice_are_those_of_monai():
    logits, target = problem()
    voxels = float(loss_of(logits, target, overlap="none"))
    tversky = float(TverskyLoss(**MONAI, alpha=0.3, beta=0.7)(logits, target[:, None]))
    assert float(loss_of(logits, target, overlap="tversky")) == pytest.approx(
        voxels + tversky, rel=1e-4
    )
    generalised = float(GeneralizedDiceLoss(**MONAI)(logits, target[:, None]))
    assert float(loss_of(logits, target, overlap="generalised_dice")) == pytest.approx(
        voxels + generalised, rel=1e-4
    )


def test_label_smoothing_is_that_of_torch():
    logits, target = problem()
    expected = torch.nn.functional.cross_entropy(logits, target.long(), label_smoothing=0.1)
    assert float(loss_of(logits, target, overlap="none", label_smoothing=0.1)) == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("regions", [None, [(1, 2), (2,), (1,), (3,)]])
def test_ignored_voxels_change_neither_the_loss_nor_its_gradient(overlap, regions):
    logits, target = problem()
    target[:, 2:4] = IGNORED
    logits.requires_grad_()
    loss = loss_of(logits, target, overlap=overlap, regions=regions)
    loss.backward()
    assert float(logits.grad[:, :, 2:4].abs().max()) == 0
    assert float(logits.grad[:, :, :2].abs().max()) > 0
    changed = logits.detach().clone()
    changed[:, :, 2:4] += 100 * torch.randn(changed[:, :, 2:4].shape)
    assert float(loss_of(changed, target, overlap=overlap, regions=regions)) == pytest.approx(
        loss.item(), rel=1e-6
    )


def test_a_wholly_ignored_batch_has_a_finite_loss():
    logits, target = problem()
    assert torch.isfinite(loss_of(logits, torch.full_like(target, IGNORED)))


def test_a_patch_without_lesion_does_not_count_as_a_failure_of_the_batch():
    target = torch.zeros((2, *SHAPE), dtype=torch.uint8)
    target[0, 2:4, 2:4, 2:4] = 1
    assert float(loss_of(confident(target, 2), target)) == pytest.approx(0, abs=1e-3)


def test_regions_may_overlap_and_each_has_its_own_loss():
    _, target = problem(classes=4)
    regions = [(1, 2, 3), (1, 3), (3,)]
    right = torch.stack(
        [torch.isin(target, torch.tensor(region)).float() * 40 - 20 for region in regions], dim=1
    )
    assert float(loss_of(right, target, regions=regions)) == pytest.approx(0, abs=1e-3)
    wrong_core = right.clone()
    wrong_core[:, 1] *= -1
    assert float(loss_of(wrong_core, target, regions=regions)) > 1


def test_generalised_dice_without_one_label_still_uses_the_others():
    target = torch.zeros((1, *SHAPE), dtype=torch.uint8)
    target[0, :4] = 1
    right, wrong = confident(target, 3), confident(torch.zeros_like(target), 3)
    assert float(loss_of(right, target, overlap="generalised_dice")) == pytest.approx(0, abs=1e-3)
    assert float(loss_of(wrong, target, overlap="generalised_dice")) > 1


def test_deep_supervision_is_a_mean_that_halves_with_each_depth():
    logits, target = problem()
    other, _ = problem(seed=1)
    alone = [float(loss_of(output, target)) for output in (logits, other)]
    both = float(loss_of(torch.stack([logits, other], dim=1), target))
    assert both == pytest.approx((alone[0] + 0.5 * alone[1]) / 1.5, rel=1e-6)


def test_the_focal_term_downweights_correct_voxels():
    logits, target = problem()
    plain, focal = (
        float(loss_of(logits, target, overlap="none", focal_gamma=gamma)) for gamma in (0.0, 2.0)
    )
    right = torch.nn.functional.cross_entropy(logits, target.long(), reduction="none")
    assert focal == pytest.approx(float((right * (1 - torch.exp(-right)) ** 2).mean()), rel=1e-5)
    assert focal < plain
