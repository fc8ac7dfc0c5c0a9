from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from laws import oblique

from volseg.evaluate.detection import detect_lesions, with_lesions
from volseg.evaluate.overlap import evaluate_case
from volseg.evaluate.summary import METRICS, as_json, mean_of, summarise_label
from volseg.volume import Geometry, Volume

GEOMETRY = Geometry((24, 6, 6), oblique((1.0, 1.0, 2.0)))
NAMES = {1: "tumour"}


def mask(*spans):
    array = np.zeros(GEOMETRY.shape, np.uint8)
    for start, stop in spans:
        array[start:stop, 2:4, 2:4] = 1
    return Volume(array, GEOMETRY)


def compare(case_id, reference, predicted, patient=None, confidence=None):
    found = [
        replace(row, patient=patient, confidence=confidence if row.side == "predicted" else None)
        for row in detect_lesions(reference, predicted, NAMES, case_id=case_id)
    ]
    (row,) = evaluate_case(reference, predicted, NAMES, case_id=case_id)
    return with_lesions(replace(row, patient=patient), found), found


def summarise(*compared):
    return summarise_label(
        [row for row, _ in compared], [lesion for _, found in compared for lesion in found]
    )


CASES = {
    "same": (mask((2, 8), (12, 16)), mask((2, 8), (12, 16))),
    "split": (mask((2, 12)), mask((2, 6), (8, 12))),
    "missed": (mask((2, 4)), mask()),
    "false": (mask(), mask((2, 4))),
    "absent": (mask(), mask()),
}


def test_cases_are_counted_by_who_has_the_label():
    found = summarise(*(compare(name, *pair) for name, pair in CASES.items()))
    assert (found.n_missed, found.n_false, found.n_absent) == (1, 1, 1)
    n = {name: found.metrics[name]["n"] for name in METRICS}
    # A distance is known where both have it, overlap where either has, the error in per cent where the reference has.
    assert (n["hd95_mm"], n["mean_surface_distance_mm"], n["dice"], n["nsd_1mm"]) == (2, 2, 4, 4)
    assert (n["volume_error_percent"], n["volume_error_ml"], found.volumes.n) == (3, 4, 4)
    assert found.metrics["dice"]["mean"] == pytest.approx((1 + 2 * 8 / 18 + 0 + 0) / 4)
    assert found.metrics["volume_error_ml"]["mean"] == pytest.approx(found.volumes.bias)
    assert found.reference_ml.sum() == pytest.approx(
        sum(pair[0].array.sum() for pair in CASES.values()) * 2 / 1000
    )


def test_rates_over_lesions_are_those_of_the_counts():
    compared = [compare(name, *pair) for name, pair in CASES.items()]
    found = summarise(*compared).detection
    assert (found["n_reference"], found["n_predicted"], found["n_matched"]) == (4, 5, 3)
    assert found["sensitivity"]["mean"] == pytest.approx(3 / 4)
    assert found["precision"]["mean"] == pytest.approx(3 / 5)
    assert found["f1"]["mean"] == pytest.approx(2 * 3 / (4 + 5))
    assert found["false_positives_per_scan"]["mean"] == pytest.approx(2 / 5)
    assert found["false_positives_per_scan"]["n"] == 5
    by_size = found["sensitivity_by_diameter_mm"]
    assert sum(each["n"] for each in by_size.values()) == 4
    assert sum(each["n"] * (each["mean"] or 0) for each in by_size.values()) == pytest.approx(3)
    totals = [row.n_matched_lesions for row, _ in compared]
    assert sum(totals) == 3


def test_without_a_patient_each_case_is_one_and_with_one_both_are_his():
    pairs = [*CASES.values()][:3] + [*CASES.values()][:2]
    apart = summarise(*(compare(str(n), *pair) for n, pair in enumerate(pairs)))
    assert apart.metrics["dice"]["n_patients"] == 5
    assert apart.metrics["dice"]["mean_95"] is not None
    assert apart.metrics["dice"]["no_mean_95"] == ""
    one = summarise(*(compare(str(n), *pair, patient="a") for n, pair in enumerate(pairs)))
    assert one.metrics["dice"]["n_patients"] == 1
    assert one.metrics["dice"]["mean_95"] is None
    assert one.metrics["dice"]["no_mean_95"] == "1 patient; an interval needs at least 5"
    assert as_json(one)["volume_agreement_ml"]["no_intervals"] == one.metrics["dice"]["no_mean_95"]
    assert one.metrics["dice"]["mean"] == apart.metrics["dice"]["mean"]


def test_a_curve_needs_a_confidence_of_every_lesion():
    sure = compare("a", *CASES["same"], confidence=0.9)
    found = summarise(sure, compare("b", *CASES["false"], confidence=0.4))
    assert found.curve is not None
    assert found.curve.sensitivity.tolist() == [1, 1]
    assert found.curve.false_positives_per_scan.tolist() == [0, 0.5]
    found = summarise(sure, compare("b", *CASES["false"]))
    assert (found.curve, found.no_curve) == (None, "1 of 3 predicted lesions have no confidence")
    assert (
        summarise(compare("b", *CASES["false"], confidence=0.4)).no_curve
        == "no lesion in any reference"
    )
    assert summarise(compare("b", *CASES["missed"])).no_curve == "no predicted lesion"


def test_json_has_no_number_that_is_none():
    for names in (CASES, ["absent"], ["missed"], ["same"]):
        found = as_json(summarise(*(compare(name, *CASES[name]) for name in names)))
        json.dumps(found, allow_nan=False)
    assert found["metrics"]["hd95_mm"]["mean"] == 0.0
    assert found["volume_agreement_ml"]["bias"] is None


def test_a_mean_over_labels_weighs_labels_alike():
    found = mean_of([1.0, 1.0, 1.0, 0.0, None], "abcaz", [1, 1, 1, 2, 2])
    assert (found["mean"], found["median"], found["n"], found["n_patients"]) == (0.5, 1.0, 4, 3)
    assert mean_of([None, float("nan")], "ab") == {
        "mean": None, "mean_95": None, "no_mean_95": "0 patients; an interval needs at least 5",
        "median": None, "n": 0, "n_patients": 0,
    }  # fmt: skip


def test_every_interval_lies_where_its_metric_can_be():
    """Five perfect and missed cases: a mean ± t standard errors would leave [0, 1] and [0, ∞)."""
    pairs = [CASES["same"], CASES["missed"], CASES["false"], CASES["split"]]
    found = summarise(*(compare(str(n), *pairs[n % 4]) for n in range(8)))
    for name, (lowest, highest) in METRICS.items():
        interval = found.metrics[name]["mean_95"]
        assert interval is None or lowest <= interval[0] <= interval[1] <= highest
    rates = [found.detection[name]["mean_95"] for name in ("sensitivity", "precision", "f1")]
    assert all(0 <= low <= high <= 1 for low, high in rates)
    assert found.detection["false_positives_per_scan"]["mean_95"][0] >= 0


def test_a_sensitivity_of_one_has_the_exact_interval():
    found = summarise(*(compare(str(n), *CASES["same"]) for n in range(6)))
    assert found.detection["sensitivity"]["mean_95"] == pytest.approx([0.025 ** (1 / 6), 1])
    assert found.metrics["hd95_mm"]["mean_95"] is None
    assert found.metrics["hd95_mm"]["no_mean_95"].startswith("all 6 patients have the same value")
