"""Simulate how often the 95 % intervals of `volseg evaluate` contain the true value (coverage).

    python benchmarks/intervals.py [--studies 4000] [--resamples 2000]

Each row is a distribution of values of patients or of their lesions. "percentile bootstrap"
resamples patients and is shown for comparison, over a quarter of the studies. Widths are medians
over the studies; intervals of metrics between 0 and 1 are clipped to [0, 1].
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from volseg.evaluation.agreement import agreement
from volseg.evaluation.intervals import mean_interval

PATIENTS = (5, 10, 20, 40)
FRACTION, ANY_NUMBER = (0.0, 1.0), (-np.inf, np.inf)
Study = tuple[np.ndarray, np.ndarray]  # values, and the patient of each


@dataclass(frozen=True)
class Population:
    name: str
    draw: Callable[[np.random.Generator, int], Study]
    truth: float
    bounds: tuple[float, float] = FRACTION


def per_patient(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Callable[..., Study]:
    """Make a study with one value per patient from a function that draws the values."""
    return lambda rng, n: (draw(rng, n), np.arange(n))


def with_misses(rng: np.random.Generator, n: int, miss_rate: float) -> np.ndarray:
    return np.where(rng.random(n) < miss_rate, 0, rng.beta(12, 3, n))


def lesions(rng: np.random.Generator, n: int) -> Study:
    """Draw detections (0 or 1) of several lesions a patient; some patients are harder."""
    rate, n_lesions = rng.beta(8, 2, n), 1 + rng.poisson(3, n)
    patients = np.repeat(np.arange(n), n_lesions)
    return (rng.random(patients.size) < rate[patients]).astype(float), patients


def scans(rng: np.random.Generator, n: int) -> Study:
    """Draw Dice of one to five scans a patient, which resemble each other."""
    centre, n_scans = rng.beta(8, 2, n), rng.integers(1, 6, n)
    patients = np.repeat(np.arange(n), n_scans)
    return rng.beta(30 * centre[patients], 30 * (1 - centre[patients])), patients


POPULATIONS = (
    Population("Dice, beta(8, 2)", per_patient(lambda rng, n: rng.beta(8, 2, n)), 0.8),
    Population("Dice, beta(20, 3)", per_patient(lambda rng, n: rng.beta(20, 3, n)), 20 / 23),
    Population("Dice, beta(9, 1)", per_patient(lambda rng, n: rng.beta(9, 1, n)), 0.9),
    Population("Dice, beta(4, 1)", per_patient(lambda rng, n: rng.beta(4, 1, n)), 0.8),
    Population("Dice, 1 to 5 scans a patient", scans, 0.8),
    Population("normal", per_patient(lambda rng, n: rng.normal(0, 1, n)), 0.0, ANY_NUMBER),
    Population(
        "HD95, log-normal, σ 0.5",
        per_patient(lambda rng, n: rng.lognormal(0, 0.5, n)),
        float(np.exp(0.125)),
        (0.0, np.inf),
    ),
    Population("sensitivity, 1 to 10 lesions a patient", lesions, 0.8),
    Population(
        "Dice, 5 % of patients missed (0)",
        per_patient(lambda rng, n: with_misses(rng, n, 0.05)),
        0.95 * 0.8,
    ),
    Population(
        "Dice, 10 % of patients missed (0)",
        per_patient(lambda rng, n: with_misses(rng, n, 0.1)),
        0.9 * 0.8,
    ),
)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--resamples", type=int, default=2000)
    arguments = parser.parse_args()
    heading = " | ".join(f"{n} patients" for n in PATIENTS)
    print(f"coverage (median width)\n\n| values | interval | {heading} |")
    print("|---|---|" + "---|" * len(PATIENTS))
    for population in POPULATIONS:
        for name, n_studies, method in (
            ("volseg", arguments.studies, volseg_interval),
            ("percentile bootstrap", arguments.studies // 4, percentile_bootstrap),
        ):
            cells = [
                coverage_and_width(population, n, n_studies, method, arguments.resamples)
                for n in PATIENTS
            ]
            print(f"| {population.name} | {name} | {' | '.join(cells)} |", flush=True)
    print(f"\ncoverage for pairs of volumes\n\n| statistic | pairs a patient | {heading} |")
    print("|---|---|" + "---|" * len(PATIENTS))
    for n_pairs in (1, 3):
        coverage = {n: coverage_of_pairs(n, n_pairs, arguments.studies // 2) for n in PATIENTS}
        for statistic in coverage[PATIENTS[0]]:
            cells = " | ".join(f"{coverage[n][statistic]:.3f}" for n in PATIENTS)
            print(f"| {statistic} | {n_pairs} | {cells} |", flush=True)


def coverage_and_width(
    population: Population, n_patients: int, n_studies: int, method: Callable, resamples: int
) -> str:
    rng = np.random.default_rng(n_patients)
    n_covered, widths = 0, []
    for _ in range(n_studies):
        values, patients = population.draw(rng, n_patients)
        low, high = method(values, patients, population.bounds, rng, resamples)
        n_covered += low <= population.truth <= high
        widths.append(high - low)
    return f"{n_covered / n_studies:.3f} ({np.nanmedian(widths):.2f})"


def volseg_interval(
    values: np.ndarray, patients: np.ndarray, bounds: tuple[float, float], *_: object
) -> tuple[float, float]:
    interval = mean_interval(values.tolist(), patients.tolist(), bounds=bounds)
    return interval.low, interval.high


def percentile_bootstrap(
    values: np.ndarray,
    patients: np.ndarray,
    bounds: tuple[float, float],
    rng: np.random.Generator,
    resamples: int,
) -> tuple[float, float]:
    n = int(patients.max()) + 1
    sums, counts = np.bincount(patients, values, n), np.bincount(patients, minlength=n)
    drawn = rng.integers(n, size=(resamples, n))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return low, high


def coverage_of_pairs(n_patients: int, n_pairs: int, n_studies: int) -> dict[str, float]:
    """Return the coverage per statistic; pair differences have normal patient and scan parts."""
    rng = np.random.default_rng(n_patients)
    truths = {
        "bias": 1.0,
        "lower_limit": 1 - 1.959964 * 2,
        "upper_limit": 1 + 1.959964 * 2,
        "pearson": 100 / np.sqrt(100 * 104),
        "concordance": 200 / (100 + 104 + 1),
    }
    n_covered = dict.fromkeys(truths, 0)
    for _ in range(n_studies):
        x = rng.normal(50, 10, (n_patients, n_pairs))
        patient_effect = rng.normal(0, 1, (n_patients, 1))
        y = x + 1 + patient_effect + rng.normal(0, np.sqrt(3), x.shape)
        patients = np.repeat(np.arange(n_patients), n_pairs).tolist()
        result = agreement(x.ravel().tolist(), y.ravel().tolist(), patients)
        for name, truth in truths.items():
            low, high = getattr(result, f"{name}_95")
            n_covered[name] += low <= truth <= high
    return {name: count / n_studies for name, count in n_covered.items()}


if __name__ == "__main__":
    main()
