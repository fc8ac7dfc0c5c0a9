"""Settings of the commands that measure, evaluate and compare masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.options.declare import (
    Range,
    argument,
    input_path,
    label_pairs,
    names,
    option,
    optional_input_path,
    optional_label,
    optional_names,
    optional_path,
    options,
    path,
)
from volseg.options.shared import (
    RESULTS,
    Announcing,
    InUnit,
    Limited,
    OfSeries,
    Pictured,
    Tilted,
)

OBJECTS = ("components", "labels")
THRESHOLD_HELP = (
    "A mask that holds fractions, such as probabilities, counts as label 1 from this value up, "
    "e.g. 0.5. Masks of whole numbers stay as they are."
)

if TYPE_CHECKING:
    from volseg.recipe import Recipe


@options
class MaskOptions(InUnit):
    """What is measured of a mask."""

    objects: str = option(
        "components: each connected part is a lesion. labels: each mask value is one.",
        default="components",
        values=OBJECTS,
    )
    threshold: float | None = option(THRESHOLD_HELP, default=None, values=Range(0.0))
    label_names: Mapping[int, str] | Path | str | None = option(
        "JSON object or CSV (columns label and name) that names the mask values; default: the "
        "table in the mask file.",
        default=None,
        kind=Path,
    )
    recipe: Path | str | Recipe | None = option(
        "Take label names, unit and [measure] settings from this recipe.", default=None, kind=str
    )
    organ: str | None = option(
        "Label (name or value) of the organ that contains the lesions; `burden` is the fraction of "
        "its volume that they fill.",
        default=None,
        converter=optional_label,
    )
    lymph_nodes: tuple[str, ...] = option(
        "Label of lymph nodes, measured along their short axis; repeatable.",
        default=(),
        converter=names,
        flag="--lymph-node",
    )
    mtv_threshold: float | None = option(
        "SUV from which a voxel counts in mtv_fixed_ml, e.g. 2.5; default: the recipe's, else 4.",
        default=None,
        values=Range(0.0),
    )
    calcium: bool = option("Also compute Agatston, volume and mass scores.", default=False)


@options
class MeasureOptions(MaskOptions, OfSeries, Tilted, Limited, Pictured, Announcing):
    """Measure the lesions in existing masks, without a model.

    Reports volume, density, shape, diameters and position of every lesion. Give --image and --mask,
    or --cases, or a results folder of `volseg infer` whose masks you corrected by hand.

    `volseg columns` explains each number and gives its source; `volseg selftest` checks the
    numbers against objects of known size.
    """

    results: Path | None = argument(
        "Results of `volseg infer`; masks corrected by hand are measured again.",
        default=None,
        converter=optional_input_path,
    )
    image: Path | None = option(
        "Scan on which the mask was drawn, or a folder of scans.",
        default=None,
        converter=optional_input_path,
    )
    mask: Path | None = option(
        "Mask on the grid of the scan, or a folder of masks, paired with the scans by name.",
        default=None,
        converter=optional_input_path,
    )
    cases: Path | None = option(
        "Table or dataset with scans and masks, instead of --image and --mask.",
        default=None,
        converter=optional_input_path,
    )
    channel: str | None = option(
        "Channel on which masks are measured, e.g. t1, where a case has several.", default=None
    )
    out: Path | None = option(
        "Folder for the results (default: volseg_results); created if missing.",
        default=None,
        converter=optional_path,
        short="-o",
    )


@options
class EvaluateOptions(Limited, Announcing):
    """Evaluate predicted masks, classes or numbers.

    Masks: writes evaluation.csv (a row per case and label: Dice, IoU, HD95, surface Dice at 1 and
    2 mm, volume error), detections.csv (a row per lesion, matched one to one), summary.json (means
    with 95 % intervals over patients), agreement.png (Bland-Altman and correlation of volumes) and,
    for results of a model, froc.png. Classes or numbers, from classes.csv or values.csv: writes
    metrics.csv (every metric with its interval), evaluation.csv (a row per case), summary.json,
    figures and report.html. docs/evaluation.md and docs/classes.md define each number.
    """

    reference: Path = option(
        "Folder of reference masks, or a dataset that has them as labels; for classes and numbers "
        "a table with the true ones, or a dataset of images.",
        converter=input_path,
    )
    predicted: Path = option(
        "Folder of predicted masks, a results folder of `volseg infer`, or a classes.csv or "
        "values.csv.",
        converter=input_path,
    )
    out: Path = option(RESULTS, converter=path, short="-o")
    min_iou: float = option(
        "IoU from which a lesion counts as detected, from 0 to below 1; at 0, one shared voxel is "
        "enough.",
        default=0.0,
        values=Range(0.0, below=1.0),
    )
    objects: str = option(
        "components: each connected part is a lesion. labels: each mask value is one, and equal "
        "values in both masks need not be the same lesion.",
        default="components",
        values=OBJECTS,
    )
    threshold: float | None = option(THRESHOLD_HELP, default=None, values=Range(0.0))
    labels: tuple[str, ...] = option(
        "Predicted value that stands for another value in the reference, e.g. 255=1; repeatable.",
        default=(),
        converter=label_pairs,
    )
    review: Path | None = option(
        "review.csv of the predicted results folder: lesions rejected there are removed from the "
        "predicted masks first.",
        default=None,
        converter=optional_input_path,
    )
    target: str | None = option(
        "Classes and numbers: column of the reference that holds the truth; default: that of "
        "the model, or target, class, label or diagnosis, else the only column whose cells are the "
        "model's classes.",
        default=None,
    )
    by: tuple[str, ...] = option(
        "Classes and numbers: also evaluate each subgroup by this column of the reference, such as "
        "sex; numbers are cut into thirds; repeatable.",
        default=(),
        converter=names,
    )
    against: Path | None = option(
        "Classes and numbers: results of a second model on the same cases; the differences get "
        "intervals and p-values.",
        default=None,
        converter=optional_input_path,
    )


@options
class CompareOptions(Limited, Announcing):
    """Match lesions at two time points and apply RECIST 1.1.

    Registers the later scan to the earlier one (rigidly), then matches lesions one to one, by
    overlap, else by distance. comparison.csv has a row per matched pair and per other lesion (new,
    gone, merged, split and so on); response.csv a row per patient with the rule that decided. Scans
    without a partner and patients that cannot be compared have a row too. A second call compares
    only what is missing or has changed.
    """

    baseline: Path = argument(
        "Results of `volseg infer` or `volseg measure` on the earlier scans.", converter=input_path
    )
    followup: Path = argument("Results on the later scans.", converter=input_path)
    out: Path = option(
        "Folder for comparison.csv and response.csv; created if missing.",
        converter=path,
        short="-o",
    )
    pairs: Path | None = option(
        "CSV with the columns patient, baseline and followup (case ids), one line per pair of "
        "scans; a patient may have several. Default: equal ids are the same patient.",
        default=None,
        converter=optional_input_path,
    )
    baseline_scans: Path | None = option(
        "Folder with the earlier scans, found by file name.",
        default=None,
        converter=optional_input_path,
    )
    followup_scans: Path | None = option(
        "Folder with the later scans, found by file name.",
        default=None,
        converter=optional_input_path,
    )
    baseline_review: Path | None = option(
        "review.csv of the baseline results: lesions rejected there are left out.",
        default=None,
        converter=optional_input_path,
    )
    followup_review: Path | None = option(
        "review.csv of the follow-up results, used in the same way.",
        default=None,
        converter=optional_input_path,
    )
    registration: bool = option(
        "Register the later scan to the earlier one, or rely on their world coordinates, which "
        "needs no scans.",
        default=True,
        flag="--registration/--no-registration",
    )
    max_distance_mm: float = option(
        "Largest distance in mm between the centroids of two lesions that are matched although "
        "they do not overlap.",
        default=10.0,
        flag="--max-distance",
        values=Range(0.0, unit="mm"),
    )
    lymph_nodes: tuple[str, ...] | None = option(
        "Label of lymph nodes, which count by their short axis; repeatable. Default: the labels "
        "measured as lymph nodes.",
        default=None,
        converter=optional_names,
        flag="--lymph-node",
    )
    pages: bool = option(
        "Write a page per patient that shows both scans side by side; only with registration.",
        default=True,
        flag="--pages/--no-pages",
    )
    figures: bool = option(
        "Also write a PNG per patient: the lesion that changed most, at both times.", default=False
    )
