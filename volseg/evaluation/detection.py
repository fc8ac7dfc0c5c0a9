"""Lesion detection: reference and predicted lesions matched one to one, and FROC."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

from volseg.columns import column
from volseg.errors import ScanError
from volseg.evaluation.overlap import OverlapRow
from volseg.postprocessing.components import component_statistics, finding_bytes, runs_of
from volseg.postprocessing.lesions import (
    MANY,
    Lesions,
    centres_mm,
    equivalent_diameter_mm,
    label_lesions,
    stable_voxel_mm3,
)
from volseg.postprocessing.pairing import MAX_PAIRS, PAIR_BYTES, best_pairs
from volseg.volume import BoundingBox, Geometry, Volume
from volseg.words import format_thousands

# bounds of the equivalent diameter; RECIST 1.1 measures lesions from 10 mm
SIZE_BINS_MM = (5.0, 10.0, 20.0)
COUNTED_TOGETHER = 2**18  # voxels per chunk when overlaps are counted
# Measured: bytes per voxel of a chunk, and per lesion with its row.
COUNTED_BYTES, LESION_BYTES = 60, 1500
FALSE_POSITIVE_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # per scan, as in LUNA16's score

Side = Literal["reference", "predicted"]
Row = TypeVar("Row", OverlapRow, "DetectionRow")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRow:
    """A lesion of the reference or the prediction: a row of detections.csv. None: an empty cell."""

    case_id: str = column("", "name of the case")
    label: int = column("", "value of the lesion in its mask")
    label_name: str = column("", "name of that value")
    side: Literal["reference", "predicted"] = column(
        "", "mask that contains the lesion: reference or predicted"
    )
    lesion_id: int = column(
        "", "number of the lesion in that mask; 1 is the largest, as in lesions.csv"
    )
    status: Literal["matched", "missed", "false"] = column(
        "",
        "matched; missed (false negative): a reference lesion without a partner; "
        "false (false positive): a predicted lesion without a partner",
    )
    matched_id: int | None = column("", "lesion_id of its partner in the other mask")
    iou: float | None = column(
        "0 to 1", "intersection over union of the pair: voxels in both lesions / voxels in either"
    )
    n_overlapping: int = column(
        "",
        "lesions of the same label in the other mask that share a voxel with it; "
        "more than one means a split or a merge",
    )
    n_voxels: int = column("voxels", "number of voxels")
    volume_ml: float = column("mL", "n_voxels × voxel volume")
    diameter_mm: float = column("mm", "diameter of a ball with that volume")
    size_bin: str = column("mm", "size bin of that diameter")
    centroid_r_mm: float = column(
        "mm", "centroid of the voxels, towards the patient's right (RAS world)"
    )
    centroid_a_mm: float = column("mm", "the same, towards anterior")
    centroid_s_mm: float = column("mm", "the same, towards superior")
    confidence: float | None = column(
        "0 to 1",
        "confidence_mean of a predicted lesion in the results' lesions.csv; empty if unknown",
        None,
    )
    patient: str | None = column("", "patient of the scan; empty if the reference names none", None)


@dataclass(frozen=True, slots=True, eq=False)
class Partners:
    """Partners of the N lesions of a mask in the other mask; lesion n is at position n - 1.

    Args:
        numbers: (N,) number of the partner, 0 if unmatched.
        iou: (N,) IoU with it, NaN if unmatched.
        n_over: (N,) lesions of the other mask that have the same label and share a voxel.
    """

    numbers: np.ndarray
    iou: np.ndarray
    n_over: np.ndarray

    @classmethod
    def of(cls, over: np.ndarray, n: int) -> Partners:
        """Return N lesions without partner; `over` has the index of a lesion for each overlap."""
        return cls(np.zeros(n, np.int64), np.full(n, np.nan), np.bincount(over, minlength=n))


def match_lesions(
    reference: Lesions, predicted: Lesions, *, min_iou: float = 0.0, most_pairs: int = MAX_PAIRS
) -> tuple[Partners, Partners]:
    """Match lesions of the same label one to one, such that the sum of the pairs' IoU is largest.

    If a lesion was predicted in parts, at most one part has a partner; the others are false.

    Args:
        min_iou: smallest IoU of a pair; 0: one common voxel is enough.
        most_pairs: largest number of overlapping pairs; more are taken for noise.

    Returns:
        The partners of the reference lesions and those of the predicted lesions.

    Raises:
        NoisyMaskError: more than `most_pairs` pairs of lesions share a voxel.
    """
    rows, columns, iou = _overlaps(reference, predicted, most_pairs)
    of_reference = Partners.of(rows, len(reference.labels))
    of_predicted = Partners.of(columns, len(predicted.labels))
    iou_of = {
        (row, col): value
        for row, col, value in zip(rows.tolist(), columns.tolist(), iou.tolist(), strict=True)
        if value >= min_iou
    }
    for row, col in best_pairs(iou_of):
        of_reference.numbers[row], of_predicted.numbers[col] = col + 1, row + 1
        of_reference.iou[row] = of_predicted.iou[col] = iou_of[row, col]
    return of_reference, of_predicted


def _overlaps(
    reference: Lesions, predicted: Lesions, most_pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return reference index, predicted index and IoU of all overlapping pairs of one label."""
    layout = "F" if reference.ids.flags.f_contiguous else "C"
    truth, guess = reference.ids.ravel(order=layout), predicted.ids.ravel(order=layout)
    width = len(predicted.labels) + 1
    pairs, shared = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, truth.size, COUNTED_TOGETHER):
        true_ids, guess_ids = (ids[start : start + COUNTED_TOGETHER] for ids in (truth, guess))
        both = np.flatnonzero((true_ids != 0) & (guess_ids != 0))
        if not both.size:
            continue
        new_pairs, n_shared = np.unique(
            true_ids[both].astype(np.int64) * width + guess_ids[both], return_counts=True
        )
        pairs, index = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        total = np.bincount(index, np.concatenate([shared, n_shared]), len(pairs))
        shared = total.astype(np.int64)
        if len(pairs) > most_pairs:
            limit = f"{most_pairs:,}".replace(",", " ")
            raise NoisyMaskError(
                f"over {limit} pairs of lesions that overlap: a mask looks like noise",
                fix="check both masks",
                code="W_SPECKS",
            )
    rows, columns = pairs // width - 1, pairs % width - 1
    true_labels = np.array(reference.labels, np.int64)
    alike = true_labels[rows] == np.array(predicted.labels, np.int64)[columns]
    rows, columns, shared = rows[alike], columns[alike], shared[alike]
    union = np.array(reference.n_voxels)[rows] + np.array(predicted.n_voxels)[columns] - shared
    return rows, columns, shared / union


def detect_lesions(
    reference: Volume,
    predicted: Volume,
    label_names: Mapping[int, str],
    *,
    case_id: str,
    min_iou: float = 0.0,
    many: int = MANY,
) -> list[DetectionRow]:
    """List all lesions of a reference and a predicted mask, with their partners in the other mask.

    A lesion is a connected component (26 neighbours) of the voxels of one label.

    Args:
        reference, predicted: integer masks on the same grid.
        label_names: value → name of every label.
        many: a mask with more components than this is taken for noise.

    Returns:
        The reference lesions by number, then the predicted lesions.

    Raises:
        NoisyMaskError: a mask has more than `many` components, or more than `MAX_PAIRS` pairs of
            lesions overlap.
    """
    truth = _lesions_of(reference, "reference", many)
    guess = _lesions_of(predicted, "prediction", many)
    matching = Matching(reference.geometry, label_names, case_id, min_iou)
    return matching.rows(truth, guess)


def detect_objects(
    reference: Volume, predicted: Volume, matching: Matching, *, many: int = MANY
) -> list[DetectionRow]:
    """List the objects of two masks in which each value is an object, all of label 1.

    Equal values in both masks need not be the same object.

    Raises:
        NoisyMaskError: as `detect_lesions`.
    """
    objects = []
    for mask, what in ((reference, "reference"), (predicted, "prediction")):
        lesions = label_lesions(mask.array, mask.geometry, objects="labels")
        _refuse_many(lesions, what, many)
        objects.append(replace(lesions, labels=[1] * len(lesions.labels)))
    return matching.rows(*objects)


@dataclass(frozen=True, slots=True, eq=False)
class Matching:
    """How the lesions of a case are matched and named.

    Args:
        geometry: the grid of both masks.
        label_names: value → name of every label.
        min_iou: smallest IoU of a pair.
    """

    geometry: Geometry
    label_names: Mapping[int, str]
    case_id: str
    min_iou: float = 0.0

    def rows(self, truth: Lesions, guess: Lesions) -> list[DetectionRow]:
        """Return the reference lesions by number, then the predicted lesions."""
        of_truth, of_guess = match_lesions(truth, guess, min_iou=self.min_iou)
        return [
            *_rows(truth, of_truth, self, "reference"),
            *_rows(guess, of_guess, self, "predicted"),
        ]


def matching_bytes(reference: np.ndarray, predicted: np.ndarray) -> int:
    """Return an upper bound in bytes of what `detect_lesions` needs beside these masks."""
    n_runs = (runs_of(reference), runs_of(predicted))
    return _matching_bytes(reference.size, n_runs, runs_of(reference, predicted))


def most_matching_bytes(voxels: int) -> int:
    """Return `matching_bytes` in the worst case, for any two masks of `voxels` voxels."""
    return _matching_bytes(voxels, (voxels, voxels), voxels)


def _matching_bytes(voxels: int, n_lesions: tuple[int, int], n_pairs: int) -> int:
    """Return the peak over finding and matching `n_lesions` with `n_pairs` overlapping pairs."""
    # Ids of the second mask exist in four and in two bytes, beside those of the first.
    finding = 8 * voxels + finding_bytes(voxels, max(n_lesions))
    rows = LESION_BYTES * sum(min(n, MANY) for n in n_lesions)
    counting = COUNTED_BYTES * min(voxels, COUNTED_TOGETHER) + PAIR_BYTES * min(n_pairs, MAX_PAIRS)
    return max(finding, 6 * voxels + counting + rows)


class NoisyMaskError(ScanError):
    """A mask with so many components that they must be noise rather than lesions."""


def _lesions_of(mask: Volume, what: str, many: int) -> Lesions:
    try:
        lesions = label_lesions(mask.array, mask.geometry)
    except ScanError as error:
        if error.code != "E_SPECKS":
            raise
        raise NoisyMaskError(
            f"the {what} has {error.problem}", fix=error.fix, code="W_SPECKS"
        ) from error
    _refuse_many(lesions, what, many)
    return lesions


def _refuse_many(lesions: Lesions, what: str, many: int) -> None:
    if len(lesions.labels) > many:
        n = format_thousands(len(lesions.labels))
        raise NoisyMaskError(
            f"the {what} has {n} components: this mask looks like noise",
            fix="check it",
            code="W_SPECKS",
        )


def _rows(
    lesions: Lesions, partners: Partners, matching: Matching, side: Side
) -> Iterator[DetectionRow]:
    geometry = matching.geometry
    voxel_mm3 = stable_voxel_mm3(geometry)
    sizes = zip(lesions.labels, lesions.n_voxels, _centroids_mm(lesions.ids, geometry), strict=True)
    for n, (label, n_voxels, (r, a, s)) in enumerate(sizes):
        diameter_mm = equivalent_diameter_mm(n_voxels * voxel_mm3)
        partner = int(partners.numbers[n])
        yield DetectionRow(
            case_id=matching.case_id,
            label=label,
            label_name=matching.label_names[label],
            side=side,
            lesion_id=n + 1,
            status="matched" if partner else "missed" if side == "reference" else "false",
            matched_id=partner or None,
            iou=float(partners.iou[n]) if partner else None,
            n_overlapping=int(partners.n_over[n]),
            n_voxels=n_voxels,
            volume_ml=n_voxels * voxel_mm3 / 1000,
            diameter_mm=diameter_mm,
            size_bin=size_bin(diameter_mm),
            centroid_r_mm=r,
            centroid_a_mm=a,
            centroid_s_mm=s,
        )


def _centroids_mm(ids: np.ndarray, geometry: Geometry) -> list[list[float]]:
    box = BoundingBox.around(ids)
    if box is None:
        return []
    return centres_mm(
        component_statistics(ids[box.slices]).centroids + box.start, geometry
    ).tolist()


def size_bin(diameter_mm: float) -> str:
    """Return the name of the size bin of an equivalent diameter; a bound counts to the bin above.

    >>> size_bin(4.9), size_bin(5.0), size_bin(30.0)
    ('under 5', '5 to 10', '20 and over')
    """
    return size_bins()[int(np.searchsorted(SIZE_BINS_MM, diameter_mm, side="right"))]


def size_bins() -> list[str]:
    """Return the names of all size bins, smallest first."""
    between = [f"{low:g} to {high:g}" for low, high in pairwise(SIZE_BINS_MM)]
    return [f"under {SIZE_BINS_MM[0]:g}", *between, f"{SIZE_BINS_MM[-1]:g} and over"]


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Lesions of one label, of any number of cases."""

    references: Sequence[DetectionRow]
    predictions: Sequence[DetectionRow]

    @classmethod
    def of(cls, rows: Iterable[DetectionRow], label: int) -> Detections:
        of_label = [row for row in rows if row.label == label]
        references = [row for row in of_label if row.side == "reference"]
        return cls(references, [row for row in of_label if row.side == "predicted"])

    @property
    def all(self) -> list[DetectionRow]:
        return [*self.references, *self.predictions]

    @property
    def n_matched(self) -> int:
        """Number of matched pairs."""
        return sum(lesion.status == "matched" for lesion in self.references)


def with_lesions(row: OverlapRow, detections: Iterable[DetectionRow]) -> OverlapRow:
    """Return the row with its lesion columns filled from the `detections` of its case."""
    lesions = Detections.of(detections, row.label)
    n_reference, n_predicted = len(lesions.references), len(lesions.predictions)
    n_matched = lesions.n_matched
    return replace(
        row,
        n_reference_lesions=n_reference,
        n_predicted_lesions=n_predicted,
        n_matched_lesions=n_matched,
        lesion_sensitivity=n_matched / n_reference if n_reference else None,
        lesion_precision=n_matched / n_predicted if n_predicted else None,
        lesion_f1=2 * n_matched / len(lesions.all) if lesions.all else None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Froc:
    """A free-response ROC curve: sensitivity and false positives per scan at each confidence.

    Args:
        thresholds: (T,) descending; predicted lesions with at least this confidence count.
        sensitivity: (T,) fraction of reference lesions whose partner counts; never decreases.
        false_positives_per_scan: (T,) unmatched predicted lesions that count, per scan; never
            decreases.
        n_reference, n_scans: numbers of reference lesions and scans, the denominators.
    """

    thresholds: np.ndarray
    sensitivity: np.ndarray
    false_positives_per_scan: np.ndarray
    n_reference: int
    n_scans: int

    def sensitivity_at(self, false_positives_per_scan: float) -> float:
        """Return the highest sensitivity with at most this rate of false positives, else 0."""
        rates = self.false_positives_per_scan
        n_within = np.searchsorted(rates, false_positives_per_scan, side="right")
        return float(self.sensitivity[n_within - 1]) if n_within else 0.0

    @property
    def score(self) -> float:
        """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per scan."""
        return float(np.mean([self.sensitivity_at(rate) for rate in FALSE_POSITIVE_RATES]))


def froc(confidence: np.ndarray, is_matched: np.ndarray, *, n_reference: int, n_scans: int) -> Froc:
    """Return the FROC curve of predicted lesions that were matched once, at all confidences.

    The masks were made with the model's own threshold, so the curve ends there: a lesion that the
    model did not segment is missed at every confidence.

    Args:
        confidence: (M,) confidence of each predicted lesion of all scans.
        is_matched: (M,) whether the lesion has a partner.

    Raises:
        ValueError: a confidence is NaN, or there is no reference lesion or no scan.

    Source: Bunch et al., J Appl Photogr Eng 4:166 (1978); rates of the score: LUNA16 (Setio, Med
        Image Anal 42:1, 2017).
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    is_matched = np.asarray(is_matched, dtype=bool)
    if np.isnan(confidence).any() or n_reference < 1 or n_scans < 1:
        raise ValueError(
            f"FROC needs a confidence for every predicted lesion, reference lesions and scans; got "
            f"{np.count_nonzero(np.isnan(confidence))} NaN, {n_reference} lesions, {n_scans} scans"
        )
    thresholds, index = np.unique(-confidence, return_inverse=True)
    n_true = np.bincount(index[is_matched], minlength=thresholds.size).cumsum()
    n_false = np.bincount(index[~is_matched], minlength=thresholds.size).cumsum()
    return Froc(-thresholds, n_true / n_reference, n_false / n_scans, n_reference, n_scans)


def by_label(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """Group rows by label, in order."""
    rows_by_label: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        rows_by_label[row.label].append(row)
    return rows_by_label
