"""The quality of the scans that `volseg check` reads: its problems, table, sheets and page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from volseg.commands.problems import Problem, problem_at
from volseg.errors import VolsegError
from volseg.io.cases import ONE_CHANNEL, Case, is_valid_id
from volseg.io.dicom import modality_of
from volseg.io.formats import stem_of, table_name, without_places
from volseg.io.header import ScanHeader
from volseg.options import Progress
from volseg.pages.about import About
from volseg.quality.compare import Raised, compare_scans
from volseg.quality.flags import every_cut
from volseg.quality.prints import print_of_scan
from volseg.quality.rows import QualityRow
from volseg.quality.scan import ScanFacts, judge_scan
from volseg.store.outputs import OutputFolder
from volseg.store.tables import table
from volseg.volume import Volume
from volseg.words import format_count, format_list

TABLE, PAGE = "quality.csv", "quality.html"
MAX_LISTED, MAX_NAMES = 20, 5  # scans with a flag that are listed one by one; named in one line


def sheet_name(number: int) -> str:
    """Return the name of a sheet of thumbnails, from 1."""
    return "quality.png" if number == 1 else f"quality_{number}.png"


class ScanQuality:
    """Collects the quality of scans as they are read, with a thumbnail of each.

    Args:
        progress: for the command that reads them.
        is_judged: False collects nothing, as judging takes as long as reading.
    """

    def __init__(self, progress: Progress, *, is_judged: bool) -> None:
        self.progress, self._is_judged = progress, is_judged
        self._facts: dict[int, ScanFacts] = {}  # number of the scan → facts
        self._failed: dict[int, QualityRow] = {}
        self._thumbnails: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._facts) + len(self._failed)

    def add(self, case: Case, channel: str, scan: Volume, header: ScanHeader) -> None:
        """Judge a scan that was read."""
        if not self._is_judged:
            return
        from volseg.pages.quality_sheet import thumbnail  # loads Pillow

        facts = judge_scan(
            scan,
            case_id=case.id,
            channel=channel,
            image=table_name(case.images[channel]),
            modality=modality_of(header),
        )
        number = len(self)
        self._facts[number] = replace(facts, print=print_of_scan(scan), patient=case.patient)
        self._thumbnails[number] = thumbnail(scan, facts.row)

    def fail(self, case: Case, channel: str, error: VolsegError) -> None:
        """Note a scan that could not be read; paths may name a patient, so the reason has none."""
        if not self._is_judged:
            return
        path = case.images[channel]
        name, reason = table_name(path), f"{error.code}: {error.problem}; to fix: {error.fix}"
        reason = without_places(reason, {path: name}).replace(f"{name}: ", "", 1)
        self._failed[len(self)] = QualityRow(
            case_id=case.id, channel=channel, status="failed", reason=reason, image=name
        )

    def problems(self, where: str) -> Iterator[Problem]:
        """Yield the flags of the scans; of one that many have, only how many."""
        raised: dict[str, list[tuple[QualityRow, Raised]]] = defaultdict(list)
        for row, flags in self._compared():
            for item in flags:
                raised[item.flag.code].append((row, item))
        for code, scans in raised.items():
            if len(scans) > MAX_LISTED:
                yield self._summary(where, code, scans)
                continue
            for row, item in scans:
                channel = "" if row.channel == ONE_CHANNEL else f"{row.channel}: "
                yield problem_at(row.case_id, code, channel + item.text, item.flag.fix)
        yield from self._cut(where, "W_CUT" in raised)

    def _summary(
        self, where: str, code: str, scans: Sequence[tuple[QualityRow, Raised]]
    ) -> Problem:
        names = format_list([row.name for row, _ in scans], MAX_NAMES)
        row, item = scans[0]
        text = (
            f"{len(scans)} of {format_count(len(self), 'scan')}: {names}; {row.name}: {item.text}"
        )
        return problem_at(where, code, text, item.flag.fix)

    def _cut(self, where: str, is_flagged: bool) -> Iterator[Problem]:
        n_cut = 0 if is_flagged else len(every_cut(list(self._facts.values())))
        if n_cut:
            text = (
                f"the body touches a side of the grid in {n_cut} of {len(self)} scans, as in crops"
            )
            yield problem_at(where, "N_CUT", text)

    def write(self, outputs: OutputFolder) -> None:
        """Write quality.csv, the sheets and the page, together."""
        from volseg.pages.quality_page import quality_page
        from volseg.pages.quality_sheet import MAX_SHEETS, Tile, quality_sheets

        done = dict(zip(self._facts, (row for row, _ in self._compared()), strict=True))
        rows = [row for _, row in sorted((done | self._failed).items())]
        tiles = [Tile(row, self._thumbnails.get(number)) for number, row in enumerate(rows)]
        sheets = {sheet_name(n): sheet for n, sheet in enumerate(quality_sheets(tiles), start=1)}
        with outputs.staged() as commit:
            commit.write(TABLE, table(QualityRow, rows))
            commit.write(PAGE, quality_page(About.now("check"), tiles).html())
            for name, sheet in sheets.items():
                commit.write(name, sheet)
            every = map(sheet_name, range(1, MAX_SHEETS + 1))
            commit.finish(removed=[name for name in every if name not in sheets])

    def _compared(self) -> list[tuple[QualityRow, list[Raised]]]:
        return compare_scans(list(self._facts.values()))


def output_names() -> list[str]:
    """Return the names of the files that a check may write."""
    from volseg.pages.quality_sheet import MAX_SHEETS

    return [TABLE, PAGE, *map(sheet_name, range(1, MAX_SHEETS + 1))]


def case_of_scan(path: Path) -> Case:
    """Return the case of a single scan."""
    name = stem_of(path)
    return Case(name if is_valid_id(name) else "scan", {ONE_CHANNEL: path})
