"""Spaghetti plots as inline SVG: a line per lesion or patient from baseline to follow-up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from volseg.pages.scales import Scale
from volseg.words import format_count

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 230, 62, 40, 28, 26
TIMES = ("baseline", "follow-up")
RADIUS = 3.2


@dataclass(frozen=True, slots=True)
class Line:
    """Two values of a lesion or patient. Args: name: what it is. href: page that it opens."""

    before: float
    after: float
    name: str
    href: str = ""


def spaghetti_svg(lines: Sequence[Line], *, title: str, unit: str, noun: str) -> Markup | None:
    """Draw a line per item; None without two distinct values.

    The axis is logarithmic if the values are spread widely; a 0, of what is new or gone, is then
    drawn below it.

    Args:
        noun: what a line is.
    """
    lines = [line for line in lines if math.isfinite(line.before) and math.isfinite(line.after)]
    values = [value for line in lines for value in (line.before, line.after)]
    positive = [value for value in values if value > 0]
    if len(set(values)) < 2 or not positive:
        return None
    axis = _Axis.of(values, positive)
    summary = escape(f"{title} of {format_count(len(lines), noun)} at baseline and follow-up")
    parts = [
        f'<svg class="strip" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" tabindex="0" '
        f'aria-label="{summary}; arrow keys move from line to line">',
        f'<text x="{LEFT}" y="14">{escape(title)}</text>',
        _soft(axis.scale.unit_text(unit), WIDTH - RIGHT, 14, "end"),
        *axis.grid(),
        *(_line(line, axis) for line in sorted(lines, key=lambda line: line.before)),
        "</svg>",
    ]
    return Markup("".join(parts))  # noqa: S704 all texts are escaped


@dataclass(frozen=True, slots=True)
class _Axis:
    """The common axis of both times; on a logarithmic one 0 lies below the other values."""

    scale: Scale
    has_zero_below: bool

    @classmethod
    def of(cls, values: Sequence[float], positive: Sequence[float]) -> _Axis:
        is_log = Scale.of(positive).is_log
        scale = Scale.of(positive if is_log else values, from_zero=True)
        return cls(scale, is_log and len(positive) < len(values))

    def at(self, fraction: float) -> float:
        """Return the height of a fraction of the axis."""
        floor = HEIGHT - BOTTOM - (14 if self.has_zero_below else 0)
        return floor - fraction * (floor - TOP)

    def y(self, value: float) -> float:
        if self.scale.is_log and value <= 0:
            return HEIGHT - BOTTOM
        return self.at(self.scale.fraction(value))

    def grid(self) -> Iterator[str]:
        """Yield the lines of round numbers, both axes and their names."""
        low, high = self.scale.low, self.scale.high
        ticks = [(self.at((place - low) / (high - low)), text) for place, text in self.scale.ticks]
        for place, text in [*ticks, *([(HEIGHT - BOTTOM, "0")] if self.has_zero_below else [])]:
            yield f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
            yield _soft(text, LEFT - 6, place + 4, "end")
        for place, text in zip((LEFT, WIDTH - RIGHT), TIMES):
            yield f'<path class="axis" d="M{place} {TOP}V{HEIGHT - BOTTOM}"/>'
            yield _soft(text, place, HEIGHT - 8, "middle")


def _line(line: Line, axis: _Axis) -> str:
    before, after = axis.y(line.before), axis.y(line.after)
    path = f'<path class="line" d="M{LEFT} {before:.1f}L{WIDTH - RIGHT} {after:.1f}"/>'
    dots = "".join(
        f'<circle class="dot" cx="{x}" cy="{y:.1f}" r="{RADIUS}"/>'
        for x, y in ((LEFT, before), (WIDTH - RIGHT, after))
    )
    link = f'href="{escape(line.href)}" ' if line.href else ""
    return f'<a {link}tabindex="-1" aria-label="{escape(line.name)}">{path}{dots}</a>'


def _soft(text: str, left: float, top: float, anchor: str) -> str:
    place = f'x="{left:g}" y="{top:.1f}" text-anchor="{anchor}"'
    return f'<text class="soft" {place}>{escape(text)}</text>'
