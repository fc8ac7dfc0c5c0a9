"""How much memory finding and measuring the lesions of a mask takes at most, whatever the mask: from the size of its grid alone."""

from __future__ import annotations

from volseg.execute.memory import Peak
from volseg.postprocess.components import finding_bytes, most_components

ID_BYTES = 4  # per voxel, of lesion ids: a noisy mask has more than uint16 holds
# Measured with benchmarks/noise.py.
KEPT = 12  # bytes per lesion, while the largest are measured: label, voxels twice
ROWS = 40 << 20  # of the 10 000 lesions that are measured in full
TOGETHER = 150 << 20  # voxels of the lesions that are measured together, their forms and surfaces
LISTED = 10_000  # lesions in report.html
REPORT = 150 << 20  # making report.html with so many
CASE = 8 << 10  # per case of the folder, for its row in cases.csv and in report.html
PAGE = (
    64 << 20
)  # making the page of a scan, whatever its size: slabs of it, 12 million voxels, their base64


def lesion_bytes(voxels: int, itemsize: int, *, copies: int = 0, calcium: bool = False) -> int:
    """Bytes for finding and measuring lesions, beside the scan, the mask, the lesion ids and the confidence.

    A mask of more than a million components has one per five voxels at most, or it is refused. One lesion may fill the whole scan: then its mask, and its
    intensities in order, are there at once.

    Args:
        itemsize: bytes of a stored voxel of the scan. copies: of the mask, in bytes per voxel.
        calcium: scored too, for which a lesion's box is there as intensities.
    """
    n = most_components(voxels)
    finding = finding_bytes(voxels, n)
    scored = 24 if calcium else 0
    measuring = ROWS + TOGETHER + (1 + max(itemsize, 2) + scored) * voxels + KEPT * n
    return max(finding, measuring) + copies * voxels


def writing_bytes() -> int:
    """Bytes for writing what a scan gave: its rows, some at a time, and its page."""
    return ROWS + max(TOGETHER, PAGE)


def report_bytes(n_cases: int) -> int:
    """Bytes for the tables and report.html of a folder of so many cases, without a scan."""
    return REPORT + CASE * n_cases


def plan_page(voxels: int, scan_itemsize: int, ids_itemsize: int, *, process: int) -> Peak:
    """What making a page again takes at most, from the headers of its scan and lesion ids."""
    return Peak(
        {
            "process": process,
            "scan": scan_itemsize * voxels,
            "lesion ids": 2 * ids_itemsize * voxels,  # while they are read they are there twice
            "page": writing_bytes(),
        }
    )


def plan_report(n_cases: int, *, process: int) -> Peak:
    """What report.html of a folder takes at most."""
    return Peak({"process": process, "report": report_bytes(n_cases)})


def plan_measuring(
    voxels: int,
    scan_itemsize: int,
    mask_itemsize: int,
    *,
    process: int,
    n_cases: int,
    has_organ: bool = False,
    calcium: bool = False,
) -> Peak:
    """What measuring a mask takes at most, from the headers of the scan and the mask.

    Args:
        process: bytes, before they are read.
        n_cases: of the folder, of which there are tables and a page afterwards.
    """
    copies = 2 * mask_itemsize if has_organ else 0
    return Peak(
        {
            "process": process,
            "scan": scan_itemsize * voxels,
            # While a mask is read it is there twice, before there are lesion ids.
            "masks": (mask_itemsize + max(ID_BYTES, mask_itemsize)) * voxels,
            "lesions": max(
                lesion_bytes(voxels, scan_itemsize, copies=copies, calcium=calcium),
                report_bytes(n_cases),
            ),
        }
    )
