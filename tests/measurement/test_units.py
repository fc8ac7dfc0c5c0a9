"""Scans in HU and SUV by the definitions of both units, and common faults of files."""

import numpy as np
import pytest
from laws import ball, grid_around, oblique, orientations, real_data
from scipy import ndimage

from volseg.io.volumes import read_volume
from volseg.measurement.units import contradiction, judge_unit, looks_like_ct, warnings_in
from volseg.volume import Geometry, Volume


def chest(seed=0):
    """Return a body of fat, muscle and lung in air, in HU, with the noise of a CT."""
    geometry = grid_around(30, oblique((1.0, 1.2, 2.5)), 3)
    values = np.full(geometry.shape, -1000.0)
    for radius, hu in ((30, -100), (26, 40), (15, -850), (5, 60)):
        values[ball(radius, geometry)] = hu
    values += np.random.default_rng(seed).normal(0, 12, geometry.shape)
    return Volume(np.asfortranarray(values.astype(np.float32)), geometry)


FAULTS = {  # common mistakes when a CT is converted
    "intercept not applied": lambda hu: np.clip(hu + 1024, 0, None),
    "intercept not applied, with padding": lambda hu: np.where(hu < -980, -2000 + 1024, hu + 1024),
    "intercept applied twice": lambda hu: hu - 1024,
    "windowed to 0..255": lambda hu: np.round(np.clip((hu + 1000) / 1400, 0, 1) * 255),
    "scaled to 0..1": lambda hu: np.clip((hu + 1000) / 1400, 0, 1),
    "scaled to -1..1": lambda hu: np.clip((hu + 1000) / 700 - 1, -1, 1),
    "standardised": lambda hu: (hu - hu.mean()) / hu.std(),
    "clipped to a brain window": lambda hu: np.clip(hu, 0, 80),
    "in thousands": lambda hu: hu / 1000,
    "constant": lambda hu: np.full_like(hu, 40),
    "not a number": lambda hu: np.full_like(hu, np.nan),
}


def magnetic(seed=0):
    """Return the same body on MRI: no value below 0, and noise in the background."""
    scan = chest(seed)
    values = np.where(scan.array < -950, 0, 300 + 0.25 * scan.array)
    noise = np.random.default_rng(seed).normal(0, 8, (2, *values.shape))
    values = np.hypot(values + noise[0], noise[1])
    return scan.with_array(np.asfortranarray(np.rint(values).astype(np.int16)))


def emission(seed=0):
    """Return the same body on PET, in SUV."""
    scan = chest(seed)
    values = np.where(scan.array < -950, 0.01, 0.5 + (scan.array > 30))
    values *= np.random.default_rng(seed).gamma(20, 1 / 20, values.shape)
    return scan.with_array(np.asfortranarray(values.astype(np.float32)))


def frame(values, width, fill):
    margins = ((width, width), (width, width), (0, 0))
    return np.pad(values[width:-width, width:-width], margins, constant_values=fill)


def first_voxels(values, fraction, fill):
    filled = values.copy()
    filled.flat[: int(fraction * values.size)] = fill
    return filled


PADDINGS = {  # left by resampling, cropping and scanners where nothing was measured
    "five voxels in a thousand": lambda values: first_voxels(values, 0.005, -1024),
    "two voxels in a thousand": lambda values: first_voxels(values, 0.002, -1000),
    "a tenth": lambda values: first_voxels(values, 0.1, -3024),
    "a half": lambda values: first_voxels(values, 0.5, -2000),
    "a frame": lambda values: frame(values, 4, -1024),
    "two fill values": lambda values: first_voxels(frame(values, 3, -1024), 0.05, -2000),
    "a value over all others": lambda values: first_voxels(values, 0.4, 3071),
    "a value over, and one under all others": lambda values: first_voxels(
        frame(values, 3, -1000), 0.1, 3071
    ),
    "a value among the others": lambda values: frame(values, 3, 100),
    "not a number": lambda values: first_voxels(values.astype(np.float32), 0.1, np.nan),
    "rotated": lambda values: ndimage.rotate(values, 17, reshape=False, order=1, cval=-1000),
    "resampled again": lambda values: ndimage.zoom(
        np.pad(values.astype(np.float32), 4, constant_values=-1024), (0.83, 0.87, 0.91), order=1
    ),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_changes_nothing_about_the_unit(padding):
    """The unit does not depend on the value and number of padded voxels."""
    for made, unit in ((chest, "HU"), (magnetic, ""), (emission, "SUV")):
        padded = np.asfortranarray(PADDINGS[padding](made().array))
        scan = Volume(padded, Geometry(padded.shape, oblique((1.0, 1.2, 2.5))))
        assert judge_unit(scan, "HU").is_hu == looks_like_ct(scan) == (unit == "HU")
        assert judge_unit(scan, None).name == ("HU" if unit == "HU" else "a.u.")
        assert bool(contradiction(scan, "SUV")) == (unit != "SUV")


def test_a_padded_scan_has_the_same_unit_in_all_48_orders():
    scan = magnetic().with_array(np.asfortranarray(frame(magnetic().array, 2, -1024)))
    for stored, affine in orientations(scan):
        reordered = Volume(stored, Geometry(stored.shape, affine))
        assert judge_unit(reordered, "HU") == judge_unit(scan, "HU")


def test_air_that_was_clipped_to_one_value_is_air():
    for lowest in (-1000, -1024):
        values = np.maximum(np.rint(chest().array), lowest)
        values[chest().array < -940] = lowest
        scan = chest().with_array(np.asfortranarray(values.astype(np.int16)))
        assert np.mean(values == lowest) > 0.3
        assert judge_unit(scan, "HU").is_hu and looks_like_ct(scan)


@pytest.mark.slow
def test_a_scan_in_hu_is_in_hu_whatever_its_axes():
    scan = chest()
    for stored, affine in orientations(scan):
        reordered = Volume(stored, Geometry(stored.shape, affine))
        assert judge_unit(reordered, "hu") == judge_unit(scan, "HU")
        assert judge_unit(reordered, "hu").is_hu and looks_like_ct(reordered)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_ct_contradicts_hu_with_a_number(fault):
    scan = chest()
    unit = judge_unit(scan.with_array(np.asfortranarray(FAULTS[fault](scan.array))), "HU")
    assert unit.is_contradicted and not unit.is_hu
    assert unit.name == "a.u."
    assert "--unit states HU, but" in unit.doubt
    assert any(letter.isdigit() for letter in unit.doubt) or fault == "not a number"


@pytest.mark.parametrize("slope", [1.0, 2.0, 0.5])
def test_slope_and_intercept_count(slope):
    scan = chest()
    stored = Volume(((scan.array + 1024) / slope).astype(np.float32), scan.geometry, slope, -1024.0)
    assert judge_unit(stored, "HU").is_hu


def test_a_guess_of_hu_is_a_guess():
    unit = judge_unit(chest(), None)
    assert unit.name == "HU" and not unit.is_contradicted
    assert not unit.is_hu and "pass --unit HU" in unit.doubt


def test_soft_tissue_alone_is_accepted_as_hu_but_not_guessed():
    geometry = Geometry((30, 30, 20), oblique((1, 1, 2)))
    values = np.random.default_rng(0).normal(60, 15, geometry.shape)
    values[:, :6] -= 160  # fat
    scan = Volume(np.asfortranarray(values.astype(np.int16)), geometry)
    assert judge_unit(scan, "HU").is_hu
    assert judge_unit(scan, None).name == "a.u."


def test_ringing_below_zero_is_not_air():
    """Cubic interpolation of an MR scan leaves small values below 0 at edges."""
    geometry = Geometry((30, 30, 20), oblique((1, 1, 2)))
    values = np.random.default_rng(0).gamma(4, 120, geometry.shape)
    values[:4] = np.random.default_rng(1).normal(0, 8, values[:4].shape)
    scan = Volume(np.asfortranarray(values), geometry)
    assert contradiction(scan, "HU")
    assert judge_unit(scan, None).name == "a.u."


@pytest.mark.parametrize(
    ("values", "is_suv"), [((2, 1), True), ((300, 100), False), ((-500, 200), False)]
)
def test_an_suv_of_one_is_the_mean_of_a_body(values, is_suv):
    mean, sd = values
    suv = np.abs(np.random.default_rng(0).normal(mean, sd, (20, 20, 20))) * np.sign(mean)
    scan = Volume(suv, Geometry((20,) * 3, np.eye(4)))
    assert bool(contradiction(scan, "SUV")) != is_suv


def test_air_alone_is_in_hu():
    geometry = Geometry((20, 20, 20), np.diag([1, 1, 2, 1.0]))
    assert judge_unit(Volume(np.full((20, 20, 20), -1000, np.int16), geometry), "HU").is_hu


@pytest.mark.parametrize(
    ("file", "unit"),
    [
        ("lidc_nodules/images/LIDC-IDRI-0001_R_1.nii.gz", "HU"),
        ("msd_spleen_ct/images/spleen2.nii.gz", "HU"),
        ("totalseg_example_ct/images/example_ct_sm.nii.gz", "HU"),
        ("sts_sarcoma/images/STS_003_MR_T1.nii.gz", ""),
        ("sts_sarcoma/images/STS_003_PET.nii.gz", "SUV"),
        ("msd_hippocampus/images/hippocampus_001.nii.gz", ""),
        ("nifti_zoo/niivueimages__CT_AVM.nii.gz", ""),  # a head CT, windowed to 8 bits
    ],
)
def test_the_unit_of_real_scans_is_recognised(file, unit):
    scan = read_volume(real_data(file))
    assert judge_unit(scan, "HU").is_hu == (unit == "HU")
    assert bool(contradiction(scan, "SUV")) == (unit != "SUV") or unit == ""


@pytest.mark.parametrize("fill", [-1024, -1000, -3024, -32768])
@pytest.mark.parametrize(
    ("file", "is_hu"),
    [
        ("lidc_nodules/images/LIDC-IDRI-0001_R_1.nii.gz", True),
        ("totalseg_example_ct/images/example_ct_sm.nii.gz", True),
        ("sts_sarcoma/images/STS_003_MR_T1.nii.gz", False),
        ("sts_sarcoma/images/STS_003_PET.nii.gz", False),
        ("msd_hippocampus/images/hippocampus_001.nii.gz", False),
        ("nifti_zoo/niivueimages__CT_AVM.nii.gz", False),
    ],
)
def test_padding_does_not_change_the_unit_of_real_scans(file, is_hu, fill):
    scan = read_volume(real_data(file))
    for fraction in (0.002, 0.02, 0.3):
        values = first_voxels(np.asarray(scan.intensities(), np.float32), fraction, fill)
        padded = Volume(np.asfortranarray(values), scan.geometry)
        assert judge_unit(padded, "HU").is_hu == looks_like_ct(padded) == is_hu
        assert judge_unit(padded, None).name == ("HU" if is_hu else "a.u.")


def test_a_cell_of_warnings_is_split_at_codes_of_any_length():
    pairs = [("W_CLIP", "5% at 3071; export it again"), ("W_EQUAL_SLICES", "2"), ("N_CUT", "x: y")]
    assert warnings_in("; ".join(f"{code}: {text}" for code, text in pairs)) == pairs
    assert warnings_in("") == warnings_in(None) == []
