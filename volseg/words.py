"""Numbers as people read them."""

from __future__ import annotations

UNITS = ((86_400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
LARGEST = 1.5  # of a unit, under which the next smaller one is used


def spaced(number: int) -> str:
    """With a space between thousands.

    >>> spaced(328_562)
    '328 562'
    """
    return f"{number:,}".replace(",", " ")


def duration(seconds: float) -> str:
    """In the largest unit of which it is 1.5 or more, with two digits.

    >>> duration(2700), duration(22_000)
    ('45 min', '6.1 h')
    """
    for size, unit in UNITS:
        if seconds >= LARGEST * size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"
    return "a second"
