"""What the parts of a call of `train` share: its options, time, processes, outputs and warnings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.commands.image_start import PRETRAINED
from volseg.commands.planning import budget_of
from volseg.errors import VolsegError
from volseg.execution.threads import Threads
from volseg.execution.time_budget import TimeBudget
from volseg.options import Progress, TrainOptions
from volseg.pages.scalars import Scalars
from volseg.sizing import Budget
from volseg.store.outputs import OutputFolder

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.training.ranks import Team

WORK_FOLDER = ".training"  # inside a model folder while it is being trained
PREPARED_FOLDER = "prepared"  # inside the work folder
ROI_FOLDER = "roi"  # inside the work folder: cases and checkpoints of the coarse first pass
HISTORY_ROI = "history_roi.csv"
TICK_SECONDS = 5.0  # without a report, after which the next step or tile is reported


def history_name(number: int) -> str:
    """Return the file with the history of the network of this split."""
    return f"history{'' if number == 0 else f'_{number}'}.csv"


def refuse_finished(out: Path) -> None:
    """Refuse an output folder that holds a model, or a network of `volseg pretrain`.

    Raises:
        VolsegError: it does.
    """
    from volseg.bundle import DESCRIPTION  # torch takes seconds to import

    for name in (DESCRIPTION, PRETRAINED):
        if (out / name).exists():
            raise VolsegError(
                f"{out}: holds a finished model",
                fix="give another --out, or delete it first",
                code="E_EXISTS",
            )


class SteadyProgress:
    """A progress callback whose `tick` reports only after `TICK_SECONDS` without a report."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last = progress, time.monotonic()

    def __call__(self, stage: str, done: float, detail: str) -> None:
        self._last = time.monotonic()
        self._progress(stage, done, detail)

    def tick(self, stage: str, done: float, detail: str) -> None:
        if time.monotonic() - self._last >= TICK_SECONDS:
            self(stage, done, detail)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """A call of `train`, in the process that leads it."""

    options: TrainOptions
    time: TimeBudget
    progress: SteadyProgress
    team: Team
    scalars: Scalars
    outputs: OutputFolder
    threads: Threads | None
    warnings: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.options.out / WORK_FOLDER

    @property
    def prepared(self) -> Path:
        """The folder in which `train` prepares a dataset."""
        return self.work / PREPARED_FOLDER

    def checkpoints(self, number: int, n: int) -> Path:
        """Return the folder for the checkpoints of one of `n` networks."""
        return self.work if n == 1 else self.work / f"fold_{number}"

    def budget(self) -> Budget:
        """Return the memory budget; time is budgeted once the speed of a step is known."""
        half = self.team.precision != "32-true"
        return budget_of(
            self.options.device, self.options.memory, processes=self.team.size, half=half
        )

    def warn(self, *warnings: str) -> None:
        self.warnings.extend(warnings)
        self.options.warn(*warnings)
