"""The page of classified images says of how many the model is not sure."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from volseg.evaluation.class_rows import ClassRow
from volseg.pages.about import About
from volseg.pages.class_page import PICTURE_HEIGHT, class_page, thumbnail

P = {"a": 0.7, "b": 0.3}


def n_unsure(pairs):
    """Return the number on the page, for rows of (class_name, confidence_set)."""
    rows = [
        ClassRow(case_id=str(n), class_name=name, confidence_set=left_open, probabilities=P)
        for n, (name, left_open) in enumerate(pairs)
    ]
    page = class_page(About.now("infer"), rows, target="t", coverage=0.9, pictures={})
    numbers = re.findall(r"of (\d+) it is not sure", page.sentence)
    return int(numbers[0]) if numbers else 0


@pytest.mark.parametrize(
    ("pairs", "n"),
    [
        ([("a", "a"), ("b", "a|b"), ("a", "a|b")], 2),
        ([("a", None), ("b", None)], 0),  # no sets are stated
        ([("a|b", "a|b"), ("a", "a"), ("", "")], 0),  # several labels, all of them sure
        ([("a|b", "a"), ("", "b"), ("a", "a"), (None, None)], 2),
    ],
)
def test_an_image_is_unsure_if_its_set_is_not_what_is_predicted(pairs, n):
    assert n_unsure(pairs) == n


@pytest.mark.parametrize("shape", [(10, 20_000), (20_000, 10), (1, 1), (1, 65_535), (40, 60)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_has_the_height_of_the_page_and_room_beside_it(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, *shape)).astype(np.uint8)
    picture = Image.open(io.BytesIO(thumbnail(image)))
    assert picture.height == PICTURE_HEIGHT and picture.width <= 4 * PICTURE_HEIGHT
    height, width = shape
    if width <= 4 * height:  # the whole picture is the image
        assert picture.width == max(1, round(width * PICTURE_HEIGHT / height))
    else:  # in a band across the middle
        assert np.asarray(picture)[PICTURE_HEIGHT // 2].max() > 0
