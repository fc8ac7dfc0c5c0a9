"""Spaghetti plots as inline SVG: a line per lesion or patient from baseline to follow-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    is_log = Scale.of(positive).is_log
    scale = Scale.of(positive if is_log else values, from_zero=True)
    floor = HEIGHT - BOTTOM - (14 if is_log and len(positive) < len(values) else 0)

    def y(value: float) -> float:
        if is_log and value <= 0:
            return HEIGHT - BOTTOM
        return floor - scale.fraction(value) * (floor - TOP)

    summary = escape(f"{title} of {format_count(len(lines), noun)} at baseline and follow-up")
    parts = [
        f'<svg class="strip" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" tabindex="0" '
        f'aria-label="{summary}; arrow keys move from line to line">',
        f'<text x="{LEFT}" y="14">{escape(title)}</text>',
        _soft(scale.unit_text(unit), WIDTH - RIGHT, 14, "end"),
    ]
    ticks = [(floor - (at - scale.low) / (scale.high - scale.low) * (floor - TOP), text)
             for at, text in scale.ticks]  # fmt: skip
    ticks += [(HEIGHT - BOTTOM, "0")] if is_log and len(positive) < len(values) else []
    for place, text in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_soft(text, LEFT - 6, place + 4, "end"))
    for place, text in zip((LEFT, WIDTH - RIGHT), TIMES):
        parts.append(f'<path class="axis" d="M{place} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_soft(text, place, HEIGHT - 8, "middle"))
    for line in sorted(lines, key=lambda line: line.before):
        before, after = y(line.before), y(line.after)
        path = f'<path class="line" d="M{LEFT} {before:.1f}L{WIDTH - RIGHT} {after:.1f}"/>'
        ends = zip((LEFT, WIDTH - RIGHT), (before, after))
        dots = "".join(
            f'<circle class="dot" cx="{x}" cy="{place:.1f}" r="{RADIUS}"/>' for x, place in ends
        )
        link = f'href="{escape(line.href)}" ' if line.href else ""
        parts.append(f'<a {link}tabindex="-1" aria-label="{escape(line.name)}">{path}{dots}</a>')
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704 all texts are escaped


def _soft(text: str, left: float, top: float, anchor: str) -> str:
    place = f'x="{left:g}" y="{top:.1f}" text-anchor="{anchor}"'
    return f'<text class="soft" {place}>{escape(text)}</text>'
