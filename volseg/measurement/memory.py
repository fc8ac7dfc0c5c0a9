"""Upper bounds of the memory for finding and measuring lesions, from the grid size alone."""

from __future__ import annotations

from volseg.execution.memory import Peak
from volseg.measurement.scan import DEFAULTS
from volseg.postprocessing.components import finding_bytes, most_components
from volseg.recipe import Measure

ID_BYTES = 4  # per voxel of lesion ids: a noisy mask has more lesions than uint16 holds
# Measured with benchmarks/noise.py, in bytes.
KEPT = 12  # per lesion, while the largest are measured: its label, and its voxel count twice
ROWS = 40 << 20  # rows of the 10 000 lesions measured in full
TOGETHER = 150 << 20  # voxels, shapes and surfaces of the lesions measured together
LISTED = 10_000  # lesions in report.html
REPORT = 150 << 20  # building report.html with that many
CASE = 8 << 10  # per case of the folder, for its row in cases.csv and in report.html
PAGE = 64 << 20  # building the page of a scan of any size: slabs, 12 million voxels, base64


def lesion_bytes(voxels: int, itemsize: int, *, copies: int = 0, calcium: bool = False) -> int:
    """Return the bytes for finding and measuring lesions.

    The scan, the mask, the lesion ids and the confidence come on top. A mask with more than a
    million components has at most one per five voxels, else it is refused. One lesion may fill the
    whole scan: its mask and its sorted intensities then exist at once.

    Args:
        itemsize: bytes of a stored voxel of the scan.
        copies: bytes per voxel of copies of the mask.
        calcium: calcium is scored too, which needs the intensities of a lesion's box.
    """
    n = most_components(voxels)
    finding = finding_bytes(voxels, n)
    scored = 24 if calcium else 0
    measuring = ROWS + TOGETHER + (1 + max(itemsize, 2) + scored) * voxels + KEPT * n
    return max(finding, measuring) + copies * voxels


def writing_bytes() -> int:
    """Return the bytes for writing the results of a scan: its rows, in batches, and its page."""
    return ROWS + max(TOGETHER, PAGE)


def report_bytes(n_cases: int) -> int:
    """Return the bytes for the tables and report.html of a folder of `n_cases`, without a scan."""
    return REPORT + CASE * n_cases


def plan_page(voxels: int, scan_itemsize: int, ids_itemsize: int, *, process: int) -> Peak:
    """Return the peak of rebuilding a page, from the headers of its scan and lesion ids."""
    return Peak(
        {
            "process": process,
            "scan": scan_itemsize * voxels,
            "lesion ids": 2 * ids_itemsize * voxels,  # reading holds them twice
            "page": writing_bytes(),
        }
    )


def plan_report(n_cases: int, *, process: int) -> Peak:
    """Return the peak of building report.html of a folder."""
    return Peak({"process": process, "report": report_bytes(n_cases)})


def plan_measuring(
    voxels: int,
    scan_itemsize: int,
    mask_itemsize: int,
    settings: Measure = DEFAULTS,
    *,
    process: int,
    n_cases: int,
) -> Peak:
    """Return the peak of measuring a mask, from the headers of the scan and the mask.

    Args:
        process: bytes of the process before it reads them.
        n_cases: cases of the folder, for the tables and the page written afterwards.
    """
    copies = 2 * mask_itemsize if settings.organ is not None else 0
    lesions = lesion_bytes(voxels, scan_itemsize, copies=copies, calcium=settings.calcium)
    return Peak(
        {
            "process": process,
            "scan": scan_itemsize * voxels,
            # Reading holds the mask twice, before there are lesion ids.
            "masks": (mask_itemsize + max(ID_BYTES, mask_itemsize)) * voxels,
            "lesions": max(lesions, report_bytes(n_cases)),
        }
    )
