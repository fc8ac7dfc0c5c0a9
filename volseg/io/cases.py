"""Find the cases of a data set: CSV files, folders, nnU-Net and Medical Decathlon layouts.

This module handles paths only and opens no scan. It reports all mistakes of a data set at once.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from volseg.errors import VolsegError
from volseg.inputs import (
    MAX_NAME,
    MAX_TEXT_BYTES,
    NotAFileError,
    kind_of,
    label_value,
    parse_json,
    read_bytes,
    shorten,
)
from volseg.io.csv_text import csv_rows
from volseg.io.nifti_header import SUFFIXES, stem_of

ONE_CHANNEL = "image"  # name of an unnamed single channel
IGNORE = "ignore"  # nnU-Net's label of voxels excluded from training and evaluation
MAX_LISTED = 10  # mistakes listed in one message
# Valid file and folder names on every system: Windows reserves device names, whatever the suffix,
# and drops a trailing dot.
_DEVICES = r"(?i:con|prn|aux|nul|conin|conout|com[0-9]|lpt[0-9])"
ID_PATTERN = rf"(?!{_DEVICES}(?:\.|\Z))[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,126}}[A-Za-z0-9_-])?"

Anything = TypeVar("Anything")


@dataclass(frozen=True, slots=True)
class Case:
    """The files of one scan.

    Args:
        id: name of the outputs; matches `ID_PATTERN`.
        images: channel → file.
        reference: the reference mask, or None.
        split: such as train, val or test; None if the data set does not state one.
        patient: no patient is in two splits; None if unknown.
        classes: the other columns of the CSV, such as `malignancy`, without empty cells.
    """

    id: str
    images: dict[str, Path]
    reference: Path | None = None
    split: str | None = None
    patient: str | None = None
    classes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(ID_PATTERN, self.id):
            raise ValueError(f"{self.id!r} is not a valid case id")


def find_cases(
    dataset: Path, channels: Sequence[str] | None = (ONE_CHANNEL,), *, allow_missing: bool = False
) -> list[Case]:
    """Return the cases of a data set in its own order.

    Args:
        dataset: a CSV file; or a folder with `cases.csv`, with `images/` and optionally `labels/`
            of equal file names, with an nnU-Net raw or Decathlon `dataset.json`, or with scans.
        channels: channels of the recipe; `image` stands for a single channel of any name, None for
            all channels.
        allow_missing: a case may lack any channel but the first; `images` then omits it.

    Raises:
        VolsegError: unknown layout, missing channel or file, invalid or repeated id, or a patient
            in two splits. One error lists all mistakes.
    """
    mistakes: list[str] = []
    rows = _rows_of(Path(dataset), _Requested(channels, allow_missing), mistakes)
    return _checked(rows, mistakes, str(dataset))


def survey_cases(
    dataset: Path, channels: Sequence[str] | None = None, *, allow_missing: bool = False
) -> tuple[list[Case], list[str]]:
    """Return the cases whose files all exist, and every mistake of the data set."""
    mistakes: list[str] = []
    rows = _rows_of(dataset, _Requested(channels, allow_missing), mistakes)
    if not rows and not mistakes:
        mistakes.append(f"no scans found; they end in {', '.join(SUFFIXES)}")
    mistakes += _mistakes(rows)
    valid = [row for row in rows if not _id_mistakes([row]) and not _file_mistakes([row])]
    return [_case(row) for row in valid], mistakes


def find_scans(
    inputs: Sequence[Path],
    channels: Sequence[str] | None = (ONE_CHANNEL,),
    *,
    allow_missing: bool = False,
) -> list[Case]:
    """Return the cases to segment, from scans, folders of scans, CSV files and data sets.

    Hidden files, among them the `._*` of macOS, are skipped.

    Raises:
        VolsegError: as `find_cases`; also for a single scan where several channels are required.
    """
    mistakes: list[str] = []
    rows: list[_Row] = []
    for path in map(Path, inputs):
        if os.path.isdir(path) or path.suffix.lower() == ".csv":
            rows += _rows_of(path, _Requested(channels, allow_missing), mistakes)
        else:
            channel = _picked({ONE_CHANNEL: path}, _Requested(channels), str(path))
            rows.append(_Row(where=str(path), id=_safe_id(stem_of(path)), images=channel))
    return _checked(rows, mistakes, ", ".join(map(str, inputs)))


def stated_labels(dataset: Path) -> dict[str, int]:
    """Return name → value of the labels in `dataset.json`, without background; {} if none.

    Regions, which are lists of values, are left out. nnU-Net labels unannotated voxels `ignore`.
    """
    return {name: value for name, value in _named_values(_stated(dataset, "labels")) if value}


def _named_values(labels: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, value) of each label that is not a region."""
    for key, entry in labels.items():
        # The Decathlon maps values to names.
        name, value = (entry, key) if str(key).isdecimal() else (key, entry)
        number = label_value(str(value))
        if number is not None:
            yield str(name), number


def stated_regions(dataset: Path) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Return nnU-Net's overlapping regions: name → mask values, and the value written for each."""
    description = _description(dataset)
    order = description.get("regions_class_order")
    if not isinstance(order, list):
        return {}, ()
    for mistake in _description_mistakes(description):
        raise VolsegError(f"{dataset}: {mistake}", fix="correct dataset.json", code="E_DATASET")
    regions = {
        name: tuple(map(int, values if isinstance(values, list) else [values]))
        for name, values in description["labels"].items()
        if values != 0 and name != IGNORE
    }
    return regions, tuple(map(int, order))


def _description_mistakes(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mistakes in the labels, regions and channels of a `dataset.json`."""
    for key in ("labels", "channel_names", "modality"):
        entries = description.get(key, {})
        if not isinstance(entries, dict):
            text = shorten(json.dumps(entries))
            yield f"dataset.json: {key!r} is {text}, not an object of names"
            continue
        is_labels = key == "labels"
        for name, value in entries.items():
            is_region = is_labels and isinstance(value, list) and bool(value)
            single = name if is_labels and str(name).isdecimal() else value
            values = value if is_region else [single]
            is_valid = all(map(_is_label_value, values)) if is_labels else isinstance(value, str)
            is_short = len(str(name)) <= MAX_NAME and (is_region or len(str(value)) <= MAX_NAME)
            if not is_valid or not is_short:
                text = f"{json.dumps(shorten(name))}: {shorten(json.dumps(value))}"
                expected = "a whole number, or a list of them" if is_labels else "a name"
                yield f"dataset.json: {key} holds {text}, where {expected} is expected"
    labels = description.get("labels")
    pairs = list(_named_values(labels)) if isinstance(labels, dict) else []
    for n_used in (Counter(name for name, _ in pairs), Counter(value for _, value in pairs)):
        for part in (part for part, n in n_used.items() if n > 1):
            yield f"dataset.json: labels has {shorten(repr(part))} twice"
    order = description.get("regions_class_order")
    if order is None:
        return
    if not (isinstance(order, list) and order and all(map(_is_label_value, order))):
        text = shorten(json.dumps(order))
        yield f"dataset.json: regions_class_order is {text}, not a list of whole numbers"
    elif not isinstance(description.get("labels"), dict):
        yield "dataset.json: regions_class_order is given without labels"


def _is_label_value(value: Any) -> bool:
    """Check whether this is a mask value; the Decathlon writes it as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return 0 <= value < 2**32
    return isinstance(value, str) and value.isdecimal() and len(value) < 10


def stated_modalities(dataset: Path) -> dict[str, str]:
    """Return channel → modality, such as CT, from `dataset.json`; {} if it states none."""
    channels = _stated(dataset, "channel_names") or _stated(dataset, "modality")
    names = [str(name) for name in channels.values()]
    return {ONE_CHANNEL: names[0]} | {name: name for name in names} if names else {}


def _stated(dataset: Path, key: str) -> dict[str, Any]:
    stated = _description(dataset).get(key)
    return stated if isinstance(stated, dict) else {}


def _description(dataset: Path) -> dict[str, Any]:
    if (dataset / "cases.csv").is_file() or not (dataset / "dataset.json").is_file():
        return {}
    return _json_of(dataset / "dataset.json")


@dataclass(frozen=True, slots=True)
class _Requested:
    """The requested channels, None for all; with `allow_missing` a case needs only the first."""

    channels: Sequence[str] | None = None
    allow_missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """An unchecked case; `where` is its place in the data set, for messages."""

    where: str
    id: str
    images: Mapping[str, Path]
    reference: Path | None = None
    split: str | None = None
    patient: str | None = None
    classes: Mapping[str, str] = field(default_factory=dict)


def has_description(folder: Path) -> bool:
    """Check whether a `dataset.json` describes the subfolders.

    Beside scans it belongs to the model that predicted them: nnU-Net copies it there.
    """
    return (folder / "dataset.json").is_file() and not _scans_in(folder)


def _rows_of(dataset: Path, requested: _Requested, mistakes: list[str]) -> list[_Row]:
    """Read the rows of a data set with the reader for its layout."""
    if not os.path.exists(dataset):
        raise VolsegError(f"{dataset}: no such file or folder", fix="check the path")
    if not os.path.isdir(dataset):  # opening it refuses a pipe or a device
        return _rows_of_csv(dataset, requested, mistakes)
    if (dataset / "cases.csv").is_file():
        return _rows_of_csv(dataset / "cases.csv", requested, mistakes)
    if has_description(dataset):
        description = _json_of(dataset / "dataset.json")
        mistakes += _description_mistakes(description)
        read = _rows_of_nnunet if _is_nnunet(dataset, description) else _rows_of_decathlon
        return read(dataset, description, requested, mistakes)
    if (dataset / "imagesTr").is_dir():
        raise VolsegError(
            f"{dataset}: has imagesTr but no dataset.json",
            fix="add a dataset.json that names the channels",
        )
    return _rows_of_folder(dataset, requested, mistakes)


# ---- CSV


def _rows_of_csv(path: Path, requested: _Requested, mistakes: list[str]) -> list[_Row]:
    columns, lines = read_table(path)
    available = {
        name.removeprefix("image_"): name
        for name in columns
        if name == "image" or name.startswith("image_")
    }
    if not available:
        raise VolsegError(
            f"{path}: has no column 'image'; its columns are {_listed(columns)}",
            fix="name the column of scans 'image', or 'image_<channel>' for several channels",
        )
    if {"image", "image_image"} <= set(columns):
        raise VolsegError(
            f"{path}: has columns 'image' and 'image_image' for the same channel", fix="rename one"
        )
    picked = _picked(available, requested, str(path))
    not_classes = {*_CASE_COLUMNS, *available.values()}
    class_columns = [name for name in columns if name not in not_classes]
    rows = []
    for number, cells in lines:
        where = f"{path.name} line {number}"
        if len(cells) != len(columns):
            mistakes.append(f"{where}: has {len(cells)} cells under {len(columns)} columns")
            continue
        row = dict(zip(columns, cells, strict=True))
        present = {
            name: column
            for name, column in picked.items()
            if row[column] or not requested.allow_missing
        }
        empty = [column for column in present.values() if not row[column]]
        empty = empty or _first_missing(picked, present)
        if empty:
            mistakes.append(f"{where}: the cell of {_listed(empty)} is empty")
            continue
        images = {channel: path.parent / row[column] for channel, column in present.items()}
        rows.append(
            _Row(
                where=where,
                id=row.get("subject") or _safe_id(stem_of(next(iter(images.values())))),
                images=images,
                reference=path.parent / row["label"] if row.get("label") else None,
                split=row.get("split") or None,
                patient=row.get("patient") or None,
                classes={name: row[name] for name in class_columns if row[name]},
            )
        )
    return rows


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the column names, and (line number, cells) of each row.

    Cells may be separated by commas, semicolons or tabs; a byte order mark is allowed.
    """
    try:
        text = _bytes_of(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VolsegError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})",
            fix="save it as “CSV UTF-8”",
        ) from error
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = max(",;\t", key=first.count)
    lines: list[tuple[int, list[str]]] = []
    number = 0
    try:
        for number, cells in csv_rows(text, delimiter=delimiter, strict=True):
            lines.append((number, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise VolsegError(
            f"{path}: line {number + 1} is not valid CSV ({error})", fix="check its quotes"
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise VolsegError(f"{path}: is empty", fix="give it a header line and a row per scan")
    columns = lines[0][1]
    repeated = sorted(name for name, n in Counter(columns).items() if n > 1)
    if repeated:
        raise VolsegError(
            f"{path}: has columns {_listed(repeated)} twice", fix="give every column its own name"
        )
    return columns, lines[1:]


# ---- folders


def _rows_of_folder(dataset: Path, requested: _Requested, mistakes: list[str]) -> list[_Row]:
    """Read `images/` and `labels/` with equal file names, or scans directly in the folder."""
    images = dataset / "images" if (dataset / "images").is_dir() else dataset
    labels: dict[str, Path] = {}
    for path in _scans_in(dataset / "labels") if images != dataset else ():
        if labels.setdefault(stem_of(path), path) != path:
            mistakes.append(f"{path}: {labels[stem_of(path)]} is a mask of the same name")
    rows = []
    for path in _scans_in(images):
        picked = _picked({ONE_CHANNEL: path}, requested, str(images))
        stem = stem_of(path)
        label = labels.pop(stem, None)
        rows.append(_Row(where=str(path), id=_safe_id(stem), images=picked, reference=label))
    mistakes += [f"{path}: no scan of this name in {images}" for path in labels.values()]
    return rows


def _rows_of_nnunet(
    dataset: Path, description: dict, requested: _Requested, mistakes: list[str]
) -> list[_Row]:
    """Read imagesTr, labelsTr and imagesTs, with one file `<id>_<number>` per channel.

    Cases of imagesTr have no split; those of imagesTs are `test`.
    """
    names = description.get("channel_names") or description.get("modality")
    if (
        not isinstance(names, dict)
        or not names
        or not all(key.isdecimal() and len(key) < 10 for key in names)
    ):
        raise VolsegError(
            f"{dataset}: dataset.json names no channels", fix='add "channel_names": {"0": "CT"}'
        )
    if len(set(map(str, names.values()))) < len(names):
        channels = _listed(map(str, names.values()))
        raise VolsegError(
            f"{dataset}: dataset.json gives two channels the same name ({channels})",
            fix="give each channel its own name",
        )
    numbers = {str(name): f"{int(key):04d}" for key, name in names.items()}
    picked = _picked(numbers, requested, str(dataset))
    ending = str(description.get("file_ending", ".nii.gz"))
    rows = []
    for images, labels, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        for stem in sorted({match[1] for match in _numbered(dataset / images, description)}):
            reference: Path | None = dataset / labels / f"{stem}{ending}"
            if split == "test" and not reference.exists():
                reference = None
            files = {
                name: dataset / images / f"{stem}_{number}{ending}"
                for name, number in picked.items()
            }
            if requested.allow_missing:  # a missing first channel is reported with the other files
                first = next(iter(files))
                files = {
                    name: path for name, path in files.items() if name == first or path.is_file()
                }
            where, case_id = f"{images}/{stem}", _safe_id(stem)
            rows.append(
                _Row(where=where, id=case_id, images=files, reference=reference, split=split)
            )
    return rows


def _is_nnunet(dataset: Path, description: dict) -> bool:
    """Check whether a `dataset.json` is of nnU-Net.

    Version 1 lists files as the Decathlon does, but their real names end in the channel number.
    """
    if "channel_names" in description:
        return True
    images = [entry["image"] for entry in _entries(description, "training") if _is_pair(entry)]
    is_listed = any((dataset / name).is_file() for name in images)
    return bool(_numbered(dataset / "imagesTr", description)) and not is_listed


def _numbered(folder: Path, description: dict) -> list[re.Match]:
    """Return the matches of files `<id>_<4 digits><ending>` in an nnU-Net folder."""
    pattern = r"(.+)_(\d{4})" + re.escape(str(description.get("file_ending", ".nii.gz")))
    matches = [re.fullmatch(pattern, path.name) for path in _visible(folder)]
    return [match for match in matches if match]


def _rows_of_decathlon(
    dataset: Path, description: dict, requested: _Requested, mistakes: list[str]
) -> list[_Row]:
    """Read the lists `training` (no split), `validation` and `test` of a Decathlon dataset.json."""
    rows = []
    for key, split in (("training", None), ("validation", "val"), ("test", "test")):
        for number, entry in enumerate(_entries(description, key)):
            where = f"dataset.json {key}[{number}]"
            entry = {"image": entry} if isinstance(entry, str) else entry
            if not _is_pair(entry):
                text = json.dumps(entry)[:60]
                mistakes.append(f"{where}: is {text}, not an image with its label")
                continue
            image = dataset / entry["image"]
            picked = _picked({ONE_CHANNEL: image}, requested, str(dataset))
            label = dataset / entry["label"] if entry.get("label") else None
            case_id = _safe_id(stem_of(image))
            rows.append(_Row(where=where, id=case_id, images=picked, reference=label, split=split))
    return rows


def _entries(description: dict, key: str) -> list:
    entries = description.get(key)
    return entries if isinstance(entries, list) else []


def _is_pair(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("image"), str)
        and isinstance(entry.get("label", ""), str)
    )


def _json_of(path: Path) -> dict[str, Any]:
    try:
        description = parse_json(_bytes_of(path))
    except ValueError as error:
        raise VolsegError(
            f"{path}: is not JSON ({error})", fix="repair it, or describe the data in cases.csv"
        ) from error
    if not isinstance(description, dict):
        raise VolsegError(
            f"{path}: is not a JSON object", fix="repair it, or describe the data in cases.csv"
        )
    return description


def _scans_in(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.name.lower().endswith(SUFFIXES)]


def _visible(folder: Path) -> list[Path]:
    """Return the sorted paths in a folder without hidden ones; [] if there is no such folder."""
    try:
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _bytes_of(path: Path) -> bytes:
    try:
        return read_bytes(path, max_bytes=MAX_TEXT_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise VolsegError(f"{path}: {error}", fix="give a cases.csv or dataset.json") from error


def _unreadable(path: Path, error: OSError) -> VolsegError:
    if isinstance(error, NotAFileError):
        return VolsegError(
            f"{path}: {error.strerror}", fix="give the path of a file", code="E_NOTFILE"
        )
    return VolsegError(
        f"{path}: cannot be read ({error.strerror})", fix="check its permissions", code="E_PERM"
    )


# ---- rules for all layouts


def _first_missing(picked: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Return the column of the first channel if a case lacks it."""
    first = next(iter(picked))
    return [] if first in present else [picked[first]]


def _picked(
    available: Mapping[str, Anything], requested: _Requested, origin: str
) -> dict[str, Anything]:
    """Return the value of each requested channel, matched by exact name, else ignoring case.

    `image` matches a single channel of any name.

    Raises:
        VolsegError: a channel is missing, or two differ only in upper and lower case.
    """
    channels = requested.channels
    if channels is not None and all(name in available for name in channels):
        return {name: available[name] for name in channels}
    ambiguous = _differ_in_case_only(available) or _differ_in_case_only(channels or ())
    if ambiguous:
        raise VolsegError(
            f"{origin}: channels {_listed(ambiguous)} differ only in upper and lower case",
            fix="rename one of them",
        )
    if channels is None:
        return dict(available)
    by_name = {name.casefold(): value for name, value in available.items()}
    if all(name.casefold() in by_name for name in channels):
        return {name: by_name[name.casefold()] for name in channels}
    if requested.allow_missing and channels[0].casefold() in by_name:
        return {name: by_name[name.casefold()] for name in channels if name.casefold() in by_name}
    if len(channels) == len(available) == 1 and ONE_CHANNEL in (channels[0], *available):
        return {channels[0]: next(iter(available.values()))}
    missing = [name for name in channels if name.casefold() not in by_name]
    columns = _listed(f"image_{name}" for name in channels)
    raise VolsegError(
        f"{origin}: has no channel {_listed(missing)}; it has {_listed(available)}",
        fix=f"add a cases.csv with the columns {columns}, or choose another recipe",
    )


def _differ_in_case_only(names: Iterable[str]) -> list[str]:
    """Return the names that equal another one except for upper and lower case."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]


def _checked(rows: list[_Row], mistakes: list[str], origin: str) -> list[Case]:
    """Return the cases, or raise one error that lists all mistakes."""
    if not rows and not mistakes:
        raise VolsegError(
            f"no scans found in {origin}", fix=f"give files that end in {', '.join(SUFFIXES)}"
        )
    mistakes = mistakes + _mistakes(rows)
    if mistakes:
        shown = "; ".join(
            f"({number}) {text}" for number, text in enumerate(mistakes[:MAX_LISTED], start=1)
        )
        more = f"; and {len(mistakes) - MAX_LISTED} more" if len(mistakes) > MAX_LISTED else ""
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
        raise VolsegError(
            f"{origin}: {count}: {shown}{more}", fix="correct them and run again; nothing was done"
        )
    return [_case(row) for row in rows]


def _case(row: _Row) -> Case:
    return Case(row.id, dict(row.images), row.reference, row.split, row.patient, dict(row.classes))


def _mistakes(rows: list[_Row]) -> list[str]:
    return _id_mistakes(rows) + _file_mistakes(rows) + _split_mistakes(rows)


def _id_mistakes(rows: list[_Row]) -> list[str]:
    mistakes, seen = [], {}
    for row in rows:
        if not re.fullmatch(ID_PATTERN, row.id):
            mistakes.append(
                f"{row.where}: subject {row.id!r} is not a valid file name; "
                f"{_safe_id(row.id)!r} would be"
            )
        key = row.id.casefold()  # some file systems treat a.nii and A.nii as one file
        if key in seen:
            first, second = (next(iter(case.images.values())) for case in (seen[key], row))
            mistakes.append(f"{row.where}: id {row.id!r} is used for both {first} and {second}")
        seen.setdefault(key, row)
    return mistakes


def _file_mistakes(rows: list[_Row]) -> list[str]:
    return [
        f"{row.where}: file {shorten(str(path), 300)!r} {_path_problem(path)}"
        for row in rows
        for path in (*row.images.values(), row.reference)
        if path is not None and not os.path.isfile(path)
    ]


def _path_problem(path: Path) -> str:
    """Describe what a path leads to instead of a file."""
    try:
        return f"is {kind_of(os.stat(path).st_mode)}, not a file"
    except (OSError, ValueError):
        return "does not exist"


def _split_mistakes(rows: list[_Row]) -> list[str]:
    mistakes, seen = [], {}
    for row in rows:
        if row.patient is None or row.split is None:
            continue
        first = seen.setdefault(row.patient, row)
        if first.split != row.split:
            mistakes.append(
                f"{row.where}: patient {row.patient!r} is in split {row.split!r}, "
                f"but in {first.split!r} at {first.where}"
            )
    return mistakes


def _safe_id(name: str) -> str:
    """Return a name that matches `ID_PATTERN`.

    Accents are dropped, other characters replaced by `_`; a device name gets a trailing `_`.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", plain).lstrip("._-")
    safe = re.sub(rf"^({_DEVICES})(?=\.|\Z)", r"\1_", safe)
    return safe[:128].rstrip(".") or "scan"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


_CASE_COLUMNS = ("subject", "label", "split", "patient")
