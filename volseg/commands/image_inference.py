"""`volseg infer` with a model that classifies: tables of it and of its baselines, a page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from volseg.commands.baseline_tables import Beside, CaseRows, earlier_rows
from volseg.commands.batch import failure_reason
from volseg.commands.class_reporting import PAGE, RUN, Row, doubtful_pictures, read_class_table
from volseg.commands.image_sources import case_key, find_inputs, source_of
from volseg.commands.scan_sources import stack_scans
from volseg.commands.seen_images import read_seen, seen_warning
from volseg.errors import ScanError, UnexpectedError, VolsegError
from volseg.evaluation.class_rows import (
    BASELINES,
    CLASSES,
    VALUES,
    BaselineRow,
    ClassRow,
    ValueRow,
    joined,
)
from volseg.image_bundle import ImageBundle, load_image_bundle
from volseg.inference.choose import choose_backend
from volseg.inference.image_predictor import load_predictor
from volseg.inference.images import judged_predictions
from volseg.inputs import read_json
from volseg.io.files import json_text, sha256_of
from volseg.io.image_cases import ImageCase
from volseg.options import InferOptions
from volseg.pages.about import About
from volseg.pages.class_page import class_page
from volseg.recipe.classification import CLASSES as EXCLUSIVE
from volseg.recipe.classification import LESION, NUMBER, Target
from volseg.reports import ImagesReport
from volseg.store.outputs import OutputFolder
from volseg.store.records import STALE
from volseg.store.tables import class_table, table
from volseg.words import format_count, format_list

STAGE = "Classifying"
MOST_LISTED = 3  # names in a message
BATCH = 64  # images that are read before the networks run
OF_SCANS = (  # options that mean nothing for images
    *(
        "volume",
        "series",
        "intensity_unit",
        "tilt",
        "spacing",
        "max_ram",
        "figures",
        "overlap",
        "inside",
        "max_vram",
        "fast",
        "probabilities",
    ),
    *("accept_mismatch", "format", "dicom_seg", "dicom_sr"),
)


def infer_images(options: InferOptions) -> ImagesReport:
    """Predict the class or number of images; write a row per image.

    Raises:
        VolsegError: the request is wrong. An image that cannot be used becomes a failed row.
    """
    assert options.model is not None
    options.refuse_stated(OF_SCANS, f"only for scans, but {options.model} classifies images")
    bundle = _as_requested(load_image_bundle(options.model), options)
    remarks, failed = list[str](), dict[str, str]()
    cases = find_inputs(
        bundle.recipe, options.scans, failed=failed.__setitem__, remark=remarks.append
    )
    # Which folders are classes is of no importance here.
    remarks = [text for text in remarks if not text.startswith("N_FOLDERS")]
    options.warn(*remarks)
    files = {image.path for case in cases for image in (case, *case.slices)}
    inputs = [*options.scans, options.model, *files]
    with OutputFolder(options.out, "infer-images", inputs=inputs) as outputs:
        _refuse_other_target(options.out, bundle)
        outputs.check_overwrites([_table_name(bundle), BASELINES, RUN, PAGE])
        beside = Beside.of(options.model, bundle.recipe.data)
        run = _Run(options, bundle, outputs, beside, n_images=len(cases))
        report = run.run(cases, remarks)
    for name, reason in failed.items():
        options.report_failure(name, reason)
    return replace(report, failed=dict(report.failed) | failed)


def _as_requested(bundle: ImageBundle, options: InferOptions) -> ImageBundle:
    """Return the bundle without test-time augmentation, if that was requested."""
    if options.tta:
        return bundle
    recipe = bundle.recipe
    infer = recipe.infer.model_copy(update={"tta_axes": ()})
    return replace(bundle, recipe=recipe.model_copy(update={"infer": infer}))


@dataclass(frozen=True, slots=True)
class _Earlier:
    """Rows of an earlier call, with the hash of the image and model that each came from.

    Args:
        beside: rows of baselines.csv of each case.
    """

    rows: Mapping[str, Row] = field(default_factory=dict)
    beside: Mapping[str, CaseRows] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        options: InferOptions,
        bundle: ImageBundle,
        outputs: OutputFolder,
        beside: Beside,
        *,
        n_images: int,
    ) -> None:
        self._options, self._bundle, self._outputs = options, bundle, outputs
        self._beside = beside
        choice = choose_backend(options.backend, options.device, options.precision)
        self._predictor = load_predictor(bundle, choice, folder=options.model, n_images=n_images)
        self._key_options = {
            "model_sha256": bundle.sha256,
            **self._predictor.identity,
            "tta_axes": list(bundle.recipe.infer.tta_axes),
        }
        text = json_text(self._key_options)
        self._made_with = hashlib.sha256(text.encode()).hexdigest()
        self._source = source_of(bundle.recipe, self._predictor.embed_slices)
        self._digests = dict[Path, str]()
        earlier = _earlier(options.out, bundle, beside)
        self._rows, self._keys = dict(earlier.rows), dict(earlier.keys)
        self._beside_rows = dict(earlier.beside)
        self._todo = dict[str, str]()  # keys of images that are read and not yet predicted
        assert options.model is not None
        self._learned_from = read_seen(options.model)

    def run(self, cases: Sequence[ImageCase], remarks: Sequence[str]) -> ImagesReport:
        done, kept, failed = list[str](), list[str](), dict[str, str]()
        remarks = [*remarks, *self._stale(cases)]
        batch: list[tuple[ImageCase, np.ndarray]] = []
        try:
            for count, case in enumerate(cases, start=1):
                try:
                    key = self._key(case)
                    if self._keys.get(case.id) == key and case.id in self._rows:
                        kept.append(case.id)
                        continue
                    settings = self._bundle.recipe.images
                    self._todo[case.id] = key
                    batch.append((case, self._source.network_input(case, settings)))
                except Exception as error:  # of any kind: the other images continue
                    problem = error if isinstance(error, VolsegError) else UnexpectedError(error)
                    failed[case.id] = failure_reason(self._outputs, case.id, problem)
                    self._options.report_failure(case.id, failed[case.id])
                    self._fail(case, failed[case.id])
                if len(batch) == BATCH or (batch and count == len(cases)):
                    done += self._predict(batch)
                    batch = []
                self._options.progress(STAGE, count / len(cases), case.id)
            done += self._predict(batch)
        finally:
            self._write(cases)
        learned = [name for name in self._learned() if name in {*done, *kept}]
        if learned:
            remarks.append(seen_warning(learned))
            self._options.warn(remarks[-1])
        return ImagesReport(
            out=self._options.out,
            done=done,
            kept=kept,
            failed=failed,
            warnings=list(remarks),
            pages=self._options.pages,
            coverage=self._bundle.judgement.stated_coverage,
            computed_with=self._predictor.identity,
        )

    def _key(self, case: ImageCase) -> str:
        image = case_key(case, self._digest)
        mask = "" if self._bundle.recipe.data.input != LESION else f"+{self._digest(case.mask)}"
        return f"{image}{mask}{self._end_of_keys}"

    def _learned(self) -> list[str]:
        """Return the images of the table that the model learned from, by their keys."""
        images = {name: key.partition("@")[0].partition("+")[0] for name, key in self._keys.items()}
        return sorted(name for name, image in images.items() if image in self._learned_from)

    @property
    def _end_of_keys(self) -> str:
        """What the keys of all images of this call end with."""
        return f"@{self._made_with}{self._beside.key}"

    def _stale(self, cases: Sequence[ImageCase]) -> list[str]:
        """Return a warning if rows of another model, or made with other options, stay."""
        now = {case.id for case in cases}
        others = [
            name
            for name, key in sorted(self._keys.items())
            if name not in now and not key.endswith(self._end_of_keys)
        ]
        if not others:
            return []
        text = (
            f"{STALE}: the table also holds {format_count(len(others), 'image')} that an earlier "
            f"call predicted with another model or other options "
            f"({format_list(others, MOST_LISTED)}); give another --out for a table without them"
        )
        self._options.warn(text)
        return [text]

    def _digest(self, path: Path | None) -> str:
        if path is None:
            return ""
        if path not in self._digests:
            try:
                self._digests[path] = sha256_of(path)
            except OSError as error:
                raise ScanError(
                    f"{path}: cannot be read ({error.strerror or error})",
                    fix="check the path and its permissions",
                    code="E_READ",
                ) from error
        return self._digests[path]

    def _fail(self, case: ImageCase, reason: str) -> None:
        row = ValueRow if self._bundle.recipe.data.kind == NUMBER else ClassRow
        self._rows[case.id] = row(
            case_id=case.id,
            patient=case.patient,
            model=self._bundle.name,
            status="failed",
            error=reason,
        )
        self._keys.pop(case.id, None)
        self._beside_rows.pop(case.id, None)

    def _predict(self, batch: Sequence[tuple[ImageCase, np.ndarray]]) -> list[str]:
        """Add the rows of a batch of images; return their ids."""
        if not batch:
            return []
        recipe, inputs = self._bundle.recipe, [image for _, image in batch]
        images = stack_scans(inputs) if recipe.sequence is not None else np.stack(inputs)
        predicted = self._predictor.predict(images)
        judgement, fusion = self._bundle.judgement, self._bundle.judgement.fusion
        measured = None
        if fusion is not None:
            measured = np.stack(
                [self._source.measurements(case, fusion.names) for case, _ in batch]
            )
        predictions = judged_predictions(predicted.outputs, recipe.data, judgement, measured)
        unusual = self._unusual(predicted.embeddings)
        self._beside_rows |= self._beside.rows([case.id for case, _ in batch], images)
        for (case, _), prediction, is_unusual in zip(batch, predictions, unusual, strict=True):
            row = self._value_row if recipe.data.kind == NUMBER else self._class_row
            self._rows[case.id] = row(case, prediction, is_unusual)
            self._keys[case.id] = self._todo.pop(case.id)
        return [case.id for case, _ in batch]

    def _unusual(self, embeddings: np.ndarray) -> list[bool | None]:
        outliers = self._bundle.judgement.outliers
        # Rounding to int8 alone moves an embedding farther than the threshold allows.
        if outliers is None or "int8" in self._predictor.identity["precision"]:
            return [None] * len(embeddings)
        return outliers.is_unusual(embeddings).tolist()

    def _class_row(
        self, case: ImageCase, probabilities: np.ndarray, is_unusual: bool | None
    ) -> ClassRow:
        recipe, judgement = self._bundle.recipe, self._bundle.judgement
        names, is_exclusive = recipe.data.names, recipe.data.kind == EXCLUSIVE
        ranked = np.argsort(-probabilities, kind="stable").tolist()
        best = ranked[0]
        present = [name for name, p in zip(names, probabilities, strict=True) if p >= 0.5]
        left_open = None
        if judgement.sets is not None:
            inside = judgement.sets.sets(probabilities[None])[0]
            left_open = joined([n for n, is_in in zip(names, inside, strict=True) if is_in])
        return ClassRow(
            case_id=case.id,
            patient=case.patient,
            class_name=names[best] if is_exclusive else joined(present),
            class_probability=float(probabilities[best]) if is_exclusive else None,
            probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
            top_classes=joined([names[index] for index in ranked[: recipe.infer.top_k]]),
            confidence_set=left_open,
            out_of_distribution=is_unusual,
            model=self._bundle.name,
        )

    def _value_row(
        self, case: ImageCase, prediction: np.ndarray, is_unusual: bool | None
    ) -> ValueRow:
        value, half = float(prediction[0]), self._bundle.judgement.half_width
        return ValueRow(
            case_id=case.id,
            patient=case.patient,
            value=value,
            value_low=None if half is None else value - half,
            value_high=None if half is None else value + half,
            out_of_distribution=is_unusual,
            model=self._bundle.name,
        )

    def _write(self, cases: Sequence[ImageCase]) -> None:
        """Write the table and run.json together."""
        rows = [self._rows[name] for name in sorted(self._rows)]
        about = About.now("infer", self._bundle.name)
        description = {
            **about.as_json(),
            "task": "classify",
            "settings": self._options.stated(),
            "options": self._key_options,
            "images": len(cases),
            "target": self._bundle.recipe.data.target,
            "data": self._bundle.recipe.data.model_dump(mode="json"),
            "coverage": self._bundle.judgement.stated_coverage,
            "baselines": list(self._beside.names),
            "operating_points": list(map(asdict, self._bundle.judgement.points)),
            "training_images": self._learned(),
            "keys": {name: self._keys[name] for name in sorted(self._keys)},
        }
        beside = [line for row in rows for line in self._beside_rows.get(row.case_id, ())]
        with self._outputs.staged() as commit:
            commit.write(_table_name(self._bundle), _table(rows, self._bundle))
            if self._beside.names:
                commit.write(BASELINES, table(BaselineRow, beside))
            if self._options.pages:
                commit.write(PAGE, self._page(rows, cases, about).encode())
            commit.write(RUN, json_text(description))
            commit.finish(last=RUN, removed=() if self._beside.names else [BASELINES])

    def _page(self, rows: Sequence[Row], cases: Sequence[ImageCase], about: About) -> str:
        """Return report.html, with pictures of the images of this call that are most doubtful."""
        return class_page(
            about,
            rows,
            target=self._bundle.recipe.data.target,
            coverage=self._bundle.judgement.stated_coverage,
            pictures=doubtful_pictures(rows, cases, self._source),
        ).html()


def _table_name(bundle: ImageBundle) -> str:
    return VALUES if bundle.recipe.data.kind == NUMBER else CLASSES


def _table(rows: Sequence[Any], bundle: ImageBundle) -> Any:
    if bundle.recipe.data.kind == NUMBER:
        return table(ValueRow, rows)
    return class_table(bundle.recipe.data.names, rows)


def _refuse_other_target(out: Path, bundle: ImageBundle) -> None:
    """Refuse a folder whose tables hold predictions of something else: they would be lost.

    Raises:
        VolsegError: a model with another target or other classes wrote it.
    """
    try:
        earlier = Target.model_validate(read_json(out / RUN)["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    data = bundle.recipe.data
    if (earlier.target, earlier.kind, earlier.names) != (data.target, data.kind, data.names):
        raise VolsegError(
            f"{out}: holds predictions of {_target_text(earlier)}, and {bundle.name} predicts "
            f"{_target_text(data)}",
            fix="give another folder to --out",
            code="E_EXISTS",
        )


def _target_text(data: Target) -> str:
    named = "" if data.kind == NUMBER else f" ({format_list(list(data.names), MOST_LISTED)})"
    return f"{data.target}{named}"


def _earlier(out: Path, bundle: ImageBundle, beside: Beside) -> _Earlier:
    """Return the rows of earlier calls; nothing if there are none."""
    try:
        keys = read_json(out / RUN)["keys"]
        rows = {row.case_id: row for row in read_class_table(out / _table_name(bundle))}
        if not all(isinstance(key, str) for key in keys.values()):
            return _Earlier()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, VolsegError):
        return _Earlier()
    beside_rows = earlier_rows(out, beside)
    complete = keys.keys() & rows.keys()
    if beside.names:
        complete &= beside_rows.keys()
    return _Earlier(rows, beside_rows, {name: keys[name] for name in complete})
