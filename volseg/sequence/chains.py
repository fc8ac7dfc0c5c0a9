"""Exact inference in a chain of states, one per slice: partition function, marginals, best path.

The score of a sequence of states y is Σ unary[t, y[t]] + Σ transition[y[t], y[t + 1]], and its
probability is exp(score) / Z. A score of −inf excludes a state or a transition. Everything is
computed with logarithms, so scores of any size neither underflow nor overflow.

Sources: Rabiner, Proc IEEE 77:257 (1989); Lafferty et al., ICML (2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Scores of the states of n slices; checked when made.

    Args:
        unary: (n, k) score of each state in each slice, natural logarithms; n, k ≥ 1.
        transition: (k, k) score of the step from state i (row) to state j (column) of the next
            slice.

    Raises:
        ValueError: a shape is wrong, or a score is NaN or +inf.

    >>> chain = Chain([[0.0, 1.0], [0.5, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    >>> chain.best_path().tolist()
    [1, 1, 1]
    >>> chain.marginals()[1].round(3).tolist()
    [0.409, 0.591]
    """

    unary: np.ndarray
    transition: np.ndarray

    def __post_init__(self) -> None:
        unary, transition = frozen_array(self.unary), frozen_array(self.transition)
        if unary.ndim != 2 or not unary.size:
            raise ValueError(f"unary {unary.shape} must be (n, k) with n, k ≥ 1")
        if transition.shape != (unary.shape[1],) * 2:
            k = unary.shape[1]
            raise ValueError(f"transition {transition.shape} must be ({k}, {k})")
        for name, scores in (("unary", unary), ("transition", transition)):
            check_scores(scores, name)
            object.__setattr__(self, name, scores)

    def score(self, path: np.ndarray) -> float:
        """Return the score of a sequence of states, (n,) integers; −inf if it is impossible."""
        path = check_path(path, *self.unary.shape)
        steps = self.transition[path[:-1], path[1:]]
        return float(self.unary[np.arange(path.size), path].sum() + steps.sum())

    def log_partition(self) -> float:
        """Return ln Z, over all sequences of states; −inf if none is possible."""
        return float(np.logaddexp.reduce(self._forward()[-1]))

    def marginals(self) -> np.ndarray:
        """Return (n, k) the probability of each state in each slice, by forward–backward.

        Raises:
            ValueError: no sequence of states is possible.
        """
        forward, after, log_z = self._forward_backward()
        return np.exp(forward + after - log_z)

    def pair_marginals(self) -> np.ndarray:
        """Return (n − 1, k, k) the probability of state i in slice t and j in slice t + 1.

        Raises:
            ValueError: no sequence of states is possible.
        """
        forward, after, log_z = self._forward_backward()
        ends = (self.unary + after - log_z)[1:, None, :]
        return np.exp(forward[:-1, :, None] + self.transition + ends)

    def best_path(self) -> np.ndarray:
        """Return (n,) the sequence of states with the highest score, by Viterbi's algorithm.

        Of several with exactly the same score, it is the one with the lowest last state, then the
        lowest one before, and so on.

        Raises:
            ValueError: no sequence of states is possible.
        """
        best = messages(self.unary, self.transition, combine=np.maximum) + self.unary
        path = np.empty(len(best), np.int64)
        path[-1] = self._possible(best)[-1].argmax()
        for t in range(len(best) - 2, -1, -1):
            path[t] = (best[t] + self.transition[:, path[t + 1]]).argmax()
        return path

    def _forward(self) -> np.ndarray:
        """Return (n, k) ln of the sum over all beginnings that end in a slice and state."""
        return messages(self.unary, self.transition) + self.unary

    def _forward_backward(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Return `_forward`, the messages from the slices after, and ln Z."""
        forward = self._possible(self._forward())
        after = messages(self.unary[::-1], self.transition.T)[::-1]
        return forward, after, float(np.logaddexp.reduce(forward[-1]))

    def _possible(self, forward: np.ndarray) -> np.ndarray:
        """Return the scores of beginnings; raise if none reaches the last slice."""
        is_reached = (forward > -np.inf).any(axis=1)
        if not is_reached.all():
            raise ValueError(
                f"no sequence of states is possible: scores of −inf exclude every state of slice "
                f"{is_reached.argmin()} (counted from 0); allow a state or a transition there"
            )
        return forward


def messages(
    unary: np.ndarray,
    transition: np.ndarray,
    *,
    combine: np.ufunc = np.logaddexp,
    linked: np.ndarray | None = None,
) -> np.ndarray:
    """Return what the slices before say about each state of a slice, without its own unary score.

    `m[0] = 0` and `m[t + 1, j] = combine over i of m[t, i] + unary[t, i] + transition[i, j]`: the
    forward recursion with `logaddexp`, the one of Viterbi with `maximum`.

    Args:
        unary: (n, …, k): the axes between are chains side by side.
        linked: (n − 1, …) bool, False where slice t + 1 does not belong to the chain of slice t;
            default: it always does.

    Returns:
        (n, …, k).
    """
    result = np.zeros_like(unary)
    for t in range(len(unary) - 1):
        steps = (result[t] + unary[t])[..., :, None] + transition
        combine.reduce(steps, axis=-2, out=result[t + 1])
        if linked is not None:
            result[t + 1][~linked[t]] = 0
    return result


def frozen_array(values: object) -> np.ndarray:
    """Return a read-only copy in float64."""
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


def check_scores(scores: np.ndarray, name: str) -> None:
    """Raise ValueError where a score is NaN or +inf, with its place."""
    bad = np.argwhere(np.isnan(scores) | (scores == np.inf))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise ValueError(f"{name}{list(place)} is {scores[place]}: scores are finite or −inf")


def check_path(path: np.ndarray, n_slices: int, n_states: int) -> np.ndarray:
    """Return (n,) states as integers; raise ValueError if there are other values or too many."""
    path = np.asarray(path)
    if path.shape != (n_slices,) or path.dtype.kind not in "iu":
        raise ValueError(f"path {path.shape} of {path.dtype} must be ({n_slices},) integers")
    if path.min() < 0 or path.max() >= n_states:
        raise ValueError(f"states from {path.min()} to {path.max()} must be 0 … {n_states - 1}")
    return path
