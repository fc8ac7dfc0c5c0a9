"""What the cells of a column to learn are: classes, several labels each, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from volseg.recipe.classification import CLASSES, LABELS, NUMBER, SEPARATOR, Kind

MOST_VALUES = 20  # different whole numbers in a column that count as classes
# Texts by which tables say that a value is unknown. None of them is a class.
MISSING = ("nan", "n/a", "#n/a", "<na>", "null")


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def is_missing(text: str) -> bool:
    return text.strip().casefold() in MISSING


def plain_name(text: str) -> str:
    """Return one spelling for the name of a class: 1.0 is 1, and case does not matter.

    >>> plain_name("1.0"), plain_name("Benign ")
    ('1', 'benign')
    """
    text = text.strip()
    if is_number(text) and float(text).is_integer():
        return str(int(float(text)))
    return text.casefold()


def kind_of(texts: Sequence[str]) -> Kind:
    """Return what a column holds, from its cells that are not blank.

    Whole numbers are classes if there are few and, on average, two cells of each. A column that is
    mostly of other numbers is one of numbers, and its texts are mistakes.

    >>> kind_of(["0", "1", "1"]), kind_of(["61", "58.5", "nan"]), kind_of(["disc", "disc|ring"])
    ('classes', 'number', 'labels')
    """
    numbers = [float(text) for text in texts if is_number(text)]
    n_values = len(set(numbers))
    few = n_values <= min(MOST_VALUES, max(2, len(numbers) // 2))
    if 2 * len(numbers) > len(texts) and not (few and all(map(float.is_integer, numbers))):
        return NUMBER
    return LABELS if any(SEPARATOR in text for text in texts) else CLASSES
