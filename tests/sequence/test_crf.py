"""The CRF's likelihood against all sequences, its gradient, and what it learns."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from volseg.sequence.crf import LabelledScans, LinearChainCRF, crf_loss, fit_crf


def draw_scans(rng, n_scans, k, *, missing=0.0, excluded=0.0):
    """Draw log-probabilities and labels of scans of 1 to 6 slices; some of both are lacking."""
    tables, labels = [], []
    for _ in range(n_scans):
        n = int(rng.integers(1, 7))
        p, truth = rng.dirichlet(np.ones(k), n), rng.integers(0, k, n)
        is_excluded = rng.random((n, k)) < excluded
        is_excluded[np.arange(n), truth] = False
        tables.append(np.where(is_excluded, -np.inf, np.log(p)))
        labels.append(np.where(rng.random(n) < missing, -1, truth))
    labels[0][0] = tables[0][0].argmax()  # at least one label
    return tables, labels


def loss_of_all_sequences(crf, tables, labels, l2):
    """Return −ln p(labels) + the penalty, by enumeration."""
    loss = l2 / 2 * ((crf.transition**2).sum() + (crf.bias**2).sum() + (crf.weight - 1) ** 2)
    for table, truth in zip(tables, labels, strict=True):
        n, k = table.shape
        paths = np.array(list(product(range(k), repeat=n)))
        unary = np.where(table == -np.inf, -np.inf, crf.weight * table) + crf.bias
        scores = unary[np.arange(n), paths].sum(axis=1)
        scores += crf.transition[paths[:, :-1], paths[:, 1:]].sum(axis=1)
        agrees = ((paths == truth) | (truth == -1)).all(axis=1)
        loss += np.log(np.exp(scores).sum()) - np.log(np.exp(scores[agrees]).sum())
    return loss


CASES = [(0.0, 0.0), (0.4, 0.0), (0.0, 0.3), (0.4, 0.3)]


@pytest.mark.parametrize(("missing", "excluded"), CASES)
def test_the_loss_is_that_of_all_sequences(missing, excluded):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        k = int(rng.integers(1, 5))
        tables, labels = draw_scans(rng, 4, k, missing=missing, excluded=excluded)
        crf = LinearChainCRF(rng.normal(size=(k, k)), rng.normal(size=k), rng.normal())
        parameters = np.concatenate([crf.transition.ravel(), crf.bias, [crf.weight]])
        loss, _ = crf_loss(parameters, LabelledScans.stack(tables, labels), 0.7)
        expected = loss_of_all_sequences(crf, tables, labels, 0.7)
        assert loss == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("missing", "excluded"), CASES)
def test_the_gradient_is_that_of_finite_differences(missing, excluded):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scans = LabelledScans.stack(*draw_scans(rng, 6, 3, missing=missing, excluded=excluded))
        point = rng.normal(size=13)
        _, gradient = crf_loss(point, scans, 0.7)
        for place in range(13):
            change = np.where(np.arange(13) == place, 1e-5, 0)
            up, down = (crf_loss(point + s * change, scans, 0.7)[0] for s in (1, -1))
            assert gradient[place] == pytest.approx((up - down) / 2e-5, abs=1e-7)


def test_scans_side_by_side_have_the_sum_of_their_losses():
    rng = np.random.default_rng(7)
    tables, labels = draw_scans(rng, 8, 3)
    point = rng.normal(size=13)
    together = crf_loss(point, LabelledScans.stack(tables, labels), 0.0)
    single = [
        crf_loss(point, LabelledScans.stack([table], [truth]), 0.0)
        for table, truth in zip(tables, labels, strict=True)
    ]
    assert together[0] == pytest.approx(sum(loss for loss, _ in single), abs=1e-10)
    np.testing.assert_allclose(together[1], sum(g for _, g in single), atol=1e-10)


def sample_scans(crf, n_scans, n_slices, rng):
    """Draw labels from the exact distribution over all sequences, given random probabilities."""
    k = crf.bias.size
    paths = np.array(list(product(range(k), repeat=n_slices)))
    tables, labels = [], []
    for _ in range(n_scans):
        table = np.log(rng.dirichlet(np.ones(k), n_slices))
        unary = crf.weight * table + crf.bias
        scores = unary[np.arange(n_slices), paths].sum(axis=1)
        scores += crf.transition[paths[:, :-1], paths[:, 1:]].sum(axis=1)
        p = np.exp(scores - scores.max())
        tables.append(table)
        labels.append(paths[rng.choice(len(paths), p=p / p.sum())])
    return tables, labels


TRUE = LinearChainCRF([[1.5, 0.2, -1.0], [-0.5, 1.0, 0.5], [0.0, -1.5, 1.2]], [0.4, -0.4, 0], 0.6)


def interactions(transition):
    """Return what a constant added to a row, a column or a bias cannot change."""
    centred = transition - transition.mean(axis=0)
    return centred - centred.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("n_scans", "tolerance"), [(500, 0.35), pytest.param(5000, 0.1, marks=pytest.mark.slow)]
)
def test_fitting_recovers_the_chain_that_drew_the_labels(n_scans, tolerance):
    rng = np.random.default_rng(8)
    fitted = fit_crf(*sample_scans(TRUE, n_scans, 5, rng), l2=1e-2)
    assert fitted.weight == pytest.approx(TRUE.weight, abs=tolerance / 3)
    np.testing.assert_allclose(
        interactions(fitted.transition), interactions(TRUE.transition), atol=tolerance
    )
    for table in sample_scans(TRUE, 20, 5, rng)[0]:
        ours, theirs = (crf.chain(table).marginals() for crf in (fitted, TRUE))
        np.testing.assert_allclose(ours, theirs, atol=tolerance / 3)


@pytest.mark.parametrize(
    ("n_scans", "tolerance"), [(500, 0.5), pytest.param(5000, 0.15, marks=pytest.mark.slow)]
)
def test_labels_of_half_the_slices_are_enough(n_scans, tolerance):
    rng = np.random.default_rng(9)
    tables, labels = sample_scans(TRUE, n_scans, 5, rng)
    some = [np.where(rng.random(5) < 0.5, -1, truth) for truth in labels]
    fitted = fit_crf(tables, some, l2=1e-2)
    assert fitted.weight == pytest.approx(TRUE.weight, abs=tolerance / 3)
    np.testing.assert_allclose(
        interactions(fitted.transition), interactions(TRUE.transition), atol=tolerance
    )


def test_the_fit_is_the_minimum_from_wherever_one_looks():
    rng = np.random.default_rng(10)
    tables, labels = sample_scans(TRUE, 60, 5, rng)
    fitted = fit_crf(tables, labels)
    best = np.concatenate([fitted.transition.ravel(), fitted.bias, [fitted.weight]])
    scans = LabelledScans.stack(tables, labels)
    lowest, gradient = crf_loss(best, scans, 1.0)
    assert np.abs(gradient).max() < 1e-3
    for _ in range(50):
        assert crf_loss(best + rng.normal(0, 0.05, 13), scans, 1.0)[0] > lowest


def test_much_regularisation_leaves_the_probabilities_as_they_are():
    rng = np.random.default_rng(11)
    tables, labels = draw_scans(rng, 5, 3)
    fitted = fit_crf(tables, labels, l2=1e9)
    np.testing.assert_allclose(fitted.chain(tables[0]).marginals(), np.exp(tables[0]), atol=1e-6)


def test_a_constant_added_to_a_slice_changes_neither_the_fit_nor_the_marginals():
    rng = np.random.default_rng(12)
    tables, labels = draw_scans(rng, 30, 3)
    shifted = [table + rng.normal(0, 5, (len(table), 1)) for table in tables]
    plain, other = fit_crf(tables, labels), fit_crf(shifted, labels)
    np.testing.assert_allclose(other.transition, plain.transition, atol=1e-4)
    np.testing.assert_allclose(other.bias, plain.bias, atol=1e-4)
    assert other.weight == pytest.approx(plain.weight, abs=1e-4)
    for table, moved in zip(tables, shifted, strict=True):
        np.testing.assert_allclose(
            plain.chain(moved).marginals(), plain.chain(table).marginals(), atol=1e-9
        )


@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.5, 3.0])
def test_a_probability_of_zero_excludes_a_state_whatever_the_weight(weight):
    crf = LinearChainCRF(np.zeros((2, 2)), np.zeros(2), weight)
    marginals = crf.chain(np.array([[-np.inf, 0.0], [-1.0, -np.inf]])).marginals()
    np.testing.assert_allclose(marginals, [[0, 1], [1, 0]])


def test_forbidden_transitions_are_never_taken():
    ordered = np.where(np.tri(3, k=-1), -np.inf, 0.0)
    crf = LinearChainCRF(ordered, np.zeros(3))
    table = np.random.default_rng(13).normal(0, 3, (100, 3))
    assert (np.diff(crf.chain(table).best_path()) >= 0).all()
    with pytest.raises(ValueError, match="slice 1 "):
        crf.chain(np.array([[-np.inf, -np.inf, 0], [0, 0, -np.inf]])).best_path()


def test_one_state_one_slice_and_one_scan_can_be_fitted():
    one_state = fit_crf([np.zeros((3, 1))], [np.zeros(3, int)])
    np.testing.assert_allclose(one_state.chain(np.zeros((4, 1))).marginals(), 1)
    one_slice = fit_crf([np.log([[0.5, 0.5]])], [np.array([1])])
    assert one_slice.bias[1] > 0 > one_slice.bias[0]
    assert not one_slice.transition.any()  # no step was seen


LOG = np.log(np.full((2, 2), 0.5))


@pytest.mark.parametrize(
    ("tables", "labels", "l2", "message"),
    [
        ([], [], 1, "0 scans with 0 of labels"),
        ([LOG], [], 1, "1 scans with 0 of labels"),
        ([LOG], [np.array([0, 1])], 0, "l2 = 0 must be above 0"),
        ([LOG], [np.array([0, 1])], np.nan, "l2 = nan must be above 0"),
        ([LOG], [np.array([0])], 1, "scan 0 has 2 slices but 1 labels"),
        ([LOG], [np.array([0, 2])], 1, "labels of scan 0: from 0 to 2"),
        ([LOG], [np.array([-1, -1])], 1, "no slice has a label"),
        ([LOG, LOG[:0]], [np.array([0, 1]), np.array([], int)], 1, "scan 1: .0, 2. must be"),
        ([LOG, np.zeros((2, 3))], [np.array([0, 1])] * 2, 1, "scan 1: .2, 3. must be .n, 2."),
        ([LOG * np.nan], [np.array([0, 1])], 1, r"scan 0\[0, 0\] is nan"),
        ([-LOG * np.inf], [np.array([0, 1])], 1, r"scan 0\[0, 0\] is inf"),
        ([np.log([[0.5, 0.5], [1, 1e-300]]) + [[0, 0], [0, -np.inf]]], [np.array([0, 1])], 1,
         "scan 0, slice 1: log-probabilities of −inf exclude the label"),
        ([LOG * np.inf], [np.array([-1, 1])], 1, "scan 0, slice 0: log-prob"),
    ],
)  # fmt: skip
def test_scans_from_which_nothing_can_be_learned_are_refused(tables, labels, l2, message):
    with pytest.raises(ValueError, match=message):
        fit_crf(tables, labels, l2=l2)


@pytest.mark.parametrize(
    ("transition", "bias", "weight"),
    [
        (np.zeros((2, 3)), np.zeros(2), 1),
        (np.zeros((2, 2)), np.zeros((2, 1)), 1),
        (np.zeros((0, 0)), np.zeros(0), 1),
        (np.full((2, 2), np.nan), np.zeros(2), 1),
        (np.full((2, 2), np.inf), np.zeros(2), 1),
        (np.zeros((2, 2)), [0, -np.inf], 1),
        (np.zeros((2, 2)), np.zeros(2), np.nan),
    ],
)
def test_parameters_that_mean_nothing_are_refused(transition, bias, weight):
    with pytest.raises(ValueError, match=r"must be|is nan|is inf"):
        LinearChainCRF(transition, bias, weight)
