"""Folders of DICOM series as cases, whose ids are hashes: names of folders may be of patients."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from volseg.errors import VolsegError
from volseg.inputs import shorten
from volseg.io.cases import ONE_CHANNEL, Channels, Listing, Row
from volseg.io.dicom import folder_of, pixel_finding
from volseg.io.dicom_frames import SUFFIXES, Skipped
from volseg.io.dicom_masks import is_mask, referenced_series
from volseg.io.dicom_series import DicomFolder, DicomVolume, collect
from volseg.io.series import with_series
from volseg.words import format_count, format_list

LARGEST = "largest"  # --series: the one with most voxels
SAMPLE = 10  # files by which slices are told from pictures
UNPLACED = re.compile(r"E_MOSAIC|E_NOGEOM: \d+ frames")
SINGLE = "E_NDIM"  # images of one slice, such as surveys, are no scans


def read_dicom(place: Path, channels: Channels, series: str | None = None) -> Listing | None:
    """List the series in a DICOM file or folder as scans; None if there is no DICOM file.

    Series that cannot be read are cases too, so that none is lost: reading them says why.

    Args:
        series: UID, key or description of the series to take, or `largest`.

    Raises:
        VolsegError: no series is the one to take, or the recipe needs several channels.
    """
    folder = folder_of(place)
    if not folder.volumes and not folder.skipped:
        return None
    masks = _masks_of(folder)
    listing = Listing(remarks=list(_remarks(place, folder, masks)))
    volumes = [volume for volume in folder.volumes if not _is_single(volume)]
    if not volumes:
        reasons = [skipped.reason for skipped in folder.skipped] or ["single slices"]
        text = format_list(list(dict.fromkeys(reasons)), 3)
        listing.mistakes.append(f"holds DICOM files, but no volume: {text}")
    for volume in volumes if series is None else _chosen(place, volumes, series):
        path = with_series(_home_of(volume), volume.key)
        images = channels.pick({ONE_CHANNEL: path}, str(place))
        why = f"a DICOM series of {format_count(len(volume.frames), 'slice')}"
        row = Row(where=str(place), id=volume.key, images=images, why=why)
        if len(paths := masks.get(volume.frames[0].series, ())) == 1:
            row = replace(row, reference=paths[0], why=f"{why}, to which the mask refers")
        listing.rows.append(row)
    return listing


def _masks_of(folder: DicomFolder) -> dict[str, list[Path]]:
    """Return UID of a series → the segmentations and contours that refer to it."""
    masks = defaultdict[str, list[Path]](list)
    for skipped in folder.skipped:
        if is_mask(skipped):
            for series in referenced_series(skipped.path):
                masks[series].append(skipped.path)
    return masks


def are_slices(paths: Sequence[Path]) -> bool:
    """Tell whether these files are DICOM slices of volumes, or their masks, from some of them.

    Radiographs are not: each is a series of its own, or has no place in the patient. Slices without
    a place are, if they are of one series, and so are files of several slices.
    """
    if not all(path.suffix.lower() in SUFFIXES for path in paths):
        return False
    sample = collect(paths[:SAMPLE])
    stacks = Counter(skipped.stack for skipped in sample.skipped if skipped.stack)
    return (
        any(len(volume.frames) > 1 for volume in sample.volumes)
        or any(is_mask(skipped) or _is_unplaced(skipped) for skipped in sample.skipped)
        or max(stacks.values(), default=0) > 1
    )


def _is_unplaced(skipped: Skipped) -> bool:
    """Check whether a file holds several slices whose places are unknown."""
    return bool(skipped.stack) and UNPLACED.match(skipped.reason) is not None


def _is_single(volume: DicomVolume) -> bool:
    return volume.error is not None and volume.error.code == SINGLE


def _home_of(volume: DicomVolume) -> Path:
    """Return the file of a volume, or the deepest folder that holds all of its files."""
    paths = list(dict.fromkeys(frame.path for frame in volume.frames))
    if len(paths) == 1:
        return paths[0]
    home = paths[0].parent
    while not all(path.is_relative_to(home) for path in paths):
        home = home.parent
    return home


def _chosen(place: Path, volumes: Sequence[DicomVolume], series: str) -> list[DicomVolume]:
    """Return the volumes that `--series` names.

    Raises:
        VolsegError: none is.
    """
    if series.casefold() == LARGEST:
        usable = [volume for volume in volumes if volume.error is None] or list(volumes)
        return [max(usable, key=lambda volume: int(np.prod(volume.shape)))] if usable else []
    selected = [volume for volume in volumes if series in (volume.key, volume.frames[0].series)]
    selected = selected or _described(volumes, series)
    if not selected:
        shown = [f"{v.key} ({shorten(v.frames[0].description, 40)})" for v in volumes]
        raise VolsegError(
            f"{place}: no series is {shorten(series)!r}; there are {format_list(shown, 5)}",
            fix="give --series a key, UID or description of one of them, or largest",
            code="E_SERIES",
        )
    return selected


def _described(volumes: Sequence[DicomVolume], text: str) -> list[DicomVolume]:
    return [v for v in volumes if v.frames[0].description.casefold() == text.casefold()]


def _remarks(
    place: Path, folder: DicomFolder, masks: Mapping[str, Sequence[Path]]
) -> Iterator[str]:
    """Say in one line each which series there are, their masks, and which files are neither."""
    used = set[Path]()
    for volume in folder.volumes:
        yield f"N_SERIES: {place}: {describe(volume)}"
        paths = masks.get(volume.frames[0].series, ())
        used |= set(paths)
        if len(paths) > 1:
            names = format_list([str(path) for path in paths], 3)
            text = f"{len(paths)} masks refer to {volume.key}, none is used unless named: {names}"
            yield f"N_MASKS: {place}: {text}"
    skipped_files = [skipped for skipped in folder.skipped if skipped.path not in used]
    if skipped_files:
        counts = Counter(skipped.reason.partition(";")[0] for skipped in skipped_files)
        reasons = [f"{reason} ({n})" for reason, n in counts.items()]
        count = format_count(len(skipped_files), "DICOM file")
        text = f"{count} left out: {format_list(reasons, 5)}"
        is_lost = any(reason.startswith("E_") for reason in counts)
        yield f"{'W' if is_lost else 'N'}_SKIPPED: {place}: {text}"


def describe(volume: DicomVolume) -> str:
    """Return key, modality, size and verdict of a volume in one line."""
    first = volume.frames[0]
    spacing = ""
    if volume.affine is not None:
        sizes = np.linalg.norm(volume.affine[:3, :3], axis=0)
        spacing = f", {' × '.join(f'{size:.4g}' for size in sizes)} mm"
    size = "×".join(map(str, volume.shape))
    findings = [*volume.findings, *filter(None, [pixel_finding(volume)])]
    verdict = "; ".join(f"{finding.code} {finding.text}" for finding in findings) or "sound"
    return f"{volume.key}: {first.modality or 'unknown modality'}, {size}{spacing}: {verdict}"


def descriptions(place: Path) -> dict[str, str]:
    """Return key → description of each series that has one.

    Free text may name a patient, so it is for the terminal alone and never part of a result.
    """
    volumes = folder_of(place).volumes
    texts = {volume.key: volume.frames[0].description for volume in volumes}
    return {key: shorten(text, 60) for key, text in texts.items() if text}
