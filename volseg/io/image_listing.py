"""2D images as a data set lists them, before they are checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from volseg.inputs import shorten
from volseg.io.cases import SPLITS, is_valid_id
from volseg.io.formats import READABLE as SCANS
from volseg.io.formats import is_there
from volseg.io.images import READABLE

SLICE_DIGITS = 3
NO_IMAGES = f"no images found; they end in {READABLE}, and volumes in {SCANS}"


@dataclass(frozen=True, slots=True)
class ImageCase:
    """One 2D image of a data set; paths only.

    Args:
        id: its name in results.
        path: its file; with `index` if that holds several images (`read_image`).
        patient: no patient is in two splits; None if unknown.
        split: train, val or test; None if the data set does not state one.
        cells: the other columns of the table as text; folders give `class`.
        mask: its mask, on the grid of its volume or picture; None if unknown.
        where: its place in the data set, for messages.
        slices: of a scan, its slices in order, of which `path` is the first; else empty.
    """

    id: str
    path: Path
    index: int | None = None
    patient: str | None = None
    split: str | None = None
    cells: Mapping[str, str] = field(default_factory=dict)
    mask: Path | None = None
    where: str = ""
    slices: tuple[ImageCase, ...] = ()


@dataclass(slots=True)
class ImageListing:
    """Unchecked images, with mistakes and remarks on reading them.

    Args:
        columns: cells of the images that could be a target, in order.
        mask_columns: columns of masks of volumes.
    """

    cases: list[ImageCase] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    mask_columns: list[str] = field(default_factory=list)

    def usable(self) -> list[ImageCase]:
        """Return the images with a file and an id of their own; add mistakes for the others."""
        if not self.cases and not self.mistakes:
            self.mistakes.append(NO_IMAGES)
        ids = dict[str, ImageCase]()
        paths = {case.path for case in self.cases}
        is_file = {path: is_there(path) for path in paths}
        usable = []
        for case in self.cases:
            first = ids.setdefault(case.id.casefold(), case)
            if not is_file[case.path]:
                name = shorten(str(case.path), 300)
                self.mistakes.append(f"{case.where}: file {name!r} does not exist")
            elif not is_valid_id(case.id):
                text = f"subject {shorten(case.id)!r} is not a valid file name"
                self.mistakes.append(f"{case.where}: {text}")
            elif first is not case:
                self.mistakes.append(
                    f"{case.where}: id {case.id!r} is also that of {first.where}; rename one, or "
                    "give each its own in the column subject of a table"
                )
            else:
                usable.append(case)
        return usable


def split_mistakes(cases: Iterable[ImageCase]) -> list[str]:
    """Return unknown words for splits, and patients in two of them, one line for each."""
    cases = list(cases)
    words = dict.fromkeys(case.split for case in cases if case.split not in (None, *SPLITS))
    first = {case.split: case.where for case in reversed(cases)}
    mistakes = [
        f"{first[word]}: split {word!r} is unknown: use {', '.join(SPLITS)} or leave it empty"
        for word in words
    ]
    homes: dict[str, ImageCase] = {}
    reported = set[str]()
    for case in cases:
        if case.patient is None or case.split is None:
            continue
        home = homes.setdefault(case.patient, case)
        if home.split != case.split and case.patient not in reported:
            reported.add(case.patient)
            mistakes.append(
                f"{case.where}: patient {case.patient!r} is in split {case.split!r}, but in "
                f"{home.split!r} at {home.where}"
            )
    return mistakes


def slice_id(name: str, index: int) -> str:
    """Return the id of a slice of a volume.

    >>> slice_id("patient7", 12)
    'patient7_s012'
    """
    return f"{name}_s{index:0{SLICE_DIGITS}d}"
