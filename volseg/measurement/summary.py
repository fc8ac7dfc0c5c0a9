"""The row of a scan in cases.csv, as far as it follows from its lesions."""

from __future__ import annotations

import math

from volseg.measurement.recist import sum_of_diameters_mm
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.specks import MeasuredLesions


def summarise(measured: MeasuredLesions) -> CaseRow:
    """Return the row of a scan: number and volume of its lesions, sum of diameters, burden, score.

    What specks may change and was not measured for them stays empty.
    """
    scan, lesions, specks = measured.scan, measured.largest, measured.specks
    total_ml = float(sum(lesion.volume_ml for lesion in lesions))
    total_ml += 0.0 if specks is None else specks.volume_ml
    organ_ml = None
    if scan.organ_voxels:  # else the whole organ would be lesion
        organ_ml = scan.organ_voxels * scan.image.geometry.voxel_volume_mm3 / 1000 + total_ml
    targets = [lesion for lesion in lesions if lesion.recist_measurable]
    is_known = _has_diameters(measured)
    return CaseRow(
        case_id=scan.case_id,
        status="done",
        n_lesions=len(measured),
        total_volume_ml=total_ml,
        largest_volume_ml=max((lesion.volume_ml for lesion in lesions), default=None),
        n_measurable=len(targets) if is_known else None,
        sum_long_axis_mm=_sum_mm(measured, targets) if is_known else None,
        organ_volume_ml=organ_ml,
        burden=total_ml / organ_ml if organ_ml else None,
        agatston_score=_agatston_score(measured),
    )


def _has_diameters(measured: MeasuredLesions) -> bool:
    """Check that none is empty, and that none of the specks may be measurable."""
    if measured.specks is not None and measured.specks.may_be_measurable:
        return False
    return all(lesion.recist_measurable is not None for lesion in measured.largest)


def _sum_mm(measured: MeasuredLesions, targets: list[LesionMeasurement]) -> float:
    settings = measured.scan.settings
    lengths_mm = [
        lesion.short_axis_mm if lesion.label_name in settings.lymph_nodes else lesion.long_axis_mm
        for lesion in targets
    ]
    return sum_of_diameters_mm(
        [length_mm or 0.0 for length_mm in lengths_mm],
        [lesion.label for lesion in targets],
        most=settings.max_targets,
        most_per_label=settings.max_targets_per_label,
    )


def _agatston_score(measured: MeasuredLesions) -> float | None:
    """Return the sum over all lesions; None if one of them has no score."""
    scores = [lesion.agatston_score for lesion in measured.largest]
    if not measured.scan.is_calcium_scored or measured.specks is not None:
        return None
    if any(score is None or math.isnan(score) for score in scores):
        return None
    return float(sum(score or 0.0 for score in scores))
