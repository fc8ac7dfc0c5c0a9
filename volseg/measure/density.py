"""Intensities of a lesion's voxels → statistics, mass and calcium scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volseg.measure.ragged import Ragged
from volseg.postprocess.components import label_components

PERCENTILES = {"p05": 5, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "p95": 95}

# HU → g/cm³, linear between. Source: Schneider et al., Phys Med Biol 45:459 (2000), equations 17 to 21. It drops at 100 HU, from soft
# tissue to the bone line.
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

AGATSTON_SLICE_MM = 3.0  # for which the score is defined
AGATSTON_STEPS_HU = (200.0, 300.0, 400.0)  # of the peak, from which a slice counts 2, 3 and 4 times
AGATSTON_SMALLEST_MM2 = 1.0
ROUNDING = (
    1e-4  # of an area on an oblique grid of a float32 affine: four pixels of 0.25 mm² are 1 mm²
)


def statistics(values: Ragged) -> dict[str, np.ndarray]:
    """Mean, SD and so on of the finite intensities of L lesions, (L,) each, by the end of their column's name.

    Percentiles are interpolated linearly between neighbouring values, as pyradiomics does; skewness and excess kurtosis are those of
    the population and NaN where all values are equal.

    Source: IBSI 1, section 3.3 (arXiv 1612.07003).
    """
    low, high = (
        values.first.astype(np.float64) + 0.0,
        values.last.astype(np.float64) + 0.0,
    )  # + 0.0 turns -0 into 0
    middle = values.mean()
    found = {name: values.percentile(percent) for name, percent in PERCENTILES.items()}
    variance, third, fourth = (
        values.mean(lambda part, lesion, p=power: (part - middle[lesion]) ** p)
        for power in (2, 3, 4)
    )
    variance = np.where(
        low < high, variance, np.nan
    )  # the mean of equal values may be off in its last bit
    return found | {
        "mean": middle,
        "sd": np.where(low < high, np.sqrt(variance), 0.0),
        "min": low,
        "max": high,
        "skewness": third / variance**1.5,
        "kurtosis": fourth / variance**2 - 3,
    }


def density_g_cm3(hu: Ragged, calibration: Sequence[tuple[float, float]] = SCHNEIDER) -> np.ndarray:
    """(L,) mean mass density of the voxels, linear between the points (HU, g/cm³) of the calibration and constant beyond them."""
    at, density = np.array(calibration).T
    return hu.mean(lambda part, lesion: np.interp(part, at, density))


def agatston(
    hu: np.ndarray, inside: np.ndarray, matrix: np.ndarray, *, threshold_hu: float = 130.0
) -> tuple[float, np.ndarray]:
    """Agatston score of a lesion and which of its voxels count.

    In each axial slice every connected patch of voxels over the threshold of at least 1 mm² gives its area times 1 to 4, by its peak. The
    score is defined for slices 3 mm apart; for others the sum is multiplied by their distance over 3 mm.

    Args:
        hu, inside: (R, A, S) of the lesion's box. matrix: (3, 3) voxel → mm.

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
    """Distance between the planes of neighbouring axial slices: less than the spacing where the gantry was tilted."""
    normal = np.cross(matrix[:, 0], matrix[:, 1])
    return abs(float(matrix[:, 2] @ normal)) / float(np.linalg.norm(normal))


def core(inside: np.ndarray) -> np.ndarray:
    """(R, A, S) bool: the voxels whose six neighbours all lie in the lesion."""
    padded = np.zeros([n + 2 for n in inside.shape], bool)
    padded[1:-1, 1:-1, 1:-1] = inside
    kept = inside.copy()
    for axis in range(3):
        for side in (slice(None, -2), slice(2, None)):
            kept &= padded[tuple(side if each == axis else slice(1, -1) for each in range(3))]
    return kept
