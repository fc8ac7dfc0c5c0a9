"""Measurements of lesions that a classifier may be fused with: numbers of scan and mask alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volseg.measurement.lesions import measure_lesions
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.units import Unit
from volseg.postprocessing.lesions import Lesions
from volseg.recipe import ARBITRARY
from volseg.volume import Volume

FUSIBLE = (  # columns of lesions.csv that need neither a model nor a unit
    *("volume_ml", "volume_mesh_mm3", "surface_area_mm2", "equiv_sphere_diameter_mm"),
    *("max3d_diameter_mm", "long_axis_mm", "short_axis_mm"),
    *("major_axis_mm", "minor_axis_mm", "least_axis_mm"),
    *("sphericity", "compactness", "elongation", "flatness"),
    *("intensity_mean", "intensity_sd", "intensity_min", "intensity_max", "intensity_median"),
    *("intensity_p05", "intensity_p10", "intensity_p25", "intensity_p75"),
    *("intensity_p90", "intensity_p95", "intensity_skewness", "intensity_kurtosis"),
    "intensity_mean_eroded1",
)


def fusible_measurements(
    image: Volume, lesions: Lesions, names: Sequence[str], *, most: int
) -> np.ndarray:
    """Return (n, k) float64 of lesions 1, 2, …, the first `most`; NaN what cannot be measured.

    Args:
        image: the scan, original intensities on its own grid.
        names: of `FUSIBLE`.
    """
    n = min(most, len(lesions.labels))
    scan = SegmentedScan(
        case_id="", image=image, lesions=lesions, unit=Unit(name=ARBITRARY), label_names={}
    )
    rows = measure_lesions(scan, only=np.arange(1, n + 1)) if n else []
    values = [[getattr(row, name) for name in names] for row in rows]
    return np.array(values, dtype=float).reshape(n, len(names))
