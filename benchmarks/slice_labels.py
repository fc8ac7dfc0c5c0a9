"""Repair randomly flipped labels of axial slices with chain models of label sequences.

    python benchmarks/slice_labels.py TOTALSEG_EXAMPLE_CT [--seeds 200] [--flips 0.2] [--scans 300]

The true labels come from the mask of one CT of 30 slices of 3 mm, from feet to head, in three ways:
the vertebra with the most voxels in the slice; the organs present, by the first rule that applies
of lung, adrenal gland, small bowel, none of them; lung or not. The second table has each slice
three times, as a mask with slices of 1 mm would. For each seed exactly a fraction --flips of the
slices gets another label, each of the others with equal probability.

No model sees this scan. They learn from --scans simulated ones, which know only the number and the
order of the labels and the kind of flips: a run of consecutive regions of 6 to 60 mm each, uniform,
with the same fraction of flips. Cells are mean accuracy (lowest to highest) over the seeds.

"Every label known to occur" knows the fraction of flips and that the scan has all labels: the most
probable label of each slice if all places of the borders are equally likely. The third table learns
from other simulated scans, to show what a wrong assumption costs.
"""

from __future__ import annotations

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import volseg
from volseg.sequence.chains import Chain
from volseg.sequence.crf import fit_crf
from volseg.sequence.hmm import HiddenMarkovModel, fit_hmm

Repair = Callable[[np.ndarray], np.ndarray]  # flipped → repaired labels


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How the scans are drawn from which the models learn."""

    n_scans: int
    flips: float  # fraction of slices with a wrong label
    shortest: int = 2  # slices of a region
    longest: int = 20

    def thinner(self, times: int) -> Simulation:
        return replace(self, shortest=self.shortest * times, longest=self.longest * times)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--flips", type=float, default=0.2)
    parser.add_argument("--scans", type=int, default=300)
    arguments = parser.parse_args()
    simulation = Simulation(n_scans=arguments.scans, flips=arguments.flips)
    labellings = labels_of_slices(arguments.folder)

    def score(labels: np.ndarray, repair: Repair) -> np.ndarray:
        return accuracies(labels, repair, arguments.flips, arguments.seeds)

    for times in (1, 3):
        thin = {name: np.repeat(labels, times) for name, labels in labellings.items()}
        columns = []
        for labels in thin.values():
            repairs = methods(labels.max() + 1, simulation.thinner(times))
            columns.append({name: score(labels, repair) for name, repair in repairs.items()})
        n_slices = len(next(iter(thin.values())))
        print_heading(f"{n_slices} slices", thin)
        for name in columns[0]:
            print_row(name, [summary(column[name]) for column in columns])
    print_heading("monotone HMM learned from", labellings)
    for assumption, other in assumptions(simulation).items():
        ordered = [learn(labels.max() + 1, other).monotone for labels in labellings.values()]
        pairs = zip(labellings.values(), ordered, strict=True)
        scores = [score(labels, repair_with(model)).mean() for labels, model in pairs]
        print_row(assumption, [f"{mean:.3f}" for mean in scores])


def print_heading(title: str, labellings: dict[str, np.ndarray]) -> None:
    sizes = (" + ".join(map(str, np.bincount(labels))) for labels in labellings.values())
    cells = [f"{name} ({size})" for name, size in zip(labellings, sizes, strict=True)]
    print()
    print_row(title, cells)
    print("|---" * (len(cells) + 1) + "|")


def print_row(name: str, cells: list[str]) -> None:
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def summary(scores: np.ndarray) -> str:
    return f"{scores.mean():.3f} ({scores.min():.3f} to {scores.max():.3f})"


def assumptions(simulation: Simulation) -> dict[str, Simulation]:
    return {
        "regions of 6 to 60 mm, the true fraction of flips": simulation,
        "regions of 6 to 18 mm": replace(simulation, longest=6),
        "regions of 60 to 300 mm": replace(simulation, shortest=20, longest=100),
        "half as many flips": replace(simulation, flips=simulation.flips / 2),
        "twice as many flips": replace(simulation, flips=simulation.flips * 2),
    }


def labels_of_slices(folder: Path) -> dict[str, np.ndarray]:
    """Return the labellings, each (n,) integers from 0, which only grow from feet to head."""
    areas = slice_areas(folder)
    organs = organ_regions(areas)
    return {
        "vertebra": vertebrae(areas),
        "organs": organs,
        "lung or not": (organs == 3).astype(int),
    }


def slice_areas(folder: Path) -> dict[str, np.ndarray]:
    """Return the voxels of each structure in each axial slice, from feet to head."""
    with (folder / "label_names.csv").open(newline="", encoding="utf-8") as file:
        names = {
            int(row["label"]): row["name"] for row in csv.DictReader(file) if row["map"] == "total"
        }
    mask = volseg.read_mask(folder / "labels" / "example_ct_sm.nii.gz")
    if mask.geometry.affine[2, 2] <= 0 or np.abs(mask.geometry.affine[2, :2]).max() > 0:
        raise SystemExit("the slices of the mask are not axial, from feet to head")
    voxels = np.asarray(mask.array)
    return {name: (voxels == label).sum(axis=(0, 1)) for label, name in names.items()}


def vertebrae(areas: dict[str, np.ndarray]) -> np.ndarray:
    """Return (n,) the vertebra with most voxels in each slice, numbered from feet to head."""
    columns = np.array([area for name, area in areas.items() if name.startswith("vertebrae_")])
    return np.unique(columns.argmax(axis=0), return_inverse=True)[1]  # listed from S1 to C1


def organ_regions(areas: dict[str, np.ndarray]) -> np.ndarray:
    """Return (n,) 3 lung, 2 adrenal gland, 0 small bowel, 1 none of them."""
    lung = areas["lung_lower_lobe_left"] + areas["lung_lower_lobe_right"] > 0
    adrenal = areas["adrenal_gland_left"] + areas["adrenal_gland_right"] > 0
    return np.select([lung, adrenal, areas["small_bowel"] > 0], [3, 2, 0], default=1)


def simulate(n_states: int, simulation: Simulation) -> list[np.ndarray]:
    """Draw the true labels of scans."""
    rng = np.random.default_rng(0)
    scans = []
    for _ in range(simulation.n_scans):
        first, last = np.sort(rng.integers(0, n_states, 2))
        lengths = rng.integers(simulation.shortest, simulation.longest + 1, last - first + 1)
        scans.append(np.repeat(np.arange(first, last + 1), lengths))
    return scans


def flip(labels: np.ndarray, n_states: int, fraction: float, seed: int) -> np.ndarray:
    """Give a fraction of the slices, rounded to whole slices, another label."""
    rng = np.random.default_rng(seed)
    flipped = labels.copy()
    slices = rng.choice(labels.size, round(fraction * labels.size), replace=False)
    steps = rng.integers(1, n_states, slices.size)
    flipped[slices] = (labels[slices] + steps) % n_states
    return flipped


@dataclass(frozen=True)
class Learned:
    """What simulated scans teach, and these scans."""

    truth: list[np.ndarray]
    noisy: list[np.ndarray]
    free: HiddenMarkovModel
    monotone: HiddenMarkovModel


def learn(n_states: int, simulation: Simulation) -> Learned:
    truth = simulate(n_states, simulation)
    noisy = [
        flip(labels, n_states, simulation.flips, 10_000 + scan) for scan, labels in enumerate(truth)
    ]
    models = (
        fit_hmm(truth, n_states, predicted=noisy, monotone=monotone) for monotone in (False, True)
    )
    return Learned(truth, noisy, *models)


def methods(n_states: int, simulation: Simulation) -> dict[str, Repair]:
    learned = learn(n_states, simulation)
    single = learned.free
    tables = [log_probabilities(single, labels) for labels in learned.noisy]
    crf = fit_crf(tables, learned.truth)
    return {
        "as they are": lambda labels: labels,
        "rolling mean of three": lambda labels: rolling_mean(labels, n_states),
        "HMM": repair_with(learned.free),
        "monotone HMM": repair_with(learned.monotone),
        "monotone HMM, most probable label of each slice": lambda labels: (
            learned.monotone.chain(labels).marginals().argmax(axis=1)
        ),
        "CRF": lambda labels: crf.chain(log_probabilities(single, labels)).best_path(),
        "every label known to occur": lambda labels: with_every_label(
            labels, n_states, simulation.flips
        ),
    }


def repair_with(model: HiddenMarkovModel) -> Repair:
    return lambda labels: model.chain(labels).best_path()


def log_probabilities(model: HiddenMarkovModel, labels: np.ndarray) -> np.ndarray:
    """Return (n, k) ln p(true label | flipped label) of single slices, all labels as frequent."""
    likelihoods = model.emission.T[labels]
    return np.log(likelihoods / likelihoods.sum(axis=1, keepdims=True))


def with_every_label(labels: np.ndarray, n_states: int, flips: float) -> np.ndarray:
    """Return the most probable labels if all n_states occur, in order, with borders anywhere."""
    is_equal = labels[:, None] == np.arange(n_states)
    unary = np.log(np.where(is_equal, 1 - flips, flips / (n_states - 1)))
    unary[0, 1:] = unary[-1, :-1] = -np.inf
    steps = np.subtract.outer(np.arange(n_states), np.arange(n_states))
    transition = np.where((steps == 0) | (steps == -1), 0.0, -np.inf)
    return Chain(unary, transition).marginals().argmax(axis=1)


def rolling_mean(labels: np.ndarray, n_states: int) -> np.ndarray:
    """Return the most frequent label of a slice and its neighbours; the slice's own if tied."""
    votes = np.eye(n_states)[labels]
    padded = np.pad(votes, ((1, 1), (0, 0)))
    return (padded[:-2] + padded[1:-1] + padded[2:] + 0.5 * votes).argmax(axis=1)


def accuracies(
    labels: np.ndarray, repair: Callable[[np.ndarray], np.ndarray], fraction: float, n_seeds: int
) -> np.ndarray:
    """Return (n_seeds,) fraction of slices with the true label after the repair."""
    n_states = int(labels.max()) + 1
    flipped = [flip(labels, n_states, fraction, seed) for seed in range(n_seeds)]
    return np.array([(repair(labels_of_seed) == labels).mean() for labels_of_seed in flipped])


if __name__ == "__main__":
    main()
