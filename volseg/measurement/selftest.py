"""Selftest: measure bodies with known sizes in the same way as lesions, and compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.columns import column
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.scan import DEFAULTS, SegmentedScan
from volseg.measurement.units import Unit
from volseg.postprocessing.lesions import label_lesions
from volseg.recipe import HU, Measure
from volseg.volume import Geometry, Volume

# The IBSI digital phantom (CC BY 4.0, theibsi/data_sets), voxels of 2 mm: x fastest, rows are y,
# lines are z; . is outside the lesion.
IBSI_PHANTOM = """
1 4 4 1 1 / 1 4 6 1 1 / 4 1 6 4 1 / 4 4 6 4 1
1 4 4 1 1 / 1 1 6 1 1 / . 1 3 1 1 / 4 4 6 1 1
1 4 4 . . / 1 1 1 1 1 / 1 1 . 1 1 / 1 1 6 1 1
1 4 4 . . / 1 1 1 1 1 / 1 1 1 1 1 / 1 1 6 1 1
"""

# Column, published value, tolerance; if IBSI states none, half of the last printed digit.
# Source: the IBSI reference manual (arXiv 1612.07003), digital phantom.
IBSI_VALUES = (
    ("volume_mm3", 592.0, 4.0),
    ("volume_mesh_mm3", 556.0, 4.0),
    ("surface_area_mm2", 388.0, 3.0),
    ("sphericity", 0.843, 0.005),
    ("compactness", 0.599, 0.004),
    ("max3d_diameter_mm", 13.1, 0.1),
    ("major_axis_mm", 11.4, 0.1),
    ("minor_axis_mm", 9.31, 0.06),
    ("least_axis_mm", 8.54, 0.05),
    ("elongation", 0.816, 0.005),
    ("flatness", 0.749, 0.005),
    ("intensity_mean", 2.15, 0.005),
    ("intensity_sd", math.sqrt(3.05), 0.002),
    ("intensity_skewness", 1.08, 0.005),
    ("intensity_kurtosis", -0.355, 0.0005),
    ("intensity_median", 1.0, 0.0),
    ("intensity_min", 1.0, 0.0),
    ("intensity_p10", 1.0, 0.0),
    ("intensity_p25", 1.0, 0.0),
    ("intensity_p75", 4.0, 0.0),
    ("intensity_p90", 4.0, 0.0),
    ("intensity_max", 6.0, 0.0),
)

BALL_MM, ROD_MM = 10.0, (3.0, 24.0)  # radius; radius and length
# Spacing in mm, angles about R, A and S in radians, relative tolerance of the volume (1.5 × the
# error of a ball made of such voxels).
GRIDS = {
    "1 mm": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), 0.011),
    "0.8 × 0.8 × 2.5 mm, oblique": ((0.8, 0.8, 2.5), (0.3, -0.2, 0.5), 0.017),
    "0.5 × 0.5 × 5 mm, oblique": ((0.5, 0.5, 5.0), (-0.1, 0.2, 0.7), 0.08),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A measure with a known value, and the value measured by this installation."""

    body: str = column("", "what was measured")
    measure: str = column("", "column of lesions.csv")
    expected: float = column("", "known value")
    tolerance: float = column("", "largest allowed difference")
    found: float = column("", "measured value")

    @property
    def is_passed(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance + 1e-9


def selftest() -> list[Check]:
    """Measure the IBSI digital phantom and analytic bodies, and compare with their known values."""
    return [*_ibsi(), *(check for name in GRIDS for check in _bodies(name)), *_calcium()]


def ibsi_phantom() -> np.ndarray:
    """Return the intensities (5, 4, 4) of the digital phantom, 0 outside its lesion."""
    lines = IBSI_PHANTOM.replace(".", "0").strip().splitlines()
    return np.array([[row.split() for row in line.split("/")] for line in lines]).astype(np.int16).T


def _ibsi() -> Iterator[Check]:
    image = ibsi_phantom()
    row = _measure(Volume(image, Geometry(image.shape, np.diag([2.0, 2.0, 2.0, 1.0]))), image > 0)
    yield from _checks("IBSI digital phantom", row, IBSI_VALUES)


def _bodies(grid: str) -> Iterator[Check]:
    spacing_mm, angles, tolerance = GRIDS[grid]
    coarse = max(spacing_mm)
    ball_ml = 4 / 3 * math.pi * BALL_MM**3 / 1000
    ball = _body(spacing_mm, angles, lambda mm: np.linalg.norm(mm, axis=1) <= BALL_MM)
    expected = [
        ("volume_ml", ball_ml, tolerance * ball_ml),
        ("equiv_sphere_diameter_mm", 2 * BALL_MM, tolerance * 2 * BALL_MM / 3),
        ("long_axis_mm", 2 * BALL_MM, 1.01 * coarse),
        ("short_axis_mm", 2 * BALL_MM, 1.01 * coarse),
        ("max3d_diameter_mm", 2 * BALL_MM, 1.01 * coarse),
        ("major_axis_mm", 4 * BALL_MM / math.sqrt(5), coarse / 3),
        ("intensity_mean", 40.0, 0.0),
        ("mass_g", 1.0506 * ball_ml, tolerance * 1.06 * ball_ml),  # 40 HU are 1.0506 g/cm³
    ]
    yield from _checks(f"ball, radius 10 mm, {grid}", ball, expected)
    radius, length = ROD_MM
    rod = _body(
        spacing_mm,
        angles,
        lambda mm: (np.hypot(mm[:, 1], mm[:, 2]) <= radius) & (np.abs(mm[:, 0]) <= length / 2),
    )
    expected = [
        ("max3d_diameter_mm", math.hypot(length, 2 * radius), 1.5 * coarse),
        ("major_axis_mm", 4 * length / math.sqrt(12), 1.2 * coarse),
    ]
    yield from _checks(f"rod, 24 × 6 mm, {grid}", rod, expected)


def _checks(
    body: str, row: LesionMeasurement, values: Sequence[tuple[str, float, float]]
) -> Iterator[Check]:
    for name, expected, tolerance in values:
        value = float(getattr(row, name))
        yield Check(body=body, measure=name, expected=expected, tolerance=tolerance, found=value)


def _calcium() -> Iterator[Check]:
    image = np.zeros((12, 12, 6), np.int16)
    image[3:7, 3:9, 1] = 250  # 24 pixels of 0.25 mm², weight 2
    image[3:7, 3:9, 2] = 420  # the same, weight 4
    volume = Volume(image, Geometry(image.shape, np.diag([0.5, 0.5, 3.0, 1.0])))
    row = _measure(volume, image > 0, Measure(calcium=True, calcium_mg_per_ml_hu=0.8))
    expected = [
        ("agatston_score", 6 * 2 + 6 * 4, 0.0),
        ("calcium_volume_mm3", 36.0, 0.0),
        ("calcium_mass_mg", 0.8 * (250 + 420) / 2 * 0.036, 1e-6),
    ]
    yield from _checks("plaque in two slices of 3 mm", row, expected)


def _body(
    spacing_mm: tuple[float, float, float],
    angles: tuple[float, float, float],
    is_inside: Callable[[np.ndarray], np.ndarray],
) -> LesionMeasurement:
    """Measure a body of 40 HU in −100 HU on a rotated grid.

    Args:
        is_inside: tests points (N, 3), in mm from the centre of the body.
    """
    matrix = np.diag(spacing_mm)
    for axis, angle in enumerate(angles):
        first, second = (n for n in range(3) if n != axis)
        rotation = np.eye(3)
        rotation[first, first] = rotation[second, second] = math.cos(angle)
        rotation[first, second], rotation[second, first] = -math.sin(angle), math.sin(angle)
        matrix = rotation @ matrix
    reach = max(ROD_MM[1] / 2, BALL_MM) + 2 * max(spacing_mm)
    i, j, k = (2 * math.ceil(reach / mm) + 1 for mm in spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -matrix @ [(n - 1) / 2 for n in (i, j, k)]
    geometry = Geometry((i, j, k), affine)
    points_mm = geometry.to_world_mm(np.indices((i, j, k)).reshape(3, -1).T)
    inside = is_inside(points_mm).reshape(i, j, k)
    return _measure(Volume(np.where(inside, np.int16(40), np.int16(-100)), geometry), inside)


def _measure(image: Volume, inside: np.ndarray, settings: Measure = DEFAULTS) -> LesionMeasurement:
    scan = SegmentedScan(
        case_id="selftest",
        image=image,
        lesions=label_lesions(inside.astype(np.uint8), image.geometry, objects="labels"),
        unit=Unit(name=HU),
        label_names={1: "body"},
        settings=settings,
    )
    (row,) = measure_lesions(scan)
    return row
