"""Duplicates are found whatever their file, and images that only look alike are not."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from volseg.evaluation.duplicates import groups_of, near_duplicates, print_of
from volseg.io.image_cases import survey_images
from volseg.io.images import ImageReader

DATA = Path(__file__).parents[2].parent / "shared/data"
N = 40


def pictures(n: int = N, size: int = 96) -> list[np.ndarray]:
    """Speckle over a common layout, as of one kind of scanner: (1, H, W) uint8."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((size, size)) / size
    layout = 90 + 80 * np.exp(-((rows - 0.5) ** 2 + (columns - 0.5) ** 2) / 0.1)
    texture = [ndimage.gaussian_filter(rng.normal(size=(size, size)), 2) for _ in range(n)]
    return [np.clip(layout + 250 * noise, 0, 255).astype(np.uint8)[None] for noise in texture]


def jpeg(array, quality):
    stream = io.BytesIO()
    Image.fromarray(array[0]).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))[None]


def resized(array, factor):
    image = Image.fromarray(array[0])
    size = (round(image.width * factor), round(image.height * factor))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))[None]


CHANGES = {
    "none": lambda a: a,
    "jpeg 50": lambda a: jpeg(a, 50),
    "half size": lambda a: resized(a, 0.5),
    "stretched": lambda a: np.repeat(a, 2, axis=2),
    "darker": lambda a: (a * 0.6 + 10).astype(np.uint8),
    "gamma": lambda a: (255 * (a / 255) ** 1.4).astype(np.uint8),
    "16 bits": lambda a: a.astype(np.uint16) * 257,
    "colour": lambda a: np.repeat(a, 3, axis=0),
    "text burnt in": lambda a: np.where(np.indices(a.shape).sum(axis=0) < 5, 255, a),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change):
    originals = pictures()
    copies = [CHANGES[change](array).astype(np.uint16) for array in originals[:10]]
    prints = [print_of(array) for array in [*originals, *copies]]
    assert set(near_duplicates(prints, rows=7)) == {(n, N + n) for n in range(10)}
    assert groups_of(prints) == [*range(N), *range(10)]


def test_the_same_pixels_have_the_same_hash_and_others_do_not():
    first, second = pictures(2)
    assert print_of(first).sha256 == print_of(first.copy(order="F")).sha256
    hashes = {print_of(array).sha256 for array in (first, second, first[:, ::-1], first * 1.0)}
    assert len(hashes) == 4


@pytest.mark.parametrize("value", [0, 7, 255])
def test_blank_images_are_no_duplicates_of_each_other(value):
    noise = np.random.default_rng(0).integers(0, 3, (1, 50, 50))
    blanks = [
        np.full((1, 20, 30), value, np.uint8),
        np.clip(value + noise, 0, 255).astype(np.uint8),
    ]
    prints = [print_of(array, 255.0) for array in [*blanks, *blanks]]
    assert all(image.is_blank for image in prints)
    assert list(near_duplicates(prints)) == [] and groups_of(prints) == [0, 1, 2, 3]
    assert print_of(blanks[0]).is_blank and not print_of(noise).is_blank


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_sixteen_bits_that_hold_fewer_are_compared_like_others(bits):
    images = [(array.astype(np.uint16) << 8) >> (16 - bits) for array in pictures(3)]
    prints = [print_of(array, 65535.0) for array in [*images, images[0]]]
    assert not any(image.is_blank for image in prints)
    assert groups_of(prints) == [0, 1, 2, 0]
    even = np.full((1, 20, 30), 4000, np.uint16)
    even[0, 0, 0] += 40
    assert print_of(even, 65535.0).is_blank


def test_duplicates_of_duplicates_are_one_group():
    first, last = pictures(2)
    mixed = [first * (1 - w) + last * w for w in np.linspace(0, 1, 9)]
    prints = [print_of(array) for array in mixed]
    assert float(prints[0].detail @ prints[-1].detail) < 0.5
    assert groups_of(prints) == [0] * 9
    assert groups_of([prints[0], prints[-1]]) == [0, 1]
    assert groups_of([]) == []


def test_images_of_a_patient_are_in_one_group_with_their_duplicates():
    first, second, third, fourth = map(print_of, pictures(4))
    prints = [first, second, third, first, fourth]
    assert groups_of(prints) == [0, 1, 2, 0, 3]
    assert groups_of(prints, ["P", None, None, "Q", "Q"]) == [0, 1, 2, 0, 0]
    assert groups_of(prints, [None, "P", "P", None, None]) == [0, 1, 1, 0, 2]


@pytest.mark.slow
def test_five_thousand_images_are_compared_within_a_minute():
    rng = np.random.default_rng(0)
    start = time.process_time()
    prints = [print_of(rng.integers(0, 255, (1, 64, 64), np.uint8)) for _ in range(5000)]
    assert groups_of(prints) == [*range(5000)]
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("busi_ultrasound", 100, 125),  # sweeps over one lesion, seen by eye
        ("oasis1_midslices", 0, 0),  # different people, or planes
        ("pneumoniamnist", 3, 20),  # the same pixels twice
    ],
)
def test_real_images_that_share_a_layout_are_told_apart(name, least, most):
    if not (DATA / name).is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    reader = ImageReader()
    cases = survey_images(DATA / name).cases[:1500]
    images = [reader.read(case.path, case.index) for case in cases]
    prints = [print_of(image.array, image.largest) for image in images]
    pairs = list(near_duplicates(prints))
    assert least <= len(pairs) <= most
    if name == "pneumoniamnist":
        assert all(prints[first].sha256 == prints[second].sha256 for first, second in pairs)
