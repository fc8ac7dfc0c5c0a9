"""What a reader with a keyboard or a screen reader needs, on every page, size and theme."""

from pathlib import Path

import pytest
from browser_visits import Visit
from hostile_pages import page_of, report_of_all_states, scene
from test_change_page import changes_of, two_scans

from volseg.pages.change_page import change_page_html
from volseg.volume import Rigid

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
FINDINGS = Path(__file__).with_name("accessibility.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    scan, ids, rows, _ = scene()
    two = two_scans(Rigid.identity())
    texts = {
        "report": report_of_all_states(),
        "viewer": page_of(scan, ids, rows),
        "compare": change_page_html(two, changes_of(two), patient="p"),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "viewer", "compare"])
def test_controls_have_names_text_has_contrast_and_nothing_is_wider_than_the_window(
    name, scheme, pages, browser
):
    visit = Visit(browser, pages / f"{name}.html", color_scheme=scheme)
    page = visit.page
    for width, height in SIZES.values():
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        assert page.evaluate(FINDINGS) == []
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = false")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    visit.end()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["report", "viewer", "compare"])
def test_every_control_is_reached_by_tab_and_shows_where_the_focus_is(name, pages, browser):
    visit = Visit(browser, pages / f"{name}.html")
    page = visit.page
    n_controls = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, a[href], summary")].filter(
          (element) => element.checkVisibility() && !element.disabled && element.tabIndex >= 0
        ).length"""
    )
    page.evaluate("document.activeElement.blur()")
    reached, invisible = 0, []
    for _ in range(n_controls + 40):
        page.keyboard.press("Tab")
        state = page.evaluate(
            """() => {
              const element = document.activeElement;
              if (element === document.body || element.dataset.reached) return null;
              element.dataset.reached = "1";
              const style = getComputedStyle(element);
              return {
                counts: element.matches("button, select, input, a[href], summary"),
                isShown: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
                html: element.outerHTML.slice(0, 80),
              };
            }"""
        )
        if state is None:
            break
        reached += state["counts"]
        if not state["isShown"]:
            invisible.append(state["html"])
    assert reached >= n_controls
    assert invisible == []
    visit.end()


@pytest.mark.browser
def test_the_warnings_column_is_in_view_on_a_desktop(pages, browser):
    visit = Visit(browser, pages / "report.html")
    box = visit.page.locator("section[aria-labelledby='scans-title'] th[data-column='warnings']")
    if not box.count():  # no scan of this page has a warning
        visit.page.locator("section[aria-labelledby='scans-title'] summary").click()
        visit.page.get_by_label("warnings (no values)").or_(
            visit.page.get_by_label("warnings")
        ).first.check()
    place = box.bounding_box()
    assert place["x"] + 150 < 1280
    visit.end()
