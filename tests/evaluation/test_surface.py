from __future__ import annotations

import math
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from laws import GRIDS, ball, grid_around, oblique, orientations
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from volseg.evaluation.surface import NOWHERE, surface_distances
from volseg.store.tables import cell
from volseg.volume import Geometry, Volume

FACES = [step for step in product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1]


def border_mm(mask, label, affine):
    """Return the border voxels in mm by the stated definition, voxel by voxel."""
    points = []
    for voxel in np.argwhere(mask == label):
        for step in FACES:
            neighbour = voxel + step
            outside = (neighbour < 0).any() or (neighbour >= mask.shape).any()
            if outside or mask[tuple(neighbour)] != label:
                points.append(affine[:3, :3] @ voxel + affine[:3, 3])
                break
    return np.array(points)


def brute_force(reference, predicted, label, affine):
    """Return the distances in both directions, from all pairs of border voxels."""
    truth, guess = border_mm(reference, label, affine), border_mm(predicted, label, affine)
    apart = np.linalg.norm(truth[:, None] - guess[None], axis=2)
    return apart.min(axis=1), apart.min(axis=0)


def random_affine(rng):
    """Return an anisotropic, oblique, sheared or mirrored grid."""
    affine = np.eye(4)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    shear = np.eye(3) + np.triu(rng.uniform(-0.3, 0.3, (3, 3)), 1)
    affine[:3, :3] = rotation @ shear @ np.diag(rng.uniform(0.4, 4.0, 3))
    affine[:3, 3] = rng.normal(0, 100, 3)
    return affine


# from voxels far apart to holes in a block
@pytest.mark.parametrize("density", [0.004, 0.05, 0.4, 0.98])
def test_equals_the_definition_by_brute_force(density):
    rng = np.random.default_rng(int(1000 * density))
    shape = (9, 9, 9)
    n_compared = 0
    for _ in range(6):
        masks = [(rng.random(shape) < density) * rng.integers(1, 3, shape) for _ in range(2)]
        reference, predicted = (mask.astype(np.uint8) for mask in masks)
        affine = random_affine(rng)
        by_label = surface_distances(reference, predicted, Geometry(shape, affine))
        for label in (1, 2):
            if not ((reference == label).any() and (predicted == label).any()):
                continue
            n_compared += 1
            distances = by_label[label]
            forward, back = brute_force(reference, predicted, label, affine)
            np.testing.assert_allclose(distances.from_reference, np.sort(forward), atol=1e-6)
            np.testing.assert_allclose(distances.from_predicted, np.sort(back), atol=1e-6)
            hd95 = max(np.percentile(forward, 95), np.percentile(back, 95))
            both = np.concatenate([forward, back])
            assert distances.hd95_mm == pytest.approx(hd95, abs=1e-6)
            assert distances.mean_mm == pytest.approx(both.mean(), abs=1e-6)
            for tolerance_mm in (1.0, 2.0, 5.0):
                nsd = (both <= tolerance_mm).mean()
                assert distances.nsd(tolerance_mm) == pytest.approx(nsd, abs=1e-6)
    assert n_compared >= 6


@pytest.fixture(scope="module")
def organ():
    """Return an anisotropic spacing, a blob of 48³, and two predictions: perturbed and moved."""
    rng = np.random.default_rng(3)
    distance = np.linalg.norm(np.indices((48, 48, 48)) - 23.5, axis=0)
    reference, predicted = (
        distance + 60 * gaussian_filter(rng.normal(size=distance.shape), width) < 15
        for width in (4, 3)
    )
    return (0.7, 0.9, 2.5), reference, predicted, np.roll(reference, 8, axis=0)


# near: reached by steps through the grid; far: by a tree
@pytest.mark.parametrize("which", ["near", "far"])
def test_equals_a_distance_transform_of_the_whole_array(organ, which):
    spacing_mm, reference, near, far = organ
    predicted = near if which == "near" else far
    borders = [mask & ~binary_erosion(mask) for mask in (reference, predicted)]
    to_reference, to_predicted = (
        distance_transform_edt(~border, sampling=spacing_mm) for border in borders
    )
    geometry = Geometry(reference.shape, np.diag([*spacing_mm, 1]))
    result = surface_distances(reference, predicted, geometry)[1]
    np.testing.assert_allclose(result.from_reference, np.sort(to_predicted[borders[0]]), atol=1e-6)
    np.testing.assert_allclose(result.from_predicted, np.sort(to_reference[borders[1]]), atol=1e-6)


@pytest.mark.parametrize("which", ["near", "far"])
def test_agrees_with_monai_where_monai_is_defined(organ, which):
    spacing_mm, reference, near, far = organ
    predicted = near if which == "near" else far
    y, y_pred = (torch.from_numpy(mask)[None, None] for mask in (reference, predicted))
    options = {"include_background": True, "spacing": spacing_mm}
    with warnings.catch_warnings():
        # MONAI warns of an argument that it passes itself
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(y_pred, y, percentile=95, **options)
        mean = compute_average_surface_distance(y_pred, y, symmetric=True, **options)
        nsd = compute_surface_dice(y_pred, y, [2.0], **options)
    geometry = Geometry(reference.shape, np.diag([*spacing_mm, 1]))
    result = surface_distances(reference, predicted, geometry)[1]
    assert result.hd95_mm == pytest.approx(float(hd95), rel=1e-6)
    assert result.mean_mm == pytest.approx(float(mean), rel=1e-6)
    assert result.nsd(2.0) == pytest.approx(float(nsd), rel=1e-6)


def test_labels_do_not_see_each_other(organ):
    _, reference, near, _ = organ
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)))
    halves = np.where(np.indices(reference.shape)[1] < 20, 7, 300).astype(np.uint16)
    together = surface_distances(reference * halves, near * halves, geometry)
    for label in (7, 300):
        half = halves == label
        alone = surface_distances(reference & half, near & half, geometry)[1]
        np.testing.assert_array_equal(together[label].from_reference, alone.from_reference)
        np.testing.assert_array_equal(together[label].from_predicted, alone.from_predicted)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_moved_block_is_off_by_the_distance_moved(grid, axis):
    geometry = Geometry((34, 34, 34), grid((0.8, 1.1, 1.7)))
    block = np.zeros(geometry.shape, bool)
    block[6:26, 6:26, 6:26] = True
    result = surface_distances(block, np.roll(block, 3, axis=axis), geometry)[1]
    moved_mm = 3 * geometry.spacing_mm[axis]
    if grid is GRIDS["sheared"]:  # the nearest voxel need not be the one that was moved
        assert 0.8 * moved_mm < result.hd95_mm <= moved_mm + 1e-6
    else:
        assert result.hd95_mm == pytest.approx(moved_mm, abs=1e-6)
    assert result.nsd(moved_mm) == 1.0


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.7, 0.7, 2.0)])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_ball_in_a_ball_is_off_by_the_difference_of_the_radii(grid, spacing_mm):
    geometry = grid_around(14, grid(spacing_mm))
    result = surface_distances(ball(10, geometry), ball(14, geometry), geometry)[1]
    step_mm = max(geometry.spacing_mm)  # border voxels lie up to one step inside the surface
    assert result.mean_mm == pytest.approx(4, abs=0.35 * step_mm)
    assert 4 - step_mm < result.hd95_mm < 4 + step_mm
    assert result.nsd(4 - 1.5 * step_mm) < 0.05
    assert result.nsd(4 + 1.5 * step_mm) == 1.0


def test_laws(organ):
    _, reference, near, far = organ
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)))
    same = surface_distances(reference, reference, geometry)[1]
    assert (same.hd95_mm, same.mean_mm, same.nsd(1e-9)) == (0.0, 0.0, 1.0)
    for predicted in (near, far):
        forward = surface_distances(reference, predicted, geometry)[1]
        back = surface_distances(predicted, reference, geometry)[1]
        assert (forward.hd95_mm, forward.mean_mm) == (back.hd95_mm, back.mean_mm)
        assert forward.nsd(2) == back.nsd(2)
        scaled = geometry.affine.copy()
        scaled[:3] *= 2
        double = surface_distances(reference, predicted, Geometry(reference.shape, scaled))[1]
        assert double.hd95_mm == pytest.approx(2 * forward.hd95_mm)
        assert double.mean_mm == pytest.approx(2 * forward.mean_mm)
        assert double.nsd(3) == pytest.approx(forward.nsd(1.5))
        assert forward.nsd(1) <= forward.nsd(2) <= forward.nsd(10)


def test_a_distance_equal_to_the_tolerance_lies_within_it_even_if_the_affine_is_rounded():
    block = np.zeros((20, 20, 20), bool)
    block[4:14, 4:14, 4:14] = True
    affine = oblique((1.0, 1.0, 1.0)).astype(np.float32)
    assert np.linalg.norm(affine[:3, 0].astype(float)) != 1.0
    for axis in range(3):
        moved = np.roll(block, 1, axis=axis)
        result = surface_distances(block, moved, Geometry(block.shape, affine))[1]
        assert result.nsd(1.0) == 1.0
        assert result.nsd(0.99) < 1.0


def test_all_48_orientations_print_the_same():
    rng = np.random.default_rng(5)
    a, b = (gaussian_filter(rng.normal(size=(13, 15, 17)), 1.5) > 0.02 for _ in range(2))
    b[0, 0, 0], a[0, 0, 0:3] = True, False  # a voxel far from all others
    geometry = Geometry(a.shape, oblique((0.7, 0.9, 2.5)))
    printed = set()
    for (reference, affine), (predicted, _) in zip(
        orientations(Volume(a, geometry)), orientations(Volume(b, geometry)), strict=True
    ):
        result = surface_distances(reference, predicted, Geometry(reference.shape, affine))[1]
        values = (result.hd95_mm, result.mean_mm, result.nsd(1), result.nsd(2))
        printed.add(tuple(map(cell, values)))
    assert len(printed) == 1


def test_distances_to_a_missing_surface_are_nan():
    mask, empty = np.zeros((6, 6, 6), np.uint8), np.zeros((6, 6, 6), np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    geometry = Geometry(mask.shape, oblique((1, 1, 2)))
    assert surface_distances(empty, empty, geometry) == {}
    assert np.isnan([NOWHERE.hd95_mm, NOWHERE.mean_mm, NOWHERE.nsd(1)]).all()
    for pair in ((mask, empty), (empty, mask)):
        result = surface_distances(*pair, geometry)[1]
        assert math.isnan(result.hd95_mm) and math.isnan(result.mean_mm)
        assert result.nsd(1) == result.nsd(1000) == 0.0
    by_label = surface_distances(mask, 2 * mask, geometry)  # each label is in one mask alone
    assert by_label.keys() == {1, 2}
    assert all(math.isnan(label.hd95_mm) and label.nsd(5) == 0.0 for label in by_label.values())


def test_a_mask_over_the_whole_array_has_its_border_at_the_faces():
    full = np.ones((5, 6, 7), np.uint8)
    result = surface_distances(full, full, Geometry(full.shape, oblique((1, 1, 2))))[1]
    assert result.from_reference.size == 5 * 6 * 7 - 3 * 4 * 5


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        surface_distances(np.ones((3, 3, 3)), np.ones((3, 3, 4)), Geometry((3, 3, 3), np.eye(4)))
