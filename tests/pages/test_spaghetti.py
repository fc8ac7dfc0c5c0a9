import xml.etree.ElementTree as ElementTree

import pytest

from volseg.pages.spaghetti import Line, spaghetti_svg


def ends(svg):
    """Heights of both ends of each line, by name; small is high."""
    heights = {}
    for link in ElementTree.fromstring(str(svg)).iter("a"):
        circles = [float(circle.get("cy")) for circle in link.iter("circle")]
        heights[link.get("aria-label")] = circles
    return heights


@pytest.mark.parametrize("largest", [9.0, 9000.0])
def test_what_grows_rises_and_what_is_gone_ends_at_zero(largest):
    lines = [Line(2.0, largest, "grows"), Line(3.0, 1.0, "shrinks"), Line(4.0, 0.0, "gone")]
    lines.append(Line(0.0, 5.0, "new"))
    svg = spaghetti_svg(lines, title="Volume", unit="mL", noun="lesion")
    assert ("log scale" in svg) == (largest > 100)
    heights = ends(svg)
    assert heights["grows"][1] < heights["grows"][0]
    assert heights["shrinks"][1] > heights["shrinks"][0]
    floor = max(height for pair in heights.values() for height in pair)
    assert heights["gone"][1] == heights["new"][0] == floor > heights["shrinks"][1]
    order = sorted((line.before, heights[line.name][0]) for line in lines)
    assert [height for _, height in order] == sorted((h for _, h in order), reverse=True)


def test_nothing_to_show_gives_no_plot_and_a_hostile_name_is_text():
    for lines in ([], [Line(0.0, 0.0, "a")], [Line(1.0, 1.0, "a")], [Line(float("nan"), 1.0, "a")]):
        assert spaghetti_svg(lines, title="v", unit="mL", noun="lesion") is None
    hostile = '"><script>'
    svg = spaghetti_svg([Line(1.0, 2.0, hostile, hostile)], title=hostile, unit=hostile, noun="x")
    assert "<script>" not in svg
    ElementTree.fromstring(str(svg))
