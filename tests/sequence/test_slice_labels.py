"""Labels of the slices of a real CT, some of them flipped, as `benchmarks/slice_labels.py` does."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from laws import real_data

FLIPS, SEEDS = 0.2, 40


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return import_module("slice_labels")


def test_labels_come_from_the_organs_and_only_grow_from_feet_to_head(bench):
    labellings = bench.labels_of_slices(real_data("totalseg_example_ct"))
    sizes = {name: np.bincount(labels).tolist() for name, labels in labellings.items()}
    assert sizes == {"vertebra": [9, 11, 10], "organs": [7, 6, 7, 10], "lung or not": [20, 10]}
    for labels in labellings.values():
        assert (np.diff(labels) >= 0).all()


def mean_accuracies(bench, labels, times):
    """Return the mean accuracy of each method on slices of which each is there several times."""
    labels, k = np.repeat(labels, times), int(labels.max()) + 1
    simulation = bench.Simulation(n_scans=100, flips=FLIPS).thinner(times)
    repairs = {
        "none": lambda flipped: flipped,
        "mean": lambda flipped: bench.rolling_mean(flipped, k),
        "hmm": bench.repair_with(bench.learn(k, simulation).monotone),
        "informed": lambda flipped: bench.with_every_label(flipped, k, FLIPS),
    }
    return {
        name: bench.accuracies(labels, repair, FLIPS, SEEDS).mean()
        for name, repair in repairs.items()
    }


@pytest.mark.parametrize("name", ["vertebra", "organs", "lung or not"])
def test_a_monotone_hmm_repairs_most_of_the_flipped_labels(bench, name):
    """It makes as many mistakes, at the borders of regions, however thin the slices are."""
    labels = bench.labels_of_slices(real_data("totalseg_example_ct"))[name]
    thick, thin = (mean_accuracies(bench, labels, times) for times in (1, 3))
    for accuracy in (thick, thin):
        assert accuracy["none"] == pytest.approx(1 - FLIPS)
        assert accuracy["hmm"] > accuracy["mean"] + 0.04
        assert abs(accuracy["hmm"] - accuracy["informed"]) < 0.025
    mistakes = (1 - thick["hmm"]) * labels.size, (1 - thin["hmm"]) * labels.size * 3
    assert max(mistakes) < 2.2 and abs(mistakes[0] - mistakes[1]) < 0.8
    assert thin["hmm"] >= 0.97


def test_the_rolling_mean_is_a_vote_of_three_slices(bench):
    labels = np.array([0, 1, 0, 0, 2, 1, 2, 2])
    assert bench.rolling_mean(labels, 3).tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert bench.rolling_mean(np.array([0, 1, 2]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_fraction_of_the_slices_is_flipped_to_the_other_labels(bench, seed):
    labels = np.repeat([0, 1, 2, 3], 250)
    flipped = bench.flip(labels, 4, FLIPS, seed)
    assert (flipped != labels).sum() == 200
    counts = np.zeros((4, 4))
    np.add.at(counts, (labels, flipped), 1)
    others = counts[~np.eye(4, dtype=bool)]  # 200 in twelve cells: 17 ± 4 in each
    assert others.sum() == 200 and others.min() > 3 and others.max() < 30
