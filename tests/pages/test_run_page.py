import json
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from browser_visits import Visit
from hostile_pages import HOSTILE, report_of_all_states, scene

import volseg
from volseg.columns import row_of
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.about import About
from volseg.pages.headline import warning_kinds
from volseg.pages.montage import montage_jpeg
from volseg.pages.run_page import code_and_text, run_page


def test_failures_come_first_with_their_code_and_reason():
    page = report_of_all_states()
    assert (
        page.index("1 of 14 scans failed")
        < page.index("<code>E_PAIR</code>")
        < page.index("scans done")
    )
    assert "Not processed yet: 1 scan." in page
    assert page.count("<svg") == 2  # volume and intensity of twelve lesions; no known long axis
    cut = run_page(
        About(), [CaseRow(case_id="b", status="failed")], [], montages={}, pages=[]
    ).html()
    assert "<strong>b</strong>: reason unknown" in cut
    assert "<svg" not in cut


def test_a_row_of_an_older_version_without_the_new_columns_is_a_row_of_unknown_cells():
    page = run_page(
        About(),
        [row_of(CaseRow, {"case_id": "a", "status": "done"})],
        [row_of(LesionMeasurement, {"case_id": "a", "lesion_id": 1})],
        montages={},
        pages=[],
    ).html()
    rows = json.loads(re.search(r'id="lesions-data">(.*?)</script>', page)[1])["rows"]
    assert rows == [["a", 1, *[None] * (len(fields(LesionMeasurement)) - 2)]]


def codes_of(package):
    """Return every code of an error or a warning in the source of the package."""
    text = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    return sorted(set(re.findall(r"\"([EW]_\w+)\"", text)))


def test_every_code_is_told_from_its_text_and_notes_are_no_warnings():
    codes = codes_of(Path(volseg.__file__).parent)
    assert len(codes) > 50 and "E_4D" in codes
    for code in codes:
        assert code_and_text(f"{code}: the text: of it") == (code, "the text: of it")
    warnings = [f"{code}: the text of it" for code in codes if code[0] == "W"]
    row = CaseRow(case_id="a", status="done", warnings="; ".join([*warnings, "N_SUV: a factor"]))
    kinds = warning_kinds([row])
    assert len(kinds.kinds) + kinds.n_more == len(warnings)


@pytest.mark.slow
def test_a_run_of_any_size_stays_within_six_megabytes():
    scan, ids, _, _ = scene()
    montage = montage_jpeg(scan, ids, window=(-100.0, 200.0), point_mm=None, extent_mm=0)
    names = [f"a_scan_with_a_long_name_{i:04}" for i in range(500)]
    row = {field.name: 123.456 for field in fields(LesionMeasurement)} | {
        "label_name": "node",
        "notes": "",
    }
    lesions = [
        LesionMeasurement(**row | {"case_id": name, "lesion_id": n, "volume_ml": float(n)})
        for name in names
        for n in range(20)
    ]
    cases = [CaseRow(case_id=name, status="done", n_lesions=20) for name in names]
    montages = dict.fromkeys(names, montage)
    page = run_page(About(), cases, lesions, montages=montages, pages=names).html()
    assert 3_000_000 < len(page.encode()) <= 6_000_000
    assert page.count("/9j/") >= 500  # every scan keeps its picture
    content = json.loads(re.search(r'id="lesions-data">(.*?)</script>', page)[1])
    index = [column["name"] for column in content["columns"]].index("volume_ml")
    volumes = [row[index] for row in content["rows"]]
    assert "lesions.csv has them all" in page
    # If not all rows fit, the largest lesions stay.
    assert len(volumes) == 10000 or min(volumes) >= 20 - len(volumes) / 500 - 1


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
    table.locator(".tools summary").press("Enter")
    table.get_by_label("n_voxels").press("Space")
    assert len(column("n_voxels")) == 12
    page.keyboard.press("Escape")
    assert not table.locator(".tools details[open]").count()
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
