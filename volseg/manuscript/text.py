"""The text and the checklist as Markdown and as the rows of a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from volseg.manuscript.claim import SOURCE, Answer
from volseg.manuscript.facts import Statement, Topic

HEADINGS = ("no.", "section", "what is asked", "answer", "still to add", "keys")
# What Markdown reads as markup; an underscore within a word is none.
MARKUP = re.compile(r"[\\`*\[\]<>|~&#]|(?<![^\W_])_|_(?![^\W_])")


def paragraphs_of(statements: Sequence[Statement]) -> list[str]:
    """Return a paragraph per topic of which anything is known."""
    topics = [topic for topic in Topic if topic]
    texts = (" ".join(line.text for line in statements if line.topic == topic) for topic in topics)
    return list(filter(None, texts))


def rows_of(answers: Sequence[Answer]) -> Iterator[list[str]]:
    """Yield the cells of each item, below their headings."""
    yield list(HEADINGS)
    for answer in answers:
        item = answer.item
        cells = [str(item.number), item.section, item.asked, answer.text, answer.left]
        yield [*cells, keys_by_file(answer.keys)]


def keys_by_file(keys: Sequence[str]) -> str:
    """Return keys with the name of each file once."""
    files: dict[str, list[str]] = {}
    for key in keys:
        name, _, path = key.partition(": ")
        files.setdefault(name, []).append(path)
    return "; ".join(f"{name}: {', '.join(paths)}" for name, paths in files.items())


def markdown(paragraphs: Sequence[str], answers: Sequence[Answer]) -> str:
    """Return the text and the checklist as a Markdown page."""
    heading, *rows = rows_of(answers)
    n = sum(answer.is_answered for answer in answers)
    table = [_row(heading), "|---" * len(heading) + "|", *map(_row, rows)]
    parts = [
        "# Methods",
        *map(escape_markdown, paragraphs),
        "# Checklist",
        f"{n} of {len(answers)} items are answered from stored files; where the answer is "
        f"*author*, no file holds it. {SOURCE}",
        "\n".join(table),
    ]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Escape what Markdown would read as markup.

    >>> escape_markdown("a|b <script> lung_nodule")
    'a\\\\|b \\\\<script\\\\> lung_nodule'
    """
    return MARKUP.sub(r"\\\g<0>", text)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"
