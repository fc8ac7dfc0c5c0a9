import io

import matplotlib.image
import numpy as np
import pytest
from laws import ball, centre_mm, grid_around, lps, orientations, ras
from segmented_scans import segmented

from volseg.measurement.lesions import measure_lesions
from volseg.pages.figures import overlay_png
from volseg.pages.preview import picture_window
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Geometry, Volume

OUTLINE = np.array([1.0, 0.36, 0.2])


def picture(volume, mask):
    lesions = label_lesions(mask, volume.geometry)
    rows = measure_lesions(segmented(volume, lesions, label_names={1: "lesion"}))
    window = picture_window(volume, lesions.ids, unit="HU")
    png = overlay_png(volume, lesions.ids, rows, title="a", window=window)
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def outlined(image):
    return np.abs(image - OUTLINE).max(axis=-1) < 0.15


def test_a_lesion_is_outlined_in_three_planes_on_the_side_where_it_lies():
    geometry = grid_around(20, lps((1, 1, 2)), margin=2)
    centre = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    inside = ball(6, geometry, centre + [12, 0, 0])  # 12 mm to the right
    image = picture(
        Volume(np.where(inside, 80, -100).astype(np.int16), geometry), inside.astype(np.uint8)
    )
    red = outlined(image)
    third = image.shape[1] // 3
    assert all(red[:, part * third : (part + 1) * third].any() for part in range(3))
    axial = red[:, :third]
    columns = np.flatnonzero(axial.any(axis=0))
    assert columns.mean() < third / 2  # radiological convention: the patient's right is on the left


def test_a_scan_without_lesion_has_a_picture_without_outline():
    geometry = grid_around(10, ras((1, 1, 2)))
    noise = np.random.default_rng(0).normal(0, 10, geometry.shape).astype(np.float32)
    assert not outlined(picture(Volume(noise, geometry), np.zeros(geometry.shape, np.uint8))).any()


def test_all_48_orders_give_the_same_picture():
    geometry = grid_around(8, ras((0.8, 1.0, 2.0)))
    inside = ball(4, geometry, np.array([0.0, 20.0, 6.0]))
    scan = Volume(
        np.where(inside, 80, 0).astype(np.int16)
        + np.arange(geometry.shape[0], dtype=np.int16)[:, None, None],
        geometry,
    )
    pairs = list(
        zip(orientations(scan), orientations(scan.with_array(inside.astype(np.uint8))), strict=True)
    )
    expected = picture(scan, inside.astype(np.uint8))
    for (stored, affine), (mask, _) in pairs[::11]:
        np.testing.assert_allclose(
            picture(Volume(stored, Geometry(stored.shape, affine)), mask), expected, atol=0.02
        )


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 2, 2)])
def test_tiny_scans_do_not_break_the_picture(shape):
    scan = Volume(np.zeros(shape, np.int16), Geometry(shape, ras((1, 1, 1))))
    assert picture(scan, np.ones(shape, np.uint8)).size > 0


def test_a_lesion_larger_than_its_surroundings_is_not_all_noise():
    """The window of a ball of 60 mm spans the ball and its surroundings, not its middle alone."""
    geometry = grid_around(40, ras((2, 2, 2)))
    inside = ball(30, geometry)
    noise = np.random.default_rng(0).normal(0, 10, geometry.shape)
    image = picture(
        Volume((noise + np.where(inside, 100, -100)).astype(np.int16), geometry),
        inside.astype(np.uint8),
    )
    axial = image[:, : image.shape[1] // 3]
    rows, columns = np.nonzero(outlined(axial))
    middle = axial[rows.min() + 40 : rows.max() - 40, columns.min() + 40 : columns.max() - 40]
    assert middle.mean() > 0.6
    assert middle.std() < 0.1


def test_the_largest_lesions_are_shown_whatever_their_numbers():
    geometry = grid_around(24, ras((1, 1, 1)))
    centre = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    mask = np.zeros(geometry.shape, np.uint8)
    for value, x in enumerate((-18, -12, -6), start=1):
        mask[ball(1.5, geometry, centre + [x, -14, -14])] = value
    mask[ball(9, geometry, centre + [10, 10, 10])] = 4  # in no slice through the others
    lesions = label_lesions(mask, geometry, objects="labels")
    scan = Volume(mask.astype(np.int16), geometry)
    rows = measure_lesions(segmented(scan, lesions, unit="a.u."))
    window = picture_window(scan, lesions.ids, unit="a.u.")
    png = overlay_png(scan, lesions.ids, rows, title="a", window=window)
    image = matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]
    first = outlined(image[: image.shape[0] // 3])
    assert np.ptp(np.nonzero(first)[0]) > 50  # the first row shows the ball of 18 mm


def test_a_label_or_case_that_looks_like_a_formula_is_text():
    geometry = grid_around(8, ras((1, 1, 2)))
    inside = ball(4, geometry, centre_mm(geometry))
    scan = Volume(np.where(inside, 80, 0).astype(np.int16), geometry)
    lesions = label_lesions(inside.astype(np.uint8), geometry)
    rows = measure_lesions(segmented(scan, lesions, label_names={1: r"$\bad{$"}))
    png = overlay_png(scan, lesions.ids, rows, title=r"$\frac$", window=(-100.0, 100.0))
    image = matplotlib.image.imread(io.BytesIO(png), format="png")
    assert outlined(image[..., :3]).any()


def test_the_row_of_a_lesion_points_at_it_and_outlines_the_other_thinly():
    """Two balls of equal size in one slice: row k has the thick outline and the arrow at ball k."""
    geometry = grid_around(24, lps((1, 1, 1)))
    offsets = ([12, 0, 0], [-12, 0, 0])  # to the right and to the left of the patient
    balls = [ball(5.2 - 0.4 * n, geometry, centre_mm(geometry) + o) for n, o in enumerate(offsets)]
    mask = (balls[0] | balls[1]).astype(np.uint8)
    image = picture(Volume(np.where(mask, 90, -60).astype(np.int16), geometry), mask)
    half = image.shape[0] // 2
    blue = np.abs(image - np.array([0x59, 0xD8, 0xFF]) / 255).max(axis=-1) < 0.15
    for number, rows in enumerate((slice(0, half), slice(half, None))):
        axial = (rows, slice(0, image.shape[1] // 3))
        thick, arrow = outlined(image)[axial], blue[axial]
        assert thick.any() and arrow.any()
        columns = np.flatnonzero(thick.any(axis=0))
        middle = thick.shape[1] / 2
        assert (columns.mean() < middle) == (number == 0)  # the patient's right is on the left
        # The arrow ends at the outline of its lesion.
        gaps = np.argwhere(arrow)[:, None] - np.argwhere(thick)[None]
        assert np.linalg.norm(gaps, axis=-1).min() < 6
