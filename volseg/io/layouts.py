"""Find the cases of a data set: a CSV file, a folder of scans, nnU-Net raw, Medical Decathlon.

Only paths are read here, no scan. All mistakes of a data set are reported at once.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError, missing_path
from volseg.inputs import shorten
from volseg.io.cases import (
    ONE_CHANNEL,
    Case,
    Channels,
    Listing,
    Row,
    Survey,
    listed,
    read_cases_csv,
    safe_id,
)
from volseg.io.dataset_json import FILE, mistakes_in, read_dataset_json
from volseg.io.files import RECORDS
from volseg.io.formats import is_scan, stem_of
from volseg.io.matching import Group, are_related, group_files
from volseg.io.tables import unreadable
from volseg.words import format_count

MAX_CANDIDATES = 3  # names listed for a mask without a scan
NNUNET_SUFFIX = ".nii.gz"  # of the files of a dataset.json without `file_ending`


def find_cases(
    dataset: Path,
    channels: Sequence[str] | None = (ONE_CHANNEL,),
    *,
    allow_missing: bool = False,
    remark: Callable[[str], None] | None = None,
) -> list[Case]:
    """Return the cases of a data set in its own order.

    Args:
        dataset: a CSV file; or a folder with `cases.csv`, with an nnU-Net raw or Decathlon
            `dataset.json`, or with scans and masks that belong together by their names.
        channels: channels of the recipe; `image` stands for a single channel of any name, None for
            all channels.
        allow_missing: a case may lack any channel but the first; `images` then omits it.
        remark: called with each choice that was made in reading the data set.

    Raises:
        VolsegError: unknown layout, missing channel or file, invalid or repeated id, or a patient
            in two splits. One error lists all mistakes.
    """
    listing = _read_dataset(Path(dataset), Channels(channels, allow_missing))
    return _said(listing, remark).cases(str(dataset))


def survey_cases(
    dataset: Path, channels: Sequence[str] | None = None, *, allow_missing: bool = False
) -> Survey:
    """Return the cases whose files all exist, and what is wrong or unusual in the data set."""
    return _read_dataset(dataset, Channels(channels, allow_missing)).survey()


def find_scans(
    inputs: Sequence[Path],
    channels: Sequence[str] | None = (ONE_CHANNEL,),
    *,
    allow_missing: bool = False,
    remark: Callable[[str], None] | None = None,
) -> list[Case]:
    """Return the cases to segment, from scans, folders of scans, CSV files and data sets.

    Hidden files, among them the `._*` of macOS, are skipped.

    Args:
        remark: called with each choice that was made in reading the inputs.

    Raises:
        VolsegError: as `find_cases`; also for a single scan where several channels are required.
    """
    listing = Listing()
    for path in map(Path, inputs):
        if os.path.isdir(path) or path.suffix.lower() == ".csv":
            part = _read_dataset(path, Channels(channels, allow_missing), may_split=True)
            listing.rows += part.rows
            listing.mistakes += part.mistakes
            listing.remarks += part.remarks
        else:
            row = _row_of_scan(path, Channels(channels), where=str(path), origin=path)
            listing.rows.append(row)
    return _said(listing, remark).cases(", ".join(map(str, inputs)))


def _said(listing: Listing, remark: Callable[[str], None] | None) -> Listing:
    if remark is not None:
        for text in listing.remarks:
            remark(text)
    return listing


def is_dataset(path: Path) -> bool:
    """Check whether a path is a table of cases or a folder that says which mask is whose.

    Scans or masks alone are none, nor are results, which have `cases.csv` beside `masks/`.
    """
    has_table = (path / "cases.csv").is_file() and not (path / "masks").is_dir()
    return path.is_file() or has_table or (path / "labels").is_dir() or _has_description(path)


def _has_description(folder: Path) -> bool:
    """Check whether a `dataset.json` describes the subfolders.

    Beside scans it belongs to the model that predicted them: nnU-Net copies it there.
    """
    return (folder / FILE).is_file() and not _scans_in(folder)


def _read_dataset(dataset: Path, channels: Channels, *, may_split: bool = False) -> Listing:
    """Read the rows of a data set with the reader for its layout."""
    if not os.path.exists(dataset):
        raise missing_path(dataset)
    if not os.path.isdir(dataset):  # opening it refuses a pipe or a device
        return read_cases_csv(dataset, channels)
    if (dataset / "cases.csv").is_file():
        return read_cases_csv(dataset / "cases.csv", channels)
    if _has_description(dataset):
        description = read_dataset_json(dataset)
        read = _read_nnunet if _is_nnunet(dataset, description) else _read_decathlon
        listing = read(dataset, description, channels)
        listing.mistakes[:0] = mistakes_in(description)
        return listing
    if (dataset / "imagesTr").is_dir():
        raise VolsegError(
            f"{dataset}: has imagesTr but no {FILE}",
            fix=f"add a {FILE} that names the channels",
        )
    return _read_folder(dataset, channels, may_split=may_split)


def _read_folder(dataset: Path, channels: Channels, *, may_split: bool) -> Listing:
    """Read scans and masks below a folder, which belong together by their names.

    Files of `images/` and `labels/` with equal names do; else `group_files` decides.

    Args:
        may_split: take scans of several channels for cases of their own if one channel is
            requested and none has its name.
    """
    images = dataset / "images" if (dataset / "images").is_dir() else dataset
    if images != dataset and (channels.names is None or len(channels.names) == 1):
        listing = _read_equal_names(dataset, channels)
        if not listing.mistakes:
            return listing
    paths = _scans_in(images)
    if images != dataset:
        paths += _scans_in(dataset / "labels")
    elif not paths:
        paths = _scans_below(dataset)
    groups = group_files([path.relative_to(dataset) for path in paths])
    if not are_related(groups) and images == dataset and all(p.parent == dataset for p in paths):
        rows = [_row_of_scan(path, channels, where=str(path), origin=images) for path in paths]
        return Listing(rows)
    if may_split and _takes_one_of_none(channels, groups):
        scans = [dataset / path for group in groups for path in group.images.values()]
        return Listing([_row_of_scan(p, channels, where=str(p), origin=images) for p in scans])
    return _listing_of(dataset, groups, channels)


def _takes_one_of_none(channels: Channels, groups: Sequence[Group]) -> bool:
    """Tell whether one channel is requested of cases with several, none of which has its name."""
    names = {name for group in groups for name in group.images}
    requested = [name.casefold() for name in channels.names or ()]
    return len(requested) == 1 and len(names) > 1 and requested[0] not in names


def _read_equal_names(dataset: Path, channels: Channels) -> Listing:
    """Read `images/` and `labels/` with equal file names."""
    images = dataset / "images"
    listing = Listing()
    labels: dict[str, Path] = {}
    for path in _scans_in(dataset / "labels"):
        if labels.setdefault(stem_of(path), path) != path:
            text = f"{path}: {labels[stem_of(path)]} is a mask of the same name"
            listing.mistakes.append(text)
    for path in _scans_in(images):
        label = labels.pop(stem_of(path), None)
        row = _row_of_scan(path, channels, where=str(path), origin=images)
        why = "no mask has its name" if label is None else "scan and mask have the same name"
        listing.rows.append(replace(row, reference=label, why=why))
    listing.mistakes += [f"{path}: no scan of this name in {images}" for path in labels.values()]
    return listing


def _listing_of(dataset: Path, groups: Sequence[Group], channels: Channels) -> Listing:
    """Make a row of each group; report groups that are no case."""
    listing = Listing()
    n_scans = Counter(group.patient for group in groups if group.images)
    names = {name for group in groups for name in group.images}
    is_only = len(names) == 1 and channels.names is not None  # then its name tells nothing
    scans = [group.id for group in groups if group.images]
    for group in groups:
        if not group.images:
            paths = [dataset / mask for mask in group.masks]
            listing.mistakes += [_lone_mask(path, group.id, scans) for path in paths]
            continue
        first = dataset / next(iter(group.images.values()))
        listing.mistakes += _mistakes_in(dataset, group, first)
        images = {
            ONE_CHANNEL if is_only else name or ONE_CHANNEL: dataset / path
            for name, path in group.images.items()
        }
        try:
            picked = channels.pick(images, str(first))
        except VolsegError as error:
            listing.mistakes.append(error.problem)
            continue
        listing.rows.append(
            Row(
                where=str(first),
                id=safe_id(group.id or stem_of(first)),
                images=picked,
                reference=dataset / group.masks[0] if group.masks else None,
                patient=group.patient if n_scans[group.patient] > 1 else None,
                why=f"{format_count(len(picked) + len(group.masks), 'file')} of this name",
            )
        )
    listing.remarks += _remarks(dataset, listing.rows)
    return listing


def _mistakes_in(dataset: Path, group: Group, first: Path) -> Iterator[str]:
    for path in group.repeated:
        yield (
            f"{dataset / path}: by its name belongs to the same case as {first}, and to the same "
            "channel; rename one of them"
        )
    if len(group.masks) > 1:
        names = ", ".join(str(dataset / mask) for mask in group.masks)
        yield (
            f"{first}: has {len(group.masks)} masks: {names}; name the one to use in the table "
            f"that `volseg cases {dataset} --out cases.csv` writes"
        )


def _remarks(dataset: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Say in one line how files were put together, with an example."""
    row = max(rows, key=lambda row: (row.reference is not None, len(row.images)), default=None)
    if row is None:
        return
    files = [f"{path.name} ({name})" for name, path in row.images.items()]
    files += [] if row.reference is None else [f"{row.reference.name} (mask)"]
    yield (
        f"W_NAMES: {dataset}: {format_count(len(rows), 'case')} put together by file names, such "
        f"as {row.id}: {', '.join(files)}"
    )


def _lone_mask(path: Path, name: str, scans: Sequence[str]) -> str:
    near = get_close_matches(name, scans, n=MAX_CANDIDATES, cutoff=0.5)
    hint = f"; similar names are {', '.join(near)}" if near else ""
    return f"{path}: no scan goes with this mask, by its name{hint}"


def _scans_below(folder: Path) -> list[Path]:
    """Return the scans in all folders below, except hidden folders and results of volseg."""
    scans: list[Path] = []
    for path in _visible(folder):
        if path.is_dir() and not (path / RECORDS).is_dir():
            scans += _scans_in(path) + _scans_below(path)
    return scans


def _row_of_scan(path: Path, channels: Channels, *, where: str, origin: Path) -> Row:
    """Return the row of a scan of one channel, whose id is its name."""
    images = channels.pick({ONE_CHANNEL: path}, str(origin))
    return Row(where=where, id=safe_id(stem_of(path)), images=images, why="a scan by itself")


# ---- nnU-Net


def _read_nnunet(dataset: Path, description: Mapping[str, Any], channels: Channels) -> Listing:
    """Read imagesTr, labelsTr and imagesTs, with one file `<id>_<number>` per channel.

    Cases of imagesTr have no split; those of imagesTs are `test`. A list `training` decides which
    label a case has, and an object `dataset` replaces the folders.
    """
    if isinstance(entries := description.get("dataset"), dict):
        return _read_listed_files(dataset, entries, description, channels)
    numbers = channels.pick(_channel_numbers(dataset, description), str(dataset))
    first, suffix = next(iter(numbers)), _suffix(description)
    listed_labels = _listed_labels(dataset, description)
    listing = Listing()
    for images, labels, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        for stem in sorted({match[1] for match in _numbered(dataset / images, description)}):
            files = {
                name: dataset / images / f"{stem}_{number}{suffix}"
                for name, number in numbers.items()
            }
            if channels.allow_missing:  # a missing first channel is reported with the other files
                files = {
                    name: path for name, path in files.items() if name == first or path.is_file()
                }
            default = dataset / labels / f"{stem}{suffix}"
            reference = default if split else listed_labels.get(stem, default)
            listing.rows.append(
                Row(
                    where=f"{images}/{stem}",
                    id=safe_id(stem),
                    images=files,
                    reference=None if split == "test" and not reference.exists() else reference,
                    split=split,
                    why=f"nnU-Net's {images} and {reference.parent.name}",
                )
            )
    return listing


def _listed_labels(dataset: Path, description: Mapping[str, Any]) -> dict[str, Path]:
    """Return name of a case → its label in the list `training`; {} without such a list."""
    pairs = [entry for entry in _entries(description, "training") if _is_pair(entry)]
    return {
        re.sub(r"_\d{4}$", "", stem_of(Path(entry["image"]))): dataset / entry["label"]
        for entry in pairs
        if entry.get("label")
    }


def _read_listed_files(
    dataset: Path, entries: Mapping[str, Any], description: Mapping[str, Any], channels: Channels
) -> Listing:
    """Read the object `dataset` of nnU-Net: id → files of its channels, in order, and its label."""
    numbers = _channel_numbers(dataset, description)
    listing = Listing()
    for name, entry in entries.items():
        where = f"{FILE} dataset[{shorten(name)!r}]"
        files = entry.get("images", ()) if isinstance(entry, dict) else ()
        label = entry.get("label", "") if isinstance(entry, dict) else None
        is_valid = isinstance(files, list) and len(files) == len(numbers)
        if not is_valid or not all(isinstance(text, str) for text in (*files, label)):
            text = f"{where}: is not {format_count(len(numbers), 'image')} with a label"
            listing.mistakes.append(text)
            continue
        paths = {channel: dataset / file for channel, file in zip(numbers, files, strict=True)}
        listing.rows.append(
            Row(
                where=where,
                id=safe_id(name),
                images=channels.pick(paths, where),
                reference=dataset / label if label else None,
                why=where,
            )
        )
    return listing


def _channel_numbers(dataset: Path, description: Mapping[str, Any]) -> dict[str, str]:
    """Return channel → the four digits in its file names."""
    names = description.get("channel_names") or description.get("modality")
    is_valid = isinstance(names, dict) and all(key.isdecimal() and len(key) < 10 for key in names)
    if not names or not is_valid:
        raise VolsegError(
            f"{dataset}: {FILE} names no channels", fix='add "channel_names": {"0": "CT"}'
        )
    if len(set(map(str, names.values()))) < len(names):
        repeated = listed(map(str, names.values()))
        raise VolsegError(
            f"{dataset}: {FILE} gives two channels the same name ({repeated})",
            fix="give each channel its own name",
        )
    return {str(name): f"{int(key):04d}" for key, name in names.items()}


def _is_nnunet(dataset: Path, description: Mapping[str, Any]) -> bool:
    """Check whether a `dataset.json` is of nnU-Net.

    Version 1 lists files as the Decathlon does, but their real names end in the channel number.
    """
    if "channel_names" in description or isinstance(description.get("dataset"), dict):
        return True
    images = [entry["image"] for entry in _entries(description, "training") if _is_pair(entry)]
    is_listed = any((dataset / name).is_file() for name in images)
    return bool(_numbered(dataset / "imagesTr", description)) and not is_listed


def _numbered(folder: Path, description: Mapping[str, Any]) -> list[re.Match]:
    """Return the matches of files `<id>_<4 digits><suffix>` in an nnU-Net folder."""
    pattern = r"(.+)_(\d{4})" + re.escape(_suffix(description))
    matches = [re.fullmatch(pattern, path.name) for path in _visible(folder)]
    return [match for match in matches if match]


def _suffix(description: Mapping[str, Any]) -> str:
    return str(description.get("file_ending", NNUNET_SUFFIX))


# ---- Decathlon


def _read_decathlon(dataset: Path, description: Mapping[str, Any], channels: Channels) -> Listing:
    """Read the lists `training` (no split), `validation` and `test` of a Decathlon dataset.json."""
    listing = Listing()
    for key, split in (("training", None), ("validation", "val"), ("test", "test")):
        for number, entry in enumerate(_entries(description, key)):
            where = f"{FILE} {key}[{number}]"
            entry = {"image": entry} if isinstance(entry, str) else entry
            if not _is_pair(entry):
                text = json.dumps(entry)[:60]
                listing.mistakes.append(f"{where}: is {text}, not an image with its label")
                continue
            row = _row_of_scan(dataset / entry["image"], channels, where=where, origin=dataset)
            label = dataset / entry["label"] if entry.get("label") else None
            listing.rows.append(replace(row, reference=label, split=split, why=where))
    return listing


def _entries(description: Mapping[str, Any], key: str) -> list:
    entries = description.get(key)
    return entries if isinstance(entries, list) else []


def _is_pair(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("image"), str)
        and isinstance(entry.get("label", ""), str)
    )


# ---- files


def _scans_in(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if is_scan(path)]


def _visible(folder: Path) -> list[Path]:
    """Return the sorted paths in a folder without hidden ones; [] if there is no such folder."""
    try:
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error
