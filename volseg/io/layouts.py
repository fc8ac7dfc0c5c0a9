"""Find the cases of a data set: a CSV file, a folder of scans, nnU-Net raw, Medical Decathlon.

Only paths are read here, no scan. All mistakes of a data set are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from volseg.errors import VolsegError, missing_path
from volseg.io.cases import (
    ONE_CHANNEL,
    ONLY_IMAGES,
    Case,
    Channels,
    Listing,
    Survey,
    read_cases_csv,
)
from volseg.io.dataset_json import FILE
from volseg.io.described import read_described
from volseg.io.dicom_frames import holds_slices, is_dicom
from volseg.io.dicom_layout import read_dicom
from volseg.io.folders import read_folder, row_of_scan, scans_in
from volseg.io.formats import DICOM, format_of, is_scan
from volseg.io.series import split_series, split_spacing, with_spacing
from volseg.io.stacks import is_stack, stacks_in
from volseg.words import format_count, format_sizes

Spacing = tuple[float, float, float]  # of voxels along I, J, K, in mm


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
        VolsegError: unknown layout, missing channel or file, invalid or repeated id. One error
            lists all mistakes.
    """
    listing = _read_dataset(Path(dataset), Channels(channels, allow_missing))
    listing.remarks += listing.unlabelled(str(dataset)) + listing.split_remarks(str(dataset))
    return _said(listing, remark).cases(str(dataset))


def survey_cases(
    dataset: Path, channels: Sequence[str] | None = None, *, allow_missing: bool = False
) -> Survey:
    """Return the cases whose files all exist, and what is wrong or unusual in the data set."""
    listing = _read_dataset(dataset, Channels(channels, allow_missing))
    listing.remarks += listing.unlabelled(str(dataset))
    return listing.survey()


def find_scans(
    inputs: Sequence[Path],
    channels: Sequence[str] | None = (ONE_CHANNEL,),
    *,
    allow_missing: bool = False,
    series: str | None = None,
    spacing: Spacing | None = None,
    remark: Callable[[str], None] | None = None,
) -> list[Case]:
    """Return the cases to segment, from scans, folders of scans, CSV files and data sets.

    Hidden files, among them the `._*` of macOS, are skipped. A folder without scans may hold
    DICOM series.

    Args:
        series: UID, key or description of the DICOM series to take of a folder, or `largest`.
        spacing: voxel spacing (I, J, K) in mm of arrays and stacks of pictures.
        remark: called with each choice that was made in reading the inputs.

    Raises:
        VolsegError: as `find_cases`; also for a single scan where several channels are required.
    """
    listing = Listing()
    for path in map(Path, inputs):
        part = _read_scans(path, Channels(channels, allow_missing), series, spacing)
        listing.rows += part.rows
        listing.mistakes += part.mistakes
        listing.remarks += part.remarks + part.split_remarks(str(path))
    cases = _said(listing, remark).cases(", ".join(map(str, inputs)))
    paths = (path for case in cases for path in case.images.values())
    if series is not None and not any(split_series(path)[1] for path in paths):
        raise VolsegError(
            f"{', '.join(map(str, inputs))}: holds no DICOM series, but one is to be chosen",
            fix="leave out --series",
            code="E_USAGE",
        )
    return cases


def of_spacing(case: Case, spacing: Spacing | None) -> Case:
    """Return the case with this spacing of its arrays and stacks of pictures."""
    if spacing is None:
        return case
    images = {name: _marked(path, spacing) for name, path in case.images.items()}
    mask = None if case.reference is None else _marked(case.reference, spacing)
    return replace(case, images=images, reference=mask)


def spacing_remarks(cases: Sequence[Case], spacing: Spacing | None) -> list[str]:
    """Say how arrays and stacks are placed.

    Raises:
        VolsegError: a spacing is given, but all files state their own.
    """
    if spacing is None:
        return []
    n = sum(split_spacing(path)[1] is not None for case in cases for path in case.images.values())
    masks = [case.reference for case in cases if case.reference is not None]
    n_masks = sum(split_spacing(mask)[1] is not None for mask in masks)
    if not n and not n_masks:
        raise VolsegError(
            "--spacing is for NPY, NPZ, TIFF and folders of pictures, and there are none",
            fix="leave out --spacing: the other formats state it",
            code="E_USAGE",
        )
    what = format_count(n, "scan") if n else format_count(n_masks, "mask")
    return [
        f"N_SPACING: {what} without geometry: voxels of {format_sizes(spacing)} "
        "mm, and the axes I, J, K are taken for R, A, S"
    ]


def _marked(path: Path, spacing: Spacing) -> Path:
    is_bare = split_spacing(path)[1] is None and is_stack(path)
    return with_spacing(path, spacing) if is_bare else path


def _read_scans(
    path: Path, channels: Channels, series: str | None, spacing: Spacing | None
) -> Listing:
    """Read the rows of a scan, a folder of scans, a CSV file or a data set."""
    if spacing is not None and path.suffix.lower() != ".csv" and (stacks := stacks_in(path)):
        marked = [with_spacing(stack, spacing) for stack in stacks]
        return Listing(
            [row_of_scan(part, channels, where=str(path), origin=path) for part in marked]
        )
    if os.path.isdir(path) or path.suffix.lower() == ".csv":
        return _read_dataset(path, channels, may_split=True, series=series)
    if os.path.isfile(path) and format_of(path).name == DICOM:
        listing = read_dicom(path, channels, series)
        if listing is not None:
            return listing
    row = row_of_scan(path, Channels(channels.names), where=str(path), origin=path)
    return Listing([row])


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
    return (folder / FILE).is_file() and not scans_in(folder)


def _read_dataset(
    dataset: Path, channels: Channels, *, may_split: bool = False, series: str | None = None
) -> Listing:
    """Read the rows of a data set with the reader for its layout."""
    if not os.path.exists(dataset):
        raise missing_path(dataset)
    if not os.path.isdir(dataset):  # opening it refuses a pipe or a device
        _refuse_scan(dataset)
        return read_cases_csv(dataset, channels)
    if (dataset / "cases.csv").is_file():
        return read_cases_csv(dataset / "cases.csv", channels)
    if _has_description(dataset):
        return read_described(dataset, channels)
    if (dataset / "imagesTr").is_dir():
        raise VolsegError(
            f"{dataset}: has imagesTr but no {FILE}",
            fix=f"add a {FILE} that names the channels",
            code="E_DATASET",
        )
    if series is not None and (listing := read_dicom(dataset, channels, series)) is not None:
        return listing  # which is asked for, whatever else is there
    listing = read_folder(dataset, channels, may_split=may_split)
    if not listing.rows and not listing.mistakes:
        return read_dicom(dataset, channels, series) or _without_scans(dataset, listing)
    if holds_slices(dataset, leave_out=is_scan):
        listing.remarks.append(
            f"W_DICOM: {dataset}: its DICOM images are not read, because it also holds scans in "
            "other formats; give the folder of the DICOM files, or --series to infer or measure"
        )
    return listing


def _without_scans(folder: Path, listing: Listing) -> Listing:
    """Return the empty listing; of 2D images with the mistake that says so."""
    from volseg.io.image_cases import looks_like_images  # which lists scans by this module

    if looks_like_images(folder):
        listing.mistakes.append(ONLY_IMAGES)
    return listing


def _refuse_scan(path: Path) -> None:
    """Refuse a single scan or mask where a dataset is needed."""
    if is_scan(path) or is_dicom(path):
        raise VolsegError(
            f"{path}: is one scan or mask, and a folder or table of them is needed",
            fix="give the folder that holds it, or a table with the columns image and label",
            code="E_USAGE",
        )
