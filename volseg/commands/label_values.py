"""Values of two masks that stand for the same label: renamed as stated, or pointed out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from volseg.evaluation.overlap import COUNTED_TOGETHER, OverlapRow
from volseg.volume import Volume, slabs_of

LABELS = "W_LABELS"
Shared = Mapping[tuple[int, int], int]  # (predicted, reference value) → voxels that have both


def parsed_pairs(pairs: Iterable[str]) -> dict[int, int]:
    """Return predicted value → reference value from `255=1`.

    >>> parsed_pairs(["255=1"])
    {255: 1}
    """
    values = (pair.split("=") for pair in pairs)
    return {int(predicted): int(reference) for predicted, reference in values}


def renamed(mask: Volume, value_of: Mapping[int, int]) -> Volume:
    """Return a mask with other values, in its own memory if they fit its dtype."""
    if not value_of:
        return mask
    dtype = np.promote_types(mask.array.dtype, np.min_scalar_type(max(value_of.values())))
    array = mask.array.astype(dtype, order="K", copy=False)
    for part in slabs_of(array):
        slab = array[part]
        is_old = {old: slab == old for old in value_of}  # before any of them is changed
        for old, new in value_of.items():
            slab[is_old[old]] = new
    return Volume(array, mask.geometry, sha256=mask.sha256)


def values_in(mask: Volume) -> set[int]:
    """Return the labels of a mask, without the background."""
    parts = slabs_of(mask.array, COUNTED_TOGETHER)
    return {value for part in parts for value in np.unique(mask.array[part]).tolist()} - {0}


def shared_voxels(truth: Volume, guess: Volume) -> Shared:
    """Count the voxels in which a value of the prediction meets another one of the reference.

    Only values that the other mask lacks are counted; none at all for most masks.
    """
    in_truth, in_guess = values_in(truth), values_in(guess)
    only_truth, only_guess = sorted(in_truth - in_guess), sorted(in_guess - in_truth)
    counts: Counter[tuple[int, int]] = Counter()
    if not (only_truth and only_guess):
        return counts
    for part in slabs_of(truth.array, COUNTED_TOGETHER):
        both = np.isin(truth.array[part], only_truth) & np.isin(guess.array[part], only_guess)
        pairs = np.stack([guess.array[part][both], truth.array[part][both]])
        values, n = np.unique(pairs.astype(np.int64), axis=1, return_counts=True)
        for predicted, reference, voxels in zip(*values.tolist(), n.tolist(), strict=True):
            counts[predicted, reference] += voxels
    return counts


def pairing_warnings(rows: Sequence[OverlapRow], shared: Iterable[Shared]) -> Iterator[str]:
    """Yield a warning that names the pairing if values lie in predicted or reference masks alone.

    Args:
        rows: of all cases. shared: `shared_voxels` of each case.
    """
    in_truth = {row.label for row in rows if row.reference_volume_ml > 0}
    in_guess = {row.label for row in rows if row.predicted_volume_ml > 0}
    only_truth, only_guess = in_truth - in_guess, in_guess - in_truth
    if len(only_truth) == len(only_guess) == 1:
        pairs = dict(zip(only_guess, only_truth, strict=True))
    else:
        pairs = _largest_pairs(only_guess, only_truth, shared)
    if pairs:
        options = " ".join(f"--labels {old}={new}" for old, new in sorted(pairs.items()))
        yield (
            f"{LABELS}: {_listed(pairs)} only in predicted masks, {_listed(pairs.values())} only "
            f"in reference masks, so they do not match; if they mean the same, give {options}"
        )


def _largest_pairs(
    only_guess: set[int], only_truth: set[int], shared: Iterable[Shared]
) -> dict[int, int]:
    """Return predicted value → reference value, those with the most common voxels first."""
    total: Counter[tuple[int, int]] = Counter()
    for counts in shared:
        total.update(counts)
    pairs: dict[int, int] = {}
    for (predicted, reference), _ in total.most_common():
        is_free = predicted not in pairs and reference not in pairs.values()
        if is_free and predicted in only_guess and reference in only_truth:
            pairs[predicted] = reference
    return pairs


def _listed(values: Iterable[int]) -> str:
    text = ", ".join(map(str, sorted(values)))
    return f"values {text} are" if "," in text else f"value {text} is"
