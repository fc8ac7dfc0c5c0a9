from __future__ import annotations

import math

import numpy as np
import pytest

from volseg.evaluation.roc import auc


def by_counting_pairs(scores, positive):
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    return float(np.mean(pairs))


def test_perfect_reversed_and_constant_scores():
    positive = np.array([False, False, True, True, True])
    assert auc(np.array([1, 2, 3, 4, 5]), positive) == 1.0
    assert auc(np.array([5, 4, 3, 2, 1]), positive) == 0.0
    assert auc(np.full(5, 0.3), positive) == 0.5


@pytest.mark.parametrize("n_levels", [2, 5, 1000])  # from almost all ties to almost none
def test_equals_the_count_of_pairs_won(n_levels):
    rng = np.random.default_rng(n_levels)
    for _ in range(20):
        scores, positive = rng.integers(0, n_levels, 40) / n_levels, rng.random(40) < 0.3
        expected = by_counting_pairs(scores, positive)
        assert auc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_laws():
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=60).round(1), rng.random(60) < 0.5
    assert auc(-scores, positive) == pytest.approx(1 - auc(scores, positive))
    assert auc(scores, ~positive) == pytest.approx(1 - auc(scores, positive))
    assert auc(np.exp(scores), positive) == auc(scores, positive)
    order = rng.permutation(60)
    assert auc(scores[order], positive[order]) == auc(scores, positive)


def test_infinite_scores_are_ranked():
    assert auc(np.array([-np.inf, 0, np.inf]), np.array([False, False, True])) == 1.0


@pytest.mark.parametrize("positive", [[], [True, True], [False, False]])
def test_without_both_groups_it_is_nan(positive):
    assert math.isnan(auc(np.arange(len(positive)), np.array(positive, dtype=bool)))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auc(np.array([np.nan, 1]), np.array([True, False]))
    with pytest.raises(ValueError, match="shape"):
        auc(np.array([0.1, 0.2]), np.array([True]))
