import tracemalloc

import numpy as np
import pytest
from laws import GRIDS, ball, centre_mm, grid_around, ras
from scipy.ndimage import gaussian_filter, label

from volseg.measurement.recist import diameters
from volseg.measurement.sections import axial_normal, section_bytes, section_diameters, tilt_deg
from volseg.volume import Geometry, Rigid


def blob(seed, shape=(14, 16, 9)):
    """Return the largest component of smoothed noise, in its box."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    pieces, _ = label(noise > np.quantile(noise, 0.7), np.ones((3, 3, 3)))
    inside = pieces == np.argmax(np.bincount(pieces.ravel())[1:]) + 1
    index = np.argwhere(inside)
    corners = zip(index.min(axis=0), index.max(axis=0))
    return inside[tuple(slice(low, high + 1) for low, high in corners)]


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_in_the_planes_of_the_slices_the_diameters_are_those_of_the_slices(make):
    # With these spacings no two chords are equally long, so the long axis is unique.
    matrix = make((0.7071, 0.8123, 2.0))[:3, :3] @ [[1, 0.013, 0], [0, 1, 0], [0, 0, 1]]
    matrix *= np.sign(np.diag(matrix))  # canonical: axes grow to R, A and S
    normal = np.cross(matrix[:, 0], matrix[:, 1])
    normal /= np.linalg.norm(normal)
    for seed in range(8):
        inside = blob(seed)
        slices = [diameters(inside[:, :, [s]], matrix) for s in range(inside.shape[2])]
        longest_mm = max(axes.long_mm for axes in slices)
        # Of slices that are equally long, any may count.
        widths_mm = [axes.short_mm for axes in slices if axes.long_mm > longest_mm - 1e-6]
        for sense in (1, -1):
            long_mm, short_mm = section_diameters(inside, matrix, sense * normal)
            assert long_mm == pytest.approx(diameters(inside, matrix).long_mm, abs=1e-6)
            assert short_mm == pytest.approx(max(widths_mm), abs=1e-6)
    parts = section_diameters(inside, matrix, normal, meshed_together=1)
    assert parts == pytest.approx((long_mm, short_mm), abs=1e-6)


def ellipse_mm(radii_mm, normal):
    """Return the long and short axis of an ellipsoid's section through its centre."""
    frame = np.linalg.svd(normal[None])[2][1:]
    form = frame @ np.diag(1 / np.array(radii_mm) ** 2) @ frame.T
    return np.sort(2 / np.sqrt(np.linalg.eigvalsh(form)))[::-1]


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_an_ellipsoid_cut_at_any_angle_has_the_axes_of_the_ellipse(make):
    radii_mm = np.array([8.3, 21.0, 6.1])
    geometry = grid_around(22, make((0.9, 1.1, 1.4)))
    index = np.indices(geometry.shape).reshape(3, -1).T
    places = geometry.to_world_mm(index) - centre_mm(geometry)
    inside = (np.linalg.norm(places / radii_mm, axis=1) <= 1).reshape(geometry.shape)
    for angle_deg in (1, 5, 14, 30, 60, 90):
        angle = np.deg2rad(angle_deg)
        normal = np.array([0.1, np.sin(angle), np.cos(angle)])
        normal /= np.linalg.norm(normal)
        measured = section_diameters(inside, geometry.affine[:3, :3], normal)
        assert measured == pytest.approx(ellipse_mm(radii_mm, normal), abs=1.4)  # one voxel


def test_the_smallest_lesions_and_planes_that_graze_a_face_have_diameters():
    voxel = np.ones((1, 1, 1), bool)
    axial = np.array([0.0, 0.0, 1.0])
    assert section_diameters(voxel, np.diag([1.0, 1.0, 5.0]), axial) == pytest.approx((1, 1))
    stick = np.ones((120, 1, 1), bool)
    for angle in np.deg2rad([0.0, 10.0, 45.0, 90.0]):  # about the stick's own axis
        normal = np.array([0.0, np.sin(angle), np.cos(angle)])
        long_mm, short_mm = section_diameters(stick, np.eye(3), normal)
        assert long_mm == pytest.approx(120, abs=1e-6)
        assert 0.5 <= short_mm <= 1.5
    box = np.ones((90, 20, 10), bool)
    long_mm, _ = section_diameters(box, np.eye(3), np.array([0.0, 1.0, 0.0]))
    # From edge to edge of the marching cubes.
    assert long_mm == pytest.approx(np.hypot(90, 9), abs=0.2)


def test_a_lesion_of_two_thick_slices_is_cut_wherever_its_planes_lie():
    geometry = grid_around(9, ras((1.0, 1.0, 5.0)))
    inside = ball(8.0, geometry)
    inside[:, :, inside.any(axis=(0, 1)).argmax() + 2 :] = False
    for angle in np.deg2rad(np.arange(0, 90, 7)):
        normal = np.array([0.0, np.sin(angle), np.cos(angle)])
        long_mm, short_mm = section_diameters(inside, geometry.affine[:3, :3], normal)
        assert 0 < short_mm <= long_mm < 25


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_a_lesion_that_lies_between_two_planes_is_cut_through_its_centroid(make):
    matrix = make((1.0, 1.0, 5.0))[:3, :3]
    upright = np.cross(matrix[:, 0], matrix[:, 1])
    upright /= np.linalg.norm(upright)
    for size in ((1, 1, 2), (2, 2, 2), (1, 3, 4), (3, 1, 2)):
        inside = np.ones(size, bool)
        sides_mm = np.linalg.norm(matrix, axis=0) * size
        for angle in np.deg2rad(np.arange(0, 181, 3)):
            for across in (matrix[:, 0], matrix[:, 1]):
                across = across - upright * (upright @ across)
                normal = np.cos(angle) * upright + np.sin(angle) * across / np.linalg.norm(across)
                long_mm, short_mm = section_diameters(inside, matrix, normal)
                assert 0 <= short_mm <= long_mm <= sides_mm.sum()
    two_voxels, coronal = np.ones((1, 1, 2), bool), np.array([0, 1.0, 0])
    long_mm, short_mm = section_diameters(two_voxels, np.diag([1.0, 1, 5]), coronal)
    assert long_mm == pytest.approx(10, abs=0.1)  # both slices, of 5 mm
    assert short_mm == pytest.approx(1, abs=0.1)


def test_the_tilt_is_the_angle_between_slices_without_rotation_within_them():
    def rotation(angle_deg, axis):
        c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
        matrix = np.eye(4)
        i, j = (n for n in range(3) if n != axis)
        matrix[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
        return matrix

    affine = ras((1.0, 1.2, 3.0))
    grid = Geometry((4, 4, 4), affine)
    for axis, expected in ((0, 11.0), (1, 11.0), (2, 0.0)):
        rotated = Geometry((4, 4, 4), rotation(11, axis) @ affine)
        assert tilt_deg(grid, rotated, Rigid.identity()) == pytest.approx(expected)
        moved = Rigid(rotation(11, axis))
        assert tilt_deg(grid, grid, moved) == pytest.approx(expected)
        assert tilt_deg(grid, rotated, moved) == pytest.approx(0, abs=1e-6)
    # Flipped axes: the same slices.
    flipped = Geometry((4, 4, 4), affine @ np.diag([-1.0, 1.0, -1.0, 1.0]))
    assert tilt_deg(grid, flipped, Rigid.identity()) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(axial_normal(flipped), (0, 0, 1))


def test_cutting_planes_in_batches_gives_the_same_diameters():
    normal = np.array([0.2, -0.1, 1.0]) / np.linalg.norm([0.2, -0.1, 1.0])
    matrix = np.diag([0.8, 0.7, 1.5])
    for seed in range(6):
        inside = blob(seed) if seed % 2 else np.random.default_rng(seed).random((13, 12, 11)) < 0.3
        whole = section_diameters(inside, matrix, normal)
        pieces = section_diameters(
            inside, matrix, normal, meshed_together=300, surface_together=0, some_pieces=1500
        )
        assert pieces == pytest.approx(whole, rel=1e-12)


def test_the_diameters_of_noise_stay_within_the_memory_estimate():
    # 1400 bytes per voxel if all planes were cut at once.
    inside = np.random.default_rng(0).random((90, 80, 30)) < 0.3
    normal = np.array([0.0, 0.1, 1.0]) / np.hypot(0.1, 1)
    section_diameters(inside[:4, :4, :4], np.eye(3), normal)  # imports modules
    tracemalloc.start()
    section_diameters(inside, np.diag([0.8, 0.8, 1.5]), normal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < section_bytes(inside.shape)
