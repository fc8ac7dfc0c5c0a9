from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import (
    GRIDS,
    ball,
    ball_volume_mm3,
    centre_mm,
    grid_around,
    oblique,
    orientations,
    real_data,
)
from segmented_scans import segmented

from volseg.columns import columns_of
from volseg.measurement.lesions import MEASURED_TOGETHER, measure_lesions
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.selftest import ibsi_phantom
from volseg.measurement.specks import measure_largest
from volseg.measurement.summary import summarise
from volseg.pages.marks import point_of
from volseg.postprocessing.lesions import Lesions, label_lesions
from volseg.recipe import Measure
from volseg.volume import Geometry, Volume

SPACING_MM = (0.7, 0.9, 2.5)
NAMES = {1: "liver", 2: "tumour", 3: "cyst"}
FLAT = "intensity_skewness and kurtosis: all intensities are equal"
THIN = "intensity_mean_eroded1: no voxel has all its neighbours in the lesion"
NOT_HU = "density, mass: need HU, but the unit is a.u."
SINGLE = "axes: a single voxel has none"
CENTROID = ("centroid_r_mm", "centroid_a_mm", "centroid_s_mm")


def scan_of(image, mask, affine=None, *, objects="components", **options):
    """Return an intensity array, or a Volume, with the lesions of a mask."""
    if not isinstance(image, Volume):
        affine = oblique(SPACING_MM) if affine is None else affine
        image = Volume(image, Geometry(image.shape, affine))
    lesions = label_lesions(mask, image.geometry, objects=objects)
    return segmented(image, lesions, **{"label_names": NAMES, **options})


def measure(*arguments, together=MEASURED_TOGETHER, **options):
    return measure_lesions(scan_of(*arguments, **options), together=together)


def summary_of(*arguments, **options):
    return summarise(measure_largest(scan_of(*arguments, **options)))


def random_scan(seed=0, shape=(10, 11, 12), dtype=np.float32, background=0.88):
    rng = np.random.default_rng(seed)
    p = (1 - background) / 6
    mask = rng.choice(4, p=(background, 3 * p, 2 * p, p), size=shape).astype(np.uint8)
    mask[2:5, 2:6, 2:7] = 1
    return (rng.normal(50, 40, shape)).astype(dtype), mask


def read(path):
    """Read a file in its stored dtype; the files used in these tests have slope 1."""
    image = nibabel.nifti1.load(path)
    return Volume(np.asanyarray(image.dataobj), Geometry(image.shape, image.affine))


# Largest relative error of the voxel count of a ball over 12 random sub-voxel centres: due to the
# voxels, not to volseg. Of 12 other centres, one or two may exceed 1.5 times that.
BALL_ERRORS = {
    (1.0, 1.0, 1.0): {3: 0.035, 5: 0.018, 10: 0.007, 20: 0.0012},
    (0.8, 0.8, 2.5): {3: 0.066, 5: 0.044, 10: 0.011, 20: 0.0034},
    (0.5, 0.5, 5.0): {3: 0.27, 5: 0.23, 10: 0.053, 20: 0.012},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("spacing_mm", BALL_ERRORS, ids=str)
@pytest.mark.parametrize("radius_mm", [3, 5, 10, 20])
def test_volume_centroid_and_intensity_of_a_ball(grid, spacing_mm, radius_mm):
    geometry = grid_around(radius_mm, grid(spacing_mm), margin=2)
    rng = np.random.default_rng(radius_mm)
    errors = []
    for _ in range(12):
        centre = centre_mm(geometry) + geometry.affine[:3, :3] @ rng.uniform(-0.5, 0.5, 3)
        mask = ball(radius_mm, geometry, centre)
        (row,) = measure(Volume(np.where(mask, np.int16(40), np.int16(-100)), geometry), mask)
        errors.append(row.volume_mm3 / ball_volume_mm3(radius_mm) - 1)
        voxel_mm3 = abs(np.linalg.det(geometry.affine[:3, :3]))
        assert row.volume_mm3 == pytest.approx(mask.sum() * voxel_mm3, rel=1e-9)
        assert row.volume_ml == row.volume_mm3 / 1000
        assert (row.intensity_mean, row.intensity_sd) == (40, 0)
        assert (row.intensity_min, row.intensity_max) == (40, 40)
        assert row.density_g_cm3 == pytest.approx(1.031 + (1.1199 - 1.031) * 17 / 77)
        assert row.mass_g == pytest.approx(row.density_g_cm3 * row.volume_ml)
        diameter_mm = (6 * row.volume_mm3 / math.pi) ** (1 / 3)
        assert row.equiv_sphere_diameter_mm == pytest.approx(diameter_mm)
        centroid = np.array([getattr(row, name) for name in CENTROID])
        expected = geometry.to_world_mm(np.argwhere(mask)).mean(axis=0)
        assert centroid == pytest.approx(expected, abs=1e-6)
        assert np.linalg.norm(centroid - centre) < max(geometry.spacing_mm) / 2
        assert not row.touches_border
    assert np.sort(np.abs(errors))[-3] < 1.5 * BALL_ERRORS[spacing_mm][radius_mm]
    assert abs(np.mean(errors)) < max(0.011, np.abs(errors).max() / 2)  # no bias beyond the scatter


def test_lesions_know_their_box_their_neighbour_and_their_axes():
    mask = np.zeros((30, 20, 12), np.uint8)
    mask[2:12, 3:7, 5] = 1  # 10 × 4 voxels of one slice
    mask[20:24, 3:7, 4:6] = 1
    affine = np.diag([-0.5, -0.5, 2.0, 1.0])
    affine[:3, 3] = 40, 30, -10
    first, second = measure(np.zeros(mask.shape), mask, affine)
    assert point_of(first, "bbox_min") == (34.25, 26.75, -1.0)
    assert point_of(first, "bbox_max") == (39.25, 28.75, 1.0)
    assert first.nearest_lesion_mm == second.nearest_lesion_mm == pytest.approx(8 * 0.5)
    assert first.axis_slice == 5 and first.long_axis_mm == pytest.approx(math.hypot(5, 1.5))
    ends = [np.array(point_of(first, f"long_axis_p{end}")) for end in (0, 1)]
    assert np.linalg.norm(ends[1] - ends[0]) == pytest.approx(first.long_axis_mm, abs=2e-3)
    assert ends[0][2] == ends[1][2] == 0
    assert first.recist_measurable is False
    assert (first.spacing_r_mm, first.spacing_a_mm, first.spacing_s_mm) == (0.5, 0.5, 2.0)


@pytest.mark.parametrize("affine", [grid(SPACING_MM) for grid in GRIDS.values()], ids=GRIDS.keys())
def test_the_box_holds_every_corner_of_every_voxel(affine):
    _, mask = random_scan()
    mask = (mask == 1).astype(np.uint8)
    (row,) = measure(np.zeros(mask.shape), mask, affine, objects="labels")
    half = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    index = (np.argwhere(mask)[:, None] + half).reshape(-1, 3)
    corners = Geometry(mask.shape, affine).to_world_mm(index)
    assert point_of(row, "bbox_min") == pytest.approx(corners.min(axis=0), abs=1e-3)
    assert point_of(row, "bbox_max") == pytest.approx(corners.max(axis=0), abs=1e-3)


def test_the_expected_volume_adds_up_the_probabilities_of_the_model():
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[3:6, 3:6, 3:6] = 1
    confidence = 255 * mask
    options = {"affine": np.eye(4), "confidence": confidence}
    (row,) = measure(np.zeros(mask.shape), mask, **options)
    assert row.volume_expected_ml == pytest.approx(row.volume_ml)
    confidence[3:6, 3:6, 3] = 153  # nine voxels of the lesion with 0.6
    confidence[3:6, 3:6, 2] = 51  # nine voxels of background beside it with 0.2
    confidence[0, 0, 0] = 120  # too far away to count for this lesion
    (row,) = measure(np.zeros(mask.shape), mask, **options)
    assert row.volume_expected_ml * 1000 == pytest.approx(27 - 9 * 0.4 + 9 * 0.2)


def test_mass_and_calcium_are_measured_on_ct_only():
    image, mask = np.full((9, 9, 9), 250.0), np.zeros((9, 9, 9), np.uint8)
    mask[3:6, 3:6, 3:6] = 1
    settings = Measure(calcium=True, calcium_mg_per_ml_hu=0.8)
    (row,) = measure(image, mask, np.diag([1, 1, 3, 1]), settings=settings)
    assert row.agatston_score == pytest.approx(27 * 2)
    assert row.calcium_volume_mm3 == row.volume_mm3
    assert row.calcium_mass_mg == pytest.approx(0.8 * 250 * row.volume_ml)
    (row,) = measure(image, mask, unit="a.u.", settings=settings)
    assert (row.mass_g, row.density_g_cm3, row.agatston_score) == (None, None, None)
    assert "density, mass, calcium: need HU, but the unit is a.u." in row.notes
    image[4, 4, 4] = np.nan
    (row,) = measure(image, mask, unit="Bq/mL")
    assert (
        "intensity: 1 of 27 voxels are not finite; density, mass: need HU, but the unit is Bq/mL"
        in row.notes
    )
    image[4, 4, 4] = 250
    (row,) = measure(image, mask, settings=Measure(calcium=True))
    assert row.calcium_mass_mg is None
    assert "calcium_mass_mg: the recipe has no calcium_mg_per_ml_hu" in row.notes
    settings = Measure(density_g_cm3=((-1000, 0), (1000, 2)))
    (row,) = measure(np.where(mask, 5000.0, 0), mask, settings=settings)
    assert row.density_g_cm3 == 2
    assert "mass: 27 voxels are over 1000 HU, where the calibration ends" in row.notes


def test_a_mask_over_the_whole_scan_and_one_of_one_slice():
    mask = np.ones((7, 8, 9), np.uint8)
    (row,) = measure(np.zeros(mask.shape), mask, np.eye(4))
    assert (row.n_voxels, row.touches_border) == (504, True)
    assert row.volume_mesh_mm3 < 504 and row.surface_area_mm2 > 0
    mask[:, :, 1:] = 0
    (row,) = measure(np.zeros(mask.shape), mask, np.eye(4))
    assert row.least_axis_mm == row.flatness == 0
    assert row.intensity_mean_eroded1 is None and THIN in row.notes


def test_the_row_of_the_scan_follows_from_its_lesions():
    mask = np.zeros((60, 40, 12), np.uint8)
    mask[2:32, 3:9, 5:8] = 2  # 30 mm long
    mask[2:14, 13:33, 2:4] = 2
    mask[40:56, 3:19, 4:6] = 3
    rows = measure(np.zeros(mask.shape), mask, np.eye(4))
    image, affine = np.zeros(mask.shape), np.eye(4)
    summary = summary_of(image, mask, affine, organ_voxels=1000)
    assert (summary.n_lesions, summary.n_measurable) == (3, 3)
    assert summary.sum_long_axis_mm == pytest.approx(sum(row.long_axis_mm for row in rows))
    assert summary.organ_volume_ml == pytest.approx(1 + mask.astype(bool).sum() / 1000)
    assert summary.burden == pytest.approx(summary.total_volume_ml / summary.organ_volume_ml)
    assert summary.largest_volume_ml == rows[0].volume_ml
    node = summary_of(image, mask, affine, settings=Measure(lymph_nodes=("cyst",)))
    cyst = next(row for row in rows if row.label == 3)
    assert node.sum_long_axis_mm == pytest.approx(
        summary.sum_long_axis_mm - cyst.long_axis_mm + cyst.short_axis_mm
    )
    empty = summary_of(image, np.zeros_like(mask), affine, organ_voxels=0)
    assert (empty.n_lesions, empty.total_volume_ml, empty.sum_long_axis_mm) == (0, 0, 0)
    assert empty.largest_volume_ml is empty.burden is empty.organ_volume_ml is None
    # Otherwise the whole organ would be lesion.
    without_organ = summary_of(image, mask, affine, organ_voxels=0)
    assert without_organ.burden is without_organ.organ_volume_ml is None


def test_a_calcium_score_of_a_scan_is_0_or_unknown_and_never_the_one_for_the_other():
    image, mask = np.full((9, 9, 9), 250.0), np.zeros((9, 9, 9), np.uint8)
    mask[1:4, 1:4, 1:4], mask[5:8, 5:8, 5:8] = 1, 1
    affine, scored = np.diag([1, 1, 3, 1]), Measure(calcium=True)

    def score(image, unit="HU", mask=mask, settings=scored):
        return summary_of(image, mask, affine, settings=settings, unit=unit).agatston_score

    assert score(image) == pytest.approx(2 * 27 * 2)
    assert score(np.zeros(mask.shape)) == 0
    assert score(image, "a.u.") is None
    image[6, 6, 6] = np.nan
    assert score(image) is None
    empty = np.zeros_like(mask)
    assert score(image, mask=empty) == 0
    assert score(image, "a.u.", empty) is None
    assert score(image, mask=empty, settings=Measure()) is None


def test_doubling_the_spacing_makes_eight_times_the_volume():
    image, mask = random_scan()
    affine = oblique(SPACING_MM)
    doubled = np.diag([2.0, 2.0, 2.0, 1.0]) @ affine
    rows, doubled_rows = measure(image, mask, affine), measure(image, mask, doubled)
    for small, large in zip(rows, doubled_rows, strict=True):
        assert large.volume_mm3 == pytest.approx(8 * small.volume_mm3, rel=1e-9)
        assert large.intensity_mean == small.intensity_mean
        for name in CENTROID:
            assert getattr(large, name) == pytest.approx(2 * getattr(small, name), abs=1e-6)


def test_rotating_and_moving_the_patient_changes_only_the_centroid():
    image, mask = random_scan()
    affine = oblique(SPACING_MM)
    motion = oblique((1.0, 1.0, 1.0), angles=(0.7, 1.1, -0.4))
    expected = {
        (row.label, row.n_voxels, row.intensity_mean): row for row in measure(image, mask, affine)
    }
    # Lesions of equal size may change places, so match them by their content.
    for row in measure(image, mask, motion @ affine):
        before = expected[row.label, row.n_voxels, row.intensity_mean]
        assert row.volume_mm3 == pytest.approx(before.volume_mm3, rel=1e-9)
        point = motion @ [*(getattr(before, name) for name in CENTROID), 1]
        centroid = [getattr(row, name) for name in CENTROID]
        assert centroid == pytest.approx(point[:3].tolist(), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_lesions_add_up_to_the_mask(seed):
    image, mask = random_scan(seed, dtype=np.int16)
    rows = measure(image, mask)
    whole = {row.label: row for row in measure(image, mask, objects="labels")}
    assert sum(row.n_voxels for row in rows) == np.count_nonzero(mask)
    for label, total in whole.items():
        parts = [row for row in rows if row.label == label]
        n_voxels = sum(row.n_voxels for row in parts)
        assert n_voxels == total.n_voxels == np.count_nonzero(mask == label)
        volume_mm3 = math.fsum(row.volume_mm3 for row in parts)
        assert volume_mm3 == pytest.approx(total.volume_mm3, rel=1e-12)
        mean = sum(row.intensity_mean * row.n_voxels for row in parts) / total.n_voxels
        assert mean == pytest.approx(total.intensity_mean, rel=1e-9)
        assert min(row.intensity_min for row in parts) == total.intensity_min
        assert any(row.touches_border for row in parts) == total.touches_border


@pytest.mark.parametrize(
    "spacing_mm",
    [SPACING_MM, pytest.param((0.625, 0.625, 0.625), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize(
    "grid",
    [
        pytest.param(grid, id=name, marks=() if name == "oblique" else pytest.mark.slow)
        for name, grid in GRIDS.items()
    ],
)
def test_all_48_orientations_give_identical_rows(grid, spacing_mm):
    image, mask = random_scan(background=0.97)
    image[mask == 3] = np.random.default_rng(1).choice(
        [np.nan, -0.0, 0.0, 1e-3, 1e6], size=(mask == 3).sum()
    )
    confidence = np.random.default_rng(2).random(image.shape)
    geometry = Geometry(image.shape, grid(spacing_mm))
    expected = measure(Volume(image, geometry), mask, confidence=confidence)
    assert len(expected) > 15 and len({row.n_voxels for row in expected}) < len(expected)
    scans = (orientations(Volume(array, geometry)) for array in (image, mask, confidence))
    for (array, affine), (mask, _), (confidence, _) in zip(*scans, strict=True):
        rows = measure(Volume(array, Geometry(array.shape, affine)), mask, confidence=confidence)
        for row, before in zip(rows, expected, strict=True):
            assert [getattr(row, name) for name in CENTROID] == pytest.approx(
                [getattr(before, name) for name in CENTROID], abs=1e-6
            )
            assert exact(row) == exact(before)
            assert printed(row) == printed(before)


@pytest.mark.parametrize("voxels", [1, 30, 200])
def test_lesions_measured_together_have_the_rows_of_each_measured_alone(voxels):
    image, mask = random_scan(background=0.97)
    confidence = np.random.default_rng(2).random(image.shape)
    image[3, 3, 3] = confidence[0] = np.nan
    together = measure(image, mask, confidence=confidence)
    alone = measure(image, mask, confidence=confidence, together=voxels)
    assert [exact(row) for row in alone] == [exact(row) for row in together]
    assert any(math.isnan(row.intensity_mean) for row in together)
    assert any(row.confidence_mean is None for row in together)


@pytest.mark.slow
def test_no_last_bit_decides_the_last_printed_digit_of_a_centroid():
    """Lesions of two voxels at odd multiples of 0.24415 mm are ties for the fourth decimal."""
    mask = np.zeros((9, 10, 11), np.uint8)
    mask[2:4, 1, 1] = mask[4, 3:5, 4] = mask[1, 4, 6:8] = mask[7:9, 8, 8] = 1
    affine = np.diag([0.4883, 0.4883, 0.4883, 1.0])
    for offset in np.random.default_rng(0).integers(-3000, 3000, (5, 3)) / 10:
        affine[:3, 3] = offset
        masks = orientations(Volume(mask, Geometry(mask.shape, affine)))
        tables = {
            tuple(text for row in measure(array, array, oriented) for text in printed(row))
            for array, oriented in masks
        }
        assert len(tables) == 1


def test_a_centroid_at_zero_has_no_sign():
    mask = np.ones((7, 7, 7), np.uint8)
    affine = np.diag([-0.3, 0.3, -0.3, 1.0])
    affine[:3, 3] = 0.9, -0.9, 0.9  # 3 * 0.3 is slightly less than 0.9
    for array, oriented in orientations(Volume(mask, Geometry(mask.shape, affine))):
        (row,) = measure(array, array, oriented)
        assert [f"{getattr(row, name):.4f}" for name in CENTROID] == ["0.0000"] * 3


def exact(row):
    """Return all values but the centroid, so that unknown equals unknown and 0 is not -0."""
    return {name: repr(value) for name, value in asdict(row).items() if name not in CENTROID}


def printed(row):
    """Return all numbers with four decimals, as in a table."""
    return [f"{value:.4f}" for value in asdict(row).values() if isinstance(value, float)]


@pytest.mark.slow  # tests/commands/test_measuring.py does it with the command
def test_the_same_real_scan_in_48_files():
    folder = real_data("nifti_zoo/orientations48")
    expected = None
    for path in sorted(folder.glob("*.nii.gz")):
        scan = read(path)
        bright = scan.array > np.percentile(scan.array, 70)
        largest = label_lesions(bright.astype(np.uint8), scan.geometry).ids
        rows = measure(scan, ((largest > 0) & (largest < 9)).astype(np.uint8))
        expected = expected or rows
        assert len(rows) == len(expected) > 1
        for row, before in zip(rows, expected, strict=True):
            assert exact(row) == exact(before)
            # The files round their affine to float32.
            assert [getattr(row, name) for name in CENTROID] == pytest.approx(
                [getattr(before, name) for name in CENTROID], abs=1e-3
            )


def test_ibsi_digital_phantom():
    image = ibsi_phantom()
    (row,) = measure(image, (image > 0).astype(np.uint8), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert (row.n_voxels, row.volume_mm3, row.volume_ml) == (74, 592.0, 0.592)
    assert row.intensity_mean == pytest.approx(2.1486, abs=5e-5)
    assert row.intensity_sd**2 == pytest.approx(3.0455, abs=5e-5)  # 1/N; with 1/(N-1) it is 3.0872
    assert (row.intensity_min, row.intensity_p10, row.intensity_median) == (1, 1, 1)
    assert (row.intensity_p90, row.intensity_max) == (4, 6)


def test_ibsi_digital_phantom_from_its_file():
    image = read(real_data("ibsi_phantoms/images/ibsi_1_digital_phantom.nii.gz"))
    mask = read(real_data("ibsi_phantoms/labels/ibsi_1_digital_phantom.nii.gz"))
    (row,) = measure(image, mask.array.astype(np.uint8))
    with open(real_data("ibsi_phantoms/digital_phantom_reference_values.csv"), newline="") as file:
        published = {line["ibsi_id"]: line for line in csv.DictReader(file)}
    names = {
        source.removeprefix("IBSI "): name for name, _, _, source in columns_of(LesionMeasurement)
    }
    values = {code: getattr(row, name) for code, name in names.items() if code in published}
    assert len(values) >= 18
    for code, value in values.items():
        expected = float(published[code]["reference_value"])
        # Intensities have no tolerance: they must agree to the printed three digits.
        digit = 10 ** (math.floor(math.log10(abs(expected))) - 2)
        tolerance = float(published[code]["tolerance"] or 0.5 * digit)
        assert value == pytest.approx(expected, abs=tolerance * 1.001), published[code]["feature"]


def test_brain1_against_its_independent_baseline():
    image = read(real_data("pyradiomics_cases/images/brain1.nii.gz"))
    mask = read(real_data("pyradiomics_cases/labels/brain1.nii.gz")).array.astype(np.uint8)
    (row,) = measure(image, mask, objects="labels")
    expected = {}
    for table in ("baseline_firstorder.csv", "baseline_shape.csv"):
        with open(real_data(f"pyradiomics_cases/{table}"), newline="") as file:
            lines = [
                line for line in csv.DictReader(file) if line["featureName"].startswith("original_")
            ]
            expected |= {line["featureName"].split("_")[-1]: line["brain1"] for line in lines}
    statistics = {
        "Mean": row.intensity_mean,
        "Median": row.intensity_median,
        "Minimum": row.intensity_min,
        "Maximum": row.intensity_max,
        "10Percentile": row.intensity_p10,
        "90Percentile": row.intensity_p90,
        "InterquartileRange": row.intensity_p75 - row.intensity_p25,
        "Variance": row.intensity_sd**2,
        "Skewness": row.intensity_skewness,
        "Kurtosis": row.intensity_kurtosis + 3,  # pyradiomics does not subtract 3
    }
    for name, value in statistics.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-6), name
    mesh_features = {
        "MeshVolume": row.volume_mesh_mm3,
        "VoxelVolume": row.volume_mm3,
        "SurfaceArea": row.surface_area_mm2,
        "Sphericity": row.sphericity,
        "Maximum3DDiameter": row.max3d_diameter_mm,
        "Elongation": row.elongation,
        "Flatness": row.flatness,
        "MajorAxisLength": row.major_axis_mm,
        "MinorAxisLength": row.minor_axis_mm,
        "LeastAxisLength": row.least_axis_mm,
    }
    for name, value in mesh_features.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-3), name


@pytest.mark.parametrize("gain, offset", [(1.0, -1024.0), (2.5, 0.0), (-3.0, 7.0)])
def test_intensities_follow_shift_and_scale(gain, offset):
    image, mask = random_scan(dtype=np.float64)
    for row, before in zip(measure(gain * image + offset, mask), measure(image, mask), strict=True):
        low, high = ("p10", "p90") if gain > 0 else ("p90", "p10")
        assert row.intensity_mean == pytest.approx(gain * before.intensity_mean + offset)
        assert row.intensity_sd == pytest.approx(abs(gain) * before.intensity_sd, abs=1e-9)
        assert row.intensity_median == pytest.approx(gain * before.intensity_median + offset)
        p10, p90 = getattr(before, f"intensity_{low}"), getattr(before, f"intensity_{high}")
        assert row.intensity_p10 == pytest.approx(gain * p10 + offset)
        assert row.intensity_p90 == pytest.approx(gain * p90 + offset)
        assert (row.n_voxels, row.volume_mm3) == (before.n_voxels, before.volume_mm3)


def test_the_scale_of_the_file_is_applied_to_stored_values():
    image, mask = random_scan(dtype=np.int16)
    geometry = Geometry(image.shape, oblique(SPACING_MM))
    stored = Volume(image, geometry, slope=2.21, intercept=-1024.0)
    for row, before in zip(measure(stored, mask), measure(stored.intensities(), mask), strict=True):
        assert repr(row) == repr(before)


def test_small_integers_do_not_overflow():
    image, mask = np.full((30, 30, 30), 250, np.uint8), np.ones((30, 30, 30), np.uint8)
    (row,) = measure(image, mask)
    assert (row.intensity_mean, row.intensity_sd, row.intensity_max) == (250, 0, 250)


def test_intensities_are_unknown_where_a_voxel_is_not_finite():
    image, mask = np.full((6, 6, 6), 5.0), np.zeros((6, 6, 6), np.uint8)
    mask[1:3, 1:3, 1:3], mask[4, 4, 4] = 1, 2
    image[1, 1, 1], image[1, 1, 2], image[4, 4, 4] = np.nan, np.inf, np.nan
    first, second = measure(image, mask)
    assert math.isnan(first.intensity_mean) and (first.n_voxels, first.mass_g) == (8, None)
    assert first.notes == "intensity, mass, density: 2 of 8 voxels are not finite"
    assert math.isnan(second.intensity_mean) and math.isnan(second.intensity_p90)
    note = "intensity, mass, density: 1 of 1 voxels are not finite"
    assert second.notes.split("; ") == [SINGLE, note]
    assert second.volume_mm3 > 0  # does not need the intensities


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [0, -1])
def test_a_lesion_at_the_edge_of_the_array_says_so(axis, end):
    mask = np.zeros((7, 8, 9), np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    np.moveaxis(mask, axis, 0)[end, 5, 5] = 2
    inner, edge = measure(np.zeros(mask.shape), mask)
    assert (inner.touches_border, edge.touches_border) == (False, True)
    np.moveaxis(mask, axis, 0)[end, 5, 5] = 0
    np.moveaxis(mask, axis, 0)[1 if end == 0 else -2, 5, 5] = 2
    assert not any(row.touches_border for row in measure(np.zeros(mask.shape), mask))


def test_confidence_is_a_mean_from_0_to_1():
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[1, 1, 1:4] = 1
    confidence = np.zeros(mask.shape, np.uint8)
    confidence[1, 1, 1:4] = 255, 255, 51
    (row,) = measure(np.zeros(mask.shape), mask, confidence=confidence)
    assert row.confidence_mean == pytest.approx((1 + 1 + 0.2) / 3)
    (row,) = measure(np.zeros(mask.shape), mask, confidence=(confidence / 255).astype(np.float16))
    assert row.confidence_mean == pytest.approx((1 + 1 + 0.2) / 3, abs=1e-4)
    (row,) = measure(np.zeros(mask.shape), mask)
    assert (row.confidence_mean, row.confidence_p10, row.notes) == (None, None, f"{FLAT}; {THIN}")
    (row,) = measure(np.zeros(mask.shape), mask, confidence=np.full(mask.shape, np.nan))
    assert (row.confidence_mean, row.notes) == (None, f"{FLAT}; {THIN}; confidence: not finite")


def test_classes():
    mask = np.zeros((9, 5, 5), np.uint8)
    mask[1:4, 1, 1], mask[5:7, 1, 1], mask[8, 1, 1] = 1, 1, 1
    classes = [{"benign": 0.12, "malignant": 0.88}, None, {"benign": math.nan, "malignant": 0.5}]
    first, second, third = measure(np.zeros(mask.shape), mask, classes=classes)
    assert (first.class_name, first.class_probability) == ("malignant", 0.88)
    assert first.class_probabilities == "benign=0.1200;malignant=0.8800"
    assert second.class_name is second.class_probability is second.class_probabilities is None
    assert second.notes.endswith("class: not classified")
    assert third.notes.endswith("class: a probability is not finite")
    assert third.class_name is None
    rows = measure(np.zeros(mask.shape), mask)
    assert not any(row.class_name or "class" in row.notes for row in rows)


def test_names():
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[1, 1, 1:3], mask[3, 3, 3] = 2, 9
    named, nameless = measure(np.zeros(mask.shape), mask, case_id="p01", unit="a.u.")
    assert (named.case_id, named.lesion_id) == ("p01", 1)
    assert (named.label, named.label_name) == (2, "tumour")
    assert named.intensity_unit == "a.u."
    assert (nameless.label, nameless.label_name) == (9, None)
    notes = ["label_name: value 9 has no name", SINGLE, NOT_HU, FLAT, THIN]
    assert nameless.notes.split("; ") == notes


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_an_empty_mask_has_no_rows(grid):
    mask = np.zeros((4, 5, 6), np.uint8)
    assert measure(np.zeros(mask.shape), mask, grid(SPACING_MM), classes=[]) == []


def test_numbers_that_do_not_agree_are_refused():
    image = Volume(np.zeros((4, 4, 4)), Geometry((4, 4, 4), oblique(SPACING_MM)))
    ids = np.zeros((4, 4, 4), np.uint16)
    ids[1, 1, 1] = 2

    def refused(ids, labels, **options):
        lesions = Lesions(ids, labels, [1] * len(labels))
        return measure_lesions(segmented(image, lesions, **options))

    with pytest.raises(ValueError, match="go up to 2, but there are 1 labels"):
        refused(ids, [1])
    ids[1, 2, 1] = 2
    with pytest.raises(ValueError, match="skip a number"):
        refused(ids, [1, 1])
    ids[2, 2, 2] = 1
    with pytest.raises(ValueError, match="shape"):
        refused(ids[:3], [1, 1])
    with pytest.raises(ValueError, match="from 0"):
        refused(-ids.astype(np.int16), [1, 1])
    with pytest.raises(ValueError, match="1 lesions are classified, but there are 2"):
        refused(ids, [1, 1], classes=[None])
    with pytest.raises(ValueError, match="confidence has shape"):
        refused(ids, [1, 1], confidence=np.zeros((4, 4, 5), np.uint8))
    with pytest.raises(ValueError, match="confidence must be uint8 or floating point"):
        refused(ids, [1, 1], confidence=np.zeros((4, 4, 4), np.int16))
    with pytest.raises(ValueError, match="confidence must be from 0 to 1"):
        refused(ids, [1, 1], confidence=np.full((4, 4, 4), 255.0))


def test_the_columns_of_both_tables_are_a_contract():
    described, cases = columns_of(LesionMeasurement), columns_of(CaseRow)
    assert " ".join(name for name, *_ in described) == (
        "case_id lesion_id label label_name n_voxels volume_mm3 volume_ml intensity_mean "
        "intensity_sd intensity_min intensity_p10 intensity_median intensity_p90 intensity_max "
        "intensity_unit centroid_r_mm centroid_a_mm centroid_s_mm touches_border confidence_mean "
        "class_name class_probability class_probabilities volume_mesh_mm3 volume_expected_ml "
        "intensity_p05 intensity_p25 intensity_p75 intensity_p95 intensity_skewness "
        "intensity_kurtosis intensity_mean_eroded1 density_g_cm3 mass_g agatston_score "
        "calcium_volume_mm3 calcium_mass_mg suv_peak mtv41_ml mtv_fixed_ml tlg_g tlg41_g "
        "tlg_fixed_g surface_area_mm2 sphericity compactness elongation "
        "flatness major_axis_mm minor_axis_mm least_axis_mm max3d_diameter_mm "
        "equiv_sphere_diameter_mm long_axis_mm short_axis_mm axis_slice "
        "long_axis_p0_r_mm long_axis_p0_a_mm long_axis_p0_s_mm "
        "long_axis_p1_r_mm long_axis_p1_a_mm long_axis_p1_s_mm "
        "short_axis_p0_r_mm short_axis_p0_a_mm short_axis_p0_s_mm "
        "short_axis_p1_r_mm short_axis_p1_a_mm short_axis_p1_s_mm recist_measurable "
        "bbox_min_r_mm bbox_min_a_mm bbox_min_s_mm bbox_max_r_mm bbox_max_a_mm bbox_max_s_mm "
        "nearest_lesion_mm confidence_p10 spacing_r_mm spacing_a_mm spacing_s_mm "
        "connectivity model volseg_version notes"
    )
    assert " ".join(name for name, *_ in cases) == (
        "case_id status reason n_lesions total_volume_ml image model seconds warnings "
        "largest_volume_ml sum_long_axis_mm n_measurable organ_volume_ml burden agatston_score "
        "n_dropped slices_skipped"
    )
    assert all(meaning for _, _, meaning, _ in described + cases)
    units = {name: unit for name, unit, *_ in described}
    assert (units["volume_mm3"], units["volume_ml"], units["centroid_r_mm"]) == ("mm³", "mL", "mm")


def test_a_failed_case_is_a_row_with_unknowns():
    row = CaseRow(case_id="p01", status="failed", reason="the file is cut off")
    assert (row.n_lesions, row.total_volume_ml) == (None, None)


def test_all_structures_of_a_ct_against_the_statistics_of_another_program():
    folder = real_data("totalseg_example_ct")
    mask = read(folder / "labels/example_ct_sm_fast.nii.gz")
    expected = json.loads((folder / "example_ct_sm_fast_statistics.json").read_text())
    with open(folder / "label_names.csv", newline="") as file:
        names = {
            int(row["label"]): row["name"] for row in csv.DictReader(file) if row["map"] == "total"
        }
    image = read(folder / "images/example_ct_sm.nii.gz")
    measured = measure(image, mask.array, objects="labels", label_names=names)
    rows = {row.label_name: row for row in measured}
    assert len(expected) == 117 and set(expected) == set(names.values())
    for name, numbers in expected.items():
        if name in rows:
            assert rows[name].volume_mm3 == numbers["volume"]
            assert rows[name].intensity_mean == pytest.approx(numbers["intensity"], abs=0.5)
        else:
            assert numbers["volume"] == 0
    parts = measure(image, mask.array, label_names=names)
    volume_mm3 = sum(numbers["volume"] for numbers in expected.values())
    assert sum(row.n_voxels for row in parts) * 27 == volume_mm3


def test_an_mr_lesion_against_pyradiomics():
    with open(real_data("pyradiomics_cases/baseline_firstorder.csv"), newline="") as file:
        baseline = dict(csv.reader(file))
    expected = {name: float(baseline[f"original_firstorder_{name}"]) for name in (
        "Mean", "Variance", "Minimum", "10Percentile", "Median", "90Percentile", "Maximum"
    )}  # fmt: skip
    image = read(real_data("pyradiomics_cases/images/brain1.nii.gz"))
    mask = read(real_data("pyradiomics_cases/labels/brain1.nii.gz")).array
    (row,) = measure(image, mask, objects="labels", unit="a.u.")
    assert row.n_voxels == int(baseline["diagnostics_Mask-original_VoxelNum"])
    assert row.volume_mm3 == pytest.approx(row.n_voxels * 0.78125 * 0.78125 * 6.5, rel=1e-6)
    assert row.intensity_mean == pytest.approx(expected["Mean"], rel=1e-12)
    assert row.intensity_sd**2 == pytest.approx(expected["Variance"], rel=1e-12)
    assert (row.intensity_min, row.intensity_max) == (expected["Minimum"], expected["Maximum"])
    assert row.intensity_p10 == expected["10Percentile"]
    assert row.intensity_p90 == pytest.approx(expected["90Percentile"], rel=1e-12)
    assert row.intensity_median == expected["Median"]
    assert len(measure(image, mask)) == int(baseline["diagnostics_Mask-original_VolumeNum"])
