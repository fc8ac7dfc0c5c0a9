"""Plots of an evaluation: agreement of volumes and FROC curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.evaluation.agreement import Agreement, Ends
from volseg.evaluation.detection import FALSE_POSITIVE_RATES, Froc
from volseg.evaluation.summary import LabelResult
from volseg.pages.canvas import new_figure, png_bytes
from volseg.words import format_count

MAX_LABELS = 8
DPI = 110
POINT, BIAS, LIMIT = "#1f5fa8", "#222222", "#b5400f"


def agreement_png(results: Sequence[LabelResult]) -> bytes:
    """Draw a Bland–Altman and a correlation plot per label.

    Labels without a volume are left out. At most eight labels are shown, those with the largest
    reference volume.
    """
    with_volume = [result for result in results if result.reference_ml.size]
    shown = sorted(with_volume, key=lambda result: -float(result.reference_ml.sum()))[:MAX_LABELS]
    shown.sort(key=lambda result: result.label)
    figure = new_figure(11, 4.2 * max(1, len(shown)) + 0.3)
    if not shown:
        figure.text(0.5, 0.5, "no label has a volume in any case", ha="center")
        return png_bytes(figure, DPI)
    plots = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1.25, 1))
    for (left, right), result in zip(plots, shown, strict=True):
        pairs = Pairs.of_volumes(result)
        _bland_altman(left, pairs)
        _correlation(right, pairs)
    if len(shown) < len(with_volume):
        count = f"{len(shown)} of {len(with_volume)} labels"
        note = f"The {count} with the largest reference volume; summary.json has all labels"
        figure.suptitle(note, fontsize=9)
    return png_bytes(figure, DPI)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Paired measurements to plot: what they are of, their quantity and unit, and agreement.

    Args:
        name: of the label or target. quantity: such as volume; empty if the name says it.
        reference, predicted: (n,) in the unit.
    """

    name: str
    quantity: str = ""
    unit: str = ""
    agreement: Agreement
    reference: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of_volumes(cls, result: LabelResult) -> Pairs:
        return cls(
            name=result.name,
            quantity="volume",
            unit="mL",
            agreement=result.volumes,
            reference=result.reference_ml,
            predicted=result.predicted_ml,
        )

    def axis(self, text: str) -> str:
        """Return the label of an axis, with the unit if there is one."""
        return f"{text} ({self.unit})" if self.unit else text


def number_agreement_png(pairs: Pairs) -> bytes:
    """Draw a Bland–Altman and a correlation plot of predicted numbers."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _bland_altman(left, pairs)
    _correlation(right, pairs)
    return png_bytes(figure, DPI)


def _bland_altman(plot: Any, pairs: Pairs) -> None:
    """Plot difference against mean, with bias and limits of agreement (bands: 95 % intervals)."""
    agreement = pairs.agreement
    mean = (pairs.reference + pairs.predicted) / 2
    difference = pairs.predicted - pairs.reference
    plot.scatter(mean, difference, s=22, color=POINT, alpha=0.7, linewidths=0, zorder=3)
    plot.axhline(0, color="#999999", linewidth=0.8)
    lines = (
        (agreement.bias, agreement.bias_95, BIAS, "bias"),
        (agreement.lower_limit, agreement.lower_limit_95, LIMIT, "bias − 1.96 SD"),
        (agreement.upper_limit, agreement.upper_limit_95, LIMIT, "bias + 1.96 SD"),
    )
    for value, interval, colour, name in lines:
        if math.isnan(value):
            continue
        style = "-" if name == "bias" else "--"
        text = f"{name}: {value:.3g} {_interval(interval)}"
        plot.axhline(value, color=colour, linewidth=1.4, linestyle=style, label=text)
        if not math.isnan(interval[0]):
            plot.axhspan(*interval, color=colour, alpha=0.12, linewidth=0)
    if not math.isnan(agreement.bias):  # below the plot, where it covers no point
        layout = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}
        plot.legend(**layout, fontsize=7.5, frameon=False, columnspacing=1)
    what = f"{pairs.quantity} agreement".lstrip()
    title = f"{pairs.name}: {what}, {_cases(agreement)}"
    plot.set_title(title, fontsize=10, loc="left")
    plot.set_xlabel(pairs.axis("mean of reference and prediction"))
    plot.set_ylabel(pairs.axis("prediction − reference"))
    plot.margins(y=0.15)
    plot.grid(alpha=0.25)


def _correlation(plot: Any, pairs: Pairs) -> None:
    """Plot predicted against reference on equal axes, with the line of identity."""
    agreement, reference, predicted = pairs.agreement, pairs.reference, pairs.predicted
    lowest, highest = _limits(pairs)
    ends = [lowest, highest]
    plot.plot(ends, ends, color="#999999", linewidth=0.8, label="identity")
    plot.scatter(reference, predicted, s=22, color=POINT, alpha=0.7, linewidths=0, zorder=3)
    plot.set_xlim(lowest, highest)
    plot.set_ylim(lowest, highest)
    plot.set_aspect("equal")
    lines = []
    if not math.isnan(agreement.pearson):
        pearson, concordance = agreement.pearson, agreement.concordance
        lines.append(f"Pearson r = {pearson:.3f} {_interval(agreement.pearson_95)}")
        interval = _interval(agreement.concordance_95)
        lines.append(f"concordance (Lin) = {concordance:.3f} {interval}")
    plot.text(0.03, 0.97, "\n".join(lines), transform=plot.transAxes, va="top", fontsize=8)
    plot.set_title(f"{pairs.name}: correlation", fontsize=10, loc="left")
    plot.set_xlabel(pairs.axis(f"reference {pairs.quantity}".rstrip()))
    plot.set_ylabel(pairs.axis(f"predicted {pairs.quantity}".rstrip()))
    plot.legend(loc="lower right", fontsize=8, frameon=False)
    plot.grid(alpha=0.25)


def _limits(pairs: Pairs) -> tuple[float, float]:
    """Return the ends of both axes; volumes start at 0, other numbers a little below the least."""
    values = np.concatenate([pairs.reference, pairs.predicted])
    low, high = float(values.min()), float(values.max())
    if pairs.quantity:
        return 0.0, 1.05 * high
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _cases(agreement: Agreement) -> str:
    n, n_patients = agreement.n, agreement.n_patients
    text = f"{n} case{'s' * (n != 1)}"
    if n != n_patients:
        text += f" of {n_patients} patient{'s' * (n_patients != 1)}"
    if math.isnan(agreement.bias):
        return f"{text}; too few for limits of agreement"
    if math.isnan(agreement.bias_95[0]):
        text += f"\nno intervals: {agreement.no_intervals}"
    return text


def _interval(interval: Ends) -> str:
    return "" if math.isnan(interval[0]) else f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def froc_png(curves: Sequence[tuple[str, Froc]]) -> bytes:
    """Plot sensitivity against false positives per scan, for a name and a curve per label.

    At most eight labels are shown, those with the most reference lesions. The dot marks the end of
    a curve, where every predicted lesion counts; the dotted line extends it, as the score does.
    """
    curves = sorted(curves, key=lambda named: -named[1].n_reference)[:MAX_LABELS]
    figure = new_figure(7, 4.6 + 0.2 * len(curves))
    plot = figure.subplots()
    lowest, highest = FALSE_POSITIVE_RATES[0] / 2, 2 * FALSE_POSITIVE_RATES[-1]
    for name, curve in curves:
        # Rates below the start of the logarithmic axis, such as 0, are drawn at its start.
        rates = np.maximum(curve.false_positives_per_scan, lowest)
        x = np.concatenate([[lowest], rates])
        y = np.concatenate([[0.0], curve.sensitivity])
        label = f"{name}: mean sensitivity at the ticks {curve.score:.2f}; "
        label += f"{format_count(curve.n_reference, 'lesion')}, "
        label += format_count(curve.n_scans, "scan")
        (line,) = plot.plot(x, y, drawstyle="steps-post", linewidth=1.6, label=label)
        colour, end = line.get_color(), (float(rates[-1]), float(curve.sensitivity[-1]))
        plot.plot(*end, "o", color=colour, markersize=6, clip_on=False, zorder=3)
        highest = max(highest, 1.2 * end[0])
        plot.hlines(end[1], end[0], highest, color=colour, linestyles=":", linewidth=1.6)
    plot.set_xscale("log")
    plot.set_xlim(lowest, highest)
    plot.set_ylim(0, 1.02)
    plot.set_xticks(FALSE_POSITIVE_RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    plot.minorticks_off()
    plot.set_xlabel("false positives per scan")
    plot.set_ylabel("sensitivity (fraction of reference lesions)")
    title = "FROC; lesions ranked by mean confidence"
    plot.set_title(title, fontsize=10, loc="left")
    plot.grid(alpha=0.25)
    plot.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    return png_bytes(figure, DPI)
