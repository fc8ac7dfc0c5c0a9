"""The report of one scan or image: a page that prints on A4, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from volseg.manuscript.case_report import (
    RESEARCH_ONLY,
    CaseReport,
    Cell,
    FactTable,
    Line,
    Picture,
    Section,
)
from volseg.manuscript.facts import Part, Statement
from volseg.manuscript.text import escape_markdown, keys_by_file
from volseg.pages.page import as_base64, render_page

EVIDENCE = "Evidence"


def case_html(report: CaseReport) -> str:
    """Return the report as one page without scripts; each value names its cell."""
    return render_page(
        "case_report.html.jinja",
        scripts=(),
        report=report,
        research_only=RESEARCH_ONLY,
        pictures=[(picture, as_base64(picture.data)) for picture in report.pictures],
    )


def case_markdown(report: CaseReport, folder: str) -> str:
    """Return the report as Markdown; a footnote of each sentence and row names its cells.

    Args:
        folder: where its pictures are, relative to the file.
    """
    notes = _Footnotes()
    blocks = [
        f"# {_text(report.title.parts)}{notes.of(report.title.keys)}",
        f"**{RESEARCH_ONLY}**",
        *(_line(line, notes) for line in report.made_with),
        *_section(report.findings, notes),
        f"## {EVIDENCE}",
        *([escape_markdown(report.no_pictures)] if report.no_pictures else []),
        *(_picture(picture, folder, notes) for picture in report.pictures),
    ]
    for section in report.about:
        blocks += _section(section, notes)
    return "\n\n".join([*blocks, notes.text()]) + "\n"


class _Footnotes:
    """The footnotes of a text: keys → number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, ...], int] = {}

    def of(self, keys: Sequence[str]) -> str:
        """Return the reference to these keys; empty without any."""
        if not keys:
            return ""
        number = self._numbers.setdefault(tuple(keys), len(self._numbers) + 1)
        return f"[^{number}]"

    def text(self) -> str:
        return "\n".join(
            f"[^{number}]: {escape_markdown(keys_by_file(keys))}"
            for keys, number in self._numbers.items()
        )


def _section(section: Section, notes: _Footnotes) -> Iterator[str]:
    yield f"## {section.title}"
    yield from (_line(line, notes) for line in section.lines)
    if section.table is not None:
        yield _table(section.table, notes)
    yield from (_line(line, notes) for line in section.remarks)


def _line(line: Line, notes: _Footnotes) -> str:
    name = f"**{escape_markdown(line.name)}:** " if line.name else ""
    return f"{name}{_text(line.statement.parts)}{notes.of(line.statement.keys)}"


def _table(table: FactTable, notes: _Footnotes) -> str:
    rows = ["| " + " | ".join(map(escape_markdown, table.headings)) + " |"]
    rows.append("|---" * len(table.headings) + "|")
    for row in table.rows:
        keys = dict.fromkeys(key for cell in row for part in cell for key in part.keys)
        first, *others = map(_text, row)
        rows.append("| " + " | ".join([f"{first}{notes.of(tuple(keys))}", *others]) + " |")
    return "\n".join(rows)


def _picture(picture: Picture, folder: str, notes: _Footnotes) -> str:
    alt = escape_markdown(picture.alt)
    return f"![{alt}]({folder}/{picture.name})\n{_caption(picture.caption, notes)}"


def _caption(caption: Statement, notes: _Footnotes) -> str:
    return f"{_text(caption.parts)}{notes.of(caption.keys)}"


def _text(parts: Cell | Sequence[Part]) -> str:
    return escape_markdown("".join(part.text for part in parts))
