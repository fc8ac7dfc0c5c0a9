from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from volseg.evaluation.operating import (
    Cuts,
    OperatingPoint,
    most_accurate_point,
    sensitive_point,
    specific_point,
    youden_point,
)


def random_scores(seed):
    rng = np.random.default_rng(seed)
    n, levels = int(rng.integers(4, 40)), int(rng.choice([3, 10, 1000]))
    positive = rng.random(n) < 0.4
    positive[:2] = True, False
    return rng.integers(0, levels + 1, n) / levels, positive


def rates(scores, positive, threshold):
    called = scores >= threshold
    return called[positive].mean(), (~called[~positive]).mean()


def every_threshold(scores):
    return [*scores, 0.0, 1.1]


def points_of(scores, positive):
    return {
        "youden": youden_point(scores, positive, "c"),
        "accuracy": most_accurate_point(scores, positive, "c"),
        "sensitivity_0.9": sensitive_point(scores, positive, "c", at_least=0.9),
        "specificity_0.8": specific_point(scores, positive, "c", at_least=0.8),
        "sensitivity_1": sensitive_point(scores, positive, "c", at_least=1.0),
        "specificity_1": specific_point(scores, positive, "c", at_least=1.0),
    }


@pytest.mark.parametrize("seed", range(100))
def test_points_are_the_best_of_all_thresholds_by_brute_force(seed):
    scores, positive = random_scores(seed)
    points = points_of(scores, positive)
    for name, point in points.items():
        assert point.name == name
        assert (point.sensitivity, point.specificity) == pytest.approx(
            rates(scores, positive, point.threshold), abs=1e-12
        )
    tried = [rates(scores, positive, threshold) for threshold in every_threshold(scores)]
    n_positive, n = positive.sum(), positive.size

    def accuracy(sensitivity, specificity):
        return (sensitivity * n_positive + specificity * (n - n_positive)) / n

    youden, accurate = points["youden"], points["accuracy"]
    assert youden.sensitivity + youden.specificity == pytest.approx(max(map(sum, tried)))
    best = max(accuracy(*pair) for pair in tried)
    rate = (best * n + 1) / (n + 2)
    error = (rate * (1 - rate) / n) ** 0.5
    reached = accuracy(accurate.sensitivity, accurate.specificity)
    assert best + 1e-12 >= reached >= best - error - 1e-12
    nearer = [t for t in every_threshold(scores) if abs(t - 0.5) < abs(accurate.threshold - 0.5)]
    gap = np.ptp(
        [
            scores[scores < accurate.threshold].max(initial=0.0),
            scores[scores >= accurate.threshold].min(initial=1.0),
        ]
    )
    for threshold in nearer:  # each is less accurate, or within the same gap
        is_less = accuracy(*rates(scores, positive, threshold)) < best - error + 1e-12
        assert is_less or abs(threshold - accurate.threshold) <= gap
    for at_least, point in ((0.9, points["sensitivity_0.9"]), (1.0, points["sensitivity_1"])):
        assert point.sensitivity >= at_least - 1e-12
        assert point.specificity == pytest.approx(max(b for a, b in tried if a >= at_least - 1e-9))
    for at_least, point in ((0.8, points["specificity_0.8"]), (1.0, points["specificity_1"])):
        assert point.specificity >= at_least - 1e-12
        assert point.sensitivity == pytest.approx(max(a for a, b in tried if b >= at_least - 1e-9))


@pytest.mark.parametrize("seed", range(30))
def test_no_threshold_is_a_score_so_rounding_moves_no_case(seed):
    scores, positive = random_scores(seed)
    for point in points_of(scores, positive).values():
        assert point.threshold not in set(scores) - {0.0}
        rounded = np.round(scores, 6)
        assert rates(rounded, positive, point.threshold) == pytest.approx(
            (point.sensitivity, point.specificity), abs=1e-12
        )


def test_ties_take_the_widest_gap_then_the_lowest_threshold():
    scores, positive = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    assert youden_point(scores, positive, "c").threshold == pytest.approx(0.5)
    scores, positive = np.array([0.2, 0.3, 0.7]), np.array([False, True, False])
    point = sensitive_point(scores, positive, "c", at_least=0.5)
    assert point.threshold == pytest.approx(0.25)


def test_the_most_accurate_point_is_near_one_half_unless_the_cases_speak_against_it():
    scores = np.linspace(0.005, 0.995, 100)
    near, far = (most_accurate_point(scores, scores > cut, "c").threshold for cut in (0.45, 0.2))
    assert near == pytest.approx(0.47, abs=0.03) and far == pytest.approx(0.2, abs=0.05)
    perfect = np.array([0.1, 0.2, 0.8, 0.9])
    assert most_accurate_point(perfect, perfect > 0.5, "c").threshold == pytest.approx(0.5)


@pytest.mark.parametrize("prior", [0.5, 0.3])
@pytest.mark.parametrize("n", [30, 120])
def test_on_new_cases_it_is_more_accurate_than_the_best_threshold_of_few_cases(n, prior):
    """Scores calibrated at even odds; the new cases may be of another mixture."""
    rng = np.random.default_rng(0)

    def draw(size, odds):
        positive = rng.random(size) < odds
        return 1 / (1 + np.exp(2 - 2 * (rng.normal(0, 1, size) + 2 * positive))), positive

    gains = []
    for _ in range(100):
        (scores, positive), (new, truth) = draw(n, 0.5), draw(2000, prior)
        cuts = Cuts.of(scores, positive)
        right = cuts.sensitivity * cuts.n_positive + cuts.specificity * cuts.n_negative
        plain = cuts.point(cuts.best(right), "accuracy", "c")
        rates_of_both = [
            (point.decide(new) == truth).mean()
            for point in (most_accurate_point(scores, positive, "c"), plain)
        ]
        gains.append(rates_of_both[0] - rates_of_both[1])
    assert np.mean(gains) > 0


def test_neighbouring_numbers_are_still_separated():
    high = np.nextafter(0.5, 1)
    scores, positive = np.array([0.5, high]), np.array([False, True])
    point = youden_point(scores, positive, "c")
    assert point.decide(scores).tolist() == [False, True]


def test_scores_of_0_and_1_can_all_be_on_one_side():
    scores, positive = np.array([0.0, 1.0]), np.array([True, False])
    assert sensitive_point(scores, positive, "c", at_least=1.0).decide(scores).all()
    assert not specific_point(scores, positive, "c", at_least=1.0).decide(scores).any()


def test_a_point_is_read_back_from_json():
    point = youden_point(*random_scores(0), "c")
    assert OperatingPoint.of_json(asdict(point)) == point


def test_the_cuts_are_those_of_scikit_learn():
    from sklearn.metrics import roc_curve

    for seed in range(50):
        scores, positive = random_scores(seed)
        cuts = Cuts.of(scores, positive)
        false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
        np.testing.assert_allclose(cuts.sensitivity, true, atol=1e-12)
        np.testing.assert_allclose(1 - cuts.specificity, false, atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "positive", "problem"),
    [
        ([0.1, 0.2], [True, True], "2 positive and 0 negative"),
        ([0.1, 1.2], [True, False], "from 0 to 1"),
        ([0.1, np.nan], [True, False], "from 0 to 1"),
    ],
)
def test_bad_scores_are_refused(scores, positive, problem):
    with pytest.raises(ValueError, match=problem):
        youden_point(np.array(scores), np.array(positive), "c")
