"""Results of an earlier call of `train`, kept in its work folder for a resumed run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.commands.automatic_recipe import recipe_for
from volseg.commands.batch import REFUSE, case_files
from volseg.commands.preparing import read_header
from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.io.files import write_json_atomic
from volseg.io.layouts import survey_cases
from volseg.options import Progress
from volseg.recipe import Recipe, parse_recipe

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Closed

RECIPE_FILE, FITTED_FILE = "recipe.json", "fitted.json"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What fits the time budget: the number of networks, and their plan."""

    folds: int
    plan: Closed


def cached_recipe(dataset: Path, work: Path, progress: Progress, tilt: str = REFUSE) -> Recipe:
    """Derive the recipe from a dataset; reuse the stored one while no file changed.

    A file counts as changed if its size or modification time differs.

    Args:
        tilt: what becomes of tilted stacks: refuse or resample.
    """
    files = _dates(dataset)
    try:
        content = read_json(work / RECIPE_FILE)
        if (content["files"], content.get("tilt", REFUSE)) == (files, tilt):
            return parse_recipe(content["recipe"], where=str(work / RECIPE_FILE))
    except (OSError, ValueError, KeyError, TypeError, VolsegError):
        pass  # missing, or written by another version
    recipe = recipe_for(dataset, None, progress, tilt)
    content = {"files": files, "tilt": tilt, "recipe": recipe.model_dump(mode="json")}
    write_json_atomic(work / RECIPE_FILE, content)
    return recipe


def _dates(dataset: Path) -> dict[str, list[int]]:
    """Return size and modification time of every file on which the recipe depends."""
    cases = survey_cases(dataset).cases
    paths = list(chain(*map(case_files, cases)))
    paths += [dataset] if dataset.is_file() else [dataset / "cases.csv", dataset / "dataset.json"]
    facts = {str(path): path.stat() for path in paths if path.is_file()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in facts.items()}


def write_fitted(work: Path, fitted: Fitted) -> None:
    """Store the fitted plan for a resumed run."""
    content = {"folds": fitted.folds, "plan": fitted.plan.as_json()}
    write_json_atomic(work / FITTED_FILE, content)


def read_fitted(work: Path) -> Fitted | None:
    """Read the fitted plan of an interrupted run; None without a time budget or plan yet."""
    from volseg.planning.close import Closed

    try:
        content = read_json(work / FITTED_FILE)
        return Fitted(folds=int(content["folds"]), plan=Closed.from_json(content["plan"]))
    except (OSError, ValueError, KeyError, TypeError, VolsegError):
        return None


def earlier_plan(prepared: Path) -> Closed | None:
    """Read the plan with which an interrupted run prepared its data; None if it had none yet."""
    from volseg.planning.close import Closed

    try:
        return Closed.from_json(read_header(prepared)["plan"])
    except (ValueError, KeyError, TypeError, VolsegError):
        return None
