"""Hidden Markov models of slice labels, learned by counting in labelled sequences.

The state is the true label of a slice; what is observed is a predicted label, or the probabilities
of a classifier.

Source: Rabiner, Proc IEEE 77:257 (1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.sequence.chains import Chain, frozen_array
from volseg.sequence.labels import UNKNOWN, check_labels

ROUNDING = 1e-6  # by which a sum of probabilities may differ from 1


@dataclass(frozen=True, slots=True, eq=False)
class HiddenMarkovModel:
    """Probabilities of k states; checked when made. All fields are read-only float64.

    Args:
        start: (k,) probability of each state in the first slice.
        transition: (k, k) probability of state j (column) in the slice after state i (row).
        prior: (k,) frequency above 0 of each class in the data that the classifier was trained on,
            by which its probabilities are divided. `fit_hmm` takes that of its labels; replace it
            if the classifier was trained with other frequencies or with balanced weights.
        emission: (k, k) probability of the predicted label (column) given the state (row), the
            confusion matrix with rows of sum 1; None if only probabilities are observed.

    Raises:
        ValueError: a shape is wrong, or a row is not a distribution.
    """

    start: np.ndarray
    transition: np.ndarray
    prior: np.ndarray
    emission: np.ndarray | None = None

    def __post_init__(self) -> None:
        k = np.size(self.start)
        shapes = {"start": (k,), "transition": (k, k), "prior": (k,), "emission": (k, k)}
        for name, shape in shapes.items():
            if getattr(self, name) is None and name == "emission":
                continue
            table = frozen_array(getattr(self, name))
            if not k or table.shape != shape:
                raise ValueError(f"{name} {table.shape} must be {shape}, with k ≥ 1 states")
            if not (table >= 0).all() or np.abs(table.sum(axis=-1) - 1).max() > ROUNDING:
                raise ValueError(f"{name} must hold probabilities with sum 1 in each row: {table}")
            object.__setattr__(self, name, table)
        if not self.prior.all():
            raise ValueError(f"prior must be above 0 for every class: {self.prior}")

    def chain(self, observations: np.ndarray) -> Chain:
        """Return the chain whose paths are the sequences of true labels of one scan.

        The score of a path is ln of its joint probability with the observations. With probabilities
        of a classifier it lacks a constant, ln p(images), which changes no path and no marginal.

        Args:
            observations: (n,) integers: predicted labels, −1 in a slice without one; or (n, k)
                probabilities of a classifier, rows with sum 1. They are divided by `prior` (Bayes),
                as the likelihood of a slice is proportional to probability / prior.

        Raises:
            ValueError: there is no slice, an observation is out of range or not finite, or there is
                no confusion matrix for predicted labels.
        """
        observations = np.asarray(observations)
        if not observations.size:
            raise ValueError("the sequence is empty: it needs at least one slice")
        with np.errstate(divide="ignore"):  # ln 0 = −inf excludes a state
            start, transition = np.log(self.start), np.log(self.transition)
            unary = np.log(self._likelihoods(observations))
        unary[0] += start
        return Chain(unary, transition)

    def _likelihoods(self, observations: np.ndarray) -> np.ndarray:
        """Return (n, k) the probability of each observation given each state, or proportional."""
        k = self.start.size
        if observations.ndim == 2:
            return _check_distributions(observations, k) / self.prior
        predicted = check_labels(observations, k, "observations")
        if self.emission is None:
            raise ValueError(
                "the model has no confusion matrix for predicted labels; fit it with `predicted`, "
                "or give probabilities (n, k)"
            )
        likelihoods = self.emission.T[predicted]
        likelihoods[predicted == UNKNOWN] = 1
        return likelihoods


def fit_hmm(
    labels: Sequence[np.ndarray],
    n_states: int,
    *,
    predicted: Sequence[np.ndarray] | None = None,
    smoothing: float = 1.0,
    monotone: bool = False,
) -> HiddenMarkovModel:
    """Count starts, steps and confusions in labelled sequences.

    Slices without a label (−1) are skipped, with the steps from and to them.

    Args:
        labels: one (n,) integer array per scan: the true label of each slice, 0 … k − 1 or −1.
        predicted: the labels predicted for the same slices, from a classifier that was not trained
            on them; −1 in a slice without one.
        smoothing: added to every count (Laplace), ≥ 0. With 0, what never occurred is impossible.
        monotone: allow only steps to the same or a later state, for labels in a fixed order, such
            as body regions from feet to head.

    Raises:
        ValueError: there is no labelled slice, a label is out of range, lengths differ, a sequence
            goes back although `monotone`, or a state was never followed by any and there is no
            smoothing.

    >>> truth = np.repeat([0, 1], 10)
    >>> predicted = truth.copy()
    >>> predicted[[2, 15]] = 1, 0
    >>> model = fit_hmm([truth], 2, predicted=[predicted], monotone=True)
    >>> model.chain(np.array([0, 1, 0, 0, 1, 1, 0, 1])).best_path().tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    if not 0 <= smoothing < np.inf:
        raise ValueError(f"smoothing = {smoothing} must be ≥ 0; 1 is the usual value")
    labels = [check_labels(scan, n_states, f"labels of scan {n}") for n, scan in enumerate(labels)]
    every = np.concatenate([np.empty(0, np.int64), *labels])
    if not (every != UNKNOWN).any():
        raise ValueError("there is no labelled slice to learn from")
    steps = np.sum([_pairs(scan[:-1], scan[1:], n_states) for scan in labels], axis=0)
    allowed = np.ones((n_states, n_states), bool)
    if monotone:
        allowed = np.triu(allowed)
        _check_order(labels)
    starts = np.array([scan[0] for scan in labels if scan.size])
    return HiddenMarkovModel(
        start=_frequencies(_counts(starts, n_states), smoothing, "start"),
        transition=_frequencies(steps, smoothing, "transition", allowed),
        prior=_frequencies(_counts(every, n_states), smoothing, "prior"),
        emission=None if predicted is None else _confusion(labels, predicted, n_states, smoothing),
    )


def _confusion(
    labels: list[np.ndarray], predicted: Sequence[np.ndarray], n_states: int, smoothing: float
) -> np.ndarray:
    """Return (k, k) frequencies of predicted (column) given true labels (row)."""
    if len(predicted) != len(labels):
        raise ValueError(f"{len(labels)} scans have labels but {len(predicted)} predicted ones")
    counts = np.zeros((n_states, n_states))
    for n, (truth, guess) in enumerate(zip(labels, predicted, strict=True)):
        guess = check_labels(guess, n_states, f"predicted labels of scan {n}")
        if guess.shape != truth.shape:
            raise ValueError(f"scan {n} has {truth.size} labels but {guess.size} predicted ones")
        counts += _pairs(truth, guess, n_states)
    return _frequencies(counts, smoothing, "emission")


def _check_order(labels: list[np.ndarray]) -> None:
    """Raise ValueError if the labels of a scan go back, also across slices without a label."""
    for n, scan in enumerate(labels):
        slices = np.flatnonzero(scan != UNKNOWN)
        back = np.flatnonzero(np.diff(scan[slices]) < 0)
        if back.size:
            before, after = slices[back[0]], slices[back[0] + 1]
            raise ValueError(
                f"scan {n} goes back from state {scan[before]} in slice {before} to {scan[after]} "
                f"in slice {after}; reverse its slices, or fit with monotone=False"
            )


def _counts(states: np.ndarray, n_states: int) -> np.ndarray:
    return np.bincount(states[states != UNKNOWN], minlength=n_states).astype(np.float64)


def _pairs(rows: np.ndarray, columns: np.ndarray, n_states: int) -> np.ndarray:
    """Return (k, k) how often each pair of states occurs in the same place of two arrays."""
    both = (rows != UNKNOWN) & (columns != UNKNOWN)
    return _counts(rows[both] * n_states + columns[both], n_states**2).reshape(n_states, n_states)


def _frequencies(
    counts: np.ndarray, smoothing: float, name: str, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Return counts as frequencies along the last axis; what is not allowed has none."""
    smoothed = counts + smoothing
    if allowed is not None:
        only = allowed & (allowed.sum(axis=1, keepdims=True) == 1)
        smoothed = np.where(only, 1, smoothed * allowed)  # one way on: no count is needed
    total = smoothed.sum(axis=-1, keepdims=True)
    if not total.all():
        state = "" if counts.ndim == 1 else f" of state {int(total.ravel().argmin())}"
        raise ValueError(f"nothing to count for {name}{state}; give smoothing above 0")
    return smoothed / total


def _check_distributions(probabilities: np.ndarray, n_classes: int) -> np.ndarray:
    """Return (n, k) probabilities; raise ValueError if a row is not a distribution."""
    table = np.asarray(probabilities, dtype=np.float64)
    if table.shape[1:] != (n_classes,):
        raise ValueError(f"probabilities {table.shape} must be (n, {n_classes})")
    is_bad = ~((table >= 0).all(axis=1) & (np.abs(table.sum(axis=1) - 1) <= 1e-3))
    if is_bad.any():
        row = int(is_bad.argmax())
        raise ValueError(f"row {row} is not a distribution with sum 1: {table[row].tolist()}")
    return table
