"""Measure how often the intervals of a classifier's metrics contain the true value.

    python benchmarks/class_intervals.py [--studies 400]

Scores are two normal distributions at a known distance, so that AUC, sensitivity and accuracy are
known. Prints a table: the fraction of simulated studies whose interval contains the truth, and the
mean width of the intervals; docs/classes.md quotes it.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from scipy.special import ndtr

from volseg.evaluation.bootstrap import Resampling, bootstrap
from volseg.evaluation.ranking import Ranking, ratio, weighted_auc

# patients, distance of the two distributions in standard deviations, fraction of positive cases
STUDIES = (
    (20, 1.5, 0.5),
    (20, 2.5, 0.5),
    (50, 1.0, 0.3),
    (50, 2.5, 0.2),
    (100, 2.0, 0.1),
    (200, 1.5, 0.5),
)
METRICS = ("auc", "sensitivity", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=400)
    n_studies = parser.parse_args().studies
    print("| patients | true AUC | positive | AUC | sensitivity | accuracy |")
    print("|---|---|---|---|---|---|")
    for n, distance, prevalence in STUDIES:
        truth = dict.fromkeys(METRICS, float(ndtr(distance / 2)))
        truth["auc"] = float(ndtr(distance / math.sqrt(2)))
        rng = np.random.default_rng(0)
        hits, widths = ({name: [] for name in METRICS} for _ in range(2))
        for _ in range(n_studies):
            for name, estimate in study(rng, n, distance, prevalence).items():
                if not estimate.interval.reason:
                    low, high = estimate.interval.low, estimate.interval.high
                    hits[name].append(low <= truth[name] <= high)
                    widths[name].append(high - low)
        cells = " | ".join(f"{np.mean(hits[m]):.3f} ({np.mean(widths[m]):.2f})" for m in METRICS)
        print(f"| {n} | {truth['auc']:.3f} | {prevalence:.0%} | {cells} |", flush=True)


def study(rng: np.random.Generator, n: int, distance: float, prevalence: float) -> dict:
    """Return the estimates of one simulated study of n patients with one case each."""
    positive = rng.random(n) < prevalence
    scores = rng.normal(size=n) + distance * positive
    ranking, right = Ranking.of(scores), ((scores > distance / 2) == positive) + 0.0

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "auc": weighted_auc(ranking, positive, weights),
            "sensitivity": ratio(weights @ (positive * right), weights @ positive),
            "accuracy": ratio(weights @ right, weights.sum(axis=1)),
        }

    n_positive = int(positive.sum())
    return bootstrap(
        statistics,
        range(n),
        bounds=dict.fromkeys(METRICS, (0.0, 1.0)),
        n_relevant={"auc": min(n_positive, n - n_positive), "sensitivity": n_positive},
        resampling=Resampling(n_resamples=1000, seed=int(rng.integers(2**31))),
    )


if __name__ == "__main__":
    main()
