"""The page of a patient at two times: one crosshair for two scans, and both in one place."""

import pytest
from browser_visits import Visit
from hostile_pages import HOSTILE
from two_scans import changes_of, two_scans
from two_times import movement

from volseg.pages.change_page import change_page_html
from volseg.volume import Rigid


def under_crosshair(page):
    """Return for both scans whether the crosshair is in a lesion, and its place."""
    return page.evaluate(
        """() => viewers.map((nv) => {
          const [i, j, k] = nv.frac2vox(nv.scene.crosshairPos);
          return {inside: nv.volumes[1].getValue(i, j, k), at: [...nv.scene.crosshairPos]};
        })"""
    )


@pytest.mark.browser
@pytest.mark.slow
def test_one_crosshair_leads_to_a_lesion_in_both_scans(browser, tmp_path):
    two = two_scans(movement(5.0, (4, -3, 2)))
    page_html = change_page_html(two, changes_of(two), patient=HOSTILE)
    assert len(page_html.encode()) < 6_000_000
    (tmp_path / "p.html").write_text(page_html, encoding="utf-8")
    visit = Visit(browser, tmp_path / "p.html")
    page = visit.page
    states = []
    for step in range(3):
        if step:
            page.keyboard.press("n")
        first, second = under_crosshair(page)
        assert first["at"] == second["at"]
        states.append((first["inside"], second["inside"]))
    assert states == [(1, 1), (1, 1), (0, 1)]  # the last one is new: at follow-up only
    page.focus("#canvas-1")
    for key in ("PageUp", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        first, second = under_crosshair(page)
        assert first["at"] == second["at"] != states
    page.select_option("#preset", label="soft tissue")
    windows = page.evaluate("viewers.map((nv) => [nv.volumes[0].cal_min, nv.volumes[0].cal_max])")
    assert windows == [[-160, 240]] * 2
    visit.end()


@pytest.mark.browser
@pytest.mark.slow
def test_flicker_shows_both_scans_in_one_place_in_turn(browser, tmp_path):
    two = two_scans(Rigid.identity(), unit="")
    (tmp_path / "p.html").write_text(
        change_page_html(two, changes_of(two), patient="p"), encoding="utf-8"
    )
    visit = Visit(browser, tmp_path / "p.html", reduced_motion="reduce")
    page = visit.page

    def box(side):
        return page.locator(f"#canvas-{side}").bounding_box()

    assert box(0)["x"] < box(1)["x"] and box(0)["y"] == box(1)["y"]
    assert not page.locator("#preset").count()  # in no common unit there is no common window
    page.keyboard.press("f")
    seen = []
    for _ in range(3):
        seen.append([page.locator(f"#canvas-{side}").is_visible() for side in (0, 1)])
        page.keyboard.press("x")
    assert seen == [[True, False], [False, True], [True, False]]
    page.keyboard.press("f")
    assert all(page.locator(f"#canvas-{side}").is_visible() for side in (0, 1))
    visit.end()
    moving = Visit(browser, tmp_path / "p.html")
    moving.page.keyboard.press("f")
    moving.page.wait_for_selector("#two[data-front='1']", state="attached", timeout=5000)
    moving.page.wait_for_selector("#two[data-front='0']", state="attached", timeout=5000)
    moving.end()
