import tracemalloc

import numpy as np
import pytest
from laws import GRIDS, ball, grid_around, orientations

from volseg.preprocessing.lattice import Placement, difference, same_voxels
from volseg.volume import BoundingBox, Geometry, Volume


def volume_of(grid):
    geometry = grid_around(6, GRIDS[grid]((0.8, 1.0, 2.0)))
    i, j, k = geometry.shape
    geometry = Geometry((i + 2, j, k + 1), geometry.affine)  # unequal: a wrong order is noticed
    values = np.arange(np.prod(geometry.shape), dtype=np.uint32).reshape(geometry.shape)
    return Volume(values, geometry)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_stored_order_of_a_volume_is_placed_onto_its_grid_bit_for_bit(grid):
    volume = volume_of(grid)
    for array, affine in orientations(volume):
        stored = Volume(array, Geometry(array.shape, affine))
        placement = same_voxels(stored.geometry, volume.geometry)
        assert placement is not None
        view, copy = placement.view(stored), placement.place(stored)
        np.testing.assert_array_equal(view.array, volume.array)
        np.testing.assert_array_equal(copy.array, volume.array)
        assert np.shares_memory(view.array, stored.array)
        assert copy.array.flags.f_contiguous or not placement.is_reordered
        assert np.array_equal(view.geometry.affine, volume.geometry.affine)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_crop_in_any_order_lies_where_its_affine_says_and_is_zero_outside(grid):
    volume = volume_of(grid)
    box = BoundingBox((2, 0, 1), (9, 7, 5))
    expected = np.zeros_like(volume.array)
    expected[box.slices] = volume.array[box.slices]
    for array, affine in orientations(volume.crop(box)):
        stored = Volume(array, Geometry(array.shape, affine))
        placement = Placement.of(stored.geometry, volume.geometry)
        assert placement is not None and not placement.is_whole
        np.testing.assert_array_equal(placement.place(stored).array, expected)
        assert placement.n_outside(stored) == 0
        # The other way round: a mask that is larger than its scan.
        larger = Placement.of(volume.geometry, stored.geometry)
        assert larger is not None
        np.testing.assert_array_equal(larger.place(volume).array, array)
        assert larger.n_outside(volume) == np.count_nonzero(volume.array) - np.count_nonzero(array)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("voxels", [1.0, 3.0, 0.5, 0.2])
def test_a_shifted_grid_is_another_one_with_its_displacement_in_any_order(grid, voxels):
    volume = volume_of(grid)
    shifted = volume.geometry.affine.copy()
    shifted[:3, 3] += voxels * shifted[:3, 0]
    moved = Volume(volume.array, Geometry(volume.geometry.shape, shifted))
    mm = voxels * volume.geometry.spacing_mm[0]
    for array, affine in orientations(moved):
        geometry = Geometry(array.shape, affine)
        assert Placement.of(geometry, volume.geometry) is None
        problem, fix = difference(geometry, volume.geometry)
        assert f"a corner is off by {voxels:.3g} voxels ({mm:.3g} mm)" in problem
        is_reordered = not np.allclose(geometry.voxel_steps_mm, volume.geometry.voxel_steps_mm)
        assert ("would mirror it" in fix) == is_reordered  # copying the affine is no advice then


@pytest.mark.parametrize("grid", GRIDS)
def test_other_voxels_are_named_by_what_differs(grid):
    geometry = volume_of(grid).geometry
    coarse = geometry.affine @ np.diag([2, 2, 1, 1])
    problem, fix = difference(Geometry(geometry.shape, coarse), geometry)
    assert "its voxels measure 1.6 × 2 × 2 mm" in problem or grid == "sheared"
    assert "nearest neighbour" in fix
    c, s = np.cos(0.1), np.sin(0.1)
    turned = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ geometry.affine
    problem, fix = difference(Geometry(geometry.shape, turned), geometry)
    assert "rotated by" in problem and "registered" in fix
    assert Placement.of(Geometry(geometry.shape, turned), geometry) is None


def test_two_balls_of_one_place_but_a_mirrored_affine_are_not_the_same_voxels():
    """A lost affine that mirrors the mask moves it, unless the grid is symmetric."""
    geometry = grid_around(6, GRIDS["ras"]((1, 1, 1)))
    mirrored = Geometry(geometry.shape, np.diag([-1.0, 1, 1, 1]) @ geometry.affine)
    assert Placement.of(mirrored, geometry) is None
    assert ball(6, geometry).any()


def test_a_view_takes_no_memory_and_placing_one_copy_of_the_target():
    geometry = Geometry((120, 100, 80), GRIDS["oblique"]((1, 1, 2)))
    mask = Volume(np.ones(geometry.shape, np.uint8, order="F"), geometry)
    array, affine = list(orientations(mask))[29]
    stored = Volume(array, Geometry(array.shape, affine))
    placement = same_voxels(stored.geometry, geometry)
    tracemalloc.start()
    placement.view(stored)
    of_view = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    placed = placement.place(stored)
    of_copy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert of_view < 2**16
    assert placed.array.nbytes <= of_copy < placed.array.nbytes + 2**16


@pytest.mark.parametrize("grid", GRIDS)
def test_an_affine_that_a_tool_made_up_is_named_and_copying_that_of_the_scan_is_the_fix(grid):
    scan = volume_of(grid).geometry
    lps = np.diag([-1.0, -1, 1, 1]) @ scan.affine
    spacing = np.diag([*scan.spacing_mm, 1])
    plain = np.eye(4)
    for affine, sign in ((lps, "in LPS"), (plain, "1 × 1 × 1 mm, no"), (spacing, "no position")):
        problem, fix = difference(Geometry(scan.shape, affine), scan)
        assert sign in problem and "a corner is off by " in problem
        assert "if its voxels are in the order of the scan, copy the scan's affine" in fix
        assert "resample" not in fix
    i, j, k = scan.shape
    problem, fix = difference(Geometry((i, j, k + 1), np.eye(4)), scan)
    assert "no position" not in problem and "copy" not in fix


def test_a_displacement_along_one_axis_has_its_direction_and_no_overlap_no_resampling():
    scan = Geometry((20, 20, 20), np.diag([-1.0, -1, 2, 1]))
    affine = scan.affine.copy()
    affine[:3, 3] = [5, 0, 0]
    assert "(5 mm) to R" in difference(Geometry(scan.shape, affine), scan)[0]
    affine[:3, 3] = [5, 0, -2]
    assert "5 mm to R and 2 mm to I" in difference(Geometry(scan.shape, affine), scan)[0]
    affine[:3, 3] = [500, 1, -2]
    affine[2, 2] = 3
    problem, fix = difference(Geometry(scan.shape, affine), scan)
    assert "500 mm to R, 1 mm to A and " in problem and "resample" not in fix


@pytest.mark.parametrize("grid", GRIDS)
def test_a_crop_off_the_lattice_is_told_by_how_much_in_any_order(grid):
    volume = volume_of(grid)
    geometry = volume.geometry
    i, j, k = geometry.shape
    affine = geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [2, 1, 1.4]
    crop = Volume(volume.array[: i - 3, : j - 2, : k - 3], Geometry((i - 3, j - 2, k - 3), affine))
    mm = 0.4 * geometry.spacing_mm[2]
    for array, stored in orientations(crop):
        problem, fix = difference(Geometry(array.shape, stored), geometry)
        assert f"its voxels lie 0.4 voxels ({mm:.3g} mm) off those of the scan" in problem
        assert "reference volume" in fix
    affine[:3, 3] = geometry.affine[:3, 3] + 5 * geometry.affine[:3, 0]
    problem, _ = difference(Geometry((i - 1, j, k), affine), geometry)
    assert "beyond the scan on one side and ends short of it on the other" in problem
