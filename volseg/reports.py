"""What each command did, as values, and the tables that it wrote, as data frames.

A data frame is read from its file on each access, and holds every case of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

SUCCESS, SOME_FAILED, NONE_SUCCEEDED, INTERRUPTED = 0, 3, 4, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a command did with its cases."""

    out: Path
    done: Sequence[str] = ()
    kept: Sequence[str] = ()  # complete from an earlier call
    failed: Mapping[str, str] = field(default_factory=dict)  # case → code and reason
    warnings: Sequence[str] = ()

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
    def late_warnings(self) -> Sequence[str]:
        """Warnings that were not announced while the command ran."""
        return self.warnings

    @property
    def remark(self) -> str:
        """A last sentence for the user."""
        return ""

    def _read_table(self, name: str) -> DataFrame:
        from volseg.store.tables import read_table  # `volseg --help` imports this file

        return read_table(self.out / name)

    def as_json(self) -> dict[str, Any]:
        """Return the content that `--json` prints."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content |= {"out": str(self.out), "exit_code": self.exit_code}
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class CasesReport(RunReport):
    """What `infer` or `measure` did.

    Args:
        objects: `components` or `labels`. pages: whether report.html was written.
        computed_with: backend and precision of the network; empty without one.
    """

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

    def as_json(self) -> dict[str, Any]:
        content = RunReport.as_json(self)
        if not self.computed_with:
            del content["computed_with"]
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessReport(RunReport):
    fingerprint: Mapping[str, Any]  # of the dataset, in a few numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingReport(RunReport):
    """The cases that were recognised; `masks` is the number of those with a mask."""

    masks: int
    channels: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport(RunReport):
    """What `train` did.

    Args:
        preview: path of the picture, if only that was asked for.
        rank: of this process in a team of several.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""  # of the model
    preview: str = ""
    interrupted: bool = False
    rank: int = 0

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.interrupted else SUCCESS

    def as_json(self) -> dict[str, Any]:
        hidden = (
            ("rank", "metrics", "sha256", "interrupted") if self.preview else ("rank", "preview")
        )
        content = RunReport.as_json(self)
        return {name: value for name, value in content.items() if name not in hidden}

    @property
    def is_silent(self) -> bool:
        return self.rank > 0

    @property
    def late_warnings(self) -> Sequence[str]:
        return ()

    @property
    def remark(self) -> str:
        if not self.interrupted:
            return ""
        return "interrupted: this is the best model so far; add --resume to continue"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantiseReport(RunReport):
    calibration: Mapping[str, int]
    validation: Mapping[str, Any]
    seconds_per_patch: Mapping[str, float]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport(RunReport):
    model: Mapping[str, str]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesReport(RunReport):
    page: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReport(RunReport):
    summary: Mapping[str, Any]  # content of summary.json

    @property
    def evaluation(self) -> DataFrame:
        """evaluation.csv: a row per case and label; see `volseg.read_table`."""
        return self._read_table("evaluation.csv")

    @property
    def detections(self) -> DataFrame:
        """detections.csv: a row per lesion of either mask."""
        return self._read_table("detections.csv")

    def as_json(self) -> dict[str, Any]:
        content = RunReport.as_json(self)
        return content | dict(content.pop("summary"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport(RunReport):
    """What `compare` did.

    Args:
        patients: rows of response.csv. unpaired: case → why it has no partner.
        not_listed: cases of each time point that the pairs do not name.
    """

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
