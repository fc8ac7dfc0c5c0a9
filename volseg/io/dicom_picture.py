"""A single DICOM image, such as a radiograph, as readers see it; never decoded by GDCM."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from volseg.image import Image2D, largest_of
from volseg.inputs import shorten
from volseg.io.dicom_frames import (
    PixelFormat,
    Unusable,
    number_of,
    numbers_of,
    parse_image,
    require_pydicom,
    text_of,
)
from volseg.io.dicom_pixels import CODEC_FIX, PALETTE, codec_problem, decoded, stored_values
from volseg.io.gzip_stream import COPY_AGAIN, refusal

MAX_PIXELS = 2**26  # 8192 × 8192
INVERTED = "MONOCHROME1"  # low values are bright


def read_picture(content: bytes, path: Path) -> Image2D:
    """Read a single-frame image, rescaled to its modality's unit; bright is high.

    Raises:
        ScanError: it is damaged, too large, of several frames, or no image; `code` is the reason.
    """
    require_pydicom(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values that are not used
            header, pixels = parse_image(content)
            n_frames = int(number_of(header, "NumberOfFrames", 1))
            samples = int(number_of(header, "SamplesPerPixel", 1))
    except Unusable as error:
        problem = f"cannot be decoded as DICOM image ({shorten(str(error), 100)})"
        raise refusal(path, "E_DAMAGED", problem, COPY_AGAIN) from error
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        problem = f"has {pixels.shape[0]}×{pixels.shape[1]} pixels, more than {MAX_PIXELS:,}"
        raise refusal(path, "E_TOOBIG", problem, "give a smaller image")
    if n_frames > 1:
        raise refusal(path, "E_NDIM", f"holds {n_frames} frames", "give images of one frame each")
    problem = codec_problem(pixels.syntax)
    if problem is not None:
        raise refusal(path, "E_CODEC", problem, CODEC_FIX)
    if samples > 1 or text_of(header, "PhotometricInterpretation") == PALETTE:
        return _colour(content, pixels, header, path)
    return _grey(content, pixels, header, path)


def _colour(content: bytes, pixels: PixelFormat, header: Any, path: Path) -> Image2D:
    array = decoded(content, pixels, path, as_rgb=True)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype.kind != "u":
        raise refusal(path, "E_NDIM", f"has shape {array.shape}", "give a grey or RGB image")
    array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    return Image2D(array, largest_of(array.dtype), _spacing_of(header))


def _grey(content: bytes, pixels: PixelFormat, header: Any, path: Path) -> Image2D:
    stored = stored_values(content, pixels, path)
    low, high = _range_of(pixels)
    slope, intercept = (
        number_of(header, name, default)
        for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    values = stored if (slope, intercept) == (1, 0) else stored * slope + intercept
    low, high = sorted((low * slope + intercept, high * slope + intercept))
    if text_of(header, "PhotometricInterpretation") == INVERTED:
        values = (low + high - values.astype(np.float64)).astype(values.dtype)
    if values.dtype.kind == "f":
        is_whole = np.array_equal(values, np.rint(values)) and max(-low, high) < 2**31
        values = values.astype(np.int32 if is_whole else np.float32)
    is_unit = intercept != 0 or low < 0  # such as HU, where nothing is white
    array = np.ascontiguousarray(values)[None]
    return Image2D(array, None if is_unit else high, _spacing_of(header))


def _range_of(pixels: PixelFormat) -> tuple[float, float]:
    """Return the lowest and highest value that the stored bits can hold."""
    start = -(2 ** (pixels.bits_stored - 1)) if pixels.is_signed else 0
    return float(start), float(start + 2**pixels.bits_stored - 1)


def _spacing_of(header: Any) -> tuple[float, float] | None:
    """Return the mm between rows and columns, of the patient or at the detector."""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        numbers = numbers_of([header], name, 2)
        if numbers is not None and (numbers > 0).all():
            return float(numbers[0]), float(numbers[1])
    return None
