"""The flags of scans: when a scan gets one, and what to do. Thresholds are stated here alone.

A check returns a sentence for each scan that it flags. To add one, write it and its row in `FLAGS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.evaluation.duplicates import MIN_CORRELATION, MIN_DETAIL
from volseg.measurement.saturation import CLIPPED_FRACTION
from volseg.quality.outliers import MIN_SCANS, outliers
from volseg.quality.scan import CT, ScanFacts
from volseg.words import format_count

MAX_EQUAL = 0  # pairs: a scanner never measures the same noise twice
MIN_JUMP = 2.0  # of 228 sound scans, the highest is 1.7
MIN_FIELD_MM = 150.0  # smaller fields are crops of a lesion, which touch every side
MAX_CROP = 0.5  # mean share of the sides; above it, the scan is a crop without background
MAX_CUT = 0.2  # of the scans of a dataset; if more touch a side, it was made of crops
MIN_IN_HU = 0.98  # share of -1200 to 3071: metal and ringing take less than 2 %
MAX_AIR_OFF_HU = 50.0  # air from -1000: -1024 is usual, as the lowest of 12 bits
MAX_COMMON = 0.99  # share of one value: even a small object in padding takes more than the rest
MAX_FACTOR, MAX_NOISE_FACTOR = 1.5, 2.0  # beyond the quartiles of the dataset
MIN_ALIKE = 0.8  # part of the other scans that agree on whether they are CT

Sentences = Mapping[int, str]  # number of the scan → sentence


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of scans.

    Args:
        code: such as `W_CUT`.
        rule: when a scan gets it, for the documentation.
        fix: what to do.
        check: all scans of a dataset → number of each flagged one, with a sentence.
        in_runs: True if it is also a warning of `infer` and `measure`, as it puts volumes or HU in
            doubt; it needs no other scan.
    """

    code: str
    rule: str
    fix: str
    check: Callable[[Sequence[ScanFacts]], Sentences]
    in_runs: bool = False


def each(check: Callable[[ScanFacts], str]) -> Callable[[Sequence[ScanFacts]], Sentences]:
    """Return a check of scans from one of a single scan, which returns an empty text if sound."""

    def of_all(scans: Sequence[ScanFacts]) -> Sentences:
        return {n: text for n, scan in enumerate(scans) if (text := check(scan))}

    return of_all


def per_channel(
    check: Callable[[Sequence[ScanFacts]], Sentences],
) -> Callable[[Sequence[ScanFacts]], Sentences]:
    """Return a check that compares the scans of each channel with each other."""

    def of_all(scans: Sequence[ScanFacts]) -> Sentences:
        texts: dict[int, str] = {}
        for channel in dict.fromkeys(scan.row.channel for scan in scans):
            numbers = [n for n, scan in enumerate(scans) if scan.row.channel == channel]
            flagged = check([scans[n] for n in numbers])
            texts |= {numbers[n]: text for n, text in flagged.items()}
        return texts

    return of_all


# ---- of one scan


def _equal_slices(scan: ScanFacts) -> str:
    n = scan.row.equal_slices or 0
    if n <= MAX_EQUAL:
        return ""
    return f"{format_count(n, 'pair')} of neighbouring slices {'is' if n == 1 else 'are'} equal"


def _jump(scan: ScanFacts) -> str:
    jump, at = scan.row.slice_jump, scan.row.slice_jump_at
    if jump is None or at is None or jump < MIN_JUMP:
        return ""
    where = f"slices {at} and {at + 1} along {scan.row.slice_axis}"
    return f"{where} differ {jump:.3g} × as much as others"


def _flat(scan: ScanFacts) -> str:
    share = scan.intensities.most_common
    return f"{share:.2%} of the voxels have one value" if share > MAX_COMMON else ""


def _drawing(scan: ScanFacts) -> str:
    if not scan.intensities.is_drawing or _flat(scan):
        return ""
    return "it has 15 different intensities or fewer, as a mask has"


def _clipped(scan: ScanFacts) -> str:
    share = scan.row.at_highest or 0.0
    if share <= CLIPPED_FRACTION or scan.intensities.is_drawing or _flat(scan):
        return ""
    return f"{share:.0%} of the voxels have the largest value, {scan.row.highest:g}"


def _stated_ct(scan: ScanFacts) -> str:
    facts = scan.intensities
    if not scan.is_stated_ct or not facts.not_hu or facts.lacks_intercept or facts.is_drawing:
        return ""
    return f"the DICOM header states CT, but {facts.not_hu}"


def _hu_range(scan: ScanFacts) -> str:
    share = scan.row.in_hu_range
    if share is None or share >= MIN_IN_HU:
        return ""
    return f"{1 - share:.1%} of the voxels are outside -1200 to 3071 HU"


def _air(scan: ScanFacts) -> str:
    air = scan.row.air_hu
    if air is None or _field_mm(scan) < MIN_FIELD_MM or abs(air + 1000) <= MAX_AIR_OFF_HU:
        return ""
    return f"the air around the patient has {air:.0f} HU instead of -1000"


# ---- of a dataset


def _cut(scans: Sequence[ScanFacts]) -> Sentences:
    texts = every_cut(scans)
    is_usual = len(scans) >= MIN_SCANS and len(texts) > MAX_CUT * len(scans)
    return {} if is_usual else texts


def every_cut(scans: Sequence[ScanFacts]) -> Sentences:
    """Return a sentence for each scan whose body touches a side, however many they are."""
    return each(_cut_of)(scans)


def _cut_of(scan: ScanFacts) -> str:
    is_crop = scan.border.mean > MAX_CROP or _field_mm(scan) < MIN_FIELD_MM
    if is_crop or not scan.row.cut_sides or scan.intensities.is_drawing or _flat(scan):
        return ""
    share = scan.row.cut_share or 0.0
    return f"the body touches the sides {scan.row.cut_sides}: up to {share:.0%} of a side"


def _field_mm(scan: ScanFacts) -> float:
    """Return the smaller field of view within slices."""
    row = scan.row
    fields = [
        (getattr(row, f"size_{axis}") or 0) * (getattr(row, f"spacing_{axis}_mm") or 0.0)
        for axis in "ras"
        if axis.upper() != row.slice_axis
    ]
    return min(fields)


def _ct_expected(scans: Sequence[ScanFacts]) -> bool | None:
    """Tell whether nearly all scans are CT; None if they differ or are too few to say."""
    kinds = [kind for scan in scans if (kind := _is_ct(scan)) is not None]
    if len(kinds) < 3:
        return None
    (kind, n), *_ = Counter(kinds).most_common(1)
    return kind if n >= MIN_ALIKE * len(kinds) or len(kinds) - n == 1 else None


def _is_ct(scan: ScanFacts) -> bool | None:
    if scan.intensities.is_drawing:
        return None
    return scan.row.modality == CT if scan.row.modality else scan.row.looks_like_ct


def _offset(scans: Sequence[ScanFacts]) -> Sentences:
    is_ct = _ct_expected(scans)
    text = "its intensities are those of a CT + 1024: HU lack the intercept"
    return {
        n: text
        for n, scan in enumerate(scans)
        if scan.intensities.lacks_intercept
        and (scan.is_stated_ct or (is_ct and not scan.row.modality))
    }


def _mixed(scans: Sequence[ScanFacts]) -> Sentences:
    stated = Counter(scan.row.modality for scan in scans if scan.row.modality)
    usual = stated.most_common(1)[0][0] if stated else ""
    expected, offset, texts = _ct_expected(scans), _offset(scans), {}
    for n, scan in enumerate(scans):
        modality = scan.row.modality
        if modality and modality != usual and stated[modality] <= stated[usual] / 4:
            texts[n] = f"it is {modality}, unlike most other scans, which are {usual}"
        elif n not in offset and expected is not None and _is_ct(scan) is (not expected):
            kind, others = ("a CT", "are not CT") if not expected else ("no CT", "are CT")
            texts[n] = f"its intensities are those of {kind}, but the other scans {others}"
    return texts


def _similar(scan: ScanFacts) -> str:
    return f"it is nearly the same as {scan.row.similar_to}" if scan.row.similar_to else ""


def _odd(
    columns: Mapping[str, str], *, factor: float = MAX_FACTOR
) -> Callable[[Sequence[ScanFacts]], Sentences]:
    """Return a check for outliers in these columns, each with its name in a sentence."""

    def check(scans: Sequence[ScanFacts]) -> Sentences:
        parts: dict[int, list[str]] = {}
        for name, words in columns.items():
            values = np.array([getattr(scan.row, name) or np.nan for scan in scans], float)
            for n in outliers(values, factor=factor):
                median = np.nanmedian(values)
                parts.setdefault(n, []).append(f"{words} {values[n]:.4g}, median {median:.4g}")
        return {n: "; ".join(texts) for n, texts in parts.items()}

    return check


FLAGS = (
    Flag(
        "W_EQUAL_SLICES",
        "two neighbouring slices have the same voxels and are not uniform",
        "export the scan again without repeated slices",
        each(_equal_slices),
        in_runs=True,
    ),
    Flag(
        "W_SLICE_JUMP",
        f"neighbouring slices differ at least {MIN_JUMP:g} × as much as any of the three pairs on "
        "either side",
        "check whether slices are missing there, and export the scan again",
        each(_jump),
        in_runs=True,
    ),
    Flag(
        "W_FLAT",
        f"over {MAX_COMMON:.0%} of the voxels have one value",
        "check that it is the scan, and export it again if it is blank",
        each(_flat),
    ),
    Flag(
        "W_DRAWING",
        "15 different intensities or fewer",
        "check that it is the scan and not its mask",
        each(_drawing),
    ),
    Flag(
        "W_CLIP",
        f"over {CLIPPED_FRACTION:.0%} of the voxels have the largest value",
        "export it again in more bits or without a window",
        each(_clipped),
    ),
    Flag(
        "W_HU_STATED",
        "a DICOM header states CT, but the intensities cannot be HU ([mismatch.md](mismatch.md))",
        "check the rescale slope and intercept",
        each(_stated_ct),
    ),
    Flag(
        "W_HU_RANGE",
        f"CT: under {MIN_IN_HU:.0%} of the voxels, without padding, are from -1200 to 3071",
        "check the rescale slope and intercept",
        each(_hu_range),
        in_runs=True,
    ),
    Flag(
        "W_HU_AIR",
        f"CT with a field of at least {MIN_FIELD_MM:g} mm: the median of the air at the sides is "
        f"over {MAX_AIR_OFF_HU:g} HU from -1000",
        "check the rescale slope and intercept",
        each(_air),
        in_runs=True,
    ),
    Flag(
        "W_HU_OFFSET",
        "stated to be CT, or the other scans are, and it looks like CT after subtracting 1024",
        "subtract 1024, or export it again with its rescale intercept",
        per_channel(_offset),
    ),
    Flag(
        "W_CUT",
        f"over a tenth of a side within the slices is body, the field is at least "
        f"{MIN_FIELD_MM:g} mm wide and less than half of all sides is body; not if over a "
        "fifth of a dataset is so",
        "do not use it where the whole body or organ is measured",
        per_channel(_cut),
    ),
    Flag(
        "W_MIXED",
        "its modality is not that of nearly all other scans: in the DICOM headers, or it looks "
        "like a CT and they do not, or the reverse",
        "check that it belongs to the dataset and to this channel",
        per_channel(_mixed),
    ),
    Flag(
        "W_ODD_SPACING",
        f"outlier of spacing along R, A or S, by a factor of {MAX_FACTOR:g} or more",
        "check its protocol and that its header is in mm",
        per_channel(
            _odd({f"spacing_{axis}_mm": f"spacing along {axis.upper()}" for axis in "ras"})
        ),
    ),
    Flag(
        "W_ODD_SIZE",
        f"outlier of the number of voxels along R, A or S, by a factor of {MAX_FACTOR:g} or more",
        "check that it is complete and shows the same part of the body",
        per_channel(_odd({f"size_{n}": f"voxels along {n.upper()}" for n in "ras"})),
    ),
    Flag(
        "W_ODD_NOISE",
        f"outlier of `snr`, by a factor of {MAX_NOISE_FACTOR:g} or more",
        "look at it: dose, coil, reconstruction or a filter differ",
        per_channel(_odd({"snr": "signal to noise"}, factor=MAX_NOISE_FACTOR)),
    ),
    Flag(
        "W_SAME",
        "another scan has the same voxels",
        "keep one of them, and check whose it is",
        each(lambda scan: f"it has the voxels of {scan.row.same_as}" if scan.row.same_as else ""),
    ),
    Flag(
        "W_SIMILAR",
        "another scan is nearly the same: thumbnails of its three middle slices correlate by "
        f"{MIN_CORRELATION:g} or more, their detail by {MIN_DETAIL:g}; not of the same patient",
        "keep one of them, or put both into one split",
        each(_similar),
    ),
)
