"""DICOM segmentations (SEG) and reports (SR) of a series that was segmented, for a PACS.

Both carry the patient and study of their series: only they do, of all that volseg writes.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.errors import VolsegError
from volseg.io.dicom_frames import reason_of
from volseg.io.dicom_series import DicomVolume
from volseg.io.gzip_stream import refusal
from volseg.io.header import ScanHeader

RESEARCH = "RESEARCH"  # first word of the description of each series
MAX_SEGMENTS = 1000  # of a file; viewers list all of them
MAX_DESCRIPTION, MAX_CODE = 64, 16  # characters of DICOM's LO and SH
SERIES_NUMBERS = {"mask": 9001, "lesions": 9002, "report": 9003}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A region of a mask: `value` in the mask, the name to show, and what it is.

    Args:
        tracking: name that is the same at all time points of a patient.
    """

    value: int
    name: str
    tracking: str
    is_organ: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The numbers of a lesion for a report: None where they are unknown.

    Args:
        unit: of the mean intensity: HU, SUV or another.
    """

    segment: Segment
    volume_mm3: float
    long_axis_mm: float | None
    short_axis_mm: float | None
    intensity_mean: float | None
    unit: str

    def values(self) -> dict[str, float]:
        """Return the numbers by their name in a report."""
        numbers = {
            "volume": self.volume_mm3,
            "long axis": self.long_axis_mm,
            "short axis": self.short_axis_mm,
            "mean": self.intensity_mean,
        }
        return {name: float(value) for name, value in numbers.items() if value is not None}


@dataclass(frozen=True, slots=True, eq=False)
class DicomSource:
    """The series from which a mask was made: a data set of each file, without pixels.

    Args:
        slices: of each slice of the volume, from the first along the normal.
        numbers: of the frame in its file of each slice.
        by_hand: True if the mask of the model was corrected by hand.
    """

    path: Path
    model: str
    slices: Sequence[Any]
    numbers: Sequence[int]
    by_hand: bool = False

    @property
    def files(self) -> list[Any]:
        return list({id(header): header for header in self.slices}.values())

    @property
    def patient(self) -> str:
        """What is the same at all time points of a patient; the series if it names none."""
        first = self.slices[0]
        return str(first.get("PatientID") or "") or str(first.SeriesInstanceUID)

    def tracking_uid(self, segment: Segment) -> str:
        """Return the UID of a region at all time points of its patient."""
        return uid_of("tracking", self.patient, segment.tracking)


def read_source(header: ScanHeader, model: str, *, by_hand: bool = False) -> DicomSource:
    """Read the headers of the series of a scan.

    Args:
        header: of a DICOM series. model: name of the model that segments it.
        by_hand: True if its mask was corrected by hand.

    Raises:
        ScanError: highdicom is not installed (`E_BACKEND`), or a file cannot be read.
    """
    volume = header.content
    assert isinstance(volume, DicomVolume)
    if find_spec("highdicom") is None:
        problem = "DICOM can be written only with highdicom, which is not installed"
        raise refusal(header.path, "E_BACKEND", problem, "pip install 'volseg[dicom]'")
    from pydicom import dcmread

    with _refusing(header.path):
        files = {path: dcmread(path, stop_before_pixels=True) for path in header.parts}
    return DicomSource(
        header.path,
        model,
        [files[frame.path] for frame in volume.frames],
        [frame.number for frame in volume.frames],
        by_hand,
    )


def uid_of(*parts: str) -> str:
    """Return a UID that is the same for the same texts.

    Source: DICOM PS3.5 B.2, UIDs derived from a UUID.
    """
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Refuse a series that lacks what DICOM demands, such as a study."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values that are copied
            yield
    except VolsegError:
        raise
    except Exception as error:  # highdicom raises many types
        problem = f"its headers do not suffice for DICOM results ({reason_of(error)})"
        fix = "export the series again, or leave out --dicom-seg and --dicom-sr"
        raise refusal(path, "E_DICOM", problem, fix) from error


# ---- segmentations


def encode_seg(
    labels: np.ndarray, segments: Sequence[Segment], source: DicomSource, *, what: str, kind: str
) -> tuple[bytes, np.ndarray]:
    """Return a segmentation on the slices of its series, and the labels (I, J, K) in it.

    Its segments are numbered from 1 in their order.

    Args:
        labels: (I, J, K) on the grid of the series. segments: those of its values to store.
        what: `mask` or `lesions`. kind: `binary` or `labelmap`.

    Raises:
        ScanError: the headers of the series do not suffice (`E_DICOM`).
    """
    number_of = np.zeros(int(labels.max()) + 1, np.uint16)
    for number, segment in enumerate(segments, start=1):
        number_of[segment.value] = number
    numbered = number_of[labels]
    numbered = numbered.astype(np.min_scalar_type(len(segments)), copy=False)
    with _refusing(source.path):
        return _encode_seg(numbered, segments, source, what=what, kind=kind), numbered


def _encode_seg(
    numbered: np.ndarray, segments: Sequence[Segment], source: DicomSource, *, what: str, kind: str
) -> bytes:
    import highdicom as hd
    from highdicom.seg import Segmentation
    from pydicom.uid import RLELossless

    seg = Segmentation(
        source_images=source.files,
        pixel_array=_frames_of(numbered, source),
        segmentation_type="LABELMAP" if kind == "labelmap" else "BINARY",
        segment_descriptions=[
            _description(number, segment, source) for number, segment in enumerate(segments, 1)
        ],
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBERS[what],
        sop_instance_uid=hd.UID(),
        instance_number=1,
        content_label="SEGMENTATION",
        content_description=f"{RESEARCH} use only",
        **_maker(source, what),
    )
    if kind == "labelmap":
        # The decoder is named: left to choose, pydicom may take GDCM.
        seg.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    return _bytes_of(seg)


def _frames_of(numbered: np.ndarray, source: DicomSource) -> np.ndarray:
    """Return (frames, rows, columns) in the order of the files or frames of the series."""
    slices = numbered.T
    if len(source.files) > 1:
        return slices
    n = int(source.files[0].get("NumberOfFrames") or 1)
    frames = np.zeros((n, *slices.shape[1:]), slices.dtype)
    frames[list(source.numbers)] = slices
    return frames


def _maker(source: DicomSource, what: str) -> dict[str, Any]:
    by = "volseg and hand" if source.by_hand else "volseg"
    return {
        "manufacturer": "volseg",
        "manufacturer_model_name": source.model[:MAX_DESCRIPTION],
        "software_versions": __version__,
        "device_serial_number": "none",
        "series_description": f"{RESEARCH} {what} by {by}, {source.model}"[:MAX_DESCRIPTION],
    }


def _description(number: int, segment: Segment, source: DicomSource) -> Any:
    import highdicom as hd
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion
    if segment.is_organ:
        category, kind = codes.SCT.AnatomicalStructure, codes.SCT.Organ
    algorithm = hd.AlgorithmIdentificationSequence(
        name=source.model[:MAX_DESCRIPTION],
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        source="volseg",
    )
    return SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:MAX_DESCRIPTION],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type="SEMIAUTOMATIC" if source.by_hand else "AUTOMATIC",
        algorithm_identification=algorithm,
        tracking_uid=source.tracking_uid(segment),
        tracking_id=segment.tracking[:MAX_DESCRIPTION],
    )


def _bytes_of(dataset: Any) -> bytes:
    from pydicom import dcmwrite

    packed = io.BytesIO()
    dcmwrite(packed, dataset, enforce_file_format=True)
    return packed.getvalue()


# ---- reports


def encode_sr(lesions: Sequence[Measured], source: DicomSource, seg: bytes) -> bytes:
    """Return a report (TID 1500) of lesions, each with its segment of a segmentation.

    Args:
        seg: the segmentation, whose segments are those of the lesions in their order.

    Raises:
        ScanError: the headers of the series do not suffice (`E_DICOM`).
    """
    with _refusing(source.path):
        return _encode_sr(lesions, source, seg)


def _encode_sr(lesions: Sequence[Measured], source: DicomSource, seg: bytes) -> bytes:
    import highdicom as hd
    from highdicom import sr
    from pydicom import dcmread
    from pydicom.sr.codedict import codes

    segmentation = dcmread(io.BytesIO(seg))
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=uid_of("volseg", __version__, source.model),
            name="volseg",
            manufacturer_name="volseg",
            model_name=source.model[:MAX_DESCRIPTION],
        ),
    )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[
            _group(number, lesion, source, segmentation)
            for number, lesion in enumerate(lesions, start=1)
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    return _bytes_of(
        sr.Comprehensive3DSR(
            evidence=[*source.files, segmentation],
            content=report[0],
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBERS["report"],
            sop_instance_uid=hd.UID(),
            instance_number=1,
            is_complete=True,
            **_maker(source, "report"),
        )
    )


def _group(number: int, lesion: Measured, source: DicomSource, segmentation: Any) -> Any:
    from highdicom import sr
    from pydicom.sr.codedict import codes

    first, segment = source.slices[0], lesion.segment
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=source.tracking_uid(segment), identifier=segment.tracking
        ),
        # By hand: ReferencedSegment.from_segmentation fails if there is only one segment.
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(first.SeriesInstanceUID),
        ),
        finding_type=codes.SCT.Organ if segment.is_organ else codes.SCT.Lesion,
        algorithm_id=sr.AlgorithmIdentification(source.model[:MAX_DESCRIPTION], __version__),
        measurements=_measurements(lesion),
    )


def _measurements(lesion: Measured) -> list[Any]:
    """Return the numbers of a lesion with their codes.

    Source: DICOM PS3.16 TID 300, CID 7469 and 7464; Slicer's SegmentStatistics
    """
    from highdicom import sr
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    mm, mm3 = codes.UCUM.Millimeter, codes.UCUM.CubicMillimeter
    unit = UNITS.get(lesion.unit, ("[arb'U]", "arbitrary unit"))
    is_hu = lesion.unit == "HU"
    by_name: dict[str, Callable[[float], Any]] = {
        "volume": lambda value: sr.Measurement(
            codes.SCT.Volume,
            value,
            mm3,
            method=Code("126030", "DCM", "Sum of segmented voxel volumes"),
        ),
        "long axis": lambda value: sr.Measurement(codes.SCT.LongAxis, value, mm),
        "short axis": lambda value: sr.Measurement(codes.SCT.ShortAxis, value, mm),
        "mean": lambda value: sr.Measurement(
            codes.DCM.AttenuationCoefficient if is_hu else codes.SCT.Mean,
            value,
            Code(unit[0], "UCUM", unit[1]),
            derivation=codes.SCT.Mean if is_hu else None,
        ),
    }
    return [by_name[name](value) for name, value in lesion.values().items()]


UNITS: Mapping[str, tuple[str, str]] = {
    "HU": ("[hnsf'U]", "Hounsfield unit"),
    "SUV": ("{SUVbw}g/ml", "Standardized Uptake Value body weight"),
}
CODES = {  # code of a measurement → its name here
    "118565006": "volume",
    "103339001": "long axis",
    "103340004": "short axis",
    "112031": "mean",
    "373098007": "mean",
}


def report_values(content: bytes) -> list[tuple[str, dict[str, float]]]:
    """Return the tracking UID and the numbers of each lesion in a report.

    Raises:
        ValueError: it is no such report.
    """
    from pydicom import dcmread

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = dcmread(io.BytesIO(content))
            groups = [item for item in _items(report) if _code(item) == "125007"]
            return [(_uid(group), _numbers(group)) for group in groups]
    except Exception as error:
        raise ValueError(reason_of(error)) from error


def _items(item: Any) -> Iterator[Any]:
    """Yield all content items below one."""
    for child in item.get("ContentSequence") or ():
        yield child
        yield from _items(child)


def _code(item: Any) -> str:
    name = item.get("ConceptNameCodeSequence")
    return str(name[0].CodeValue) if name else ""


def _uid(group: Any) -> str:
    return next(str(item.UID) for item in _items(group) if _code(item) == "112040")


def _numbers(group: Any) -> dict[str, float]:
    return {
        CODES[_code(item)]: float(item.MeasuredValueSequence[0].NumericValue)
        for item in _items(group)
        if item.ValueType == "NUM"
    }
