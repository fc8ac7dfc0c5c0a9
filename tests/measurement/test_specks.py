"""Masks of noise: the largest lesions have all columns, the others those of a single pass."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from laws import GRIDS, oblique, orientations
from segmented_scans import segmented

from volseg.measurement.lesions import measure_lesions
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.specks import measure_largest
from volseg.postprocessing.lesions import label_lesions
from volseg.recipe import Measure
from volseg.volume import Geometry, Volume

SPACING_MM = (0.7, 0.9, 2.5)
NAMES = {1: "liver", 2: "tumour"}
OPTIONS = {"label_names": NAMES, "model": "m"}
# Columns not measured for a speck.
UNKNOWN = {
    "volume_mesh_mm3", "volume_expected_ml", "intensity_mean_eroded1", "surface_area_mm2",
    "sphericity", "compactness", "elongation", "flatness", "major_axis_mm", "minor_axis_mm",
    "least_axis_mm", "max3d_diameter_mm", "long_axis_mm", "short_axis_mm", "axis_slice",
    "recist_measurable", "nearest_lesion_mm",
} | {
    f"{axis}_axis_p{end}_{side}_mm" for axis in ("long", "short") for end in "01" for side in "ras"
}  # fmt: skip


def noise(density=0.12, n_labels=3, shape=(14, 15, 12), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, n_labels + 1, shape) * (rng.random(shape) < density)).astype(np.uint8)


def scan_of(shape, affine=None, *, dtype=np.int16, slope=1.0, intercept=0.0, seed=1):
    values = np.random.default_rng(seed).normal(30, 200, shape).astype(dtype)
    geometry = Geometry(shape, oblique(SPACING_MM) if affine is None else affine)
    return Volume(values, geometry, slope, intercept)


def is_same(a, b):
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a + b))


def assert_equal_rows(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        for field in fields(LesionMeasurement):
            pair = getattr(row, field.name), getattr(other, field.name)
            assert is_same(*pair), (row.lesion_id, field.name, *pair)


SCALES = [(np.int16, 1.0, 0.0), (np.int16, 0.5, -1000.0), (np.int16, -0.5, 7.0)]
SCALES += [(np.float32, 1.0, 0.0), (np.float32, -2.0, 1.0)]


@pytest.mark.parametrize(("dtype", "slope", "intercept"), SCALES)
@pytest.mark.parametrize("objects", ["components", "labels"])
def test_the_largest_have_all_columns_and_the_others_the_cheap_ones(
    objects, dtype, slope, intercept
):
    mask = noise(n_labels=20 if objects == "labels" else 3)
    image = scan_of(mask.shape, dtype=dtype, slope=slope, intercept=intercept)
    lesions = label_lesions(mask, image.geometry, objects=objects)
    options = dict(OPTIONS)
    options["confidence"] = np.random.default_rng(2).integers(0, 256, mask.shape).astype(np.uint8)
    every = measure_lesions(segmented(image, lesions, **options))
    most = len(every) // 3
    measured = measure_largest(segmented(image, lesions, **options), most=most)
    assert len(measured) == len(every) and len(measured.specks) == len(every) - most
    largest = sorted(every, key=lambda row: (-row.n_voxels, row.lesion_id))[:most]
    assert_equal_rows(measured.largest, sorted(largest, key=lambda row: row.lesion_id))
    rows = list(measured)
    assert [row.lesion_id for row in rows] == [row.lesion_id for row in every]
    full = {row.lesion_id for row in measured.largest}
    for row, other in zip(rows, every, strict=True):
        if row.lesion_id in full:
            continue
        for field in fields(LesionMeasurement):
            value, expected = getattr(row, field.name), getattr(other, field.name)
            if field.name in UNKNOWN:
                assert value is None
            elif field.name != "notes":
                assert is_same(value, expected), (field.name, value, expected)
        assert f"only the {most} largest of {len(every)} lesions" in row.notes
    assert sum(row.volume_ml for row in measured.specks) == pytest.approx(measured.specks.volume_ml)
    warning = f"W_SPECKS: {len(every)} components: this mask looks like noise"
    assert measured.specks.warning.startswith(warning)


def test_up_to_the_limit_there_are_no_specks():
    mask = noise()
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    every = measure_lesions(segmented(image, lesions, **OPTIONS))
    measured = measure_largest(segmented(image, lesions, **OPTIONS), most=len(every))
    assert_equal_rows(measured, every)
    assert measured.specks is None
    nothing = label_lesions(np.zeros_like(mask), image.geometry)
    empty = measure_largest(segmented(image, nothing, **OPTIONS), most=0)
    assert (len(empty), list(empty)) == (0, [])


@pytest.mark.parametrize(("voxels", "rows"), [(1, 1), (7, 1000), (1000, 7)])
def test_rows_do_not_depend_on_the_batch_size(voxels, rows):
    mask = noise()
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    measured = measure_largest(segmented(image, lesions, **OPTIONS), most=5)
    few = replace(measured.specks, together_voxels=voxels, together_rows=rows)
    assert_equal_rows(list(few), list(measured.specks))


def test_voxels_that_are_not_finite_leave_the_intensities_of_their_speck_empty():
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[0, 0, :4] = mask[3, 3, 2:4] = mask[5, 5, 5] = 1
    image = scan_of(mask.shape, dtype=np.float32)
    image.array[3, 3, 3] = np.nan
    lesions = label_lesions(mask, image.geometry)
    _, broken, single = measure_largest(segmented(image, lesions, **OPTIONS), most=1)
    assert math.isnan(broken.intensity_mean) and broken.mass_g is None
    assert broken.notes.startswith("intensity, mass, density: 1 of 2 voxels are not finite")
    assert single.intensity_sd == 0 and math.isnan(single.intensity_skewness)


def test_calcium_of_a_speck_is_unknown_and_not_zero():
    mask = noise()
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    options = OPTIONS | {"settings": Measure(calcium=True)}
    measured = measure_largest(segmented(image, lesions, **options), most=2)
    assert all(row.agatston_score is not None for row in measured.largest)
    assert all(row.agatston_score is None for row in measured.specks)


def test_specks_have_the_same_rows_in_all_48_orientations():
    mask = noise(shape=(6, 7, 8), density=0.2)
    image = scan_of(mask.shape, dtype=np.float32)
    lesions = label_lesions(mask, image.geometry, many=0)
    expected = list(measure_largest(segmented(image, lesions, **OPTIONS), most=4))
    spacings = {f"spacing_{axis}_mm" for axis in "ras"}
    masks = orientations(Volume(mask, image.geometry))
    for (array, affine), (stored, _) in zip(masks, orientations(image), strict=True):
        scan = Volume(stored, Geometry(array.shape, affine))
        lesions = label_lesions(array, scan.geometry, many=0)
        rows = measure_largest(segmented(scan, lesions, **OPTIONS), most=4)
        for row, other in zip(rows, expected, strict=True):
            for field in fields(LesionMeasurement):
                a, b = getattr(row, field.name), getattr(other, field.name)
                is_near = is_same(a, b) or a == pytest.approx(b, rel=1e-9, abs=1e-9)
                assert field.name in spacings or is_near, field.name


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize(
    ("density", "n_labels", "connectivity"),
    [(0.03, 1, 26), (0.2, 1, 26), (0.3, 3, 26), (0.3, 1, 6)],
)
def test_searching_the_scan_finds_the_same_nearest_lesion_as_all_surfaces(
    density, n_labels, connectivity, grid
):
    mask = noise(density, n_labels, shape=(17, 13, 11))
    image = scan_of(mask.shape, grid(SPACING_MM))
    lesions = label_lesions(mask, image.geometry, connectivity=connectivity)
    expected = measure_lesions(segmented(image, lesions, **OPTIONS))
    rows = measure_lesions(segmented(image, lesions, **OPTIONS), most_points=0)
    assert distances_mm(rows) == distances_mm(expected)


def distances_mm(rows):
    return [row.nearest_lesion_mm for row in rows]


def test_a_far_neighbour_is_found_and_a_single_lesion_has_none():
    mask = np.zeros((150, 70, 40), np.uint8)
    mask[2:40, 3:40, 3:37] = noise(0.7, 1, shape=(38, 37, 34))
    mask[145, 60, 20] = 1
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    expected = measure_lesions(segmented(image, lesions, **OPTIONS))
    rows = measure_lesions(segmented(image, lesions, **OPTIONS), most_points=0)
    assert distances_mm(rows) == distances_mm(expected)
    alone = label_lesions((lesions.ids == 1).astype(np.uint8), image.geometry)
    (row,) = measure_lesions(segmented(image, alone, **OPTIONS), most_points=0)
    assert math.isnan(row.nearest_lesion_mm)


def test_a_lesion_as_large_as_the_scan_is_measured_slab_by_slab():
    mask = noise(0.6, 1, shape=(23, 14, 12))
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    confidence = np.random.default_rng(2).integers(0, 256, mask.shape).astype(np.uint8)
    options = OPTIONS | {"confidence": confidence}
    expected = measure_lesions(segmented(image, lesions, **options))
    for together in (1, 500):
        rows = measure_lesions(segmented(image, lesions, **options), together=together)
        assert_equal_rows(rows, expected)


@pytest.mark.parametrize("density", [pytest.param(0.01, marks=pytest.mark.slow), 0.2, 1.0])
def test_measuring_takes_a_few_bytes_per_voxel_and_per_lesion_whatever_the_mask(density):
    shape = (90, 100, 100)
    mask = np.asfortranarray(noise(density, 1, shape=shape))
    values = np.random.default_rng(0).normal(0, 100, shape).astype(np.int16)
    image = Volume(np.asfortranarray(values), Geometry(shape, oblique((0.8, 0.8, 1.5))), 0.5, -10.0)
    confidence = np.full(shape, 200, np.uint8, order="F")
    lesions = label_lesions(mask, image.geometry)
    options = OPTIONS | {"confidence": confidence}
    tracemalloc.start()
    measured = measure_largest(segmented(image, lesions, **options), most=300)
    n = sum(1 for _ in measured)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == len(lesions.labels)
    assert peak < 4 * mask.size + 8 * n + 100 * 2**20


@pytest.mark.parametrize("settings", [Measure(), Measure(calcium=True)])
def test_with_a_unit_in_doubt_specks_and_the_largest_leave_the_same_columns_empty(settings):
    mask = noise()
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    options = OPTIONS | {"doubt": "HU is a guess", "settings": settings}
    options["classes"] = [{"benign": 1.0}] * 5
    measured = measure_largest(segmented(image, lesions, **options), most=5)
    calcium = "calcium, " if settings.calcium else ""
    for row in measured:
        assert row.notes.count(f"density, mass, {calcium}class: HU is a guess") == 1
        withheld = (row.density_g_cm3, row.mass_g, row.agatston_score, row.class_name)
        assert withheld == (None, None, None, None)
        assert row.intensity_unit == "HU" and row.intensity_mean is not None


def test_notes_of_specks_name_missing_class_and_calcium():
    mask = noise()
    image = scan_of(mask.shape)
    lesions = label_lesions(mask, image.geometry)
    options = OPTIONS | {"settings": Measure(calcium=True), "classes": [{"benign": 1.0}] * 5}
    measured = measure_largest(segmented(image, lesions, **options), most=5)
    assert {row.class_name for row in measured.largest} == {"benign"}
    assert all("calcium, class: not measured" in row.notes for row in measured.specks)


def spread(n_labels=12, shape=(16, 15, 14)):
    """Return a scan, and lesions that each spread over all of it, with fewer voxels later."""
    weights = np.linspace(3, 1, n_labels)
    rng = np.random.default_rng(0)
    mask = rng.choice(np.arange(1, n_labels + 1), shape, p=weights / weights.sum()).astype(np.uint8)
    image = scan_of(shape)
    return image, label_lesions(mask, image.geometry, objects="labels")


@pytest.mark.parametrize("n_full", [1, 5, 11])
def test_the_largest_of_lesions_that_spread_over_the_scan_are_measured_in_full(n_full):
    image, lesions = spread()
    every = measure_lesions(segmented(image, lesions, **OPTIONS))
    most_boxes = (n_full + 1) * lesions.ids.size - 1
    measured = measure_largest(segmented(image, lesions, **OPTIONS), most_boxes=most_boxes)
    largest = sorted(every, key=lambda row: (-row.n_voxels, row.lesion_id))[:n_full]
    assert_equal_rows(measured.largest, sorted(largest, key=lambda row: row.lesion_id))
    full = {row.lesion_id for row in largest}
    for row, other in zip(measured, every, strict=True):
        for field in fields(LesionMeasurement):
            value, expected = getattr(row, field.name), getattr(other, field.name)
            if row.lesion_id not in full and field.name in UNKNOWN:
                assert value is None
            elif row.lesion_id in full or field.name != "notes":
                assert is_same(value, expected), (field.name, value, expected)
    assert measured.specks.warning == (
        "W_SPECKS: the boxes round 12 lesions would fill the scan 12 times: this mask looks like "
        f"noise; only the {n_full} largest have every column"
    )


def test_lesions_in_boxes_of_ordinary_size_are_all_measured_in_full():
    """Bricks side by side, as many as TotalSegmentator's organs, and one lesion round them all."""
    shape = (26, 27, 30)
    index = np.indices(shape)
    mask = (1 + index[0] // 5 + 6 * (index[1] // 5) + 36 * (index[2] // 5)).astype(np.uint8)
    for axis in range(3):
        np.moveaxis(mask, axis, 0)[[0, -1]] = 255
    image = scan_of(shape)
    lesions = label_lesions(mask, image.geometry, objects="labels")
    assert len(lesions.labels) > 117
    measured = measure_largest(segmented(image, lesions, **OPTIONS), most_boxes=3 * mask.size)
    assert measured.specks is None
    assert all(row.long_axis_mm is not None for row in measured)


def test_a_large_speck_takes_little_memory():
    image, lesions = spread(n_labels=4, shape=(90, 100, 100))
    scan = segmented(image, lesions, **OPTIONS)
    measured = measure_largest(scan, most_boxes=lesions.ids.size, most=10)
    assert len(measured.specks) == 3
    alone = replace(measured.specks, together_rows=1)
    expected = list(measured.specks)
    tracemalloc.start()
    rows = list(alone)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_equal_rows(rows, expected)
    assert peak < 2 * measured.specks.most_voxels + 60 * 2**20


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_the_distance_between_touching_lesions_is_zero(grid):
    mask = np.zeros((14, 12, 10), np.uint8)
    mask[2:6, 2:6, 2:6], mask[6:9, 2:6, 2:6], mask[12, 10, 8] = 1, 2, 3
    image = scan_of(mask.shape, grid(SPACING_MM))
    scan = segmented(image, label_lesions(mask, image.geometry, objects="labels"))
    expected = measure_lesions(scan)
    rows = measure_lesions(scan, most_points=0)
    assert distances_mm(rows) == distances_mm(expected)
    assert distances_mm(rows[:2]) == [0.0, 0.0]
