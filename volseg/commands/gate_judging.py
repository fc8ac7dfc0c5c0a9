"""What a gate skipped in results, against the reference masks: slices and sensitivity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from volseg.io.csv_text import iterate_csv
from volseg.io.formats import stem_of
from volseg.io.images import through_axis
from volseg.io.volumes import read_mask
from volseg.volume import Volume
from volseg.words import parse_ranges

TABLE, COLUMN = "cases.csv", "slices_skipped"


def gate_summary(
    results: Path, masks: Iterable[tuple[Path, Path, Path | None]]
) -> dict[str, int | float | None] | None:
    """Return how many slices a gate skipped, and how many with a label it kept.

    Args:
        results: folder of `volseg infer`.
        masks: of each case, the predicted mask, the reference mask, and its scan if known.

    Returns:
        None if no gate skipped anything; `sensitivity` is None if no slice has a label.
    """
    skipped = _skipped(results)
    if not any(skipped.values()):
        return None
    totals = np.zeros(4, int)
    for predicted, reference, scan in masks:
        name = stem_of(predicted)
        if name in skipped:
            totals += _counts(read_mask(reference, like=scan), skipped[name])
    n_slices, n_skipped, n_labelled, n_kept = totals.tolist()
    return {
        "slices": n_slices,
        "skipped": n_skipped,
        "with_label": n_labelled,
        "with_label_kept": n_kept,
        "sensitivity": n_kept / n_labelled if n_labelled else None,
    }


def _skipped(results: Path) -> Mapping[str, str]:
    """Return case id → the cell of its skipped slices."""
    path = results / TABLE
    if not path.is_file():
        return {}
    return {row.get("case_id", ""): row.get(COLUMN, "") for row in iterate_csv(path)}


def _counts(mask: Volume, cell: str) -> np.ndarray:
    """Return the numbers of slices: all, skipped, with a label, and those of them kept."""
    array = mask.canonical().array
    through = through_axis(array.shape)
    n = array.shape[through]
    has_label = np.moveaxis(array, through, 0).reshape(n, -1).any(axis=1)
    is_skipped = np.zeros(n, bool)
    is_skipped[parse_ranges(cell, below=n)] = True
    kept = has_label & ~is_skipped
    return np.array([n, is_skipped.sum(), has_label.sum(), kept.sum()])
