"""The rows of lesions.csv and cases.csv: every column with its unit, meaning and source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from volseg.columns import column


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionMeasurement:
    """A row of lesions.csv.

    None and NaN both mean unknown and are written as an empty cell; `notes` says why.
    """

    case_id: str = column("", "name of the scan")
    lesion_id: int = column(
        "",
        "number of the lesion in the scan and in lesion_ids; 1 is the largest lesion, or with "
        "`--objects labels` the smallest label value",
    )
    label: int = column("", "value of the lesion in the mask")
    label_name: str | None = column(
        "", "name of that value; without a name empty, or such as label_7 from `volseg measure`"
    )
    n_voxels: int = column("voxels", "number of voxels")
    volume_mm3: float = column(
        "mm³",
        "n_voxels × voxel volume |det A| of the scan's own grid, to 12 digits",
        source="IBSI YEKZ",
    )
    volume_ml: float = column("mL", "volume_mm3 / 1000")
    intensity_mean: float = column(
        "intensity_unit",
        "mean of the original intensities; all intensities are empty if a voxel is not finite",
        source="IBSI Q4LE",
    )
    intensity_sd: float = column(
        "intensity_unit",
        "their standard deviation, of the population (1/N)",
        source="root of IBSI ECT3",
    )
    intensity_min: float = column("intensity_unit", "their minimum", source="IBSI 1GSF")
    intensity_p10: float = column(
        "intensity_unit",
        "their 10th percentile, linear between neighbouring values",
        source="IBSI QG58",
    )
    intensity_median: float = column("intensity_unit", "their median", source="IBSI Y12H")
    intensity_p90: float = column(
        "intensity_unit",
        "their 90th percentile, linear between neighbouring values",
        source="IBSI 8DWT",
    )
    intensity_max: float = column("intensity_unit", "their maximum", source="IBSI 84IY")
    intensity_unit: str = column(
        "",
        "HU, SUV or another unit; a.u. if unknown or contradicted; `notes` says if it is a guess",
    )
    centroid_r_mm: float = column(
        "mm", "centre of mass of the voxels, towards the patient's right (RAS world)"
    )
    centroid_a_mm: float = column("mm", "the same, towards anterior")
    centroid_s_mm: float = column("mm", "the same, towards superior")
    touches_border: bool = column(
        "", "true if a voxel lies on the edge of the array, so that the lesion may be cut off"
    )
    confidence_mean: float | None = column(
        "0 to 1",
        "mean probability of the predicted label, before post-processing; empty without a model",
    )
    class_name: str | None = column(
        "",
        "most probable class; empty without a classifier, or if the modality or unit of the scan "
        "is in doubt",
    )
    class_probability: float | None = column("0 to 1", "probability of that class")
    class_probabilities: str | None = column(
        "0 to 1", "probability of every class, as name=value;name=value"
    )
    volume_mesh_mm3: float | None = column(
        "mm³",
        "volume inside the surface (marching cubes at 0.5 on the voxels)",
        None,
        source="IBSI RNU0",
    )
    volume_expected_ml: float | None = column(
        "mL",
        "sum of the model's lesion probability over its voxels and background up to 2 voxels away; "
        "empty without a model",
        None,
    )
    intensity_p05: float | None = column(
        "intensity_unit",
        "5th percentile of the intensities, linear between neighbouring values",
        None,
    )
    intensity_p25: float | None = column(
        "intensity_unit", "25th percentile of the intensities", None
    )
    intensity_p75: float | None = column(
        "intensity_unit", "75th percentile of the intensities", None
    )
    intensity_p95: float | None = column(
        "intensity_unit", "95th percentile of the intensities", None
    )
    intensity_skewness: float | None = column(
        "",
        "skewness of the intensities, m₃ / m₂^1.5; empty if all are equal",
        None,
        source="IBSI KE2A",
    )
    intensity_kurtosis: float | None = column(
        "",
        "excess kurtosis of the intensities, m₄ / m₂² − 3: 0 for a normal distribution; "
        "empty if all are equal",
        None,
        source="IBSI IPH6",
    )
    intensity_mean_eroded1: float | None = column(
        "intensity_unit",
        "mean of the voxels whose six neighbours all lie in the lesion: excludes partial volume",
        None,
    )
    density_g_cm3: float | None = column(
        "g/cm³",
        "mean mass density of the voxels, from HU by a piecewise-linear calibration; "
        "only if `--unit` or the model states HU",
        None,
        source="Schneider, Phys Med Biol 45:459 (2000), or the recipe's",
    )
    mass_g: float | None = column("g", "density_g_cm3 × volume_ml", None)
    agatston_score: float | None = column(
        "",
        "area over 130 HU per slice × 1 to 4 by its peak, summed, × slice distance / 3 mm; "
        "only if calcium is scored",
        None,
        source="Agatston, JACC 15:827 (1990)",
    )
    calcium_volume_mm3: float | None = column(
        "mm³", "volume of the voxels counted in the Agatston score", None
    )
    calcium_mass_mg: float | None = column(
        "mg", "their mean HU × volume × the recipe's calibration factor; empty without one", None
    )
    suv_peak: float | None = column(
        "SUV",
        "highest mean of a ball of 1 cm³ (radius 6.2 mm) round any voxel of the lesion, over all "
        "voxels of the scan whose centres lie in it; only if the unit is SUV. SUVmax is "
        "intensity_max, SUVmean intensity_mean",
        None,
        source="IBSI 0F91 (global intensity peak)",
    )
    mtv41_ml: float | None = column(
        "mL",
        "metabolic tumour volume: voxels of the lesion from 41 % of its SUVmax up; only if the "
        "unit is SUV",
        None,
        source="EANM, Eur J Nucl Med Mol Imaging 42:328 (2015)",
    )
    mtv_fixed_ml: float | None = column(
        "mL", "the same, from a fixed SUV up: `--mtv-threshold`, by default 4", None
    )
    tlg_g: float | None = column(
        "g",
        "total lesion glycolysis: SUVmean × volume_ml; only if the unit is SUV",
        None,
        source="Larson, Clin Positron Imaging 2:159 (1999)",
    )
    tlg41_g: float | None = column("g", "the same of the voxels in mtv41_ml", None)
    tlg_fixed_g: float | None = column("g", "the same of the voxels in mtv_fixed_ml", None)
    surface_area_mm2: float | None = column(
        "mm²", "area of the surface that encloses volume_mesh_mm3", None, source="IBSI C0JK"
    )
    sphericity: float | None = column(
        "0 to 1", "(36 π V²)^⅓ / A of that surface: 1 for a ball", None, source="IBSI QCFX"
    )
    compactness: float | None = column(
        "0 to 1", "36 π V² / A³: sphericity cubed", None, source="IBSI BQWJ"
    )
    elongation: float | None = column(
        "0 to 1",
        "minor / major axis; 1 is round (ITK reports the inverse)",
        None,
        source="IBSI Q3CK",
    )
    flatness: float | None = column("0 to 1", "least / major axis", None, source="IBSI N17B")
    major_axis_mm: float | None = column(
        "mm",
        "4 √λ₁ of the covariance of the voxel centres, 1/(N − 1); empty for one voxel",
        None,
        source="IBSI TDIC",
    )
    minor_axis_mm: float | None = column("mm", "4 √λ₂", None, source="IBSI P9VJ")
    least_axis_mm: float | None = column("mm", "4 √λ₃", None, source="IBSI 7J51")
    max3d_diameter_mm: float | None = column(
        "mm", "largest distance between two points of the surface", None, source="IBSI L0JK"
    )
    equiv_sphere_diameter_mm: float | None = column(
        "mm", "diameter of the ball of volume_mm3", None
    )
    long_axis_mm: float | None = column(
        "mm",
        "longest chord between two points of the contour in any axial slice",
        None,
        source="RECIST 1.1, Eur J Cancer 45:228 (2009)",
    )
    short_axis_mm: float | None = column(
        "mm", "longest chord perpendicular to it in the same slice", None, source="RECIST 1.1"
    )
    axis_slice: int | None = column(
        "", "slice of the two axes, counted from 0 at the lowest slice of the scan", None
    )
    long_axis_p0_r_mm: float | None = column(
        "mm", "one end of the long axis, towards the patient's right (RAS world)", None
    )
    long_axis_p0_a_mm: float | None = column("mm", "the same, towards anterior", None)
    long_axis_p0_s_mm: float | None = column("mm", "the same, towards superior", None)
    long_axis_p1_r_mm: float | None = column(
        "mm", "its other end, towards the patient's right (RAS world)", None
    )
    long_axis_p1_a_mm: float | None = column("mm", "the same, towards anterior", None)
    long_axis_p1_s_mm: float | None = column("mm", "the same, towards superior", None)
    short_axis_p0_r_mm: float | None = column(
        "mm", "one end of the short axis, towards the patient's right (RAS world)", None
    )
    short_axis_p0_a_mm: float | None = column("mm", "the same, towards anterior", None)
    short_axis_p0_s_mm: float | None = column("mm", "the same, towards superior", None)
    short_axis_p1_r_mm: float | None = column(
        "mm", "its other end, towards the patient's right (RAS world)", None
    )
    short_axis_p1_a_mm: float | None = column("mm", "the same, towards anterior", None)
    short_axis_p1_s_mm: float | None = column("mm", "the same, towards superior", None)
    recist_measurable: bool | None = column(
        "",
        "long axis ≥ 10 mm and, if slices are over 5 mm apart, ≥ twice their distance; "
        "for a lymph node short axis ≥ 15 mm",
        None,
        source="RECIST 1.1",
    )
    bbox_min_r_mm: float | None = column(
        "mm",
        "lower corner of the bounding box, edges of voxels included, towards the patient's right "
        "(RAS world)",
        None,
    )
    bbox_min_a_mm: float | None = column("mm", "the same, towards anterior", None)
    bbox_min_s_mm: float | None = column("mm", "the same, towards superior", None)
    bbox_max_r_mm: float | None = column(
        "mm", "its upper corner, towards the patient's right (RAS world)", None
    )
    bbox_max_a_mm: float | None = column("mm", "the same, towards anterior", None)
    bbox_max_s_mm: float | None = column("mm", "the same, towards superior", None)
    nearest_lesion_mm: float | None = column(
        "mm",
        "distance to the surface of the nearest other lesion; empty if there is none",
        None,
    )
    confidence_p10: float | None = column(
        "0 to 1", "10th percentile of the probability whose mean is confidence_mean", None
    )
    spacing_r_mm: float | None = column("mm", "voxel size along the array axis nearest to R", None)
    spacing_a_mm: float | None = column("mm", "the same, nearest to A", None)
    spacing_s_mm: float | None = column("mm", "the same, nearest to S", None)
    connectivity: int | None = column(
        "", "26: voxels that share a corner belong together; empty with `--objects labels`", None
    )
    model: str | None = column(
        "", "name and hash of the model; empty for a mask from elsewhere", None
    )
    volseg_version: str | None = column("", "volseg version that measured the lesion", None)
    notes: str = column("", "what could not be measured, and why; empty if nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRow:
    """A row of cases.csv, also for a failed case.

    None means unknown and is written as an empty cell.
    """

    case_id: str = column("", "name of the scan")
    status: Literal["done", "failed", "pending", "unknown"] = column(
        "", "done, failed, pending (not reached yet) or unknown (the case's record is damaged)"
    )
    reason: str = column("", "why the case failed and what to do; empty if it did not", default="")
    n_lesions: int | None = column(
        "", "number of rows in lesions.csv; 0 for a scan without lesions", default=None
    )
    total_volume_ml: float | None = column("mL", "sum of the volumes of all lesions", default=None)
    image: str = column("", "file of the scan", default="")
    model: str = column(
        "", "name and hash of the model; empty for a mask from elsewhere", default=""
    )
    seconds: float | None = column("s", "time taken for this scan", default=None)
    warnings: str = column(
        "", "what to know before trusting the numbers; empty if nothing", default=""
    )
    largest_volume_ml: float | None = column(
        "mL", "volume of the largest lesion; empty if there is none", default=None
    )
    sum_long_axis_mm: float | None = column(
        "mm",
        "sum of diameters: long axes (short axes of lymph nodes) of the five largest measurable "
        "lesions, at most two per label; the recipe may set other numbers",
        default=None,
        source="RECIST 1.1, Eur J Cancer 45:228 (2009)",
    )
    n_measurable: int | None = column(
        "", "number of measurable lesions, see recist_measurable", default=None
    )
    organ_volume_ml: float | None = column(
        "mL",
        "volume of the organ and all lesions of any label; empty if no label is the organ",
        default=None,
    )
    burden: float | None = column(
        "0 to 1",
        "volume of all lesions / organ_volume_ml; all other labels count as lesions of the organ",
        default=None,
    )
    agatston_score: float | None = column(
        "", "sum over all lesions; only if calcium is scored", default=None
    )
    n_dropped: int | None = column(
        "",
        "predicted lesions that the model's filter dropped; empty without a filter",
        default=None,
    )
    slices_skipped: str | None = column(
        "",
        "axial slices that the model's gate skipped, counted from 0 at the feet, such as 0-11;30; "
        "empty without a gate, or if it skipped none",
        default=None,
    )
