"""Results folders: a record per case, which marks it as complete, and tables made from the records.

The code calls a case of `infer` or `measure`, or a patient of `compare`, an item.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from heapq import nlargest
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from volseg.errors import ScanError
from volseg.io.files import json_text, sha256_of
from volseg.measurement.confidence import probabilities_in
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.store.outputs import Commit, OutputFolder, confined, trace_name
from volseg.store.records import (
    STALE,
    CaseRecord,
    Item,
    Record,
    StoredRows,
    record_name,
    rows_name,
    volume_ml_of,
    with_warning,
    write_rows,
)
from volseg.store.tables import table

VIEWERS, THUMBNAILS = "viewer", "viewer/thumbnails"
EDITED = "W_EDITED"
DAMAGED = "E_RECORD: the record is damaged; to fix: repeat the command that wrote it"
R = TypeVar("R", bound=Record[Any, Any])


class State(Enum):
    """State of an item in a folder."""

    MISSING = "missing"  # absent, incomplete, or made with another model, option or input
    COMPLETE = "complete"
    EDITED = "edited"  # a mask was edited by hand and not measured since
    OTHER_INPUT = "other input"  # a mask was edited by hand, but the scan is a different one now


class RecordFolder(OutputFolder, Generic[R, Item]):
    """A folder with a record per item; one run uses it at a time, in a `with` statement.

    An item is complete if its record has the current `key` (input, model and options) and the
    hashes of its files.
    """

    record_type: ClassVar[type[Record[Any, Any]]]

    # ---- records

    def record(self, name: str) -> R | None:
        """Return the record of an item; None if it is missing or damaged."""
        try:
            return self.record_type.read(self.path, name)  # type: ignore[return-value]
        except (OSError, ValueError):
            return None

    def records(self) -> Iterator[tuple[str, R | None]]:
        """Yield (name, record) by name; the record is None if it or its rows are damaged."""
        for path in sorted(self._records.glob("*.json")):
            record, rows = self.record(path.stem), rows_name(path.stem)
            if record is not None and rows in record.files:
                record = record if self._is_as(rows, record.files[rows]) else None
            yield path.stem, record

    def has_record(self, name: str) -> bool:
        return (self._records / f"{name}.json").exists()

    def count_items(self, names: Iterable[str]) -> int:
        """Return how many items the folder has, counting also `names`."""
        return len({path.stem for path in self._records.glob("*.json")}.union(names))

    def is_complete(self, name: str, key: str) -> bool:
        """Check whether the item was done with this key and its files, except pages, are intact."""
        record = self.record(name)
        if record is None or not record.is_done or record.key != key:
            return False
        return self._is_intact(record)

    def commit(self, record: R, commit: Commit, *, keep: str = "") -> None:
        """Record an item that was done; delete its other files of an earlier call.

        Args:
            record: without files; its lesions are consumed one at a time, so that they need not fit
                in memory.
            commit: holds the other files of the item.
            keep: folder whose files of an earlier call stay, and stay recorded.
        """
        earlier = self.record(record.name)
        commit.write(rows_name(record.name), lambda file: write_rows(file, record.lesions))
        files = commit.hashes()
        if earlier is not None and keep:
            kept_files = [name for name in earlier.files if name.startswith(f"{keep}/")]
            # One that was deleted or changed is the user's: it need not be intact any more.
            intact = {name for name in kept_files if self._is_as(name, earlier.files[name])}
            files = {name: earlier.files[name] for name in intact} | files
        content = replace(record, files=files).as_json()
        commit.write(record_name(record.name), json_text(content, indent=None))
        # A corrected mask stays, even if it was changed back to a mask that volseg once wrote.
        kept = {*files, *content.get("corrected", ())}
        stale = [path for path in (earlier.files if earlier else ()) if path not in kept]
        commit.finish(last=record_name(record.name), removed=[*stale, trace_name(record.name)])

    def update(self, record: R) -> None:
        """Replace the record of an item and keep its rows and files."""
        self.write(record_name(record.name), json_text(record.as_json(), indent=None))

    def clear_failure(self, name: str) -> None:
        """Remove the mark of a failed later run from the record of a complete item."""
        record = self.record(name)
        if record is not None and (record.failed is not None or record.remark):
            self.update(replace(record, failed=None, remark=""))

    def commit_failure(self, row: Item, inputs: Sequence[str]) -> None:
        """Record that an item failed, and keep the files of an earlier run.

        The earlier rows stay in the tables, with a warning, if the input is the same.

        Args:
            inputs: SHA-256 of each file of the item.
        """
        record = self.record(self._name_of(row))
        if record is None or not record.is_done:
            values = {self.record_type.row_name: row, "inputs": tuple(inputs)}
            self.update(self.record_type(lesions=(), **values))  # type: ignore[arg-type]
        elif record.inputs == tuple(inputs):
            remark = f"the last run failed ({row.reason}); these numbers are from an earlier one"
            self.update(replace(record, failed=None, remark=f"{STALE}: {remark}"))
        else:
            self.update(replace(record, failed=row))

    # ---- rows

    def item_rows(self, pending: Iterable[Item] = ()) -> list[Item]:
        """Return the row of every item of the folder, by name.

        Args:
            pending: rows of items not processed yet; an earlier result of an item replaces its row.
        """
        rows = {self._name_of(row): row for row in pending}
        for name, record in self.records():
            if record is None:
                rows[name] = self._unknown_row(name)
            elif name not in rows or record.is_done:
                rows[name] = self.shown(record, is_pending=name in rows)
        return [rows[name] for name in sorted(rows)]

    def shown(self, record: R, *, is_pending: bool = False) -> Item:
        """Return the item's row as tables and pages show it."""
        return record.shown(is_pending=is_pending)

    def checked_rows(self, pending: Iterable[Item] = ()) -> list[Item]:
        """Return `item_rows`, with status unknown for items whose lesion rows cannot be read."""
        rows, unreadable = self.item_rows(pending), set()
        for _ in self.lesion_rows(rows, unreadable):
            pass
        return self._as_damaged(rows, unreadable)

    def lesion_rows(self, items: Iterable[Item], unreadable: set[str]) -> Iterator[Any]:
        """Yield the lesion rows of these items.

        Args:
            items: rows from `item_rows`.
            unreadable: receives the names of items whose rows cannot be read completely.
        """
        for item in items:
            if item.status == "done":
                try:
                    yield from self.rows_of(self._name_of(item))
                except ScanError:
                    unreadable.add(self._name_of(item))

    def rows_of(self, name: str) -> StoredRows:
        """Return the lesion rows of an item, which are read one at a time."""
        return StoredRows(self.path, name, self.record_type)

    def listed_rows(self, limits: Mapping[str, int], most: int) -> tuple[list[Any], int]:
        """Return the rows of the largest lesions, by volume, of these items, in their order.

        Args:
            limits: item → how many of its largest lesions, by voxels, are considered.
            most: maximum number of rows.

        Returns:
            The rows, and the number of lesions considered.
        """
        n, items = 0, [self.rows_of(name) for name in limits]

        def lines() -> Iterator[tuple[int, int, bytes]]:
            nonlocal n
            for item, limit in enumerate(limits.values()):
                for index, line in items[item].largest_lines(limit):
                    n += 1
                    yield item, index, line

        largest = nlargest(most, lines(), key=lambda line: volume_ml_of(line[-1]))
        largest.sort(reverse=True)
        rows = []
        while largest:  # frees each line once its row is parsed
            item, _, line = largest.pop()
            rows.append(items[item].parse(line))
        return rows, n

    def write_tables(self, pending: Iterable[Item] = ()) -> list[Item]:
        """Write both tables of all items of the folder, by name, and return the items' rows.

        Args:
            pending: as in `item_rows`.
        """
        rows, unreadable = self.item_rows(pending), set()
        types, names = self.record_type.row_types, self.record_type.tables
        with self.staged() as commit:
            # Rows are checked while they are written: reading them first would take 40 % longer.
            for _ in range(2):
                lesions = self.lesion_rows(rows, unreadable)
                commit.write(names[1], table(types[1], lesions, classes=self._classes(rows)))
                if not unreadable:
                    break
                rows = self._as_damaged(rows, unreadable)
            commit.write(names[0], table(types[0], rows))
            commit.finish()
        return rows

    def _classes(self, items: Iterable[Item]) -> list[str]:
        """Return the classes of lesions in these items, as the first lesion of each has them."""
        names: dict[str, None] = {}
        for item in items:
            if item.status == "done":
                with suppress(ScanError):  # found again where its rows are written
                    first = next(iter(self.rows_of(self._name_of(item))), None)
                    cell = getattr(first, "class_probabilities", None)
                    names |= dict.fromkeys(probabilities_in(cell))
        return list(names)

    def write_run(self, description: Mapping[str, Any]) -> None:
        """Write run.json, which describes the command, its settings and its inputs."""
        self.write("run.json", json_text(dict(description)))

    def _as_damaged(self, rows: Sequence[Item], unreadable: Collection[str]) -> list[Item]:
        """Mark items with unreadable lesion rows as damaged, and return the rows of all items."""
        for name in unreadable:
            record = self.record(name)
            if record is not None:  # without the rows, the next run with this item redoes it
                files = dict(record.files)
                files.pop(rows_name(name), None)
                self.update(replace(record, files=files))
        return [
            self._unknown_row(self._name_of(row)) if self._name_of(row) in unreadable else row
            for row in rows
        ]

    def _unknown_row(self, name: str) -> Item:
        """Return the row of an item whose record cannot be read."""
        columns = {self.record_type.name_column: name, "status": "unknown", "reason": DAMAGED}
        return self.record_type.row_types[0](**columns)

    def _name_of(self, row: Item) -> str:
        return getattr(row, self.record_type.name_column)

    def _is_intact(self, record: R) -> bool:
        """Check whether the files of an item, except its pages, are as they were written."""
        files = record.files.items()
        return all(self._is_as(path, digest) for path, digest in files if not _is_page(path))

    def _is_as(self, name: str, digest: str) -> bool:
        path = confined(self.path, name)
        try:
            return path is not None and path.is_file() and sha256_of(path) == digest
        except OSError:
            return False  # the file cannot be read


class ResultsFolder(RecordFolder[CaseRecord[Iterable[LesionMeasurement]], CaseRow]):
    """The folder of `infer` and `measure`: a record per case; masks may be edited by hand."""

    record_type = CaseRecord

    def state_of(self, name: str, key: str | None, inputs: Sequence[str] | None = None) -> State:
        """Return whether a case has to be done; a mask edited by hand is kept for any key.

        Args:
            key: of the input, model and options; None accepts any.
            inputs: SHA-256 of each input file of the case; None accepts any.
        """
        record = self.record(name)
        if record is None or not record.is_done:
            return State.MISSING
        is_edited = self.is_edited(record)
        if not is_edited and not self._is_corrected(record):
            return self._state_by_key(record, key)
        if inputs is not None and tuple(inputs) != record.inputs:
            return State.OTHER_INPUT
        # If its results are damaged, a corrected mask has to be measured again.
        is_measured = not is_edited and self._is_intact(record)
        return State.COMPLETE if is_measured else State.EDITED

    def _state_by_key(self, record: CaseRecord[Any], key: str | None) -> State:
        """Return the state of a case whose masks are as the model made them."""
        is_current = key is None or (record.key == key and not record.corrected)
        return State.COMPLETE if is_current and self._is_intact(record) else State.MISSING

    def is_complete(self, name: str, key: str) -> bool:
        return self.state_of(name, key) is State.COMPLETE

    def is_edited(self, record: CaseRecord[Any]) -> bool:
        """Check whether a mask of the case was edited by hand after it was measured."""
        return any(
            (self.path / path).is_file() and not self._is_as(path, digest)
            for path, digest in record.masks.items()
        )

    def _is_corrected(self, record: CaseRecord[Any]) -> bool:
        """Check whether the measured mask is one that was edited by hand."""
        masks = [self.path / path for path in record.corrected]
        return bool(masks) and all(path.is_file() for path in masks)

    @property
    def edited_text(self) -> str:
        """Warning for a case whose mask was edited by hand and not measured yet."""
        text = "the mask was edited by hand and is kept; its numbers are from before the edit"
        return f"{text}; run `volseg measure {self.path}` to measure the edited mask"

    def shown(self, record: CaseRecord[Any], *, is_pending: bool = False) -> CaseRow:
        """Return the case's row, with a warning if the mask was edited after it was measured."""
        row = record.shown(is_pending=is_pending)
        is_edited = row.status == "done" and self.is_edited(record)
        return with_warning(row, f"{EDITED}: {self.edited_text}" if is_edited else "")

    def keep(self, case_id: str, scan: Path) -> None:
        """Update the scan's path of a complete case, and settle an earlier failure."""
        self.clear_failure(case_id)
        record, path = self.record(case_id), scan.absolute()
        if record is not None and record.source.scan not in (None, path):
            self.update(replace(record, source=replace(record.source, scan=path)))

    def add_files(self, record: CaseRecord[Any], commit: Commit) -> None:
        """Add files to a complete case, replacing those of the same name."""
        content = replace(record, files={**record.files, **commit.hashes()}).as_json()
        commit.write(record_name(record.name), json_text(content, indent=None))
        commit.finish()

    def has_pages(self, record: CaseRecord[Any]) -> bool:
        """Check whether the page and the picture of a case are there and unchanged."""
        pages = [path for path in record.files if _is_page(path)]
        return bool(pages) and all(self._is_as(path, record.files[path]) for path in pages)


def _is_page(path: str) -> bool:
    return path.startswith(f"{VIEWERS}/")
