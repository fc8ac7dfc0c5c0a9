from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from laws import oblique

from volseg.evaluation.detection import detect_lesions, with_lesions
from volseg.evaluation.overlap import evaluate_case
from volseg.evaluation.summary import METRICS, Mean, as_json, mean_of, summarise_label
from volseg.volume import Geometry, Volume

GEOMETRY = Geometry((24, 6, 6), oblique((1.0, 1.0, 2.0)))
NAMES = {1: "tumour"}


def mask(*spans):
    array = np.zeros(GEOMETRY.shape, np.uint8)
    for start, stop in spans:
        array[start:stop, 2:4, 2:4] = 1
    return Volume(array, GEOMETRY)


def compare(case_id, reference, predicted, patient=None, confidence=None):
    lesions = [
        replace(row, patient=patient, confidence=confidence if row.side == "predicted" else None)
        for row in detect_lesions(reference, predicted, NAMES, case_id=case_id)
    ]
    (row,) = evaluate_case(reference, predicted, NAMES, case_id=case_id)
    return with_lesions(replace(row, patient=patient), lesions), lesions


def summarise(*compared):
    detections = [lesion for _, lesions in compared for lesion in lesions]
    return summarise_label([row for row, _ in compared], detections)


CASES = {
    "same": (mask((2, 8), (12, 16)), mask((2, 8), (12, 16))),
    "split": (mask((2, 12)), mask((2, 6), (8, 12))),
    "missed": (mask((2, 4)), mask()),
    "false": (mask(), mask((2, 4))),
    "absent": (mask(), mask()),
}


def test_cases_are_counted_by_the_masks_that_have_the_label():
    result = summarise(*(compare(name, *pair) for name, pair in CASES.items()))
    assert (result.n_missed, result.n_false, result.n_absent) == (1, 1, 1)
    n = {name: result.metrics[name].n for name in METRICS}
    # Distances need the label in both masks, overlap in either, the error in % in the reference.
    assert (n["hd95_mm"], n["mean_surface_distance_mm"], n["dice"], n["nsd_1mm"]) == (2, 2, 4, 4)
    assert (n["volume_error_percent"], n["volume_error_ml"], result.volumes.n) == (3, 4, 4)
    assert result.metrics["dice"].mean == pytest.approx((1 + 2 * 8 / 18 + 0 + 0) / 4)
    assert result.metrics["volume_error_ml"].mean == pytest.approx(result.volumes.bias)
    n_voxels = sum(reference.array.sum() for reference, _ in CASES.values())
    assert result.reference_ml.sum() == pytest.approx(n_voxels * 2 / 1000)


def test_rates_over_lesions_are_those_of_the_counts():
    compared = [compare(name, *pair) for name, pair in CASES.items()]
    rates = summarise(*compared).detection
    assert (rates.n_reference, rates.n_predicted, rates.n_matched) == (4, 5, 3)
    assert rates.sensitivity.mean == pytest.approx(3 / 4)
    assert rates.precision.mean == pytest.approx(3 / 5)
    assert rates.f1.mean == pytest.approx(2 * 3 / (4 + 5))
    assert rates.false_positives_per_scan.mean == pytest.approx(2 / 5)
    assert rates.false_positives_per_scan.n == 5
    size_bins = rates.sensitivity_by_diameter_mm.values()
    assert sum(size_bin.n for size_bin in size_bins) == 4
    n_matched = sum(size_bin.n * (size_bin.mean or 0) for size_bin in size_bins)
    assert n_matched == pytest.approx(3)
    assert sum(row.n_matched_lesions for row, _ in compared) == 3


def test_a_case_without_a_patient_counts_as_its_own_patient():
    pairs = [*CASES.values()][:3] + [*CASES.values()][:2]
    apart = summarise(*(compare(str(n), *pair) for n, pair in enumerate(pairs)))
    assert apart.metrics["dice"].n_patients == 5
    assert apart.metrics["dice"].mean_95 is not None
    assert apart.metrics["dice"].no_mean_95 == ""
    single = summarise(*(compare(str(n), *pair, patient="a") for n, pair in enumerate(pairs)))
    assert single.metrics["dice"].n_patients == 1
    assert single.metrics["dice"].mean_95 is None
    assert single.metrics["dice"].no_mean_95 == "1 patient; an interval needs at least 5"
    assert (
        as_json(single)["volume_agreement_ml"]["no_intervals"] == single.metrics["dice"].no_mean_95
    )
    assert single.metrics["dice"].mean == apart.metrics["dice"].mean


def test_a_curve_needs_a_confidence_of_every_lesion():
    sure = compare("a", *CASES["same"], confidence=0.9)
    result = summarise(sure, compare("b", *CASES["false"], confidence=0.4))
    assert result.curve is not None
    assert result.curve.sensitivity.tolist() == [1, 1]
    assert result.curve.false_positives_per_scan.tolist() == [0, 0.5]
    result = summarise(sure, compare("b", *CASES["false"]))
    assert (result.curve, result.no_curve) == (None, "1 of 3 predicted lesions have no confidence")
    result = summarise(compare("b", *CASES["false"], confidence=0.4))
    assert result.no_curve == "no lesion in any reference"
    assert summarise(compare("b", *CASES["missed"])).no_curve == "no predicted lesion"


def test_json_has_null_in_place_of_nan():
    for names in (CASES, ["absent"], ["missed"], ["same"]):
        content = as_json(summarise(*(compare(name, *CASES[name]) for name in names)))
        json.dumps(content, allow_nan=False)
    assert content["metrics"]["hd95_mm"]["mean"] == 0.0
    assert content["volume_agreement_ml"]["bias"] is None


def test_a_mean_over_labels_weights_labels_equally():
    result = mean_of([1.0, 1.0, 1.0, 0.0, None], "abcaz", [1, 1, 1, 2, 2])
    assert (result.mean, result.median, result.n, result.n_patients) == (0.5, 1.0, 4, 3)
    unknown = mean_of([None, float("nan")], "ab")
    assert unknown == Mean(None, None, "0 patients; an interval needs at least 5", None, 0, 0)


def test_every_interval_lies_within_the_range_of_its_metric():
    """Use perfect and missed cases, whose mean ± t standard errors leaves [0, 1] and [0, ∞)."""
    pairs = [CASES["same"], CASES["missed"], CASES["false"], CASES["split"]]
    result = summarise(*(compare(str(n), *pairs[n % 4]) for n in range(8)))
    for name, metric in METRICS.items():
        lowest, highest = metric.bounds
        interval = result.metrics[name].mean_95
        assert interval is None or lowest <= interval[0] <= interval[1] <= highest
    rates = [getattr(result.detection, name).mean_95 for name in ("sensitivity", "precision", "f1")]
    assert all(0 <= low <= high <= 1 for low, high in rates)
    assert result.detection.false_positives_per_scan.mean_95[0] >= 0


def test_a_sensitivity_of_one_has_the_exact_interval():
    result = summarise(*(compare(str(n), *CASES["same"]) for n in range(6)))
    assert result.detection.sensitivity.mean_95 == pytest.approx([0.025 ** (1 / 6), 1])
    assert result.metrics["hd95_mm"].mean_95 is None
    assert result.metrics["hd95_mm"].no_mean_95.startswith("all 6 patients have the same value")
