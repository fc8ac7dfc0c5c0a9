"""DICOM files: where each frame lies in the patient, and how its pixels are stored; no pixels."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from volseg.errors import ScanError
from volseg.inputs import shorten
from volseg.io.gzip_stream import CHUNK_BYTES, opened_raw, refusal

SUFFIXES = (".dcm", ".dicom", ".ima")
LOOKED_AT = 100  # files of a folder until it is taken for one without DICOM
PREAMBLE = 128  # bytes before the letters DICM
START_BYTES = 2**16  # most headers are shorter; the rest of a file is read only if needed
MAX_FILE_BYTES = 2**32
MAX_INFLATED_BYTES = 2**30  # of a deflated file, which holds a slice or a series
MAX_FRAMES = 100_000  # of a file
MAX_EDGE = 2**16  # pixels; DICOM stores the number in 16 bits
MAX_SKEW = 1e-3  # of the axes of a slice from right angles and length 1
IMAGES = (  # SOP classes of slices: CT, MR and PET, also enhanced
    *("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"),
    *("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"),
    *("1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.130"),
)
NO_IMAGES = ("SEG", "RTDOSE", "RWV", "PR")  # although some have rows and columns
SLICED = ("CT", "MR", "PT")  # modalities whose images are slices
LOCALIZER, MOSAIC = "LOCALIZER", "MOSAIC"
# What is read of a header: nothing that names a person, but the series' own description.
TAGS: Mapping[str, int] = MappingProxyType(
    {
        "ImageType": 0x0008_0008,
        "SOPClassUID": 0x0008_0016,
        "Modality": 0x0008_0060,
        "SeriesDescription": 0x0008_103E,
        "FrameType": 0x0008_9007,
        "SliceThickness": 0x0018_0050,
        "EchoTime": 0x0018_0081,
        "ImagerPixelSpacing": 0x0018_1164,
        "EffectiveEchoTime": 0x0018_9082,
        "SeriesInstanceUID": 0x0020_000E,
        "ImagePositionPatient": 0x0020_0032,
        "ImageOrientationPatient": 0x0020_0037,
        "FrameOfReferenceUID": 0x0020_0052,
        "SamplesPerPixel": 0x0028_0002,
        "PhotometricInterpretation": 0x0028_0004,
        "NumberOfFrames": 0x0028_0008,
        "Rows": 0x0028_0010,
        "Columns": 0x0028_0011,
        "PixelSpacing": 0x0028_0030,
        "BitsAllocated": 0x0028_0100,
        "BitsStored": 0x0028_0101,
        "HighBit": 0x0028_0102,
        "PixelRepresentation": 0x0028_0103,
        "RescaleIntercept": 0x0028_1052,
        "RescaleSlope": 0x0028_1053,
        "ModalityLUTSequence": 0x0028_3000,
        "SharedFunctionalGroupsSequence": 0x5200_9229,
        "PerFrameFunctionalGroupsSequence": 0x5200_9230,
    }
)
SHORTS = (  # stored as numbers of 16 bits
    *("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    "PixelRepresentation",
)
DOUBLES = ("EffectiveEchoTime",)  # stored as numbers of 64 bits; all others are text


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """How the pixels of a file are stored.

    Args:
        syntax: UID of the transfer syntax.
        shape: (rows, columns). offset: byte of the element with the pixels in the file; None if
            it is not known, because the file is deflated.
        digest: of the header before it, by which a replaced file is known.
        high_bit: the highest of the `bits_stored` in `bits_allocated`.
    """

    syntax: str
    shape: tuple[int, int]
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    offset: int | None
    digest: str

    def is_of(self, content: bytes) -> bool:
        """Check whether a file still has the header that was read."""
        return self.digest == _digest(content, self.offset)


def _digest(content: bytes, offset: int | None) -> str:
    return hashlib.sha256(content[: START_BYTES if offset is None else offset]).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """A slice, and the file that holds it.

    Args:
        number: of the frame in its file, from 0.
        series, modality, description: of its series.
        frame_of_reference: UID of the space in which positions are given; empty if unknown.
        position_mm: (3,) centre of the first pixel. axes: (2, 3) unit vectors along a row (to the
            next column) and along a column (to the next row). Both in DICOM's LPS axes.
        spacing_mm: between rows, and between columns.
        slope, intercept: intensity = stored value × slope + intercept.
        kind: image type and echo time; frames of several kinds are several volumes.
    """

    path: Path
    number: int
    series: str
    modality: str
    description: str
    frame_of_reference: str
    position_mm: np.ndarray
    axes: np.ndarray
    spacing_mm: tuple[float, float]
    thickness_mm: float | None
    slope: float
    intercept: float
    kind: str
    pixels: PixelFormat


@dataclass(frozen=True, slots=True)
class Skipped:
    """A DICOM file without a slice of a volume, and why.

    Args:
        stack: UID of the series if it is of a modality that takes slices; else empty.
    """

    path: Path
    reason: str
    stack: str = ""


class Unusable(Exception):
    """A file or frame cannot be used; the text is the reason."""


def rest_of(file: io.RawIOBase) -> bytes:
    """Return what follows in a file; a size to read takes memory even where the file is shorter."""
    return file.read(min(MAX_FILE_BYTES, os.fstat(file.fileno()).st_size)) or b""


def is_dicom(path: Path) -> bool:
    """Check whether a file starts as DICOM does."""
    try:
        with opened_raw(path) as file:
            return file.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    except ScanError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Check whether one of the first files of a folder, or of those below, is DICOM."""
    return any(map(is_dicom, islice(_files_below(folder), LOOKED_AT)))


def holds_slices(folder: Path, *, leave_out: Callable[[Path], bool]) -> bool:
    """Check whether one of the first files of a folder, or of those below, is a DICOM image.

    Args:
        leave_out: tells by its name that a file is none.
    """
    paths = (path for path in _files_below(folder) if not leave_out(path))
    return any(is_dicom(path) and _is_image(path) for path in islice(paths, LOOKED_AT))


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(names))


def _is_image(path: Path) -> bool:
    try:
        return isinstance(read_frames(path), list)
    except ScanError:
        return False


def read_frames(path: Path) -> list[Frame] | Skipped | None:
    """Return the frames of a DICOM file, or why it holds none; None if it is not DICOM.

    Raises:
        ScanError: the file cannot be opened.
    """
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return _read_frames(path, 0, 0)  # opening it says why
    return _read_frames(path, state.st_size, state.st_mtime_ns)


# A series is listed, checked and read: its headers are parsed once.
@lru_cache(maxsize=10_000)
def _read_frames(path: Path, n_bytes: int, changed_ns: int) -> list[Frame] | Skipped | None:
    """Return what `read_frames` does for a file of this size and time."""
    with opened_raw(path) as file:
        start = file.read(START_BYTES)
        if start[PREAMBLE : PREAMBLE + 4] != b"DICM":
            return None
        require_pydicom(path)
        header: Any = None
        try:
            try:
                header, offset = _parse(start, is_whole=len(start) < START_BYTES)
            except Unusable:
                if len(start) < START_BYTES:
                    raise
                start += rest_of(file)  # the header is longer
                header, offset = _parse(start, is_whole=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on values that are not used
                pixels = _image_format(header, offset, _digest(start, offset))
                return _frames_of(header, pixels, path)
        except Unusable as error:
            return Skipped(path, str(error), _stack_of(header))
        except Exception as error:  # pydicom converts a value when it is asked for
            return Skipped(path, f"E_DAMAGED: {reason_of(error)}")


def _stack_of(header: Any) -> str:
    if header is None or text_of(header, "Modality") not in SLICED:
        return ""
    return text_of(header, "SeriesInstanceUID")


def parse_image(content: bytes) -> tuple[Any, PixelFormat]:
    """Return the header of an image, and how its pixels are stored, from the whole file.

    Raises:
        Unusable: it cannot be parsed, or is no image.
    """
    try:
        header, offset = _parse(content, is_whole=True)
        return header, _image_format(header, offset, _digest(content, offset))
    except Unusable:
        raise
    except Exception as error:  # pydicom converts a value when it is asked for
        raise Unusable(f"E_DAMAGED: {reason_of(error)}") from error


def number_of(header: Any, name: str, default: float) -> float:
    """Return a finite number of the header, or the default."""
    values = numbers_of([header], name, 1)
    return default if values is None else float(values[0])


def require_pydicom(path: Path) -> None:
    if find_spec("pydicom") is None:
        problem = "is DICOM, and pydicom is not installed"
        raise refusal(path, "E_BACKEND", problem, "pip install 'volseg[dicom]'")


def _frames_of(header: Any, pixels: PixelFormat, path: Path) -> list[Frame]:
    _refuse_kinds(header)
    n = _whole(header, "NumberOfFrames", 1, 1, MAX_FRAMES)
    common = {
        "path": path,
        "series": text_of(header, "SeriesInstanceUID"),
        "modality": text_of(header, "Modality"),
        "description": text_of(header, "SeriesDescription"),
        "frame_of_reference": text_of(header, "FrameOfReferenceUID"),
        "pixels": pixels,
    }
    if "PerFrameFunctionalGroupsSequence" in header:
        return list(enhanced_frames(header, n, common))
    if n > 1:
        raise Unusable(f"E_NOGEOM: {n} frames, no functional groups")
    return [Frame(number=0, **_place([header]), **common)]


def _parse(content: bytes, *, is_whole: bool) -> tuple[Any, int | None]:
    """Return the header, and the byte at which the element with the pixels starts.

    Raises:
        Unusable: it cannot be parsed, or the content is not the whole file and ends within it.
    """
    from pydicom import dcmread
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if is_whole and DeflatedExplicitVRLittleEndian.encode() in content[:START_BYTES]:
        refuse_bomb(content)
    file = io.BytesIO(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values that are not used
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS.values()))
            syntax = str(header.file_meta.TransferSyntaxUID)
            offset = file.tell()
            if syntax == DeflatedExplicitVRLittleEndian:
                return header, None
            if offset >= len(content) and not is_whole:
                raise Unusable("E_TRUNCATED: the header ends too early")
    except Unusable:
        raise
    except EOFError as error:
        raise Unusable("E_TRUNCATED: the header ends too early") from error
    except Exception as error:  # pydicom raises many types on damaged headers
        raise Unusable(f"E_DAMAGED: {reason_of(error)}") from error
    return header, offset


def refuse_bomb(content: bytes) -> None:
    """Refuse a deflated file that grows beyond all images, before pydicom inflates it.

    Raises:
        Unusable: it does.
    """
    # The length of the part that is not deflated is in its first element (PS3.10 7.1).
    start = PREAMBLE + 16 + int.from_bytes(content[PREAMBLE + 12 : PREAMBLE + 16], "little")
    inflate, packed, n_bytes = zlib.decompressobj(-zlib.MAX_WBITS), content[start:], 0
    while packed and not inflate.eof:
        n_bytes += len(inflate.decompress(packed, CHUNK_BYTES))
        packed = inflate.unconsumed_tail
        if n_bytes > MAX_INFLATED_BYTES:
            raise Unusable(f"E_BOMB: grows to more than {MAX_INFLATED_BYTES:,} bytes")


def reason_of(error: BaseException) -> str:
    """Return the text of an error in one line."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, 100)


def _refuse_others(header: Any) -> None:
    """Refuse what is no image."""
    if not text_of(header, "SOPClassUID"):
        raise Unusable("not an image")
    modality = text_of(header, "Modality") or "unknown"
    has_size = _values(header, "Rows") and _values(header, "Columns")
    if not has_size and text_of(header, "SOPClassUID") in IMAGES:
        raise Unusable("E_TRUNCATED: the header ends before the size of the image")
    if not has_size or modality in NO_IMAGES:
        raise Unusable(f"not an image: {modality}")


def _refuse_kinds(header: Any) -> None:
    """Refuse images that are no slices, by their type."""
    types = _words(header, "ImageType")
    if LOCALIZER in types:
        raise Unusable("localizer")
    if MOSAIC in types:
        raise Unusable(
            "E_MOSAIC: all slices in one picture; export the series as enhanced DICOM, or convert "
            "it with dcm2niix"
        )
    samples = _whole(header, "SamplesPerPixel", 1, 1, 4)
    if samples != 1 or text_of(header, "PhotometricInterpretation") == "PALETTE COLOR":
        raise Unusable("E_RGB: colours, not intensities")
    if header.get("ModalityLUTSequence"):
        raise Unusable("E_SCALE: intensities are in a lookup table; export the series again")


def _image_format(header: Any, offset: int | None, digest: str) -> PixelFormat:
    _refuse_others(header)
    return pixel_format(header, offset, digest)


def pixel_format(header: Any, offset: int | None, digest: str) -> PixelFormat:
    """Return how the pixels of a file are stored.

    Raises:
        Unusable: its header does not say so.
    """
    allocated = _whole(header, "BitsAllocated", 16, 1, 64)
    stored = _whole(header, "BitsStored", allocated, 1, allocated)
    return PixelFormat(
        syntax=str(header.file_meta.TransferSyntaxUID),
        shape=(_whole(header, "Rows", 0, 1, MAX_EDGE), _whole(header, "Columns", 0, 1, MAX_EDGE)),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=_whole(header, "HighBit", stored - 1, stored - 1, allocated - 1),
        is_signed=bool(_whole(header, "PixelRepresentation", 0, 0, 1)),
        offset=offset,
        digest=digest,
    )


# ---- the place of a frame


def enhanced_frames(header: Any, n: int, common: dict[str, Any]) -> Iterator[Frame]:
    """Yield the frames of an enhanced file, each described by its own and the shared groups.

    Args:
        n: number of frames. common: the fields that they share.

    Raises:
        Unusable: the place of a frame is missing or impossible.
    """
    items_of = list(header.PerFrameFunctionalGroupsSequence)
    if len(items_of) != n:
        raise Unusable(f"E_NOGEOM: {n} frames, and {len(items_of)} of them are described")
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])[:1]
    for number, groups in enumerate(items_of):
        items = [*_items_in(groups), *(item for group in shared for item in _items_in(group))]
        yield Frame(number=number, **_place([*items, header]), **common)


def _items_in(groups: Any) -> Iterator[Any]:
    """Yield the items of the sequences of a functional group."""
    for element in groups:
        if element.VR == "SQ" and element.value and not element.tag.is_private:
            yield element.value[0]


def _place(sources: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of a frame from the first of several data sets that has each of them."""
    axes = _required(sources, "ImageOrientationPatient", 6).reshape(2, 3)
    spacing = _required(sources, "PixelSpacing", 2)
    if np.abs(axes @ axes.T - np.eye(2)).max() > MAX_SKEW:
        raise Unusable("E_GEOM: its rows and columns are not at right angles")
    if not (spacing > 0).all():
        raise Unusable(f"E_SPACING: pixel spacing is {spacing[0]:g} × {spacing[1]:g} mm")
    slope = _first(sources, "RescaleSlope")
    if slope == 0:
        raise Unusable("E_SCALE: RescaleSlope is 0")
    return {
        "position_mm": _required(sources, "ImagePositionPatient", 3),
        "axes": axes / np.linalg.norm(axes, axis=1, keepdims=True),
        "spacing_mm": (float(spacing[0]), float(spacing[1])),
        "thickness_mm": _first(sources, "SliceThickness"),
        "slope": 1.0 if slope is None else slope,
        "intercept": _first(sources, "RescaleIntercept") or 0.0,
        "kind": _kind(sources),
    }


def _required(sources: Sequence[Any], name: str, n: int) -> np.ndarray:
    numbers = numbers_of(sources, name, n)
    if numbers is None:
        raise Unusable(f"E_NOGEOM: has no usable {name}")
    return numbers


def _first(sources: Sequence[Any], name: str) -> float | None:
    numbers = numbers_of(sources, name, 1)
    return None if numbers is None else float(numbers[0])


def _kind(sources: Sequence[Any]) -> str:
    """Return image type and echo time."""
    types = next((words for item in sources if (words := _types_of(item))), [])
    echo = _first(sources, "EffectiveEchoTime")
    echo = _first(sources, "EchoTime") if echo is None else echo
    return "/".join(types) + ("" if echo is None else f" TE {echo:g}")


def _types_of(item: Any) -> list[str]:
    return _words(item, "FrameType") or _words(item, "ImageType")


# ---- values of a header, which may be anything


def _values(item: Any, name: str) -> list[Any]:
    """Return the values of an element: texts or numbers; none if it is absent or empty.

    pydicom's own conversion, which knows all elements, takes most of the time of a header.
    """
    try:
        element = item.get_item(TAGS[name])
    except NotImplementedError:  # an empty value of an unknown type
        return []
    if element is None or element.value is None or element.value == "":
        return []
    stored = element.value
    if isinstance(stored, bytes):
        return _unpacked(stored, name, is_little_endian=element.is_little_endian)
    is_one = isinstance(stored, str) or not hasattr(stored, "__len__")
    return [stored] if is_one else list(stored)  # converted before


def _unpacked(stored: bytes, name: str, *, is_little_endian: bool) -> list[Any]:
    if name in SHORTS or name in DOUBLES:
        size, kind = (2, "H") if name in SHORTS else (8, "d")
        order = "<" if is_little_endian else ">"
        return list(struct.unpack(f"{order}{len(stored) // size}{kind}", stored))
    words = (word.strip(" \0") for word in stored.decode("latin-1").split("\\"))
    return [word for word in words if word]


def text_of(header: Any, name: str) -> str:
    values = _values(header, name)
    return str(values[0]).strip() if values else ""


def _words(header: Any, name: str) -> list[str]:
    return list(map(str, _values(header, name)))


def _whole(header: Any, name: str, default: int, low: int, high: int) -> int:
    """Return a whole number of the header.

    Raises:
        Unusable: it is none, or not from `low` to `high`.
    """
    values = _values(header, name)
    try:
        number = int(values[0]) if values else default
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable(f"E_HEADER: {name} is {shorten(str(values[0]))!r}") from error
    if not low <= number <= high:
        raise Unusable(f"E_HEADER: {name} is {number}, not {low} to {high}")
    return number


def numbers_of(sources: Sequence[Any], name: str, n: int) -> np.ndarray | None:
    """Return `n` finite numbers (n,) from the first data set that has them; None if none has."""
    values = next((values for item in sources if (values := _values(item, name))), [])
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    is_usable = len(numbers) == n and all(map(math.isfinite, numbers))
    return np.array(numbers) if is_usable else None
