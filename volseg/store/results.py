"""The results folder: a record per case as the mark that it is complete, and the tables made from the records."""

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
from volseg.measure.rows import CaseRow, LesionMeasurement
from volseg.store.outputs import RECORDS, Commit, OutputFolder, confined, trace_name
from volseg.store.tables import table

MAX_ROW_BYTES = 2**20  # of a line of a stranger's file; a row takes about one thousandth of it
VIEWERS, THUMBNAILS = "viewer", "viewer/thumbnails"
MASKS, LESION_IDS = "masks", "lesion_ids"
STALE, EDITED = "W_STALE", "W_EDITED"
_VOLUME_ML = re.compile(rb'"volume_ml": ([0-9]{1,18}(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,3})?)\b')
DAMAGED = "E_RECORD: its record is damaged; to fix: run the command that made it again"
_N_VOXELS = re.compile(rb'"n_voxels": ([0-9]{1,18})\b')


class State(Enum):
    """What a folder holds of an item."""

    MISSING = "missing"  # nothing, or not all of it, or of another model, option or input
    COMPLETE = "complete"
    EDITED = "edited"  # a mask that was changed by hand since it was measured
    OTHER_INPUT = "other input"  # a mask that was corrected by hand, of another scan than this one


class RecordFolder(OutputFolder):
    """A folder in which each item has a record, held by one run at a time. Use it with `with`.

    An item is complete when its record says that it was made from the same input, model and options (`key`), and its files
    carry the hashes that the record names.
    """

    # Where a record holds the row of its item, what that row and those of its lesions are, which
    # tables hold these rows, and which column names the item.
    row: ClassVar[str] = "case"
    row_types: ClassVar[tuple[type, type]] = (CaseRow, LesionMeasurement)
    tables: ClassVar[tuple[str, str]] = ("cases.csv", "lesions.csv")
    name_column: ClassVar[str] = "case_id"

    def state_of(self, name: str, key: str | None, inputs: Sequence[str] | None = None) -> State:
        """Whether an item needs to be done. A mask that was corrected by hand is kept whatever the model and options are.

        Args:
            key: of the input, model and options; None: whatever they were.
            inputs: SHA-256 of each file of the item; None: whatever they were.
        """
        record = self.record(name)
        if record is None or record[self.row]["status"] != "done":
            return State.MISSING
        corrected, is_edited = record.get("corrected", {}), self.is_edited(record)
        is_corrected = bool(corrected) and all((self.path / path).is_file() for path in corrected)
        if (
            (is_edited or is_corrected)
            and inputs is not None
            and list(inputs) != record.get("inputs")
        ):
            return State.OTHER_INPUT
        if is_edited:
            return State.EDITED
        if key is not None and not is_corrected and (record.get("key") != key or corrected):
            return State.MISSING
        needed = {
            path: digest
            for path, digest in record["files"].items()
            if not path.startswith(f"{VIEWERS}/")
        }
        if self._are_there(needed):
            return State.COMPLETE
        return (
            State.EDITED if is_corrected else State.MISSING
        )  # what was measured of the corrected mask is damaged

    def is_edited(self, record: Mapping[str, Any]) -> bool:
        """Whether a mask was changed by hand since the numbers of its item were taken."""
        masks = masks_of(record).items()
        return any(
            (self.path / path).is_file() and not self._is_as(path, digest) for path, digest in masks
        )

    @property
    def edited_text(self) -> str:
        """What is to be said of an item whose mask was changed by hand and not measured."""
        command = f"`volseg measure {self.path}`"
        return f"its mask was changed by hand after it was measured and is kept; {command} measures it as it is now"

    def shown(self, record: Mapping[str, Any], *, is_pending: bool = False) -> dict[str, Any]:
        """`shown_row`, with a warning if the mask is not the one that was measured."""
        row = shown_row(record, self.row, is_pending=is_pending)
        is_edited = row["status"] == "done" and self.is_edited(record)
        return _warned(row, f"{EDITED}: {self.edited_text}") if is_edited else row

    def is_complete(self, name: str, key: str) -> bool:
        """Whether the item was done with this key and its files are as they were written; pages are soon made again."""
        return self.state_of(name, key) is State.COMPLETE

    def has_record(self, name: str) -> bool:
        return (self._records / f"{name}.json").exists()

    def n_with(self, names: Iterable[str]) -> int:
        """How many items the folder holds once those of these names are among them."""
        return len({path.stem for path in self._records.glob("*.json")}.union(names))

    def record(self, name: str) -> dict[str, Any] | None:
        """What was recorded of an item; None if nothing was or the record is damaged."""
        return read_json_record(self._records / f"{name}.json", type(self))

    def rows_of(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of an item, one after another, as column → value; one that is not there is unknown."""
        return read_rows(self.path, name, type(self))

    def largest_rows(self, name: str, most: int) -> list[dict[str, Any]]:
        """The rows of the largest lesions of an item, in their order; of equal ones the first. Up to `most` rows: all of them."""
        lines = sorted(self._largest_lines(name, most))
        return [_row_of(line, self.path, name, type(self)) for _, line in lines]

    def _largest_lines(self, name: str, most: int) -> list[tuple[int, bytes]]:
        """Place and line of the largest lesions of an item, the largest first."""
        # Lines are told apart before they are parsed: of noise a few of 100 000 are wanted.
        lines = enumerate(_lines(self.path, name))
        return nlargest(most, lines, key=lambda place_and_line: _size_of(place_and_line[1]))

    def listed_rows(self, limits: Mapping[str, int], most: int) -> tuple[list[dict[str, Any]], int]:
        """The rows of the largest lesions, by volume, of all these items, in their order.

        Args:
            limits: of an item, how many of its largest lesions, by voxels, may be among them.
            most: rows.

        Returns:
            The rows, and of how many they are the largest.
        """
        n = 0

        def lines() -> Iterator[tuple[int, int, bytes]]:
            nonlocal n
            for item, (name, limit) in enumerate(limits.items()):
                for place, line in self._largest_lines(name, limit):
                    n += 1
                    yield item, place, line

        largest = nlargest(most, lines(), key=lambda line: _volume_of(line[-1]))
        largest.sort(reverse=True)
        names, rows = list(limits), []
        while largest:  # a line goes when its row is there
            item, _, line = largest.pop()
            rows.append(_row_of(line, self.path, names[item], type(self)))
        return rows, n

    def records(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """(name, record) by name, one after another; None for one that is damaged, or whose rows are."""
        for path in sorted(self._records.glob("*.json")):
            record = read_json_record(path, type(self))
            rows = rows_name(path.stem)
            is_sound = record is not None and (
                rows not in record["files"] or self._is_as(rows, record["files"][rows])
            )
            yield path.stem, record if is_sound else None

    def item_rows(self, pending: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The row of every item that the folder holds, by name.

        Args:
            pending: rows of items that were not reached; of one with an earlier result that result
                is shown.
        """
        rows = {getattr(row, self.name_column): plain(row) for row in pending}
        for name, record in self.records():
            if record is None:
                rows[name] = self._unknown_row(name)
            elif name not in rows or record[self.row]["status"] == "done":
                rows[name] = self.shown(record, is_pending=name in rows)
        return [rows[name] for name in sorted(rows)]

    def checked_rows(self, pending: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """`item_rows`, but an item whose lesion rows cannot be read is unknown."""
        rows, unreadable = self.item_rows(pending), set()
        for _ in self.lesion_rows(rows, unreadable):
            pass
        return self._as_damaged(rows, unreadable)

    def lesion_rows(
        self,
        items: Iterable[Mapping[str, Any]],
        unreadable: set[str],
    ) -> Iterator[dict[str, Any]]:
        """The rows of the lesions of these items, one after another.

        Args:
            items: rows as `item_rows` gives them.
            unreadable: takes the names of items whose rows cannot be read, or not to their end.
        """
        for item in items:
            if item["status"] == "done":
                name = item[self.name_column]
                try:
                    yield from self.rows_of(name)
                except ScanError:
                    unreadable.add(name)

    def write_tables(self, pending: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Write both tables, of every item of the folder, by name; returns the rows of the items.

        Args:
            pending: as in `item_rows`.
        """
        rows, unreadable = self.item_rows(pending), set()
        with self.staged() as commit:
            # Rows are checked while they are written: to read them before takes 40 % longer.
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
        """The rows of items; one whose lesion rows cannot be read has a damaged record from here on."""
        for name in unreadable:
            record = self.record(name)
            if record is not None:  # without its rows the next run that includes it does it again
                record["files"].pop(rows_name(name), None)
                self.update(name, record)
        names = (row[self.name_column] for row in rows)
        return [
            self._unknown_row(name) if name in unreadable else row
            for name, row in zip(names, rows, strict=True)
        ]

    def _unknown_row(self, name: str) -> dict[str, Any]:
        """The row of an item whose record cannot be read."""
        columns = {self.name_column: name, "status": "unknown", "reason": DAMAGED}
        return plain(self.row_types[0](**columns))

    def write_run(self, description: Mapping[str, Any]) -> None:
        """run.json: what was run, with what, on what."""
        self.write("run.json", json_text(dict(description)))

    def update(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of an item whose rows and files stay."""
        self.write(_record_name(name), json_text(record, indent=None))

    def settle(self, name: str) -> None:
        """Forget, of an item that is complete, that a later run failed."""
        record = self.record(name) or {}
        settled = {key: value for key, value in record.items() if key not in ("remark", "failed")}
        if settled != record:
            self.update(name, settled)

    def commit_failure(self, name: str, row: Any, inputs: Sequence[str]) -> None:
        """Record that an item failed. What an earlier run made of it stays.

        Where that was of the same input, its rows stay in the tables too, with a warning; of another input they would be
        numbers of something that is not there any more.

        Args:
            row: a dataclass with `status` and `reason`.
            inputs: SHA-256 of each file of the item.
        """
        record = self.record(name)
        if record is None or record[self.row]["status"] != "done":
            record = {
                "key": "",
                "inputs": list(inputs),
                self.row: plain(row),
                "files": {},
                "source": {},
            }
        elif list(inputs) == record.get("inputs"):
            record.pop("failed", None)  # of another input
            record |= {
                "remark": f"{STALE}: the last run failed ({row.reason}); these numbers are from an earlier one"
            }
        else:
            record |= {"failed": plain(row)}
        self.update(name, record)

    def _are_there(self, files: Mapping[str, str]) -> bool:
        return all(self._is_as(path, digest) for path, digest in files.items())

    def _is_as(self, name: str, digest: str) -> bool:
        path = confined(self.path, name)
        try:
            return path is not None and path.is_file() and sha256_of(path) == digest
        except OSError:
            return False  # it cannot be read

    def _finish(
        self,
        name: str,
        commit: Commit,
        content: Mapping[str, Any],
        rows: Iterable[Any],
        *,
        keeps: Sequence[str] = (),
    ) -> None:
        """Let the files of an item appear together with its rows and its record; other files of an earlier call go.

        Args:
            rows: dataclasses; taken one after another.
            keeps: earlier files that stay the item's.
        """
        earlier = (self.record(name) or {}).get("files", {})
        commit.write(rows_name(name), lambda file: write_rows(file, rows))
        files = {path: earlier[path] for path in keeps if path in earlier} | commit.hashes()
        commit.write(_record_name(name), json_text(dict(content) | {"files": files}, indent=None))
        corrected = content.get(
            "corrected", ()
        )  # even where it is a mask that volseg drew once: its own again by its hash
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
        """Record a case that was done, whose other files are in the commit.

        Args:
            inputs: SHA-256 of each file that was read.
            lesions: its rows, taken one after another, so that they need not be in memory together.
            source: what is needed to measure it or make its page again, such as where its scan is.
            corrected: masks that were changed by hand, path → SHA-256, from which the numbers were taken.
        """
        content = {
            "key": key,
            "inputs": list(inputs),
            "case": plain(case),
            "source": dict(source or {}),
        }
        self._finish(
            case.case_id,
            commit,
            content | ({"corrected": dict(corrected)} if corrected else {}),
            lesions,
        )

    def keep(self, case_id: str, scan: Path) -> None:
        """Say where the scan of a complete case is now; an earlier failure is settled."""
        self.settle(case_id)
        record = self.record(case_id)
        if record is not None and record["source"].get("scan") not in (None, str(scan.absolute())):
            self.update(
                case_id, record | {"source": record["source"] | {"scan": str(scan.absolute())}}
            )

    def add_files(self, case_id: str, commit: Commit) -> None:
        """Let further files of a complete case appear; those of the same name are replaced."""
        record = self.record(case_id)
        assert record is not None, f"{case_id} has no record"
        record["files"] |= commit.hashes()
        commit.write(_record_name(case_id), json_text(record, indent=None))
        commit.finish()

    def has_pages(self, record: Mapping[str, Any]) -> bool:
        """Whether a case has its page and its picture, as they were written."""
        pages = {
            name: digest
            for name, digest in record["files"].items()
            if name.startswith(f"{VIEWERS}/")
        }
        return bool(pages) and self._are_there(pages)


def shown_row(
    record: Mapping[str, Any], row_name: str = "case", *, is_pending: bool = False
) -> dict[str, Any]:
    """The row of an item as tables and pages show it.

    Args:
        row_name: where the record holds it.
        is_pending: the present run was to do it again and did not reach it.
    """
    if "failed" in record:
        return dict(record["failed"])
    row = dict(record[row_name])
    remark = record.get("remark", "")
    if is_pending and not remark:
        remark = f"{STALE}: from an earlier run; the run that was to replace it was interrupted"
    return _warned(row, remark) if remark else row


def _warned(row: Mapping[str, Any], warning: str) -> dict[str, Any]:
    return {**row, "warnings": "; ".join(filter(None, (row.get("warnings"), warning)))}


def masks_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Path → SHA-256 of each mask that the numbers of an item were taken from."""
    masks = {**record["files"], **record.get("corrected", {})}
    return {path: digest for path, digest in masks.items() if path.startswith(f"{MASKS}/")}


def read_json_record(path: Path, kind: type[RecordFolder] = RecordFolder) -> dict[str, Any] | None:
    """A record as it was written; None where it is not there or damaged. It may come from a stranger."""
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
    """Whether each value of a row that was read is one that its column may have; of other columns, any."""
    unfit = set(zip(row, map(type, row.values()))) - _kinds(
        row_type
    )  # not a loop: noise has 100 000 rows
    return not any(name in _names(row_type) for name, _ in unfit)


@cache
def _kinds(row_type: type) -> frozenset[tuple[str, type]]:
    """(column, type of a value of it in JSON), in which unknown is null and a whole number may stand for another."""

    def kinds_of(hint: Any) -> tuple[type, ...]:
        if get_origin(hint) is Literal:
            return (str,)
        parts = get_args(hint) or (hint,)
        return (*parts, NoneType, int) if float in parts else (*parts, NoneType)

    return frozenset(
        (name, kind) for name, hint in get_type_hints(row_type).items() for kind in kinds_of(hint)
    )


def write_rows(file: BinaryIO, rows: Iterable[Any]) -> None:
    """A JSON object per line, without what is unknown: of noise that is half of each row."""
    for row in rows:
        file.write(json_text(known(row), indent=None).encode("utf-8", "replace"))


def read_rows(
    folder: Path,
    name: str,
    kind: type[RecordFolder] = RecordFolder,
) -> Iterator[dict[str, Any]]:
    """What `write_rows` wrote for an item; a column that is not there is unknown.

    Raises:
        ScanError: the file is not there, or not as volseg writes it for this item (`E_RECORD`).
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
            raise ValueError("a line is no row")
        if row.get(kind.name_column) != name:
            raise ValueError(f"a row is not of {name!r}")
    except ValueError as error:
        raise _bad_rows(folder, name, error) from error
    return row


def _bad_rows(folder: Path, name: str, error: Exception) -> ScanError:
    return ScanError(
        f"{folder / rows_name(name)}: not as volseg writes it ({error})",
        fix=f"delete {folder / _record_name(name)} and run the command that made it again",
        code="E_RECORD",
    )


def plain(row: Any) -> dict[str, Any]:
    """Fields of a row for JSON, which has no NaN: unknown is null there and an empty cell in a table."""
    return dict.fromkeys(_names(type(row))) | known(row)


def known(row: Any) -> dict[str, Any]:
    """Fields of a row that are known, for JSON."""
    # Not `asdict`, which copies each value deeply: a noisy mask has ten thousands of rows.
    return {
        name: value
        for name in _names(type(row))
        if (value := getattr(row, name)) is not None
        and not (isinstance(value, float) and not math.isfinite(value))
    }


@cache
def _names(row_type: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(row_type))


def _size_of(line: bytes) -> int:
    """Voxels of a lesion, by its line, which may come from a stranger."""
    n_voxels = _N_VOXELS.search(line)
    return int(n_voxels[1]) if n_voxels else 0


def _volume_of(line: bytes) -> float:
    """Volume in mL of a lesion, by its line, as `_size_of`."""
    volume_ml = _VOLUME_ML.search(line)
    return float(volume_ml[1]) if volume_ml else 0.0


def _record_name(name: str) -> str:
    return f"{RECORDS}/{name}.json"


def rows_name(name: str) -> str:
    """Path in the folder of the file with the rows of an item."""
    return f"{RECORDS}/{name}.rows.jsonl"
