"""Pair the lesions of two masks one to one (Hungarian method)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

MAX_PAIRS = 100_000  # overlapping lesions, ten per lesion that a mask may have: more are noise
PAIR_BYTES = 1000  # measured, during the assignment

Pair = tuple[int, int]  # lesion numbers in the first and in the second mask


def best_pairs(gains: Mapping[Pair, float]) -> list[Pair]:
    """Return the one-to-one pairs with the largest sum of gains (> 0).

    Memory grows with the number of given pairs, not of all possible ones.
    """
    if not gains:
        return []
    pairs = sorted(gains)
    (befores, rows), (afters, columns) = (
        np.unique([p[side] for p in pairs], return_inverse=True) for side in (0, 1)
    )
    values = np.array([gains[pair] for pair in pairs])
    # A lesion may stay unpaired: it is then matched with its own dummy, at no gain. All weights are
    # raised equally, because a weight of 0 would mean no edge.
    n, m = len(befores), len(afters)
    alone = values.max() + 1
    weights = np.concatenate([alone - values, np.full(n, alone)])
    edges = (np.concatenate([rows, np.arange(n)]), np.concatenate([columns, m + np.arange(n)]))
    left, right = min_weight_full_bipartite_matching(csr_array((weights, edges), shape=(n, m + n)))
    matches = zip(left.tolist(), right.tolist(), strict=True)
    return sorted((int(befores[row]), int(afters[column])) for row, column in matches if column < m)
