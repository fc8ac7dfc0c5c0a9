"""Models of the baselines as arrays: they predict with NumPy and are stored without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import numpy as np

# How a model's scores (n, k) become its prediction: probabilities that sum to 1, a probability per
# label, one-vs-rest probabilities that are made to sum to 1, or values.
Link = Literal["softmax", "sigmoid", "shares", "values"]


class Model(Protocol):
    """A fitted model: features (n, F) → (n, k) probabilities or values, all in float64."""

    def predict(self, features: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """The same prediction for every image.

    Args:
        values: (k,) the shares of the classes in training, or the mean value.
    """

    values: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        return np.tile(self.values, (len(features), 1))


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear model of standardised features: logistic regression, or ridge regression.

    Args:
        mean, scale: (F,) of the features.
        weights: (k, F); bias: (k,).
    """

    link: Link
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        scores = (features - self.mean) / self.scale @ self.weights.T + self.bias
        return apply_link(scores, self.link)


@dataclass(frozen=True, slots=True, eq=False)
class SupportVectors:
    """Support vector machines with a Gaussian kernel on standardised features, one per output.

    Args:
        mean, scale: (F,) of the features.
        vectors: (s, F) standardised support vectors; dual: (k, s) their weights; bias: (k,).
        gamma: (1,) of the kernel exp(-gamma |x - y|²).
        slope, offset: (k,) of the sigmoid that turns a score into a probability (Platt); for
            values, what scales them back.
    """

    link: Link
    mean: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray
    dual: np.ndarray
    bias: np.ndarray
    gamma: np.ndarray
    slope: np.ndarray
    offset: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        scores = self.decide((features - self.mean) / self.scale)
        return apply_link(scores * self.slope + self.offset, self.link)

    def decide(self, standardised: np.ndarray, *, rows_at_once: int = 512) -> np.ndarray:
        """Return (n, k) scores of standardised features."""
        norms = (self.vectors**2).sum(1)
        scores = np.empty((len(standardised), len(self.bias)))
        for start in range(0, len(standardised), rows_at_once):
            rows = standardised[start : start + rows_at_once]
            squared = (rows**2).sum(1)[:, None] + norms - 2 * rows @ self.vectors.T
            kernel = np.exp(-self.gamma[0] * np.maximum(squared, 0))
            scores[start : start + rows_at_once] = kernel @ self.dual.T + self.bias
        return scores


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """Boosted regression trees; all their nodes stand in one list.

    Args:
        start: (k,) scores before the first tree.
        roots: (t,) index of the first node of each tree; outputs: (t,) the output it adds to.
        feature: (m,) that a node looks at, or -1 in a leaf; threshold: (m,) up to which a feature
            goes left; left, right: (m,) indices of the next nodes; value: (m,) of a leaf.
    """

    link: Link
    start: np.ndarray
    roots: np.ndarray
    outputs: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray

    def __post_init__(self) -> None:
        # Each branch leads to later nodes, so that a damaged file cannot lead in circles.
        inner = np.flatnonzero(self.feature >= 0)
        for branch in (self.left[inner], self.right[inner]):
            if (branch <= inner).any() or (branch >= len(self.feature)).any():
                raise ValueError("a branch of a tree leads nowhere")

    def predict(self, features: np.ndarray) -> np.ndarray:
        scores = np.tile(self.start, (len(features), 1))
        for root, output in zip(self.roots, self.outputs, strict=True):
            scores[:, output] += self.value[self._leaves(features, int(root))]
        return apply_link(scores, self.link)

    def _leaves(self, features: np.ndarray, root: int) -> np.ndarray:
        """Return (n,) the leaf of one tree that each row ends in."""
        nodes = np.full(len(features), root)
        rows = np.flatnonzero(self.feature[nodes] >= 0)
        while len(rows):
            node = nodes[rows]
            goes_left = features[rows, self.feature[node]] <= self.threshold[node]
            nodes[rows] = np.where(goes_left, self.left[node], self.right[node])
            rows = rows[self.feature[nodes[rows]] >= 0]
        return nodes


@dataclass(frozen=True, slots=True, eq=False)
class DeepBelief:
    """A deep belief network: two restricted Boltzmann machines and a logistic layer on their units.

    Args:
        low, span: (P,) that bring the first P features of each image, its pixels, to [0, 1].
        weights_1: (H1, P), bias_1: (H1,), weights_2: (H2, H1), bias_2: (H2,) of the hidden units.
        mean, scale: (H2,) of the last hidden units; weights: (k, H2), bias: (k,) of the layer.
    """

    link: Link
    low: np.ndarray
    span: np.ndarray
    weights_1: np.ndarray
    bias_1: np.ndarray
    weights_2: np.ndarray
    bias_2: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        pixels = unit_range(features[:, : len(self.low)], self.low, self.span)
        hidden = sigmoid(
            sigmoid(pixels @ self.weights_1.T + self.bias_1) @ self.weights_2.T + self.bias_2
        )
        return Linear(self.link, self.mean, self.scale, self.weights, self.bias).predict(hidden)


MODELS: Mapping[str, type[Model]] = {
    "constant": Constant,
    "linear": Linear,
    "support_vectors": SupportVectors,
    "trees": Trees,
    "deep_belief": DeepBelief,
}


def arrays_of(model: Model) -> dict[str, np.ndarray]:
    """Return the arrays of a model by the name of the field."""
    values = {field.name: getattr(model, field.name) for field in fields(model)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def model_of(kind: str, link: Link, arrays: Mapping[str, np.ndarray]) -> Model:
    """Return the model with these arrays, as `arrays_of` gave them.

    Raises:
        KeyError, TypeError: an array is missing or superfluous, or the kind is unknown.
    """
    row = MODELS[kind]
    names = {field.name for field in fields(row)}  # type: ignore[arg-type]
    return row(**arrays, **({"link": link} if "link" in names else {}))


def kind_of(model: Model) -> tuple[str, Link]:
    """Return the name of the model's type and its link."""
    (name,) = (name for name, row in MODELS.items() if isinstance(model, row))
    return name, getattr(model, "link", "values")


def apply_link(scores: np.ndarray, link: Link) -> np.ndarray:
    """Return probabilities or values (n, k) of scores (n, k)."""
    if link == "softmax":
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)
    if link == "values":
        return scores
    probabilities = sigmoid(scores)
    if link == "shares":
        return probabilities / probabilities.sum(axis=1, keepdims=True)
    return probabilities


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-score)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * scores))


def unit_range(pixels: np.ndarray, low: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Return pixels (n, P) scaled to [0, 1] and clipped."""
    return np.clip((pixels - low) / span, 0, 1)


def join_trees(link: Link, start: np.ndarray, forests: Sequence[Sequence[np.ndarray]]) -> Trees:
    """Return the model of the trees of each output.

    Args:
        start: (k,) scores before the first tree.
        forests: the nodes of each tree of each output: an array with the fields is_leaf,
            feature_idx, num_threshold, left, right and value, as scikit-learn has it.
    """
    trees = [(output, nodes) for output, forest in enumerate(forests) for nodes in forest]
    sizes = [len(nodes) for _, nodes in trees]
    roots = np.cumsum([0, *sizes])[:-1]

    def gather(name: str) -> Iterator[np.ndarray]:
        return (nodes[name] for _, nodes in trees)

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype) for part in gather(name))])

    offsets = np.repeat(roots, sizes)
    is_leaf = joined("is_leaf", np.bool_)
    return Trees(
        link=link,
        start=start.astype(np.float64),
        roots=roots.astype(np.int64),
        outputs=np.array([output for output, _ in trees], np.int64),
        feature=np.where(is_leaf, -1, joined("feature_idx", np.int64)),
        threshold=joined("num_threshold", np.float64),
        left=joined("left", np.int64) + offsets,
        right=joined("right", np.int64) + offsets,
        value=joined("value", np.float64),
    )
