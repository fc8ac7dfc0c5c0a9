from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from volseg.evaluation.agreement import agreement

# Peak expiratory flow of 17 people by two meters, L/min: Bland and Altman, Lancet i:307 (1986),
# table 1.
WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI_WRIGHT = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def test_the_published_example():
    result = agreement(MINI_WRIGHT, WRIGHT, range(17))
    assert result.bias == pytest.approx(-2.1, abs=0.05)
    assert result.sd == pytest.approx(38.8, abs=0.05)
    assert result.bias_95 == pytest.approx((-22.0, 17.8), abs=0.1)
    assert result.pearson == pytest.approx(0.94, abs=0.005)
    assert result.lower_limit == pytest.approx(-2.1 - 1.96 * 38.8, abs=0.1)
    assert result.upper_limit == pytest.approx(-2.1 + 1.96 * 38.8, abs=0.1)
    # The paper's approximate intervals are (-114.3, -45.1) and (40.9, 110.1) about bias ∓ 2 SD.
    assert -130 < result.lower_limit_95[0] < -110 < -60 < result.lower_limit_95[1] < -45
    assert 40 < result.upper_limit_95[0] < 60 < 110 < result.upper_limit_95[1] < 130


def test_by_hand():
    result = agreement([1, 2, 3, 4], [2, 2, 5, 4], "abcd")
    assert result.bias == pytest.approx(3 / 4)  # differences 1, 0, 2, 0
    assert result.sd == pytest.approx(math.sqrt((5 - 9 / 4) / 3))
    covariance, var_x, var_y = 37 / 4 - 2.5 * 3.25, 30 / 4 - 2.5**2, 49 / 4 - 3.25**2
    assert result.pearson == pytest.approx(covariance / math.sqrt(var_x * var_y))
    assert result.concordance == pytest.approx(2 * covariance / (var_x + var_y + 0.75**2))


def test_concordance_sees_a_shift_that_correlation_does_not():
    x = np.random.default_rng(0).uniform(10, 90, 40)
    same = agreement(x, x, range(40))
    assert (same.bias, same.sd, same.pearson, same.concordance) == pytest.approx((0, 0, 1, 1))
    shifted, doubled = agreement(x, x + 25, range(40)), agreement(x, 2 * x, range(40))
    assert shifted.bias == pytest.approx(25)
    assert (shifted.pearson, doubled.pearson) == pytest.approx((1, 1))
    assert shifted.concordance == pytest.approx(2 * x.var() / (2 * x.var() + 25**2))
    assert max(shifted.concordance, doubled.concordance) < 0.8


def test_swapping_the_sides_swaps_the_limits():
    rng = np.random.default_rng(4)
    x = rng.uniform(10, 90, 40)
    y = x + rng.normal(3, 5, 40)
    forward, back = agreement(x, y, range(40)), agreement(y, x, range(40))
    assert (back.bias, back.concordance) == pytest.approx((-forward.bias, forward.concordance))
    assert back.lower_limit_95 == pytest.approx([-end for end in forward.upper_limit_95[::-1]])
    assert back.upper_limit_95 == pytest.approx([-end for end in forward.lower_limit_95[::-1]])


def test_large_numbers_do_not_cancel():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 30))
    small, large = agreement(x, y, range(30)), agreement(x + 1e7, y + 1e7, range(30))
    assert large.pearson == pytest.approx(small.pearson, abs=1e-6)
    assert large.sd == pytest.approx(small.sd, rel=1e-6)


def test_intervals_cover_the_truth_at_their_level():
    rng = np.random.default_rng(2)
    hits = np.zeros(4)
    for _ in range(150):
        x = rng.normal(50, 10, 12)
        result = agreement(x, x + rng.normal(1, 2, 12), range(12))
        truths = (1, 1 - 1.959964 * 2, 1 + 1.959964 * 2, 10 / math.hypot(10, 2))
        intervals = (
            result.bias_95,
            result.lower_limit_95,
            result.upper_limit_95,
            result.pearson_95,
        )
        hits += [low <= truth <= high for truth, (low, high) in zip(truths, intervals, strict=True)]
    # exact for normal differences: 0.95 less chance
    assert (hits[:3] / 150 >= 0.91).all()
    assert hits[3] / 150 >= 0.91


def test_intervals_of_patients_with_several_pairs_cover_the_truth_at_their_level():
    rng = np.random.default_rng(6)
    hits = np.zeros(4)
    for _ in range(300):
        x = rng.normal(50, 10, (6, 3))
        y = x + 1 + rng.normal(0, 1, (6, 1)) + rng.normal(0, math.sqrt(3), (6, 3))
        result = agreement(x.ravel(), y.ravel(), np.repeat(np.arange(6), 3).tolist())
        truths = (1, 1 - 1.959964 * 2, 1 + 1.959964 * 2, 10 / math.hypot(10, 2))
        intervals = (
            result.bias_95,
            result.lower_limit_95,
            result.upper_limit_95,
            result.pearson_95,
        )
        hits += [low <= truth <= high for truth, (low, high) in zip(truths, intervals, strict=True)]
        assert -1 < result.concordance_95[0] <= result.concordance <= result.concordance_95[1] < 1
    assert (hits / 300 >= 0.91).all()


def test_more_scans_of_a_patient_do_not_narrow_the_limits():
    rng = np.random.default_rng(3)
    x = rng.normal(50, 10, 20)
    y = x + rng.normal(0, 2, 20)
    widths = []
    for times in (2, 12):
        patients = np.repeat(np.arange(20), times).tolist()
        result = agreement(np.repeat(x, times), np.repeat(y, times), patients)
        assert (result.n, result.n_patients) == (20 * times, 20)
        intervals = (result.bias_95, result.upper_limit_95, result.concordance_95)
        widths.append([high - low for low, high in intervals])
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    alone = agreement(x, y, range(20))
    assert widths[1][0] == pytest.approx(alone.bias_95[1] - alone.bias_95[0], rel=0.2)


def test_what_cannot_be_measured_is_nan():
    few = asdict(agreement([1, 2], [1, 3], "ab"))
    assert (few.pop("n"), few.pop("n_patients")) == (2, 2)
    assert few.pop("no_intervals") == "2 patients; an interval needs at least 5"
    assert all(np.isnan(value).all() for value in few.values())
    constant = agreement([5, 5, 5], [4, 5, 6], "abc")
    assert math.isnan(constant.pearson) and math.isnan(constant.concordance_95[0])
    assert constant.bias == pytest.approx(0)
    # two patients: a bias, but no interval
    two = agreement([1, 2, 3, 4], [1, 2, 3, 5], "aaab")
    assert two.bias == 0.25
    assert math.isnan(two.bias_95[0]) and math.isnan(two.pearson_95[0])
    four = agreement([1, 2, 3, 4], [1, 2, 3, 5], "abcd")
    assert math.isnan(four.bias_95[0]) and math.isnan(four.upper_limit_95[0])
    assert four.no_intervals == "4 patients; an interval needs at least 5"
    line = agreement([1, 2, 3, 4, 5], [2, 4, 6, 8, 10], "abcde")
    assert not math.isnan(line.concordance_95[0]) and math.isnan(line.pearson_95[0])
    assert line.no_intervals == "pearson: the pairs lie on a line"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"one shape \(N,\)"):
        agreement([1, 2, 3], [1, 2], "abc")
    with pytest.raises(ValueError, match="finite"):
        agreement([1, 2, math.nan], [1, 2, 3], "abc")
