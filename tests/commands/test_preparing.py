import json
import shutil

import numpy as np
import pytest
import torch

import volseg
from volseg.commands.prepared import load_prepared
from volseg.commands.preparing import Preparation
from volseg.commands.training_cases import assign_splits
from volseg.errors import ScanError, VolsegError
from volseg.io.cases import Case
from volseg.io.prepared import read_prepared_case


@pytest.fixture
def folder(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data"


def test_a_dataset_becomes_memory_mapped_arrays_and_the_test_split_is_left_alone(
    folder, tiny_recipe, tmp_path
):
    report = volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "p")
    assert report.exit_code == 0
    assert sorted(report.done) == [f"scan_{n}" for n in range(6)]
    case = read_prepared_case(tmp_path / "p" / "cases", "scan_1")
    assert isinstance(case.image, np.memmap)
    assert case.image.shape[1:] == case.mask.shape == tuple(case.record["shape"])
    assert set(np.unique(case.mask)) == {0, 1}  # the mask's value 3 is class 1 inside
    assert case.image[0][case.mask == 1].mean() > case.image[0][case.mask == 0].mean() + 1
    assert (case.mask[tuple(case.foreground[1].T)] == 1).all()
    assert (case.record["split"], case.record["class"]) == ("train", "high")
    fingerprint = report.fingerprint
    assert fingerprint["n_cases"] == 4
    assert fingerprint["median_spacing_mm"] == pytest.approx([1.6, 2.0, 2.4], abs=0.4)
    assert fingerprint["foreground"]["ct"]["mean"] == pytest.approx(150, abs=2)


def test_a_second_call_prepares_only_what_is_missing_or_changed(folder, tiny_recipe, tmp_path):
    out = tmp_path / "p"
    volseg.preprocess(folder, recipe=tiny_recipe, out=out)
    before = {path: path.stat().st_mtime_ns for path in (out / "cases").glob("*/image.npy")}
    again = volseg.preprocess(folder, recipe=tiny_recipe, out=out)
    assert (list(again.done), len(again.kept)) == ([], 6)
    shutil.rmtree(out / "cases" / "scan_2")
    assert list(volseg.preprocess(folder, recipe=tiny_recipe, out=out).done) == ["scan_2"]
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.parent.name for path in before if before[path] != after[path]} == {"scan_2"}
    # Other content under the same name.
    shutil.copy(folder / "images" / "scan_7.nii.gz", folder / "images" / "scan_4.nii.gz")
    assert "scan_4" in volseg.preprocess(folder, recipe=tiny_recipe, out=out).done


def test_a_missing_gpu_is_refused_before_anything_is_read(folder, tiny_recipe):
    for path in (folder / "images").iterdir():
        path.unlink()
    if not torch.cuda.is_available():
        with pytest.raises(VolsegError, match="torch finds no CUDA device"):
            volseg.plan(folder, recipe=tiny_recipe, device="cuda")


@pytest.mark.parametrize("n_replaced", [0, 1, 5])
def test_a_folder_that_is_prepared_again_is_whole_or_refused_but_never_of_two_settings(
    n_replaced, folder, tiny_recipe, tmp_path, monkeypatch
):
    out, prepare, begun = tmp_path / "p", Preparation.prepare, []
    volseg.preprocess(folder, recipe=tiny_recipe, out=out)
    seeds = {case.id: case.foreground for case in load_prepared(out, None)[2]}

    def interrupted(preparation, case):
        if len(begun) == n_replaced:
            raise KeyboardInterrupt
        begun.append(case.id)
        prepare(preparation, case)

    monkeypatch.setattr(Preparation, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        volseg.preprocess(folder, recipe=tiny_recipe, out=out, seed=1)
    monkeypatch.undo()
    if n_replaced:
        with pytest.raises(VolsegError, match=f"{n_replaced} of its 6 cases, such as {begun[0]},"):
            load_prepared(out, None)
    else:
        kept = {case.id: case.foreground for case in load_prepared(out, None)[2]}
        assert all((kept[name][1] == voxels[1]).all() for name, voxels in seeds.items())
    assert sorted(volseg.preprocess(folder, recipe=tiny_recipe, out=out).done) == sorted(begun)
    load_prepared(out, None)


def test_a_second_call_that_can_prepare_nothing_leaves_the_folder_as_it_was(
    folder, tiny_recipe, tmp_path, monkeypatch
):
    def failing(preparation, case):
        raise ScanError("no", fix="none", code="E_X")

    volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "p")
    tables = {name: (tmp_path / "p" / name).read_bytes() for name in ("prepared.json", "cases.csv")}
    monkeypatch.setattr(Preparation, "prepare", failing)
    report = volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "p", seed=1)
    assert report.exit_code == 4
    assert "W_STALE" in report.warnings[-1]
    assert {name: (tmp_path / "p" / name).read_bytes() for name in tables} == tables
    assert len(load_prepared(tmp_path / "p", None)[2]) == 6


def test_a_first_preparation_that_is_interrupted_says_so(
    folder, tiny_recipe, tmp_path, monkeypatch
):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Preparation, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "p")
    with pytest.raises(VolsegError, match="preparing it was interrupted"):
        load_prepared(tmp_path / "p", None)


def test_a_bad_case_is_a_row_with_its_reason_and_the_others_are_prepared(
    folder, tiny_recipe, tmp_path
):
    path = folder / "images" / "scan_1.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    shutil.copy(folder / "labels" / "scan_3.nii.gz", folder / "labels" / "scan_2.nii.gz")
    report = volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "p")
    assert report.exit_code == 3
    assert sorted(report.failed) == ["scan_1", "scan_2"]
    assert report.failed["scan_1"].startswith("E_TRUNCATED")
    assert report.failed["scan_2"].startswith("E_PAIR")
    assert sorted(report.done) == ["scan_0", "scan_3", "scan_4", "scan_5"]
    assert sorted(json.loads((tmp_path / "p" / "prepared.json").read_text())["failed"]) == [
        "scan_1",
        "scan_2",
    ]
    with pytest.raises(
        VolsegError,
        match=r"2 of its cases cannot be used: \(1\) scan_1: E_TRUNCATED.*\(2\) scan_2: E_PAIR",
    ):
        volseg.train(folder, recipe=tiny_recipe, out=tmp_path / "m")


def test_mask_values_the_recipe_does_not_name_are_refused(folder, tiny_recipe, tmp_path):
    recipe = tiny_recipe.model_copy(
        update={"data": tiny_recipe.data.model_copy(update={"labels": {"lesion": 2}})}
    )
    with pytest.raises(VolsegError, match=r"holds values \[3\]"):
        volseg.preprocess(folder, recipe=recipe, out=tmp_path / "p")


def test_no_patient_is_on_both_sides_of_a_drawn_split():
    cases = [Case(f"c{n}", {}, patient=f"p{n // 3}") for n in range(30)]
    drawn = assign_splits(cases, 0.2, seed=0)
    sides = {
        side: {case.patient for case in drawn if case.split == side} for side in ("train", "val")
    }
    assert not sides["train"] & sides["val"]
    assert len(sides["val"]) == 2
    assert [case.split for case in drawn] == [
        case.split for case in assign_splits(cases, 0.2, seed=0)
    ]
    assert [case.split for case in drawn] != [
        case.split for case in assign_splits(cases, 0.2, seed=1)
    ]


def test_a_dataset_without_masks_or_with_one_patient_cannot_be_trained_on(
    folder, tiny_recipe, tmp_path
):
    with pytest.raises(VolsegError, match="two patients"):
        assign_splits([Case("a", {}, patient="p"), Case("b", {}, patient="p")], 0.2, seed=0)
    with pytest.raises(VolsegError, match="none of its 8 cases has a mask"):
        volseg.preprocess(folder / "images", recipe=tiny_recipe, out=tmp_path / "p")


def test_a_scan_without_split_goes_where_its_patient_is(tmp_path, tiny_recipe, folder):
    table = (folder / "cases.csv").read_text().splitlines()
    lines = [table[0] + ",patient"]
    for line in table[1:]:
        name = line.split(",")[0]
        # One patient has scans 0 and 7 (test), another 1 and 4 (val); 0 and 1 have no split.
        patient = {"scan_0": "p", "scan_7": "p", "scan_1": "q", "scan_4": "q"}.get(name, name)
        lines.append(
            (line.replace(",train,", ",,") if name in ("scan_0", "scan_1") else line)
            + f",{patient}"
        )
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "p")
    cases = json.loads((tmp_path / "p" / "prepared.json").read_text())["cases"]
    assert "scan_0" not in cases
    assert cases["scan_1"] == "val"
    assert cases["scan_2"] == "train"
    (folder / "cases.csv").write_text("\n".join(lines).replace(",val,", ",held out,") + "\n")
    with pytest.raises(VolsegError, match="split 'held out' is unknown"):
        volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / "q")


def test_a_prepared_case_that_lost_a_file_or_changed_its_class_is_prepared_again(
    folder, tiny_recipe, tmp_path
):
    out = tmp_path / "p"
    volseg.preprocess(folder, recipe=tiny_recipe, out=out)
    (out / "cases" / "scan_2" / "image.npy").unlink()
    assert list(volseg.preprocess(folder, recipe=tiny_recipe, out=out).done) == ["scan_2"]
    table = (folder / "cases.csv").read_text()
    (folder / "cases.csv").write_text(
        table.replace("scan_0.nii.gz,train,1", "scan_0.nii.gz,train,4")
    )
    assert list(volseg.preprocess(folder, recipe=tiny_recipe, out=out).done) == ["scan_0"]
    assert read_prepared_case(out / "cases", "scan_0").record["class"] == "high"


def test_a_missing_class_column_is_named(folder, tiny_recipe, tmp_path):
    table = (folder / "cases.csv").read_text().replace(",grade", ",rating")
    (folder / "cases.csv").write_text(table)
    for command in (volseg.preprocess, volseg.train):
        with pytest.raises(VolsegError, match="there is no column 'grade', which"):
            command(folder, recipe=tiny_recipe, out=tmp_path / "p")
    (problem,) = (p for p in volseg.check(folder, tiny_recipe) if p["code"] == "E_DATASET")
    assert "there is no column 'grade', which" in problem["problem"]
