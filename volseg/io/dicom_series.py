"""DICOM series: which frames are one volume, and whether it can be trusted."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from volseg.io.dicom_frames import SUFFIXES, Frame, Skipped, read_frames
from volseg.io.dicom_pixels import have_equal_pixels
from volseg.io.header import TILT_FIX
from volseg.io.paths import visible_paths
from volseg.volume import LPS_TO_RAS, MAX_COSINE
from volseg.words import format_count

KEY_DIGITS = 12
AXES_DIGITS, SPACING_DIGITS, THICKNESS_DIGITS = 3, 4, 2  # of what frames of one volume share
SAME_PLACE = 0.01  # of the distance of slices; also in mm
GAP = 1.5  # distance of slices, in medians, from which one is missing
UNEVEN, VERY_UNEVEN = 0.01, 0.1  # deviation from even slices, in their distance
NO_START = "E_DAMAGED: does not start as a DICOM file does, with 128 bytes and DICM"
TILT = "E_TILT"  # the stack is not at right angles to its slices
TO_RAS = np.diag(LPS_TO_RAS)[:3]
_Group = tuple[tuple[Any, ...], list[Frame]]  # what its frames share, and they


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong or unusual with a volume: a code such as `E_GAP`, one line, and the fix."""

    code: str
    text: str
    fix: str = ""

    @property
    def is_error(self) -> bool:
        return self.code.startswith("E_")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DicomVolume:
    """Frames that make one volume, from the first slice to the last along their normal.

    Args:
        key: names it among the volumes of a folder; a hash, which says nothing of the patient.
        frames: without repeated ones. affine: (4, 4) from voxel (column, row, slice) to RAS mm;
            None if there is none.
        findings: errors first; without errors the volume can be read.
    """

    key: str
    frames: tuple[Frame, ...]
    affine: np.ndarray | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.frames[0].pixels.shape
        return columns, rows, len(self.frames)

    def although_tilted(self) -> DicomVolume:
        """Return the volume without the error that it is tilted."""
        findings = tuple(finding for finding in self.findings if finding.code != TILT)
        return replace(self, findings=findings)

    @property
    def error(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.is_error), None)


@dataclass(slots=True)
class DicomFolder:
    """The volumes of a folder and of those below it, and the DICOM files that are none."""

    volumes: list[DicomVolume] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def read_folder(folder: Path) -> DicomFolder:
    """List the volumes in a folder, and in those below it, without reading pixels.

    Raises:
        VolsegError: a folder or file cannot be opened.
    """
    return collect(files_below(folder))


def collect(paths: Iterable[Path]) -> DicomFolder:
    """List the volumes in these files; those that are not DICOM, by name too, are ignored."""
    result, frames = DicomFolder(), list[Frame]()
    for path in paths:
        read = read_frames(path)
        if isinstance(read, Skipped):
            result.skipped.append(read)
        elif read is not None:
            frames += read
        elif path.suffix.lower() in SUFFIXES:
            result.skipped.append(Skipped(path, NO_START))
    groups: dict[tuple[object, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[_group_of(frame)].append(frame)
    result.volumes = [
        _volume_of(group, key_for(repr(name)))
        for name, group in _joined(sorted(groups.items(), key=_order))
    ]
    return result


def files_below(folder: Path) -> Iterable[Path]:
    """Yield the files of a folder and of those below, but not of hidden or linked folders."""
    for path in visible_paths(folder):
        if path.is_dir() and not path.is_symlink():
            yield from files_below(path)
        elif path.is_file():
            yield path


def _group_of(frame: Frame) -> tuple[object, ...]:
    """Return what frames of one volume share; numbers are rounded, as they are stored as text."""
    return (
        frame.series,
        tuple((np.round(frame.axes.ravel(), AXES_DIGITS) + 0.0).tolist()),  # + 0: no negative zero
        tuple(np.round(frame.spacing_mm, SPACING_DIGITS).tolist()),
        frame.pixels.shape,
        frame.kind,
        -1.0 if frame.thickness_mm is None else round(frame.thickness_mm, THICKNESS_DIGITS),
    )


def _joined(groups: Iterable[_Group]) -> list[_Group]:
    """Join groups whose numbers differ by one rounding step, as where slices lie on both sides."""
    joined: list[_Group] = []
    candidates: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for name, frames in groups:
        series, axes, spacing, shape, kind, thickness = name
        places = candidates[series, shape, kind]
        numbers = (axes, AXES_DIGITS), (spacing, SPACING_DIGITS), (thickness, THICKNESS_DIGITS)
        for place in places:
            others = joined[place][0]
            steps = zip(numbers, (others[1], others[2], others[5]), strict=True)
            if all(_are_close(one, other, digits) for (one, digits), other in steps):
                joined[place][1].extend(frames)
                break
        else:
            places.append(len(joined))
            joined.append((name, list(frames)))
    return joined


def _are_close(one: Any, other: Any, digits: int) -> bool:
    """Check whether rounded numbers differ by one step at most."""
    return bool(np.abs(np.subtract(one, other)).max() < 1.5 * 10.0**-digits)


def key_for(text: str) -> str:
    """Return a key that says nothing of what it stands for."""
    return "s" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:KEY_DIGITS]


def _order(item: tuple[tuple[object, ...], list[Frame]]) -> tuple[str, str, str]:
    first = item[1][0]
    return first.series, first.kind, repr(item[0])


# ---- judging


def _volume_of(group: Sequence[Frame], key: str) -> DicomVolume:
    """Put the frames of a group in order, and judge them."""
    frames, along = _sorted(group)
    places = _places(along)
    findings: list[Finding] = []
    if len(places) < len(frames):
        repeated = [frames[part] for part in places if part.stop - part.start > 1]
        if not all(map(have_equal_pixels, repeated)):
            return DicomVolume(key=key, frames=tuple(frames), findings=(_four_dimensional(places),))
        text = f"{format_count(len(frames) - len(places), 'slice')} left out that are copies"
        findings.append(Finding("W_TWICE", text))
        frames, along = _sorted([frames[part.start] for part in places])
    if len(frames) == 1:
        text = "a single slice, whose distance to others is unknown"
        finding = Finding("E_NDIM", text, "export the whole series")
        return DicomVolume(key=key, frames=tuple(frames), findings=(finding,))
    affine = _affine_of(frames)
    findings += [*(_gaps(along) or _unevenness(frames, affine)), *_tilt(affine)]
    findings.sort(key=lambda finding: not finding.is_error)
    return DicomVolume(key=key, frames=tuple(frames), affine=affine, findings=tuple(findings))


def _sorted(group: Sequence[Frame]) -> tuple[list[Frame], np.ndarray]:
    """Return frames and their places (n,) in mm along the normal of the slices."""
    normal = np.cross(group[0].axes[0], group[0].axes[1])
    along = np.array([frame.position_mm @ normal for frame in group])
    order = np.argsort(along, kind="stable")
    return [group[index] for index in order], along[order]


def _four_dimensional(places: Sequence[slice]) -> Finding:
    counts = [part.stop - part.start for part in places]
    text = (
        f"{sum(counts)} frames at {format_count(len(places), 'place')}, {min(counts)} to "
        f"{max(counts)} at each"
    )
    return Finding("E_4D", text, "export each phase, echo or time point as a series of its own")


def _places(along: np.ndarray) -> list[slice]:
    """Return the frames at each place along the normal."""
    steps = np.diff(along)
    apart = steps[steps > SAME_PLACE]
    limit = max(SAME_PLACE, SAME_PLACE * float(np.median(apart))) if len(apart) else SAME_PLACE
    starts = [0, *(int(index) + 1 for index in np.flatnonzero(steps > limit)), len(along)]
    return list(itertools.starmap(slice, itertools.pairwise(starts)))


def _affine_of(frames: Sequence[Frame]) -> np.ndarray:
    """Return the affine (4, 4) from (column, row, slice) to RAS mm."""
    first, last = frames[0], frames[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing_mm[1]
    affine[:3, 1] = first.axes[1] * first.spacing_mm[0]
    affine[:3, 2] = (last.position_mm - first.position_mm) / (len(frames) - 1)
    affine[:3, 3] = first.position_mm
    affine[:3] *= TO_RAS[:, None]
    return affine


def _gaps(along: np.ndarray) -> list[Finding]:
    steps = np.diff(along)
    median = float(np.median(steps))
    places = np.flatnonzero(steps > GAP * median)
    if not len(places):
        return []
    n = sum(max(1, round(steps[place] / median) - 1) for place in places)
    text = (
        f"{format_count(n, 'slice')} missing: slices {places[0] + 1} and {places[0] + 2} are "
        f"{steps[places[0]]:.3g} mm apart, others {median:.3g} mm"
    )
    return [Finding("E_GAP", text, "copy or export the whole series again")]


def _unevenness(frames: Sequence[Frame], affine: np.ndarray) -> list[Finding]:
    positions = np.array([frame.position_mm for frame in frames]) * TO_RAS
    even = affine[:3, 3] + np.arange(len(frames))[:, None] * affine[:3, 2]
    off_mm = float(np.linalg.norm(positions - even, axis=1).max())
    distance_mm = float(np.linalg.norm(affine[:3, 2]))
    if off_mm > VERY_UNEVEN * distance_mm:
        text = f"slices lie up to {off_mm:.3g} mm beside an even stack of {distance_mm:.4g} mm"
        return [Finding("E_UNEVEN", text, "export it with even slices, or resample it")]
    if off_mm > UNEVEN * distance_mm:
        text = f"slices lie up to {off_mm:.3f} mm beside an even stack of {distance_mm:.4f} mm"
        return [Finding("W_UNEVEN", text)]
    return []


def _tilt(affine: np.ndarray) -> list[Finding]:
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    along = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    beside = along - (along @ normal) * normal / (normal @ normal)
    sine = float(np.linalg.norm(beside))
    if sine > MAX_COSINE:
        text = f"the stack of slices is tilted by {math.degrees(math.asin(min(1.0, sine))):.3g}°"
        return [Finding(TILT, text, TILT_FIX)]
    return []
