"""Hidden Markov models against the joint probability of all sequences, counts and laws."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from volseg.sequence.hmm import HiddenMarkovModel, fit_hmm


def draw_model(rng, k, *, zeros=0.0):
    """Draw a model; some probabilities are 0, but state 0 stays possible everywhere."""

    def rows(*shape):
        table = rng.random(shape) * (rng.random(shape) >= zeros)
        table[..., 0] += 0.1
        return table / table.sum(axis=-1, keepdims=True)

    prior = rng.random(k) + 0.1
    return HiddenMarkovModel(rows(k), rows(k, k), prior / prior.sum(), rows(k, k))


def joint_probabilities(model, likelihoods):
    """Return every path, and its probability with the observations as a plain product."""
    n, k = likelihoods.shape
    paths, joint = np.array(list(product(range(k), repeat=n))), []
    for path in paths:
        p = model.start[path[0]] * likelihoods[0, path[0]]
        for t in range(1, n):
            p *= model.transition[path[t - 1], path[t]] * likelihoods[t, path[t]]
        joint.append(p)
    return paths, np.array(joint)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("seeds", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_posterior_and_best_path_are_those_of_all_sequences(zeros, seeds):
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        model = draw_model(rng, k, zeros=zeros)
        predicted = rng.integers(-1, k, n)
        likelihoods = np.ones((n, k))
        for t in np.flatnonzero(predicted >= 0):
            likelihoods[t] = [model.emission[state, predicted[t]] for state in range(k)]
        paths, joint = joint_probabilities(model, likelihoods)
        chain = model.chain(predicted)
        if not joint.any():
            assert chain.log_partition() == -np.inf
            continue
        assert chain.log_partition() == pytest.approx(np.log(joint.sum()), abs=1e-9)
        posterior = [
            [joint[paths[:, t] == state].sum() / joint.sum() for state in range(k)]
            for t in range(n)
        ]
        np.testing.assert_allclose(chain.marginals(), posterior, rtol=0, atol=1e-9)
        best = chain.best_path()
        assert chain.score(best) == pytest.approx(np.log(joint.max()), abs=1e-9)
        np.testing.assert_allclose(joint[(paths == best).all(axis=1)], joint.max(), rtol=1e-9)


def test_bayes_with_the_prior_gives_back_the_likelihood():
    """A classifier that is right: p(state | image) = prior × p(image | state) / p(image)."""
    rng = np.random.default_rng(0)
    model = draw_model(rng, 3)
    likelihoods = rng.gamma(1, 5, (5, 3))  # densities of the images, given each state
    joint = model.prior * likelihoods
    probabilities = joint / joint.sum(axis=1, keepdims=True)
    paths, p = joint_probabilities(model, likelihoods)
    chain = model.chain(probabilities)
    posterior = [[p[paths[:, t] == s].sum() / p.sum() for s in range(3)] for t in range(5)]
    np.testing.assert_allclose(chain.marginals(), posterior, atol=1e-9)
    assert chain.best_path().tolist() == paths[p.argmax()].tolist()
    constant = np.log(joint.sum(axis=1)).sum()
    assert chain.log_partition() == pytest.approx(np.log(p.sum()) - constant, abs=1e-9)


def test_with_independent_slices_the_probabilities_are_returned():
    """If each slice has the prior's frequencies whatever its neighbour, the classifier decides."""
    prior = np.array([0.7, 0.2, 0.1])
    model = HiddenMarkovModel(prior, np.tile(prior, (3, 1)), prior)
    probabilities = np.random.default_rng(1).dirichlet([1, 1, 1], 20)
    np.testing.assert_allclose(model.chain(probabilities).marginals(), probabilities, atol=1e-12)


def test_counts_are_those_of_the_sequences():
    labels = [np.array([0, 0, 1, 1, 1]), np.array([1, 0]), np.array([0]), np.array([], int)]
    predicted = [np.array([0, 1, 1, 1, 0]), np.array([1, 0]), np.array([0]), np.array([], int)]
    plain = fit_hmm(labels, 2, predicted=predicted, smoothing=0)
    np.testing.assert_allclose(plain.start, [2 / 3, 1 / 3])
    np.testing.assert_allclose(plain.transition, [[1 / 2, 1 / 2], [1 / 3, 2 / 3]])
    np.testing.assert_allclose(plain.emission, [[3 / 4, 1 / 4], [1 / 4, 3 / 4]])
    np.testing.assert_allclose(plain.prior, [1 / 2, 1 / 2])
    smooth = fit_hmm(labels, 2, predicted=predicted, smoothing=1)
    np.testing.assert_allclose(smooth.start, [3 / 5, 2 / 5])
    np.testing.assert_allclose(smooth.transition, [[2 / 4, 2 / 4], [2 / 5, 3 / 5]])
    np.testing.assert_allclose(smooth.emission, [[4 / 6, 2 / 6], [2 / 6, 4 / 6]])


def test_slices_without_a_label_or_prediction_are_not_counted():
    labels = [np.array([-1, 0, 0, -1, 1, 0]), np.array([0, 1])]
    predicted = [np.array([1, 0, -1, 1, 1, 0]), np.array([1, -1])]
    model = fit_hmm(labels, 2, predicted=predicted, smoothing=0)
    np.testing.assert_allclose(model.start, [1, 0])
    np.testing.assert_allclose(model.transition, [[1 / 2, 1 / 2], [1, 0]])
    np.testing.assert_allclose(model.emission, [[2 / 3, 1 / 3], [0, 1]])


def sample(model, n, rng):
    """Draw true and predicted labels of one scan of n slices."""
    k = model.start.size
    states = [rng.choice(k, p=model.start)]
    while len(states) < n:
        states.append(rng.choice(k, p=model.transition[states[-1]]))
    return np.array(states), np.array([rng.choice(k, p=model.emission[s]) for s in states])


def test_fitting_recovers_the_model_that_drew_the_scans():
    rng = np.random.default_rng(4)
    model = draw_model(rng, 3)
    scans = [sample(model, int(rng.integers(10, 40)), rng) for _ in range(400)]
    fitted = fit_hmm([s for s, _ in scans], 3, predicted=[p for _, p in scans])
    for name in ("start", "transition", "emission"):
        np.testing.assert_allclose(getattr(fitted, name), getattr(model, name), atol=0.06)


def test_posterior_probabilities_are_calibrated_and_more_accurate_than_the_observations():
    """Of states with a posterior of about p, a fraction p is true: the model drew the scans."""
    rng = np.random.default_rng(5)
    emission = 0.7 * np.eye(3) + 0.1
    model = HiddenMarkovModel([0.5, 0.3, 0.2], 0.85 * np.eye(3) + 0.05, np.ones(3) / 3, emission)
    truth, predicted = sample(model, 4000, rng)
    posterior = model.chain(predicted).marginals()
    is_true = (truth[:, None] == np.arange(3)).ravel()
    for low, high in ((0.05, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.0)):
        inside = (posterior.ravel() >= low) & (posterior.ravel() < high)
        assert is_true[inside].mean() == pytest.approx(posterior.ravel()[inside].mean(), abs=0.06)
    accuracy = (posterior.argmax(axis=1) == truth).mean()
    assert accuracy > (predicted == truth).mean() + 0.04


@pytest.mark.parametrize("smoothing", [0.1, 1.0, 100.0])
def test_a_monotone_model_never_goes_back(smoothing):
    rng = np.random.default_rng(6)
    labels = [np.sort(rng.integers(0, 4, 30)) for _ in range(10)]
    noisy = [np.where(rng.random(30) < 0.3, rng.integers(0, 4, 30), scan) for scan in labels]
    model = fit_hmm(labels, 4, predicted=noisy, smoothing=smoothing, monotone=True)
    assert (model.transition[np.tril_indices(4, -1)] == 0).all()
    assert (model.transition[np.triu_indices(4)] > 0).all()
    for _ in range(50):
        path = model.chain(rng.integers(-1, 4, 60)).best_path()
        assert (np.diff(path) >= 0).all()
    later = model.chain(rng.integers(0, 4, 60)).marginals()[:, ::-1].cumsum(axis=1)[:, ::-1]
    assert (np.diff(later, axis=0) >= -1e-12).all()  # P(state ≥ s) only grows


def test_a_free_model_of_the_same_scans_can_go_back():
    rng = np.random.default_rng(6)
    labels = [np.sort(rng.integers(0, 4, 30)) for _ in range(10)]
    model = fit_hmm(labels, 4, predicted=labels, smoothing=0.1)
    back = np.repeat([3, 0], 30)
    assert model.chain(back).best_path().tolist() == back.tolist()


def test_labels_that_go_back_are_refused_by_a_monotone_model():
    labels = [np.array([0, 1]), np.array([0, 2, -1, 1])]
    with pytest.raises(ValueError, match="scan 1 goes back from state 2 in slice 1 to 1 in slice"):
        fit_hmm(labels, 3, monotone=True)


def test_one_state_and_the_last_state_of_an_order_need_no_counts():
    one = fit_hmm([np.array([0])], 1, predicted=[np.array([0])], smoothing=0)
    assert one.chain(np.zeros(5, int)).log_partition() == pytest.approx(0, abs=1e-12)
    ordered = fit_hmm([np.array([0, 0, 1])], 2, smoothing=0, monotone=True)
    np.testing.assert_allclose(ordered.transition, [[0.5, 0.5], [0, 1]])


def test_what_a_model_excludes_is_an_error_that_names_the_slice():
    exact = HiddenMarkovModel([1, 0], [[0.5, 0.5], [0, 1]], [0.5, 0.5], np.eye(2))
    assert exact.chain(np.array([0, 0, 1])).best_path().tolist() == [0, 0, 1]
    chain = exact.chain(np.array([0, 1, 1, 0]))
    assert chain.log_partition() == -np.inf
    with pytest.raises(ValueError, match="slice 3 "):
        chain.best_path()


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        (np.array([], int), "the sequence is empty"),
        (np.zeros((0, 2)), "the sequence is empty"),
        (np.array([0, 2]), "observations: from 0 to 2"),
        (np.array([-2, 0]), "observations: from -2 to 0"),
        (np.array([0.5, 1.0]), "must be .n,. integers"),
        (np.array([[0.5, np.nan]]), "row 0 is not a distribution"),
        (np.array([[0.5, 0.5], [-0.1, 1.1]]), "row 1 is not a distribution"),
        (np.array([[0.5, 0.6]]), "row 0 is not a distribution"),
        (np.array([[0.0, 0.0]]), "row 0 is not a distribution"),
        (np.ones((2, 3)) / 3, r"probabilities \(2, 3\) must be \(n, 2\)"),
    ],
)
def test_observations_that_mean_nothing_are_refused(observations, message):
    model = HiddenMarkovModel([0.5, 0.5], np.eye(2), [0.5, 0.5], np.eye(2))
    with pytest.raises(ValueError, match=message):
        model.chain(observations)


def test_predicted_labels_need_a_confusion_matrix():
    model = fit_hmm([np.array([0, 1])], 2)
    with pytest.raises(ValueError, match="no confusion matrix"):
        model.chain(np.array([0, 1]))
    assert model.chain(np.array([[1.0, 0], [0, 1]])).best_path().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [0.5, 0.4]}, "start must hold probabilities"),
        ({"start": []}, "start .0,. must be"),
        ({"transition": [[1, 0], [-1, 2]]}, "transition must hold probabilities"),
        ({"transition": [[np.nan, 1], [0, 1]]}, "transition must hold probabilities"),
        ({"transition": np.eye(3)}, r"transition \(3, 3\) must be \(2, 2\)"),
        ({"emission": [[0.5, 0.5], [1, 1]]}, "emission must hold probabilities"),
        ({"prior": [1, 0]}, "prior must be above 0"),
    ],
)
def test_models_that_are_no_probabilities_are_refused(change, message):
    model = HiddenMarkovModel([0.5, 0.5], np.eye(2), [0.5, 0.5], np.eye(2))
    with pytest.raises(ValueError, match=message):
        replace(model, **change)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "no labelled slice"),
        ([np.array([-1, -1])], {}, "no labelled slice"),
        ([np.array([0, 2])], {}, "labels of scan 0: from 0 to 2"),
        ([np.array([0, 1])], {"smoothing": -1}, "smoothing = -1"),
        ([np.array([0, 1])], {"smoothing": float("nan")}, "smoothing = nan"),
        ([np.array([0, 1])], {"smoothing": float("inf")}, "smoothing = inf"),
        ([np.array([0, 1])], {"predicted": []}, "1 scans have labels but 0 predicted ones"),
        ([np.array([0, 1])], {"smoothing": 0}, "nothing to count for transition of state 1"),
        ([np.array([0, 1])], {"predicted": [np.array([0])]}, "scan 0 has 2 labels but 1 predicted"),
    ],
)
def test_labels_from_which_nothing_can_be_learned_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        fit_hmm(labels, 2, **options)
