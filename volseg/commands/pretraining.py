"""`volseg pretrain`: pretrain the backbone of a 2D network on images without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from volseg.commands.image_data import ImageDataset
from volseg.commands.image_recipes import unlabelled_recipe
from volseg.commands.image_start import PRETRAINED
from volseg.commands.loaded_images import load_images
from volseg.commands.training_call import (
    PREPARED_FOLDER,
    WORK_FOLDER,
    SteadyProgress,
    history_name,
    refuse_finished,
)
from volseg.errors import VolsegError
from volseg.io.files import json_text, make_folder
from volseg.options import PretrainOptions, command
from volseg.recipe import ClassifyRecipe, as_any_recipe
from volseg.recipe.section import closed
from volseg.reports import TrainReport
from volseg.store.outputs import OutputFolder, delete_written
from volseg.store.tables import table

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.io.prepared_images import ImageSet
    from volseg.training.loop import Trained
    from volseg.training.ranks import Team
    from volseg.training.state import Epoch

CLASSIFIER_FILE = "classifier.safetensors"
COLLAPSED = 0.1  # spread of the projections below which all embeddings are nearly equal


@command(PretrainOptions)
def pretrain(options: PretrainOptions) -> TrainReport:
    """Train a network on images without labels, as a start for `train --init`.

    Raises:
        VolsegError: the dataset has no images, or the recipe is not one of a classifier.

    Example:
        >>> import volseg
        >>> result = volseg.pretrain("images", out="pretrained", epochs=1)
        >>> (result.out / "classifier.safetensors").is_file()
        True
    """
    from volseg.inference.choose import choose_device
    from volseg.training.loop import serve
    from volseg.training.ranks import team_of

    recipe = _recipe(options)
    outputs = OutputFolder(options.out, "train", inputs=[options.dataset])
    with outputs, team_of(choose_device(options.device), 1, serve, "fp32") as team:
        if any((options.out / WORK_FOLDER).glob("**/last.safetensors")):
            raise VolsegError(
                f"{options.out}: holds an interrupted training run",
                fix="give another --out, or delete it first; `volseg train --resume` continues one",
                code="E_EXISTS",
            )
        refuse_finished(options.out)
        outputs.check_overwrites([PRETRAINED, CLASSIFIER_FILE, history_name(0)])
        outputs.work_folder(WORK_FOLDER)
        return _Pretraining(options, outputs, team).run(recipe)


def _recipe(options: PretrainOptions) -> ClassifyRecipe:
    if options.recipe is None:
        return unlabelled_recipe(options.dataset)
    recipe = as_any_recipe(options.recipe)
    if not isinstance(recipe, ClassifyRecipe):
        raise VolsegError(
            f"recipe {recipe.name!r} is one of scans",
            fix='give one with task = "classify"',
            code="E_TASK",
        )
    return recipe


class _Pretraining:
    def __init__(self, options: PretrainOptions, outputs: OutputFolder, team: Team) -> None:
        self._options, self._outputs, self._team = options, outputs, team
        self._progress = SteadyProgress(options.progress)
        self._work = options.out / WORK_FOLDER

    def run(self, recipe: ClassifyRecipe) -> TrainReport:
        from volseg.training.schedule import Stop

        folder = self._work / PREPARED_FOLDER
        make_folder(folder)
        dataset = ImageDataset(
            self._options.dataset,
            recipe,
            seed=self._options.seed,
            progress=self._progress,
            announce=self._options.announce,
        )
        planned = dataset.plan(labelled=False)
        images = dataset.prepare(planned, folder)
        recipe = load_images(folder).recipe
        trained = self._train(images, recipe)
        self._write(trained, recipe)
        delete_written(folder)
        delete_written(self._work, lambda name: name.endswith(".safetensors"))
        return TrainReport(
            out=self._options.out,
            done=[recipe.name],
            failed=dict(planned.failed),
            warnings=[*planned.remarks, *_collapse(trained.metrics)],
            metrics=dict(trained.metrics),
            interrupted=trained.stop is Stop.INTERRUPTED,
            hint=f"start from it with: volseg train IMAGES --init {self._options.out}",
        )

    def _train(self, images: ImageSet, recipe: ClassifyRecipe) -> Trained:
        from volseg.training.loop import Watch, train_network
        from volseg.training.pretraining import PretrainObjective
        from volseg.training.run import Job
        from volseg.training.schedule import RunSettings

        seconds, epochs = self._options.time_budget_seconds, self._options.epochs
        settings = RunSettings(
            seed=self._options.seed,
            epochs=epochs or (closed(recipe.train.epochs) if seconds is None else None),
            patience=recipe.train.patience,
            seconds=seconds,
        )
        objective = PretrainObjective(images.of_split("train"), images.of_split("val"), recipe)
        watch = Watch(
            self._report, lambda doing, done: self._progress.tick("Pretraining", done, doing)
        )
        job = Job(objective=objective, settings=settings, checkpoints=self._work)
        return train_network(job, self._team, watch)

    def _report(self, history: Sequence[Epoch], done: float) -> None:
        from volseg.training.state import Epoch

        headings = {"validation_score": "validation_similarity_loss", "validation_loss": None}
        self._outputs.write(history_name(0), table(Epoch, history, headings))
        self._progress("Pretraining", done, f"epoch {len(history)}, loss {history[-1].loss:.3f}")

    def _write(self, trained: Trained, recipe: ClassifyRecipe) -> None:
        """Write the weights before the head, and what they expect."""
        from volseg.bundle import write_weights
        from volseg.training.pretraining import NETWORK

        weights = {
            name.removeprefix(NETWORK): tensor
            for name, tensor in trained.weights.items()
            if name.startswith(NETWORK) and not name.startswith(f"{NETWORK}head.")
        }
        with self._outputs.staged() as commit:
            write_weights(commit.folder, {"classifier": weights})
            facts = {"recipe": recipe.model_dump(mode="json"), "metrics": dict(trained.metrics)}
            commit.write(PRETRAINED, json_text(facts))
            commit.finish(last=PRETRAINED)


def _collapse(metrics: Mapping[str, Any]) -> list[str]:
    """Return a warning if the network maps all images to nearly the same embedding."""
    if metrics.get("spread", 1.0) >= COLLAPSED:
        return []
    return [
        f"W_COLLAPSED: the embeddings of all images are nearly equal (spread "
        f"{metrics['spread']:.2f}): lower train.learning_rate, or use more images"
    ]
