import csv
import json

import numpy as np
import pytest
from laws import ball, grid_around, oblique
from segmented_scans import segmented
from typer.testing import CliRunner

import volseg
from volseg.cli import app
from volseg.commands import mask_pairs
from volseg.errors import VolsegError
from volseg.evaluation.surface import surface_distances
from volseg.io.volumes import read_mask, write_volume
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.rows import LesionMeasurement
from volseg.postprocessing.lesions import label_lesions
from volseg.store.tables import table
from volseg.volume import Geometry, Volume


def write(path, mask, geometry):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(Volume(mask.astype(np.uint8), geometry), path)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folders(tmp_path):
    geometry = grid_around(10, oblique((1, 1.2, 2)))
    whole = ball(9, geometry)
    half = whole.copy()
    half[: geometry.shape[0] // 2] = False
    empty = np.zeros(geometry.shape)
    for name, truth, guess in (
        ("a", whole, whole),
        ("b", whole, half),
        ("c", empty, empty),
        ("d", whole, empty),
    ):
        write(tmp_path / "truth" / f"{name}.nii.gz", truth, geometry)
        write(tmp_path / "guess" / f"{name}.nii.gz", guess, geometry)
    write(tmp_path / "truth" / "only_here.nii.gz", whole, geometry)
    return tmp_path / "truth", tmp_path / "guess", whole, half


def test_dice_and_volume_error_are_those_of_the_masks(folders, tmp_path):
    truth, guess, whole, half = folders
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    table = {row["case_id"]: row for row in rows(tmp_path / "out" / "evaluation.csv")}
    assert table["a"]["dice"] == "1"
    assert float(table["b"]["dice"]) == pytest.approx(
        2 * half.sum() / (whole.sum() + half.sum()), abs=1e-5
    )
    assert float(table["b"]["volume_error_percent"]) == pytest.approx(
        100 * (half.sum() / whole.sum() - 1), abs=1e-3
    )
    assert table["c"]["dice"] == ""  # both empty: there is nothing to overlap
    assert table["d"]["dice"] == "0"
    assert report.summary["not_predicted"] == ["only_here"]
    assert report.summary["labels"]["1"]["n"] == 3
    assert report.exit_code == 0


def test_a_folder_of_predictions_may_hold_the_description_of_its_model(folders, tmp_path):
    """nnU-Net writes one there."""
    truth, guess, *_ = folders
    (guess / "dataset.json").write_text(
        '{"labels": {"background": 0, "kidney": 1}, "file_ending": ".nii.gz"}'
    )
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    assert list(report.done) == ["a", "b", "c", "d"]


def test_masks_on_different_grids_are_a_failed_row(folders, tmp_path):
    truth, guess, *_ = folders
    geometry = grid_around(12, oblique((1, 1.2, 2)))
    write(guess / "a.nii.gz", np.ones(geometry.shape), geometry)
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    assert report.exit_code == 3
    assert "E_PAIR" in report.failed["a"]
    assert "labelled voxels of it would be lost; " in report.failed["a"]
    assert "% of it lies within the reference" in report.failed["a"]
    table = {row["case_id"]: row for row in rows(tmp_path / "out" / "evaluation.csv")}
    assert (table["a"]["status"], table["a"]["reason"], table["a"]["dice"]) == (
        "failed",
        report.failed["a"],
        "",
    )
    assert {table[name]["status"] for name in "bcd"} == {"done"}
    assert report.summary["mean_dice"] == pytest.approx(
        float(table["b"]["dice"]) / 2, abs=1e-5
    )  # b and d, as without it


def test_folders_without_a_common_name_are_a_wrong_request(folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    geometry = grid_around(5, oblique((1, 1, 1)))
    write(other / "z.nii.gz", np.ones(geometry.shape), geometry)
    with pytest.raises(VolsegError, match="no mask of"):
        volseg.evaluate(reference=folders[0], predicted=other, out=tmp_path / "out")


def test_rows_hold_the_surfaces_and_the_lesions_and_say_what_is_unknown(folders, tmp_path):
    truth, guess, whole, half = folders
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    table = {row["case_id"]: row for row in rows(tmp_path / "out" / "evaluation.csv")}
    surface = surface_distances(whole, half, grid_around(10, oblique((1, 1.2, 2))))[1]
    assert float(table["b"]["hd95_mm"]) == pytest.approx(surface.hd95_mm, abs=1e-3)
    assert float(table["b"]["nsd_1mm"]) == pytest.approx(surface.nsd(1), abs=1e-4)
    assert float(table["b"]["iou"]) == pytest.approx(half.sum() / whole.sum(), abs=1e-5)
    assert (table["a"]["hd95_mm"], table["a"]["nsd_2mm"], table["a"]["notes"]) == ("0", "1", "")
    assert (table["d"]["hd95_mm"], table["d"]["nsd_2mm"], table["d"]["iou"]) == ("", "0", "0")
    assert "the prediction lacks the label" in table["d"]["notes"]
    assert (table["c"]["hd95_mm"], table["c"]["nsd_2mm"], table["c"]["iou"]) == ("", "", "")
    assert "neither mask has the label" in table["c"]["notes"]
    assert [table[name]["lesion_f1"] for name in "abcd"] == ["1", "1", "", "0"]
    assert [row["status"] for row in rows(tmp_path / "out" / "detections.csv")] == [
        "matched"
    ] * 4 + ["missed"]
    label = report.summary["labels"]["1"]
    assert (label["n_missed"], label["n_false"], label["n_absent"]) == (1, 0, 1)
    assert label["detection"]["sensitivity"]["mean"] == pytest.approx(2 / 3)
    assert label["metrics"]["hd95_mm"]["n"] == 2
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
        == report.summary
    )
    assert (tmp_path / "out" / "agreement.png").read_bytes().startswith(b"\x89PNG")


def test_an_overlap_that_is_asked_for_is_needed(folders, tmp_path):
    truth, guess, *_ = folders
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out", min_iou=0.6)
    assert (
        report.summary["labels"]["1"]["detection"]["n_matched"] == 1
    )  # half of the ball is no find any more
    with pytest.raises(VolsegError, match="--min-iou must be ≥ 0 and < 1, got 1"):
        volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out", min_iou=1.0)


def test_a_label_of_one_case_has_a_row_in_every_case(folders, tmp_path):
    truth, guess, whole, _ = folders
    write(truth / "a.nii.gz", 4 * whole, grid_around(10, oblique((1, 1.2, 2))))
    volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    table = rows(tmp_path / "out" / "evaluation.csv")
    assert [(row["case_id"], row["label"]) for row in table] == [
        (name, label) for name in "abcd" for label in "14"
    ]
    assert all(
        row["notes"] and row["dice"] == ""
        for row in table
        if row["label"] == "4" and row["case_id"] != "a"
    )
    assert [row["dice"] for row in table if row["case_id"] == "a"] == ["0", "0"]


@pytest.fixture
def study(tmp_path):
    """Make a dataset of three scans of two patients, and results with lesion confidences."""
    geometry = Geometry((30, 20, 16), oblique((1, 1.2, 2)))
    first, second, third = (
        ball(radius, geometry, centre) for radius, centre in zip((7, 4, 3), centres(geometry))
    )
    truths = {"p1_a": first | second, "p1_b": first, "p2": second}
    guesses = {"p1_a": first | third, "p1_b": first, "p2": second | third}
    confidences = [(first, 0.9), (second, 0.6), (third, 0.4)]
    lines, measured = [["subject", "image", "label", "patient"]], []
    for name in truths:
        write(tmp_path / "data" / f"{name}.nii.gz", truths[name], geometry)
        write(tmp_path / "results" / "masks" / f"{name}.nii.gz", guesses[name], geometry)
        lines.append([name, f"{name}.nii.gz", f"{name}.nii.gz", name.split("_")[0]])
        lesions = label_lesions(guesses[name].astype(np.uint8), geometry)
        confidence = sum(inside * value for inside, value in confidences).astype(np.float32)
        scan = Volume(np.zeros(geometry.shape, np.int16), geometry)
        options = {"case_id": name, "label_names": {1: "tumour"}, "confidence": confidence}
        measured += measure_lesions(segmented(scan, lesions, **options))
    with (tmp_path / "data" / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    with (tmp_path / "results" / "lesions.csv").open("wb") as file:
        table(LesionMeasurement, measured)(file)
    return tmp_path / "data", tmp_path / "results"


def centres(geometry):
    return (
        geometry.to_world_mm(np.array([index]))[0]
        for index in ((8, 9, 7), (20, 9, 7), (26, 15, 12))
    )


def test_patients_names_and_confidence_come_from_the_dataset_and_the_results(study, tmp_path):
    data, results = study
    report = volseg.evaluate(reference=data, predicted=results, out=tmp_path / "out")
    assert (report.summary["n_cases"], report.summary["n_patients"]) == (3, 2)
    label = report.summary["labels"]["1"]
    assert label["name"] == "tumour"
    assert {row["patient"] for row in rows(tmp_path / "out" / "evaluation.csv")} == {"p1", "p2"}
    # The first lesion is detected twice (0.9), the second once (0.6) and missed once; the third is
    # a false positive twice (0.4).
    assert label["froc"]["threshold"] == pytest.approx([0.9, 0.6, 0.4], abs=1e-6)
    assert label["froc"]["sensitivity"] == pytest.approx([2 / 4, 3 / 4, 3 / 4])
    assert label["froc"]["false_positives_per_scan"] == pytest.approx([0, 0, 2 / 3])
    assert (tmp_path / "out" / "froc.png").is_file()
    detections = rows(tmp_path / "out" / "detections.csv")
    predicted = sorted(row["confidence"] for row in detections if row["side"] == "predicted")
    assert predicted == ["0.4", "0.4", "0.6", "0.9", "0.9"]
    assert all(row["confidence"] == "" for row in detections if row["side"] == "reference")


def test_lesions_have_their_confidence_where_an_organ_is_a_label_too(study, tmp_path):
    """Lesion numbers differ: lesions.csv excludes the organ, evaluation numbers it first."""
    data, results = study
    for path in (*(results / "masks").iterdir(), *data.glob("*.nii.gz")):
        mask = read_mask(path)
        array = mask.array.copy()
        array[:, 12:, :][array[:, 12:, :] == 0] = 2
        write_volume(mask.with_array(array), path)
    report = volseg.evaluate(reference=data, predicted=results, out=tmp_path / "out")
    assert report.summary["labels"]["1"]["froc"]["threshold"] == pytest.approx(
        [0.9, 0.6, 0.4], abs=1e-6
    )


def test_a_confidence_is_not_given_to_another_lesion_and_an_old_curve_goes(study, tmp_path):
    data, results = study
    volseg.evaluate(reference=data, predicted=results, out=tmp_path / "out")
    shape = (30, 20, 16)  # of a mask edited since it was measured
    mask = results / "masks" / "p2.nii.gz"
    write(mask, np.ones(shape), Geometry(shape, oblique((1, 1.2, 2))))
    report = volseg.evaluate(reference=data, predicted=results, out=tmp_path / "out")
    label = report.summary["labels"]["1"]
    assert label["froc"] is None
    assert label["no_froc"] == "1 of 4 predicted lesions have no confidence"
    assert not (tmp_path / "out" / "froc.png").exists()


def test_cases_without_a_patient_count_as_one_each_and_the_summary_says_so(folders, tmp_path):
    report = volseg.evaluate(reference=folders[0], predicted=folders[1], out=tmp_path / "out")
    assert report.summary["n_patients"] == 4
    assert report.summary["patients"] == "4 of 4 cases name no patient and count as one each"


def test_voxels_that_a_dataset_labels_ignore_are_left_out_of_both_masks(tmp_path):
    geometry = Geometry((20, 12, 8), oblique((1, 1, 2)))
    truth, guess = np.zeros((2, *geometry.shape))
    truth[2:8, 2:8, 2:6] = guess[2:8, 2:8, 2:6] = 1
    truth[12:18], guess[13:16, 2:8, 2:6] = 7, 1
    dataset = tmp_path / "Dataset001"
    write(dataset / "imagesTr" / "a_0000.nii.gz", truth, geometry)
    write(dataset / "labelsTr" / "a.nii.gz", truth, geometry)
    write(tmp_path / "guess" / "a.nii.gz", guess, geometry)
    stated = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "kidney": 1, "ignore": 7},
        "numTraining": 1,
    }
    (dataset / "dataset.json").write_text(
        json.dumps(stated | {"file_ending": ".nii.gz"}), encoding="utf-8"
    )
    report = volseg.evaluate(reference=dataset, predicted=tmp_path / "guess", out=tmp_path / "out")
    assert list(report.summary["labels"]) == ["1"]
    kidney = report.summary["labels"]["1"]
    assert (kidney["name"], kidney["mean_dice"]) == ("kidney", 1.0)
    assert kidney["detection"]["n_predicted"] == 1


def test_where_no_pair_can_be_compared_the_tables_are_empty_and_the_reasons_there(
    folders, tmp_path
):
    truth, guess, *_ = folders
    volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    geometry = grid_around(12, oblique((1, 1.2, 2)))
    for name in "abcd":
        write(guess / f"{name}.nii.gz", np.ones(geometry.shape), geometry)
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    assert report.exit_code == 4
    assert set(report.failed) == set("abcd")
    assert report.summary["mean_dice"] is None
    assert [row["status"] for row in rows(tmp_path / "out" / "evaluation.csv")] == ["failed"] * 4
    assert rows(tmp_path / "out" / "detections.csv") == []
    assert not (tmp_path / "out" / "agreement.png").exists()


@pytest.mark.parametrize("min_iou", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_where_every_pair_fails_the_rows_of_the_same_masks_stay(min_iou, study, tmp_path):
    data, results = study
    out = tmp_path / "out"
    before = volseg.evaluate(reference=data, predicted=results, out=out)
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for _ in range(2):  # repeated, the remark appears once
        report = volseg.evaluate(
            reference=data, predicted=results, out=out, max_ram="1M", min_iou=min_iou
        )
        assert (report.exit_code, list(report.done)) == (4, [])
        assert "W_STALE" in report.warnings[-1]
        assert (out / "detections.csv").read_bytes() == files["detections.csv"]
        assert {path.name for path in out.iterdir() if path.is_file()} == files.keys()
        stale = rows(out / "evaluation.csv")
        assert all(row["notes"].count("W_STALE: the last run failed (E_RAM") == 1 for row in stale)
        (out / "expected.csv").write_bytes(files["evaluation.csv"])
        assert [row | {"notes": ""} for row in stale] == [
            row | {"notes": ""} for row in rows(out / "expected.csv")
        ]
        (out / "expected.csv").unlink()
        assert report.summary["mean_dice"] == pytest.approx(before.summary["mean_dice"], abs=1e-6)
        assert report.summary["min_iou"] == 0.0
    volseg.evaluate(reference=data, predicted=results, out=out)
    assert (out / "evaluation.csv").read_bytes() == files["evaluation.csv"]


@pytest.mark.slow
def test_where_one_pair_fails_its_row_stays_if_its_masks_and_the_overlap_are_the_same(
    folders, tmp_path, monkeypatch
):
    out, evaluate_case = tmp_path / "out", mask_pairs.evaluate_case
    before = {row["case_id"]: row for row in rows(evaluated(folders, out) / "evaluation.csv")}

    def buggy(*arguments, case_id):
        if case_id == "b":
            raise ZeroDivisionError("a bug")
        return evaluate_case(*arguments, case_id=case_id)

    monkeypatch.setattr(mask_pairs, "evaluate_case", buggy)
    after = {row["case_id"]: row for row in rows(evaluated(folders, out) / "evaluation.csv")}
    assert "E_BUG" in after["b"].pop("notes")
    before["b"].pop("notes")
    assert after == before
    assert {row["case_id"] for row in rows(out / "detections.csv")} == {"a", "b", "d"}
    after = {
        row["case_id"]: row for row in rows(evaluated(folders, out, min_iou=0.5) / "evaluation.csv")
    }
    assert (after["b"]["status"], after["b"]["dice"]) == ("failed", "")
    assert after["a"]["status"] == "done"
    monkeypatch.undo()
    evaluated(folders, out)
    other = grid_around(12, oblique((1, 1.2, 2)))
    write(folders[1] / "b.nii.gz", np.ones(other.shape), other)
    after = {row["case_id"]: row for row in rows(evaluated(folders, out) / "evaluation.csv")}
    assert (after["b"]["status"], after["b"]["dice"]) == ("failed", "")


def evaluated(folders, out, **options):
    volseg.evaluate(reference=folders[0], predicted=folders[1], out=out, **options)
    return out


def test_a_broken_table_of_lesions_is_a_wrong_request(study, tmp_path):
    data, results = study
    (results / "lesions.csv").write_text("case_id,lesion_id\na,1\n", encoding="utf-8")
    with pytest.raises(VolsegError, match="is not a table of lesions"):
        volseg.evaluate(reference=data, predicted=results, out=tmp_path / "out")


def test_the_command_prints_means_with_their_intervals(study, tmp_path):
    data, results = study
    out = tmp_path / "out"
    arguments = ["--reference", str(data), "--predicted", str(results), "--out", str(out)]
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 0
    label = json.loads((out / "summary.json").read_text(encoding="utf-8"))["labels"]["1"]
    for metric in ("dice", "nsd_1mm"):
        assert f"{label['metrics'][metric]['mean']:.3f}" in done.stdout
    assert label["detection"]["f1"]["mean_95"] is None
    assert "(none)" in done.stdout
    words = " ".join(done.stdout.split())
    assert "over 2 patients (named by the reference)" in words
    assert "(none): no interval; 2 patients; an interval needs at least 5" in words
    assert "froc.png" in done.stdout


def test_the_command_prints_intervals_of_five_patients_and_not_of_four(tmp_path):
    geometry = grid_around(8, oblique((1, 1.2, 2)))
    whole = ball(7, geometry)
    for n in range(5):
        guess = whole.copy()
        guess[: geometry.shape[0] // 2 - n] = False
        write(tmp_path / "truth" / f"{n}.nii.gz", whole, geometry)
        write(tmp_path / "guess" / f"{n}.nii.gz", guess, geometry)

    def evaluate(out):
        folders = (str(tmp_path / "truth"), "--predicted", str(tmp_path / "guess"))
        done = CliRunner().invoke(app, ["evaluate", "--reference", *folders, "--out", str(out)])
        assert done.exit_code == 0
        return done.stdout, json.loads((out / "summary.json").read_text(encoding="utf-8"))

    stdout, summary = evaluate(tmp_path / "five")
    label = summary["labels"]["1"]
    for name, decimals in (("dice", 2), ("volume_error_ml", 1)):
        low, high = label["metrics"][name]["mean_95"]
        assert low < label["metrics"][name]["mean"] < high
        assert f"({low:.{decimals}f}," in stdout
    assert 0 <= summary["mean_dice_95"][0] < summary["mean_dice_95"][1] <= 1
    assert summary["no_mean_dice_95"] == ""
    # Each patient's only lesion is detected: the exact interval of 5 of 5.
    assert label["detection"]["sensitivity"]["mean_95"] == pytest.approx([0.4782, 1], abs=1e-4)
    (tmp_path / "guess" / "4.nii.gz").unlink()
    stdout, summary = evaluate(tmp_path / "four")
    assert summary["mean_dice_95"] is None
    assert summary["no_mean_dice_95"] == "4 patients; an interval needs at least 5"
    assert "(none): no interval; 4 patients; an interval needs at least 5" in stdout
