import csv
import json
from dataclasses import replace

import pytest

from volseg.columns import row_of
from volseg.errors import EnvironmentProblem, ScanError, VolsegError
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.store.records import CaseRecord
from volseg.store.results import ResultsFolder, State


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def done(name):
    return CaseRow(case_id=name, status="done", n_lesions=0, total_volume_ml=0.0)


def lesion(number, n_voxels):
    cells = {"case_id": "a", "lesion_id": number, "label": 1, "n_voxels": n_voxels}
    return row_of(LesionMeasurement, cells | {"volume_ml": 1.0})


def failed(name):
    return CaseRow(case_id=name, status="failed", reason="E_CRC: damaged")


def commit(results, name, files=(), **more):
    """Record a case as done, with files."""
    with results.staged() as case_files:
        for file in files:
            case_files.write(file, b"mask")
        record = CaseRecord(case=done(name), **{"lesions": ()} | more)
        results.commit(record, case_files)


def test_a_case_is_complete_only_with_its_key_and_its_untouched_files(tmp_path):
    with ResultsFolder(tmp_path / "out", "infer") as results:
        assert not results.is_complete("a", "key")
        commit(results, "a", ["lesion_ids/a.nii.gz"], key="key")
        assert results.is_complete("a", "key")
        assert not results.is_complete("a", "other model")
        (results.path / "lesion_ids" / "a.nii.gz").write_bytes(b"changed")
        assert not results.is_complete("a", "key")


def test_a_mask_that_was_edited_by_hand_is_in_state_edited_for_any_key(tmp_path):
    with ResultsFolder(tmp_path / "out", "infer") as results:
        commit(results, "a", ["masks/a.nii.gz"], key="key")
        mask = results.path / "masks" / "a.nii.gz"
        mask.write_bytes(b"corrected")
        assert results.state_of("a", "key") is results.state_of("a", "other") is State.EDITED
        mask.unlink()
        assert results.state_of("a", "key") is State.MISSING


def test_tables_hold_every_case_of_the_folder_and_what_is_pending(tmp_path):
    with ResultsFolder(tmp_path, "measure") as results:
        commit(results, "b")
        results.commit_failure(failed("a"), ())
        results.write_tables(pending=[CaseRow(case_id="c", status="pending")])
    assert [(row["case_id"], row["status"]) for row in rows(tmp_path / "cases.csv")] == [
        ("a", "failed"),
        ("b", "done"),
        ("c", "pending"),
    ]
    assert rows(tmp_path / "cases.csv")[0]["n_lesions"] == ""
    assert rows(tmp_path / "cases.csv")[1]["n_lesions"] == "0"
    assert rows(tmp_path / "lesions.csv") == []


@pytest.mark.parametrize(("inputs", "status"), [(("same",), "done"), (("other",), "failed")])
def test_a_case_that_fails_later_keeps_the_files_of_its_earlier_success(inputs, status, tmp_path):
    with ResultsFolder(tmp_path, "infer") as results:
        commit(results, "a", ["masks/a.nii.gz"], key="key", inputs=("same",))
        results.commit_failure(failed("a"), inputs)
        results.write_tables()
        row = rows(tmp_path / "cases.csv")[0]
        assert row["status"] == status
        assert "E_CRC" in row["warnings"] + row["reason"]
        assert (tmp_path / "masks" / "a.nii.gz").read_bytes() == b"mask"
        results.keep("a", tmp_path / "scan.nii.gz")  # complete with the key of the earlier run
        results.write_tables()
        row = rows(tmp_path / "cases.csv")[0]
        assert (row["status"], row["warnings"]) == ("done", "")


def test_an_earlier_result_stays_in_the_tables_until_its_case_is_reached(tmp_path):
    with ResultsFolder(tmp_path, "infer") as results:
        commit(results, "a", key="key")
        results.write_tables(pending=[CaseRow(case_id="a", status="pending")])
    row = rows(tmp_path / "cases.csv")[0]
    assert row["status"] == "done"
    assert row["warnings"].startswith("W_STALE")


@pytest.mark.parametrize(
    "damage", [b"", b'{"case": {"sta', b"[" * 100_000, b'{"case": {"status": 1}, "files": {}}']
)
def test_a_damaged_record_is_an_unknown_row(damage, tmp_path):
    with ResultsFolder(tmp_path, "infer") as results:
        commit(results, "a", key="key")
        commit(results, "b", key="key")
        (tmp_path / ".volseg" / "a.json").write_bytes(damage)
        results.write_tables()
        assert [row["status"] for row in rows(tmp_path / "cases.csv")] == ["unknown", "done"]
        assert not results.is_complete("a", "key")
        commit(results, "a", key="key")
        results.write_tables()
    assert [row["status"] for row in rows(tmp_path / "cases.csv")] == ["done", "done"]


def test_a_record_whose_rows_are_damaged_is_an_unknown_row(tmp_path):
    with ResultsFolder(tmp_path, "infer") as results:
        commit(results, "a", key="key")
        (tmp_path / ".volseg" / "a.rows.jsonl").write_bytes(b'{"cut of')
        results.write_tables()
    assert [row["status"] for row in rows(tmp_path / "cases.csv")] == ["unknown"]


@pytest.mark.parametrize(
    "name", ["../victim.txt", "/victim.txt", "link/victim.txt", "a/../../victim.txt"]
)
def test_a_record_of_a_stranger_reaches_nothing_outside_its_folder(name, tmp_path):
    victim, out = tmp_path / "victim.txt", tmp_path / "out"
    victim.write_bytes(b"mask")
    with ResultsFolder(out, "infer") as results:
        commit(results, "a", ["masks/a.nii.gz"], key="key")
    (out / "link").symlink_to(tmp_path)
    record = json.loads((out / ".volseg" / "a.json").read_text())
    record["files"][name] = record["files"]["masks/a.nii.gz"]
    (out / ".volseg" / "a.json").write_text(json.dumps(record))
    with (out / ".volseg" / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"path": name, "sha256": record["files"]["masks/a.nii.gz"]}) + "\n")
    with ResultsFolder(out, "infer") as results:
        commit(results, "a", key="other")
    assert victim.read_bytes() == b"mask"


def test_two_runs_cannot_hold_one_folder(tmp_path):
    with (
        ResultsFolder(tmp_path, "infer"),
        pytest.raises(EnvironmentProblem, match="in use"),
        ResultsFolder(tmp_path, "infer"),
    ):
        pass
    with ResultsFolder(tmp_path, "infer"):
        pass


def test_a_folder_of_another_command_is_refused(tmp_path):
    with ResultsFolder(tmp_path, "infer") as results:
        commit(results, "a")
    with (
        pytest.raises(VolsegError, match="holds the results of infer"),
        ResultsFolder(tmp_path, "measure"),
    ):
        pass


@pytest.mark.parametrize("name", ["out", "out/deep/er", "link/deep"])
def test_a_file_where_the_folder_should_be_is_refused(name, tmp_path):
    (tmp_path / "out").write_text("a file")
    (tmp_path / "link").symlink_to("nowhere")
    with (
        pytest.raises(VolsegError, match="is not a folder") as refusal,
        ResultsFolder(tmp_path / name, "infer"),
    ):
        pass
    assert (refusal.value.code, refusal.value.exit_code) == ("E_EXISTS", 2)


def test_a_file_called_as_the_folder_of_records_is_refused(tmp_path):
    (tmp_path / ".volseg").write_text("mine")
    with (
        pytest.raises(VolsegError, match="not made by volseg") as refusal,
        ResultsFolder(tmp_path, "infer"),
    ):
        pass
    assert refusal.value.code == "E_EXISTS"


def test_the_largest_rows_are_those_with_most_voxels_in_their_order(tmp_path):
    sizes = [3, 9, 9, 1, 7]
    rows_of_a = [lesion(n, size) for n, size in enumerate(sizes, start=1)]
    with ResultsFolder(tmp_path, "measure") as results:
        commit(results, "a", lesions=iter(rows_of_a))
        stored = results.rows_of("a")
        assert [row.lesion_id for row in stored.largest(2)] == [2, 3]
        assert [row.lesion_id for row in stored.largest(10)] == [1, 2, 3, 4, 5]
        assert list(stored) == rows_of_a


def test_the_largest_of_all_items_are_listed_item_by_item_in_their_order(tmp_path):
    volumes = {"a": [5.0, 2e-3, 9.0], "b": [1.0, 9.0], "c": [7.0, 8.0, 6.0]}
    with ResultsFolder(tmp_path, "measure") as results:
        for name, volumes_ml in volumes.items():
            rows = (
                replace(lesion(n, 4), case_id=name, volume_ml=volume_ml)
                for n, volume_ml in enumerate(volumes_ml, start=1)
            )
            commit(results, name, lesions=rows)
        for most in range(1, 9):
            rows, n = results.listed_rows({"a": 9, "b": 9, "c": 2}, most)
            listed = sorted([5.0, 2e-3, 9.0, 1.0, 9.0, 7.0, 8.0], reverse=True)[:most]
            assert n == 7
            assert sorted((row.volume_ml for row in rows), reverse=True) == listed
            order = [(row.case_id, row.lesion_id) for row in rows]
            assert len(order) == len(set(order)) == min(most, 7)


def test_the_largest_rows_are_those_of_their_item(tmp_path):
    with ResultsFolder(tmp_path, "measure") as results:
        commit(results, "b", lesions=[lesion(1, 3)])
        with pytest.raises(ScanError, match="a row is not of 'b'"):
            results.rows_of("b").largest(1)


def test_rows_that_cannot_be_opened_are_those_of_a_damaged_record(tmp_path, monkeypatch):
    with ResultsFolder(tmp_path, "measure") as results:
        commit(results, "a", lesions=[lesion(1, 3)])
        commit(results, "b")

        def refused(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("volseg.store.results.sha256_of", refused)
        results.write_tables()
    assert [row["status"] for row in rows(tmp_path / "cases.csv")] == ["unknown", "unknown"]
