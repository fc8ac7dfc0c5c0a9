import time

import numpy as np
import pytest
import torch

from volseg.bundle import load_bundle
from volseg.evaluation.validation import ValidationRow, mean_dice
from volseg.io.prepared import PreparedCase
from volseg.training.validator import LARGEST_RESERVE, Validator


@pytest.fixture
def make_validator(model, tiny_recipe):
    """Five cases, three of them in the validation subset, and a time budget in seconds."""
    bundle = load_bundle(model)
    mask = np.zeros((30, 24, 20), np.uint8)
    mask[10:20, 8:16, 6:14] = 1
    image = np.where(mask, 3.0, 0.0).astype(np.float32)[None]
    cases = [PreparedCase(f"case_{n}", image, mask, {}, None, {}) for n in range(5)]
    recipe = tiny_recipe.model_copy(
        update={"train": tiny_recipe.train.model_copy(update={"validation_cases": 3})}
    )

    def make(seconds):
        validator = Validator(cases, recipe, torch.device("cpu"), seconds)
        return validator, bundle.weights["segmentation"]

    return make


def ids(rows):
    return [row.case_id for row in rows]


def test_without_a_budget_every_epoch_is_validated(make_validator):
    validator, weights = make_validator(None)
    assert ids(validator.validate_subset(weights)) == ["case_0", "case_2", "case_4"]
    assert len(validator.validate_all(weights)) == 5
    assert validator.due_after(0.0) and validator.reserve == 0 and validator.compares_last


@pytest.mark.slow
def test_with_a_budget_validation_waits_until_training_can_afford_it(make_validator):
    validator, weights = make_validator(1e6)
    assert not validator.due_after(0.0)
    assert validator.due_after(1e5)
    assert ids(validator.validate_subset(weights)) == ["case_0", "case_2", "case_4"]
    assert not validator.due_after(0.0)
    assert 0 < validator.reserve < 1e4 and validator.compares_last
    assert [validator.due_after(1e-5), validator.due_after(1e5)] == [
        False,
        True,
    ]  # training time adds up


@pytest.mark.slow
def test_a_tiny_budget_validates_one_case_and_reserves_a_limited_part(make_validator):
    validator, weights = make_validator(1e-4)
    assert len(validator.validate_subset(weights)) == 1
    assert validator.reserve == LARGEST_RESERVE * 1e-4
    assert not validator.compares_last


@pytest.mark.slow
def test_no_case_starts_after_the_time_limit_and_completed_ones_count(make_validator):
    validator, weights = make_validator(1e6)
    assert validator.validate_subset(weights, until=0.0) == []
    assert validator.validate_all(weights, until=0.0) == []
    assert ids(validator.validate_all(weights, until=time.monotonic() + 1e3)) == [
        f"case_{n}" for n in range(5)
    ]
    began = time.monotonic()
    validator.validate_all(weights)
    partly = validator.validate_all(
        weights, until=time.monotonic() + 0.5 * (time.monotonic() - began)
    )
    assert ids(partly) == sorted(ids(partly))


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.8, 0.6], 0.7),
        ([0.8, np.nan, np.nan], 0.8),
        ([0.8, 0.0, np.nan], 0.4),
        ([np.nan, np.nan], 1.0),
    ],
)
def test_true_negative_scans_do_not_raise_the_mean_dice(dice, expected):
    rows = [
        ValidationRow(
            case_id=str(n), patient=str(n), fold=0, label=1, label_name="x", dice=value,
            reference_volume_ml=0.0, predicted_volume_ml=0.0,
        )
        for n, value in enumerate(dice)
    ]  # fmt: skip
    assert mean_dice(rows) == pytest.approx(expected)
