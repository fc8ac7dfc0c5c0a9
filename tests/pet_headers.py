"""Headers of PET slices as four vendors write them, complete; tests take parts away."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dicom_files import Edit, group
from pydicom.dataset import Dataset
from pydicom.uid import PositronEmissionTomographyImageStorage

HALF_LIFE_S, BED_S = 6586.2, 240.0
DAY, TIME = "20310203", "110000"  # of the series; the injection was an hour before
PLANTED = (DAY, "20310202", "1100", "1000", "2350")  # no output may hold them


def pet(**changes: Any) -> Edit:
    """Return an edit that makes a slice one of a PET in Bq/mL, one bed position.

    Args:
        changes: element → value; None removes it. Those of the drug are found in its sequence. A
            function is called with the number of the slice.
    """

    def edit(header: Dataset, index: int) -> None:
        header.SOPClassUID, header.Modality = PositronEmissionTomographyImageStorage, "PT"
        header.Units, header.DecayCorrection = "BQML", "START"
        header.CorrectedImage = ["DECY", "ATTN", "SCAT"]
        header.PatientWeight = "70"
        header.SeriesDate = header.AcquisitionDate = DAY
        header.SeriesTime = header.AcquisitionTime = TIME
        header.ActualFrameDuration = str(int(1000 * BED_S))
        header.FrameReferenceTime, header.DecayFactor = "0", decay_factor(0.0)
        drug = group(
            RadiopharmaceuticalStartTime="100000",
            RadionuclideTotalDose="370000000",
            RadionuclideHalfLife=str(HALF_LIFE_S),
        )
        header.RadiopharmaceuticalInformationSequence = [drug]
        for name, value in changes.items():
            place = drug if name.startswith("Radio") and "Sequence" not in name else header
            _set(place, name, value(index) if callable(value) else value)

    return edit


def _set(place: Dataset, name: str, value: Any) -> None:
    if value is None:
        delattr(place, name)
    else:
        setattr(place, name, value)


def decay_factor(start_s: float) -> str:
    """Return DecayFactor of a bed that starts so long after the reference, in 6 digits."""
    rate = math.log(2) / HALF_LIFE_S
    x = rate * BED_S
    return f"{math.exp(rate * start_s) * x / (1 - math.exp(-x)):.7g}"


def middle_ms(start_s: float) -> str:
    """Return FrameReferenceTime by the standard: when the activity is its mean over the bed."""
    rate = math.log(2) / HALF_LIFE_S
    x = rate * BED_S
    return f"{1000 * (start_s + math.log(x / (1 - math.exp(-x))) / rate):.1f}"


def clock(seconds: float) -> str:
    """Return a time of the day as DICOM stores it."""
    minutes, seconds = divmod(seconds, 60)
    return f"{int(minutes // 60):02d}{int(minutes % 60):02d}{seconds:09.6f}"


def beds(first_s: float, *, middle: bool, moved_s: float = 0.0) -> dict[str, Callable[[int], str]]:
    """Return the times of two bed positions, of which each has two slices.

    Args:
        first_s: when the first starts. middle: FrameReferenceTime is that of the standard, not
            the start of the bed. moved_s: added to AcquisitionTime of the second.
    """

    def start(index: int) -> float:
        return BED_S * (index // 2)

    return {
        "AcquisitionTime": lambda index: clock(first_s + start(index) + moved_s * (index // 2)),
        "FrameReferenceTime": lambda index: (
            middle_ms(start(index)) if middle else f"{1000 * start(index):.1f}"
        ),
        "DecayFactor": lambda index: decay_factor(start(index)),
    }


def philips(
    suv: str | None = None, activity: str | None = None, creator: str = "Philips PET Private Group"
) -> Edit:
    """Return an edit that makes a slice one in counts, with Philips' private factors."""

    def edit(header: Dataset, index: int) -> None:
        pet(Units="CNTS")(header, index)
        if creator:
            header.add_new(0x7053_0010, "LO", creator)
        for tag, value in ((0x7053_1000, suv), (0x7053_1009, activity)):
            if value is not None:
                header.add_new(tag, "DS", value)

    return edit
