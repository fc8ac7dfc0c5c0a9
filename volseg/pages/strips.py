"""Strip plots as inline SVG in the page's colours: a dot is a scan or a lesion and opens it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from volseg.pages.scales import Scale
from volseg.words import format_count

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400, 16, 16, 24, 36
ROW, RADIUS = 62, 3.2  # height of a group and radius of a dot, in units of the picture
MAX_GROUPS = 6
MANY = 100  # dots that cover each other: they are drawn more transparent
ALL = ""  # name of the only group, which needs none


@dataclass(frozen=True, slots=True)
class Dot:
    """A value of a strip plot. Args: name: what it is. href: page that it opens; empty: none."""

    value: float
    name: str
    href: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """A drawn strip plot, and its outliers from the largest."""

    svg: Markup
    outliers: Sequence[Dot]


def strip_of(
    groups: Mapping[str, Sequence[Dot]], *, title: str, unit: str, noun: str
) -> Strip | None:
    """Draw a row of dots per group on a common axis; None without two distinct values.

    A line marks the median of each group, a band its quartiles. The axis is logarithmic if the
    values are spread widely. Outliers are ringed.

    Args:
        groups: name → dots; non-finite values are left out. More than six groups are joined.
        noun: what a dot is.
    """
    groups = _sorted_groups(groups)
    values = [dot.value for dots in groups.values() for dot in dots]
    if len(set(values)) < 2:
        return None
    scale, outliers = Scale.of(values), []
    height = TOP + ROW * len(groups) + BOTTOM
    median = f"median {np.median(values):.3g} {unit}".rstrip()
    span = f"{min(values):.4g} to {max(values):.4g} {unit}".rstrip()
    summary = escape(f"{title}: {len(values)} values from {span}, {median}")
    parts = [
        f'<svg class="strip" viewBox="0 0 {WIDTH} {height}" role="group" tabindex="0" '
        f'aria-label="{summary}; arrow keys move from dot to dot">',
        f'<text x="{LEFT}" y="14">{escape(title)}</text>',
        _soft(f"{format_count(len(values), noun)}, {median}", WIDTH - RIGHT, 14, "end"),
        *_axis(scale, unit, height),
    ]
    for row, (name, dots) in enumerate(groups.items()):
        is_outlier = scale.outliers([dot.value for dot in dots])
        outliers += [dot for dot, is_out in zip(dots, is_outlier) if is_out]
        parts += _row(scale, dots, is_outlier, TOP + ROW * row, name if len(groups) > 1 else ALL)
    parts.append("</svg>")
    outliers.sort(key=lambda dot: -dot.value)
    return Strip(Markup("".join(parts)), outliers)  # noqa: S704 all texts are escaped


def _sorted_groups(groups: Mapping[str, Sequence[Dot]]) -> dict[str, list[Dot]]:
    """Return the groups with ascending finite values; one group of all if there are too many."""
    finite = {
        name: [dot for dot in dots if math.isfinite(dot.value)] for name, dots in groups.items()
    }
    finite = {name: dots for name, dots in finite.items() if dots}
    if len(finite) > MAX_GROUPS:
        finite = {ALL: [dot for dots in finite.values() for dot in dots]}
    return {name: sorted(dots, key=lambda dot: dot.value) for name, dots in finite.items()}


def _row(
    scale: Scale, dots: Sequence[Dot], is_outlier: Sequence[bool], top: float, name: str
) -> Iterator[str]:
    """Yield quartiles, median and dots of a group, whose row begins at `top`."""
    values = [scale.scaled(dot.value) for dot in dots]
    lower, median, upper = (
        _x((part - scale.low) / (scale.high - scale.low))
        for part in np.percentile(values, (25, 50, 75)).tolist()
    )
    place = f'x="{lower:.1f}" y="{top + 12}" width="{max(upper - lower, 1):.1f}"'
    yield f'<rect class="quartiles" {place} height="{ROW - 16}"/>'
    if name:
        yield _soft(name, LEFT, top + 9, "start")
    for n, (dot, is_out) in enumerate(zip(dots, is_outlier)):
        x, y = _x(scale.fraction(dot.value)), top + 16 + (ROW - 24) * _spread(n)
        kind = "dot outlier" if is_out else "dot many" if len(dots) > MANY else "dot"
        circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
        link = f'href="{escape(dot.href)}" ' if dot.href else ""
        yield f'<a {link}tabindex="-1" aria-label="{escape(dot.name)}">{circle}</a>'
    yield f'<path class="middle" d="M{median:.1f} {top + 8}v{ROW - 8}"/>'  # over the dots


def _spread(n: int) -> float:
    """Return the n-th number of the van der Corput sequence: neighbours lie far apart in 0 to 1."""
    value, part = 0.0, 0.5
    n += 1
    while n:
        value, n, part = value + part * (n % 2), n // 2, part / 2
    return value


def _axis(scale: Scale, unit: str, height: float) -> Iterator[str]:
    base = height - BOTTOM
    yield f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>'
    for value, text in scale.ticks:
        x = _x((value - scale.low) / (scale.high - scale.low))
        yield f'<path class="grid" d="M{x:.1f} {TOP + 4}V{base}"/>'
        yield f'<path class="axis" d="M{x:.1f} {base}v4"/>'
        yield f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{text}</text>'
    yield _soft(scale.unit_text(unit), WIDTH / 2, height - 4, "middle")


def _x(fraction: float) -> float:
    return LEFT + 6 + fraction * (WIDTH - LEFT - RIGHT - 12)


def _soft(text: str, left: float, top: float, anchor: str) -> str:
    place = f'x="{left:g}" y="{top:g}" text-anchor="{anchor}"'
    return f'<text class="soft" {place}>{escape(text)}</text>'
