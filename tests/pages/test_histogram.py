import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from volseg.pages.histogram import histogram_svg


def bars(svg):
    """(left, right, height) of the bars, in the units of the picture."""
    rows = []
    for bar in ElementTree.fromstring(str(svg)).iter("rect"):
        left, width, height = (float(bar.get(name)) for name in ("x", "width", "height"))
        rows.append([left, left + width, height])
    return np.array(rows)


@pytest.mark.parametrize("log", [True, False])
def test_heights_are_counts_and_the_median_stands_among_them(log):
    values = np.random.default_rng(0).lognormal(1, 1.5, 500)
    svg = histogram_svg(values.tolist(), title="Volume", unit="mL", log=log)
    heights = bars(svg)[:, 2]
    counts, _ = np.histogram(np.log10(values) if log else values, bins=round(2 * 500 ** (1 / 3)))
    np.testing.assert_allclose(heights / heights.sum(), counts[counts > 0] / 500, atol=0.002)
    paths = ElementTree.fromstring(str(svg)).iter("path")
    line = next(path for path in paths if path.get("class") == "middle")
    median_x = float(line.get("d")[1:].split()[0])
    left = bars(svg)[:, 1] <= median_x
    assert abs(heights[left].sum() / heights.sum() - 0.5) < heights.max() / heights.sum()


def test_unknown_values_and_those_without_a_logarithm_are_left_out():
    assert "2 values" in histogram_svg(
        [0.0, -1.0, float("nan"), float("inf"), 1.0, 2.0], title="v", unit="mL", log=True
    )


@pytest.mark.parametrize("values", [[], [1.0], [3.0, 3.0, 3.0], [float("nan")] * 4])
def test_fewer_than_two_distinct_values_give_no_histogram(values):
    assert histogram_svg(values, title="v", unit="mL") is None


def test_a_hostile_unit_is_text():
    svg = histogram_svg([1.0, 2.0], title="<script>", unit='"><script>')
    assert "<script>" not in svg
    ElementTree.fromstring(str(svg))


@pytest.mark.parametrize("values", [[1e-9, 2e-9], [-1e6, 1e6], [0.1, 0.1000001], [5, 1e12]])
def test_axes_of_any_range_have_their_numbers_in_order_within_the_picture(values):
    for log in (False, min(values) > 0):
        svg = ElementTree.fromstring(str(histogram_svg(values, title="v", unit="", log=log)))
        _title, *texts = (text for text in svg.iter("text") if text.get("class") is None)
        ticks = [(float(text.get("x")), float(text.text)) for text in texts]
        assert len(ticks) >= 2
        assert ticks == sorted(ticks)
        assert all(0 <= x <= 400 for x, _ in ticks)
