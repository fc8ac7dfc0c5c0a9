"""`volseg train`: train a model on a dataset or a prepared folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from volseg.commands.batch import input_paths
from volseg.commands.image_recipes import OF_IMAGES, is_of_images
from volseg.errors import VolsegError
from volseg.execution.cpu import idle_cores, keep_freed_memory, physical_cores
from volseg.execution.threads import Threads
from volseg.execution.time_budget import TimeBudget
from volseg.options import TrainOptions, command
from volseg.pages.scalars import Scalars
from volseg.reports import TrainReport
from volseg.store.outputs import OutputFolder

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.training.ranks import Team


@command(TrainOptions)
def train(options: TrainOptions) -> TrainReport:
    """Train a model on a dataset or a prepared folder.

    A time budget covers reading, preparing, planning, first pass, all folds, classifier,
    validation, pictures and export. If it is too short for networks that can learn, there are fewer
    folds, then a smaller network, then an error.

    Raises:
        VolsegError: cases cannot be used (the error lists all of them), the recipe does not fit the
            prepared folder, or the time budget is too short; then the error suggests one, and the
            prepared data are kept.

    Example:
        >>> import volseg
        >>> result = volseg.train("dataset", recipe="recipe.toml", out="trained", epochs=1)
        >>> (result.out / "model.json").is_file()
        True
    """
    started = time.monotonic() - options.spent_seconds
    time_budget = TimeBudget(seconds=options.time_budget_seconds, started=started)
    keep_freed_memory()
    from volseg.commands.training_call import Call, SteadyProgress
    from volseg.commands.training_run import run_training
    from volseg.inference.choose import choose_device
    from volseg.training.loop import serve
    from volseg.training.ranks import team_of

    if options.fold is not None and (options.folds or 1) > 1:
        problem = "--fold and --folds exclude each other"
        raise VolsegError(problem, fix="give one of them", code="E_USAGE")
    device = choose_device(options.device)
    with team_of(device, options.devices, serve, options.precision) as team:
        if team.rank > 0:  # under torchrun and SLURM every rank calls this function
            serve(team)
            return TrainReport(out=options.out, rank=team.rank)
        with (
            closing(Scalars(options.out / "tensorboard")) as scalars,
            _threads(team, time_budget) as threads,
        ):
            inputs = input_paths(options.dataset, options.recipe, options.init)
            call = Call(
                options=options,
                time=time_budget,
                progress=SteadyProgress(options.progress),
                team=team,
                scalars=scalars,
                outputs=OutputFolder(options.out, "train", inputs=inputs),
                threads=threads,
            )
            if is_of_images(options.dataset, options.recipe, options.target):
                from volseg.commands.image_training import run_image_training

                return run_image_training(call)
            options.refuse_stated(("prune", "teacher", "target"), OF_IMAGES)
            return run_training(call)


@contextmanager
def _threads(team: Team, time_budget: TimeBudget) -> Iterator[Threads | None]:
    """Yield a search for the fastest number of threads, if results need not be reproducible."""
    import torch

    if time_budget.seconds is None or team.size > 1 or team.fabric.device.type != "cpu":
        yield None
        return
    original = torch.get_num_threads()
    most = min(original, physical_cores())
    try:
        yield Threads(most, torch.set_num_threads, first=min(most, idle_cores()))
    finally:
        torch.set_num_threads(original)
