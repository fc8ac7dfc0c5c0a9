"""The files that hold facts of a model, results and an evaluation, and which fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.inputs import MAX_TEXT_BYTES, parse_json, read_bytes
from volseg.io.csv_text import iterate_csv
from volseg.manuscript.facts import Document
from volseg.recipe.load import parse_any_recipe

MODEL, RUN, EVALUATION = "model", "run", "evaluation"
FILES = {MODEL: "model.json", RUN: "run.json", EVALUATION: "summary.json"}  # the first decides
KINDS = {MODEL: "a model", RUN: "results", EVALUATION: "an evaluation"}


def read_documents(folders: Sequence[Path]) -> dict[str, Document]:
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


def add_model(documents: dict[str, Document]) -> str:
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


def check_model(documents: Mapping[str, Document]) -> None:
    """Check that results and evaluation are of this model, as far as they say which.

    Raises:
        VolsegError: one is not.
    """
    contents = _contents(documents)
    run, evaluation = contents.get(RUN), contents.get(EVALUATION)
    if run is not None and MODEL in contents:
        options = run.get("options")
        stated = options.get("model_sha256") if isinstance(options, Mapping) else None
        if stated not in (None, documents["files"].content[FILES[MODEL]]):
            raise _unrelated("the results are not of this model")
    if run is None or evaluation is None:
        return
    if evaluation.get("model") not in (None, run.get("model")):
        raise _unrelated("the evaluation is of another model than the results")


def check_evaluation(documents: Mapping[str, Document]) -> None:
    """Check like `check_model`, and that the evaluation is of these results.

    Raises:
        VolsegError: it is not.
    """
    check_model(documents)
    contents = _contents(documents)
    run, evaluation = contents.get(RUN), contents.get(EVALUATION)
    if run is None or evaluation is None:
        return
    names = {name for key in ("done", "kept") for name in _names(run.get(key))}
    masks = evaluation.get("masks")
    if isinstance(masks, Mapping) and masks and names.isdisjoint(masks):
        raise _unrelated("the evaluation has none of the cases of the results")


def _contents(documents: Mapping[str, Document]) -> dict[str, Mapping[str, Any]]:
    return {kind: documents[kind].content for kind in KINDS if kind in documents}


def _names(content: Any) -> list[str]:
    return list(filter(lambda name: isinstance(name, str), content or ()))


def _unrelated(problem: str) -> VolsegError:
    return VolsegError(
        problem, fix="give folders that belong together, or one at a time", code="E_USAGE"
    )
