import numpy as np
import pytest

from volseg.errors import VolsegError
from volseg.preprocess.normalise import Percentile, Scale, Window, ZScore

ARRAY = np.random.default_rng(0).normal(100, 30, (8, 9, 10)).astype(np.float32)
BODY = ARRAY > 80


def test_a_window_clips_and_scales_with_the_statistics_of_the_dataset():
    found = Window(low=0, high=200, mean=50, sd=25)(
        np.array([-500.0, 0, 50, 75, 200, 3000], np.float32)
    )
    np.testing.assert_allclose(found, [-2, -2, 0, 1, 6, 6], atol=1e-6)


def test_an_empty_window_is_refused():
    with pytest.raises(VolsegError, match="empty"):
        Window(low=10, high=10, mean=0, sd=1)


@pytest.mark.parametrize("normaliser", [ZScore(), Percentile(low_percent=1, high_percent=99)])
@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1.0, 500.0), (1e4, -3.0)])
def test_per_image_normalisation_does_not_see_scale_and_offset(normaliser, scale, offset):
    np.testing.assert_allclose(
        normaliser(ARRAY * np.float32(scale) + np.float32(offset), BODY),
        normaliser(ARRAY, BODY),
        atol=2e-3,
    )


def test_the_z_score_is_that_of_the_body():
    inside = ZScore()(ARRAY, BODY)[BODY]
    assert inside.mean() == pytest.approx(0, abs=1e-4)
    assert inside.std() == pytest.approx(1, abs=1e-4)


def test_percentiles_of_the_body_become_0_and_1_and_twice_is_once():
    normaliser = Percentile(low_percent=0, high_percent=100)
    once = normaliser(ARRAY, BODY)
    assert (once[BODY].min(), once[BODY].max()) == pytest.approx((0, 1), abs=1e-6)
    np.testing.assert_allclose(normaliser(once, BODY), once, atol=1e-6)


@pytest.mark.parametrize("normaliser", [ZScore(), Percentile(low_percent=1, high_percent=99)])
def test_a_constant_scan_becomes_zero_and_not_nan(normaliser):
    np.testing.assert_array_equal(normaliser(np.full((3, 3, 3), 7.0, np.float32), None), 0)


def test_an_empty_body_falls_back_to_all_voxels():
    np.testing.assert_array_equal(
        ZScore()(ARRAY, np.zeros(ARRAY.shape, bool)), ZScore()(ARRAY, None)
    )


@pytest.mark.parametrize(
    "normaliser",
    [
        Window(low=0, high=200, mean=50, sd=25),
        ZScore(),
        ZScore(region="scan"),
        ZScore(region="nonzero"),
        Percentile(low_percent=1, high_percent=99),
        Scale(subtract=3, divide_by=7),
    ],
)
def test_what_is_fitted_to_the_scan_does_the_same_to_each_slab(normaliser):
    whole = normaliser(ARRAY, BODY)
    fitted = normaliser.fit(ARRAY, BODY)
    slabs = [fitted(ARRAY[part], BODY[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 8))]
    np.testing.assert_array_equal(np.concatenate(slabs), whole)
    assert whole.dtype == np.float32
    assert not np.shares_memory(whole, ARRAY)


def test_the_region_says_whose_mean_and_deviation_and_what_is_outside():
    scan, nonzero = ZScore(region="scan")(ARRAY, BODY), ZScore(region="nonzero")(ARRAY, BODY)
    assert (scan.mean(), scan.std()) == pytest.approx((0, 1), abs=1e-4)
    assert (nonzero[BODY].mean(), nonzero[BODY].std()) == pytest.approx((0, 1), abs=1e-4)
    assert not nonzero[~BODY].any()
    kept = np.where(BODY, ARRAY, 0)
    np.testing.assert_array_equal(
        ZScore(region="nonzero")(kept, None), ZScore(region="nonzero")(kept, kept != 0)
    )


def test_stated_numbers_do_not_look_at_the_scan():
    np.testing.assert_array_equal(Scale()(ARRAY, BODY), ARRAY)
    np.testing.assert_allclose(
        Scale(subtract=10, divide_by=255)(ARRAY, None), (ARRAY - 10) / 255, atol=1e-6
    )
