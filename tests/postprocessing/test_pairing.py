from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.postprocessing.pairing import best_pairs


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.tuples(*[st.integers(1, 5)] * 2), st.floats(1e-9, 10.0), max_size=15))
def test_no_other_pairs_gain_more(gains):
    pairs = best_pairs(gains)
    assert all(pair in gains for pair in pairs)
    assert all(len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1))
    best = max(
        sum(gains.get((row, column), 0.0) for row, column in zip(range(1, 6), order, strict=True))
        for order in permutations(range(1, 6))
    )
    assert abs(sum(gains[pair] for pair in pairs) - best) < 1e-9


def test_many_overlapping_specks_need_no_dense_matrix():
    n = 20_000  # a dense matrix would take 3.2 GB
    gains = {(i, j): 1.0 + (i == j) for i in range(n) for j in (i, (i + 1) % n)}
    assert best_pairs(gains) == [(i, i) for i in range(n)]


def test_no_gains_give_no_pairs():
    assert best_pairs({}) == []
    assert np.shape(best_pairs({(1, 1): 0.5})) == (1, 2)
