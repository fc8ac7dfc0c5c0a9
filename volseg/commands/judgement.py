"""What came out of judging classes or numbers, as rows, a summary and figures; no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from volseg.columns import row_of
from volseg.commands.class_tables import TruthTable
from volseg.evaluation.agreement import Agreement, agreement
from volseg.evaluation.calibration import calibration_error, error_if_calibrated
from volseg.evaluation.class_intervals import Judged, MetricRow, text_of_metric
from volseg.evaluation.class_rows import JudgedRow, joined
from volseg.evaluation.classes import ClassPredictions, Value, confusion
from volseg.evaluation.conformal import judge_sets
from volseg.evaluation.regression import NumberPredictions
from volseg.io.files import sha256_of
from volseg.options import EvaluateOptions
from volseg.recipe.classification import split_names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """What came out: the metrics, and all that its tables, figures and page say.

    Args:
        judged_rows: of evaluation.csv, for the judged cases.
        baselines: judged on the same cases, each with its name as model.
    """

    truth: TruthTable
    judged: Judged
    metrics: Sequence[MetricRow]
    judged_rows: Sequence[JudgedRow]
    baselines: Sequence[Judged] = ()

    @classmethod
    def of(
        cls,
        truth: TruthTable,
        judged: Judged,
        metrics: Sequence[MetricRow],
        baselines: Sequence[Judged] = (),
    ) -> Judgement:
        return cls(
            truth=truth,
            judged=judged,
            metrics=metrics,
            judged_rows=list(_judged_rows(truth, judged)),
            baselines=baselines,
        )

    @property
    def case_rows(self) -> list[JudgedRow]:
        """Rows of evaluation.csv: the judged cases, then those that failed."""
        failed = [
            row_of(
                JudgedRow,
                {
                    "case_id": name,
                    "patient": self.truth.patient_of(name) or name,
                    "status": "failed",
                    "reason": reason,
                },
            )
            for name, reason in self.truth.predicted.failed.items()
        ]
        return [*self.judged_rows, *failed]

    def rows_of(self, metric: str, *, average: str = "", class_name: str = "") -> list[MetricRow]:
        """Return the rows of a metric over all cases, of the one model."""
        return [
            row
            for row in self.metrics
            if (row.metric, row.average, row.class_name) == (metric, average, class_name)
            and not row.group_column
            and row.model == self.judged.model
            and not row.baseline
        ]

    def row(self, metric: str, *, average: str = "", class_name: str = "") -> MetricRow | None:
        """Return the row of a metric over all cases; None if there is none."""
        rows = self.rows_of(metric, average=average, class_name=class_name)
        return rows[0] if rows else None

    def text(self, metric: str, **where: str) -> str:
        """Return a metric with its interval in words; empty if it is undefined."""
        return text_of_metric(self.row(metric, **where))

    @property
    def headline(self) -> str:
        """The most important metrics in one line."""
        if isinstance(self.judged.predictions, NumberPredictions):
            names = (("mae", "MAE"), ("r2", "R²"))
            parts = [(title, self.text(metric, average="overall")) for metric, title in names]
        else:
            parts = [
                ("AUC", self.text("auc", average="macro")),
                ("balanced accuracy", self.text("balanced_accuracy", average="overall")),
            ]
        return ", ".join(f"{title} {text}" for title, text in parts if text)

    def _agreement(self, p: NumberPredictions) -> Agreement:
        return agreement(p.targets, p.predicted, list(self.judged.patients))

    def summary(self, options: EvaluateOptions, warnings: Sequence[str]) -> dict[str, Any]:
        """Return the content of summary.json."""
        truth, reference = self.truth, self.truth.reference
        content = {
            "task": truth.predicted.kind,
            "headline": self.headline,
            "target": truth.target,
            "model": self.judged.model,
            "n_cases": len(truth.names),
            "n_patients": len(set(truth.patients)),
            **_metrics_json(self.metrics, self.judged.model),
            **self._kind_summary(),
            "out_of_distribution": self._unusual(),
            "settings": {"by": list(options.by), "against": _text_of(options.against)},
            "tables": {
                str(part.path): sha256_of(part.path)
                for part in (reference, truth.predicted)
                if part.path.is_file()
            },
            "not_predicted": sorted(
                set(reference.cells) - set(truth.predicted.rows) - set(truth.predicted.failed)
            ),
            "not_in_reference": sorted(set(truth.predicted.rows) - set(reference.cells)),
            "left_out": dict(truth.left_out),
            "failed": dict(truth.predicted.failed),
            "warnings": list(warnings),
        }
        return _finite(content)

    def _kind_summary(self) -> dict[str, Any]:
        """Return what only classes, or only numbers have."""
        p = self.judged.predictions
        if isinstance(p, NumberPredictions):
            return {"agreement": asdict(self._agreement(p)), "intervals": self._covered()}
        matrix = confusion(p)
        return {
            "classes": list(p.names),
            "support": dict(zip(p.names, p.truth.sum(axis=0).tolist(), strict=True)),
            "confusion": None if matrix is None else matrix.astype(int).tolist(),
            "calibration": {
                "ece": calibration_error(p.probabilities, p.targets),
                "ece_if_calibrated": error_if_calibrated(p.probabilities, p.targets),
            },
            "confidence_sets": self._sets(),
            "operating_points": [asdict(point) for point in self.truth.predicted.points],
        }

    def _covered(self) -> dict[str, Any] | None:
        """Return how many intervals contain the true number; None if the model states none."""
        covered = [row.is_covered for row in self.judged_rows if row.is_covered is not None]
        if not covered:
            return None
        widths = [
            row.value_high - row.value_low
            for row in self.truth.rows
            if row.value_low is not None and row.value_high is not None
        ]
        mean_width = float(np.mean(widths))
        return {"n": len(covered), "coverage": float(np.mean(covered)), "mean_width": mean_width}

    def _sets(self) -> dict[str, Any] | None:
        """Return what the confidence sets were worth; None if the model states none."""
        p, texts = self.judged.predictions, [row.confidence_set for row in self.truth.rows]
        if not isinstance(p, ClassPredictions) or not _states_sets(p, texts):
            return None
        sets = np.array([np.isin(list(p.names), split_names(text or "")) for text in texts])
        return asdict(judge_sets(sets, p.targets, p.names))

    def _unusual(self) -> dict[str, Any] | None:
        """Return how many cases were flagged, and the errors among them and among the others."""
        rows = [row for row in self.judged_rows if row.out_of_distribution is not None]
        if not rows:
            return None
        flagged = [row for row in rows if row.out_of_distribution]
        usual = [row for row in rows if not row.out_of_distribution]
        return {
            "n": len(rows),
            "n_flagged": len(flagged),
            "flagged": asdict(_mean_success(flagged)),
            "others": asdict(_mean_success(usual)),
        }

    def _texts(self, metric: str, title: str) -> dict[str, str]:
        """Return class name → a metric in words, for the classes in which it is defined."""
        classes = self.truth.predicted.classes
        texts = {name: self.text(metric, class_name=name) for name in classes}
        return {name: f"{title} {text}" for name, text in texts.items() if text}

    def _curves(self) -> dict[str, ClassPredictions]:
        """Return name → predictions of each baseline of classes."""
        parts = ((one.model, one.predictions) for one in self.baselines)
        return {name: p for name, p in parts if isinstance(p, ClassPredictions)}

    def pictures(self) -> dict[str, bytes]:
        """Return the figures for which there is data, by file name."""
        from volseg.pages import classification_figures as figures
        from volseg.pages.plots import Pairs, number_agreement_png

        p = self.judged.predictions
        if isinstance(p, NumberPredictions):
            pairs = Pairs(
                name=self.truth.target,
                agreement=self._agreement(p),
                reference=p.targets,
                predicted=p.predicted,
            )
            return {"agreement.png": number_agreement_png(pairs)}
        aucs = self._texts("auc", "AUC")
        precisions = self._texts("average_precision", "average precision")
        error = calibration_error(p.probabilities, p.targets)
        expected = error_if_calibrated(p.probabilities, p.targets)
        drawn = {
            "roc.png": figures.roc_png(p, aucs, self.truth.predicted.points, self._curves()),
            "precision_recall.png": figures.precision_recall_png(p, precisions),
            "calibration.png": figures.calibration_png(
                p, f"ECE {error:.3f} ({expected:.3f} if perfectly calibrated)"
            ),
            "confusion.png": figures.confusion_png(p),
            "decision.png": figures.decision_png(p),
        }
        return {name: picture for name, picture in drawn.items() if picture is not None}


def _judged_rows(truth: TruthTable, judged: Judged) -> Iterator[JudgedRow]:
    p = judged.predictions
    facts_of = _number_facts(p) if isinstance(p, NumberPredictions) else _class_facts(p, truth.rows)
    for number, (name, row) in enumerate(zip(truth.names, truth.rows, strict=True)):
        patient = truth.patient_of(name) or name
        values = {"case_id": name, "patient": patient, "status": "done"}
        values["out_of_distribution"] = row.out_of_distribution
        yield row_of(JudgedRow, values | facts_of(number, row))


Facts = Callable[[int, Any], dict[str, Any]]


def _states_sets(p: ClassPredictions, texts: Sequence[str | None]) -> bool:
    """Tell whether a model states confidence sets; of several labels at once some may be empty."""
    return any(texts) if p.is_multilabel else all(texts)


def _class_facts(p: ClassPredictions, rows: Sequence[Any]) -> Facts:
    """Return the function from a case of classes to its columns."""
    names, truth, decided = list(p.names), p.truth, p.decided
    may_be_empty = p.is_multilabel and _states_sets(p, [row.confidence_set for row in rows])

    def facts(number: int, row: Any) -> dict[str, Any]:
        is_true, is_open = truth[number], None
        if row.confidence_set or may_be_empty:
            is_open = np.isin(names, split_names(row.confidence_set or ""))
        single = None if p.is_multilabel else float(p.probabilities[number][is_true][0])
        return {
            "reference": joined([names[n] for n in np.flatnonzero(is_true)]),
            "predicted": joined([names[n] for n in np.flatnonzero(decided[number])]),
            "is_right": bool((is_true == decided[number]).all()),
            "reference_probability": single,
            "is_covered": None if is_open is None else bool(is_open[is_true].all()),
        }

    return facts


def _number_facts(p: NumberPredictions) -> Facts:
    """Return the function from a case of numbers to its columns."""

    def facts(number: int, row: Any) -> dict[str, Any]:
        true, predicted = float(p.targets[number]), float(p.predicted[number])
        is_covered = None
        if row.value_low is not None and row.value_high is not None:
            is_covered = row.value_low <= true <= row.value_high
        return {
            "reference": f"{true:.10g}",
            "predicted": f"{predicted:.10g}",
            "error": predicted - true,
            "is_covered": is_covered,
        }

    return facts


def _mean_success(rows: Sequence[JudgedRow]) -> Value:
    """Return the accuracy of classes, or the mean absolute error of numbers."""
    if not rows:
        return Value(None, "no such case")
    values = [
        abs(row.error) if row.error is not None else float(bool(row.is_right)) for row in rows
    ]
    return Value(float(np.mean(values)))


def _metrics_json(rows: Sequence[MetricRow], model: str) -> dict[str, Any]:
    """Return the metrics by what they are of; subgroups and differences apart."""
    content: dict[str, Any] = {"metrics": {}, "metrics_by_class": {}, "subgroups": {}}
    content |= {"difference": {}, "baselines": {}}
    for row in rows:
        kind = "metrics" if row.average else "metrics_by_class"
        place = content[kind]
        if row.baseline:
            place = content["baselines"].setdefault(row.baseline, {}).setdefault(kind, {})
        elif row.group_column:
            by_value = content["subgroups"].setdefault(row.group_column, {})
            place = by_value.setdefault(row.group_value, {})
        elif row.model != model:
            place = content["difference"].setdefault(row.model, {})
        entry = {"value": row.value, "value_95": None if row.low is None else [row.low, row.high]}
        entry |= {"reason": row.reason, "n": row.n, "n_patients": row.n_patients}
        entry |= {} if row.p_value is None else {"p_value": row.p_value}
        place.setdefault(row.average or row.class_name, {})[row.metric] = entry
    return content


def _finite(value: Any) -> Any:
    """Convert a value to JSON, in which NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _text_of(path: Any) -> str | None:
    return None if path is None else str(path)
