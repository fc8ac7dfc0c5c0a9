"""Folders that a `dataset.json` describes: nnU-Net raw and the Medical Decathlon."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.inputs import shorten
from volseg.io.cases import Channels, Listing, Row, listed, safe_id
from volseg.io.dataset_json import FILE, mistakes_in, read_dataset_json
from volseg.io.folders import lone_mask, row_of_scan, scans_in
from volseg.io.formats import stem_of
from volseg.io.paths import visible_paths
from volseg.words import format_count, format_list

NNUNET_SUFFIX = ".nii.gz"  # of the files of a dataset.json without `file_ending`
MAX_NAMED = 5  # cases named in one remark
CHANNEL_NUMBER = re.compile(r"_\d{4}$")  # at the end of the stem of a scan


def read_described(dataset: Path, channels: Channels) -> Listing:
    """Read a folder with a `dataset.json`, whose mistakes come first."""
    description = read_dataset_json(dataset)
    read = _read_nnunet if _is_nnunet(dataset, description) else _read_decathlon
    listing = read(dataset, description, channels)
    listing.mistakes[:0] = mistakes_in(description)
    return listing


# ---- nnU-Net


def _read_nnunet(dataset: Path, description: Mapping[str, Any], channels: Channels) -> Listing:
    """Read imagesTr, labelsTr and imagesTs, with one file `<id>_<number>` per channel.

    Cases of imagesTr have no split; those of imagesTs are `test`. A list `training` decides which
    cases of imagesTr are used and which label each has; an object `dataset` replaces the folders.
    """
    if isinstance(entries := description.get("dataset"), dict):
        return _read_listed_files(dataset, entries, description, channels)
    numbers = channels.pick(_channel_numbers(dataset, description), str(dataset))
    pairs, mistakes = _pairs_in(description, "training")
    label_of = {_case_in(pair): dataset / pair["label"] for pair in pairs if pair.get("label")}
    required = frozenset(channels.required(list(numbers)))
    raw = _RawFolders(dataset, _suffix(description), numbers, required, label_of)
    listing, named = Listing(mistakes=mistakes), set(map(_case_in, pairs))
    for images, labels, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        stems = raw.stems(images)
        rows = [raw.row_of(stem, images, labels, split) for stem in stems]
        used = set(stems) & named if named and split is None else set(stems)
        listing.rows += [row for stem, row in zip(stems, rows, strict=True) if stem in used]
        unlisted = [stem for stem in stems if stem not in used]
        listing.remarks += _unlisted(dataset, images, unlisted)
        references = {row.reference for row in rows if row.reference is not None}
        listing.mistakes += raw.lone_labels(references, stems)
    in_folder = set(raw.stems("imagesTr"))
    listing.mistakes += [
        f"{pair['where']}: {shorten(_image_of(pair))} is not in imagesTr"
        for pair in pairs
        if _case_in(pair) not in in_folder
    ]
    if not listing.rows and (scans := scans_in(dataset / "imagesTr")):
        listing.mistakes.append(
            f"{FILE}: no scan in imagesTr is named <case>_<4 digits>{raw.suffix}, as its "
            f"file_ending states; the first is {scans[0].name}"
        )
    return listing


@dataclass(frozen=True, slots=True)
class _RawFolders:
    """The folders of nnU-Net.

    Args:
        suffix: of all files. numbers: channel → the digits in its files.
        required: channels whose missing files are a mistake.
        label_of: name of a case → label, where a list states it.
    """

    dataset: Path
    suffix: str
    numbers: Mapping[str, str]
    required: frozenset[str]
    label_of: Mapping[str, Path]

    def stems(self, images: str) -> list[str]:
        """Return the names of the cases in a folder."""
        return sorted({match[1] for match in _numbered(self.dataset / images, self.suffix)})

    def row_of(self, stem: str, images: str, labels: str, split: str | None) -> Row:
        paths = {
            name: self.dataset / images / f"{stem}_{number}{self.suffix}"
            for name, number in self.numbers.items()
        }
        files = {
            name: path
            for name, path in paths.items()
            if name in self.required or os.path.lexists(path)
        }
        default = self.dataset / labels / f"{stem}{self.suffix}"
        reference = default if split else self.label_of.get(stem, default)
        return Row(
            where=f"{images}/{stem}",
            id=safe_id(stem),
            images=files,
            reference=None if split == "test" and not reference.exists() else reference,
            split=split,
            why=f"nnU-Net's {images} and {reference.parent.name}",
        )

    def lone_labels(self, references: Collection[Path], stems: Sequence[str]) -> Iterator[str]:
        """Yield the labels without a scan in the folders of other labels."""
        for folder in sorted({path.parent for path in references}):
            for path in scans_in(folder):
                if path not in references and path.name.endswith(self.suffix):
                    yield lone_mask(path, path.name.removesuffix(self.suffix), stems)


def _case_in(pair: Mapping[str, Any]) -> str:
    """Return the name of the case of a pair in a list, whose scan may end in a channel number."""
    return CHANNEL_NUMBER.sub("", stem_of(Path(_image_of(pair))))


def _image_of(pair: Mapping[str, Any]) -> str:
    """Return the scan of a pair, the first of several channels."""
    return pair["image"] if isinstance(pair["image"], str) else pair["image"][0]


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
    pairs, _ = _pairs_in(description, "training")
    is_listed = any((dataset / _image_of(pair)).is_file() for pair in pairs)
    return bool(_numbered(dataset / "imagesTr", _suffix(description))) and not is_listed


def _numbered(folder: Path, suffix: str) -> list[re.Match]:
    """Return the matches of files `<id>_<4 digits><suffix>` in an nnU-Net folder."""
    pattern = r"(.+)_(\d{4})" + re.escape(suffix)
    matches = [re.fullmatch(pattern, path.name) for path in visible_paths(folder)]
    return [match for match in matches if match]


def _suffix(description: Mapping[str, Any]) -> str:
    return str(description.get("file_ending", NNUNET_SUFFIX))


# ---- Decathlon


def _read_decathlon(dataset: Path, description: Mapping[str, Any], channels: Channels) -> Listing:
    """Read the lists `training` (no split), `validation` and `test` of a Decathlon dataset.json."""
    listing = Listing()
    for key, split in (("training", None), ("validation", "val"), ("test", "test")):
        pairs, mistakes = _pairs_in(description, key)
        listing.mistakes += mistakes
        for pair in pairs:
            where = pair["where"]
            row = row_of_scan(dataset / _image_of(pair), channels, where=where, origin=dataset)
            label = dataset / pair["label"] if pair.get("label") else None
            listing.rows.append(replace(row, reference=label, split=split, why=where))
    read = {os.path.normpath(path) for row in listing.rows for path in row.images.values()}
    scans = [path for path in scans_in(dataset / "imagesTr") if os.path.normpath(path) not in read]
    listing.remarks += _unlisted(dataset, "imagesTr", [stem_of(path) for path in scans])
    return listing


# ---- lists of files


def _pairs_in(description: Mapping[str, Any], key: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the pairs of image and label in a list, each with its place, and the mistakes."""
    pairs, mistakes = list[dict[str, Any]](), list[str]()
    entries = description.get(key)
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        where = f"{FILE} {key}[{number}]"
        entry = {"image": entry} if isinstance(entry, str) else entry
        if _is_pair(entry):
            pairs.append({**entry, "where": where})
        else:
            text = shorten(json.dumps(entry), 60)
            mistakes.append(f"{where}: is {text}, not an image with its label")
    return pairs, mistakes


def _unlisted(dataset: Path, folder: str, stems: Sequence[str]) -> list[str]:
    """Return a remark on the cases of a folder that no list names, if there are any."""
    if not stems:
        return []
    are, they = ("is", "it is") if len(stems) == 1 else ("are", "they are")
    return [
        f"W_LIST: {dataset}: {format_count(len(stems), 'case')} of {folder} {are} not in the list "
        f"of {FILE}, so {they} not used: {format_list(stems, MAX_NAMED)}"
    ]


def _is_pair(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("label", ""), str):
        return False
    images = entry.get("image")
    are_texts = isinstance(images, list) and images and all(isinstance(i, str) for i in images)
    return isinstance(images, str) or bool(are_texts)
