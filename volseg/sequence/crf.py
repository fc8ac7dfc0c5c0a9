"""A linear-chain conditional random field (CRF) on the probabilities of a slice classifier.

Sources: Lafferty et al., ICML (2001); Sutton and McCallum, Found Trends Mach Learn 4:267 (2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from volseg.sequence.chains import Chain, check_scores, frozen_array, messages
from volseg.sequence.labels import UNKNOWN, check_labels

GRADIENT = 1e-4  # per slice: above it, the fit has not converged
MAX_ITERATIONS = 2000


@dataclass(frozen=True, slots=True, eq=False)
class LinearChainCRF:
    """Parameters of a chain of k states; checked when made. Arrays are read-only float64.

    Args:
        transition: (k, k) score of the step from state i (row) to state j (column) of the next
            slice; −inf forbids it.
        bias: (k,) finite score added to each state in every slice.
        weight: finite factor of the log-probabilities that are given; 1 takes them as they are.

    Raises:
        ValueError: a shape is wrong, or a number is not of these.
    """

    transition: np.ndarray
    bias: np.ndarray
    weight: float = 1.0

    def __post_init__(self) -> None:
        transition, bias = frozen_array(self.transition), frozen_array(self.bias)
        if bias.ndim != 1 or not bias.size or transition.shape != (bias.size,) * 2:
            raise ValueError(
                f"bias {bias.shape} must be (k,), transition {transition.shape} (k, k)"
            )
        check_scores(transition, "transition")
        if not (np.isfinite(bias).all() and np.isfinite(self.weight)):
            raise ValueError(f"bias {bias} and weight {self.weight} must be finite")
        object.__setattr__(self, "transition", transition)
        object.__setattr__(self, "bias", bias)

    def chain(self, log_probabilities: np.ndarray) -> Chain:
        """Return the chain whose paths are the sequences of labels of one scan.

        Args:
            log_probabilities: (n, k) natural logarithms of a classifier, one row per slice. A
                constant added to a row changes no path and no marginal. −inf excludes a state,
                whatever the weight.

        Raises:
            ValueError: there is no slice, or a value is NaN or +inf.
        """
        features, excluded = split_features(log_probabilities, self.bias.size, "log_probabilities")
        return Chain(self.weight * features + excluded + self.bias, self.transition)


def fit_crf(
    log_probabilities: Sequence[np.ndarray], labels: Sequence[np.ndarray], *, l2: float = 1.0
) -> LinearChainCRF:
    """Fit a CRF by maximum conditional likelihood, with exact gradients and L-BFGS.

    It minimises −Σ over scans of ln p(labels | log-probabilities) + l2 / 2 × (Σ transition² +
    Σ bias² + (weight − 1)²): with a large `l2` the given probabilities stay as they are. With a
    label in every slice this is convex, so the minimum is unique. Slices without a label are
    marginalised, and then it is a local minimum.

    Args:
        log_probabilities: one (n, k) array per scan, as in `LinearChainCRF.chain`, from a
            classifier that was not trained on these slices.
        labels: one (n,) integer array per scan: the true label of each slice, or −1 if unknown.
        l2: above 0, or labels that the parameters can explain perfectly have no finite optimum.

    Raises:
        ValueError: there is no label, shapes differ, a number is not finite, or −inf excludes the
            label of a slice.
    """
    if not (np.isfinite(l2) and l2 > 0):
        raise ValueError(f"l2 = {l2} must be above 0; 1 is the usual value")
    scans = LabelledScans.stack(log_probabilities, labels)
    k = scans.n_states
    first = np.concatenate([np.zeros(k * k + k), [1.0]])
    fit = minimize(
        lambda parameters: crf_loss(parameters, scans, l2),
        first,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_ITERATIONS, "ftol": 1e-13, "gtol": 1e-7},
    )
    if np.abs(fit.jac).max() > GRADIENT * scans.is_slice.sum():
        raise ValueError(f"the CRF did not converge ({fit.message}); raise l2 = {l2}")
    return unpack(fit.x, k)


def unpack(parameters: np.ndarray, n_states: int) -> LinearChainCRF:
    """Return the CRF of (k² + k + 1,) numbers: transition by rows, bias, weight."""
    transition, bias, weight = np.split(parameters, [n_states**2, n_states**2 + n_states])
    return LinearChainCRF(transition.reshape(n_states, n_states), bias, float(weight[0]))


@dataclass(frozen=True, slots=True, eq=False)
class LabelledScans:
    """Scans of different lengths side by side: b scans, n slices of the longest, k states.

    Args:
        features: (n, b, k) log-probabilities, 0 where they are −inf and after the last slice.
        excluded: (n, b, k) −inf where a state is excluded, else 0.
        by_label: (n, b, k) −inf where a label excludes a state, else 0.
        is_slice: (n, b) bool, False after the last slice of a scan.
    """

    features: np.ndarray
    excluded: np.ndarray
    by_label: np.ndarray
    is_slice: np.ndarray

    @property
    def n_states(self) -> int:
        return self.features.shape[-1]

    @classmethod
    def stack(cls, tables: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> LabelledScans:
        """Check the scans and pad them to one length."""
        if not len(tables) or len(tables) != len(labels):
            raise ValueError(f"{len(tables)} scans with {len(labels)} of labels: need as many, ≥ 1")
        n_states = np.shape(tables[0])[-1]
        n, b = max(map(len, tables)), len(tables)
        features, excluded, by_label = np.zeros((3, n, b, n_states))
        is_slice = np.zeros((n, b), bool)
        for scan, (table, truth) in enumerate(zip(tables, labels, strict=True)):
            values, without = split_features(table, n_states, f"log-probabilities of scan {scan}")
            truth = check_labels(truth, n_states, f"labels of scan {scan}")
            allowed = _by_label(truth, without, scan)
            part = slice(len(values)), scan
            features[part], excluded[part], by_label[part] = values, without, allowed
            is_slice[part] = True
        if not np.isinf(by_label).any() and n_states > 1:
            raise ValueError("no slice has a label to learn from")
        return cls(features, excluded, by_label, is_slice)


def _by_label(truth: np.ndarray, excluded: np.ndarray, scan: int) -> np.ndarray:
    """Return (n, k) −inf for the states that a label excludes, else 0."""
    if truth.shape != excluded.shape[:1]:
        raise ValueError(f"scan {scan} has {len(excluded)} slices but {truth.size} labels")
    is_other = (truth[:, None] != np.arange(excluded.shape[1])) & (truth != UNKNOWN)[:, None]
    is_impossible = (is_other | np.isinf(excluded)).all(axis=1)
    if is_impossible.any():
        raise ValueError(
            f"scan {scan}, slice {is_impossible.argmax()}: log-probabilities of −inf exclude the "
            "label, or every state; clip the probabilities above 0"
        )
    return np.where(is_other, -np.inf, 0.0)


def split_features(table: np.ndarray, n_states: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, k) log-probabilities with 0 for −inf, and (n, k) −inf there and 0 elsewhere."""
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != n_states or not table.size:
        raise ValueError(f"{name}: {table.shape} must be (n, {n_states}) with n ≥ 1 slices")
    check_scores(table, name)
    is_excluded = table == -np.inf
    return np.where(is_excluded, 0.0, table), np.where(is_excluded, -np.inf, 0.0)


def crf_loss(parameters: np.ndarray, scans: LabelledScans, l2: float) -> tuple[float, np.ndarray]:
    """Return what `fit_crf` minimises, and its gradient.

    The gradient is the difference of expected counts, under the model and with the labels given.

    Args:
        parameters: (k² + k + 1,), as in `unpack`.
    """
    crf = unpack(parameters, scans.n_states)
    unary = crf.weight * scans.features + scans.excluded + crf.bias
    free = _expected_counts(unary, crf.transition, scans)
    labelled = _expected_counts(unary + scans.by_label, crf.transition, scans)
    shift = parameters - np.concatenate([np.zeros(parameters.size - 1), [1.0]])
    loss = free[0] - labelled[0] + l2 / 2 * float(shift @ shift)
    return loss, free[1] - labelled[1] + l2 * shift


def _expected_counts(
    unary: np.ndarray, transition: np.ndarray, scans: LabelledScans
) -> tuple[float, np.ndarray]:
    """Return Σ over scans of ln Z, and its gradient with respect to the parameters."""
    linked = scans.is_slice[1:]
    before = messages(unary, transition, linked=linked)
    after = messages(unary[::-1], transition.T, linked=linked[::-1])[::-1]
    log_z = np.logaddexp.reduce(unary[0] + after[0], axis=-1)[:, None]
    inside = before + unary + after - log_z
    nodes = np.exp(np.where(scans.is_slice[..., None], inside, -np.inf))
    begins, ends = before + unary - log_z, unary + after
    pairs = np.zeros_like(transition)
    for t, are_linked in enumerate(linked):
        steps = begins[t][:, :, None] + transition + ends[t + 1][:, None, :]
        pairs += np.exp(steps[are_linked]).sum(axis=0)
    gradient = [pairs.ravel(), nodes.sum(axis=(0, 1)), [(nodes * scans.features).sum()]]
    return float(log_z.sum()), np.concatenate(gradient)
