"""Validation results: Dice per scan and label, and its means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.columns import column
from volseg.evaluation.intervals import mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRow:
    """One label of one validation scan; NaN is unknown and becomes an empty cell."""

    case_id: str = column("", "name of the case")
    patient: str = column("", "patient of the scan")
    fold: int = column(
        "", "fold of the network that was not trained on it; 0 without cross-validation"
    )
    label: int = column("", "value in the mask")
    label_name: str = column("", "name of that value")
    dice: float = column(
        "0 to 1", "2 |R ∩ P| / (|R| + |P|); 0 if one mask is empty; empty if both are"
    )
    reference_volume_ml: float = column("mL", "volume in the reference mask, on the prepared grid")
    predicted_volume_ml: float = column("mL", "volume in the predicted mask, on the prepared grid")


def mean_dice(rows: Sequence[ValidationRow]) -> float:
    """Return the mean Dice over labels and cases, except labels that neither mask has; 1 if none.

    If empty pairs counted as 1, a network that finds nothing would excel on scans without lesions.
    """
    scores = [row.dice for row in rows if not np.isnan(row.dice)]
    return float(np.mean(scores)) if scores else 1.0


def summary(rows: Sequence[ValidationRow]) -> dict[str, Any]:
    """Return the mean Dice of each label with its 95 % interval over patients.

    Cases count if either mask has the label. If there is no interval,
    `no_validation_dice_<label>_95` says why.
    """
    metrics: dict[str, Any] = {"validation_cases": len({row.case_id for row in rows})}
    for name in dict.fromkeys(row.label_name for row in rows):
        of_label = [row for row in rows if row.label_name == name]
        dice = np.array([row.dice for row in of_label])
        if np.isnan(dice).all():
            continue
        metrics[f"validation_dice_{name}"] = round(float(np.mean(dice[~np.isnan(dice)])), 4)
        patients = [row.patient for row in of_label]
        interval = mean_interval(dice.tolist(), patients, bounds=(0.0, 1.0))
        if interval.ends is None:
            metrics[f"no_validation_dice_{name}_95"] = interval.reason
        else:
            metrics[f"validation_dice_{name}_95"] = [round(end, 4) for end in interval.ends]
    return metrics
