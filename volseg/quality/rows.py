"""The columns of quality.csv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from volseg.columns import column, optional

SHARE = "0 to 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """A row of quality.csv: a scan of a case, also one that cannot be read.

    Shares of voxels are those of a regular grid of about 262 000 of them.
    """

    case_id: str = column("", "name of the case")
    channel: str = column("", "channel of the case; image if it has one")
    status: Literal["done", "failed"] = column("", "done, or failed: the scan cannot be read")
    reason: str = column("", "why it failed and what to do; empty if it did not", "")
    flags: str = column("", "codes of the warnings, see docs/quality.md; empty if none", "")
    warnings: str = column("", "each code with what it means here and what to do", "")
    image: str = column("", "file of the scan; of DICOM the key of the series", "")
    modality: str = column("", "CT, MR, PT and so on, as a DICOM header states; else empty", "")
    looks_like_ct: bool | None = optional(
        "", "true: holds air in HU; false: cannot be HU; empty: undecided"
    )
    axes: str = column("", "anatomical direction of each array axis, such as LPS", "")
    size_r: int | None = optional("", "voxels along R (right to left)")
    size_a: int | None = optional("", "voxels along A (anterior to posterior)")
    size_s: int | None = optional("", "voxels along S (superior to inferior)")
    spacing_r_mm: float | None = optional("mm", "distance of voxels along R")
    spacing_a_mm: float | None = optional("mm", "distance of voxels along A")
    spacing_s_mm: float | None = optional("mm", "distance of voxels along S")
    slice_axis: str = column("", "axis along which slices are stacked: the coarsest, else S", "")
    equal_slices: int | None = optional(
        "", "pairs of neighbouring slices with the same voxels; uniform slices do not count"
    )
    slice_jump: float | None = optional(
        "",
        "largest difference of neighbouring slices / largest of up to three such differences on "
        "either side; missing slices raise it above 1",
    )
    slice_jump_at: int | None = optional(
        "", "number of the slice before slice_jump, from 1 at the left, posterior or inferior end"
    )
    cut_share: float | None = optional(
        SHARE, "largest share of a side of the grid, beside the ends of the stack, that is body"
    )
    cut_sides: str = column(
        "", "sides of which over a tenth is body: L, R (left, right), P, A, I, S", ""
    )
    lowest: float | None = optional("HU or a.u.", "lowest intensity")
    median: float | None = optional("HU or a.u.", "median intensity")
    highest: float | None = optional("HU or a.u.", "highest intensity")
    most_common: float | None = optional(SHARE, "share of voxels with the most frequent value")
    at_highest: float | None = optional(SHARE, "share of voxels with the highest value")
    whole_numbers: float | None = optional(
        SHARE, "share of intensities that are whole numbers; in CT below 1 after interpolation"
    )
    in_hu_range: float | None = optional(
        SHARE, "share of voxels from -1200 to 3071, without padding; empty if not CT"
    )
    air_hu: float | None = optional(
        "HU", "median of the air at the sides of the grid; empty if there is little, or not CT"
    )
    noise_sd: float | None = optional(
        "HU or a.u.",
        "standard deviation of the noise in the most homogeneous tissue; smooth noise reads low",
        source="global noise level, AJR 205:W93 (2015), with planes removed",
    )
    snr: float | None = optional(
        "", "median intensity of that tissue (in HU above air at -1000) / noise_sd"
    )
    same_as: str = column("", "first other scan with the same voxels", "")
    similar_to: str = column("", "first other scan that is nearly the same", "")

    @property
    def name(self) -> str:
        """The case, and its channel if it has a name."""
        return self.case_id if self.channel == "image" else f"{self.case_id} ({self.channel})"
