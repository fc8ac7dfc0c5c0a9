"""A lesion that a reader rejects counts as if it had never been found."""

import csv
import shutil

import pytest
from two_times import draw, grid, measured, movement

import volseg
from volseg.errors import VolsegError
from volseg.io.volumes import write_volume

BALLS = [((-14, 0, 0), 11), ((20, 8, 4), 8), ((0, -14, 24), 6), ((4, 20, -20), 5)]


def review(path, *rows, sizes=None):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "lesion_id", "verdict", "comment", "n_voxels"])
        for name, number, verdict in rows:
            writer.writerow([name, number, verdict, "", (sizes or {}).get(number, "")])
    return path


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without(volumes, balls, geometry, number):
    """Return the scan, and a mask without the ball of this index."""
    scan, _ = volumes
    kept = [shape for n, shape in enumerate(balls) if n != number]
    return scan, draw(geometry, kept)[1]


@pytest.fixture(scope="module")
def one_time(tmp_path_factory):
    """Results of a phantom, as a folder of `infer`: with masks and lesion ids."""
    folder = tmp_path_factory.mktemp("one")
    geometry = grid()
    results = measured(folder, {"p": draw(geometry, BALLS)})
    (results / "masks").mkdir()
    shutil.copy(folder / "mask_p.nii.gz", results / "masks" / "p.nii.gz")
    return results, geometry


def test_evaluate_removes_a_rejected_lesion_from_the_prediction(one_time, tmp_path):
    results, geometry = one_time
    reference = tmp_path / "reference"
    reference.mkdir()
    _, truth = draw(geometry, [BALLS[0], BALLS[1], BALLS[3]])
    write_volume(truth, reference / "p.nii.gz")
    given = {"reference": reference, "predicted": results}
    before = volseg.evaluate(**given, out=tmp_path / "before")
    file = review(tmp_path / "review.csv", ("p", 3, "rejected"), ("p", 1, "accepted"))
    after = volseg.evaluate(**given, out=tmp_path / "after", review=file)
    dice = [float(rows_of(report.out / "evaluation.csv")[0]["dice"]) for report in (before, after)]
    assert dice[0] < 1 and dice[1] == 1
    assert "W_REVIEW: 1 lesion that" in " ".join(after.warnings)
    states = [row["status"] for row in rows_of(after.out / "detections.csv")]
    assert set(states) == {"matched"} and len(states) == 6


def test_a_review_of_other_lesions_fails_the_case_and_says_so(one_time, tmp_path):
    results, _ = one_time
    for rows, sizes in (([("p", 9, "rejected")], {}), ([("p", 2, "rejected")], {2: 7})):
        file = review(tmp_path / "review.csv", *rows, sizes=sizes)
        report = volseg.evaluate(
            reference=results / "masks", predicted=results, out=tmp_path / "out", review=file
        )
        assert report.failed["p"].startswith("E_REVIEW: ") and "changed after" in report.failed["p"]
    with pytest.raises(VolsegError, match="has no folder lesion_ids"):
        volseg.evaluate(
            reference=results / "masks", predicted=results / "masks", out=tmp_path, review=file
        )


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_compare_leaves_a_rejected_lesion_out_and_keeps_the_numbers_of_the_others(number, tmp_path):
    """The rows are those of masks without the lesion, except for the numbers."""
    moved, geometry = movement(4.0, (3, -2, 1)), grid()
    before = draw(geometry, BALLS)
    balls = [(offset, radius * 1.1) for offset, radius in BALLS]
    after = draw(geometry, balls, moved)
    baseline = measured(tmp_path / "b", {"p": before})
    followup = measured(tmp_path / "f", {"p": after})
    bare = measured(tmp_path / "w", {"p": without(before, BALLS, geometry, number - 1)})
    file = review(tmp_path / "review.csv", ("p", number, "rejected"))
    given = {"registration": True, "max_distance_mm": 5}
    reviewed = volseg.compare(
        baseline, followup, out=tmp_path / "reviewed", baseline_review=file, **given
    )
    expected = volseg.compare(bare, followup, out=tmp_path / "expected", **given)
    assert "W_REVIEW: p: 1 lesion at baseline left out" in reviewed.warnings[0]
    reviewed_rows, expected_rows = (
        rows_of(report.out / "comparison.csv") for report in (reviewed, expected)
    )
    numbers = [row["baseline_lesion_id"] for row in reviewed_rows]
    assert str(number) not in numbers and len(set(numbers) - {""}) == 3
    renumbered = {"": ""} | {str(n): str(n + (n >= number)) for n in (1, 2, 3)}
    assert {renumbered[row["baseline_lesion_id"]] for row in expected_rows} == set(numbers)
    for row in expected_rows:
        row["baseline_lesion_id"] = renumbered[row["baseline_lesion_id"]]

    def key(row):
        return row["baseline_lesion_id"], row["followup_lesion_id"]

    columns = (
        "status",
        "baseline_volume_ml",
        "change_volume_ml",
        "is_target",
        "followup_volume_ml",
    )
    for one, other in zip(
        sorted(reviewed_rows, key=key), sorted(expected_rows, key=key), strict=True
    ):
        assert {name: one[name] for name in columns} == {name: other[name] for name in columns}
    again = volseg.compare(
        baseline, followup, out=tmp_path / "reviewed", baseline_review=file, **given
    )
    assert again.kept == ["p"]
    undone = volseg.compare(baseline, followup, out=tmp_path / "reviewed", **given)
    assert undone.done == ["p"]  # another review is another comparison


def test_the_report_shows_the_review_in_the_folder_or_the_one_that_is_named(one_time, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(one_time[0], results)
    volseg.report(results)
    page = results / "report.html"
    assert 'id="reviews">[]<' in page.read_text(encoding="utf-8")
    review(results / "review.csv", ("p", 1, "accepted"))
    volseg.report(results)
    assert "1 lesion, 1 accepted, 0 rejected" in page.read_text(encoding="utf-8")
    other = review(tmp_path / "other.csv", ("p", 1, "rejected"), ("p", 2, "rejected"))
    volseg.report(results, review=other)
    assert "2 lesions, 0 accepted, 2 rejected" in page.read_text(encoding="utf-8")
