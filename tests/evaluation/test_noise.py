"""Noisy masks: overlap is measured, lesions are not matched or compared, and a warning says so."""

from __future__ import annotations

import csv
import json
import tracemalloc

import nibabel
import numpy as np
import pytest

import volseg
from volseg.evaluation.detection import NoisyMaskError, detect_lesions, match_lesions
from volseg.evaluation.surface import surface_distances
from volseg.measurement.rows import CaseRow
from volseg.postprocessing.lesions import label_lesions
from volseg.store.records import CaseRecord
from volseg.store.results import ResultsFolder
from volseg.volume import Geometry, Volume

AFFINE = np.diag([-0.8, -0.8, 1.5, 1.0])


def noise(shape, density, n_labels=3, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, n_labels + 1, shape) * (rng.random(shape) < density)).astype(np.uint8)


def test_lesions_of_noise_are_not_matched():
    truth, guess = noise((20, 20, 20), 0.001), noise((20, 20, 20), 0.1)
    geometry = Geometry(truth.shape, AFFINE)
    names = {1: "a", 2: "b", 3: "c"}
    masks = Volume(truth, geometry), Volume(guess, geometry)
    assert detect_lesions(*masks, names, case_id="x")
    with pytest.raises(NoisyMaskError, match=r"the prediction has .* this mask looks like noise"):
        detect_lesions(*masks, names, case_id="x", many=100)


def test_lesions_with_too_many_overlapping_pairs_are_not_matched():
    rods, others = np.zeros((2, 142, 142, 10), np.uint8)
    rods[::2], others[:, ::2] = 1, 1
    rods[:, :, 1::2] = others[:, :, 1::2] = 0
    masks = (Volume(mask, Geometry(mask.shape, AFFINE)) for mask in (rods, others))
    reference, predicted = (label_lesions(mask.array, mask.geometry) for mask in masks)
    assert len(reference.labels) == len(predicted.labels) == 355
    with pytest.raises(NoisyMaskError, match="over 20 000 pairs of lesions that overlap"):
        match_lesions(reference, predicted, most_pairs=20_000)
    of_reference, _ = match_lesions(reference, predicted)
    assert of_reference.n_over.tolist() == [71] * 355


def test_a_noisy_prediction_has_its_overlap_and_a_warning_and_no_lesions(tmp_path):
    shape = (70, 70, 60)
    truth = np.zeros(shape, np.uint8)
    truth[20:40, 20:40, 20:40] = 1
    guess = noise(shape, 0.06, 3)
    for folder, mask in (("truth", truth), ("guess", guess)):
        (tmp_path / folder).mkdir()
        image = nibabel.nifti1.Nifti1Image(mask, AFFINE)
        nibabel.nifti1.save(image, tmp_path / folder / "a.nii.gz")
    report = volseg.evaluate(
        reference=tmp_path / "truth", predicted=tmp_path / "guess", out=tmp_path / "out"
    )
    assert not report.failed
    with (tmp_path / "out" / "evaluation.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    n_both, n_sum = ((truth == 1) & (guess == 1)).sum(), (truth == 1).sum() + (guess == 1).sum()
    assert float(row["dice"]) == pytest.approx(2 * n_both / n_sum, rel=1e-4)
    assert row["n_predicted_lesions"] == row["lesion_precision"] == ""
    assert "W_SPECKS: the prediction has" in row["notes"]
    (warning,) = report.warnings
    assert warning.startswith("W_SPECKS") and "W_SPECKS: a: " in warning
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"] == [warning]


def test_surface_distances_do_not_depend_on_the_chunk_size(monkeypatch):
    from volseg.evaluation import surface

    truth, guess = noise((12, 13, 14), 0.02), noise((12, 13, 14), 0.3)
    geometry = Geometry(truth.shape, AFFINE)
    expected = surface_distances(truth, guess, geometry)
    monkeypatch.setattr(surface, "LOOKED_UP_TOGETHER", 7)
    chunked = surface_distances(truth, guess, geometry)
    assert expected.keys() == chunked.keys()
    for label, distances in expected.items():
        assert np.array_equal(distances.from_reference, chunked[label].from_reference)
        assert np.array_equal(distances.from_predicted, chunked[label].from_predicted)


def test_surface_distances_of_noise_take_a_bounded_number_of_bytes_per_voxel():
    truth, guess = noise((200, 200, 60), 0.2, 1), noise((200, 200, 60), 0.2, 1, seed=1)
    tracemalloc.start()
    surface_distances(truth, guess, Geometry(truth.shape, AFFINE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20 + 16 * truth.size


@pytest.mark.parametrize(
    "noise",
    [
        {"n_lesions": 20_000},
        {"n_lesions": 117, "warnings": "W_SPECKS: the boxes round 117 lesions would fill the scan"},
    ],
)
def test_noise_is_not_compared_and_the_reason_says_why(noise, tmp_path):
    row = CaseRow(case_id="a", status="done", image="a.nii.gz", **noise)
    for time in ("before", "after"):
        with ResultsFolder(tmp_path / time, "measure") as results:
            with results.staged() as commit:
                results.commit(CaseRecord(case=row, lesions=()), commit)
            results.write_tables()
    report = volseg.compare(tmp_path / "before", tmp_path / "after", out=tmp_path / "out")
    (reason,) = report.failed.values()
    assert reason.startswith("E_SPECKS")
    assert f"{noise['n_lesions']:,} lesions: its mask looks like noise" in reason
