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

from volseg.evaluate.surface import NOWHERE, surface_distances
from volseg.store.tables import cell
from volseg.volume import Geometry, Volume

FACES = [step for step in product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1]


def border_mm(mask, label, affine):
    """The stated definition, voxel by voxel."""
    points = []
    for voxel in np.argwhere(mask == label):
        for step in FACES:
            there = voxel + step
            outside = (there < 0).any() or (there >= mask.shape).any()
            if outside or mask[tuple(there)] != label:
                points.append(affine[:3, :3] @ voxel + affine[:3, 3])
                break
    return np.array(points)


def brute_force(reference, predicted, label, affine):
    """Sorted distances in both directions, from all pairs of border voxels."""
    one, other = border_mm(reference, label, affine), border_mm(predicted, label, affine)
    apart = np.linalg.norm(one[:, None] - other[None], axis=2)
    return apart.min(axis=1), apart.min(axis=0)


def random_affine(rng):
    """Anisotropic, oblique, sheared or mirrored: any grid at all."""
    affine = np.eye(4)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    shear = np.eye(3) + np.triu(rng.uniform(-0.3, 0.3, (3, 3)), 1)
    affine[:3, :3] = rotation @ shear @ np.diag(rng.uniform(0.4, 4.0, 3))
    affine[:3, 3] = rng.normal(0, 100, 3)
    return affine


@pytest.mark.parametrize(
    "density", [0.004, 0.05, 0.4, 0.98]
)  # from voxels far apart to holes in a block
def test_equals_the_definition_by_brute_force(density):
    rng = np.random.default_rng(int(1000 * density))
    seen = 0
    for _ in range(6):
        masks = [
            (rng.random((9, 9, 9)) < density) * rng.integers(1, 3, (9, 9, 9)) for _ in range(2)
        ]
        reference, predicted = (mask.astype(np.uint8) for mask in masks)
        affine = random_affine(rng)
        found = surface_distances(reference, predicted, Geometry((9, 9, 9), affine))
        for label in (1, 2):
            if not ((reference == label).any() and (predicted == label).any()):
                continue
            seen += 1
            one, other = brute_force(reference, predicted, label, affine)
            np.testing.assert_allclose(found[label].from_reference, np.sort(one), atol=1e-6)
            np.testing.assert_allclose(found[label].from_predicted, np.sort(other), atol=1e-6)
            hd95 = max(np.percentile(one, 95), np.percentile(other, 95))
            both = np.concatenate([one, other])
            assert found[label].hd95_mm == pytest.approx(hd95, abs=1e-6)
            assert found[label].mean_mm == pytest.approx(both.mean(), abs=1e-6)
            for tolerance_mm in (1.0, 2.0, 5.0):
                assert found[label].nsd(tolerance_mm) == pytest.approx(
                    (both <= tolerance_mm).mean(), abs=1e-6
                )
    assert seen >= 6


@pytest.fixture(scope="module")
def organ():
    """A blob of 48³ at an anisotropic spacing, its perturbed and its displaced prediction."""
    rng = np.random.default_rng(3)
    distance = np.linalg.norm(np.indices((48, 48, 48)) - 23.5, axis=0)
    reference, predicted = (
        distance + 60 * gaussian_filter(rng.normal(size=distance.shape), width) < 15
        for width in (4, 3)
    )
    return (0.7, 0.9, 2.5), reference, predicted, np.roll(reference, 8, axis=0)


@pytest.mark.parametrize("which", ["near", "far"])  # found by steps through the grid, and by a tree
def test_equals_a_distance_transform_of_the_whole_array(organ, which):
    spacing_mm, reference, near, far = organ
    predicted = near if which == "near" else far
    borders = [mask & ~binary_erosion(mask) for mask in (reference, predicted)]
    to_reference, to_predicted = (
        distance_transform_edt(~border, sampling=spacing_mm) for border in borders
    )
    found = surface_distances(
        reference, predicted, Geometry(reference.shape, np.diag([*spacing_mm, 1]))
    )[1]
    np.testing.assert_allclose(found.from_reference, np.sort(to_predicted[borders[0]]), atol=1e-6)
    np.testing.assert_allclose(found.from_predicted, np.sort(to_reference[borders[1]]), atol=1e-6)


@pytest.mark.parametrize("which", ["near", "far"])
def test_agrees_with_monai_where_monai_is_defined(organ, which):
    spacing_mm, reference, near, far = organ
    y, y_pred = (
        torch.from_numpy(mask)[None, None] for mask in (reference, near if which == "near" else far)
    )
    options = {"include_background": True, "spacing": spacing_mm}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # MONAI warns of an argument that it gives itself
        hd95 = compute_hausdorff_distance(y_pred, y, percentile=95, **options)
        mean = compute_average_surface_distance(y_pred, y, symmetric=True, **options)
        nsd = compute_surface_dice(y_pred, y, [2.0], **options)
    predicted = near if which == "near" else far
    found = surface_distances(
        reference, predicted, Geometry(reference.shape, np.diag([*spacing_mm, 1]))
    )[1]
    assert found.hd95_mm == pytest.approx(float(hd95), rel=1e-6)
    assert found.mean_mm == pytest.approx(float(mean), rel=1e-6)
    assert found.nsd(2.0) == pytest.approx(float(nsd), rel=1e-6)


def test_labels_do_not_see_each_other(organ):
    _, reference, near, _ = organ
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)))
    halves = np.where(np.indices(reference.shape)[1] < 20, 7, 300).astype(np.uint16)
    together = surface_distances(reference * halves, near * halves, geometry)
    for label in (7, 300):
        alone = surface_distances(
            reference & (halves == label), near & (halves == label), geometry
        )[1]
        np.testing.assert_array_equal(together[label].from_reference, alone.from_reference)
        np.testing.assert_array_equal(together[label].from_predicted, alone.from_predicted)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_block_that_is_moved_is_off_by_as_much(grid, axis):
    geometry = Geometry((34, 34, 34), grid((0.8, 1.1, 1.7)))
    block = np.zeros(geometry.shape, bool)
    block[6:26, 6:26, 6:26] = True
    found = surface_distances(block, np.roll(block, 3, axis=axis), geometry)[1]
    moved_mm = 3 * geometry.spacing_mm[axis]
    if grid is GRIDS["sheared"]:  # the nearest voxel need not be the one that was moved
        assert 0.8 * moved_mm < found.hd95_mm <= moved_mm + 1e-6
    else:
        assert found.hd95_mm == pytest.approx(moved_mm, abs=1e-6)
    assert found.nsd(moved_mm) == 1.0


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.7, 0.7, 2.0)])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_ball_in_a_ball_is_off_by_the_difference_of_the_radii(grid, spacing_mm):
    geometry = grid_around(14, grid(spacing_mm))
    found = surface_distances(ball(10, geometry), ball(14, geometry), geometry)[1]
    step_mm = max(geometry.spacing_mm)  # border voxels lie up to one step inside of the surface
    assert found.mean_mm == pytest.approx(4, abs=0.35 * step_mm)
    assert 4 - step_mm < found.hd95_mm < 4 + step_mm
    assert found.nsd(4 - 1.5 * step_mm) < 0.05
    assert found.nsd(4 + 1.5 * step_mm) == 1.0


def test_laws(organ):
    _, reference, near, far = organ
    geometry = Geometry(reference.shape, oblique((0.7, 0.9, 2.5)))
    same = surface_distances(reference, reference, geometry)[1]
    assert (same.hd95_mm, same.mean_mm, same.nsd(1e-9)) == (0.0, 0.0, 1.0)
    for predicted in (near, far):
        there, back = (
            surface_distances(*pair, geometry)[1]
            for pair in ((reference, predicted), (predicted, reference))
        )
        assert (there.hd95_mm, there.mean_mm, there.nsd(2)) == (
            back.hd95_mm,
            back.mean_mm,
            back.nsd(2),
        )
        scaled = geometry.affine.copy()
        scaled[:3] *= 2
        double = surface_distances(reference, predicted, Geometry(reference.shape, scaled))[1]
        assert double.hd95_mm == pytest.approx(2 * there.hd95_mm)
        assert double.mean_mm == pytest.approx(2 * there.mean_mm)
        assert double.nsd(3) == pytest.approx(there.nsd(1.5))
        assert there.nsd(1) <= there.nsd(2) <= there.nsd(10)


def test_a_distance_that_is_the_tolerance_lies_within_it_also_after_rounding_of_the_header():
    block = np.zeros((20, 20, 20), bool)
    block[4:14, 4:14, 4:14] = True
    affine = oblique((1.0, 1.0, 1.0)).astype(np.float32)
    assert np.linalg.norm(affine[:3, 0].astype(float)) != 1.0
    for axis in range(3):
        found = surface_distances(
            block, np.roll(block, 1, axis=axis), Geometry(block.shape, affine)
        )[1]
        assert found.nsd(1.0) == 1.0
        assert found.nsd(0.99) < 1.0


def test_all_48_orientations_print_the_same():
    rng = np.random.default_rng(5)
    a, b = (gaussian_filter(rng.normal(size=(13, 15, 17)), 1.5) > 0.02 for _ in range(2))
    b[0, 0, 0], a[0, 0, 0:3] = True, False  # far from the rest of it
    geometry = Geometry(a.shape, oblique((0.7, 0.9, 2.5)))
    printed = set()
    for (reference, affine), (predicted, _) in zip(
        orientations(Volume(a, geometry)), orientations(Volume(b, geometry)), strict=True
    ):
        found = surface_distances(reference, predicted, Geometry(reference.shape, affine))[1]
        printed.add(tuple(map(cell, (found.hd95_mm, found.mean_mm, found.nsd(1), found.nsd(2)))))
    assert len(printed) == 1


def test_what_no_surface_tells_is_not_a_number():
    mask, empty = np.zeros((6, 6, 6), np.uint8), np.zeros((6, 6, 6), np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    geometry = Geometry(mask.shape, oblique((1, 1, 2)))
    assert surface_distances(empty, empty, geometry) == {}
    assert (
        math.isnan(NOWHERE.hd95_mm) and math.isnan(NOWHERE.mean_mm) and math.isnan(NOWHERE.nsd(1))
    )
    for pair in ((mask, empty), (empty, mask)):
        found = surface_distances(*pair, geometry)[1]
        assert math.isnan(found.hd95_mm) and math.isnan(found.mean_mm)
        assert found.nsd(1) == found.nsd(1000) == 0.0
    other = surface_distances(mask, 2 * mask, geometry)  # each label is in one mask alone
    assert other.keys() == {1, 2}
    assert all(math.isnan(found.hd95_mm) and found.nsd(5) == 0.0 for found in other.values())


def test_a_mask_over_the_whole_array_has_its_border_at_the_faces():
    full = np.ones((5, 6, 7), np.uint8)
    found = surface_distances(full, full, Geometry(full.shape, oblique((1, 1, 2))))[1]
    assert found.from_reference.size == 5 * 6 * 7 - 3 * 4 * 5


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        surface_distances(np.ones((3, 3, 3)), np.ones((3, 3, 4)), Geometry((3, 3, 3), np.eye(4)))
