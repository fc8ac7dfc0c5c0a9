"""Read the rows of an earlier evaluation, for cases that the current run cannot compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from volseg.evaluation.detection import DetectionRow
from volseg.evaluation.overlap import OverlapRow
from volseg.inputs import read_json
from volseg.io.csv_text import iterate_csv
from volseg.store.outputs import OutputFolder
from volseg.store.tables import typed_row

EVALUATION, DETECTIONS, SUMMARY = "evaluation.csv", "detections.csv", "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluatedCase:
    """Rows of one case.

    Args:
        masks: SHA-256 of the reference and of the predicted mask.
        shared: (predicted, reference value) → voxels that have both, of values that the other mask
            lacks; not stored.
    """

    overlap: Sequence[OverlapRow]
    detections: Sequence[DetectionRow]
    masks: tuple[str, str]
    shared: Mapping[tuple[int, int], int] = field(default_factory=dict)


def read_evaluation(
    outputs: OutputFolder, cases: Collection[str], settings: Mapping[str, Any]
) -> tuple[float | None, Mapping[str, EvaluatedCase]]:
    """Read `--min-iou` of an earlier evaluation and its rows of these cases.

    Args:
        settings: how the masks are read.

    Returns:
        (None, {}) if there is no evaluation with these settings or one of its files was changed.
    """
    if not all(outputs.is_own(name) for name in (EVALUATION, DETECTIONS, SUMMARY)):
        return None, {}
    try:
        summary = read_json(outputs.path / SUMMARY)
        if summary["settings"] != settings:
            return None, {}
        masks = {name: (str(a), str(b)) for name, (a, b) in summary["masks"].items()}
        overlap, detections = defaultdict(list), defaultdict(list)
        for table, row_type, rows in (
            (EVALUATION, OverlapRow, overlap),
            (DETECTIONS, DetectionRow, detections),
        ):
            for cells in iterate_csv(outputs.path / table):
                if cells["case_id"] in cases and cells["status"] != "failed":
                    rows[cells["case_id"]].append(typed_row(row_type, cells))
        return float(summary["min_iou"]), {
            name: EvaluatedCase(overlap=rows, detections=detections[name], masks=masks[name])
            for name, rows in overlap.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}  # written by an earlier version
