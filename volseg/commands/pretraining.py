"""`volseg pretrain`: train the base of a 2D network on images without labels."""

from __future__ import annotations

from collections.abc import Sequence

from volseg.commands.image_data import ImageDataset, load_images, unlabelled_recipe
from volseg.commands.image_start import PRETRAINED
from volseg.commands.training_call import PREPARED_FOLDER, WORK_FOLDER, SteadyProgress, history_name
from volseg.errors import VolsegError
from volseg.io.files import json_text, make_folder
from volseg.options import PretrainOptions, command
from volseg.recipe import ClassifyRecipe, as_any_recipe
from volseg.recipe.section import closed
from volseg.reports import TrainReport
from volseg.store.outputs import OutputFolder, delete_written
from volseg.store.tables import table

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
    from volseg.bundle import write_weights
    from volseg.inference.choose import choose_device
    from volseg.training.loop import Watch, serve, train_network
    from volseg.training.pretraining import NETWORK, PretrainObjective
    from volseg.training.ranks import team_of
    from volseg.training.run import Job
    from volseg.training.schedule import RunSettings, Stop
    from volseg.training.state import Epoch

    recipe = unlabelled_recipe(options.dataset)
    if options.recipe is not None:
        given = as_any_recipe(options.recipe)
        if not isinstance(given, ClassifyRecipe):
            raise VolsegError(
                f"recipe {given.name!r} is one of scans",
                fix='give one with task = "classify"',
                code="E_TASK",
            )
        recipe = given
    progress = SteadyProgress(options.progress)
    outputs = OutputFolder(options.out, "train", inputs=[options.dataset])
    with outputs, team_of(choose_device(options.device), 1, serve, "fp32") as team:
        outputs.check_overwrites([PRETRAINED, CLASSIFIER_FILE, history_name(0)])
        outputs.work_folder(WORK_FOLDER)
        folder = options.out / WORK_FOLDER / PREPARED_FOLDER
        make_folder(folder)
        dataset = ImageDataset(
            options.dataset, recipe, seed=options.seed, progress=progress, announce=options.announce
        )
        planned = dataset.plan(labelled=False)
        images = dataset.prepare(planned, folder)
        recipe = load_images(folder).recipe
        objective = PretrainObjective(images.of_split("train"), images.of_split("val"), recipe)
        seconds = options.time_budget_seconds
        settings = RunSettings(
            seed=options.seed,
            epochs=options.epochs or (closed(recipe.train.epochs) if seconds is None else None),
            patience=10**6,
            seconds=seconds,
        )
        job = Job(objective=objective, settings=settings, checkpoints=options.out / WORK_FOLDER)

        def report(history: Sequence[Epoch], done: float) -> None:
            headings = {"validation_score": "validation_similarity_loss", "validation_loss": None}
            outputs.write(history_name(0), table(Epoch, history, headings))
            progress("Pretraining", done, f"epoch {len(history)}, loss {history[-1].loss:.3f}")

        trained = train_network(
            job, team, Watch(report, lambda doing, done: progress.tick("Pretraining", done, doing))
        )
        weights = {
            name.removeprefix(NETWORK): tensor
            for name, tensor in trained.weights.items()
            if name.startswith(NETWORK) and not name.startswith(f"{NETWORK}head.")
        }
        with outputs.staged() as commit:
            write_weights(commit.folder, {"classifier": weights})
            facts = {"recipe": recipe.model_dump(mode="json"), "metrics": dict(trained.metrics)}
            commit.write(PRETRAINED, json_text(facts))
            commit.finish(last=PRETRAINED)
        delete_written(folder)
        delete_written(options.out / WORK_FOLDER, lambda name: name.endswith(".safetensors"))
    warnings = list(planned.remarks)
    if trained.metrics.get("spread", 1.0) < COLLAPSED:
        warnings.append(
            f"W_COLLAPSED: the embeddings of all images are nearly equal (spread "
            f"{trained.metrics['spread']:.2f}): lower train.learning_rate, or use more images"
        )
    return TrainReport(
        out=options.out,
        done=[recipe.name],
        failed=dict(planned.failed),
        warnings=warnings,
        metrics=dict(trained.metrics),
        interrupted=trained.stop is Stop.INTERRUPTED,
        hint="start from it with: volseg train IMAGES --init " + str(options.out),
    )
