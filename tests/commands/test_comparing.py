import csv
import io
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from laws import GRIDS, ball, centre_mm, grid_around, orientations
from two_times import change_record, draw, grid, measured, movement
from typer.testing import CliRunner

import volseg
from volseg.cli import app
from volseg.commands import comparing
from volseg.comparison.changes import LesionChange
from volseg.errors import VolsegError
from volseg.io.files import sha256_of
from volseg.pages.comparison_figures import change_png
from volseg.store.records import read_record
from volseg.volume import Geometry, Volume


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(out):
    """Read the rows of patients by name, and the rows of lesions of each patient."""
    lesions = {}
    for row in rows(out / "comparison.csv"):
        lesions.setdefault(row["patient"], []).append(row)
    return {row["patient"]: row for row in rows(out / "response.csv")}, lesions


def on_page(page, table):
    """Read the rows of a table of report.html, as its script does."""
    island = re.search(
        rf'id="{table}-data">(.*?)</script>', page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    content = json.loads(island[1])
    names = [column["name"] for column in content["columns"]]
    return [dict(zip(names, row, strict=True)) for row in content["rows"]]


def fates(lesions):
    names = ("status", "baseline_lesion_id", "followup_lesion_id")
    return sorted(tuple(row[name] for name in names) for row in lesions)


def scan_of(geometry, balls):
    """Draw balls of 60 HU, (offset from the middle, radius in mm), in tissue of 20 HU."""
    mask = np.zeros(geometry.shape, np.uint8)
    for offset, radius in balls:
        mask[ball(radius, geometry, centre_mm(geometry) + offset)] = 1
    noise = np.random.default_rng(0).integers(-9, 10, geometry.shape)
    array = np.where(mask, 60, 20).astype(np.int16) + noise.astype(np.int16)
    return Volume(array, geometry), Volume(mask, geometry)


def around(spacing, make, radius=32):
    """Return a grid centred on the origin."""
    affine = make(spacing)
    shape = grid_around(radius, affine).shape
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


GRID = around((1.5, 1.5, 2.0), GRIDS["lps"])
LARGE, SMALL, FAR = ((-12, 0, 0), 11), ((16, 8, 4), 6), ((0, -10, 24), 5)
TIMES = {  # patient: at baseline, at follow-up, response
    "grows": ([LARGE, SMALL], [(LARGE[0], 15.5), SMALL], "PD"),
    "shrinks": ([LARGE, SMALL], [(LARGE[0], 6), (SMALL[0], 3.5)], "PR"),
    "stays": ([LARGE, SMALL], [LARGE, SMALL], "SD"),
    "vanishes": ([LARGE], [], "CR"),
    "new": ([LARGE], [LARGE, FAR], "PD"),
    "never": ([], [], "NE"),
}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return measured(
        tmp_path_factory.mktemp("baseline"),
        {name: scan_of(GRID, before) for name, (before, _, _) in TIMES.items()},
    )


@pytest.mark.parametrize(
    "make",
    [pytest.param(GRIDS["ras"], id="ras", marks=pytest.mark.slow), GRIDS["oblique"]],
)
def test_growth_shrinkage_and_what_is_new_or_gone_on_any_grid(baseline, make, tmp_path):
    geometry = around((1.8, 1.3, 1.6), make)
    scans = {name: scan_of(geometry, after) for name, (_, after, _) in TIMES.items()}
    followup = measured(tmp_path / "later", scans)
    report = volseg.compare(baseline, followup, out=tmp_path / "out", registration=False)
    assert report.exit_code == 0
    patients, lesions = tables(tmp_path / "out")
    assert {name: row["response"] for name, row in patients.items()} == {
        name: t[2] for name, t in TIMES.items()
    }
    large, small = lesions["grows"]
    assert float(large["change_volume_percent"]) == pytest.approx(
        100 * ((15.5 / 11) ** 3 - 1), abs=8
    )
    assert float(large["change_long_axis_mm"]) == pytest.approx(9, abs=1)
    assert abs(float(small["change_volume_percent"])) < 6
    assert float(large["change_intensity_mean"]) == pytest.approx(0, abs=0.6)
    assert fates(lesions["vanishes"]) == [("gone", "1", "")]
    assert fates(lesions["new"]) == [("matched", "1", "1"), ("new", "", "2")]
    assert "never" not in lesions
    assert patients["vanishes"]["change_volume_percent"] == "-100"
    assert float(patients["shrinks"]["change_sum_percent"]) == pytest.approx(
        100 * (9.5 / 17 - 1), abs=4
    )
    shown = {
        row["patient"]: row["response"]
        for row in on_page(tmp_path / "out" / "report.html", "patients")
    }
    assert shown == {name: row["response"] for name, row in patients.items()}
    changes = on_page(tmp_path / "out" / "report.html", "changes")
    assert sorted(row["status"] for row in changes) == sorted(
        row["status"] for of_patient in lesions.values() for row in of_patient
    )


def test_a_scan_compared_with_itself_has_not_changed(baseline, tmp_path):
    report = volseg.compare(baseline, baseline, out=tmp_path / "out", registration=False)
    assert report.exit_code == 0
    patients, lesions = tables(tmp_path / "out")
    for row in (row for of_patient in lesions.values() for row in of_patient):
        assert (row["status"], row["dice"], row["distance_mm"]) == ("matched", "1", "0")
        assert row["baseline_lesion_id"] == row["followup_lesion_id"]
        assert {
            row[f"change_{name}"]
            for name in ("volume_ml", "volume_percent", "long_axis_mm", "intensity_mean")
        } == {"0"}
    for case in rows(baseline / "cases.csv"):
        assert patients[case["case_id"]]["baseline_sum_mm"] == (
            case["sum_long_axis_mm"] if case["n_lesions"] != "0" else ""
        )
    responses = {name: row["response"] for name, row in patients.items()}
    assert responses.pop("never") == "NE"
    assert set(responses.values()) == {"SD"}


@pytest.mark.parametrize("shift_mm", [(0, 0, 1000), (0, 0, -60), (-90, 0, 0), (300, 300, 300)])
def test_scans_that_do_not_overlap_in_the_world_have_no_response(shift_mm, tmp_path):
    """The same scan and mask, and a header that puts the patient elsewhere."""
    scan, mask = scan_of(GRID, [LARGE, SMALL])
    affine = GRID.affine.copy()
    affine[:3, 3] += shift_mm
    geometry = Geometry(scan.array.shape, affine)
    moved = Volume(scan.array, geometry), Volume(mask.array, geometry)
    before = measured(tmp_path / "a", {"p": (scan, mask)})
    after = measured(tmp_path / "b", {"p": moved})
    for first, second in ((before, after), (after, before)):
        out = tmp_path / f"from_{first.parent.name}"
        volseg.compare(first, second, out=out, registration=False)
        row = tables(out)[0]["p"]
        overlaps = max(map(abs, shift_mm)) < 65
        assert (row["response"], row["volume_response"]) == (("PD", "PD") if overlaps else ("", ""))
        rule = "nowhere overlap in world coordinates: compare without --no-reg"
        assert (rule in row["response_rule"]) != overlaps
        assert ("W_APART: " in row["warnings"]) != overlaps
        assert ("count as new" in row["warnings"]) == overlaps


@pytest.mark.parametrize("unit", [None, "a.u.", "Bq/mL"])
def test_no_intensity_is_compared_in_a_unit_in_doubt_or_without_a_common_scale(unit, tmp_path):
    scan, mask = scan_of(GRID, [LARGE])
    air = scan.array.copy()
    air[:5] -= 1000  # so that HU is guessed
    scan = scan.with_array(air)
    one, other = (measured(tmp_path / name, {"p": (scan, mask)}, unit=unit) for name in ("a", "b"))
    report = volseg.compare(one, other, out=tmp_path / "out", registration=False)
    (patient,), (row,) = (
        rows(tmp_path / "out" / f"{name}.csv") for name in ("response", "comparison")
    )
    assert row["baseline_intensity_mean"] == row["followup_intensity_mean"] != ""
    assert (row["change_intensity_mean"] == "0") == (unit == "Bq/mL")
    assert row["intensity_unit"] == (unit or "")
    for time in ("baseline", "follow-up"):
        note = f"intensity: its unit at {time} is in doubt (no --unit given; "
        assert (note in row["notes"]) == (unit is None)
        warning = f"W_UNIT: the unit at {time} was in doubt when it was measured (no --unit given; "
        assert (warning in patient["warnings"]) == (unit is None)
    warnings = [text for text in report.warnings if "W_UNIT" in text]
    assert [text.split(",")[0] for text in warnings] == (
        ["W_UNIT: no intensity is compared for 1 patient"] if unit is None else []
    )
    assert ("a.u. has no common scale" in row["notes"]) == (unit == "a.u.")


def test_exchanged_folders_exchange_new_and_gone_and_merged_and_split(tmp_path):
    later = around((1.8, 1.4, 1.5), GRIDS["oblique"])
    apart = [((-6, 0, 0), 5), ((7, 0, 0), 4), ((0, 20, 0), 5)]
    joined = [((0, 0, 0), 13), ((0, -22, 0), 5)]
    one = measured(tmp_path / "one", {"p": scan_of(GRID, apart)})
    other = measured(tmp_path / "other", {"p": scan_of(later, joined)})
    volseg.compare(one, other, out=tmp_path / "forward", registration=False)
    volseg.compare(other, one, out=tmp_path / "backward", registration=False)
    forward, lesions = tables(tmp_path / "forward")
    backward, exchanged = tables(tmp_path / "backward")
    # The lesions of 5 mm are numbered by position, so the one at the back is the first of them.
    forward_fates = fates(lesions["p"])
    assert [status for status, _, _ in forward_fates] == ["gone", "merged", "merged", "new"]
    swap = {"merged": "split", "new": "gone", "gone": "new"}
    assert fates(exchanged["p"]) == sorted((swap[status], f, b) for status, b, f in forward_fates)
    counts = [
        (row["n_merged"], row["n_split"], row["n_new"], row["n_gone"])
        for row in (forward["p"], backward["p"])
    ]
    assert counts == [("2", "0", "1", "1"), ("0", "1", "1", "1")]
    merged, split = (
        next(row for row in of_patient["p"] if row["status"] == status and row["change_volume_ml"])
        for of_patient, status in ((lesions, "merged"), (exchanged, "split"))
    )
    assert float(merged["change_volume_ml"]) == pytest.approx(-float(split["change_volume_ml"]))


def test_axis_orders_of_the_later_scan_do_not_matter(tmp_path):
    scan, mask = scan_of(around((1.8, 1.3, 1.6), GRIDS["oblique"]), [(LARGE[0], 13), SMALL, FAR])
    stored = list(zip(orientations(scan), orientations(mask), strict=True))[::13]
    cases = {
        f"order_{n}": (Volume(a, Geometry(a.shape, affine)), Volume(m, Geometry(m.shape, affine)))
        for n, ((a, affine), (m, _)) in enumerate(stored)
    }
    one = measured(tmp_path / "one", {"p": scan_of(GRID, [LARGE, SMALL])})
    other = measured(tmp_path / "other", cases)
    (tmp_path / "pairs.csv").write_text(
        "patient,baseline,followup\n" + "".join(f"{n},p,{n}\n" for n in cases)
    )
    volseg.compare(
        one, other, out=tmp_path / "out", pairs=tmp_path / "pairs.csv", registration=False
    )
    patients, lesions = tables(tmp_path / "out")
    assert len(patients) == len(stored) == 4

    # Files hold affines in single precision, so positions agree to a few nanometres only.
    nearly = ["dice", "distance_mm"]
    nearly += [f"{time}_centroid_{axis}_mm" for time in ("baseline", "followup") for axis in "ras"]

    def same(row):
        return {
            name: value
            for name, value in row.items()
            if name not in ("patient", "followup_case", "seconds", *nearly)
        }

    def numbers(row):
        return [float(row[name] or "nan") for name in nearly]

    assert [same(row) for row in patients.values()] == [same(patients["order_0"])] * 4
    for of_patient in lesions.values():
        assert [same(row) for row in of_patient] == [same(row) for row in lesions["order_0"]]
        for row, expected in zip(of_patient, lesions["order_0"], strict=True):
            assert numbers(row) == pytest.approx(numbers(expected), abs=1e-3, nan_ok=True)


BEFORE = [((25, 5, 10), 9), ((-22, 8, -10), 7), ((20, 12, -14), 6)]
AFTER = [((25, 5, 10), 11.5), ((20, 12, -14), 6), ((-26, -2, 12), 6)]


@pytest.mark.slow
def test_a_patient_who_moved_is_compared_as_one_who_did_not(tmp_path):
    """Motion of 7° and 12 mm on another grid gives the rows of a still patient, and a picture."""
    later = grid("PSR", (1.6, 1.8, 2.0), tilt_deg=9)
    one = measured(tmp_path / "one", {"p": draw(grid("RAS"), BEFORE)})
    scan, mask = draw(later, AFTER, movement(7, (8.0, -6.0, 6.6)), seed=1)
    values = scan.array.astype(np.float32)
    values[0, 0, 0] = np.nan  # `measure` accepts NaN
    moved = measured(tmp_path / "moved", {"p": (scan.with_array(values), mask)})
    still = measured(tmp_path / "still", {"p": draw(later, AFTER, seed=1)})
    scans = {
        "baseline_scans": tmp_path / "one" / "scans",
        "followup_scans": tmp_path / "moved" / "scans",
    }
    report = volseg.compare(one, moved, out=tmp_path / "out", figures=True, **scans)
    assert report.exit_code == 0
    volseg.compare(one, still, out=tmp_path / "expected", registration=False)
    patients, lesions = tables(tmp_path / "out")
    expected, without_motion = tables(tmp_path / "expected")
    row = patients["p"]
    assert fates(lesions["p"]) == fates(without_motion["p"])
    assert sorted({status for status, _, _ in fates(lesions["p"])}) == ["gone", "matched", "new"]
    # The distance of a lesion to itself is the error of registration, plus a few tenths of a voxel.
    assert max(float(r["distance_mm"]) for r in lesions["p"] if r["distance_mm"]) < 1.0
    assert (row["registration"], row["warnings"]) == ("rigid", "")
    assert row["response"] == expected["p"]["response"]
    assert 5 < float(row["moved_mm"]) < 20
    assert float(row["turned_deg"]) == pytest.approx(7, abs=0.8)
    assert float(row["registration_error_mm"]) < 2
    assert float(row["similarity_after"]) > float(row["similarity_before"])
    tolerances = {"change_volume_ml": 0.2, "change_long_axis_mm": 1.6}  # 1.6 mm is a voxel
    for row, still_row in zip(lesions["p"], without_motion["p"], strict=True):
        for name, tolerance in tolerances.items():
            assert float(row[name]) == pytest.approx(float(still_row[name]), abs=tolerance)
    picture = matplotlib.image.imread(tmp_path / "out" / "figures" / "p.png")[..., :3]
    for colour in ((0.3, 0.83, 0.3), (1.0, 0.55, 0.2)):
        assert (np.abs(picture - colour).max(axis=-1) < 0.15).sum() > 100
    # Without registration the lesions are elsewhere.
    volseg.compare(one, moved, out=tmp_path / "blind", registration=False)
    blind = tables(tmp_path / "blind")[1]["p"]
    assert max(float(r["distance_mm"]) for r in blind if r["distance_mm"]) > 5


@pytest.mark.slow
def test_the_row_warns_of_a_registration_that_cannot_be_trusted(tmp_path):
    geometry = Geometry((32, 32, 20), GRIDS["ras"]((2.0, 2.0, 3.0)))
    cases = []
    for seed in (0, 1):
        noise = np.random.default_rng(seed).normal(0, 100, geometry.shape).astype(np.int16)
        mask = ball(8, geometry, centre_mm(geometry)).astype(np.uint8)
        cases.append(
            measured(tmp_path / str(seed), {"p": (Volume(noise, geometry), Volume(mask, geometry))})
        )
    volseg.compare(
        *cases,
        out=tmp_path / "out",
        baseline_scans=tmp_path / "0" / "scans",
        followup_scans=tmp_path / "1" / "scans",
    )
    row = tables(tmp_path / "out")[0]["p"]
    assert row["status"] == "failed" or "W_REGISTRATION" in row["warnings"]
    assert row["response"] == ""  # matches may be wrong


def test_the_same_scan_is_not_registered_however_it_is_packed(baseline, tmp_path):
    scans = tmp_path / "elsewhere" / "deep"
    shutil.copytree(baseline.parent / "scans", scans)
    import nibabel

    image = nibabel.load(scans / "stays.nii.gz")
    image.header["descrip"] = b"packed again"
    nibabel.save(image, scans / "stays.nii.gz")
    options = {
        "baseline_scans": baseline.parent / "scans",
        "followup_scans": tmp_path / "elsewhere",
    }
    volseg.compare(baseline, baseline, out=tmp_path / "out", **options)
    patients, _ = tables(tmp_path / "out")
    assert {name: row["registration"] for name, row in patients.items()} == dict.fromkeys(
        TIMES, "identical"
    ) | {"never": ""}
    warned = {
        name: row["warnings"] for name, row in patients.items() if "W_SCAN" in row["warnings"]
    }
    assert list(warned) == ["stays"]
    assert "the follow-up scan stays.nii.gz is not the file that was measured" in warned["stays"]
    (scans.parent / "other").mkdir()
    shutil.copy(scans / "grows.nii.gz", scans.parent / "other")
    report = volseg.compare(baseline, baseline, out=tmp_path / "again", **options)
    assert list(report.failed) == ["grows"]
    assert "has 2 files 'grows.nii.gz'" in report.failed["grows"]


def test_scans_are_found_through_the_record_and_without_any_the_error_says_what_to_do(
    baseline, tmp_path
):
    results = tmp_path / "results"
    shutil.copytree(baseline, results)
    report = volseg.compare(results, results, out=tmp_path / "out")
    assert set(report.done) == set(TIMES)
    with_lesions = set(TIMES) - {"never"}  # scans without lesions need no registration
    for name in TIMES:
        change_record(results, name, lambda record: record.pop("source"))
    report = volseg.compare(results, results, out=tmp_path / "without")
    assert (set(report.failed), report.exit_code) == (with_lesions, 3)
    assert "E_MISSING" in report.failed["stays"]
    fix = "give its folder to --baseline-scans, or --no-registration"
    assert fix in report.failed["stays"]
    for name in TIMES:
        path = baseline.parent / "scans" / f"{name}.nii.gz"
        change_record(
            results, name, lambda record, path=path: record.update(source={"scan": str(path)})
        )
    report = volseg.compare(results, results, out=tmp_path / "with")
    assert report.exit_code == 0
    assert tables(tmp_path / "with")[0]["stays"]["registration"] == "identical"


def test_scans_without_partner_and_cases_that_failed_are_rows(baseline, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(baseline, results)
    change_record(
        results,
        "grows",
        lambda record: record["case"].update(status="failed", reason="E_CRC: damaged"),
    )
    (results / ".volseg" / "shrinks.json").write_text('{"key": "cut o')
    change_record(results, "vanishes", lambda record: record["lesions"][0].pop("volume_ml"))
    (results / "lesion_ids" / "stays.nii.gz").write_bytes(b"another file")
    (results / ".volseg" / "new.json").rename(results / ".volseg" / "renamed.json")
    (results / "cases.csv").write_text("case_id,status\nrenamed,done\n")
    report = volseg.compare(baseline, results, out=tmp_path / "out", registration=False)
    assert report.exit_code == 3
    patients, _ = tables(tmp_path / "out")
    expected = dict.fromkeys(("grows", "shrinks", "stays", "vanishes"), "failed")
    expected |= {"never": "done", "new": "unpaired", "renamed": "unpaired"}
    assert {name: row["status"] for name, row in patients.items()} == expected
    assert "the follow-up case 'grows' is failed: E_CRC: damaged" in patients["grows"]["reason"]
    assert "is damaged" in patients["shrinks"]["reason"]
    assert "it lacks volume_ml" in patients["vanishes"]["reason"]
    assert "was changed since the case was measured" in patients["stays"]["reason"]
    assert patients["new"]["reason"].startswith("only a baseline scan")
    assert patients["renamed"]["baseline_case"] == ""
    assert patients["renamed"]["followup_case"] == "renamed"
    assert {row["response"] for row in patients.values() if row["status"] != "done"} == {""}
    # If the only pair fails, none succeeded.
    pairs = tmp_path / "pairs.csv"
    options = {"out": tmp_path / "one", "pairs": pairs, "registration": False}
    pairs.write_text("patient;baseline;followup\np;stays;stays\nq;;new\n")
    with pytest.raises(VolsegError, match="has no case 'new'"):
        volseg.compare(baseline, results, **options)
    pairs.write_text("patient;baseline;followup\np;stays;stays\nq;;renamed\n")
    report = volseg.compare(baseline, results, **options)
    assert report.exit_code == 4
    assert report.not_listed["followup"] == ["grows", "never", "shrinks", "vanishes"]


def test_a_table_of_pairs_names_patients_and_its_error_every_mistake(baseline, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("patient,baseline,followup,site\nann,grows,stays,1\nbob,never,,2\n")
    report = volseg.compare(
        baseline, baseline, out=tmp_path / "out", pairs=path, registration=False
    )
    assert (list(report.done), list(report.unpaired)) == (["ann"], ["bob"])
    row = tables(tmp_path / "out")[0]["ann"]
    assert (row["baseline_case"], row["followup_case"]) == ("grows", "stays")
    path.write_text(
        "patient,baseline,followup\nann,grows,none\nAnn,grows,stays\n../x,grows,stays\ncy,,\n"
    )
    with pytest.raises(VolsegError) as caught:
        volseg.compare(baseline, baseline, out=tmp_path / "bad", pairs=path, registration=False)
    for part in (
        "line 2: ",
        "no case 'none'",
        "'Ann' and 'ann' differ in upper and lower case only",
        "'../x' is not a valid file name",
        "line 5: names no case",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "bad").exists()
    path.write_text("id,baseline,followup\n")
    with pytest.raises(VolsegError, match="has no column 'patient'"):
        volseg.compare(baseline, baseline, out=tmp_path / "bad", pairs=path)


@pytest.mark.slow
def test_the_scans_of_a_patient_are_matched_one_by_one_and_judged_together(baseline, tmp_path):
    """Each pair alone would be PD, PR, CR; the response is that of all lesions together."""
    names = ("grows", "shrinks", "vanishes")
    later = measured(
        tmp_path / "later", {name: scan_of(GRID, TIMES[name][1]) for name in (*names, "new")}
    )
    path = tmp_path / "pairs.csv"
    path.write_text(
        "patient,baseline,followup\n" + "".join(f"ann,{name},{name}\n" for name in names)
    )
    options = {"pairs": path, "registration": False}
    report = volseg.compare(baseline, later, out=tmp_path / "out", figures=True, **options)
    assert (list(report.done), report.exit_code) == (["ann"], 0)
    patients, lesions = tables(tmp_path / "out")
    row = patients["ann"]
    assert (row["baseline_case"], row["followup_case"]) == (";".join(names), ";".join(names))
    assert (row["n_baseline"], row["n_matched"], row["n_gone"]) == ("5", "4", "1")
    alone = volseg.compare(
        baseline, later, out=tmp_path / "alone", figures=True, registration=False
    )
    single = {patient["patient"]: patient for patient in alone.patients}
    assert float(row["baseline_volume_ml"]) == pytest.approx(
        sum(single[name]["baseline_volume_ml"] for name in names)
    )
    assert [single[name]["response"] for name in names] == ["PD", "PR", "CR"]
    # Two lesions of a label are targets: two of the three large ones, of 22 mm each.
    assert len(row["targets"].split(";")) == 2
    assert sum(lesion["is_target"] == "true" for lesion in lesions["ann"]) == 2
    assert [lesion["group"] for lesion in lesions["ann"]] == ["1", "2", "3", "4", "5"]
    cases = ["grows", "grows", "shrinks", "shrinks", "vanishes"]
    assert [lesion["baseline_case"] for lesion in lesions["ann"]] == cases
    assert row["registration"] == "none;none;none"
    # All phantoms have the same world coordinates.
    assert "W_TWICE: at baseline grows:1 and shrinks:1" in row["warnings"]
    picture, one = (
        matplotlib.image.imread(tmp_path / path)
        for path in ("out/figures/ann.png", "alone/figures/grows.png")
    )
    assert picture.shape[:2] == (3 * one.shape[0], one.shape[1])
    shown = on_page(tmp_path / "out" / "report.html", "changes")
    assert {lesion["baseline_case"] for lesion in shown} == set(names)
    report = volseg.compare(baseline, later, out=tmp_path / "out", figures=True, **options)
    assert list(report.kept) == ["ann"]
    # Lesions of a region that was scanned once cannot be evaluated, or are new.
    path.write_text(
        "patient,baseline,followup\nann,stays,\nann,shrinks,shrinks\nbob,stays,\nbob,,new\n"
    )
    report = volseg.compare(baseline, later, out=tmp_path / "out", **options)
    patients, lesions = tables(tmp_path / "out")
    assert (patients["ann"]["n_outside"], patients["ann"]["change_volume_ml"]) == ("2", "")
    warning = "W_UNPAIRED: stays: there is no follow-up scan of what it shows"
    assert warning in patients["ann"]["warnings"]
    for lesion in lesions["ann"][:2]:
        assert (lesion["status"], lesion["followup_case"]) == ("outside", "")
    assert patients["ann"]["baseline_case"] == "stays;shrinks"
    assert patients["ann"]["followup_case"] == ";shrinks"
    assert (patients["bob"]["status"], patients["bob"]["baseline_case"]) == ("unpaired", "stays;")
    assert "no line of the table has both" in patients["bob"]["reason"]
    path.write_text("patient,baseline,followup\nann,,new\nann,shrinks,shrinks\n")
    volseg.compare(baseline, later, out=tmp_path / "out", **options)
    row = tables(tmp_path / "out")[0]["ann"]
    # The larger new lesion may be one of the other scan, at the same world coordinates.
    assert (row["response"], row["response_rule"].split(" (")[0]) == ("PD", "PD: new lesion new:2")
    # If one scan cannot be compared, the patient cannot be judged.
    (later / "lesion_ids" / "new.nii.gz").write_bytes(b"another file")
    path.write_text("patient,baseline,followup\nann,new,new\nann,shrinks,shrinks\n")
    report = volseg.compare(baseline, later, out=tmp_path / "out", **options)
    assert "case 'new'" in report.failed["ann"] or "new.nii.gz" in report.failed["ann"]
    assert tables(tmp_path / "out")[0]["ann"]["response"] == ""
    for second, text in (
        ("new,shrinks", "has the baseline 'new' twice"),
        ("grows,new", "a follow-up on another|a baseline on one line"),
    ):
        path.write_text(
            f"patient,baseline,followup\nann,new,stays\nann,{second}\n".replace("stays", "vanishes")
        )
        with pytest.raises(VolsegError, match=text):
            volseg.compare(baseline, later, out=tmp_path / "out", **options)


def test_folders_that_cannot_be_compared_are_a_wrong_request(baseline, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolsegError, match="holds no results"):
        volseg.compare(baseline, tmp_path / "empty", out=tmp_path / "out")
    with pytest.raises(VolsegError, match="holds the results to compare") as caught:
        volseg.compare(baseline, baseline, out=baseline)
    assert caught.value.code == "E_EXISTS"
    (tmp_path / "other" / ".volseg").mkdir(parents=True)
    with pytest.raises(VolsegError, match="has the name of one in"):
        volseg.compare(baseline, tmp_path / "other", out=tmp_path / "out")
    ledger = tmp_path / "other" / ".volseg" / "ledger.jsonl"
    ledger.write_text('{"run": "1", "command": "infer-images"}\n')
    with pytest.raises(VolsegError, match="holds predictions of images, not lesions"):
        volseg.compare(baseline, tmp_path / "other", out=tmp_path / "out")
    for options in (
        {"max_distance_mm": -1},
        {"max_distance_mm": float("nan")},
        {"max_distance_mm": float("inf")},
        {"followup_scans": tmp_path / "no"},
    ):
        with pytest.raises(VolsegError):
            volseg.compare(baseline, baseline, out=tmp_path / "out", **options)


def test_a_second_call_does_what_changed_and_no_more(baseline, tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    shutil.copytree(baseline, results)
    options = {"out": out, "registration": False}
    assert len(volseg.compare(baseline, results, **options).done) == len(TIMES)
    before = {name: (out / name).read_bytes() for name in ("comparison.csv", "response.csv")}
    report = volseg.compare(baseline, results, **options)
    assert (len(report.done), len(report.kept)) == (0, len(TIMES))
    assert {name: (out / name).read_bytes() for name in before} == before
    assert {row["patient"] for row in report.patients} == set(TIMES)
    change_record(
        results,
        "stays",
        lambda record: record["lesions"][0].update(long_axis_mm=40.0, volume_ml=33.0),
    )
    assert list(volseg.compare(baseline, results, **options).done) == ["stays"]
    assert tables(out)[0]["stays"]["response"] == "PD"
    assert len(volseg.compare(baseline, results, **options, max_distance_mm=5).done) == len(TIMES)


def named(path, *names):
    """Write a table of pairs with these cases, each under its own name."""
    path.write_text(
        "patient,baseline,followup\n" + "".join(f"{name},{name},{name}\n" for name in names)
    )
    return path


def test_patients_compared_one_after_another_are_the_tables_of_all_compared_together(
    baseline, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    volseg.compare(baseline, baseline, out=whole, registration=False)
    for name in ("stays", "grows", "never", "shrinks", "new", "vanishes"):
        pairs = named(tmp_path / "pairs.csv", name)
        report = volseg.compare(baseline, baseline, out=parts, registration=False, pairs=pairs)
        assert [row["patient"] for row in report.patients] == list(report.done) == [name]
    assert any("W_STALE: the tables also hold 5 patients" in text for text in report.warnings)
    assert rows(parts / "comparison.csv") == rows(whole / "comparison.csv")  # in the same order
    assert list(tables(parts)[0]) == list(tables(whole)[0])
    assert {row["patient"] for row in on_page(parts / "report.html", "patients")} == set(TIMES)


@pytest.mark.parametrize("damage", ["cut", "another's", "no rows"])
def test_a_patient_whose_rows_are_damaged_is_unknown_and_the_others_stay(
    damage, baseline, tmp_path
):
    out, options = tmp_path / "out", {"registration": False}
    volseg.compare(baseline, baseline, out=out, **options)
    _, lesions = tables(out)
    path, lines = out / ".volseg" / "grows.json", out / ".volseg" / "grows.rows.jsonl"
    if damage == "cut":
        lines.write_bytes(lines.read_bytes()[:300])
    else:
        lines.write_bytes(
            b'{"patient": "new"}\n'
            if damage == "another's"
            else b'{"patient": "grows", "status": 1}\n'
        )
        record = json.loads(path.read_text())
        record["files"][".volseg/grows.rows.jsonl"] = sha256_of(lines)
        path.write_text(json.dumps(record))
    report = volseg.compare(
        baseline, baseline, out=out, **options, pairs=named(tmp_path / "pairs.csv", "stays")
    )
    assert (list(report.kept), report.exit_code) == (["stays"], 0)
    assert any("W_RECORD: grows" in warning for warning in report.warnings)
    statuses = {name: row["status"] for name, row in tables(out)[0].items()}
    assert statuses == dict.fromkeys(TIMES, "done") | {"grows": "unknown"}
    assert tables(out)[1] == {name: rows for name, rows in lesions.items() if name != "grows"}
    assert list(volseg.compare(baseline, baseline, out=out, **options).done) == ["grows"]
    assert tables(out)[1] == lesions


def test_rows_that_were_edited_by_hand_are_not_compared(baseline, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(baseline, results)
    lines = results / ".volseg" / "grows.rows.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b'"volume_ml": ', b'"volume_ml": 1'))
    report = volseg.compare(baseline, results, out=tmp_path / "out", registration=False)
    assert list(report.failed) == ["grows"] and "its rows were changed" in report.failed["grows"]


def test_a_scan_or_record_replaced_while_it_is_compared_fails_its_patient(
    baseline, tmp_path, monkeypatch
):
    scans = tmp_path / "scans"
    shutil.copytree(Path(read_record(baseline, "stays").source.scan).parent, scans)
    other = next(path for path in scans.iterdir() if path.name.startswith("vanishes"))
    target = next(path for path in scans.iterdir() if path.name.startswith("stays"))
    input_digests = comparing.input_digests

    def replaced_afterwards(patient, times):
        digests = input_digests(patient, times)
        if patient.name == "stays":
            shutil.copy(other, target)
        return digests

    monkeypatch.setattr(comparing, "input_digests", replaced_afterwards)
    report = volseg.compare(
        baseline, baseline, out=tmp_path / "out", baseline_scans=scans, followup_scans=scans
    )
    assert list(report.failed) == ["stays"]
    assert report.failed["stays"].startswith("E_CHANGED") and target.name in report.failed["stays"]


def test_a_label_without_a_name_at_one_time_has_that_of_the_other(baseline, tmp_path):
    for copy, name in (("nameless", "label_1"), ("named", "nodule")):
        shutil.copytree(baseline, tmp_path / copy)
        for case in TIMES:
            change_record(
                tmp_path / copy,
                case,
                lambda record, name=name: [
                    lesion.update(label_name=name) for lesion in record["lesions"]
                ],
            )
    volseg.compare(baseline, baseline, out=tmp_path / "expected", registration=False)
    expected = {name: row["response"] for name, row in tables(tmp_path / "expected")[0].items()}
    for first, second in (("nameless", "named"), ("named", "nameless")):
        volseg.compare(
            tmp_path / first, tmp_path / second, out=tmp_path / f"from_{first}", registration=False
        )
        patients, lesions = tables(tmp_path / f"from_{first}")
        assert {name: row["response"] for name, row in patients.items()} == expected
        names = {row["label_name"] for of_patient in lesions.values() for row in of_patient}
        assert names == {"nodule"}


def test_models_and_grids_that_differ_are_warned_of(baseline, tmp_path):
    thick = measured(
        tmp_path / "thick",
        {"stays": scan_of(around((1.5, 1.5, 5.0), GRIDS["lps"]), [LARGE, SMALL])},
    )
    change_record(thick, "stays", lambda record: record["case"].update(model="other@12"))
    report = volseg.compare(baseline, thick, out=tmp_path / "out", registration=False)
    origin, grid = sorted(report.warnings, reverse=True)
    assert "W_MODEL: stays: the masks come from different sources (no model; other@12)" in origin
    assert "W_GRID: stays: voxels of 1.5 × 1.5 × 2 mm and 1.5 × 1.5 × 5 mm" in grid


def test_lymph_nodes_are_those_that_were_measured_as_such_or_that_are_named(tmp_path):
    """A box with a short axis of 10 mm is measurable as a lesion, but not as a node."""
    place = np.abs(GRID.to_world_mm(np.indices(GRID.shape).reshape(3, -1).T)).reshape(
        *GRID.shape, 3
    )
    mask = (place < (10.2, 5.2, 8)).all(axis=-1).astype(np.uint8)
    scan = Volume(np.where(mask, 60, 20).astype(np.int16), GRID)
    results = measured(
        tmp_path / "one",
        {"p": (scan, Volume(mask, GRID))},
        names={1: "nodes"},
        lymph_nodes=["nodes"],
    )
    volseg.compare(results, results, out=tmp_path / "out", registration=False)
    row = tables(tmp_path / "out")[0]["p"]
    assert (row["response"], row["targets"], row["warnings"]) == ("Non-CR/Non-PD", "", "")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["lymph_nodes"] == [
        "nodes"
    ]
    (results / "run.json").unlink()
    volseg.compare(results, results, out=tmp_path / "out", registration=False)
    assert "W_NODE: nodes sounds like lymph nodes" in tables(tmp_path / "out")[0]["p"]["warnings"]
    volseg.compare(results, results, out=tmp_path / "out", registration=False, lymph_nodes=["1"])
    assert tables(tmp_path / "out")[0]["p"]["warnings"] == ""
    # As written by infer, from the model's recipe.
    (results / "run.json").write_text('{"measure": {"lymph_nodes": ["nodes"]}}')
    volseg.compare(results, results, out=tmp_path / "again", registration=False)
    assert tables(tmp_path / "again")[0]["p"]["warnings"] == ""


def test_unmeasured_diameters_leave_recist_empty_and_say_so(baseline, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(baseline, results)

    def forget(record):
        for lesion in record["lesions"]:
            lesion |= {"long_axis_mm": None, "short_axis_mm": None, "recist_measurable": None}

    for name in TIMES:
        change_record(results, name, forget)
    volseg.compare(results, results, out=tmp_path / "out", registration=False)
    row = tables(tmp_path / "out")[0]["stays"]
    assert row["status"] == "done"
    for name in ("response", "targets", "baseline_sum_mm", "volume_response"):
        assert row[name] == ""
    assert "diameters were not measured" in row["response_rule"]
    assert row["change_volume_percent"] == "0"


def test_the_command_prints_responses_and_ends_with_the_code_of_a_batch(baseline, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(baseline, results)
    change_record(
        results,
        "grows",
        lambda record: record["case"].update(status="failed", reason="E_CRC: damaged"),
    )

    arguments = ["compare", str(baseline), str(results), "--no-registration"]
    arguments += ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3
    assert "stays" in done.stdout
    assert "SD" in done.stdout
    assert "failed: grows: E_RECORD" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--json"])
    content = json.loads(done.stdout)
    assert (done.exit_code, content["exit_code"]) == (3, 3)
    assert {row["patient"]: row["response"] for row in content["patients"]}["stays"] == "SD"


def test_the_picture_shows_both_outlines_where_the_lesion_is():
    """A lesion that shrinks, of a patient who moved."""
    moved = movement(20, (30, -20, 10))
    grids = [around((1.5, 1.5, 2.0), GRIDS["lps"], radius=40)]
    later = around((1.8, 1.3, 1.6), GRIDS["oblique"], radius=60)
    grids.append(Geometry(later.shape, moved.matrix @ later.affine))
    centre = np.array([20.0, 0.0, 0.0])
    before = np.array(ball(9, grids[0], centre), np.uint16)
    after = np.array(ball(5, grids[1], moved.apply(centre[None])[0]), np.uint16)
    scans = [
        Volume(np.where(ids, 60, 0).astype(np.int16), geometry)
        for ids, geometry in zip((before, after), grids, strict=True)
    ]
    row = LesionChange(
        patient="p", baseline_case="a", followup_case="b", status="matched", group=1,
        baseline_lesion_id=1, followup_lesion_id=1, label_name="tumour", change_volume_ml=-2.5,
        baseline_centroid_r_mm=20.0, baseline_centroid_a_mm=0.0, baseline_centroid_s_mm=0.0,
    )  # fmt: skip
    png = change_png((scans[0], scans[1]), (before, after), moved, [row], title="p")
    picture = matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    sizes = {}
    for name, colour in (("before", (0.3, 0.83, 0.3)), ("after", (1.0, 0.55, 0.2))):
        outline = np.abs(picture - colour).max(axis=-1) < 0.15
        for line in range(2):
            for column in range(3):
                tile = outline[:, column * width : (column + 1) * width]
                pixels = np.argwhere(tile[line * height + 30 : (line + 1) * height])
                assert len(pixels) > 20, (name, line, column)
                sizes[name, line, column] = np.ptp(pixels, axis=0)
    for line in range(2):
        ratio = sizes["after", line, 0] / sizes["before", line, 0]
        np.testing.assert_allclose(ratio, 5 / 9, atol=0.2)


def rod(turn_deg=0.0):
    """Draw the scan and mask of a tilted patient with a rod along A."""
    balls = [((20, y, 0), 4.2) for y in range(-24, 25, 3)]
    return draw(grid("LPS", (2.0, 2.0, 2.0)), balls, movement(turn_deg, (0, 0, 0), axis=(1, 0, 0)))


@pytest.mark.slow
def test_a_head_that_tilted_between_the_scans_is_measured_in_the_planes_of_the_baseline(tmp_path):
    """The slices of the later scan cut the same rod at 14°."""
    one, other = (
        measured(tmp_path / name, {"p": rod(deg)}) for name, deg in (("one", 0), ("other", 14))
    )
    axes_mm = [float(rows(folder / "lesions.csv")[0]["long_axis_mm"]) for folder in (one, other)]
    assert axes_mm[1] < 0.8 * axes_mm[0]
    volseg.compare(one, other, out=tmp_path / "out")
    patients, lesions = tables(tmp_path / "out")
    row, (lesion,) = patients["p"], lesions["p"]
    assert row["response"] == "SD"
    assert abs(float(row["change_sum_percent"])) < 4
    assert float(row["tilt_deg"]) == pytest.approx(14, abs=0.5)
    assert "in the axial planes of the baseline" in lesion["notes"]
    # With trusted world coordinates the lesion shrinks in its plane, but its volume does not.
    volseg.compare(one, other, out=tmp_path / "blind", registration=False)
    row = tables(tmp_path / "blind")[0]["p"]
    assert (row["response"], row["target_response"], row["volume_response"]) == ("", "PR", "SD")
    assert "W_DISAGREE: the targets are PR by their diameters" in row["warnings"]


def test_a_fringe_that_missing_voxels_cut_off_is_no_progression(tmp_path):
    """A plane of the scan is missing below the surface, so the mask has a gap there."""
    scan, mask = scan_of(GRID, [LARGE, SMALL])
    values, cut = scan.array.astype(np.float32), mask.array.copy()
    for middle, radius in (LARGE, SMALL):
        lesion = mask.array.astype(bool) & ball(radius + 1, GRID, centre_mm(GRID) + middle)
        plane = np.flatnonzero(lesion.any(axis=(0, 1)))[-1] - 1
        values[:, :, plane][lesion[:, :, plane]] = np.nan
        cut[:, :, plane][lesion[:, :, plane]] = 0
    before = measured(tmp_path / "before", {"p": (scan, mask)})
    after = measured(tmp_path / "after", {"p": (scan.with_array(values), mask.with_array(cut))})
    assert len(rows(after / "lesions.csv")) == 4
    volseg.compare(before, after, out=tmp_path / "out", registration=False)
    patients, lesions = tables(tmp_path / "out")
    row = patients["p"]
    assert (row["response"], row["n_new"], row["n_split"]) == ("SD", "0", "0")
    assert row["n_crumbs"] == "2"
    assert "W_CRUMB" in row["warnings"]
    expected = ["crumb", "crumb", "matched", "matched"]
    assert sorted(lesion["status"] for lesion in lesions["p"]) == expected
    assert abs(float(row["change_sum_percent"])) < 1
    shown = on_page(tmp_path / "out" / "report.html", "changes")
    assert sorted(lesion["status"] for lesion in shown) == expected


NAMES = ["**", "/etc/x", "../scans/stays.nii.gz"]
OTHERS = ["**x", "*", "[", "..", "/", "a\0b", "x" * 300, "a/../..", "."]


@pytest.mark.parametrize(
    "image", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_scan_name_in_an_untrusted_record_is_used_neither_as_pattern_nor_as_path(
    image, baseline, tmp_path
):
    results, scans = tmp_path / "results", tmp_path / "elsewhere"
    shutil.copytree(baseline, results)
    shutil.copytree(baseline.parent / "scans", scans / "deep")
    change_record(
        results, "stays", lambda record: (record["case"].update(image=image), record.pop("source"))
    )
    options = {"baseline_scans": scans, "followup_scans": scans}
    report = volseg.compare(results, results, out=tmp_path / "out", **options)
    assert set(report.done) >= TIMES.keys() - {"stays"}
    if image.endswith("stays.nii.gz"):  # the name is taken, not where it leads
        assert report.exit_code == 0
    else:
        assert report.failed["stays"].startswith("E_MISSING: ")
    options |= {"out": tmp_path / "blind", "registration": False}
    assert volseg.compare(results, results, **options).exit_code == 0


@pytest.mark.parametrize("name", ["p[1].nii.gz", "p*.nii.gz", "p?.nii.gz", "[!p].nii.gz"])
def test_a_scan_is_found_below_the_folder_whatever_its_name(name, baseline, tmp_path):
    results, scans = tmp_path / "results", tmp_path / "elsewhere"
    shutil.copytree(baseline, results)
    for time in TIMES:
        deep = scans / time
        deep.mkdir(parents=True)
        shutil.copy(
            baseline.parent / "scans" / f"{time}.nii.gz",
            deep / (name if time == "stays" else f"{time}.nii.gz"),
        )
    (scans / "folder" / name).mkdir(parents=True)
    change_record(
        results, "stays", lambda record: (record["case"].update(image=name), record.pop("source"))
    )
    volseg.compare(
        results, results, out=tmp_path / "out", baseline_scans=scans, followup_scans=scans
    )
    row = tables(tmp_path / "out")[0]["stays"]
    assert (row["status"], row["registration"], row["response"]) == ("done", "identical", "SD")
