"""Settings of the functions for scans in memory, which the command line does not have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.options.declare import (
    Options,
    argument,
    option,
    optional_input_path,
    options,
)
from volseg.options.inference import LoadOptions
from volseg.options.measurement import MaskOptions
from volseg.options.shared import Progressing

if TYPE_CHECKING:
    from collections.abc import Sequence


def anything(value: Any) -> Any:
    """Return a value as it is: the function that takes it checks its type."""
    return value


@options
class Placed(Options):
    """Where arrays lie that bring no grid of their own."""

    affine: Any = option(
        "Affine (4, 4) of an array, voxel index → RAS mm, as in nibabel.", default=None
    )
    spacing_mm: Sequence[float] | None = option(
        "Voxel size of an array in mm, in the order of its axes, instead of its affine; the axes "
        "are then taken as R, A and S.",
        default=None,
    )
    case_id: str = option("Name of the scan in the tables.", default="scan")


@options
class LoadModelOptions(LoadOptions):
    """Load a model once, to call it for many scans."""

    model: Path | None = argument(
        "Folder made by `volseg train`; default: the model that ships with volseg.",
        default=None,
        converter=optional_input_path,
    )


@options
class SegmentOptions(Placed, Progressing):
    """Segment a scan in memory and measure its lesions; no file is written."""

    image: Any = argument(
        "The scan: a path, a NumPy array or torch tensor with `affine` or `spacing_mm`, a nibabel "
        "image, a SimpleITK image, a MONAI MetaTensor or a volseg.Volume; a dict of these, by "
        "channel, for a model of several channels.",
        converter=anything,
    )
    model: Any = option(
        "Model of `volseg.load_model`, or its folder; default: the model that ships with volseg.",
        default=None,
    )
    accept_mismatch: bool = option(
        "Also segment scans of another modality than the model's training scans, without density "
        "or class.",
        default=False,
    )


@options
class MeasureMaskOptions(MaskOptions, Placed):
    """Measure the lesions of a mask in memory, without a model; no file is written."""

    image: Any = argument(
        "The scan: a path, a NumPy array or torch tensor with `affine` or `spacing_mm`, a nibabel "
        "image, a SimpleITK image, a MONAI MetaTensor or a volseg.Volume.",
        converter=anything,
    )
    mask: Any = argument(
        "Its mask, in any of these forms; an array lies on the voxels of the scan.",
        converter=anything,
    )
