"""DICOM files that are no images, such as segmentations and contours: parse them whole, once."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping
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
from volseg.io.header import ScanWarning
from volseg.io.series import place_of
from volseg.io.text_header import shown
from volseg.words import format_list

DEFLATED = "1.2.840.10008.1.2.1.99"
FIX = "export the file again"
REPLACED = "W_NAME"
DATES = (
    *("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"),
    *("StructureSetDate", "InstanceCreationDate"),
)
MIN_SECRET = 3  # letters and digits of a name or id that is looked for in names of regions
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


def names_of(
    data: Any, items: Mapping[int, Any], keyword: str
) -> tuple[dict[int, str], list[ScanWarning]]:
    """Return number → name of regions, and a warning if some are replaced by `region 1`.

    Those are names that hold the patient's, an id or a date: names are part of all results.

    Args:
        data: of the file, which says who the patient is.
        items: number → the item that holds its name under `keyword`.
    """
    names = {number: _name_of(item, keyword) for number, item in items.items()}
    secrets, dates = _secrets_of(data), _dates_of(data)
    replaced = {
        number: f"region {number}"
        for number, name in names.items()
        if any(secret in _padded(name) for secret in secrets)
        or any(date in re.sub(r"\D", "", name) for date in dates)
    }
    if not replaced:
        return names, []
    text = f"named after the patient or a date: {format_list(list(replaced.values()), 5)}"
    return names | replaced, [ScanWarning(REPLACED, text)]


def _name_of(item: Any, keyword: str) -> str:
    """Return a name that is shown to users, in one line."""
    text = str(item.get(keyword) or "").replace("\0", " ")
    return shorten(" ".join(text.split()), MAX_NAME)


def _secrets_of(data: Any) -> list[str]:
    """Return the parts of the patient's name and the ids, as `_padded`; shorter ones are left out.

    A part ends at `^`, as in Miller^Ann, or at a space, but not at a hyphen: de-identified names
    such as Prostate-01 are of one part, so that a region may be called prostate.
    """
    texts = [*re.split(r"[\^=\s,]+", str(data.get("PatientName") or ""))]
    texts += [str(data.get(keyword) or "") for keyword in ("PatientID", "AccessionNumber")]
    padded = map(_padded, texts)
    return [text for text in padded if len(text) >= MIN_SECRET + 2]


def _dates_of(data: Any) -> list[str]:
    """Return the dates of the file, as eight digits."""
    dates = (re.sub(r"\D", "", str(data.get(keyword) or "")) for keyword in DATES)
    return [date for date in dates if len(date) == 8]


def _padded(text: str) -> str:
    """Return the words of a text in lower case, with a space before and after each."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "


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
