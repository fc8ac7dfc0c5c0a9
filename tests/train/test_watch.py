import time

import numpy as np
import pytest
import torch

from volseg.bundle import load_bundle
from volseg.evaluate.validation import ValidationRow, mean_dice
from volseg.io.prepared import PreparedCase
from volseg.train.watch import LARGEST_RESERVE, Watch


@pytest.fixture
def watching(model, tiny_recipe):
    """A watch of five cases, of which the recipe watches three, with a budget in seconds."""
    bundle = load_bundle(model)
    mask = np.zeros((30, 24, 20), np.uint8)
    mask[10:20, 8:16, 6:14] = 1
    image = np.where(mask, 3.0, 0.0).astype(np.float32)[None]
    cases = [PreparedCase(f"case_{n}", image, mask, {}, None, {}) for n in range(5)]
    recipe = tiny_recipe.model_copy(
        update={"train": tiny_recipe.train.model_copy(update={"validation_cases": 3})}
    )

    def make(seconds):
        return Watch(cases, recipe, bundle.plan, torch.device("cpu"), seconds), bundle.weights[
            "segmentation"
        ]

    return make


def seen(rows):
    return [row.case_id for row in rows]


def test_without_a_budget_every_epoch_is_looked_at(watching):
    watch, weights = watching(None)
    assert seen(watch.look(weights)) == ["case_0", "case_2", "case_4"]
    assert len(watch.validate(weights)) == 5
    assert watch.is_due(0.0) and watch.reserve == 0 and watch.compares_last


def test_with_a_budget_looks_wait_until_training_has_earned_them(watching):
    watch, weights = watching(1e6)
    assert not watch.is_due(0.0)
    assert watch.is_due(1e5)
    assert seen(watch.look(weights)) == ["case_0", "case_2", "case_4"]
    assert not watch.is_due(0.0)
    assert 0 < watch.reserve < 1e4 and watch.compares_last
    assert [watch.is_due(1e-5), watch.is_due(1e5)] == [False, True]  # what was trained adds up


def test_with_a_budget_too_small_for_it_one_case_is_watched_and_half_of_the_time_is_kept_at_most(
    watching,
):
    watch, weights = watching(1e-4)
    assert len(watch.look(weights)) == 1
    assert watch.reserve == LARGEST_RESERVE * 1e-4
    assert not watch.compares_last


def test_no_case_is_begun_after_the_time_is_over_and_what_was_seen_counts(watching):
    watch, weights = watching(1e6)
    assert watch.look(weights, until=0.0) == []
    assert watch.validate(weights, until=0.0) == []
    assert seen(watch.validate(weights, until=time.monotonic() + 1e3)) == [
        f"case_{n}" for n in range(5)
    ]
    began = time.monotonic()
    watch.validate(weights)
    partly = watch.validate(weights, until=time.monotonic() + 0.5 * (time.monotonic() - began))
    assert seen(partly) == sorted(seen(partly))


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.8, 0.6], 0.7),
        ([0.8, np.nan, np.nan], 0.8),
        ([0.8, 0.0, np.nan], 0.4),
        ([np.nan, np.nan], 1.0),
    ],
)
def test_a_scan_without_a_lesion_in_which_none_is_found_is_no_merit(dice, expected):
    rows = [
        ValidationRow(
            case_id=str(n), patient=str(n), fold=0, label=1, label_name="x", dice=value,
            reference_volume_ml=0.0, predicted_volume_ml=0.0,
        )
        for n, value in enumerate(dice)
    ]  # fmt: skip
    assert mean_dice(rows) == pytest.approx(expected)
