"""No command loses a user's files in an output folder; results are kept until replaced."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import volseg
from volseg.commands import (
    batch,
    comparing,
    correcting,
    mask_measurement,
    mask_pairs,
    measuring,
    preparing,
)
from volseg.errors import EnvironmentProblem, VolsegError
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.recipe import load_recipe


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digests(folder):
    """Return path → SHA-256 of every file except the ledger, to which each run adds a line."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ledger.jsonl"
    }


@pytest.fixture
def data(dataset, tmp_path):
    """Copy two scans and their masks into a dataset."""
    folder = tmp_path / "data"
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
        for n in (6, 7):
            shutil.copy(dataset / sub / f"scan_{n}.nii.gz", folder / sub)
    return folder


def measure(data, out, **options):
    return volseg.measure(
        image=data / "images",
        mask=data / "labels",
        out=out,
        **{"intensity_unit": "HU", "pages": False} | options,
    )


def erode(mask):
    """Correct a mask by hand: its first slice with a label becomes background."""
    volume = read_mask(mask)
    array = volume.array.copy()
    array[:, :, np.flatnonzero(array.any(axis=(0, 1)))[0]] = 0
    write_volume(volume.with_array(array), mask, like=mask)


@pytest.fixture
def refused():
    def check(call, *, names, folder):
        before = digests(folder)
        with pytest.raises(VolsegError) as refusal:
            call()
        assert (refusal.value.code, refusal.value.exit_code) == ("E_EXISTS", 2), refusal.value
        assert names in str(refusal.value)
        assert digests(folder) == before

    return check


def without_classes(recipe):
    """Return the recipe for a dataset that has no column of classes."""
    return recipe.model_copy(update={"classify": None})


@pytest.mark.slow
def test_a_corrected_mask_is_measured_within_the_memory_that_is_announced(model, data, tmp_path):
    out, texts = tmp_path / "out", []
    volseg.infer(data / "images", model=model, out=out)
    erode(out / "masks" / "scan_6.nii.gz")
    report = volseg.measure(out, max_ram="10M")
    assert list(report.failed) == ["scan_6"] and report.failed["scan_6"].startswith("E_RAM")
    report = volseg.measure(out, max_ram="20G", announce=texts.append)
    assert list(report.done) == ["scan_6"]
    text, *warnings = texts
    assert text.startswith("memory: at most") and text.endswith("for scan_6")
    assert [warning.partition(": the mask")[0] for warning in warnings] == [
        "warning: W_CORRECTED: scan_6"
    ]


def test_a_mask_corrected_by_hand_is_kept_and_measured(model, data, tmp_path):
    out = tmp_path / "out"
    volseg.infer(data / "images", model=model, out=out, figures=True)
    before = {row["case_id"]: row for row in rows(out / "lesions.csv") if row["lesion_id"] == "1"}
    mask = out / "masks" / "scan_6.nii.gz"
    erode(mask)
    corrected = mask.read_bytes()

    again = volseg.infer(data / "images", model=model, out=out, figures=True, overlap=0.1)
    assert mask.read_bytes() == corrected
    assert "scan_6" in again.kept
    assert any("W_EDITED: scan_6" in warning for warning in again.warnings)
    case = {row["case_id"]: row for row in rows(out / "cases.csv")}["scan_6"]
    assert "W_EDITED" in case["warnings"]

    report = volseg.measure(out)
    assert (report.exit_code, list(report.done), list(report.kept)) == (0, ["scan_6"], ["scan_7"])
    assert mask.read_bytes() == corrected
    after = {row["case_id"]: row for row in rows(out / "lesions.csv") if row["lesion_id"] == "1"}
    n_voxels = np.count_nonzero(read_mask(mask).array)
    assert int(after["scan_6"]["n_voxels"]) == n_voxels < int(before["scan_6"]["n_voxels"])
    assert after["scan_6"]["confidence_mean"] == after["scan_6"]["class_name"] == ""
    assert after["scan_6"]["label_name"] == before["scan_6"]["label_name"] == "lesion"
    case = {row["case_id"]: row for row in rows(out / "cases.csv")}["scan_6"]
    assert "W_CORRECTED" in case["warnings"]
    assert "W_EDITED" not in case["warnings"]
    np.testing.assert_array_equal(
        read_mask(out / "lesion_ids" / "scan_6.nii.gz").array > 0, read_mask(mask).array > 0
    )

    assert list(volseg.measure(out).done) == []
    third = volseg.infer(data / "images", model=model, out=out, figures=True)
    assert mask.read_bytes() == corrected
    assert "scan_6" in third.kept
    assert rows(out / "lesions.csv") != []
    later = {row["case_id"]: row for row in rows(out / "lesions.csv") if row["lesion_id"] == "1"}
    assert later["scan_6"] == after["scan_6"]

    erode(mask)
    assert list(volseg.measure(out).done) == ["scan_6"]


def test_probabilities_of_the_model_outlive_a_correction_of_its_mask(model, data, tmp_path):
    out = tmp_path / "out"
    given = {"model": model, "out": out, "pages": False, "probabilities": True}
    volseg.infer(data / "images", **given)
    stored = out / "probabilities" / "label_3" / "scan_6.nii.gz"
    before = stored.read_bytes()
    erode(out / "masks" / "scan_6.nii.gz")
    report = volseg.measure(out, pages=False)
    assert (list(report.done), stored.read_bytes()) == (["scan_6"], before)
    case = {row["case_id"]: row for row in rows(out / "cases.csv")}["scan_6"]
    assert "probabilities/ holds those of the model, from before the correction" in case["warnings"]
    assert list(volseg.measure(out, pages=False).done) == []
    stored.unlink()  # not needed for the case to be complete
    volseg.measure(out, pages=False)
    assert list(volseg.measure(out, pages=False).done) == []
    (out / "masks" / "scan_6.nii.gz").unlink()  # the model segments the scan again
    assert "scan_6" in volseg.infer(data / "images", **given).done
    assert stored.read_bytes() == before


@pytest.mark.slow
def test_other_results_that_were_changed_by_hand_are_refused_not_replaced(
    model, data, tmp_path, refused
):
    out = tmp_path / "out"
    scan = data / "images" / "scan_6.nii.gz"
    volseg.infer(scan, model=model, out=out)
    (out / "lesion_ids" / "scan_6.nii.gz").write_bytes(b"mine")
    refused(
        lambda: volseg.infer(scan, model=model, out=out),
        names="lesion_ids/scan_6.nii.gz",
        folder=out,
    )
    (out / "lesion_ids" / "scan_6.nii.gz").unlink()
    (out / "lesions.csv").write_text("edited in a spreadsheet")
    refused(lambda: volseg.infer(scan, model=model, out=out), names="lesions.csv", folder=out)
    (out / "lesions.csv").unlink()
    assert volseg.infer(scan, model=model, out=out).exit_code == 0


def test_outputs_that_are_inputs_are_refused(model, data, tmp_path, refused):
    results = tmp_path / "results"
    volseg.infer(data / "images", model=model, out=results)
    shutil.copytree(results, tmp_path / "r")
    calls = {
        "results of infer": lambda: volseg.measure(
            image=data / "images" / "scan_6.nii.gz",
            mask=results / "masks" / "scan_6.nii.gz",
            out=results,
        ),
        "another folder": lambda: volseg.infer(results / "masks", model=model, out=results),
    }
    for names, call in calls.items():
        refused(call, names=names, folder=tmp_path)

    ids = data / "lesion_ids"
    shutil.copytree(data / "labels", ids)
    (ids / "scan_7.nii.gz").unlink()
    image = data / "images" / "scan_6.nii.gz"
    for mask in (ids, ids / "scan_6.nii.gz"):
        images = image.parent if mask.is_dir() else image
        if mask.is_dir():
            (image.parent / "scan_7.nii.gz").unlink()
        refused(
            lambda m=mask, i=images: volseg.measure(image=i, mask=m, out=data),
            names="lesion_ids",
            folder=data,
        )


def test_a_reference_beside_the_scans_is_not_overwritten(model, data, refused):
    (data / "labels").rename(data / "masks")
    refused(
        lambda: volseg.infer(data / "images", model=model, out=data),
        names="masks/scan_6.nii.gz",
        folder=data,
    )
    assert not (data / ".volseg").exists()


def test_the_table_of_a_dataset_is_not_overwritten(data, tiny_recipe, model, tmp_path, refused):
    table = data / "cases.csv"
    lines = [f"images/scan_{n}.nii.gz,labels/scan_{n}.nii.gz\n" for n in (6, 7)]
    table.write_text("image,label\n" + "".join(lines))
    calls = {
        "measure": lambda: volseg.measure(cases=table, out=data, intensity_unit="HU"),
        "measure, folder": lambda: volseg.measure(cases=data, out=data, intensity_unit="HU"),
        "preprocess": lambda: volseg.preprocess(data, recipe=tiny_recipe, out=data),
        "train": lambda: volseg.train(data, recipe=tiny_recipe, out=data),
        "infer": lambda: volseg.infer(table, model=model, out=data),
        "evaluate": lambda: volseg.evaluate(reference=data, predicted=data / "labels", out=data),
        "import": lambda: volseg.import_nnunet(data, out=data),
    }
    for name, call in calls.items():
        before = digests(data)
        with pytest.raises(VolsegError):
            call()
        assert digests(data) == before, name


@pytest.mark.parametrize(
    "name", ["evaluation.csv", "detections.csv", "summary.json", "agreement.png", "froc.png"]
)
def test_evaluate_replaces_no_file_of_the_user(name, data, tmp_path, refused):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    refused(
        lambda: volseg.evaluate(reference=data / "labels", predicted=data / "labels", out=out),
        names=name,
        folder=out,
    )


@pytest.mark.parametrize(
    "name", ["run.json", "lesions.csv", "cases.csv", "report.html", "lesion_ids/scan_7.nii.gz"]
)
def test_measure_replaces_no_file_of_the_user(name, data, tmp_path, refused):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    refused(lambda: measure(data, out, pages=True), names=name, folder=out)


@pytest.mark.parametrize(
    "name", ["model.json", "segmentation_3.safetensors", "history_1.csv", "curves.png", "card.md"]
)
def test_train_replaces_no_file_of_the_user(name, dataset, tiny_recipe, tmp_path, refused):
    (tmp_path / name).write_text("mine")
    refused(
        lambda: volseg.train(dataset, recipe=tiny_recipe, out=tmp_path),
        names=str(tmp_path),
        folder=tmp_path,
    )


@pytest.mark.parametrize(
    "name", ["prepared.json", "cases.csv", "cases/scan_0/image.npy", "cases/scan_1"]
)
def test_preprocess_replaces_no_file_of_the_user(name, dataset, tiny_recipe, tmp_path, refused):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(VolsegError, match=name.replace("/", ".")) as refusal:
        volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path)
    assert refusal.value.code == "E_EXISTS"
    assert before.items() <= digests(tmp_path).items()


def test_preparing_a_case_again_keeps_what_the_user_put_beside_it(dataset, tiny_recipe, tmp_path):
    volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path / "out")
    cases = tmp_path / "out" / "cases"
    notes = [cases / "scan_0" / "notes.txt", cases / ".tmp-scan_0"]
    for note in notes:
        note.write_text("mine")
    preprocess = tiny_recipe.preprocess.model_copy(update={"spacing_mm": (2.5, 2.5, 2.5)})
    other = tiny_recipe.model_copy(update={"preprocess": preprocess})
    report = volseg.preprocess(dataset, recipe=other, out=tmp_path / "out")
    assert len(report.done) == 6
    assert [note.read_text() for note in notes] == ["mine", "mine"]


def test_a_plan_is_overwritten_only_if_it_is_as_volseg_wrote_it(data, tiny_recipe, tmp_path):
    tiny_recipe = without_classes(tiny_recipe)
    out = tmp_path / "plan.toml"
    volseg.plan(data, recipe=tiny_recipe, out=out)
    written = out.read_text()
    volseg.plan(data, recipe=tiny_recipe, out=out)
    assert out.read_text() == written
    load_recipe(out)  # the seal is a comment
    edited = written.replace("batch_size = 2", "batch_size = 7")
    assert edited != written
    for content in (edited, "my notes", ""):
        out.write_text(content)
        with pytest.raises(VolsegError) as refusal:
            volseg.plan(data, recipe=tiny_recipe, out=out)
        assert refusal.value.code == "E_EXISTS"
        assert out.read_text() == content


def test_rows_stay_in_the_tables_until_their_case_is_done_again(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    measure(data, out)
    before = (out / "lesions.csv").read_bytes()

    def full(*args, **kwargs):
        raise EnvironmentProblem("disk full", fix="free some space", code="E_DISK")

    monkeypatch.setattr(batch, "write_mask", full)
    files = digests(out / "lesion_ids")
    with pytest.raises(EnvironmentProblem):
        measure(data, out, calcium=True)
    assert (out / "lesions.csv").read_bytes() == before
    assert digests(out / "lesion_ids") == files
    assert {row["status"] for row in rows(out / "cases.csv")} == {"done"}
    assert all("W_STALE" in row["warnings"] for row in rows(out / "cases.csv"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "write_mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(data, out, calcium=True)
    assert (out / "lesions.csv").read_bytes() == before
    monkeypatch.undo()
    assert list(measure(data, out).kept) == ["scan_6", "scan_7"]  # nothing was lost
    assert not any("W_STALE" in row["warnings"] for row in rows(out / "cases.csv"))
    assert list(measure(data, out, calcium=True).done) == ["scan_6", "scan_7"]


def test_a_damaged_record_gives_a_warning_and_its_case_is_done_again(data, tmp_path):
    out = tmp_path / "out"
    measure(data, out)
    record = out / ".volseg" / "scan_6.json"
    record.write_bytes(record.read_bytes()[:100])
    (data / "images" / "scan_6.nii.gz").rename(tmp_path / "scan_6.nii.gz")
    report = measure(data, out)
    assert any("W_RECORD: scan_6" in warning for warning in report.warnings)
    assert [row["status"] for row in rows(out / "cases.csv")] == ["unknown", "done"]
    (tmp_path / "scan_6.nii.gz").rename(data / "images" / "scan_6.nii.gz")
    assert list(measure(data, out).done) == ["scan_6"]
    assert [row["status"] for row in rows(out / "cases.csv")] == ["done", "done"]


def test_a_scan_replaced_while_it_is_measured_is_recorded_as_it_was_read(
    data, tmp_path, monkeypatch
):
    out, scan = tmp_path / "out", data / "images" / "scan_6.nii.gz"
    read = hashlib.sha256(scan.read_bytes()).hexdigest()
    original = mask_measurement.measure_largest

    def replacing(image, *args, **kwargs):
        if scan.exists() and hashlib.sha256(scan.read_bytes()).hexdigest() == read:
            brighter = read_volume(scan)
            write_volume(brighter.with_array(brighter.array + 100), scan, like=scan)
        return original(image, *args, **kwargs)

    monkeypatch.setattr(mask_measurement, "measure_largest", replacing)
    measure(data, out)
    record = json.loads((out / ".volseg" / "scan_6.json").read_text())
    assert record["source"]["sha256"] == record["inputs"][0] == read
    monkeypatch.undo()
    assert list(measure(data, out).done) == ["scan_6"]
    assert json.loads((out / ".volseg" / "scan_6.json").read_text())["inputs"][0] != read


def test_inputs_are_hashed_separately_only_to_check_an_earlier_result(data, tmp_path, monkeypatch):
    hashed = []
    for name in ("digest_of", "mask_digest_of"):
        original = getattr(batch, name)

        def noted(path, *scan, original=original):
            hashed.append(path)
            return original(path, *scan)

        monkeypatch.setattr(batch, name, noted)
    measure(data, tmp_path / "out")
    assert hashed == []
    measure(data, tmp_path / "out")
    assert len(hashed) == len(set(hashed)) == 4


def test_a_bug_in_one_case_is_a_failed_row_and_the_others_go_on(data, tmp_path, monkeypatch):
    out, original = tmp_path / "out", measuring.measure_mask

    def buggy(case, *args, **kwargs):
        if case.id == "scan_6":
            raise ZeroDivisionError("a bug")
        return original(case, *args, **kwargs)

    monkeypatch.setattr(measuring, "measure_mask", buggy)
    report = measure(data, out)
    assert report.exit_code == 3
    assert [(row["status"], row["reason"][:5]) for row in rows(out / "cases.csv")] == [
        ("failed", "E_BUG"),
        ("done", ""),
    ]
    assert "ZeroDivisionError: a bug" in (out / ".volseg" / "scan_6.traceback.txt").read_text()
    monkeypatch.undo()
    assert measure(data, out).exit_code == 0
    assert not (out / ".volseg" / "scan_6.traceback.txt").exists()


def test_a_label_name_that_cannot_be_encoded_does_not_end_the_batch(data, tmp_path):
    report = measure(
        data, tmp_path / "out", label_names={3: "lesion \ud800"}, figures=True, pages=True
    )
    assert report.exit_code in (0, 3, 4)
    assert len(rows(tmp_path / "out" / "cases.csv")) == 2


@pytest.mark.slow
def test_a_full_disk_in_the_first_case_loses_nothing(data, tmp_path):
    """Limit the size of files, which ends a write as a full disk does."""
    out = tmp_path / "out"
    measure(data, out, pages=True)
    before = digests(out)
    script = f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        import volseg
        from volseg.errors import EnvironmentProblem
        try:
            volseg.measure(image={str(data / "images")!r}, mask={str(data / "labels")!r},
                           out={str(out)!r}, intensity_unit="HU", calcium=True)
        except EnvironmentProblem as problem:
            sys.exit(problem.exit_code)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120)
    assert ended.returncode == 5
    after = digests(out)
    names = [name for name in before if not name.startswith(".volseg/ledger")]
    assert [
        name
        for name in names
        if after.get(name) != before[name] and not name.endswith(("cases.csv", ".html"))
    ] == []
    assert list(measure(data, out, pages=True).kept) == ["scan_6", "scan_7"]
    assert digests(out)["lesions.csv"] == before["lesions.csv"]


@pytest.mark.slow
def test_a_mask_restored_to_an_earlier_result_is_kept_as_a_correction(model, data, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(model, other)
    content = json.loads((other / "model.json").read_text())
    content["recipe"]["postprocess"] = [{"step": "remove_small", "min_volume_mm3": 1e6}]
    (other / "model.json").write_text(json.dumps(content))
    scan = data / "images" / "scan_6.nii.gz"
    volseg.infer(scan, model=model, out=out)
    mask = out / "masks" / "scan_6.nii.gz"
    earlier = mask.read_bytes()
    volseg.infer(scan, model=other, out=out)
    assert not read_mask(mask).array.any()
    mask.write_bytes(earlier)
    assert list(volseg.measure(out).done) == ["scan_6"]
    assert mask.read_bytes() == earlier
    assert list(volseg.infer(scan, model=model, out=out).kept) == ["scan_6"]
    assert mask.read_bytes() == earlier


@pytest.mark.parametrize("is_measured", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_corrected_mask_is_not_the_result_of_another_scan_of_that_name(
    is_measured, model, data, tmp_path
):
    out, other = tmp_path / "out", tmp_path / "other"
    scan = data / "images" / "scan_6.nii.gz"
    volseg.infer(scan, model=model, out=out)
    mask = out / "masks" / "scan_6.nii.gz"
    erode(mask)
    if is_measured:
        volseg.measure(out)
    corrected, numbers = mask.read_bytes(), rows(out / "lesions.csv")
    other.mkdir()
    shutil.copy(data / "images" / "scan_7.nii.gz", other / "scan_6.nii.gz")

    report = volseg.infer(other / "scan_6.nii.gz", model=model, out=out)
    assert (report.exit_code, list(report.kept)) == (4, [])
    reason = report.failed["scan_6"]
    assert reason.startswith("E_CHANGED") and "corrected by hand" in reason
    assert (rows(out / "lesions.csv"), rows(out / "cases.csv")[0]["status"]) == ([], "failed")
    assert mask.read_bytes() == corrected

    report = volseg.infer(scan, model=model, out=out)  # that scan is restored
    assert (list(report.kept), report.exit_code) == (["scan_6"], 0)
    assert (rows(out / "lesions.csv"), rows(out / "cases.csv")[0]["status"]) == (numbers, "done")


def test_damaged_measurements_of_a_corrected_mask_are_measured_again(model, data, tmp_path):
    out = tmp_path / "out"
    volseg.infer(data / "images", model=model, out=out)
    erode(out / "masks" / "scan_6.nii.gz")
    volseg.measure(out)
    numbers = rows(out / "lesions.csv")
    for name in (".volseg/scan_6.rows.jsonl", "lesion_ids/scan_6.nii.gz"):
        (out / name).unlink()
        assert list(volseg.measure(out).done) == ["scan_6"], name
        assert rows(out / "lesions.csv") == numbers


def test_a_case_that_failed_on_another_scan_recovers_when_its_scan_is_restored(data, tmp_path):
    out, scan = tmp_path / "out", data / "images" / "scan_6.nii.gz"
    good = scan.read_bytes()
    measure(data, out)
    numbers = rows(out / "lesions.csv")
    scan.write_bytes(good[: len(good) // 2])
    assert list(measure(data, out).failed) == ["scan_6"]
    scan.write_bytes(good)
    assert list(measure(data, out, calcium=True, max_ram="10M").failed) == ["scan_6", "scan_7"]
    assert rows(out / "lesions.csv") == numbers
    (row,) = (row for row in rows(out / "cases.csv") if row["case_id"] == "scan_6")
    assert row["status"] == "done" and "W_STALE" in row["warnings"] and "E_RAM" in row["warnings"]


@pytest.mark.parametrize("place", ["case", "failed"])
@pytest.mark.parametrize(
    "change",
    [
        {"case_id": "../../../index"},
        {"case_id": "scan_7"},
        {"case_id": None},
        {"warnings": 7},
        {"reason": ["a"]},
        {"total_volume_ml": "much"},
        {"image": {"a": 1}},
    ],
    ids=str,
)
def test_an_untrusted_record_writes_nothing_elsewhere_and_is_a_row_unknown(
    place, change, data, tmp_path
):
    out, victim = tmp_path / "a" / "out", tmp_path / "a" / "index.html"
    measure(data, out)
    victim.write_text("mine")
    path = out / ".volseg" / "scan_6.json"
    record = json.loads(path.read_text())
    row = {"case_id": "scan_6", "status": "failed", "reason": "E_X: so", "image": "scan_6.nii.gz"}
    record[place] = {**(record["case"] if place == "case" else row), **change}
    record["files"] = {
        name: digest for name, digest in record["files"].items() if not name.startswith("viewer/")
    }
    path.write_text(json.dumps(record))
    volseg.report(out)
    (data / "images" / "scan_6.nii.gz").rename(data / "scan_6.nii.gz")
    report = measure(data, out, pages=True)
    assert any("W_RECORD: scan_6" in warning for warning in report.warnings)
    assert {row["case_id"]: row["status"] for row in rows(out / "cases.csv")} == {
        "scan_6": "unknown",
        "scan_7": "done",
    }
    (data / "scan_6.nii.gz").rename(data / "images" / "scan_6.nii.gz")
    assert "scan_6" in measure(data, out, pages=True).done
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [{"failed": 3}, {"remark": 1}, {"files": {}}, {"source": []}, {"corrected": []}],
    ids=str,
)
def test_other_parts_of_a_record_are_checked_too(change, data, tmp_path):
    out = tmp_path / "out"
    measure(data, out)
    path = out / ".volseg" / "scan_6.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    volseg.report(out)
    assert list(measure(data, out).done) == ["scan_6"]


@pytest.mark.parametrize(
    "content",
    [
        b"[1]\n",
        b"7\n",
        b'{"case_id": "scan_6", "lesion_id": "x"}\n',
        b'{"case_id": "scan_6", "lesion_id": 1, "notes": 3}\n',
        b'{"case_id": "scan_7", "lesion_id": 1}\n',
        b'{"lesion_id": 1}\n',
    ],
    ids=str,
)
def test_untrusted_rows_of_another_case_leave_theirs_unknown_and_the_others_whole(
    content, data, tmp_path
):
    out = tmp_path / "out"
    measure(data, out, pages=True)
    lesions = rows(out / "lesions.csv")
    path, lines = out / ".volseg" / "scan_6.json", out / ".volseg" / "scan_6.rows.jsonl"
    first_line = lines.read_bytes().splitlines(keepends=True)[0]
    lines.write_bytes(first_line + content)  # after a good line
    record = json.loads(path.read_text())
    record["files"][".volseg/scan_6.rows.jsonl"] = hashlib.sha256(lines.read_bytes()).hexdigest()
    path.write_text(json.dumps(record))
    shutil.copytree(out, tmp_path / "copy")
    report = volseg.report(tmp_path / "copy")
    assert any("W_RECORD: scan_6" in warning for warning in report.warnings)
    assert list(report.done) == ["scan_7"]
    report = measure(data, out, pages=True)
    assert (report.exit_code, list(report.kept), list(report.failed)) == (3, ["scan_7"], ["scan_6"])
    assert any("W_RECORD: scan_6" in warning for warning in report.warnings)
    assert {row["case_id"]: row["status"] for row in rows(out / "cases.csv")} == {
        "scan_6": "unknown",
        "scan_7": "done",
    }
    assert rows(out / "lesions.csv") == [row for row in lesions if row["case_id"] == "scan_7"]
    assert list(measure(data, out, pages=True).done) == ["scan_6"]
    assert rows(out / "lesions.csv") == lesions


def infer_and_erode(model, data, out):
    volseg.infer(data / "images", model=model, out=out)
    erode(out / "masks" / "scan_6.nii.gz")


def test_a_corrected_mask_that_cannot_be_measured_leaves_no_number_unmarked(model, data, tmp_path):
    out = tmp_path / "out"
    volseg.infer(data / "images", model=model, out=out)
    mask = out / "masks" / "scan_6.nii.gz"
    good, numbers = mask.read_bytes(), rows(out / "lesions.csv")
    mask.write_bytes(b"garbage")
    report = volseg.measure(out)
    assert (report.exit_code, list(report.failed)) == (3, ["scan_6"])
    warnings = {row["case_id"]: row["warnings"] for row in rows(out / "cases.csv")}
    assert "W_STALE: the last run failed (E_" in warnings["scan_6"]
    assert "W_EDITED: " in warnings["scan_6"]
    assert f"`volseg measure {out}`" in warnings["scan_6"]
    assert "W_STALE" not in warnings["scan_7"] and "W_EDITED" not in warnings["scan_7"]
    assert "W_EDITED: " in (out / "report.html").read_text("utf-8")
    assert rows(out / "lesions.csv") == numbers
    mask.write_bytes(good)
    erode(mask)
    assert list(volseg.measure(out).done) == ["scan_6"]
    warnings = {row["case_id"]: row["warnings"] for row in rows(out / "cases.csv")}
    assert "W_STALE" not in warnings["scan_6"] and "W_EDITED" not in warnings["scan_6"]


def test_pages_mark_a_corrected_mask_that_was_not_measured_yet(model, data, tmp_path):
    out = tmp_path / "out"
    infer_and_erode(model, data, out)
    report = volseg.report(out)
    warnings = report.warnings
    assert any(warning.startswith("W_EDITED: scan_6: ") for warning in warnings)
    for page in ("report.html", "viewer/scan_6.html"):
        assert "W_EDITED: " in (out / page).read_text("utf-8"), page
    assert "W_EDITED: " not in (out / "viewer" / "scan_7.html").read_text("utf-8")
    volseg.measure(out)
    volseg.report(out)
    assert not any("W_EDITED: " in page.read_text("utf-8") for page in out.rglob("*.html"))


@pytest.mark.parametrize("time", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_lesions_of_a_mask_that_was_corrected_and_not_measured_are_not_compared(
    time, model, data, tmp_path
):
    folders = {name: tmp_path / name for name in ("before", "after")}
    for folder in folders.values():
        volseg.infer(data / "images", model=model, out=folder)
    call = {"out": tmp_path / "out", "registration": False}
    volseg.compare(*folders.values(), **call)
    mask = folders[time] / "masks" / "scan_6.nii.gz"
    drawn = mask.read_bytes()
    erode(mask)
    report = volseg.compare(*folders.values(), **call)
    assert (list(report.failed), list(report.kept)) == (["scan_6"], ["scan_7"])
    assert report.failed["scan_6"].startswith(f"E_EDITED: {mask}: ")
    assert report.failed["scan_6"].endswith(f"run `volseg measure {folders[time]}` first")
    table = rows(tmp_path / "out" / "response.csv")
    assert {row["patient"]: row["response"] for row in table}["scan_6"] == ""
    corrected = mask.read_bytes()
    mask.write_bytes(drawn)  # restored
    assert volseg.compare(*folders.values(), **call).exit_code == 0
    mask.write_bytes(corrected)
    volseg.measure(folders[time])
    report = volseg.compare(*folders.values(), **call)
    assert (list(report.done), list(report.kept)) == (["scan_6"], ["scan_7"])


@pytest.fixture
def calls(data, dataset, model, tiny_recipe, tmp_path):
    """Return command → function that calls it with an output folder."""
    results, labels = tmp_path / "results", data / "labels"
    measure(data, results)
    return {
        "measure": lambda out: measure(data, out),
        "measure again": lambda out: volseg.measure(out),
        "evaluate": lambda out: volseg.evaluate(reference=labels, predicted=labels, out=out),
        "compare": lambda out: volseg.compare(results, results, out=out, registration=False),
        "infer": lambda out: volseg.infer(data / "images", model=model, out=out),
        "preprocess": lambda out: volseg.preprocess(dataset, recipe=tiny_recipe, out=out),
        "train": lambda out: volseg.train(dataset, recipe=tiny_recipe, out=out),
        "plan": lambda out: volseg.plan(dataset, recipe=tiny_recipe, out=out / "plan.toml"),
    }


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("measure", measuring, "measure_mask"),
        pytest.param("measure again", correcting, "measure_mask", marks=pytest.mark.slow),
        ("evaluate", mask_pairs, "evaluate_case"),
        ("compare", comparing.PatientComparison, "run"),
        ("compare", comparing, "input_digests"),
        pytest.param("preprocess", preparing.TrainingSet, "analyse", marks=pytest.mark.slow),
        ("preprocess", preparing.Preparation, "prepare"),
    ],
)
def test_the_traceback_that_a_reason_names_is_there_until_the_case_is_done(
    command, module, name, calls, model, data, tmp_path, monkeypatch
):
    out, call, met = tmp_path / "out", calls[command], []
    if command == "measure again":
        infer_and_erode(model, data, out)
    original = getattr(module, name)

    def buggy(*args, **kwargs):
        if not met:
            met.append(args)
            raise ZeroDivisionError("a bug")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, buggy)
    ((case, reason),) = call(out).failed.items()
    trace = out / ".volseg" / f"{case}.traceback.txt"
    assert reason.startswith("E_BUG: unexpected ZeroDivisionError at ")
    assert reason.endswith(f"; to fix: report it with {trace}")
    assert "ZeroDivisionError: a bug" in trace.read_text()
    monkeypatch.undo()
    assert call(out).exit_code == 0
    assert not trace.exists()


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize(
    "command", ["measure", "evaluate", "compare", "infer", "preprocess", "train", "plan"]
)
def test_a_file_at_the_path_of_the_output_folder_is_refused(
    command, below, calls, tmp_path, refused
):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(lambda: calls[command](file / below), names=str(file), folder=tmp_path)


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_nothing_is_written_among_the_scans_and_masks_of_a_dataset(folder, data, tiny_recipe):
    rows = [f"images/scan_{n}.nii.gz,labels/scan_{n}.nii.gz" for n in (6, 7)]
    (data / "cases.csv").write_text("\n".join(["image,label", *rows]))
    out, before = data / folder, sorted(data.rglob("*"))
    calls = (
        lambda: volseg.preprocess(data, recipe=without_classes(tiny_recipe), out=out),
        lambda: volseg.measure(cases=data / "cases.csv", out=out),
    )
    for call in calls:
        with pytest.raises(VolsegError) as refused:
            call()
        assert refused.value.code == "E_EXISTS"
    assert [path for path in sorted(data.rglob("*")) if ".volseg" not in path.parts] == before
