"""Baselines that stand beside a trained network: classic models on simple features of the images.

They are fitted with scikit-learn (extra `classic`) and stored as arrays; predicting needs NumPy
alone. A fit does not depend on the machine's speed: `seconds` chooses how many images it learns
from, and the clock only whether a baseline is fitted at all.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from volseg.errors import VolsegError
from volseg.inputs import parse_json, read_bytes
from volseg.io.files import write_bytes_atomic, write_json_atomic
from volseg.training.baseline_models import (
    Constant,
    DeepBelief,
    Linear,
    Link,
    Model,
    SupportVectors,
    Trees,
    arrays_of,
    join_trees,
    kind_of,
    model_of,
    unit_range,
)
from volseg.training.image_features import SCANS_NDIM, image_features, n_features, n_pixels

Kind = Literal["classes", "labels", "number"]
MISSING = "not run: install volseg[classic]"
FILE = "baselines"  # .json and .safetensors
MAX_BYTES = 2**30
MAX_IMAGES = 20_000  # to learn from
FOLDS = 3  # in which regularisation and Platt's sigmoid are chosen
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of logistic regression
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10_000.0)  # alpha of ridge regression
HIDDEN = (128, 64)  # units of the two restricted Boltzmann machines
RBM_IMAGES = 20_000  # that a machine sees at least, those of all epochs together
# Images that a baseline of one output and 405 features learns from per second on one core; of
# support vector machines, pairs of images.
LOGISTIC_RATE, BOOSTING_RATE, BELIEF_RATE = 2000.0, 1000.0, 500.0
PAIRS_RATE = 2e7
LEAST_IMAGES = 200  # to learn from, however little time there is


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """A fitted baseline, or the reason why there is none.

    Args:
        fill: (k,) prediction of the outputs that `model` leaves out, as too few training images
            had a class, or one of the two values of a label.
        outputs: indices of the outputs that the model predicts.
    """

    name: str
    kind: Kind
    model: Model | None
    fill: np.ndarray
    outputs: tuple[int, ...] = ()
    reason: str = ""

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities (n, k), or values (n,), of images (n, C, H, W)."""
        return self.predict_features(image_features(images))

    def predict_features(self, features: np.ndarray) -> np.ndarray:
        """Return probabilities (n, k), or values (n,), of features (n, F) of `image_features`."""
        assert self.model is not None, self.reason
        predicted = np.tile(self.fill, (len(features), 1))
        predicted[:, list(self.outputs)] = self.model.predict(features)
        return predicted[:, 0] if self.kind == "number" else predicted


def fit_baselines(
    images: np.ndarray,
    targets: np.ndarray,
    kind: Kind,
    *,
    seed: int,
    seconds: float,
    n_classes: int | None = None,
) -> list[Baseline]:
    """Fit all baselines of this kind of target; the first predicts what is most frequent or mean.

    Args:
        images: (n, C, H, W) training images, n ≥ 1, or scans, as for `image_features`.
        targets: (n,) class indices, (n, k) zeros and ones for labels, or (n,) numbers.
        seconds: about how long it may take; what there is no time for has a reason instead.
        n_classes: number of classes; None: those that occur.

    Returns:
        A baseline per row of `CLASSIFIERS` or `REGRESSORS`, in that order.
    """
    end = time.monotonic() + seconds
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(images))[:MAX_IMAGES]
    targets = np.asarray(targets)[rows]
    problem, fill = _problem(targets, kind, n_classes)
    first = "mean" if kind == "number" else "majority"
    # Only this one keeps all outputs: it states the shares of all classes.
    baselines = [Baseline(first, kind, Constant(fill), fill, tuple(range(len(fill))))]
    fits = REGRESSORS if kind == "number" else CLASSIFIERS
    reason = _reason_not_to_fit(problem)
    features = np.empty((0, 0)) if reason else image_features(images[rows[problem.rows]])
    is_of_scans = images.ndim == SCANS_NDIM
    n_pixel_features = features.shape[1] if is_of_scans else n_pixels(images.shape[1])
    for name, fit in fits.items():
        now = reason or ("" if time.monotonic() < end else "not run: no time was left")
        data = FitData(features, problem.targets, n_pixel_features, seed, seconds / len(fits))
        model = None if now else _quietly(fit, data, problem.link)
        rest_of = np.zeros_like(fill) if kind == "classes" else fill
        baselines.append(Baseline(name, kind, model, rest_of, problem.outputs, now))
    return baselines


def save_baselines(baselines: Sequence[Baseline], folder: Path) -> None:
    """Write baselines.safetensors and, last, baselines.json into a folder."""
    arrays: dict[str, np.ndarray] = {}
    described = []
    for baseline in baselines:
        row: dict[str, Any] = {"name": baseline.name, "kind": baseline.kind}
        row |= {"outputs": list(baseline.outputs), "reason": baseline.reason}
        arrays[f"{baseline.name}/fill"] = baseline.fill
        if baseline.model is not None:
            row["model"], row["link"] = kind_of(baseline.model)
            for name, array in arrays_of(baseline.model).items():
                arrays[f"{baseline.name}/model/{name}"] = np.ascontiguousarray(array)
        described.append(row)
    write_bytes_atomic(folder / f"{FILE}.safetensors", save_arrays(arrays))
    write_json_atomic(folder / f"{FILE}.json", {"baselines": described})


def load_baselines(folder: Path) -> list[Baseline]:
    """Read the baselines that `save_baselines` wrote.

    Raises:
        VolsegError: they are missing or damaged.
    """
    try:
        content = parse_json(read_bytes(folder / f"{FILE}.json", max_bytes=MAX_BYTES))
        arrays = load_arrays(read_bytes(folder / f"{FILE}.safetensors", max_bytes=MAX_BYTES))
        return [_load(row, arrays) for row in content["baselines"]]
    except OSError as error:
        raise VolsegError(
            f"{folder / FILE}: cannot be read ({error.strerror or error})",
            fix="copy the model again",
            code="E_CKPT",
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise VolsegError(
            f"{folder / FILE}: damaged ({type(error).__name__}: {error})",
            fix="copy the model again",
            code="E_CKPT",
        ) from error


def _load(row: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Baseline:
    name, model = str(row["name"]), None
    if "model" in row:
        start = f"{name}/model/"
        parts = {key.removeprefix(start): a for key, a in arrays.items() if key.startswith(start)}
        model = model_of(row["model"], row["link"], parts)
    fill = arrays[f"{name}/fill"]
    outputs = tuple(int(index) for index in row["outputs"])
    if any(not 0 <= index < len(fill) for index in outputs):
        raise ValueError(f"{name} has {len(fill)} outputs, and predicts {outputs}")
    return Baseline(name, row["kind"], model, fill, outputs, str(row["reason"]))


# ---- what is to be learnt


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """Targets without classes, or values of a label, that too few images have.

    Args:
        targets: (n,) indices into `outputs`, (n, k) of labels, or (n,) numbers.
        rows: (n,) indices of the images with these targets.
    """

    targets: np.ndarray
    rows: np.ndarray
    outputs: tuple[int, ...]
    link: Link


@dataclass(frozen=True, slots=True, eq=False)
class FitData:
    """Data that a baseline is fitted to: features (n, F) and targets.

    Args:
        n_pixels: number of features, the first ones, that are pixels.
        seconds: about how long fitting may take.
    """

    features: np.ndarray
    targets: np.ndarray
    n_pixels: int
    seed: int
    seconds: float

    def within(self, images: float) -> FitData:
        """Return as many images as there is time for, the first ones: their order is random.

        Args:
            images: what there is time for with one output and the features of one channel.
        """
        share = n_features(1) / self.features.shape[1]
        n = max(LEAST_IMAGES, int(images * share / self.n_machines))
        is_used = np.arange(len(self.features)) < n
        for values in self.columns:  # of each class, so many that there is one in each fold
            for value in (0, 1):
                is_used[np.flatnonzero(values == value)[:FOLDS]] = True
        return replace(self, features=self.features[is_used], targets=self.targets[is_used])

    @property
    def n_machines(self) -> int:
        """Number of models of one output that are fitted: one for two classes or a number."""
        return max(1, len(self.columns))

    @property
    def columns(self) -> list[np.ndarray]:
        """Zeros and ones (n,) of each label, or of each class; of two, of the second alone."""
        if self.targets.ndim == 2:
            return list(self.targets.T)
        if not np.issubdtype(self.targets.dtype, np.integer):
            return []
        n = int(self.targets.max()) + 1
        return [(self.targets == index).astype(int) for index in range(1 if n == 2 else 0, n)]


def _problem(targets: np.ndarray, kind: Kind, n_classes: int | None) -> tuple[_Problem, np.ndarray]:
    """Return what to fit, and (k,) the constant prediction: shares, or the mean."""
    rows = np.arange(len(targets))
    if kind == "number":
        return _Problem(targets.astype(float), rows, (0,), "values"), np.array([targets.mean()])
    if kind == "labels":
        counts = targets.sum(axis=0)
        used = np.flatnonzero(np.minimum(counts, len(targets) - counts) >= FOLDS)
        problem = _Problem(targets[:, used].astype(int), rows, tuple(used.tolist()), "sigmoid")
        return problem, counts / len(targets)
    counts = np.bincount(targets, minlength=n_classes or 0)
    used = np.flatnonzero(counts >= FOLDS)
    rows = np.flatnonzero(np.isin(targets, used))
    indices = np.searchsorted(used, targets[rows])
    return _Problem(indices, rows, tuple(used.tolist()), "softmax"), counts / counts.sum()


def _reason_not_to_fit(problem: _Problem) -> str:
    if find_spec("sklearn") is None:
        return MISSING
    if len(problem.outputs) < (2 if problem.link == "softmax" else 1):
        return f"not run: it needs {FOLDS} images of each of two classes"
    if problem.link == "values" and (len(problem.rows) < FOLDS or np.ptp(problem.targets) == 0):
        return f"not run: it needs {FOLDS} images, and not of a single value"
    return ""


def _quietly(fit: Callable[[FitData, Link], Model], data: FitData, link: Link) -> Model:
    """Fit without scikit-learn's warnings that the last digits may not have converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit(data, link)


def _standardise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (F,); 1 where a feature is constant."""
    mean, scale = features.mean(axis=0), features.std(axis=0)
    return mean, np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)


def _folds(data: FitData, strata: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=data.seed)
    return folds.split(data.features, strata)


# ---- the baselines


def fit_logistic(data: FitData, link: Link) -> Model:
    """Fit logistic regression, whose regularisation has the least log loss in three folds."""
    data = data.within(LOGISTIC_RATE * data.seconds)
    mean, scale = _standardise(data.features)
    standardised = (data.features - mean) / scale
    columns = data.columns if link == "sigmoid" else [data.targets]
    estimators = [_best_logistic(data, standardised, column) for column in columns]
    return linear_of(estimators, link, mean, scale)


def _best_logistic(data: FitData, features: np.ndarray, targets: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    losses = dict.fromkeys(STRENGTHS, 0.0)
    for train, test in _folds(data, targets):
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=300)
            predicted = model.fit(features[train], targets[train]).predict_proba(features[test])
            shares = predicted[np.arange(len(test)), targets[test].astype(int)]
            losses[strength] -= float(np.log(np.maximum(shares, 1e-15)).sum())
    best = min(losses, key=losses.__getitem__)
    return LogisticRegression(C=best, max_iter=1000).fit(features, targets)


def linear_of(estimators: Sequence[Any], link: Link, mean: np.ndarray, scale: np.ndarray) -> Linear:
    """Return the arrays of scikit-learn's linear models of standardised features.

    One of several classes has a row of weights per class; one of two has one row, of the second
    class: the first then has zeros. One per label has one row.
    """
    weights = np.concatenate([np.atleast_2d(model.coef_) for model in estimators])
    bias = np.concatenate([np.atleast_1d(model.intercept_) for model in estimators])
    if link == "softmax" and len(weights) == 1:
        weights, bias = (np.concatenate([np.zeros_like(a), a]) for a in (weights, bias))
    return Linear(link, mean, scale, weights, bias)


def fit_boosting(data: FitData, link: Link) -> Model:
    """Fit gradient boosting of 100 trees of at most 15 leaves."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    data = data.within(BOOSTING_RATE * data.seconds)
    row = HistGradientBoostingRegressor if link == "values" else HistGradientBoostingClassifier
    columns = data.columns if link == "sigmoid" else [data.targets]
    settings = {"max_iter": 100, "max_leaf_nodes": 15, "l2_regularization": 1.0}
    settings |= {"early_stopping": False, "max_features": 0.3, "random_state": data.seed}
    estimators = [row(**settings).fit(data.features, column) for column in columns]
    return trees_of(estimators, link)


def trees_of(estimators: Sequence[Any], link: Link) -> Trees:
    """Return the arrays of scikit-learn's histogram gradient boosting, one model or one per label.

    The trees are private there; a test compares the predictions.
    """
    start, forests = [], []
    for model in estimators:
        start += np.ravel(model._baseline_prediction).tolist()
        forests += [
            [tree.nodes for tree in trees] for trees in zip(*model._predictors, strict=True)
        ]
    if link == "softmax" and len(forests) == 1:
        start, forests = [0.0, *start], [[], *forests]
    return join_trees(link, np.array(start), forests)


def fit_support_vectors(data: FitData, link: Link) -> Model:
    """Fit a support vector machine per output; its sigmoid is fitted to scores of other folds."""
    from sklearn.svm import SVC

    data = data.within((PAIRS_RATE * data.seconds / (FOLDS + 1)) ** 0.5)
    mean, scale = _standardise(data.features)
    standardised = ((data.features - mean) / scale).astype(np.float32)  # as it is stored
    columns = data.columns
    gamma = 1 / standardised.shape[1]
    estimators, sigmoids = [], []
    for column in columns:
        scores = np.empty(len(column))
        for train, test in _folds(data, column):
            model = SVC(gamma=gamma).fit(standardised[train], column[train])
            scores[test] = model.decision_function(standardised[test])
        sigmoids.append(_platt(scores, column))
        estimators.append(SVC(gamma=gamma).fit(standardised, column))
    if link == "softmax" and len(columns) > 1:
        link = "shares"
    return vectors_of(estimators, link, (mean, scale, standardised), sigmoids)


def _platt(scores: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Return slope and offset of the sigmoid that makes scores probabilities.

    Source: Platt, Probabilistic outputs for support vector machines, 1999.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e3).fit(scores[:, None], targets)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def vectors_of(
    estimators: Sequence[Any],
    link: Link,
    training: tuple[np.ndarray, np.ndarray, np.ndarray],
    sigmoids: Sequence[tuple[float, float]],
) -> SupportVectors:
    """Return the arrays of scikit-learn's support vector machines, one per output.

    Args:
        training: mean and scale of the features, and the standardised training features.
        sigmoids: slope and offset that each machine's scores are scaled with.
    """
    mean, scale, standardised = training
    dual = np.zeros((len(estimators), len(standardised)))
    for row, model in zip(dual, estimators, strict=True):
        row[model.support_] = model.dual_coef_[0]
    used = np.flatnonzero(dual.any(axis=0))
    dual, bias = dual[:, used], np.array([float(model.intercept_[0]) for model in estimators])
    slope, offset = (np.array(values) for values in zip(*sigmoids, strict=True))
    if link == "softmax":  # two classes: the first has the score 0
        dual = np.concatenate([np.zeros_like(dual), dual])
        bias, slope, offset = (np.concatenate([[0.0], values]) for values in (bias, slope, offset))
    gamma = np.array([float(estimators[0].gamma)])
    vectors = standardised[used]
    return SupportVectors(link, mean, scale, vectors, dual, bias, gamma, slope, offset)


def fit_deep_belief(data: FitData, link: Link) -> Model:
    """Fit two stacked restricted Boltzmann machines to the pixels, then logistic regression.

    Source: Hinton, Osindero & Teh, A fast learning algorithm for deep belief nets, 2006; without
    fine-tuning of the whole.
    """
    from sklearn.neural_network import BernoulliRBM

    data = data.within(BELIEF_RATE * data.seconds)
    pixels = data.features[:, : data.n_pixels]
    low, high = np.percentile(pixels, (1, 99), axis=0)
    span = np.where(high > low, high - low, 1.0)
    visible = unit_range(pixels, low, span)
    machines = []
    epochs = min(200, max(20, RBM_IMAGES // len(pixels)))
    for units in HIDDEN:
        machine = BernoulliRBM(units, learning_rate=0.05, n_iter=epochs, random_state=data.seed)
        visible = machine.fit_transform(visible)
        machines.append(machine)
    layer = fit_logistic(replace(data, features=visible), link)
    assert isinstance(layer, Linear)
    return belief_of(machines, layer, low, span)


def belief_of(
    machines: Sequence[Any], layer: Linear, low: np.ndarray, span: np.ndarray
) -> DeepBelief:
    """Return the arrays of two of scikit-learn's restricted Boltzmann machines and the layer."""
    first, second = machines
    return DeepBelief(
        link=layer.link,
        low=low,
        span=span,
        weights_1=first.components_,
        bias_1=first.intercept_hidden_,
        weights_2=second.components_,
        bias_2=second.intercept_hidden_,
        mean=layer.mean,
        scale=layer.scale,
        weights=layer.weights,
        bias=layer.bias,
    )


def fit_ridge(data: FitData, link: Link) -> Model:
    """Fit ridge regression, whose penalty has the least squared error if each image is left out."""
    from sklearn.linear_model import RidgeCV

    mean, scale = _standardise(data.features)
    estimator = RidgeCV(alphas=PENALTIES).fit((data.features - mean) / scale, data.targets)
    return linear_of([estimator], link, mean, scale)


def fit_support_regression(data: FitData, link: Link) -> Model:
    """Fit support vector regression to standardised targets."""
    from sklearn.svm import SVR

    data = data.within((PAIRS_RATE * data.seconds) ** 0.5)
    mean, scale = _standardise(data.features)
    standardised = ((data.features - mean) / scale).astype(np.float32)
    centre, spread = float(data.targets.mean()), float(data.targets.std()) or 1.0
    estimator = SVR(gamma=1 / standardised.shape[1])
    estimator.fit(standardised, (data.targets - centre) / spread)
    return vectors_of([estimator], link, (mean, scale, standardised), [(spread, centre)])


CLASSIFIERS: Mapping[str, Callable[[FitData, Link], Model]] = {
    "logistic_regression": fit_logistic,
    "gradient_boosting": fit_boosting,
    "support_vector_machine": fit_support_vectors,
    "deep_belief_network": fit_deep_belief,
}
REGRESSORS: Mapping[str, Callable[[FitData, Link], Model]] = {
    "ridge_regression": fit_ridge,
    "gradient_boosting": fit_boosting,
    "support_vector_regression": fit_support_regression,
}
