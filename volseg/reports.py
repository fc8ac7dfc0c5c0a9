"""What each command did, as values, and what it wrote: tables as data frames, masks as volumes.

A data frame is read from its file on each access, and holds every case of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from volseg.errors import VolsegError, is_note, without_notes
from volseg.manuscript.claim import Answer
from volseg.manuscript.facts import Statement
from volseg.words import NOUNS, format_count, format_list, format_number

if TYPE_CHECKING:
    from pandas import DataFrame

    from volseg.volume import Volume

MAX_LINES, MAX_ROWS = 5, 20  # of failures and warnings, of a table in a notebook
SUCCESS, SOME_FAILED, NONE_SUCCEEDED, INTERRUPTED = 0, 3, 4, 130


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunReport:
    """What a command did with its cases."""

    files: ClassVar[tuple[str, ...]] = ()  # that the command may write into `out`

    out: Path
    done: Sequence[str] = ()
    kept: Sequence[str] = ()  # complete from an earlier call
    failed: Mapping[str, str] = field(default_factory=dict)  # case → code and reason
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()  # how the input was read, which is no problem

    def __post_init__(self) -> None:
        """Set apart the notes among the warnings: a command reports both as they occur."""
        notes = [text for text in self.warnings if is_note(text)]
        object.__setattr__(self, "notes", [*self.notes, *notes])
        object.__setattr__(self, "warnings", without_notes(self.warnings))

    @property
    def exit_code(self) -> int:
        """Exit code: 0 if all are done, 3 if some cases failed, 4 if none succeeded."""
        if not self.failed:
            return SUCCESS
        return SOME_FAILED if self.done or self.kept else NONE_SUCCEEDED

    @property
    def is_silent(self) -> bool:
        """Whether another process reports for this one."""
        return False

    @property
    def remark(self) -> str:
        """A last sentence for the user."""
        return ""

    @property
    def paths(self) -> dict[str, Path]:
        """Files of the folder that cover all cases: name without suffix → path."""
        paths = [self.out / name for name in self.files]
        return {path.stem: path for path in paths if path.is_file()}

    @property
    def outcome(self) -> str:
        """What came out, in a few words."""
        return format_count(len(self.done) + len(self.kept), "case")

    @property
    def goal(self) -> Path | None:
        """The file or folder to look at; None if nothing was written."""
        return self.paths.get("report", self.out)

    @property
    def counts(self) -> dict[str, int | float]:
        """How many items were done, kept and failed, how many warnings there are, and results."""
        names = ("done", "kept", "failed", "warnings")
        return {name: len(getattr(self, name)) for name in names} | self._more_counts

    @property
    def _more_counts(self) -> dict[str, int | float]:
        return {}

    @property
    def headline(self) -> str:
        """One line: what came out, what is wrong with it, and where to look.

        >>> str(RunReport(out=Path("results"), done=["a", "b"], warnings=["W_NAN: a: …"]).headline)
        '2 cases, 1 warning → results'
        """
        parts = [self.outcome]
        if self.kept:
            parts.append(self._kept_text)
        if self.warnings:
            parts.append(format_count(len(self.warnings), "warning"))
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        goal = "" if self.goal is None else f" → {self.goal}"
        return f"{', '.join(parts)}{goal}"

    @property
    def _kept_text(self) -> str:
        return f"{len(self.kept)} of them already complete"

    def __repr__(self) -> str:
        lines = [f"failed: {case}: {reason}" for case, reason in self.failed.items()]
        return text_of(type(self).__name__, self.headline, [*lines, *self.warnings])

    def _repr_html_(self) -> str:
        try:
            frame = self._shown_table()
        except VolsegError:  # the folder was moved or changed since
            frame = None
        return html_of(repr(self), frame)

    def _shown_table(self) -> DataFrame | None:
        """Return the table that a notebook shows, if any."""
        return None

    def _read_table(self, name: str) -> DataFrame:
        from volseg.store.tables import read_table  # `volseg --help` imports this file

        return read_table(self.out / name)

    def as_json(self) -> dict[str, Any]:
        """Return the content that `--json` prints."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content |= {"out": str(self.out), "exit_code": self.exit_code}
        return content | {"counts": self.counts, "text": self.headline}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CasesReport(RunReport):
    """What `infer` or `measure` did.

    Args:
        objects: `components` or `labels`. pages: whether report.html was written.
        computed_with: backend and precision of the network; empty without one.
    """

    files: ClassVar[tuple[str, ...]] = ("cases.csv", "lesions.csv", "run.json", "report.html")

    objects: str
    pages: bool
    computed_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def lesions(self) -> DataFrame:
        """lesions.csv: a row per lesion; see `volseg.read_table`."""
        return self._read_table("lesions.csv")

    @property
    def cases(self) -> DataFrame:
        """cases.csv: a row per scan, also for a failed one."""
        return self._read_table("cases.csv")

    def mask(self, case: str) -> Volume:
        """Return the mask of a case, as it is now in the folder, with the corrections in it.

        Raises:
            VolsegError: the case is not done, or it was measured without a model (`E_RECORD`).
        """
        return self._read_mask("masks", case)

    def lesion_ids(self, case: str) -> Volume:
        """Return the number of the lesion in each voxel of a case, 1 for the largest.

        Raises:
            VolsegError: the case is not done (`E_RECORD`).
        """
        return self._read_mask("lesion_ids", case)

    def mask_path(self, case: str) -> Path:
        """Return the file of `mask`."""
        return self._file_of("masks", case)

    def lesion_ids_path(self, case: str) -> Path:
        """Return the file of `lesion_ids`."""
        return self._file_of("lesion_ids", case)

    def _read_mask(self, folder: str, case: str) -> Volume:
        from volseg.io.volumes import read_mask

        return read_mask(self._file_of(folder, case), max_labels=2**32)

    def _file_of(self, folder: str, case: str) -> Path:
        from volseg.store.records import MASKS, CaseRecord, path_of

        try:
            record = CaseRecord.read(self.out, case)
        except (OSError, ValueError, TypeError):
            record = None
        if record is None or not record.is_done:
            names = format_list([*self.done, *self.kept], MAX_LINES, "case")
            reason = self.failed.get(case, "it is not in the folder")
            fix = f"give one of {names}" if names else "run it again"
            raise VolsegError(
                f"{self.out}: case {case!r} has no result: {reason}", fix=fix, code="E_RECORD"
            )
        if folder == MASKS and not record.masks:
            raise VolsegError(
                f"{self.out}: `volseg measure` writes no masks",
                fix="read the mask that you gave, or lesion_ids",
                code="E_RECORD",
            )
        return path_of(self.out, case, {**record.files, **record.corrected}, folder)

    @property
    def outcome(self) -> str:
        if not self.done and not self.kept:
            return "no scan done"
        scans, totals = format_count(len(self.done) + len(self.kept), "scan"), self._totals()
        return scans if totals is None else f"{scans}: {text_of_lesions(*totals, self.noun)}"

    @property
    def goal(self) -> Path | None:
        return self.paths.get("report", self.out) if self.pages else self.out  # it may be older

    @property
    def noun(self) -> str:
        """What a row of lesions.csv is: a lesion, or with `--objects labels` a structure."""
        return NOUNS[self.objects]

    @property
    def _more_counts(self) -> dict[str, int | float]:
        n_lesions, volume_ml = self._totals() or (0, 0.0)
        return {"lesions": n_lesions, "volume_ml": volume_ml}

    def _totals(self) -> tuple[int, float] | None:
        """Return number and volume of the lesions; None if the folder was moved or changed."""
        try:
            return totals_of_cases(self._shown_table())
        except VolsegError:
            return None

    def _shown_table(self) -> DataFrame:
        """Return the rows of the cases of this call."""
        cases, names = self.cases, [*self.done, *self.kept, *self.failed]
        return cases.loc[cases["case_id"].isin(names)]

    def as_json(self) -> dict[str, Any]:
        content = RunReport.as_json(self)
        if not self.computed_with:
            del content["computed_with"]
        return content


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ImagesReport(CasesReport):
    """What `infer` did with images; there are no lesions and no masks.

    Args:
        coverage: of the confidence sets or intervals in the table; None if it has none.
    """

    files: ClassVar[tuple[str, ...]] = (
        *("classes.csv", "values.csv", "baselines.csv", "run.json", "report.html"),
    )

    objects: str = "components"
    coverage: float | None

    @property
    def _more_counts(self) -> dict[str, int | float]:
        return {}

    @property
    def classes(self) -> DataFrame:
        """classes.csv: a row per image, with the probability of each class."""
        return self._read_table("classes.csv")

    @property
    def values(self) -> DataFrame:
        """values.csv: a row per image, with the predicted number and its interval."""
        return self._read_table("values.csv")

    @property
    def outcome(self) -> str:
        if not self.done and not self.kept:
            return "no image done"
        images = format_count(len(self.done) + len(self.kept), "image")
        try:
            frame = self._shown_table()
        except VolsegError:  # the folder was moved or changed
            return images
        if "class_name" not in frame:
            return images
        counts = frame["class_name"].dropna().value_counts()
        listed = format_list([f"{n} {name}" for name, n in counts.items()], MAX_LINES)
        return f"{images}: {listed}" if listed else images

    def _shown_table(self) -> DataFrame:
        """Return the rows of the images of this call."""
        frame = self.classes if "classes" in self.paths else self.values
        names = [*self.done, *self.kept, *self.failed]
        return frame.loc[frame["case_id"].isin(names)]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExplainReport(RunReport):
    """What `explain` did.

    Args:
        verdicts: method → the checks that it failed with this model, empty if none; None if it was
            not checked.
        scores: method or simple map → its mean scores against masks in words; empty without masks.
    """

    files: ClassVar[tuple[str, ...]] = (
        *("explain.csv", "randomisation.csv", "saliency.csv", "run.json", "explain.html"),
    )

    verdicts: Mapping[str, str | None]
    scores: Mapping[str, str]

    @property
    def goal(self) -> Path | None:
        return self.paths.get("explain", self.out)

    @property
    def paths(self) -> dict[str, Path]:
        """Files of the folder: name without suffix → path; `explain` is the page."""
        paths = [self.out / name for name in self.files]
        names = {path: "table" if path.name == "explain.csv" else path.stem for path in paths}
        return {names[path]: path for path in paths if path.is_file()}

    @property
    def explained(self) -> DataFrame:
        """explain.csv: a row per image and method, with its checks and scores."""
        return self._read_table("explain.csv")

    @property
    def randomisation(self) -> DataFrame:
        """randomisation.csv: a row per checked image, method and layer."""
        return self._read_table("randomisation.csv")

    @property
    def saliency(self) -> DataFrame:
        """saliency.csv: mean scores against masks, with intervals over patients."""
        return self._read_table("saliency.csv")

    @property
    def outcome(self) -> str:
        if not self.done:
            return "no image explained"
        doubted = [name for name, doubt in self.verdicts.items() if doubt]
        unreliable = f", unreliable: {format_list(doubted, MAX_LINES)}" if doubted else ""
        return f"maps of {format_count(len(self.done), 'image')}{unreliable}"

    def _shown_table(self) -> DataFrame:
        return self.explained


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PreprocessReport(RunReport):
    """What `preprocess` did."""

    fingerprint: Mapping[str, Any]  # of the dataset, in a few numbers

    @property
    def outcome(self) -> str:
        return f"{format_count(len(self.done) + len(self.kept), 'case')} prepared"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ListingReport(RunReport):
    """The cases that were recognised; `masks` is the number of those with a mask."""

    masks: int
    channels: Sequence[str]

    @property
    def outcome(self) -> str:
        one_image = list(self.channels) == ["image"]
        of_channels = "" if one_image else f" of channels {', '.join(self.channels)}"
        return f"{format_count(len(self.done), 'case')}{of_channels}, {self.masks} with a mask"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PlanReport(RunReport):
    """What training would do.

    Args:
        recipe: closed, as JSON. reasons: setting, value and reason of each decision.
        cases: number of training cases.
    """

    recipe: Mapping[str, Any]
    reasons: Sequence[Mapping[str, str]]
    cases: int
    folds: int
    plan_file: str = ""  # if it was written

    @property
    def outcome(self) -> str:
        """Number of training cases and of decisions."""
        decisions = format_count(len(self.reasons), "decision")
        return f"{format_count(self.cases, 'training case')}, {decisions}"

    @property
    def goal(self) -> Path | None:
        return Path(self.plan_file) if self.plan_file else None

    def _shown_table(self) -> DataFrame:
        from pandas import DataFrame

        return DataFrame([dict(reason) for reason in self.reasons])


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainReport(RunReport):
    """What `train` did.

    Args:
        preview: path of the picture, if only that was asked for.
        hint: what to know before the model is used.
        rank: of this process in a team of several.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""  # of the model
    preview: str = ""
    interrupted: bool = False
    hint: str = ""
    rank: int = 0

    @property
    def outcome(self) -> str:
        """Mean Dice of the validation cases by label, where there are any."""
        if self.preview:
            return "augmented patches with their masks"
        dice = [
            f"{name.removeprefix('validation_dice_')} {value:.3f}"
            for name, value in self.metrics.items()
            if name.startswith("validation_dice_") and isinstance(value, float)
        ]
        return f"a model, validation Dice: {', '.join(dice)}" if dice else "a model"

    @property
    def goal(self) -> Path | None:
        return Path(self.preview) if self.preview else self.out

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.interrupted else SUCCESS

    def as_json(self) -> dict[str, Any]:
        hidden = (
            ("rank", "metrics", "sha256", "interrupted", "hint")
            if self.preview
            else ("rank", "preview")
        )
        content = RunReport.as_json(self)
        return {name: value for name, value in content.items() if name not in hidden}

    @property
    def is_silent(self) -> bool:
        return self.rank > 0

    @property
    def remark(self) -> str:
        if self.interrupted:
            return "interrupted: this is the best model so far; add --resume to continue"
        return self.hint


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QuantiseReport(RunReport):
    """What `quantise` added to a model, and what it costs.

    Args:
        validation: number of cases with the Dice of each label, or of images with their scores, by
            precision.
        seconds: of a patch, or of an image, by precision.
    """

    calibration: Mapping[str, int]
    validation: Mapping[str, Any]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    @property
    def item(self) -> str:
        """What `seconds` are of: a patch or an image."""
        return "image" if "images" in self.validation else "patch"

    @property
    def scores(self) -> Mapping[str, Mapping[str, float | None]]:
        """Heading → precision → score on the validation cases or images."""
        if "scores" in self.validation:
            return self.validation["scores"]
        return {f"Dice {label}": dice for label, dice in self.validation["dice"].items()}

    @property
    def outcome(self) -> str:
        return "int8 network, for `volseg infer --precision int8`"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ImportReport(RunReport):
    """What `import_nnunet` made; `model` says in words what the model is."""

    model: Mapping[str, str]
    sha256: str
    hint: str = ""  # what to know before the model is used

    @property
    def remark(self) -> str:
        return self.hint

    @property
    def outcome(self) -> str:
        return f"model {self.done[0]}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AttachReport(RunReport):
    """What `attach` made; `roles` says in words what each classifier does."""

    roles: Mapping[str, str]
    sha256: str

    @property
    def outcome(self) -> str:
        return f"model {self.done[0]} with {format_list(list(self.roles), 3)}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CandidatesReport(RunReport):
    """What `candidates` found: how many predicted lesions are matched, false, or neither.

    Args:
        n_partial: those on a reference lesion that another one is matched with.
    """

    n_matched: int
    n_false: int
    n_partial: int

    @property
    def outcome(self) -> str:
        counts = {"matched": self.n_matched, "false": self.n_false, "partial": self.n_partial}
        shown = ", ".join(f"{n} {name}" for name, n in counts.items() if n or name != "partial")
        return f"{format_count(sum(counts.values()), 'predicted lesion')}: {shown}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PagesReport(RunReport):
    """What `report` made.

    Args:
        page: path of report.html, or of the report of a scan, or of the folder of several.
        cases: whether these are reports of single scans or images.
    """

    page: str
    cases: bool = False

    @property
    def outcome(self) -> str:
        if self.cases:
            return format_count(len(self.done), "report")
        return f"{format_count(len(self.done), 'page')} rebuilt"

    @property
    def _kept_text(self) -> str:
        return f"{len(self.kept)} could not be rebuilt"

    @property
    def goal(self) -> Path | None:
        return Path(self.page)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MethodsReport(RunReport):
    """What `methods` says.

    Args:
        paragraphs: the text. sentences: those of text and checklist, with their keys.
        answers: of each item of the checklist, in order.
    """

    paragraphs: Sequence[str]
    sentences: Sequence[Statement]
    answers: Sequence[Answer]
    is_written: bool = False  # to `out`
    hint: str = ""  # how to get more answers

    @property
    def left_to_author(self) -> list[int]:
        """Numbers of the items of which no file says anything."""
        return [answer.item.number for answer in self.answers if not answer.is_answered]

    @property
    def outcome(self) -> str:
        n, n_partly = len(self.answers), sum(bool(answer.left) for answer in self.answers)
        n_answered = n - len(self.left_to_author)
        return f"{n_answered} of {n} items of CLAIM answered, {n_partly} of them in part"

    @property
    def goal(self) -> Path | None:
        return self.out if self.is_written else None

    @property
    def remark(self) -> str:
        return self.hint

    @property
    def _more_counts(self) -> dict[str, int | float]:
        return {"items": len(self.answers), "left_to_author": len(self.left_to_author)}

    def as_json(self) -> dict[str, Any]:
        content = RunReport.as_json(self)
        del content["is_written"], content["answers"]
        content["sentences"] = [
            {"text": line.text, "keys": list(line.keys), "items": list(line.items)}
            for line in self.sentences
        ]
        return content | {
            "checklist": [
                {
                    "number": answer.item.number,
                    "section": answer.item.section,
                    "asked": answer.item.asked,
                    "answer": answer.text,
                    "left": answer.left,
                    "keys": list(answer.keys),
                }
                for answer in self.answers
            ]
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EvaluateReport(RunReport):
    """What `evaluate` measured."""

    files: ClassVar[tuple[str, ...]] = (
        "evaluation.csv", "detections.csv", "metrics.csv", "summary.json", "agreement.png",
        "froc.png", "roc.png", "precision_recall.png", "calibration.png", "confusion.png",
        "decision.png", "report.html",
    )  # fmt: skip

    summary: Mapping[str, Any]  # content of summary.json

    @property
    def evaluation(self) -> DataFrame:
        """evaluation.csv: a row per case and label, or per case; see `volseg.read_table`."""
        return self._read_table("evaluation.csv")

    @property
    def metrics(self) -> DataFrame:
        """metrics.csv: a row per metric of classes or numbers, with its interval."""
        return self._read_table("metrics.csv")

    @property
    def detections(self) -> DataFrame:
        """detections.csv: a row per lesion of either mask."""
        return self._read_table("detections.csv")

    @property
    def outcome(self) -> str:
        """Number of cases, and mean Dice or the metrics of a classifier, with 95 % intervals."""
        if self.summary.get("headline"):
            return f"{format_count(len(self.done), 'case')}, {self.summary['headline']}"
        text, dice = format_count(len(self.done), "case"), self.summary.get("mean_dice")
        if dice is None:
            return text
        interval = self.summary.get("mean_dice_95")
        between = "" if interval is None else f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
        return f"{text}, mean Dice {dice:.3f}{between}"

    def _shown_table(self) -> DataFrame:
        return self.metrics if "headline" in self.summary else self.evaluation

    def as_json(self) -> dict[str, Any]:
        content = RunReport.as_json(self)
        return content | dict(content.pop("summary"))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompareReport(RunReport):
    """What `compare` did.

    Args:
        patients: rows of response.csv. unpaired: case → why it has no partner.
        not_listed: cases of each time point that the pairs do not name.
    """

    files: ClassVar[tuple[str, ...]] = ("response.csv", "comparison.csv", "report.html")

    patients: Sequence[Mapping[str, Any]]
    unpaired: Mapping[str, str] = field(default_factory=dict)
    not_listed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def responses(self) -> DataFrame:
        """response.csv: a row per patient; see `volseg.read_table`."""
        return self._read_table("response.csv")

    @property
    def changes(self) -> DataFrame:
        """comparison.csv: a row per pair of lesions, and per lesion without a partner."""
        return self._read_table("comparison.csv")

    @property
    def outcome(self) -> str:
        """Number of patients, and how many have each response."""
        compared = [row for row in self.patients if row.get("status") == "done"]
        responses = [str(row.get("response") or "no response") for row in compared]
        counts = [f"{responses.count(name)} {name}" for name in sorted(set(responses))]
        text = format_count(len(compared), "patient")
        text = f"{text}: {', '.join(counts)}" if counts else text
        n_alone = len(self.unpaired)
        return f"{text}, {n_alone} without a partner" if n_alone else text

    @property
    def _more_counts(self) -> dict[str, int | float]:
        return {"unpaired": len(self.unpaired)}

    def _shown_table(self) -> DataFrame:
        return self.responses


def totals_of_cases(cases: DataFrame) -> tuple[int, float]:
    """Return the number of lesions and their volume in mL, from rows of cases.csv."""
    n_lesions, volume_ml = cases[["n_lesions", "total_volume_ml"]].sum().tolist()
    return int(n_lesions), float(volume_ml)


def text_of_lesions(n: int, volume_ml: float, noun: str) -> str:
    """Return number and volume of lesions, or of what else they are called."""
    return f"{format_count(n, noun)}, {format_number(volume_ml, 3)} mL" if n else f"no {noun}"


def text_of(title: str, outcome: str, remarks: Sequence[str]) -> str:
    """Return what a result shows: its outcome, and the first of its failures and warnings."""
    lines = [f"{title}: {outcome}", *(f"  {remark}" for remark in remarks[:MAX_LINES])]
    more = len(remarks) - MAX_LINES
    return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])])


def html_of(text: str, frame: DataFrame | None) -> str:
    """Return a result as HTML for a notebook: its text and a table without empty columns."""
    parts = [f"<pre>{escape(text)}</pre>"]
    if frame is not None and len(frame):
        shown = frame.dropna(axis="columns", how="all")
        parts.append(shown.to_html(index=False, max_rows=MAX_ROWS, na_rep="", border=0))
    return "\n".join(parts)
