"""Compare methods of self-supervision by a linear probe: which embedding tells most?

    python benchmarks/self_supervision.py busi_ultrasound --target class=malignant --epochs 30
    python benchmarks/self_supervision.py ct_ich_slices --target hemorrhage=1 --group patient
        --epochs 8

A small CNN learns from all images without their labels. Then logistic regression on its frozen
embeddings is judged by five folds, which keep a group together: mean AUC, before and after. Needs
scikit-learn.
"""

from __future__ import annotations

import csv
import math
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional

from volseg.evaluation.roc import auc
from volseg.networks.cnn_small import Settings
from volseg.networks.image_network import ImageNetwork
from volseg.training.pretrain import SimSiam, Views

BATCH, RATE, WARM_UP = 128, 2e-3, 20  # images, learning rate, steps
NETWORK = Settings(features=(16, 32, 64, 128), convolutions=1, block_dropout=0.0)


class BarlowTwins(nn.Module):
    """Rival: the cross-correlation of two views shall be the identity (Zbontar et al. 2021)."""

    def __init__(self, network: ImageNetwork, width: int = 256) -> None:
        super().__init__()
        self.network = network
        self.projector = nn.Sequential(
            nn.Linear(network.head.in_features, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width, affine=False),
        )

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one, other = (self.projector(self.network.embed(view)) for view in (first, second))
        correlation = one.T @ other / len(one)
        diagonal = correlation.diagonal()
        others = correlation.square().sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + 2 / len(correlation) * others


class Rotation(nn.Module):
    """Rival: which multiple of 90° a view is turned by (Gidaris et al. 2018)."""

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network
        self.classifier = nn.Linear(network.head.in_features, 4)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        turns = torch.arange(len(first)) % 4
        views = torch.stack([v.rot90(int(n), (1, 2)) for v, n in zip(first, turns, strict=True)])
        return functional.cross_entropy(self.classifier(self.network.embed(views)), turns)


METHODS = {"simsiam": SimSiam, "barlow_twins": BarlowTwins, "rotation": Rotation}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--target", required=True, help="column=value of the positive images")
    parser.add_argument("--group", help="column of what folds keep together")
    parser.add_argument("--pixels", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    images, targets, groups = read(arguments)
    print("| method | AUC, random weights | AUC after | seconds |")
    print("|---|---|---|---|")
    for name in arguments.methods:
        torch.manual_seed(arguments.seed)
        network = NETWORK.build(1, 2)
        method = METHODS[name](network)
        before = probe(network, images, targets, groups)
        started = time.monotonic()
        pretrain(method, images, arguments.epochs, arguments.seed)
        seconds = time.monotonic() - started
        after = probe(network, images, targets, groups)
        print(f"| {name} | {before:.3f} | {after:.3f} | {seconds:.0f} |", flush=True)


def read(arguments: Namespace) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Return standardised images (n, 1, pixels, pixels), 0 or 1 (n,) and groups (n,)."""
    column, _, value = arguments.target.partition("=")
    with open(arguments.dataset / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    size = (arguments.pixels, arguments.pixels)
    images = []
    for row in rows:
        with Image.open(arguments.dataset / row["image"]) as image:
            images.append(np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR)))
    stack = torch.from_numpy(np.stack(images).astype(np.float32))[:, None]
    groups = [row[arguments.group] if arguments.group else row["image"] for row in rows]
    targets = np.array([int(row[column] == value) for row in rows])
    return (stack - stack.mean()) / stack.std(), targets, np.array(groups)


def pretrain(method: nn.Module, images: torch.Tensor, epochs: int, seed: int) -> None:
    """Train on views of the images; the learning rate rises, then falls to zero (cosine)."""
    generator, views = torch.Generator().manual_seed(seed), Views()
    optimizer = torch.optim.AdamW(method.parameters(), lr=RATE, weight_decay=1e-4)
    n_batches = len(images) // BATCH
    step, n_steps = 0, epochs * n_batches
    method.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)[: n_batches * BATCH]
        for rows in order.split(BATCH):
            rate = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate
            loss = method(*(views(images[rows], generator) for _ in range(2)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def probe(
    network: ImageNetwork, images: torch.Tensor, targets: np.ndarray, groups: np.ndarray
) -> float:
    """Return the mean AUC over five folds of logistic regression on the embeddings."""
    network.train()
    with torch.no_grad():  # a random network's batch norms have seen nothing yet
        for batch in images.split(2 * BATCH):
            network.embed(batch)
    network.eval()
    with torch.inference_mode():
        parts = [network.embed(batch) for batch in images.split(2 * BATCH)]
    features, areas = torch.cat(parts).numpy(), []
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for train, test in folds.split(features, targets, groups):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        scores = model.fit(features[train], targets[train]).decision_function(features[test])
        areas.append(auc(scores, targets[test] == 1))
    return float(np.mean(areas))


if __name__ == "__main__":
    main()
