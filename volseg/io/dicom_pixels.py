"""The pixels of DICOM frames, decoded by a stated plug-in and never by GDCM."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np

from volseg.inputs import shorten
from volseg.io.codestream import size_of_stream
from volseg.io.dicom_frames import Frame, PixelFormat, rest_of
from volseg.io.gzip_stream import COPY_AGAIN, opened_raw, refusal

if TYPE_CHECKING:  # pydicom is an extra
    from pydicom import Dataset

LITTLE, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
IMPLICIT = "1.2.840.10008.1.2"
PLAIN: Mapping[str, Literal["<", ">"]] = MappingProxyType(  # byte order
    {IMPLICIT: "<", LITTLE: "<", BIG: ">"}
)
PALETTE = "PALETTE COLOR"
CODEC_FIX = (
    "pip install pylibjpeg-libjpeg (GPL) decodes JPEG; or decompress the files, for example with "
    "dcmdjpeg or gdcmconv --raw"
)
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG = "1.2.840.10008.1.2.4."
# Compressed transfer syntax → pydicom's plug-in, and the module that it needs. python-gdcm can
# abort the process (sizes that are odd, little memory), so it is never left to choose.
PLUGINS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "1.2.840.10008.1.2.5": ("pydicom", "pydicom"),  # RLE
        **{JPEG + end: ("pylibjpeg", "openjpeg") for end in ("90", "91", "201", "202", "203")},
        **{JPEG + end: ("pyjpegls", "jpeg_ls") for end in ("80", "81")},
        JPEG + "50": ("pillow", "PIL"),  # 8 bits
        **{JPEG + end: ("pylibjpeg", "libjpeg") for end in ("51", "57", "70")},
    }
)


def codec_problem(syntax: str) -> str | None:
    """Return why pixels of a transfer syntax cannot be decoded here; None if they can."""
    from pydicom.uid import UID

    if syntax in PLAIN or syntax == DEFLATED:
        return None
    if syntax not in PLUGINS:
        return f"its transfer syntax {shorten(syntax, 70)} has no decoder"
    _, module = PLUGINS[syntax]
    return None if find_spec(module) else f"its pixels are compressed as {UID(syntax).name}"


def stored_dtype(pixels: PixelFormat) -> np.dtype:
    """Return the dtype of the stored values, in native byte order.

    Raises:
        ValueError: they are neither whole bytes nor at most 32 bits.
    """
    if pixels.bits_allocated not in (8, 16, 32):
        raise ValueError(f"stores {pixels.bits_allocated} bits a pixel")
    return np.dtype(f"{'i' if pixels.is_signed else 'u'}{pixels.bits_allocated // 8}")


def have_equal_pixels(frames: Sequence[Frame]) -> bool:
    """Check whether frames of one place are copies: files whose pixels are equal byte by byte.

    Raises:
        ScanError: a file cannot be opened.
    """
    digests = set[bytes]()
    for frame in frames:
        with opened_raw(frame.path) as file:
            file.seek(frame.pixels.offset or 0)
            digests.add(hashlib.sha256(rest_of(file)).digest())
    return len(digests) == 1 and len({frame.path for frame in frames}) == len(frames)


def stored_values(
    content: bytes, pixels: PixelFormat, path: Path, *, number: int = 0
) -> np.ndarray:
    """Return the stored (rows, columns) of a frame of a file, without the unused bits.

    Args:
        content: of the file. path: its name, for messages.

    Raises:
        ScanError: pixels are missing (`E_TRUNCATED`) or damaged (`E_DAMAGED`).
    """
    if pixels.syntax in PLAIN and pixels.offset is not None:
        array = _plain(content, pixels, path, number)
    else:
        array = decoded(content, pixels, path, number=number)
    if array.shape != pixels.shape:
        text = f"holds {array.shape} pixels, and its header says {pixels.shape}"
        raise refusal(path, "E_DAMAGED", text, COPY_AGAIN)
    return _without_unused_bits(array, pixels)


def _plain(content: bytes, pixels: PixelFormat, path: Path, number: int) -> np.ndarray:
    """Return the pixels of a frame that are stored one after another."""
    assert pixels.offset is not None
    dtype = stored_dtype(pixels).newbyteorder(PLAIN[pixels.syntax])
    # Tag, type and length of the element: 8 bytes without a type, else 12.
    start = pixels.offset + (8 if pixels.syntax == IMPLICIT else 12)
    n = pixels.shape[0] * pixels.shape[1]
    start += number * n * dtype.itemsize
    if start + n * dtype.itemsize > len(content):
        n_bytes = max(0, len(content) - start)
        text = f"holds {n_bytes:,} of {n * dtype.itemsize:,} bytes of pixels"
        raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
    return np.frombuffer(content, dtype, n, start).reshape(pixels.shape)


def decoded(
    content: bytes, pixels: PixelFormat, path: Path, *, number: int = 0, as_rgb: bool = False
) -> np.ndarray:
    """Return the decoded pixels of a frame; colours as RGB (rows, columns, 3).

    Raises:
        ScanError: they are damaged.
    """
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, pixel_array

    plugin, _ = PLUGINS.get(pixels.syntax, ("", ""))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = dcmread(io.BytesIO(content))
            _check_stream(whole, pixels, number)
            array = pixel_array(whole, index=number, raw=not as_rgb, decoding_plugin=plugin)
            if as_rgb and whole.PhotometricInterpretation == PALETTE:
                array = apply_color_lut(array, whole)
    except Exception as error:  # decoders raise many types on damaged pixels
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 100)
        raise refusal(path, "E_DAMAGED", f"cannot be decoded ({reason})", COPY_AGAIN) from error
    return array


def _check_stream(whole: Dataset, pixels: PixelFormat, number: int) -> None:
    """Compare a compressed frame with the header: decoders take memory for what the frame says."""
    from pydicom.encaps import get_frame

    if not pixels.syntax.startswith(JPEG):
        return
    n_frames = int(whole.get("NumberOfFrames") or 1)
    size = size_of_stream(get_frame(whole.PixelData, number, number_of_frames=n_frames))
    if size is None:
        raise ValueError("a compressed frame has no header")
    shape, n = (size.rows, size.columns), whole.SamplesPerPixel
    if (shape, size.components) != (pixels.shape, n):
        raise ValueError(
            f"compressed as {shape} pixels of {size.components} samples, and the header says "
            f"{pixels.shape} of {n}"
        )


def _without_unused_bits(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Return the stored bits alone: old files keep overlays in the bits above them."""
    dtype = stored_dtype(pixels)
    array = array.astype(dtype, copy=False)
    above = pixels.bits_allocated - 1 - pixels.high_bit
    unused = pixels.bits_allocated - pixels.bits_stored
    if unused == 0:
        return array
    # Shifts of signed numbers keep the sign.
    return np.right_shift(np.left_shift(array, above), unused)
