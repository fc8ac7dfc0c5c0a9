"""`volseg evaluate`: predicted masks against reference masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volseg.errors import ScanError, VolsegError
from volseg.evaluate.overlap import OverlapRow, evaluate_case
from volseg.execute.local import run
from volseg.io.cases import find_cases, find_scans
from volseg.io.files import write_json_atomic
from volseg.io.nifti import read_mask
from volseg.report.results import RECORDS, held
from volseg.report.tables import write_table
from volseg.workflows.batch import Progress, RunReport, reason_of, silent


def evaluate(
    *, reference: Path | str, predicted: Path | str, out: Path | str, progress: Progress = silent
) -> RunReport:
    """Dice per label and volume error of predicted masks against reference masks, matched by name.

    Args:
        reference: folder of masks, or a dataset whose labels they are.
        predicted: folder of masks, or a results folder (its masks/ is taken).

    Raises:
        VolsegError: no case has both. A pair that cannot be compared is a failed row instead.
    """
    out = Path(out)
    truths, guesses = _masks(Path(reference)), _masks(Path(predicted))
    common = [name for name in truths if name in guesses]
    if not common:
        raise VolsegError(
            f"no mask of {predicted} has the name of one in {reference}, such as {next(iter(truths), 'none')!r}",
            fix="give masks named after their cases",
            code="E_DATASET",
        )

    def compare(name: str) -> list[OverlapRow]:
        truth, guess = read_mask(truths[name]), read_mask(guesses[name])
        values = (set(np.unique(truth.array).tolist()) | set(np.unique(guess.array).tolist())) - {0}
        names = {value: f"label_{value}" for value in sorted(values | labels)}
        return evaluate_case(truth, guess, names, case_id=name)

    with held(out, out / RECORDS):
        labels = _all_labels([truths[name] for name in common])
        rows, failed, done = [], {}, []
        for count, outcome in enumerate(run(compare, common), start=1):
            progress("Comparing", count / len(common), outcome.item)
            if outcome.error is None:
                rows += outcome.value or []
                done.append(outcome.item)
            else:
                failed[outcome.item] = reason_of(outcome.error)
        write_table(out / "evaluation.csv", OverlapRow, rows)
        summary = _evaluation_summary(rows, sorted(set(truths) - set(guesses)), failed)
        write_json_atomic(out / "summary.json", summary)
    return RunReport(out=out, done=done, failed=failed, details=summary)


def _masks(path: Path) -> dict[str, Path]:
    """Case id → mask of a folder of masks, a results folder or a dataset."""
    if (
        path.is_file()
        or ((path / "cases.csv").is_file() and not (path / "masks").is_dir())
        or (path / "labels").is_dir()
        or (path / "dataset.json").is_file()
    ):
        return {case.id: case.reference for case in find_cases(path, None) if case.reference is not None}
    if (path / RECORDS).is_dir() and not (path / "masks").is_dir():
        raise VolsegError(f"{path}: holds no masks", fix="give the results of `volseg infer`", code="E_DATASET")
    folder = path / "masks" if (path / "masks").is_dir() else path
    return {case.id: next(iter(case.images.values())) for case in find_scans([folder], ("image",))}


def _all_labels(paths: Sequence[Path]) -> set[int]:
    """Values of any reference: a label missing from one case's two masks still has a row there."""
    labels: set[int] = set()
    for path in paths:
        try:
            labels |= set(np.unique(read_mask(path).array).tolist())
        except ScanError:
            continue  # compared, and reported as a failed row, below
    return labels - {0}


def _evaluation_summary(rows: Sequence[Any], missing: Sequence[str], failed: Mapping[str, str]) -> dict[str, Any]:
    summary: dict[str, Any] = {"n_cases": len({row.case_id for row in rows}), "labels": {}}
    for label in sorted({row.label for row in rows}):
        scores = np.array([row.dice for row in rows if row.label == label])
        errors = np.array([row.volume_error_percent for row in rows if row.label == label])
        known, sized = scores[~np.isnan(scores)], errors[~np.isnan(errors)]
        summary["labels"][str(label)] = {
            "n": int(known.size),
            "mean_dice": float(known.mean()) if known.size else None,
            "median_dice": float(np.median(known)) if known.size else None,
            "median_volume_error_percent": float(np.median(sized)) if sized.size else None,
        }
    means = [values["mean_dice"] for values in summary["labels"].values() if values["mean_dice"] is not None]
    summary["mean_dice"] = float(np.mean(means)) if means else None
    return summary | {"not_predicted": list(missing), "failed": dict(failed)}
