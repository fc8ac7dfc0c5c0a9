from dataclasses import replace

import numpy as np
import pytest
from browser_visits import Visit, launched
from hostile_pages import CASE, HOSTILE, lesion, page_of, scene
from laws import centre_mm, lps, orientations, ras

from volseg.pages.marks import point_of
from volseg.volume import Geometry, Volume


def test_a_viewer_page_of_a_large_noisy_scan_stays_within_six_megabytes():
    shape = (512, 512, 200)
    noise = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape))), np.int8).reshape(
        shape, order="F"
    )
    ids = np.zeros(shape, np.uint16, order="F")
    ids[100:110, 120:130, 20:24], ids[400:404, 380:390, 180:184] = 1, 2
    scan = Volume(noise, Geometry(shape, lps((0.7, 0.7, 1.0))))
    rows = [
        lesion(lesion_id=n, n_voxels=9, connectivity=26, label_name=HOSTILE, notes=HOSTILE * 3)
        for n in range(1, 1500)
    ]
    page = page_of(scan, ids, rows)
    assert "Showing the first 1000 of 1499 lesions" in page
    assert 2_000_000 < len(page.encode()) <= 6_000_000


def test_the_licences_travel_with_the_viewer():
    scan, ids, rows, _ = scene()
    page = page_of(scan, ids, rows)
    for words in ("Copyright (c) 2021, Niivue", "Arjun Barrett", "RII-UTHSCSA"):
        assert words in page


def test_a_mask_that_volseg_did_not_make_has_no_model_box():
    scan, ids, rows, _ = scene()
    assert '<section class="model"' not in page_of(scan, ids, rows)


PIXELS = """() => {
  viewer.drawScene();
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [viewer.canvas.width, viewer.canvas.height];
  const pen = copy.getContext("2d");
  pen.drawImage(viewer.canvas, 0, 0);  // in the same tick: afterwards the buffer is gone
  const {data} = pen.getImageData(0, 0, copy.width, copy.height);
  let lit = 0, coloured = 0;
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b] = data.subarray(i, i + 3);
    lit += r + g + b > 90;
    coloured += Math.max(r, g, b) - Math.min(r, g, b) > 15;
  }
  return {lit, coloured};
}"""
TILE = "() => viewer.screenSlices.filter((slice) => slice.axCorSag === 0)[0].leftTopWidthHeight"


@pytest.mark.browser
@pytest.mark.parametrize(
    "kind",
    ["oblique", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("turned", "many"))],
)
@pytest.mark.slow
def test_a_click_on_a_lesion_leads_to_it(kind, browser, tmp_path):
    """At the position from the tables, NiiVue reads the lesion's id under the crosshair."""
    scan, ids, rows, centres = scene(n_small=300 if kind == "many" else 0)
    if kind == "turned":
        stored, affine = list(orientations(scan))[29]
        numbers, _ = list(orientations(scan.with_array(ids)))[29]
        scan, ids = Volume(stored, Geometry(stored.shape, affine)), numbers
    path = tmp_path / "a.html"
    path.write_text(
        page_of(scan, ids, rows, replace(CASE, case_id=HOSTILE, warnings=HOSTILE)), encoding="utf-8"
    )
    visit = Visit(browser, path, "#lesion=3")
    page = visit.page
    assert visit.place()["id"] == "3"  # from the address
    for number, centre in enumerate(centres, start=1):
        page.get_by_role("button", name=f"Show lesion {number}", exact=True).click()
        place = visit.place()
        assert place["id"] == str(number)
        point = np.array([float(place[axis]) for axis in "ras"])
        assert np.linalg.norm(point - centre) < max(scan.geometry.spacing_mm)
        assert f"lesion {number}" in page.inner_text("#place")
        assert float(place["value"]) == pytest.approx(100, abs=60)  # HU, in one voxel of noise
        assert page.inner_text("#numbers h3") == f"Lesion {number}"
        drawn = int(page.get_attribute("#lines", "data-drawn") or 0)
        # The long and the short axis, also of neighbours in the same slice.
        assert drawn == 2 or (kind == "many" and drawn > 2)
        assert page.get_attribute(f'tr[data-lesion="{number}"]', "aria-current") == "true"
    if kind == "many":
        button = page.get_by_role("button", name="Show lesion 303", exact=True)
        page.get_by_label("Filter").fill("lesion_id=303")
        button.press("Enter")
        assert visit.place()["id"] == "303"
    seen = page.evaluate(PIXELS)
    assert seen["lit"] > 50_000
    # The background stays grey, however many lesions there are.
    assert 800 < seen["coloured"] < 0.1 * seen["lit"]
    if kind == "oblique":
        # Page Up moves to a slice without diameters.
        page.focus("#canvas")
        before = visit.place()
        for _ in range(4):
            page.keyboard.press("PageUp")
        after = visit.place()
        moved = np.array([float(after[axis]) - float(before[axis]) for axis in "ras"])
        np.testing.assert_allclose(moved, 4 * scan.geometry.affine[:3, 2], atol=0.01)
        assert page.get_attribute("#lines", "data-drawn") == "0"
        # The patient's right is on the left until the button flips it.
        left, top, width, height = page.evaluate(TILE)
        position = {"x": left + width / 2 - abs(width) / 4, "y": top + height / 2}
        page.click("#canvas", position=position)
        right = float(visit.place()["r"])
        page.get_by_role("button", name="R is left").click()
        page.click("#canvas", position=position)
        assert right > centre_mm(scan.geometry)[0] > float(visit.place()["r"])
    visit.end()


SHORT_AXES = """() => {
  const canvas = document.getElementById("lines"), {width, height} = canvas;
  const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
  const scale = width / canvas.getBoundingClientRect().width, points = [];
  const isBlue = (r, g, b) => Math.abs(r - 127) + Math.abs(g - 223) + Math.abs(b - 255) < 30;
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b, a] = data.subarray(i, i + 4);
    const x = (i / 4) % width, y = Math.floor(i / 4 / width);
    if (a > 250 && isBlue(r, g, b)) points.push([x / scale, y / scale]);
  }
  return points;
}"""


@pytest.mark.browser
@pytest.mark.slow
def test_on_a_phone_the_picture_stays_in_view_while_lesions_are_chosen(browser, tmp_path):
    scan, ids, rows, _ = scene(n_small=60)
    (tmp_path / "a.html").write_text(page_of(scan, ids, rows), encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 700}, offline=True)
    page = context.new_page()
    page.goto((tmp_path / "a.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    for _ in range(30):
        page.keyboard.press("n")
    page.wait_for_function("document.getElementById('place').dataset.id === '31'")
    assert page.evaluate("scrollY") == 0
    box, row = (
        page.evaluate(
            f"(() => {{ const r = document.querySelector({name!r})"
            ".getBoundingClientRect(); return [r.top, r.bottom] })()"
        )
        for name in (".side .wide", '.side [aria-current="true"]')
    )
    assert box[0] <= row[0] and row[1] <= box[1]  # in view within the table
    context.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_diameter_is_drawn_where_it_was_measured(browser, tmp_path):
    """Clicking an end of the drawn short axis moves the crosshair to its end in the table."""
    scan, ids, rows, _ = scene()
    (tmp_path / "a.html").write_text(page_of(scan, ids, rows), encoding="utf-8")
    visit = Visit(browser, tmp_path / "a.html", "#lesion=1")
    drawn = np.array(visit.page.evaluate(SHORT_AXES), float)
    between = np.linalg.norm(drawn[:, None] - drawn[None], axis=-1)
    left, top, *_ = visit.page.evaluate(
        "Object.values(document.getElementById('canvas').getBoundingClientRect().toJSON())"
    )
    ends = [np.array(point_of(rows[0], f"short_axis_p{end}")) for end in (0, 1)]
    for x, y in drawn[list(np.unravel_index(between.argmax(), between.shape))]:
        visit.page.mouse.click(left + x, top + y)
        point = np.array([float(visit.place()[axis]) for axis in "ras"])
        distance_mm = min(np.linalg.norm(point - end) for end in ends)
        assert distance_mm < 1.5 * max(scan.geometry.spacing_mm[:2])
    visit.end()


@pytest.mark.browser
def test_without_webgl_the_page_says_so_and_shows_the_picture_and_the_table(playwright, tmp_path):
    scan, ids, rows, _ = scene(ras((1.0, 1.0, 2.0)))
    (tmp_path / "a.html").write_text(page_of(scan, ids, rows), encoding="utf-8")
    browser = launched(playwright, "--disable-3d-apis")
    visit = Visit(browser, tmp_path / "a.html", ready="no-webgl", color_scheme="dark")
    assert "no WebGL" in visit.page.inner_text("#message")
    assert visit.page.evaluate("document.querySelector('#montage img').naturalWidth") == 768
    assert visit.page.is_visible("#montage img")
    assert not visit.page.is_visible("#canvas")
    visit.page.get_by_role("button", name="Show lesion 2", exact=True).press("Enter")
    assert visit.page.inner_text("#numbers h3") == "Lesion 2"
    assert "–" in visit.page.inner_text("#lesions")
    visit.end()
    browser.close()
