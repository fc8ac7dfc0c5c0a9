"""Lesions of one mask and lesions of another → pairs, one to one (Hungarian method)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

MOST_PAIRS = 100_000  # of lesions that overlap, ten for each that a mask may have: more are noise
PAIR_BYTES = 1000  # measured, while the best of them are chosen

Pair = tuple[int, int]  # numbers of a lesion of the first mask and of one of the second


def best_pairs(gains: Mapping[Pair, float]) -> list[Pair]:
    """The pairs, no lesion in two of them, with the largest sum of gains (> 0). Takes memory for the pairs given, not for all that there could be."""
    if not gains:
        return []
    pairs = sorted(gains)
    (befores, rows), (afters, columns) = (
        np.unique([p[side] for p in pairs], return_inverse=True) for side in (0, 1)
    )
    values = np.array([gains[pair] for pair in pairs])
    # A lesion may stay alone: it then goes with a partner of its own that brings nothing. A weight of 0 would be no edge, so all are raised alike.
    n, m = len(befores), len(afters)
    alone = values.max() + 1
    weights = np.concatenate([alone - values, np.full(n, alone)])
    places = (np.concatenate([rows, np.arange(n)]), np.concatenate([columns, m + np.arange(n)]))
    left, right = min_weight_full_bipartite_matching(csr_array((weights, places), shape=(n, m + n)))
    chosen = zip(left.tolist(), right.tolist(), strict=True)
    return sorted((int(befores[row]), int(afters[column])) for row, column in chosen if column < m)
