"""Exact and near duplicates among 2D images.

Two images are near duplicates if their 32 × 32 thumbnails correlate, and so does their detail: what
a thumbnail holds beyond its blurred self. That survives another size, JPEG quality, brightness or
contrast, and tells apart images that share only their layout, as all chest radiographs do.
Perceptual hashes do not: of mid-slices of the brain of different people (OASIS-1), 802 pairs have
equal 64-bit difference hashes, and of 5856 chest radiographs (PneumoniaMNIST) 174,452 pairs differ
in at most 5 bits, where volseg names 31 pairs, which have the same pixels.

The thresholds lie between copies and look-alikes (`benchmarks/duplicates.py`). At JPEG quality 50
or with another gamma, 99 % of copies have thumbnails ≥ 0.983 and detail ≥ 0.881 on four data sets,
even at 28 × 28 pixels. In BUSI 124 pairs of 655 ultrasound images pass; the 24 least alike show one
lesion each by eye.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from volseg.preprocessing.images import resize, to_channels

THUMBNAIL = 32  # pixels of an edge
BLUR_SD = 1.5  # of the Gaussian, in pixels of the thumbnail
MIN_CORRELATION = 0.975  # of thumbnails
MIN_DETAIL = 0.85  # correlation of their detail
BLANK = 0.01  # contrast of a blank image at most, as a part of white
ROWS = 512  # images compared with all others at once


@dataclass(frozen=True, slots=True, eq=False)
class ImagePrint:
    """What is kept of an image to find its duplicates.

    Args:
        sha256: of shape, dtype and pixels; equal for exact duplicates, whatever their files.
        thumbnail, detail: (1024,) float32 of mean 0 and length 1; None if the image is blank.
    """

    sha256: str
    thumbnail: np.ndarray | None = None
    detail: np.ndarray | None = None

    @property
    def is_blank(self) -> bool:
        return self.detail is None


def print_of(array: np.ndarray, largest: float | None = None) -> ImagePrint:
    """Return the print of an image (1 or 3, H, W); `largest` is what white is, if known."""
    sha256 = hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
    white = largest or 0
    if white > 255:  # files of 16 bits often use only a small part of them
        white = min(white, float(array.max()))
    if float(array.max()) - float(array.min()) <= BLANK * white:
        return ImagePrint(sha256)
    return print_of_thumbnail(resize(to_channels(array, 1), (THUMBNAIL, THUMBNAIL))[0], sha256)


def print_of_thumbnail(
    pixels: np.ndarray, sha256: str, *, axes: tuple[int, ...] = (0, 1)
) -> ImagePrint:
    """Return the print of an image or scan with this thumbnail, or several of them.

    Args:
        axes: of the pixels, along which they are blurred.
    """
    thumbnail = _normed(pixels)
    detail = _normed(pixels - ndimage.gaussian_filter(pixels, BLUR_SD, axes=axes))
    if thumbnail is None or detail is None:
        return ImagePrint(sha256)
    return ImagePrint(sha256, thumbnail, detail)


def _normed(pixels: np.ndarray) -> np.ndarray | None:
    """Return pixels with mean 0 and length 1; None if there is nothing but rounding."""
    values = (pixels - pixels.mean()).ravel()
    length = float(np.linalg.norm(values))
    return values / np.float32(length) if length > 1e-4 * np.abs(pixels).max() else None


def near_duplicates(prints: Sequence[ImagePrint], *, rows: int = ROWS) -> Iterator[tuple[int, int]]:
    """Yield the pairs i < j of images that are exact or near duplicates; blank ones are none.

    Args:
        rows: images compared with all others at once; memory grows with it.
    """
    numbers = [number for number, image in enumerate(prints) if not image.is_blank]
    if not numbers:
        return
    details = np.stack([image.detail for image in prints if image.detail is not None])
    thumbnails = np.stack([image.thumbnail for image in prints if image.thumbnail is not None])
    for start in range(0, len(numbers), rows):
        correlation = np.triu(details[start : start + rows] @ details[start:].T, 1)
        first, second = (axis + start for axis in np.nonzero(correlation >= MIN_DETAIL))
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            if thumbnails[i] @ thumbnails[j] >= MIN_CORRELATION:
                yield numbers[i], numbers[j]


def groups_of(prints: Sequence[ImagePrint], patients: Sequence[str | None] = ()) -> list[int]:
    """Return the number of each image's group of near duplicates, from 0 in order of appearance.

    Duplicates of duplicates are in one group. Folds that keep groups together do not leak.

    Args:
        patients: of each image, if known; images of a patient are in one group, too.
    """
    homes: dict[str, int] = {}
    pairs = [
        (homes.setdefault(patient, number), number)
        for number, patient in enumerate(patients)
        if patient is not None
    ]
    return groups_of_pairs([*pairs, *near_duplicates(prints)], len(prints))


def groups_of_pairs(pairs: Iterable[tuple[int, int]], n_images: int) -> list[int]:
    """Return the group of each image from pairs of images that belong together (union-find)."""
    parents = list(range(n_images))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for first, second in pairs:
        parents[max(root(first), root(second))] = min(root(first), root(second))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(number), len(numbers)) for number in range(n_images)]
