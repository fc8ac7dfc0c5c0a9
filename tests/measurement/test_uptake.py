"""Uptake of lesions in PET: the intensity peak, metabolic volumes and their glycolysis."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from laws import oblique, orientations
from segmented_scans import segmented

from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.specks import measure_largest
from volseg.postprocessing.lesions import label_lesions
from volseg.recipe import Measure
from volseg.volume import Geometry, Volume

SHARED = Path(__file__).parents[2].parent / "shared/data"
RADIUS_MM = 10 * (3 / (4 * math.pi)) ** (1 / 3)
UPTAKE = ("suv_peak", "mtv41_ml", "mtv_fixed_ml", "tlg_g", "tlg41_g", "tlg_fixed_g")
SHEARED = oblique((4.0, 4.0, 3.3))
SHEARED[:3, 2] += 0.3 * SHEARED[:3, 1]
GRIDS = {
    "PET": oblique((5.5, 5.5, 3.3)),
    "fine": oblique((2.0, 1.3, 1.7)),
    "thick": np.diag([3.0, 3.0, 9.0, 1.0]),
    "coarser than the ball": np.diag([13.0, 13.0, 13.0, 1.0]),
    "tilted": SHEARED,
}


def scan_of(affine, shape=(11, 10, 9), seed=0, **options):
    rng = np.random.default_rng(seed)
    values = rng.gamma(2.0, 2.0, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[2:9, 3:8, 2:6], mask[0, 0, 0], mask[-2:, -3:, -1] = 1, 2, 3
    geometry = Geometry(shape, affine)
    lesions = label_lesions(mask, geometry, objects="labels")
    return segmented(Volume(values, geometry), lesions, unit="SUV", **options)


def peak_by_definition(scan, number):
    """IBSI: the mean of all voxels of the scan up to 6.2 mm away; the highest of the lesion."""
    image, highest = scan.image, -math.inf
    index = np.array(list(product(*map(range, image.array.shape))))
    places = image.geometry.to_world_mm(index)
    values = image.intensities().astype(np.float64)[tuple(index.T)]
    for centre in image.geometry.to_world_mm(np.argwhere(scan.lesions.ids == number)):
        near = np.linalg.norm(places - centre, axis=1) <= RADIUS_MM * (1 + 1e-6)
        mean = values[near].mean()
        highest = max(highest, mean) if np.isfinite(mean) else highest
    return highest if math.isfinite(highest) else math.nan


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("together", [2**20, 7])
def test_the_peak_is_the_highest_mean_of_a_ball(name, together):
    scan = scan_of(GRIDS[name])
    rows = measure_lesions(scan, together=together)
    assert len(rows) == 3
    for row in rows:
        assert row.suv_peak == pytest.approx(peak_by_definition(scan, row.lesion_id), rel=1e-9)


def test_metabolic_volumes_count_voxels_from_their_threshold_up():
    scan = scan_of(GRIDS["PET"], settings=Measure(mtv_threshold_suv=2.5))
    voxel_ml = 5.5 * 5.5 * 3.3 / 1000
    for row in measure_lesions(scan):
        values = scan.image.array[scan.lesions.ids == row.lesion_id].astype(np.float64)
        assert row.intensity_max == values.max()
        for threshold, volume, glycolysis in (
            (0.41 * values.max(), row.mtv41_ml, row.tlg41_g),
            (2.5, row.mtv_fixed_ml, row.tlg_fixed_g),
            (-1.0, row.volume_ml, row.tlg_g),
        ):
            part = values[values >= threshold]
            assert volume == pytest.approx(part.size * voxel_ml, rel=1e-9)
            assert glycolysis == pytest.approx(part.sum() * voxel_ml, rel=1e-9)
        assert row.tlg_g == pytest.approx(row.intensity_mean * row.volume_ml, rel=1e-9)


def test_all_48_orders_have_the_same_uptake():
    scan = scan_of(GRIDS["PET"])
    expected = [[getattr(row, name) for name in UPTAKE] for row in measure_lesions(scan)]
    ids = scan.image.with_array(scan.lesions.ids)
    for (array, affine), (stored, _) in zip(orientations(scan.image), orientations(ids)):
        geometry = Geometry(array.shape, affine)
        mask = np.array([0, *scan.lesions.labels], np.uint8)[stored]
        lesions = label_lesions(mask, geometry, objects="labels")
        rows = measure_lesions(segmented(Volume(array, geometry), lesions, unit="SUV"))
        assert [[getattr(row, name) for name in UPTAKE] for row in rows] == expected


@pytest.mark.parametrize(
    ("unit", "doubt"), [("HU", ""), ("a.u.", ""), ("Bq/mL", ""), ("SUV", "it was guessed")]
)
def test_without_a_proved_or_stated_suv_there_is_no_uptake(unit, doubt):
    scan = scan_of(GRIDS["PET"])
    rows = measure_lesions(segmented(scan.image, scan.lesions, unit=unit, doubt=doubt))
    assert {getattr(row, name) for row in rows for name in UPTAKE} == {None}


def test_balls_with_voxels_that_are_not_finite_are_left_out():
    scan = scan_of(GRIDS["PET"])
    scan.image.array[1, 5, 4] = np.nan  # beside the first lesion
    scan.image.array[-1, -1, -2] = np.inf  # beside all of the third
    rows = {row.label: row for row in measure_lesions(scan)}
    expected = peak_by_definition(scan, rows[1].lesion_id)
    assert rows[1].suv_peak == pytest.approx(expected, rel=1e-9)
    scan.image.array[:, :, -2] = np.nan
    row = {row.label: row for row in measure_lesions(scan)}[3]
    assert math.isnan(row.suv_peak) and "suv_peak:" in row.notes
    scan.image.array[0, 0, 0] = np.nan
    row = {row.label: row for row in measure_lesions(scan)}[2]
    assert row.mtv41_ml is None and "suv_peak, mtv, tlg" in row.notes


def test_specks_have_metabolic_volumes_but_no_peak():
    scan = scan_of(GRIDS["PET"])
    whole = measure_lesions(scan)
    for full, row in zip(whole, measure_largest(scan, most=1), strict=True):
        assert row.mtv41_ml == pytest.approx(full.mtv41_ml)
        assert row.tlg_g == pytest.approx(full.tlg_g)
        assert (row.suv_peak is None) == (row.lesion_id > 1) == ("suv_peak" in row.notes)


def test_the_peak_of_the_digital_phantom_is_that_of_ibsi():
    folder = SHARED / "ibsi_phantoms"
    if not folder.exists():
        pytest.skip("shared/data/ibsi_phantoms is not here")
    image = read_volume(folder / "images" / "ibsi_1_digital_phantom.nii.gz")
    mask = read_mask(folder / "labels" / "ibsi_1_digital_phantom.nii.gz")
    lesions = label_lesions(mask.array, image.geometry, objects="labels")
    (row,) = measure_lesions(segmented(image, lesions, unit="SUV"))
    assert row.suv_peak == pytest.approx(3.1, abs=0.05)  # 0F91; the local peak VJGA is 2.6
