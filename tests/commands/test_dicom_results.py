"""DICOM segmentations and reports hold the mask and the numbers of a run, on the series' slices."""

from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pytest
from dicom_files import (
    FRAME,
    NAME,
    SERIES,
    STUDY,
    Series,
    complete,
    oblique_volume,
    write_enhanced,
    write_series,
)
from pydicom import dcmread
from pydicom.uid import RLELossless

import volseg
from volseg.commands import dicom_results
from volseg.commands.dicom_results import NOTE, DicomResults
from volseg.errors import EnvironmentProblem, ScanError, VolsegError
from volseg.io.dicom_out import read_source, uid_of
from volseg.io.volumes import read_header, read_mask, read_volume, write_volume
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.specks import MeasuredLesions, measure_largest
from volseg.measurement.units import judge_unit
from volseg.postprocessing.lesions import label_lesions
from volseg.recipe import Measure
from volseg.store.results import ResultsFolder
from volseg.volume import Volume

SHARED = Path(__file__).parents[2].parent / "shared/data/dicom"
NAMES = {2: "nodule", 5: "organ", 7: "absent"}


@pytest.fixture
def series(tmp_path) -> Path:
    return write_series(oblique_volume((30, 26, 7)), tmp_path / "ct", Series(edit=complete))


def mask_of(scan: Volume) -> Volume:
    """Return two nodules and an organ, none on the first and last slices."""
    array = np.zeros(scan.geometry.shape, np.uint8, order="F")
    array[3:9, 4:9, 2:4], array[20:26, 10:12, 4], array[10:16, 14:22, 1:6] = 2, 2, 5
    return scan.with_array(array)


def measured(scan: Volume, mask: Volume) -> MeasuredLesions:
    lesions = label_lesions(np.where(mask.array == 5, 0, mask.array), scan.geometry)
    unit = judge_unit(scan, "HU", by="the test")
    return measure_largest(
        SegmentedScan(
            case_id="case",
            image=scan,
            lesions=lesions,
            unit=replace(unit, name="HU"),
            label_names=NAMES,
            settings=Measure(),
            organ_voxels=None,
        )
    )


def written(scan_path: Path, out: Path, **how) -> tuple[Volume, MeasuredLesions, list[str]]:
    """Write the DICOM results of a made-up mask; return it with its lesions and the notes."""
    scan = read_volume(scan_path)
    mask = mask_of(scan)
    lesions = measured(scan, mask)
    request = {"seg": "binary", "sr": True, "model": "balls", "label_names": NAMES}
    results = DicomResults(**(request | {"organ": "organ"} | how))
    with ResultsFolder(out, "infer", inputs=[]) as folder, folder.staged() as commit:
        notes = results.write(scan_path, mask, lesions, commit)
        commit.finish()
    return mask, lesions, notes


def voxels_of(path: Path, scan: Volume, number: int) -> np.ndarray:
    """Return a segment (I, J, K) by highdicom, on the slices of the scan."""
    seg = highdicom.seg.segread(path)
    volume = seg.get_volume(segment_numbers=[number], rescale_fractional=False)
    affine = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    whole = np.zeros(scan.geometry.shape, bool)
    index = np.argwhere(volume.array[..., 0] > 0)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    offsets = scan.geometry.to_index(points)
    assert np.abs(offsets - np.rint(offsets)).max() < 0.01
    whole[tuple(np.rint(offsets).astype(int).T)] = True
    return whole


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_another_reader_gets_the_mask_on_the_slices_of_the_series(kind, series, tmp_path):
    mask, _, notes = written(series, tmp_path / "out", seg=kind)
    path = tmp_path / "out" / "dicom_seg" / "case.dcm"
    for number, value in enumerate((2, 5), start=1):
        assert np.array_equal(voxels_of(path, mask, number), mask.array == value)
    header = dcmread(path)
    names = {int(item.SegmentNumber): item.SegmentLabel for item in header.SegmentSequence}
    names.pop(0, None)
    assert names == {1: "nodule", 2: "organ"}
    assert notes == [f"{NOTE}: labels without a voxel have no DICOM segment: 'absent'"]
    assert header.SeriesDescription.startswith("RESEARCH")
    assert header.PatientName == NAME and header.StudyInstanceUID == STUDY
    (referenced,) = header.ReferencedSeriesSequence
    instances = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert referenced.SeriesInstanceUID == SERIES
    assert instances == {dcmread(file).SOPInstanceUID for file in series.iterdir()}
    assert header.FrameOfReferenceUID == FRAME
    is_packed = header.file_meta.TransferSyntaxUID == RLELossless
    assert is_packed == (kind == "labelmap")
    types = [item.SegmentedPropertyTypeCodeSequence[0] for item in header.SegmentSequence]
    assert [code.CodeMeaning for code in types[-2:]] == ["Lesion", "Organ"]


def test_a_report_holds_the_numbers_of_each_lesion_and_its_segment(series, tmp_path):
    mask, lesions, _ = written(series, tmp_path / "out", seg=None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        ".volseg",
        "dicom_lesions",
        "dicom_sr",
    ]
    report = highdicom.sr.srread(tmp_path / "out" / "dicom_sr" / "case.dcm")
    assert report.SeriesDescription.startswith("RESEARCH")
    assert report.VerificationFlag == "UNVERIFIED"
    segments = tmp_path / "out" / "dicom_lesions" / "case.dcm"
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(lesions.largest) == 2
    for lesion, group in zip(lesions.largest, groups, strict=True):
        values = {item.name.meaning: item.value for item in group.get_measurements()}
        expected = {
            "Volume": lesion.volume_mm3,
            "Long axis": lesion.long_axis_mm,
            "Short axis": lesion.short_axis_mm,
            "Attenuation Coefficient": lesion.intensity_mean,
        }
        assert values == pytest.approx(expected, rel=1e-9)
        units = {item.name.meaning: item.unit.value for item in group.get_measurements()}
        assert units["Attenuation Coefficient"] == "[hnsf'U]" and units["Volume"] == "mm3"
        assert group.tracking_identifier == f"nodule {lesion.lesion_id}"
        (referenced,) = group.referenced_segment[0].ReferencedSOPSequence
        number = int(referenced.ReferencedSegmentNumber)
        inside = voxels_of(segments, mask, number)
        assert np.array_equal(inside, lesions.scan.lesions.ids == lesion.lesion_id)
        assert referenced.ReferencedSOPInstanceUID == dcmread(segments).SOPInstanceUID


def test_tracking_uids_are_equal_at_all_times_of_a_patient_and_differ_between_patients(tmp_path):
    uids = []
    for number, (patient, study) in enumerate((("A", 1), ("A", 2), ("B", 1))):

        def edit(header, index, patient=patient, study=study, number=number):
            complete(header, index)
            header.PatientID, header.StudyInstanceUID = patient, f"{STUDY}{study}"
            header.SeriesInstanceUID = f"{SERIES}{study}{number}"

        folder = tmp_path / f"{number}"
        write_series(oblique_volume((30, 26, 7), seed=number), folder / "ct", Series(edit=edit))
        written(folder / "ct", folder / "out")
        of_files = [
            [str(item.TrackingUID) for item in dcmread(path).SegmentSequence]
            for path in sorted((folder / "out").glob("dicom_[ls]e*/case.dcm"))
        ]
        uids.append([uid for part in of_files for uid in part])
    assert len(set(uids[0])) == 4  # two labels, two lesions
    assert uids[0] == uids[1] and not set(uids[0]) & set(uids[2])
    assert "A" not in uid_of("tracking", "A", "nodule 1")


def test_an_enhanced_file_gets_a_segmentation_of_its_frames(tmp_path):
    def edit(header, index):
        complete(header)
        header.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = []

    path = write_enhanced(oblique_volume((30, 26, 7)), tmp_path / "mr.dcm", Series(edit=edit))
    mask, _, _ = written(path, tmp_path / "out")
    assert np.array_equal(
        voxels_of(tmp_path / "out" / "dicom_seg" / "case.dcm", mask, 1), mask.array == 2
    )


def test_a_file_that_is_not_what_was_written_never_appears(series, tmp_path, monkeypatch):
    def wrong_seg(labels, segments, source, **how):
        content, numbered = encode_seg(np.roll(labels, 1, axis=0), segments, source, **how)
        return content, np.roll(numbered, -1, axis=0)

    def wrong_sr(lesions, source, seg):
        return encode_sr([replace(lesions[0], volume_mm3=1.0), *lesions[1:]], source, seg)

    encode_seg, encode_sr = dicom_results.encode_seg, dicom_results.encode_sr
    for name, wrong in (("encode_seg", wrong_seg), ("encode_sr", wrong_sr)):
        with monkeypatch.context() as patched:
            patched.setattr(dicom_results, name, wrong)
            with pytest.raises(EnvironmentProblem, match="read back"):
                written(series, tmp_path / name)
        assert not list((tmp_path / name).rglob("case.dcm"))


def test_a_series_that_lacks_what_dicom_demands_is_refused(tmp_path):
    def poor(header, index):
        complete(header, index)
        del header.StudyInstanceUID

    folder = write_series(oblique_volume((30, 26, 7)), tmp_path / "ct", Series(edit=poor))
    with pytest.raises(ScanError, match="StudyInstanceUID") as caught:
        written(folder, tmp_path / "out")
    assert caught.value.code == "E_DICOM"


def test_an_empty_mask_has_no_files_and_a_note(series, tmp_path):
    scan = read_volume(series)
    empty = scan.with_array(np.zeros(scan.geometry.shape, np.uint8))
    results = DicomResults(seg="binary", sr=True, model="balls", label_names={1: "ball"})
    with ResultsFolder(tmp_path / "out", "infer", inputs=[]) as folder, folder.staged() as commit:
        notes = results.write(series, empty, measured(scan, empty), commit)
        commit.finish()
    assert len(notes) == 2 and all(note.startswith(NOTE) for note in notes)
    assert not list((tmp_path / "out").rglob("*.dcm"))


# ---- the command


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(dataset, tmp_path_factory) -> Path:
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    stored = Volume(np.rint(scan.array).astype(np.int16), scan.geometry)
    folder = tmp_path_factory.mktemp("study")
    return write_series(stored, folder / "ct", Series(edit=complete))


def test_infer_writes_them_and_no_other_result_names_the_patient(study, model, tmp_path):
    out = tmp_path / "out"
    how = {"model": model, "out": out, "figures": True, "dicom_seg": "labelmap", "dicom_sr": True}
    report = volseg.infer(study, **how)
    assert report.exit_code == 0
    (case,) = {row["case_id"] for row in rows(out / "cases.csv")}
    mask = read_mask(out / "masks" / f"{case}.nii.gz")
    seg = read_mask(out / "dicom_seg" / f"{case}.dcm", like=study)
    assert mask.array.any() and np.array_equal(seg.array != 0, mask.array != 0)
    ids = read_mask(out / "lesion_ids" / f"{case}.nii.gz")
    lesions = read_mask(out / "dicom_lesions" / f"{case}.dcm", like=study)
    assert np.array_equal(lesions.array, ids.array)
    sr = highdicom.sr.srread(out / "dicom_sr" / f"{case}.dcm")
    groups = sr.content.get_volumetric_roi_measurement_groups()
    volumes = [group.get_measurements()[0].value for group in groups]
    expected = [float(row["volume_mm3"]) for row in rows(out / "lesions.csv")]
    assert volumes == pytest.approx(expected, rel=1e-5)
    for path in out.rglob("*"):
        if not path.is_file() or path.suffix == ".dcm":
            continue
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for word in (NAME, "Thorax", "19611111", "20111111", "1.2.826.0.1.3680043", "2.25."):
            assert word.encode() not in content, (path, word)
    again = volseg.infer(study, **how)
    assert not again.done and len(again.kept) == 1
    write_volume(mask.with_array(np.roll(mask.array, 2, axis=0)), out / "masks" / f"{case}.nii.gz")
    volseg.measure(results=out)
    corrected = read_mask(out / "masks" / f"{case}.nii.gz")
    seg = read_mask(out / "dicom_seg" / f"{case}.dcm", like=study)
    assert np.array_equal(seg.array != 0, corrected.array != 0)
    header = dcmread(out / "dicom_seg" / f"{case}.dcm")
    assert header.SegmentSequence[1].SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert header.file_meta.TransferSyntaxUID == RLELossless and "hand" in header.SeriesDescription
    other = volseg.infer(study, **(how | {"dicom_seg": "binary", "out": tmp_path / "other"}))
    assert len(other.done) == 1


def test_what_is_no_series_is_refused_before_anything_is_done(dataset, model, tmp_path):
    scan = dataset / "images" / "scan_6.nii.gz"
    for how in ({"dicom_seg": "binary"}, {"dicom_sr": True}):
        with pytest.raises(VolsegError, match="need a DICOM series") as caught:
            volseg.infer(scan, model=model, out=tmp_path / "out", **how)
        assert caught.value.code == "E_USAGE"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
@pytest.mark.parametrize("modality", ["ct", "pet"])
def test_real_series_come_back(modality, tmp_path):
    folder = SHARED / f"sts002_{modality}"
    scan = read_volume(folder / "series")
    mask = read_mask(folder / "rtstruct", like=folder / "series")
    results = DicomResults(seg="labelmap", sr=True, model="hand", label_names={1: "GTV"})
    with ResultsFolder(tmp_path / "out", "infer", inputs=[]) as out, out.staged() as commit:
        notes = results.write(folder / "series", mask, measured(scan, mask), commit)
        commit.finish()
    assert not notes
    for name in ("dicom_seg", "dicom_lesions"):
        path = tmp_path / "out" / name / "case.dcm"
        assert np.array_equal(voxels_of(path, scan, 1), mask.array == 1)


def test_a_source_knows_its_slices_in_the_order_of_the_volume(series):
    source = read_source(read_header(series), "balls")
    affine = read_header(series).geometry.affine
    for index, header in enumerate(source.slices):
        position = np.array(header.ImagePositionPatient, float) * [-1, -1, 1]
        assert position == pytest.approx((affine @ [0, 0, index, 1])[:3], abs=1e-3)
    assert len(source.files) == 7 and set(source.numbers) == {0}
