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
