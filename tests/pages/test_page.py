"""What all pages have in common: escaping, security policy, colours, and the visible model box."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from browser_visits import Visit
from hostile_pages import CASE, HOSTILE, lesion, page_of, report_of_all_states, scene

from volseg.measurement.rows import CaseRow
from volseg.pages.about import About
from volseg.pages.model_box import LabelDice, ModelBox
from volseg.pages.montage import montage_jpeg
from volseg.pages.preview import make_preview
from volseg.pages.run_page import run_page
from volseg.pages.viewer_page import image_budget, viewer_html


class Elements(HTMLParser):
    """Start tags with their attributes, and the texts of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self._open = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.texts.append((*self._open, data))


@pytest.mark.parametrize("kind", ["report", "viewer"])
def test_a_hostile_name_stays_text_and_the_policy_lets_nothing_but_our_scripts_run(kind):
    if kind == "report":
        page = report_of_all_states()
    else:
        scan, ids, rows, _ = scene()
        page = page_of(
            scan, ids, rows, replace(CASE, case_id=HOSTILE, warnings=HOSTILE, image=HOSTILE)
        )
    assert "alert(1)" in page
    elements = Elements(page)
    assert not any(tag == "img" and "onerror" in attributes for tag, attributes in elements.found)
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert "{{7*7}}" in page  # what looks like a template is text
    tags = [tag for tag, _ in elements.found]
    policy = next(a["content"] for tag, a in elements.found if tag == "meta" and "http-equiv" in a)
    assert tags.index("meta") < tags.index("style") < tags.index("script")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    running = [
        text
        for tag, attributes, text in elements.texts
        if tag == "script" and "type" not in attributes
    ]
    assert len(running) == 1
    assert HOSTILE[:9] not in running[0]
    for tag, attributes in elements.found:  # nothing is asked of a network, or of another file
        source = attributes.get("src") or attributes.get("srcset")
        assert source is None or source.startswith("data:image/jpeg;base64,")
        if tag == "a":
            target = attributes.get("href", "../report.html")
            is_viewer = re.fullmatch(r"viewer/[\w.%~-]+\.html(#lesion=\d+)?", target)
            assert target == "../report.html" or is_viewer
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")


def test_text_colours_have_enough_contrast():
    style = resources.files("volseg.pages").joinpath("templates/style.css").read_text()
    themes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root[^{]*\{([^}]*)\}", style)
    ]
    assert len(themes) == 3
    assert themes[1] == themes[2]

    def luminance(colour):
        parts = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    pairs = [
        (text, ground)
        for text in ("text", "muted", "link", "bad")
        for ground in ("page", "panel", "marked")
    ]
    pairs += [("bad", "bad-panel"), ("text", "bad-panel"), ("on-accent", "accent")]
    for theme in themes[:2]:
        for text, ground in pairs:
            dark, light = sorted((luminance(theme[text]), luminance(theme[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, theme[text], theme[ground])


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("is_poor", [False, True])
def test_the_model_box_is_visible_on_the_report_and_on_the_viewer_page(is_poor, browser, tmp_path):
    box = ModelBox(
        name="lung@1234",
        intended_use=HOSTILE,
        limits="Never a whole chest.",
        training_cases=601,
        dice=(LabelDice(label="nodule", mean=0.12 if is_poor else 0.8, low=0.05, high=0.9),),
        checks=("modality: ct must be in HU",),
    )
    scan, ids, rows, _ = scene()
    warnings = "W_FOV: field of view along R, A, S 300 x 300 x 200 mm"
    case = replace(CASE, model=box.name, warnings=warnings)
    preview = make_preview(scan, ids, unit="HU", max_bytes=image_budget(rows))
    montage = montage_jpeg(scan, ids, window=preview.window, point_mm=None, extent_mm=0)
    pages = {
        "viewer": viewer_html(case, rows, preview, montage, unit="HU", box=box),
        "report": run_page(
            About(command="infer", boxes=(box,)),
            [CaseRow(case_id="a", status="done", model=box.name, warnings=warnings, n_lesions=3)],
            [*rows[:2], lesion(lesion_id=3)],  # its cells are unknown, also the last ones
            montages={},
            pages=[],
        ).html(),
    }
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
        visit = Visit(browser, tmp_path / f"{name}.html")
        section = visit.page.locator("section.model")
        assert section.count() == 1 and section.is_visible()
        text = section.inner_text()
        assert "<script>alert(1)</script>" in text and "601 cases" in text and "whole chest" in text
        assert (
            "This scan does not resemble the training scans: W_FOV." in text
            if name == "viewer"
            else "0 of 1 scans" in text
        )
        poor = section.locator(".poor")
        assert poor.count() == is_poor
        if is_poor:
            assert poor.is_visible() and "nodule 0.12" in poor.inner_text()
            red, green, blue = map(
                int, re.findall(r"\d+", poor.evaluate("part => getComputedStyle(part).color"))[:3]
            )
            assert red > 1.5 * max(green, blue)
            assert poor.bounding_box()["height"] < 30  # one line
        visit.page.set_viewport_size({"width": 700, "height": 800})  # a table is wider
        visit.end()
