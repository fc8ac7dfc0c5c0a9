"""Names of labels, on which the scans of a patient must agree to be matched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from volseg.measurement.rows import LesionMeasurement


def label_of(lesion: LesionMeasurement) -> str:
    """Return the name of the lesion's label, or its value if it has no name.

    Lesions are matched only if this is equal.
    """
    return lesion.label_name or str(lesion.label)


def names_in(lesions: Iterable[LesionMeasurement]) -> dict[int, str]:
    """Return the labels that have a name other than their value."""
    named = ((lesion.label, lesion.label_name) for lesion in lesions)
    return {label: name for label, name in named if name and name != f"label_{label}"}


def agreed_names(scans: Iterable[Sequence[LesionMeasurement]]) -> dict[int, str]:
    """Return the label names on which all scans that name the label agree."""
    names: dict[int, set[str]] = defaultdict(set)
    for lesions in scans:
        for label, name in names_in(lesions).items():
            names[label].add(name)
    return {label: options.pop() for label, options in names.items() if len(options) == 1}


def named(
    lesions: Iterable[LesionMeasurement], names: Mapping[int, str]
) -> list[LesionMeasurement]:
    """Return the lesions, those without a name of their label with that in `names`."""
    return [
        replace(lesion, label_name=names.get(lesion.label, lesion.label_name))
        if lesion.label_name in (None, f"label_{lesion.label}")
        else lesion
        for lesion in lesions
    ]
