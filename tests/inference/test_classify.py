import numpy as np
import pytest
from laws import GRIDS, ball, grid_around, orientations, ras

from volseg.inference.classify import classify_lesions, lesion_slices
from volseg.recipe import Classify
from volseg.volume import Volume

SETTINGS = Classify(
    column="grade",
    classes={"small": (0, 1), "large": (2, 3)},
    network={"name": "cnn2d"},
    field_of_view_mm=32,
    pixels=64,
    low=-1000,
    high=200,
)


class AreaNetwork:
    """A stub that returns the fraction of lesion pixels, which can be computed by hand."""

    def logits(self, batch):
        fraction = batch[:, 1].mean(axis=(1, 2))
        return np.stack([-fraction, fraction], axis=1)


def scan_of_a_ball(radius_mm, affine):
    geometry = grid_around(radius_mm, affine, margin=8)
    inside = ball(radius_mm, geometry)
    return Volume(np.where(inside, 80, -800).astype(np.int16), geometry), inside


@pytest.mark.parametrize("grid", [GRIDS["ras"], GRIDS["lps"]])
@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.7, 0.7, 2.5), (2, 1, 0.5)])
def test_every_slice_of_a_ball_is_a_disc_of_its_size_in_mm(grid, spacing_mm):
    image, inside = scan_of_a_ball(8, grid(spacing_mm))
    slices = lesion_slices(image, inside, SETTINGS)
    pixel_mm2 = (32 / 64) ** 2
    np.testing.assert_allclose(slices[:, 1].sum(axis=(1, 2)) * pixel_mm2, np.pi * 8**2, rtol=0.1)
    assert slices[:, 0, 32, 32] == pytest.approx(1080 / 1200, abs=1e-3)
    assert slices[:, 0, 0, 0] == pytest.approx(200 / 1200, abs=1e-3)


def test_all_48_orders_give_the_same_slices_and_classes():
    image, inside = scan_of_a_ball(6, ras((0.8, 0.9, 1.7)))
    image.array[: image.array.shape[0] // 2] += 100  # not symmetric any more
    expected = lesion_slices(image, inside, SETTINGS)
    ids = inside.astype(np.uint16)
    masks = orientations(image.with_array(ids))
    for (stored, affine), (mask, _) in zip(orientations(image), masks, strict=True):
        turned = Volume(stored, type(image.geometry)(stored.shape, affine))
        np.testing.assert_allclose(lesion_slices(turned, mask == 1, SETTINGS), expected, atol=1e-4)


def test_each_lesion_has_its_own_probabilities_and_the_crop_changes_nothing():
    geometry = grid_around(30, ras((1, 1, 1.5)), margin=6)
    centre = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    large, small = ball(9, geometry, centre - [15, 0, 0]), ball(4, geometry, centre + [15, 0, 0])
    ids = large.astype(np.uint16) + 2 * small.astype(np.uint16)
    image = Volume(np.where(ids > 0, 80, -800).astype(np.int16), geometry)
    rows = classify_lesions(image, ids, AreaNetwork(), SETTINGS)
    assert [set(row) for row in rows] == [{"small", "large"}] * 2
    assert rows[0]["large"] > rows[1]["large"] > 0.5
    for row, inside in zip(rows, (large, small), strict=True):
        assert sum(row.values()) == pytest.approx(1)
        fraction = lesion_slices(image, inside, SETTINGS)[:, 1].mean()
        assert row["large"] == pytest.approx(1 / (1 + np.exp(-2 * fraction)), abs=1e-4)


def test_a_scan_without_lesions_has_no_classes():
    image, inside = scan_of_a_ball(5, ras((1, 1, 1)))
    assert classify_lesions(image, np.zeros(inside.shape, np.uint16), AreaNetwork(), SETTINGS) == []
