"""Inference in chains against the enumeration of all sequences of states, and by its laws."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest

from volseg.sequence.chains import Chain

KINDS = [(scale, excluded) for scale in (0.3, 2.0, 30.0, 300.0) for excluded in (0.0, 0.3, 0.6)]


def all_paths(n_slices, n_states):
    """Return (k ** n, n) every sequence of states, in the order of counting."""
    return np.array(list(product(range(n_states), repeat=n_slices)))


def scores_of(paths, unary, transition):
    """Return the score of each path, from the definition."""
    scores = np.zeros(len(paths))
    for t in range(paths.shape[1]):
        scores += unary[t, paths[:, t]]
        if t:
            scores += transition[paths[:, t - 1], paths[:, t]]
    return scores


def draw(seed, *, scale=2.0, excluded=0.0):
    """Draw a chain of at most 4 states and 8 slices; some scores are −inf, but one path is not."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    unary, transition = rng.normal(0, scale, (n, k)), rng.normal(0, scale, (k, k))
    is_excluded, is_forbidden = rng.random((n, k)) < excluded, rng.random((k, k)) < excluded
    path = rng.integers(k, size=n)
    is_excluded[np.arange(n), path] = False
    is_forbidden[path[:-1], path[1:]] = False
    return np.where(is_excluded, -np.inf, unary), np.where(is_forbidden, -np.inf, transition)


@pytest.mark.parametrize("seeds", [96, pytest.param(1800, marks=pytest.mark.slow)])
def test_partition_marginals_and_best_path_are_those_of_all_sequences(seeds):
    for seed in range(seeds):
        scale, excluded = KINDS[seed % len(KINDS)]
        unary, transition = draw(seed, scale=scale, excluded=excluded)
        n, k = unary.shape
        paths = all_paths(n, k)
        scores = scores_of(paths, unary, transition)
        log_z = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        p = np.exp(scores - log_z)
        chain = Chain(unary, transition)
        np.testing.assert_allclose(chain.log_partition(), log_z, rtol=0, atol=1e-9)
        nodes = [[p[paths[:, t] == s].sum() for s in range(k)] for t in range(n)]
        np.testing.assert_allclose(chain.marginals(), nodes, rtol=0, atol=1e-9)
        pairs = np.zeros((n - 1, k, k))
        for t in range(n - 1):
            np.add.at(pairs[t], (paths[:, t], paths[:, t + 1]), p)
        np.testing.assert_allclose(chain.pair_marginals(), pairs, rtol=0, atol=1e-9)
        best = chain.best_path()
        assert best.tolist() == paths[scores.argmax()].tolist()
        np.testing.assert_allclose(chain.score(best), scores.max(), rtol=0, atol=1e-9)


def test_scores_of_impossible_and_possible_paths_are_those_of_the_definition():
    for seed in range(30):
        unary, transition = draw(seed, excluded=0.3)
        chain, paths = Chain(unary, transition), all_paths(*unary.shape)[:200]
        expected = scores_of(paths, unary, transition)
        np.testing.assert_allclose([chain.score(path) for path in paths], expected, atol=1e-9)


def test_constants_change_neither_probabilities_nor_the_best_path():
    rng = np.random.default_rng(0)
    unary, transition = rng.normal(0, 2, (50, 5)), rng.normal(0, 2, (5, 5))
    plain = Chain(unary, transition)
    by_slice = rng.normal(0, 300, (50, 1))
    shifted = Chain(unary + by_slice, transition - 700)
    np.testing.assert_allclose(shifted.marginals(), plain.marginals(), atol=1e-9)
    assert shifted.best_path().tolist() == plain.best_path().tolist()
    change = by_slice.sum() - 49 * 700
    assert shifted.log_partition() == pytest.approx(plain.log_partition() + change, abs=1e-8)


def test_scores_that_would_underflow_as_probabilities_keep_their_sum():
    """Two states without a way between them: two paths, of which the better one starts worse."""
    unary = np.zeros((2000, 2))
    unary[0], unary[-1] = (0, -5000), (-5001, 0)
    chain = Chain(unary, [[0, -np.inf], [-np.inf, 0]])
    assert chain.log_partition() == pytest.approx(-5000 + np.log1p(np.exp(-1)), abs=1e-9)
    np.testing.assert_allclose(chain.marginals()[:, 1], 1 / (1 + np.exp(-1)), atol=1e-12)
    assert chain.best_path().tolist() == [1] * 2000


def test_without_transitions_slices_are_independent():
    unary = np.random.default_rng(1).normal(0, 2, (30, 4))
    chain = Chain(unary, np.zeros((4, 4)))
    softmax = np.exp(unary) / np.exp(unary).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(chain.marginals(), softmax, atol=1e-12)
    assert chain.best_path().tolist() == unary.argmax(axis=1).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_reversed_slices_and_renamed_states_give_the_same_answer(seed):
    rng = np.random.default_rng(seed)
    unary, transition = rng.normal(0, 2, (40, 5)), rng.normal(0, 2, (5, 5))
    chain, order = Chain(unary, transition), rng.permutation(5)
    turned = Chain(unary[::-1], transition.T)
    renamed = Chain(unary[:, order], transition[np.ix_(order, order)])
    for other in (turned, renamed):
        assert other.log_partition() == pytest.approx(chain.log_partition(), abs=1e-9)
    np.testing.assert_allclose(turned.marginals()[::-1], chain.marginals(), atol=1e-10)
    np.testing.assert_allclose(renamed.marginals(), chain.marginals()[:, order], atol=1e-10)
    assert turned.best_path()[::-1].tolist() == chain.best_path().tolist()
    assert order[renamed.best_path()].tolist() == chain.best_path().tolist()


def test_pairs_sum_to_the_marginals_of_both_slices():
    rng = np.random.default_rng(2)
    chain = Chain(rng.normal(0, 2, (200, 6)), rng.normal(0, 2, (6, 6)))
    pairs, nodes = chain.pair_marginals(), chain.marginals()
    np.testing.assert_allclose(nodes.sum(axis=1), 1, atol=1e-10)
    np.testing.assert_allclose(pairs.sum(axis=2), nodes[:-1], atol=1e-10)
    np.testing.assert_allclose(pairs.sum(axis=1), nodes[1:], atol=1e-10)


def test_marginals_are_the_derivatives_of_the_log_partition():
    rng = np.random.default_rng(3)
    unary, transition = rng.normal(0, 1, (6, 3)), rng.normal(0, 1, (3, 3))
    pairs, nodes = Chain(unary, transition).pair_marginals(), Chain(unary, transition).marginals()
    step = 1e-5
    for place in np.ndindex(6, 3):
        change = np.zeros((6, 3))
        change[place] = step
        up, down = (Chain(unary + s * change, transition).log_partition() for s in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(nodes[place], abs=1e-8)
    for place in np.ndindex(3, 3):
        change = np.zeros((3, 3))
        change[place] = step
        up, down = (Chain(unary, transition + s * change).log_partition() for s in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(pairs.sum(axis=0)[place], abs=1e-8)


def test_of_equal_paths_the_lowest_last_state_is_chosen():
    assert Chain(np.zeros((3, 2)), np.zeros((2, 2))).best_path().tolist() == [0, 0, 0]
    alternating = Chain(np.zeros((4, 2)), [[-1, 0], [0, -1]])
    assert alternating.best_path().tolist() == [1, 0, 1, 0]


def test_one_slice_is_a_softmax_and_one_state_is_certain():
    one_slice = Chain([[np.log(3), 0, -np.inf]], np.full((3, 3), -np.inf))
    np.testing.assert_allclose(one_slice.marginals(), [[0.75, 0.25, 0]])
    assert one_slice.log_partition() == pytest.approx(np.log(4))
    assert one_slice.pair_marginals().shape == (0, 3, 3)
    assert one_slice.best_path().tolist() == [0]
    one_state = Chain([[1.0], [2.0], [3.0]], [[0.5]])
    assert one_state.log_partition() == pytest.approx(7)
    np.testing.assert_allclose(one_state.marginals(), 1, atol=1e-14)
    assert one_state.best_path().tolist() == [0, 0, 0]


def test_if_no_sequence_is_possible_the_slice_is_named():
    """State 1 is the only one of slice 1, and state 0 that of slice 2: there is no way back."""
    unary = [[0, 0], [-np.inf, 0], [0, -np.inf], [0, 0]]
    chain = Chain(unary, [[0, 0], [-np.inf, 0]])
    assert chain.log_partition() == -np.inf
    for ask in (chain.marginals, chain.pair_marginals, chain.best_path):
        with pytest.raises(ValueError, match=r"no sequence of states is possible.* slice 2 "):
            ask()


@pytest.mark.parametrize(
    ("unary", "transition", "message"),
    [
        (np.zeros((0, 2)), np.zeros((2, 2)), "with n, k ≥ 1"),
        (np.zeros((2, 0)), np.zeros((0, 0)), "with n, k ≥ 1"),
        (np.zeros(3), np.zeros((3, 3)), "with n, k ≥ 1"),
        (np.zeros((4, 2)), np.zeros((3, 3)), r"transition \(3, 3\) must be \(2, 2\)"),
        ([[0, 1], [np.nan, 0]], np.zeros((2, 2)), r"unary\[1, 0\] is nan"),
        ([[0, np.inf]], np.zeros((2, 2)), r"unary\[0, 1\] is inf"),
        ([[0, 1]], [[0, 0], [0, np.nan]], r"transition\[1, 1\] is nan"),
    ],
)
def test_scores_that_mean_nothing_are_refused(unary, transition, message):
    with pytest.raises(ValueError, match=message):
        Chain(unary, transition)


@pytest.mark.parametrize("path", [[0], [0, 2], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_paths_that_are_no_states_of_the_slices_are_refused(path):
    with pytest.raises(ValueError, match="must be"):
        Chain(np.zeros((2, 2)), np.zeros((2, 2))).score(np.array(path))


def test_scores_cannot_be_changed_from_outside():
    unary = np.zeros((2, 2))
    chain = Chain(unary, np.zeros((2, 2)))
    unary[0, 0] = 9
    assert chain.log_partition() == pytest.approx(np.log(4))
    with pytest.raises(ValueError, match="read-only"):
        chain.unary[0, 0] = 9


def seconds(ask):
    """Return the shortest of several times."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        ask()
        times.append(time.perf_counter() - started)
    return min(times)


@pytest.mark.parametrize("question", ["log_partition", "marginals", "best_path"])
def test_time_grows_linearly_with_slices(question):
    """Eight times the slices take about eight times as long; 64 times would be quadratic."""
    rng = np.random.default_rng(0)
    transition = rng.normal(size=(10, 10))
    short, long = (Chain(rng.normal(size=(n, 10)), transition) for n in (250, 2000))
    assert seconds(getattr(long, question)) < 24 * seconds(getattr(short, question))
