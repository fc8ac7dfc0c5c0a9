from __future__ import annotations

import numpy as np
import pytest

from volseg.evaluation.bootstrap import Resampling
from volseg.evaluation.calibration import apply_temperature
from volseg.evaluation.class_intervals import (
    RELEVANT,
    Judged,
    difference_rows,
    groups_of,
    metric_rows,
    subgroup_rows,
)
from volseg.evaluation.classes import ClassPredictions, class_metrics, evaluate_classes
from volseg.evaluation.regression import NumberPredictions

QUICK = Resampling(n_resamples=200)
NAMES = ("benign", "malignant", "macro")  # a class may be called like an average


def judged_classes(seed=0, *, n=60, skill=1.5, model="m"):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, n)
    logits = np.random.default_rng(seed + 100).normal(size=(n, 3))
    logits[np.arange(n), targets] += skill
    patients = [f"p{number // 2}" for number in range(n)]
    return Judged(ClassPredictions(apply_temperature(logits, 1), targets, NAMES), patients, model)


def value_of(rows, metric, *, average="", class_name="", group=""):
    (row,) = [
        row
        for row in rows
        if (row.metric, row.average, row.class_name, row.group_value)
        == (metric, average, class_name, group)
    ]
    return row


def test_every_metric_has_a_row_with_its_value_and_an_interval_around_it():
    judged = judged_classes()
    rows, metrics = metric_rows(judged, resampling=QUICK), evaluate_classes(judged.predictions)
    for class_name, values in metrics.of_class.items():
        for metric, value in values.items():
            assert value_of(rows, metric, class_name=class_name).value == value.value
    for average, values in metrics.average.items():
        for metric, value in values.items():
            assert value_of(rows, metric, average=average).value == value.value
    for row in rows:
        assert (row.n, row.n_patients, row.model) == (60, 30, "m")
        if row.metric == "ece":
            assert row.low is None and "resampling alone raises it" in row.reason
        else:
            assert row.low <= row.value <= row.high, row
            assert row.low >= 0


def test_a_class_without_cases_has_a_reason_in_its_row():
    judged = judged_classes()
    p = judged.predictions
    without = ClassPredictions(p.probabilities, np.minimum(p.targets, 1), NAMES)
    rows = metric_rows(Judged(without, judged.patients), resampling=QUICK)
    row = value_of(rows, "auc", class_name="macro")
    assert (row.value, row.low, row.reason) == (None, None, "no case has the class")
    average = value_of(rows, "auc", average="macro")
    assert average.value is not None and average.reason.startswith("without macro")


def test_numbers_have_rows_too():
    rng = np.random.default_rng(1)
    numbers = NumberPredictions(rng.normal(size=40), rng.normal(size=40))
    rows = metric_rows(Judged(numbers, range(40)), resampling=QUICK)
    assert {row.metric for row in rows} == {"mae", "mse", "rmse", "bias", "r2"}
    assert all(row.average == "overall" and row.low <= row.value <= row.high for row in rows)
    assert value_of(rows, "r2", average="overall").high <= 1
    assert value_of(rows, "bias", average="overall").low < 0


def test_a_difference_is_that_of_the_values_and_changes_sign_with_the_order():
    ours, theirs = judged_classes(model="a"), judged_classes(skill=0.2, model="b")
    rows, reversed_rows = difference_rows(ours, theirs), difference_rows(theirs, ours)
    of_ours, of_theirs = metric_rows(ours, resampling=QUICK), metric_rows(theirs, resampling=QUICK)
    for row, other in zip(rows, reversed_rows):
        where = {"average": row.average, "class_name": row.class_name}
        pair = [value_of(table, row.metric, **where).value for table in (of_ours, of_theirs)]
        assert row.value == pytest.approx(pair[0] - pair[1], abs=1e-12)
        assert other.value == pytest.approx(-row.value, abs=1e-12)
    auc = value_of(rows, "auc", average="macro")
    assert auc.model == "a − b" and auc.low > 0 and auc.p_value < 0.05


def test_equal_models_do_not_differ_and_other_cases_are_refused():
    judged = judged_classes()
    for row in difference_rows(judged, judged, resampling=QUICK):
        assert row.value == 0 and row.p_value is None and "same value" in row.reason
    with pytest.raises(ValueError, match="same cases"):
        difference_rows(judged, judged_classes(seed=1))


def test_subgroups_are_judged_as_if_alone():
    judged = judged_classes()
    values = ["f" if number % 3 else "m" for number in range(60)]
    rows = subgroup_rows(judged, "sex", values, resampling=QUICK)
    for group in ("f", "m"):
        is_in = np.array([value == group for value in values])
        alone = metric_rows(judged.subset(is_in), resampling=QUICK)
        of_group = [row for row in rows if row.group_value == group]
        assert [row.value for row in of_group] == [row.value for row in alone]
        assert {(row.n, row.group_column) for row in of_group} == {(is_in.sum(), "sex")}


def test_many_numbers_are_cut_into_thirds_and_names_are_not():
    ages = [str(age) for age in range(20, 80)]
    groups = groups_of([*ages, ""])
    assert groups[0] == "up to 39" and groups[30] == "over 39 to 59" and groups[59] == "over 59"
    assert groups[60] == "unknown"
    assert [groups.count(name) for name in dict.fromkeys(groups)] == [20, 20, 20, 1]
    assert groups_of(["1", "2", "1"]) == ["1", "2", "1"]
    assert groups_of([f"site{n}" for n in range(20)])[3] == "site3"
    judged = judged_classes()
    order = [row.group_value for row in subgroup_rows(judged, "age", ages, resampling=QUICK)]
    assert list(dict.fromkeys(order)) == ["up to 39", "over 39 to 59", "over 59"]


def test_the_relevant_cases_of_a_metric_are_those_that_change_it():
    """A case outside of every relevant group can be left out without changing the metric."""
    judged = judged_classes()
    p, ones = judged.predictions, np.ones((1, 60))
    whole, singles = class_metrics(p, ones), 1 - np.eye(60)
    left_out = class_metrics(p, singles)
    for metric, groups in RELEVANT.items():
        for number in range(3):
            masks = groups(p.truth[:, number], p.decided[:, number])
            others = ~np.any(masks, axis=0)
            changed = left_out[metric][others, number]
            np.testing.assert_allclose(changed, whole[metric][0, number], atol=1e-12)
            assert not np.allclose(left_out[metric][~others, number], whole[metric][0, number])
