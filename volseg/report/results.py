"""The results folder: a record per case as the mark that it is complete, and the tables made from the records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache
from heapq import merge
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.io.files import TEMPORARY_PREFIX, sha256_of, write_json_atomic, write_lines_atomic
from volseg.measure.rows import CaseRow, LesionMeasurement
from volseg.measure.specks import MeasuredLesions
from volseg.report.tables import write_table

RECORDS = ".volseg"
SPECKS = ".specks.jsonl"  # beside the record of a case: rows of the lesions beyond the largest, one per line
VIEWERS, THUMBNAILS = "viewer", "viewer/thumbnails"
OUTPUT_FOLDERS = ("masks", "lesion_ids", "figures", VIEWERS, THUMBNAILS)


@contextmanager
def held(folder: Path, records: Path) -> Iterator[None]:
    """Make both folders and hold them for one run, by a lock in `records`; leftovers of a killed run are swept.

    Raises:
        EnvironmentProblem: another run holds it, or it cannot be written.
    """
    lock = FileLock(records / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise EnvironmentProblem(
            f"{folder}: in use by another run", fix="wait for it, or give another --out", code="E_LOCKED"
        ) from error
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: cannot write there ({error.strerror})", fix="give a folder you may write to", code="E_PERM"
        ) from error
    try:
        for place in (folder, records, *(folder / name for name in OUTPUT_FOLDERS)):
            for leftover in place.glob(f"{TEMPORARY_PREFIX}*"):
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


class RecordFolder:
    """A folder of which each item has a record, held by one run at a time. Use it with `with`.

    An item is complete when its record is there and says that it was made from the same input, model and options (`key`); its
    files carry the hashes that the record names. So an interrupted run leaves nothing that looks finished and is not.
    """

    row = "case"  # where a record holds the row of its item

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = path / RECORDS
        self._held = held(path, self._records)

    def __enter__(self) -> Self:
        """Hold the folder.

        Raises:
            VolsegError: another kind of command wrote it; its files would be lost.
        """
        self._held.__enter__()
        name = next((path.stem for path in sorted(self._records.glob("*.json"))), None)
        record = None if name is None else self._read(name)
        if record is not None and self.row not in record:
            self._held.__exit__(None, None, None)
            raise VolsegError(
                f"{self.path}: {'is the folder of a comparison' if self.row == 'case' else 'holds the results of scans'}",
                fix="give another folder",
                code="E_USAGE",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def is_complete(self, name: str, key: str) -> bool:
        """Whether the item was done with this key and its files are still as they were written, but for pages, which are soon made again."""
        record = self._read(name)
        if record is None or record.get("key") != key or record[self.row]["status"] != "done":
            return False
        return self._are_there({n: digest for n, digest in record["files"].items() if not n.startswith(f"{VIEWERS}/")})

    def _are_there(self, files: Mapping[str, str]) -> bool:
        return all(
            (self.path / file).is_file() and sha256_of(self.path / file) == digest for file, digest in files.items()
        )

    def write_run(self, description: Mapping[str, Any]) -> None:
        """run.json: what was run, with what, on what."""
        write_json_atomic(self.path / "run.json", dict(description))

    def _write(self, name: str, record: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Record an item. `files` are its outputs, already written; other files of an earlier call go."""
        hashes = self._hashes(files)
        earlier = self._read(name) or {"files": {}}
        write_json_atomic(self._records / f"{name}.json", dict(record) | {"files": hashes}, indent=None)
        for stale in earlier["files"].keys() - hashes.keys():
            (self.path / stale).unlink(missing_ok=True)  # a stale picture or mask would stand beside new numbers

    def _hashes(self, files: Sequence[Path]) -> dict[str, str]:
        return {file.relative_to(self.path).as_posix(): sha256_of(file) for file in files}

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self._records / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class ResultsFolder(RecordFolder):
    """The folder of `infer` and `measure`: a record per case."""

    def commit(
        self,
        case: CaseRow,
        *,
        key: str = "",
        lesions: Sequence[LesionMeasurement] | MeasuredLesions = (),
        files: Sequence[Path] = (),
        source: Mapping[str, str] | None = None,
    ) -> None:
        """Record a case as done or failed.

        Args:
            files: its outputs, already written; other files of an earlier call go.
            source: what is needed to make its page again, such as where its scan is.
        """
        specks, side_file = None, self._records / f"{case.case_id}{SPECKS}"
        if isinstance(lesions, MeasuredLesions):
            lesions, specks = lesions.largest, lesions.specks
        if specks is None:
            side_file.unlink(missing_ok=True)
        else:
            write_lines_atomic(side_file, (json.dumps(known_values(speck)) for speck in specks))
        record = {"key": key, "case": plain(case), "lesions": [plain(lesion) for lesion in lesions]}
        self._write(case.case_id, record | {"source": dict(source or {})}, files)

    def add_files(self, case_id: str, files: Sequence[Path]) -> None:
        """Name further files, already written, in the record of a case that is complete; those of the same name are replaced."""
        record = self._read(case_id)
        assert record is not None, f"{case_id} has no record"
        record["files"] |= self._hashes(files)
        write_json_atomic(self._records / f"{case_id}.json", record, indent=None)

    def has_pages(self, record: Mapping[str, Any]) -> bool:
        """Whether a case has its page and its picture, as they were written."""
        pages = {name: digest for name, digest in record["files"].items() if name.startswith(f"{VIEWERS}/")}
        return bool(pages) and self._are_there(pages)

    def is_at(self, case_id: str, scan: Path) -> None:
        """Say where the scan of a complete case is now."""
        record = self._read(case_id)
        if record is not None and record.get("source") and record["source"].get("scan") != str(scan.absolute()):
            record["source"]["scan"] = str(scan.absolute())
            write_json_atomic(self._records / f"{case_id}.json", record, indent=None)

    def records(self) -> dict[str, dict[str, Any]]:
        """Case id → record, by case id; damaged ones are left out. One made by an older version may lack what was added since."""
        found = {path.stem: self._read(path.stem) for path in sorted(self._records.glob("*.json"))}
        return {name: record for name, record in found.items() if record is not None}

    def write_tables(self, pending: Sequence[CaseRow] = ()) -> None:
        """lesions.csv and cases.csv of every case that the folder holds, by case id; `pending` ones have no record yet."""
        records = self.records()
        rows: dict[str, Mapping[str, Any]] = {row.case_id: asdict(row) for row in pending}
        rows |= {name: record["case"] for name, record in records.items() if name not in rows}
        lesions = (
            lesion
            for name, record in sorted(records.items())
            if rows[name]["status"] == "done"
            for lesion in merge(record["lesions"], self._specks(name), key=itemgetter("lesion_id"))
        )
        write_table(self.path / "lesions.csv", LesionMeasurement, lesions)
        write_table(self.path / "cases.csv", CaseRow, [rows[name] for name in sorted(rows)])

    def _specks(self, case_id: str) -> Iterator[dict[str, Any]]:
        """Rows of the lesions that are not in the record of a case, one at a time."""
        try:
            with open(self._records / f"{case_id}{SPECKS}", encoding="utf-8") as file:
                yield from map(json.loads, file)
        except FileNotFoundError:
            return

    def case_warnings(self, case_ids: Sequence[str], code: str) -> list[str]:
        """Those of this code that the rows of these cases hold."""
        texts = ((name, record["case"].get("warnings") or "") for name in case_ids if (record := self._read(name)))
        return [f"{part} ({name})" for name, text in texts for part in text.split("; ") if part.startswith(code)]


def known_values(row: Any) -> dict[str, Any]:
    """As `plain`, without what is unknown."""
    values = ((name, getattr(row, name)) for name in _names(type(row)))
    return {
        name: value
        for name, value in values
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


@cache
def _names(row_type: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(row_type))


def plain(row: Any) -> dict[str, Any]:
    """Fields of a row for JSON, which has no NaN: unknown is null there and an empty cell in a table."""
    # Not `asdict`, which copies each value deeply: a noisy mask has ten thousands of rows.
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
