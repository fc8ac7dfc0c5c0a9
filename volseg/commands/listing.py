"""`volseg cases`: which files belong together, as a table to look at and edit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from volseg.errors import VolsegError
from volseg.io.cases import (
    NO_SCANS,
    ONE_CHANNEL,
    ONLY_IMAGES,
    Case,
    Survey,
    dataset_error,
    is_image_column,
)
from volseg.io.csv_text import write_csv
from volseg.io.files import atomic_write, make_folder
from volseg.io.image_cases import looks_like_images
from volseg.io.layouts import survey_cases
from volseg.options import CasesOptions, command
from volseg.reports import ListingReport


@command(CasesOptions)
def cases(options: CasesOptions) -> ListingReport:
    """Write which files below folders belong together, with the reason for each case.

    The table is a dataset for every command. Cells may be corrected and lines deleted.

    Raises:
        VolsegError: there are no scans, or the table exists.

    Example:
        >>> import volseg
        >>> volseg.cases("sample_data", out="found/cases.csv").masks > 0
        True
    """
    out = options.out
    if out.exists():
        raise VolsegError(
            f"{out}: exists and may have been edited", fix="give another --out", code="E_EXISTS"
        )
    surveys = [survey_cases(folder) for folder in options.folders]
    rows = [row for survey in surveys for row in _rows(survey, out.parent)]
    mistakes = [mistake for survey in surveys for mistake in survey.mistakes]
    if not rows:
        raise _nothing_listed(options.folders, mistakes)
    columns = _columns(rows)
    make_folder(out.parent)
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    atomic_write(out, partial(write_csv, rows=lines))
    return ListingReport(
        out=out,
        done=[row["subject"] for row in rows],
        warnings=[*(f"W_UNUSED: {text}" for text in mistakes)],
        masks=sum("label" in row for row in rows),
        channels=[name.removeprefix("image_") for name in filter(is_image_column, columns)],
    )


def _nothing_listed(folders: Sequence[Path], mistakes: Sequence[str]) -> VolsegError:
    images = next((folder for folder in folders if looks_like_images(folder)), None)
    if images is not None:  # a folder of them, or a table or a file
        return dataset_error([ONLY_IMAGES], str(images))
    return dataset_error(mistakes or [NO_SCANS], ", ".join(map(str, folders)))


def _rows(survey: Survey, folder: Path) -> Iterator[dict[str, str]]:
    for case in survey.cases:
        yield {
            "subject": case.id,
            **({"patient": case.patient} if case.patient else {}),
            **_files(case, folder),
            **({"split": case.split} if case.split else {}),
            **case.classes,
            "why": survey.why.get(case.id, ""),
        }


def _files(case: Case, folder: Path) -> Mapping[str, str]:
    """Return column → path of the scans and the mask, relative to the table's folder."""
    files = {
        "image" if name == ONE_CHANNEL else f"image_{name}": path
        for name, path in case.images.items()
    }
    files |= {} if case.reference is None else {"label": case.reference}
    return {
        column: Path(os.path.relpath(path, folder)).as_posix() for column, path in files.items()
    }


def _columns(rows: list[dict[str, str]]) -> list[str]:
    """Return all columns of the rows, with those of files in the middle and `why` at the end."""
    names = dict.fromkeys(name for row in rows for name in row)
    first = [name for name in ("subject", "patient") if name in names]
    images = list(filter(is_image_column, names))
    others = [name for name in names if name not in (*first, *images, "label", "split", "why")]
    last = [name for name in ("label", "split") if name in names]
    return [*first, *images, *last, *others, "why"]
