"""`volseg plan`, `preprocess` and `check` for classifiers of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.commands.image_data import ImageDataset
from volseg.commands.problems import Problem, problem_of
from volseg.errors import VolsegError
from volseg.io.files import make_folder, refuse_unsealed, write_sealed
from volseg.io.prepared_images import CASES_FILE, PIXELS_FILE
from volseg.io.targets import TargetCells
from volseg.options import PlanOptions, PreprocessOptions
from volseg.recipe import ClassifyRecipe, as_any_recipe
from volseg.recipe.classification import SCAN
from volseg.reports import PlanReport, PreprocessReport
from volseg.store.outputs import OutputFolder

if TYPE_CHECKING:  # torch takes seconds to import
    from volseg.image_bundle import ImageBundle

NOT_PLANNED = ("memory", "tilt")  # options that the plan of a classifier does not take into account
NOT_PLANNED_WHY = "the plan of a classifier of images does not depend on it"


def image_dataset(options: PlanOptions | PreprocessOptions, **callbacks: Any) -> ImageDataset:
    """Return the dataset that options name."""
    recipe = None if options.recipe is None else as_any_recipe(options.recipe)
    assert recipe is None or isinstance(recipe, ClassifyRecipe)
    return ImageDataset(options.dataset, recipe, options.target, options.seed, **callbacks)


def plan_images(options: PlanOptions) -> PlanReport:
    """Plan the training of a classifier, with a reason for each decision."""
    options.refuse_stated((*NOT_PLANNED, "time_budget_seconds"), NOT_PLANNED_WHY)
    from volseg.commands.planning import plan_text
    from volseg.training.check import check_image_recipe

    planned = image_dataset(options, progress=options.progress).plan()
    check_image_recipe(planned.closed.recipe)
    out = options.out
    if out is not None:
        refuse_unsealed(out)
        make_folder(out.parent)
        folds = options.folds or 1
        write_sealed(out, plan_text(planned.closed, out, options.dataset, folds))
    return PlanReport(
        out=options.dataset if out is None else out,
        done=[planned.closed.recipe.name],
        warnings=list(planned.remarks),
        recipe=planned.closed.recipe.model_dump(mode="json"),
        reasons=[line.model_dump() for line in planned.closed.reasons],
        cases=planned.fingerprint.n_images,
        folds=options.folds or 1,
        plan_file="" if out is None else str(out),
    )


def preprocess_images(options: PreprocessOptions) -> PreprocessReport:
    """Prepare images: one array of network inputs, and a JSON file of their cases."""
    options.refuse_stated(NOT_PLANNED, NOT_PLANNED_WHY)
    from volseg.training.check import check_image_recipe

    dataset = image_dataset(options, progress=options.progress, announce=options.announce)
    planned = dataset.plan()
    check_image_recipe(planned.closed.recipe)
    if planned.closed.recipe.data.input == SCAN:
        raise VolsegError(
            f"recipe {planned.closed.recipe.name!r}: slices of scans are embedded by the network "
            "that training is given",
            fix="give the dataset itself to `volseg train`, with --init WEIGHTS",
            code="E_USAGE",
        )
    options.warn(*planned.remarks)
    with OutputFolder(options.out, "preprocess", inputs=[options.dataset]) as outputs:
        outputs.check_overwrites([PIXELS_FILE, CASES_FILE])
        with outputs.staged() as commit:
            images = dataset.prepare(planned, commit.folder)
            commit.finish(last=CASES_FILE)
    facts = planned.fingerprint
    return PreprocessReport(
        out=options.out,
        done=[case.id for case in images.cases],
        failed=dict(planned.failed),
        warnings=list(planned.remarks),
        fingerprint={
            "n_images": facts.n_images,
            "n_validation": facts.n_validation,
            "median_edge": facts.median_edge,
            "pixels": planned.closed.recipe.images.pixels,
            "counts": facts.counts,
        },
    )


def target_problems(dataset: Path, recipe: ClassifyRecipe) -> Iterator[VolsegError]:
    """Yield what does not fit the recipe in the column that a dataset is to be learned from."""
    survey, recipe = ImageDataset(dataset, recipe).survey()
    name = recipe.data.target
    cells = TargetCells(name, {case.id: case.cells.get(name, "") for case in survey.cases})
    described = recipe.model_copy(update={"data": cells.describe(recipe.data)})
    for mistake in cells.values(described.data)[1]:
        yield VolsegError(
            mistake, fix="correct the cell, or data.classes in the recipe", code="E_TARGET"
        )


def check_image_model(path: Path) -> Iterator[Problem]:
    """Yield what is wrong with a model that classifies, and which classes it contradicts.

    Raises:
        VolsegError: its files are damaged.
    """
    from volseg.commands.baseline_tables import Beside
    from volseg.commands.checking_labels import label_problems
    from volseg.image_bundle import load_image_bundle

    bundle = load_image_bundle(path)
    for problem in _reference_problems(path, bundle):
        yield problem_of(str(path), problem)
    Beside.of(path, bundle.recipe.data)
    yield from label_problems(path, bundle.recipe.data)


def _reference_problems(path: Path, bundle: ImageBundle) -> Iterator[VolsegError]:
    """Yield how the outputs for the reference image differ from those of training."""
    import numpy as np

    from volseg.image_bundle import REFERENCE_TOLERANCE
    from volseg.inference.choose import choose_backend
    from volseg.inference.image_predictor import load_predictor
    from volseg.inference.openvino_backend import openvino_is_installed

    reference = bundle.reference
    if reference is None:
        return
    for backend in ("torch", *(["openvino"] if openvino_is_installed() else [])):
        choice = choose_backend(backend, "cpu", "fp32")
        predictor = load_predictor(bundle, choice, folder=path, n_images=1)
        (outputs,) = predictor.predict(reference.image[None]).outputs
        difference = float(np.abs(outputs - reference.outputs).max())
        if difference > REFERENCE_TOLERANCE * max(1.0, float(np.abs(reference.outputs).max())):
            yield VolsegError(
                f"{path}: the output for its reference image {reference.case_id!r} differs by "
                f"{difference:.3g} from that of training (backend {backend})",
                fix="copy the model again; if that does not help, report this machine and the "
                f"version of {backend}",
                code="E_REFERENCE",
            )
            return
