from __future__ import annotations

import pytest

from volseg.evaluation.validation import ValidationRow, summary


def row(n, dice):
    return ValidationRow(
        case_id=f"c{n}",
        patient=f"p{n}",
        fold=0,
        label=1,
        label_name="lesion",
        dice=dice,
        reference_volume_ml=1.0,
        predicted_volume_ml=1.0,
    )


def test_a_validation_has_an_interval_from_five_patients_on_and_else_a_reason():
    dice = [0.95, 0.9, 0.97, 0.85, 0.6]
    metrics = summary([row(n, value) for n, value in enumerate(dice)])
    low, high = metrics["validation_dice_lesion_95"]
    assert 0 <= low < metrics["validation_dice_lesion"] < high <= 1
    assert "no_validation_dice_lesion_95" not in metrics
    metrics = summary([row(n, value) for n, value in enumerate(dice[:4])])
    assert metrics["validation_dice_lesion"] == pytest.approx(0.9175)
    assert "validation_dice_lesion_95" not in metrics
    assert metrics["no_validation_dice_lesion_95"] == "4 patients; an interval needs at least 5"
