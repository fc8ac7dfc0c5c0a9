"""Settings of `volseg infer`, and of `volseg report` and `methods`, which show its results."""

from __future__ import annotations

from pathlib import Path

from volseg.options.declare import (
    Options,
    Range,
    amount,
    argument,
    input_path,
    input_paths,
    more_input_paths,
    names,
    option,
    optional_input_path,
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
    OnDevice,
    Pictured,
    Progressing,
    Tilted,
)


@options
class LoadOptions(OnDevice):
    """How the networks of a model run."""

    backend: str = option(
        "auto, torch or openvino; auto uses OpenVINO on a CPU where it is installed.",
        default="auto",
        values=("auto", "torch", "openvino"),
    )
    precision: str = option(
        "auto, fp32, fp16 (half precision, if the hardware supports it) or int8 (see "
        "`volseg quantise`); auto is fp16 on a GPU and fp32 on a CPU.",
        default="auto",
        values=("auto", "fp32", "fp16", "int8"),
    )


@options
class InferOptions(LoadOptions, OfSeries, InUnit, Tilted, Limited, Pictured, Announcing):
    """Segment scans and measure every lesion, or classify images.

    Writes masks, lesions.csv and cases.csv. Each mask has the voxel grid of its scan. A lesion is a
    group of connected voxels (26 neighbours) of one label; lesion 1 is the largest. A scan that
    cannot be used becomes a failed row with the reason; the others are still processed. A second
    call processes only scans that are missing or have changed. Masks that you corrected by hand
    are kept; `volseg measure RESULTS` measures them.

    A model that classifies images writes classes.csv instead, and one that predicts a number
    values.csv, with a row per image.
    """

    scans: tuple[Path, ...] = argument(
        "Scans or images, folders of them, or tables of cases.", converter=input_paths
    )
    model: Path | None = option(
        "Folder made by `volseg train`; default: the model that ships with volseg.",
        default=None,
        converter=optional_input_path,
        short="-m",
    )
    out: Path = option(RESULTS, default="volseg_results", converter=path, short="-o")
    overlap: float | None = option(
        "Overlap of neighbouring tiles, 0 to below 1; default: the recipe's. 0.5 takes up to 8 "
        "times as long as 0.",
        default=None,
        values=Range(0.0, below=1.0),
    )
    tta: bool = option(
        "Test-time augmentation: average over flipped copies if the recipe does; each axis doubles "
        "the time.",
        default=True,
        flag="--tta/--no-tta",
    )
    inside: str | None = option(
        "Where to run tiles: scan (everywhere) or body (its bounding box only); default: the "
        "recipe's. Either value skips the coarse first pass of a recipe with [roi].",
        default=None,
        values=("scan", "body"),
    )
    max_vram: int | None = option(
        "GPU memory limit, e.g. 8G; default: all free GPU memory.", default=None, converter=amount
    )
    fast: bool = option(
        "Resample linearly where the recipe says cubic: faster, slightly less accurate.",
        default=False,
    )
    format: str = option(
        "File format of the masks: nifti (.nii.gz), nrrd, mha, or seg.nrrd (a segmentation with "
        "names and colours for 3D Slicer). lesion_ids and probabilities are always NIfTI.",
        default="nifti",
        values=("nifti", "nrrd", "mha", "seg.nrrd"),
    )
    probabilities: bool = option(
        "Also write the probability of each label as probabilities/label_<value>/<case>.nii.gz, "
        "uint8 scaled to 0 to 1, before post-processing.",
        default=False,
    )
    dicom_seg: str | None = option(
        "Also write the mask of a DICOM series as a DICOM segmentation, dicom_seg/<case>.dcm: "
        "binary, or labelmap (smaller; newer viewers). It carries the patient and study of the "
        "series, as no other result does, for a PACS.",
        default=None,
        values=("binary", "labelmap"),
    )
    dicom_sr: bool = option(
        "Also write the lesions of a DICOM series as a DICOM report, dicom_sr/<case>.dcm, with a "
        "segment each in dicom_lesions/<case>.dcm. Both carry the patient and study of the series.",
        default=False,
    )
    accept_mismatch: bool = option(
        "Also segment scans of another modality than the model's training scans, without density "
        "or class.",
        default=False,
    )


@options
class ReportOptions(Progressing):
    """Rebuild the pages of results, or report on single scans.

    A scan that is no longer at its path keeps its earlier page, and report.html says so.

    With --scan, write reports/CASE.html instead, which prints on a page of A4, or reports/CASE.md:
    what was found, pictures, what the model is for, how the scan compares with the training data.
    Every number names the cell that it comes from. For research use only.
    """

    results: Path = argument(
        "Results folder of `volseg infer` or `volseg measure`.", converter=input_path
    )
    review: Path | None = option(
        "review.csv downloaded from a page; its verdicts and comments appear in report.html. "
        "Default: review.csv in the results folder, if there is one.",
        default=None,
        converter=optional_input_path,
    )
    scan: tuple[str, ...] = option(
        "Write a report of this scan or image, by its case_id; * stands for any characters, so "
        "'*' reports on all. Repeat for several.",
        default=(),
        converter=names,
    )
    format: str = option(
        "Format of the reports of --scan: html, or md with footnotes.",
        default="html",
        values=("html", "md"),
    )
    facts: tuple[Path, ...] = option(
        "Folder with more facts for the reports of --scan: the model if it was moved, an "
        "evaluation of it, a comparison with an earlier scan, or maps of what a classifier looked "
        "at (explain.csv). Repeat for several.",
        default=(),
        converter=more_input_paths,
    )


@options
class MethodsOptions(Options):
    """Write a methods section and the checklist CLAIM.

    Give a model, a results folder, an evaluation, or several that belong together. Prints what they
    say of data, preprocessing, network, training, inference, measurement and evaluation; every
    number is a value of one of their files. The checklist (CLAIM, 2024 update) says for each item
    what the files answer, under which key, and what is left to the author.
    """

    folders: tuple[Path, ...] = argument(
        "Model folder, results of `volseg infer` or `volseg measure`, folder of `volseg evaluate`.",
        converter=input_paths,
    )
    out: Path | None = option(
        "File for the text and the checklist (.md), or for the checklist alone (.csv).",
        default=None,
        converter=optional_path,
        short="-o",
    )
