"""Facts about a scan: known noise, the same numbers in every axis order, little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from laws import oblique, orientations
from quality_phantoms import Patient, dataset

from volseg.quality.noise import estimate_noise
from volseg.quality.outliers import outliers
from volseg.quality.prints import print_of_scan
from volseg.quality.scan import judge_scan
from volseg.quality.slices import judge_slices, slice_axis
from volseg.volume import Geometry, Volume


@pytest.mark.parametrize("is_ct", [True, False])
@pytest.mark.parametrize("sd", [3, 10, 40])
def test_noise_is_that_of_the_phantom_within_a_tenth(is_ct, sd):
    patient = Patient(
        seed=sd, shape=(160, 140, 24), spacing_mm=(1.2, 1.3, 4), is_ct=is_ct, noise=sd
    )
    noise = estimate_noise(patient.scan(), is_hu=is_ct)
    assert noise.sd == pytest.approx(sd, rel=0.1)
    tissue = 1040 if is_ct else 640
    assert noise.snr == pytest.approx(tissue / sd, rel=0.15)


def test_a_gradient_is_no_noise_and_no_noise_is_zero():
    shape = (70, 70, 6)
    ramp = np.broadcast_to(np.arange(70.0)[:, None, None] * 5 + 100, shape)
    geometry = Geometry(shape, np.diag([1, 1, 3, 1.0]))
    smooth = estimate_noise(Volume(ramp.astype(np.float32), geometry), is_hu=False)
    assert smooth.sd == 0 and smooth.snr is None
    flat = estimate_noise(Volume(np.where(ramp > 200, 50, 0), geometry), is_hu=False)
    assert flat.sd == 0 and flat.snr is None
    tiny = Volume(ramp[:9, :9].astype(np.float32), Geometry((9, 9, 6), np.eye(4)))
    assert estimate_noise(tiny, is_hu=False).sd is None


def test_the_facts_are_the_same_in_all_48_axis_orders():
    patient = Patient(seed=4, shape=(50, 44, 20))
    scan = Volume(patient.scan().array, Geometry(patient.shape, oblique((3.0, 3.1, 5.0))))
    expected = judge_scan(scan).row
    prints = print_of_scan(scan)
    for array, affine in orientations(scan):
        turned = Volume(array, Geometry(array.shape, affine))
        row = judge_scan(turned).row
        assert row.axes == turned.geometry.axis_codes
        for name in ("size_r", "equal_slices", "slice_jump_at", "cut_sides", "median", "air_hu"):
            assert getattr(row, name) == getattr(expected, name), name
        for name in ("spacing_s_mm", "slice_jump", "cut_share", "noise_sd", "snr", "at_highest"):
            assert getattr(row, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
        assert print_of_scan(turned).sha256 == prints.sha256


def test_scaled_voxels_have_the_facts_of_their_intensities():
    scan = Patient(seed=2).scan()
    stored = ((scan.array.astype(np.int32) + 2000) * 2).astype(np.uint16)
    scaled = Volume(stored, scan.geometry, slope=0.5, intercept=-2000.0)
    assert judge_scan(scaled).row == judge_scan(scan).row
    assert print_of_scan(scaled).sha256 == print_of_scan(scan).sha256


@pytest.mark.parametrize("axis", range(3))
def test_slices_lie_along_the_coarsest_axis_and_a_gap_is_found_where_it_is(axis):
    spacing = np.ones(3)
    spacing[axis] = 3
    assert slice_axis(Geometry((9, 9, 9), np.diag([*spacing, 1]))) == axis
    array = np.moveaxis(Patient(seed=1, shape=(60, 60, 40)).scan().array, 2, axis)
    gap = np.delete(array, range(15, 23), axis=axis)
    slices = judge_slices(Volume(gap, Geometry(gap.shape, np.diag([*spacing, 1]))))
    assert (slices.axis, slices.jump_at, slices.n_equal) == (axis, 15, 0)
    assert slices.jump is not None and slices.jump > 2


def test_padding_is_no_gap():
    scan = Patient(seed=1, is_ct=False).scan()
    array = scan.array.astype(np.float32)
    array[:, :, :6], array[:25, :, 6] = 0, 0  # as resampling to another grid leaves it
    jump = judge_slices(Volume(array, scan.geometry)).jump
    assert jump is not None and jump < 2


def test_memory_does_not_grow_with_the_number_of_slices():
    peaks = []
    for n in (30, 120):
        array = np.random.default_rng(0).integers(-1000, 400, (200, 200, n), dtype=np.int16)
        scan = Volume(np.asfortranarray(array), Geometry(array.shape, np.diag([1, 1, 2, 1.0])))
        tracemalloc.start()
        judge_scan(scan)
        print_of_scan(scan)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_outliers_are_few_and_far_from_the_quartiles():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = np.exp(rng.normal(0, rng.choice([0.01, 0.1, 1.0]), rng.integers(8, 60)))
        values[: rng.integers(0, 4)] *= rng.choice([0.1, 3, 10])
        lower, upper = np.exp(np.percentile(np.log(values), (25, 75)))
        width = upper / lower
        far = [
            n
            for n, value in enumerate(values)
            if value > upper * max(width**3, 1.5) or value < lower / max(width**3, 1.5)
        ]
        expected = far if len(far) <= max(1, 0.1 * len(values)) else []
        assert outliers(values, factor=1.5) == expected
    assert outliers(np.array([1.0] * 6 + [9.0]), factor=1.5) == []  # too few to say


def test_noise_hardly_depends_on_the_patient():
    deviations = [judge_scan(scan).row.noise_sd for scan in dataset(5)]
    assert all(sd is not None and 9 < sd < 16 for sd in deviations)
