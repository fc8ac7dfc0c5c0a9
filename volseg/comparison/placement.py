"""Where the later scan lies relative to the earlier one, and whether that can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volseg.preprocessing.register import Registration
from volseg.volume import Geometry, Rigid

# Usual limits for a patient on the table; larger values may be right, but need a check by eye.
MAX_MOVED_MM, MAX_TURNED_DEG = 50.0, 20.0
MAX_ERROR_MM = 3.0  # between registration in one direction and the other
MAX_TILT_ERROR_DEG = 5.0  # of the axial plane: long axes may be 16 % off (docs/benchmarks.md)
SAME_PLACE_MM = 2.0  # registration that moves less agrees with the headers
# Of several pairs of scans, the row of the patient has the worst value.
WORST = {
    "moved_mm": max,
    "turned_deg": max,
    "registration_error_mm": max,
    "similarity_before": min,
    "similarity_after": min,
}


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Transform between the two scans, with its columns of response.csv and its warnings.

    Args:
        transform: from points of the earlier to points of the later scan.
        doubt: why lesions matched by it cannot be trusted; empty if they can.
    """

    transform: Rigid = field(default_factory=Rigid.identity)
    columns: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    doubt: str = ""


def place_by_headers(before: Geometry, after: Geometry) -> Placement:
    """Take the world coordinates of two scans as they are."""
    columns = {"registration": "none"}
    if before.fraction_inside(after) or after.fraction_inside(before):
        return Placement(columns=columns)
    doubt = "the two scans nowhere overlap in world coordinates"
    warnings = [f"W_APART: {doubt}, so no lesion could be matched"]
    fix = "compare without --no-registration"
    return Placement(columns=columns, warnings=warnings, doubt=f"{doubt}: {fix}")


def trusted_placement(
    registration: Registration, points_mm: np.ndarray, *, normal: np.ndarray
) -> Placement:
    """Judge a registration at the lesions; return the identity if it did not improve similarity.

    Args:
        points_mm: (N, 3) lesion centroids in the earlier scan, RAS mm, N ≥ 1.
        normal: (3,) normal of the earlier scan's axial slices, in which diameters are measured.
    """
    shift_mm = float(registration.shift_mm(points_mm).max())
    similarity = {
        "similarity_before": registration.similarity_before,
        "similarity_after": registration.similarity_after,
    }
    if not registration.is_better:
        columns = {"registration": "none", "moved_mm": 0.0, "turned_deg": 0.0} | similarity
        if shift_mm <= SAME_PLACE_MM:
            return Placement(columns=columns)
        doubt = "the scans are nowhere more alike than where their headers place them"
        warning = f"W_REGISTRATION: {doubt}, so world coordinates were taken as they are"
        return Placement(Rigid.identity(), columns, [warning], _no_response(doubt))
    rotation_deg = registration.transform.angle_deg
    errors_mm = registration.disagreement_mm(points_mm)
    error_mm = None if errors_mm is None else float(errors_mm.max())
    doubt, consequence = _uncertainty(registration, error_mm, normal)
    warnings = []
    if shift_mm > MAX_MOVED_MM or rotation_deg > MAX_TURNED_DEG:
        warnings.append(
            f"W_MOVED: registration moved a lesion by {shift_mm:.0f} mm and turned the scan by "
            f"{rotation_deg:.0f}°, over {MAX_MOVED_MM:.0f} mm or {MAX_TURNED_DEG:.0f}°: "
            "look at the picture"
        )
    if doubt:
        warnings.append(f"W_REGISTRATION: {doubt}, so {consequence}")
    columns = {"registration": "rigid", "moved_mm": shift_mm, "turned_deg": rotation_deg}
    columns |= {"registration_error_mm": error_mm} | similarity
    return Placement(
        registration.transform, columns, warnings, _no_response(doubt) if doubt else ""
    )


def _uncertainty(
    registration: Registration, error_mm: float | None, normal: np.ndarray
) -> tuple[str, str]:
    """Return why a registration cannot be trusted, and what may follow; empty if it can."""
    mismatched = "lesions may have been matched wrongly"
    if error_mm is None:
        return "registration worked in one direction only", mismatched
    if error_mm > MAX_ERROR_MM:
        return f"registration is uncertain by {error_mm:.1f} mm", mismatched
    tilt_deg = registration.plane_disagreement_deg(normal)
    if tilt_deg is not None and tilt_deg > MAX_TILT_ERROR_DEG:
        doubt = f"registration is uncertain by {tilt_deg:.0f}° about the axial plane"
        return doubt, "diameters may have been taken in another plane"
    return "", ""


def _no_response(doubt: str) -> str:
    return (
        f"{doubt}: look at the picture (--figures), and if world coordinates can be trusted, "
        "compare with --no-registration"
    )


def worst_columns(columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the worst columns of several placements; None where a value is unknown."""
    if len(columns) == 1:
        return dict(columns[0])
    if not any(columns):
        return {}
    result: dict[str, Any] = {
        "registration": ";".join(cells.get("registration", "") for cells in columns)
    }
    for name, worst in WORST.items():
        values = [cells[name] for cells in columns if name in cells]
        result[name] = worst(values) if values and None not in values else None
    return result
