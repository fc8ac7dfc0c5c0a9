import pytest
import torch

from volseg.train.losses import dice_cross_entropy


def test_a_sure_and_right_answer_costs_nothing_and_a_sure_wrong_one_much():
    target = torch.zeros(2, 1, 6, 6, 6, dtype=torch.uint8)
    target[:, :, 2:4, 2:4, 2:4] = 1
    right = torch.cat([1 - target.float(), target.float()], dim=1) * 40 - 20
    loss = dice_cross_entropy()
    assert float(loss(right, target)) == pytest.approx(0, abs=1e-3)
    assert float(loss(-right, target)) > 10


def test_the_loss_of_uniform_logits_is_that_of_the_formula():
    target = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    target[..., :2] = 1
    share, n = 0.5, 64
    dice = 2 * share * n / 2 / (share * n + n / 2)
    expected = (1 - dice) + float(torch.log(torch.tensor(2.0)))
    assert float(dice_cross_entropy()(torch.zeros(1, 2, 4, 4, 4), target)) == pytest.approx(expected, abs=1e-4)


def test_a_patch_without_lesion_does_not_count_as_a_failure_of_the_batch():
    target = torch.zeros(2, 1, 6, 6, 6, dtype=torch.uint8)
    target[0, :, 2:4, 2:4, 2:4] = 1
    right = torch.cat([1 - target.float(), target.float()], dim=1) * 40 - 20
    assert float(dice_cross_entropy()(right, target)) == pytest.approx(0, abs=1e-3)
