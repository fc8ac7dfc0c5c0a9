"""What RECIST 1.1 measures of a lesion, and which lesions are the targets of a patient."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from volseg.measure import recist
from volseg.measure.rows import LesionMeasurement

NORMAL_NODE_MM = 10.0  # a lymph node with a shorter short axis is normal

RECIST = "RECIST 1.1, Eur J Cancer 45:228 (2009)"


def known(value: float | None) -> float | None:
    """None for NaN too."""
    return None if value is None or math.isnan(value) else value


def label_of(lesion: LesionMeasurement) -> str:
    """What two lesions must share to be the same: the name of their label, or its value where it has none."""
    return lesion.label_name or str(lesion.label)


def is_lymph_node(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """Whether its label is one of those, by name or value."""
    return not {label_of(lesion), str(lesion.label), f"label_{lesion.label}"}.isdisjoint(
        lymph_nodes
    )


def is_normal(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """A lymph node too small to be of disease; one whose size is unknown is taken for disease."""
    size = diameter_mm(lesion, lymph_nodes)
    return is_lymph_node(lesion, lymph_nodes) and size is not None and size < NORMAL_NODE_MM


def diameter_mm(lesion: LesionMeasurement, lymph_nodes: Collection[str] = ()) -> float | None:
    """The diameter that counts: the short axis of a lymph node, else the long axis; None if unknown."""
    return known(
        lesion.short_axis_mm if is_lymph_node(lesion, lymph_nodes) else lesion.long_axis_mm
    )


def choose_targets(
    lesions: Sequence[LesionMeasurement], lymph_nodes: Collection[str] = ()
) -> list[LesionMeasurement] | None:
    """The five largest measurable lesions by diameter, two per label at most, in the order of all of them.

    Args:
        lesions: of the baseline, of all its scans.

    Returns:
        None where it is not known of some whether they are measurable: without diameters no lesion can be told to be a smaller one.

    Source: RECIST 1.1, section 3.2; a label is an organ.
    """
    if any(lesion.recist_measurable is None for lesion in lesions):
        return None
    measured = [
        (size, at)
        for at, lesion in enumerate(lesions)
        if _is_measurable(lesion, lymph_nodes) and (size := diameter_mm(lesion, lymph_nodes))
    ]
    chosen = recist.choose_targets(
        [size for size, _ in measured], [label_of(lesions[at]) for _, at in measured]
    )
    return [lesions[at] for at in sorted(measured[n][1] for n in chosen)]


def _is_measurable(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """As it was measured, unless its label was not known as lymph nodes then and is now, or the other way round."""
    long_mm, short_mm = known(lesion.long_axis_mm), known(lesion.short_axis_mm)
    spacing_mm = [
        known(value) for value in (lesion.spacing_r_mm, lesion.spacing_a_mm, lesion.spacing_s_mm)
    ]
    slice_mm = max((each for each in spacing_mm if each is not None), default=None)
    is_node = is_lymph_node(lesion, lymph_nodes)
    if is_node or (long_mm is not None and slice_mm is not None):
        return recist.is_measurable(
            long_mm or 0.0, short_mm or 0.0, slice_mm or 0.0, is_node=is_node
        )
    return bool(lesion.recist_measurable)
