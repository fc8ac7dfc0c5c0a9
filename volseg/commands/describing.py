"""`volseg methods`: what a paper says of a model, of results and of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from volseg.columns import columns_of
from volseg.errors import VolsegError
from volseg.inputs import MAX_TEXT_BYTES, parse_json, read_bytes
from volseg.io.csv_text import iterate_csv, write_csv
from volseg.io.files import atomic_write, make_folder, write_bytes_atomic
from volseg.manuscript.claim import Answer, answer_items
from volseg.manuscript.facts import Document, Sentence, state
from volseg.manuscript.of_models import sentences_of_model
from volseg.manuscript.of_results import SUBJECT, sentences_of_evaluation, sentences_of_run
from volseg.manuscript.text import markdown, paragraphs_of, rows_of
from volseg.measurement.rows import LesionMeasurement
from volseg.options import MethodsOptions, command
from volseg.recipe.load import parse_any_recipe
from volseg.reports import MethodsReport

MODEL, RUN, EVALUATION = "model", "run", "evaluation"
FILES = {MODEL: "model.json", RUN: "run.json", EVALUATION: "summary.json"}  # the first decides
KINDS = {MODEL: "a model", RUN: "results", EVALUATION: "an evaluation"}
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
    documents = _documents(options.folders)
    hint = "" if MODEL in documents else _add_model(documents)
    _check_evaluation(documents)
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


# ---- the folders


def _documents(folders: Sequence[Path]) -> dict[str, Document]:
    """Read the folders; `model`, `run` and `evaluation` → the file that describes each."""
    documents, places = dict[str, Document](), dict[str, Path]()
    for folder in folders:
        kind = next((kind for kind, name in FILES.items() if (folder / name).is_file()), None)
        if kind is None:
            raise _foreign(folder)
        if kind in places:
            raise VolsegError(
                f"{places[kind]} and {folder}: both hold {KINDS[kind]}",
                fix="give one model, one results folder and one evaluation at most",
                code="E_USAGE",
            )
        places[kind] = folder
        documents |= READERS[kind](folder)
    return documents


def _foreign(folder: Path) -> VolsegError:
    return VolsegError(
        f"{folder}: holds no model, no results and no evaluation",
        fix="give a folder of `volseg train`, `infer`, `measure` or `evaluate`",
        code="E_USAGE",
    )


def _read_model(folder: Path) -> dict[str, Document]:
    """Return model.json, its hash, and history.csv if there is one.

    Raises:
        VolsegError: it is damaged.
    """
    content, digest = _read(folder, MODEL)
    recipe = content.get("recipe")
    if not isinstance(recipe, dict):
        raise _damaged(folder / FILES[MODEL], "it has no recipe")
    try:
        parse_any_recipe(recipe, where="recipe")
    except VolsegError as error:
        from volseg.bundle import read_description  # torch takes seconds to import

        read_description(folder)  # raises if another version of volseg wrote it
        raise _damaged(folder / FILES[MODEL], error.problem) from error
    documents = {
        MODEL: Document(FILES[MODEL], content),
        "files": Document("SHA-256 of files", {FILES[MODEL]: digest}),
    }
    epochs = _epochs(folder / "history.csv")
    if epochs:
        documents["history"] = Document("history.csv", {"epoch": epochs})
    return documents


def _epochs(history: Path) -> list[str]:
    try:
        return [row["epoch"] for row in iterate_csv(history)]
    except (OSError, ValueError, KeyError):
        return []  # an imported model has none


def _read_run(folder: Path) -> dict[str, Document]:
    """Return run.json of results.

    Raises:
        VolsegError: it is damaged, or of a command without results.
    """
    content, _ = _read(folder, RUN)
    if content.get("command") not in ("infer", "measure"):
        raise _foreign(folder)
    return {RUN: Document(FILES[RUN], content)}


def _read_evaluation(folder: Path) -> dict[str, Document]:
    """Return summary.json of an evaluation.

    Raises:
        VolsegError: it is damaged.
    """
    content, _ = _read(folder, EVALUATION)
    if "n_cases" not in content or not ("labels" in content or "metrics" in content):
        raise _foreign(folder)
    return {EVALUATION: Document(FILES[EVALUATION], content)}


READERS: dict[str, Callable[[Path], dict[str, Document]]] = {
    MODEL: _read_model,
    RUN: _read_run,
    EVALUATION: _read_evaluation,
}


def _read(folder: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Return the content of the file that describes a folder, and its SHA-256."""
    path = folder / FILES[kind]
    try:
        data = read_bytes(path, max_bytes=MAX_TEXT_BYTES)
        content = parse_json(data)
    except (OSError, ValueError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is no JSON object")
    return content, hashlib.sha256(data).hexdigest()


def _damaged(path: Path, reason: str) -> VolsegError:
    fix = f"copy the folder again, or repeat the command that wrote {path.name}"
    return VolsegError(f"{path}: damaged ({reason})", fix=fix, code="E_RECORD")


# ---- what belongs together


def _add_model(documents: dict[str, Document]) -> str:
    """Add the model of the results if it is where it was; return a hint if it is not."""
    run = documents.get(RUN)
    options = {} if run is None else run.content.get("options")
    digest = options.get("model_sha256") if isinstance(options, Mapping) else None
    if run is None or digest is None:
        return ""
    for folder in _model_folders(run.content):
        try:
            model = _read_model(folder)
        except VolsegError:
            continue
        if model["files"].content[FILES[MODEL]] == digest:
            documents |= model
            return ""
    return "the model of these results is not where it was: give its folder too, for more answers"


def _model_folders(run: Mapping[str, Any]) -> Iterator[Path]:
    """Yield where the model may be: where the run had it, and the one that ships with volseg."""
    from volseg.bundle import shipped_bundle  # torch takes seconds to import

    settings = run.get("settings")
    stated = settings.get("model") if isinstance(settings, Mapping) else None
    if isinstance(stated, str):
        yield Path(stated)
    yield shipped_bundle()


def _check_evaluation(documents: Mapping[str, Document]) -> None:
    """Check that results and evaluation are of this model, and the evaluation of these results.

    Raises:
        VolsegError: one is not.
    """
    contents = {kind: documents[kind].content for kind in KINDS if kind in documents}
    run, evaluation = contents.get(RUN), contents.get(EVALUATION)
    if run is not None and MODEL in contents:
        options = run.get("options")
        stated = options.get("model_sha256") if isinstance(options, Mapping) else None
        if stated not in (None, documents["files"].content[FILES[MODEL]]):
            raise _unrelated("the results are not of this model")
    if run is not None and evaluation is not None:
        _check_same_cases(run, evaluation)


def _check_same_cases(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    names = {name for key in ("done", "kept") for name in _names(run.get(key))}
    masks = evaluation.get("masks")
    if isinstance(masks, Mapping) and masks and names.isdisjoint(masks):
        raise _unrelated("the evaluation has none of the cases of the results")
    if evaluation.get("model") not in (None, run.get("model")):
        raise _unrelated("the evaluation is of another model than the results")


def _names(content: Any) -> list[str]:
    return list(filter(lambda name: isinstance(name, str), content or ()))


def _unrelated(problem: str) -> VolsegError:
    return VolsegError(
        problem, fix="give folders that belong together, or one at a time", code="E_USAGE"
    )


def _sources() -> dict[str, Any]:
    """Return column of lesions.csv → where its definition comes from."""
    return {name: {"source": source} for name, _, _, source in columns_of(LesionMeasurement)}
