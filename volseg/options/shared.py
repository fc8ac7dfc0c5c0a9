"""Settings that several commands share."""

from __future__ import annotations

from volseg.errors import is_note
from volseg.options.declare import (
    Announce,
    Options,
    Progress,
    Range,
    amount,
    callback,
    ignore_progress,
    ignore_text,
    option,
    options,
    voxel_spacing,
)

SEED, COUNT = Range(0, 2**32 - 1), Range(1, 1_000_000)
DATASET = (
    "Dataset: CSV table, folder with cases.csv, folder of scans and masks (images/ and labels/, a "
    "folder per patient, BIDS, names such as P1_t1 and P1_seg), nnU-Net raw or Decathlon folder; "
    "for a classifier also a folder of images per class or a MedMNIST file."
)
RESULTS = "Folder for the results; created if missing."


@options
class Progressing(Options):
    """Reports its progress: stage, fraction done, detail."""

    progress: Progress = callback(
        "Called with a stage, the fraction of it that is done, and a detail.",
        default=ignore_progress,
    )


@options
class Announcing(Progressing):
    """Also announces what it expects, such as memory and duration, and what goes wrong."""

    announce: Announce = callback(
        "Called with sentences such as the expected peak memory, and with each warning, note and "
        "failure when it occurs.",
        default=ignore_text,
    )

    def warn(self, *remarks: str) -> None:
        """Announce warnings and notes when they occur."""
        for text in remarks:
            self.announce(remark_line(text))

    def report_failure(self, name: str, reason: str) -> None:
        """Announce that an item failed."""
        self.announce(failure_line(name, reason))


def remark_line(text: str) -> str:
    return f"{'note' if is_note(text) else 'warning'}: {text}"


def failure_line(name: str, reason: str) -> str:
    return f"failed: {name}: {reason}"


@options
class OnDevice(Options):
    device: str = option(
        "auto, cpu or cuda; auto uses a GPU if there is one.",
        default="auto",
        values=("auto", "cpu", "cuda"),
    )


@options
class Seeded(Options):
    seed: int = option(
        "Seed of every random choice, e.g. of validation cases and batches.",
        default=0,
        values=SEED,
    )


@options
class Limited(Options):
    max_ram: int | None = option(
        "Main memory limit, e.g. 4G; a case that does not fit becomes a failed row.",
        default=None,
        converter=amount,
    )


@options
class OfSeries(Options):
    volume: int | None = option(
        "Number of the volume, from 1, in files that hold several (4-D); other files are read as "
        "they are.",
        default=None,
        values=Range(1, 999_999),
    )
    series: str | None = option(
        "DICOM series to take, if a folder holds several: its UID, key or description, or largest; "
        "by default all of them.",
        default=None,
    )
    spacing: tuple[float, float, float] | None = option(
        "Voxel spacing I,J,K in mm of NPY and NPZ arrays, TIFF files and folders of pictures, "
        "which state none, e.g. 0.8,0.8,2.5; their axes are taken for R, A, S.",
        default=None,
        converter=voxel_spacing,
    )


@options
class Tilted(Options):
    tilt: str = option(
        "Stacks of slices that are not at right angles to them, as in CT with a tilted gantry: "
        "refuse them, or resample: move the slices of what the network sees within their planes. "
        "Masks and measurements stay on the slices of the scan.",
        default="refuse",
        values=("refuse", "resample"),
    )


@options
class InUnit(Options):
    intensity_unit: str | None = option(
        "Unit of the intensities: HU, SUV, a.u. or another; only HU gives density and mass, only "
        "SUV uptake. SUVbw converts PET in DICOM to SUV by body weight, or refuses it. Default: "
        "guessed from the scan; with a model that of the model, beside which only SUVbw is "
        "possible.",
        default=None,
        flag="--unit",
    )


@options
class Pictured(Options):
    figures: bool = option("Also write a PNG per scan with its lesions outlined.", default=False)
    pages: bool = option(
        "Write report.html and a page per scan that shows its lesions.",
        default=True,
        flag="--report/--no-report",
    )
