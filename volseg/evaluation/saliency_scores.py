"""Mean scores of maps against masks, with intervals over patients, beside simple maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

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
    by_method = [[row for row in scored if row.method == method] for method in methods]
    lines = [_rows_of_method(method, of) for method, of in zip(methods, by_method, strict=True)]
    simple = [
        _score_rows(simple, _mean_of(by_method[0], f"_{simple}"), by_method[0])
        for simple in SIMPLE_MAPS
    ]
    return [*chain.from_iterable(lines), *chain.from_iterable(simple)]


def _rows_of_method(method: str, rows: Sequence[ExplainRow]) -> list[SaliencyRow]:
    """Return the mean scores of a method, and their differences from the simple maps."""
    scores = _mean_of(rows)
    lines = _score_rows(method, scores, rows)
    for simple in SIMPLE_MAPS:
        other = _mean_of(rows, f"_{simple}")
        differences = bootstrap_difference(scores, other, _patients(rows))
        lines += [_score_row(method, name, differences[name], rows, simple) for name in METRICS]
    return lines


def _score_rows(name: str, scores: Statistics, rows: Sequence[ExplainRow]) -> list[SaliencyRow]:
    bounds = dict.fromkeys(METRICS, (0.0, 1.0))
    estimates = bootstrap(scores, _patients(rows), bounds=bounds)
    return [_score_row(name, metric, estimates[metric], rows) for metric in METRICS]


def _patients(rows: Sequence[ExplainRow]) -> list[str]:
    return [row.patient or row.case_id for row in rows]


def _mean_of(rows: Sequence[ExplainRow], end: str = "") -> Statistics:
    """Return the weighted means of the scores, or of those of a simple map: `end` names it."""
    values = {name: np.array([getattr(row, name + end) for row in rows], float) for name in METRICS}

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        totals = weights.sum(axis=1)
        return {name: weights @ of_rows / totals for name, of_rows in values.items()}

    return statistics


def _score_row(
    method: str, metric: str, estimate: Estimate, rows: Sequence[ExplainRow], against: str = ""
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
        n=len(rows),
        n_patients=len(set(_patients(rows))),
    )
