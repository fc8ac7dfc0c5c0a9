from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GRIDS, ball, ball_volume_mm3, centre_mm, grid_around, oblique
from scipy.spatial.distance import cdist
from skimage.measure import marching_cubes, mesh_surface_area

from volseg.measurement import ragged
from volseg.measurement.density import agatston, density_g_cm3, slice_distance_mm, statistics
from volseg.measurement.nearest import gaps_mm
from volseg.measurement.ragged import Ragged
from volseg.measurement.recist import diameters, is_measurable, sum_of_diameters_mm
from volseg.measurement.shape import (
    axes_mm,
    core,
    mesh,
    outermost_points,
    sphericity,
    surface_points,
    widest_pair,
)
from volseg.volume import AxisOrder, BoundingBox, Geometry

SPACINGS_MM = [(1, 1, 1), (0.7, 0.7, 0.7), (0.5, 0.5, 1), (0.8, 0.8, 2.5)]
SPACINGS_MM += [(2, 1, 0.5), (1, 2, 1), (0.6, 0.9, 1.3), (1, 1, 3)]
ANGLES = [(0, 0, 0), (0.3, -0.2, 0.5), (0.7, 0.1, 0)]
ANGLES += [(0, 0, 0.78), (-0.4, 0.6, 0.2), (1.2, 0.4, -0.9)]


def canonical(mask, geometry):
    """Return the box of the mask in canonical order, and its voxel → mm matrix."""
    order = AxisOrder.of(geometry)
    box = BoundingBox.around(mask)
    matrix = geometry.reordered(order).affine[:3, :3]
    return np.ascontiguousarray(order.apply(mask[box.slices])), matrix


def body(geometry, inside_mm):
    """Return a mask (I, J, K) from a test of points (N, 3), in mm from the middle of the grid."""
    index = np.indices(geometry.shape).reshape(3, -1).T
    return inside_mm(geometry.to_world_mm(index) - centre_mm(geometry)).reshape(geometry.shape)


masks = (
    st.tuples(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 7)] * 3), st.floats(0.2, 0.9))
    .map(lambda drawn: np.random.default_rng(drawn[0]).random(drawn[1]) < drawn[2])
    .filter(np.any)
)
MATRIX = oblique((0.7, 0.9, 2.5))[:3, :3] @ np.array([[1, 0.2, 0], [0, 1, 0.1], [0, 0, 1]])


@settings(max_examples=60, deadline=None)
@given(masks)
def test_the_counted_surface_is_that_of_marching_cubes(inside):
    outside = 1 - np.pad(inside, 1).astype(np.float32)
    points, faces, _, _ = marching_cubes(outside, 0.5, method="lorensen")
    points = (points - 1) @ MATRIX.T
    a, b, c = points[faces].transpose(1, 0, 2)
    volume_mm3, area_mm2 = mesh(inside, MATRIX)
    expected_mm3 = abs(float(np.einsum("ni,ni->", a, np.cross(b, c)))) / 6
    assert volume_mm3 == pytest.approx(expected_mm3, rel=1e-5)
    assert area_mm2 == pytest.approx(float(mesh_surface_area(points, faces)), rel=1e-5)
    widest_mm = widest_pair(outermost_points(inside), MATRIX)[0]
    assert widest_mm == pytest.approx(cdist(points, points).max(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(masks)
def test_axes_are_those_of_the_covariance(inside):
    points = np.argwhere(inside) @ MATRIX.T
    axes = axes_mm(inside, MATRIX)
    if len(points) == 1:
        assert np.isnan(axes).all()
        return
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    assert axes == pytest.approx(4 * np.sqrt(np.maximum(values, 0)), abs=1e-5)
    assert list(axes) == sorted(axes, reverse=True)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_the_long_axis_is_the_longest_chord_of_any_slice(inside):
    axes = diameters(inside, MATRIX)
    best = 0.0
    for s in np.flatnonzero(inside.any(axis=(0, 1))):
        plane = np.pad(inside[:, :, s], 1)
        points = [
            np.argwhere(np.diff(plane, axis=axis)) + np.eye(2)[axis] / 2 - 1 for axis in (0, 1)
        ]
        points_mm = np.insert(np.concatenate(points), 2, s, axis=1) @ MATRIX.T
        best = max(best, cdist(points_mm, points_mm).max())
    assert axes.long_mm == pytest.approx(best, rel=1e-9)
    ends = [pair @ MATRIX.T for pair in (axes.long_ends, axes.short_ends)]
    (long, short) = (pair[1] - pair[0] for pair in ends)
    assert np.linalg.norm(long) == pytest.approx(axes.long_mm)
    assert np.linalg.norm(short) == pytest.approx(axes.short_mm, abs=1e-6)
    assert abs(long @ short) < 1e-6 * axes.long_mm * max(axes.short_mm, 1)
    assert 0 < axes.short_mm <= axes.long_mm + 1e-9
    assert set(axes.long_ends[:, 2]) == set(axes.short_ends[:, 2]) == {axes.slice}
    expected_mm = widest_across(inside[:, :, axes.slice], axes.long_ends)
    assert axes.short_mm == pytest.approx(expected_mm, rel=1e-6)


def widest_across(plane, long_ends):
    """Return the longest chord perpendicular to the long axis, at all corners of the contour."""
    plane = np.pad(plane, 1)
    edges = []  # of the polygon through the middles between neighbouring voxel centres
    for i in range(plane.shape[0] - 1):
        for j in range(plane.shape[1] - 1):
            corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            values = [plane[corner] for corner in corners]
            cuts = [
                (np.array(corners[n]) + corners[n - 3]) / 2 - 1
                for n in range(4)
                if values[n] != values[n - 3]
            ]
            if len(cuts) == 2:
                edges.append(cuts)
            elif cuts:  # a saddle: joined or not, its two segments have the same four ends
                edges += [[cuts[a], cuts[b]] for a, b in ((0, 3), (1, 2), (0, 1), (2, 3))]
    points = np.array(edges) @ MATRIX[:, :2].T  # (n, 2, 3)
    along = MATRIX @ (long_ends[1] - long_ends[0])
    along /= np.linalg.norm(along)
    normal = np.cross(MATRIX[:, 0], MATRIX[:, 1])
    across = np.cross(normal / np.linalg.norm(normal), along)
    u, v = points @ along, points @ across
    best = 0.0
    for place in np.unique(u):
        hit = (u.min(axis=1) <= place + 1e-9) & (u.max(axis=1) >= place - 1e-9)
        (a, b), (c, d) = u[hit].T, v[hit].T
        flat = np.abs(b - a) < 1e-12
        crossing = c + (d - c) * np.clip((place - a) / np.where(flat, 1, b - a), 0, 1)
        values = np.concatenate([crossing[~flat], c[flat], d[flat]])
        best = max(best, float(np.ptp(values)))
    return best


@pytest.mark.parametrize("angles", ANGLES, ids=str)
@pytest.mark.parametrize("spacing_mm", SPACINGS_MM, ids=str)
def test_balls_ellipsoids_and_rods_have_their_sizes(spacing_mm, angles):
    affine, voxel = oblique(spacing_mm, angles), max(spacing_mm)
    geometry = grid_around(12, affine)
    off_centre = centre_mm(geometry) + geometry.affine[:3, :3] @ [0.3, 0.17, -0.23]
    inside, matrix = canonical(ball(10, geometry, off_centre), geometry)
    volume_mm3, area_mm2 = mesh(inside, matrix)
    # Error of a ball of 10 mm made of such voxels, times 1.5.
    tolerance = 1.5 * (0.007 if voxel <= 1 else 0.011 if voxel <= 2.5 else 0.053)
    counted_mm3 = inside.sum() * abs(np.linalg.det(matrix))
    assert counted_mm3 == pytest.approx(ball_volume_mm3(10), rel=tolerance)
    assert density(40) * counted_mm3 == pytest.approx(1.0506 * ball_volume_mm3(10), rel=tolerance)
    assert volume_mm3 == pytest.approx(ball_volume_mm3(10), rel=0.06)
    assert 0.8 < sphericity(volume_mm3, area_mm2) < 1
    assert widest_pair(outermost_points(inside), matrix)[0] == pytest.approx(20, abs=1.01 * voxel)
    assert axes_mm(inside, matrix) == pytest.approx([4 * 10 / math.sqrt(5)] * 3, rel=0.04)
    axes = diameters(inside, matrix)
    assert [axes.long_mm, axes.short_mm] == pytest.approx([20, 20], abs=1.01 * voxel)

    half_mm = np.array([11.0, 7.0, 5.0])  # along R, A and S of the patient, whatever the grid
    shift = off_centre - centre_mm(geometry)
    ellipsoid = body(geometry, lambda p: (((p - shift) / half_mm) ** 2).sum(axis=1) <= 1)
    inside, matrix = canonical(ellipsoid, geometry)
    counted_mm3 = inside.sum() * abs(np.linalg.det(matrix))
    expected_mm3 = 4 / 3 * math.pi * half_mm.prod()
    tolerance = 1.5 * (0.018 if voxel <= 1 else 0.044)  # of a ball of its least half axis
    assert counted_mm3 == pytest.approx(expected_mm3, rel=tolerance)
    assert mesh(inside, matrix)[0] == pytest.approx(expected_mm3, rel=0.03 + 0.04 * voxel)
    assert widest_pair(outermost_points(inside), matrix)[0] == pytest.approx(22, abs=1.5 * voxel)
    expected_mm = (4 * half_mm / math.sqrt(5)).tolist()
    assert axes_mm(inside, matrix) == pytest.approx(expected_mm, abs=voxel / 2)

    rod = body(geometry, lambda p: (np.hypot(p[:, 1], p[:, 2]) <= 2.5) & (np.abs(p[:, 0]) <= 9))
    inside, matrix = canonical(rod, geometry)
    widest_mm = widest_pair(outermost_points(inside), matrix)[0]
    assert widest_mm == pytest.approx(math.hypot(18, 5), abs=1.5 * voxel)


def test_no_body_is_biased_over_all_grids():
    """Single grids scatter, but over all of them the counted volume is right to about a percent."""
    half_mm = np.array([11.0, 7.0, 5.0])
    bodies = {
        4 / 3 * math.pi * 10**3: lambda p: (p**2).sum(axis=1) <= 100,
        4 / 3 * math.pi * half_mm.prod(): lambda p: ((p / half_mm) ** 2).sum(axis=1) <= 1,
        math.pi * 2.5**2 * 18: lambda p: (
            (np.hypot(p[:, 1], p[:, 2]) <= 2.5) & (np.abs(p[:, 0]) <= 9)
        ),
    }
    for volume_mm3, contains in bodies.items():
        errors = []
        for spacing_mm in SPACINGS_MM:
            for angles in ANGLES:
                geometry = grid_around(12, oblique(spacing_mm, angles))
                offset = np.random.default_rng(len(errors)).uniform(-0.5, 0.5, 3)
                shift = offset @ geometry.affine[:3, :3].T
                inside = body(geometry, lambda p, s=shift, contains=contains: contains(p + s))
                errors.append(inside.sum() * geometry.voxel_volume_mm3 / volume_mm3 - 1)
        assert abs(np.mean(errors)) < max(0.011, 3 * np.std(errors) / math.sqrt(len(errors)))
        assert np.abs(errors).max() < 0.3  # a rod of 5 mm in voxels of 3 mm


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_disc_is_as_wide_as_it_is_between_its_edges(grid):
    geometry = Geometry((61, 61, 1), grid((0.5, 0.5, 3.0)))
    index = np.indices(geometry.shape).reshape(3, -1).T - [30, 30, 0]
    mm = index[:, :2] @ geometry.affine[:3, :2].T
    inside = (np.linalg.norm(mm, axis=1) <= 10).reshape(geometry.shape)
    axes = diameters(inside, geometry.affine[:3, :3])
    # Voxels with their centre inside reach a quarter of a mm beyond the disc.
    assert axes.long_mm == pytest.approx(20.3, abs=0.3)
    assert axes.short_mm == pytest.approx(20.3, abs=0.4)


def test_of_equally_long_slices_the_largest_is_taken_then_the_lowest():
    inside = np.zeros((9, 5, 5), bool)
    inside[:, 2, :] = True
    inside[2:5, 3, 3:] = True
    assert diameters(inside, np.eye(3)).slice == 3


@pytest.mark.parametrize(
    "long_mm, short_mm, slice_mm, is_node, expected",
    [
        (10, 3, 1, False, True),
        (9.99, 9, 1, False, False),
        (13, 9, 7, False, False),  # slices 7 mm apart: from 14 mm
        (14, 9, 7, False, True),
        (30, 14.9, 1, True, False),
        (30, 15, 1, True, True),
    ],
)
def test_what_is_measurable(long_mm, short_mm, slice_mm, is_node, expected):
    assert is_measurable(long_mm, short_mm, slice_mm, is_node=is_node) is expected


def test_the_sum_of_diameters_takes_five_and_two_per_label():
    assert sum_of_diameters_mm([20, 30, 10, 40], [1, 1, 1, 2]) == 90
    assert sum_of_diameters_mm([20.0] * 9, range(9)) == 100
    assert sum_of_diameters_mm([], []) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_gaps_are_the_smallest_distances_between_surfaces(seed, n):
    rng = np.random.default_rng(seed)
    surfaces = [rng.normal(rng.uniform(-9, 9, 3), 2, (rng.integers(1, 200), 3)) for _ in range(n)]
    expected = [min(cdist(a, b).min() for b in surfaces if b is not a) for a in surfaces]
    assert gaps_mm(surfaces) == pytest.approx(expected)
    assert np.isnan(gaps_mm(surfaces[:1])).all() and gaps_mm([]) == []


@pytest.mark.parametrize("n", [33, 90, 160])
def test_gaps_of_many_small_lesions_between_a_few_large_ones_are_found_too(n):
    rng = np.random.default_rng(n)
    sizes = rng.choice([0.5, 2.0, 20.0], n, p=[0.6, 0.35, 0.05])
    surfaces = [
        rng.normal(rng.uniform(-60, 60, 3), size, (rng.integers(1, 60), 3)) for size in sizes
    ]
    expected = [min(cdist(a, b).min() for b in surfaces if b is not a) for a in surfaces]
    assert gaps_mm(surfaces) == pytest.approx(expected)


def test_two_boxes_are_as_far_apart_as_their_faces():
    a, b = np.zeros((12, 4, 4), bool), np.zeros((12, 4, 4), bool)
    a[:3], b[7:] = True, True
    matrix = np.diag([0.5, 1, 2])
    gaps = gaps_mm([surface_points(a) @ matrix, surface_points(b) @ matrix])
    assert gaps == pytest.approx([2.0, 2.0])  # four voxels of 0.5 mm lie between
    b[3:] = True
    assert gaps_mm([surface_points(a) @ matrix, surface_points(b) @ matrix]) == [0.0, 0.0]


def test_the_core_holds_voxels_whose_six_neighbours_are_inside():
    inside = np.ones((5, 5, 5), bool)
    assert core(inside).sum() == 27
    inside[2, 2, 2] = False
    assert core(inside).sum() == 20


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_statistics_by_their_definition(seed, sizes):
    random = np.random.default_rng(seed)
    parts = [random.normal(50, 20, n) for n in sizes]
    measured = statistics(Ragged.of([*parts, np.full(7, 0.1)]))
    for n, values in enumerate(parts):
        moments = [measured[name][n] for name in ("mean", "sd", "min", "max")]
        expected = [values.mean(), values.std(), values.min(), values.max()]
        assert moments == pytest.approx(expected, rel=1e-12, abs=1e-9)
        percents = {"p05": 5, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "p95": 95}
        expected = np.percentile(values, list(percents.values())).tolist()
        assert [measured[name][n] for name in percents] == pytest.approx(expected, rel=1e-12)
        if len(values) > 1:
            z = (values - values.mean()) / values.std()
            assert measured["skewness"][n] == pytest.approx((z**3).mean())
            assert measured["kurtosis"][n] == pytest.approx((z**4).mean() - 3)
    assert measured["sd"][-1] == 0
    assert np.isnan(measured["skewness"][-1]) and np.isnan(measured["kurtosis"][-1])


@pytest.mark.parametrize("together", [1, 3, 7, 2**20])
def test_sums_over_lesions_do_not_depend_on_the_batch_size(together, monkeypatch):
    monkeypatch.setattr(ragged, "SUMMED_TOGETHER", together)
    random = np.random.default_rng(0)
    parts = [random.integers(-99, 99, n).astype(np.int16) for n in (0, 1, 5, 0, 0, 12, 2, 0)]
    values = Ragged.of(parts)
    assert values.sum().tolist() == [part.sum() for part in parts]
    weighted = values.sum(lambda part, lesion: part * lesion).tolist()
    assert weighted == [n * part.sum() for n, part in enumerate(parts)]
    assert Ragged.of([np.zeros(0, np.uint8)] * 3).sum().tolist() == [0, 0, 0]


def density(*hu, **settings):
    """Return the mean density of one lesion with these voxels."""
    return density_g_cm3(Ragged.of([np.array(hu, float)]), **settings).item()


def test_density_goes_through_the_published_points():
    for hu, expected in [(-1000, 0.00121), (-98, 0.93), (14, 1.03), (100, 1.1199), (1600, 1.9642)]:
        assert density(hu) == pytest.approx(expected)
    assert density(-2000, 9000) == pytest.approx((0.00121 + 2.8) / 2)
    assert density(0, calibration=[(-1000, 0), (0, 1), (1000, 2)]) == 1


@pytest.mark.parametrize(
    "peak, weight", [(131, 1), (199, 1), (200, 2), (299, 2), (300, 3), (399, 3), (400, 4), (900, 4)]
)
def test_agatston_of_one_plaque(peak, weight):
    hu, inside = np.full((6, 6, 2), 0.0), np.ones((6, 6, 2), bool)
    hu[1:3, 1:4, 0] = 131
    hu[1, 1, 0] = peak
    matrix = np.diag([0.5, 0.5, 3.0])
    score, counted = agatston(hu, inside, matrix)
    assert (score, counted.sum()) == (pytest.approx(6 * 0.25 * weight), 6)
    # Half the slice distance: twice the slices for the same plaque, half the score for each.
    assert agatston(hu, inside, np.diag([0.5, 0.5, 1.5]))[0] == pytest.approx(score / 2)


def test_four_pixels_of_half_a_millimetre_are_a_square_millimetre_on_any_oblique_grid():
    hu = np.zeros((4, 4, 1))
    hu[1:3, 1:3] = 150
    for seed in range(50):
        angles = np.random.default_rng(seed).uniform(-1, 1, 3)
        matrix = oblique((0.5, 0.5, 3.0), angles)[:3, :3].astype(np.float32).astype(float)
        assert agatston(hu, np.ones(hu.shape, bool), matrix)[0] == pytest.approx(1, rel=1e-4)


def test_agatston_leaves_out_noise_and_voxels_outside_the_lesion():
    hu, inside = np.zeros((6, 6, 3)), np.ones((6, 6, 3), bool)
    hu[0, 0, 0] = 500  # 0.25 mm²
    hu[2:5, 2:5, 1] = 130  # not over the threshold
    hu[1:4, 1:4, 2], inside[:, :, 2] = 300, False
    score, counted = agatston(hu, inside, np.diag([0.5, 0.5, 3.0]))
    assert score == 0 and not counted.any()


def test_slices_of_a_tilted_gantry_are_nearer_than_their_spacing():
    matrix = np.array([[1, 0, 0], [0, 1, 3], [0, 0, 4]], float)
    assert slice_distance_mm(matrix) == pytest.approx(4)
    assert np.linalg.norm(matrix[:, 2]) == 5


def test_three_pixels_of_a_quarter_square_millimetre_do_not_score():
    hu = np.array([0, 0, 0, 200, 200, 200, 0.0]).reshape(1, 7, 1)
    matrix = np.diag([0.5, 0.5, 3.0])
    for slices in (hu, hu.transpose(1, 0, 2)):
        score, counted = agatston(slices, np.ones(slices.shape, bool), matrix)
        assert score == 0 and not counted.any()
    hu[0, 2] = 150
    score, counted = agatston(hu, np.ones(hu.shape, bool), matrix)
    assert (score, counted.sum()) == (pytest.approx(1.0 * 2), 4)


def agatston_by_definition(hu, inside, matrix):
    """Compute the score pixel by pixel, with the area of each patch by flood fill."""
    across, along, up = matrix.T
    normal = np.cross(across, along)
    pixel_mm2 = math.sqrt(normal @ normal)
    spacing_mm = abs(up @ normal) / pixel_mm2
    score, counted = 0.0, set()
    for s in range(hu.shape[2]):
        calcified = {
            (r, a)
            for r in range(hu.shape[0])
            for a in range(hu.shape[1])
            if inside[r, a, s] and hu[r, a, s] > 130
        }
        while calcified:
            patch, edge = [], [calcified.pop()]
            while edge:
                r, a = pixel = edge.pop()
                patch.append(pixel)
                for neighbour in [(r + i, a + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                    if neighbour in calcified:
                        calcified.remove(neighbour)
                        edge.append(neighbour)
            area_mm2 = len(patch) * pixel_mm2
            peak = max(hu[r, a, s] for r, a in patch)
            weight = 1 if peak < 200 else 2 if peak < 300 else 3 if peak < 400 else 4
            if area_mm2 >= 1:
                score += area_mm2 * weight
                counted |= {(r, a, s) for r, a in patch}
    return score * spacing_mm / 3, counted


def test_agatston_follows_the_definition_for_1000_random_lesions():
    rng = np.random.default_rng(7)
    n_scored = 0
    for n in range(1000):
        shape = (*rng.integers(1, [4, 6, 9][n % 3], 2), int(rng.integers(1, 4)))
        steps = np.array([-50, 60, 130, 131, 180, 199.9, 200, 299, 300, 399, 400, 700])
        hu = rng.choice(steps, shape, p=rng.dirichlet(np.full(steps.size, 0.4)))
        hu[rng.random(shape) < 0.02] = np.nan
        hu = hu.astype([np.float32, np.float64][n % 2])
        inside = rng.random(shape) < rng.choice([0.2, 0.5, 0.8, 1.0])
        in_plane = rng.choice([0.3, 0.5, 0.6, 1.0]), rng.choice([0.25, 0.5, 0.9])
        matrix = np.diag([*in_plane, rng.uniform(0.4, 5)])
        if n % 4 == 0:  # a tilted gantry
            matrix[1, 2] = rng.uniform(-1, 1)
        score, counted = agatston(hu, inside, matrix)
        expected, voxels = agatston_by_definition(hu, inside, matrix)
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-6), (hu.tolist(), matrix)
        assert {tuple(index) for index in np.argwhere(counted).tolist()} == voxels
        n_scored += expected > 0
    assert n_scored > 300
