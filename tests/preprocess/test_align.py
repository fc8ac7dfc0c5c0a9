from importlib.util import find_spec

import numpy as np
import pytest
from laws import GRIDS, oblique

from volseg.errors import ScanError
from volseg.preprocess.align import on_one_grid, resampled_onto, rigid_transform
from volseg.volume import Geometry, Volume


def linear(points):
    return 3.0 * points[..., 0] - 2.0 * points[..., 1] + 0.5 * points[..., 2] + 40.0


def world(geometry):
    return geometry.to_world_mm(
        np.moveaxis(np.indices(geometry.shape), 0, -1).reshape(-1, 3)
    ).reshape(*geometry.shape, 3)


def blobs(points):
    """Something without symmetry, smooth in mm."""
    centres = np.array([[0, 0, 0], [14, -8, 6], [-10, 12, -12], [5, 15, 10]])
    sizes, heights = np.array([9.0, 6.0, 7.0, 5.0]), np.array([100.0, 70.0, -60.0, 90.0])
    squares = ((points[..., None, :] - centres) ** 2).sum(-1)
    return (heights * np.exp(-squares / (2 * sizes**2))).sum(-1)


def around(shape, spacing, turned=True):
    """A grid whose middle is the world's origin."""
    affine = oblique(spacing) if turned else np.diag([*spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def test_a_linear_function_of_the_world_is_the_same_on_another_grid():
    source = around((40, 44, 36), (1.5, 1.2, 2.0))
    grid = around((20, 22, 18), (1.1, 1.7, 1.3), turned=False)
    found = resampled_onto(Volume(linear(world(source)).astype(np.float32), source), grid)
    np.testing.assert_allclose(found.array, linear(world(grid)), atol=2e-3)
    assert found.geometry is grid


def test_scaled_integers_are_resampled_as_intensities():
    source = around((30, 30, 30), (2.0, 2.0, 2.0))
    stored = np.round(linear(world(source)) * 4).astype(np.int16)
    grid = around((10, 10, 10), (1.0, 1.0, 1.0))
    found = resampled_onto(Volume(stored, source, slope=0.25, intercept=-7.0), grid)
    np.testing.assert_allclose(found.array, linear(world(grid)) - 7.0, atol=0.13)


@pytest.mark.parametrize("affine", [make((1.0, 1.5, 2.0)) for make in GRIDS.values()], ids=GRIDS)
def test_a_channel_on_the_same_grid_is_left_as_it_is(affine):
    geometry = Geometry((6, 7, 8), affine)
    images = {
        name: Volume(np.full((6, 7, 8), value, np.int16), geometry)
        for name, value in (("t1", 1), ("pet", 2))
    }
    found = on_one_grid(images)
    assert found["t1"] is images["t1"]
    assert found["pet"] is images["pet"]


def test_where_a_channel_does_not_reach_it_has_its_smallest_intensity():
    grid = around((20, 20, 20), (2.0, 2.0, 2.0), turned=False)
    small = around((20, 20, 12), (2.0, 2.0, 2.0), turned=False)
    images = {
        "ct": Volume(np.zeros(grid.shape, np.float32), grid),
        "pet": Volume(
            np.linspace(5, 9, 20 * 20 * 12, dtype=np.float32).reshape(small.shape), small
        ),
    }
    found = on_one_grid(images)["pet"].array
    assert (found[:, :, :3] == 5).all()
    assert found[:, :, 6:14].max() > 8


def test_a_coarse_channel_reaches_to_the_faces_of_its_outermost_voxels():
    """PET of 4 mm under MR of 1 mm over the same box: no voxel of the MR lacks a value, and the next one beyond does."""
    coarse = around((6, 7, 5), (4.0, 4.0, 4.0))
    scan = np.full(coarse.shape, 7.0, np.float32)
    scan[3, 3, 2] = 1.0  # the smallest intensity
    found = resampled_onto(
        Volume(scan, coarse), around((26, 30, 22), (1.0, 1.0, 1.0))
    ).array  # a voxel more on each side
    edge = np.ones(found.shape, bool)
    edge[1:-1, 1:-1, 1:-1] = False
    assert (found[edge] == 1).all()
    np.testing.assert_allclose(found[1:5, 1:-1, 1:-1], 7, atol=1e-5)
    np.testing.assert_allclose(found[1:-1, 1:-1, -5:-1], 7, atol=1e-5)


def test_scans_of_different_places_are_refused():
    here = around((20, 20, 20), (2.0, 2.0, 2.0))
    affine = here.affine.copy()
    affine[:3, 3] += 500
    images = {name: Volume(np.zeros((20, 20, 20), np.float32), Geometry((20, 20, 20), a)) for name, a in
              (("t1", here.affine), ("pet", affine))}  # fmt: skip
    with pytest.raises(ScanError, match="'pet' covers 0% of the grid of 't1'"):
        on_one_grid(images)


@pytest.mark.skipif(not find_spec("SimpleITK"), reason="SimpleITK is not installed")
def test_a_patient_who_moved_is_moved_back():
    fixed = around((48, 48, 40), (1.5, 1.5, 1.8))
    moving = around((40, 44, 40), (1.8, 1.7, 2.0), turned=False)
    angle = np.deg2rad(7)
    moved = np.eye(4)
    moved[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    moved[:3, 3] = (4.0, -3.0, 2.5)
    here = Volume(blobs(world(fixed)).astype(np.float32), fixed)
    # What is at x in the fixed scan lies at moved(x) in the other, with other grey values.
    back = np.linalg.inv(moved)
    there = blobs(world(moving) @ back[:3, :3].T + back[:3, 3])
    other = Volume((200 - 0.5 * there).astype(np.float32), moving)
    found = rigid_transform(here, other)
    corners = np.array([[r, a, s, 1.0] for r in (-20, 20) for a in (-20, 20) for s in (-20, 20)])
    error = np.linalg.norm((corners @ found.T - corners @ moved.T)[:, :3], axis=1)
    assert error.max() < 0.5
    aligned = on_one_grid({"t1": here, "pet": other}, align=True)["pet"].array
    inside = np.linalg.norm(world(fixed), axis=-1) < 20
    assert np.corrcoef(aligned[inside], here.array[inside])[0, 1] < -0.99
