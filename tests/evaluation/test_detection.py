from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from laws import ball, grid_around, lps, oblique, orientations
from monai.metrics import compute_froc_curve_data

from volseg.evaluation.detection import detect_lesions, froc, match_lesions, size_bin, with_lesions
from volseg.evaluation.overlap import evaluate_case
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Geometry, Volume

NAMES = {1: "tumour", 2: "cyst"}


def detect(reference, predicted, affine=None, **options):
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)) if affine is None else affine)
    masks = (Volume(mask.astype(np.uint8), geometry) for mask in (reference, predicted))
    return detect_lesions(*masks, NAMES, case_id="scan", **options)


def of_side(rows, side):
    return [row for row in rows if row.side == side]


def bars(*spans, length=40):
    """Make a mask with a row of voxels for each (start, stop)."""
    mask = np.zeros((length, 3, 3), np.uint8)
    for start, stop in spans:
        mask[start:stop, 1, 1] = 1
    return mask


def rates(reference, predicted, rows):
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)))
    (row,) = evaluate_case(
        Volume(reference, geometry), Volume(predicted, geometry), {1: "tumour"}, case_id="scan"
    )
    filled = with_lesions(row, rows)
    return filled.lesion_sensitivity, filled.lesion_precision, filled.lesion_f1


def test_one_part_of_a_split_lesion_is_matched_and_the_other_is_false():
    reference, predicted = bars((2, 22)), bars((2, 12), (14, 22))
    rows = detect(reference, predicted)
    (truth,), (large, small) = of_side(rows, "reference"), of_side(rows, "predicted")
    assert (truth.status, truth.matched_id, truth.n_overlapping) == ("matched", 1, 2)
    assert truth.iou == large.iou == 10 / 20
    assert (large.status, small.status) == ("matched", "false")
    assert small.iou is None and small.matched_id is None and small.n_overlapping == 1
    assert rates(reference, predicted, rows) == pytest.approx((1, 1 / 2, 2 / 3))


def test_one_of_two_merged_lesions_is_matched_and_the_other_is_missed():
    reference, predicted = bars((2, 12), (14, 22)), bars((2, 22))
    rows = detect(reference, predicted)
    large, small = of_side(rows, "reference")
    (guess,) = of_side(rows, "predicted")
    assert (large.status, small.status) == ("matched", "missed")
    assert (guess.status, guess.matched_id, guess.n_overlapping) == ("matched", 1, 2)
    assert rates(reference, predicted, rows) == pytest.approx((1 / 2, 1, 2 / 3))


def test_pairs_have_the_largest_sum_of_iou_rather_than_the_largest_iou_first():
    # The first pair overlaps most (8 / 19), but the crossed pairs sum to more (4 / 18 + 3 / 15).
    reference, predicted = bars((10, 24), (26, 31)), bars((16, 29), (6, 14))
    rows = detect(reference, predicted)
    partners = [row.matched_id for row in of_side(rows, "reference")]
    assert partners == [2, 1] == best_by_trial(reference, predicted)
    assert [row.iou for row in of_side(rows, "reference")] == [4 / 18, 3 / 15]


def best_by_trial(reference, predicted):
    """Return the partner of each reference lesion, from trying every pairing."""
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)))
    truth, guess = (label_lesions(mask, geometry) for mask in (reference, predicted))
    n, m = len(truth.labels), len(guess.labels)
    iou = np.zeros((n, m + n))  # the last n columns: unmatched
    for i in range(n):
        for j in range(m):
            true_mask, guess_mask = truth.ids == i + 1, guess.ids == j + 1
            if truth.labels[i] == guess.labels[j]:
                iou[i, j] = (true_mask & guess_mask).sum() / (true_mask | guess_mask).sum()
    pairings = permutations(range(m + n), n)
    best = max(pairings, key=lambda columns: sum(iou[i, j] for i, j in enumerate(columns)))
    return [j + 1 if j < m and iou[i, j] > 0 else None for i, j in enumerate(best)]


@pytest.mark.parametrize("seed", range(12))
def test_no_other_pairing_overlaps_more(seed):
    rng = np.random.default_rng(seed)
    reference, predicted = np.zeros((2, 7, 7, 3), np.uint8)
    for mask in (reference, predicted):
        while label_count(mask) < 3:
            i, j = rng.integers(0, 6, 2)
            mask[i : i + 2, j : j + 2, rng.integers(0, 3)] = rng.integers(1, 3)
    rows = detect(reference, predicted)
    truths = of_side(rows, "reference")
    best = best_by_trial(reference, predicted)
    guesses = {row.lesion_id: row for row in of_side(rows, "predicted")}
    matched = [row for row in truths if row.matched_id is not None]
    assert len(matched) == sum(partner is not None for partner in best)
    for row in matched:
        guess = guesses[row.matched_id]
        expected = (row.lesion_id, row.label, row.iou)
        assert (guess.matched_id, guess.label, guess.iou) == expected
    geometry = Geometry(reference.shape, np.eye(4))
    swapped, _ = match_lesions(*(label_lesions(mask, geometry) for mask in (predicted, reference)))
    assert sum(row.iou or 0 for row in truths) == pytest.approx(np.nansum(swapped.iou))


def label_count(mask):
    return len(label_lesions(mask, Geometry(mask.shape, np.eye(4))).labels)


def test_an_overlap_below_min_iou_is_not_matched():
    reference, predicted = bars((2, 12)), bars((7, 17))  # IoU 5 / 15
    rows = detect(reference, predicted, min_iou=1 / 3)
    assert [row.status for row in rows] == ["matched", "matched"]
    rows = detect(reference, predicted, min_iou=0.34)
    assert [row.status for row in rows] == ["missed", "false"]
    assert [row.n_overlapping for row in rows] == [1, 1]


def test_lesions_of_different_labels_are_not_matched():
    reference, predicted = bars((2, 12)), 2 * bars((2, 12))
    rows = detect(reference, predicted)
    assert [(row.status, row.label_name, row.n_overlapping) for row in rows] == [
        ("missed", "tumour", 0),
        ("false", "cyst", 0),
    ]


def test_voxels_that_share_a_corner_are_one_lesion():
    reference = np.zeros((6, 6, 6), np.uint8)
    reference[1, 1, 1] = reference[2, 2, 2] = 1
    assert len(of_side(detect(reference, reference), "reference")) == 1
    reference[2, 2, 2], reference[3, 3, 3] = 0, 1
    assert len(of_side(detect(reference, reference), "reference")) == 2


def test_empty_masks():
    empty, mask = bars(), bars((2, 5), (10, 12))
    assert detect(empty, empty) == []
    assert [row.status for row in detect(mask, empty)] == ["missed", "missed"]
    assert [row.status for row in detect(empty, mask)] == ["false", "false"]
    assert rates(mask, empty, detect(mask, empty)) == (0, None, 0)
    assert rates(empty, mask, detect(empty, mask)) == (None, 0, 0)
    assert rates(empty, empty, []) == (None, None, None)


@pytest.mark.parametrize(
    "affine", [lps((0.7, 0.7, 1.5)), oblique((0.8, 0.9, 1.4))], ids=["lps", "oblique"]
)
def test_size_and_place_are_those_of_a_ball(affine):
    geometry = grid_around(9, affine)
    mask = ball(9, geometry)
    row = detect(mask, mask, geometry.affine)[0]
    assert row.diameter_mm == pytest.approx(18, rel=0.02)
    assert row.size_bin == "10 to 20"
    centre = geometry.to_world_mm(np.argwhere(mask)).mean(axis=0)
    centroid = (row.centroid_r_mm, row.centroid_a_mm, row.centroid_s_mm)
    assert centroid == pytest.approx(centre.tolist())
    assert row.volume_ml == pytest.approx(mask.sum() * geometry.voxel_volume_mm3 / 1000)


def test_a_bound_of_a_size_bin_belongs_to_the_bin_above():
    assert [size_bin(value) for value in (0.1, 4.999, 5, 9.999, 10, 20, 500)] == [
        "under 5", "under 5", "5 to 10", "5 to 10", "10 to 20", "20 and over", "20 and over",
    ]  # fmt: skip


def test_all_48_orientations_give_the_same_rows():
    rng = np.random.default_rng(0)
    a, b = rng.choice(3, p=(0.9, 0.07, 0.03), size=(2, 8, 9, 10)).astype(np.uint8)
    geometry = Geometry(a.shape, oblique((0.7, 0.9, 2.5)))
    expected = detect(a, b)
    assert {row.status for row in expected} == {"matched", "missed", "false"}
    for (reference, affine), (predicted, _) in zip(
        orientations(Volume(a, geometry)), orientations(Volume(b, geometry)), strict=True
    ):
        for row, other in zip(detect(reference, predicted, affine), expected, strict=True):
            near = pytest.approx(
                (other.centroid_r_mm, other.centroid_a_mm, other.centroid_s_mm), abs=1e-6
            )
            assert (row.centroid_r_mm, row.centroid_a_mm, row.centroid_s_mm) == near
            assert replace(row, centroid_r_mm=0, centroid_a_mm=0, centroid_s_mm=0) == replace(
                other, centroid_r_mm=0, centroid_a_mm=0, centroid_s_mm=0
            )


def test_thousands_of_lesions_need_no_table_of_all_pairs():
    rng = np.random.default_rng(1)
    reference, predicted = (rng.random((2, 90, 90, 90)) < 0.01).astype(np.uint8)
    rows = detect(reference, predicted)
    assert len(rows) > 10000
    n_matched = sum(row.status == "matched" for row in of_side(rows, "reference"))
    assert n_matched == sum(row.status == "matched" for row in of_side(rows, "predicted")) > 10


def test_froc_by_hand():
    confidence = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    is_matched = np.array([True, True, False, False, True])
    curve = froc(confidence, is_matched, n_reference=5, n_scans=2)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert curve.sensitivity.tolist() == [1 / 5, 2 / 5, 2 / 5, 3 / 5]
    assert curve.false_positives_per_scan.tolist() == [0, 1 / 2, 1, 1]
    sensitivities = [curve.sensitivity_at(rate) for rate in (0, 0.49, 0.5, 1, 8)]
    assert sensitivities == [0.2, 0.2, 0.4, 0.6, 0.6]
    assert curve.score == pytest.approx((0.2 + 0.2 + 0.4 + 4 * 0.6) / 7)


def test_froc_never_falls_and_depends_on_ranks_alone():
    rng = np.random.default_rng(2)
    confidence, is_matched = rng.random(200).round(2), rng.random(200) < 0.4
    curve = froc(confidence, is_matched, n_reference=120, n_scans=30)
    rates = curve.false_positives_per_scan
    assert (np.diff(curve.sensitivity) >= 0).all() and (np.diff(rates) >= 0).all()
    assert curve.sensitivity[-1] == is_matched.sum() / 120
    assert rates[-1] == (~is_matched).sum() / 30
    squared = froc(confidence**2, is_matched, n_reference=120, n_scans=30)
    np.testing.assert_array_equal(squared.sensitivity, curve.sensitivity)
    assert squared.score == curve.score
    # MONAI's curve has the same points except that of the lowest confidence.
    points = compute_froc_curve_data(confidence[~is_matched], confidence[is_matched], 120, 30)
    ours = {(round(x, 9), round(y, 9)) for x, y in zip(rates, curve.sensitivity)}
    theirs = {(round(x, 9), round(y, 9)) for x, y in zip(*points, strict=True)}
    assert theirs - {(0, 0)} <= ours
    assert len(theirs) > 20


def test_froc_refuses_nan_and_no_lesions_and_scores_0_without_predictions():
    with pytest.raises(ValueError, match="1 NaN"):
        froc(np.array([np.nan]), np.array([True]), n_reference=1, n_scans=1)
    with pytest.raises(ValueError, match="0 lesions"):
        froc(np.array([0.5]), np.array([False]), n_reference=0, n_scans=1)
    assert froc(np.array([]), np.array([]), n_reference=3, n_scans=1).score == 0
