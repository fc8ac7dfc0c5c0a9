"""`volseg check --out`: a row and a picture for each scan of a dataset, also for broken ones."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_files import NAME, write_series
from PIL import Image
from quality_phantoms import Patient, dataset, with_array
from typer.testing import CliRunner

import volseg
from volseg.cli import app
from volseg.errors import VolsegError
from volseg.io.volumes import write_volume
from volseg.pages.about import About
from volseg.pages.quality_page import quality_page
from volseg.pages.quality_sheet import MAX_SHEETS, PER_SHEET, Tile, quality_sheets, thumbnail
from volseg.quality.flags import FLAGS
from volseg.quality.scan import judge_scan

CASES = 9
BROKEN, REPEATED = "p2", "p4"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Nine scans: one is truncated, one has a slice twice."""
    folder = tmp_path_factory.mktemp("scans")
    for number, scan in enumerate(dataset()[:CASES]):
        path = folder / f"p{number}.nii.gz"
        if path.name.startswith(REPEATED):
            array = scan.array.copy()
            array[:, :, 9] = array[:, :, 8]
            scan = with_array(scan, array)
        write_volume(scan, path)
        if path.name.startswith(BROKEN):
            path.write_bytes(path.read_bytes()[:2000])
    return folder


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def test_every_scan_has_a_row_and_a_broken_one_says_why(scans, tmp_path):
    stages = []
    problems = volseg.check(scans, out=tmp_path / "q", progress=lambda *step: stages.append(step))
    table = rows(tmp_path / "q" / "quality.csv")
    assert list(table) == [f"p{number}" for number in range(CASES)]
    assert table[BROKEN]["status"] == "failed"
    assert table[BROKEN]["reason"].startswith("E_TRUNCATED: ")
    assert str(scans) not in table[BROKEN]["reason"]
    assert table[REPEATED]["flags"] == "W_EQUAL_SLICES"
    sound = [name for name in table if name not in (BROKEN, REPEATED)]
    assert {table[name]["flags"] for name in sound} == {""}
    listed = [(problem["where"], problem["code"]) for problem in problems]
    assert listed == [(BROKEN, "E_TRUNCATED"), (REPEATED, "W_EQUAL_SLICES")]
    assert stages[-1] == ("Checking", 1.0, f"p{CASES - 1}")
    frame = volseg.read_table(tmp_path / "q" / "quality.csv")
    assert frame["size_s"].dropna().unique().tolist() == [30]
    with Image.open(tmp_path / "q" / "quality.png") as sheet:
        assert sheet.width > sheet.height > 400 and not sheet.info


def test_the_page_says_what_the_table_says(scans, tmp_path):
    volseg.check(scans, out=tmp_path / "q")
    table = rows(tmp_path / "q" / "quality.csv")
    page = (tmp_path / "q" / "quality.html").read_text(encoding="utf-8")
    assert f"volseg checked the quality of {CASES} scans: look at 2 of them." in page
    assert f"<li><strong>{BROKEN}</strong>: <code>E_TRUNCATED</code>" in page
    assert f"(1 scan: {REPEATED})" in page and "<code>W_EQUAL_SLICES</code>" in page
    content = json.loads(island(page, "scans-data"))
    names = [column["name"] for column in content["columns"]]
    shown = {line[0]: dict(zip(names, line, strict=True)) for line in content["rows"]}
    assert list(shown)[:2] == [BROKEN, REPEATED] and shown.keys() == table.keys()
    for name, line in shown.items():
        for column in ("flags", "modality", "axes"):
            assert (line[column] or "") == table[name][column]
        for column in ("snr", "noise_sd", "spacing_s_mm", "size_a", "median"):
            stated = float(table[name][column]) if table[name][column] else None
            assert line[column] == (None if stated is None else pytest.approx(stated, rel=1e-3))
    assert json.loads(island(page, "pictures")).keys() == table.keys() - {BROKEN}


def test_the_page_tells_channels_apart():
    scan = dataset()[0]
    tiles = []
    for channel in ("t1", "t2"):
        row = judge_scan(scan, case_id="p1", channel=channel).row
        tiles.append(Tile(row, thumbnail(scan, row)))
    page = quality_page(About(command="check"), tiles).html()
    assert json.loads(island(page, "pictures")).keys() == {"p1 (t1)", "p1 (t2)"}
    assert "none of them has a flag" in page


@pytest.mark.parametrize(("step_mm", "is_plotted"), [(1e-5, False), (0.5, True)])
def test_what_differs_by_rounding_alone_is_not_plotted(step_mm, is_plotted):
    row = judge_scan(dataset()[0], case_id="p").row
    rows = [replace(row, case_id=f"p{n}", spacing_s_mm=3.27 + n * step_mm) for n in range(6)]
    page = quality_page(About(command="check"), [Tile(row, None) for row in rows]).html()
    assert ("Spacing along S" in page) == is_plotted


def island(page: str, name: str) -> str:
    """Return the JSON that a page holds under this id."""
    match = re.search(rf'id="{name}"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert match is not None, name
    return match[1]


def test_without_out_the_quality_is_not_judged(scans):
    assert [problem["code"] for problem in volseg.check(scans)] == ["E_TRUNCATED"]


def test_the_command_line_names_the_files_and_a_second_call_replaces_them(scans, tmp_path):
    out = tmp_path / "q"
    for _ in range(2):
        result = CliRunner().invoke(app, ["check", str(scans), "--out", str(out)])
        assert result.exit_code == 2  # a scan is damaged
    assert f"{out / 'quality.csv'}: a row per scan" in result.output
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "quality.csv",
        "quality.html",
        "quality.png",
    ]
    (out / "quality.csv").write_text("mine")
    with pytest.raises(VolsegError, match=r"quality\.csv: already exists"):
        volseg.check(scans, out=out)
    assert (out / "quality.csv").read_text() == "mine"


@pytest.mark.parametrize("path", ["smoke"])
def test_what_holds_no_scan_is_refused(path, tmp_path):
    with pytest.raises(VolsegError, match="no 3D scans") as caught:
        volseg.check(path, out=tmp_path / "q")
    assert caught.value.code == "E_USAGE" and not (tmp_path / "q").exists()


def test_a_single_scan_has_a_row_too(scans, tmp_path):
    assert volseg.check(scans / "p0.nii.gz", out=tmp_path / "q") == []
    (row,) = rows(tmp_path / "q" / "quality.csv").values()
    assert (row["case_id"], row["status"], row["image"]) == ("p0", "done", "p0.nii.gz")


def test_nothing_of_a_patient_is_written_and_a_series_has_its_modality(tmp_path):
    study = tmp_path / NAME
    for number in range(2):
        scan = Patient(seed=number, shape=(40, 40, 12), spacing_mm=(4.5, 4.5, 5)).scan()
        write_series(scan, study / f"{NAME}{number}")
    files = sorted((study / f"{NAME}1").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-500])
    problems = volseg.check(study, out=tmp_path / "q")
    table = rows(tmp_path / "q" / "quality.csv")
    assert sorted(row["status"] for row in table.values()) == ["done", "failed"]
    (done,) = (row for row in table.values() if row["status"] == "done")
    assert done["modality"] == "CT" and done["case_id"] == done["image"] and problems
    for path in (tmp_path / "q").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert NAME.encode() not in content and b"Thorax" not in content, path
            assert not re.search(rb"1\.2\.826\.0\.1|19611111|20111111", content), path


@pytest.mark.slow
def test_sheets_show_flagged_scans_first_if_there_are_too_many():
    scan = dataset()[0]
    row = judge_scan(scan, case_id="sound").row
    picture = thumbnail(scan, row)
    with Image.open(io.BytesIO(picture)) as image:
        assert max(image.size) == 200
        assert image.width / image.height == pytest.approx(52 / 46, rel=0.02)
    flagged = replace(row, flags="W_CUT")
    many = [Tile(row, picture)] * (MAX_SHEETS * PER_SHEET) + [Tile(flagged, None)]
    sheets = quality_sheets(many)
    assert len(sheets) == MAX_SHEETS
    assert sheets[0] == quality_sheets([Tile(flagged, None), *many[: PER_SHEET - 1]])[0]
    assert len(quality_sheets(many[: PER_SHEET + 1])) == 2


def test_many_scans_with_one_flag_are_one_line(tmp_path):
    scan = Patient(seed=0, shape=(20, 20, 8)).scan()
    for number in range(22):
        array = scan.array + (number % 2)
        array[:, :, 4] = array[:, :, 3]
        write_volume(with_array(scan, array), tmp_path / f"s{number:02}.nii.gz")
    problems = volseg.check(tmp_path, out=tmp_path / "q" / "out")
    (equal,) = (problem for problem in problems if problem["code"] == "W_EQUAL_SLICES")
    assert equal["problem"].startswith("22 of 22 scans: s00, s01, s02, s03, s04 and 17 more; ")


def test_the_page_of_the_documentation_has_each_flag_with_its_rule():
    page = (Path(__file__).parents[2] / "docs" / "quality.md").read_text(encoding="utf-8")
    for flag in FLAGS:
        assert f"| `{flag.code}` | {flag.rule} | {flag.fix} |" in page


def test_arrays_are_judged_with_their_spacing(tmp_path):
    (tmp_path / "arrays").mkdir()
    for number, scan in enumerate(dataset()[:3]):
        np.save(tmp_path / "arrays" / f"p{number}.npy", scan.array)
    problems = volseg.check(tmp_path / "arrays", spacing="4,4,5", out=tmp_path / "q")
    assert [problem["code"] for problem in problems] == ["N_SPACING"]
    table = rows(tmp_path / "q" / "quality.csv")
    assert [(row["case_id"], row["image"], row["spacing_s_mm"]) for row in table.values()] == [
        (f"p{number}", f"p{number}.npy", "5") for number in range(3)
    ]
    with pytest.raises(VolsegError, match="--spacing must be three lengths"):
        volseg.check(tmp_path / "arrays", spacing="4,4")


def test_the_row_and_page_of_a_measured_scan_warn_of_repeated_slices(scans, tmp_path):
    scan = dataset()[4]
    mask = np.zeros(scan.array.shape, np.uint8)
    mask[20:24, 20:24, 5:15] = 1
    write_volume(with_array(scan, mask), tmp_path / "mask.nii.gz")
    volseg.measure(
        image=scans / f"{REPEATED}.nii.gz",
        mask=tmp_path / "mask.nii.gz",
        intensity_unit="HU",
        out=tmp_path / "r",
    )
    (row,) = rows(tmp_path / "r" / "cases.csv").values()
    assert row["warnings"].startswith("W_EQUAL_SLICES: 1 pair")
    assert "W_EQUAL_SLICES" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
