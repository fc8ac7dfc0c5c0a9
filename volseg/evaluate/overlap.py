"""How much of a predicted mask lies in the reference mask, and how far their volumes differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from volseg.columns import column
from volseg.errors import ScanError
from volseg.volume import Geometry, Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapRow:
    """One label of one case. NaN is unknown and is written as an empty cell."""

    case_id: str = column("", "name of the case")
    label: int = column("", "value in the mask")
    label_name: str = column("", "name of that value")
    dice: float = column("0 to 1", "2 |R ∩ P| / (|R| + |P|); 0 if one mask is empty; empty if both are")
    reference_volume_ml: float = column("mL", "volume in the reference mask")
    predicted_volume_ml: float = column("mL", "volume in the predicted mask")
    volume_error_ml: float = column("mL", "predicted minus reference")
    volume_error_percent: float = column("%", "volume_error_ml / reference_volume_ml; empty where that is 0")


def evaluate_case(
    reference: Volume, predicted: Volume, label_names: Mapping[int, str], *, case_id: str
) -> list[OverlapRow]:
    """Compare a predicted mask with its reference, label by label.

    Args:
        reference, predicted: masks on the same grid.
        label_names: label value → name, for every value of the masks; 0 is background and has no row.
        case_id: name of the case.

    Returns:
        One row per named label in ascending order, also for a label that neither mask has.

    Raises:
        ScanError: `E_PAIR`, the grids differ; `E_LABEL`, a mask has a value without a name.
    """
    _check_same_grid(reference.geometry, predicted.geometry, case_id)
    layout = "F" if reference.array.flags.f_contiguous else "C"
    truth, guess = reference.intensities().ravel(order=layout), predicted.intensities().ravel(order=layout)
    inside = (truth != 0) | (guess != 0)
    truth, guess = truth[inside], guess[inside]
    n_truth, n_guess, n_both = _count(truth), _count(guess), _count(truth[truth == guess])
    _check_named(n_truth | n_guess, label_names, case_id)
    ml = reference.geometry.voxel_volume_mm3 / 1000
    rows = []
    for label in sorted(label_names.keys() - {0}):
        n_reference, n_predicted = n_truth.get(label, 0), n_guess.get(label, 0)
        error = n_predicted - n_reference
        rows.append(
            OverlapRow(
                case_id=case_id,
                label=label,
                label_name=label_names[label],
                dice=_dice(n_reference, n_predicted, n_both.get(label, 0)),
                reference_volume_ml=n_reference * ml,
                predicted_volume_ml=n_predicted * ml,
                volume_error_ml=error * ml,
                volume_error_percent=100 * error / n_reference if n_reference else math.nan,
            )
        )
    return rows


def dice(reference: np.ndarray, predicted: np.ndarray, label: int) -> float:
    """Dice coefficient 2 |R ∩ P| / (|R| + |P|) of one label of two masks of equal shape.

    Returns:
        From 0 to 1; 0 if one mask lacks the label; NaN if both do, since no overlap can then be measured.

    >>> dice(np.array([1, 1, 0]), np.array([0, 1, 0]), 1)
    0.6666666666666666
    """
    _check_same_shape(reference, predicted)
    in_reference, in_predicted = reference == label, predicted == label
    return _dice(int(in_reference.sum()), int(in_predicted.sum()), int((in_reference & in_predicted).sum()))


def _dice(n_reference: int, n_predicted: int, n_both: int) -> float:
    return 2 * n_both / (n_reference + n_predicted) if n_reference + n_predicted else math.nan


def _count(values: np.ndarray) -> dict[int, int]:
    """Label value → number of voxels, without background."""
    labels, counts = np.unique(values, return_counts=True)
    return {label: n for label, n in zip(labels.tolist(), counts.tolist(), strict=True) if label != 0}


def _check_same_grid(reference: Geometry, predicted: Geometry, case_id: str) -> None:
    difference = reference.difference(predicted)
    if difference:
        raise ScanError(
            f"{case_id}: the predicted mask is not on the grid of the reference: {difference}",
            fix="save the predicted mask on the grid of the reference; a mask is never moved silently",
            code="E_PAIR",
        )


def _check_same_shape(reference: np.ndarray, predicted: np.ndarray) -> None:
    if reference.shape != predicted.shape:
        raise ValueError(f"the reference has shape {reference.shape}, the prediction {predicted.shape}")


def _check_named(counts: Mapping[int, int], label_names: Mapping[int, str], case_id: str) -> None:
    unnamed = sorted(counts.keys() - label_names.keys())
    if unnamed:
        raise ScanError(
            f"{case_id}: the masks hold values {unnamed} without a name; named are {dict(label_names)}",
            fix="name them, or set them to 0 in both masks",
            code="E_LABEL",
        )
