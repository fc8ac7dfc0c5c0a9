import csv
import json
import re
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from laws import ball, centre_mm, grid_around, oblique
from segmented_scans import segmented

import volseg
from volseg.commands.pages import page_files, write_report
from volseg.errors import VolsegError
from volseg.io.volumes import write_volume
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.memory import LISTED, PAGE, REPORT
from volseg.measurement.rows import CaseRow
from volseg.options.declare import amount
from volseg.pages.about import About
from volseg.postprocessing.lesions import label_lesions
from volseg.store.records import CaseRecord
from volseg.store.results import ResultsFolder
from volseg.volume import Geometry, Volume


@pytest.fixture
def cases(tmp_path):
    """A table of three scans with a ball each; the second scan is damaged."""
    geometry = grid_around(12, oblique((1.0, 1.2, 2.0)))
    rng = np.random.default_rng(0)
    lines = ["subject,image,label"]
    for n, name in enumerate("abc"):
        mask = ball(5 + n, geometry, centre_mm(geometry) + n).astype(np.uint8)
        array = (rng.normal(-80, 10, geometry.shape) + mask * 120).astype(np.int16)
        write_volume(Volume(array, geometry), tmp_path / f"{name}.nii.gz")
        write_volume(Volume(mask, geometry), tmp_path / f"{name}_mask.nii.gz")
        lines.append(f"{name},{name}.nii.gz,{name}_mask.nii.gz")
    path = tmp_path / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:500])
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "cases.csv"


def pages(out):
    return sorted(path.relative_to(out).as_posix() for path in (out / "viewer").rglob("*.*"))


def record(out, name):
    return json.loads((out / ".volseg" / f"{name}.json").read_text())


def test_each_scan_gets_a_page_and_the_run_one_over_all_of_them(cases, tmp_path):
    out = tmp_path / "out"
    report = volseg.measure(cases=cases, out=out, intensity_unit="HU")
    assert report.exit_code == 3
    assert pages(out) == [
        "viewer/a.html",
        "viewer/c.html",
        "viewer/thumbnails/a.jpg",
        "viewer/thumbnails/c.jpg",
    ]
    assert set(pages(out)[::2]) <= set(record(out, "a")["files"]) | set(record(out, "c")["files"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert (
        page.index("1 of 3 scans failed")
        < page.index("<strong>b</strong>")
        < page.index('id="scans-data"')
    )
    assert '<script type="application/json" id="pages">["a","c"]</script>' in page
    # The page may be shared, so it holds no path.
    assert str(tmp_path) not in (out / "viewer" / "a.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_making_a_page_takes_the_memory_that_is_planned_for_it(tmp_path):
    """Use the largest possible preview, with more lesions than a byte can number."""
    shape = (400, 400, 74)
    array = np.zeros(shape, np.int16, order="F")
    array[100:300, 100:300] = np.random.default_rng(0).integers(0, 400, (200, 200, 74))
    mask = np.zeros(shape, np.uint8, order="F")
    mask[::25, ::25, ::12] = 1
    scan = Volume(array, Geometry(shape, oblique((0.9, 0.9, 2.0))))
    lesions = label_lesions(mask, scan.geometry)
    options = {"case_id": "a", "label_names": {1: "speck"}, "unit": "a.u."}
    rows = measure_lesions(segmented(scan, lesions, **options))
    assert len(rows) > 1000
    case = CaseRow(case_id="a", status="done", n_lesions=len(rows))
    with ResultsFolder(tmp_path, "measure") as results, results.staged() as commit:
        page_files(case, rows[:1], scan, lesions.ids, unit="a.u.")  # also packs NiiVue
        tracemalloc.start()
        commit.write_all(page_files(case, rows, scan, lesions.ids, unit="a.u."))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        commit.finish()
    page = tmp_path / "viewer" / "a.html"
    assert PAGE / 2 < peak < PAGE
    assert page.stat().st_size <= 6_000_000
    assert f"Showing the first 1000 of {len(rows)} lesions" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_report_html_lists_the_largest_lesions_in_the_memory_that_is_planned_for_it(tmp_path):
    """Memory does not grow with the number of lesions of all cases."""
    geometry = grid_around(12, oblique((1.0, 1.2, 2.0)))
    mask = ball(6, geometry).astype(np.uint8)
    scan = Volume(
        np.random.default_rng(0).normal(30, 10, geometry.shape).astype(np.int16), geometry
    )
    names = {1: "a label of some length"}
    lesions = label_lesions(mask, geometry)
    (row,) = measure_lesions(segmented(scan, lesions, case_id="a", label_names=names))
    most, n = 1000, 2500
    with ResultsFolder(tmp_path, "measure") as results:
        for name in "abc":
            case = CaseRow(case_id=name, status="done", n_lesions=n, total_volume_ml=1.0)
            rows = (
                replace(row, case_id=name, lesion_id=number, volume_ml=1 / number)
                for number in range(1, n + 1)
            )
            with results.staged() as commit:
                results.commit(CaseRecord(case=case, lesions=rows), commit)
        rows = results.item_rows()
        about = About(command="measure")
        write_report(results, about, rows, most=10)  # also reads the templates
        tracemalloc.start()
        assert write_report(results, about, rows, most=most) == []
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < REPORT * most / LISTED
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    remark = "The 1 000 largest of 7 500 lesions are listed and plotted; lesions.csv has them all."
    assert remark in page
    (content,) = re.findall(r'id="lesions-data">(.*?)</script>', page, flags=re.DOTALL)
    columns = [column["name"] for column in json.loads(content)["columns"]]
    listed = {
        tuple(line[columns.index(name)] for name in ("case_id", "lesion_id"))
        for line in json.loads(content)["rows"]
    }
    largest = {(name, number) for name in "abc" for number in range(1, 335)}
    assert listed == largest - {("b", 334), ("c", 334)}


def test_pages_of_complete_cases_keep_to_the_memory_budget(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU", pages=False)
    report = volseg.measure(cases=cases, out=out, intensity_unit="HU", max_ram="1M")
    assert list(report.kept) == ["a", "c"]
    assert pages(out) == []
    warnings = [text for text in report.warnings if text.startswith("W_PAGE")]
    assert [text.split(" ")[1] for text in warnings] == ["a:", "c:", "report.html"]
    assert all("the budget is 0.00 GB" in text and "--no-report" in text for text in warnings)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "report.html lists no lesions" in page and "<strong>b</strong>" in page
    enough = max((re.search(r"--max-ram (\S+),", text)[1] for text in warnings), key=amount)
    texts = []
    report = volseg.measure(
        cases=cases, out=out, intensity_unit="HU", max_ram=enough, announce=texts.append
    )
    assert not any(text.startswith("W_PAGE") for text in report.warnings)
    assert len(pages(out)) == 4 and "lists no lesions" not in (out / "report.html").read_text(
        encoding="utf-8"
    )
    assert any("for the page of a" in text for text in texts)


def test_a_call_that_finds_all_done_leaves_every_page_alone(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.html")}
    assert list(volseg.measure(cases=cases, out=out, intensity_unit="HU").kept) == ["a", "c"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.html")} == before


def test_pages_can_be_left_out_and_are_added_later_without_measuring_again(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU", pages=False)
    assert not (out / "viewer").exists()
    assert not (out / "report.html").exists()
    report = volseg.measure(cases=cases, out=out, intensity_unit="HU")
    assert list(report.kept) == ["a", "c"]
    assert len(pages(out)) == 4
    volseg.measure(cases=cases, out=tmp_path / "at_once", intensity_unit="HU")
    for name in pages(out):
        assert (out / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    # Pages that are gone are made again from what is there, and nothing else is.
    whole = (out / "viewer" / "a.html").read_bytes()
    (out / "viewer" / "a.html").write_text("changed by hand")
    with pytest.raises(VolsegError, match=r"viewer/a\.html: already exists"):
        volseg.measure(cases=cases, out=out, intensity_unit="HU")
    (out / "viewer" / "a.html").unlink()
    (out / "viewer" / "c.html").unlink()
    assert list(volseg.measure(cases=cases, out=out, intensity_unit="HU").kept) == ["a", "c"]
    assert (out / "viewer" / "a.html").read_bytes() == whole
    assert len(pages(out)) == 4


def test_a_run_on_scans_that_were_moved_does_nothing_but_learn_where_they_are(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    shutil.copytree(cases.parent, tmp_path / "moved", ignore=shutil.ignore_patterns("out"))
    for path in cases.parent.glob("*.nii.gz"):
        path.unlink()
    assert list(
        volseg.measure(cases=tmp_path / "moved" / "cases.csv", out=out, intensity_unit="HU").kept
    ) == ["a", "c"]
    assert record(out, "a")["source"]["scan"] == str(tmp_path / "moved" / "a.nii.gz")
    assert list(volseg.report(out).done) == ["a", "c"]


def test_outlines_that_were_edited_are_not_shown_beside_older_numbers(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    shutil.copy(out / "lesion_ids" / "c.nii.gz", out / "lesion_ids" / "a.nii.gz")
    report = volseg.report(out)
    assert (list(report.done), list(report.kept)) == (["c"], ["a"])
    assert "was changed since the case was measured" in report.warnings[0]


def test_results_and_comparisons_do_not_overwrite_each_other(cases, tmp_path):
    volseg.measure(cases=cases, out=tmp_path / "out", intensity_unit="HU")
    volseg.measure(cases=cases, out=tmp_path / "again", intensity_unit="HU")
    volseg.compare(
        tmp_path / "out", tmp_path / "again", out=tmp_path / "compared", registration=False
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(VolsegError, match="holds the results of measure"):
        volseg.compare(
            tmp_path / "out", tmp_path / "out", out=tmp_path / "again", registration=False
        )
    with pytest.raises(VolsegError, match="holds a comparison"):
        volseg.measure(cases=cases, out=tmp_path / "compared", intensity_unit="HU")
    with pytest.raises(VolsegError, match="is not a results folder"):
        volseg.report(tmp_path / "compared")
    assert {path: path.read_bytes() for path in before} == before


def test_an_interrupted_run_has_its_page_with_what_is_pending(cases, tmp_path):
    def stop(stage, fraction, detail):
        if detail == "a":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        volseg.measure(cases=cases, out=tmp_path / "out", intensity_unit="HU", progress=stop)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Not processed yet: 2 scans." in page
    assert '["a"]</script>' in page
    volseg.report(tmp_path / "out")  # without run.json; pending cases come from cases.csv
    assert "Not processed yet: 2 scans." in (tmp_path / "out" / "report.html").read_text(
        encoding="utf-8"
    )
    volseg.measure(cases=cases, out=tmp_path / "out", intensity_unit="HU")
    assert "Not processed yet" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_folder_gives_the_same_pages_again(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    before = {path: path.read_bytes() for path in (*out.rglob("*.html"), *out.rglob("*.jpg"))}
    shutil.rmtree(out / "viewer")
    (out / "report.html").unlink()
    report = volseg.report(out)
    assert (report.exit_code, list(report.done), list(report.kept)) == (0, ["a", "c"], [])
    for path, content in before.items():
        assert path.read_bytes() == content
    assert list(volseg.measure(cases=cases, out=out, intensity_unit="HU").kept) == ["a", "c"]


def test_if_a_scan_is_gone_or_changed_the_earlier_page_stays_and_the_report_says_so(
    cases, tmp_path
):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    before = (out / "viewer" / "a.html").read_bytes()
    (cases.parent / "a.nii.gz").unlink()
    shutil.copy(cases.parent / "a_mask.nii.gz", cases.parent / "c.nii.gz")
    (out / "viewer" / "c.html").unlink()
    report = volseg.report(out)
    assert (list(report.done), list(report.kept)) == ([], ["a", "c"])
    assert (out / "viewer" / "a.html").read_bytes() == before
    page = (out / "report.html").read_text(encoding="utf-8")
    problem = "its scan a.nii.gz was moved or deleted; the earlier page stays."
    assert f"The page of a could not be rebuilt: {problem}" in page
    problem = "its scan c.nii.gz has changed since, so it has no page."
    assert f"The page of c could not be rebuilt: {problem}" in page
    assert list(report.warnings) == [line for line in report.warnings if line in page]


def test_only_a_results_folder_has_a_report(tmp_path):
    with pytest.raises(VolsegError, match="nowhere: does not exist"):
        volseg.report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolsegError, match="is not a results folder"):
        volseg.report(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_a_case_that_fails_later_is_shown_as_failed_and_its_files_stay(cases, tmp_path):
    out = tmp_path / "out"
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    (cases.parent / "a.nii.gz").write_bytes(b"")
    volseg.measure(cases=cases, out=out, intensity_unit="HU")
    assert len(pages(out)) == 4
    assert '<script type="application/json" id="pages">["c"]</script>' in (
        out / "report.html"
    ).read_text("utf-8")
    with (out / "cases.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["failed", "failed", "done"]
    assert "2 of 3 scans failed" in (out / "report.html").read_text(encoding="utf-8")
