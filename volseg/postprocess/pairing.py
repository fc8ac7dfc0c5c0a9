"""Lesions of one mask and lesions of another → pairs, one to one (Hungarian method)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Pair = tuple[int, int]  # numbers of a lesion of the first mask and of one of the second


def best_pairs(gains: Mapping[Pair, float]) -> list[Pair]:
    """The pairs, no lesion in two of them, with the largest sum of gains (> 0); each connected part of the graph on its own."""
    if not gains:
        return []
    pairs = np.array(sorted(gains))
    (befores, rows), (afters, columns) = (np.unique(pairs[:, side], return_inverse=True) for side in (0, 1))
    n = len(befores) + len(afters)
    graph = coo_array((np.ones(len(pairs)), (rows, columns + len(befores))), shape=(n, n))
    parts = connected_components(graph, directed=False)[1][rows]
    chosen = []
    for members in np.split(np.argsort(parts, kind="stable"), np.flatnonzero(np.diff(np.sort(parts))) + 1):
        (left, i), (right, j) = (np.unique(pairs[members, side], return_inverse=True) for side in (0, 1))
        matrix = np.zeros((len(left), len(right)))
        matrix[i, j] = [gains[b, f] for b, f in pairs[members].tolist()]
        for row, column in zip(*linear_sum_assignment(matrix, maximize=True), strict=True):
            if matrix[row, column] > 0:
                chosen.append((int(left[row]), int(right[column])))
    return sorted(chosen)
