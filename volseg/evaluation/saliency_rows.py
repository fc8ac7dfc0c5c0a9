"""Rows of explain.csv, randomisation.csv and saliency.csv, which `explain` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.columns import column, optional

EXPLAIN, RANDOMISATION, SALIENCY = "explain.csv", "randomisation.csv", "saliency.csv"
MOST_SIMILAR = 0.5  # SSIM that a map may keep when all layers are random
MOST_RISE = 0.1  # by which the SSIM may rise from one layer to the next
UNLIKE = 0.25  # SSIM of maps that have little in common: a rise to less is chance
LEAST_REPEATABLE = 0.5  # SSIM between seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRow:
    """One map of evidence in explain.csv; an empty cell is unknown."""

    case_id: str = column("", "name of the image")
    patient: str | None = optional("", "patient of the image; empty if unknown")
    scan: str | None = optional("", "volume of which it is a slice; empty for a picture")
    slice_index: int | None = optional("", "axial slice of the volume, from 0 at the feet")
    method: str = column("", "gradcam, gradients, occlusion or lime; empty for a failed image", "")
    class_name: str | None = optional("", "class, label or number that the map speaks for")
    probability: float | None = optional(
        "0 to 1", "its probability; for a number the predicted value"
    )
    is_empty: bool | None = optional("", "true if nothing in the image speaks for the class")
    is_reliable: bool | None = optional(
        "", "false if the method failed a check with this model; empty if it was not checked"
    )
    doubt: str | None = optional("", "the checks that failed")
    ssim_head: float | None = optional(
        "-1 to 1",
        "similarity of the map to the one after the last layer was set to random weights",
        source="SSIM; Adebayo et al. 2018",
    )
    ssim_all: float | None = optional(
        "-1 to 1", "the same after all layers were", source="SSIM; Adebayo et al. 2018"
    )
    ssim_seeds: float | None = optional(
        "-1 to 1",
        "mean similarity of the map to those with other seeds and noise of 1 % of the image's "
        "standard deviation",
        source="SSIM",
    )
    ssim_networks: float | None = optional(
        "-1 to 1", "mean similarity of the maps of the networks of an ensemble", source="SSIM"
    )
    ssim_centre: float | None = optional(
        "-1 to 1", "similarity of the map to a Gaussian in the middle of the image", source="SSIM"
    )
    mask_fraction: float | None = optional("0 to 1", "part of the image that is in the mask")
    auprc: float | None = optional(
        "0 to 1", "average precision of the map's pixels for those of the mask"
    )
    auprc_centre: float | None = optional("0 to 1", "the same of a Gaussian in the middle")
    auprc_intensity: float | None = optional("0 to 1", "the same of the image's brightness")
    pointing: float | None = optional(
        "0 to 1",
        "1 if the highest pixel is in the mask; of several equal ones the part in it",
        source="pointing game; Zhang et al. 2018",
    )
    pointing_centre: float | None = optional("0 to 1", "the same of a Gaussian in the middle")
    pointing_intensity: float | None = optional("0 to 1", "the same of the image's brightness")
    model: str | None = optional("", "name of the model")
    status: str = column("", "done or failed", "done")
    error: str | None = optional("", "code and reason of a failure")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomisationRow:
    """How similar a map stays when layers get random weights, from the last one to the first."""

    case_id: str = column("", "name of the image")
    method: str = column("", "gradcam, gradients, occlusion or lime")
    n_random: int = column("", "how many layers are random; 1 is the last layer alone")
    layer: str = column("", "the layer that became random last")
    ssim: float | None = optional(
        "-1 to 1", "similarity to the map of the trained network; empty if both are", source="SSIM"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaliencyRow:
    """A mean score of a method, or of a simple map, with its interval over patients."""

    method: str = column("", "gradcam, gradients, occlusion, lime; centre or intensity: simple map")
    metric: str = column("", "auprc or pointing")
    against: str | None = optional("", "simple map that is subtracted; empty for the score itself")
    value: float | None = optional("-1 to 1", "mean over the images with a mask")
    low: float | None = optional("-1 to 1", "lower end of the 95 % interval over patients")
    high: float | None = optional("-1 to 1", "its upper end")
    n: int = column("", "images with a mask", 0)
    n_patients: int = column("", "their patients", 0)
    reason: str | None = optional("", "why there is no interval")


def doubts_of(
    by_layer: Sequence[tuple[str, float]], seeds: float | None, *, all_empty: bool = False
) -> str:
    """Return which checks a method fails with a model; empty if it passes all of them.

    Args:
        by_layer: (layer, mean SSIM) from the last layer on, as `RandomisationRow`.
        seeds: mean SSIM between seeds. all_empty: no map shows anything.
    """
    if all_empty:
        return "all maps are empty"
    doubts, lowest = [], np.inf
    for layer, ssim in by_layer:
        if ssim > max(lowest + MOST_RISE, UNLIKE):
            doubts.append(f"SSIM rises from {lowest:.2f} to {ssim:.2f} when {layer} is random")
        lowest = min(lowest, ssim)
    if by_layer and by_layer[-1][1] > MOST_SIMILAR:
        last = by_layer[-1][1]
        doubts.append(f"SSIM is {last:.2f} when all layers are random, above {MOST_SIMILAR}")
    if seeds is not None and seeds < LEAST_REPEATABLE:
        doubts.append(f"SSIM between seeds is {seeds:.2f}, below {LEAST_REPEATABLE}")
    return "; ".join(doubts)
