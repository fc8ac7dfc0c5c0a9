"""What a reader decides in the pages arrives in review.csv as it was decided."""

import csv
import io
import json
from dataclasses import replace

import pytest
from browser_visits import Visit
from hostile_pages import CASE, HOSTILE, lesion, page_of, scene

from volseg.errors import VolsegError
from volseg.measurement.rows import CaseRow
from volseg.pages.about import About
from volseg.pages.run_page import Notes, run_page
from volseg.store.reviews import read_reviews


def report(tmp_path, n_scans, *, pages=(), notes=None, n_lesions=2):
    cases = [
        CaseRow(case_id=f"scan_{n:03}", status="done", n_lesions=n_lesions) for n in range(n_scans)
    ]
    lesions = [
        lesion(case_id=case.case_id, lesion_id=number, n_voxels=100 + number, volume_ml=1.0)
        for case in cases
        for number in range(1, n_lesions + 1)
    ]
    page = run_page(About(), cases, lesions, montages={}, pages=pages, notes=notes)
    (tmp_path / "report.html").write_text(page.html(), encoding="utf-8")
    return tmp_path / "report.html"


def downloaded(page, tmp_path):
    """Press the key that saves, and return the path of the file."""
    with page.expect_download() as download:
        page.keyboard.press("s")
    assert download.value.suggested_filename == "review.csv"
    download.value.save_as(tmp_path / "review.csv")
    return tmp_path / "review.csv"


def verdicts(reviews):
    return {
        (name, number): (row.verdict, row.comment)
        for name, rows in reviews.of_case.items()
        for number, row in rows.items()
    }


@pytest.mark.browser
@pytest.mark.slow
def test_two_hundred_scans_are_reviewed_on_one_page_with_the_keyboard_alone(browser, tmp_path):
    visit = Visit(browser, report(tmp_path, 200), accept_downloads=True)
    page, expected = visit.page, {}
    for n in range(400):
        page.keyboard.press("n")
        if n % 100 == 7:
            comment = f'=1+1, "{n}" {HOSTILE[:40]} é'
            page.keyboard.press("c")
            page.keyboard.type(comment)
            page.keyboard.press("Enter")
        else:
            comment = ""
        page.keyboard.press("r" if n % 3 == 0 else "a")
        verdict = "rejected" if n % 3 == 0 else "accepted"
        expected[f"scan_{n // 2:03}", 1 + n % 2] = (verdict, comment)
    page.keyboard.press("u")  # takes the last one back
    del expected["scan_199", 2]
    assert "399 of 400 reviewed" in page.inner_text("#review-place")
    assert verdicts(read_reviews(downloaded(page, tmp_path))) == expected
    page.get_by_label("Filter").last.fill("verdict = rejected")
    assert (
        page.locator("section[aria-labelledby='lesions-title'] output")
        .inner_text()
        .startswith("1–100 of 133")
    )
    visit.end()


@pytest.mark.browser
@pytest.mark.slow
def test_reviews_go_with_the_reader_from_page_to_page(browser, tmp_path):
    """Report → scan → next scan → report: every page adds to the same review.csv."""
    scan, ids, rows, _ = scene()
    (tmp_path / "viewer").mkdir()
    names = ["first/one", "second"]
    for name in names:
        named = [replace(row, case_id=name) for row in rows]
        case = replace(CASE, case_id=name, n_lesions=3)
        # A case id has no slash, but a page must not be led out of its folder by one.
        (tmp_path / "viewer" / f"{name.replace('/', '%2F')}.html").write_text(
            page_of(scan, ids, named, case), encoding="utf-8"
        )
    cases = [CaseRow(case_id=name, status="done", n_lesions=3) for name in names]
    lesions = [replace(row, case_id=name) for name in names for row in rows]
    page = run_page(About(), cases, lesions, montages={}, pages=names)
    (tmp_path / "report.html").write_text(page.html(), encoding="utf-8")
    visit = Visit(browser, tmp_path / "report.html", accept_downloads=True)
    page = visit.page
    page.keyboard.press("n")
    page.keyboard.press("a")
    visit.page.add_init_script("localStorage.clear()")  # as where no page sees another's storage
    page.evaluate("pages.delete('first/one')")  # its file has a name that cannot be a case's
    page.keyboard.press("n")
    page.keyboard.press("n")
    page.keyboard.press("n")
    with page.expect_navigation():
        page.keyboard.press("o")
    page.wait_for_selector("html[data-ready]", state="attached")
    assert "second" in page.url and "state" not in page.url
    assert page.inner_text("#scan-place") == "2 of 2"
    assert page.is_disabled("#scan-after")
    page.keyboard.press("n")
    page.keyboard.press("r")
    assert page.get_attribute("#reject", "aria-pressed") == "true"
    assert page.get_attribute('tr[data-lesion="2"]', "data-verdict") == "rejected"
    with page.expect_navigation():
        page.click("#report")
    page.wait_for_selector("html[data-ready]", state="attached")
    saved = verdicts(read_reviews(downloaded(page, tmp_path)))
    assert saved == {("first/one", 1): ("accepted", ""), ("second", 2): ("rejected", "")}
    assert visit.trouble == []


@pytest.mark.browser
@pytest.mark.slow
def test_the_keys_of_the_viewer_step_judge_and_change_the_window(browser, tmp_path):
    scan, ids, rows, _ = scene()
    (tmp_path / "a.html").write_text(page_of(scan, ids, rows), encoding="utf-8")
    visit = Visit(browser, tmp_path / "a.html", "#lesion=1", accept_downloads=True)
    page = visit.page
    assert visit.place()["id"] == "1"
    page.focus("#canvas")
    page.keyboard.press("n")
    assert visit.place()["id"] == "2" and page.inner_text("#lesion-place") == "2 of 3"
    page.keyboard.press("p")
    assert visit.place()["id"] == "1"
    assert page.is_disabled("#scan-after") or page.is_hidden("#scan-after")
    before = page.input_value("#low"), page.input_value("#high")
    page.keyboard.press("w")
    name = page.evaluate("at('preset').selectedOptions[0].textContent")
    assert name == "soft tissue"
    assert (page.input_value("#low"), page.input_value("#high")) == ("-160", "240") != before
    assert page.evaluate("[viewer.volumes[0].cal_min, viewer.volumes[0].cal_max]") == [-160, 240]
    page.fill("#low", "-100")
    page.press("#low", "Enter")
    page.focus("#canvas")
    assert page.input_value("#preset") == "" and page.input_value("#high") == "240"
    depth = int(page.get_attribute("#slice", "max"))
    page.evaluate("at('slice').value = 3; at('slice').dispatchEvent(new Event('input'))")
    assert page.inner_text("#slice-place") == f"3 of {depth}" == f"3 of {scan.geometry.shape[2]}"
    page.keyboard.press("c")
    page.keyboard.type("near n, p and a")  # while typing, keys are letters
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.uncheck("#keys") if page.is_visible("#keys") else page.evaluate(
        "at('keys').checked = false"
    )
    page.focus("#canvas")
    page.keyboard.press("a")  # the keys are off
    page.evaluate("at('keys').checked = true")
    saved = verdicts(read_reviews(downloaded(page, tmp_path)))
    assert list(saved.values()) == [("rejected", "near n, p and a")]
    visit.end()


@pytest.mark.browser
@pytest.mark.slow
def test_the_lesions_have_surfaces_of_their_volume_where_they_lie(browser, tmp_path):
    scan, ids, rows, centres = scene()
    (tmp_path / "a.html").write_text(page_of(scan, ids, rows), encoding="utf-8")
    visit = Visit(browser, tmp_path / "a.html")
    page = visit.page
    page.select_option("#plane", "surface")
    page.wait_for_selector("#surface[data-meshes='3']")
    meshes = page.evaluate(
        """() => solid.meshes.map(({pts, tris}) => {
          let volume = 0; const centre = [0, 0, 0];
          for (let t = 0; t < tris.length; t += 3) {
            const [a, b, c] = [0, 1, 2].map((n) => pts.slice(3 * tris[t + n], 3 * tris[t + n] + 3));
            volume += (a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2])
              + a[2] * (b[0] * c[1] - b[1] * c[0])) / 6;
          }
          for (let p = 0; p < pts.length; p++) centre[p % 3] += 3 * pts[p] / pts.length;
          return {volume, centre};
        })"""
    )
    for mesh, row, centre in zip(meshes, rows, centres, strict=True):
        # Closed and turned outwards; smoothing takes some of a small ball.
        assert mesh["volume"] == pytest.approx(row.volume_mm3, rel=0.3)
        assert mesh["centre"] == pytest.approx(centre.tolist(), abs=1.0)
    visit.end()


def test_the_reviews_of_the_report_are_those_of_the_file_and_a_hostile_one_is_text(tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows(
        [
            ["case_id", "lesion_id", "verdict", "comment", "n_voxels"],
            ["scan_000", 1, "Accepted", HOSTILE, 101],
            ["scan_001", 2, "reject", "", 999],  # its lesion has 102 voxels
        ]
    )
    (tmp_path / "review.csv").write_text(text.getvalue(), encoding="utf-8")
    reviews = read_reviews(tmp_path / "review.csv")
    page = report(tmp_path, 3, notes=Notes(reviews=reviews)).read_text(encoding="utf-8")
    assert "2 lesions, 1 accepted, 1 rejected" in page
    assert "1 of them changed size since" in page
    island = page.partition('id="reviews">')[2].partition("</script>")[0]
    assert [entry[:3] for entry in json.loads(island)] == [
        ["scan_000", 1, "accepted"],
        ["scan_001", 2, "rejected"],
    ]
    assert "<script>alert(1)" not in page


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("case_id,lesion_id\na,1", "lacks the columns verdict"),
        ("case_id,lesion_id,verdict\na,1,maybe", "row 2, verdict: must be accepted"),
        ("case_id,lesion_id,verdict\na,x,accepted", "row 2: is not valid"),
        ('case_id,lesion_id,verdict\n"' + "a" * 200_000, "not CSV"),
    ],
)
def test_a_review_that_is_not_valid_is_refused_with_its_row(lines, words, tmp_path):
    (tmp_path / "review.csv").write_text(lines, encoding="utf-8")
    with pytest.raises(VolsegError, match=words) as error:
        read_reviews(tmp_path / "review.csv")
    assert error.value.code == "E_REVIEW" and str(tmp_path) in error.value.problem
    with pytest.raises(VolsegError, match="cannot be read"):
        read_reviews(tmp_path / "missing.csv")
