"""Overlap, surface distances and volume errors of a predicted mask and its reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.columns import column
from volseg.errors import ScanError
from volseg.evaluation.surface import NOWHERE, SurfaceDistances, surface_distances
from volseg.volume import Geometry, Volume

COUNTED_TOGETHER = 2**20  # voxels per chunk when labels are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapRow:
    """One label of one case; NaN is unknown and becomes an empty cell."""

    case_id: str = column("", "name of the case")
    label: int = column("", "value in the mask; empty if the two masks could not be compared")
    label_name: str = column("", "name of that value")
    dice: float = column(
        "0 to 1", "2 |R ∩ P| / (|R| + |P|); 0 if one mask is empty; empty if both are"
    )
    reference_volume_ml: float = column("mL", "volume in the reference mask")
    predicted_volume_ml: float = column("mL", "volume in the predicted mask")
    volume_error_ml: float = column("mL", "predicted minus reference")
    volume_error_percent: float = column(
        "%", "volume_error_ml / reference_volume_ml; empty if the reference volume is 0"
    )
    iou: float = column("0 to 1", "|R ∩ P| / |R ∪ P|; 0 if one mask is empty; empty if both are")
    hd95_mm: float = column(
        "mm",
        "95th percentile of the distance from a border voxel to the other border, the larger "
        "of both directions; empty if a mask is empty",
        source="Hausdorff distance; percentile as in Huttenlocher, IEEE TPAMI 15:850 (1993)",
    )
    mean_surface_distance_mm: float = column(
        "mm",
        "mean of those distances over the border voxels of both masks; empty if a mask is empty",
    )
    nsd_1mm: float = column(
        "0 to 1",
        "normalised surface Dice: fraction of the border voxels of both masks within 1 mm of the "
        "other border; 0 if one mask is empty; empty if both are",
        source="Nikolov, J Med Internet Res 23:e26151 (2021), on border voxels",
    )
    nsd_2mm: float = column("0 to 1", "the same within 2 mm", source="the same")
    n_reference_lesions: int | None = column(
        "", "connected components (26 neighbours) in the reference", None
    )
    n_predicted_lesions: int | None = column("", "connected components in the prediction", None)
    n_matched_lesions: int | None = column(
        "", "pairs of lesions matched one to one by overlap; see detections.csv", None
    )
    lesion_sensitivity: float | None = column(
        "0 to 1", "n_matched_lesions / n_reference_lesions; empty without reference lesions", None
    )
    lesion_precision: float | None = column(
        "0 to 1", "n_matched_lesions / n_predicted_lesions; empty without predicted lesions", None
    )
    lesion_f1: float | None = column(
        "0 to 1",
        "2 n_matched_lesions / (n_reference_lesions + n_predicted_lesions); "
        "empty if neither mask has a lesion",
        None,
    )
    patient: str | None = column(
        "",
        "patient of the scan; intervals are over patients; empty if the reference names none",
        None,
    )
    notes: str = column("", "columns that could not be measured, and why; else empty", "")
    status: str = column("", "done, or failed: the masks could not be compared", "done")
    reason: str = column("", "why it failed, and how to fix it; empty if done", "")


@dataclass(frozen=True, slots=True, eq=False)
class LabelPair:
    """One label of two masks: its voxels in the reference, the prediction and both, and surfaces.

    Args:
        voxel_ml: volume of a voxel.
    """

    reference: int
    predicted: int
    both: int
    surface: SurfaceDistances = NOWHERE
    voxel_ml: float = 0.0

    @property
    def dice(self) -> float:
        n = self.reference + self.predicted
        return 2 * self.both / n if n else math.nan

    @property
    def iou(self) -> float:
        n = self.reference + self.predicted - self.both
        return self.both / n if n else math.nan

    @property
    def error(self) -> int:
        """Voxels that the prediction has too many; too few if negative."""
        return self.predicted - self.reference

    @property
    def error_percent(self) -> float:
        return 100 * self.error / self.reference if self.reference else math.nan

    @property
    def notes(self) -> str:
        """Names of the empty columns, and why they are empty."""
        if not self.reference and not self.predicted:
            return "overlap, distances, volume_error_percent: neither mask has the label"
        if not self.reference:
            return "distances, volume_error_percent: the reference lacks the label"
        return "" if self.predicted else "distances: the prediction lacks the label"

    def row(self, label: int, label_name: str, *, case_id: str) -> OverlapRow:
        """Return the row of the label, with every metric."""
        metrics: dict[str, Any] = {name: metric.of(self) for name, metric in METRICS.items()}
        return OverlapRow(
            case_id=case_id,
            label=label,
            label_name=label_name,
            reference_volume_ml=self.reference * self.voxel_ml,
            predicted_volume_ml=self.predicted * self.voxel_ml,
            notes=self.notes,
            **metrics,
        )


ABSENT = LabelPair(0, 0, 0)  # neither mask has the label


def evaluate_case(
    reference: Volume, predicted: Volume, label_names: Mapping[int, str], *, case_id: str
) -> list[OverlapRow]:
    """Compare a predicted mask with its reference, label by label.

    Args:
        reference, predicted: masks on the same grid.
        label_names: label value → name, for every value of the masks; 0 (background) has no row.
        case_id: name of the case.

    Returns:
        One row per named label in ascending order, even if neither mask has it. Columns about
        lesions and patients are left empty.

    Raises:
        ScanError: `E_PAIR` if the grids differ; `E_LABEL` if a mask has a value without a name.
    """
    _check_same_grid(reference.geometry, predicted.geometry, case_id)
    layout = "F" if reference.array.flags.f_contiguous else "C"
    truth, guess = reference.intensities(), predicted.intensities()
    n_truth, n_guess, n_both = _counts(truth.ravel(order=layout), guess.ravel(order=layout))
    _check_named(n_truth | n_guess, label_names, case_id)
    surfaces = surface_distances(truth, guess, reference.geometry)
    voxel_ml = reference.geometry.voxel_volume_mm3 / 1000
    rows = []
    for label in sorted(label_names.keys() - {0}):
        n_reference, n_predicted, n_shared = (n.get(label, 0) for n in (n_truth, n_guess, n_both))
        surface = surfaces.get(label, NOWHERE)
        pair = LabelPair(n_reference, n_predicted, n_shared, surface, voxel_ml)
        rows.append(pair.row(label, label_names[label], case_id=case_id))
    return rows


def dice(reference: np.ndarray, predicted: np.ndarray, label: int) -> float:
    """Return the Dice coefficient 2 |R ∩ P| / (|R| + |P|) of a label of two masks of equal shape.

    Returns:
        From 0 to 1; 0 if one mask lacks the label; NaN if both do, since no overlap is defined.

    >>> dice(np.array([1, 1, 0]), np.array([0, 1, 0]), 1)
    0.6666666666666666
    """
    _check_same_shape(reference, predicted)
    in_reference, in_predicted = reference == label, predicted == label
    both = in_reference & in_predicted
    return LabelPair(int(in_reference.sum()), int(in_predicted.sum()), int(both.sum())).dice


def _counts(
    truth: np.ndarray, guess: np.ndarray
) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Count voxels per label in the first mask, in the second and in both, in one voxel order."""
    counts: tuple[Counter[int], Counter[int], Counter[int]] = (Counter(), Counter(), Counter())
    for start in range(0, truth.size, COUNTED_TOGETHER):
        first, second = (mask[start : start + COUNTED_TOGETHER] for mask in (truth, guess))
        for total, values in zip(counts, (first, second, first[first == second])):
            total.update(_count(values))
    return dict(counts[0]), dict(counts[1]), dict(counts[2])


def _count(values: np.ndarray) -> dict[int, int]:
    """Count the voxels of each label value, without background."""
    labels, counts = np.unique(values, return_counts=True)
    return {
        label: n for label, n in zip(labels.tolist(), counts.tolist(), strict=True) if label != 0
    }


def _check_same_grid(reference: Geometry, predicted: Geometry, case_id: str) -> None:
    difference = reference.difference(predicted)
    if difference:
        raise ScanError(
            f"{case_id}: the predicted mask is not on the grid of the reference: {difference}; "
            f"{predicted.fraction_inside(reference):.0%} of it lies within the reference",
            fix="save the predicted mask on the grid of the reference; masks are not resampled",
            code="E_PAIR",
        )


def _check_same_shape(reference: np.ndarray, predicted: np.ndarray) -> None:
    if reference.shape != predicted.shape:
        raise ValueError(
            f"the reference has shape {reference.shape}, the prediction {predicted.shape}"
        )


def _check_named(counts: Mapping[int, int], label_names: Mapping[int, str], case_id: str) -> None:
    unnamed = sorted(counts.keys() - label_names.keys())
    if unnamed:
        raise ScanError(
            f"{case_id}: masks have values {unnamed} without a name; named: {dict(label_names)}",
            fix="name these values, or set them to 0 in both masks",
            code="E_LABEL",
        )


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a label of two masks; NaN if it is not defined.

    Args:
        of: computes it.
        bounds: smallest and largest possible value.
    """

    of: Callable[[LabelPair], float]
    bounds: tuple[float, float]


FRACTION, NOT_NEGATIVE = (0.0, 1.0), (0.0, math.inf)
# Column of evaluation.csv → how it is computed; summary.json has the mean of each.
METRICS = {
    "dice": Metric(lambda pair: pair.dice, FRACTION),
    "iou": Metric(lambda pair: pair.iou, FRACTION),
    "hd95_mm": Metric(lambda pair: pair.surface.hd95_mm, NOT_NEGATIVE),
    "mean_surface_distance_mm": Metric(lambda pair: pair.surface.mean_mm, NOT_NEGATIVE),
    "nsd_1mm": Metric(lambda pair: pair.surface.nsd(1.0), FRACTION),
    "nsd_2mm": Metric(lambda pair: pair.surface.nsd(2.0), FRACTION),
    "volume_error_ml": Metric(lambda pair: pair.error * pair.voxel_ml, (-math.inf, math.inf)),
    "volume_error_percent": Metric(lambda pair: pair.error_percent, (-100.0, math.inf)),
}
