"""The quality of one scan: its facts as a row, and what is kept to compare it with others."""

from __future__ import annotations

from dataclasses import dataclass

from volseg.columns import row_of
from volseg.evaluation.duplicates import ImagePrint
from volseg.measurement.saturation import clipped_fraction
from volseg.quality.border import Border, judge_border
from volseg.quality.intensities import Intensities, judge_intensities
from volseg.quality.noise import Noise, estimate_noise
from volseg.quality.rows import QualityRow
from volseg.quality.slices import Slices, judge_slices
from volseg.volume import Volume

CT = "CT"
OF_INTENSITIES = ("lowest", "median", "highest", "most_common", "whole_numbers", "looks_like_ct")
CUT_SHARE = 0.1  # of a side: a couch or a tube covers less


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanFacts:
    """The facts about a scan, and what flags need besides the columns.

    Args:
        print: by which duplicates are found; None: they are not. patient: None if unknown.
    """

    row: QualityRow
    border: Border
    intensities: Intensities
    print: ImagePrint | None = None
    patient: str | None = None

    @property
    def is_stated_ct(self) -> bool:
        return self.row.modality == CT


def judge_scan(
    scan: Volume,
    *,
    case_id: str = "",
    channel: str = "image",
    image: str = "",
    modality: str = "",
    has_noise: bool = True,
) -> ScanFacts:
    """Measure the quality of a scan; the same for all 48 axis orders.

    Slabs of the scan are processed one after another, so memory hardly grows with its size.

    Args:
        image: name of its file in tables. modality: as a DICOM header states, such as CT.
        has_noise: False leaves the noise unknown.
    """
    slices = judge_slices(scan)
    intensities = judge_intensities(scan, slices.axis)
    is_hu = bool(intensities.looks_like_ct) or (modality == CT and not intensities.not_hu)
    border = judge_border(scan, slices.axis, is_hu=is_hu)
    is_noisy = has_noise and not intensities.is_drawing
    noise = estimate_noise(scan, is_hu=is_hu) if is_noisy else Noise()
    cells = {
        "case_id": case_id,
        "channel": channel,
        "status": "done",
        "image": image,
        "modality": modality,
        "at_highest": clipped_fraction(scan),
        "noise_sd": noise.sd,
        "snr": noise.snr,
        "cut_share": border.largest,
        "cut_sides": border.sides_over(CUT_SHARE),
        "in_hu_range": intensities.in_hu_range if is_hu else None,
        "air_hu": intensities.air_hu if is_hu else None,
        **{name: getattr(intensities, name) for name in OF_INTENSITIES},
        **_grid_cells(scan),
        **_slice_cells(slices, is_drawing=intensities.is_drawing),
    }
    row = row_of(QualityRow, cells)
    return ScanFacts(row=row, border=border, intensities=intensities)


def _grid_cells(scan: Volume) -> dict[str, str | float]:
    canonical = scan.geometry.canonical()
    cells: dict[str, str | float] = {"axes": scan.geometry.axis_codes}
    for axis, n, mm in zip("ras", canonical.shape, canonical.spacing_mm, strict=True):
        cells |= {f"size_{axis}": n, f"spacing_{axis}_mm": mm}
    return cells


def _slice_cells(slices: Slices, *, is_drawing: bool) -> dict[str, str | float | None]:
    cells: dict[str, str | float | None] = {"slice_axis": "RAS"[slices.axis]}
    if is_drawing:  # neighbouring slices of a mask may well be equal
        return cells
    return cells | {
        "equal_slices": slices.n_equal,
        "slice_jump": slices.jump,
        "slice_jump_at": slices.jump_at,
    }
