"""Mean scores of maps against masks, with intervals over patients, beside simple maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from volseg.evaluation.bootstrap import Estimate, Statistics, bootstrap, bootstrap_difference
from volseg.evaluation.saliency import SIMPLE_MAPS
from volseg.evaluation.saliency_rows import ExplainRow, SaliencyRow

METRICS: tuple[str, ...] = ("auprc", "pointing")


def saliency_rows(rows: Iterable[ExplainRow], methods: Sequence[str]) -> list[SaliencyRow]:
    """Return the mean scores of the methods and of the simple maps, and their differences.

    The intervals are over patients; an image without a known patient counts as one.
    """
    scored = [row for row in rows if row.auprc is not None]
    if not scored:
        return []
    lines = list[SaliencyRow]()
    for method in methods:
        of_method = [row for row in scored if row.method == method]
        patients = [row.patient or row.case_id for row in of_method]
        numbers = {"n": len(of_method), "n_patients": len(set(patients))}
        scores = _mean_of(of_method)
        bounds = dict.fromkeys(METRICS, (0.0, 1.0))
        estimates = bootstrap(scores, patients, bounds=bounds)
        lines += [_score_row(method, name, estimates[name], numbers) for name in METRICS]
        for simple in SIMPLE_MAPS:
            other = _mean_of(of_method, f"_{simple}")
            differences = bootstrap_difference(scores, other, patients)
            lines += [
                _score_row(method, name, differences[name], numbers, simple) for name in METRICS
            ]
            if method == methods[0]:
                estimates = bootstrap(other, patients, bounds=bounds)
                lines += [_score_row(simple, name, estimates[name], numbers) for name in METRICS]
    return lines


def _mean_of(rows: Sequence[ExplainRow], end: str = "") -> Statistics:
    """Return the weighted means of the scores, or of those of a simple map: `end` names it."""
    values = {name: np.array([getattr(row, name + end) for row in rows], float) for name in METRICS}

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        totals = weights.sum(axis=1)
        return {name: weights @ of_rows / totals for name, of_rows in values.items()}

    return statistics


def _score_row(
    method: str, metric: str, estimate: Estimate, numbers: Mapping[str, int], against: str = ""
) -> SaliencyRow:
    ends = estimate.interval.ends or (None, None)
    return SaliencyRow(
        method=method,
        metric=metric,
        against=against or None,
        value=estimate.value,
        low=ends[0],
        high=ends[1],
        reason=estimate.interval.reason or None,
        **numbers,
    )
