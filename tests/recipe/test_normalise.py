import numpy as np
import pytest

from volseg.recipe.normalise import NORMALISERS, Histogram, Percentile, Scale, Window, ZScore

ARRAY = np.random.default_rng(0).normal(100, 30, (8, 9, 10)).astype(np.float32)
BODY = ARRAY > 80


def test_a_window_clips_and_scales_with_the_statistics_of_the_dataset():
    intensities = np.array([-500.0, 0, 50, 75, 200, 3000], np.float32)
    normalised = Window(low=0, high=200, mean=50, sd=25)(intensities)
    np.testing.assert_allclose(normalised, [-2, -2, 0, 1, 6, 6], atol=1e-6)


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Window(low=10, high=10, mean=0, sd=1)


@pytest.mark.parametrize("normaliser", [ZScore(), Percentile(low_percent=1, high_percent=99)])
@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1.0, 500.0), (1e4, -3.0)])
def test_per_image_normalisation_ignores_scale_and_offset(normaliser, scale, offset):
    array = ARRAY * np.float32(scale) + np.float32(offset)
    np.testing.assert_allclose(normaliser(array, BODY), normaliser(ARRAY, BODY), atol=2e-3)


def test_the_z_score_uses_the_voxels_of_the_body():
    inside = ZScore()(ARRAY, BODY)[BODY]
    assert inside.mean() == pytest.approx(0, abs=1e-4)
    assert inside.std() == pytest.approx(1, abs=1e-4)


def test_percentiles_of_the_body_become_0_and_1_and_normalising_is_idempotent():
    normaliser = Percentile(low_percent=0, high_percent=100)
    normalised = normaliser(ARRAY, BODY)
    assert (normalised[BODY].min(), normalised[BODY].max()) == pytest.approx((0, 1), abs=1e-6)
    np.testing.assert_allclose(normaliser(normalised, BODY), normalised, atol=1e-6)


@pytest.mark.parametrize("normaliser", [ZScore(), Percentile(), Histogram()])
def test_a_constant_scan_becomes_zero_and_not_nan(normaliser):
    np.testing.assert_array_equal(normaliser(np.full((3, 3, 3), 7.0, np.float32), None), 0)


def test_an_empty_body_falls_back_to_all_voxels():
    empty = np.zeros(ARRAY.shape, bool)
    np.testing.assert_array_equal(ZScore()(ARRAY, empty), ZScore()(ARRAY, None))


# A normaliser whose keys have no usable defaults needs an example here.
EXAMPLES = {Window: [{"low": 0, "high": 200, "mean": 50, "sd": 25}]}
EXAMPLES |= {ZScore: [{}, {"region": "scan"}, {"region": "nonzero"}]}
EXAMPLES |= {Histogram: [{}, {"bins": 2}, {"bins": 1000, "region": "scan"}]}
EXAMPLES |= {Scale: [{"subtract": 3, "divide_by": 7}]}


@pytest.mark.parametrize(
    "normaliser", [row(**keys) for row in NORMALISERS for keys in EXAMPLES.get(row, [{}])], ids=str
)
def test_laws_of_every_normaliser(normaliser):
    before = ARRAY.copy()
    whole = normaliser(ARRAY, BODY)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(ARRAY, before)
    assert type(normaliser).model_validate(dict(normaliser)) == normaliser
    with pytest.raises(ValueError, match="hihg"):
        type(normaliser).model_validate(dict(normaliser) | {"hihg": 1})
    fitted = normaliser.fit(ARRAY, BODY)
    slabs = [fitted(ARRAY[part], BODY[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 8))]
    np.testing.assert_array_equal(np.concatenate(slabs), whole)
    assert whole.dtype == np.float32
    assert not np.shares_memory(whole, ARRAY)


def test_the_region_determines_the_statistics_and_the_voxels_outside():
    scan, nonzero = ZScore(region="scan")(ARRAY, BODY), ZScore(region="nonzero")(ARRAY, BODY)
    assert (scan.mean(), scan.std()) == pytest.approx((0, 1), abs=1e-4)
    assert (nonzero[BODY].mean(), nonzero[BODY].std()) == pytest.approx((0, 1), abs=1e-4)
    assert not nonzero[~BODY].any()
    masked, normaliser = np.where(BODY, ARRAY, 0), ZScore(region="nonzero")
    np.testing.assert_array_equal(normaliser(masked, None), normaliser(masked, masked != 0))


@pytest.mark.parametrize("bins", [16, 256])
@pytest.mark.parametrize("change", [lambda x: x, np.exp, lambda x: x**3], ids=["id", "exp", "cube"])
def test_an_equalised_histogram_is_uniform_whatever_rising_change_came_before(change, bins):
    array = change(np.random.default_rng(1).normal(2, 1, (20, 30, 40))).astype(np.float32)
    levels = Histogram(bins=bins, region="scan")(array).ravel()
    np.testing.assert_allclose(np.sort(levels), np.linspace(0, 1, levels.size), atol=1.5 / bins)
    assert (np.diff(levels[np.argsort(array.ravel())]) >= -1e-6).all()


def test_few_intensities_are_equalised_exactly_as_the_formula_says():
    array = (np.random.default_rng(2).integers(0, 50, (5, 6, 700)) ** 2 // 10).astype(np.uint8)
    cumulative = np.array([(array <= value).sum() for value in range(256)])
    lowest = cumulative[array.min()]
    expected = (cumulative[array] - lowest) / (array.size - lowest)  # as OpenCV's equalizeHist
    np.testing.assert_allclose(Histogram(region="scan")(array), expected, atol=1e-6)


def test_the_histogram_of_the_body_leaves_out_the_background():
    levels = Histogram()(ARRAY, BODY)[BODY]
    np.testing.assert_allclose(np.sort(levels), np.linspace(0, 1, levels.size), atol=0.01)


def test_scale_uses_fixed_numbers():
    np.testing.assert_array_equal(Scale()(ARRAY, BODY), ARRAY)
    scaled = Scale(subtract=10, divide_by=255)(ARRAY, None)
    np.testing.assert_allclose(scaled, (ARRAY - 10) / 255, atol=1e-6)
