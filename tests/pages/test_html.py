import json
import re
import shutil
from dataclasses import fields
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
from jinja2.utils import htmlsafe_json_dumps
from laws import ball, centre_mm, grid_around, lps, oblique, orientations, ras

from volseg.measurement.lesions import measure_lesions
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.html import (
    comparison_html,
    fitting_table,
    image_budget,
    lesion_table,
    report_html,
    viewer_html,
)
from volseg.pages.model_box import LabelDice, ModelBox
from volseg.pages.preview import make_preview, montage_jpeg
from volseg.postprocessing.lesions import label_lesions
from volseg.store.results import plain
from volseg.volume import Geometry, Volume

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}} <!--\u2028"
FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox", "--disable-quic"]
CASE = {
    "case_id": "a",
    "status": "done",
    "n_lesions": 1,
    "total_volume_ml": 2.5,
    "image": "a.nii.gz",
}


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


def scene(affine=None, radii=(8, 5, 3), n_small=0):
    """Make a noisy scan with three distant balls and `n_small` lesions of one voxel.

    Returns (scan, ids, rows, centres of the balls).
    """
    geometry = grid_around(26, oblique((0.9, 1.2, 2.2)) if affine is None else affine, 2)
    centre = centre_mm(geometry)
    centres = [centre + offset for offset in ([-14, -8, 6], [13, 9, -4], [10, -12, 8])]
    mask = np.zeros(geometry.shape, np.uint8)
    for radius, point in zip(radii, centres, strict=True):
        mask[ball(radius, geometry, point)] = 1
    if n_small:
        free = np.zeros(geometry.shape, bool)
        free[::3, ::3, ::3] = True
        free &= ~ball(20, geometry)
        mask[tuple(np.argwhere(free)[:n_small].T)] = 2
    array = np.random.default_rng(0).normal(-50, 15, geometry.shape) + np.where(mask == 1, 150, 0)
    scan = Volume(np.asfortranarray(array.astype(np.int16)), geometry)
    lesions = label_lesions(mask, geometry)
    names = {1: HOSTILE, 2: "speck"}
    rows = measure_lesions(
        scan, lesions.ids, lesions.labels, case_id=HOSTILE, label_names=names, intensity_unit="HU"
    )
    return scan, lesions.ids, [plain(row) for row in rows], centres


def page_of(scan, ids, rows, case=CASE):
    preview = make_preview(scan, ids, unit="HU", max_bytes=image_budget(rows))
    montage = montage_jpeg(scan, ids, window=preview.window, point_mm=None, extent_mm=0)
    return viewer_html(case, rows, preview, montage, unit="HU")


def lesion(**values):
    return (
        {field.name: None for field in fields(LesionMeasurement)}
        | {"case_id": "a", "notes": ""}
        | values
    )


def report_of_all_states(n=12):
    """Report done, failed and pending scans with hostile names; some lesion values are unknown."""
    cases = [
        plain(CaseRow(case_id=f"scan_{i:02}", status="done", n_lesions=i % 3)) for i in range(n)
    ]
    cases += [
        plain(
            CaseRow(
                case_id=HOSTILE,
                status="failed",
                reason=f"E_PAIR: {HOSTILE}; to fix: {HOSTILE}",
                image=HOSTILE,
            )
        ),
        plain(CaseRow(case_id="later", status="pending")),
    ]
    lesions = [
        lesion(
            case_id=f"scan_{i:02}",
            lesion_id=1,
            label_name=HOSTILE if i % 2 else "node",
            volume_ml=float(1 + (7 * i) % n),
            intensity_mean=None if i == 3 else 10.0 * i,
            intensity_unit="HU",
            notes="intensity: no finite voxel" if i == 3 else "",
        )
        for i in range(n)
    ]
    scan, ids, _, _ = scene()
    montage = montage_jpeg(scan, ids, window=(-100.0, 200.0), point_mm=None, extent_mm=0, pixels=96)
    about = {"command": "infer", "volseg": "9.9", "model": HOSTILE, "started": "today"}
    return report_html(
        about,
        cases,
        lesions,
        montages={f"scan_{i:02}": montage for i in range(n)},
        pages=["scan_00", "scan_01"],
    )


# ---- the files


@pytest.mark.parametrize("kind", ["report", "viewer"])
def test_a_hostile_name_stays_text_and_the_policy_lets_nothing_but_our_scripts_run(kind):
    if kind == "report":
        page = report_of_all_states()
    else:
        scan, ids, rows, _ = scene()
        page = page_of(
            scan, ids, rows, CASE | {"case_id": HOSTILE, "warnings": HOSTILE, "image": HOSTILE}
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
            assert attributes["href"] == "../report.html"
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")


def test_failures_come_first_with_their_code_and_reason():
    page = report_of_all_states()
    assert (
        page.index("1 of 14 scans failed")
        < page.index("<code>E_PAIR</code>")
        < page.index("scans done")
    )
    assert "Not processed yet: 1 scan." in page
    assert page.count("<svg") == 2  # volume and intensity of twelve lesions; no known long axis
    cut = report_html(
        {}, [{"case_id": "b", "status": "failed", "reason": None}], [], montages={}, pages=[]
    )
    assert "<strong>b</strong>: reason unknown" in cut
    assert "<svg" not in cut


def test_rows_hold_the_numbers_of_the_csv_and_unknown_is_null():
    table = lesion_table(
        [lesion(volume_ml=1 / 3, n_voxels=7, intensity_mean=float("nan"), touches_border=False)]
    )
    columns = [column["name"] for column in table.content["columns"]]
    assert sorted(columns) == sorted(field.name for field in fields(LesionMeasurement))
    row = dict(zip(columns, table.content["rows"][0], strict=True))
    assert (row["volume_ml"], row["n_voxels"], row["intensity_mean"], row["touches_border"]) == (
        0.333333,
        7,
        None,
        False,
    )
    shown = {column["name"] for column in table.content["columns"] if column["shown"]}
    assert "volume_ml" in shown
    assert "mass_g" not in shown  # unknown in all rows


def test_a_row_of_an_older_version_without_the_new_columns_is_a_row_of_unknown_cells():
    page = report_html(
        {},
        [{"case_id": "a", "status": "done"}],
        [{"case_id": "a", "lesion_id": 1}],
        montages={},
        pages=[],
    )
    rows = json.loads(re.search(r'id="lesions-data">(.*?)</script>', page)[1])["rows"]
    assert rows == [["a", 1, *[None] * (len(fields(LesionMeasurement)) - 2)]]


def test_a_run_of_any_size_stays_within_six_megabytes():
    scan, ids, _, _ = scene()
    montage = montage_jpeg(scan, ids, window=(-100.0, 200.0), point_mm=None, extent_mm=0)
    names = [f"a_scan_with_a_long_name_{i:04}" for i in range(500)]
    row = {field.name: 123.456 for field in fields(LesionMeasurement)} | {
        "label_name": "node",
        "notes": "",
    }
    lesions = [
        row | {"case_id": name, "lesion_id": n, "volume_ml": float(n)}
        for name in names
        for n in range(20)
    ]
    cases = [{"case_id": name, "status": "done", "n_lesions": 20} for name in names]
    page = report_html({}, cases, lesions, montages=dict.fromkeys(names, montage), pages=names)
    assert 3_000_000 < len(page.encode()) <= 6_000_000
    assert page.count("/9j/") >= 500  # every scan keeps its picture
    content = json.loads(re.search(r'id="lesions-data">(.*?)</script>', page)[1])
    index = [column["name"] for column in content["columns"]].index("volume_ml")
    volumes = [row[index] for row in content["rows"]]
    assert "lesions.csv has them all" in page
    # If not all rows fit, the largest lesions stay.
    assert len(volumes) == 10000 or min(volumes) >= 20 - len(volumes) / 500 - 1


@pytest.mark.parametrize("max_bytes", [-1000, 0, 6000, 20_000, 200_000])
def test_a_table_that_does_not_fit_keeps_its_largest_rows(max_bytes):
    # In a page each of these characters takes six bytes.
    row = {field.name: 1.5 for field in fields(LesionMeasurement)} | {"notes": "<&'>" * 9}
    order = np.random.default_rng(0).permutation(300)
    rows = [row | {"case_id": "a", "lesion_id": int(n), "volume_ml": float(n)} for n in order]
    table = fitting_table(
        "t", "T", LesionMeasurement, rows, shown=("lesion_id", "volume_ml"), needed=("notes",),
        max_bytes=max_bytes, file="f.csv", rank=lambda row: -row["volume_ml"], kept="largest",
    )  # fmt: skip
    size = len(
        htmlsafe_json_dumps(table.content, separators=(",", ":"), ensure_ascii=False).encode()
    )
    numbers = [row[0] for row in table.content["rows"]]
    assert sorted(numbers, reverse=True) == list(range(299, 299 - len(numbers), -1))
    assert (size <= max_bytes) or not numbers
    assert (len(numbers) < 300) is (
        f"Showing the {len(numbers)} largest of 300 rows" in table.remark
    )
    assert bool(numbers) is (max_bytes >= 6000)


@pytest.mark.parametrize("n", [3, 4, 1000])
def test_a_comparison_of_many_lesions_lists_the_first_and_reads_no_more(n):
    lesions = ({"patient": "p", "group": number} for number in range(n))
    page = comparison_html(
        {"command": "compare"}, [{"patient": "p", "status": "done"}], lesions, most=3
    )
    listed = json.loads(re.search(r'id="changes-data">(.*?)</script>', page, flags=re.DOTALL)[1])[
        "rows"
    ]
    assert len(listed) == 3
    assert ("Showing the first 3 lesion rows" in page) == (n > 3)
    assert len(list(lesions)) == max(0, n - 4)


def test_a_viewer_page_of_a_large_noisy_scan_stays_within_six_megabytes():
    shape = (512, 512, 200)
    noise = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape))), np.int8).reshape(
        shape, order="F"
    )
    ids = np.zeros(shape, np.uint16, order="F")
    ids[100:110, 120:130, 20:24], ids[400:404, 380:390, 180:184] = 1, 2
    scan = Volume(noise, Geometry(shape, lps((0.7, 0.7, 1.0))))
    rows = [
        lesion(lesion_id=n, n_voxels=9, label_name=HOSTILE, notes=HOSTILE * 3)
        for n in range(1, 1500)
    ]
    page = page_of(scan, ids, rows)
    assert "Showing the first 1000 of 1499 lesions" in page
    assert 2_000_000 < len(page.encode()) <= 6_000_000


def test_text_colours_have_enough_contrast():
    style = resources.files("volseg.report").joinpath("templates/style.css").read_text()
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


def test_the_licences_travel_with_the_viewer():
    scan, ids, rows, _ = scene()
    page = page_of(scan, ids, rows)
    for words in ("Copyright (c) 2021, Niivue", "Arjun Barrett", "RII-UTHSCSA"):
        assert words in page


# ---- in a browser


def launched(playwright, *flags):
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("NO BROWSER: pages not tested; install one (apt-get install chromium)")
    return playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags])


@pytest.fixture(scope="module")
def playwright():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="NO BROWSER: playwright is not installed"
    )
    with sync_api.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright):
    browser = launched(playwright)
    yield browser
    browser.close()


class Visit:
    """A page in an offline browser, with its requests and its errors."""

    def __init__(self, browser, path, fragment="", ready="1", **options):
        context = browser.new_context(
            viewport={"width": 1280, "height": 800}, offline=True, **options
        )
        self.page = context.new_page()
        self.requests, self.trouble = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append("dialog") or dialog.dismiss())
        self.page.on(
            "console", lambda line: line.type == "error" and self.trouble.append(line.text)
        )
        self.uri = path.resolve().as_uri() + fragment
        self.page.goto(self.uri)
        self.page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        assert self.page.get_attribute("html", "data-ready") == ready, self.page.inner_text(
            "#message"
        )

    def place(self):
        return self.page.evaluate("({...document.getElementById('place').dataset})")

    def end(self):
        assert self.trouble == []
        assert [
            request for request in self.requests if not request.startswith(("data:", "blob:"))
        ] == [self.uri.partition("#")[0]]
        root = "document.documentElement"
        assert self.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), (
            "wider than the window"
        )
        self.page.context.close()


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
@pytest.mark.parametrize("kind", ["oblique", "turned", "many"])
def test_a_click_on_a_lesion_leads_to_it(kind, browser, tmp_path):
    """At the position from the tables, NiiVue reads the lesion's id under the crosshair."""
    scan, ids, rows, centres = scene(n_small=300 if kind == "many" else 0)
    if kind == "turned":
        stored, affine = list(orientations(scan))[29]
        numbers, _ = list(orientations(scan.with_array(ids)))[29]
        scan, ids = Volume(stored, Geometry(stored.shape, affine)), numbers
    path = tmp_path / "a.html"
    path.write_text(
        page_of(scan, ids, rows, CASE | {"case_id": HOSTILE, "warnings": HOSTILE}), encoding="utf-8"
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
    ends = [np.array(json.loads(rows[0][f"short_axis_p{end}_ras"])) for end in (0, 1)]
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


@pytest.mark.browser
def test_the_report_is_sorted_filtered_and_arranged_by_keyboard(browser, tmp_path):
    (tmp_path / "report.html").write_text(report_of_all_states(), encoding="utf-8")
    visit = Visit(browser, tmp_path / "report.html")
    page, table = visit.page, visit.page.locator("section[aria-labelledby='lesions-title']")

    def column(name):
        heads = table.locator("thead th").all()
        index = [head.get_attribute("data-column") for head in heads].index(name)
        rows = table.locator("tbody tr").all()
        return [row.locator("td").nth(index).inner_text() for row in rows]

    head = table.locator("th[data-column='volume_ml']")
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    volumes = [float(text) for text in column("volume_ml")]
    assert all(a <= b for a, b in pairwise(volumes))
    page.keyboard.press("Enter")
    assert [float(text) for text in column("volume_ml")] == sorted(volumes, reverse=True)
    table.locator("th[data-column='intensity_mean'] button").press("Enter")
    unknown = table.locator("tbody tr").last.locator("td.unknown").first
    assert unknown.get_attribute("title") == "unknown: no finite voxel"  # and unknown comes last
    table.get_by_label("Filter").focus()
    page.keyboard.type("node volume_ml > 6")
    assert set(column("label_name")) == {"node"}
    assert min(map(float, column("volume_ml"))) > 6
    assert (
        table.locator("output").inner_text()
        == f"1–{len(column('volume_ml'))} of {len(column('volume_ml'))} (of 12)"
    )
    table.get_by_label("Filter").fill("")
    table.locator("summary").press("Enter")
    table.get_by_label("n_voxels").press("Space")
    assert len(column("n_voxels")) == 12
    page.keyboard.press("Escape")
    assert not table.locator("details[open]").count()
    assert HOSTILE.replace("\u2028", "") in page.inner_text(".failures").replace("\u2028", "")
    links = page.locator("section[aria-labelledby='scans-title'] tbody a").all()
    assert {link.get_attribute("href") for link in links} == {
        "viewer/scan_00.html",
        "viewer/scan_01.html",
    }
    pictures = page.locator("td.picture img")
    assert pictures.count() == 12
    assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 288
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    visit.end()


@pytest.mark.browser
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
    case = CASE | {"model": box.name, "warnings": warnings}
    preview = make_preview(scan, ids, unit="HU", max_bytes=image_budget(rows))
    montage = montage_jpeg(scan, ids, window=preview.window, point_mm=None, extent_mm=0)
    pages = {
        "viewer": viewer_html(case, rows, preview, montage, unit="HU", box=box),
        "report": report_html(
            {"command": "infer"},
            [
                plain(
                    CaseRow(
                        case_id="a", status="done", model=box.name, warnings=warnings, n_lesions=3
                    )
                )
            ],
            [*rows[:2], lesion(lesion_id=3)],  # its cells are unknown, also the last ones
            montages={},
            pages=[],
            boxes=[box],
        ),
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


def test_a_mask_that_volseg_did_not_make_has_no_model_box():
    scan, ids, rows, _ = scene()
    assert '<section class="model"' not in page_of(scan, ids, rows)
