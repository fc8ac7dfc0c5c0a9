"""The labels of slices as states: integers from 0, and −1 where there is none."""

from __future__ import annotations

import numpy as np

UNKNOWN = -1  # the state of a slice without a label or without a prediction


def check_labels(labels: np.ndarray, n_states: int, name: str) -> np.ndarray:
    """Return (n,) labels as integers; raise ValueError if one is not −1 … k − 1."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
        raise ValueError(f"{name}: {labels.shape} of {labels.dtype} must be (n,) integers")
    if labels.size and not (labels.min() >= UNKNOWN and labels.max() < n_states):
        low, high = labels.min(), labels.max()
        raise ValueError(f"{name}: from {low} to {high}, must be −1 or 0 … {n_states - 1}")
    return labels.astype(np.int64)
