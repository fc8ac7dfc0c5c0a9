"""2D images: pictures, single DICOM images, slices of volumes and rows of MedMNIST files."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import error as struct_error
from typing import TYPE_CHECKING, Protocol

import numpy as np

from volseg.errors import ScanError
from volseg.image import Image2D, largest_of
from volseg.inputs import shorten
from volseg.io.dicom_frames import SUFFIXES as DICOM_SUFFIXES
from volseg.io.dicom_picture import MAX_PIXELS, read_picture
from volseg.io.formats import is_scan
from volseg.io.gzip_stream import COPY_AGAIN, opened_raw, refusal
from volseg.io.medmnist import SUFFIX as NPZ_SUFFIX
from volseg.io.medmnist import ImageArrays
from volseg.io.series import split_volume
from volseg.io.volumes import read_volume
from volseg.volume import AxisOrder, Geometry, Volume

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SUFFIXES = PICTURE_SUFFIXES + DICOM_SUFFIXES  # of files that hold one image
UNREAD_SUFFIXES = (".gif", ".webp", ".heic", ".avif", ".jp2", ".svg")  # of other pictures
READABLE = ", ".join((*SUFFIXES, NPZ_SUFFIX))  # for messages
PICTURES = ("PNG", "JPEG", "BMP", "TIFF")  # Pillow's names; other decoders stay shut
MAX_FILE_BYTES = 2**30
DECODING_ERRORS = (  # what Pillow raises on damaged files
    *(OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError),
    *(TypeError, AttributeError, RuntimeError, AssertionError, struct_error, zlib.error),
    Warning,
)


def read_image(path: Path | str, index: int | None = None) -> Image2D:
    """Read one 2D image.

    Args:
        path: PNG, JPEG, BMP, TIFF, a single DICOM image, a volume, or a MedMNIST `.npz`.
        index: of the image in a file that holds several, from 0: an axial slice of a volume,
            counted from the feet; a page of a TIFF; a row of a `.npz`, through train, val and test.
            A file of one image ignores it.

    Raises:
        ScanError: the file is missing, damaged, truncated, too large or of another type, or has no
            image of this index; `code` is the reason.
    """
    return ImageReader().read(Path(path), index)


class ImageReader:
    """Reads images; keeps the last file of several images, so that the next needs no new reading.

    Slices of a volume, and rows of a `.npz`, should be read one after another.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stack: _Stack | None = None

    def read(self, path: Path, index: int | None = None) -> Image2D:
        """Read one image, as `read_image` does.

        Raises:
            ScanError: as `read_image`.
        """
        opener = _stack_opener(path)
        if opener is None:
            return _read_single(path, index)
        if path != self._path or self._stack is None:
            self._path = self._stack = None  # frees the memory of the last one first
            self._stack = opener(path)
            self._path = path
        return self._stack.image(checked_index(index, len(self._stack), path))


def checked_index(index: int | None, n_images: int, path: Path) -> int:
    """Return the index of an image of a file, or refuse one that it lacks."""
    if n_images == 1:
        return 0
    if index is None:
        problem = f"holds {n_images} images, and none is named"
        fix = f"give an index from 0 to {n_images - 1}; a table names it in the column slice"
        raise refusal(path, "E_INDEX", problem, fix)
    if not 0 <= index < n_images:
        problem = f"holds {n_images} images, so there is no image {index}"
        raise refusal(path, "E_INDEX", problem, f"give an index from 0 to {n_images - 1}")
    return index


def is_image(path: Path) -> bool:
    """Check whether the name is that of a file with one 2D image."""
    return path.name.lower().endswith(SUFFIXES)


# ---- files that hold several images


class _Stack(Protocol):
    """A file in memory that holds several images."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image2D: ...


def _stack_opener(path: Path) -> Callable[[Path], _Stack] | None:
    if path.name.lower().endswith(NPZ_SUFFIX):
        return _Rows
    return _Slices if is_scan(split_volume(path)[0]) else None


class _Rows:
    """The rows of a MedMNIST file."""

    def __init__(self, path: Path) -> None:
        self._arrays = ImageArrays(path)

    def __len__(self) -> int:
        return len(self._arrays)

    def image(self, index: int) -> Image2D:
        row = self._arrays.row(index)
        if row.dtype.kind == "f" and not np.isfinite(row).all():
            problem = f"image {index} has pixels that are not finite"
            raise refusal(self._arrays.path, "E_NAN", problem, "replace NaN and infinity")
        array = row[None] if row.ndim == 2 else np.moveaxis(row, -1, 0)
        return Image2D(np.ascontiguousarray(array), largest_of(row.dtype))


class _Slices:
    """The axial slices of a volume, from the feet; of a single slice, whatever its plane, itself.

    As radiologists draw them: the patient's right at the left, anterior at the top.
    """

    def __init__(self, path: Path) -> None:
        self._volume = read_volume(path).canonical()
        self._through = through_axis(self._volume.geometry.shape)

    def __len__(self) -> int:
        return self._volume.geometry.shape[self._through]

    def image(self, index: int) -> Image2D:
        return slice_image(self._volume, self._through, index)


def through_axis(shape: tuple[int, int, int]) -> int:
    """Return the canonical axis along which slices follow: the axial one, unless another has one.

    >>> through_axis((256, 256, 20)), through_axis((256, 1, 256))
    (2, 1)
    """
    return shape.index(1) if 1 in shape and shape[2] != 1 else 2


def slice_image(volume: Volume, through: int, index: int) -> Image2D:
    """Return a slice of a canonical volume: the patient's right at the left, anterior at the top.

    Args:
        through: as `through_axis` says.
    """
    plane = volume.array[(slice(None),) * through + (index,)]  # (across, up)
    values = volume.intensities(plane)[::-1, ::-1].T
    if volume.is_scaled:
        values = values.astype(np.float32)
    across, up = (mm for axis, mm in enumerate(volume.geometry.spacing_mm) if axis != through)
    white = None if volume.is_scaled else largest_of(values.dtype)
    return Image2D(np.ascontiguousarray(values)[None], white, (up, across))


def stack_slices(slices: Mapping[int, np.ndarray], geometry: Geometry) -> Volume:
    """Return slices as a volume; undoes the reading of the axial slices of a volume.

    Args:
        slices: index from the feet → (H, W) float32, as `read_image` counts and turns the slices.
        geometry: of the volume, as stored.

    Returns:
        float32 on the same grid, NaN in slices that are not given.
    """
    order, stored = AxisOrder.of(geometry), np.full(geometry.shape, np.nan, np.float32)
    canonical = order.apply(stored)  # a view
    through = through_axis(geometry.canonical().shape)
    for index, values in slices.items():
        canonical[(slice(None),) * through + (index,)] = values.T[::-1, ::-1]
    return Volume(stored, geometry)


# ---- files that hold one image


def _read_single(path: Path, index: int | None) -> Image2D:
    content = _content_of(path)
    if content[128:132] == b"DICM":
        return read_picture(content, path)
    if path.name.lower().endswith(DICOM_SUFFIXES):
        problem = "is not a DICOM file: it lacks the letters DICM at byte 128"
        raise refusal(path, "E_NOTIMAGE", problem, "export it again as a DICOM Part 10 file")
    return _read_picture(content, path, index)


def _content_of(path: Path) -> bytes:
    with opened_raw(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size) if size <= MAX_FILE_BYTES else b""  # takes what it asks for
    if size > MAX_FILE_BYTES:
        problem = f"holds {size:,} bytes, above the limit of {MAX_FILE_BYTES:,}"
        raise refusal(path, "E_TOOBIG", problem, "give a smaller image")
    if not content:
        raise refusal(path, "E_EMPTY", "the file is empty", COPY_AGAIN)
    return content


def _read_picture(content: bytes, path: Path, index: int | None) -> Image2D:
    from PIL import ImageOps

    with _decoding(path):
        picture = _opened_picture(content, path)
        picture.seek(checked_index(index, _pages_in(picture), path))
        _refuse_large(picture.size, path)
        array = _array_of(ImageOps.exif_transpose(picture))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise refusal(path, "E_NAN", "has pixels that are not finite", "export the image again")
    return Image2D(array, largest_of(array.dtype))


def _opened_picture(content: bytes, path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(content), formats=PICTURES)
    except UnidentifiedImageError as error:
        problem = "is not a PNG, JPEG, BMP or TIFF image, or its first bytes are damaged"
        raise refusal(path, "E_NOTIMAGE", problem, "convert it to PNG") from error


def _pages_in(picture: Image) -> int:
    return getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How a picture is stored: pages, rows and columns, type, and whether it is in colour."""

    n_pages: int
    size: tuple[int, int]
    dtype: np.dtype
    is_colour: bool

    @property
    def text(self) -> str:
        return f"{self.size[0]}×{self.size[1]} pixels of {self.dtype}"


def page_layout(path: Path) -> PageLayout:
    """Return the layout of a picture from its header, without decoding it.

    Raises:
        ScanError: as `read_image`.
    """
    content = _content_of(path)
    with _decoding(path):
        picture = _opened_picture(content, path)
        _refuse_large(picture.size, path)
        n_pages, (width, height) = _pages_in(picture), picture.size
        is_colour = picture.mode not in GREY + TO_GREY
        dtype = GREY_TYPES.get(picture.mode, np.dtype(np.uint8))
    return PageLayout(n_pages, (height, width), dtype, is_colour)


def pages_of(path: Path) -> Iterator[np.ndarray]:
    """Yield the pages (H, W) of a grey picture, one of a PNG; each is decoded when asked for.

    Raises:
        ScanError: as `read_image`; a page is in colour (`E_RGB`).
    """
    from PIL import ImageOps

    content = _content_of(path)
    with _decoding(path):
        picture = _opened_picture(content, path)
        n_pages = _pages_in(picture)
    for number in range(n_pages):
        with _decoding(path):
            picture.seek(number)
            _refuse_large(picture.size, path)
            array = _array_of(ImageOps.exif_transpose(picture))
        if len(array) > 1 or picture.mode not in GREY + TO_GREY:
            raise refusal(path, "E_RGB", "is in colour", "store one grey value or label per pixel")
        yield array[0]


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what a decoder raises on a damaged file into the user's error."""
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on metadata, which is not used
            warnings.simplefilter("error", DecompressionBombWarning)
            yield
    except ScanError:
        raise
    except (DecompressionBombWarning, DecompressionBombError) as error:
        problem = f"has more pixels than {MAX_PIXELS:,}"
        raise refusal(path, "E_TOOBIG", problem, "give a smaller image") from error
    except MemoryError as error:
        problem = "needs more memory than there is to decode it"
        raise refusal(path, "E_TOOBIG", problem, "give a smaller image, or free memory") from error
    except DECODING_ERRORS as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 100)
        raise refusal(path, "E_DAMAGED", f"cannot be decoded ({reason})", COPY_AGAIN) from error


def _refuse_large(size: tuple[int, ...], path: Path) -> None:
    if np.prod(size, dtype=object) > MAX_PIXELS:
        problem = f"has {'×'.join(map(str, size))} pixels, more than {MAX_PIXELS:,}"
        raise refusal(path, "E_TOOBIG", problem, "give a smaller image")


GREY = ("L", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # modes whose pixels are numbers
TO_GREY = ("1", "LA", "La")
GREY_TYPES = {
    "I": np.dtype(np.int32),
    "F": np.dtype(np.float32),
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), np.dtype(np.uint16)),
}


def _array_of(picture: Image) -> np.ndarray:
    """Return (C, H, W); transparency is left out, and a palette of greys gives one channel."""
    if picture.mode in TO_GREY:
        picture = picture.convert("L")
    if picture.mode in GREY:
        array = np.asarray(picture)
        return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))[None]
    has_palette = picture.mode in ("P", "PA")
    array = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    if has_palette and (array == array[:1]).all():
        array = array[:1]
    return np.ascontiguousarray(array)
