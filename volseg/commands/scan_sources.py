"""Scans to classify: series of images of one scan, and volumes, as sequences of slices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from volseg.commands.seen_images import image_key
from volseg.errors import ScanError, named
from volseg.image import Image2D
from volseg.io.cases import dataset_error, safe_id
from volseg.io.image_cases import ImageCase, ImageSurvey
from volseg.io.images import ImageReader
from volseg.io.target_cells import is_missing
from volseg.preprocessing.images import to_input
from volseg.recipe.images import Images
from volseg.words import format_list

SCAN_COLUMNS, SLICE = ("scan", "series"), "slice"  # of a table of images

Embed = Callable[[np.ndarray], np.ndarray]  # (S, C, H, W) network input → (S, features)


def scans_of(cases: Sequence[ImageCase], mistakes: list[str]) -> list[ImageCase]:
    """Return a case per scan, with its slices in order, from a case per slice.

    Slices of one volume are a scan. Images of one file each are a scan if they share the cell of a
    column `scan` or `series`, else the patient; their order is that of the numbers in `slice`. A
    scan has the cells that all its slices have in common.

    Args:
        mistakes: gets a sentence for each image of no scan, and for each scan whose slices cannot
            be put in order.
    """
    scans: dict[str, list[ImageCase]] = {}
    for case in cases:
        name = _scan_name(case)
        if name is None:
            mistakes.append(
                f"{case.where}: does not say of which scan it is a slice: add a column "
                f"{SCAN_COLUMNS[0]!r}, or 'patient'"
            )
        else:
            scans.setdefault(name, []).append(case)
    return [scan for slices in scans.values() for scan in _scan(slices, mistakes)]


def _scan_name(case: ImageCase) -> str | None:
    if case.index is not None:
        return str(case.path)
    stated = [case.cells[name] for name in SCAN_COLUMNS if case.cells.get(name)]
    return stated[0] if stated else case.patient


def _scan(slices: Sequence[ImageCase], mistakes: list[str]) -> Iterator[ImageCase]:
    """Yield the scan of these slices, or nothing after noting a mistake."""
    first, numbers = slices[0], list(map(_number, slices))
    if (mistake := _disorder(slices, numbers)) is not None:
        mistakes.append(mistake)
        return
    order = np.argsort([number or 0 for number in numbers])
    cells = {
        column: text
        for column, text in first.cells.items()
        if all(case.cells.get(column) == text for case in slices)
    }
    ordered = tuple(slices[place] for place in order)
    yield replace(first, id=_scan_id(first), index=None, cells=cells, slices=ordered)


def _disorder(slices: Sequence[ImageCase], numbers: Sequence[float | None]) -> str | None:
    """Return why slices are no scan; None if they are one."""
    name = _scan_id(slices[0])
    if len(slices) > 1 and None in numbers:
        where = slices[numbers.index(None)].where
        return f"{where}: scan {name!r}: the cell of {SLICE!r} is no number"
    if len(set(numbers)) < len(numbers):
        where = next(case.where for case, n in zip(slices, numbers) if numbers.count(n) > 1)
        return f"{where}: scan {name!r} has two slices of one number in {SLICE!r}"
    if len({(case.patient, case.split) for case in slices}) > 1:
        return f"{slices[0].where}: scan {name!r} has slices of two patients or splits"
    return None


def _scan_id(case: ImageCase) -> str:
    if case.index is None:
        return safe_id(_scan_name(case) or case.id)
    return case.id.rpartition("_s")[0] or case.id


def _number(case: ImageCase) -> float | None:
    """Return the number that puts a slice in order; None if it has none."""
    if case.index is not None:
        return case.index
    try:
        number = float(case.cells.get(SLICE, ""))
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def scan_survey(survey: ImageSurvey, dataset: Path, target: str | None) -> ImageSurvey:
    """Return the survey of the scans of a data set whose slices were surveyed.

    Raises:
        VolsegError: slices cannot be put in order, or those of a scan differ in the target.
    """
    mistakes = list(survey.mistakes)
    scans = scans_of(survey.cases, mistakes)
    for scan in scans if target is not None else ():
        values = {case.cells.get(target or "", "") for case in scan.slices}
        if len(values) > 1:
            listed = format_list(sorted(values - {""}), 3)
            mistakes.append(
                f"{scan.where}: the slices of scan {scan.id!r} differ in {target!r} ({listed}), "
                "which is to be learned of the whole scan"
            )
    if mistakes:
        raise dataset_error(mistakes, str(dataset))
    unlabelled = [
        f"{scan.where}: scan {scan.id!r}: the cell of {target!r} is empty"
        for scan in scans
        if target is not None and is_missing(scan.cells.get(target, ""))
    ]
    return replace(survey, cases=scans, mistakes=[], unlabelled=unlabelled)


def scan_digest(scan: ImageCase, digest_of: Callable[[Path], str]) -> str:
    """Return the hash of the hashes of a scan's slices, in order."""
    keys = [image_key(digest_of(case.path), case.index) for case in scan.slices]
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


class Unmeasured:
    """A source of images or scans, of which nothing is measured."""

    __slots__ = ()

    def measurements(self, case: ImageCase, names: Sequence[str]) -> np.ndarray:
        """Return (0,): only lesions are measured."""
        assert not names, "only lesions are measured"
        return np.empty(0)


@dataclass(slots=True)
class ScanSource(Unmeasured):
    """Scans as sequences of slice embeddings.

    Args:
        embed: None where only pictures are needed.
    """

    embed: Embed | None = None
    _reader: ImageReader = field(default_factory=ImageReader)

    def picture(self, case: ImageCase) -> Image2D:
        """Return the slice in the middle of a scan, or a slice itself."""
        middle = case.slices[len(case.slices) // 2] if case.slices else case
        return self._reader.read(middle.path, middle.index)

    def network_input(self, case: ImageCase, settings: Images) -> np.ndarray:
        """Return (S, features + 1) float32: the embeddings of the slices, then a column of ones."""
        assert self.embed is not None, "the network of slices is needed"
        slices = [self._slice(one, settings) for one in case.slices]
        features = self.embed(np.stack(slices))
        return np.concatenate([features, np.ones((len(features), 1), np.float32)], axis=1)

    def _slice(self, case: ImageCase, settings: Images) -> np.ndarray:
        image = self._reader.read(case.path, case.index)
        with named(case.path, ScanError):
            return to_input(image, settings)


def stack_scans(scans: Sequence[np.ndarray], n_slices: int | None = None) -> np.ndarray:
    """Return scans (S, features + 1) as (N, n_slices, features + 1), with zeros after the last.

    Args:
        n_slices: default: of the longest scan.
    """
    longest = max(map(len, scans)) if n_slices is None else n_slices
    stacked = np.zeros((len(scans), longest, scans[0].shape[1]), np.float32)
    for place, scan in zip(stacked, scans, strict=True):
        place[: len(scan)] = scan
    return stacked
