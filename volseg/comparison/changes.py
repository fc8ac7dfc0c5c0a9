"""Matched and measured lesions of two time points → what changed, row by row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from volseg.columns import column, optional
from volseg.comparison.groups import LesionGroup, PatientLesions, ScanPair
from volseg.comparison.label_names import label_of
from volseg.comparison.matching import Match
from volseg.comparison.targets import RECIST, none_if_nan
from volseg.measurement.rows import LesionMeasurement
from volseg.recipe import ARBITRARY

TIMES = ("baseline", "follow-up")
# Columns of a lesion at each time; sizes are 0 where it is absent.
SIZES = ("volume_ml", "long_axis_mm", "short_axis_mm")
OTHER_COLUMNS = ("intensity_mean", "centroid_r_mm", "centroid_a_mm", "centroid_s_mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionChange:
    """A row of comparison.csv: a pair of lesions, or a lesion seen at one time point only.

    None is written as an empty cell; `notes` says why.
    """

    patient: str = column("", "name of the patient, as in response.csv")
    baseline_case: str | None = column(
        "", "baseline scan; empty if this region was not scanned then"
    )
    followup_case: str | None = column(
        "", "follow-up scan; empty if this region was not scanned then"
    )
    status: str = column(
        "",
        "matched: one lesion at both times; merged: one of several that became one; "
        "split: one that became several; regrouped: several that became several others; new; gone; "
        "outside: outside the field of view of the other scan; "
        "crumb: a small piece beside a lesion of its scan, counted with it",
    )
    group: int = column(
        "",
        "number shared by lesions that merged or split together, and by a lesion and its crumbs; "
        "unique for every other row",
    )
    label_name: str | None = column("", "name of the label, or its value if it has no name")
    baseline_lesion_id: int | None = column(
        "", "number of the lesion in the baseline scan; empty if it is not there"
    )
    followup_lesion_id: int | None = column(
        "", "number of the lesion in the follow-up scan; empty if it is not there"
    )
    is_target: bool | None = optional(
        "",
        "true for a target lesion, chosen at baseline; empty if targets could not be chosen",
        source=RECIST,
    )
    matched_by: str | None = optional(
        "", "overlap, or distance (of the centroids); empty for a lesion without a partner"
    )
    dice: float | None = optional(
        "0 to 1", "Dice coefficient of the two lesions after registration"
    )
    distance_mm: float | None = optional(
        "mm", "distance between their centroids after registration"
    )
    baseline_volume_ml: float | None = optional(
        "mL", "volume at baseline, crumbs included; 0 for a new lesion"
    )
    followup_volume_ml: float | None = optional(
        "mL", "volume at follow-up, crumbs included; 0 for a lesion that is gone"
    )
    change_volume_ml: float | None = optional(
        "mL",
        "follow-up minus baseline; for merged or split lesions the change of their sum, "
        "in the first row of the group",
    )
    change_volume_percent: float | None = optional(
        "%", "change_volume_ml in percent of the baseline volume"
    )
    baseline_long_axis_mm: float | None = optional(
        "mm", "long axis at baseline, crumbs included; 0 for a new lesion"
    )
    followup_long_axis_mm: float | None = optional(
        "mm",
        "long axis at follow-up, crumbs included, in the axial planes of the baseline scan; "
        "0 for a lesion that is gone",
    )
    change_long_axis_mm: float | None = optional(
        "mm",
        "follow-up minus baseline; for merged or split lesions the change of their sum, "
        "in the first row of the group",
        source=RECIST,
    )
    change_long_axis_percent: float | None = optional(
        "%", "change_long_axis_mm in percent of the baseline long axis"
    )
    baseline_short_axis_mm: float | None = optional(
        "mm", "short axis at baseline, crumbs included; 0 for a new lesion"
    )
    followup_short_axis_mm: float | None = optional(
        "mm", "short axis at follow-up, measured like the long axis; 0 for a lesion that is gone"
    )
    baseline_intensity_mean: float | None = optional("intensity_unit", "mean intensity at baseline")
    followup_intensity_mean: float | None = optional(
        "intensity_unit", "mean intensity at follow-up"
    )
    change_intensity_mean: float | None = optional(
        "intensity_unit",
        "follow-up minus baseline; for merged or split lesions the change of the mean over all "
        "their voxels, in the first row of the group; empty in a.u., which has no common scale "
        "between scans, and if the unit is in doubt",
    )
    intensity_unit: str | None = optional(
        "", "unit of the intensities; empty if it is in doubt or differs between the two times"
    )
    baseline_centroid_r_mm: float | None = optional(
        "mm", "centroid in the baseline scan, towards the patient's right"
    )
    baseline_centroid_a_mm: float | None = optional("mm", "the same, towards anterior")
    baseline_centroid_s_mm: float | None = optional("mm", "the same, towards superior")
    followup_centroid_r_mm: float | None = optional(
        "mm", "centroid in the follow-up scan, in the coordinates of that scan"
    )
    followup_centroid_a_mm: float | None = optional("mm", "the same, towards anterior")
    followup_centroid_s_mm: float | None = optional("mm", "the same, towards superior")
    notes: str = column("", "what is unknown and why, and what to check; empty if nothing", "")


def lesion_changes(
    pairs: Sequence[ScanPair], *, patient: str, lymph_nodes: Collection[str] = ()
) -> list[LesionChange]:
    """Return a row per match of all scan pairs of a patient, in their order.

    Args:
        lymph_nodes: labels of lymph nodes, by name or value.
    """
    lesions = PatientLesions(pairs, lymph_nodes)
    group_of = {id(match): group for group in lesions.groups for match in group.matches}
    return [
        _row(match, group_of[id(match)], lesions, patient)
        for pair in pairs
        for match in pair.matches
    ]


def _row(match: Match, group: LesionGroup, lesions: PatientLesions, patient: str) -> LesionChange:
    pair = group.pair
    of_time = _lesions_of(match, pair)
    b, f = of_time
    changes, notes = _changes(match, group)
    doubts = list(_unit_doubts(pair, of_time))
    units = {lesion.intensity_unit for lesion in of_time if lesion is not None}
    return LesionChange(
        patient=patient,
        baseline_case=pair.baseline.case,
        followup_case=pair.followup.case,
        status=match.status,
        group=group.number,
        label_name=next(label_of(lesion) for lesion in of_time if lesion is not None),
        baseline_lesion_id=match.baseline,
        followup_lesion_id=match.followup,
        is_target=None if lesions.targets is None else b is not None and lesions.is_target(b),
        matched_by=match.how,
        dice=match.dice,
        distance_mm=match.distance_mm,
        **_columns_of("baseline", b, match, absent="new"),
        **_columns_of("followup", f, match, absent="gone"),
        **changes,
        intensity_unit=units.pop() if len(units) == 1 and not doubts else None,
        notes="; ".join([*notes, *doubts, *_notes(match, of_time, pair)]),
    )


_OfTime = tuple[LesionMeasurement | None, LesionMeasurement | None]  # baseline, follow-up


def _lesions_of(match: Match, pair: ScanPair) -> _OfTime:
    return (
        None if match.baseline is None else pair.baseline.by_number[match.baseline],
        None if match.followup is None else pair.followup.by_number[match.followup],
    )


def _columns_of(
    time: str, lesion: LesionMeasurement | None, match: Match, *, absent: str
) -> dict[str, Any]:
    """Return the columns of one time point.

    Args:
        absent: status of a lesion that is not there at this time: its sizes are 0. Otherwise the
            sizes of no lesion are unknown, and those of a crumb belong to its lesion.
    """
    if match.status == "crumb":
        return {}
    if lesion is None:
        zero = 0.0 if match.status == absent else None
        return {f"{time}_{name}": zero for name in SIZES}
    values = {name: none_if_nan(getattr(lesion, name)) for name in (*SIZES, *OTHER_COLUMNS)}
    return {f"{time}_{name}": value for name, value in values.items()}


def _changes(match: Match, group: LesionGroup) -> tuple[dict[str, Any], list[str]]:
    """Return the change columns of a row, and notes on the empty ones."""
    if match.status == "crumb":
        return {}, [_crumb_note(match, group.pair)]
    if not match.is_first:
        first = group.first
        ids = f"lesion {first.baseline} at baseline and {first.followup} at follow-up"
        return {}, [f"change: in the row of {ids}, of the same group"]
    if group.status == "outside":
        return {}, ["change: outside the field of view of the other scan, or no other scan"]
    volume = difference(_total(group.before, "volume_ml"), _total(group.after, "volume_ml"))
    axis = difference(_total(group.before, "long_axis_mm"), _total(group.after, "long_axis_mm"))
    intensity, note = _intensity_change(group)
    notes = [
        "percent: undefined, as there was nothing at baseline" if group.status == "new" else "",
        "long axis: not measured" if axis[0] is None else "",
        note,
    ]
    return {
        "change_volume_ml": volume[0],
        "change_volume_percent": volume[1],
        "change_long_axis_mm": axis[0],
        "change_long_axis_percent": axis[1],
        "change_intensity_mean": intensity,
    }, [text for text in notes if text]


def _intensity_change(group: LesionGroup) -> tuple[float | None, str]:
    if not group.before or not group.after:
        return None, "intensity: no change for a lesion seen at one time only"
    if group.pair.baseline.unit_doubt or group.pair.followup.unit_doubt:
        return None, ""  # the rows say so
    units = {lesion.intensity_unit for lesion in (*group.before, *group.after)}
    if len(units) > 1:
        return None, "intensity: the unit differs between the two times"
    if units == {ARBITRARY}:
        return None, f"intensity: no change, since {ARBITRARY} has no common scale between scans"
    before, after = _mean_intensity(group.before), _mean_intensity(group.after)
    if before is None or after is None:
        return None, "intensity: not measured"
    return after - before, ""


def _mean_intensity(lesions: Sequence[LesionMeasurement]) -> float | None:
    """Return the mean over the voxels of all lesions; None if one is unknown."""
    means = [none_if_nan(lesion.intensity_mean) for lesion in lesions]
    weights = [lesion.n_voxels for lesion in lesions]
    if None in means:
        return None
    total = sum(mean * weight for mean, weight in zip(means, weights) if mean is not None)
    return total / sum(weights)


def _total(lesions: Sequence[LesionMeasurement], name: str) -> float | None:
    values = [none_if_nan(getattr(lesion, name)) for lesion in lesions]
    return None if None in values else float(sum(value for value in values if value is not None))


def _crumb_note(match: Match, pair: ScanPair) -> str:
    time, crumb = next(
        (time, lesion)
        for time, lesion in zip(TIMES, _lesions_of(match, pair), strict=True)
        if lesion is not None
    )
    beside = f"{crumb.volume_ml:.3g} mL beside lesion {match.whole} at {time}"
    return f"crumb: {beside}, counted with it"


def _unit_doubts(pair: ScanPair, of_time: _OfTime) -> Iterator[str]:
    """Yield notes on why a row has no unit: the doubts about the scans of its lesions."""
    for time, scan, lesion in zip(TIMES, (pair.baseline, pair.followup), of_time, strict=True):
        if lesion is not None and scan.unit_doubt:
            yield f"intensity: its unit at {time} is in doubt ({scan.unit_doubt})"


def _notes(match: Match, of_time: _OfTime, pair: ScanPair) -> Iterator[str]:
    if pair.is_remeasured and match.followup is not None and match.status != "crumb":
        yield (
            "diameters at follow-up: in the axial planes of the baseline, "
            f"{pair.tilt_deg:.1f}° from its own slices"
        )
    if match.how == "distance":
        yield "no overlap: matched by the distance between centroids"
    if match.relabelled:
        time = "baseline" if match.baseline is None else "follow-up"
        ids = ", ".join(map(str, match.relabelled))
        yield f"overlaps lesion {ids} at {time}, which has another label"
    for time, lesion in zip(TIMES, of_time, strict=True):
        if lesion is not None and lesion.touches_border:
            yield f"touches the border of the scan at {time}: its size is a lower bound"


def difference(before: float | None, after: float | None) -> tuple[float | None, float | None]:
    """Return `after` − `before`, and the same in percent of `before`; None where unknown."""
    if before is None or after is None:
        return None, None
    return after - before, 100 * (after - before) / before if before > 0 else None
