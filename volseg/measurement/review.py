"""A reader's verdict on a lesion: the rows of review.csv, which the viewer pages write."""

from __future__ import annotations

from dataclasses import dataclass

from volseg.columns import column

ACCEPTED, REJECTED = "accepted", "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionReview:
    """A row of review.csv: what a reader decided about a lesion, made in a page and downloaded."""

    case_id: str = column("", "name of the scan")
    lesion_id: int = column("", "number of the lesion in the scan, as in lesions.csv")
    verdict: str = column("", "accepted or rejected; empty if there is only a comment")
    comment: str = column("", "the reader's text; empty if there is none", "")
    n_voxels: int | None = column(
        "voxels",
        "size of the lesion that was reviewed; a review of another size belongs to an earlier mask",
        None,
    )
    reviewed_at: str = column("", "time of the last change, in UTC", "")
