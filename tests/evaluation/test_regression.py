from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as oracle

from volseg.evaluation.regression import (
    NumberPredictions,
    conformal_quantile,
    explained_variance,
    interval_half_width,
    number_metrics,
)


def test_every_metric_equals_scikit_learn_with_weights():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 40))
        targets = rng.normal(rng.choice([0, 1e4]), rng.choice([0.1, 10]), n)
        predicted = targets + rng.normal(0, 1, n) * rng.choice([0, 1])
        weights = rng.choice([np.ones(n), rng.random(n)], axis=0) + 0.01
        values = number_metrics(NumberPredictions(predicted, targets), weights[None])
        for name, score in (
            ("mae", oracle.mean_absolute_error),
            ("mse", oracle.mean_squared_error),
            ("rmse", oracle.root_mean_squared_error),
            ("r2", oracle.r2_score),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = score(targets, predicted, sample_weight=weights)
            np.testing.assert_allclose(values[name][0], expected, rtol=1e-9, atol=1e-9)
        bias = np.average(predicted - targets, weights=weights)
        np.testing.assert_allclose(values["bias"][0], bias, atol=1e-9)


def test_the_mean_of_the_truth_has_an_r2_of_0_and_equal_truth_has_none():
    targets = np.array([1.0, 2.0, 6.0])
    assert explained_variance(np.full(3, 3.0), targets) == pytest.approx(0)
    assert explained_variance(targets, targets) == 1
    assert math.isnan(explained_variance(targets, np.full(3, 1e6)))


def test_each_row_of_weights_is_judged_on_its_own():
    rng = np.random.default_rng(0)
    numbers = NumberPredictions(rng.normal(size=20), rng.normal(size=20))
    rows = rng.integers(0, 3, (4, 20)).astype(float)
    together = number_metrics(numbers, rows)
    for name, values in together.items():
        alone = [number_metrics(numbers, row[None])[name][0] for row in rows]
        np.testing.assert_allclose(values, alone, atol=1e-12)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_intervals_cover_new_cases_at_their_rate_whatever_the_distribution(coverage):
    rng, hits, n_calibration, n_studies = np.random.default_rng(1), [], 59, 600
    for _ in range(n_studies):
        errors = rng.standard_t(2, n_calibration + 1) * 5  # heavy tails
        half = interval_half_width(errors[:-1], coverage=coverage)
        hits.append(abs(errors[-1]) <= half)
    # Exactly ⌈60 c⌉ / 60 is expected, which is 0.8, 0.9 and 0.95.
    error = math.sqrt(coverage * (1 - coverage) / n_studies)
    assert abs(np.mean(hits) - coverage) < 3.5 * error


def test_the_rank_of_the_quantile_is_exact():
    for n in range(1, 120):
        scores = np.arange(1.0, n + 1)
        for percent in range(50, 100):
            rank = -(-(n + 1) * percent // 100)
            expected = math.inf if rank > n else float(rank)
            assert conformal_quantile(scores, percent / 100) == expected, (n, percent)


@pytest.mark.parametrize("coverage", [0.0, 1.0, 1.5])
def test_an_impossible_coverage_is_refused(coverage):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        conformal_quantile(np.array([1.0]), coverage)


@pytest.mark.parametrize(
    ("predicted", "targets", "problem"),
    [
        ([1.0], [1.0, 2.0], "one shape"),
        ([], [], "no case"),
        ([np.nan], [1.0], "finite"),
    ],
)
def test_bad_numbers_are_refused(predicted, targets, problem):
    with pytest.raises(ValueError, match=problem):
        NumberPredictions(np.array(predicted), np.array(targets))
