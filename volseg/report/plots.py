"""Plots of an evaluation: how volumes agree, and what is found at which price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from volseg.evaluate.agreement import Agreement, Ends
from volseg.evaluate.detection import FALSE_POSITIVE_RATES, Froc
from volseg.evaluate.summary import LabelResult
from volseg.report.canvas import Figure, FigureCanvasAgg
from volseg.report.slices import png_bytes

MAX_LABELS = 8
POINT, BIAS, LIMIT = "#1f5fa8", "#222222", "#b5400f"


def agreement_png(results: Sequence[LabelResult]) -> bytes:
    """A row per label: Bland–Altman plot and predicted against reference volume.

    Labels without a volume are left out; of many labels the eight with the largest reference volume are shown.
    """
    with_volume = [result for result in results if result.reference_ml.size]
    shown = sorted(with_volume, key=lambda result: -float(result.reference_ml.sum()))[:MAX_LABELS]
    shown.sort(key=lambda result: result.label)
    figure = Figure(figsize=(11, 4.2 * max(1, len(shown)) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    if not shown:
        figure.text(0.5, 0.5, "no label has a volume in any case", ha="center")
        return _png(figure)
    plots = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1.25, 1))
    for (left, right), result in zip(plots, shown, strict=True):
        _bland_altman(left, result)
        _correlation(right, result)
    if len(shown) < len(with_volume):
        figure.suptitle(
            f"The {len(shown)} of {len(with_volume)} labels with the largest reference volume; all are in summary.json",
            fontsize=9,
        )
    return _png(figure)


def _bland_altman(plot: Any, result: LabelResult) -> None:
    """Difference against mean, with the bias, the limits of agreement and their 95 % intervals as bands."""
    found = result.volumes
    mean, difference = (
        (result.reference_ml + result.predicted_ml) / 2,
        result.predicted_ml - result.reference_ml,
    )
    plot.scatter(mean, difference, s=22, color=POINT, alpha=0.7, linewidths=0, zorder=3)
    plot.axhline(0, color="#999999", linewidth=0.8)
    lines = (
        (found.bias, found.bias_95, BIAS, "bias"),
        (found.lower_limit, found.lower_limit_95, LIMIT, "bias − 1.96 SD"),
        (found.upper_limit, found.upper_limit_95, LIMIT, "bias + 1.96 SD"),
    )
    for value, interval, colour, name in lines:
        if math.isnan(value):
            continue
        style = "-" if name == "bias" else "--"
        text = f"{name}: {value:.3g} {_interval(interval)}"
        plot.axhline(value, color=colour, linewidth=1.4, linestyle=style, label=text)
        if not math.isnan(interval[0]):
            plot.axhspan(*interval, color=colour, alpha=0.12, linewidth=0)
    if not math.isnan(found.bias):  # below the plot, where it covers no point
        plot.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=3,
            fontsize=7.5,
            frameon=False,
            columnspacing=1,
        )
    plot.set_title(f"{result.name}: agreement of volumes, {_cases(found)}", fontsize=10, loc="left")
    plot.set_xlabel("mean of reference and prediction (mL)")
    plot.set_ylabel("prediction − reference (mL)")
    plot.margins(y=0.15)
    plot.grid(alpha=0.25)


def _correlation(plot: Any, result: LabelResult) -> None:
    """Predicted against reference volume, equally scaled, with the line of identity."""
    found = result.volumes
    highest = 1.05 * max(float(result.reference_ml.max()), float(result.predicted_ml.max()))
    plot.plot([0, highest], [0, highest], color="#999999", linewidth=0.8, label="identity")
    plot.scatter(
        result.reference_ml,
        result.predicted_ml,
        s=22,
        color=POINT,
        alpha=0.7,
        linewidths=0,
        zorder=3,
    )
    plot.set_xlim(0, highest)
    plot.set_ylim(0, highest)
    plot.set_aspect("equal")
    lines = []
    if not math.isnan(found.pearson):
        lines.append(f"Pearson r = {found.pearson:.3f} {_interval(found.pearson_95)}")
        lines.append(
            f"concordance (Lin) = {found.concordance:.3f} {_interval(found.concordance_95)}"
        )
    plot.text(0.03, 0.97, "\n".join(lines), transform=plot.transAxes, va="top", fontsize=8)
    plot.set_title(f"{result.name}: correlation", fontsize=10, loc="left")
    plot.set_xlabel("reference volume (mL)")
    plot.set_ylabel("predicted volume (mL)")
    plot.legend(loc="lower right", fontsize=8, frameon=False)
    plot.grid(alpha=0.25)


def _cases(found: Agreement) -> str:
    of = (
        ""
        if found.n == found.n_patients
        else f" of {found.n_patients} patient{'s' * (found.n_patients != 1)}"
    )
    few = "; too few for limits" if math.isnan(found.bias) else ""
    no_interval = math.isnan(found.bias_95[0]) and not few
    why = f"\nno intervals: {found.no_intervals}" if no_interval else ""
    return f"{found.n} case{'s' * (found.n != 1)}{of}{few}{why}"


def _interval(interval: Ends) -> str:
    return "" if math.isnan(interval[0]) else f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def froc_png(curves: Sequence[tuple[str, Froc]]) -> bytes:
    """Share of the reference lesions that are found against the false positives per scan: a name and a curve per label.

    Of many labels the eight with the most reference lesions are shown.
    A curve ends where all that was predicted counts: the dot. From there on it is held, as the score holds it.
    """
    curves = sorted(curves, key=lambda named: -named[1].n_reference)[:MAX_LABELS]
    figure = Figure(figsize=(7, 4.6 + 0.2 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    lowest, highest = FALSE_POSITIVE_RATES[0] / 2, 2 * FALSE_POSITIVE_RATES[-1]
    for name, curve in curves:
        # On the logarithmic axis all rates below its end, 0 among them, stand at its end.
        rates = np.maximum(curve.false_positives_per_scan, lowest)
        (line,) = plot.plot(
            np.concatenate([[lowest], rates]),
            np.concatenate([[0.0], curve.sensitivity]),
            drawstyle="steps-post",
            linewidth=1.6,
            label=f"{name}: {curve.score:.2f} on average at the ticks; {curve.n_reference} lesions, {curve.n_scans} scans",
        )
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
    plot.set_ylabel("sensitivity (share of reference lesions)")
    plot.set_title(
        "FROC over the mean confidence of each predicted lesion", fontsize=10, loc="left"
    )
    plot.grid(alpha=0.25)
    plot.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    return png_bytes(figure, "white", dpi=110)
