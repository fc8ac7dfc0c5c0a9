"""`volseg methods`: what a paper says of a model, of results and of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from volseg.columns import columns_of
from volseg.commands.fact_files import (
    MODEL,
    add_model,
    check_evaluation,
    read_documents,
)
from volseg.errors import VolsegError
from volseg.io.csv_text import write_csv
from volseg.io.files import atomic_write, make_folder, write_bytes_atomic
from volseg.manuscript.claim import Answer, answer_items
from volseg.manuscript.facts import Document, Sentence, state
from volseg.manuscript.of_models import sentences_of_model
from volseg.manuscript.of_results import SUBJECT, sentences_of_evaluation, sentences_of_run
from volseg.manuscript.text import markdown, paragraphs_of, rows_of
from volseg.measurement.rows import LesionMeasurement
from volseg.options import MethodsOptions, command
from volseg.reports import MethodsReport

SUFFIXES = (".md", ".csv")


@command(MethodsOptions)
def methods(options: MethodsOptions) -> MethodsReport:
    """Write what a methods section says of a model, of results and of an evaluation.

    Every number comes from a file in the folders, and the report names its key.

    Raises:
        VolsegError: a folder holds none of these, is damaged or does not belong to the others, or
            `out` exists or is neither .md nor .csv.

    Example:
        >>> import volseg
        >>> scan, mask = (f"sample_data/{kind}/phantom_15.nii.gz" for kind in ("images", "labels"))
        >>> measured = volseg.measure(image=scan, mask=mask, out="measured", pages=False)
        >>> print(volseg.methods("measured", out="methods.md").paragraphs[0])
        Lesions in existing masks were measured with volseg 0.1.0.
    """
    _check_out(options.out)
    documents = read_documents(options.folders)
    hint = "" if MODEL in documents else add_model(documents)
    check_evaluation(documents)
    documents["columns"] = Document("volseg columns", {"lesions.csv": _sources()})
    statements = list(dict.fromkeys(state(documents, _sentences(documents))))
    paragraphs, answers = paragraphs_of(statements), answer_items(statements)
    if options.out is not None:
        _write(options.out, paragraphs, answers)
    return MethodsReport(
        out=options.out or options.folders[0],
        done=list(map(str, options.folders)),
        paragraphs=paragraphs,
        sentences=statements,
        answers=answers,
        is_written=options.out is not None,
        hint=hint,
    )


def _sentences(documents: Mapping[str, Document]) -> Iterator[Sentence]:
    """Yield the sentences on all documents, in the order of the text."""
    yield from SUBJECT
    yield from sentences_of_model(documents)
    yield from sentences_of_run(documents)
    yield from sentences_of_evaluation(documents)


# ---- the file


def _check_out(out: Path | None) -> None:
    """Check that the file can be written, before anything is read."""
    if out is None:
        return
    if out.suffix.lower() not in SUFFIXES:
        raise VolsegError(
            f"--out {out}: ends neither in .md nor in .csv",
            fix="end it in .md for the text and the checklist, in .csv for the checklist alone",
            code="E_USAGE",
        )
    if out.exists():
        raise VolsegError(
            f"{out}: exists and may have been edited", fix="give another --out", code="E_EXISTS"
        )


def _write(out: Path, paragraphs: Sequence[str], answers: Sequence[Answer]) -> None:
    make_folder(out.parent)
    if out.suffix.lower() == ".csv":
        atomic_write(out, partial(write_csv, rows=rows_of(answers)))
    else:
        write_bytes_atomic(out, markdown(paragraphs, answers).encode())


def _sources() -> dict[str, Any]:
    """Return column of lesions.csv → where its definition comes from."""
    return {name: {"source": source} for name, _, _, source in columns_of(LesionMeasurement)}
