"""Data sets of 2D images: a folder per class, a table, a MedMNIST file, or slices of volumes.

Nothing is read but tables, headers of volumes, and masks where the target is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from volseg.errors import ScanError, VolsegError, missing_path
from volseg.io.cases import NO_SCANS, ONE_CHANNEL, Case, dataset_error, listed, safe_id
from volseg.io.dicom_layout import are_slices
from volseg.io.files import RECORDS
from volseg.io.formats import is_scan, stem_of
from volseg.io.image_folders import CLASS, read_image_folders
from volseg.io.image_listing import ImageCase, ImageListing, split_mistakes
from volseg.io.image_tables import (
    HEADS,
    LABEL,
    SLICE,
    is_arrays,
    read_image_arrays,
    read_image_table,
    slices_of_scans,
)
from volseg.io.images import READABLE, UNREAD_SUFFIXES, is_image, through_axis
from volseg.io.layouts import survey_cases
from volseg.io.paths import visible_paths
from volseg.io.tables import read_table
from volseg.io.target_cells import is_missing, is_number, kind_of
from volseg.io.volumes import read_header, read_mask
from volseg.recipe.classification import CLASSES, LABELS, NUMBER, split_names
from volseg.words import format_count

__all__ = [
    "ImageCase",
    "ImageSurvey",
    "TargetColumn",
    "find_images",
    "looks_like_images",
    "survey_images",
]

TABLE = "cases.csv"
LIKELY = (CLASS, LABEL, "target", "diagnosis")  # names of a column to learn
TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
WITH_LABEL, WITHOUT_LABEL = "with label", "without label"  # classes of slices, from their masks
MOST_CLASSES = 100
MOST_DEPTHS = 4  # folders in folders that are searched
SAMPLE = 2000  # entries of a folder, and rows of a table, from which its kind is told

Kind = Literal["classes", "labels", "number", "mask"]


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """A column that could be the target.

    Args:
        kind: `classes`; `labels`, several at once; `number`; or `mask`, which says of each slice
            whether it holds a label.
        values: the distinct ones that are not empty, sorted; none of a mask, which is not read.
        n_empty: images without a value.
    """

    name: str
    kind: Kind
    values: tuple[str, ...]
    n_empty: int

    @property
    def n_values(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class ImageSurvey:
    """The usable images of a data set, every mistake in it, and remarks on how it was read.

    Args:
        cases: in the order of the data set; those with an empty target are among them.
        target_columns: columns that could be the target, in the order of the table.
        unlabelled: one sentence for each image whose cell of the target is empty.
    """

    cases: list[ImageCase]
    target_columns: list[TargetColumn]
    mistakes: list[str]
    remarks: list[str]
    unlabelled: list[str] = field(default_factory=list)

    @property
    def likely_target(self) -> str | None:
        """The column to learn if none is named: the class that folders give, or the only one."""
        names = [column.name for column in self.target_columns]
        usual = [name for name in LIKELY if name in names]
        return usual[0] if usual else names[0] if len(names) == 1 else None


def survey_images(dataset: Path, *, target: str | None = None) -> ImageSurvey:
    """Find the images of a data set.

    Args:
        dataset: a folder per class (`benign/x.png`, or `train/benign/x.png`); a table with a column
            `image`, or a folder with such a `cases.csv`; a MedMNIST `.npz`, or a folder with one;
            a folder of images without classes; or a data set of volumes, of which all axial slices
            are taken unless the table has a column `slice`, counted from 0 at the feet.
        target: column to learn. If it holds masks of volumes, these are read, and its cells become
            `with label` or `without label`, slice by slice.

    Raises:
        VolsegError: the layout is unknown, a table cannot be read, or it lacks the target.
    """
    dataset = Path(dataset)
    listing = _read(dataset)
    cases = listing.usable()
    masks = listing.mask_columns
    if target is not None and target not in (*listing.columns, *masks):
        if not cases and listing.mistakes:  # no columns, because there is nothing
            raise dataset_error(listing.mistakes, str(dataset))
        raise _missing_target(target, [*listing.columns, *masks], dataset)
    if target is not None and target in masks:
        cases = list(_labelled_by_masks(cases, target, listing.mistakes))
        masks = [name for name in masks if name != target]
    columns = _target_columns(cases, masks)
    unlabelled = [
        f"{case.where}: the cell of {target!r} is empty"
        for case in cases
        if target is not None and not case.cells.get(target)
    ]
    return ImageSurvey(cases, columns, listing.mistakes, listing.remarks, unlabelled)


def find_images(
    inputs: Sequence[Path], *, remark: Callable[[str], None] | None = None
) -> list[ImageCase]:
    """Return the images to classify, from files, volumes, folders, tables and data sets.

    Args:
        inputs: of a volume, all axial slices are taken.
        remark: called with each choice that was made in reading the inputs.

    Raises:
        VolsegError: as `survey_images`; one error lists all mistakes. Splits are not checked.
    """
    listing = ImageListing()
    for path in map(Path, inputs):
        if is_image(path):
            listing.cases.append(ImageCase(safe_id(path.stem), path, where=str(path)))
        elif is_scan(path):
            slices_of_scans([Case(safe_id(stem_of(path)), {ONE_CHANNEL: path})], listing)
        else:
            if path.is_file() and not (is_arrays(path) or _is_table(path)):
                raise VolsegError(
                    f"{path}: is not an image; images end in {READABLE}",
                    fix="convert it to PNG",
                    code="E_NOTIMAGE",
                )
            part = _read_images(path) or _slices(path)
            listing.cases += part.cases
            listing.mistakes += part.mistakes
            listing.remarks += part.remarks
    cases = listing.usable()
    if listing.mistakes:
        raise dataset_error(listing.mistakes, ", ".join(map(str, inputs)))
    if remark is not None:
        for text in listing.remarks:
            remark(text)
    return cases


def looks_like_images(dataset: Path) -> bool:
    """Tell whether a data set is of 2D images to classify, rather than of scans to segment.

    No image is read. A table of volumes is one of images if it has a column `slice`; a folder is
    one if it holds pictures, or a MedMNIST file, and no scans.
    """
    dataset = Path(dataset)
    try:
        if is_arrays(dataset):
            # An added format of scans may have the same suffix.
            return dataset.is_file() and not is_scan(dataset)
        if not dataset.is_dir():
            return _is_table(dataset) and _lists_images(dataset)
        table = dataset / TABLE
        return _lists_images(table) if table.is_file() else _has_images(dataset)
    except (VolsegError, OSError):
        return False  # the reader of the data set will say what is wrong


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLE_SUFFIXES)


def _lists_images(path: Path) -> bool:
    table = read_table(path, HEADS)
    if "image" not in table.columns:
        return False
    column = list(table.columns).index("image")
    rows = [cells for _, cells in table.lines[:SAMPLE] if len(cells) > column and cells[column]]
    names = [Path(cells[column].replace("\\", "/")) for cells in rows]
    if not names:
        return False
    images = [is_image(name) or (is_arrays(name) and not is_scan(name)) for name in names]
    if 2 * sum(images) > len(names):  # others are mistakes of their rows
        return True
    return SLICE in table.columns and all(map(is_scan, names))


def _has_images(folder: Path) -> bool:
    paths = list(islice(_files_below(folder), SAMPLE))
    if any(map(is_scan, paths)) or are_slices(list(filter(is_image, paths))):
        return False
    return any(is_image(path) or (path.parent == folder and is_arrays(path)) for path in paths)


# ---- reading


def _read(dataset: Path) -> ImageListing:
    listing = _read_images(dataset)
    if listing is None:
        return _slices(dataset)
    listing.mistakes += split_mistakes(listing.cases)
    return listing


def _read_images(dataset: Path) -> ImageListing | None:
    """List the images of a data set; None if it is one of volumes."""
    if not dataset.exists():
        raise missing_path(dataset)
    if is_arrays(dataset):
        return read_image_arrays(dataset)
    table = dataset / TABLE if dataset.is_dir() else dataset
    if table.is_file():
        return read_image_table(table) if looks_like_images(table) else None
    arrays = [path for path in visible_paths(dataset) if is_arrays(path)]
    files = list(_files_below(dataset))
    images = [path for path in files if is_image(path)]
    if images:
        listing = read_image_folders(dataset, images)
        listing.remarks += _unread(dataset, files)
        return listing
    if len(arrays) > 1:
        raise VolsegError(
            f"{dataset}: holds {len(arrays)} .npz files: {listed(p.name for p in arrays[:5])}",
            fix="give the one to use",
            code="E_DATASET",
        )
    return read_image_arrays(arrays[0]) if arrays else None


def _unread(dataset: Path, files: Sequence[Path]) -> list[str]:
    """Return a warning if there are pictures of a format that is not read."""
    unread = [path for path in files if path.name.lower().endswith(UNREAD_SUFFIXES)]
    if not unread:
        return []
    count = format_count(len(unread), "picture")
    first = unread[0].relative_to(dataset)
    return [
        f"W_FORMAT: {dataset}: left out {count} of a format that is not read, first {first}; "
        "convert to PNG"
    ]


def _slices(dataset: Path) -> ImageListing:
    survey = survey_cases(dataset)
    mistakes = [text for text in survey.mistakes if text != NO_SCANS]  # nor images
    listing = ImageListing(mistakes=mistakes, remarks=list(survey.remarks))
    slices_of_scans(survey.cases, listing)
    return listing


def _files_below(folder: Path, depth: int = MOST_DEPTHS) -> Iterator[Path]:
    """Yield the visible files of a folder and of those below, without results of volseg."""
    folders = []
    for path in visible_paths(folder):
        if not path.is_dir():
            yield path
        elif depth and not (path / RECORDS).is_dir():
            folders.append(path)
    for path in folders:
        yield from _files_below(path, depth - 1)


# ---- targets


def _missing_target(target: str, columns: Sequence[str], dataset: Path) -> VolsegError:
    near = get_close_matches(target, columns, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
    shown = listed(columns) or "none: put images of each class into a folder of its own"
    return VolsegError(
        f"{dataset}: has no column {target!r}; its columns are {shown}", fix=hint, code="E_TARGET"
    )


def _target_columns(cases: Sequence[ImageCase], masks: Collection[str]) -> list[TargetColumn]:
    """Return the columns that could be the target."""
    columns = [TargetColumn(name, "mask", (), _n_without_mask(cases)) for name in masks]
    for name in dict.fromkeys(name for case in cases for name in case.cells if name != SLICE):
        cells = [case.cells.get(name, "") for case in cases]
        texts = [text for text in cells if text and not is_missing(text)]
        values = sorted(_values_in(texts), key=_numbers_first)
        kind = _kind_of(values, texts)
        if kind is not None:
            columns.append(TargetColumn(name, kind, tuple(values), len(cells) - len(texts)))
    return columns


def _values_in(texts: Sequence[str]) -> set[str]:
    """Return the different texts of a column, or labels if cells hold several."""
    several = kind_of(texts) == LABELS
    return {part for text in texts for part in (split_names(text) if several else [text])}


def _n_without_mask(cases: Sequence[ImageCase]) -> int:
    return sum(case.mask is None for case in cases)


def _kind_of(values: Sequence[str], texts: Sequence[str]) -> Kind | None:
    """Tell what a column of these texts and distinct values is; None for names and remarks."""
    if len(values) < 2:
        return None
    kind = kind_of(texts)
    if kind == NUMBER:
        return "number"
    if kind == CLASSES and all(map(is_number, values)):
        return "classes"
    # At least two images of a class on average: else the column is a name.
    return kind if len(values) <= min(MOST_CLASSES, len(texts) // 2) else None


def _numbers_first(text: str) -> tuple[bool, float, str]:
    return (False, float(text), text) if is_number(text) else (True, 0.0, text)


def _labelled_by_masks(
    cases: Sequence[ImageCase], target: str, mistakes: list[str]
) -> Iterator[ImageCase]:
    """Yield the slices with their class from the masks; those of unusable masks are mistakes."""
    labelled: Mapping[tuple[Path, Path], np.ndarray | None] = {
        key: _labelled_slices(*key, mistakes)
        for key in dict.fromkeys((case.path, case.mask) for case in cases if case.mask)
    }
    for case in cases:
        is_labelled = None if case.mask is None else labelled[case.path, case.mask]
        if case.mask is not None and is_labelled is None:
            continue
        text = ""
        if is_labelled is not None and case.index is not None:
            text = WITH_LABEL if is_labelled[case.index] else WITHOUT_LABEL
        yield replace(case, cells={target: text, **case.cells})


def _labelled_slices(path: Path, mask_path: Path, mistakes: list[str]) -> np.ndarray | None:
    """Return (slices,) bool; None after noting that the mask does not fit the volume."""
    try:
        mask, geometry = read_mask(mask_path, like=path), read_header(path).geometry
    except ScanError as error:
        mistakes.append(error.problem)
        return None
    difference = mask.geometry.difference(geometry)
    if difference:
        mistakes.append(f"{mask_path}: is not on the grid of {path.name}: {difference}")
        return None
    array = mask.canonical().array
    through = through_axis(array.shape)
    return np.any(np.moveaxis(array, through, 0).reshape(array.shape[through], -1), axis=1)
