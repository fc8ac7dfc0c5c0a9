"""Baselines: their arrays predict what scikit-learn predicts, and nothing depends on the rest."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import BernoulliRBM
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, SVR

from volseg.errors import VolsegError
from volseg.evaluation.roc import auc
from volseg.training.baseline_models import sigmoid
from volseg.training.baselines import (
    CLASSIFIERS,
    MISSING,
    REGRESSORS,
    FitData,
    belief_of,
    fit_baselines,
    linear_of,
    load_baselines,
    save_baselines,
    trees_of,
    vectors_of,
)
from volseg.training.image_features import (
    GRID,
    PERCENTILES,
    downsampled,
    image_features,
    n_features,
    n_pixels,
)

NONE, ONE = np.zeros(6), np.ones(6)


def table(n=120, classes=3, seed=0):
    """Features (n, 6) float64, and (n,) classes that the first two decide, with noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 6))
    scores = features[:, 0] + 0.5 * features[:, 1] ** 2 + rng.normal(scale=0.3, size=n)
    edges = np.quantile(scores, np.arange(1, classes) / classes)
    return features, np.searchsorted(edges, scores), scores


def pictures(n=90, classes=2, channels=1, pixels=24, seed=0):
    """Images (n, C, pixels, pixels) of a disc, whose brightness is the class; (n,) classes."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % classes
    y, x = np.mgrid[:pixels, :pixels] - (pixels - 1) / 2
    disc = np.hypot(x, y) < pixels / 3
    images = rng.normal(scale=0.5, size=(n, channels, pixels, pixels))
    return (images + disc * targets[:, None, None, None]).astype(np.float32), targets


# ---- equality with scikit-learn


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_predicts_as_scikit_learn(classes):
    features, targets, _ = table(classes=classes)
    model = LogisticRegression(C=0.3).fit(features, targets)
    ours = linear_of([model], "softmax", NONE, ONE).predict(features)
    np.testing.assert_allclose(ours, model.predict_proba(features), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_boosting_predicts_as_scikit_learn(classes):
    features, targets, _ = table(classes=classes)
    model = HistGradientBoostingClassifier(max_iter=30, min_samples_leaf=5).fit(features, targets)
    unseen = np.random.default_rng(1).normal(size=(500, 6))
    ours = trees_of([model], "softmax").predict(unseen)
    np.testing.assert_allclose(ours, model.predict_proba(unseen), atol=1e-6)


def test_regressors_predict_as_scikit_learn():
    features, _, values = table()
    ridge = Ridge().fit(features, values)
    trees = HistGradientBoostingRegressor(max_iter=30, min_samples_leaf=5).fit(features, values)
    svr = SVR(gamma=0.2).fit(features, values)
    models = {
        ridge: linear_of([ridge], "values", NONE, ONE),
        trees: trees_of([trees], "values"),
        svr: vectors_of([svr], "values", (NONE, ONE, features), [(1.0, 0.0)]),
    }
    unseen = np.random.default_rng(1).normal(size=(500, 6))
    for estimator, model in models.items():
        ours = model.predict(unseen)
        np.testing.assert_allclose(ours[:, 0], estimator.predict(unseen), atol=1e-6)


def test_support_vector_machines_score_as_scikit_learn():
    features, targets, _ = table()
    columns = [(targets == index).astype(int) for index in range(3)]
    machines = [SVC(gamma=0.2).fit(features, column) for column in columns]
    model = vectors_of(machines, "shares", (NONE, ONE, features), [(1.0, 0.0)] * 3)
    expected = np.stack([machine.decision_function(features) for machine in machines], axis=1)
    np.testing.assert_allclose(model.decide(features, rows_at_once=7), expected, atol=1e-6)
    shares = model.predict(features)
    np.testing.assert_allclose(shares, sigmoid(expected) / sigmoid(expected).sum(1)[:, None])
    (two,) = machines[:1]
    pair = vectors_of([two], "softmax", (NONE, ONE, features), [(2.0, 0.5)]).predict(features)
    np.testing.assert_allclose(pair[:, 1], sigmoid(2 * two.decision_function(features) + 0.5))


def test_a_deep_belief_network_predicts_as_scikit_learns_pipeline():
    features, targets, _ = table()
    low, high = features.min(0), features.max(0)
    unit = (features - low) / (high - low)
    machines = [
        BernoulliRBM(8, n_iter=5, random_state=0),
        BernoulliRBM(4, n_iter=5, random_state=0),
    ]
    pipeline = make_pipeline(*machines, LogisticRegression()).fit(unit, targets)
    layer = linear_of([pipeline[-1]], "softmax", np.zeros(4), np.ones(4))
    ours = belief_of([pipeline[0], pipeline[1]], layer, low, high - low)
    np.testing.assert_allclose(ours.predict(features), pipeline.predict_proba(unit), atol=1e-6)


# ---- features


def test_features_of_a_plain_image_are_its_value():
    images = np.full((2, 3, 20, 30), 7.0, np.float32)
    features = image_features(images)
    assert features.shape == (2, n_features(3))
    n = n_pixels(3) + 3 * len(PERCENTILES)
    np.testing.assert_allclose(features[:, :n], 7)
    assert not features[:, n:].any()


def test_downsampling_keeps_the_mean_and_repeats_a_smaller_image():
    rng = np.random.default_rng(0)
    for shape in ((32, 48), (33, 47), (16, 16), (5, 9)):
        image = rng.normal(size=shape)
        small = downsampled(image, GRID)
        assert small.mean() == pytest.approx(image.mean())
    blocks = rng.normal(size=(GRID, GRID))
    np.testing.assert_allclose(downsampled(np.kron(blocks, np.ones((3, 2))), GRID), blocks)
    np.testing.assert_allclose(downsampled(blocks, GRID), blocks)


def test_gradients_know_the_orientation_and_neither_contrast_nor_brightness():
    n = n_pixels(1) + len(PERCENTILES)
    ramp = np.tile(np.arange(32.0), (32, 1))
    images = np.stack([ramp, ramp.T, 5 * ramp + 3, -ramp, ramp + ramp.T])[:, None]
    right, down, brighter, opposite, diagonal = image_features(images)[:, n:].reshape(5, 8, 4, 4)
    for histogram, orientation in ((right, 0), (down, 4), (diagonal, 2), (opposite, 0)):
        assert histogram.sum(axis=(1, 2)).argmax() == orientation
        np.testing.assert_allclose(histogram[orientation], 0.25)
    np.testing.assert_allclose(brighter, right)


def test_features_do_not_depend_on_what_is_computed_together():
    images, _ = pictures(n=11, channels=2)
    together = image_features(images)
    np.testing.assert_array_equal(image_features(images, pixels_at_once=1), together)
    np.testing.assert_array_equal(image_features(images[4:5]), together[4:5])
    assert image_features(images[:0]).shape == (0, n_features(2))


# ---- fitting


@pytest.fixture(scope="module")
def fitted():
    images, targets = pictures()
    return fit_baselines(images, targets, "classes", seed=0, seconds=60)


def test_every_baseline_tells_bright_from_dark_discs_but_the_majority(fitted):
    assert [b.name for b in fitted] == ["majority", *CLASSIFIERS]
    images, targets = pictures(seed=1)
    for baseline in fitted:
        assert baseline.reason == ""
        predicted = baseline.predict(images)
        assert predicted.shape == (90, 2)
        np.testing.assert_allclose(predicted.sum(axis=1), 1)
        area = auc(predicted[:, 1], targets == 1)
        assert area == 0.5 if baseline.name == "majority" else area > 0.9, baseline.name


def test_what_is_stored_predicts_the_same_and_twice_is_the_same(fitted, tmp_path):
    images, targets = pictures()
    again = fit_baselines(images, targets, "classes", seed=0, seconds=60)
    save_baselines(fitted, tmp_path)
    features = image_features(pictures(seed=1)[0])
    for first, second, loaded in zip(fitted, again, load_baselines(tmp_path), strict=True):
        expected = first.predict_features(features)
        np.testing.assert_array_equal(loaded.predict_features(features), expected)
        np.testing.assert_array_equal(second.predict_features(features), expected)
        assert (loaded.name, loaded.kind, loaded.outputs) == (first.name, "classes", first.outputs)


@pytest.mark.slow
def test_three_classes_of_which_the_second_never_occurs():
    images, targets = pictures(n=120, classes=3)
    targets = np.array([0, 2, 3])[targets]
    for baseline in fit_baselines(images, targets, "classes", seed=0, seconds=60, n_classes=5):
        predicted = baseline.predict(images)
        assert predicted.shape == (120, 5)
        np.testing.assert_allclose(predicted.sum(axis=1), 1)
        assert not predicted[:, [1, 4]].any()
        if baseline.name != "majority":
            assert (predicted.argmax(axis=1) == targets).mean() > 0.7, baseline.name


@pytest.mark.slow
def test_labels_are_learnt_one_by_one():
    images, bright = pictures()
    striped = (np.arange(len(images)) // 2) % 2
    images[:, :, ::4] += 3 * striped[:, None, None, None].astype(np.float32)
    targets = np.stack([bright, striped, np.ones_like(bright)], axis=1)
    for baseline in fit_baselines(images, targets, "labels", seed=0, seconds=60):
        predicted = baseline.predict(images)
        assert predicted.shape == (90, 3)
        np.testing.assert_allclose(predicted[:, 2], 1)
        if baseline.name != "majority":
            for label in (0, 1):
                assert auc(predicted[:, label], targets[:, label] == 1) > 0.9, baseline.name


def test_numbers_are_predicted_better_than_by_the_mean():
    images, _ = pictures(n=120, classes=1)
    values = np.random.default_rng(2).uniform(60, 96, len(images))
    images += ((values - 78) / 9)[:, None, None, None].astype(np.float32)
    baselines = fit_baselines(images[:80], values[:80], "number", seed=0, seconds=60)
    assert [b.name for b in baselines] == ["mean", *REGRESSORS]
    errors = {b.name: np.abs(b.predict(images[80:]) - values[80:]).mean() for b in baselines}
    assert baselines[0].predict(images[:1]) == pytest.approx(values[:80].mean())
    assert all(errors[name] < 0.6 * errors["mean"] for name in REGRESSORS), errors


# ---- what cannot be fitted


def assert_only_the_first_ran(baselines, reason):
    assert baselines[0].reason == ""
    assert {baseline.reason for baseline in baselines[1:]} == {reason}
    assert all(baseline.model is None for baseline in baselines[1:])


def test_without_scikit_learn_only_the_majority_is_there(monkeypatch, tmp_path):
    images, targets = pictures(n=30)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    baselines = fit_baselines(images, targets, "classes", seed=0, seconds=60)
    assert_only_the_first_ran(baselines, MISSING)
    np.testing.assert_allclose(baselines[0].predict(images), 0.5)
    save_baselines(baselines, tmp_path)
    assert_only_the_first_ran(load_baselines(tmp_path), MISSING)


def test_what_no_time_is_left_for_has_a_reason():
    images, targets = pictures(n=30)
    baselines = fit_baselines(images, targets, "classes", seed=0, seconds=0)
    assert_only_the_first_ran(baselines, "not run: no time was left")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_little_time_means_fewer_images_and_not_another_clock(name):
    """With hardly any time it learns from the first 200 images, as if there were no others."""
    features, targets, _ = table(n=600, classes=2)
    hurried = FitData(features, targets, n_pixels=4, seed=0, seconds=1e-6)
    alone = FitData(features[:200], targets[:200], n_pixels=4, seed=0, seconds=1e6)
    first, second = (CLASSIFIERS[name](data, "softmax") for data in (hurried, alone))
    np.testing.assert_array_equal(first.predict(features), second.predict(features))
    unhurried = CLASSIFIERS[name](replace(hurried, seconds=1e6), "softmax")
    assert not np.array_equal(unhurried.predict(features), first.predict(features))


def test_too_few_images_or_a_single_class_have_a_reason():
    images, targets = pictures(n=30)
    few = "not run: it needs 3 images of each of two classes"
    rare = np.where(np.arange(30) < 2, 1, 0)
    for kind, values, reason in (
        ("classes", np.zeros(30, int), few),
        ("number", np.full(30, 2.5), "not run: it needs 3 images, and not of a single value"),
        ("labels", np.stack([np.ones(30, int), np.zeros(30, int)], axis=1), few),
        ("classes", rare, few),
        ("labels", np.stack([rare, 1 - rare], axis=1), few),
    ):
        baselines = fit_baselines(images, values, kind, seed=0, seconds=60)
        assert_only_the_first_ran(baselines, reason)
    few_images = fit_baselines(images[:4], targets[:4], "classes", seed=0, seconds=60)
    assert_only_the_first_ran(few_images, few)


@pytest.mark.slow
def test_a_class_of_two_images_does_not_stop_the_others():
    images, targets = pictures(n=60)
    rare = targets.copy()
    rare[:2] = 2
    for baseline in fit_baselines(images, rare, "classes", seed=0, seconds=60):
        predicted = baseline.predict(images)
        expected = 2 / 60 if baseline.name == "majority" else 0
        np.testing.assert_allclose(predicted[:, 2], expected)
    label = (rare == 2).astype(int)
    both = np.stack([targets, label], axis=1)
    for baseline in fit_baselines(images, both, "labels", seed=0, seconds=60):
        np.testing.assert_allclose(baseline.predict(images)[:, 1], 2 / 60)


def test_a_rare_class_stays_when_there_is_hardly_time():
    features, targets, _ = table(n=600, classes=2)
    targets[-4:] = 2  # beyond the first 200
    for name, fit in CLASSIFIERS.items():
        data = FitData(features, targets, n_pixels=4, seed=0, seconds=1e-6)
        predicted = fit(data, "softmax").predict(features)
        assert predicted.shape == (600, 3), name
        assert predicted[:, 2].min() > 0


def test_a_tree_that_leads_in_circles_is_refused():
    features, targets, _ = table()
    trees = trees_of([HistGradientBoostingClassifier(max_iter=2).fit(features, targets)], "softmax")
    inner = int(np.flatnonzero(trees.feature >= 0)[0])
    for target in (inner, -1, len(trees.feature)):
        left = trees.left.copy()
        left[inner] = target
        with pytest.raises(ValueError, match="leads nowhere"):
            replace(trees, left=left)


def test_damaged_files_are_refused_by_name(fitted, tmp_path):
    with pytest.raises(VolsegError, match="baselines: cannot be read") as caught:
        load_baselines(tmp_path)
    assert caught.value.code == "E_CKPT"
    save_baselines(fitted, tmp_path)
    for name, content in {
        "baselines.safetensors": b"x" * 40,
        "baselines.json": b'{"baselines": [{"name": "majority"}]}',
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolsegError, match="baselines: damaged"):
            load_baselines(tmp_path)
