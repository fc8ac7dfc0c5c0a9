"""Intensities of a lesion's voxels → statistics, mass and calcium scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volseg.measurement.ragged import Ragged
from volseg.postprocessing.components import label_components

PERCENTILES = {"p05": 5, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "p95": 95}

# (HU, g/cm³), linear between. Source: Schneider et al., Phys Med Biol 45:459 (2000), equations
# 17 to 21. Density drops at 100 HU, where the line of soft tissue ends and that of bone begins.
SCHNEIDER = (
    (-1000.0, 0.00121),
    (-98.0, 0.93),
    (-97.0, 0.930486),
    (14.0, 1.03),
    (23.0, 1.031),
    (100.0, 1.1199),
    (101.0, 1.0762),
    (1600.0, 1.9642),
    (3000.0, 2.8),
)

AGATSTON_SLICE_MM = 3.0  # slice distance for which the score is defined
AGATSTON_STEPS_HU = (200.0, 300.0, 400.0)  # peaks from which the weight is 2, 3 and 4
AGATSTON_SMALLEST_MM2 = 1.0
# Relative error of an area on an oblique grid with a float32 affine: so that four pixels of
# 0.25 mm² count as 1 mm².
ROUNDING = 1e-4


def statistics(values: Ragged) -> dict[str, np.ndarray]:
    """Return statistics of the finite intensities of L lesions, such as `mean` → (L,) array.

    Percentiles are interpolated linearly between neighbouring values, as in pyradiomics. Skewness
    and excess kurtosis are those of the population; NaN if all values are equal.

    Source: IBSI 1, section 3.3 (arXiv 1612.07003).
    """
    # + 0.0 turns -0 into 0.
    low, high = (end.astype(np.float64) + 0.0 for end in (values.first, values.last))
    mean = values.mean()
    percentiles = {name: values.percentile(percent) for name, percent in PERCENTILES.items()}
    variance, third, fourth = (
        values.mean(lambda part, lesion, p=power: (part - mean[lesion]) ** p) for power in (2, 3, 4)
    )
    # The mean of equal values may be off in its last bit.
    variance = np.where(low < high, variance, np.nan)
    return percentiles | {
        "mean": mean,
        "sd": np.where(low < high, np.sqrt(variance), 0.0),
        "min": low,
        "max": high,
        "skewness": third / variance**1.5,
        "kurtosis": fourth / variance**2 - 3,
    }


def density_g_cm3(hu: Ragged, calibration: Sequence[tuple[float, float]] = SCHNEIDER) -> np.ndarray:
    """Return the mean mass density (L,) of L lesions in g/cm³.

    Args:
        calibration: points (HU, g/cm³), linear between and constant beyond them.
    """
    points_hu, density = np.array(calibration).T
    return hu.mean(lambda part, lesion: np.interp(part, points_hu, density))


def agatston(
    hu: np.ndarray, inside: np.ndarray, matrix: np.ndarray, *, threshold_hu: float = 130.0
) -> tuple[float, np.ndarray]:
    """Return the Agatston score of a lesion and the mask of the voxels that count.

    In each axial slice, every connected patch of at least 1 mm² above the threshold adds its area
    in mm² × 1 to 4, depending on its peak. The score is defined for slices 3 mm apart; for other
    slices the sum is scaled by slice distance / 3 mm.

    Args:
        hu, inside: (R, A, S) intensities and mask of the lesion's box.
        matrix: (3, 3) voxel → mm.

    Source: Agatston et al., JACC 15:827 (1990).
    """
    counted = np.zeros(inside.shape, bool)
    pixel_mm2 = float(np.linalg.norm(np.cross(matrix[:, 0], matrix[:, 1])))
    calcium = inside & (np.nan_to_num(hu, nan=-np.inf) > threshold_hu)
    score = 0.0
    for s in np.flatnonzero(calcium.any(axis=(0, 1))):
        in_slice = calcium[:, :, s]
        patches, n = label_components(np.ascontiguousarray(in_slice), 8)
        patch_of_pixel = patches[in_slice]
        areas_mm2 = np.bincount(patch_of_pixel, minlength=n + 1) * pixel_mm2
        peaks = np.full(n + 1, -np.inf)
        np.maximum.at(peaks, patch_of_pixel, hu[:, :, s][in_slice])
        areas_mm2[areas_mm2 < AGATSTON_SMALLEST_MM2 * (1 - ROUNDING)] = 0.0
        counted[:, :, s] = areas_mm2[patches] > 0
        score += float(areas_mm2 @ (1 + np.searchsorted(AGATSTON_STEPS_HU, peaks, "right")))
    return score * slice_distance_mm(matrix) / AGATSTON_SLICE_MM, counted


def slice_distance_mm(matrix: np.ndarray) -> float:
    """Return the distance between axial slices; below the spacing if the gantry was tilted."""
    normal = np.cross(matrix[:, 0], matrix[:, 1])
    return abs(float(matrix[:, 2] @ normal)) / float(np.linalg.norm(normal))
