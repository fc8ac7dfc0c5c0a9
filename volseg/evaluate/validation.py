"""What a network was worth on the scans that it was validated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.columns import column
from volseg.evaluate.intervals import mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRow:
    """One label of one validation scan. NaN is unknown and is written as an empty cell."""

    case_id: str = column("", "name of the case")
    patient: str = column("", "whose scan it is")
    fold: int = column("", "the network that never saw it: 0 but for cross-validation")
    label: int = column("", "value in the mask")
    label_name: str = column("", "name of that value")
    dice: float = column(
        "0 to 1", "2 |R ∩ P| / (|R| + |P|); 0 if one mask is empty; empty if both are"
    )
    reference_volume_ml: float = column("mL", "volume in the reference mask, on the prepared grid")
    predicted_volume_ml: float = column("mL", "volume in the predicted mask, on the prepared grid")


def mean_dice(rows: Sequence[ValidationRow]) -> float:
    """Mean over labels and cases, of those with the label or that were given it; 1 if there is none.

    A label that is neither in the mask nor found does not count: else a network that finds nothing would be good at scans without lesions.
    """
    known = [row.dice for row in rows if not np.isnan(row.dice)]
    return float(np.mean(known)) if known else 1.0


def summary(rows: Sequence[ValidationRow]) -> dict[str, Any]:
    """Mean Dice per label over the cases that have the label or were given it, with its 95 % interval over patients.

    Where there is no interval, `no_validation_dice_<label>_95` says why.
    """
    found: dict[str, Any] = {"validation_cases": len({row.case_id for row in rows})}
    for name in dict.fromkeys(row.label_name for row in rows):
        own = [row for row in rows if row.label_name == name]
        known = [row.dice for row in own if not np.isnan(row.dice)]
        if not known:
            continue
        found[f"validation_dice_{name}"] = round(float(np.mean(known)), 4)
        patients = [row.patient for row in own]
        interval = mean_interval([row.dice for row in own], patients, bounds=(0.0, 1.0))
        if interval.ends is None:
            found[f"no_validation_dice_{name}_95"] = interval.reason
        else:
            found[f"validation_dice_{name}_95"] = [round(end, 4) for end in interval.ends]
    return found
