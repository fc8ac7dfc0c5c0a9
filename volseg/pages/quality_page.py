"""The page quality.html: the facts, flags and middle slice of each scan of a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from volseg.pages.about import About
from volseg.pages.headline import warning_kinds
from volseg.pages.page import CONTENT_BYTES, json_size
from volseg.pages.page_tables import Layout, fitting_table, with_picture_column
from volseg.pages.quality_sheet import Tile
from volseg.pages.run_page import (
    MIN_PLOTTED,
    Plot,
    RunPage,
    count_fact,
    failures,
    fitting_pictures,
    unpictured_remark,
)
from volseg.pages.scales import OUTLIER_RULE
from volseg.pages.strips import Dot, strip_of
from volseg.quality.rows import QualityRow
from volseg.words import format_count, format_number

LAYOUT = Layout(
    name="scans",
    caption="Scans, those to look at first",
    row_type=QualityRow,
    hint="type words, such as W_CUT, or a condition such as snr < 5",
    file="quality.csv",
    shown=(
        *("case_id", "status", "flags", "modality", "size_r", "size_a", "size_s"),
        *("spacing_r_mm", "spacing_a_mm", "spacing_s_mm", "lowest", "median", "highest"),
        *("noise_sd", "snr", "slice_jump", "cut_sides", "same_as", "similar_to"),
    ),
    needed=("warnings", "reason"),
    rank=lambda row: not _is_odd(row),
)
SAME = 0.01  # relative spread of values that is not plotted
# column → title, unit
PLOTTED = {
    "snr": ("Signal-to-noise ratio", ""),
    "median": ("Median intensity", ""),
    "spacing_s_mm": ("Spacing along S", "mm"),
}


def quality_page(about: About, tiles: Sequence[Tile]) -> RunPage:
    """Return the page: scans that cannot be read, flags with their meaning, plots and a table.

    Args:
        tiles: the scans with their pictures, in their order.
    """
    # Pictures and links go by case; here a scan is one of a case and a channel.
    rows = [replace(tile.row, case_id=tile.row.name) for tile in tiles]
    rows.sort(key=lambda row: not _is_odd(row))
    montages = {tile.row.name: tile.picture for tile in tiles if tile.picture is not None}
    height, pictures, n_unpictured = fitting_pictures(montages)
    failed, plots = failures(rows, "case_id"), list(_plots(rows))
    left = CONTENT_BYTES - json_size(pictures) - json_size(failed)
    table = fitting_table(LAYOUT, rows, max_bytes=left - sum(len(p.svg.encode()) for p in plots))
    return RunPage(
        title=f"volseg check: {format_count(len(rows), 'scan')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(rows),
        files="quality.csv",
        sentence=_sentence(rows),
        warnings=warning_kinds(rows),
        remarks=unpictured_remark(n_unpictured),
        facts=_facts(rows),
        plots=plots,
        plot_note=f"A dot is a scan. {OUTLIER_RULE}." if plots else "",
        tables=[with_picture_column(table, "picture", "middle slice")],
        pictures=pictures,
        picture_height=height,
    )


def _is_odd(row: QualityRow) -> bool:
    return row.status == "failed" or bool(row.flags)


def _sentence(rows: Sequence[QualityRow]) -> str:
    n_odd = sum(map(_is_odd, rows))
    look = f"look at {n_odd} of them" if n_odd else "none of them has a flag"
    return f"volseg checked the quality of {format_count(len(rows), 'scan')}: {look}."


def _facts(rows: Sequence[QualityRow]) -> list[tuple[str, str]]:
    facts = [count_fact(len(rows), "scan")]
    facts.append(count_fact(sum(bool(row.flags) for row in rows), "scan", "with a flag"))
    facts.append(count_fact(sum(row.status == "failed" for row in rows), "scan", "unreadable"))
    return facts


def _plots(rows: Sequence[QualityRow]) -> Iterator[Plot]:
    """Yield a strip plot of each quantity, with a group per channel."""
    if len(rows) < MIN_PLOTTED:
        return
    for column, (title, unit) in PLOTTED.items():
        groups: dict[str, list[Dot]] = defaultdict(list)
        for row in rows:
            value = getattr(row, column)
            if value is not None:
                text = f"{row.case_id}: {format_number(value)} {unit}".rstrip()
                groups[row.channel].append(Dot(value, text))
        values = [dot.value for dots in groups.values() for dot in dots]
        if np.ptp(values or [0]) <= SAME * np.abs(values or [0]).max():
            continue  # rounding would fill the axis
        strip = strip_of(groups, title=title, unit=unit, noun="scan")
        if strip is not None:
            yield Plot.of(strip)
