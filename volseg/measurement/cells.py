"""Cells of the rows of lesions.csv, and the rows that they make up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from volseg import __version__
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.scan import CanonicalScan
from volseg.postprocessing.lesions import equivalent_diameter_mm


class Cells(NamedTuple):
    """Some columns of a row, and a note on those left empty."""

    values: Mapping[str, Any]
    note: str = ""


NOTHING = Cells({})


def joined(parts: Iterable[Cells]) -> Cells:
    """Return the cells of all parts, with their notes."""
    values: dict[str, Any] = {}
    notes = []
    for part in parts:
        values.update(part.values)
        if part.note:
            notes.append(part.note)
    return Cells(values, "; ".join(notes))


class LesionRows:
    """Makes the rows of the lesions of a scan from what was measured."""

    def __init__(self, view: CanonicalScan) -> None:
        scan = view.scan
        self._names, self._labels = scan.label_names, scan.lesions.labels
        self._voxel_mm3, self._is_slice = view.voxel_mm3, view.slice_axis is not None
        self._shared: dict[str, Any] = {
            "case_id": scan.case_id,
            "intensity_unit": scan.unit.name,
            "connectivity": scan.lesions.connectivity,
            "model": scan.model,
            "volseg_version": __version__,
            "confidence_mean": None,
            "class_name": None,
            "class_probability": None,
            "class_probabilities": None,
            **{f"spacing_{axis}_mm": mm for axis, mm in zip("ras", view.image.geometry.spacing_mm)},
        }

    def row(
        self, number: int, n_voxels: int, centroid_mm: Sequence[float], cells: Iterable[Cells]
    ) -> LesionMeasurement:
        """Return the row of a lesion, with the notes in the order of its cells."""
        label, volume_mm3 = int(self._labels[number - 1]), n_voxels * self._voxel_mm3
        r, a, s = centroid_mm
        values, note = joined(cells)
        if label not in self._names:
            note = "; ".join(filter(None, (f"label_name: value {label} has no name", note)))
        ball_mm = None if self._is_slice else equivalent_diameter_mm(volume_mm3)
        return LesionMeasurement(
            **(self._shared | dict(values)),
            lesion_id=number,
            label=label,
            label_name=self._names.get(label),
            n_voxels=n_voxels,
            volume_mm3=volume_mm3,
            volume_ml=volume_mm3 / 1000,
            equiv_sphere_diameter_mm=ball_mm,
            centroid_r_mm=r,
            centroid_a_mm=a,
            centroid_s_mm=s,
            notes=note,
        )


def point_cells(name: str, point_mm: np.ndarray) -> dict[str, float]:
    """Return the columns R, A and S of a point, with three decimals.

    The numbers are rounded twice, so that the last bit does not decide the last digit.
    """
    rounded = (round(rounded_mm(value), 3) + 0.0 for value in point_mm.tolist())
    return {f"{name}_{axis}_mm": value for axis, value in zip("ras", rounded)}


def rounded_mm(value: float) -> float:
    """Round to 1e-9, above the differences between axis orders."""
    return round(value, 9)
