import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from volseg.pages.scales import MIN_JUDGED, Scale
from volseg.pages.strips import ALL, Dot, strip_of


def dots(values):
    return [Dot(float(value), f"scan_{n}", f"viewer/{n}.html") for n, value in enumerate(values)]


def strip(values, **given):
    return strip_of({ALL: dots(values)}, **{"title": "v", "unit": "mL", "noun": "lesion"} | given)


def circles(drawn):
    """(href, x, is ringed) of every dot."""
    rows = []
    for link in ElementTree.fromstring(str(drawn.svg)).iter("a"):
        (circle,) = link.iter("circle")
        ringed = "outlier" in circle.get("class")
        rows.append((link.get("href"), float(circle.get("cx")), ringed))
    return rows


@pytest.mark.parametrize("is_wide", [True, False])
def test_every_value_is_a_dot_that_opens_it_in_the_order_of_the_values(is_wide):
    rng = np.random.default_rng(0)
    values = rng.lognormal(1, 2, 300) if is_wide else rng.uniform(50, 90, 300)
    drawn = strip(values)
    assert ("log scale" in drawn.svg) is is_wide
    x = {href: place for href, place, _ in circles(drawn)}
    assert len(x) == len(values)
    places = np.array([x[f"viewer/{n}.html"] for n in range(len(values))])
    expected = np.log10(values) if is_wide else values
    assert np.corrcoef(places, expected)[0, 1] > 0.99999  # an affine map, up to rounding


def test_the_ringed_dots_are_those_of_the_stated_rule_and_are_named_from_the_largest():
    values = [*np.linspace(40, 60, 30), 5.0, 130.0]
    lower, upper = np.percentile(values, (25, 75))
    reach = 1.5 * (upper - lower)
    drawn = strip(values)
    ringed = {href for href, _, is_out in circles(drawn) if is_out}
    expected = {
        f"viewer/{n}.html" for n, v in enumerate(values) if not lower - reach <= v <= upper + reach
    }
    assert ringed == expected == {"viewer/30.html", "viewer/31.html"}
    assert [dot.value for dot in drawn.outliers] == [130.0, 5.0]
    assert not strip([1.0] * (MIN_JUDGED - 2) + [9.0]).outliers  # too few to judge


def test_groups_have_a_row_each_and_many_are_joined():
    groups = {f"label {n}": dots([n + 1.0, n + 2.0]) for n in range(3)}
    drawn = strip_of(groups, title="v", unit="mm", noun="lesion")
    texts = [text.text for text in ElementTree.fromstring(str(drawn.svg)).iter("text")]
    assert set(groups) < set(texts)
    many = {f"label {n}": dots([n + 1.0]) for n in range(20)}
    drawn = strip_of(many, title="v", unit="mm", noun="lesion")
    assert "label 3" not in drawn.svg and len(circles(drawn)) == 20


@pytest.mark.parametrize("values", [[], [1.0], [3.0, 3.0, 3.0], [float("nan")] * 4])
def test_fewer_than_two_distinct_values_give_no_plot(values):
    assert strip(values) is None


def test_unknown_values_are_left_out_and_those_without_a_logarithm_need_none():
    drawn = strip([0.0, -1.0, float("nan"), float("inf"), 1.0, 200.0])
    assert len(circles(drawn)) == 4 and "log scale" not in drawn.svg


def test_a_hostile_unit_name_or_page_is_text():
    hostile = '"><script>alert(1)</script>'
    groups = {hostile: [Dot(1.0, hostile, hostile)], "b": [Dot(2.0, "b")]}
    drawn = strip_of(groups, title=hostile, unit=hostile, noun="lesion")
    assert "<script>" not in drawn.svg
    ElementTree.fromstring(str(drawn.svg))


@pytest.mark.parametrize(
    "values", [[1e-9, 2e-9], [-1e6, 1e6], [0.1, 0.1000001], [5, 1e12], [7, 7], [0, 0]]
)
def test_axes_of_any_range_have_their_numbers_in_order(values):
    scale = Scale.of(values)
    positions = [position for position, _ in scale.ticks]
    numbers = [float(text) for _, text in scale.ticks]
    assert len(numbers) >= 2 and numbers == sorted(numbers)
    assert all(scale.low <= position <= scale.high for position in positions)
    assert all(-1e-9 <= scale.fraction(value) <= 1 + 1e-9 for value in values)
