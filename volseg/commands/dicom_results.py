"""DICOM results of `volseg infer`: written, read back and compared before they appear."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.commands.mask_measurement import MaskSettings
from volseg.errors import EnvironmentProblem, ScanError, VolsegError
from volseg.io.cases import Case
from volseg.io.dicom_object import read_object
from volseg.io.dicom_out import (
    MAX_SEGMENTS,
    DicomSource,
    Measured,
    Segment,
    encode_seg,
    encode_sr,
    read_source,
    report_values,
)
from volseg.io.dicom_seg import LABELMAP
from volseg.io.files import read_back_problem
from volseg.io.formats import DICOM, format_of
from volseg.io.volumes import read_header, read_mask
from volseg.measurement.specks import MeasuredLesions
from volseg.store.outputs import Commit
from volseg.volume import Volume
from volseg.words import format_count, format_list

SEG, LESIONS, REPORT = "dicom_seg", "dicom_lesions", "dicom_sr"  # folders
NOTE = "N_DICOM"
RELATIVE_ERROR = 1e-6  # of a number in a report, which stores it as text of 16 characters


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomResults:
    """Which DICOM files are written for each case.

    Args:
        seg: binary or labelmap; None for no segmentation of the mask. sr: a report of the lesions.
        model: its name. label_names: value of the mask → name. organ: name of the label that is
            no lesion. by_hand: True if masks were corrected by hand.
    """

    seg: str | None
    sr: bool
    model: str
    label_names: Mapping[int, str]
    organ: str | None = None
    by_hand: bool = False

    @classmethod
    def again(
        cls, files: Iterable[str], folder: Path, model: str, settings: MaskSettings
    ) -> DicomResults:
        """Return what wrote these files of a folder, for masks corrected by hand."""
        names = {name.partition("/")[0]: name for name in files}
        return cls(
            seg=_kind_of(folder / names[SEG]) if SEG in names else None,
            sr=REPORT in names,
            model=model,
            label_names=settings.label_names,
            organ=settings.measure.organ,
            by_hand=True,
        )

    @property
    def folders(self) -> list[str]:
        return [*([SEG] if self.seg else []), *([LESIONS, REPORT] if self.sr else [])]

    def refuse_others(self, cases: Sequence[Case]) -> None:
        """Refuse scans that are no DICOM series, of which nothing could be written.

        Raises:
            VolsegError: there is one (`E_USAGE`).
        """
        if not self.folders:
            return
        for case in cases:
            path = next(iter(case.images.values()))
            if format_of(path).name != DICOM:
                raise VolsegError(
                    f"{path}: --dicom-seg and --dicom-sr need a DICOM series, and it is none",
                    fix="give the series, or leave out these options; --format sets others",
                    code="E_USAGE",
                )

    def write(
        self, path: Path, mask: Volume, lesions: MeasuredLesions, commit: Commit
    ) -> list[str]:
        """Write the files of a case; return notes on what they leave out, as `N_CODE: sentence`.

        Args:
            path: of the scan. mask: on its grid.

        Raises:
            ScanError: the headers of the series do not suffice (`E_DICOM`).
            EnvironmentProblem: what was read back differs.
        """
        if not self.folders:
            return []
        source = read_source(read_header(path), self.model, by_hand=self.by_hand)
        case_id, notes = lesions.scan.case_id, list[str]()
        if self.seg:
            segments, empty = self._labels(mask)
            if empty:
                listed = format_list([repr(name) for name in empty], 5)
                notes.append(f"{NOTE}: labels without a voxel have no DICOM segment: {listed}")
            if segments:
                written = _Written(f"{SEG}/{case_id}.dcm", path, commit)
                written.segmentation(mask.array, segments, source, "mask", self.seg)
        if self.sr:
            notes += self._write_report(path, source, lesions, commit)
        return notes

    def _labels(self, mask: Volume) -> tuple[list[Segment], list[str]]:
        """Return the segments of the labels in a mask, and the names of those without a voxel."""
        present = set(np.unique(mask.array).tolist()) - {0}
        names = {value: self.label_names.get(value, f"label_{value}") for value in present}
        segments = [
            Segment(value=value, name=name, tracking=name, is_organ=name == self.organ)
            for value, name in sorted(names.items())
        ]
        absent = [name for value, name in self.label_names.items() if value not in present]
        return segments, absent

    def _write_report(
        self, path: Path, source: DicomSource, lesions: MeasuredLesions, commit: Commit
    ) -> Iterator[str]:
        """Write the lesions as segments, and the report on them; yield notes."""
        case_id, unit = lesions.scan.case_id, lesions.scan.unit.name
        rows = lesions.largest[:MAX_SEGMENTS]
        n_left_out = len(lesions) - len(rows)
        if n_left_out > 0:
            count = format_count(n_left_out, "lesion")
            yield f"{NOTE}: the DICOM report holds the largest lesions; {count} left out"
        if not rows:
            yield f"{NOTE}: no DICOM report, as there is no lesion"
            return
        measured = [
            Measured(
                segment=Segment(
                    value=row.lesion_id,
                    name=f"{row.label_name} {row.lesion_id}",
                    tracking=f"{row.label_name} {row.lesion_id}",
                ),
                volume_mm3=row.volume_mm3,
                long_axis_mm=row.long_axis_mm,
                short_axis_mm=row.short_axis_mm,
                intensity_mean=row.intensity_mean,
                unit=unit,
            )
            for row in rows
        ]
        segments = [lesion.segment for lesion in measured]
        written = _Written(f"{LESIONS}/{case_id}.dcm", path, commit)
        ids = lesions.scan.lesions.ids
        # Readers know references from a report to segments of binary segmentations alone.
        seg = written.segmentation(ids, segments, source, "lesions", "binary")
        _Written(f"{REPORT}/{case_id}.dcm", path, commit).report(measured, source, seg)


def _kind_of(path: Path) -> str:
    """Return the kind of a segmentation; binary if it is no longer there."""
    try:
        return "labelmap" if read_object(path).sop_class == LABELMAP else "binary"
    except ScanError:
        return "binary"


@dataclass(frozen=True, slots=True)
class _Written:
    """A DICOM file of a commit, which is read back and compared. `scan` is the series."""

    name: str
    scan: Path
    commit: Commit

    def segmentation(
        self,
        labels: np.ndarray,
        segments: Sequence[Segment],
        source: DicomSource,
        what: str,
        kind: str,
    ) -> bytes:
        content, numbered = encode_seg(labels, segments, source, what=what, kind=kind)
        self.commit.write(self.name, content)
        mask = read_mask(self.commit.path(self.name), like=self.scan, max_labels=MAX_SEGMENTS + 1)
        if not np.array_equal(mask.array, numbered):
            raise self._problem()
        return content

    def report(self, lesions: Sequence[Measured], source: DicomSource, seg: bytes) -> None:
        content = encode_sr(lesions, source, seg)
        self.commit.write(self.name, content)
        stored = report_values(self.commit.path(self.name).read_bytes())
        expected = [(source.tracking_uid(lesion.segment), lesion.values()) for lesion in lesions]
        if [uid for uid, _ in stored] != [uid for uid, _ in expected]:
            raise self._problem()
        for (_, one), (_, other) in zip(stored, expected, strict=True):
            is_same = one.keys() == other.keys() and np.allclose(
                [one[name] for name in other], list(other.values()), rtol=RELATIVE_ERROR, atol=0
            )
            if not is_same:
                raise self._problem()

    def _problem(self) -> EnvironmentProblem:
        return read_back_problem(Path(self.name))
