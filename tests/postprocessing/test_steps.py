from __future__ import annotations

import numpy as np
import pytest
from laws import (
    GRIDS,
    assert_is_a_row,
    ball,
    grid_around,
    oblique,
    orientations,
    row_with_examples,
)
from scipy.ndimage import binary_fill_holes

from volseg.errors import VolsegError
from volseg.postprocessing.steps import STEPS, FillHoles, KeepLargest, RemoveSmall, make_steps
from volseg.recipe import Step
from volseg.volume import Geometry, Volume

SPACING_MM = (0.7, 0.9, 2.5)
ALL_STEPS = [
    RemoveSmall(min_volume_mm3=5),
    KeepLargest(n=2),
    KeepLargest(label=2),
    FillHoles(),
    FillHoles(label=1),
]


def geometry_of(mask):
    return Geometry(mask.shape, oblique(SPACING_MM))


def boxes(*sizes_and_labels):
    """Return cubes of the given edges and labels in a row, two voxels apart."""
    mask = np.zeros((8, 8, sum(size + 2 for size, _ in sizes_and_labels) + 2), np.uint8)
    start = 2
    for size, label in sizes_and_labels:
        mask[1 : 1 + size, 1 : 1 + size, start : start + size] = label
        start += size + 2
    return mask


def test_remove_small_compares_volumes_not_voxels():
    mask = boxes((1, 1), (2, 1), (3, 2))
    geometry, voxel_mm3 = geometry_of(mask), np.prod(SPACING_MM)
    cleaned = RemoveSmall(min_volume_mm3=8 * voxel_mm3)(mask, geometry)
    assert np.array_equal(cleaned, boxes((1, 0), (2, 1), (3, 2)))  # exactly 8 voxels stay
    cleaned = RemoveSmall(min_volume_mm3=8.01 * voxel_mm3)(mask, geometry)
    assert np.array_equal(cleaned > 0, mask == 2)


def test_remove_small_of_one_label_leaves_the_others():
    mask = boxes((1, 1), (2, 1), (1, 2))
    step = RemoveSmall(min_volume_mm3=1.01 * np.prod(SPACING_MM), label=1)
    assert np.array_equal(step(mask, geometry_of(mask)), boxes((1, 0), (2, 1), (1, 2)))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_lesion_of_exactly_the_minimal_volume_stays_in_all_48_orientations(grid):
    mask = boxes((3, 1), (1, 1))
    geometry = Geometry(mask.shape, grid(SPACING_MM))
    step = RemoveSmall(min_volume_mm3=27 * abs(np.linalg.det(geometry.affine[:3, :3])))
    for array, affine in orientations(Volume(mask, geometry)):
        assert np.count_nonzero(step(array, Geometry(array.shape, affine))) == 27


def test_keep_largest_of_each_label():
    mask = boxes((1, 1), (3, 1), (2, 1), (1, 2), (2, 2))
    for step, expected in (
        (KeepLargest(), boxes((1, 0), (3, 1), (2, 0), (1, 0), (2, 2))),
        (KeepLargest(n=2), boxes((1, 0), (3, 1), (2, 1), (1, 2), (2, 2))),
        (KeepLargest(label=2), boxes((1, 1), (3, 1), (2, 1), (1, 0), (2, 2))),
    ):
        assert np.array_equal(step(mask, geometry_of(mask)), expected)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_hollow_ball_is_filled(grid):
    geometry = grid_around(10, grid((0.9, 0.9, 1.5)))
    full = ball(10, geometry)
    hollow = (full & ~ball(6, geometry)).astype(np.uint8) * 3
    assert (hollow > 0).sum() < full.sum()
    assert np.array_equal(FillHoles()(hollow, geometry), full * np.uint8(3))
    assert np.array_equal(FillHoles(label=3)(hollow, geometry), full * np.uint8(3))
    assert np.array_equal(FillHoles(label=1)(hollow, geometry), hollow)


def test_fill_holes_of_one_label_equals_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = (rng.random((9, 10, 11)) < 0.75).astype(np.uint8)
        filled = FillHoles()(mask, geometry_of(mask))
        assert filled.sum() > mask.sum()
        assert np.array_equal(filled, binary_fill_holes(mask))


def nested():
    """Return a hollow tumour (2) in an organ (1), with a gap between them and a notch outside."""
    mask = np.zeros((13, 13, 13), np.uint8)
    mask[1:12, 1:12, 1:12] = 1
    mask[3:10, 3:10, 3:10] = 2
    mask[5:8, 5:8, 5:8] = 0  # core: adjacent to 2 only
    mask[3, 4:9, 4:9] = 0  # gap: adjacent to 1 and 2
    mask[1:3, 1, 1] = 0  # notch: open to the outside
    return mask


def test_a_cavity_is_filled_with_the_label_around_it_unless_it_is_between_two():
    mask = nested()
    expected = mask.copy()
    expected[5:8, 5:8, 5:8] = 2
    assert np.array_equal(FillHoles()(mask, geometry_of(mask)), expected)
    assert np.array_equal(FillHoles(label=1)(mask, geometry_of(mask)), mask)


def test_a_hole_at_the_edge_of_the_array_is_open():
    mask = np.ones((4, 4, 4), np.uint8)
    mask[0, 1, 1] = 0
    assert np.array_equal(FillHoles()(mask, geometry_of(mask)), mask)
    mask[1, 2, 2] = 0  # inside, touches the open hole only at an edge
    assert FillHoles()(mask, geometry_of(mask))[1, 2, 2] == 1


@pytest.mark.parametrize("step", ALL_STEPS, ids=repr)
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16])
def test_a_step_keeps_dtype_and_input_is_idempotent_and_leaves_an_empty_mask_empty(step, dtype):
    mask = (np.random.default_rng(1).random((8, 9, 10)) < 0.4).astype(dtype)
    before = mask.copy()
    mask.setflags(write=False)
    once = step(mask, geometry_of(mask))
    assert np.array_equal(mask, before)
    assert once.dtype == mask.dtype and once.shape == mask.shape
    assert np.array_equal(step(once, geometry_of(mask)), once)
    assert not step(np.zeros_like(mask), geometry_of(mask)).any()


@pytest.mark.parametrize("step", ALL_STEPS, ids=repr)
def test_a_step_gives_the_same_in_all_48_orientations(step):
    mask = np.random.default_rng(2).choice(3, p=(0.8, 0.12, 0.08), size=(13, 14, 20))
    mask = mask.astype(np.uint8)
    mask[:, 1:, 7:] = nested()
    expected = step(mask, geometry_of(mask))
    assert not np.array_equal(expected, mask) or step == FillHoles(label=1)
    assert_same_in_all_48_orientations(step, mask, expected)


@pytest.mark.parametrize("name", STEPS)
def test_laws_of_every_step(name):
    """Any step of the table, with its defaults: its author need not touch this file."""
    assert_is_a_row(STEPS[name])
    step = row_with_examples(STEPS[name])
    for dtype in (bool, np.uint8, np.int16):
        mask = np.random.default_rng(2).choice(3, p=(0.7, 0.2, 0.1), size=(13, 14, 20))
        mask[:, 1:, 7:] = nested()
        mask = mask.astype(dtype)
        mask.setflags(write=False)
        cleaned = step(mask, geometry_of(mask))
        assert (cleaned.dtype, cleaned.shape) == (mask.dtype, mask.shape)
        assert set(np.unique(cleaned)) <= {0, *np.unique(mask)}
        assert not step(np.zeros_like(mask), geometry_of(mask)).any()
        assert_same_in_all_48_orientations(step, mask, cleaned)


def assert_same_in_all_48_orientations(step, mask, expected):
    masks, results = (orientations(Volume(a, geometry_of(mask))) for a in (mask, expected))
    for (array, affine), (cleaned, _) in zip(masks, results, strict=True):
        assert np.array_equal(step(array, Geometry(array.shape, affine)), cleaned)


def test_keep_largest_of_equal_lesions_is_the_same_in_all_48_orientations():
    mask = boxes((2, 1), (2, 1), (2, 1))
    expected = KeepLargest()(mask, geometry_of(mask))
    assert expected.sum() == 8
    assert_same_in_all_48_orientations(KeepLargest(), mask, expected)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("remove_small", {"min_volume_mm3": 0}),
        ("remove_small", {"min_volume_mm3": True}),
        ("remove_small", {"min_volume_mm3": "10"}),
        ("remove_small", {"min_volume_mm3": 10, "label": 0}),
        ("keep_largest", {"n": 0}),
        ("keep_largest", {"n": 1.5}),
        ("keep_largest", {"label": "liver"}),
        ("fill_holes", {"label": -1}),
    ],
)
def test_invalid_settings_are_refused(name, settings):
    with pytest.raises(VolsegError) as caught:
        make_steps([Step(step=name, **settings)])
    assert caught.value.code == "E_RECIPE"
    assert repr(list(settings.values())[-1]) in str(caught.value)


def test_steps_of_a_recipe_keep_their_order_and_errors_name_unknown_ones():
    steps = make_steps([Step(step="remove_small", min_volume_mm3=5), Step(step="keep_largest")])
    assert steps == [RemoveSmall(min_volume_mm3=5), KeepLargest()]
    for step, message in (
        (Step(step="remove_smal"), "remove_small"),
        (Step(step="remove_small", mm=3), "mm"),
    ):
        with pytest.raises(VolsegError, match=message):
            make_steps([step])
