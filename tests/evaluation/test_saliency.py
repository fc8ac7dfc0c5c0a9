"""Maps are compared and scored: against definitions by brute force, and against what must hold."""

from __future__ import annotations

import numpy as np
import pytest

from volseg.evaluation.saliency import (
    SIMPLE_MAPS,
    average_precision,
    centre_map,
    evidence,
    intensity_map,
    map_similarity,
    pointing,
)
from volseg.evaluation.saliency_rows import doubts_of

RNG = np.random.default_rng(0)


def square(shape=(40, 40), corner=(5, 5), edge=8):
    inside = np.zeros(shape, bool)
    inside[corner[0] : corner[0] + edge, corner[1] : corner[1] + edge] = True
    return inside


def ssim_by_the_definition(one, other, window=7):
    """Return the SSIM around each pixel at which the window fits, by loops."""
    values = np.full(one.shape, np.nan)
    half, n = window // 2, window**2
    for row in range(half, one.shape[0] - half):
        for column in range(half, one.shape[1] - half):
            part = np.s_[row - half : row + half + 1, column - half : column + half + 1]
            a, b = one[part], other[part]
            covariance = ((a - a.mean()) * (b - b.mean())).sum() / (n - 1)
            values[row, column] = (
                (2 * a.mean() * b.mean() + 1e-4) * (2 * covariance + 9e-4)
                / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                   * (a.var(ddof=1) + b.var(ddof=1) + 9e-4))
            )  # fmt: skip
    return values


def test_the_similarity_is_the_weighted_ssim_of_the_definition():
    one, other = (np.pad(RNG.random((20, 20)), 4) for _ in range(2))  # nothing at the edges
    one, other = one / one.max(), other / other.max()
    values, weights = ssim_by_the_definition(one, other), one + other
    expected = np.nansum(values * weights) / weights.sum()
    assert map_similarity(one, other) == pytest.approx(expected, abs=1e-9)


def test_equal_maps_are_alike_at_any_scale_and_small_ones_elsewhere_are_not():
    blob, elsewhere = square().astype(float), square(corner=(28, 28)).astype(float)
    assert map_similarity(blob, blob * 1e4) == pytest.approx(1)
    # Most pixels are zero in both, which an unweighted SSIM would take for agreement.
    assert map_similarity(blob, elsewhere) < 0.05
    assert map_similarity(blob, np.zeros_like(blob)) < 0.05
    assert map_similarity(blob, elsewhere) == pytest.approx(map_similarity(elsewhere, blob))


def test_two_empty_maps_are_neither_alike_nor_different():
    assert map_similarity(np.zeros((9, 9)), -np.ones((9, 9))) is None


@pytest.mark.parametrize("shape", [(3, 40), (8, 8), (5, 6)])
def test_maps_smaller_than_the_window_are_compared(shape):
    one = RNG.random(shape)
    assert map_similarity(one, one) == pytest.approx(1)


def test_evidence_is_what_speaks_for_the_class():
    np.testing.assert_array_equal(evidence(np.array([[-3.0, 0, 2, 4]])), [[0, 0, 0.5, 1]])
    assert not evidence(np.array([[-3.0, -1]])).any()


def average_precision_by_the_definition(scores, truth):
    """Return the sum over thresholds of precision × gain in recall."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.ravel()), reverse=True):
        called = scores >= threshold
        recall = (called & truth).sum() / truth.sum()
        total += (recall - recall_before) * (called & truth).sum() / called.sum()
        recall_before = recall
    return total


def test_the_average_precision_is_that_of_the_definition_with_ties():
    scores, truth = RNG.integers(0, 6, (9, 11)).astype(float), RNG.random((9, 11)) < 0.3
    expected = average_precision_by_the_definition(scores, truth)
    assert average_precision(scores, truth) == pytest.approx(expected)


def test_a_perfect_map_scores_one_and_a_constant_one_the_fraction_of_the_mask():
    mask = square()
    assert average_precision(mask.astype(float), mask) == pytest.approx(1)
    assert average_precision(np.zeros(mask.shape), mask) == pytest.approx(mask.mean())
    assert pointing(mask.astype(float), mask) == 1
    assert pointing(1.0 - mask, mask) == 0
    assert pointing(np.zeros(mask.shape), mask) == pytest.approx(mask.mean())


def test_a_plateau_points_into_the_mask_by_its_fraction():
    mask, saliency = square(edge=4), np.zeros((40, 40))
    saliency[5:9, 7:11] = 1  # half of it in the mask
    assert pointing(saliency, mask) == 0.5


def test_an_empty_mask_has_no_score():
    saliency, nothing = RNG.random((8, 8)), np.zeros((8, 8), bool)
    assert average_precision(saliency, nothing) is None and pointing(saliency, nothing) is None
    assert average_precision(saliency, ~nothing) is None


def test_the_simple_maps_are_highest_in_the_middle_and_where_the_image_is_bright():
    image = RNG.random((3, 21, 31))
    for simple in SIMPLE_MAPS.values():
        assert simple(image).shape == (21, 31)
    centre = centre_map((21, 31))
    assert np.unravel_index(centre.argmax(), centre.shape) == (10, 15)
    np.testing.assert_allclose(centre, centre[::-1, ::-1])
    assert intensity_map(image).argmax() == image.sum(axis=0).argmax()


@pytest.mark.parametrize(
    ("by_layer", "seeds", "words"),
    [
        ([("head", 0.8), ("b", 0.4), ("a", 0.1)], 0.9, []),
        ([("head", 0.2), ("b", 0.25), ("a", 0.1)], 0.9, []),  # a rise within the noise
        ([("head", 0.0), ("b", 0.2), ("a", 0.1)], 0.9, []),  # neither is alike
        ([("head", 0.2), ("b", 0.45), ("a", 0.1)], 0.9, ["rises from 0.20 to 0.45 when b"]),
        ([("head", 0.9), ("a", 0.7)], 0.9, ["0.70 when all layers are random"]),
        ([("head", 0.9), ("a", 0.1)], 0.3, ["between seeds is 0.30"]),
        ([("head", 0.9), ("a", 0.7)], 0.3, ["all layers", "between seeds"]),
        ([], None, []),
    ],
)
def test_a_method_is_doubted_for_each_check_that_it_fails(by_layer, seeds, words):
    doubts = doubts_of(by_layer, seeds)
    assert bool(doubts) == bool(words)
    assert all(word in doubts for word in words)


def test_maps_without_anything_are_doubted():
    assert "empty" in doubts_of([("head", 0.0)], 0.9, all_empty=True)
