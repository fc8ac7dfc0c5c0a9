"""The section [images], and the normalisation of 2D images."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from volseg.errors import VolsegError
from volseg.recipe import ClassifyRecipe
from volseg.recipe.images import (
    IMAGE_NORMALISERS,
    HistogramImage,
    Images,
    PercentileImage,
    ScaleImage,
    WindowImage,
    ZScoreImage,
)
from volseg.recipe.load import validation_messages

RNG = np.random.default_rng(0)
ARRAY = RNG.gamma(2, 20, (3, 40, 50)).astype(np.float32)
# A normaliser whose keys have no usable defaults needs an example.
EXAMPLES = {WindowImage: [{"low": 10, "high": 90}], ScaleImage: [{}, {"divide_by": 7}]}
NORMALISERS = [row(**keys) for row in IMAGE_NORMALISERS for keys in EXAMPLES.get(row, [{}])]


def applied(normaliser, array, largest=255.0):
    return normaliser.standardise(normaliser.fit(array, largest)(array))


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=str)
def test_laws_of_every_normaliser(normaliser):
    before = ARRAY.copy()
    normalised = applied(normaliser, ARRAY)
    np.testing.assert_array_equal(ARRAY, before)
    assert normalised.dtype == np.float32 and np.isfinite(normalised).all()
    assert Images.model_validate({"normalise": dict(normaliser)}).normalise == normaliser
    mirrored = applied(normaliser, ARRAY[:, ::-1, ::-1])
    np.testing.assert_allclose(mirrored, normalised[:, ::-1, ::-1], atol=1e-5)
    order = np.argsort(ARRAY.ravel())
    assert (np.diff(normalised.ravel()[order]) >= -1e-6).all()  # brighter stays brighter


@pytest.mark.parametrize("normaliser", [PercentileImage(), HistogramImage(), ZScoreImage()])
@pytest.mark.parametrize("value", [0.0, 7.0, 1e5])
def test_a_constant_image_becomes_zero(normaliser, value):
    np.testing.assert_array_equal(applied(normaliser, np.full((1, 9, 9), value, np.float32)), 0)


@pytest.mark.parametrize("normaliser", [PercentileImage(), HistogramImage(), ZScoreImage()])
def test_exposure_does_not_change_an_image_normalised_by_itself(normaliser):
    exposed = applied(normaliser, ARRAY * 3 + 11)
    np.testing.assert_allclose(exposed, applied(normaliser, ARRAY), atol=2e-3)


def test_a_small_bright_spot_survives_percentiles():
    array = np.zeros((1, 100, 100), np.float32)
    array[0, 3, 3] = 200
    assert applied(PercentileImage(), array).max() == 1


def test_white_becomes_one_and_then_the_mean_and_sd_of_imagenet():
    mean, sd = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    white = np.full((3, 2, 2), 65535, np.float32)
    normalised = applied(ScaleImage(mean=mean, sd=sd), white, 65535)
    np.testing.assert_allclose(normalised[:, 0, 0], (1 - np.array(mean)) / sd, rtol=1e-5)
    grey = applied(ScaleImage(mean=(0.5,), sd=(0.25,)), white / 65535 * 255)
    np.testing.assert_allclose(grey, 2, rtol=1e-5)


def test_white_must_be_known():
    with pytest.raises(VolsegError, match="which intensity is white"):
        ScaleImage().fit(ARRAY, None)
    assert ScaleImage(divide_by=2).fit(ARRAY, None).factor == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pixels": 7}, "greater than or equal to 8"),
        ({"pixels": 1025}, "less than or equal to 1024"),
        ({"channels": 2}, "1 or 3"),
        ({"fit": "squeeze"}, "pad"),
        ({"planes": []}, "at least 1"),
        ({"planes": ["axial", "axial"]}, "planes must differ"),
        ({"planes": ["oblique"]}, "axial"),
        ({"normalise": {"method": "window", "low": 3, "high": 3}}, "empty"),
        ({"normalise": {"method": "scale", "mean": [0.5]}}, "1 numbers and sd 0"),
        (
            {"channels": 1, "normalise": {"method": "scale", "mean": [1, 2, 3], "sd": [1, 1, 1]}},
            "3 numbers for 1 channels",
        ),
        ({"normalise": {"method": "percentile", "low_percent": 60, "high_percent": 40}}, "less"),
        ({"normalise": {"method": "histogramm"}}, "histogram"),
        ({"pixel": 8}, "pixel"),
    ],
)
def test_wrong_settings_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        Images.model_validate(keys)


def test_the_input_of_a_lesion_has_a_channel_per_slice_and_one_for_the_mask():
    assert Images().lesion_channels == 2
    assert Images(neighbours=2, mask_channel=False).lesion_channels == 5


@pytest.mark.parametrize(
    ("section", "values", "sentences"),
    [
        ("train", {"epochs": -3}, ["train.epochs: input should be greater than or equal to 1"]),
        ("train", {"balance": "x"}, ["train.balance: input should be 'none', 'weights' or 'sam"]),
        ("images", {"pixels": 3}, ["images.pixels: input should be greater than or equal to 8"]),
        ("images", {"normalise": {"method": "zscor"}}, ["images.normalise: input tag 'zscor'"]),
        (
            "images",
            {"normalise": {"method": "window", "lo[w]": 3}},
            ["images.normalise.window.lo[w]: unknown key; known keys are mean, sd, method, low, h"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key_of_the_recipe(section, values, sentences):
    content = {
        "task": "classify",
        "name": "x",
        "description": "X.",
        "data": {"target": "class"},
        "network": {"name": "cnn_small"},
    }
    with pytest.raises(ValidationError) as error:
        ClassifyRecipe.model_validate(content | {section: values})
    messages = validation_messages(error.value, ClassifyRecipe)
    pairs = zip(messages, sentences, strict=True)
    assert all(text.startswith(start) for text, start in pairs), messages
