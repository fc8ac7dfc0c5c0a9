"""Settings of `volseg explain`."""

from __future__ import annotations

from pathlib import Path

from volseg.options.declare import (
    Range,
    argument,
    input_path,
    input_paths,
    listed_names,
    option,
    options,
    path,
)
from volseg.options.shared import COUNT, RESULTS, Announcing, OnDevice, Seeded


@options
class ExplainOptions(OnDevice, Seeded, Announcing):
    """Show what a classifier looked at, and whether to trust it.

    Writes for each image and method a map of the evidence for its class: a picture, and for slices
    of a volume a NIfTI file on the grid of the volume. Each method is checked: do its maps change
    when the network's layers get random weights, and are they the same for other seeds? Where a
    dataset has masks, the maps are scored against them, beside a Gaussian in the middle of the
    image and the image's brightness. explain.html shows all of it, and marks unreliable maps.
    Needs volseg[explain].
    """

    scans: tuple[Path, ...] = argument(
        "Images or volumes, folders of them, or tables of cases.", converter=input_paths
    )
    model: Path = option(
        "Folder of a classifier made by `volseg train`.", converter=input_path, short="-m"
    )
    out: Path = option(RESULTS, default="volseg_explained", converter=path, short="-o")
    method: tuple[str, ...] | None = option(
        "Methods, e.g. gradcam,lime; default: gradcam, gradients (integrated), occlusion and lime.",
        default=None,
        converter=listed_names,
    )
    class_name: str | None = option(
        "Class or label to explain; default: the most probable one of each image.",
        default=None,
        flag="--class",
    )
    most: int = option(
        "Explain at most this many images, spread evenly over the input.",
        default=50,
        values=COUNT,
    )
    checked: int = option(
        "Number of these images on which the methods are checked; 0: no checks.",
        default=8,
        values=Range(0, 1_000_000),
    )
