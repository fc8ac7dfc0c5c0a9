"""Figures of a classifier: ROC, precision–recall, calibration, confusion and decision curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from volseg.evaluation.calibration import reliability
from volseg.evaluation.classes import ClassPredictions, confusion
from volseg.evaluation.decision import decision_curve, precision_recall_curve, roc_curve
from volseg.evaluation.operating import OperatingPoint
from volseg.pages.canvas import new_figure, png_bytes
from volseg.pages.plots import DPI, MAX_LABELS
from volseg.words import format_count, format_number

GREY, INK, PAPER = "#999999", "#222222", "#ffffff"
# Colours that differ in lightness too: told apart in grey and by colour-blind readers.
COLOURS = ("#1f5fa8", "#b5400f", "#2a7f3f", "#7a3b8f", "#8a6d00", "#0a7f86", "#b03060", "#555555")
MARKERS = "osD^vP*X"
LINE_INCHES = 0.19  # height of a line of a legend
MAX_CELLS = 20  # classes of a confusion matrix with numbers in its cells

# class name → text after its name in the legend, such as a metric with its interval
Texts = Mapping[str, str]


def drawn_classes(predictions: ClassPredictions) -> list[int]:
    """Return the classes that get a curve: of two the second, else at most eight, by their cases.

    Of two classes both would have the same curve, mirrored.
    """
    k = len(predictions.names)
    if k == 2 and not predictions.is_multilabel:
        return [1]
    support = predictions.truth.sum(axis=0)
    return sorted(np.argsort(-support, kind="stable")[:MAX_LABELS].tolist())


def roc_png(
    predictions: ClassPredictions,
    texts: Texts,
    points: Sequence[OperatingPoint] = (),
    beside: Mapping[str, ClassPredictions] = MappingProxyType({}),
) -> bytes | None:
    """Plot sensitivity against 1 − specificity; None if no class has positive and negative cases.

    Args:
        points: drawn where these thresholds lie on the cases shown, as filled marks.
        beside: name → predictions of simple models of the same cases, drawn as thin dashed lines if
            there is one curve.
    """
    curves = [
        (number, curve)
        for number in drawn_classes(predictions)
        if (curve := roc_curve(predictions.probabilities[:, number], predictions.truth[:, number]))
    ]
    if not curves:
        return None
    figure, plot = _square_plot("ROC", "1 − specificity", "sensitivity")
    plot.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, label="chance")
    if len(curves) == 1:
        _draw_beside(plot, beside, curves[0][0])
    for number, curve in curves:
        name = predictions.names[number]
        x, y = curve.false_positive_rate, curve.sensitivity
        plot.plot(x, y, color=_colour(number), linewidth=1.6, label=_label(name, texts))
        for place, point in enumerate(p for p in points if p.class_name == name):
            called = point.decide(predictions.probabilities[:, number])
            truth = predictions.truth[:, number]
            plot.plot(
                called[~truth].mean(),
                called[truth].mean(),
                MARKERS[place % len(MARKERS)],
                color=_colour(number),
                markeredgecolor=PAPER,
                markersize=8,
                clip_on=False,
                zorder=3,
                label=f"{point.name}: {name} ≥ {format_number(point.threshold, 3)}",
            )
    return _with_legend(figure, plot)


def _draw_beside(plot: Any, beside: Mapping[str, ClassPredictions], number: int) -> None:
    """Draw the ROC curve of one class of each simple model; a constant prediction is a guess."""
    for place, (name, p) in enumerate(beside.items(), start=2):
        scores = p.probabilities[:, number]
        curve = roc_curve(scores, p.truth[:, number])
        if curve is not None and np.ptp(scores) > 0:
            x, y, style = curve.false_positive_rate, curve.sensitivity, {"linestyle": "--"}
            label = name.replace("_", " ")
            plot.plot(x, y, color=_colour(place), linewidth=0.9, label=label, **style)


def precision_recall_png(predictions: ClassPredictions, texts: Texts) -> bytes | None:
    """Plot precision against recall; the dotted line is chance. None if no class has cases."""
    curves = [
        (number, curve)
        for number in drawn_classes(predictions)
        if (
            curve := precision_recall_curve(
                predictions.probabilities[:, number], predictions.truth[:, number]
            )
        )
    ]
    if not curves:
        return None
    figure, plot = _square_plot("Precision and recall", "recall (sensitivity)", "precision (PPV)")
    for number, curve in curves:
        # A step: between two thresholds no precision in between can be reached.
        recall = np.concatenate([[0.0], curve.recall])
        precision = np.concatenate([curve.precision[:1], curve.precision])
        label = _label(predictions.names[number], texts)
        style = {"color": _colour(number), "linewidth": 1.6}
        plot.plot(recall, precision, drawstyle="steps-pre", label=label, **style)
        plot.axhline(curve.prevalence, color=_colour(number), linewidth=0.8, linestyle=":")
    return _with_legend(figure, plot)


def calibration_png(predictions: ClassPredictions, note: str = "") -> bytes:
    """Plot the frequency of a class against its predicted probability, in bins of equal mass.

    The bars below count the cases by predicted probability.

    Args:
        note: such as the calibration error; stands in the title.
    """
    figure = new_figure(5.4, 6.4)
    plot, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    plot.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, label="perfect")
    edges = np.linspace(0, 1, 21)
    for number in drawn_classes(predictions):
        p, truth = predictions.probabilities[:, number], predictions.truth[:, number]
        points, colour = reliability(p, truth), _colour(number)
        spread = 1.96 * np.sqrt(points.observed * (1 - points.observed) / points.n)
        plot.errorbar(
            points.predicted,
            points.observed,
            yerr=[np.minimum(spread, points.observed), np.minimum(spread, 1 - points.observed)],
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
            label=predictions.names[number],
        )
        counts = np.histogram(p, edges)[0]
        below.stairs(counts, edges, color=colour, linewidth=1.4)
    _finish_square(plot, f"Calibration{': ' if note else ''}{note}", "observed frequency")
    plot.set_aspect("auto")
    below.set_xlabel("predicted probability")
    below.set_ylabel("cases")
    below.grid(alpha=0.25)
    plot.legend(fontsize=8, loc="upper left", frameon=False)
    return png_bytes(figure, DPI)


def confusion_png(predictions: ClassPredictions) -> bytes | None:
    """Draw cases by true and predicted class, coloured by the fraction of the true class.

    None with several labels at once, and for more than 20 classes.
    """
    matrix, names = confusion(predictions), list(predictions.names)
    if matrix is None or len(names) > MAX_CELLS:
        return None
    totals = matrix.sum(axis=1, keepdims=True)
    fractions = np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)
    side = 2.6 + 0.62 * len(names)
    figure = new_figure(side + 0.07 * max(map(len, names)) + 0.9, side)
    plot = figure.subplots()
    plot.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for (row, col), count in np.ndenumerate(matrix):
        colour = PAPER if fractions[row, col] > 0.55 else INK
        percent = f"\n{fractions[row, col]:.0%}" if totals[row, 0] else ""
        text = f"{count:g}{percent}"
        plot.text(col, row, text, ha="center", va="center", fontsize=8, color=colour)
    rotation = 0 if sum(map(len, names)) < 12 * len(names) ** 0.5 else 40
    alignment = "center" if rotation == 0 else "right"
    plot.set_xticks(range(len(names)), names, rotation=rotation, ha=alignment, fontsize=8)
    labels = [f"{name} ({n:g})" for name, n in zip(names, totals[:, 0], strict=True)]
    plot.set_yticks(range(len(names)), labels, fontsize=8)
    plot.set_xlabel("predicted class")
    plot.set_ylabel("true class (cases)")
    right = f"{np.trace(matrix):g} of {format_count(len(predictions), 'case')} right"
    plot.set_title(f"Confusion: {right}", fontsize=10, loc="left")
    return png_bytes(figure, DPI)


def decision_png(predictions: ClassPredictions) -> bytes:
    """Plot net benefit against threshold probability, beside treating all and treating none."""
    figure = new_figure(6.2, 4.4)
    plot = figure.subplots()
    highest, numbers = 0.0, drawn_classes(predictions)
    for number in numbers:
        p, truth = predictions.probabilities[:, number], predictions.truth[:, number]
        curve, colour, name = decision_curve(p, truth), _colour(number), predictions.names[number]
        highest = max(highest, float(truth.mean()), float(curve.model.max()))
        plot.plot(curve.thresholds, curve.model, color=colour, linewidth=1.6, label=name)
        everyone = "treat all (dashed)" if number == numbers[-1] else None
        style = {"color": colour, "linewidth": 1.0, "linestyle": "--"}
        plot.plot(curve.thresholds, curve.treat_all, label=everyone, **style)
    plot.axhline(0, color=INK, linewidth=1.0, label="treat none")
    top = max(highest, 0.05)
    plot.set_xlim(0, 1)
    plot.set_ylim(-0.15 * top, 1.08 * top)
    plot.set_xlabel("threshold probability for acting")
    plot.set_ylabel("net benefit (true positives per case)")
    plot.set_title("Decision curve", fontsize=10, loc="left")
    plot.grid(alpha=0.25)
    return _with_legend(figure, plot)


def _square_plot(title: str, x: str, y: str) -> tuple[Any, Any]:
    # Higher than wide: where the height limits a square plot, matplotlib cuts its title off.
    figure = new_figure(5.6, 5.9)
    plot = figure.subplots()
    plot.set_xlabel(x)
    _finish_square(plot, title, y)
    return figure, plot


def _finish_square(plot: Any, title: str, y: str) -> None:
    """Set a plot of two fractions: equal axes from 0 to 1."""
    plot.set_xlim(-0.02, 1.02)
    plot.set_ylim(-0.02, 1.02)
    plot.set_aspect("equal")
    plot.set_ylabel(y)
    plot.set_title(title, fontsize=10, loc="left")
    plot.grid(alpha=0.25)


def _with_legend(figure: Any, plot: Any) -> bytes:
    """Return the figure with its legend below, where it covers no curve."""
    handles, labels = plot.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LINE_INCHES * len(labels))
    # "outside": the layout of the figure makes room for it, however many lines it has.
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    return png_bytes(figure, DPI)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _label(name: str, texts: Texts) -> str:
    return f"{name}: {texts[name]}" if texts.get(name) else name
