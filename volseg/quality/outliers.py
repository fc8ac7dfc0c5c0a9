"""Which numbers of a dataset lie far from the others."""

from __future__ import annotations

import math

import numpy as np

MIN_SCANS = 8  # from which a dataset has outliers
FENCE = 3.0  # interquartile ranges beyond the quartiles: "far out", Tukey 1977
MAX_PART = 0.1  # more scans than this are a second group, not outliers


def outliers(values: np.ndarray, *, factor: float) -> list[int]:
    """Return the numbers of the outliers among positive values (N,), NaN where unknown.

    An outlier lies more than three interquartile ranges beyond the quartiles of the logarithms, and
    beyond the nearer quartile by at least `factor`. There are none among fewer than eight values,
    nor if over a tenth of them would be one.

    Source: Tukey, Exploratory Data Analysis (1977), far out values

    >>> outliers(np.array([1, 1, 1, 1, 1, 1, 1, 5.0]), factor=1.5)
    [7]
    """
    places = np.flatnonzero(np.isfinite(values) & (values > 0))
    if places.size < MIN_SCANS:
        return []
    logs = np.log(values[places])
    lower, upper = np.percentile(logs, (25, 75))
    reach = max(FENCE * (upper - lower), math.log(factor) - 1e-9)
    far = places[(logs < lower - reach) | (logs > upper + reach)].tolist()
    return far if len(far) <= max(1, MAX_PART * places.size) else []
