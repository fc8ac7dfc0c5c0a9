"""The diameter that RECIST 1.1 uses for a lesion, and the choice of target lesions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from volseg.comparison.label_names import label_of
from volseg.measurement import recist
from volseg.measurement.rows import LesionMeasurement

NORMAL_NODE_MM = 10.0  # a lymph node with a shorter short axis is normal

RECIST = "RECIST 1.1, Eur J Cancer 45:228 (2009)"


def none_if_nan(value: float | None) -> float | None:
    """Return the value, or None if it is None or NaN."""
    return None if value is None or math.isnan(value) else value


def is_lymph_node(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """Check whether the lesion's label is one of `lymph_nodes`, by name or value."""
    names = {label_of(lesion), str(lesion.label), f"label_{lesion.label}"}
    return not names.isdisjoint(lymph_nodes)


def is_normal(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """Check whether it is a lymph node of normal size; unknown size counts as disease."""
    size = diameter_mm(lesion, lymph_nodes)
    return is_lymph_node(lesion, lymph_nodes) and size is not None and size < NORMAL_NODE_MM


def diameter_mm(lesion: LesionMeasurement, lymph_nodes: Collection[str] = ()) -> float | None:
    """Return the short axis of a lymph node, else the long axis; None if unknown."""
    is_node = is_lymph_node(lesion, lymph_nodes)
    return none_if_nan(lesion.short_axis_mm if is_node else lesion.long_axis_mm)


def choose_targets(
    lesions: Sequence[LesionMeasurement], lymph_nodes: Collection[str] = ()
) -> list[LesionMeasurement] | None:
    """Choose the five measurable lesions with the largest diameters, at most two per label.

    Args:
        lesions: lesions of all baseline scans.

    Returns:
        The targets in the order of `lesions`; None if some were not measured, since a lesion
        without diameters may be larger than the others.

    Source: RECIST 1.1, section 3.2; a label is an organ.
    """
    if any(lesion.recist_measurable is None for lesion in lesions):
        return None
    measured = [
        (size, index)
        for index, lesion in enumerate(lesions)
        if _is_measurable(lesion, lymph_nodes) and (size := diameter_mm(lesion, lymph_nodes))
    ]
    targets = recist.choose_targets(
        [size for size, _ in measured], [label_of(lesions[index]) for _, index in measured]
    )
    return [lesions[index] for index in sorted(measured[n][1] for n in targets)]


def _is_measurable(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """Check whether a lesion is measurable, given which labels are lymph nodes now.

    `recist_measurable` may have been measured with other lymph nodes, so it is used only if the
    sizes are unknown.
    """
    long_mm, short_mm = none_if_nan(lesion.long_axis_mm), none_if_nan(lesion.short_axis_mm)
    spacing_mm = map(none_if_nan, (lesion.spacing_r_mm, lesion.spacing_a_mm, lesion.spacing_s_mm))
    slice_mm = max((mm for mm in spacing_mm if mm is not None), default=None)
    is_node = is_lymph_node(lesion, lymph_nodes)
    if is_node or (long_mm is not None and slice_mm is not None):
        return recist.is_measurable(
            long_mm or 0.0, short_mm or 0.0, slice_mm or 0.0, is_node=is_node
        )
    return bool(lesion.recist_measurable)
