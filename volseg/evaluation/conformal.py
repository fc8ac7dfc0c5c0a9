"""Abstention: sets of classes that contain the true one at a stated rate, and unusual images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from volseg.evaluation.calibration import one_hot
from volseg.evaluation.classes import Value
from volseg.evaluation.regression import conformal_quantile

COVERAGE, USUAL = 0.9, 0.99
MAX_DIRECTIONS = 64  # of the embeddings' covariance that a model stores
ROUNDING, SMALLEST_VARIANCE = 1e-12, 1e-30  # of a direction: relative to the mean, and absolute


@dataclass(frozen=True, slots=True)
class ConformalRule:
    """Which classes a prediction leaves open.

    Args:
        quantile: k limits, all equal unless the coverage holds for each class: a class is in the
            set if 1 − its probability is at most its limit. Infinity: always.
        coverage: the fraction of sets that contain the true class; of several labels at once, the
            fraction of the images with a label whose set contains it.
        is_multilabel: a case may have several labels, or none.
    """

    quantile: tuple[float, ...]
    coverage: float
    is_multilabel: bool = False

    def sets(self, probabilities: np.ndarray) -> np.ndarray:
        """Return (n, k) bool: the set of each case.

        It always holds the most probable class; of several labels it may be empty.
        """
        table = np.asarray(probabilities, dtype=np.float64)
        # 1e-9: probabilities that were written to a table and read again stay in the set.
        inside = 1 - table <= np.array(self.quantile) + 1e-9
        if self.is_multilabel:
            return inside
        return inside | one_hot(table.argmax(axis=1), table.shape[1])


def fit_conformal(
    probabilities: np.ndarray,
    targets: np.ndarray,
    *,
    coverage: float = COVERAGE,
    per_class: bool = False,
) -> ConformalRule:
    """Return the rule whose sets contain the true class of a new case with this probability.

    It holds for any network if new cases are exchangeable with these, on which the network was not
    trained. The score of a case is 1 − the probability of its true class (LAC), which gives the
    smallest sets; adaptive sets (APS) would be larger for every case to be fairer to difficult
    ones, where the user's question is only whether the answer is sure. LAC alone may leave a set
    empty, so the most probable class always belongs to it, which can only raise the coverage.

    Args:
        probabilities: (n, k). targets: (n,) class index; or (n, k) bool of several labels at once,
            each of which then has its own limit among the cases that have it.
        per_class: the coverage holds among the cases of each class, also of a rare one; a class
            with fewer than coverage / (1 − coverage) cases is then in every set.

    Source: Sadinle et al., J Am Stat Assoc 114:223 (2019); per class: Vovk, ACML (2012).
    """
    table = np.asarray(probabilities, dtype=np.float64)
    truth = one_hot(targets, table.shape[1])
    is_multilabel = np.ndim(targets) == truth.ndim
    if per_class or is_multilabel:
        pairs = zip(table.T, truth.T, strict=True)
        quantiles = [conformal_quantile(1 - p[is_true], coverage) for p, is_true in pairs]
        return ConformalRule(tuple(quantiles), coverage, is_multilabel)
    limit = conformal_quantile(1 - table[truth], coverage)
    return ConformalRule((limit,) * table.shape[1], coverage)


@dataclass(frozen=True, slots=True)
class SetStatistics:
    """What sets of classes were worth on n cases.

    Args:
        coverage: fraction of the sets that contain the true class; of several labels at once, the
            fraction of the labels of all cases that are in the set of their case.
        coverage_of_class: class name → that among its cases.
        single: fraction of the cases with one class in the set, for which the model is sure.
        single_right: fraction of those whose class, or labels, are right; unknown if there is none.
        mean_size: mean number of classes in a set.
    """

    n: int
    coverage: float
    coverage_of_class: Mapping[str, Value]
    single: float
    single_right: Value
    mean_size: float


def judge_sets(sets: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> SetStatistics:
    """Return coverage and size of (n, k) sets for (n,) true classes, or (n, k) bool labels."""
    truth, sets = one_hot(targets, len(names)), np.asarray(sets, dtype=bool)
    size = np.sum(sets, axis=1)
    is_single = np.asarray(size == 1)
    is_equal = np.all(sets == truth, axis=1)
    return SetStatistics(
        n=len(sets),
        coverage=float(sets[truth].mean()) if truth.any() else 1.0,
        coverage_of_class={
            name: _fraction(in_set[of_class], "no case has the class")
            for name, in_set, of_class in zip(names, sets.T, truth.T, strict=True)
        },
        single=float(is_single.mean()),
        single_right=_fraction(is_equal[is_single], "no set has one class"),
        mean_size=float(size.mean()),
    )


def _fraction(hits: np.ndarray, otherwise: str) -> Value:
    return Value(float(hits.mean())) if hits.size else Value(None, otherwise)


# ---- unusual images


@dataclass(frozen=True, slots=True, eq=False)
class OutlierModel:
    """A normal distribution around each class in the space of embeddings.

    Args:
        centres: (c, d) mean of each class. directions: (r, d) orthonormal.
        variances: (r,) along the directions. other_variance: () along all others.
        threshold: () distance above which an image is unusual; infinity until it is chosen.
    """

    centres: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    other_variance: np.ndarray
    threshold: np.ndarray

    def distances(self, embeddings: np.ndarray) -> np.ndarray:
        """Return (n,) Mahalanobis distance of (n, d) embeddings to the nearest class centre."""
        embeddings = np.asarray(embeddings, dtype=np.float64)
        squares = []
        for centre in self.centres:
            offset = embeddings - centre
            along = offset @ self.directions.T
            outside = np.maximum((offset**2).sum(axis=1) - (along**2).sum(axis=1), 0)
            squares.append((along**2 / self.variances).sum(axis=1) + outside / self.other_variance)
        return np.sqrt(np.min(squares, axis=0))

    def is_unusual(self, embeddings: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which images are farther away than the threshold."""
        return self.distances(embeddings) > self.threshold

    def with_threshold(self, embeddings: np.ndarray, *, usual: float = USUAL) -> OutlierModel:
        """Return the model with the threshold that this fraction of new usual images stays below.

        Args:
            embeddings: (n, d) of validation images; training images lie closer to the centres.
            usual: 0.99 flags one of 100 images that are like these; with fewer than 99 images the
                threshold is the largest distance.
        """
        distances = self.distances(embeddings)
        limit = min(conformal_quantile(distances, usual), float(distances.max()))
        return replace(self, threshold=np.array(limit))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the model as arrays by name, for a safetensors file."""
        return {
            f"outlier.{name}": np.ascontiguousarray(getattr(self, name), dtype=np.float64)
            for name in ARRAYS
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> OutlierModel:
        """Return the model that `arrays` wrote.

        Raises:
            KeyError: an array is missing.
        """
        return cls(**{name: np.asarray(arrays[f"outlier.{name}"], np.float64) for name in ARRAYS})


ARRAYS = ("centres", "directions", "variances", "other_variance", "threshold")


def fit_outliers(
    embeddings: np.ndarray,
    targets: np.ndarray | None = None,
    *,
    max_directions: int = MAX_DIRECTIONS,
) -> OutlierModel:
    """Describe the embeddings of training images, without a threshold yet.

    The distance is Mahalanobis with Ledoit–Wolf shrinkage and not that to the k nearest training
    images: those would all have to be stored with the model (20 MB for 4 000 images), and tell
    about single patients. Of the covariance the leading directions are kept; along all others the
    variance is their mean.

    Args:
        embeddings: (n, d) finite. targets: (n,) class index; None: one centre for all.
        max_directions: most directions that are kept, at most d.

    Source: Lee et al., NeurIPS (2018); shrinkage: Ledoit and Wolf, J Multivar Anal 88:365 (2004).
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"embeddings {x.shape} must be (n, d), n ≥ 2, and finite")
    classes = np.zeros(len(x)) if targets is None else targets
    groups = np.unique(classes, return_inverse=True)[1]
    centres = np.stack([x[groups == group].mean(axis=0) for group in range(groups.max() + 1)])
    offsets = x - centres[groups]
    n, d = offsets.shape
    _, singular, directions = np.linalg.svd(offsets, full_matrices=False)
    sample = singular**2 / n
    mean = sample.sum() / d
    shrinkage = _shrinkage(offsets, sample)
    variances = (1 - shrinkage) * sample + shrinkage * mean
    r = min(max_directions, d, variances.size)
    n_others = d - r
    others = variances[r:].sum() + (d - variances.size) * shrinkage * mean
    floor = max(ROUNDING * mean, SMALLEST_VARIANCE)
    return OutlierModel(
        centres=centres,
        directions=directions[:r],
        variances=np.maximum(variances[:r], floor),
        other_variance=np.array(max(others / n_others if n_others else mean, floor)),
        threshold=np.array(np.inf),
    )


def _shrinkage(offsets: np.ndarray, eigenvalues: np.ndarray) -> float:
    """Return the weight of the mean variance, from 0 to 1, that Ledoit and Wolf derive."""
    n, d = offsets.shape
    squared_norm = float((eigenvalues**2).sum())
    mean = float(eigenvalues.sum()) / d
    noise = (float(((offsets**2).sum(axis=1) ** 2).sum()) / n - squared_norm) / (d * n)
    distance = (squared_norm - d * mean**2) / d
    return 1.0 if distance <= 0 else min(1.0, max(0.0, noise / distance))
