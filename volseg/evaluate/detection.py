"""Which lesions were found: reference and predicted lesions matched one to one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from volseg.columns import column
from volseg.errors import ScanError
from volseg.evaluate.overlap import OverlapRow
from volseg.postprocess.components import component_statistics, finding_bytes, runs_of
from volseg.postprocess.lesions import MANY, Lesions, label_lesions
from volseg.postprocess.pairing import MOST_PAIRS, PAIR_BYTES, best_pairs
from volseg.volume import BoundingBox, Geometry, Volume
from volseg.words import spaced

SIZE_BINS_MM = (
    5.0,
    10.0,
    20.0,
)  # bounds of the equivalent diameter; 10 mm is where RECIST 1.1 begins to measure
COUNTED_TOGETHER = 2**18  # voxels of two masks
# Measured: bytes per such voxel, and per lesion with its row.
COUNTED_BYTES, LESION_BYTES = 60, 1500
FALSE_POSITIVE_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # per scan: those of LUNA16's score

Side = Literal["reference", "predicted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRow:
    """A row of detections.csv: a lesion of the reference or of the prediction. None is unknown and is written as an empty cell."""

    case_id: str = column("", "name of the case")
    label: int = column("", "value of the lesion in its mask")
    label_name: str = column("", "name of that value")
    side: Literal["reference", "predicted"] = column(
        "", "reference or predicted: the mask that the lesion is in"
    )
    lesion_id: int = column(
        "", "number of the lesion in that mask; 1 is the largest, as in lesions.csv"
    )
    status: Literal["matched", "missed", "false"] = column(
        "", "matched; missed: a reference lesion without a partner; false: a predicted one without"
    )
    matched_id: int | None = column("", "lesion_id of its partner in the other mask")
    iou: float | None = column(
        "0 to 1", "voxels that both have / voxels that either has; of a pair"
    )
    n_overlapping: int = column(
        "",
        "lesions of its label in the other mask that share a voxel with it; several of one are a split or a merger",
    )
    n_voxels: int = column("voxels", "number of voxels")
    volume_ml: float = column("mL", "n_voxels × voxel volume")
    diameter_mm: float = column("mm", "diameter of the ball of that volume")
    size_bin: str = column("mm", "bin of that diameter")
    centroid_r_mm: float = column(
        "mm", "centre of mass of the voxels, towards the patient's right (RAS world)"
    )
    centroid_a_mm: float = column("mm", "the same, towards anterior")
    centroid_s_mm: float = column("mm", "the same, towards superior")
    confidence: float | None = column(
        "0 to 1",
        "confidence_mean of a predicted lesion in lesions.csv of the results; empty without one",
        None,
    )
    patient: str | None = column("", "whose scan it is; empty if the reference does not say", None)


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Lesions of two masks: reference lesion n and predicted lesion m stand at position n - 1 and m - 1.

    Args:
        partner_of_reference, partner_of_predicted: number of the partner in the other mask, 0 for none.
        iou_of_reference, iou_of_predicted: overlap with that partner, NaN without one.
        n_over_reference, n_over_predicted: lesions of the other mask with its label that share a voxel with it.
    """

    partner_of_reference: np.ndarray
    partner_of_predicted: np.ndarray
    iou_of_reference: np.ndarray
    iou_of_predicted: np.ndarray
    n_over_reference: np.ndarray
    n_over_predicted: np.ndarray


def match_lesions(
    reference: Lesions, predicted: Lesions, *, min_iou: float = 0.0, most_pairs: int = MOST_PAIRS
) -> Matches:
    """Pair lesions of one label one to one, so that the sum of the overlaps (IoU) of the pairs is the largest that there is.

    Args:
        min_iou: overlap from which two lesions may be a pair; 0: a common voxel is enough.
        most_pairs: of lesions that share a voxel; more are noise.

    Returns:
        Of a lesion that was predicted in parts, one part at most has a partner; the others are false.

    Raises:
        NoisyMaskError: more pairs share a voxel.
    """
    n, m = len(reference.labels), len(predicted.labels)
    found = Matches(
        np.zeros(n, np.int64), np.zeros(m, np.int64), np.full(n, np.nan), np.full(m, np.nan),
        np.zeros(n, np.int64), np.zeros(m, np.int64),
    )  # fmt: skip
    rows, columns, iou = _overlaps(reference, predicted, most_pairs)
    np.add.at(found.n_over_reference, rows, 1)
    np.add.at(found.n_over_predicted, columns, 1)
    gains = {
        (row, column_): value
        for row, column_, value in zip(rows.tolist(), columns.tolist(), iou.tolist(), strict=True)
        if value >= min_iou
    }
    for row, column_ in best_pairs(gains):
        found.partner_of_reference[row], found.partner_of_predicted[column_] = column_ + 1, row + 1
        found.iou_of_reference[row] = found.iou_of_predicted[column_] = gains[row, column_]
    return found


def _overlaps(
    reference: Lesions, predicted: Lesions, most_pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the reference and the predicted lesion, and their IoU, for every two of one label that share a voxel."""
    layout = "F" if reference.ids.flags.f_contiguous else "C"
    first, second = reference.ids.ravel(order=layout), predicted.ids.ravel(order=layout)
    width = len(predicted.labels) + 1
    pairs, shared = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, first.size, COUNTED_TOGETHER):
        one, other = (ids[start : start + COUNTED_TOGETHER] for ids in (first, second))
        both = np.flatnonzero((one != 0) & (other != 0))
        if not both.size:
            continue
        some, n_shared = np.unique(
            one[both].astype(np.int64) * width + other[both], return_counts=True
        )
        pairs, places = np.unique(np.concatenate([pairs, some]), return_inverse=True)
        shared = np.bincount(places, np.concatenate([shared, n_shared]), len(pairs)).astype(
            np.int64
        )
        if len(pairs) > most_pairs:
            raise NoisyMaskError(
                f"over {most_pairs:,} pairs of lesions that overlap: a mask looks like noise".replace(
                    ",", " "
                ),
                fix="check both masks",
                code="W_SPECKS",
            )
    rows, columns = pairs // width - 1, pairs % width - 1
    alike = (
        np.array(reference.labels, np.int64)[rows] == np.array(predicted.labels, np.int64)[columns]
    )
    rows, columns, shared = rows[alike], columns[alike], shared[alike]
    either = np.array(reference.n_voxels)[rows] + np.array(predicted.n_voxels)[columns] - shared
    return rows, columns, shared / either


def detect_lesions(
    reference: Volume,
    predicted: Volume,
    label_names: Mapping[int, str],
    *,
    case_id: str,
    min_iou: float = 0.0,
    many: int = MANY,
) -> list[DetectionRow]:
    """Every lesion of a reference and a predicted mask, with its partner in the other one.

    A lesion is a connected component (26 neighbours) of the voxels of one label.

    Args:
        reference, predicted: masks of whole numbers on the same grid.
        label_names: value → name of every label.

    Returns:
        The reference lesions by their number, then the predicted ones.

    Raises:
        NoisyMaskError: a mask has more than `many` components, or they overlap in more than ten ways each; they are no lesions,
            and are not matched.
    """
    geometry = reference.geometry
    truth, guess = (
        _lesions_of(mask, geometry, side, many)
        for side, mask in (("reference", reference.array), ("prediction", predicted.array))
    )
    matches = match_lesions(truth, guess, min_iou=min_iou)
    return [
        *_rows(
            truth,
            geometry,
            label_names,
            case_id,
            "reference",
            matches.partner_of_reference,
            matches.iou_of_reference,
            matches.n_over_reference,
        ),
        *_rows(
            guess,
            geometry,
            label_names,
            case_id,
            "predicted",
            matches.partner_of_predicted,
            matches.iou_of_predicted,
            matches.n_over_predicted,
        ),
    ]


def matching_bytes(reference: np.ndarray, predicted: np.ndarray) -> int:
    """Most memory that `detect_lesions` of these masks takes beside them, which a look at runs of voxels tells."""
    n_runs = (runs_of(reference), runs_of(predicted))
    return _matching_bytes(reference.size, n_runs, runs_of(reference, predicted))


def most_matching_bytes(voxels: int) -> int:
    """The same for any two masks of so many voxels."""
    return _matching_bytes(voxels, (voxels, voxels), voxels)


def _matching_bytes(voxels: int, n_lesions: tuple[int, int], n_pairs: int) -> int:
    """Peak of what follows each other, for at most so many lesions and pairs of them that overlap."""
    # The second mask's ids are there in four bytes and in two, beside those of the first.
    finding = 8 * voxels + finding_bytes(voxels, max(n_lesions))
    rows = LESION_BYTES * sum(min(n, MANY) for n in n_lesions)
    counting = COUNTED_BYTES * min(voxels, COUNTED_TOGETHER) + PAIR_BYTES * min(n_pairs, MOST_PAIRS)
    return max(finding, 6 * voxels + counting + rows)


class NoisyMaskError(ScanError):
    """A mask of so many components that they are no lesions."""


def _lesions_of(mask: np.ndarray, geometry: Geometry, side: str, many: int) -> Lesions:
    try:
        lesions = label_lesions(mask, geometry)
    except ScanError as error:
        if error.code == "E_SPECKS":
            raise NoisyMaskError(
                f"the {side} has {error.problem}", fix=error.fix, code="W_SPECKS"
            ) from error
        raise
    if len(lesions.labels) > many:
        n = spaced(len(lesions.labels))
        raise NoisyMaskError(
            f"the {side} has {n} components: this mask looks like noise",
            fix="check it",
            code="W_SPECKS",
        )
    return lesions


def _rows(
    lesions: Lesions,
    geometry: Geometry,
    label_names: Mapping[int, str],
    case_id: str,
    side: Side,
    partners: np.ndarray,
    iou: np.ndarray,
    n_over: np.ndarray,
) -> list[DetectionRow]:
    rows = []
    voxel_mm3 = float(
        f"{geometry.voxel_volume_mm3:.12g}"
    )  # |det A| differs in its last bit between axis orders
    for position, (label, n_voxels, centroid) in enumerate(
        zip(lesions.labels, lesions.n_voxels, _centroids_mm(lesions.ids, geometry), strict=True)
    ):
        diameter_mm = (6 * n_voxels * voxel_mm3 / math.pi) ** (1 / 3)
        partner = int(partners[position])
        r, a, s = centroid.tolist()
        rows.append(
            DetectionRow(
                case_id=case_id,
                label=label,
                label_name=label_names[label],
                side=side,
                lesion_id=position + 1,
                status="matched" if partner else "missed" if side == "reference" else "false",
                matched_id=partner or None,
                iou=float(iou[position]) if partner else None,
                n_overlapping=int(n_over[position]),
                n_voxels=n_voxels,
                volume_ml=n_voxels * voxel_mm3 / 1000,
                diameter_mm=diameter_mm,
                size_bin=size_bin(diameter_mm),
                centroid_r_mm=r,
                centroid_a_mm=a,
                centroid_s_mm=s,
            )
        )
    return rows


def _centroids_mm(ids: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(N, 3) RAS mm of lesion 1, 2, …, N, to 1e-9 mm: the last bits differ between axis orders."""
    box = BoundingBox.around(ids)
    if box is None:
        return np.empty((0, 3))
    centroids = component_statistics(ids[box.slices]).centroids
    return np.round(geometry.to_world_mm(centroids + box.start), 9) + 0.0


def size_bin(diameter_mm: float) -> str:
    """Name of the bin of an equivalent diameter; a bound belongs to the bin above it.

    >>> size_bin(4.9), size_bin(5.0), size_bin(30.0)
    ('under 5', '5 to 10', '20 and over')
    """
    return size_bins()[int(np.searchsorted(SIZE_BINS_MM, diameter_mm, side="right"))]


def size_bins() -> list[str]:
    """Names of all bins, from the smallest."""
    between = [f"{low:g} to {high:g}" for low, high in pairwise(SIZE_BINS_MM)]
    return [f"under {SIZE_BINS_MM[0]:g}", *between, f"{SIZE_BINS_MM[-1]:g} and over"]


def with_lesions(row: OverlapRow, detections: Sequence[DetectionRow]) -> OverlapRow:
    """The row with what was detected of its label; `detections` are those of its case."""
    own = [lesion for lesion in detections if lesion.label == row.label]
    n_reference = sum(lesion.side == "reference" for lesion in own)
    n_predicted = len(own) - n_reference
    n_matched = sum(lesion.side == "reference" and lesion.status == "matched" for lesion in own)
    return replace(
        row,
        n_reference_lesions=n_reference,
        n_predicted_lesions=n_predicted,
        n_matched_lesions=n_matched,
        lesion_sensitivity=n_matched / n_reference if n_reference else None,
        lesion_precision=n_matched / n_predicted if n_predicted else None,
        lesion_f1=2 * n_matched / len(own) if own else None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Froc:
    """Free-response ROC: what is found and what is found falsely if only lesions of some confidence count.

    Args:
        thresholds: (T,) confidences from the highest; predicted lesions at or above it count.
        sensitivity: (T,) share of the reference lesions whose partner counts. Never falls from left to right.
        false_positives_per_scan: (T,) predicted lesions without a partner that count, per scan. Never falls either.
        n_reference, n_scans: lesions and scans that these are shares of.
    """

    thresholds: np.ndarray
    sensitivity: np.ndarray
    false_positives_per_scan: np.ndarray
    n_reference: int
    n_scans: int

    def sensitivity_at(self, false_positives_per_scan: float) -> float:
        """The highest sensitivity of a threshold with at most so many false positives per scan; 0 where there is none."""
        reached = np.searchsorted(
            self.false_positives_per_scan, false_positives_per_scan, side="right"
        )
        return float(self.sensitivity[reached - 1]) if reached else 0.0

    @property
    def score(self) -> float:
        """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per scan."""
        return float(np.mean([self.sensitivity_at(rate) for rate in FALSE_POSITIVE_RATES]))


def froc(confidence: np.ndarray, is_matched: np.ndarray, *, n_reference: int, n_scans: int) -> Froc:
    """FROC of predicted lesions that were matched once, all together.

    The masks are those of the model's own threshold, so the curve ends there: what the model did not segment cannot be
    found at any confidence.

    Args:
        confidence: (M,) of each predicted lesion of all scans. is_matched: (M,) whether it has a partner.

    Raises:
        ValueError: a confidence is NaN, or there is no reference lesion or no scan.

    Source: Bunch et al., J Appl Photogr Eng 4:166 (1978); the rates of the score are those of LUNA16 (Setio, Med Image Anal
        42:1, 2017).
    """
    confidence, is_matched = (
        np.asarray(confidence, dtype=np.float64),
        np.asarray(is_matched, dtype=bool),
    )
    if np.isnan(confidence).any() or n_reference < 1 or n_scans < 1:
        raise ValueError(
            f"FROC needs a confidence of every predicted lesion, reference lesions and scans; got "
            f"{np.count_nonzero(np.isnan(confidence))} NaN, {n_reference} lesions, {n_scans} scans"
        )
    thresholds, first = np.unique(-confidence, return_inverse=True)
    found = np.bincount(first[is_matched], minlength=thresholds.size).cumsum()
    false = np.bincount(first[~is_matched], minlength=thresholds.size).cumsum()
    return Froc(-thresholds, found / n_reference, false / n_scans, n_reference, n_scans)
