from __future__ import annotations

import itertools

import numpy as np
import pytest
import sklearn
from sklearn import metrics as oracle

from volseg.evaluation.classes import (
    SCORES,
    ClassPredictions,
    Value,
    class_metrics,
    confusion,
    evaluate_classes,
    overall_metrics,
)

N_TABLES = 200


def random_table(seed, *, multilabel=False):
    """Return probabilities with ties, targets in which classes may be missing, and weights."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(6, 60)), int(rng.integers(2, 6))
    levels = int(rng.choice([2, 5, 1000]))  # from almost all ties to almost none
    raw = rng.integers(1, levels + 1, (n, k)).astype(float)
    weights = rng.choice([np.ones(n), rng.integers(0, 4, n) + 0.0, rng.random(n)], axis=0)
    weights[rng.integers(n)] += 1
    if multilabel:
        targets = rng.random((n, k)) < rng.random(k)
        return raw / (levels + 1), targets, weights
    present = rng.choice(k, size=int(rng.integers(1, k + 1)), replace=False)
    return raw / raw.sum(axis=1, keepdims=True), rng.choice(present, n), weights


def predictions_of(probabilities, targets):
    return ClassPredictions(
        probabilities, targets, [f"c{i}" for i in range(probabilities.shape[1])]
    )


def assert_equal(value, expected, what):
    number = np.nan if value.value is None else value.value
    np.testing.assert_allclose(number, expected, atol=1e-9, rtol=1e-9, err_msg=what)


@pytest.fixture(autouse=True)
def quick_oracle():
    """Skip scikit-learn's check of its own parameters, which takes most of its time."""
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        yield


@pytest.mark.parametrize("multilabel", [False, True])
def test_every_class_against_all_others_equals_scikit_learn(multilabel):
    for seed in range(multilabel, N_TABLES, 2):
        probabilities, targets, weights = random_table(seed, multilabel=multilabel)
        predictions = predictions_of(probabilities, targets)
        metrics, keep = evaluate_classes(predictions, weights), {"sample_weight": weights}
        both = predictions.truth.astype(int), predictions.decided.astype(int)
        matrices = oracle.multilabel_confusion_matrix(*both, **keep)
        rates = oracle.precision_recall_fscore_support(
            *both, average=None, zero_division=np.nan, **keep
        )
        for number, name in enumerate(predictions.names):
            of_class, where = metrics.of_class[name], f"table {seed}, {name}"
            (tn, fp), (_, tp) = matrices[number]
            for metric, values in zip(("precision", "recall", "f1"), rates):
                assert_equal(of_class[metric], values[number], f"{where} {metric}")
            assert of_class["sensitivity"].value == of_class["recall"].value
            specificity = tn / (tn + fp) if tn + fp > 1e-9 else np.nan
            assert_equal(of_class["specificity"], specificity, where)
            assert_equal(of_class["accuracy"], (tn + tp) / weights.sum(), where)
            truth, scores = predictions.truth[:, number], probabilities[:, number]
            has_any, has_others = weights[truth].any(), weights[~truth].any()
            auc = np.nan
            if has_any and has_others:
                auc = oracle.roc_auc_score(truth, scores, **keep)
            assert_equal(of_class["auc"], auc, f"{where} auc")
            area = oracle.average_precision_score(truth, scores, **keep) if has_any else np.nan
            assert_equal(of_class["average_precision"], area, f"{where} average precision")


def test_averages_of_classes_equal_scikit_learn():
    for seed in range(0, N_TABLES, 2):
        probabilities, targets, weights = random_table(seed)
        predictions = predictions_of(probabilities, targets)
        guess, labels = probabilities.argmax(axis=1), np.arange(probabilities.shape[1])
        average, keep = evaluate_classes(predictions, weights).average, {"sample_weight": weights}
        matrix = oracle.confusion_matrix(targets, guess, labels=labels, **keep)
        np.testing.assert_allclose(confusion(predictions, weights), matrix, atol=1e-9)
        overall = average["overall"]
        assert_equal(overall["accuracy"], oracle.accuracy_score(targets, guess, **keep), f"{seed}")
        recalls = np.diag(matrix)[matrix.any(axis=1)] / matrix.sum(axis=1)[matrix.any(axis=1)]
        assert_equal(overall["balanced_accuracy"], recalls.mean(), f"{seed}")
        for kind in ("macro", "weighted"):
            options = {"labels": labels, "average": kind, "zero_division": np.nan} | keep
            rates = oracle.precision_recall_fscore_support(targets, guess, **options)
            for metric, expected in zip(("precision", "recall", "f1"), rates):
                if average[kind][metric].reason.startswith("undefined"):
                    continue  # scikit-learn has 0 if the classes that are left have no weight
                assert_equal(average[kind][metric], expected, f"{seed} {kind} {metric}")


def test_log_loss_brier_and_balanced_accuracy_equal_scikit_learn():
    for seed in range(0, N_TABLES, 2):
        probabilities, targets, weights = random_table(seed)
        predictions = predictions_of(probabilities, targets)
        overall = evaluate_classes(predictions, weights).average["overall"]
        labels, keep = np.arange(probabilities.shape[1]), {"sample_weight": weights}
        loss = oracle.log_loss(targets, probabilities, labels=labels, **keep)
        assert_equal(overall["log_loss"], loss, f"{seed} log loss")
        options = {"labels": labels, "scale_by_half": True} | keep
        brier = oracle.brier_score_loss(targets, probabilities, **options)
        assert_equal(overall["brier"], brier, f"{seed} Brier")
        guess = probabilities.argmax(axis=1)
        if set(guess) <= set(targets[weights > 0]):  # else scikit-learn warns
            balanced = oracle.balanced_accuracy_score(targets, guess, **keep)
            assert_equal(overall["balanced_accuracy"], balanced, f"{seed}")


def test_the_auc_averages_equal_scikit_learn_where_every_class_has_cases():
    n_compared = 0
    for seed in range(N_TABLES):
        probabilities, targets, _ = random_table(seed)
        k = probabilities.shape[1]
        if len(np.unique(targets)) < k or k == 2:
            continue
        n_compared += 1
        average = evaluate_classes(predictions_of(probabilities, targets)).average
        for kind in ("macro", "weighted"):
            expected = oracle.roc_auc_score(targets, probabilities, multi_class="ovr", average=kind)
            assert_equal(average[kind]["auc"], expected, f"{seed} {kind}")
    assert n_compared > 20


def test_several_labels_at_once_equal_scikit_learn():
    for seed in range(0, N_TABLES, 4):
        probabilities, targets, weights = random_table(seed, multilabel=True)
        overall = evaluate_classes(predictions_of(probabilities, targets), weights).average[
            "overall"
        ]
        exact = oracle.accuracy_score(targets, probabilities >= 0.5, sample_weight=weights)
        assert_equal(overall["accuracy"], exact, f"{seed}")
        losses = [
            oracle.log_loss(truth, p, labels=[False, True], sample_weight=weights)
            for truth, p in zip(targets.T, probabilities.T)
        ]
        assert_equal(overall["log_loss"], np.mean(losses), f"{seed}")
        briers = [
            np.average((p - t) ** 2, weights=weights) for t, p in zip(targets.T, probabilities.T)
        ]
        assert_equal(overall["brier"], np.mean(briers), f"{seed}")


def test_auc_counts_pairs_and_their_weights():
    for seed in range(40):
        probabilities, targets, weights = random_table(seed)
        truth, scores = targets == targets[0], probabilities[:, targets[0]]
        if truth.all():
            continue
        won = total = 0.0
        for i, j in itertools.product(np.flatnonzero(truth), np.flatnonzero(~truth)):
            pair = weights[i] * weights[j]
            won += pair * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            total += pair
        value = evaluate_classes(predictions_of(probabilities, targets), weights)
        if total:
            expected = won / total
            assert value.of_class[f"c{targets[0]}"]["auc"].value == pytest.approx(
                expected, abs=1e-12
            )


def test_rows_of_weights_are_judged_each_on_its_own():
    probabilities, targets, _ = random_table(3)
    predictions = predictions_of(probabilities, targets)
    rows = np.random.default_rng(0).integers(0, 3, (5, len(targets))).astype(float)
    rows[:, 0] += 1
    for function in (class_metrics, overall_metrics):
        together = function(predictions, rows)
        for name, values in together.items():
            alone = np.stack([function(predictions, row[None])[name][0] for row in rows])
            np.testing.assert_allclose(values, alone, atol=1e-12, err_msg=name)


def test_whole_weights_are_repeated_cases():
    for seed in range(20):
        probabilities, targets, _ = random_table(seed)
        counts = np.random.default_rng(seed).integers(0, 3, len(targets))
        counts[0] += 1
        repeated = predictions_of(probabilities.repeat(counts, axis=0), targets.repeat(counts))
        weighted = evaluate_classes(predictions_of(probabilities, targets), counts.astype(float))
        for name, values in evaluate_classes(repeated).of_class.items():
            for metric, value in values.items():
                number = np.nan if value.value is None else value.value
                assert_equal(weighted.of_class[name][metric], number, f"{seed} {name} {metric}")


def test_what_is_undefined_is_none_with_a_reason_and_never_zero():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0]])
    metrics = evaluate_classes(ClassPredictions(probabilities, np.array([0, 0, 1]), "abc"))
    rare = metrics.of_class["c"]
    for metric in ("sensitivity", "recall", "auc", "average_precision", "balanced_accuracy"):
        assert rare[metric] == Value(None, "no case has the class")
    assert rare["precision"] == Value(None, "the class is never predicted")
    assert rare["f1"] == Value(None, "no case has the class or is predicted to have it")
    assert rare["specificity"] == Value(1.0)
    assert metrics.average["macro"]["auc"] == Value(1.0, "without c, where it is undefined")
    assert metrics.average["macro"]["accuracy"] == Value(1.0)
    only = evaluate_classes(ClassPredictions(probabilities, np.array([0, 0, 0]), "abc"))
    assert only.of_class["a"]["specificity"] == Value(None, "every case has the class")
    assert only.average["macro"]["auc"] == Value(None, "undefined in every class that has cases")
    undefined = [v for values in only.of_class.values() for v in values.values() if v.value is None]
    assert all(value.reason for value in undefined)


def test_of_equal_probabilities_the_first_class_is_predicted():
    tied = ClassPredictions(np.array([[0.4, 0.4, 0.2]]), np.array([1]), "abc")
    assert tied.decided.tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("probabilities", "targets", "names", "problem"),
    [
        ([[0.5, 0.4]], [0], "ab", "sum 0.9"),
        ([[0.5, np.nan]], [0], "ab", "from 0 to 1"),
        ([[1.5, -0.5]], [0], "ab", "from 0 to 1"),
        ([[0.5, 0.5]], [2], "ab", "indices of 2 classes"),
        ([[0.5, 0.5]], [-1], "ab", "indices of 2 classes"),
        ([[0.5, 0.5]], [0], "aa", "different class names"),
        ([[0.5, 0.5]], [0, 1], "ab", "at least one case"),
        (np.empty((0, 2)), np.empty(0, int), "ab", "at least one case"),
    ],
)
def test_bad_tables_are_refused(probabilities, targets, names, problem):
    with pytest.raises(ValueError, match=problem):
        ClassPredictions(np.array(probabilities), np.array(targets), list(names))


@pytest.mark.parametrize("name", SCORES)
def test_a_score_prefers_the_truth_to_noise(name):
    score, rng = SCORES[name], np.random.default_rng(0)
    if score.task == "numbers":
        targets = rng.normal(size=50)
        good, bad = targets + rng.normal(0, 0.1, 50), rng.permutation(targets)
    else:
        targets = rng.integers(0, 3, 60)
        sure = np.eye(3)[targets] * 0.8 + 0.2 / 3
        good, bad = sure, sure[rng.permutation(60)]
    assert score.is_better(score(good, targets), score(bad, targets))
    assert not score.is_better(score(bad, targets), score(good, targets))
    assert not score.is_better(score(good, targets), score(good, targets))
    assert score.is_better(score(bad, targets), None)
    assert not score.is_better(None, score(bad, targets))


def test_scores_that_are_undefined_are_none():
    assert SCORES["auc"](np.array([[0.5, 0.5]]), np.array([0])) is None
    assert SCORES["r2"](np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    assert SCORES["auc"](np.array([[0.2, 0.8], [0.9, 0.1]]), np.eye(2, dtype=bool)) == 0.0
