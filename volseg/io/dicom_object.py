"""DICOM files that are no images, such as segmentations and contours: parse them whole, once."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from volseg.inputs import MAX_NAME, label_value, shorten
from volseg.io.dicom_frames import (
    START_BYTES,
    Unusable,
    reason_of,
    refuse_bomb,
    require_pydicom,
    rest_of,
)
from volseg.io.gzip_stream import COPY_AGAIN, opened_raw, refusal
from volseg.io.series import place_of
from volseg.io.text_header import shown
from volseg.words import format_list

DEFLATED = "1.2.840.10008.1.2.1.99"
FIX = "export the file again"
MAX_KEPT = 8  # files whose headers are kept: a mask is checked, planned and read


@dataclass(frozen=True, slots=True, eq=False)
class DicomObject:
    """A parsed file, without its pixels.

    Args:
        data: all elements before the pixels.
        syntax: UID of the transfer syntax.
        offset: byte of the element with the pixels; None if the file is deflated.
    """

    path: Path
    data: Any
    syntax: str
    offset: int | None

    @property
    def sop_class(self) -> str:
        return str(self.data.get("SOPClassUID", ""))


def read_object(path: Path) -> DicomObject:
    """Parse a DICOM file; it is parsed once while it does not change.

    Raises:
        ScanError: it cannot be opened or parsed.
    """
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return _read_object(path, 0, 0)  # opening it says why
    return _read_object(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=MAX_KEPT)
def _read_object(path: Path, n_bytes: int, changed_ns: int) -> DicomObject:
    """Return what `read_object` does for a file of this size and time."""
    with opened_raw(path) as file:
        content = rest_of(file)
    require_pydicom(path)
    from pydicom import dcmread

    stream = io.BytesIO(content)
    try:
        if DEFLATED.encode() in content[:START_BYTES]:
            refuse_bomb(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values that are not used
            data = dcmread(stream, stop_before_pixels=True)
            syntax = str(data.file_meta.TransferSyntaxUID)
    except Unusable as error:
        code, _, text = str(error).partition(": ")
        raise refusal(path, code, text, FIX) from error
    except Exception as error:  # pydicom raises many types on damaged files
        raise refusal(path, "E_DAMAGED", reason_of(error), COPY_AGAIN) from error
    return DicomObject(path, data, syntax, None if syntax == DEFLATED else stream.tell())


def items_of(item: Any, name: str) -> list[Any]:
    """Return the items of a sequence; none if it is absent or empty."""
    return list(item.get(name) or [])


def name_of(item: Any, keyword: str) -> str:
    """Return a name that is shown to users, in one line."""
    text = str(item.get(keyword) or "").replace("\0", " ")
    return shorten(" ".join(text.split()), MAX_NAME)


def choose_segments(names: dict[int, str], choice: str | None, path: Path, what: str) -> list[int]:
    """Return the labels of the segments that a path names; all if it names none.

    Args:
        names: label → name. what: `segment` or `ROI`, for messages.

    Raises:
        ScanError: a name or number is not one of them, or stands for several (`E_LABELS`).
    """
    if choice is None:
        return list(names)
    if choice in names.values():
        return [_one_segment(names, choice, path, what)]
    parts = [part.strip() for part in choice.split(",") if part.strip()]
    return list(dict.fromkeys(_one_segment(names, part, path, what) for part in parts))


def _one_segment(names: dict[int, str], part: str, path: Path, what: str) -> int:
    labels = [label for label, name in names.items() if name == part]
    if not labels and label_value(part) in names:
        labels = [label for label in names if label == label_value(part)]
    if len(labels) == 1:
        return labels[0]
    listed = format_list([f"{label} {shown(name)}" for label, name in names.items()], 10)
    problem = f"has {len(labels) or 'no'} {what}{'s' * bool(labels)} {shown(part)}; it has {listed}"
    fix = f"choose by name or number, such as {place_of(path).name}#{min(names, default=1)}"
    raise refusal(path, "E_LABELS", problem, fix)


def overlap_fix(path: Path, names: dict[int, str], numbers: tuple[int, int]) -> str:
    """Return how to take segments that do not overlap."""
    name = names[numbers[0]]
    part = name if name and "/" not in name and "," not in name else str(numbers[0])
    return f"choose those that do not, for example {place_of(path).name}#{part}"
