import csv

import pytest

from volseg.errors import EnvironmentProblem
from volseg.measure.rows import CaseRow
from volseg.report.results import ResultsFolder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def done(name):
    return CaseRow(case_id=name, status="done", n_lesions=0, total_volume_ml=0.0)


def test_a_case_is_complete_only_with_its_key_and_its_untouched_files(tmp_path):
    with ResultsFolder(tmp_path / "out") as results:
        mask = results.path / "masks" / "a.nii.gz"
        mask.parent.mkdir()
        mask.write_bytes(b"mask")
        assert not results.is_complete("a", "key")
        results.commit(done("a"), key="key", files=[mask])
        assert results.is_complete("a", "key")
        assert not results.is_complete("a", "other model")
        mask.write_bytes(b"changed")
        assert not results.is_complete("a", "key")


def test_tables_hold_every_case_of_the_folder_and_what_is_pending(tmp_path):
    with ResultsFolder(tmp_path) as results:
        results.commit(done("b"))
        results.commit(CaseRow(case_id="a", status="failed", reason="E_CRC: damaged"))
        results.write_tables(pending=[CaseRow(case_id="c", status="pending")])
    assert [(row["case_id"], row["status"]) for row in rows(tmp_path / "cases.csv")] == [
        ("a", "failed"),
        ("b", "done"),
        ("c", "pending"),
    ]
    assert rows(tmp_path / "cases.csv")[0]["n_lesions"] == ""
    assert rows(tmp_path / "cases.csv")[1]["n_lesions"] == "0"
    assert rows(tmp_path / "lesions.csv") == []


def test_a_case_that_fails_later_loses_the_files_of_its_earlier_success(tmp_path):
    with ResultsFolder(tmp_path) as results:
        mask = tmp_path / "mask.nii.gz"
        mask.write_bytes(b"mask")
        results.commit(done("a"), key="key", files=[mask])
        results.commit(CaseRow(case_id="a", status="failed", reason="E_CRC: damaged"))
        assert not mask.exists()


def test_two_runs_cannot_hold_one_folder_and_leftovers_are_swept(tmp_path):
    leftover = tmp_path / "masks" / ".tmp-1234"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with ResultsFolder(tmp_path):
        assert not leftover.exists()
        with pytest.raises(EnvironmentProblem, match="in use"), ResultsFolder(tmp_path):
            pass
    with ResultsFolder(tmp_path):
        pass


def test_a_file_where_the_folder_should_be_is_an_environment_problem(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EnvironmentProblem, match="cannot write"), ResultsFolder(tmp_path / "out"):
        pass
