from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from volseg.evaluation.calibration import apply_temperature
from volseg.evaluation.classes import Value
from volseg.evaluation.conformal import (
    ConformalRule,
    OutlierModel,
    fit_conformal,
    fit_outliers,
    judge_sets,
)

NAMES = ("a", "b", "c")


def draw(rng, n, *, rare=False):
    """Return probabilities of a network that is wrong in its certainty, and true classes."""
    prior = [0.85, 0.1, 0.05] if rare else [1 / 3] * 3
    targets = rng.choice(3, n, p=prior)
    logits = rng.normal(0, 1, (n, 3))
    logits[np.arange(n), targets] += 1.5
    return apply_temperature(logits, 0.3), targets


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_cover_new_cases_at_their_rate(coverage):
    """Over many calibrations of 79 cases, so that the rate is exact but for binomial error."""
    rng, hits, sizes = np.random.default_rng(0), [], []
    for _ in range(400):
        p, targets = draw(rng, 79 + 10)
        rule = fit_conformal(p[:79], targets[:79], coverage=coverage)
        sets = rule.sets(p[79:])
        hits.append(sets[np.arange(10), targets[79:]].mean())
        sizes.append(sets.sum(axis=1).mean())
    error = np.std(hits) / math.sqrt(len(hits))
    assert coverage - 4 * error < np.mean(hits) < coverage + 0.02 + 4 * error
    assert 1 <= np.mean(sizes) < 3


def test_sets_per_class_cover_each_class_also_the_rare_one():
    rng, hits = np.random.default_rng(1), {0: [], 1: [], 2: []}
    for _ in range(60):
        p, targets = draw(rng, 1500, rare=True)
        rule = fit_conformal(p[:1000], targets[:1000], coverage=0.9, per_class=True)
        sets = rule.sets(p[1000:])
        for number in hits:
            hits[number].append(sets[targets[1000:] == number, number].mean())
    for number, rates in hits.items():
        assert abs(np.mean(rates) - 0.9) < 0.025, number


def test_every_set_holds_the_most_probable_class_and_more_coverage_never_removes_one():
    rng = np.random.default_rng(2)
    p, targets = draw(rng, 300)
    earlier = np.zeros((300, 3), bool)
    for coverage in (0.5, 0.8, 0.9, 0.99):
        sets = fit_conformal(p, targets, coverage=coverage).sets(p)
        assert sets[np.arange(300), p.argmax(axis=1)].all()
        assert (sets >= earlier).all()
        earlier = sets
    assert ConformalRule((math.inf,) * 3, 0.9).sets(p).all()


def draw_labels(rng, n):
    """Return probabilities of labels that are common, rare or hard to see, and the truth."""
    truth = rng.random((n, 3)) < (0.6, 0.1, 0.3)
    logits = rng.normal(0, 1, (n, 3)) + truth * (3.0, 2.0, 0.7) - 1
    return 1 / (1 + np.exp(-logits)), truth


def test_each_label_is_in_the_sets_of_its_cases_at_the_stated_rate():
    rng, rates = np.random.default_rng(5), []
    for _ in range(60):
        p, truth = draw_labels(rng, 1500)
        rule = fit_conformal(p[:1000], truth[:1000], coverage=0.9)
        sets = rule.sets(p[1000:])
        rates.append([sets[truth[1000:, k], k].mean() for k in range(3)])
    assert (np.abs(np.mean(rates, axis=0) - 0.9) < 0.02).all(), np.mean(rates, axis=0)
    assert len(set(rule.quantile)) == 3  # each label has its own limit
    # A label that is certainly absent is excluded: the most probable one is not forced in.
    assert not rule.sets(np.zeros((1, 3))).any()
    assert rule.sets(np.ones((1, 3))).all()


def test_a_label_with_too_few_cases_cannot_be_excluded():
    p, truth = draw_labels(np.random.default_rng(6), 200)
    truth[:, 1] = False
    truth[:5, 1] = True
    sets = fit_conformal(p, truth, coverage=0.9).sets(p)
    assert sets[:, 1].all() and not sets[:, 0].all()


def test_what_sets_of_labels_were_worth_is_counted_by_label():
    truth = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]], bool)
    sets = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
    worth = judge_sets(sets, truth, NAMES)
    assert worth.coverage == 3 / 4  # of four labels one is missed
    assert worth.coverage_of_class == {"a": Value(1.0), "b": Value(0.0), "c": Value(1.0)}
    assert worth.single == 0.5 and worth.single_right == Value(0.5)
    assert worth.mean_size == 5 / 4


def test_a_class_with_too_few_cases_is_in_every_set():
    p, targets = draw(np.random.default_rng(3), 100)
    targets[:] = np.minimum(targets, 1)
    rule = fit_conformal(p, targets, coverage=0.9, per_class=True)
    assert math.isinf(rule.quantile[2])
    assert rule.sets(p)[:, 2].all()


def test_probabilities_rounded_in_a_table_give_the_same_sets():
    p, targets = draw(np.random.default_rng(4), 400)
    rule = fit_conformal(p, targets, coverage=0.9)
    sets = rule.sets(p)
    assert (rule.sets(np.array([[float(f"{x:.12g}") for x in row] for row in p])) == sets).all()


def test_measured_rates_by_hand():
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 1]], bool)
    rates = judge_sets(sets, np.array([0, 0, 0, 1]), NAMES)
    assert (rates.n, rates.coverage, rates.single, rates.mean_size) == (4, 0.75, 0.5, 1.75)
    assert rates.single_right == Value(0.5)
    assert rates.coverage_of_class["a"].value == pytest.approx(2 / 3)
    assert rates.coverage_of_class["b"] == Value(1.0)
    assert rates.coverage_of_class["c"] == Value(None, "no case has the class")
    everything = judge_sets(np.ones((2, 3), bool), np.array([0, 1]), NAMES)
    assert everything.single_right == Value(None, "no set has one class")


# ---- unusual images


@pytest.mark.parametrize(("n", "d"), [(200, 8), (30, 8), (12, 20)])  # also fewer images than d
def test_the_distance_is_that_of_scikit_learns_shrunk_covariance(n, d):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    targets = np.arange(n) % 2
    model = fit_outliers(x, targets, max_directions=d)
    offsets = x - np.stack([x[targets == c].mean(axis=0) for c in (0, 1)])[targets]
    shrunk = LedoitWolf(assume_centered=True).fit(offsets)
    new = rng.normal(size=(50, d)) * 3
    expected = np.min([shrunk.mahalanobis(new - centre) for centre in model.centres], axis=0)
    np.testing.assert_allclose(model.distances(new) ** 2, expected, rtol=1e-6)


def test_the_flag_has_its_stated_rate_on_usual_and_finds_unusual_images():
    rng = np.random.default_rng(5)
    mixing = rng.normal(size=(100, 100)) / 10

    def images(n, shift=0.0):
        labels = rng.integers(0, 2, n)
        return rng.normal(size=(n, 100)) @ mixing + labels[:, None] * 2 + shift, labels

    model = fit_outliers(*images(500)).with_threshold(images(400)[0], usual=0.95)
    flagged = model.is_unusual(images(4000)[0]).mean()
    assert abs(flagged - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 400)  # error of the threshold
    between = rng.normal(size=(200, 100)) @ mixing + 1  # usual in no class, as near as can be
    assert model.is_unusual(between).mean() > 0.9
    assert model.is_unusual(images(200, shift=5.0)[0]).all()
    assert model.directions.shape == (64, 100)


def test_the_model_survives_a_safetensors_file(tmp_path):
    from safetensors.numpy import load_file, save_file

    x = np.random.default_rng(6).normal(size=(40, 6))
    model = fit_outliers(x).with_threshold(x)
    save_file(model.arrays(), tmp_path / "outliers.safetensors")
    again = OutlierModel.of_arrays(load_file(tmp_path / "outliers.safetensors"))
    assert (again.distances(x) == model.distances(x)).all()
    assert again.threshold == model.threshold


def test_equal_images_and_few_validation_images_give_finite_limits():
    model = fit_outliers(np.ones((5, 3)))
    assert model.distances(np.ones((2, 3))).tolist() == [0, 0]
    assert not model.is_unusual(np.full((1, 3), 1e9)).any()  # no threshold yet
    few = model.with_threshold(np.ones((3, 3)))
    assert few.threshold == 0 and few.is_unusual(np.full((1, 3), 2.0)).all()
