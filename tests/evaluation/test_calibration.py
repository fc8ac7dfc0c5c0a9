from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from volseg.evaluation.calibration import (
    apply_temperature,
    calibration_error,
    case_briers,
    case_log_losses,
    equal_mass_bins,
    error_if_calibrated,
    fit_temperature,
    one_hot,
    reliability,
    shift_prior,
)


def simulated(seed, *, n=4000, k=3, temperature=1.0):
    """Return logits whose softmax at `temperature` is the true probability, and drawn classes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, k))
    p = apply_temperature(logits, temperature)
    targets = (rng.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=k - 1)
    return logits, targets


def mean_loss(logits, targets, temperature):
    p = apply_temperature(logits, temperature, multilabel=targets.ndim == 2)
    truth = one_hot(targets, logits.shape[1])
    return case_log_losses(p, truth, multilabel=targets.ndim == 2).mean()


def test_log_loss_and_brier_equal_scikit_learn_also_at_0_and_1():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(1, 40)), int(rng.integers(2, 5))
        p = rng.integers(0, 4, (n, k)).astype(float)
        p[:, 0] += p.sum(axis=1) == 0
        p, targets = p / p.sum(axis=1, keepdims=True), rng.integers(0, k, n)
        truth, labels = one_hot(targets, k), np.arange(k)
        loss = case_log_losses(p, truth, multilabel=False).mean()
        assert loss == pytest.approx(log_loss(targets, p, labels=labels), abs=1e-9)
        brier = case_briers(p, truth, multilabel=False).mean()
        expected = brier_score_loss(targets, p, labels=labels, scale_by_half=True)
        assert brier == pytest.approx(expected, abs=1e-9)


def test_points_of_two_classes_without_ties_equal_scikit_learn():
    rng = np.random.default_rng(1)
    p, is_true = rng.random(200), rng.random(200) < 0.4
    points = reliability(p, is_true, n_bins=8)
    observed, predicted = calibration_curve(is_true, p, n_bins=8, strategy="quantile")
    np.testing.assert_allclose(points.observed, observed, atol=1e-9)
    np.testing.assert_allclose(points.predicted, predicted, atol=1e-9)
    assert points.n.tolist() == [25] * 8


def test_bins_depend_on_no_order_and_keep_ties_together():
    rng = np.random.default_rng(2)
    values = rng.integers(0, 6, 97) / 6
    bins, order = equal_mass_bins(values), rng.permutation(97)
    assert (equal_mass_bins(values[order]) == bins[order]).all()
    for value in set(values):
        assert len(set(bins[values == value])) == 1
    assert set(bins) == set(range(bins.max() + 1))
    assert set(equal_mass_bins(np.full(30, 0.5))) == {0}
    assert equal_mass_bins(np.array([0.1, 0.9])).tolist() == [0, 0]  # too few for two bins


def test_the_error_of_a_constant_guess_is_its_distance_from_the_frequency():
    targets = np.array([0] * 30 + [1] * 70)
    p = np.tile([0.1, 0.9], (100, 1))
    assert calibration_error(p, targets) == pytest.approx(0.2)
    assert calibration_error(np.tile([0.3, 0.7], (100, 1)), targets) == pytest.approx(0)
    labels = np.stack([targets == 1, targets == 0], axis=1)
    assert calibration_error(p, labels) == pytest.approx(((0.7 - 0.1) + (0.9 - 0.3)) / 2)


def test_calibrated_probabilities_have_the_error_that_is_expected_of_them():
    logits, targets = simulated(3)
    p = apply_temperature(logits, 1.0)
    expected = error_if_calibrated(p, targets)
    assert 0 < expected < 0.02
    assert calibration_error(p, targets) < 2 * expected
    too_sure = apply_temperature(logits, 0.4)
    assert calibration_error(too_sure, targets) > 3 * error_if_calibrated(too_sure, targets)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_a_temperature_is_recovered(temperature):
    logits, targets = simulated(4, temperature=temperature)
    assert fit_temperature(logits, targets) == pytest.approx(temperature, rel=0.06)


def test_probabilities_are_made_more_extreme_only_on_evidence():
    fits = [fit_temperature(*simulated(seed, n=300)) for seed in range(200)]
    assert sum(t < 1 for t in fits) <= 10  # by chance in 2.5 %; without the rule, in half of them
    assert sum(t > 1 for t in fits) >= 80
    too_careful = [fit_temperature(*simulated(s, n=300, temperature=0.6)) for s in range(50)]
    assert sum(t < 1 for t in too_careful) >= 45


def test_the_temperature_of_several_labels_is_recovered():
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (3000, 3))
    targets = rng.random((3000, 3)) < 1 / (1 + np.exp(-logits / 2.5))
    assert fit_temperature(logits, targets) == pytest.approx(2.5, rel=0.06)


def test_the_log_loss_is_never_worse_and_no_prediction_changes():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(1, 30)), int(rng.integers(2, 4))
        logits = rng.normal(0, rng.choice([0.1, 1, 30]), (n, k))
        targets = rng.random((n, k)) < 0.5 if seed % 3 == 0 else rng.integers(0, k, n)
        t = fit_temperature(logits, targets)
        assert mean_loss(logits, targets, t) <= mean_loss(logits, targets, 1.0)
        assert (apply_temperature(logits, t).argmax(axis=1) == logits.argmax(axis=1)).all()


def test_the_temperature_is_the_best_of_a_fine_grid():
    logits, targets = simulated(6, n=600, temperature=2.2)
    t = fit_temperature(logits, targets)
    grid = np.geomspace(0.1, 10, 400)
    best = min(mean_loss(logits, targets, value) for value in grid)
    assert mean_loss(logits, targets, t) <= best + 1e-5


def test_cases_without_a_mistake_do_not_make_the_network_certain():
    logits = np.array([[2.0, 0.0], [0.0, 2.0]] * 20)
    targets = np.array([0, 1] * 20)
    assert 0.2 < fit_temperature(logits, targets) < 1


def test_probabilities_do_not_overflow():
    logits = np.array([[1000.0, -1000.0]])
    assert apply_temperature(logits, 1.0).tolist() == [[1.0, 0.0]]
    assert apply_temperature(logits, 1.0, multilabel=True).tolist() == [[1.0, 0.0]]


def test_a_shifted_prior_is_bayes_rule():
    """Two normal densities: the posterior at another prior is known in closed form."""
    x = np.linspace(-3, 3, 50)
    likelihood = np.stack([np.exp(-((x + 1) ** 2) / 2), np.exp(-((x - 1) ** 2) / 2)], axis=1)

    def posterior(prior):
        joint = likelihood * prior
        return joint / joint.sum(axis=1, keepdims=True)

    before, after = np.array([0.3, 0.7]), np.array([0.9, 0.1])
    shifted = shift_prior(posterior(before), before, after)
    np.testing.assert_allclose(shifted, posterior(after), atol=1e-12)
    np.testing.assert_allclose(shift_prior(shifted, after, before), posterior(before), atol=1e-12)
    np.testing.assert_allclose(shift_prior(shifted, after, after), shifted, atol=1e-12)


@pytest.mark.parametrize("prior", [[0.0, 1.0], [np.nan, 1], [0.2, 0.3, 0.5]])
def test_bad_priors_are_refused(prior):
    with pytest.raises(ValueError, match="frequencies above 0"):
        shift_prior(np.array([[0.5, 0.5]]), [0.5, 0.5], prior)
