"""Label slices and whole scans from frozen embeddings of the slices, with and without their order.

    python benchmarks/scan_sequences.py ct_ich_slices --init WEIGHTS --out FOLDER
        [--pixels 224] [--seeds 0 1 2] [--without-test] [--only NAME ...]

The network of the weights, EfficientNet-Lite0, is not trained: it embeds each slice once. Five
folds keep the slices of a patient together and hold as many scans with a haemorrhage each; each
seed draws other folds and other first weights. All settings were chosen without the patients of the
test split (`--without-test`).

Slice labels: a logistic regression of each slice alone; its probabilities averaged over three
slices, or given to a CRF and an HMM (marginals), which learn from probabilities for slices that the
regression did not see (five inner folds); a linear layer and the networks of `networks/sequence`
trained on the labels of the slices. The score of a scan is that of its highest slice. Scan labels:
the same networks, with their pooling, trained on the labels of the scans alone, and a logistic
regression of the mean embedding. Predictions of all folds are judged together; intervals resample
patients, and are of the mean over the seeds. What was done before is not done again.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen_probe import embedded
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional

from volseg.commands.image_splits import fold_of_groups
from volseg.commands.scan_sources import scans_of, stack_scans
from volseg.evaluation.bootstrap import Estimate, Statistics, bootstrap, bootstrap_difference
from volseg.evaluation.ranking import Ranking, weighted_auc
from volseg.io.image_cases import survey_images
from volseg.networks.scan_network import ScanNetwork
from volseg.networks.sequence import build_sequence, sequence_names
from volseg.networks.sequence.base import InOrder
from volseg.sequence.crf import fit_crf
from volseg.sequence.hmm import fit_hmm

TARGET, SCAN_TARGET = "hemorrhage", "scan_hemorrhage"
FOLDS, STRENGTH = 5, 0.003
EPOCHS, BATCH, RATE, DECAY = 20, 16, 1e-3, 1e-2
SMALLEST = 1e-6  # probability that a chain is given
ALONE, ROLLING = "logistic regression of each slice", "rolling mean of three slices"
LINEAR = "linear layer on each slice"


@dataclass(frozen=True, eq=False)
class Scans:
    """Scans with the embeddings (S, F) and labels (S,) of their slices, and their own label."""

    names: Sequence[str]
    slices: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    scan_labels: np.ndarray

    def folds(self, scans: np.ndarray, seed: int) -> np.ndarray:
        """Return the fold of each of some scans."""
        groups = {str(n): str(n) for n in scans}
        fold_of = fold_of_groups(
            groups, {str(n): int(self.scan_labels[n]) for n in scans}, FOLDS, seed
        )
        return np.array([fold_of[str(n)] for n in scans])


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores from models that did not see the scans: of all slices, or None, and of the scans."""

    slices: list[np.ndarray] | None
    scan_scores: np.ndarray


Method = Callable[[Scans, np.ndarray, np.ndarray, int], Any]  # scans, training, tested, seed


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without-test", action="store_true")
    parser.add_argument("--only", nargs="+", help="words in the names of the methods to run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scans = read_scans(arguments)
    of_slices, of_scans = {}, {}
    chains = (ALONE, ROLLING, "CRF", "HMM")
    for seed in arguments.seeds:
        parts = kept(arguments, "chains", seed, lambda seed=seed: chain_scores(scans, seed))
        for name in chains:
            of_slices.setdefault(name, []).append(parts[name])
    for name, train in methods().items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        runs = [
            kept(arguments, name, seed, lambda seed=seed, train=train: crossed(scans, train, seed))
            for seed in arguments.seeds
        ]
        (of_scans if runs[0].slices is None else of_slices)[name] = runs
    print_slices(scans, of_slices)
    print_scans(scans, of_slices | of_scans)


def read_scans(arguments: Any) -> Scans:
    """Read the dataset, and embed each slice unless that was done before."""
    cases = survey_images(arguments.dataset, target=TARGET).cases
    path = arguments.out / f"embeddings_{arguments.pixels}.npy"
    if not path.is_file():
        np.save(path, embedded(cases, arguments))
    place = {case.id: row for case, row in zip(cases, np.load(path), strict=True)}
    mistakes = list[str]()
    scans = scans_of(cases, mistakes)
    assert not mistakes, mistakes
    if arguments.without_test:
        scans = [scan for scan in scans if scan.split != "test"]
    print(f"{len(scans)} scans, {sum(len(scan.slices) for scan in scans)} slices\n")
    return Scans(
        [scan.id for scan in scans],
        [np.stack([place[case.id] for case in scan.slices]) for scan in scans],
        [np.array([int(case.cells[TARGET]) for case in scan.slices]) for scan in scans],
        np.array([int(scan.cells[SCAN_TARGET]) for scan in scans]),
    )


def kept(arguments: Any, name: str, seed: int, compute: Callable[[], Any]) -> Any:
    """Return what was computed before, or compute it and keep it."""
    which = "without_test" if arguments.without_test else "all"
    path = arguments.out / f"{which}_{name.replace(' ', '_')}_{arguments.pixels}_{seed}.npz"
    if not path.is_file():
        result = compute()
        scored = result if isinstance(result, dict) else {"": result}
        arrays = {}
        for key, one in scored.items():
            arrays[f"{key}/own"] = one.scan_scores
            if one.slices is not None:
                arrays[f"{key}/slices"] = np.concatenate(one.slices)
                arrays[f"{key}/lengths"] = np.array(list(map(len, one.slices)))
        np.savez(path, **arrays)
    arrays = np.load(path)
    keys = [key.removesuffix("/own") for key in arrays if key.endswith("/own")]
    scored = {key: stored(arrays, key) for key in keys}
    return scored.get("", scored)


def stored(arrays: Any, key: str) -> Scored:
    slices = None
    if f"{key}/slices" in arrays:
        ends = np.cumsum(arrays[f"{key}/lengths"])[:-1]
        slices = np.split(arrays[f"{key}/slices"], ends)
    return Scored(slices, arrays[f"{key}/own"])


# ---- a regression of each slice, and chains of its probabilities


def chain_scores(scans: Scans, seed: int) -> dict[str, Scored]:
    """Return the scores of the regression, and of what smooths its probabilities."""
    n = len(scans.names)
    folds = scans.folds(np.arange(n), seed)
    slices: dict[str, list[Any]] = {name: [None] * n for name in (ALONE, ROLLING, "CRF", "HMM")}
    for fold in range(FOLDS):
        training, tested = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        inner, unseen = scans.folds(training, seed), {}
        for part in range(FOLDS):
            model = regression(scans, training[inner != part])
            for k in training[inner == part].tolist():
                unseen[k] = np.log(probabilities(model, scans.slices[k]))
        labels = [scans.labels[k] for k in training.tolist()]
        crf = fit_crf([unseen[k] for k in training.tolist()], labels)
        hmm, model = fit_hmm(labels, 2), regression(scans, training)
        for k in tested.tolist():
            alone = probabilities(model, scans.slices[k])
            slices[ALONE][k] = alone[:, 1]
            slices[ROLLING][k] = rolling_mean(alone[:, 1])
            slices["CRF"][k] = crf.chain(np.log(alone)).marginals()[:, 1]
            slices["HMM"][k] = hmm.chain(alone).marginals()[:, 1]
    return {name: Scored(scores, highest(scores)) for name, scores in slices.items()}


def regression(scans: Scans, training: np.ndarray) -> Any:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=500))
    features = np.concatenate([scans.slices[k] for k in training])
    return model.fit(features, np.concatenate([scans.labels[k] for k in training]))


def probabilities(model: Any, features: np.ndarray) -> np.ndarray:
    p = np.clip(model.predict_proba(features), SMALLEST, None)
    return p / p.sum(axis=1, keepdims=True)


def rolling_mean(p: np.ndarray) -> np.ndarray:
    padded = np.pad(p, 1, mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def highest(slices: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([scores.max() for scores in slices])


# ---- networks of sequences


def methods() -> dict[str, Method]:
    """Return the networks trained on slice labels, and those trained on scan labels."""
    by_name: dict[str, Method] = {LINEAR: slice_network("mean")}
    for name in sequence_names():
        if isinstance(build_sequence(name, in_features=2), InOrder):
            by_name[f"{name}, slice labels"] = slice_network(name)
    by_name["logistic regression of the mean embedding"] = mean_regression
    for name in sequence_names():
        by_name[f"{name}, scan labels"] = scan_network(name)
    return by_name


def crossed(scans: Scans, method: Method, seed: int) -> Scored:
    """Return the scores of all scans, each from a model that did not see it."""
    n = len(scans.names)
    folds, slices, scan_scores = scans.folds(np.arange(n), seed), [None] * n, np.zeros(n)
    for fold in range(FOLDS):
        training, tested = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        for k, score in zip(tested, method(scans, training, tested, seed), strict=True):
            if np.ndim(score):
                slices[k] = score
            scan_scores[k] = np.max(score)
    return Scored(None if slices[0] is None else slices, scan_scores)  # type: ignore[arg-type]


def mean_regression(scans: Scans, training: np.ndarray, tested: np.ndarray, seed: int) -> Any:
    means = np.stack([features.mean(axis=0) for features in scans.slices])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=500))
    model.fit(means[training], scans.scan_labels[training])
    return model.predict_proba(means[tested])[:, 1]


def slice_network(name: str) -> Method:
    def method(scans: Scans, training: np.ndarray, tested: np.ndarray, seed: int) -> Any:
        every = np.concatenate([scans.labels[k] for k in training])
        network = trained(name, scans, training, seed, every, slice_loss)
        with torch.inference_mode():
            return [
                network.slice_logits(batch_of(scans, [k]))[0, :, 0].sigmoid().numpy()
                for k in tested
            ]

    return method


def scan_network(name: str) -> Method:
    def method(scans: Scans, training: np.ndarray, tested: np.ndarray, seed: int) -> Any:
        network = trained(name, scans, training, seed, scans.scan_labels[training], scan_loss)
        with torch.inference_mode():
            return [network(batch_of(scans, [k]))[0, 0].sigmoid().numpy() for k in tested]

    return method


def trained(
    name: str,
    scans: Scans,
    training: np.ndarray,
    seed: int,
    labels: np.ndarray,
    loss: Callable[..., torch.Tensor],
) -> ScanNetwork:
    """Return a trained network; `labels` are those from which the rarer class gets its weight."""
    torch.manual_seed(seed)
    rng, n_features = np.random.default_rng(seed), scans.slices[0].shape[1]
    network = ScanNetwork(build_sequence(name, in_features=n_features), n_features, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    n_steps = EPOCHS * -(-len(training) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    weight = torch.tensor((1 - labels.mean()) / labels.mean())
    for _ in range(EPOCHS):
        order = rng.permutation(training)
        for start in range(0, len(order), BATCH):
            optimizer.zero_grad()
            loss(network, scans, order[start : start + BATCH], weight).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return network.eval()


def batch_of(scans: Scans, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Return the network input (N, S, F + 1) of some scans."""
    stacked = stack_scans([scans.slices[k] for k in numbers])
    is_slice = np.zeros((*stacked.shape[:2], 1), np.float32)
    for row, k in enumerate(numbers):
        is_slice[row, : len(scans.slices[k])] = 1
    return torch.from_numpy(np.concatenate([stacked, is_slice], axis=2))


def slice_loss(
    network: ScanNetwork, scans: Scans, numbers: np.ndarray, weight: torch.Tensor
) -> torch.Tensor:
    batch = batch_of(scans, numbers)
    logits = network.slice_logits(batch)[..., 0][batch[..., -1] > 0]
    labels = torch.from_numpy(np.concatenate([scans.labels[k] for k in numbers])).float()
    return functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)


def scan_loss(
    network: ScanNetwork, scans: Scans, numbers: np.ndarray, weight: torch.Tensor
) -> torch.Tensor:
    labels = torch.from_numpy(scans.scan_labels[numbers]).float()
    logits = network(batch_of(scans, numbers))[:, 0]
    return functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)


# ---- tables


def mean_auc(scores: Sequence[np.ndarray], truth: np.ndarray) -> Statistics:
    """Return the function from weights (B, n) of cases to the mean AUC over the seeds."""
    rankings = [Ranking.of(of_seed) for of_seed in scores]

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        areas = [weighted_auc(ranking, truth, weights) for ranking in rankings]
        return {"auc": np.mean(areas, axis=0)}

    return statistics


def ends(estimate: Estimate) -> str:
    low, high = estimate.interval.low, estimate.interval.high
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def print_slices(scans: Scans, methods: dict[str, list[Scored]]) -> None:
    truth = np.concatenate(scans.labels) > 0
    patients = np.repeat(scans.names, list(map(len, scans.labels))).tolist()
    statistics = {
        name: mean_auc([np.concatenate(run.slices or []) for run in runs], truth)
        for name, runs in methods.items()
    }
    others = [name for name in (ALONE, ROLLING, LINEAR) if name in methods]
    heads = ["slice labels", "AUC of slices", "range over seeds", *(f"minus {n}" for n in others)]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name, runs in methods.items():
        areas = [
            float(
                mean_auc([np.concatenate(run.slices or [])], truth)(np.ones((1, truth.size)))[
                    "auc"
                ][0]
            )
            for run in runs
        ]
        cells = [name, f"{np.mean(areas):.3f}", f"{min(areas):.3f} to {max(areas):.3f}"]
        for other in others:
            if name == other:
                cells.append("")
                continue
            estimate = bootstrap_difference(statistics[name], statistics[other], patients)["auc"]
            cells.append(f"{estimate.value:+.3f} {ends(estimate)}")
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def print_scans(scans: Scans, methods: dict[str, list[Scored]]) -> None:
    print("| label of the scan | AUC of scans | 95 % interval | range over seeds |")
    print("|---|---|---|---|")
    truth = scans.scan_labels > 0
    for name, runs in methods.items():
        scores = [run.scan_scores for run in runs]
        areas = [
            float(mean_auc([of_seed], truth)(np.ones((1, truth.size)))["auc"][0])
            for of_seed in scores
        ]
        estimate = bootstrap(mean_auc(scores, truth), list(scans.names))["auc"]
        cells = [name, f"{np.mean(areas):.3f}", ends(estimate)]
        print("| " + " | ".join([*cells, f"{min(areas):.3f} to {max(areas):.3f}"]) + " |")


if __name__ == "__main__":
    main()
