from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import norm

from volseg.evaluation.bootstrap import Resampling, bootstrap, bootstrap_difference
from volseg.evaluation.ranking import Ranking, ratio, weighted_auc

QUICK = Resampling(n_resamples=600)


def mean_of(values):
    return lambda weights: {"mean": ratio(weights @ values, weights.sum(axis=1))}


def auc_of(scores, positive):
    ranking = Ranking.of(scores)
    return lambda weights: {"auc": weighted_auc(ranking, positive, weights)}


@pytest.mark.parametrize(
    ("n", "distance", "prevalence"),
    [(20, 1.5, 0.5), (50, 1.0, 0.3), (100, 2.0, 0.1), (200, 1, 0.5)],
)
def test_the_interval_of_an_auc_covers_it(n, distance, prevalence):
    """The scores are two normal distributions, whose AUC is Φ(distance / √2)."""
    rng, hits, widths = np.random.default_rng(n), [], []
    truth = norm.cdf(distance / math.sqrt(2))
    for _ in range(250):
        positive = rng.random(n) < prevalence
        scores = rng.normal(size=n) + distance * positive
        estimate = bootstrap(
            auc_of(scores, positive),
            range(n),
            bounds={"auc": (0, 1)},
            n_relevant={"auc": int(min(positive.sum(), (~positive).sum()))},
            resampling=QUICK,
        )["auc"]
        if not estimate.interval.reason:
            hits.append(estimate.interval.low <= truth <= estimate.interval.high)
            widths.append(estimate.interval.high - estimate.interval.low)
    assert len(hits) > 200
    assert np.mean(hits) >= 0.89  # one standard error is 0.014
    assert np.mean(widths) < 2.3 / math.sqrt(n * prevalence)


@pytest.mark.parametrize("per_patient", [1, 8])
def test_several_cases_of_a_patient_are_not_several_samples(per_patient):
    """Cases of a patient are alike: an interval over cases would be far too narrow."""
    rng, hits, narrow = np.random.default_rng(1), [], []
    for _ in range(250):
        patients = np.repeat(np.arange(30), per_patient)
        values = rng.normal(size=30)[patients] + 0.1 * rng.normal(size=patients.size)
        for names, into in ((patients, hits), (range(patients.size), narrow)):
            interval = bootstrap(mean_of(values), list(names), resampling=QUICK)["mean"].interval
            into.append(interval.low <= 0 <= interval.high)
    assert 0.92 <= np.mean(hits) <= 0.99
    assert np.mean(narrow) < (1 if per_patient == 1 else 0.6)


def test_for_many_patients_it_is_scipys_interval():
    values = np.random.default_rng(2).exponential(size=300)
    resampling = Resampling(n_resamples=4000)
    interval = bootstrap(mean_of(values), range(300), resampling=resampling)["mean"].interval
    expected = scipy_bootstrap(
        (values,), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    width = expected.high - expected.low
    # Ours takes the wider of two intervals at each end.
    assert expected.low - 0.15 * width < interval.low < expected.low + 0.03 * width
    assert expected.high - 0.03 * width < interval.high < expected.high + 0.15 * width


def test_the_same_seed_gives_the_same_interval_whatever_the_chunks():
    values = np.random.default_rng(3).normal(size=40)
    patients = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 4]).tolist()
    intervals = [
        bootstrap(mean_of(values), patients, resampling=Resampling(seed=seed, chunk_weights=chunk))
        for seed, chunk in ((0, 10**6), (0, 900), (1, 10**6))
    ]
    assert intervals[0] == intervals[1] != intervals[2]
    rows = np.concatenate(list(Resampling(n_resamples=50).rows(np.array(patients))))
    assert rows.shape == (50, 40)
    firsts = np.unique(patients, return_index=True)[1]
    assert (rows[:, firsts].sum(axis=1) == 9).all()  # nine patients are drawn each time
    assert (rows == rows[:, firsts][:, patients]).all()  # with all their cases


def test_a_perfect_auc_is_not_certain():
    positive = np.arange(40) < 8
    estimate = bootstrap(
        auc_of(positive + 0.0, positive),
        range(40),
        bounds={"auc": (0, 1)},
        n_relevant={"auc": 8},
        resampling=QUICK,
    )["auc"]
    assert estimate.value == 1
    assert estimate.interval.ends == pytest.approx((0.025 ** (1 / 8), 1))


def test_without_patients_or_without_cases_there_is_no_interval():
    few = bootstrap(mean_of(np.arange(4.0)), range(4))["mean"]
    assert (few.value, few.interval.ends) == (1.5, None)
    assert few.interval.reason == "4 patients; an interval needs at least 5"
    one_positive = np.arange(30) == 3
    rare = bootstrap(auc_of(np.arange(30.0), one_positive), range(30), resampling=QUICK)["auc"]
    assert "over 5 % of the resamples" in rare.interval.reason
    none = bootstrap(auc_of(np.arange(30.0), one_positive & False), range(30))["auc"]
    assert (none.value, none.interval.reason) == (None, "undefined")


def test_a_paired_difference_is_narrower_than_two_intervals_and_covers():
    rng, hits, narrower = np.random.default_rng(4), [], []
    for _ in range(200):
        shared = rng.normal(size=40)  # cases that are difficult for both models
        ours = shared + 0.1 + 0.3 * rng.normal(size=40)
        theirs = shared + 0.3 * rng.normal(size=40)
        paired = bootstrap_difference(mean_of(ours), mean_of(theirs), range(40), resampling=QUICK)[
            "mean"
        ].interval
        alone = bootstrap(mean_of(ours), range(40), resampling=QUICK)["mean"].interval
        hits.append(paired.low <= 0.1 <= paired.high)
        narrower.append(paired.high - paired.low < alone.high - alone.low)
    assert 0.92 <= np.mean(hits) <= 0.99
    assert all(narrower)


def test_the_p_value_is_uniform_without_a_difference_and_small_with_one():
    rng, p_values = np.random.default_rng(5), []
    for _ in range(200):
        ours, theirs = rng.normal(size=(2, 50))
        difference = bootstrap_difference(
            mean_of(ours), mean_of(theirs), range(50), resampling=QUICK
        )["mean"]
        p_values.append(difference.p_value)
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.11
    better = bootstrap_difference(mean_of(theirs + 2), mean_of(theirs), range(50))["mean"]
    assert better.value == pytest.approx(2)
    assert better.p_value is None and "same value" in better.interval.reason
    ours = theirs + 1 + 0.1 * rng.normal(size=50)
    assert bootstrap_difference(mean_of(ours), mean_of(theirs), range(50))["mean"].p_value < 0.01
