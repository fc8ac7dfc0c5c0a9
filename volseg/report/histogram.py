"""Distributions as inline SVG: text and shapes in a page's own colours, without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 24, 36
MAX_BINS = 24


def histogram_svg(
    values: Sequence[float], *, title: str, unit: str, log: bool = False
) -> Markup | None:
    """How often values occur, with their median as a dashed line; None where there are too few to say anything.

    Args:
        values: unknown ones (NaN, infinite; with `log` those not above 0) are left out.
        log: a logarithmic axis.
    """
    known = np.array(
        [value for value in values if math.isfinite(value) and (value > 0 or not log)], float
    )
    if known.size < 2 or known.min() == known.max():
        return None
    seen = np.log10(known) if log else known
    n_bins = int(min(MAX_BINS, max(5, math.ceil(2 * known.size ** (1 / 3)))))
    counts, edges = np.histogram(seen, bins=n_bins)
    ticks = _log_ticks(seen.min(), seen.max()) if log else _ticks(seen.min(), seen.max())
    low, high = edges[0], edges[-1]
    inside = [(at, text) for at, text in ticks if low <= at <= high]
    if len(inside) < 2:  # the axis goes out to round numbers where none would be on it
        inside, low, high = ticks, min(low, ticks[0][0]), max(high, ticks[-1][0])
    steps = [(at, text) for at, text in _ticks(0, int(counts.max())) if at == int(at)]
    top = max(counts.max(), steps[-1][0])

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - count / top * (HEIGHT - TOP - BOTTOM)

    median = float(np.median(known))
    summary = f"{title}: {known.size} values from {known.min():.4g} to {known.max():.4g} {unit}, median {median:.4g}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">',
        f"<title>{escape(summary)}</title>",
        f'<text x="{LEFT}" y="14">{escape(title)}</text>',
        f'<text class="soft" x="{WIDTH - RIGHT}" y="14" text-anchor="end">{known.size} lesions, median {median:.3g} {escape(unit)}</text>',
    ]
    for at, text in steps:
        parts.append(f'<path class="grid" d="M{LEFT} {y(at):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="soft" x="{LEFT - 5}" y="{y(at) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for count, start, stop in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist()):
        if count:
            shape = f'x="{x(start) + 0.5:.1f}" y="{y(count):.1f}" width="{max(x(stop) - x(start) - 1, 1):.1f}"'
            parts.append(f'<rect class="filled" {shape} height="{y(0) - y(count):.1f}"/>')
    parts.append(f'<path class="axis" d="M{LEFT} {y(0):.1f}H{WIDTH - RIGHT}"/>')
    for at, text in inside:
        parts.append(f'<path class="axis" d="M{x(at):.1f} {y(0):.1f}v4"/>')
        parts.append(
            f'<text x="{x(at):.1f}" y="{y(0) + 16:.1f}" text-anchor="middle">{text}</text>'
        )
    at = x(math.log10(median) if log else median)
    parts.append(f'<path class="middle" d="M{at:.1f} {y(0):.1f}V{TOP}"/>')
    scale = f"{unit}, logarithmic" if log else unit
    parts.append(
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(scale)}</text>'
    )
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 every text in it was escaped above


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to eight round numbers from at most `low` to at least `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(n * step, f"{n * step:.6g}") for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, or also their twofold and fivefold within a decade or two, as (log₁₀, text)."""
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    found = [
        (math.log10(factor) + power, f"{factor * 10.0**power:.6g}")
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in factors
    ]
    below = max((at for at, _ in found if at <= low), default=found[0][0])
    above = min((at for at, _ in found if at >= high), default=found[-1][0])
    return [(at, text) for at, text in found if below <= at <= above]
