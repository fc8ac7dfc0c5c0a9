import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st
from laws import GRIDS, ball, grid_around, oblique, orientations, ras

from volseg.errors import ScanError
from volseg.preprocessing.prepare import Preparation, Trail, prepare, prepare_mask
from volseg.preprocessing.resample import positions
from volseg.preprocessing.restore import MaskRestorer
from volseg.recipe import Preprocess, Window, ZScore
from volseg.recipe.normalise import Histogram, Percentile
from volseg.volume import AxisOrder, BoundingBox, Geometry, Volume

WINDOW = Window(low=-1000, high=1000, mean=0, sd=1)


def int16_noise(shape, low=-400, high=400):
    return np.random.default_rng(0).integers(low, high, shape).astype(np.int16)


def settings(**changes):
    base = {"spacing_mm": (1.0, 1.0, 1.5), "normalise": WINDOW, "body_above": -500.0}
    return Preprocess(**(base | changes))


def phantom(geometry, radius_mm=10.0):
    """Return a ball of 100 HU in a box of tissue in air, int16, and the mask of the ball."""
    inside = ball(radius_mm, geometry)
    array = np.full(geometry.shape, -1000, np.int16)
    array[2:-2, 2:-2, 1:-1] = 0
    array[inside] = 100
    return Volume(array, geometry), inside


def restore_mask(logits, trail, values, *, regions=False):
    """Return mask and confidence for logits (classes, R, A, S) of the whole grid."""
    restorer = MaskRestorer(trail, values, axis=2, regions=regions)
    restorer.add(logits)
    return restorer.result()


def one_hot(mask, n):
    return np.stack([(mask == value).astype(np.float32) * 20 for value in range(n)])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("crop", ["body", "none"])
def test_prepare_then_restore_is_the_identity_at_the_original_spacing(grid, crop):
    geometry = grid_around(8, grid((0.8, 1.0, 2.0)), margin=4)
    scan, inside = phantom(geometry, radius_mm=8)
    prepared = prepare({"ct": scan}, settings(spacing_mm=_canonical_spacing(geometry), crop=crop))
    mask = prepare_mask(inside.astype(np.uint8) * 3, prepared.trail)
    restored, confidence = restore_mask(one_hot(mask // 3, 2), prepared.trail, [3])
    np.testing.assert_array_equal(restored, inside * 3)
    assert restored.dtype == np.uint8
    assert confidence[inside].min() >= 254
    assert not confidence[~inside].any()
    assert (prepared.trail.box != BoundingBox.whole(prepared.trail.box.shape)) == (crop == "body")


def _canonical_spacing(geometry):
    codes = geometry.axis_codes
    order = [codes.find(a) if a in codes else codes.find(b) for a, b in ("RL", "AP", "SI")]
    return tuple(geometry.spacing_mm[axis] for axis in order)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_ball_is_restored_from_another_spacing(grid):
    geometry = grid_around(10, grid((0.8, 0.8, 2.5)), margin=4)
    scan, inside = phantom(geometry)
    prepared = prepare({"ct": scan}, settings(spacing_mm=(1.0, 1.0, 1.0)))
    mask = prepare_mask(inside.astype(np.uint8), prepared.trail)
    restored, _ = restore_mask(one_hot(mask, 2), prepared.trail, [1])
    both = np.count_nonzero(inside & (restored == 1))
    assert 2 * both / (inside.sum() + np.count_nonzero(restored)) > 0.97


def test_all_48_orders_prepare_to_the_same_network_input_and_restore_to_the_same_place():
    geometry = Geometry((18, 21, 12), oblique((1.0, 0.9, 2.0)))
    rng = np.random.default_rng(0)
    scan = Volume(rng.integers(-400, 400, geometry.shape).astype(np.int16), geometry)
    expected = prepare({"ct": scan}, settings())
    logits = rng.normal(size=(3, *expected.array.shape[1:])).astype(np.float32)
    expected_mask, _ = restore_mask(logits, expected.trail, [1, 5])
    for (stored, affine), (mask, _) in zip(
        orientations(scan), orientations(scan.with_array(expected_mask)), strict=True
    ):
        prepared = prepare({"ct": Volume(stored, Geometry(stored.shape, affine))}, settings())
        np.testing.assert_allclose(prepared.array, expected.array, atol=5e-3)
        restored, _ = restore_mask(logits, prepared.trail, [1, 5])
        np.testing.assert_array_equal(restored, mask)


@pytest.mark.parametrize(
    "normaliser",
    [
        ZScore(region="scan"),
        ZScore(region="nonzero"),
        Percentile(low_percent=0, high_percent=100, region="scan"),
    ],
)
def test_normalise_first_uses_every_stored_voxel(normaliser, monkeypatch):
    monkeypatch.setattr(sys.modules["volseg.preprocessing.prepare"], "SAMPLE_VOXELS", 50)
    monkeypatch.setattr(sys.modules["volseg.volume"], "SLAB_VOXELS", 100)
    geometry = Geometry((6, 7, 30), np.eye(4))
    array = np.random.default_rng(0).integers(1, 50, geometry.shape).astype(np.int16)
    array[:2, :3] = 0  # a notch, so that the box of the others is the whole scan
    array[3, 3, 17] = 3000  # in a plane that a sample would miss
    changes = {
        "spacing_mm": (1.0, 1.0, 1.0),
        "crop": "nonzero" if normaliser.region == "nonzero" else "none",
        "normalise_first": True,
        "normalise": normaliser,
    }
    prepared = prepare({"ct": Volume(np.asfortranarray(array), geometry)}, settings(**changes))
    inside = array > 0 if normaliser.region == "nonzero" else np.ones(array.shape, bool)
    values = array[inside].astype(float)
    is_z_score = isinstance(normaliser, ZScore)
    shift, scale = (values.mean(), values.std()) if is_z_score else (values.min(), np.ptp(values))
    expected = np.where(inside, (array - shift) / scale, 0)
    np.testing.assert_allclose(prepared.array[0], expected, atol=1e-5)
    assert prepared.array.flags.c_contiguous


def test_small_tiles_restore_the_same_mask_as_large_ones(monkeypatch):
    geometry = Geometry((20, 18, 40), oblique((1.0, 0.9, 1.1)))
    scan = Volume(int16_noise(geometry.shape), geometry)
    prepared = prepare({"ct": scan}, settings(spacing_mm=(1.3, 1.3, 1.7)))
    logits = np.random.default_rng(1).normal(size=(4, *prepared.array.shape[1:])).astype(np.float32)
    whole = restore_mask(logits, prepared.trail, [1, 2, 9])
    monkeypatch.setattr(sys.modules["volseg.preprocessing.restore"], "TILE_VALUES", 900)
    restored = restore_mask(logits, prepared.trail, [1, 2, 9])
    for array, expected in zip(restored, whole, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_confidence_is_the_softmax_probability_of_the_winner():
    geometry = Geometry((4, 4, 4), np.diag([1.0, 1.0, 1.5, 1.0]))
    scan = Volume(np.zeros((4, 4, 4), np.int16), geometry)
    prepared = prepare({"ct": scan}, settings())
    logits = np.random.default_rng(0).normal(0, 2, (5, 4, 4, 4)).astype(np.float32)
    mask, confidence = restore_mask(logits, prepared.trail, [1, 2, 3, 4])
    exponents = np.exp(logits - logits.max(axis=0))
    np.testing.assert_array_equal(mask, logits.argmax(axis=0))
    probability = 1 / exponents.sum(axis=0)
    # In the background it is the probability of any label.
    expected = 255 * np.where(mask > 0, probability, 1 - probability)
    np.testing.assert_allclose(confidence, expected, atol=0.51)


def test_outside_the_body_the_mask_is_background_whatever_the_logits():
    geometry = Geometry((20, 20, 20), oblique((1, 1, 1.5)))
    array = np.full(geometry.shape, -1000, np.int16)
    array[5:15, 6:16, 4:18] = 50
    prepared = prepare({"ct": Volume(array, geometry)}, settings())
    logits = np.zeros((2, *prepared.array.shape[1:]), np.float32)
    logits[1] = 1
    mask, _ = restore_mask(logits, prepared.trail, [1])
    np.testing.assert_array_equal(mask == 1, array == 50)


def test_a_scaled_scan_gives_the_same_network_input_as_its_intensities():
    geometry = Geometry((12, 13, 9), oblique((1.0, 1.2, 2.0)))
    stored = np.random.default_rng(0).integers(0, 2000, geometry.shape).astype(np.uint16)
    scaled = Volume(stored, geometry, slope=0.5, intercept=-700)
    plain = Volume(scaled.intensities().astype(np.float32), geometry)
    for changes in ({}, {"body_above": "per_scan"}):
        first, second = (prepare({"ct": volume}, settings(**changes)) for volume in (scaled, plain))
        assert first.trail.box == second.trail.box
        np.testing.assert_allclose(first.array, second.array, atol=1e-3)


def test_channels_on_different_grids_are_refused():
    first = Volume(np.zeros((5, 5, 5), np.int16), Geometry((5, 5, 5), oblique((1, 1, 2))))
    second = Volume(np.zeros((5, 5, 6), np.int16), Geometry((5, 5, 6), oblique((1, 1, 2))))
    with pytest.raises(
        ScanError, match=r"not on the grid of .t1.: it has 5 × 5 × 6 voxels"
    ) as caught:
        prepare({"t1": first, "t2": second}, settings())
    assert caught.value.code == "E_PAIR"


@settings_of_test(max_examples=30, deadline=None)
@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    st.tuples(*[st.floats(0.5, 3)] * 3),
    st.integers(0, 2),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.booleans(),
)
def test_planes_and_slabs_of_any_size_along_any_axis_equal_the_whole(
    shape, spacing, axis, steps, separate
):
    geometry = Geometry(shape, oblique((1.0, 0.9, 1.1)))
    rng = np.random.default_rng(0)
    scan = Volume(rng.integers(-400, 400, shape).astype(np.int16), geometry)
    cubic = settings(
        spacing_mm=spacing,
        crop="none",
        interpolation="cubic",
        normalise=ZScore(),
        separate_above=1.5 if separate else None,
    )
    preparation = Preparation({"ct": scan}, cubic)
    trail = preparation.trail
    axis = axis if trail.separate_axis is None else trail.separate_axis
    whole = prepare({"ct": scan}, cubic).array
    logits = rng.normal(size=(3, *trail.shape)).astype(np.float32)
    planes, restorer = preparation.planes(axis), MaskRestorer(trail, [1, 5], axis=axis)
    start = 0
    while start < trail.shape[axis]:
        part = range(start, min(trail.shape[axis], start + steps[start % len(steps)]))
        array = planes.read(part.start, part.stop)
        np.testing.assert_allclose(array, np.take(whole, part, 1 + axis), atol=1e-4)
        restorer.add(np.take(logits, part, 1 + axis))
        start = part.stop
    mask, confidence = restorer.result()
    expected_mask, expected = restore_mask(logits, trail, [1, 5])
    same = mask == expected_mask
    # Labels may differ where two logits are equal except for the last bit.
    assert np.count_nonzero(~same) <= 1 + 0.001 * mask.size
    np.testing.assert_allclose(confidence[same].astype(int), expected[same].astype(int), atol=1)


def test_regions_are_where_their_logit_is_positive_and_later_ones_overwrite_earlier_ones():
    geometry = Geometry((5, 6, 7), np.eye(4))
    scan = Volume(np.zeros(geometry.shape, np.int16), geometry)
    trail = prepare({"ct": scan}, settings(spacing_mm=(1.0, 1.0, 1.0), crop="none")).trail
    logits = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float32)
    mask, confidence = restore_mask(logits, trail, [4, 2, 9], regions=True)
    expected = np.zeros(geometry.shape, int)
    probability = np.zeros(geometry.shape)
    for region, value in zip(logits, [4, 2, 9], strict=True):
        expected[region > 0] = value
        probability[region > 0] = 1 / (1 + np.exp(-region[region > 0]))
    probability = np.where(expected > 0, probability, 1 / (1 + np.exp(-logits.max(0))))
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(confidence, 255 * probability, atol=0.51)


def test_a_single_coarse_axis_uses_the_nearest_plane():
    geometry = Geometry((8, 8, 5), np.diag([1.0, 1.0, 5.0, 1.0]))
    scan = Volume(int16_noise(geometry.shape, 0, 9), geometry)
    changes = {"crop": "none", "separate_above": 3.0, "interpolation": "cubic"}
    preparation = Preparation({"ct": scan}, settings(spacing_mm=(1.0, 1.0, 2.5), **changes))
    assert preparation.trail.separate_axis == 2
    planes = preparation.planes(2).read(0, 10)[0]
    np.testing.assert_allclose(planes, np.repeat(scan.array, 2, axis=2), atol=1e-5)


def test_stored_axes_are_the_reversed_axes_of_the_file_then_transposed():
    geometry = Geometry((4, 5, 6), oblique((1, 1, 1)))
    scan = Volume(int16_noise(geometry.shape, 0, 99), geometry)
    changes = {"crop": "none", "axes": "stored", "transpose": (1, 0, 2)}
    prepared = prepare({"ct": scan}, settings(spacing_mm=(1.0, 1.0, 1.0), **changes))
    expected = scan.array.transpose(2, 1, 0).transpose(1, 0, 2)
    np.testing.assert_allclose(prepared.array[0], expected, atol=1e-4)
    mask, _ = restore_mask(one_hot(prepared.array[0] > 50, 2), prepared.trail, [1])
    np.testing.assert_array_equal(mask, scan.array > 50)


@settings_of_test(max_examples=30, deadline=None)
@given(st.data())
def test_a_part_of_the_grid_equals_the_whole_and_leaves_background_elsewhere(data):
    shape = data.draw(st.tuples(*[st.integers(2, 14)] * 3))
    geometry = Geometry(shape, oblique((1.0, 0.9, 1.1)))
    rng = np.random.default_rng(0)
    scan = Volume(rng.integers(-400, 400, shape).astype(np.int16), geometry)
    spacing_mm = data.draw(st.tuples(*[st.floats(0.5, 3)] * 3))
    preparation = Preparation({"ct": scan}, settings(spacing_mm=spacing_mm, crop="none"))
    trail, axis = preparation.trail, data.draw(st.integers(0, 2))
    ends = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
        for n in trail.shape
    ]
    part = BoundingBox(tuple(a for a, _ in ends), tuple(b for _, b in ends))
    whole = preparation.planes(axis).read(0, trail.shape[axis])
    planes = preparation.planes(axis, part).read(0, part.shape[axis])
    np.testing.assert_allclose(planes, whole[(slice(None), *part.slices)], atol=1e-4)
    logits = rng.normal(size=(3, *trail.shape)).astype(np.float32)
    restorer = MaskRestorer(trail, [1, 5], axis=axis, part=part)
    restorer.add(logits[(slice(None), *part.slices)])
    expected, _ = restore_mask(logits, trail, [1, 5])
    mask = trail.order.apply(restorer.result()[0])
    expected = trail.order.apply(expected)
    inside = np.ones(expected.shape, bool)
    for n, (m, native) in enumerate(zip(trail.shape, expected.shape, strict=True)):
        lower, upper, _ = positions(m, native)
        covered = (lower >= part.start[n]) & (upper < part.stop[n])
        inside &= covered.reshape([-1 if axis == n else 1 for axis in range(3)])
    assert not mask[~inside].any()
    assert np.count_nonzero(mask[inside] != expected[inside]) <= 1 + 0.001 * mask.size


@pytest.mark.parametrize("grid", [ras, oblique])
def test_at_another_spacing_equals_preparing_at_that_spacing(grid):
    geometry = Geometry((25, 30, 16), grid((0.9, 1.1, 2.5)))
    scan = Volume(int16_noise(geometry.shape, -1000, 400), geometry)
    coarse_mm = (3.0, 4.0, 5.0)
    fine = Preparation({"ct": scan}, settings(interpolation="cubic", separate_above=2.0))
    linear = settings(spacing_mm=coarse_mm, interpolation="linear", separate_above=None)
    expected = prepare({"ct": scan}, linear)
    coarse = fine.at(coarse_mm)
    assert coarse.trail == expected.trail
    planes = coarse.planes(2)
    np.testing.assert_allclose(planes.read(0, planes.shape[2]), expected.array, atol=1e-5)
    extent = np.array(coarse.trail.shape) * coarse.trail.spacing_mm
    np.testing.assert_allclose(extent, np.array(fine.trail.shape) * fine.trail.spacing_mm)
    box_extent = np.array(fine.trail.box.shape) * np.array([0.9, 1.1, 2.5])
    np.testing.assert_allclose(extent, box_extent, rtol=1e-6)
    assert fine.trail.separate_axis == 2  # unchanged


def interpolated(logits, trail):
    """Interpolate (classes, R, A, S) float64 to all native voxels of the box at once."""
    for axis, (n, native) in enumerate(zip(trail.shape, trail.box.shape, strict=True), start=1):
        kind = "nearest" if axis - 1 == trail.separate_axis else "linear"
        lower, upper, weight = positions(n, native, kind)
        weight = weight.reshape([-1 if other == axis else 1 for other in range(4)])
        logits = np.take(logits, lower, axis) * (1 - weight) + np.take(logits, upper, axis) * weight
    return logits


def logits_of_kind(kind, n_classes, shape, rng):
    if kind == "random":
        return rng.normal(0, 3, (n_classes, *shape)).astype(np.float32)
    low = torch.from_numpy(rng.normal(0, 3, (1, n_classes, 4, 3, 3)))
    smooth = torch.nn.functional.interpolate(low, size=shape, mode="trilinear")[0].numpy()
    if kind == "smooth":
        return smooth.astype(np.float32)
    if kind == "ties":
        return np.round(smooth).astype(np.float32)
    return np.maximum(20 * (smooth - smooth.max(0)), -rng.uniform(8, 30)).astype(np.float32)


@pytest.mark.parametrize("kind", ["smooth", "sharp", "random", "ties"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_skipped_classes_change_no_label_and_no_confidence_by_more_than_one(
    kind, regions, seed, monkeypatch
):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 28, 3).tolist())
    n_classes = int(rng.choice([2, 3, 12, 40, 300]))
    separate = int(rng.integers(0, 3)) if seed % 3 == 0 else None
    size = tuple(
        max(1, round(n * rng.uniform(0.4, 2.5))) if rng.random() < 0.8 else n for n in shape
    )
    geometry = Geometry(shape, oblique((1.0, 0.9, 1.1)))
    trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(shape), size, separate)
    size = trail.shape
    logits = logits_of_kind(kind, n_classes, size, rng)
    if regions and kind != "ties":
        logits += 2.0
    if seed % 2:  # many small tiles
        module = sys.modules["volseg.preprocessing.restore"]
        monkeypatch.setattr(module, "TILE_VALUES", 300 * n_classes)
    axis, step = int(rng.integers(0, 3)), int(rng.integers(1, 20))
    values = list(range(1, n_classes + regions))
    restorer = MaskRestorer(trail, values, axis=axis, regions=regions)
    for start in range(0, size[axis], step):
        restorer.add(np.take(logits, range(start, min(size[axis], start + step)), 1 + axis))
    mask, confidence = (trail.order.apply(array) for array in restorer.result())
    dense = interpolated(logits.astype(np.float64), trail)
    if regions:
        expected = ((dense > 0) * np.arange(1, n_classes + 1)[:, None, None, None]).max(0)
        winner = np.take_along_axis(dense, np.maximum(0, expected - 1)[None], 0)[0]
        probability = 1 / (1 + np.exp(-np.where(expected > 0, winner, dense.max(0))))
        is_close = np.abs(dense).min(0) < 1e-4
    else:
        expected = dense.argmax(0)
        probability = 1 / np.exp(dense - dense.max(0)).sum(0)
        probability = np.where(expected > 0, probability, 1 - probability)
        first, second = np.sort(dense, 0)[[-1, -2]]
        is_close = first - second < 1e-4
    same = mask == expected
    assert (same | is_close).all()
    assert np.count_nonzero(~same) <= 1 + 0.01 * mask.size or kind == "ties"
    difference = np.abs(confidence - np.round(255 * probability))
    is_label = same & (expected > 0)
    assert difference[is_label].max(initial=0) <= 1
    assert np.count_nonzero(difference[is_label]) <= 0.25 * is_label.sum() + 1
    is_background = same & (expected == 0)
    # Background tiles in which all labels have less than 0.1 may be skipped.
    assert difference[is_background].max(initial=0) <= 255 * 0.1 + 1
    assert difference[is_background & (probability > 0.101)].max(initial=0) <= 255 * 0.01 + 1


def test_the_first_of_classes_with_equal_logits_wins():
    geometry = Geometry((9, 9, 9), oblique((1, 1, 1)))
    trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole((9, 9, 9)), (9, 9, 9))
    logits = np.random.default_rng(0).integers(0, 3, (6, 9, 9, 9)).astype(np.float32)
    mask, _ = restore_mask(logits, trail, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(trail.order.apply(mask), logits.argmax(0))


@pytest.mark.parametrize("regions", [False, True])
def test_tensors_in_half_precision_give_the_same_as_arrays(regions):
    geometry = Geometry((20, 17, 12), oblique((1.0, 0.9, 1.1)))
    trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(geometry.shape), (11, 9, 12))
    logits = logits_of_kind("sharp", 5, trail.shape, np.random.default_rng(0)).astype(np.float16)
    values = [3, 4, 300, 7, 8][: 5 if regions else 4]
    expected = restore_mask(logits.astype(np.float32), trail, values, regions=regions)
    restorer = MaskRestorer(trail, values, axis=2, regions=regions)
    for planes in torch.from_numpy(logits).split(5, dim=3):
        restorer.add(planes)
    for array, expected_array in zip(restorer.result(), expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)


@pytest.mark.parametrize("border", [3, 4, 5])
def test_many_improbable_classes_count_between_two_certain_ones(border):
    """Between 8 and -8 the larger logit is 2, so 300 others of -8 have over 1 % together."""
    shape = (36, 9, 9)
    geometry = Geometry(shape, oblique((1.0, 1.0, 1.0)))
    trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(shape), (9, 9, 9))
    logits = np.full((303, 9, 9, 9), -8.0, np.float32)
    logits[1, :border], logits[2, border:] = 8, 8
    restored = restore_mask(logits, trail, list(range(1, 303)))
    mask, confidence = (trail.order.apply(array) for array in restored)
    dense = interpolated(logits.astype(np.float64), trail)
    np.testing.assert_array_equal(mask, dense.argmax(0))
    probability = 1 / np.exp(dense - dense.max(0)).sum(0)
    expected = 255 * np.where(dense.argmax(0) > 0, probability, 1 - probability)
    np.testing.assert_allclose(confidence, expected, atol=0.76)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_the_scan_with_a_reason(regions, value):
    geometry = Geometry((12, 12, 12), np.eye(4))
    trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(geometry.shape), (6, 6, 6))
    logits = np.zeros((3, 6, 6, 6), np.float32)
    logits[1 if value != -np.inf else slice(None), 2, 3, 4] = value
    logits -= 8 * regions  # so that no region is likely
    restorer = MaskRestorer(trail, [1, 2, 3] if regions else [1, 2], axis=2, regions=regions)
    with pytest.raises(ScanError, match="not finite"):
        restorer.add(logits)


def test_an_equalised_scan_is_uniform_in_its_body_plane_by_plane_too():
    geometry = Geometry((18, 21, 12), oblique((1.0, 0.9, 2.0)))
    array = np.random.default_rng(0).gamma(2, 200, geometry.shape).astype(np.float32)
    array[:, :, :3] = 0
    changes = {"spacing_mm": geometry.spacing_mm, "body_above": 0.0, "normalise": Histogram()}
    preparation = Preparation({"ct": Volume(array, geometry)}, settings(**changes))
    planes = preparation.planes()
    whole = planes.read(0, planes.shape[planes.axis]).numpy()
    levels = np.sort(whole[whole > 0])
    np.testing.assert_allclose(levels, np.linspace(0, 1, levels.size), atol=0.02)
    for start in range(planes.shape[planes.axis]):
        plane = planes.read(start, start + 1).numpy()
        np.testing.assert_array_equal(plane, np.take(whole, [start], 1 + planes.axis))
