from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as oracle

from volseg.evaluation.decision import decision_curve, precision_recall_curve, roc_curve
from volseg.evaluation.roc import auc


def random_scores(seed):
    rng = np.random.default_rng(seed)
    n, levels = int(rng.integers(4, 80)), int(rng.choice([3, 10, 1000]))
    positive = rng.random(n) < 0.4
    positive[:2] = True, False
    return rng.integers(0, levels + 1, n) / levels, positive


def test_roc_and_precision_recall_points_equal_scikit_learn():
    for seed in range(100):
        scores, positive = random_scores(seed)
        curve = roc_curve(scores, positive)
        false, true, thresholds = oracle.roc_curve(positive, scores, drop_intermediate=False)
        np.testing.assert_allclose(curve.false_positive_rate, false, atol=1e-12)
        np.testing.assert_allclose(curve.sensitivity, true, atol=1e-12)
        np.testing.assert_allclose(curve.thresholds, thresholds)
        assert curve.area == pytest.approx(auc(scores, positive), abs=1e-12)
        curve = precision_recall_curve(scores, positive)
        precision, recall, _ = oracle.precision_recall_curve(positive, scores)
        np.testing.assert_allclose(curve.precision[::-1], precision[:-1], atol=1e-12)
        np.testing.assert_allclose(curve.recall[::-1], recall[:-1], atol=1e-12)
        assert curve.precision[-1] == pytest.approx(curve.prevalence)


def test_without_both_kinds_there_is_no_curve():
    assert roc_curve(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert roc_curve(np.array([0.1, 0.2]), np.array([False, False])) is None
    assert precision_recall_curve(np.array([0.1, 0.2]), np.array([False, False])) is None


def test_net_benefit_by_counting():
    for seed in range(40):
        p, positive = random_scores(seed)
        curve = decision_curve(p, positive)
        for t, model, everyone in zip(curve.thresholds, curve.model, curve.treat_all):
            acted = p >= t
            harm, n = t / (1 - t), len(p)
            true, false = np.count_nonzero(acted & positive), np.count_nonzero(acted & ~positive)
            assert model == pytest.approx(true / n - false / n * harm, abs=1e-12)
            expected = positive.mean() - (~positive).mean() * harm
            assert everyone == pytest.approx(expected, abs=1e-12)


def test_a_perfect_model_has_the_prevalence_everywhere_and_a_constant_one_no_use():
    positive = np.arange(50) < 15
    perfect = decision_curve(np.where(positive, 1.0, 0.0), positive)
    np.testing.assert_allclose(perfect.model, 0.3)
    assert perfect.useful.all()
    constant = decision_curve(np.full(50, 0.3), positive)
    assert not constant.useful.any()  # below 0.3 it treats all, above 0.3 none


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_without_a_harm_is_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        decision_curve(np.array([0.5]), np.array([True]), np.array([threshold]))
