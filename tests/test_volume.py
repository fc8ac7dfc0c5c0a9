import numpy as np
import pytest
from laws import GRIDS, oblique, orientations, ras

from volseg.volume import BoundingBox, Geometry, Volume

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


def test_the_box_around_a_mask_is_tight_and_clipped_at_the_border():
    mask = np.zeros(SHAPE, bool)
    mask[2, 3, 4] = mask[5, 3, 8] = True
    assert BoundingBox.around(mask) == BoundingBox((2, 3, 4), (6, 4, 9))
    assert BoundingBox.around(mask, margin=(3, 1, 1)) == BoundingBox((0, 2, 3), (7, 5, 9))
    assert BoundingBox.around(np.zeros(SHAPE)) is None


def test_only_intensities_applies_the_scale():
    stored = np.arange(504, dtype=np.int16).reshape(SHAPE)
    volume = Volume(stored, Geometry(SHAPE, np.eye(4)), slope=0.5, intercept=-1024)
    assert volume.array.dtype == np.int16
    assert volume.intensities()[0, 0, 2] == -1023
    plain = Volume(stored, Geometry(SHAPE, np.eye(4)))
    assert plain.intensities() is stored
