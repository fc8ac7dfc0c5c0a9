"""Compare a classifier with its int8 network, a pruned one and a student on the test split.

    python benchmarks/compress_classifier.py MODEL DATASET [--pruned FOLDER] [--student FOLDER]

MODEL is a trained classifier of two or more classes, with an int8 network (`volseg quantise MODEL
DATASET`; made first if missing); the others were trained from it (`volseg train --init MODEL
--prune 0.5`, `volseg train --teacher MODEL`). All run with OpenVINO on the CPU. Each is given the
same images, which its own recipe converts; a batch of each runs in turn, and the speed is the
median of the ratios to fp32 within one turn. Multiply-adds are those of convolutions and linear
layers for one image. The test split is read here only.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import volseg
from volseg.bundle import exported_files
from volseg.commands.image_sources import source_of
from volseg.evaluation.classes import SCORES
from volseg.image_bundle import ImageBundle, load_image_bundle
from volseg.inference.choose import choose_backend
from volseg.inference.image_predictor import ImagePredictor, load_predictor
from volseg.inference.images import to_predictions
from volseg.io.image_cases import ImageCase, survey_images
from volseg.io.targets import TargetCells
from volseg.networks import build_images
from volseg.networks.image_network import count_multiply_adds


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A model as it runs, with the images of the test split as its input."""

    bundle: ImageBundle
    predictor: ImagePredictor
    images: np.ndarray

    @classmethod
    def load(cls, folder: Path, precision: str, cases: Sequence[ImageCase], n: int) -> Candidate:
        bundle = load_image_bundle(folder)
        source, choice = source_of(bundle.recipe), choose_backend("openvino", "cpu", precision)
        images = np.stack([source.network_input(case, bundle.recipe.images) for case in cases])
        return cls(bundle, load_predictor(bundle, choice, folder=folder, n_images=n), images)

    def auc(self, targets: np.ndarray) -> float:
        outputs, data = self.predictor.predict(self.images).outputs, self.bundle.recipe.data
        value = SCORES["auc"](to_predictions(outputs, data), targets)
        return np.nan if value is None else value

    def multiply_adds(self) -> int:
        """Return those of all networks of the model for one image, with all of its planes."""
        *planes, channels, height, width = self.bundle.recipe.input_shape
        network = build_images(self.bundle.recipe)
        one = count_multiply_adds(network, (channels, height, width))
        return one * int(np.prod(planes, dtype=int)) * len(self.bundle.network_names)


def main() -> None:
    arguments = parsed()
    names = exported_files(load_image_bundle(arguments.model).network_names, "int8")
    if not all((arguments.model / name).is_file() for name in names):
        volseg.quantise(arguments.model, arguments.dataset, seed=arguments.seed)
    cases, targets = test_split(arguments.dataset, load_image_bundle(arguments.model))
    folders = {
        "fp32": (arguments.model, "fp32"),
        "int8": (arguments.model, "int8"),
        "pruned": (arguments.pruned, "fp32"),
        "student": (arguments.student, "fp32"),
    }
    candidates = {
        name: Candidate.load(folder, precision, cases, arguments.batch)
        for name, (folder, precision) in folders.items()
        if folder is not None
    }
    report(candidates, targets, arguments)


def parsed() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--pruned", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the training of MODEL")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    return parser.parse_args()


def test_split(dataset: Path, bundle: ImageBundle) -> tuple[list[ImageCase], np.ndarray]:
    """Return the images of the test split, and the index of the class of each."""
    data = bundle.recipe.data
    survey = survey_images(dataset, target=data.target)
    cases = [case for case in survey.cases if case.split == "test"]
    cells = TargetCells(data.target, {case.id: case.cells[data.target] for case in cases})
    values, mistakes = cells.values(data)
    if mistakes or not cases:
        raise SystemExit(f"{dataset}: {mistakes[0] if mistakes else 'has no test split'}")
    return cases, np.array([values[case.id] for case in cases])


def report(candidates: Mapping[str, Candidate], targets: np.ndarray, arguments: Namespace) -> None:
    seconds = timed(candidates, arguments)
    aucs = {name: candidate.auc(targets) for name, candidate in candidates.items()}
    adds = {name: candidate.multiply_adds() for name, candidate in candidates.items()}
    print(f"{len(targets)} test images, batches of {arguments.batch}\n")
    print("| | AUC | AUC lost | images/s | × as fast | million multiply-adds | × fewer |")
    print("|---|---|---|---|---|---|---|")
    for name, values in seconds.items():
        speed = arguments.batch / np.median(values)
        ratio = np.median(seconds["fp32"] / values)
        print(
            f"| {name} | {aucs[name]:.4f} | {aucs['fp32'] - aucs[name]:+.4f} | {speed:.4g} | "
            f"{ratio:.2f} | {adds[name] / 1e6:.4g} | {adds['fp32'] / adds[name]:.3g} |"
        )


def timed(candidates: Mapping[str, Candidate], arguments: Namespace) -> dict[str, np.ndarray]:
    """Return the seconds that each candidate takes for a batch in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(arguments.turns + 1):
        for name, candidate in candidates.items():
            places = np.arange(arguments.batch) % len(candidate.images)
            batch = candidate.images[places]
            started = time.perf_counter()
            candidate.predictor.predict(batch)
            if turn > 0:  # the first one allocates memory
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
