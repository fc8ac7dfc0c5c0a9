"""`volseg cases` writes what was recognised, as a table that every command reads the same."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from laws import ras
from PIL import Image

import volseg
from volseg.errors import VolsegError
from volseg.io.layouts import find_cases, survey_cases
from volseg.io.volumes import write_volume
from volseg.volume import Geometry, Volume

LAYOUTS = {
    "brats": ("B{n}/B{n}_t1.nii.gz", "B{n}/B{n}_flair.nii.gz", "B{n}/B{n}_seg.nii.gz"),
    "multiple sclerosis": ("p{n}_FLAIR.nii.gz", "p{n}_FLAIR_lesions.nii.gz"),
    "bids": (
        "sub-{n}/ses-1/anat/sub-{n}_ses-1_T1w.nii.gz",
        "derivatives/manual/sub-{n}/ses-1/anat/sub-{n}_ses-1_desc-lesion_mask.nii.gz",
    ),
    "a folder per patient": ("pat{n}/image.nii.gz", "pat{n}/mask.nii.gz"),
}
DESCRIBED = {  # files that a list or table names
    "nnU-Net with a list": ("imagesTr/c{n}_0000.nii.gz", "labels2/c{n}.nii.gz"),
    "a table from Windows": ("Scans/Sc{n}.nii.gz", "Masks/Ma{n}.nii.gz"),
}
MASKS = ("seg", "mask", "lesions", "labels2")


def describe(folder, layout):
    """Write the list or table of a layout; return what is given to the commands."""
    if layout == "nnU-Net with a list":
        pairs = [
            {"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labels2/c{n}.nii.gz"}
            for n in range(4)
        ]
        labels = {"0": "background", "1": "ball"}
        content = {"modality": {"0": "MR"}, "labels": labels, "training": pairs}
        (folder / "dataset.json").write_text(json.dumps(content))
    if layout == "a table from Windows":
        lines = [f"P{n};Scans\\Sc{n}.nii.gz;Masks\\Ma{n}.nii.gz;" for n in range(4)]
        text = "\r\n".join(["sep=;", "Patient ID;Image;Mask;", *lines, ""])
        (folder / "cases.csv").write_bytes(text.encode("utf-8-sig"))
        return folder / "cases.csv"
    return folder


@pytest.fixture
def dataset(tmp_path):
    """Return a function that writes four cases with a bright ball each, in a layout."""

    def make(patterns):
        rng = np.random.default_rng(0)
        grid = np.indices((16, 16, 16)).reshape(3, -1).T
        for n in range(4):
            ball = (np.linalg.norm(grid - 8, axis=1) < 3 + n).reshape(16, 16, 16)
            scan = (100 * ball + rng.normal(20, 5, ball.shape)).astype(np.float32)
            for pattern in patterns:
                is_mask = any(word in pattern.casefold() for word in MASKS)
                path = tmp_path / "data" / pattern.format(n=n)
                path.parent.mkdir(parents=True, exist_ok=True)
                array = ball.astype(np.uint8) if is_mask else scan
                geometry = Geometry(ball.shape, ras((1.0, 1.0, 1.0)))
                write_volume(Volume(np.asfortranarray(array), geometry), path)
        return tmp_path / "data"

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_is_the_dataset(layout, dataset, tmp_path):
    folder = dataset(LAYOUTS[layout])
    report = volseg.cases(folder, out=tmp_path / "t" / "cases.csv")
    assert (len(report.done), report.masks) == (4, 4)
    read = find_cases(report.out, None)
    again = survey_cases(folder).cases
    files = [(case.id, case.reference and case.reference.resolve()) for case in read]
    assert files == [(case.id, case.reference) for case in again]
    assert [{k: p.resolve() for k, p in c.images.items()} for c in read] == [
        c.images for c in again
    ]
    assert not any(case.classes for case in read)
    why = {line.split(",")[-1] for line in report.out.read_text().splitlines()[1:]}
    n_files = len(LAYOUTS[layout])
    assert why == {f"{n_files} files with this id in folder or file name"}
    with pytest.raises(VolsegError, match="exists and may have been edited"):
        volseg.cases(folder, out=report.out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_plan_and_training_read_a_layout_alike(layout, dataset, tmp_path):
    folder = dataset(LAYOUTS[layout])
    problems = [p for p in volseg.check(folder) if p["code"].startswith("E_")]
    assert problems == []
    plan = volseg.plan(folder, memory="2G", device="cpu")
    assert plan.cases == 3 and plan.notes[0].startswith("N_NAMES: ")  # one validates
    prepared = volseg.preprocess(folder, out=tmp_path / "p")
    assert len(prepared.done) == 4 and not prepared.failed


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, *DESCRIBED])
def test_a_layout_is_trained_and_inferred_without_an_edit(layout, dataset, tmp_path):
    folder = describe(dataset((LAYOUTS | DESCRIBED)[layout]), layout)
    volseg.train(folder, out=tmp_path / "m", time_budget_seconds=60, folds=1, device="cpu")
    report = volseg.infer(folder, model=tmp_path / "m", out=tmp_path / "r", device="cpu")
    assert len(report.done) == 4 and not report.failed
    scores = volseg.evaluate(reference=folder, predicted=tmp_path / "r", out=tmp_path / "e")
    assert scores.evaluation["dice"].to_numpy().mean() > 0.5


def test_a_folder_that_is_scans_and_masks_is_measured(dataset, tmp_path):
    folder = dataset(LAYOUTS["multiple sclerosis"])
    report = volseg.measure(image=folder, mask=folder, out=tmp_path / "r")
    assert sorted(report.done) == [f"p{n}_FLAIR" for n in range(4)]
    shutil.move(folder / "p0_FLAIR_lesions.nii.gz", tmp_path)
    report = volseg.measure(image=folder, mask=folder, out=tmp_path / "q")
    assert sorted(report.done) == [f"p{n}_FLAIR" for n in (1, 2, 3)]
    assert [text for text in report.warnings if text.startswith("W_NO_LABEL: ")]


def test_the_channel_to_measure_on_is_asked_for_and_given(dataset, tmp_path):
    folder = dataset(LAYOUTS["brats"])
    with pytest.raises(VolsegError, match=r"has several channels: .*'t1'.*--channel flair"):
        volseg.measure(cases=folder, out=tmp_path / "r")
    report = volseg.measure(cases=folder, channel="t1", out=tmp_path / "r")
    assert sorted(report.cases["image"]) == [f"B{n}_t1.nii.gz" for n in range(4)]


def test_a_folder_of_images_is_told_apart_from_scans(tmp_path):
    for name in ("benign", "malignant"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (20, 20)).save(tmp_path / "data" / name / "1.png")
    calls = {
        "cases.csv": lambda out: volseg.cases(tmp_path / "data", out=out),
        "model": lambda out: volseg.train(tmp_path / "data", recipe="smoke", out=out),
        "scores": lambda out: volseg.evaluate(
            reference=tmp_path / "data", predicted=tmp_path / "data" / "benign", out=out
        ),
    }
    for name, call in calls.items():
        with pytest.raises(VolsegError, match=r"2D images, not scans.*volseg train"):
            call(tmp_path / name)
        assert not (tmp_path / name).exists()
