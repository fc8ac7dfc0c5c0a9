"""Results folders: a record per case, which marks it as complete, and tables made from the records.

The code calls a case of `infer` or `measure`, or a patient of `compare`, an item.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from heapq import nlargest
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, ClassVar, Literal, get_args, get_origin, get_type_hints

from volseg.errors import ScanError
from volseg.inputs import open_regular, parse_json, read_json
from volseg.io.files import json_text, sha256_of
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.store.outputs import RECORDS, Commit, OutputFolder, confined, trace_name
from volseg.store.tables import table

MAX_ROW_BYTES = 2**20  # per line of a stranger's file; volseg's rows take about a thousandth
VIEWERS, THUMBNAILS = "viewer", "viewer/thumbnails"
MASKS, LESION_IDS = "masks", "lesion_ids"
STALE, EDITED = "W_STALE", "W_EDITED"
_VOLUME_ML = re.compile(rb'"volume_ml": ([0-9]{1,18}(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,3})?)\b')
DAMAGED = "E_RECORD: the record is damaged; to fix: repeat the command that wrote it"
_N_VOXELS = re.compile(rb'"n_voxels": ([0-9]{1,18})\b')


class State(Enum):
    """State of an item in a folder."""

    MISSING = "missing"  # absent, incomplete, or made with another model, option or input
    COMPLETE = "complete"
    EDITED = "edited"  # a mask was edited by hand and not measured since
    OTHER_INPUT = "other input"  # a mask was edited by hand, but the scan is a different one now


class RecordFolder(OutputFolder):
    """A folder with a record per item; one run uses it at a time, in a `with` statement.

    An item is complete if its record has the current `key` (input, model and options) and the
    hashes of its files.
    """

    # The key of an item's row in its record, the types of the item's and its lesions' rows, the
    # tables with these rows, and the column with the item's name.
    row: ClassVar[str] = "case"
    row_types: ClassVar[tuple[type, type]] = (CaseRow, LesionMeasurement)
    tables: ClassVar[tuple[str, str]] = ("cases.csv", "lesions.csv")
    name_column: ClassVar[str] = "case_id"

    def state_of(self, name: str, key: str | None, inputs: Sequence[str] | None = None) -> State:
        """Return whether an item has to be done; a mask edited by hand is kept for any key.

        Args:
            key: of the input, model and options; None accepts any.
            inputs: SHA-256 of each input file of the item; None accepts any.
        """
        record = self.record(name)
        if record is None or record[self.row]["status"] != "done":
            return State.MISSING
        corrected, is_edited = record.get("corrected", {}), self.is_edited(record)
        is_corrected = bool(corrected) and all((self.path / path).is_file() for path in corrected)
        is_other = inputs is not None and list(inputs) != record.get("inputs")
        if (is_edited or is_corrected) and is_other:
            return State.OTHER_INPUT
        if is_edited:
            return State.EDITED
        if key is not None and not is_corrected and (record.get("key") != key or corrected):
            return State.MISSING
        files = record["files"]
        if all(self._is_as(path, files[path]) for path in files if not _is_page(path)):
            return State.COMPLETE
        # The results of a corrected mask are damaged, so the mask has to be measured again.
        return State.EDITED if is_corrected else State.MISSING

    def is_edited(self, record: Mapping[str, Any]) -> bool:
        """Check whether a mask of the item was edited by hand after it was measured."""
        return any(
            (self.path / path).is_file() and not self._is_as(path, digest)
            for path, digest in masks_of(record).items()
        )

    @property
    def edited_text(self) -> str:
        """Warning for an item whose mask was edited by hand and not measured yet."""
        text = "the mask was edited by hand and is kept; its numbers are from before the edit"
        return f"{text}; run `volseg measure {self.path}` to measure the edited mask"

    def shown(self, record: Mapping[str, Any], *, is_pending: bool = False) -> dict[str, Any]:
        """Return `shown_row`, with a warning if the mask was edited after it was measured."""
        row = shown_row(record, self.row, is_pending=is_pending)
        is_edited = row["status"] == "done" and self.is_edited(record)
        return _warned(row, f"{EDITED}: {self.edited_text}") if is_edited else row

    def is_complete(self, name: str, key: str) -> bool:
        """Check whether the item was done with this key and its files, except pages, are intact."""
        return self.state_of(name, key) is State.COMPLETE

    def has_record(self, name: str) -> bool:
        return (self._records / f"{name}.json").exists()

    def count_items(self, names: Iterable[str]) -> int:
        """Return how many items the folder has, counting also `names`."""
        return len({path.stem for path in self._records.glob("*.json")}.union(names))

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of an item; None if it is missing or damaged."""
        return read_json_record(self._records / f"{name}.json", type(self))

    def rows_of(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lesion rows of an item as column → value, without unknown values."""
        return read_rows(self.path, name, type(self))

    def largest_rows(self, name: str, most: int) -> list[dict[str, Any]]:
        """Return at most `most` rows of an item's largest lesions, in the order of the file."""
        lines = sorted(self._largest_lines(name, most))
        return [_row_of(line, self.path, name, type(self)) for _, line in lines]

    def _largest_lines(self, name: str, most: int) -> list[tuple[int, bytes]]:
        """Return index and line of an item's largest lesions, the largest first."""
        # Lines are ranked unparsed: of noise only a few of 100 000 are needed.
        lines = enumerate(_lines(self.path, name))
        return nlargest(most, lines, key=lambda indexed: _size_of(indexed[1]))

    def listed_rows(self, limits: Mapping[str, int], most: int) -> tuple[list[dict[str, Any]], int]:
        """Return the rows of the largest lesions, by volume, of these items, in their order.

        Args:
            limits: item → how many of its largest lesions, by voxels, are considered.
            most: maximum number of rows.

        Returns:
            The rows, and the number of lesions considered.
        """
        n = 0

        def lines() -> Iterator[tuple[int, int, bytes]]:
            nonlocal n
            for item, (name, limit) in enumerate(limits.items()):
                for index, line in self._largest_lines(name, limit):
                    n += 1
                    yield item, index, line

        largest = nlargest(most, lines(), key=lambda line: _volume_of(line[-1]))
        largest.sort(reverse=True)
        names, rows = list(limits), []
        while largest:  # frees each line once its row is parsed
            item, _, line = largest.pop()
            rows.append(_row_of(line, self.path, names[item], type(self)))
        return rows, n

    def records(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yield (name, record) by name; the record is None if it or its rows are damaged."""
        for path in sorted(self._records.glob("*.json")):
            record, rows = read_json_record(path, type(self)), rows_name(path.stem)
            if record is not None and rows in record["files"]:
                record = record if self._is_as(rows, record["files"][rows]) else None
            yield path.stem, record

    def item_rows(self, pending: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return the row of every item of the folder, by name.

        Args:
            pending: rows of items not processed yet; an earlier result of an item replaces its row.
        """
        rows = {getattr(row, self.name_column): plain(row) for row in pending}
        for name, record in self.records():
            if record is None:
                rows[name] = self._unknown_row(name)
            elif name not in rows or record[self.row]["status"] == "done":
                rows[name] = self.shown(record, is_pending=name in rows)
        return [rows[name] for name in sorted(rows)]

    def checked_rows(self, pending: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return `item_rows`, with status unknown for items whose lesion rows cannot be read."""
        rows, unreadable = self.item_rows(pending), set()
        for _ in self.lesion_rows(rows, unreadable):
            pass
        return self._as_damaged(rows, unreadable)

    def lesion_rows(
        self,
        items: Iterable[Mapping[str, Any]],
        unreadable: set[str],
    ) -> Iterator[dict[str, Any]]:
        """Yield the lesion rows of these items.

        Args:
            items: rows from `item_rows`.
            unreadable: receives the names of items whose rows cannot be read completely.
        """
        for item in items:
            if item["status"] == "done":
                name = item[self.name_column]
                try:
                    yield from self.rows_of(name)
                except ScanError:
                    unreadable.add(name)

    def write_tables(self, pending: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Write both tables of all items of the folder, by name, and return the items' rows.

        Args:
            pending: as in `item_rows`.
        """
        rows, unreadable = self.item_rows(pending), set()
        with self.staged() as commit:
            # Rows are checked while they are written: reading them first would take 40 % longer.
            for _ in range(2):
                lesions = self.lesion_rows(rows, unreadable)
                commit.write(self.tables[1], table(self.row_types[1], lesions))
                if not unreadable:
                    break
                rows = self._as_damaged(rows, unreadable)
            commit.write(self.tables[0], table(self.row_types[0], rows))
            commit.finish()
        return rows

    def _as_damaged(
        self,
        rows: Sequence[dict[str, Any]],
        unreadable: Collection[str],
    ) -> list[dict[str, Any]]:
        """Mark items with unreadable lesion rows as damaged, and return the rows of all items."""
        for name in unreadable:
            record = self.record(name)
            if record is not None:  # without the rows, the next run with this item redoes it
                record["files"].pop(rows_name(name), None)
                self.update(name, record)
        names = (row[self.name_column] for row in rows)
        return [
            self._unknown_row(name) if name in unreadable else row
            for name, row in zip(names, rows, strict=True)
        ]

    def _unknown_row(self, name: str) -> dict[str, Any]:
        """Return the row of an item whose record cannot be read."""
        columns = {self.name_column: name, "status": "unknown", "reason": DAMAGED}
        return plain(self.row_types[0](**columns))

    def write_run(self, description: Mapping[str, Any]) -> None:
        """Write run.json, which describes the command, its settings and its inputs."""
        self.write("run.json", json_text(dict(description)))

    def update(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of an item and keep its rows and files."""
        self.write(_record_name(name), json_text(record, indent=None))

    def clear_failure(self, name: str) -> None:
        """Remove the mark of a failed later run from the record of a complete item."""
        record = self.record(name) or {}
        settled = {key: value for key, value in record.items() if key not in ("remark", "failed")}
        if settled != record:
            self.update(name, settled)

    def commit_failure(self, name: str, row: Any, inputs: Sequence[str]) -> None:
        """Record that an item failed, and keep the files of an earlier run.

        The earlier rows stay in the tables, with a warning, if the input is the same.

        Args:
            row: a dataclass with `status` and `reason`.
            inputs: SHA-256 of each file of the item.
        """
        record = self.record(name)
        if record is None or record[self.row]["status"] != "done":
            record = {"key": "", "inputs": list(inputs), self.row: plain(row)}
            record |= {"files": {}, "source": {}}
        elif list(inputs) == record.get("inputs"):
            record.pop("failed", None)  # a failure with another input
            remark = f"the last run failed ({row.reason}); these numbers are from an earlier one"
            record["remark"] = f"{STALE}: {remark}"
        else:
            record["failed"] = plain(row)
        self.update(name, record)

    def _is_as(self, name: str, digest: str) -> bool:
        path = confined(self.path, name)
        try:
            return path is not None and path.is_file() and sha256_of(path) == digest
        except OSError:
            return False  # the file cannot be read

    def _finish(
        self,
        name: str,
        commit: Commit,
        content: Mapping[str, Any],
        rows: Iterable[Any],
        *,
        keeps: Sequence[str] = (),
    ) -> None:
        """Publish the files, rows and record of an item; delete its other files of an earlier call.

        Args:
            rows: dataclasses, consumed one at a time.
            keeps: earlier files of the item that stay.
        """
        earlier = (self.record(name) or {}).get("files", {})
        commit.write(rows_name(name), lambda file: write_rows(file, rows))
        files = {path: earlier[path] for path in keeps if path in earlier} | commit.hashes()
        commit.write(_record_name(name), json_text(dict(content) | {"files": files}, indent=None))
        # A corrected mask stays, even if it was changed back to a mask that volseg once wrote.
        corrected = content.get("corrected", ())
        stale = [path for path in earlier if path not in files and path not in corrected]
        commit.finish(last=_record_name(name), removed=[*stale, trace_name(name)])


class ResultsFolder(RecordFolder):
    """The folder of `infer` and `measure`: a record per case."""

    def commit(
        self,
        case: CaseRow,
        commit: Commit,
        *,
        key: str = "",
        inputs: Sequence[str] = (),
        lesions: Iterable[LesionMeasurement] = (),
        source: Mapping[str, Any] | None = None,
        corrected: Mapping[str, str] | None = None,
    ) -> None:
        """Record a case that was done.

        Args:
            commit: holds the other files of the case.
            inputs: SHA-256 of each file that was read.
            lesions: the rows, consumed one at a time, so that they need not fit in memory.
            source: what is needed to redo the measurement or the page, such as the scan's path.
            corrected: the measured masks that were edited by hand, path → SHA-256.
        """
        content: dict[str, Any] = {"key": key, "inputs": list(inputs), "case": plain(case)}
        content["source"] = dict(source or {})
        if corrected:
            content["corrected"] = dict(corrected)
        self._finish(case.case_id, commit, content, lesions)

    def keep(self, case_id: str, scan: Path) -> None:
        """Update the scan's path of a complete case, and settle an earlier failure."""
        self.clear_failure(case_id)
        record, path = self.record(case_id), str(scan.absolute())
        if record is not None and record["source"].get("scan") not in (None, path):
            self.update(case_id, record | {"source": record["source"] | {"scan": path}})

    def add_files(self, case_id: str, commit: Commit) -> None:
        """Add files to a complete case, replacing those of the same name."""
        record = self.record(case_id)
        assert record is not None, f"{case_id} has no record"
        record["files"] |= commit.hashes()
        commit.write(_record_name(case_id), json_text(record, indent=None))
        commit.finish()

    def has_pages(self, record: Mapping[str, Any]) -> bool:
        """Check whether the page and the picture of a case are there and unchanged."""
        pages = [path for path in record["files"] if _is_page(path)]
        return bool(pages) and all(self._is_as(path, record["files"][path]) for path in pages)


def shown_row(
    record: Mapping[str, Any], row_name: str = "case", *, is_pending: bool = False
) -> dict[str, Any]:
    """Return the row of an item as tables and pages show it.

    Args:
        row_name: key of the row in the record.
        is_pending: the current run ended before it redid this item.
    """
    if "failed" in record:
        return dict(record["failed"])
    row = dict(record[row_name])
    remark = record.get("remark", "")
    if is_pending and not remark:
        remark = f"{STALE}: the last run was interrupted; these numbers are from an earlier one"
    return _warned(row, remark) if remark else row


def _warned(row: Mapping[str, Any], warning: str) -> dict[str, Any]:
    return {**row, "warnings": "; ".join(filter(None, (row.get("warnings"), warning)))}


def masks_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return path → SHA-256 of the measured masks of an item."""
    masks = {**record["files"], **record.get("corrected", {})}
    return {path: digest for path, digest in masks.items() if path.startswith(f"{MASKS}/")}


def read_json_record(path: Path, kind: type[RecordFolder] = RecordFolder) -> dict[str, Any] | None:
    """Read and check a record, which may come from a stranger; None if missing or damaged."""
    try:
        record = read_json(path)
        record.setdefault("source", {})
        line, files, masks = record[kind.row], record["files"], record.get("corrected", {})
        failed = record.get("failed", {kind.name_column: path.stem})
        is_sound = all(
            row[kind.name_column] == path.stem and _fits(row, kind.row_types[0])
            for row in (line, failed)
        )
        is_sound &= isinstance(line["status"], str) and (
            line["status"] != "done" or rows_name(path.stem) in files
        )
        is_sound &= isinstance(record["source"], dict) and isinstance(record.get("remark", ""), str)
        is_sound &= all(
            isinstance(text, str) for text in (*files, *files.values(), *masks, *masks.values())
        )
        is_sound &= all(confined(path.parent.parent, name) is not None for name in (*files, *masks))
        return record if is_sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fits(row: Mapping[str, Any], row_type: type) -> bool:
    """Check the types of a row's values; columns that `row_type` does not have may hold any."""
    # A set difference, because a loop is slow for noise with 100 000 rows.
    unfit = set(zip(row, map(type, row.values()))) - _kinds(row_type)
    return not any(name in _names(row_type) for name, _ in unfit)


@cache
def _kinds(row_type: type) -> frozenset[tuple[str, type]]:
    """Return the valid (column, type in JSON) pairs; null is unknown, a float may be an int."""

    def kinds_of(hint: Any) -> tuple[type, ...]:
        if get_origin(hint) is Literal:
            return (str,)
        parts = get_args(hint) or (hint,)
        return (*parts, NoneType, int) if float in parts else (*parts, NoneType)

    return frozenset(
        (name, kind) for name, hint in get_type_hints(row_type).items() for kind in kinds_of(hint)
    )


def write_rows(file: BinaryIO, rows: Iterable[Any]) -> None:
    """Write a JSON object per line, without unknown values, which are half of a row of noise."""
    for row in rows:
        file.write(json_text(known(row), indent=None).encode("utf-8", "replace"))


def read_rows(
    folder: Path,
    name: str,
    kind: type[RecordFolder] = RecordFolder,
) -> Iterator[dict[str, Any]]:
    """Yield the rows that `write_rows` wrote for an item; a missing column is unknown.

    Raises:
        ScanError: the file is missing or not valid for this item (`E_RECORD`).
    """
    return (_row_of(line, folder, name, kind) for line in _lines(folder, name))


def _lines(folder: Path, name: str) -> Iterator[bytes]:
    try:
        with open_regular(folder / rows_name(name)) as file:
            while line := file.readline(MAX_ROW_BYTES):
                yield line
    except OSError as error:
        raise _bad_rows(folder, name, error) from error


def _row_of(line: bytes, folder: Path, name: str, kind: type[RecordFolder]) -> dict[str, Any]:
    try:
        row = parse_json(line)
        if not isinstance(row, dict) or not _fits(row, kind.row_types[1]):
            raise ValueError("a line is not a valid row")
        if row.get(kind.name_column) != name:
            raise ValueError(f"a row is not of {name!r}")
    except ValueError as error:
        raise _bad_rows(folder, name, error) from error
    return row


def _bad_rows(folder: Path, name: str, error: Exception) -> ScanError:
    return ScanError(
        f"{folder / rows_name(name)}: not a valid file of rows ({error})",
        fix=f"delete {folder / _record_name(name)} and repeat the command that wrote it",
        code="E_RECORD",
    )


def plain(row: Any) -> dict[str, Any]:
    """Return the fields of a row for JSON, with None for unknown values: JSON has no NaN."""
    return dict.fromkeys(_names(type(row))) | known(row)


def known(row: Any) -> dict[str, Any]:
    """Return the known fields of a row for JSON."""
    # `asdict` would copy each value deeply: a noisy mask has tens of thousands of rows.
    return {
        name: value
        for name in _names(type(row))
        if (value := getattr(row, name)) is not None
        and not (isinstance(value, float) and not math.isfinite(value))
    }


@cache
def _names(row_type: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(row_type))


def _is_page(path: str) -> bool:
    return path.startswith(f"{VIEWERS}/")


def _size_of(line: bytes) -> int:
    """Extract n_voxels from the line of a lesion, which may come from a stranger."""
    n_voxels = _N_VOXELS.search(line)
    return int(n_voxels[1]) if n_voxels else 0


def _volume_of(line: bytes) -> float:
    """Extract volume_ml from the line of a lesion, like `_size_of`."""
    volume_ml = _VOLUME_ML.search(line)
    return float(volume_ml[1]) if volume_ml else 0.0


def _record_name(name: str) -> str:
    return f"{RECORDS}/{name}.json"


def rows_name(name: str) -> str:
    """Return the path, relative to the folder, of the file with an item's rows."""
    return f"{RECORDS}/{name}.rows.jsonl"
