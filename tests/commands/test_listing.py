"""`volseg cases` writes what was recognised, as a table that every command reads the same."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from laws import ras

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


@pytest.fixture
def dataset(tmp_path):
    """Return a function that writes four cases with a bright ball each, in a layout."""

    def make(patterns):
        rng = np.random.default_rng(0)
        grid = np.indices((24, 24, 24)).reshape(3, -1).T
        for n in range(4):
            ball = (np.linalg.norm(grid - 12, axis=1) < 5 + n).reshape(24, 24, 24)
            scan = (100 * ball + rng.normal(20, 5, ball.shape)).astype(np.float32)
            for pattern in patterns:
                is_mask = any(word in pattern for word in ("seg", "mask", "lesions"))
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
    assert [(c.id, c.reference.resolve()) for c in read] == [(c.id, c.reference) for c in again]
    assert [{k: p.resolve() for k, p in c.images.items()} for c in read] == [
        c.images for c in again
    ]
    assert not any(case.classes for case in read)
    assert all(line.split(",")[-1] for line in report.out.read_text().splitlines())
    with pytest.raises(VolsegError, match="exists and may have been edited"):
        volseg.cases(folder, out=report.out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_plan_and_training_read_a_layout_alike(layout, dataset, tmp_path):
    folder = dataset(LAYOUTS[layout])
    problems = [p for p in volseg.check(folder) if p["code"].startswith("E_")]
    assert problems == []
    plan = volseg.plan(folder, memory="2G", device="cpu")
    assert plan.cases == 3 and plan.warnings[0].startswith("W_NAMES: ")  # one validates
    prepared = volseg.preprocess(folder, out=tmp_path / "p")
    assert len(prepared.done) == 4 and not prepared.failed


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_trained_and_inferred_without_an_edit(layout, dataset, tmp_path):
    folder = dataset(LAYOUTS[layout])
    volseg.train(folder, out=tmp_path / "m", time_budget_seconds=60, folds=1, device="cpu")
    report = volseg.infer(folder, model=tmp_path / "m", out=tmp_path / "r", device="cpu")
    assert len(report.done) == 4 and not report.failed
    scores = volseg.evaluate(folder, tmp_path / "r", out=tmp_path / "e").evaluation
    assert scores["dice"].mean() > 0.5


def test_a_folder_that_is_scans_and_masks_is_measured(dataset, tmp_path):
    folder = dataset(LAYOUTS["multiple sclerosis"])
    report = volseg.measure(image=folder, mask=folder, out=tmp_path / "r")
    assert sorted(report.done) == [f"p{n}_FLAIR" for n in range(4)]
    shutil.move(folder / "p0_FLAIR_lesions.nii.gz", tmp_path)
    with pytest.raises(VolsegError, match="1 case without a mask, first 'p0_FLAIR'"):
        volseg.measure(image=folder, mask=folder, out=tmp_path / "q")
