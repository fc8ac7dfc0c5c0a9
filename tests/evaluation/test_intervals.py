from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta as beta_distribution
from scipy.stats import t as student

from volseg.evaluation.intervals import FEWEST_PATIENTS, jackknife_interval, mean_interval

FRACTION = (0.0, 1.0)


def coverage(draw, truth, n_patients, *, n_studies=800, bounds=FRACTION):
    """Return the fraction of simulated studies whose interval contains the truth."""
    rng = np.random.default_rng(n_patients)
    intervals = [
        mean_interval(draw(rng, n_patients).tolist(), range(n_patients), bounds=bounds)
        for _ in range(n_studies)
    ]
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


# Dice-like: most values near 1, with a tail to the left. benchmarks/intervals.py has more.
@pytest.mark.parametrize("n_patients", [5, 10, 20, 40])
@pytest.mark.parametrize(("a", "b"), [(8, 2), (9, 1), (20, 3)])
def test_the_interval_covers_a_dice_like_mean_at_its_level(n_patients, a, b):
    hits = coverage(lambda rng, n: rng.beta(a, b, n), a / (a + b), n_patients)
    assert 0.93 <= hits <= 0.985  # 800 studies: one standard error is 0.008


@pytest.mark.parametrize("n_patients", [5, 10, 40])
def test_the_interval_covers_a_normal_mean_at_its_level(n_patients):
    any_number = (-math.inf, math.inf)
    hits = coverage(lambda rng, n: rng.normal(3, 1, n), 3.0, n_patients, bounds=any_number)
    assert 0.935 <= hits <= 0.985


@pytest.mark.parametrize("n_patients", [5, 10, 20])
def test_the_interval_covers_a_rate_over_lesions_of_few_patients(n_patients):
    rng = np.random.default_rng(n_patients)
    hits = []
    for _ in range(800):
        rate = rng.beta(8, 2, n_patients)
        n_lesions = 1 + rng.poisson(3, n_patients)
        is_hit = [rng.random(n) < p for n, p in zip(n_lesions, rate, strict=True)]
        patients = np.repeat(np.arange(n_patients), n_lesions)
        interval = mean_interval(
            np.concatenate(is_hit).tolist(), patients.tolist(), bounds=FRACTION
        )
        hits.append(interval.low <= 0.8 <= interval.high)
    assert 0.93 <= np.mean(hits) <= 1


def test_its_width_is_that_of_the_normal_approximation_for_many_patients():
    values = np.random.default_rng(1).normal(0, 2, 400)
    interval = mean_interval(values.tolist(), range(400))
    expected = 2 * 1.96 * values.std() / math.sqrt(400)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.05)


def test_values_without_skewness_have_a_student_t_interval():
    values = [0.5, 0.6, 0.7, 0.8, 0.9]
    half = student.ppf(0.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    assert mean_interval(values, "abcde").ends == pytest.approx((0.7 - half, 0.7 + half))


def test_a_tail_lengthens_its_side_and_shortens_neither():
    values = [0.95, 0.93, 0.94, 0.9, 0.4]
    interval = mean_interval(values, "abcde")
    half = student.ppf(0.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    assert np.mean(values) - interval.low > 1.5 * half
    assert interval.high - np.mean(values) == pytest.approx(half)


def test_the_transformation_is_that_of_hall():
    """Check that g(t), with s = skewness / √n, maps the end to the quantile of Student's t."""
    values = np.array([0.95, 0.93, 0.94, 0.9, 0.4, 0.85])
    n, mean = values.size, values.mean()
    skewness = ((values - mean) ** 3).mean() / values.std() ** 3 * math.sqrt(n * (n - 1)) / (n - 2)
    s = skewness / math.sqrt(n)
    t = (mean - mean_interval(values.tolist(), range(n)).low) / (values.std(ddof=1) / math.sqrt(n))
    g = t + s * t**2 / 3 + s**2 * t**3 / 27 + s / 6
    assert g == pytest.approx(student.ppf(0.975, n - 1))


def test_the_interval_stays_within_the_range_of_the_metric():
    rng = np.random.default_rng(4)
    for _ in range(200):
        n = int(rng.integers(5, 12))
        values = np.clip(rng.normal(0.9, 0.3, n), 0, 1)
        interval = mean_interval(values.tolist(), range(n), bounds=FRACTION)
        assert 0 <= interval.low <= values.mean() <= interval.high <= 1
    assert mean_interval([0, 0, 0, 0, 9.0], range(5), bounds=(0, math.inf)).low == 0


def test_mirrored_shifted_and_reordered_values_have_the_same_interval():
    rng = np.random.default_rng(5)
    values, order = rng.beta(8, 2, 9), rng.permutation(9)
    interval = mean_interval(values.tolist(), range(9))
    mirrored = mean_interval((1 - values).tolist(), range(9))
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx(interval.ends)
    scaled = mean_interval((3 * values + 7).tolist(), range(9))
    assert scaled.ends == pytest.approx([3 * end + 7 for end in interval.ends])
    reordered = mean_interval(values[order].tolist(), order.tolist())
    assert reordered.ends == pytest.approx(interval.ends)


def test_more_scans_of_a_patient_do_not_narrow_the_interval():
    values = np.random.default_rng(2).normal(0, 1, 30)
    alone = mean_interval(values.tolist(), range(30))
    repeated = mean_interval(np.repeat(values, 10).tolist(), np.repeat(np.arange(30), 10).tolist())
    assert repeated.ends == pytest.approx(alone.ends)


@pytest.mark.parametrize("n_patients", range(FEWEST_PATIENTS))
def test_fewer_than_five_patients_give_a_reason_instead_of_an_interval(n_patients):
    values = [0.5 + 0.1 * n for n in range(n_patients)]
    interval = mean_interval([*values, math.nan], [*range(n_patients), "unmeasured"])
    assert interval.ends is None
    assert math.isnan(interval.low) and math.isnan(interval.high)
    plural = "" if n_patients == 1 else "s"
    assert interval.reason == f"{n_patients} patient{plural}; an interval needs at least 5"
    many_scans = mean_interval(values * 10, [*range(n_patients)] * 10)
    assert many_scans.reason == interval.reason


def test_equal_patients_have_the_exact_interval_at_a_bound_and_none_elsewhere():
    for n in (5, 8, 30):
        exact = beta_distribution.ppf(0.025, n, 1)  # Clopper and Pearson for n of n
        all_hit = mean_interval([True] * (2 * n), [*range(n)] * 2, bounds=FRACTION)
        assert all_hit.ends == pytest.approx((exact, 1))
        all_missed = mean_interval([0.0] * n, range(n), bounds=FRACTION)
        assert all_missed.ends == pytest.approx((0, 1 - exact))
    for value, bounds in ((0.7, FRACTION), (0.0, (0, math.inf)), (3.0, (-math.inf, math.inf))):
        interval = mean_interval([value] * 6, range(6), bounds=bounds)
        assert interval.ends is None
        assert interval.reason.startswith("all 6 patients have the same value")


def test_the_interval_of_a_mean_over_labels_is_that_of_the_patients_mean():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.9, 0.02, 60), rng.normal(0.5, 0.1, 60)
    values, patients = [*first, *second], [*range(60), *range(60)]
    together = mean_interval(values, patients, groups=[1] * 60 + [2] * 60)
    of_means = mean_interval(((first + second) / 2).tolist(), range(60))
    assert together.ends == pytest.approx(of_means.ends)
    # A label that few scans have weighs as much as one that all have: the mean is one of means.
    few = mean_interval([*first, *second[:6]], [*range(60), *range(6)], groups=[1] * 60 + [2] * 6)
    assert few.low < (first.mean() + second[:6].mean()) / 2 < few.high
    assert few.high < mean_interval([*first, *second[:6]], [*range(60), *range(6)]).low


def test_a_label_that_one_patient_has_is_left_out_of_the_mean_without_that_patient():
    values, patients, labels = [0.0, 0.1, 0.0, 0.1, 0.0, 1.0], "abcdea", [1, 1, 1, 1, 1, 2]
    mean = (0.04 + 1.0) / 2
    without_one = np.array([0.05, *[(other + 1) / 2 for other in (0.025, 0.05, 0.025, 0.05)]])
    expected = jackknife_interval(mean, without_one, bounds=FRACTION)
    assert mean_interval(values, patients, groups=labels, bounds=FRACTION) == expected
    assert expected.low < 0.1  # that patient decides half of the mean
