"""The channels of a scan on one grid: complete, in order, on the grid of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from volseg.errors import ScanError
from volseg.preprocessing.lattice import same_voxels
from volseg.preprocessing.register import align_channels
from volseg.preprocessing.regrid import resample_to_grid
from volseg.recipe import AUTO, Recipe
from volseg.volume import Rigid, Volume
from volseg.words import format_sizes

MIN_COVERED = 0.5  # fraction of the first channel's grid that every other channel must cover


def completed(images: Mapping[str, Volume], channels: Sequence[str]) -> dict[str, Volume]:
    """Return all channels in this order; a missing one is zeros on the grid of the first."""
    grid = images[channels[0]].geometry
    return {
        name: images[name]
        if name in images
        else Volume(np.zeros(grid.shape, np.uint8, order="F"), grid)
        for name in channels
    }


def on_one_grid(images: Mapping[str, Volume], recipe: Recipe) -> dict[str, Volume]:
    """Return the channels in the axis order of the first, or on its grid if the recipe says so.

    Raises:
        ScanError: a channel that is to be resampled covers less than half of the first one's grid,
            or a scan has a single slice and the network takes volumes.
    """
    data, patch = recipe.data, recipe.train.patch_shape
    for name, volume in images.items():
        if 1 in volume.geometry.shape and (patch == AUTO or 1 not in patch):
            size = "that the plan chooses" if patch == AUTO else f"of {format_sizes(patch)} voxels"
            raise ScanError(
                f"channel {name!r} has a single slice, but the network takes patches {size}",
                fix="give all slices of the scan, or train with patches of one slice "
                "(train.patch_shape)",
                code="E_NDIM",
            )
    if data.grids == "first":
        return to_first_grid(images, align=data.align == "rigid")
    return in_first_order(images)


def in_first_order(images: Mapping[str, Volume]) -> dict[str, Volume]:
    """Return channels with the same voxels as the first in its axis order, as views.

    Channels of other voxels are returned unchanged.
    """
    (first_name, first), *others = images.items()
    volumes = {first_name: first}
    for name, volume in others:
        placement = same_voxels(volume.geometry, first.geometry)
        if placement is not None and placement.is_reordered:
            volume = placement.view(volume)
        volumes[name] = volume
    return volumes


def to_first_grid(images: Mapping[str, Volume], *, align: bool = False) -> dict[str, Volume]:
    """Resample channels onto the grid of the first; those already on it are returned unchanged.

    A channel of the same voxels in another axis order is reordered, which changes no intensity.
    Outside its field of view a channel has its smallest intensity: air, or no uptake.

    Args:
        align: first register each channel rigidly to the first (mutual information), for patients
            who moved between the scans.

    Raises:
        ScanError: a channel covers less than half of the first one's grid.
    """
    (first_name, first), *others = in_first_order(images).items()
    volumes = {first_name: first}
    for name, volume in others:
        if first.geometry.matches(volume.geometry) and not align:
            volumes[name] = volume
            continue
        transform = align_channels(first, volume) if align else Rigid.identity()
        fraction = first.geometry.fraction_inside(volume.geometry, transform)
        if fraction < MIN_COVERED:
            raise ScanError(
                f"channel {name!r} covers {fraction:.0%} of the grid of {first_name!r}",
                fix="check that both scans show the same part of the same patient, "
                f"or leave {name!r} out",
                code="E_PAIR",
            )
        volumes[name] = resample_to_grid(volume, first.geometry, transform)
    return volumes
