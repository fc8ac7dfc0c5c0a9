"""The page report.html of classified images: counts, doubtful images first, and their pictures."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from PIL import Image

from volseg.columns import columns_of
from volseg.evaluation.class_rows import PROBABILITY, ClassRow, ValueRow
from volseg.pages.about import About
from volseg.pages.page import CONTENT_BYTES, as_base64, json_size, json_value
from volseg.pages.page_tables import PageTable
from volseg.pages.run_page import Plot, RunPage, count_fact, failures
from volseg.pages.scales import OUTLIER_RULE
from volseg.pages.strips import ALL, Dot, strip_of
from volseg.words import format_count, format_list

PICTURE_HEIGHT = 72  # pixels
MOST_WIDTHS = 4  # a picture is at most this many times as wide as high
MOST_PICTURES = 400  # of the most doubtful images
PICTURE = "picture"  # column that the page's script fills
MAX_CLASSES = 5  # named in the sentence

Row = ClassRow | ValueRow


def class_page(
    about: About,
    rows: Sequence[Row],
    *,
    target: str,
    coverage: float | None,
    pictures: Mapping[str, bytes],
    remarks: Sequence[str] = (),
) -> RunPage:
    """Return the page of a run of a classifier, or of a model that predicts numbers.

    Args:
        target: what is predicted.
        coverage: of confidence sets and intervals; None if there are none.
        pictures: case id → JPEG of the image, as high as the page shows it.
    """
    rows = sorted(rows, key=_doubt, reverse=True)
    failed = failures(rows, "case_id", "error")
    done = [row for row in rows if row.status == "done"]
    plots = list(_plots(done, target))
    shown = {name: as_base64(data) for name, data in pictures.items()}
    left = CONTENT_BYTES - json_size(shown) - json_size(failed)
    return RunPage(
        title=f"volseg infer: {format_count(len(rows), 'image')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(rows),
        noun="images",
        files="values.csv" if _has_values(rows) else "classes.csv",
        sentence=_sentence(rows, done, target, coverage),
        remarks=list(remarks),
        facts=_facts(rows, done, target),
        plots=plots,
        plot_note=f"A dot is an image. {OUTLIER_RULE}." if plots else "",
        tables=[_table(rows, max_bytes=left)],
        pictures=shown,
        picture_height=PICTURE_HEIGHT,
    )


def thumbnail(image: np.ndarray, height: int = PICTURE_HEIGHT) -> bytes:
    """Return a JPEG of one image (C, H, W), from its darkest to its brightest intensity.

    It is `height` pixels high. A wider image than the page has room for lies on black.
    """
    array = image[:3] if len(image) >= 3 else image[:1]
    low, high = float(array.min()), float(array.max())
    grey = ((array - low) / (high - low if high > low else 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(grey[0] if len(grey) == 1 else np.moveaxis(grey, 0, -1))
    most = (MOST_WIDTHS * height, height)
    scale = min(room / pixels for room, pixels in zip(most, picture.size, strict=True))
    picture = picture.resize([max(1, round(pixels * scale)) for pixels in picture.size])
    canvas = Image.new(picture.mode, (picture.width, height))
    canvas.paste(picture, (0, (height - picture.height) // 2))
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=80)
    return file.getvalue()


def most_doubtful(rows: Sequence[Row], most: int = MOST_PICTURES) -> list[str]:
    """Return the ids of the images of which the model is least sure."""
    done = [row for row in rows if row.status == "done"]
    return [row.case_id for row in sorted(done, key=_doubt, reverse=True)[:most]]


def _doubt(row: Row) -> float:
    """Return a number that is larger the less sure the model is; failures come first.

    Unusual images lead; then classes go by the entropy of their probabilities.
    """
    if row.status != "done":
        return math.inf
    doubt = 10.0 if row.out_of_distribution else 0.0
    if isinstance(row, ClassRow):
        doubt += sum(-p * math.log(p) for p in (row.probabilities or {}).values() if 0 < p < 1)
    return doubt


def _has_values(rows: Sequence[Row]) -> bool:
    return bool(rows) and isinstance(rows[0], ValueRow)


def _sentence(rows: Sequence[Row], done: Sequence[Row], target: str, coverage: float | None) -> str:
    """Say in one sentence what was predicted, and how sure that is."""
    n = format_count(len(done), "image")
    of_all = f"{len(done)} of {format_count(len(rows), 'image')}" if len(done) < len(rows) else n
    n_unusual = sum(bool(row.out_of_distribution) for row in done)
    unusual = f"; {format_count(n_unusual, 'image')} unlike those of training" if n_unusual else ""
    if _has_values(rows):
        return f"volseg predicted {target} of {of_all}{_span(done, coverage)}{unusual}."
    return f"volseg classified {of_all} by {target}: {_named(done, coverage)}{unusual}."


def _span(done: Sequence[Row], coverage: float | None) -> str:
    """Say between which numbers the predictions lie."""
    values = [row.value for row in done if isinstance(row, ValueRow) and row.value is not None]
    span = f", from {min(values):.4g} to {max(values):.4g}" if values else ""
    if coverage is None:
        return span
    return f"{span}, each with an interval of {coverage:.0%} coverage on validation images"


def _named(done: Sequence[Row], coverage: float | None) -> str:
    """Say how many images are of each class, and how many might be of several."""
    named = format_list([f"{n} {name}" for name, n in _counts(done).items()], MAX_CLASSES)
    if coverage is None:
        return named or "none"
    rows = [row for row in done if isinstance(row, ClassRow)]
    states_sets = any(row.confidence_set for row in rows)
    # Of one class of several the set holds the predicted one; of labels it may differ either way.
    is_open = [(row.confidence_set or "") != (row.class_name or "") for row in rows]
    n_open = sum(is_open) if states_sets else 0
    sure = f"; of {n_open} it is not sure at {coverage:.0%} coverage" if n_open else ""
    return f"{named or 'none'}{sure}"


def _counts(done: Sequence[Row]) -> dict[str, int]:
    names = [row.class_name or "none" for row in done if isinstance(row, ClassRow)]
    return dict(Counter(names).most_common())


def _facts(rows: Sequence[Row], done: Sequence[Row], target: str) -> list[tuple[str, str]]:
    facts = [count_fact(len(rows), "image")]
    facts += [(name, str(n)) for name, n in list(_counts(done).items())[:MAX_CLASSES]]
    n_unusual = sum(bool(row.out_of_distribution) for row in done)
    return [*facts, ("unlike training images", str(n_unusual)), ("target", target)]


def _plots(done: Sequence[Row], target: str) -> Iterator[Plot]:
    """Yield a strip plot of the numbers, or of the probability of each predicted class."""
    if _has_values(done):
        dots = [
            Dot(row.value, f"{row.case_id}: {row.value:.4g}")
            for row in done
            if isinstance(row, ValueRow) and row.value is not None
        ]
        strip = strip_of({ALL: dots}, title=target, unit="", noun="image")
    else:
        groups: dict[str, list[Dot]] = {}
        for row in done:
            if isinstance(row, ClassRow) and row.class_probability is not None:
                text = f"{row.case_id}: {row.class_name} {row.class_probability:.3f}"
                groups.setdefault(row.class_name or "", []).append(Dot(row.class_probability, text))
        title = "Probability of the predicted class"
        strip = strip_of(groups, title=title, unit="", noun="image")
    if strip is not None:
        yield Plot.of(strip)


def _table(rows: Sequence[Row], *, max_bytes: int) -> PageTable:
    """Return the table of all images with their pictures, or as many of them as fit."""
    columns = _columns(rows)
    cells = [[*_cells(row, columns)] for row in rows]
    remark, n = "", len(cells)
    while True:
        content = {
            "name": "scans",
            "caption": "Images, the most doubtful first",
            "hint": "type words, or a condition such as class_probability < 0.8",
            "columns": columns,
            "rows": cells[:n],
        }
        if json_size(content) <= max_bytes or not n:
            return PageTable(
                name="scans",
                caption="Images, the most doubtful first",
                content=content,
                remark=remark,
            )
        n = n * 9 // 10
        remark = f"Showing the {n} most doubtful of {len(cells)} images; the CSV has them all."


def _columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    row_type = type(rows[0]) if rows else ClassRow
    described = {name: (unit, meaning) for name, unit, meaning, _ in columns_of(row_type)}
    names = [item.name for item in fields(row_type) if item.name != "probabilities"]
    columns = [_column("case_id", *described["case_id"])]
    columns.append(_column(PICTURE, "", "the image, darkest to brightest"))
    columns += [_column(name, *described[name]) for name in names if name != "case_id"]
    columns += [
        _column(PROBABILITY + name, "", "probability of that class") for name in _classes(rows)
    ]
    hidden = {name for name in names if all(getattr(row, name) is None for row in rows)}
    for column in columns:
        column["shown"] = column["name"] not in hidden | {"model", "error", "status"}
    return columns


def _classes(rows: Sequence[Row]) -> list[str]:
    """Return the names of the classes that have probabilities, in their order."""
    stated = (row.probabilities or {} for row in rows if isinstance(row, ClassRow))
    return list(dict.fromkeys(name for probabilities in stated for name in probabilities))


def _column(name: str, unit: str, meaning: str) -> dict[str, Any]:
    return {"name": name, "unit": unit, "meaning": meaning, "shown": True}


def _cells(row: Row, columns: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    probabilities = (row.probabilities or {}) if isinstance(row, ClassRow) else {}
    for column in columns:
        name = column["name"]
        if name == PICTURE:
            yield ""
        elif name.startswith(PROBABILITY):
            yield json_value(probabilities.get(name.removeprefix(PROBABILITY)))
        else:
            yield json_value(getattr(row, name))
