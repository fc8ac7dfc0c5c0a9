"""Fusion: a logistic regression on the score of an image and measurements of the lesion in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_STEPS, TOLERANCE = 100, 1e-10  # of Newton's method; of the gradient per case
ARRAYS = ("means", "deviations", "weights", "intercept")
PREFIX = "fusion."
ROUNDING = 1e-12  # of a mean
FEWEST_OF_A_CLASS = 5  # lesions


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """A logistic regression with two classes on 1 + k standardised inputs: score, measurements.

    Args:
        names: the k measurements, columns of lesions.csv; none for the score alone.
        means, deviations: (1 + k,) of the inputs.
        weights: (1 + k,) of the standardised inputs. intercept: ().
    """

    names: tuple[str, ...]
    means: np.ndarray
    deviations: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray

    def __call__(self, outputs: np.ndarray, measurements: np.ndarray) -> np.ndarray:
        """Return (n, 2) fused logits, whose difference is that of the regression.

        Args:
            outputs: (n, 2) logits of the image. measurements: (n, k); NaN counts as the mean.
        """
        inputs = _standardised(_inputs(outputs, measurements), self.means, self.deviations)
        logit = inputs @ self.weights + self.intercept
        return np.stack([-logit / 2, logit / 2], axis=1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the regression as arrays by name, for a safetensors file."""
        return {f"{PREFIX}{name}": np.asarray(getattr(self, name), np.float64) for name in ARRAYS}

    @classmethod
    def of_arrays(cls, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> Fusion:
        """Return the regression that `arrays` wrote.

        Raises:
            ValueError: an array is missing, is not finite, or has another size.
        """
        missing = [name for name in ARRAYS if f"{PREFIX}{name}" not in arrays]
        if missing:
            raise ValueError(f"the fusion lacks {', '.join(missing)}")
        values = {name: np.asarray(arrays[f"{PREFIX}{name}"], np.float64) for name in ARRAYS}
        for name, array in values.items():
            shape = () if name == "intercept" else (1 + len(names),)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"the {name} of the fusion must be finite and of shape {shape}")
        if (values["deviations"] <= 0).any():
            raise ValueError("the deviations of the fusion must be above 0")
        return cls(tuple(names), **values)


def fit_fusion(
    outputs: np.ndarray,
    measurements: np.ndarray,
    positive: np.ndarray,
    names: Sequence[str],
    *,
    l2: float,
) -> Fusion:
    """Fit the regression on n lesions that the networks were not trained on.

    It minimises Σ log loss + l2/2 |weights|², as scikit-learn does with C = 1/l2.

    Args:
        outputs: (n, 2) logits. measurements: (n, k); NaN counts as the mean.
        positive: (n,) bool, lesions of the second class.

    Raises:
        ValueError: there are fewer than five lesions of a class.
    """
    n_of_class = np.bincount(np.asarray(positive, int), minlength=2)
    if n_of_class.min() < FEWEST_OF_A_CLASS:
        raise ValueError(
            f"a fusion needs {FEWEST_OF_A_CLASS} lesions of each class, got {n_of_class.tolist()}"
        )
    inputs = _inputs(outputs, measurements)
    is_finite = np.isfinite(inputs)
    n_known = np.maximum(is_finite.sum(axis=0), 1)
    means = np.where(is_finite, inputs, 0).sum(axis=0) / n_known
    squares = np.where(is_finite, (inputs - means) ** 2, 0).sum(axis=0) / n_known
    deviations = np.sqrt(squares)
    deviations = np.where(deviations > ROUNDING * np.abs(means), deviations, 1.0)  # else constant
    weights, intercept = _logistic(_standardised(inputs, means, deviations), positive, l2)
    return Fusion(tuple(names), means, deviations, weights, np.array(intercept))


def cross_fused(
    outputs: np.ndarray,
    measurements: np.ndarray,
    positive: np.ndarray,
    folds: np.ndarray,
    *,
    l2: float,
) -> np.ndarray:
    """Return (n, 2) fused logits of each lesion, by a regression that was not fitted on its fold.

    Args:
        folds: (n,) number of the fold.

    Raises:
        ValueError: as `fit_fusion`.
    """
    names, fused = [""] * measurements.shape[1], np.empty(outputs.shape)
    for fold in np.unique(folds):
        others, held = folds != fold, folds == fold
        fusion = fit_fusion(outputs[others], measurements[others], positive[others], names, l2=l2)
        fused[held] = fusion(outputs[held], measurements[held])
    return fused


def _inputs(outputs: np.ndarray, measurements: np.ndarray) -> np.ndarray:
    score = outputs[:, 1].astype(np.float64) - outputs[:, 0]
    return np.column_stack([score, measurements.astype(np.float64)])


def _standardised(inputs: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(inputs), (inputs - means) / deviations, 0.0)


def _logistic(inputs: np.ndarray, positive: np.ndarray, l2: float) -> tuple[np.ndarray, float]:
    """Return weights and intercept by Newton's method, with steps halved until the loss falls."""
    design = np.column_stack([inputs, np.ones(len(inputs))])
    truth, ridge = np.asarray(positive, float), np.full(design.shape[1], l2)
    ridge[-1] = 0.0  # the intercept is not shrunk

    def loss(weights: np.ndarray) -> float:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - truth * logits).sum() + ridge @ weights**2 / 2)

    weights = np.zeros(design.shape[1])
    for _ in range(MAX_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        gradient = design.T @ (p - truth) + ridge * weights
        if np.abs(gradient).max() <= TOLERANCE * len(design):
            break
        curvature = (design.T * (p * (1 - p))) @ design + np.diag(ridge + 1e-12)
        step, before = np.linalg.solve(curvature, gradient), loss(weights)
        while loss(weights - step) > before and np.abs(step).max() > 1e-15:
            step = step / 2
        weights = weights - step
    return weights[:-1], float(weights[-1])
