"""Columns that come from the model: confidence, expected volume, class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat

import numpy as np

from volseg.measurement.cells import NOTHING, Cells, joined
from volseg.measurement.lesion_box import LesionBox
from volseg.measurement.ragged import Ragged


def confidence_cells(lesions: Sequence[LesionBox]) -> list[Cells]:
    """Return the confidence in each lesion and its expected volume."""
    view = lesions[0].view
    if view.confidence is None:
        return [NOTHING] * len(lesions)
    # In the background, confidence is the probability of any label.
    halos = Ragged.of([lesion.halo_confidence() for lesion in lesions])
    with np.errstate(invalid="ignore"):
        halo_sums = halos.sum()
    del halos
    values = Ragged.of([lesion.values(view.confidence) for lesion in lesions])
    return value_cells(values, halo_sums=halo_sums, voxel_mm3=view.voxel_mm3)


def value_cells(
    values: Ragged, *, halo_sums: np.ndarray | None = None, voxel_mm3: float = 0.0
) -> list[Cells]:
    """Return the columns that follow from the confidence in the voxels of each lesion.

    Args:
        halo_sums: (L,) sum of the confidence round each lesion; None: the expected volume is not
            measured.
    """
    full = 255 if values.values.dtype == np.uint8 else 1
    with np.errstate(invalid="ignore"):
        sums = values.sum()
        means = (sums / values.counts / full).tolist()
        tenths = (values.percentile(10) / full).tolist()
        expected = repeat(NOTHING)
        if halo_sums is not None:
            volumes_ml = (sums + halo_sums) / full * voxel_mm3 / 1000
            expected = _expected_cells(volumes_ml.tolist())
    return [
        joined((Cells({"confidence_mean": mean, "confidence_p10": tenth}), volume))
        if math.isfinite(mean)
        else Cells({}, "confidence: not finite")
        for mean, tenth, volume in zip(means, tenths, expected)
    ]


def _expected_cells(volumes_ml: Sequence[float]) -> Iterator[Cells]:
    for volume_ml in volumes_ml:
        if math.isfinite(volume_ml):
            yield Cells({"volume_expected_ml": volume_ml})
        else:
            yield Cells({}, "volume_expected_ml: the confidence round the lesion is not finite")


def class_cells(lesions: Sequence[LesionBox]) -> list[Cells]:
    """Return the class of each lesion; none if the unit of the scan is in doubt."""
    scan = lesions[0].view.scan
    if scan.classes is None or scan.unit.doubt:
        return [NOTHING] * len(lesions)
    return [_class_cells(scan.classes[lesion.number - 1]) for lesion in lesions]


def probabilities_in(cell: str | None) -> dict[str, float]:
    """Return class → probability of a cell of `class_probabilities`.

    >>> probabilities_in("benign=0.1200;malignant=0.8800")
    {'benign': 0.12, 'malignant': 0.88}
    """
    probabilities: dict[str, float] = {}
    name = ""
    for part in (cell or "").split(";"):
        name += part
        before, _, value = name.rpartition("=")
        if len(value) == len("0.1234") and value[1] == "." and value.replace(".", "").isdecimal():
            probabilities[before], name = float(value), ""
        else:  # the name of the class holds a semicolon
            name += ";"
    return probabilities


def _class_cells(probabilities: Mapping[str, float] | None) -> Cells:
    if not probabilities:
        return Cells({}, "class: not classified")
    if not all(math.isfinite(probability) for probability in probabilities.values()):
        return Cells({}, "class: a probability is not finite")
    name = max(probabilities, key=lambda candidate: probabilities[candidate])
    text = ";".join(f"{key}={value:.4f}" for key, value in probabilities.items())
    return Cells(
        {
            "class_name": name,
            "class_probability": float(probabilities[name]),
            "class_probabilities": text,
        }
    )
