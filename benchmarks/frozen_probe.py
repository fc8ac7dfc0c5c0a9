"""Judge frozen features with a linear layer, with related images kept together or not.

    python benchmarks/frozen_probe.py DATASET --target COLUMN --positive CLASS --init WEIGHTS
        [--pixels 224] [--seeds 5]

The network of the weights, EfficientNet-Lite0, is not trained: the square root of its pooled
features goes into a logistic regression, five folds, all settings fixed beforehand. `related` folds
keep the images of a patient, and near duplicates, together, as `cross_validate.py` does; `random`
folds do not. The difference is what leaks from related images.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cross_validate import chosen_cases, groups_of_cases
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from volseg.evaluation.classes import SCORES
from volseg.io.image_cases import ImageCase
from volseg.io.images import ImageReader
from volseg.networks import build_network
from volseg.networks.adapt import adapt, read_weights
from volseg.networks.image_network import ImageNetwork
from volseg.preprocessing.images import to_input
from volseg.recipe.images import Images

FOLDS, BATCH, STRENGTH = 5, 32, 0.01


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--positive", required=True)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.where = None
    cases = chosen_cases(arguments)
    truth = np.array([case.cells[arguments.target] == arguments.positive for case in cases])
    features = np.sqrt(np.maximum(embedded(cases, arguments), 0))
    groups = groups_of_cases(cases)
    print(f"{len(cases)} images in {len(np.unique(groups))} groups of related ones\n")
    print("| folds | AUC, mean | range over seeds |")
    print("|---|---|---|")
    for name, keys in (("related", groups), ("random", np.arange(len(cases)))):
        areas = [area(features, truth, keys, seed) for seed in range(arguments.seeds)]
        print(f"| {name} | {np.mean(areas):.3f} | {min(areas):.3f} to {max(areas):.3f} |")


def embedded(cases: list[ImageCase], arguments: Any) -> np.ndarray:
    """Return the pooled features (n, d) of the images."""
    normalise = {"method": "scale", "mean": (127 / 255,) * 3, "sd": (128 / 255,) * 3}
    images = Images.model_validate(
        {"pixels": arguments.pixels, "channels": 3, "normalise": normalise}
    )
    network = build_network("efficientnet_lite", in_channels=3, out_channels=2)
    assert isinstance(network, ImageNetwork)
    adapted = adapt(network, read_weights(arguments.init).tensors)
    network.load_state_dict(adapted.weights, strict=False)
    network.eval()
    reader, rows = ImageReader(), []
    for start in range(0, len(cases), BATCH):
        batch = [
            to_input(reader.read(case.path, case.index), images)
            for case in cases[start : start + BATCH]
        ]
        with torch.inference_mode():
            rows.append(network.embed(torch.from_numpy(np.stack(batch))).numpy())
    return np.concatenate(rows)


def area(features: np.ndarray, truth: np.ndarray, keys: np.ndarray, seed: int) -> float:
    """Return the AUC of all folds together; images of one key are in one fold."""
    names = np.unique(keys)
    drawn = np.random.default_rng(seed).permutation(len(names)) % FOLDS
    folds = drawn[np.searchsorted(names, keys)]
    scores = np.zeros(len(truth))
    for fold in range(FOLDS):
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500),
        )
        model.fit(features[folds != fold], truth[folds != fold])
        scores[folds == fold] = model.decision_function(features[folds == fold])
    probabilities = 1 / (1 + np.exp(-scores))
    area = SCORES["auc"](np.column_stack([1 - probabilities, probabilities]), truth.astype(int))
    assert area is not None
    return area


if __name__ == "__main__":
    main()
