import math

import numpy as np
import pytest

from volseg.evaluate.intervals import bootstrap_interval


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 40).tolist(), range(40), seed=seed)
        held += low <= 3.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_its_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(0, 2, 400)
    low, high = bootstrap_interval(values.tolist(), range(400))
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.1)


def test_scans_of_one_patient_do_not_make_the_mean_surer():
    values = np.random.default_rng(2).normal(0, 1, 30)
    alone = bootstrap_interval(values.tolist(), range(30))
    repeated = bootstrap_interval(np.repeat(values, 10).tolist(), np.repeat(np.arange(30), 10).tolist())
    assert repeated == pytest.approx(alone)


def test_what_cannot_be_known_is_not_a_number():
    assert all(map(math.isnan, bootstrap_interval([0.5, 0.6], ["a", "a"])))
    assert all(map(math.isnan, bootstrap_interval([math.nan, 0.6], ["a", "b"])))
    assert bootstrap_interval([0.5, math.nan, 0.5], ["a", "b", "c"]) == (0.5, 0.5)


def test_the_mean_of_labels_is_as_sure_as_their_means_together():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.9, 0.02, 60), rng.normal(0.5, 0.1, 60)
    values, patients = [*first, *second], [*range(60), *range(60)]
    together = bootstrap_interval(values, patients, groups=[1] * 60 + [2] * 60)
    assert together == pytest.approx(bootstrap_interval(((first + second) / 2).tolist(), range(60)))
    # A label that few scans have weighs as much as one that all have: so the mean is that of means, and not of values.
    few = bootstrap_interval([*first, *second[:6]], [*range(60), *range(6)], groups=[1] * 60 + [2] * 6)
    assert few[0] < (first.mean() + second[:6].mean()) / 2 < few[1]
    assert few[1] < bootstrap_interval([*first, *second[:6]], [*range(60), *range(6)])[0]


def test_a_label_that_one_patient_has_is_left_out_of_the_resamples_without_that_patient():
    low, high = bootstrap_interval([0.0, 0.0, 0.0, 1.0], ["a", "b", "c", "a"], groups=[1, 1, 1, 2])
    assert (low, high) == (0.0, 0.5)
