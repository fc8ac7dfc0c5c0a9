"""Which files belong to which case: CSV files, folders, and the layouts of nnU-Net and the Medical Decathlon.

Only paths are handled here; no scan is opened. All mistakes of a data set are reported at once.
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
    shortened,
)
from volseg.io.csv_text import csv_rows
from volseg.io.nifti import SUFFIXES, stem_of

ONE_CHANNEL = "image"  # the channel of data sets that have one and do not name it
IGNORE = "ignore"  # nnU-Net's label of voxels that are neither trained on nor judged
MAX_LISTED = 10  # mistakes written out in one message
# Safe as the name of a file and of a folder everywhere: Windows keeps some names for devices, whatever their ending, and drops a last dot.
_DEVICES = r"(?i:con|prn|aux|nul|conin|conout|com[0-9]|lpt[0-9])"
ID_PATTERN = rf"(?!{_DEVICES}(?:\.|\Z))[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,126}}[A-Za-z0-9_-])?"

Anything = TypeVar("Anything")


@dataclass(frozen=True, slots=True)
class Case:
    """The files of one scan.

    Args:
        id: names the outputs; matches `ID_PATTERN`.
        images: channel → file.
        reference: the true mask, if there is one.
        split: such as train, val or test; None where the data set does not say.
        patient: no patient is in two splits; None where unknown.
        classes: the further columns of the CSV, such as `malignancy`; empty cells are left out.
    """

    id: str
    images: dict[str, Path]
    reference: Path | None = None
    split: str | None = None
    patient: str | None = None
    classes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(ID_PATTERN, self.id):
            raise ValueError(f"{self.id!r} is not a safe case id")


def find_cases(
    dataset: Path, channels: Sequence[str] | None = (ONE_CHANNEL,), *, may_miss: bool = False
) -> list[Case]:
    """The cases of a data set, in the order in which it lists them.

    Args:
        dataset: a CSV file; or a folder with `cases.csv`, with `images/` and maybe `labels/` holding equal file
            names, with an nnU-Net raw or Decathlon `dataset.json`, or simply with scans in it.
        channels: what the recipe wants; `image` means “the only one there is”, None all that there are.
        may_miss: a case may lack channels but the first; it is then without them.

    Raises:
        VolsegError: the layout is not known, a channel or file is missing, an id is unsafe or used twice, a patient
            is in two splits. One error names all mistakes.
    """
    mistakes: list[str] = []
    rows = _rows_of(Path(dataset), _Wanted(channels, may_miss), mistakes)
    return _checked(rows, mistakes, str(dataset))


def survey_cases(
    dataset: Path, channels: Sequence[str] | None = None, *, may_miss: bool = False
) -> tuple[list[Case], list[str]]:
    """The cases whose files are all there, and every mistake of the dataset: for a check, which stops at none of them."""
    mistakes: list[str] = []
    rows = _rows_of(dataset, _Wanted(channels, may_miss), mistakes)
    if not rows and not mistakes:
        mistakes.append(f"no scans found; they end in {', '.join(SUFFIXES)}")
    mistakes += _mistakes(rows)
    sound = [row for row in rows if not _id_mistakes([row]) and not _file_mistakes([row])]
    return [_case(row) for row in sound], mistakes


def find_scans(
    inputs: Sequence[Path],
    channels: Sequence[str] | None = (ONE_CHANNEL,),
    *,
    may_miss: bool = False,
) -> list[Case]:
    """The cases to segment: scans, folders of scans (hidden files and `._*` are skipped), CSV files and data sets.

    Raises:
        VolsegError: as `find_cases`; also when a plain scan is given but several channels are wanted.
    """
    mistakes: list[str] = []
    rows: list[_Row] = []
    for path in map(Path, inputs):
        if os.path.isdir(path) or path.suffix.lower() == ".csv":
            rows += _rows_of(path, _Wanted(channels, may_miss), mistakes)
        else:
            channel = _picked({ONE_CHANNEL: path}, _Wanted(channels), str(path))
            rows.append(_Row(where=str(path), id=_safe_id(stem_of(path)), images=channel))
    return _checked(rows, mistakes, ", ".join(map(str, inputs)))


def stated_labels(dataset: Path) -> dict[str, int]:
    """Name → value of the labels that a `dataset.json` states, without the background; {} where there is none.

    Regions, which are lists of values, are left out; nnU-Net's name for voxels of which nobody knows what they are is `ignore`.
    """
    return {name: value for name, value in _named_values(_stated(dataset, "labels")) if value}


def _named_values(labels: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, value) of each label that is not a region."""
    for one, other in labels.items():
        name, value = (
            (other, one) if str(one).isdecimal() else (one, other)
        )  # the Decathlon has the value first
        number = label_value(str(value))
        if number is not None:
            yield str(name), number


def stated_regions(dataset: Path) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Name → mask values of the overlapping regions that an nnU-Net `dataset.json` states, and the value that each writes."""
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
    """What is wrong with the labels, regions and channels that a dataset.json states."""
    for key in ("labels", "channel_names", "modality"):
        stated = description.get(key, {})
        if not isinstance(stated, dict):
            yield f"dataset.json: {key!r} is {shortened(json.dumps(stated))}, not an object of names"
            continue
        for name, value in stated.items():
            is_region = key == "labels" and isinstance(value, list) and bool(value)
            values = (
                value
                if is_region
                else [name if key == "labels" and str(name).isdecimal() else value]
            )
            is_right = (
                all(map(_is_label_value, values)) if key == "labels" else isinstance(value, str)
            )
            is_short = len(str(name)) <= MAX_NAME and (is_region or len(str(value)) <= MAX_NAME)
            if not is_right or not is_short:
                text = f"{json.dumps(shortened(name))}: {shortened(json.dumps(value))}"
                expected = "a whole number, or a list of them" if key == "labels" else "a name"
                yield f"dataset.json: {key} holds {text}, where {expected} is expected"
    labels = description.get("labels")
    pairs = list(_named_values(labels)) if isinstance(labels, dict) else []
    for n_used in (Counter(name for name, _ in pairs), Counter(value for _, value in pairs)):
        for part in (part for part, n in n_used.items() if n > 1):
            yield f"dataset.json: labels has {shortened(repr(part))} twice"
    order = description.get("regions_class_order")
    if order is not None and not (
        isinstance(order, list) and order and all(map(_is_label_value, order))
    ):
        yield f"dataset.json: regions_class_order is {shortened(json.dumps(order))}, not a list of whole numbers"
    elif order is not None and not isinstance(description.get("labels"), dict):
        yield "dataset.json: regions_class_order is given without labels"


def _is_label_value(value: Any) -> bool:
    """Whether it is a value of a mask, which the Decathlon writes as text."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return (
        0 <= value < 2**32
        if is_number
        else isinstance(value, str) and value.isdecimal() and len(value) < 10
    )


def stated_modalities(dataset: Path) -> dict[str, str]:
    """Channel → modality, such as CT, as a `dataset.json` states it; {} where there is none."""
    names = [
        str(name)
        for name in (_stated(dataset, "channel_names") or _stated(dataset, "modality")).values()
    ]
    return {ONE_CHANNEL: names[0]} | {name: name for name in names} if names else {}


def _stated(dataset: Path, key: str) -> dict[str, Any]:
    stated = _description(dataset).get(key)
    return stated if isinstance(stated, dict) else {}


def _description(dataset: Path) -> dict[str, Any]:
    if (dataset / "cases.csv").is_file() or not (dataset / "dataset.json").is_file():
        return {}
    return _json_of(dataset / "dataset.json")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The channels that are asked for, None for all; with `may_miss` a case needs the first alone."""

    channels: Sequence[str] | None = None
    may_miss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A case as it was found, not yet checked; `where` says where, for messages."""

    where: str
    id: str
    images: Mapping[str, Path]
    reference: Path | None = None
    split: str | None = None
    patient: str | None = None
    classes: Mapping[str, str] = field(default_factory=dict)


def is_described(folder: Path) -> bool:
    """Whether a `dataset.json` says what is in the subfolders. Beside scans it is that of the model that made them, as nnU-Net lays it there."""
    return (folder / "dataset.json").is_file() and not _scans_in(folder)


def _rows_of(dataset: Path, wanted: _Wanted, mistakes: list[str]) -> list[_Row]:
    """The layout decides who reads it."""
    if not os.path.exists(dataset):
        raise VolsegError(f"{dataset}: no such file or folder", fix="check the path")
    if not os.path.isdir(dataset):
        return _rows_of_csv(
            dataset, wanted, mistakes
        )  # a pipe or a device is refused where it would be opened
    if (dataset / "cases.csv").is_file():
        return _rows_of_csv(dataset / "cases.csv", wanted, mistakes)
    if is_described(dataset):
        description = _json_of(dataset / "dataset.json")
        mistakes += _description_mistakes(description)
        read = _rows_of_nnunet if _is_nnunet(dataset, description) else _rows_of_decathlon
        return read(dataset, description, wanted, mistakes)
    if (dataset / "imagesTr").is_dir():
        raise VolsegError(
            f"{dataset}: has imagesTr but no dataset.json",
            fix="add dataset.json, which names the channels",
        )
    return _rows_of_folder(dataset, wanted, mistakes)


# ---- CSV


def _rows_of_csv(path: Path, wanted: _Wanted, mistakes: list[str]) -> list[_Row]:
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
            f"{path}: has columns 'image' and 'image_image', which name one channel",
            fix="rename one",
        )
    picked = _picked(available, wanted, str(path))
    not_classes = {*_KNOWN_COLUMNS, *available.values()}
    further = [name for name in columns if name not in not_classes]
    rows = []
    for number, cells in lines:
        where = f"{path.name} line {number}"
        if len(cells) != len(columns):
            mistakes.append(f"{where}: has {len(cells)} cells under {len(columns)} columns")
            continue
        row = dict(zip(columns, cells, strict=True))
        present = {
            name: column for name, column in picked.items() if row[column] or not wanted.may_miss
        }
        empty = [column for column in present.values() if not row[column]] or _first_missing(
            picked, present
        )
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
                classes={name: row[name] for name in further if row[name]},
            )
        )
    return rows


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names, and (line number, cells) of each row; commas, semicolons or tabs, with or without a BOM."""
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
            f"{path}: line {number + 1} is not CSV ({error})", fix="check its quotes"
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise VolsegError(f"{path}: is empty", fix="give it a header line and a row per scan")
    columns = lines[0][1]
    twice = sorted(name for name, n in Counter(columns).items() if n > 1)
    if twice:
        raise VolsegError(
            f"{path}: has columns {_listed(twice)} twice", fix="give every column its own name"
        )
    return columns, lines[1:]


# ---- folders


def _rows_of_folder(dataset: Path, wanted: _Wanted, mistakes: list[str]) -> list[_Row]:
    """`images/` and `labels/` with equal names, or scans right in the folder."""
    images = dataset / "images" if (dataset / "images").is_dir() else dataset
    labels: dict[str, Path] = {}
    for path in _scans_in(dataset / "labels") if images != dataset else ():
        if labels.setdefault(stem_of(path), path) != path:
            mistakes.append(f"{path}: {labels[stem_of(path)]} is a mask of this name too")
    rows = []
    for path in _scans_in(images):
        picked = _picked({ONE_CHANNEL: path}, wanted, str(images))
        stem = stem_of(path)
        rows.append(
            _Row(
                where=str(path), id=_safe_id(stem), images=picked, reference=labels.pop(stem, None)
            )
        )
    mistakes += [f"{path}: no scan of this name in {images}" for path in labels.values()]
    return rows


def _rows_of_nnunet(
    dataset: Path, description: dict, wanted: _Wanted, mistakes: list[str]
) -> list[_Row]:
    """imagesTr, labelsTr and imagesTs, one file `<id>_<number>` per channel; Tr has no split, Ts is `test`."""
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
        raise VolsegError(
            f"{dataset}: dataset.json gives two channels one name ({_listed(map(str, names.values()))})",
            fix="give each channel a name of its own",
        )
    picked = _picked(
        {str(name): f"{int(key):04d}" for key, name in names.items()}, wanted, str(dataset)
    )
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
            if (
                wanted.may_miss
            ):  # what is left of the first channel is a mistake that is found with the other files
                first = next(iter(files))
                files = {
                    name: path for name, path in files.items() if name == first or path.is_file()
                }
            where = f"{images}/{stem}"
            rows.append(
                _Row(where=where, id=_safe_id(stem), images=files, reference=reference, split=split)
            )
    return rows


def _is_nnunet(dataset: Path, description: dict) -> bool:
    """Version 1 has the lists of the Decathlon, but adds the channel number to the names of the files."""
    if "channel_names" in description:
        return True
    listed = [entry["image"] for entry in _entries(description, "training") if _is_pair(entry)]
    return bool(_numbered(dataset / "imagesTr", description)) and not any(
        (dataset / name).is_file() for name in listed
    )


def _numbered(folder: Path, description: dict) -> list[re.Match]:
    """Files `<id>_<4 digits><ending>` in an nnU-Net folder."""
    pattern = r"(.+)_(\d{4})" + re.escape(str(description.get("file_ending", ".nii.gz")))
    matches = [re.fullmatch(pattern, path.name) for path in _visible(folder)]
    return [match for match in matches if match]


def _rows_of_decathlon(
    dataset: Path, description: dict, wanted: _Wanted, mistakes: list[str]
) -> list[_Row]:
    """The lists `training`, `validation` and `test` of dataset.json; only `training` has no split."""
    rows = []
    for key, split in (("training", None), ("validation", "val"), ("test", "test")):
        for number, entry in enumerate(_entries(description, key)):
            where = f"dataset.json {key}[{number}]"
            entry = {"image": entry} if isinstance(entry, str) else entry
            if not _is_pair(entry):
                mistakes.append(
                    f"{where}: is {json.dumps(entry)[:60]}, not an image with its label"
                )
                continue
            image = dataset / entry["image"]
            picked = _picked({ONE_CHANNEL: image}, wanted, str(dataset))
            reference = dataset / entry["label"] if entry.get("label") else None
            rows.append(
                _Row(
                    where=where,
                    id=_safe_id(stem_of(image)),
                    images=picked,
                    reference=reference,
                    split=split,
                )
            )
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
            f"{path}: is not JSON ({error})", fix="repair it, or describe the data by cases.csv"
        ) from error
    if not isinstance(description, dict):
        raise VolsegError(
            f"{path}: holds no JSON object", fix="repair it, or describe the data by cases.csv"
        )
    return description


def _scans_in(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.name.lower().endswith(SUFFIXES)]


def _visible(folder: Path) -> list[Path]:
    """Files by name, without hidden ones, to which the `._*` of macOS belong; [] for no folder."""
    try:
        return (
            sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            if folder.is_dir()
            else []
        )
    except OSError as error:
        raise _unreadable(folder, error) from error


def _bytes_of(path: Path) -> bytes:
    try:
        return read_bytes(path, max_bytes=MAX_TEXT_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise VolsegError(f"{path}: {error}", fix="give a table or description of cases") from error


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
    """The column of the first channel, where a case is without it."""
    first = next(iter(picked))
    return [] if first in present else [picked[first]]


def _picked(available: Mapping[str, Anything], asked: _Wanted, origin: str) -> dict[str, Anything]:
    """What stands for each wanted channel: that of its name, else of its name in another case.

    `image` stands for the only one.

    Raises:
        VolsegError: one is not there, or only its case tells it from another.
    """
    wanted = asked.channels
    if wanted is not None and all(name in available for name in wanted):
        return {name: available[name] for name in wanted}
    alike = _differ_in_case_only(available) or _differ_in_case_only(wanted or ())
    if alike:
        raise VolsegError(
            f"{origin}: channels {_listed(alike)} differ in upper and lower case only",
            fix="rename one of them",
        )
    if wanted is None:
        return dict(available)
    by_name = {name.casefold(): value for name, value in available.items()}
    if all(name.casefold() in by_name for name in wanted):
        return {name: by_name[name.casefold()] for name in wanted}
    if asked.may_miss and wanted[0].casefold() in by_name:
        return {name: by_name[name.casefold()] for name in wanted if name.casefold() in by_name}
    if len(wanted) == len(available) == 1 and ONE_CHANNEL in (wanted[0], *available):
        return {wanted[0]: next(iter(available.values()))}
    missing = [name for name in wanted if name.casefold() not in by_name]
    raise VolsegError(
        f"{origin}: has no channel {_listed(missing)}; it has {_listed(available)}",
        fix=f"add a cases.csv with the columns {_listed(f'image_{name}' for name in wanted)}, or choose another recipe",
    )


def _differ_in_case_only(names: Iterable[str]) -> list[str]:
    """Those of the names that another one is like."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    return [name for group in alike.values() if len(group) > 1 for name in group]


def _checked(rows: list[_Row], mistakes: list[str], origin: str) -> list[Case]:
    """Cases without a mistake, or one error that names all mistakes."""
    if not rows and not mistakes:
        raise VolsegError(
            f"no scans found in {origin}", fix=f"give files that end in {', '.join(SUFFIXES)}"
        )
    mistakes = mistakes + _mistakes(rows)
    if mistakes:
        shown = "; ".join(
            f"({number}) {text}" for number, text in enumerate(mistakes[:MAX_LISTED], start=1)
        )
        rest = f"; and {len(mistakes) - MAX_LISTED} more" if len(mistakes) > MAX_LISTED else ""
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
        raise VolsegError(
            f"{origin}: {count}: {shown}{rest}",
            fix="correct them and run again; nothing was done yet",
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
                f"{row.where}: subject {row.id!r} is no safe file name; {_safe_id(row.id)!r} would be"
            )
        key = row.id.casefold()  # some file systems do not tell a.nii from A.nii
        if key in seen:
            files = [str(next(iter(each.images.values()))) for each in (seen[key], row)]
            mistakes.append(
                f"{row.where}: id {row.id!r} is used for both {files[0]} and {files[1]}"
            )
        seen.setdefault(key, row)
    return mistakes


def _file_mistakes(rows: list[_Row]) -> list[str]:
    return [
        f"{row.where}: file {shortened(str(path), 300)!r} {_what_it_is(path)}"
        for row in rows
        for path in (*row.images.values(), row.reference)
        if path is not None and not os.path.isfile(path)
    ]


def _what_it_is(path: Path) -> str:
    """What a path leads to that is not a file."""
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
            elsewhere = f"but in {first.split!r} at {first.where}"
            mistakes.append(
                f"{row.where}: patient {row.patient!r} is in split {row.split!r}, {elsewhere}"
            )
    return mistakes


def _safe_id(name: str) -> str:
    """A name that matches `ID_PATTERN`: accents dropped, other characters replaced by `_`, which also follows the name of a device."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", plain).lstrip("._-")
    safe = re.sub(rf"^({_DEVICES})(?=\.|\Z)", r"\1_", safe)
    return safe[:128].rstrip(".") or "scan"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


_KNOWN_COLUMNS = ("subject", "label", "split", "patient")
