from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from volseg.evaluation.agreement import agreement
from volseg.evaluation.detection import froc
from volseg.evaluation.summary import LabelResult
from volseg.pages import plots


def result(label, reference, predicted):
    reference, predicted = np.array(reference, float), np.array(predicted, float)
    return LabelResult(
        label=label,
        name=f"organ {label}",
        n_missed=0,
        n_false=0,
        n_absent=0,
        metrics={},
        reference_ml=reference,
        predicted_ml=predicted,
        volumes=agreement(reference, predicted, range(reference.size)),
        detection=None,
        curve=None,
        no_curve="",
    )


@pytest.fixture
def measured():
    rng = np.random.default_rng(0)
    x = rng.uniform(5, 90, 25)
    return result(1, x, x + rng.normal(2, 3, 25))


def pixels(png):
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_lines_and_bands_stand_at_the_limits_and_their_intervals(measured):
    plot = Figure().subplots()
    plots._bland_altman(plot, plots.Pairs.of_volumes(measured))
    expected = measured.volumes
    heights = {line.get_ydata()[0] for line in plot.get_lines()}
    assert heights == {0, expected.bias, expected.lower_limit, expected.upper_limit}
    bands = {(band.get_y(), band.get_y() + band.get_height()) for band in plot.patches}
    intervals = (expected.bias_95, expected.lower_limit_95, expected.upper_limit_95)
    assert sorted(bands) == pytest.approx(np.array(sorted(intervals)))
    points = plot.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1], measured.predicted_ml - measured.reference_ml)
    np.testing.assert_allclose(points[:, 0], (measured.predicted_ml + measured.reference_ml) / 2)
    assert f"{expected.bias:.3g}" in plot.get_legend().get_texts()[0].get_text()


def test_volumes_that_agree_lie_on_the_line_of_identity(measured):
    plot = Figure().subplots()
    plots._correlation(plot, plots.Pairs.of_volumes(measured))
    points = plot.collections[0].get_offsets()
    np.testing.assert_allclose(
        points, np.stack([measured.reference_ml, measured.predicted_ml], axis=1)
    )
    assert plot.get_xlim() == plot.get_ylim()
    assert f"{measured.volumes.concordance:.3f}" in plot.texts[0].get_text()


def test_at_most_max_labels_are_shown_those_with_the_largest_volume(monkeypatch):
    monkeypatch.setattr(plots, "MAX_LABELS", 2)
    drawn = []
    monkeypatch.setattr(plots, "_correlation", lambda plot, pairs: drawn.append(pairs.name))
    one, two, five = (
        len(pixels(plots.agreement_png([result(n, [n, 2], [n, 3]) for n in range(1, count + 1)])))
        for count in (1, 2, 5)
    )
    assert one < two == five
    assert drawn == [f"organ {label}" for label in (1, 1, 2, 4, 5)]


def test_a_plot_of_few_patients_says_why_it_has_no_intervals():
    plot = Figure().subplots()
    few = plots.Pairs.of_volumes(result(1, [4, 5, 6, 9], [5, 5, 7, 8]))
    plots._bland_altman(plot, few)
    assert "no intervals: 4 patients; an interval needs at least 5" in plot.get_title(loc="left")
    assert not plot.patches


def test_few_equal_and_missing_cases_are_plotted():
    same = result(1, [4, 5, 6, 7], [4, 5, 6, 7])
    for results in ([same], [result(1, [4], [0])], [result(1, [], []), same], [result(1, [], [])]):
        assert pixels(plots.agreement_png(results)).std() > 0


def test_the_curve_is_drawn_unchanged_and_ends_at_a_dot(monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "png_bytes", lambda figure, dpi: seen.append(figure) or b"")
    rng = np.random.default_rng(1)
    is_matched = rng.random(50) < 0.5
    curve = froc(rng.random(50), is_matched, n_reference=40, n_scans=10)
    plots.froc_png([("tumour", curve)])
    steps, dot = seen[0].axes[0].get_lines()
    np.testing.assert_array_equal(steps.get_ydata()[1:], curve.sensitivity)
    drawn = curve.false_positives_per_scan >= 1 / 8
    np.testing.assert_array_equal(
        steps.get_xdata()[1:][drawn], curve.false_positives_per_scan[drawn]
    )
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (
        (~is_matched).sum() / 10,
        is_matched.sum() / 40,
    )


def test_two_curves_make_a_picture():
    rng = np.random.default_rng(2)
    curves = [
        (name, froc(rng.random(9), rng.random(9) < 0.5, n_reference=9, n_scans=4))
        for name in ("tumour", "cyst")
    ]
    assert pixels(plots.froc_png(curves)).std() > 0
