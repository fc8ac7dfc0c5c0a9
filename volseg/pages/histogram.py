"""Histograms as inline SVG in the page's colours, without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 24, 36
MAX_BINS = 24


def histogram_svg(
    values: Sequence[float], *, title: str, unit: str, log: bool = False
) -> Markup | None:
    """Return a histogram with the median as a dashed line; None without two distinct values.

    Args:
        values: non-finite values, and with `log` those ≤ 0, are left out.
        log: use a logarithmic axis.
    """
    valid = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    finite = np.array(valid, float)
    if finite.size < 2 or finite.min() == finite.max():
        return None
    scaled, median = np.log10(finite) if log else finite, float(np.median(finite))
    span = f"{finite.min():.4g} to {finite.max():.4g} {unit}"
    summary = escape(f"{title}: {finite.size} values from {span}, median {median:.4g}")
    heading = f"{finite.size} lesions, median {median:.3g} {unit}"
    scale = f"{unit}, log scale" if log else unit
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{summary}">',
        f"<title>{summary}</title>",
        f'<text x="{LEFT}" y="14">{escape(title)}</text>',
        _soft_text(heading, WIDTH - RIGHT, 14, "end"),
        *_chart(scaled, math.log10(median) if log else median, _log_ticks if log else _ticks),
        _soft_text(scale, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle"),
        "</svg>",
    ]
    return Markup("".join(parts))  # noqa: S704 all texts are escaped above


def _chart(
    values: np.ndarray, median: float, ticks_of: Callable[[float, float], list[tuple[float, str]]]
) -> Iterator[str]:
    """Yield the elements of the bars, both axes and the median."""
    n_bins = int(min(MAX_BINS, max(5, math.ceil(2 * values.size ** (1 / 3)))))
    counts, edges = np.histogram(values, bins=n_bins)
    low, high = edges[0], edges[-1]
    ticks = ticks_of(values.min(), values.max())
    inside = [(value, text) for value, text in ticks if low <= value <= high]
    if len(inside) < 2:  # extend the axis to round numbers outside the range
        inside, low, high = ticks, min(low, ticks[0][0]), max(high, ticks[-1][0])
    steps = [(n, text) for n, text in _ticks(0, int(counts.max())) if n == int(n)]
    top = max(counts.max(), steps[-1][0])

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - count / top * (HEIGHT - TOP - BOTTOM)

    for n, text in steps:
        yield f'<path class="grid" d="M{LEFT} {y(n):.1f}H{WIDTH - RIGHT}"/>'
        yield _soft_text(text, LEFT - 5, f"{y(n) + 4:.1f}", "end")
    for count, start, stop in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist()):
        if count:
            place = f'x="{x(start) + 0.5:.1f}" y="{y(count):.1f}"'
            width, height = max(x(stop) - x(start) - 1, 1), y(0) - y(count)
            yield f'<rect class="filled" {place} width="{width:.1f}" height="{height:.1f}"/>'
    yield f'<path class="axis" d="M{LEFT} {y(0):.1f}H{WIDTH - RIGHT}"/>'
    for value, text in inside:
        yield f'<path class="axis" d="M{x(value):.1f} {y(0):.1f}v4"/>'
        yield f'<text x="{x(value):.1f}" y="{y(0) + 16:.1f}" text-anchor="middle">{text}</text>'
    yield f'<path class="middle" d="M{x(median):.1f} {y(0):.1f}V{TOP}"/>'


def _soft_text(text: str, left: float, top: float | str, anchor: str) -> str:
    place = f'x="{left}" y="{top}" text-anchor="{anchor}"'
    return f'<text class="soft" {place}>{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return four to eight round numbers that span `low` to `high`, as (value, text)."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(n * step, f"{n * step:.6g}") for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return powers of ten, over short ranges also 2 and 5 times them, as (log₁₀, text)."""
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [
        (math.log10(factor) + power, f"{factor * 10.0**power:.6g}")
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in factors
    ]
    below = max((value for value, _ in ticks if value <= low), default=ticks[0][0])
    above = min((value for value, _ in ticks if value >= high), default=ticks[-1][0])
    return [(value, text) for value, text in ticks if below <= value <= above]
