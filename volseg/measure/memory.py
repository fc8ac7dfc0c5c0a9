"""How much memory finding and measuring the lesions of a mask takes at most, whatever the mask: from the size of its grid alone."""

from __future__ import annotations

from dataclasses import dataclass

from volseg.errors import ScanError
from volseg.execute.cpu import enough_bytes, give_back_freed_memory, resident_bytes
from volseg.postprocess.components import ALWAYS_ALLOWED, MOST_SHARE

ID_BYTES = 4  # per voxel, of lesion ids: a noisy mask has more than uint16 holds
# Measured with benchmarks/noise.py.
SLABS = 64 << 20  # of the mask, while its components are found
COMPONENT = 21  # bytes, while components are found and put in order
KEPT = 12  # bytes per lesion, while the largest are measured: label, voxels twice
ROWS = 40 << 20  # of the 10 000 lesions that are measured in full
TOGETHER = 150 << 20  # voxels of the lesions that are measured together, their forms and surfaces
PAGE = 64 << 20  # making the page of a scan, whatever its size: slabs of it, 12 million voxels, their base64
LIBRARIES = 110 << 20  # that are imported when they are needed


def lesion_bytes(voxels: int, itemsize: int, *, copies: int = 0, calcium: bool = False) -> int:
    """Bytes for finding and measuring lesions, beside the scan, the mask, the lesion ids and the confidence.

    A mask of more than a million components has one per five voxels at most, or it is refused. One lesion may fill the whole scan: then its mask, and its
    intensities in order, are there at once.

    Args:
        itemsize: bytes of a stored voxel of the scan. copies: of the mask, in bytes per voxel.
        calcium: scored too, for which a lesion's box is there as intensities.
    """
    n = max(voxels // MOST_SHARE, min(voxels, ALWAYS_ALLOWED))
    finding = SLABS + COMPONENT * n
    scored = 24 if calcium else 0
    measuring = ROWS + TOGETHER + (1 + max(itemsize, 2) + scored) * voxels + KEPT * n
    return max(finding, measuring) + copies * voxels


def writing_bytes() -> int:
    """Bytes for writing what a scan gave: its rows, some at a time, and its page."""
    return ROWS + max(TOGETHER, PAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePlan:
    """Bytes at the peak of measuring a mask on its scan, by what they are for."""

    process: int
    scan: int
    masks: int  # the mask as stored and as read, and lesion ids
    lesions: int

    @property
    def total(self) -> int:
        return self.process + self.scan + self.masks + self.lesions

    def __str__(self) -> str:
        parts = {"process": self.process, "scan": self.scan, "masks": self.masks, "lesions": self.lesions}
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"{self.total / 2**30:.2f} GB ({listed})"


def plan_measuring(
    voxels: int,
    scan_itemsize: int,
    mask_itemsize: int,
    *,
    has_organ: bool = False,
    calcium: bool = False,
    max_ram: int | None = None,
) -> MeasurePlan:
    """What measuring a mask takes at most, from the headers of the scan and the mask.

    Raises:
        ScanError: E_RAM, it does not fit into `max_ram` bytes; says what would.
    """
    give_back_freed_memory()
    copies = 2 * mask_itemsize if has_organ else 0
    plan = MeasurePlan(
        process=resident_bytes() + LIBRARIES,
        scan=scan_itemsize * voxels,
        # While a mask is read it is there twice, before there are lesion ids.
        masks=(mask_itemsize + max(ID_BYTES, mask_itemsize)) * voxels,
        lesions=lesion_bytes(voxels, scan_itemsize, copies=copies, calcium=calcium),
    )
    if max_ram is not None and plan.total > max_ram:
        raise ScanError(
            f"measuring this mask takes up to {plan}, and the budget is {max_ram / 2**30:.2f} GB",
            fix=f"give --max-ram {enough_bytes(plan.total)}, or cut scan and mask to the region that matters",
            code="E_RAM",
        )
    return plan
