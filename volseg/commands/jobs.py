"""Loop over the items of a records folder: one job after another, and a failure becomes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from volseg.commands.batch import failure_reason
from volseg.errors import VolsegError
from volseg.execution.local import run
from volseg.options import CompareOptions, MeasureOptions
from volseg.store.records import ItemRow
from volseg.store.results import RecordFolder


class Job(Protocol):
    """The work on one item: a case or a patient; `inputs` are the SHA-256 of its files."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> Sequence[str]: ...

    def run(self, results: Any, /) -> Sequence[str]:
        """Do the work, commit the item's record and files to its folder, return its warnings."""
        ...

    def failed_row(self, reason: str) -> ItemRow:
        """Return the row of the item if the work failed."""
        ...


class Tally:
    """Which items of a call are done or failed so far, and the warnings of those done.

    Args:
        stage: name of the work in progress reports.
    """

    def __init__(
        self,
        results: RecordFolder[Any, Any],
        stage: str,
        options: CompareOptions | MeasureOptions,
    ) -> None:
        self._results, self._stage, self._options = results, stage, options
        self.done: list[str] = []
        self.failed: dict[str, str] = {}  # name → reason
        self.warnings: list[str] = []

    def run(self, jobs: Sequence[Job], refusals: Mapping[str, VolsegError]) -> None:
        """Run the jobs; one with a refusal, by name, fails with it."""

        def task(job: Job) -> Sequence[str]:
            if job.name in refusals:
                raise refusals[job.name]
            return job.run(self._results)

        for count, outcome in enumerate(run(task, jobs), start=1):
            job = outcome.item
            if outcome.error is None:
                self.done.append(job.name)
                self.warnings += (warnings := outcome.value or ())
                self._options.warn(*warnings)
            else:
                reason = failure_reason(self._results, job.name, outcome.error)
                self._results.commit_failure(job.failed_row(reason), job.inputs)
                self.failed[job.name] = reason
                self._options.report_failure(job.name, reason)
            self._options.progress(self._stage, count / len(jobs), job.name)
