"""Slices through a lesion have their physical size, whatever the grid of the scan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from laws import oblique, orientations

from volseg.errors import VolsegError
from volseg.preprocessing.lesion_images import LesionView, cut_lesion, lesion_input
from volseg.preprocessing.planes import PLANES
from volseg.recipe.images import Images, ScaleImage
from volseg.volume import BoundingBox, Geometry, Volume

SPACING_MM = (0.8, 1.1, 2.5)
SHAPE = (40, 30, 16)


def scan(spacing_mm=SPACING_MM, slope_per_mm=(3.0, -2.0, 5.0)) -> tuple[Volume, np.ndarray]:
    """Return a scan whose intensity rises linearly in mm along R, A and S, and a lesion."""
    geometry = Geometry(SHAPE, np.diag([*spacing_mm, 1.0]))
    index = np.indices(SHAPE)
    mm = [axis * step for axis, step in zip(index, spacing_mm, strict=True)]
    array = sum(slope * axis for slope, axis in zip(slope_per_mm, mm, strict=True))
    inside = np.zeros(SHAPE, bool)
    inside[17:23, 12:18, 6:10] = True
    return Volume(np.asarray(array, np.float32), geometry), inside


def settings(**keys) -> Images:
    base = {
        "pixels": 16,
        "field_of_view_mm": 12.0,
        "normalise": {"method": "scale", "divide_by": 1},
    }
    return Images.model_validate(base | keys)


@pytest.mark.parametrize("neighbours", [0, 1, 3])
def test_pixels_and_slices_are_their_millimetres_apart(neighbours):
    image, inside = scan()
    slopes = (3.0, -2.0, 5.0)
    channels = lesion_input(image, inside, settings(neighbours=neighbours, neighbour_mm=1.7))
    assert channels.shape == (3, 2 + 2 * neighbours, 16, 16) and channels.dtype == np.float32
    for plane, slices in zip(PLANES, channels[:, :-1], strict=True):
        across, up = np.diff(slices, axis=1), np.diff(slices, axis=2)
        np.testing.assert_allclose(across, slopes[plane.across] * 12 / 16, rtol=1e-3)
        np.testing.assert_allclose(up, slopes[plane.up] * 12 / 16, rtol=1e-3)
        np.testing.assert_allclose(np.diff(slices, axis=0), slopes[plane.through] * 1.7, rtol=1e-3)
        centre_mm = [19.5 * 0.8, 14.5 * 1.1, 7.5 * 2.5]
        middle = slices[neighbours, 7:9, 7:9].mean()
        assert middle == pytest.approx(np.dot(slopes, centre_mm), rel=1e-4)


@pytest.mark.parametrize(
    "names",
    [c for n in (1, 2, 3) for c in itertools.combinations(("axial", "coronal", "sagittal"), n)],
    ids="+".join,
)
def test_chosen_planes_equal_those_of_all(names):
    image, inside = scan()
    all_planes = lesion_input(image, inside, settings(neighbours=1))
    some = lesion_input(image, inside, settings(neighbours=1, planes=names, mask_channel=False))
    rows = [number for number, plane in enumerate(PLANES) if plane.name in names]
    np.testing.assert_allclose(some, all_planes[rows, :-1], rtol=1e-5)


def test_all_48_orders_of_an_oblique_grid_give_the_same_input():
    geometry = Geometry(SHAPE, oblique(SPACING_MM))
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    _, inside = scan()
    image = Volume(array, geometry)
    keys = settings(neighbours=1, normalise={"method": "zscore"})
    expected = lesion_input(image, inside, keys)
    pairs = zip(orientations(image), orientations(image.with_array(inside)), strict=True)
    for (stored, affine), (mask, _) in pairs:
        turned = Volume(stored, Geometry(stored.shape, affine))
        np.testing.assert_allclose(lesion_input(turned, mask, keys), expected, atol=1e-4)


def test_the_box_of_a_view_holds_all_that_it_shows():
    image, inside = scan()
    image = image.with_array(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    for view in (
        LesionView(field_of_view_mm=9.0, pixels=20),
        LesionView(field_of_view_mm=2.0, pixels=8, neighbours=2, neighbour_mm=4.0),
    ):
        box = view.box(BoundingBox.of_voxels(np.argwhere(inside)), image.geometry)
        cropped = cut_lesion(image.crop(box), inside[box.slices], view)
        for part, whole in zip(cropped, cut_lesion(image, inside, view), strict=True):
            np.testing.assert_allclose(part, whole, atol=1e-5)


def test_the_mask_channel_covers_the_size_of_the_lesion():
    image, inside = scan()
    channels = lesion_input(image, inside, settings(pixels=48, neighbours=2))
    sizes_mm = [6 * 0.8, 6 * 1.1, 4 * 2.5]
    for plane, covered in zip(PLANES, channels[:, -1], strict=True):
        area = covered.sum() * (12 / 48) ** 2
        assert area == pytest.approx(sizes_mm[plane.across] * sizes_mm[plane.up], rel=0.02)


def test_planes_are_normalised_together():
    image, inside = scan()
    image = image.with_array(image.array**2)  # its planes have other means
    channels = lesion_input(
        image, inside, settings(normalise={"method": "zscore"}, mask_channel=False)
    )
    assert channels.mean() == pytest.approx(0, abs=1e-4)
    assert channels.std() == pytest.approx(1, rel=1e-4)
    assert np.ptp(channels.mean(axis=(1, 2, 3))) > 0.001
    with pytest.raises(VolsegError, match="which intensity is white"):
        lesion_input(image, inside, settings(normalise=ScaleImage()))
