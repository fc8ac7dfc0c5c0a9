from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from volseg.evaluation.agreement import agreement
from volseg.evaluation.calibration import apply_temperature
from volseg.evaluation.classes import ClassPredictions
from volseg.evaluation.operating import youden_point
from volseg.pages.classification_figures import (
    calibration_png,
    confusion_png,
    decision_png,
    drawn_classes,
    precision_recall_png,
    roc_png,
)
from volseg.pages.plots import Pairs, number_agreement_png

NAMES = ["no tumour", "$glioma$", "a class with a long name, to be seen"]


def predictions(k=3, *, n=80, seed=0):
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % k
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), targets] += 1.5
    return ClassPredictions(apply_temperature(logits, 1), targets, NAMES[:k])


def opened(png):
    picture = Image.open(io.BytesIO(png))
    picture.load()
    return np.asarray(picture.convert("RGB")).astype(int)


def n_coloured(png, colour):
    """Return how many pixels have nearly this colour."""
    target = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(opened(png) - target).max(axis=2) < 12).sum())


@pytest.mark.parametrize("k", [2, 3])
def test_every_figure_shows_the_curve_of_each_drawn_class(k):
    p = predictions(k)
    texts = dict.fromkeys(NAMES, "AUC 0.9")
    for png in (
        roc_png(p, texts),
        precision_recall_png(p, texts),
        calibration_png(p, "ECE 0.1"),
        decision_png(p),
    ):
        drawn = [n_coloured(png, colour) > 100 for colour in ("#1f5fa8", "#b5400f", "#2a7f3f")]
        assert drawn == ([False, True, False] if k == 2 else [True, True, True])
        assert max(opened(png).shape) < 1200


@pytest.mark.parametrize("n_lines", [0, 1, 4, 9])
def test_title_and_legend_lie_within_the_figure(n_lines):
    p = predictions(2)
    beside = {f"model {number}": predictions(2, seed=number + 1) for number in range(n_lines)}
    points = [youden_point(p.probabilities[:, 1], p.truth[:, 1], NAMES[1])] * 3
    for png in (roc_png(p, {}, points, beside), precision_recall_png(p, {}), decision_png(p)):
        dark = opened(png).min(axis=2) < 250
        margins = [dark[:3], dark[-3:], dark[:, :3], dark[:, -3:]]
        assert not any(margin.any() for margin in margins)


def test_an_operating_point_is_drawn_on_the_curve_of_its_class():
    p = predictions()
    point = youden_point(p.probabilities[:, 1], p.truth[:, 1], NAMES[1])
    with_point = n_coloured(roc_png(p, {}, [point]), "#b5400f")
    assert with_point > n_coloured(roc_png(p, {}), "#b5400f") + 40


def test_figures_without_data_are_none():
    p = predictions()
    single = ClassPredictions(p.probabilities[:1], p.targets[:1], NAMES)
    assert roc_png(single, {}) is None
    nothing = ClassPredictions(p.probabilities, np.zeros((80, 3), bool), NAMES)
    assert precision_recall_png(nothing, {}) is None
    assert confusion_png(nothing) is None
    calibration_png(nothing), decision_png(nothing)


def test_the_diagonal_of_the_confusion_is_darkest():
    targets = np.arange(30) % 3
    png = confusion_png(ClassPredictions(np.eye(3)[targets], targets, NAMES))
    picture = opened(png)
    darkest = np.abs(picture - np.array([8, 48, 107])).max(axis=2) < 12  # the end of "Blues"
    assert darkest.mean() > 0.05
    assert confusion_png(predictions(2)) is not None


def test_of_many_classes_the_eight_with_most_cases_have_a_curve():
    rng = np.random.default_rng(0)
    targets = np.concatenate([np.arange(12), np.repeat(np.arange(4, 12), 3)])
    table = rng.dirichlet(np.ones(12), targets.size)
    assert drawn_classes(ClassPredictions(table, targets, [str(n) for n in range(12)])) == list(
        range(4, 12)
    )


def test_numbers_may_be_negative():
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    y = x + rng.normal(0, 0.1, 30)
    pairs = Pairs(name="z", agreement=agreement(x, y, range(30)), reference=x, predicted=y)
    assert opened(number_agreement_png(pairs)).shape[1] > 1000
