"""Values of regions in a comparison: files that number them in their own ways go by the names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import count
from pathlib import Path

from volseg.errors import ScanError
from volseg.io.label_table import read_region_names

Names = Mapping[int, str]  # value → name


def names_in_file(mask: Path, scan: Path | None) -> dict[int, str]:
    """Return the names of the regions of a mask; {} if it has none or cannot be read."""
    try:
        return read_region_names(mask, scan)
    except ScanError:  # reading the mask says why
        return {}


def value_of_names(
    stated: Names, truths: Iterable[Names], guesses: Iterable[Names]
) -> dict[str, int]:
    """Return name → value in a whole comparison.

    A name keeps its value if all files agree on it. Regions of the reference keep theirs if none
    of all its names is stated, and predicted ones if no name is that of a label of the reference,
    as two programs may name one thing differently; so do those of a file that has a name twice.

    Args:
        stated: of the dataset or results, which come first.
        truths, guesses: of the files that name their regions.

    >>> value_of_names({}, [{1: "organ", 2: "node"}], [{1: "node"}, {1: "tumour"}])
    {'node': 2, 'organ': 1}
    >>> value_of_names({3: "lesion"}, [{3: "Segment 3"}], [])
    {'lesion': 3}
    """
    value_of = {name: value for value, name in stated.items()}
    named = list(filter(_are_distinct, truths))
    if not stated or value_of.keys() & {name for names in named for name in names.values()}:
        _add(value_of, named)
    labels = set(value_of)
    distinct = filter(_are_distinct, guesses)
    _add(value_of, [n for n in distinct if not labels or labels & set(n.values())])
    return value_of


def _add(value_of: dict[str, int], files: Collection[Names]) -> None:
    """Give each new name its value in the files, or a free one if they disagree."""
    pairs = {
        (name, value) for names in files for value, name in names.items() if name not in value_of
    }
    of_name, of_value = Counter(name for name, _ in pairs), Counter(value for _, value in pairs)
    taken = set(value_of.values())
    agreed = {
        name: value
        for name, value in sorted(pairs)
        if of_name[name] == of_value[value] == 1 and value not in taken
    }
    value_of |= agreed
    taken |= set(agreed.values())
    free = (number for number in count(1) if number not in taken)
    value_of |= dict(zip(sorted(of_name.keys() - agreed.keys()), free))


def new_values(names: Names, value_of: Mapping[str, int]) -> dict[int, int]:
    """Return old value → new value of the regions of a file, where they differ.

    >>> new_values({1: "node", 2: "organ"}, {"node": 2, "organ": 1})
    {1: 2, 2: 1}
    """
    if not _are_distinct(names):
        return {}
    return {
        value: value_of[name] for value, name in names.items() if value_of.get(name, value) != value
    }


def _are_distinct(names: Names) -> bool:
    return len(set(names.values())) == len(names)
