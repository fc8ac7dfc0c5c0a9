from __future__ import annotations

import math

import numpy as np
import pytest
from laws import GRIDS, ball, ball_volume_mm3, centre_mm, grid_around, oblique, orientations

from volseg.columns import columns_of
from volseg.errors import ScanError
from volseg.evaluation.overlap import OverlapRow, dice, evaluate_case
from volseg.volume import Geometry, Volume

NAMES = {1: "liver", 2: "tumour"}


def random_mask(seed, shape=(8, 9, 10)):
    return np.random.default_rng(seed).choice(3, p=(0.7, 0.2, 0.1), size=shape).astype(np.uint8)


def evaluate(reference, predicted, affine=None, names=NAMES):
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)) if affine is None else affine)
    return evaluate_case(
        Volume(reference, geometry), Volume(predicted, geometry), names, case_id="scan"
    )


def test_dice_of_a_mask_with_itself_is_one_and_dice_is_symmetric():
    a, b = random_mask(0), random_mask(1)
    assert dice(a, a, 1) == 1.0
    assert dice(a, b, 1) == dice(b, a, 1)
    assert 0 < dice(a, b, 1) < 1


def test_dice_by_hand():
    assert dice(np.array([1, 1, 1, 0]), np.array([0, 1, 1, 2]), 1) == pytest.approx(4 / 5)


def test_one_empty_mask_gives_zero_and_two_give_nan():
    a, empty = random_mask(0), np.zeros((8, 9, 10), np.uint8)
    assert dice(a, empty, 1) == dice(empty, a, 1) == 0.0
    assert math.isnan(dice(empty, empty, 1))
    rows = evaluate(empty, a)
    assert [row.dice for row in rows] == [0.0, 0.0]
    assert all(math.isnan(row.volume_error_percent) and row.volume_error_ml > 0 for row in rows)
    rows = evaluate(empty, empty)
    assert [row.label for row in rows] == [1, 2]
    assert all(math.isnan(row.dice) for row in rows)
    assert all(row.reference_volume_ml == row.volume_error_ml == 0 for row in rows)


def test_rows_agree_with_the_functions():
    a, b = random_mask(0), random_mask(1)
    affine = oblique((0.7, 0.9, 2.5))
    voxel_ml = Geometry(a.shape, affine).voxel_volume_mm3 / 1000
    for row in evaluate(a, b, affine):
        assert row.dice == dice(a, b, row.label)
        voxels = np.count_nonzero(b == row.label) - np.count_nonzero(a == row.label)
        error_ml, reference_ml = row.volume_error_ml, row.reference_volume_ml
        assert error_ml == pytest.approx(voxels * voxel_ml)
        assert error_ml == pytest.approx(row.predicted_volume_ml - reference_ml)
        assert row.volume_error_percent == pytest.approx(100 * error_ml / reference_ml)
        assert row.label_name == NAMES[row.label]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_two_balls_on_any_grid(grid):
    geometry = grid_around(16, grid((0.9, 0.9, 1.5)))
    small, large = ball(10, geometry), ball(13, geometry, centre_mm(geometry) + 0.2)
    names = {1: "ball"}
    (row,) = evaluate_case(Volume(small, geometry), Volume(large, geometry), names, case_id="balls")
    inner, outer = ball_volume_mm3(10), ball_volume_mm3(13)
    assert row.reference_volume_ml == pytest.approx(inner / 1000, rel=0.02)
    assert row.volume_error_ml == pytest.approx((outer - inner) / 1000, rel=0.03)
    assert row.volume_error_percent == pytest.approx(100 * (outer / inner - 1), rel=0.03)
    assert row.dice == pytest.approx(2 * inner / (inner + outer), rel=0.02)


def test_all_48_orientations_give_the_same_rows():
    a, b = random_mask(0), random_mask(1)
    geometry = Geometry(a.shape, oblique((0.7, 0.9, 2.5)))
    expected = evaluate(a, b)
    for (reference, affine), (predicted, _) in zip(
        orientations(Volume(a, geometry)), orientations(Volume(b, geometry)), strict=True
    ):
        for row, other in zip(evaluate(reference, predicted, affine), expected, strict=True):
            assert (row.dice, row.volume_error_percent) == (other.dice, other.volume_error_percent)
            assert row.volume_error_ml == pytest.approx(other.volume_error_ml, rel=1e-12)


def test_the_order_in_memory_does_not_matter():
    a, b = random_mask(0), random_mask(1)
    expected = evaluate(a, b)
    assert evaluate(np.asfortranarray(a), b) == expected
    assert evaluate(a, np.asfortranarray(b)) == expected
    assert evaluate(a[::-1][::-1], b) == expected


def test_the_same_mask_stored_in_another_orientation_is_refused():
    a = random_mask(0, shape=(8, 8, 8))
    reference = Volume(a, Geometry(a.shape, oblique((0.7, 0.9, 2.5))))
    for array, affine in list(orientations(reference))[1:]:
        predicted = Volume(array, Geometry(array.shape, affine))
        with pytest.raises(ScanError) as caught:
            evaluate_case(reference, predicted, NAMES, case_id="scan")
        assert caught.value.code == "E_PAIR"


def test_another_grid_is_an_error_with_numbers():
    a = random_mask(0)
    affine = oblique((1.0, 1.0, 2.0))
    reference = Volume(a, Geometry(a.shape, affine))
    moved = affine.copy()
    moved[:3, 3] += 3 * affine[:3, 2]  # three slices of 2 mm
    with pytest.raises(ScanError, match=r"scan: .* off by 3 voxels \(6 mm\)") as caught:
        evaluate_case(reference, Volume(a, Geometry(a.shape, moved)), NAMES, case_id="scan")
    assert caught.value.code == "E_PAIR"
    cut = Volume(a[..., 1:], Geometry((8, 9, 9), affine))
    with pytest.raises(ScanError, match=r"\(8, 9, 9\).*\(8, 9, 10\)") as caught:
        evaluate_case(reference, cut, NAMES, case_id="scan")
    assert caught.value.code == "E_PAIR"


def test_rounding_of_a_header_is_not_another_grid():
    a = random_mask(0)
    affine = oblique((0.7, 0.9, 2.5))
    rounded = Volume(a, Geometry(a.shape, affine.astype(np.float32)))
    rows = evaluate_case(Volume(a, Geometry(a.shape, affine)), rounded, NAMES, case_id="scan")
    assert [row.dice for row in rows] == [1.0, 1.0]


def test_a_value_without_a_name_is_refused_rather_than_left_out():
    a = random_mask(0)
    with pytest.raises(ScanError, match=r"\[2\]") as caught:
        evaluate(a, a, names={1: "liver"})
    assert caught.value.code == "E_LABEL"
    assert len(evaluate(a, a, names={0: "background", **NAMES})) == 2  # background has no row


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        dice(np.zeros(3), np.zeros(4), 1)


def test_columns_have_a_meaning():
    described = columns_of(OverlapRow)
    assert " ".join(name for name, *_ in described) == (
        "case_id label label_name dice reference_volume_ml predicted_volume_ml volume_error_ml "
        "volume_error_percent iou hd95_mm mean_surface_distance_mm nsd_1mm nsd_2mm "
        "n_reference_lesions n_predicted_lesions n_matched_lesions lesion_sensitivity "
        "lesion_precision lesion_f1 patient notes status reason"
    )
    assert all(meaning for _, _, meaning, _ in described)
