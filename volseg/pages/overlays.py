"""Pictures of images with the evidence for a class laid over them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from volseg.image import Image2D

SMALLEST, LARGEST = 256, 1024  # pixels of the longer edge of a picture
EVIDENCE, MASK = (255, 106, 0), (0, 229, 255)  # colours of evidence and of the mask's outline
OPACITY = 0.65  # of the strongest evidence
PERCENTILES = (1, 99)  # of the intensities that are black and white


def overlay(image: Image2D, evidence: np.ndarray, mask: np.ndarray | None = None) -> Image.Image:
    """Draw the evidence over an image in grey; the stronger, the more opaque.

    Args:
        evidence: (H, W), 0 to 1.
        mask: (H, W) bool, outlined.
    """
    grey = _grey(image)
    opacity = OPACITY * np.clip(evidence, 0, 1)[..., None]
    picture = grey[..., None] * (1 - opacity) + np.array(EVIDENCE) * opacity
    size = _shown_size(image)
    drawn = Image.fromarray(picture.round().astype(np.uint8)).resize(size)
    return drawn if mask is None else _outlined(drawn, mask)


def plain(image: Image2D, mask: np.ndarray | None = None) -> Image.Image:
    """Draw an image in grey, with the outline of a mask if there is one."""
    return overlay(image, np.zeros(image.array.shape[1:]), mask)


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pair_jpeg(left: Image.Image, right: Image.Image) -> bytes:
    """Return two pictures of one size beside each other as JPEG."""
    sheet = Image.new("RGB", (left.width + right.width, left.height))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=85)
    return file.getvalue()


def _grey(image: Image2D) -> np.ndarray:
    """Return (H, W), 0 to 255: the mean of the channels between two percentiles."""
    values = image.array.mean(axis=0, dtype=np.float64)
    low, high = np.percentile(values, PERCENTILES)
    if high <= low:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return np.clip((values - low) / (high - low), 0, 1) * 255


def _shown_size(image: Image2D) -> tuple[int, int]:
    """Return width and height of the picture, in true proportions if the spacing is known."""
    height, width = image.array.shape[1:]
    down, across = image.spacing_mm or (1.0, 1.0)
    lengths = np.array([width * across, height * down])
    edge = np.clip(max(height, width), SMALLEST, LARGEST)
    w, h = np.maximum(1, np.rint(lengths / lengths.max() * edge)).astype(int).tolist()
    return w, h


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        picture.size, Image.Resampling.NEAREST
    )
    inside = np.asarray(enlarged) > 0
    pixels = np.array(picture)
    pixels[inside & ~ndimage.binary_erosion(inside)] = MASK
    return Image.fromarray(pixels)
