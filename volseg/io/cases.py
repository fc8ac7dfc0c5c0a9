"""The case, its id and channels, and the table cases.csv; paths only, no scan is opened."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from volseg.errors import VolsegError
from volseg.inputs import kind_of, shorten
from volseg.io.formats import READABLE, is_there, stem_of
from volseg.io.tables import PATIENT, read_table
from volseg.words import format_count, format_numbered

ONE_CHANNEL = "image"  # name of an unnamed single channel
MAX_LISTED = 10  # mistakes listed in one message
CHANNEL = "image_"  # before the name of a channel
COLUMNS = {  # of cases.csv → other usual heads; `image_<channel>` comes on top
    "image": ("images", "img", "scan", "volume", "image_path", "scan_path", "image_file", "file"),
    "label": (
        *("labels", "mask", "masks", "seg", "segmentation", "label_path", "mask_path"),
        *("mask_file", "label_file", "seg_path", "ground_truth", "gt", "annotation", "roi"),
    ),
    "subject": ("subject_id", "subjectid", "case", "case_id", "caseid", "scan_id"),
    "patient": PATIENT,
    "split": ("set", "subset", "partition", "fold_split"),
}
SPLITS = {  # split → words for it, in lower case
    "train": ("train", "training", "tr"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "ts"),
}
# Valid file and folder names on every system: Windows reserves device names, whatever the suffix,
# and drops a trailing dot or space. Characters of control, format and private use are left out.
_DEVICES = r"(?i:con|prn|aux|nul|conin|conout|com[0-9]|lpt[0-9])"
_LETTERS = (
    "A-Za-z0-9_%\u00a1-\u00ac\u00ae-\u1fff\u2070-\u2fef\u3001-\ud7ff\uf900-\ufdcf\ufdf0-\ufefe"
    "\uff01-\uffef\U00010000-\U0003fffd"
)
ID_PATTERN = rf"(?!{_DEVICES}(?:\.|\Z))[{_LETTERS}](?:[{_LETTERS}. -]{{0,126}}[{_LETTERS}-])?"
MAX_ID_BYTES = 180  # in UTF-8; file systems allow 255 with what volseg adds

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
        classes: the other columns of the CSV, such as `malignancy`.
    """

    id: str
    images: dict[str, Path]
    reference: Path | None = None
    split: str | None = None
    patient: str | None = None
    classes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_valid_id(self.id):
            raise ValueError(f"{self.id!r} is not a valid case id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An unchecked case; `where` is its place in the data set, for messages.

    Args:
        why: its files belong together.
    """

    where: str
    id: str
    images: dict[str, Path]
    reference: Path | None = None
    split: str | None = None
    patient: str | None = None
    classes: dict[str, str] = field(default_factory=dict)
    why: str = ""

    def case(self) -> Case:
        """Return the case of a row without mistakes."""
        return Case(self.id, self.images, self.reference, self.split, self.patient, self.classes)


NO_SCANS = f"no scans found; they end in {READABLE}"
ONLY_IMAGES = (
    "holds 2D images, not scans with masks; `volseg check` says how it is read, and `volseg train` "
    "without a recipe, or with one of a classifier, classifies them"
)


@dataclass(frozen=True, slots=True)
class Survey:
    """The usable cases of a data set, every mistake in it, and remarks on how it was read."""

    cases: list[Case]
    mistakes: list[str]
    remarks: Sequence[str]
    why: Mapping[str, str]  # case id → why its files belong together


@dataclass(slots=True)
class Listing:
    """The rows of a data set; mistakes that were met and choices that were made in reading it."""

    rows: list[Row] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def all_mistakes(self) -> list[str]:
        """Return also the mistakes of ids and files."""
        if not self.rows and not self.mistakes:
            return [NO_SCANS]
        return [*self.mistakes, *_id_mistakes(self.rows), *_file_mistakes(self.rows)]

    def split_mistakes(self) -> list[str]:
        """Return unknown words for splits, and patients in two of them.

        Commands that use splits refuse them; `split_remarks` names them in the others.
        """
        return _unknown_splits(self.rows) + _patients_in_two_splits(self.rows)

    def split_remarks(self, origin: str) -> list[str]:
        """Return a remark on the mistakes of splits, if there are any."""
        mistakes = self.split_mistakes()
        if not mistakes:
            return []
        more = f"; and {len(mistakes) - 1} more" if len(mistakes) > 1 else ""
        return [f"W_SPLIT: {origin}: {mistakes[0]}{more}; only training uses splits"]

    def unlabelled(self, origin: str) -> list[str]:
        """Return a remark on the cases that lack a mask although others have one.

        Rows of the training split are named one by one where they are read; those of the test
        split need no mask.
        """
        rows = [row for row in self.rows if row.split != "test"]
        lacking = [row.id for row in rows if row.reference is None and row.split != "train"]
        if not lacking or len(lacking) == len(rows):
            return []
        are = "has no mask and is" if len(lacking) == 1 else "have no mask and are"
        return [
            f"W_NO_LABEL: {origin}: {len(lacking)} of {format_count(len(rows), 'case')} {are} left "
            f"out where masks are read, first {lacking[0]!r}"
        ]

    def survey(self) -> Survey:
        """Return the cases with a valid id whose files all exist, mistakes and remarks.

        Unlike `cases` it takes unknown or contradictory splits for mistakes, as training does.
        """
        valid = [row for row in self.rows if not _id_mistakes([row]) + _file_mistakes([row])]
        cases = [row.case() for row in valid]
        mistakes = self.all_mistakes() + self.split_mistakes()
        return Survey(cases, mistakes, self.remarks, {row.id: row.why for row in valid})

    def cases(self, origin: str) -> list[Case]:
        """Return all cases, or raise one error that lists all mistakes.

        Args:
            origin: the data set, for the message.
        """
        mistakes = self.all_mistakes()
        if mistakes:
            raise dataset_error(mistakes, origin)
        return [row.case() for row in self.rows]


def dataset_error(mistakes: Sequence[str], origin: str, summary: str = "") -> VolsegError:
    """Return the error that refuses a data set, with its mistakes, at least one.

    Args:
        summary: what they are, with their number; otherwise mistakes.
    """
    if len(mistakes) == 1:
        text, fix = mistakes[0], "correct it and run again; nothing was changed"
    else:
        summary = summary or format_count(len(mistakes), "mistake")
        text = f"{summary}: {format_numbered(mistakes, MAX_LISTED)}"
        fix = "correct them and run again; nothing was changed; `volseg check` lists all of them"
    return VolsegError(f"{origin}: {text}", fix=fix, code="E_DATASET")


@dataclass(frozen=True, slots=True)
class Channels:
    """The requested channels.

    Args:
        names: names in the recipe; `image` stands for a single channel of any name, None for all
            channels of the data set.
        allow_missing: a case may lack any channel but the first.
    """

    names: Sequence[str] | None
    allow_missing: bool = False

    def pick(self, available: Mapping[str, Anything], origin: str) -> dict[str, Anything]:
        """Return the value of each channel, matched by exact name, else ignoring case.

        Args:
            origin: the data set, for messages.

        Raises:
            VolsegError: a channel is missing, or two differ only in upper and lower case.
        """
        names = self.names
        if names is not None and available.keys() >= set(names):
            return {name: available[name] for name in names}
        _refuse_ambiguous(available, origin)
        _refuse_ambiguous(names or (), origin)
        if names is None:
            return dict(available)
        picked = _matches_ignoring_case(names, available)
        if len(picked) == len(names) or (self.allow_missing and names[0] in picked):
            return picked
        if len(names) == len(available) == 1 and ONE_CHANNEL in (names[0], *available):
            return {names[0]: next(iter(available.values()))}
        raise _missing_channel(names, available, origin)

    def required(self, available: Sequence[str]) -> Sequence[str]:
        """Return the channels that no case may lack."""
        if not self.allow_missing:
            return available
        return [] if self.names is None else available[:1]

    def lacking(
        self, available: Mapping[str, object], everywhere: Sequence[str], origin: str
    ) -> list[str]:
        """Return the mistake if all channels are requested, and a case lacks one that others have.

        Args:
            everywhere: channels of all cases.
        """
        if self.names is not None or self.allow_missing or available.keys() >= set(everywhere):
            return []
        return [_missing_channel(everywhere, available, origin).problem]


def _matches_ignoring_case(
    names: Iterable[str], available: Mapping[str, Anything]
) -> dict[str, Anything]:
    by_name = {name.casefold(): value for name, value in available.items()}
    return {name: by_name[name.casefold()] for name in names if name.casefold() in by_name}


def _missing_channel(
    names: Sequence[str], available: Mapping[str, object], origin: str
) -> VolsegError:
    picked = _matches_ignoring_case(names, available)
    missing = listed(name for name in names if name not in picked)
    columns = listed(f"image_{name}" for name in names)
    return VolsegError(
        f"{origin}: has no channel {missing}; it has {listed(available)}",
        fix=f"add a cases.csv with the columns {columns}, or choose another recipe",
    )


def _refuse_ambiguous(names: Iterable[str], origin: str) -> None:
    """Refuse channels that differ only in upper and lower case."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    ambiguous = [name for group in groups.values() if len(group) > 1 for name in group]
    if ambiguous:
        raise VolsegError(
            f"{origin}: channels {listed(ambiguous)} differ only in upper and lower case",
            fix="rename one of them",
        )


# ---- cases.csv


def read_cases_csv(path: Path, channels: Channels) -> Listing:
    """Read the rows of a table of cases."""
    table = read_table(path, COLUMNS, prefix=CHANNEL)
    columns = list(map(_with_lower_prefix, table.columns))
    image_columns = channels.pick(_image_columns(columns, path), str(path))
    listing = Listing(remarks=list(table.remarks))
    required = [image_columns[name] for name in channels.required(list(image_columns))]
    for number, texts in table.lines:
        where = f"{path.name} line {number}"
        if len(texts) != len(columns):
            text = f"{where}: has {format_count(len(texts), 'cell')} under "
            text += format_count(len(columns), "column")
            listing.mistakes.append(text)
            continue
        cells = dict(zip(columns, texts, strict=True))
        is_filled = any(cells[column] for column in image_columns.values())
        needed = required if is_filled else image_columns.values()
        empty = [column for column in needed if not cells[column]]
        if empty:
            listing.mistakes.append(f"{where}: the cell of {listed(empty)} is empty")
            continue
        row = _row_of(cells, image_columns, where=where, folder=path.parent)
        listing.rows.append(row)
        if row.split == "train" and row.reference is None:
            listing.remarks.append(
                f"W_NO_LABEL: {path}: line {number} is of the training split but has no label, "
                "so it is not used"
            )
    return listing


def _with_lower_prefix(column: str) -> str:
    """Return `image_T1` for `Image_T1`; other columns as they are."""
    prefix, name = column[: len(CHANNEL)], column[len(CHANNEL) :]
    return column if prefix.casefold() != CHANNEL else CHANNEL + name


def _unknown_splits(rows: Sequence[Row]) -> list[str]:
    splits = ", ".join(SPLITS)
    return [
        f"{row.where}: split {row.split!r} is unknown: use {splits} or leave it empty"
        for row in rows
        if row.split not in (None, *SPLITS)
    ]


def split_of(word: str) -> str | None:
    """Return train, val or test for any usual word for it; None if the word is another."""
    words = SPLITS.items()
    return next((split for split, others in words if word.casefold() in others), None)


def _row_of(
    cells: Mapping[str, str], image_columns: Mapping[str, str], *, where: str, folder: Path
) -> Row:
    """Return the row of a line; an empty cell of an image is a missing channel."""
    filled = {name: key for name, key in image_columns.items() if cells[key]}
    images = {name: cell_path(folder, cells[key]) for name, key in filled.items()}
    not_classes = {"subject", "label", "split", "patient", "why", *filter(is_image_column, cells)}
    return Row(
        where=where,
        why=f"listed at {where}",
        id=cells.get("subject") or safe_id(stem_of(next(iter(images.values())))),
        images=images,
        reference=cell_path(folder, cells["label"]) if cells.get("label") else None,
        split=split_of(cells.get("split", "")) or cells.get("split") or None,
        patient=cells.get("patient") or None,
        classes={name: cells[name] for name in cells if name not in not_classes},
    )


def cell_path(folder: Path, cell: str) -> Path:
    """Return the path in a cell; backslashes of Windows separate folders, unless it exists."""
    path = folder / cell
    return path if "\\" not in cell or path.exists() else folder / cell.replace("\\", "/")


def is_image_column(name: str) -> bool:
    """Check whether a column holds the scans of a channel."""
    return name == "image" or name.startswith(CHANNEL)


def _image_columns(columns: Sequence[str], path: Path) -> dict[str, str]:
    """Return channel → column of scans."""
    available = {name.removeprefix(CHANNEL): name for name in filter(is_image_column, columns)}
    if not available:
        raise VolsegError(
            f"{path}: has no column 'image'; its columns are {listed(columns)}",
            fix="name the column of scans 'image', or 'image_<channel>' for several channels",
        )
    if {"image", "image_image"} <= set(columns):
        raise VolsegError(
            f"{path}: has columns 'image' and 'image_image' for the same channel", fix="rename one"
        )
    return available


# ---- rules for every data set


def _id_mistakes(rows: list[Row]) -> list[str]:
    mistakes, seen = [], {}
    for row in rows:
        if max(len(row.id) - 128, len(row.id.encode("utf-8", "replace")) - MAX_ID_BYTES) > 0:
            text = f"id {shorten(row.id)!r} has more than 128 characters or {MAX_ID_BYTES} bytes"
            mistakes.append(f"{row.where}: {text}; give a shorter one in the column subject")
        elif not is_valid_id(row.id):
            mistakes.append(
                f"{row.where}: subject {row.id!r} is not a valid file name; "
                f"{safe_id(row.id)!r} would be"
            )
        key = unicodedata.normalize(
            "NFC", row.id
        ).casefold()  # some file systems treat a.nii and A.nii as one file
        if key in seen:
            first, second = (next(iter(case.images.values())) for case in (seen[key], row))
            mistakes.append(
                f"{row.where}: id {row.id!r} is used for both {first} and {second}; rename one, or "
                "give each its own name in the column subject of a cases.csv"
            )
        seen.setdefault(key, row)
    return mistakes


def _file_mistakes(rows: list[Row]) -> list[str]:
    return [
        f"{row.where}: file {shorten(str(path), 300)!r} {_path_problem(path)}"
        for row in rows
        for path in (*row.images.values(), row.reference)
        if path is not None and not is_there(path)
    ]


def _path_problem(path: Path) -> str:
    """Describe what a path leads to instead of a file."""
    try:
        return f"is {kind_of(os.stat(path).st_mode)}, not a file"
    except (OSError, ValueError):
        return "does not exist"


def _patients_in_two_splits(rows: list[Row]) -> list[str]:
    mistakes = []
    seen: dict[str, Row] = {}
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


def is_valid_id(name: str) -> bool:
    """Check whether a name can be a case id, and so the name of a file on any system."""
    is_short = len(name.encode("utf-8", "replace")) <= MAX_ID_BYTES
    return is_short and re.fullmatch(ID_PATTERN, name) is not None


def safe_id(name: str) -> str:
    """Return a case id for a name: itself, with `%` and two hex digits for each unsafe byte.

    Letters of any script stay. `urllib.parse.unquote` gives the name back, in Unicode's form NFC.

    >>> safe_id("患者 1"), safe_id("a/b:c"), safe_id("con")
    ('患者 1', 'a%2Fb%3Ac', '%63on')
    """
    text = unicodedata.normalize("NFC", name)
    text = re.sub(rf"[^{_LETTERS}. -]|%", _escaped, text)
    text = re.sub(rf"\A[. -]|[. ]\Z|\A{_DEVICES}(?=\.|\Z)", _first_escaped, text)
    return text or "scan"


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def _first_escaped(match: re.Match[str]) -> str:
    return f"%{ord(match[0][0]):02X}{match[0][1:]}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
