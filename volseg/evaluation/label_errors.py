"""Images whose class is probably wrong, by predictions of networks not trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATIO = 4.0  # of the probabilities of another class and of the given one, from which it is doubted


@dataclass(frozen=True, slots=True)
class DoubtfulLabel:
    """An image whose class is probably wrong.

    Args:
        index: of the image. given, likely: classes, with their probabilities.
    """

    index: int
    given: int
    likely: int
    given_probability: float
    likely_probability: float


def doubtful_labels(
    probabilities: np.ndarray, targets: np.ndarray, *, ratio: float = RATIO
) -> list[DoubtfulLabel]:
    """Return the images whose class is probably wrong, the most doubtful first.

    Confident learning: a class is confident of an image if its probability is at least the mean
    that it has among the images of that class, so that a network which is unsure of a class, or of
    all, doubts no label for it. Of an image that lies off the diagonal of the confident joint,
    the most probable confident class is not the given one. Such images are listed if the given
    class has less than 1 / `ratio` of its probability. An image that truly shows both classes
    looks the same, so that a person has to decide.

    Args:
        probabilities: (n, k), of networks that were not trained on the image.
        targets: (n,) index of the given class.

    Source: Northcutt, Jiang and Chuang, J Artif Intell Res 70:1373 (2021); the ratio is ours.
    """
    table, given = np.asarray(probabilities, dtype=np.float64), np.asarray(targets)
    limits = np.full(table.shape[1], np.inf)  # of a class without images
    for number in np.unique(given):
        limits[number] = table[given == number, number].mean()
    confident = np.where(table >= limits, table, -1.0)
    likely, rows = confident.argmax(axis=1), np.arange(len(table))
    p_likely, p_given = confident[rows, likely], table[rows, given]
    is_doubtful = (p_likely > 0) & (likely != given) & (p_likely > ratio * p_given)
    indices = np.flatnonzero(is_doubtful)
    order = np.argsort(p_given[indices] - p_likely[indices], kind="stable")
    return [
        DoubtfulLabel(n, int(given[n]), int(likely[n]), float(p_given[n]), float(p_likely[n]))
        for n in indices[order].tolist()
    ]
