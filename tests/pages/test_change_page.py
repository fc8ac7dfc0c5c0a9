"""The page of a patient at two times: one crosshair for two scans, and both in one place."""

import numpy as np
import pytest
from browser_visits import Visit
from hostile_pages import HOSTILE
from two_times import draw, grid, movement

from volseg.columns import row_of
from volseg.comparison.changes import LesionChange
from volseg.pages.change_page import TwoScans, change_page_html
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Rigid

BALLS = [((-14, 0, 0), 11), ((20, 8, 4), 8)]


def two_scans(moved: Rigid, unit="HU", names=("before", "after")):
    geometry = grid()
    drawn = [draw(geometry, BALLS), draw(geometry, [*BALLS, ((0, 20, -18), 6)], moved, seed=1)]
    ids = tuple(label_lesions(mask.array, geometry).ids for _, mask in drawn)
    scans = tuple(scan for scan, _ in drawn)
    return TwoScans(names=names, scans=scans, ids=ids, transform=moved, unit=unit)


def changes_of(two):
    """Return a row per lesion of the follow-up: two matched ones and a new one."""
    rows = []
    for number in (1, 2, 3):
        values = {"patient": "p", "status": "matched", "group": number, "notes": ""}
        values |= {"followup_lesion_id": number, "followup_volume_ml": 1.0}
        for time, side in (("baseline", 0), ("followup", 1)):
            index = np.argwhere(two.ids[side] == number)
            if len(index):
                point = two.scans[side].geometry.to_world_mm(index).mean(axis=0)
                values |= {f"{time}_centroid_{axis}_mm": point[n] for n, axis in enumerate("ras")}
        if "baseline_centroid_r_mm" not in values:
            values["status"] = "new"
        rows.append(row_of(LesionChange, values))
    return rows


def under_crosshair(page):
    """Return for both scans whether the crosshair is in a lesion, and its place."""
    return page.evaluate(
        """() => viewers.map((nv) => {
          const [i, j, k] = nv.frac2vox(nv.scene.crosshairPos);
          return {inside: nv.volumes[1].getValue(i, j, k), at: [...nv.scene.crosshairPos]};
        })"""
    )


@pytest.mark.browser
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
