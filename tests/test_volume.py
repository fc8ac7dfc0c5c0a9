import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import GRIDS, centre_mm, oblique, orientations, ras
from scipy.spatial.transform import Rotation

from volseg import volume as volume_module
from volseg.volume import BoundingBox, Geometry, Rigid, Volume, angle_deg, slabs_of

SPACING_MM = (0.7, 0.9, 2.5)
SHAPE = (7, 8, 9)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_index_and_world_are_inverse(grid):
    geometry = Geometry(SHAPE, grid(SPACING_MM))
    index = np.random.default_rng(0).uniform(-3, 12, (20, 3))
    np.testing.assert_allclose(geometry.to_index(geometry.to_world_mm(index)), index, atol=1e-9)


def test_voxel_volume_is_the_determinant_not_the_product_of_spacings():
    geometry = Geometry(SHAPE, GRIDS["sheared"](SPACING_MM))
    assert geometry.voxel_volume_mm3 == pytest.approx(0.7 * 0.9 * 2.5)
    assert np.prod(geometry.spacing_mm) > 1.05 * geometry.voxel_volume_mm3


def test_axis_codes_of_all_48_orders_are_distinct_and_start_with_ras():
    volume = Volume(np.zeros(SHAPE), Geometry(SHAPE, ras(SPACING_MM)))
    codes = [Geometry(array.shape, affine).axis_codes for array, affine in orientations(volume)]
    assert codes[0] == "RAS"
    assert len(set(codes)) == 48


@pytest.mark.parametrize(
    ("affine", "problem"),
    [
        (np.diag([1, 1, 0, 1]), "singular"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([1, 1, np.nan, 1]), "not finite"),
        (np.eye(3), "shape"),
        (np.ones((4, 4)), "last row"),
    ],
)
def test_an_invalid_affine_is_refused(affine, problem):
    with pytest.raises(ValueError, match=problem):
        Geometry(SHAPE, affine)


def test_tiny_voxels_are_not_mistaken_for_singular_ones():
    assert Geometry(SHAPE, np.diag([1e-4, 1e-4, 1e-4, 1])).voxel_volume_mm3 == pytest.approx(1e-12)


def test_grids_match_within_a_tenth_of_a_voxel():
    geometry = Geometry(SHAPE, oblique(SPACING_MM))
    affine = geometry.affine.copy()
    affine[:3, 3] += 0.05 * geometry.affine[:3, 0]
    assert geometry.matches(Geometry(SHAPE, affine))
    affine[:3, 3] += 0.95 * geometry.affine[:3, 0]
    other = Geometry(SHAPE, affine)
    assert not geometry.matches(other)
    assert geometry.corner_offset_voxels(other) == pytest.approx(1.0)
    assert not geometry.matches(Geometry((7, 8, 10), geometry.affine))


def test_a_cropped_grid_stays_where_it_was():
    geometry = Geometry(SHAPE, oblique(SPACING_MM))
    box = BoundingBox((2, 3, 4), (5, 7, 9))
    np.testing.assert_allclose(
        geometry.crop(box).to_world_mm(np.array([[0, 0, 0], [1, 2, 3]])),
        geometry.to_world_mm(np.array([[2, 3, 4], [3, 5, 7]])),
    )


def test_the_box_around_a_mask_is_tight_and_widens_up_to_the_border():
    mask = np.zeros(SHAPE, bool)
    mask[2, 3, 4] = mask[5, 3, 8] = True
    box = BoundingBox.around(mask)
    assert box == BoundingBox((2, 3, 4), (6, 4, 9)) == BoundingBox.of(box.slices)
    assert box.widened((3, 1, 1), SHAPE) == BoundingBox((0, 2, 3), (7, 5, 9))
    assert BoundingBox.around(np.zeros(SHAPE)) is None


@pytest.mark.parametrize("layout", ["C", "F"])
def test_the_box_of_slabs_is_the_box_of_the_whole_array(layout, monkeypatch):
    monkeypatch.setattr(volume_module, "slabs_of", lambda array: slabs_of(array, 40))
    rng = np.random.default_rng(0)
    for _ in range(20):
        array = np.asarray(rng.random((9, 8, 7)) > 0.99, order=layout)
        box = BoundingBox.of_voxels(np.argwhere(array)) if array.any() else None
        assert BoundingBox.around(array) == box
        assert BoundingBox.where(lambda part, array=array: array[part], array) == box


def test_the_hull_of_two_boxes_holds_both():
    one, other = BoundingBox((0, 3, 4), (2, 4, 5)), BoundingBox((1, 0, 5), (6, 1, 9))
    assert one.hull(other) == other.hull(one) == BoundingBox((0, 0, 4), (6, 4, 9))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_all_48_orders_become_the_same_canonical_scan(grid):
    array = np.random.default_rng(0).integers(-9, 9, SHAPE).astype(np.int16)
    volume = Volume(array, Geometry(SHAPE, grid(SPACING_MM)), slope=2.0, intercept=-3.0, sha256="a")
    expected = volume.canonical()
    assert expected.geometry.axis_codes == "RAS"
    assert np.shares_memory(expected.array, array)
    assert (expected.slope, expected.intercept, expected.sha256) == (2.0, -3.0, "a")
    for stored, affine in orientations(volume):
        canonical = Volume(stored, Geometry(stored.shape, affine)).canonical()
        np.testing.assert_array_equal(canonical.array, expected.array)
        np.testing.assert_allclose(canonical.geometry.affine, expected.geometry.affine, atol=1e-9)
        geometry = Geometry(stored.shape, affine).canonical()
        np.testing.assert_array_equal(geometry.affine, canonical.geometry.affine)


def test_canonical_axes_point_to_r_a_and_s():
    affine = np.diag([-1.0, -2.0, 3.0, 1.0]) @ oblique((1, 1, 1), (0.1, 0.1, 0.1))
    assert Geometry(SHAPE, affine).canonical().axis_codes == "RAS"


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_cropped_scan_keeps_its_voxels_and_their_place(grid):
    scan = Volume(np.arange(504).reshape(SHAPE), Geometry(SHAPE, grid(SPACING_MM)), slope=0.5)
    part = scan.crop(BoundingBox((2, 3, 4), (5, 7, 9)))
    index = np.array([[1, 2, 3]])
    assert part.intensities()[1, 2, 3] == scan.intensities()[3, 5, 7]
    expected = scan.geometry.to_world_mm(index + (2, 3, 4))
    np.testing.assert_allclose(part.geometry.to_world_mm(index), expected)


rotations = st.lists(st.floats(-np.pi, np.pi), min_size=3, max_size=3).map(
    lambda angles: Rotation.from_euler("xyz", angles)
)
shifts_mm = st.lists(st.floats(-500, 500), min_size=3, max_size=3).map(np.array)
POINTS_MM = np.array([[0, 0, 0], [10, -20, 300], [-7.5, 80, 4]])


@given(rotations, shifts_mm)
def test_a_rigid_transform_and_its_inverse_cancel_and_keep_distances(rotation, shift_mm):
    rigid = Rigid.about(POINTS_MM[1], rotation.as_matrix(), shift_mm)
    moved = rigid.apply(POINTS_MM)
    np.testing.assert_allclose(moved[1], POINTS_MM[1] + shift_mm, atol=1e-9)
    np.testing.assert_allclose(rigid.inverse().apply(moved), POINTS_MM, atol=1e-9)
    distances = [np.linalg.norm(np.diff(points, axis=0), axis=1) for points in (POINTS_MM, moved)]
    np.testing.assert_allclose(*distances)
    assert rigid.inverse().angle_deg == pytest.approx(rigid.angle_deg, abs=1e-4)


@given(st.floats(0, 180), shifts_mm)
def test_the_angle_of_a_rigid_transform_does_not_depend_on_axis_and_centre(angle_deg, centre):
    axis = np.array([0.3, -0.5, 0.8]) / np.linalg.norm([0.3, -0.5, 0.8])
    rotation = Rotation.from_rotvec(np.deg2rad(angle_deg) * axis).as_matrix()
    # The cosine near 0° and 180° holds half of the digits.
    assert Rigid.about(centre, rotation, centre).angle_deg == pytest.approx(angle_deg, abs=1e-5)
    assert Rigid.identity().angle_deg == 0


@pytest.mark.parametrize("angle", [0, 1e-6, 30, 90, 179.999999, 180])
def test_the_angle_between_directions_of_any_length(angle):
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    assert angle_deg(np.array([5.0, 0, 0]), np.array([c, 0, s])) == pytest.approx(angle, abs=1e-12)


@pytest.mark.parametrize(
    "matrix",
    [np.eye(3), np.diag([-1, 1, 1, 1]), np.diag([1, 1, 1.01, 1]), np.full((4, 4), np.nan)],
    ids=["3 × 3", "mirrored", "scaled", "NaN"],
)
def test_a_matrix_that_is_not_rigid_is_refused(matrix):
    with pytest.raises(ValueError, match="rigid"):
        Rigid(matrix)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_patient_and_a_grid_that_move_together_keep_their_indices(grid):
    geometry = Geometry(SHAPE, grid(SPACING_MM))
    rigid = Rigid.about(np.array([5, -20, 9]), Rotation.from_rotvec([0.2, 0.3, 1]).as_matrix(), 7)
    moved = Geometry(SHAPE, rigid.matrix @ geometry.affine)
    np.testing.assert_allclose(geometry.index_matrix(moved, rigid), np.eye(4), atol=1e-9)
    np.testing.assert_allclose(rigid.apply(geometry.centre_mm[None])[0], moved.centre_mm)
    np.testing.assert_allclose(geometry.centre_mm, centre_mm(geometry))
    assert geometry.fraction_inside(moved, rigid) == 1


def test_the_fraction_of_a_grid_inside_another():
    geometry = Geometry((40, 40, 40), oblique((1.0, 1.0, 1.0)))
    half = geometry.crop(BoundingBox((10, 0, 0), (30, 40, 40)))
    assert half.fraction_inside(geometry) == 1
    assert geometry.fraction_inside(half) == pytest.approx(0.5, abs=0.02)
    away = Rigid.about(np.zeros(3), np.eye(3), np.array([100.0, 0, 0]))
    assert geometry.fraction_inside(half, away) == 0


def test_only_intensities_applies_the_scale():
    stored = np.arange(504, dtype=np.int16).reshape(SHAPE)
    volume = Volume(stored, Geometry(SHAPE, np.eye(4)), slope=0.5, intercept=-1024)
    assert volume.array.dtype == np.int16
    assert volume.intensities()[0, 0, 2] == -1023
    plain = Volume(stored, Geometry(SHAPE, np.eye(4)))
    assert plain.intensities() is stored
