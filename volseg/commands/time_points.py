"""The measured cases of a time point: records, lesion ids and scans, checked as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from volseg.commands.batch import digest_of
from volseg.commands.placing import scan_in_order
from volseg.comparison.label_names import named
from volseg.comparison.pairs import MeasuredScan
from volseg.errors import ScanError, VolsegError
from volseg.inputs import read_json
from volseg.io.files import sha256_of
from volseg.io.formats import is_there
from volseg.io.series import like_scan, split_volume, with_volume
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.specks import SPECKS
from volseg.measurement.units import unit_doubt_in
from volseg.postprocessing.lesions import MANY
from volseg.store.outputs import SAME_KIND, folder_content
from volseg.store.records import (
    LESION_IDS,
    CaseRecord,
    case_ids,
    file_of,
    read_record,
    record_files,
)
from volseg.store.reviews import REVIEWED, Reviews
from volseg.volume import Volume, slabs_of
from volseg.words import format_count


@dataclass(frozen=True)
class TimePoint:
    """The results of one time point.

    Args:
        name: `baseline` or `follow-up`.
        scans: folder in which scans are found by name; None: where they were measured.
        reviews: verdicts of a reader; rejected lesions are left out.
    """

    name: str
    results: Path
    scans: Path | None
    reviews: Reviews = field(default_factory=Reviews)

    @cached_property
    def case_ids(self) -> list[str]:
        """Ids of the cases of the folder.

        Raises:
            VolsegError: it is not a results folder of scans.
        """
        content = folder_content(self.results)
        if content not in (None, SAME_KIND["infer"], SAME_KIND["measure"]):
            raise VolsegError(
                f"{self.results}: holds {content}, not lesions of scans",
                fix="give a folder that `volseg infer` or `volseg measure` wrote for scans",
                code="E_USAGE",
            )
        return case_ids(self.results)

    def measured_nodes(self) -> Iterator[str]:
        """Yield the labels measured as lymph nodes, according to run.json."""
        try:
            content = read_json(self.results / "run.json")
            settings = content.get("measure") or content["options"].get("measure") or {}
            yield from map(str, settings.get("lymph_nodes") or ())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # an interrupted run has none; W_NODE warns of labels that sound like nodes

    def digests(self, case: str) -> list[str]:
        """Return the SHA-256 of all files of a case on which a comparison depends."""
        digests = [_file_digest(path) for path in record_files(self.results, case)]
        try:
            record = read_record(self.results, case)
            digests += [_file_digest(self.results / mask) for mask in record.masks]
            path = self.scan_path(record)
            digests.append("none" if path is None else digest_of(path))
        except ScanError as error:
            digests.append(str(error))  # raised again when the patient is compared
        return digests

    def record(self, case: str) -> CaseRecord:
        """Read the record of a measured case.

        Raises:
            ScanError: the case was not measured, or its mask looks like noise.
        """
        record = read_record(self.results, case)
        if record.case.status != "done":
            reason = record.case.reason or "no reason given"
            raise ScanError(
                f"the {self.name} case {case!r} is {record.case.status}: {reason}",
                fix="repair it and rerun the command that made the folder",
                code="E_RECORD",
            )
        n_lesions = record.case.n_lesions or 0
        if n_lesions > MANY or f"{SPECKS}: " in (record.case.warnings or ""):
            raise ScanError(
                f"the {self.name} case {case!r} has {n_lesions:,} lesions: its mask looks like "
                "noise",
                fix="correct the mask and measure it again; noise has no response",
                code="E_SPECKS",
            )
        return record

    def scan_path(self, record: CaseRecord) -> Path | None:
        """Find a scan by name in the folder, else at the recorded path; None if in neither.

        Raises:
            ScanError: the folder has several files of this name.
        """
        name = Path(record.case.image or "").name  # an untrusted record may name a path
        paths = _files_named(name, self.scans) if self.scans is not None and name else []
        if len(paths) > 1:
            raise ScanError(
                f"{self.scans}: has {len(paths)} files {name!r}, such as {paths[0]} and {paths[1]}",
                fix="give the folder of the right one",
                code="E_MISSING",
            )
        if paths:
            return paths[0]
        scan = record.source.scan
        return scan if scan is not None and is_there(scan) else None

    def read(self, case: str, inputs: Sequence[str]) -> CaseAtTime:
        """Read the record and the lesion ids of a case.

        Args:
            inputs: SHA-256 of the patient's files at the start of the comparison.

        Raises:
            ScanError: the case was not measured, or its files changed since.
        """
        for path in record_files(self.results, case):
            _check_unchanged(path, _file_digest(path), inputs)
        record = self.record(case)
        self._check_masks(record)
        lesions = sorted(record.lesions, key=lambda lesion: lesion.lesion_id)
        path = file_of(self.results, case, record.files, LESION_IDS)
        ids = _read_ids(path, record.source.scan, most=len(lesions) + 1000)
        if [lesion.lesion_id for lesion in lesions] != list(range(1, int(ids.array.max()) + 1)):
            raise ScanError(
                f"{path}: has {format_count(int(ids.array.max()), 'lesion')}, but the record of "
                f"case {case!r} has {len(lesions)}",
                fix="rerun the command that made the folder",
                code="E_RECORD",
            )
        lesions = self._without_rejected(case, lesions, ids)
        return CaseAtTime(self, replace(record, lesions=lesions), ids, inputs)

    def _without_rejected(
        self, case: str, lesions: list[LesionMeasurement], ids: Volume
    ) -> list[LesionMeasurement]:
        """Return the lesions that the reader did not reject; `ids` loses the others.

        Raises:
            ScanError: the review is of other lesions.
        """
        self.reviews.check(case, {lesion.lesion_id: lesion.n_voxels for lesion in lesions})
        rejected = set(self.reviews.rejected(case))
        if not rejected:
            return lesions
        is_rejected = np.zeros(len(lesions) + 1, bool)
        is_rejected[list(rejected)] = True
        for part in slabs_of(ids.array):
            ids.array[part][is_rejected[ids.array[part]]] = 0
        return [lesion for lesion in lesions if lesion.lesion_id not in rejected]

    def _check_masks(self, record: CaseRecord) -> None:
        """Check that the mask of a case was not corrected by hand since it was measured.

        Raises:
            ScanError: it was (`E_EDITED`).
        """
        for name, digest in record.masks.items():
            if (self.results / name).is_file() and sha256_of(self.results / name) != digest:
                raise ScanError(
                    f"{self.results / name}: was changed by hand after it was measured",
                    fix=f"run `volseg measure {self.results}` first",
                    code="E_EDITED",
                )


@dataclass(frozen=True, eq=False)
class CaseAtTime:
    """A case of one time point; its scan is read on first access.

    Args:
        ids: (I, J, K) n in the voxels of lesion n, of the lesions in the record.
        inputs: SHA-256 of the patient's files at the start of the comparison.
    """

    time: TimePoint
    record: CaseRecord
    ids: Volume
    inputs: Sequence[str]

    @property
    def lesions(self) -> Sequence[LesionMeasurement]:
        return self.record.lesions

    @property
    def unit_doubt(self) -> str:
        return unit_doubt_in(self.record.case.warnings)

    @property
    def measured(self) -> MeasuredScan:
        return MeasuredScan(self.record.case.case_id, self.ids, self.lesions, self.unit_doubt)

    def with_names(self, names: Mapping[int, str]) -> CaseAtTime:
        """Return a copy in which labels without a name have that in `names`."""
        return replace(self, record=replace(self.record, lesions=named(self.lesions, names)))

    @property
    def path(self) -> Path:
        """Path of the scan file.

        Raises:
            ScanError: the file was not found.
        """
        path = self.time.scan_path(self.record)
        if path is None:
            name = self.record.source.scan or self.record.case.image or "its scan"
            option = f"--{self.time.name.replace('-', '')}-scans"
            raise ScanError(
                f"the {self.time.name} scan of case {self.record.case.case_id!r} was not found: "
                f"{name}",
                fix=f"give its folder to {option}, or --no-registration if both scans have the "
                "same world coordinates",
                code="E_MISSING",
            )
        return path

    @cached_property
    def scan(self) -> Volume:
        scan = read_volume(self.path, is_finite=False)  # as in measuring
        _check_unchanged(self.path, scan.sha256 or digest_of(self.path), self.inputs)
        lesions = f"the lesions of case {self.record.case.case_id!r}"
        names = {"scan_name": str(self.path), "grid_name": lesions}
        scan = scan_in_order(scan, self.ids.geometry, **names)
        finite = np.isfinite(scan.array) if scan.array.dtype.kind == "f" else np.ones(1, bool)
        if finite.all():
            return scan
        # For registration, fill NaN with the lowest intensity.
        return replace(scan, array=np.where(finite, scan.array, scan.array[finite].min(initial=0)))

    @property
    def rejection(self) -> str:
        """Warning about the lesions that a reader rejected; empty without any."""
        n = len(self.time.reviews.rejected(self.record.case.case_id))
        if not n:
            return ""
        rejected = f"{format_count(n, 'lesion')} at {self.time.name}"
        return (
            f"{REVIEWED}: {rejected} left out, as the reader rejected {'it' if n == 1 else 'them'}"
        )

    @cached_property
    def digest(self) -> str:
        return self.scan.sha256 or digest_of(self.path)

    @property
    def change(self) -> str:
        """Warning if the scan file differs from the one measured; empty without a file."""
        sha256 = self.record.source.sha256
        if sha256 is None or self.time.scan_path(self.record) is None or sha256 == self.digest:
            return ""
        return (
            f"W_SCAN: the {self.time.name} scan {self.path.name} is not the file that was "
            "measured, or was rewritten since"
        )

    def is_same_scan(self, other: CaseAtTime) -> bool:
        """Return whether both are of the same scan, even if its files differ in packing."""
        if self.path.resolve() == other.path.resolve() or self.digest == other.digest:
            return True
        first, second = self.scan, other.scan
        return (
            first.geometry.matches(second.geometry)
            and (first.slope, first.intercept) == (second.slope, second.intercept)
            and np.array_equal(first.array, second.array)
        )


def _read_ids(path: Path, scan: Path | None, *, most: int) -> Volume:
    """Read the lesion ids of a scan.

    Raises:
        ScanError: they cannot be read, or lie on tilted slices, which registration does not know.
    """
    ids = read_mask(path if scan is None else like_scan(path, scan), max_labels=most)
    if ids.geometry.is_tilted:
        raise ScanError(
            f"{path}: lies on tilted slices, and tilted scans are not compared",
            fix="resample both scans to right-angled grids, and measure those",
            code="E_TILT",
        )
    return ids


def _files_named(name: str, folder: Path) -> list[Path]:
    """Return the files of this name: that in the folder itself, else all below it."""
    file, number = split_volume(Path(name))
    if number is not None:
        return [with_volume(path, number) for path in _files_named(file.name, folder)]
    if os.path.isfile(folder / name):
        return [folder / name]
    return sorted(Path(parent, name) for parent, _, files in os.walk(folder) if name in files)


def _file_digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else str(path)


def _check_unchanged(path: Path, digest: str, inputs: Sequence[str]) -> None:
    """Check that a file did not change since the comparison began.

    Raises:
        ScanError: its digest is not among `inputs`.
    """
    if digest not in inputs:
        raise ScanError(
            f"{path}: was replaced while it was being compared", fix="run again", code="E_CHANGED"
        )
