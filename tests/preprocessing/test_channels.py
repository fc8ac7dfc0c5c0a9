import numpy as np
import pytest
from laws import GRIDS, oblique

from volseg.errors import ScanError
from volseg.preprocessing.channels import to_first_grid
from volseg.preprocessing.register import align_channels
from volseg.preprocessing.regrid import resample_to_grid
from volseg.volume import Geometry, Rigid, Volume


def linear(points):
    return 3.0 * points[..., 0] - 2.0 * points[..., 1] + 0.5 * points[..., 2] + 40.0


def world(geometry):
    index = np.moveaxis(np.indices(geometry.shape), 0, -1)
    return geometry.to_world_mm(index.reshape(-1, 3)).reshape(*geometry.shape, 3)


def blobs(points):
    """Return an asymmetric function that is smooth in mm."""
    centres = np.array([[0, 0, 0], [14, -8, 6], [-10, 12, -12], [5, 15, 10]])
    sizes, heights = np.array([9.0, 6.0, 7.0, 5.0]), np.array([100.0, 70.0, -60.0, 90.0])
    squares = ((points[..., None, :] - centres) ** 2).sum(-1)
    return (heights * np.exp(-squares / (2 * sizes**2))).sum(-1)


def centred(shape, spacing, is_oblique=True):
    """Return a grid centred on the world origin."""
    affine = oblique(spacing) if is_oblique else np.diag([*spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def test_a_linear_function_of_the_world_is_the_same_on_another_grid():
    source = centred((40, 44, 36), (1.5, 1.2, 2.0))
    grid = centred((20, 22, 18), (1.1, 1.7, 1.3), is_oblique=False)
    resampled = resample_to_grid(Volume(linear(world(source)).astype(np.float32), source), grid)
    np.testing.assert_allclose(resampled.array, linear(world(grid)), atol=2e-3)
    assert resampled.geometry is grid


def test_scaled_integers_are_resampled_as_intensities():
    source = centred((30, 30, 30), (2.0, 2.0, 2.0))
    stored = np.round(linear(world(source)) * 4).astype(np.int16)
    grid = centred((10, 10, 10), (1.0, 1.0, 1.0))
    resampled = resample_to_grid(Volume(stored, source, slope=0.25, intercept=-7.0), grid)
    np.testing.assert_allclose(resampled.array, linear(world(grid)) - 7.0, atol=0.13)


@pytest.mark.parametrize("affine", [make((1.0, 1.5, 2.0)) for make in GRIDS.values()], ids=GRIDS)
def test_a_channel_on_the_same_grid_is_unchanged(affine):
    geometry = Geometry((6, 7, 8), affine)
    images = {
        name: Volume(np.full((6, 7, 8), value, np.int16), geometry)
        for name, value in (("t1", 1), ("pet", 2))
    }
    resampled = to_first_grid(images)
    assert resampled["t1"] is images["t1"]
    assert resampled["pet"] is images["pet"]


def test_outside_its_field_of_view_a_channel_has_its_smallest_intensity():
    grid = centred((20, 20, 20), (2.0, 2.0, 2.0), is_oblique=False)
    small = centred((20, 20, 12), (2.0, 2.0, 2.0), is_oblique=False)
    ramp = np.linspace(5, 9, 20 * 20 * 12, dtype=np.float32).reshape(small.shape)
    images = {"ct": Volume(np.zeros(grid.shape, np.float32), grid), "pet": Volume(ramp, small)}
    resampled = to_first_grid(images)["pet"].array
    assert (resampled[:, :, :3] == 5).all()
    assert resampled[:, :, 6:14].max() > 8


def test_a_field_of_view_ends_at_the_faces_of_the_outermost_voxels():
    """PET at 4 mm covers MR at 1 mm over the same box completely, and nothing beyond it."""
    coarse = centred((6, 7, 5), (4.0, 4.0, 4.0))
    scan = np.full(coarse.shape, 7.0, np.float32)
    scan[3, 3, 2] = 1.0  # the smallest intensity
    grid = centred((26, 30, 22), (1.0, 1.0, 1.0))  # one voxel more on each side
    resampled = resample_to_grid(Volume(scan, coarse), grid).array
    edge = np.ones(resampled.shape, bool)
    edge[1:-1, 1:-1, 1:-1] = False
    assert (resampled[edge] == 1).all()
    np.testing.assert_allclose(resampled[1:5, 1:-1, 1:-1], 7, atol=1e-5)
    np.testing.assert_allclose(resampled[1:-1, 1:-1, -5:-1], 7, atol=1e-5)


def test_scans_without_overlap_are_refused():
    grid = centred((20, 20, 20), (2.0, 2.0, 2.0))
    affine = grid.affine.copy()
    affine[:3, 3] += 500
    array = np.zeros(grid.shape, np.float32)
    images = {"t1": Volume(array, grid), "pet": Volume(array, Geometry(grid.shape, affine))}
    with pytest.raises(ScanError, match="'pet' covers 0% of the grid of 't1'"):
        to_first_grid(images)


def test_alignment_recovers_the_motion_of_a_patient():
    fixed = centred((48, 48, 40), (1.5, 1.5, 1.8))
    moving = centred((40, 44, 40), (1.8, 1.7, 2.0), is_oblique=False)
    angle = np.deg2rad(7)
    rotation = np.eye(3)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    motion = Rigid.about(np.zeros(3), rotation, np.array((4.0, -3.0, 2.5)))
    first = Volume(blobs(world(fixed)).astype(np.float32), fixed)
    # The point x of the first scan is at motion(x) in the second, with other grey values.
    values = blobs(motion.inverse().apply(world(moving)))
    second = Volume((200 - 0.5 * values).astype(np.float32), moving)
    transform = align_channels(first, second)
    corners = np.array([[r, a, s] for r in (-20, 20) for a in (-20, 20) for s in (-20, 20)])
    error = np.linalg.norm(transform.apply(corners) - motion.apply(corners), axis=1)
    assert error.max() < 0.5
    aligned = to_first_grid({"t1": first, "pet": second}, align=True)["pet"].array
    inside = np.linalg.norm(world(fixed), axis=-1) < 20
    assert np.corrcoef(aligned[inside], first.array[inside])[0, 1] < -0.99
