"""The steps of `volseg train` for images: data, plan, networks, judgement, model, pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volseg.bundle import DESCRIPTION
from volseg.commands.checking_labels import LABEL_CODE, VALIDATION, label_summary
from volseg.commands.image_data import ImageDataset
from volseg.commands.image_planning import NOT_PLANNED, NOT_PLANNED_WHY
from volseg.commands.image_recipes import refuse_other_target
from volseg.commands.image_splits import fold_of_groups
from volseg.commands.image_start import Start, seen_by
from volseg.commands.image_time import ImageTime
from volseg.commands.loaded_images import LoadedImages, listing_digest, load_images
from volseg.commands.seen_images import SEEN, write_seen
from volseg.commands.training_call import (
    PREPARED_FOLDER,
    WORK_FOLDER,
    Call,
    history_name,
    refuse_finished,
)
from volseg.errors import VolsegError, without_notes
from volseg.evaluation.classes import SCORES
from volseg.evaluation.fusion import Fusion, cross_fused, fit_fusion
from volseg.evaluation.label_errors import doubtful_labels
from volseg.image_bundle import (
    ENCODER,
    ImageBundle,
    Judgement,
    Reference,
    classifier_name,
    load_image_bundle,
    save_image_bundle,
)
from volseg.inference.images import embed_images, predict_outputs, to_predictions
from volseg.inference.slices import SliceEncoder
from volseg.io.csv_text import write_csv
from volseg.io.files import TEMPORARY_PREFIX, make_folder
from volseg.io.prepared_images import ImageSet, has_prepared_images
from volseg.networks import build_slices, copy_weights, unique_tensors
from volseg.networks.image_network import PLANES_NDIM, ImageNetwork
from volseg.options.training import MAX_FOLDS
from volseg.pages.training_figures import curves_png, images_png
from volseg.recipe import ClassifyRecipe, as_any_recipe
from volseg.recipe.classification import CLASSES, NUMBER, SCAN
from volseg.recipe.section import closed
from volseg.reports import TrainReport
from volseg.store.outputs import delete_written
from volseg.store.tables import cell, table
from volseg.training.baselines import Baseline, fit_baselines, save_baselines
from volseg.training.check import check_image_recipe
from volseg.training.image_features import first_planes
from volseg.training.images import ImageObjective, Outputs, Taught, known_targets
from volseg.training.judge import judge
from volseg.training.loop import Trained, Watch, train_network
from volseg.training.objective import Weights
from volseg.training.run import BEST, LAST, Job
from volseg.training.schedule import RunSettings, Stop
from volseg.training.state import Epoch

CURVES = "curves.png"
FUSION_FOLDS = 5  # of the validation lesions, to judge a fusion on lesions that are new to it
BASELINES = ("baselines.json", "baselines.safetensors")
PREVIEW, PREVIEWED, PREVIEW_STEPS = "preview.png", 24, 6  # images drawn, of so many steps


def run_image_training(call: Call) -> TrainReport:
    """Train the classifier of a call of `train`, and write it."""
    return _ImageTraining(call).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Fold:
    """A network with the images that it was validated on."""

    trained: Trained
    validation: ImageSet
    number: int
    outputs: Outputs  # of the validation images


class _ImageTraining:
    def __init__(self, call: Call) -> None:
        self._call, self._options, self._time = call, call.options, ImageTime(call)
        init, teacher = call.options.init, call.options.teacher
        call.options.refuse_stated(NOT_PLANNED, NOT_PLANNED_WHY)
        if call.options.prune is not None and init is None:
            raise VolsegError(
                "--prune removes channels of a trained network, and --init names none",
                fix="add --init MODEL",
                code="E_USAGE",
            )
        self._start = None if init is None else Start.read(init)
        if self._start is not None and call.options.prune:
            self._start = self._start.pruned(call.options.prune)
        self._teacher = None if teacher is None else load_image_bundle(teacher)
        self._answers: dict[str, np.ndarray] = {}  # case id → outputs of the teacher
        self._encoder: SliceEncoder | None = None  # of the slices of scans

    def run(self) -> TrainReport:
        call, options = self._call, self._options
        if call.team.size > 1:
            raise VolsegError(
                "a classifier is trained on one device",
                fix="leave out --devices",
                code="E_USAGE",
            )
        with call.outputs:
            self._open()
            data = self._data()
            check_image_recipe(data.recipe)
            if options.preview:
                return self._preview(data)
            folds = self._train_all(data)
            bundle = self._write(data, folds)
            self._draw(folds, data.recipe)
            is_interrupted = any(fold.trained.stop is Stop.INTERRUPTED for fold in folds)
            if not is_interrupted:
                delete_written(call.prepared)
                delete_written(call.work, _is_intermediate)
        return TrainReport(
            out=options.out,
            done=[data.recipe.name],
            warnings=call.warnings,
            metrics=dict(bundle.metrics),
            sha256=bundle.sha256,
            interrupted=is_interrupted,
        )

    def _open(self) -> None:
        """Check that `out` can take the model, and open the work folder."""
        out, resume = self._options.out, self._options.resume
        unfinished = self._has_checkpoints
        if unfinished and not resume:
            raise VolsegError(
                f"{out}: holds an interrupted training run",
                fix="add --resume to continue, or give another --out to start over",
                code="E_EXISTS",
            )
        if not unfinished:
            refuse_finished(out)
        networks = [*map(classifier_name, range(MAX_FOLDS)), ENCODER]
        names = [f"{name}.safetensors" for name in networks]
        histories = [history_name(number) for number in range(MAX_FOLDS)]
        self._call.outputs.check_overwrites(
            [
                *(DESCRIPTION, "card.md", *names, *histories, VALIDATION, SEEN, CURVES, PREVIEW),
                *BASELINES,
            ]
        )
        self._call.outputs.work_folder(WORK_FOLDER)
        self._call.progress("Starting", 0.0, str(self._options.dataset))

    @property
    def _has_checkpoints(self) -> bool:
        """Whether there are checkpoints of an interrupted run."""
        return any(path.is_file() for path in self._call.work.glob(f"**/{LAST}"))

    def _data(self) -> LoadedImages:
        """Prepare the dataset in the work folder, or load prepared images."""
        options, folder = self._options, self._options.dataset
        recipe = None if options.recipe is None else as_any_recipe(options.recipe)
        assert recipe is None or isinstance(recipe, ClassifyRecipe)
        is_resumed = False
        if not has_prepared_images(folder):
            folder = self._call.prepared
            is_resumed = options.resume and self._has_checkpoints and has_prepared_images(folder)
            if not is_resumed:
                self._prepare(recipe, folder)
        data = load_images(folder)
        if is_resumed and listing_digest(options.dataset, data.recipe) != data.listing:
            raise self._not_resumed("the data set, or what it says of its images, is another")
        refuse_other_target(options.target, data.recipe)
        if recipe is not None:
            try:
                data = data.with_training_of(recipe, folder, seen=seen_by(self._start))
            except VolsegError:
                if is_resumed:
                    raise self._not_resumed("[data] or [images] of the recipe differ") from None
                raise
        self._check_encoder(data)
        self._call.warn(*data.warnings)
        return replace(data, recipe=self._pruned(data.recipe))

    def _not_resumed(self, difference: str) -> VolsegError:
        return VolsegError(
            f"{self._options.out}: --resume continues a run that was started with other images: "
            f"{difference}",
            fix="give the data set and recipe of that run, or another --out to start over",
            code="E_PREPARED",
        )

    def _prepare(self, recipe: ClassifyRecipe | None, folder: Path) -> None:
        options = self._options
        make_folder(folder)
        dataset = ImageDataset(
            options.dataset,
            recipe,
            options.target,
            seed=options.seed,
            start=self._start,
            teacher=None if self._teacher is None else self._teacher.recipe,
            progress=self._time.guarded(),
            announce=options.announce,
        )
        planned = dataset.plan()
        dataset.prepare(planned, folder, self._encoder_of(planned.closed.recipe))

    def _check_encoder(self, data: LoadedImages) -> None:
        """Refuse embeddings of scans that another network made."""
        encoder = self._encoder_of(data.recipe)
        if encoder is not None and encoder.digest != data.encoder:
            raise self._not_resumed("the weights of --init, which embedded the slices, differ")

    def _encoder_of(self, recipe: ClassifyRecipe) -> SliceEncoder | None:
        """Return the network that embeds the slices of scans; None for images.

        Raises:
            VolsegError: there are no weights for it, or they do not fit.
        """
        if recipe.data.input != SCAN:
            return None
        if self._start is None:
            raise VolsegError(
                f'recipe {recipe.name!r}: input = "scan" embeds slices with a network that is not '
                "trained, and no weights are given for it",
                fix="add --init WEIGHTS, or a model of slices that `volseg train` made",
                code="E_USAGE",
            )
        if self._encoder is None:
            network = build_slices(recipe)
            weights, lines = self._start.adapted_to(network)
            for line in lines:
                self._options.announce(line)
            copy_weights(network, unique_tensors(network) | dict(weights))
            self._encoder = SliceEncoder(network, recipe.infer, self._call.team.fabric.device)
        return self._encoder

    def _pruned(self, recipe: ClassifyRecipe) -> ClassifyRecipe:
        """Return the recipe with the smaller network that --prune leaves."""
        if not self._options.prune:
            return recipe
        assert self._start is not None and self._start.network is not None
        network = self._start.network
        if recipe.network.name != network.name:
            raise VolsegError(
                f"--prune leaves a smaller {network.name}, and the recipe has the network "
                f"{recipe.network.name!r}",
                fix=f'set name = "{network.name}" under [network], or give no recipe',
                code="E_USAGE",
            )
        return recipe.model_copy(update={"network": network})

    def _splits(self, data: LoadedImages) -> list[tuple[int, ImageSet, ImageSet]]:
        """Return number, training and validation images of each network."""
        options, images = self._options, data.images
        n = options.folds or 1
        if n == 1 and options.fold is None:
            return [(0, images.of_split("train"), images.of_split("val"))]
        groups = {case.id: case.group for case in images.cases}
        values = {case.id: case.target for case in images.cases}
        folds = fold_of_groups(groups, values, n if n > 1 else 5, options.seed)
        numbers = range(n) if options.fold is None else [options.fold]
        fold_of_image = np.array([folds[case.id] for case in images.cases])
        return [
            (
                number,
                images.take(np.flatnonzero(fold_of_image != number).tolist()),
                images.take(np.flatnonzero(fold_of_image == number).tolist()),
            )
            for number in numbers
        ]

    def _preview(self, data: LoadedImages) -> TrainReport:
        """Draw augmented training images with their targets; train nothing."""
        training, recipe = data.images.of_split("train"), data.recipe
        if recipe.data.input == SCAN:
            raise VolsegError(
                "--preview draws training images, and a recipe of scans trains on embeddings",
                fix="leave out --preview",
                code="E_USAGE",
            )
        objective = ImageObjective(training, training, recipe)
        batches = objective.batches(self._options.seed, torch.device("cpu"))
        with batches:
            parts = [pair for step in range(PREVIEW_STEPS) for pair in batches.at(step)]
        images = np.concatenate([part.numpy() for part, _ in parts])[:PREVIEWED]
        if images.ndim == PLANES_NDIM:
            images = images[:, 0]
        targets = np.concatenate([part.numpy() for _, part in parts])[:PREVIEWED]
        titles = [_target_text(row, recipe) for row in targets]
        self._call.outputs.write(PREVIEW, images_png(list(images), titles))
        return TrainReport(
            out=self._options.out,
            done=[recipe.name],
            warnings=self._call.warnings,
            preview=str(self._options.out / PREVIEW),
        )

    def _train_all(self, data: LoadedImages) -> list[_Fold]:
        """Train a network per split, until Ctrl-C ends one."""
        folds, splits = list[_Fold](), self._splits(data)
        self._ask_teacher(data.images, data.recipe)
        if not (self._options.resume and self._has_checkpoints):
            self._time.check(self._objective(*splits[0][1:], data.recipe), len(splits))
        for split in splits:
            folds.append(self._train(*split, data.recipe))
            if folds[-1].trained.stop is Stop.INTERRUPTED:
                break
        return folds

    def _train(
        self, number: int, training: ImageSet, validation: ImageSet, recipe: ClassifyRecipe
    ) -> _Fold:
        options, call = self._options, self._call
        n = options.folds or 1
        objective = self._objective(training, validation, recipe)
        make_folder(folder := call.checkpoints(number, n))
        left = self._time.left(recipe)
        seconds = None if left is None else left / (n - number if n > 1 else 1)
        settings = RunSettings(
            seed=options.seed,
            epochs=options.epochs or (closed(recipe.train.epochs) if seconds is None else None),
            patience=options.patience or recipe.train.patience,
            seconds=seconds,
            freeze=options.freeze,
        )
        job = Job(
            objective=objective,
            settings=settings,
            checkpoints=folder,
            initial=self._initial(objective),
            resume=options.resume,
        )
        stage = f"Training fold {number + 1} of {n}" if n > 1 else "Training"
        call.progress(
            stage, 0.0, f"{len(training)} training and {len(validation)} validation images"
        )
        watch = Watch(
            report=partial(self._report, stage, history_name(number if n > 1 else 0), objective),
            tick=lambda doing, done: call.progress.tick(stage, done, doing),
            threads=call.threads,
        )
        trained = train_network(job, call.team, watch)
        # An interrupted run has not validated its best weights, which takes little time.
        rows = trained.validation or objective.validation(
            call.team.fabric.device, None, lambda doing: None
        ).validate_all(trained.weights)
        return _Fold(trained, validation, number, rows[0])

    def _objective(
        self, training: ImageSet, validation: ImageSet, recipe: ClassifyRecipe
    ) -> ImageObjective:
        taught = None
        if self._teacher is not None:
            outputs = np.stack([self._answers[case.id] for case in training.cases])
            taught = Taught(outputs, self._teacher.sha256)
        starts_trained = self._start is not None and recipe.data.input != SCAN
        return ImageObjective(training, validation, recipe, starts_trained, taught)

    def _ask_teacher(self, images: ImageSet, recipe: ClassifyRecipe) -> None:
        """Have the teacher, which must see and name the same as the student, judge all images."""
        if self._teacher is None:
            return
        other = self._teacher.recipe
        for what, mine, its in (
            ("classes", recipe.data.names, other.data.names),
            ("kind of target", recipe.data.kind, other.data.kind),
            ("[images]", recipe.images, other.images),
        ):
            if mine != its:
                raise VolsegError(
                    f"{self._options.teacher}: its {what} differ from those of the student",
                    fix="give a recipe with the teacher's [data] and [images], or none",
                    code="E_TEACHER",
                )
        device = self._call.team.fabric.device
        networks = [network.to(device) for network in self._teacher.networks()]
        size = other.infer.batch_size
        for start in range(0, len(images), size):
            part = images.pixels[start : start + size]
            answers = np.mean(
                [predict_outputs(network, part, other.infer, device) for network in networks], 0
            )
            cases = images.cases[start : start + size]
            self._answers |= dict(zip((case.id for case in cases), answers, strict=True))
            done = start + len(cases)
            self._call.progress("Asking the teacher", done / len(images), f"{done} images")

    def _initial(self, objective: ImageObjective) -> Weights:
        if self._start is None or not objective.starts_trained:
            return {}
        weights, lines = self._start.adapted_to(objective.network())
        for line in lines:
            self._options.announce(line)
        return weights

    def _report(
        self,
        stage: str,
        name: str,
        objective: ImageObjective,
        history: Sequence[Epoch],
        done: float,
    ) -> None:
        headings = {"validation_score": objective.score_name}
        self._call.outputs.write(name, table(Epoch, history, headings))
        epoch = history[-1]
        values = {key: value for key, value in asdict(epoch).items() if value is not None}
        self._call.scalars.add(name.removesuffix(".csv"), epoch.step, values)
        scores = [line.validation_score for line in history if line.validation_score is not None]
        score = f"{objective.score_name} {scores[-1]:.3f}, " if scores else ""
        text = f"epoch {epoch.epoch}, loss {epoch.loss:.3f}, {score}"
        self._call.progress(stage, done, f"{text}{epoch.steps_per_second:.3g} steps/s")

    def _write(self, data: LoadedImages, folds: Sequence[_Fold]) -> ImageBundle:
        """Judge the networks on the images that they were not trained on; write the model."""
        recipe, device = data.recipe, self._call.team.fabric.device
        weights: dict[str, Weights] = {
            classifier_name(index): fold.trained.weights for index, fold in enumerate(folds)
        }
        if self._encoder is not None:
            weights[ENCODER] = self._encoder.weights
        bundle = ImageBundle(recipe, data.fingerprint, weights, reasons=data.reasons)
        networks = bundle.networks()
        fusion, folds = _fused(folds, recipe)
        judgement, metrics = _judged(folds, networks[0].to(device), data, device)
        judgement = replace(judgement, fusion=fusion)
        facts: dict[str, Any] = {"networks": len(folds)}
        if len(folds) == 1:
            facts = dict(folds[0].trained.metrics)
        facts["training_images"] = data.fingerprint.n_images
        baselines, scores = self._baselines(data)
        facts |= scores | self._doubtful(folds, recipe, judgement.temperature)
        if warnings := without_notes(self._call.warnings):
            facts["warnings"] = "; ".join(warnings)
        bundle = replace(
            bundle,
            judgement=judgement,
            reference=_reference(folds[0], networks, recipe, device),
            metrics=facts | metrics,
        )
        with self._call.outputs.staged() as commit:
            save_image_bundle(bundle, commit.folder)
            if baselines:
                save_baselines(baselines, commit.folder)
            commit.write(VALIDATION, _validation_table(folds, recipe, judgement.temperature))
            commit.write(SEEN, partial(write_seen, keys=_learned_from(data, folds)))
            commit.finish(last=DESCRIPTION)
        return load_image_bundle(self._options.out)

    def _doubtful(
        self, folds: Sequence[_Fold], recipe: ClassifyRecipe, temperature: float
    ) -> dict[str, int]:
        """Return how many validation images may have a wrong class, and warn of them."""
        if recipe.data.kind != CLASSES:
            return {}
        logits, targets = _outputs(folds)
        probabilities = to_predictions(logits, recipe.data, temperature)
        n = len(doubtful_labels(probabilities, targets.argmax(axis=1)))
        if n:
            advice = f"`volseg check {self._options.out}` lists them"
            self._call.warn(f"{LABEL_CODE}: {label_summary(n, len(targets))}; {advice}")
        return {"doubtful_labels": n}

    def _baselines(self, data: LoadedImages) -> tuple[list[Baseline], dict[str, Any]]:
        """Fit the baselines on the training split; return them and their validation scores."""
        recipe, kind = data.recipe, str(data.recipe.data.kind)
        training, validation = (data.images.of_split(split) for split in ("train", "val"))
        if not recipe.train.baselines:
            return [], {}
        seconds = self._time.baselines(recipe)
        self._call.progress("Fitting baselines", 0.0, f"at most {seconds:.0f} s")
        baselines = fit_baselines(
            first_planes(training.pixels),
            known_targets(training, recipe),
            kind,  # type: ignore[arg-type]
            seed=self._options.seed,
            seconds=seconds,
            n_classes=recipe.data.n_outputs,
        )
        scores: dict[str, Any] = {}
        score, truth = SCORES[str(recipe.train.monitor)], known_targets(validation, recipe)
        for baseline in baselines:
            name = f"baseline_{baseline.name}_{recipe.train.monitor}"
            if baseline.reason:
                scores[name] = baseline.reason
                continue
            predicted = baseline.predict(first_planes(validation.pixels))
            value = score(predicted, truth > 0 if truth.ndim == 2 else truth)
            if value is not None:
                scores[name] = round(value, 4)
        return baselines, scores

    def _draw(self, folds: Sequence[_Fold], recipe: ClassifyRecipe) -> None:
        monitor = str(recipe.train.monitor)
        limits = None if recipe.data.kind == NUMBER or monitor == "log_loss" else (0.0, 1.0)
        histories = [fold.trained.history for fold in folds]
        title = f"validation {monitor.replace('_', ' ')}"
        self._call.outputs.write(CURVES, curves_png(histories, title, limits))


def _target_text(target: np.ndarray, recipe: ClassifyRecipe) -> str:
    """Return the number, or the classes with their parts if images were mixed."""
    data = recipe.data
    if data.kind == NUMBER:
        return f"{to_predictions(target[None], data)[0, 0]:.4g}"
    parts = [(name, part) for name, part in zip(data.names, target, strict=True) if part > 0]
    return ", ".join(name if part == 1 else f"{part:.0%} {name}" for name, part in parts)


def _fused(folds: Sequence[_Fold], recipe: ClassifyRecipe) -> tuple[Fusion | None, Sequence[_Fold]]:
    """Fit the fusion on validation lesions; return it, and the folds with fused outputs.

    Those of a lesion come from a fusion that was fitted without its patient.

    Raises:
        VolsegError: there are too few lesions of a class.
    """
    settings = recipe.fusion
    if settings is None:
        return None, folds
    names, l2 = settings.measurements, settings.l2
    logits, targets = _outputs(folds)
    positive = targets.argmax(axis=1) == 1
    measurements = np.concatenate([fold.validation.measurements(names) for fold in folds])
    groups = [case.group for fold in folds for case in fold.validation.cases]
    keys = {str(n): group for n, group in enumerate(groups)}
    values = {str(n): int(value) for n, value in enumerate(positive)}
    numbers = fold_of_groups(keys, values, FUSION_FOLDS, seed=0)
    parts = np.array([numbers[str(n)] for n in range(len(groups))])
    try:
        fusion = fit_fusion(logits, measurements, positive, names, l2=l2)
        fused = cross_fused(logits, measurements, positive, parts, l2=l2)
    except ValueError as error:
        raise VolsegError(
            f"the validation lesions are too few for [fusion]: {error}",
            fix="add --folds 5, so that all lesions are validated, or leave [fusion] out",
            code="E_DATASET",
        ) from error
    ends = np.cumsum([len(fold.validation) for fold in folds])[:-1]
    return fusion, [
        replace(fold, outputs=replace(fold.outputs, logits=part.astype(np.float32)))
        for fold, part in zip(folds, np.split(fused, ends), strict=True)
    ]


def _outputs(folds: Sequence[_Fold]) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs of the validation images of all networks, and their targets."""
    logits = np.concatenate([fold.outputs.logits for fold in folds])
    return logits, np.concatenate([fold.outputs.targets for fold in folds])


def _learned_from(data: LoadedImages, folds: Sequence[_Fold]) -> list[str]:
    """Return the keys of the images that a network learned from: of several folds, all."""
    held_out = {case.id for case in folds[0].validation.cases} if len(folds) == 1 else set()
    return [case.sha256 for case in data.images.cases if case.id not in held_out]


def _judged(
    folds: Sequence[_Fold], network: ImageNetwork, data: LoadedImages, device: torch.device
) -> tuple[Judgement, dict[str, Any]]:
    """Judge all networks on their validation images; embed those of the first for outliers.

    What is usual is learned from the images that the first network was trained on, so that its
    validation images are as new to it as those to come.
    """
    recipe, validation = data.recipe, folds[0].validation
    held_out = {case.id for case in validation.cases}
    training = data.images.take(
        [n for n, case in enumerate(data.images.cases) if case.id not in held_out]
    )
    embeddings = [
        embed_images(network, images.pixels, recipe.infer, device)
        for images in (training, validation)
    ]
    return judge(
        *_outputs(folds),
        recipe,
        embeddings=(embeddings[0], embeddings[1]),
        training_targets=[case.target for case in training.cases],
    )


def _reference(
    fold: _Fold, networks: Sequence[torch.nn.Module], recipe: ClassifyRecipe, device: torch.device
) -> Reference:
    """Return the first validation image with the outputs of the whole model for it."""
    from volseg.inference.images import predict_outputs

    image = fold.validation.pixels[:1]
    outputs = [
        predict_outputs(network.to(device), image, recipe.infer, device) for network in networks
    ]
    name = fold.validation.cases[0].id
    return Reference(name, np.array(image[0]), np.mean(outputs, axis=0)[0])


def _validation_table(folds: Sequence[_Fold], recipe: ClassifyRecipe, temperature: float) -> Any:
    """Return a function that writes a row per validation image: its target and prediction."""
    data = recipe.data
    outputs = ["value"] if data.kind == NUMBER else [f"probability_{name}" for name in data.names]

    def write(file: Any) -> None:
        write_csv(file, [["case_id", "patient", "fold", "target", *outputs]])
        for fold in folds:
            predictions = to_predictions(fold.outputs.logits, data, temperature)
            write_csv(
                file,
                (
                    [
                        *(case.id, case.patient, str(fold.number)),
                        case.cells.get(data.target, ""),
                        *(cell(float(value)) for value in row),
                    ]
                    for case, row in zip(fold.validation.cases, predictions, strict=True)
                ),
            )

    return write


def _is_intermediate(name: str) -> bool:
    """Tell whether a file in the work folder serves only to resume, or is a temporary of one."""
    names = "|".join(map(re.escape, (LAST, BEST)))
    temporary = rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{16}}"
    prepared = rf"{re.escape(PREPARED_FOLDER)}/images\.(npy|json)"
    return re.fullmatch(rf"([^/]+/)?({names}|{temporary})|{prepared}", name) is not None
