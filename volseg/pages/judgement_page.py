"""The page report.html of judged classes or numbers: failures, metrics, figures, doubtful cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from volseg.columns import column_names, optional, row_of
from volseg.evaluation.class_intervals import MetricRow, text_of_metric
from volseg.evaluation.class_rows import JudgedRow
from volseg.evaluation.classes import MACRO, OVERALL
from volseg.pages.about import About
from volseg.pages.page import CONTENT_BYTES, as_base64, json_size
from volseg.pages.page_tables import Layout, fitting_table
from volseg.pages.run_page import Plot, RunPage, code_and_text, count_fact
from volseg.words import format_count


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideRow:
    """The main metrics of the model or of a simple one, with their intervals, as text."""

    model: str = optional("", "the model, or the simple model")
    auc: str | None = optional("", "macro AUC")
    average_precision: str | None = optional("", "macro average precision")
    balanced_accuracy: str | None = optional("", "overall balanced accuracy")
    accuracy: str | None = optional("", "overall accuracy")
    log_loss: str | None = optional("", "log loss")
    mae: str | None = optional("", "mean absolute error")
    rmse: str | None = optional("", "root of the mean squared error")
    r2: str | None = optional("", "1 − MSE / variance of the truth")


BESIDE_TABLE = Layout(
    name="beside",
    caption="Beside simple models",
    row_type=BesideRow,
    hint="type words",
    file="metrics.csv",
    shown=column_names(BesideRow),
)
METRIC_TABLE = Layout(
    name="metrics",
    caption="Metrics",
    row_type=MetricRow,
    hint="type words, such as auc, or a condition such as value < 0.8",
    file="metrics.csv",
    shown=(
        *("metric", "average", "class_name", "group_column", "group_value", "model", "baseline"),
        *("value", "low", "high", "p_value", "n", "n_patients", "reason"),
    ),
)
CASE_TABLE = Layout(
    name="cases",
    caption="Cases, the worst first",
    row_type=JudgedRow,
    hint="type words, or a condition such as reference_probability < 0.2",
    file="evaluation.csv",
    shown=(
        *("case_id", "patient", "reference", "predicted", "is_right", "reference_probability"),
        *("error", "is_covered", "out_of_distribution", "status", "reason"),
    ),
    rank=lambda row: badness(row),
    kept="worst",
)
RANKED = ("auc", "average_precision")  # shown as means over classes, the others overall
MEANINGS = {
    "roc.png": "ROC curves: sensitivity against 1 − specificity",
    "precision_recall.png": "precision against recall",
    "calibration.png": "observed frequency against predicted probability",
    "confusion.png": "cases by true and predicted class",
    "decision.png": "net benefit against threshold probability",
    "agreement.png": "Bland–Altman plot, and predicted against true numbers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What the page shows.

    Args:
        sentence: who was judged and with what result.
        pictures: file name → PNG.
        remarks: sentences above the numbers, such as warnings.
    """

    sentence: str
    cases: Sequence[JudgedRow]
    metrics: Sequence[MetricRow]
    pictures: Mapping[str, bytes]
    remarks: Sequence[str] = ()


def judgement_html(about: About, judged: Content) -> str:
    """Return the page: failures first, then one table of metrics, figures and the worst cases."""
    failed = _failures(judged.cases)
    cases = sorted(judged.cases, key=badness)
    plots = [_plot(name, picture) for name, picture in judged.pictures.items()]
    left = CONTENT_BYTES - json_size(failed) - sum(len(plot.svg.encode()) for plot in plots)
    metrics = fitting_table(METRIC_TABLE, judged.metrics, max_bytes=left // 2)
    table = fitting_table(CASE_TABLE, cases, max_bytes=left - json_size(metrics.content))
    beside = _beside(judged.metrics)
    first = [fitting_table(BESIDE_TABLE, beside, max_bytes=left)] if beside else []
    return RunPage(
        title=f"volseg evaluate: {format_count(len(cases), 'case')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(cases),
        noun="cases",
        files="metrics.csv and evaluation.csv",
        remarks=judged.remarks,
        sentence=judged.sentence,
        facts=_facts(judged.cases),
        plots=plots,
        tables=[*first, metrics, table],
    ).html()


def _beside(metrics: Sequence[MetricRow]) -> list[BesideRow]:
    """Return a row of the model and one of each of its baselines; none without baselines."""
    of_baselines = [row for row in metrics if row.baseline]
    if not of_baselines:
        return []
    model = of_baselines[0].model

    def texts(name: str) -> dict[str, str]:
        return {
            row.metric: text_of_metric(row)
            for row in metrics
            if (row.model, row.baseline, row.group_column) == (model, name, "")
            and row.average == (MACRO if row.metric in RANKED else OVERALL)
        }

    names = dict.fromkeys(row.baseline for row in of_baselines)
    return [
        row_of(BesideRow, texts(name) | {"model": name.replace("_", " ") or model})
        for name in ("", *names)
    ]


def _failures(rows: Sequence[JudgedRow]) -> list[tuple[str, str, str]]:
    """Return (case, code, reason) of each failed case."""
    failed = [row for row in rows if row.status != "done"]
    return [(row.case_id, *code_and_text(row.reason or "reason unknown")) for row in failed]


def badness(row: JudgedRow) -> float:
    """Return the sort key of a case: failed ones first, then those that are most wrong."""
    if row.status != "done":
        return -float("inf")
    if row.error is not None:
        return -abs(row.error)
    if row.reference_probability is not None:
        return row.reference_probability
    return float(bool(row.is_right))


def _plot(name: str, picture: bytes) -> Plot:
    """Return a PNG as a figure of the page, which loads nothing from elsewhere."""
    text = escape(MEANINGS.get(name, name))
    source = f"data:image/png;base64,{as_base64(picture)}"
    return Plot(Markup('<img src="{}" alt="{}">').format(source, text))


def _facts(cases: Sequence[JudgedRow]) -> list[tuple[str, str]]:
    done = [row for row in cases if row.status == "done"]
    facts = [count_fact(len(done), "case", "evaluated")]
    if any(row.is_right is not None for row in done):
        facts.append(count_fact(sum(row.is_right is False for row in done), "case", "wrong"))
    if any(row.is_covered is not None for row in done):
        n_missed = sum(row.is_covered is False for row in done)
        facts.append(count_fact(n_missed, "case", "outside the confidence set or interval"))
    if any(row.out_of_distribution is not None for row in done):
        n_unusual = sum(bool(row.out_of_distribution) for row in done)
        facts.append(count_fact(n_unusual, "case", "unlike the training images"))
    return facts
