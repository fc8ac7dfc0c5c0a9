from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GRIDS, ball, ball_volume_mm3, centre_mm, grid_around, oblique
from scipy.spatial.distance import cdist
from skimage.measure import marching_cubes, mesh_surface_area

from volseg.measure import ragged
from volseg.measure.density import agatston, core, density_g_cm3, slice_distance_mm, statistics
from volseg.measure.ragged import Ragged
from volseg.measure.recist import diameters, is_measurable, sum_of_diameters_mm
from volseg.measure.shape import (
    axes_mm,
    gaps_mm,
    mesh,
    outermost_points,
    sphericity,
    surface_points,
    widest_pair,
)
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.volume import BoundingBox, Geometry

SPACINGS_MM = [
    (1, 1, 1),
    (0.7, 0.7, 0.7),
    (0.5, 0.5, 1),
    (0.8, 0.8, 2.5),
    (2, 1, 0.5),
    (1, 2, 1),
    (0.6, 0.9, 1.3),
    (1, 1, 3),
]
ANGLES = [
    (0, 0, 0),
    (0.3, -0.2, 0.5),
    (0.7, 0.1, 0),
    (0, 0, 0.78),
    (-0.4, 0.6, 0.2),
    (1.2, 0.4, -0.9),
]


def canonical(mask, geometry):
    """Box of the mask in canonical order, and its voxel → mm matrix."""
    order = AxisOrder.of(geometry)
    box = BoundingBox.around(mask)
    return np.ascontiguousarray(to_canonical(mask[box.slices], order)), canonical_geometry(
        geometry, order
    ).affine[:3, :3]


def body(geometry, inside_mm):
    """(I, J, K) bool of a solid given by a test of the points (N, 3), in mm from the middle of the grid."""
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
    assert volume_mm3 == pytest.approx(
        abs(float(np.einsum("ni,ni->", a, np.cross(b, c)))) / 6, rel=1e-5
    )
    assert area_mm2 == pytest.approx(float(mesh_surface_area(points, faces)), rel=1e-5)
    assert widest_pair(outermost_points(inside), MATRIX)[0] == pytest.approx(
        cdist(points, points).max(), rel=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(masks)
def test_axes_are_those_of_the_covariance(inside):
    points = np.argwhere(inside) @ MATRIX.T
    found = axes_mm(inside, MATRIX)
    if len(points) == 1:
        assert np.isnan(found).all()
        return
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    assert found == pytest.approx(4 * np.sqrt(np.maximum(values, 0)), abs=1e-5)
    assert list(found) == sorted(found, reverse=True)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_the_long_axis_is_the_longest_chord_of_any_slice(inside):
    found = diameters(inside, MATRIX)
    best = 0.0
    for s in np.flatnonzero(inside.any(axis=(0, 1))):
        plane = np.pad(inside[:, :, s], 1)
        points = [
            np.argwhere(np.diff(plane, axis=axis)) + np.eye(2)[axis] / 2 - 1 for axis in (0, 1)
        ]
        places = np.insert(np.concatenate(points), 2, s, axis=1) @ MATRIX.T
        best = max(best, cdist(places, places).max())
    assert found.long_mm == pytest.approx(best, rel=1e-9)
    ends = [pair @ MATRIX.T for pair in (found.long_ends, found.short_ends)]
    (long, short) = (pair[1] - pair[0] for pair in ends)
    assert np.linalg.norm(long) == pytest.approx(found.long_mm)
    assert np.linalg.norm(short) == pytest.approx(found.short_mm, abs=1e-6)
    assert abs(long @ short) < 1e-6 * found.long_mm * max(found.short_mm, 1)
    assert 0 < found.short_mm <= found.long_mm + 1e-9
    assert set(found.long_ends[:, 2]) == set(found.short_ends[:, 2]) == {found.slice}
    assert found.short_mm == pytest.approx(
        widest_across(inside[:, :, found.slice], found.long_ends), rel=1e-6
    )


def widest_across(plane, long_ends):
    """Longest chord of the contour perpendicular to the long axis, at every place along it where the contour has a corner."""
    plane = np.pad(plane, 1)
    edges = []  # of the polygon between the middles of the sides of four neighbouring centres
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
            elif (
                cuts
            ):  # a saddle: whether its two pieces join or part, they have the same four ends
                edges += [
                    [cuts[0], cuts[3]],
                    [cuts[1], cuts[2]],
                    [cuts[0], cuts[1]],
                    [cuts[2], cuts[3]],
                ]
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
        at = c + (d - c) * np.clip((place - a) / np.where(flat, 1, b - a), 0, 1)
        values = np.concatenate([at[~flat], c[flat], d[flat]])
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
    # What voxels of that size do to a ball of 10 mm, times 1.5.
    share = 1.5 * (0.007 if voxel <= 1 else 0.011 if voxel <= 2.5 else 0.053)
    counted_mm3 = inside.sum() * abs(np.linalg.det(matrix))
    assert counted_mm3 == pytest.approx(ball_volume_mm3(10), rel=share)
    assert density(40) * counted_mm3 == pytest.approx(1.0506 * ball_volume_mm3(10), rel=share)
    assert volume_mm3 == pytest.approx(ball_volume_mm3(10), rel=0.06)
    assert 0.8 < sphericity(volume_mm3, area_mm2) < 1
    assert widest_pair(outermost_points(inside), matrix)[0] == pytest.approx(20, abs=1.01 * voxel)
    assert axes_mm(inside, matrix) == pytest.approx([4 * 10 / math.sqrt(5)] * 3, rel=0.04)
    found = diameters(inside, matrix)
    assert [found.long_mm, found.short_mm] == pytest.approx([20, 20], abs=1.01 * voxel)

    half_mm = np.array([11.0, 7.0, 5.0])  # along R, A and S of the patient, whatever the grid
    shift = off_centre - centre_mm(geometry)
    inside, matrix = canonical(
        body(geometry, lambda p: (((p - shift) / half_mm) ** 2).sum(axis=1) <= 1), geometry
    )
    counted_mm3 = inside.sum() * abs(np.linalg.det(matrix))  # as a ball of its least half axis
    assert counted_mm3 == pytest.approx(
        4 / 3 * math.pi * half_mm.prod(), rel=1.5 * (0.018 if voxel <= 1 else 0.044)
    )
    assert mesh(inside, matrix)[0] == pytest.approx(
        4 / 3 * math.pi * half_mm.prod(), rel=0.03 + 0.04 * voxel
    )
    assert widest_pair(outermost_points(inside), matrix)[0] == pytest.approx(22, abs=1.5 * voxel)
    assert axes_mm(inside, matrix) == pytest.approx(
        (4 * half_mm / math.sqrt(5)).tolist(), abs=voxel / 2
    )

    rod = body(geometry, lambda p: (np.hypot(p[:, 1], p[:, 2]) <= 2.5) & (np.abs(p[:, 0]) <= 9))
    inside, matrix = canonical(rod, geometry)
    assert widest_pair(outermost_points(inside), matrix)[0] == pytest.approx(
        math.hypot(18, 5), abs=1.5 * voxel
    )


def test_no_body_is_biased_over_all_grids():
    """Single grids scatter; over all of them the counted volume, and so the mass, is right to about a percent."""
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
                shift = (
                    np.random.default_rng(len(errors)).uniform(-0.5, 0.5, 3)
                    @ geometry.affine[:3, :3].T
                )
                inside = body(
                    geometry, lambda p, shift=shift, contains=contains: contains(p + shift)
                )
                errors.append(inside.sum() * geometry.voxel_volume_mm3 / volume_mm3 - 1)
        assert abs(np.mean(errors)) < max(0.011, 3 * np.std(errors) / math.sqrt(len(errors)))
        assert np.abs(errors).max() < 0.3  # a rod of 5 mm in voxels of 3 mm


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_disc_is_as_wide_as_it_is_between_its_edges(grid):
    geometry = Geometry((61, 61, 1), grid((0.5, 0.5, 3.0)))
    index = np.indices(geometry.shape).reshape(3, -1).T - [30, 30, 0]
    mm = index[:, :2] @ geometry.affine[:3, :2].T
    inside = (np.linalg.norm(mm, axis=1) <= 10).reshape(geometry.shape)
    found = diameters(inside, geometry.affine[:3, :3])
    assert found.long_mm == pytest.approx(
        20.3, abs=0.3
    )  # voxels whose centre is inside reach a quarter of a mm beyond it
    assert found.short_mm == pytest.approx(20.3, abs=0.4)


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


def test_the_sum_of_diameters_takes_five_and_two_of_an_organ():
    assert sum_of_diameters_mm([20, 30, 10, 40], [1, 1, 1, 2]) == 90
    assert sum_of_diameters_mm([20.0] * 9, range(9)) == 100
    assert sum_of_diameters_mm([], []) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_gaps_are_the_smallest_distances_between_surfaces(seed, n):
    rng = np.random.default_rng(seed)
    surfaces = [rng.normal(rng.uniform(-9, 9, 3), 2, (rng.integers(1, 200), 3)) for _ in range(n)]
    expected = [
        min(cdist(one, other).min() for other in surfaces if other is not one) for one in surfaces
    ]
    assert gaps_mm(surfaces) == pytest.approx(expected)
    assert np.isnan(gaps_mm(surfaces[:1])).all() and gaps_mm([]) == []


@pytest.mark.parametrize("n", [33, 90, 160])
def test_gaps_of_many_small_lesions_between_a_few_large_ones_are_found_too(n):
    rng = np.random.default_rng(n)
    sizes = rng.choice([0.5, 2.0, 20.0], n, p=[0.6, 0.35, 0.05])
    surfaces = [
        rng.normal(rng.uniform(-60, 60, 3), size, (rng.integers(1, 60), 3)) for size in sizes
    ]
    expected = [
        min(cdist(one, other).min() for other in surfaces if other is not one) for one in surfaces
    ]
    assert gaps_mm(surfaces) == pytest.approx(expected)


def test_two_boxes_are_as_far_apart_as_their_faces():
    one, other = np.zeros((12, 4, 4), bool), np.zeros((12, 4, 4), bool)
    one[:3], other[7:] = True, True
    matrix = np.diag([0.5, 1, 2])
    gap = gaps_mm([surface_points(one) @ matrix, surface_points(other) @ matrix])
    assert gap == pytest.approx([2.0, 2.0])  # four voxels of 0.5 mm lie between
    other[3:] = True
    assert gaps_mm([surface_points(one) @ matrix, surface_points(other) @ matrix]) == [0.0, 0.0]


def test_the_core_is_what_no_face_of_the_outside_touches():
    inside = np.ones((5, 5, 5), bool)
    assert core(inside).sum() == 27
    inside[2, 2, 2] = False
    assert core(inside).sum() == 20


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_statistics_by_their_definition(seed, sizes):
    random = np.random.default_rng(seed)
    parts = [random.normal(50, 20, n) for n in sizes]
    found = statistics(Ragged.of([*parts, np.full(7, 0.1)]))
    for n, values in enumerate(parts):
        assert [found[name][n] for name in ("mean", "sd", "min", "max")] == pytest.approx(
            [values.mean(), values.std(), values.min(), values.max()], rel=1e-12, abs=1e-9
        )
        percents = {"p05": 5, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "p95": 95}
        assert [found[name][n] for name in percents] == pytest.approx(
            np.percentile(values, list(percents.values())).tolist(), rel=1e-12
        )
        if len(values) > 1:
            z = (values - values.mean()) / values.std()
            assert found["skewness"][n] == pytest.approx((z**3).mean())
            assert found["kurtosis"][n] == pytest.approx((z**4).mean() - 3)
    assert (
        found["sd"][-1] == 0 and np.isnan(found["skewness"][-1]) and np.isnan(found["kurtosis"][-1])
    )


@pytest.mark.parametrize("together", [1, 3, 7, 2**20])
def test_sums_over_lesions_do_not_depend_on_how_many_values_are_summed_at_a_time(
    together, monkeypatch
):
    monkeypatch.setattr(ragged, "SUMMED_TOGETHER", together)
    random = np.random.default_rng(0)
    parts = [random.integers(-99, 99, n).astype(np.int16) for n in (0, 1, 5, 0, 0, 12, 2, 0)]
    found = Ragged.of(parts)
    assert found.sum().tolist() == [part.sum() for part in parts]
    assert found.sum(lambda values, lesion: values * lesion).tolist() == [
        n * part.sum() for n, part in enumerate(parts)
    ]
    assert Ragged.of([np.zeros(0, np.uint8)] * 3).sum().tolist() == [0, 0, 0]


def density(*hu, **settings):
    """Mean of the voxels of one lesion."""
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


def test_four_pixels_of_half_a_millimetre_are_a_square_millimetre_however_the_scan_is_turned():
    hu = np.zeros((4, 4, 1))
    hu[1:3, 1:3] = 150
    for seed in range(50):
        angles = np.random.default_rng(seed).uniform(-1, 1, 3)
        matrix = oblique((0.5, 0.5, 3.0), angles)[:3, :3].astype(np.float32).astype(float)
        assert agatston(hu, np.ones(hu.shape, bool), matrix)[0] == pytest.approx(1, rel=1e-4)


def test_agatston_leaves_out_noise_and_what_is_not_in_the_lesion():
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
    for turned in (hu, hu.transpose(1, 0, 2)):
        score, counted = agatston(turned, np.ones(turned.shape, bool), matrix)
        assert score == 0 and not counted.any()
    hu[0, 2] = 150
    score, counted = agatston(hu, np.ones(hu.shape, bool), matrix)
    assert (score, counted.sum()) == (pytest.approx(1.0 * 2), 4)


def agatston_by_definition(hu, inside, matrix):
    """The score, pixel by pixel: the area of every patch of each axial slice by flood fill."""
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


def test_agatston_is_that_of_the_definition_for_5000_random_lesions():
    rng = np.random.default_rng(7)
    n_scored = 0
    for n in range(5000):
        shape = (*rng.integers(1, [4, 6, 9][n % 3], 2), int(rng.integers(1, 4)))
        steps = np.array([-50, 60, 130, 131, 180, 199.9, 200, 299, 300, 399, 400, 700])
        hu = rng.choice(steps, shape, p=rng.dirichlet(np.full(steps.size, 0.4)))
        hu[rng.random(shape) < 0.02] = np.nan
        hu = hu.astype([np.float32, np.float64][n % 2])
        inside = rng.random(shape) < rng.choice([0.2, 0.5, 0.8, 1.0])
        spacing = (
            rng.choice([0.3, 0.5, 0.6, 1.0]),
            rng.choice([0.25, 0.5, 0.9]),
            rng.uniform(0.4, 5),
        )
        matrix = np.diag(spacing)
        if n % 4 == 0:  # a tilted gantry
            matrix[1, 2] = rng.uniform(-1, 1)
        score, counted = agatston(hu, inside, matrix)
        expected, voxels = agatston_by_definition(hu, inside, matrix)
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-6), (hu.tolist(), matrix)
        assert {tuple(index) for index in np.argwhere(counted).tolist()} == voxels
        n_scored += expected > 0
    assert n_scored > 1000
