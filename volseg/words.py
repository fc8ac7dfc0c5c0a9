"""Numbers formatted for reading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

UNITS = ((86_400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
# what a row of lesions.csv is, by the setting `objects`
NOUNS = {"components": "lesion", "labels": "structure"}
MIN_VALUE = 1.5  # below it, the next smaller unit is used


def lower_first(sentence: str) -> str:
    """Return a sentence that begins with a small letter, to follow a colon.

    >>> lower_first("Input should be 'R' or 'A'")
    "input should be 'R' or 'A'"
    """
    return sentence[:1].lower() + sentence[1:]


def format_thousands(number: int) -> str:
    """Format a number with a space between thousands.

    >>> format_thousands(328_562)
    '328 562'
    """
    return f"{number:,}".replace(",", " ")


def format_count(number: int | None, noun: str) -> str:
    """Format a number of things; return "" if it is unknown.

    >>> format_count(1, "scan"), format_count(2, "scan")
    ('1 scan', '2 scans')
    """
    return "" if number is None else f"{number} {noun}{'s' * (number != 1)}"


def lesion_noun(connectivities: Iterable[float | None]) -> str:
    """Return what the rows of a table of lesions are, from their column `connectivity`.

    >>> lesion_noun([26, 26]), lesion_noun([None]), lesion_noun([])
    ('lesion', 'structure', 'lesion')
    """
    unknown = [number is None or number != number for number in connectivities]
    return NOUNS["labels" if unknown and all(unknown) else "components"]


def format_list(names: Sequence[str], most: int, noun: str = "") -> str:
    """Join the first names, and state how many more of them there are.

    >>> format_list(["a", "b", "c"], 2), format_list(["a", "b", "c", "d"], 2, "scan")
    ('a, b and 1 more', 'a, b and 2 more scans')
    """
    listed, n_more = ", ".join(names[:most]), len(names) - most
    if n_more <= 0:
        return listed
    return f"{listed} and {format_count(n_more, f'more {noun}') if noun else f'{n_more} more'}"


def format_numbered(texts: Sequence[str], most: int) -> str:
    """Join the first sentences with their numbers, and state how many more there are.

    >>> format_numbered(["a.nii is empty"], 2)
    'a.nii is empty'
    >>> format_numbered(["a.nii is empty", "b.nii is empty", "c.nii is empty"], 2)
    '(1) a.nii is empty; (2) b.nii is empty; and 1 more'
    """
    if len(texts) == 1:
        return texts[0]
    listed = "; ".join(f"({number}) {text}" for number, text in enumerate(texts[:most], start=1))
    return f"{listed}; and {len(texts) - most} more" if len(texts) > most else listed


def format_sizes(sizes: Iterable[float]) -> str:
    """Format the sizes along several axes.

    >>> format_sizes((0.5, 1.0, 128))
    '0.5 × 1 × 128'
    """
    return " × ".join(str(size) if isinstance(size, int) else f"{size:g}" for size in sizes)


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a value with four digits, or as whole number; a dash means unknown."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Format a duration with two digits, in the largest unit of which it is at least 1.5.

    >>> duration(2700), duration(22_000)
    ('45 min', '6.1 h')
    """
    for size, unit in UNITS:
        if seconds >= MIN_VALUE * size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"
    return "a second"


def format_ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges; `parse_ranges` is its inverse.

    >>> format_ranges([0, 1, 2, 5])
    '0-2;5'
    """
    pairs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in pairs]
    return ";".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def parse_ranges(text: str, *, below: int) -> list[int]:
    """Return the numbers that `format_ranges` wrote.

    Args:
        below: none may reach it.

    Raises:
        ValueError: the text is not of that form, or a number is too large.

    >>> parse_ranges("0-2;5", below=6)
    [0, 1, 2, 5]
    """
    numbers: list[int] = []
    for part in text.split(";") if text else ():
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first) + 1
        if not 0 <= start < stop <= below:
            raise ValueError(f"{part!r} is not a range of numbers below {below}")
        numbers += range(start, stop)
    return numbers
