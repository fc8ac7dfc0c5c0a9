"""Scan and numbered lesions → one row of numbers per lesion, on the scan's own grid and in its original intensities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cc3d
import numpy as np

from volseg.columns import column
from volseg.volume import BoundingBox, Geometry, Volume

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionMeasurement:
    """A row of lesions.csv. None and NaN both mean unknown and are written as an empty cell; `notes` says why."""

    case_id: str = column("", "name of the scan")
    lesion_id: int = column(
        "",
        "number of the lesion in the scan and in lesion_ids; 1 is the largest, or with `--objects labels` the smallest value",
    )
    label: int = column("", "value of the lesion in the mask")
    label_name: str | None = column("", "name of that value; empty if it has none")
    n_voxels: int = column("voxels", "number of voxels")
    volume_mm3: float = column(
        "mm³", "n_voxels × voxel volume |det A| of the scan's own grid, to 12 digits", source="IBSI YEKZ"
    )
    volume_ml: float = column("mL", "volume_mm3 / 1000", source="IBSI YEKZ")
    volume_mesh_mm3: float | None = column(
        "mm³", "volume inside the surface (marching cubes at 0.5 on the voxels)", None, source="IBSI RNU0"
    )
    volume_expected_ml: float | None = column(
        "mL",
        "sum of the model's probability of a lesion over its voxels and those up to 2 away; empty without a model",
        None,
    )
    intensity_mean: float = column(
        "intensity_unit", "mean of the original intensities of the finite voxels", source="IBSI Q4LE"
    )
    intensity_sd: float = column(
        "intensity_unit", "their standard deviation, of the population (1/N)", source="root of IBSI ECT3"
    )
    intensity_min: float = column("intensity_unit", "their minimum", source="IBSI 1GSF")
    intensity_p05: float | None = column("intensity_unit", "their 5th percentile, linear between values", None)
    intensity_p10: float = column(
        "intensity_unit", "their 10th percentile, linear between neighbouring values", source="IBSI QG58"
    )
    intensity_p25: float | None = column("intensity_unit", "their 25th percentile", None)
    intensity_median: float = column("intensity_unit", "their median", source="IBSI Y12H")
    intensity_p75: float | None = column("intensity_unit", "their 75th percentile", None)
    intensity_p90: float = column(
        "intensity_unit", "their 90th percentile, linear between neighbouring values", source="IBSI 8DWT"
    )
    intensity_p95: float | None = column("intensity_unit", "their 95th percentile", None)
    intensity_max: float = column("intensity_unit", "their maximum", source="IBSI 84IY")
    intensity_skewness: float | None = column(
        "", "their skewness m₃ / m₂^1.5; empty if all are equal", None, source="IBSI KE2A"
    )
    intensity_kurtosis: float | None = column(
        "",
        "their excess kurtosis m₄ / m₂² − 3: 0 for a normal distribution; empty if all are equal",
        None,
        source="IBSI IPH6",
    )
    intensity_mean_eroded1: float | None = column(
        "intensity_unit",
        "mean of the core: voxels whose six neighbours are all in the lesion, so that none holds part of something else",
        None,
    )
    intensity_unit: str = column("", "unit of the intensities: HU, SUV, a.u.")
    density_g_cm3: float | None = column(
        "g/cm³",
        "mean mass density of the voxels from their HU, by a piecewise-linear calibration; CT only",
        None,
        source="Schneider, Phys Med Biol 45:459 (2000), or the recipe's",
    )
    mass_g: float | None = column("g", "density_g_cm3 × volume_ml; CT only", None)
    agatston_score: float | None = column(
        "",
        "calcium: area over 130 HU per slice × 1 to 4 by its peak, summed, × slice distance / 3 mm; only where asked for",
        None,
        source="Agatston, JACC 15:827 (1990)",
    )
    calcium_volume_mm3: float | None = column("mm³", "volume of the voxels that the Agatston score counts", None)
    calcium_mass_mg: float | None = column(
        "mg", "their mean HU × volume × the recipe's calibration factor; empty without one", None
    )
    surface_area_mm2: float | None = column("mm²", "area of the surface of volume_mesh_mm3", None, source="IBSI C0JK")
    sphericity: float | None = column(
        "0 to 1", "(36 π V²)^⅓ / A of that surface: 1 for a ball", None, source="IBSI QCFX"
    )
    compactness: float | None = column("0 to 1", "36 π V² / A³: sphericity cubed", None, source="IBSI BQWJ")
    elongation: float | None = column(
        "0 to 1", "minor / major axis; 1 is round (ITK reports the inverse)", None, source="IBSI Q3CK"
    )
    flatness: float | None = column("0 to 1", "least / major axis", None, source="IBSI N17B")
    major_axis_mm: float | None = column(
        "mm", "4 √λ₁ of the covariance of the voxel centres, 1/(N − 1); empty for one voxel", None, source="IBSI TDIC"
    )
    minor_axis_mm: float | None = column("mm", "4 √λ₂", None, source="IBSI P9VJ")
    least_axis_mm: float | None = column("mm", "4 √λ₃", None, source="IBSI 7J51")
    max3d_diameter_mm: float | None = column(
        "mm", "largest distance between two points of the surface", None, source="IBSI L0JK"
    )
    equiv_sphere_diameter_mm: float | None = column("mm", "diameter of the ball of volume_mm3", None)
    long_axis_mm: float | None = column(
        "mm",
        "longest chord between points of the contour in one axial slice",
        None,
        source="RECIST 1.1, Eur J Cancer 45:228 (2009)",
    )
    short_axis_mm: float | None = column(
        "mm", "longest chord perpendicular to it in the same slice", None, source="RECIST 1.1"
    )
    axis_slice: int | None = column("", "that slice, counted from 0 at the lowest slice of the scan", None)
    long_axis_p0_ras: str | None = column("mm", "one end of the long axis: R A S", None)
    long_axis_p1_ras: str | None = column("mm", "its other end", None)
    short_axis_p0_ras: str | None = column("mm", "one end of the short axis: R A S", None)
    short_axis_p1_ras: str | None = column("mm", "its other end", None)
    recist_measurable: bool | None = column(
        "",
        "long axis ≥ 10 mm and, where slices are over 5 mm apart, ≥ twice their distance; of a lymph node short axis ≥ 15 mm",
        None,
        source="RECIST 1.1",
    )
    centroid_r_mm: float = column("mm", "centre of mass of the voxels, towards the patient's right (RAS world)")
    centroid_a_mm: float = column("mm", "the same, towards anterior")
    centroid_s_mm: float = column("mm", "the same, towards superior")
    bbox_min_ras: str | None = column("mm", "lowest R, A and S of any of its voxels, edges included", None)
    bbox_max_ras: str | None = column("mm", "highest R, A and S", None)
    touches_border: bool = column("", "a voxel lies on the edge of the array; volume is a lower bound if it was cut")
    nearest_lesion_mm: float | None = column(
        "mm", "distance between its surface and that of the nearest other lesion; empty if there is none", None
    )
    confidence_mean: float | None = column(
        "0 to 1", "mean probability of the class that the model chose, before post-processing; empty without a model"
    )
    confidence_p10: float | None = column("0 to 1", "10th percentile of that probability", None)
    class_name: str | None = column("", "most probable class; empty without a classifier")
    class_probability: float | None = column("0 to 1", "probability of that class")
    class_probabilities: str | None = column("0 to 1", "probability of every class, as name=value;name=value")
    spacing_r_mm: float | None = column("mm", "distance of voxels along the array axis nearest to R", None)
    spacing_a_mm: float | None = column("mm", "the same, nearest to A", None)
    spacing_s_mm: float | None = column("mm", "the same, nearest to S", None)
    connectivity: int | None = column(
        "", "26: voxels that share a corner are one lesion; empty with `--objects labels`", None
    )
    model: str | None = column("", "name and hash of the model; empty for a mask from elsewhere", None)
    volseg_version: str | None = column("", "version that measured", None)
    notes: str = column("", "what could not be measured, and why; empty if nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRow:
    """A row of cases.csv. A case that failed is a row too; None is unknown and is written as an empty cell."""

    case_id: str = column("", "name of the scan")
    status: Literal["done", "failed", "pending"] = column("", "done, failed, or pending: not reached yet")
    reason: str = column("", "why it failed and what to do; empty if it did not", default="")
    n_lesions: int | None = column("", "number of rows in lesions.csv; 0 is a scan without lesions", default=None)
    total_volume_ml: float | None = column("mL", "sum of the volumes of all lesions", default=None)
    largest_volume_ml: float | None = column("mL", "volume of the largest lesion; empty if there is none", default=None)
    sum_long_axis_mm: float | None = column(
        "mm",
        "sum of diameters: long axes (short ones of lymph nodes) of the five largest measurable lesions, two per label at most",
        default=None,
        source="RECIST 1.1, Eur J Cancer 45:228 (2009)",
    )
    n_measurable: int | None = column("", "lesions that are measurable by that rule", default=None)
    organ_volume_ml: float | None = column(
        "mL", "volume of the organ with the lesions in it; empty where no label is the organ", default=None
    )
    burden: float | None = column("0 to 1", "lesion volume / organ volume", default=None)
    agatston_score: float | None = column("", "sum over its lesions; only where asked for", default=None)
    image: str = column("", "file of the scan", default="")
    model: str = column("", "name and hash of the model; empty for a mask from elsewhere", default="")
    seconds: float | None = column("s", "time taken for this scan", default=None)
    warnings: str = column("", "what to know before trusting the numbers; empty if nothing", default="")


def measure_lesions(
    image: Volume,
    ids: np.ndarray,
    labels: Sequence[int],
    *,
    case_id: str,
    label_names: Mapping[int, str],
    intensity_unit: str,
    confidence: np.ndarray | None = None,
    classes: Sequence[Mapping[str, float] | None] | None = None,
) -> list[LesionMeasurement]:
    """Measure every lesion of a scan; the same numbers for all 48 axis orders of it.

    Args:
        image: the scan as it was read: own grid, original intensities.
        ids: (I, J, K) whole numbers on the same grid; n in the voxels of lesion n, 0 elsewhere.
        labels: label value of lesion 1, 2, …, N.
        case_id: name of the scan.
        label_names: label value → name.
        intensity_unit: such as `HU`.
        confidence: (I, J, K) of the model in its label, uint8 from 0 to 255 or floating point from 0 to 1.
        classes: for lesion 1, 2, …, N the probability of each class by name; None for one that was not classified.

    Returns:
        N rows; none for an empty mask.

    Raises:
        ValueError: arrays of different shape, or numbers of lesions that do not agree.
    """
    _check(image, ids, labels, confidence, classes)
    box = BoundingBox.around(ids)
    if box is None:
        return []
    statistics = cc3d.statistics(ids[box.slices])
    centroids_mm = _centroids_mm(statistics["centroids"][1:] + box.start, image.geometry)
    # |det A| differs in its last bit between axis orders; 12 digits do not.
    voxel_volume_mm3 = float(f"{image.geometry.voxel_volume_mm3:.12g}")
    rows = []
    for n, label in enumerate(labels, start=1):
        lesion_box = _shift(statistics["bounding_boxes"][n], box)
        inside = ids[lesion_box] == n
        name_note = "" if label in label_names else f"label_name: value {label} has no name"
        intensity, intensity_note = _intensity(image, lesion_box, inside)
        trust, trust_note = _confidence(None if confidence is None else _take(confidence, lesion_box, inside))
        scores, class_note = _class(classes[n - 1]) if classes is not None else (NO_CLASS, "")
        n_voxels = int(statistics["voxel_counts"][n])
        r, a, s = centroids_mm[n - 1].tolist()
        rows.append(
            LesionMeasurement(
                case_id=case_id,
                lesion_id=n,
                label=int(label),
                label_name=label_names.get(label),
                n_voxels=n_voxels,
                volume_mm3=n_voxels * voxel_volume_mm3,
                volume_ml=n_voxels * voxel_volume_mm3 / 1000,
                **intensity,
                intensity_unit=intensity_unit,
                centroid_r_mm=r,
                centroid_a_mm=a,
                centroid_s_mm=s,
                touches_border=_touches_border(lesion_box, ids.shape),
                confidence_mean=trust,
                **scores,
                notes="; ".join(note for note in (name_note, intensity_note, trust_note, class_note) if note),
            )
        )
    return rows


def _check(
    image: Volume,
    ids: np.ndarray,
    labels: Sequence[int],
    confidence: np.ndarray | None,
    classes: Sequence[Mapping[str, float] | None] | None,
) -> None:
    if ids.shape != image.array.shape:
        raise ValueError(f"lesion ids have shape {ids.shape}, their image {image.array.shape}")
    if ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ValueError(f"lesion ids are whole numbers from 0, got {ids.dtype} from {ids.min()}")
    if int(ids.max()) != len(labels):
        raise ValueError(f"lesion ids go up to {ids.max()}, but there are {len(labels)} labels")
    if confidence is not None and confidence.shape != ids.shape:
        raise ValueError(f"confidence has shape {confidence.shape}, its image {ids.shape}")
    if confidence is not None and confidence.dtype != np.uint8 and confidence.dtype.kind != "f":
        raise ValueError(f"confidence is uint8 or floating point, got {confidence.dtype}")
    if confidence is not None and confidence.dtype != np.uint8 and np.fmax.reduce(confidence, axis=None) > 1:
        raise ValueError(f"confidence goes from 0 to 1, got {np.fmax.reduce(confidence, axis=None)}")
    if classes is not None and len(classes) != len(labels):
        raise ValueError(f"{len(classes)} lesions are classified, but there are {len(labels)}")


def _centroids_mm(indices: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(N, 3) mean voxel indices → (N, 3) RAS mm, to 1e-9 mm.

    The last bits differ between axis orders. Without this rounding they would decide the last printed digit of a
    centroid such as 0.24415 mm, and the sign of a centroid at 0.
    """
    return np.round(geometry.to_world_mm(indices), 9) + 0.0


def _shift(lesion_box: Box | None, by: BoundingBox) -> Box:
    if lesion_box is None:
        raise ValueError("lesion ids skip a number: every label needs a lesion with voxels")
    i, j, k = (slice(s.start + start, s.stop + start) for s, start in zip(lesion_box, by.start, strict=True))
    return i, j, k


def _touches_border(box: Box, shape: tuple[int, ...]) -> bool:
    return any(side.start == 0 or side.stop == size for side, size in zip(box, shape, strict=True))


def _take(array: np.ndarray, box: Box, inside: np.ndarray) -> np.ndarray:
    """(N,) values of the box where `inside` holds, in no particular order.

    Boolean indexing is several times faster along memory, which in an array from a NIfTI file is along the first axis.
    """
    part = array[box]
    return part.T[inside.T] if array.flags.f_contiguous else part[inside]


def _intensity(image: Volume, box: Box, inside: np.ndarray) -> tuple[dict[str, float], str]:
    """Statistics of the finite intensities of a lesion, and a note on the others.

    Source: IBSI 1, section 3.3 (arXiv 1612.07003), except the percentiles: between two values they are interpolated
    linearly, as in pyradiomics.
    """
    values = image.intensities(_take(image.array, box, inside)).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return dict.fromkeys(INTENSITY_COLUMNS, math.nan), "intensity: no finite voxel"
    # Sorted, so that the sums do not depend on the axis order; + 0.0 turns -0 into 0.
    finite = np.sort(finite) + 0.0
    p10, median, p90 = np.percentile(finite, (10, 50, 90)).tolist()
    numbers = (finite.mean(), finite.std(), finite[0], p10, median, p90, finite[-1])
    n_lost = values.size - finite.size
    note = f"intensity: {n_lost} of {values.size} voxels are not finite and were left out" if n_lost else ""
    return dict(zip(INTENSITY_COLUMNS, map(float, numbers), strict=True)), note


def _confidence(values: np.ndarray | None) -> tuple[float | None, str]:
    """Mean confidence from 0 to 1, and a note if it is unknown though there was a model."""
    if values is None:
        return None, ""
    if not np.isfinite(values).all():
        return None, "confidence: not finite"
    return float(np.sort(values).mean(dtype=np.float64)) / (255 if values.dtype == np.uint8 else 1), ""


def _class(probabilities: Mapping[str, float] | None) -> tuple[dict[str, Any], str]:
    """The class columns of a lesion, and a note if they are unknown."""
    if not probabilities:
        return NO_CLASS, "class: not classified"
    if not all(math.isfinite(probability) for probability in probabilities.values()):
        return NO_CLASS, "class: a probability is not finite"
    name = max(probabilities, key=lambda candidate: probabilities[candidate])
    text = ";".join(f"{candidate}={probability:.4f}" for candidate, probability in probabilities.items())
    return {"class_name": name, "class_probability": float(probabilities[name]), "class_probabilities": text}, ""


INTENSITY_COLUMNS = tuple(f"intensity_{name}" for name in ("mean", "sd", "min", "p10", "median", "p90", "max"))
NO_CLASS: dict[str, Any] = {"class_name": None, "class_probability": None, "class_probabilities": None}
