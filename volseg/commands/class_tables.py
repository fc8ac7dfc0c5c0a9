"""Tables of true and predicted classes or numbers: how they are read and which rows pair up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from volseg.commands.scan_sources import scan_survey
from volseg.errors import VolsegError
from volseg.evaluation.class_intervals import Judged
from volseg.evaluation.class_rows import CLASSES, PROBABILITY, VALUES, ClassRow, ValueRow
from volseg.evaluation.classes import SUM_TOLERANCE, ClassPredictions
from volseg.evaluation.operating import OperatingPoint
from volseg.evaluation.regression import NumberPredictions
from volseg.inputs import read_json
from volseg.io.cases import dataset_error, is_image_column, safe_id, split_of
from volseg.io.csv_text import stream_rows
from volseg.io.formats import is_scan, stem_of
from volseg.io.image_cases import ImageSurvey, survey_images
from volseg.io.image_tables import HEADS, SLICE, is_arrays
from volseg.io.tables import read_table
from volseg.io.targets import LARGEST, value_of
from volseg.recipe.classification import CLASSES as EXCLUSIVE
from volseg.recipe.classification import (
    LABELS,
    LESION,
    NUMBER,
    SCAN,
    SEPARATOR,
    Target,
    split_names,
)
from volseg.store.tables import read_class_rows, read_value_rows
from volseg.words import format_count, format_list

Kind = Literal["classes", "numbers"]
USUAL_TARGETS = ("target", "class", "label", "diagnosis")
MOST_LISTED = 5  # cases that a warning names


def predicted_table(path: Path) -> Path | None:
    """Return the table of predicted classes or numbers that a path is or holds; None if none.

    A table of masks is none.
    """
    if path.is_dir():
        return next((path / name for name in (CLASSES, VALUES) if (path / name).is_file()), None)
    if path.suffix.lower() != ".csv" or not path.is_file():
        return None
    try:
        columns = set(next(stream_rows(path), []))
    except (OSError, ValueError):
        return None
    return path if {"case_id", "class_name"} <= columns or {"case_id", "value"} <= columns else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The true classes or numbers.

    Args:
        cells: case id → column → cell.
        remarks: choices that were made in reading the table.
    """

    path: Path
    columns: Sequence[str]
    cells: Mapping[str, Mapping[str, str]]
    remarks: Sequence[str]

    @classmethod
    def of(cls, path: Path, target: str | None, predicted: Predicted) -> Reference:
        """Read a table of cases, the cases.csv of a folder, or a data set of images.

        A table is read as it is, so that the images need not be there. Where it lists slices or
        scans whose slices were predicted, and where there is none, the data set is read as `infer`
        reads it. A lesion has the cells of its scan.

        Args:
            target: column of the truth, if it is stated; masks in it become classes of slices.
            predicted: says which column is taken if none is stated, and what the cases are.

        Raises:
            VolsegError: there is none, it names no cases, or one of them twice.
        """
        file = path / "cases.csv" if path.is_dir() else path
        if not file.is_file() or is_arrays(file):
            return cls._of_images(path, target, predicted)
        table = read_table(file, HEADS)
        if SLICE in table.columns:
            return cls._of_images(path, target, predicted)
        rows = [dict(zip(table.columns, texts)) for _, texts in table.lines]
        ids = _case_ids(rows, file)
        if _lists_scans(rows) and not predicted.case_ids & set(ids):
            if predicted.data is None or predicted.data.input != LESION:
                return cls._of_images(path, target, predicted)
            ids, rows = _rows_of_lesions(dict(zip(ids, rows)), predicted.case_ids)
        remarks = [text for text in table.remarks if "W_COLUMN" not in text]
        return cls(path=file, columns=table.columns, cells=dict(zip(ids, rows)), remarks=remarks)

    @classmethod
    def _of_images(cls, path: Path, target: str | None, predicted: Predicted) -> Reference:
        """Read a folder per class, a MedMNIST file, or slices, which may be judged as scans."""
        survey = _survey(path, target, predicted)
        cells = {
            case.id: {**case.cells, "patient": case.patient or "", "split": case.split or ""}
            for case in survey.cases
        }
        columns = list(dict.fromkeys(name for row in cells.values() for name in row))
        return cls(path=path, columns=columns, cells=cells, remarks=survey.remarks)

    def target(self, name: str | None, data: Target) -> str:
        """Return the column of the truth: the given, the usual, or the one that fits the classes.

        Args:
            data: what the model predicts.

        Raises:
            VolsegError: there is no such column, or several might be it.
        """
        if name is not None:
            self.check_column(name, "--target")
            return name
        fitting = [name for name in self._free_columns if self._fits(name, data)]
        fitting = [name for name in USUAL_TARGETS if name in fitting][:1] or fitting
        if len(fitting) != 1:
            columns_text = f"columns {', '.join(fitting)} all fit" if fitting else "no column fits"
            raise VolsegError(
                f"{self.path}: which column holds the truth is not clear: {columns_text}",
                fix=f"name it with --target; there are {', '.join(self._free_columns) or 'none'}",
                code="E_USAGE",
            )
        return fitting[0]

    def check_column(self, name: str, option: str) -> None:
        """Refuse a column that the table lacks."""
        if name not in self.columns:
            raise VolsegError(
                f"{self.path}: has no column {name!r}",
                fix=f"give one of {', '.join(self.columns)} to {option}",
                code="E_USAGE",
            )

    @property
    def _free_columns(self) -> list[str]:
        """Columns that are not those of every cases.csv."""
        return [name for name in self.columns if name not in HEADS and not is_image_column(name)]

    def _fits(self, column: str, data: Target) -> bool:
        """Check whether the cells of a column are what a model predicts, and not all the same."""
        cells = {row.get(column, "") for row in self.cells.values()}
        try:
            return len({value_of(cell, data) for cell in cells} - {None}) > 1
        except ValueError:
            return False


def _survey(path: Path, target: str | None, predicted: Predicted) -> ImageSurvey:
    """Return the images of a data set, or its scans if that is what was predicted."""
    usual, survey = predicted.target, survey_images(path, target=target)
    if target is None and usual in [column.name for column in survey.target_columns]:
        survey = survey_images(path, target=usual)  # reads masks that say the classes
    if survey.mistakes or not survey.cases:
        raise dataset_error(survey.mistakes or ["no images found"], str(path))
    is_of_scans = predicted.data is not None and predicted.data.input == SCAN
    return scan_survey(survey, path, target) if is_of_scans else survey


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """The predictions of a model.

    Args:
        path: of the table. classes: names in order; empty for numbers.
        rows: case id → row of each case that was predicted. failed: case id → reason.
        points: the operating points of the model, if run.json states them (`operating_points`).
        target: name of what it predicts, if run.json states it (`target`).
        data: kind, classes and ranges of that, if run.json states them (`data`).
        learned_from: cases from which the model learned (`training_images` of run.json).
    """

    path: Path
    kind: Kind
    classes: Sequence[str]
    rows: Mapping[str, Any]  # ClassRow or ValueRow
    failed: Mapping[str, str]
    points: Sequence[OperatingPoint] = ()
    target: str | None = None
    data: Target | None = None
    learned_from: frozenset[str] = frozenset()

    @classmethod
    def of(cls, path: Path) -> Predicted:
        """Read a results folder or its table.

        Raises:
            VolsegError: it holds neither classes nor numbers.
        """
        file = predicted_table(path)
        try:
            if file is None:
                raise ValueError(f"has no {CLASSES} and no {VALUES}")
            classes, rows = _predicted_rows(file)
            run = _run_of(file.parent)
            _check_rows(rows, classes, run)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise VolsegError(
                f"{file or path}: is not a table of predicted classes or numbers ({error})",
                fix="give the results of `volseg infer` with a classifier",
                code="E_DATASET",
            ) from error
        reasons = {row.case_id: _failure(row, len(classes)) for row in rows}
        failed = {name: reason for name, reason in reasons.items() if reason}
        return cls(
            path=file,
            kind="classes" if classes else "numbers",
            classes=classes,
            rows={row.case_id: row for row in rows if row.case_id not in failed},
            failed=failed,
            points=_points(run),
            target=stated if isinstance(stated := run.get("target"), str) else None,
            data=_data_of(run, classes),
            learned_from=_learned_from(run),
        )

    @property
    def case_ids(self) -> set[str]:
        """The cases of the table, also those that failed."""
        return {*self.rows, *self.failed}

    def described(self, cells: Iterable[str] = ()) -> Target:
        """Return what the model predicts: as run.json states, else as the tables suggest.

        Args:
            cells: of the truth; several labels in one show that a case can have several.
        """
        if self.data is not None:
            return self.data
        if self.kind == "numbers":
            return Target(target="value", kind=NUMBER, classes=())
        sums = [sum(row.probabilities.values()) for row in self.rows.values()]
        several = len(self.classes) < 2 or any(SEPARATOR in cell for cell in cells)
        several |= any(abs(total - 1) > SUM_TOLERANCE for total in sums)
        kind = LABELS if several else EXCLUSIVE
        return Target(target="class", kind=kind, classes=tuple(self.classes))

    @property
    def model(self) -> str:
        """Name of the model; of the folder if the rows name none or several."""
        names = {row.model for row in self.rows.values() if row.model}
        return names.pop() if len(names) == 1 else self.path.parent.name or "model"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TruthTable:
    """Reference and predictions of the cases that have both.

    Args:
        target: column of the truth.
        names: ids of the n cases that are judged, in the order of the reference.
        truths: (n,) class index or number, or (n, k) bool labels.
        left_out: case id → why it is not judged although it was predicted.
    """

    reference: Reference
    predicted: Predicted
    target: str
    names: Sequence[str]
    truths: np.ndarray
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, reference: Reference, predicted: Predicted, target: str | None) -> TruthTable:
        """Pair the rows by case.

        Raises:
            VolsegError: no case has both a truth and a prediction.
        """
        if target is None and predicted.target in reference.columns:
            target = predicted.target
        column = reference.target(target, predicted.described())
        common = [name for name in reference.cells if name in predicted.rows]
        cells = {name: reference.cells[name].get(column, "") for name in common}
        data = predicted.described(cells.values())
        truths, left_out = {}, {}
        for name, text in cells.items():
            try:
                truths[name] = _truth(text, data)
            except ValueError as error:
                left_out[name] = str(error)
        if not truths:
            reason = next(iter(left_out.values()), "") or _unmatched(reference, predicted)
            raise VolsegError(
                f"{predicted.path}: no case can be judged by column {column!r} of "
                f"{reference.path}: {reason}",
                fix="check --target, and that both tables name the cases alike",
                code="E_DATASET",
            )
        return cls(
            reference=reference,
            predicted=predicted,
            target=column,
            names=list(truths),
            truths=np.array(list(truths.values())),
            left_out=left_out,
        )

    @property
    def rows(self) -> list[Any]:
        """The predicted rows of the judged cases."""
        return [self.predicted.rows[name] for name in self.names]

    @property
    def patients(self) -> list[str]:
        """The patient of each judged case; a case without a patient counts as its own."""
        return [self.patient_of(name) or f"case {name}" for name in self.names]

    def patient_of(self, name: str) -> str:
        """Return the patient whom the reference, else the results name; empty if neither does."""
        row = self.predicted.rows.get(name)
        stated = self.reference.cells.get(name, {}).get("patient", "")
        return stated or (row.patient if row is not None and row.patient else "")

    def column(self, name: str) -> list[str]:
        """Return the cells of a column of the reference for the judged cases."""
        return [self.reference.cells[case].get(name, "") for case in self.names]

    @property
    def judged(self) -> Judged:
        """The cases as arrays.

        Raises:
            VolsegError: the probabilities of a case are none.
        """
        try:
            return self._judged()
        except ValueError as error:
            raise VolsegError(
                f"{self.predicted.path}: {error}",
                fix="repeat `volseg infer`, or correct the table",
                code="E_DATASET",
            ) from error

    def _judged(self) -> Judged:
        if self.predicted.kind == "numbers":
            values = np.array([row.value for row in self.rows], dtype=np.float64)
            predictions = NumberPredictions(values, self.truths)
        else:
            classes = self.predicted.classes
            table = np.array([[row.probabilities[name] for name in classes] for row in self.rows])
            predictions = ClassPredictions(table, self.truths, classes)
        return Judged(predictions, self.patients, self.predicted.model)

    def limited_to(self, names: Sequence[str]) -> TruthTable:
        """Return the table of some of its cases."""
        place = {name: number for number, name in enumerate(self.names)}
        index = [place[name] for name in names]
        return TruthTable(
            reference=self.reference,
            predicted=self.predicted,
            target=self.target,
            names=list(names),
            truths=self.truths[index],
            left_out=self.left_out,
        )

    @property
    def warnings(self) -> list[str]:
        """What puts the numbers in doubt: cases left out, of the training split, or unnamed."""
        texts = list(self.reference.remarks)
        for reason in dict.fromkeys(self.left_out.values()):
            cases = [name for name, why in self.left_out.items() if why == reason]
            listed = format_list(cases, MOST_LISTED)
            texts.append(f"W_LEFT_OUT: {format_count(len(cases), 'case')}: {reason} ({listed})")
        texts += self._unpaired()
        trained = [
            name
            for name in self.names
            if _split(self.reference.cells[name]) == "train" or name in self.predicted.learned_from
        ]
        if trained:
            texts.append(
                f"W_TRAINING: {format_count(len(trained), 'training case')} among them: a model "
                f"that was trained on them looks better than it is "
                f"({format_list(trained, MOST_LISTED)})"
            )
        n_unnamed = sum(not self.patient_of(name) for name in self.names)
        if n_unnamed:
            texts.append(
                f"W_PATIENT: {format_count(n_unnamed, 'case')} without a patient: each counts as "
                "one, so intervals are too narrow if some are of the same patient"
            )
        return texts

    def _unpaired(self) -> Iterator[str]:
        """Yield how many cases are in one table only; those of other splits are not expected."""
        rows, predicted = self.reference.cells, self.predicted.case_ids
        splits = {_split(rows[name]) for name in self.names}
        expected = [
            name
            for name, row in rows.items()
            if _split(row) in splits and row.get(self.target, "").strip()
        ]
        missing = [name for name in expected if name not in predicted]
        if missing:
            yield (
                f"W_NOT_PREDICTED: {len(missing)} of {format_count(len(expected), 'case')} with a "
                f"truth were not predicted ({format_list(missing, MOST_LISTED)})"
            )
        unknown = [name for name in sorted(predicted) if name not in rows]
        if unknown:
            yield (
                f"W_NO_TRUTH: {len(unknown)} of {format_count(len(predicted), 'predicted case')} "
                f"are not in the reference ({format_list(unknown, MOST_LISTED)})"
            )


def _split(row: Mapping[str, str]) -> str | None:
    return split_of(row.get("split", ""))


def _case_ids(rows: Sequence[Mapping[str, str]], file: Path) -> list[str]:
    """Return the ids of the cases of a table.

    Raises:
        VolsegError: a row names none, or two rows name the same.
    """
    ids = [_case_id(row) for row in rows]
    repeated = [name for name, n in Counter(ids).items() if n > 1]
    if repeated or "" in ids:
        problem = f"names case {repeated[0]!r} twice" if any(repeated) else "names no cases"
        raise VolsegError(
            f"{file}: {problem}",
            fix="give it a column 'subject' with the id of each case",
            code="E_DATASET",
        )
    return ids


def _case_id(row: Mapping[str, str]) -> str:
    """Return the id of a case: its subject, else the name of its first image."""
    images = (cell for column, cell in row.items() if is_image_column(column) and cell)
    if row.get("subject"):
        return row["subject"]
    image = Path(next(images, "").replace("\\", "/"))
    stem = stem_of(image) if is_scan(image) else image.stem
    return safe_id(stem) if stem else ""


def _lists_scans(rows: Sequence[Mapping[str, str]]) -> bool:
    """Check whether the images of a table are volumes."""
    cells = [cell for row in rows for column, cell in row.items() if is_image_column(column)]
    return any(cells) and all(is_scan(Path(cell.replace("\\", "/"))) for cell in cells if cell)


def _rows_of_lesions(
    scans: Mapping[str, Mapping[str, str]], names: Iterable[str]
) -> tuple[list[str], list[dict[str, str]]]:
    """Return the lesions of these scans among the names, and the row of each."""
    ids, rows = [], []
    for name in sorted(names):
        scan = name.rpartition("_")[0]
        if scan in scans:
            ids.append(name)
            rows.append({**scans[scan], "patient": scans[scan].get("patient") or scan})
    return ids, rows


def _unmatched(reference: Reference, predicted: Predicted) -> str:
    """Say that no case is in both tables, with a name from each, or why none was predicted."""
    if predicted.failed and not predicted.rows:
        name, reason = next(iter(predicted.failed.items()))
        return f"none was predicted, such as {name!r}: {reason}"
    examples = [next(iter(names), "none") for names in (reference.cells, predicted.rows)]
    return (
        f"no case of the reference was predicted: it names cases such as {examples[0]!r}, and the "
        f"predictions {examples[1]!r}"
    )


def _predicted_rows(file: Path) -> tuple[Sequence[str], Sequence[ClassRow | ValueRow]]:
    """Return the classes of a table of predictions, none for numbers, and its rows.

    Raises:
        ValueError: it is a table of something else.
    """
    columns = next(stream_rows(file), [])
    if "class_name" in columns:
        classes, rows = read_class_rows(file)
        if not classes:
            raise ValueError("has no column of probabilities")
        return classes, rows
    if {"case_id", "value"} <= set(columns):
        return [], read_value_rows(file)
    raise ValueError(f"has neither the columns of {CLASSES} nor those of {VALUES}")


def _check_rows(
    rows: Sequence[ClassRow | ValueRow], classes: Sequence[str], run: Mapping[str, Any]
) -> None:
    """Refuse a table that names a case twice, or lacks the column of a class.

    Raises:
        ValueError: it does.
    """
    repeated = [name for name, n in Counter(row.case_id for row in rows).items() if n > 1]
    if repeated:
        raise ValueError(f"names case {repeated[0]!r} twice")
    stated = _stated_data(run)
    needed = dict.fromkeys(() if stated is None else stated.names)
    for row in rows:
        if isinstance(row, ClassRow) and row.class_name:
            needed |= dict.fromkeys(split_names(row.class_name))
    lost = [name for name in needed if name not in classes]
    if lost:
        raise ValueError(f"has no column {PROBABILITY + lost[0]!r}, and {lost[0]!r} is a class")


def _failure(row: ClassRow | ValueRow, n_classes: int) -> str:
    """Return why a case was not predicted; empty if it was."""
    if row.status != "done":
        return row.error or "reason unknown"
    if isinstance(row, ValueRow):
        is_known = row.value is not None and abs(row.value) <= LARGEST
        return "" if is_known else f"E_ROW: has no value from {-LARGEST:g} to {LARGEST:g}"
    n_probabilities = len(row.probabilities or ())
    if n_probabilities < n_classes:
        return f"E_ROW: has {n_probabilities} of {n_classes} probabilities"
    wrong = [name for name, p in (row.probabilities or {}).items() if not 0 <= p <= 1]
    return f"E_ROW: the probability of {wrong[0]!r} is not from 0 to 1" if wrong else ""


def _truth(cell: str, data: Target) -> float | int | np.ndarray:
    """Return the index of the class, (k,) bool labels, or the number.

    Raises:
        ValueError: the cell is none of them.
    """
    value = value_of(cell, data)
    if value is None:
        is_blank = not cell.strip()
        raise ValueError(
            "the cell of the truth is empty"
            if is_blank
            else "the truth lies outside the ranges of all classes"
        )
    if isinstance(value, tuple):
        return np.isin(np.arange(len(data.names)), value)
    return value


def _stated_data(run: Mapping[str, Any]) -> Target | None:
    try:
        return Target.model_validate(run["data"])
    except (ValueError, KeyError):
        return None


def _data_of(run: Mapping[str, Any], classes: Sequence[str]) -> Target | None:
    """Return what run.json says of the target; None if it does not fit the table."""
    data = _stated_data(run)
    if data is None:
        return None
    names = [] if data.kind == NUMBER else list(data.names)
    return data if names == list(classes) else None


def _run_of(folder: Path) -> Mapping[str, Any]:
    """Return the content of run.json of the results; empty if there is none."""
    try:
        content = read_json(folder / "run.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _learned_from(run: Mapping[str, Any]) -> frozenset[str]:
    names = run.get("training_images", ())
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


def _points(run: Mapping[str, Any]) -> list[OperatingPoint]:
    """Return the operating points that run.json states, if any."""
    try:
        return [OperatingPoint.of_json(entry) for entry in run.get("operating_points", ())]
    except (ValueError, KeyError, TypeError):
        return []
