"""A 2D image becomes the input of a network: size, channels, margins."""

from __future__ import annotations

import numpy as np
import pytest

from volseg.image import Image2D
from volseg.preprocessing.images import (
    axis_weights,
    fit_square,
    resize,
    to_channels,
    to_input,
    to_pixels,
    with_margins,
)
from volseg.recipe.images import IMAGE_NORMALISERS, Images, ScaleImage, WindowImage

SHAPES = [(28, 28), (40, 60), (61, 40), (7, 100), (200, 33), (1, 9), (501, 300)]
EXAMPLES = {WindowImage: {"low": 10, "high": 200}}
NORMALISERS = [row(**EXAMPLES.get(row, {})) for row in IMAGE_NORMALISERS]


def picture(shape, channels=1, seed=0) -> Image2D:
    rng = np.random.default_rng(seed)
    return Image2D(rng.integers(0, 256, (channels, *shape), np.uint8), 255.0)


def brute_force_areas(line: np.ndarray, n_out: int) -> np.ndarray:
    """Integrate a line of constant pixels over equal parts by dense sampling."""
    points = (np.arange(n_out * 4000) + 0.5) / (n_out * 4000) * len(line)
    return line[points.astype(int)].reshape(n_out, -1).mean(axis=1)


@pytest.mark.parametrize(("n_in", "n_out"), [(10, 4), (7, 5), (224, 32), (9, 8), (3, 1), (100, 99)])
def test_shrinking_takes_the_mean_over_the_area_of_each_pixel(n_in, n_out):
    line = np.random.default_rng(1).random(n_in)
    shrunk = axis_weights(n_in, n_out) @ line.astype(np.float32)
    np.testing.assert_allclose(shrunk, brute_force_areas(line, n_out), atol=2e-3)


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 10), (5, 7), (1, 3), (28, 224), (8, 9)])
def test_enlarging_is_linear_between_pixel_centres(n_in, n_out):
    line = np.random.default_rng(2).random(n_in)
    centres = (np.arange(n_out) + 0.5) / n_out * n_in - 0.5
    enlarged = axis_weights(n_in, n_out) @ line.astype(np.float32)
    np.testing.assert_allclose(enlarged, np.interp(centres, np.arange(n_in), line), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", [(8, 8), (28, 28), (32, 17), (224, 224)])
def test_the_weights_of_a_pixel_add_up_to_one_and_the_mean_is_kept(shape, target):
    for n_in, n_out in zip(shape, target, strict=True):
        weights = axis_weights(n_in, n_out)
        np.testing.assert_allclose(np.asarray(weights.sum(axis=1)).ravel(), 1, rtol=1e-5)
        if n_out <= n_in or n_out % n_in == 0:  # then each pixel of the image counts the same
            sums = np.asarray(weights.sum(axis=0)).ravel()
            np.testing.assert_allclose(sums, n_out / n_in, rtol=1e-4)
    array = picture(shape).array.astype(np.float32)
    if all(n_out <= n_in for n_in, n_out in zip(shape, target, strict=True)):
        assert resize(array, target).mean() == pytest.approx(array.mean(), rel=1e-4)


def test_a_fine_grid_shrinks_to_even_grey_and_not_to_moire():
    rows, columns = np.indices((224, 224))
    board = (((rows + columns) % 2) * 255.0).astype(np.float32)[None]
    assert resize(board, (50, 50)).std() < 0.2 * board[:, ::4, ::4].std() + 10


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda row: row.method)
def test_mirroring_before_or_after_is_the_same(fit, shape, normaliser):
    settings = Images(pixels=32, channels=1, fit=fit, normalise=normaliser)
    image = picture(shape)
    mirrored = Image2D(image.array[:, ::-1, ::-1], image.largest)
    expected = to_input(image, settings)[:, ::-1, ::-1]
    assert expected.shape == (1, 32, 32) and expected.dtype == np.float32
    # Equal pixels differ by rounding after resizing, and ranks tell them apart.
    atol = 5e-3 if normaliser.method == "histogram" else 2e-4
    np.testing.assert_allclose(to_input(mirrored, settings), expected, atol=atol)


@pytest.mark.parametrize("pixels", [8, 31, 224])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_keeps_the_aspect_within_a_pixel_and_the_margins_equal(pixels, shape):
    inner = fit_square(picture(shape).array.astype(np.float32), pixels, "pad")
    for n_in, n_out in zip(shape, inner.shape[1:], strict=True):
        assert abs(n_out - n_in * pixels / max(shape)) <= 1 or n_out == 2 - pixels % 2
        assert (pixels - n_out) % 2 == 0
    assert max(inner.shape[1:]) == pixels
    top, left = ((pixels - n) // 2 for n in inner.shape[1:])
    square = with_margins(inner, pixels)
    np.testing.assert_array_equal(square[:, top : pixels - top, left : pixels - left], inner)
    assert square.sum() == pytest.approx(
        inner.sum() + inner.min() * (pixels**2 - inner[0].size), rel=1e-5
    )


def test_cropping_shows_the_middle_and_no_margin():
    array = np.zeros((1, 20, 60), np.uint8)
    array[:, :, 20:40] = 200
    settings = Images(pixels=16, channels=1, fit="crop", normalise=ScaleImage())
    np.testing.assert_allclose(to_input(Image2D(array, 255.0), settings), 200 / 255, rtol=1e-5)


def test_margins_do_not_count_in_the_normalisation():
    settings = {"pixels": 32, "channels": 1, "normalise": {"method": "zscore"}}
    square = to_input(picture((16, 32)), Images.model_validate(settings))
    content = square[:, 8:24]
    assert content.mean() == pytest.approx(0, abs=1e-4) and content.std() == pytest.approx(1)
    np.testing.assert_array_equal(square[:, :8], content.min())


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("method", ["zscore", "percentile", "histogram"])
@pytest.mark.parametrize("value", [0, 3, 255])
def test_a_constant_image_becomes_zero(fit, method, value):
    settings = Images.model_validate(
        {"pixels": 37, "channels": 3, "fit": fit, "normalise": {"method": method}}
    )
    image = Image2D(np.full((3, 50, 23), value, np.uint8), 255.0)
    np.testing.assert_array_equal(to_input(image, settings), 0)


def test_grey_fills_three_channels_and_colour_becomes_its_luminance():
    grey, colour = picture((5, 6)), picture((5, 6), channels=3)
    tripled = to_channels(grey.array, 3)
    np.testing.assert_array_equal(tripled, np.repeat(grey.array, 3, axis=0))
    np.testing.assert_allclose(to_channels(tripled, 1), grey.array, rtol=1e-5)
    red, green, blue = colour.array.astype(float)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    np.testing.assert_allclose(to_channels(colour.array, 1)[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(to_channels(colour.array, 3), colour.array)


def test_an_equalised_image_is_uniform():
    rng = np.random.default_rng(3)
    array = (rng.beta(0.5, 4, (1, 64, 64)) * 65535).astype(np.uint16)
    settings = {"pixels": 64, "channels": 1, "normalise": {"method": "histogram"}}
    levels = np.sort(to_input(Image2D(array, 65535.0), Images.model_validate(settings)).ravel())
    np.testing.assert_allclose(levels, np.linspace(0, 1, levels.size), atol=0.01)


FITS = ["pad", "crop", "stretch"]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("pixels", [31, 64, 224])
@pytest.mark.parametrize("shape", [(64, 64), (40, 60), (121, 80), (90, 200), (501, 300)])
def test_a_square_of_the_input_comes_back_at_its_place_in_the_image(shape, pixels, fit):
    """What the input shows of a planted square, mapped back, lies on the square."""
    height, width = shape
    edge = min(shape) // 3
    top, left = height // 2 - edge + 3, width // 2 - 2
    image = np.zeros((1, *shape), np.float32)
    image[:, top : top + edge, left : left + edge] = 1
    settings = Images(pixels=pixels, channels=1, fit=fit, normalise=ScaleImage(divide_by=1))
    back = to_pixels(to_input(Image2D(image, None), settings)[0], shape, fit)
    assert back.shape == shape and back.dtype == np.float32
    centre = np.array([(np.arange(n) * back.sum(axis=1 - axis)).sum() / back.sum()
                       for axis, n in enumerate(shape)])  # fmt: skip
    pixel = max(shape) / pixels if fit == "pad" else np.array(shape) / pixels  # of the input
    expected = np.array([top, left]) + (edge - 1) / 2
    assert (np.abs(centre - expected) <= 0.15 * np.maximum(pixel, 1)).all()
    assert back.sum() == pytest.approx(edge**2, rel=0.15)
    inner = back[top + edge // 2, left + edge // 2]
    assert inner == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_map_comes_back_constant_but_for_what_the_network_never_saw(shape, fit):
    back = to_pixels(np.full((32, 32), 0.7, np.float32), shape, fit)
    unseen = np.ones(shape, bool)
    side = min(shape)
    if fit == "crop":
        top, left = ((n - side) // 2 for n in shape)
        unseen[top : shape[0] - top, left : shape[1] - left] = False
    else:
        unseen[:] = False
    np.testing.assert_allclose(back[~unseen], 0.7, rtol=1e-5)
    assert not back[unseen].any()


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_size_of_the_input_needs_no_change(fit):
    saliency = np.random.default_rng(0).normal(size=(24, 24)).astype(np.float32)
    np.testing.assert_array_equal(to_pixels(saliency, (24, 24), fit), saliency)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(33, 50), (50, 33)])
def test_mirroring_a_map_before_or_after_is_the_same(shape, fit):
    saliency = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    mirrored = to_pixels(saliency[::-1, ::-1], shape, fit)
    np.testing.assert_allclose(mirrored[::-1, ::-1], to_pixels(saliency, shape, fit), atol=1e-5)
