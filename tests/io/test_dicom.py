"""DICOM series are the volumes that were scanned, or are refused with the reason."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_files import (
    NAME,
    Series,
    group,
    image_header,
    numbers,
    oblique_volume,
    save,
    write_enhanced,
    write_series,
)
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

import volseg
from volseg.errors import ScanError, VolsegError
from volseg.io import dicom, dicom_frames
from volseg.io.dicom_layout import describe
from volseg.io.dicom_series import read_folder
from volseg.io.image_cases import looks_like_images
from volseg.io.layouts import find_scans
from volseg.io.volumes import read_header, read_mask, read_volume, scan_digest, write_volume
from volseg.volume import Geometry, Volume

SHARED = Path(__file__).parents[2].parent / "shared/data"
SYNTAXES = (
    *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian),
    *(DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless),
)


def assert_same(volume: Volume, expected: Volume, corner_mm: float = 1e-4) -> None:
    """Both on canonical axes, since slices are sorted along their normal."""
    one, other = volume.canonical(), expected.canonical()
    assert one.geometry.shape == other.geometry.shape
    corners = np.array(list(itertools.product(*((0, n - 1) for n in one.geometry.shape))))
    apart = one.geometry.to_world_mm(corners) - other.geometry.to_world_mm(corners)
    assert np.abs(apart).max() <= corner_mm
    np.testing.assert_allclose(
        one.intensities(one.array), other.intensities(other.array), rtol=1e-6, atol=1e-5
    )


# ---- sound series


@pytest.mark.parametrize("seed", range(6))
def test_an_oblique_series_is_the_volume_whatever_the_names_of_its_files(seed, tmp_path):
    volume = oblique_volume(seed=seed)
    folder = write_series(volume, tmp_path / "ct", Series(seed=seed))
    read = read_volume(folder)
    assert_same(read, volume)
    assert read.array.dtype == np.int16
    assert read.sha256 == scan_digest(folder)


def test_all_orientations_of_the_stored_axes_give_the_same_volume(tmp_path):
    volume = oblique_volume((6, 5, 4))
    for number, axes in enumerate(itertools.permutations(range(3))):
        for signs in itertools.product((1, -1), repeat=3):
            turned, affine = volume.array.transpose(axes), volume.geometry.affine.copy()
            affine[:3, :3] = volume.geometry.affine[:3, :3][:, axes]
            for axis, sign in enumerate(signs):
                if sign < 0:
                    turned = np.flip(turned, axis)
                    affine[:3, 3] += (turned.shape[axis] - 1) * affine[:3, axis]
                    affine[:3, axis] *= -1
            stored = Volume(turned, Geometry(turned.shape, affine))
            folder = tmp_path / f"{number}_{'_'.join(map(str, signs))}"
            assert_same(read_volume(write_series(stored, folder)), volume)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_every_transfer_syntax_gives_the_same_voxels(syntax, dtype, tmp_path):
    volume = oblique_volume((67, 45, 3), dtype=dtype)
    folder = write_series(volume, tmp_path / "ct", Series(syntax=syntax))
    assert_same(read_volume(folder), volume)


def test_an_enhanced_file_is_the_same_volume_as_a_file_per_slice(tmp_path):
    volume = oblique_volume()
    slopes = [(1 + index / 8, -3.0 * index) for index in range(5)]
    for how in (Series(), Series(slopes=slopes)):
        one = read_volume(write_enhanced(volume, tmp_path / "mr.dcm", how))
        many = read_volume(write_series(volume, tmp_path / f"ct{len(how.slopes)}", how))
        assert_same(one, many)


def test_a_slope_of_each_slice_is_applied(tmp_path):
    volume = oblique_volume(dtype=np.uint16)
    slopes = [(0.25 + index, 10.0 * index) for index in range(5)]
    read = read_volume(write_series(volume, tmp_path / "pt", Series(slopes=slopes)))
    scale, offset = np.array(slopes).T
    expected = volume.array * scale + offset
    assert read.array.dtype == np.float32 and not read.is_scaled
    assert_same(read, Volume(expected, volume.geometry))


def test_a_common_slope_stays_a_scale_of_whole_numbers(tmp_path):
    volume = oblique_volume()
    read = read_volume(write_series(volume, tmp_path / "ct", Series(slopes=[(2.0, -1024.0)] * 5)))
    assert (read.slope, read.intercept, read.array.dtype) == (2.0, -1024.0, np.int16)


@pytest.mark.parametrize("is_signed", [False, True])
def test_bits_above_those_stored_are_no_intensities(is_signed, tmp_path):
    volume = oblique_volume(dtype=np.int16 if is_signed else np.uint16)
    low, high = (-(2**11), 2**11) if is_signed else (0, 2**12)
    volume = volume.with_array(np.clip(volume.array, low, high - 1))
    rng = np.random.default_rng(0)

    def overlaid(header, index):
        stored = np.frombuffer(header.PixelData, np.uint16) & 0x0FFF
        overlay = rng.integers(0, 16, stored.shape).astype(np.uint16) << 12
        header.PixelData = (stored | overlay).tobytes()
        header.BitsStored, header.HighBit = 12, 11

    assert_same(read_volume(write_series(volume, tmp_path / "ct", Series(edit=overlaid))), volume)


def test_copies_of_slices_are_left_out(tmp_path):
    volume = oblique_volume()
    folder = write_series(volume, tmp_path / "ct")
    shutil.copy(folder / "IM0002", folder / "copy of IM0002")
    header = read_header(folder)
    assert [warning.code for warning in header.warnings] == ["W_TWICE"]
    assert_same(read_volume(folder), volume)


def test_a_mask_written_on_a_series_lies_on_its_grid(tmp_path):
    volume = oblique_volume((20, 18, 9))
    folder = write_series(volume, tmp_path / "ct")
    scan = read_volume(folder)
    mask = scan.with_array((scan.intensities(scan.array) > 1000).astype(np.uint8))
    write_volume(mask, tmp_path / "mask.nii.gz", like=folder)
    again = read_mask(tmp_path / "mask.nii.gz")
    assert np.array_equal(again.geometry.affine, scan.geometry.affine)
    assert np.array_equal(again.array, mask.array)


def turned(header, index):
    sine = (0.000499, 0.000501)[index % 2]
    header.ImageOrientationPatient = numbers([1, sine, 0, -sine, 1, 0])


def thicker(header, index):
    header.SliceThickness = ("2.9049", "2.9051")[index % 2]


def wider(header, index):
    header.PixelSpacing = [("1.30004", "1.30006")[index % 2], "0.7"]


@pytest.mark.parametrize("edit", [turned, thicker, wider])
def test_numbers_on_both_sides_of_their_rounding_are_one_volume(edit, tmp_path):
    volume = oblique_volume()
    affine = np.diag([-0.7, -1.3, 2.9, 1.0])
    volume = Volume(volume.array, Geometry(volume.geometry.shape, affine))
    folder = write_series(volume, tmp_path / "ct", Series(edit=edit))
    (case,) = find_scans([folder])  # not one of every second slice each
    assert np.array_equal(read_volume(case.images["image"]).array, volume.array)


# ---- several series


def test_kinds_stacks_and_series_in_a_folder_are_volumes_of_their_own(tmp_path):
    volumes = {name: oblique_volume(seed=seed) for seed, name in enumerate("abc")}
    for name, volume in volumes.items():
        write_series(volume, tmp_path / "study" / name)

    def as_phase(header, index):
        header.ImageType = ["ORIGINAL", "PRIMARY", "P"]

    write_series(volumes["a"], tmp_path / "study" / "a2", Series(edit=as_phase))
    cases = find_scans([tmp_path / "study"])
    assert len(cases) == 4 and len({case.id for case in cases}) == 4
    volumes_read = [read_volume(case.images["image"]) for case in cases]
    for volume in volumes.values():
        expected = np.sort(volume.array, axis=None)
        same = [np.array_equal(np.sort(one.array, axis=None), expected) for one in volumes_read]
        assert sum(same) == 1 + (volume is volumes["a"])


def test_one_of_several_series_is_chosen_by_size_uid_key_or_description(tmp_path):
    def named(name):
        def edit(header, index):
            header.SeriesDescription = name

        return Series(edit=edit, seed=len(name))

    write_series(oblique_volume((9, 9, 4)), tmp_path / "s" / "small", named("Scout"))
    large = write_series(oblique_volume((9, 9, 8)), tmp_path / "s" / "large", named("Thorax 1.0"))
    uid = dcmread(large / "IM0000").SeriesInstanceUID
    (largest,) = find_scans([tmp_path / "s"], series="largest")
    assert read_header(largest.images["image"]).geometry.shape[2] == 8
    for choice in (uid, largest.id, "thorax 1.0"):
        assert find_scans([tmp_path / "s"], series=choice) == [largest]
    with pytest.raises(VolsegError, match="no series is 'none'") as caught:
        find_scans([tmp_path / "s"], series="none")
    assert caught.value.code == "E_SERIES"
    assert "(Scout)" in str(caught.value) and "(Thorax 1.0)" in str(caught.value)
    with pytest.raises(ScanError, match="holds 2 series"):
        read_volume(tmp_path / "s")
    with pytest.raises(VolsegError, match="holds no DICOM series"):
        find_scans([Path("sample_data/images")], series="largest")


def test_ids_and_remarks_for_results_say_nothing_of_the_patient(tmp_path):
    folder = write_series(oblique_volume(), tmp_path / NAME)
    (case,) = find_scans([folder])
    assert case.id.startswith("s") and len(case.id) == 13
    again = write_series(oblique_volume(), tmp_path / "elsewhere", Series(seed=1))
    assert find_scans([again])[0].id != case.id  # another series


# ---- faults


def shifted(index: int, mm: float, along: int = 2):
    """Return an edit that moves a slice."""

    def edit(header, number):
        if number == index:
            position = [float(value) for value in header.ImagePositionPatient]
            position[along] += mm
            header.ImagePositionPatient = numbers(position)

    return edit


def straight_volume() -> Volume:
    affine = np.diag([0.7, 1.3, 3.0, 1.0])
    return Volume(oblique_volume().array, Geometry((9, 7, 5), affine))


def tilted(degrees: float):
    def edit(header, index):
        position = [float(value) for value in header.ImagePositionPatient]
        position[1] += 3.0 * index * np.tan(np.radians(degrees))
        header.ImagePositionPatient = numbers(position)

    return edit


def with_value(name: str, value: object):
    def edit(header, index):
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)

    return edit


FAULTS = {  # what is done → code, and part of the message
    "tilt": (tilted(14), "E_TILT", r"tilted by 14°"),
    "a slice between others": (shifted(2, 1.2), "E_UNEVEN", "beside an even stack"),
    "a slice beside others": (shifted(2, 1.0, along=0), "E_UNEVEN", "beside an even stack"),
    "a lost slice": (shifted(4, 3.0), "E_GAP", "1 slice missing: slices 4 and 5"),
    "two at one place": (shifted(4, -3.0), "E_4D", "5 frames at 4 places, 1 to 2 at each"),
    "colour": (with_value("PhotometricInterpretation", "PALETTE COLOR"), "E_RGB", "colours"),
    "a mosaic": (with_value("ImageType", ["DERIVED", "MOSAIC"]), "E_MOSAIC", "one picture"),
    "no position": (with_value("ImagePositionPatient", None), "E_NOGEOM", "ImagePosition"),
    "no orientation": (with_value("ImageOrientationPatient", None), "E_NOGEOM", "ImageOrien"),
    "no spacing": (with_value("PixelSpacing", None), "E_NOGEOM", "PixelSpacing"),
    "spacing of 0": (with_value("PixelSpacing", [0, 1]), "E_SPACING", "0 × 1 mm"),
    "oblique axes": (
        with_value("ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0]),
        "E_GEOM",
        "right angles",
    ),
    "a slope of 0": (with_value("RescaleSlope", 0), "E_SCALE", "RescaleSlope is 0"),
    "a table": (
        with_value("ModalityLUTSequence", [group(LUTDescriptor=[0, 0, 16])]),
        "E_SCALE",
        "lookup",
    ),
    "no pixels": (with_value("PixelData", None), "E_TRUNCATED", "0 of 126 bytes"),
    "too few pixels": (with_value("PixelData", b"1234"), "E_TRUNCATED", "of 126 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_series_that_cannot_be_trusted_is_refused_with_the_reason(fault, tmp_path):
    edit, code, text = FAULTS[fault]
    volume = straight_volume()
    assert_same(read_volume(write_series(volume, tmp_path / "sound")), volume)
    folder = write_series(volume, tmp_path / "ct", Series(edit=edit))
    with pytest.raises(ScanError, match=text) as caught:
        read_volume(folder)
    assert caught.value.code == code
    assert str(folder) in str(caught.value) and NAME not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "code"),
    [(tilted(0.05), "W_SHEAR"), (shifted(2, 0.1), "W_UNEVEN")],
    ids=["tilt", "uneven slices"],
)
def test_small_faults_are_warnings(edit, code, tmp_path):
    folder = write_series(straight_volume(), tmp_path / "ct", Series(edit=edit))
    codes = [warning.code for warning in read_header(folder).warnings]
    assert code in codes
    assert read_volume(folder).array.shape == (9, 7, 5)


def test_what_is_no_slice_is_left_out_and_named(tmp_path):
    volume = straight_volume()
    folder = write_series(volume, tmp_path / "ct")
    (folder / "notes.txt").write_text("no DICOM")
    for name, uid, modality, kind in (
        ("seg", SegmentationStorage, "SEG", "PRIMARY"),
        ("scout", SecondaryCaptureImageStorage, "CT", "LOCALIZER"),
    ):
        header = image_header(volume.array[:, :, 0].T)
        header.SOPClassUID, header.Modality = uid, modality
        header.ImageType = ["ORIGINAL", "PRIMARY", kind]
        save(header, folder / name)
    remarks: list[str] = []
    (case,) = find_scans([folder], remark=remarks.append)
    assert_same(read_volume(case.images["image"]), volume)
    (skipped,) = (text for text in remarks if text.startswith("N_SKIPPED"))
    assert "2 DICOM files left out" in skipped and "localizer (1)" in skipped
    assert "not an image: SEG (1)" in skipped


def mosaic(header, index):
    header.ImageType = ["DERIVED", "MOSAIC"]


@pytest.mark.parametrize(
    ("edit", "code"), [(mosaic, "E_MOSAIC"), (with_value("ImagePositionPatient", None), "E_NOGEOM")]
)
def test_slices_that_make_no_volume_are_no_pictures_to_classify(edit, code, tmp_path):
    folder = write_series(oblique_volume(), tmp_path / "mr", Series(edit=edit))
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".dcm"))
    problems = volseg.check(folder)
    assert any(code in problem["problem"] for problem in problems)
    assert problems[0]["code"] == "E_DATASET"
    with pytest.raises(VolsegError, match=code):
        volseg.infer(folder, out=tmp_path / "out")


def test_radiographs_without_a_place_stay_pictures(tmp_path):
    def radiograph(header, index):
        header.Modality = "CR"
        with_value("ImagePositionPatient", None)(header, index)

    folder = write_series(oblique_volume(), tmp_path / "cr", Series(edit=radiograph))
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".dcm"))
    assert looks_like_images(folder)


def test_dicom_images_beside_other_scans_are_not_left_out_without_a_word(tmp_path):
    volume = straight_volume()
    write_volume(volume, tmp_path / "scan.nii.gz")
    remarks: list[str] = []
    find_scans([tmp_path], remark=remarks.append)
    assert not any(text.startswith("W_") for text in remarks)
    write_series(volume, tmp_path / "Doe^Jane" / "series")
    (case,) = find_scans([tmp_path], remark=remarks.append)
    assert case.id == "scan"
    (warning,) = (text for text in remarks if text.startswith("W_DICOM"))
    assert "Doe" not in warning and "--series" in warning
    (problem,) = (p for p in volseg.check(tmp_path) if p["code"] == "W_DICOM")
    assert problem["fix"] == ""  # the warning names it
    (case,) = find_scans([tmp_path], series="largest")
    assert_same(read_volume(case.images["image"]), volume)


@pytest.mark.parametrize("n_bytes", [0, 100, 700])
def test_a_slice_that_was_copied_in_part_is_a_warning(n_bytes, tmp_path):
    folder = write_series(oblique_volume(), tmp_path / "ct")
    last = folder / "last.dcm"
    content = (folder / "IM0001").read_bytes()
    last.write_bytes(content[:n_bytes])
    assert len(content) > 700
    remarks: list[str] = []
    find_scans([folder], remark=remarks.append)
    (warning,) = (text for text in remarks if text.startswith("W_SKIPPED"))
    assert "1 DICOM file left out: E_" in warning
    with pytest.raises(ScanError) as caught:
        read_volume(last)
    assert caught.value.code in ("E_DAMAGED", "E_TRUNCATED")


GDCM = """
import os

class Version:
    @staticmethod
    def GetVersion():
        return "3.2.6"

def __getattr__(name):
    return lambda *arguments: os.abort()  # pydicom imports some names
"""


def test_gdcm_is_never_called_where_it_is_installed(tmp_path):
    """It can abort the process, as this stand-in does on any use but asking for its version."""
    (tmp_path / "gdcm.py").write_text(GDCM)
    volume = oblique_volume((67, 45, 3), dtype=np.uint8)
    syntaxes = [RLELossless, JPEG2000Lossless, JPEGLSLossless]
    for syntax in syntaxes:
        write_series(volume, tmp_path / syntax.keyword, Series(syntax=syntax))
    folders = [str(tmp_path / syntax.keyword) for syntax in syntaxes]
    code = (
        "import sys; from pathlib import Path; from volseg.io.volumes import read_volume; "
        "from pydicom.pixels.decoders.gdcm import HAVE_GDCM; assert HAVE_GDCM; "
        f"[read_volume(Path(folder)) for folder in {folders}]"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_file_that_is_replaced_while_reading_is_not_mixed_in(tmp_path):
    folder = write_series(straight_volume(), tmp_path / "ct")
    header = dicom.read_header(folder)
    write_series(oblique_volume(seed=3), folder)
    with pytest.raises(ScanError, match="was replaced") as caught:
        dicom.read_voxels(header, folder)
    assert caught.value.code == "E_CHANGED"


def test_a_deflated_file_that_grows_without_end_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_frames, "MAX_INFLATED_BYTES", 2**27)
    folder = write_series(
        straight_volume(), tmp_path, Series(syntax=DeflatedExplicitVRLittleEndian)
    )
    path = folder / "IM0001"
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(deflate.compress(bytes(2**24)) for _ in range(12)) + deflate.flush()
    path.write_bytes(content[:start] + packed)
    tracemalloc.start()
    with pytest.raises(ScanError, match="grows to more than") as caught:
        read_volume(path)
    assert caught.value.code == "E_BOMB"
    assert tracemalloc.get_traced_memory()[1] < 2**27  # of 192 MB
    tracemalloc.stop()


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    folder = write_series(straight_volume(), tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ScanError, match=r"pydicom is not installed.*'volseg\[dicom\]'"):
        read_volume(folder)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_compressed_frame_larger_than_its_header_says_is_not_decoded(syntax, tmp_path):
    volume = oblique_volume((67, 45, 3))
    folder = write_series(volume, tmp_path, Series(syntax=syntax))
    (rows, columns), path = volume.geometry.shape[1::-1], folder / "IM0001"
    if syntax == JPEG2000Lossless:
        size, huge = struct.pack(">2L", columns, rows), struct.pack(">2L", 60_000, 60_000)
    else:
        size, huge = struct.pack(">2H", rows, columns), struct.pack(">2H", 60_000, 60_000)
    content = path.read_bytes()
    start = content.index(b"\xff\x51" if syntax == JPEG2000Lossless else b"\xff\xf7")
    place = content.index(size, start)
    path.write_bytes(content[:place] + huge + content[place + len(size) :])
    with pytest.raises(ScanError, match=r"compressed as \(60000, 60000\) pixels") as caught:
        read_volume(folder)
    assert caught.value.code == "E_DAMAGED"


@pytest.mark.parametrize("n", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_and_never_a_traceback(n, tmp_path):
    rng, compressible = np.random.default_rng(0), oblique_volume((33, 35, 2))
    sources = [
        write_series(straight_volume(), tmp_path / "plain") / "IM0001",
        *(
            write_series(compressible, tmp_path / syntax, Series(syntax=syntax)) / "IM0001"
            for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless)
        ),
        write_enhanced(straight_volume(), tmp_path / "mr.dcm"),
    ]
    contents = [path.read_bytes() for path in sources]
    target = tmp_path / "one" / "x.dcm"
    target.parent.mkdir()
    n_read = 0
    for number in range(n):
        content = bytearray(contents[number % len(contents)])
        for _ in range(int(rng.integers(1, 6))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        if number % 5 == 0:
            del content[int(rng.integers(len(content))) :]
        target.write_bytes(bytes(content))
        try:
            read_volume(target)
            n_read += 1
        except ScanError as error:
            assert error.code
    assert n_read > 0  # some damage is to what is not used, or to intensities


# ---- real series

VERDICTS = {  # folder of shared/data/dicom → what each volume is
    "ct_3slice_seg": [(512, 512, 3)],
    "ct_oblique_axes": [(100, 50, 3)],
    "ct_philips_study": ["E_NDIM", (512, 512, 4)],
    "d2n_failing_gantrytilting_001": ["E_TILT"],
    "d2n_failing_slicecount_001": [(256, 256, 2)],
    "d2n_failing_sliceincrement_002": ["E_GAP E_TILT"],
    "d2n_ge_fmri_001": ["E_4D"],
    "d2n_generic_anatomical_001": [(256, 256, 4)],
    "d2n_generic_compressed_j2k_001": [(256, 256, 4)],
    "d2n_generic_compressed_jpeg_001": ["E_CODEC"],
    "d2n_generic_compressed_jpegls_001": [(256, 256, 4)],
    "d2n_generic_compressed_rle_001": [(256, 256, 4)],
    "d2n_generic_rgb_001": [],
    # Its slices are at right angles to the stack within 5e-5°; 0.53° comes of rounded cosines.
    "d2n_hitachi_anatomical_001": [(64, 64, 4)],
    "d2n_philips_enhanced_anatomical_001": [(256, 256, 8)],
    "mr_enhanced_philips_fieldmap": [(64, 64, 32), (64, 64, 32)],
    "mr_mosaic_siemens": [],
    "orientation_phantom": [(32, 48, 64)],
    "pet_raw_ge": ["W_UNEVEN"],
    "pydicom_emri_small": [],
    "pydicom_emri_small_jpeg_2k_lossless": [],
    "pydicom_emri_small_jpeg_ls_lossless": [],
    "pydicom_emri_small_rle": [],
    "pydicom_liver": [],
    "rtstruct_rtutils": [(512, 512, 2)],
    "seg_23x38x3": [(23, 38, 3), (23, 38, 3)],
    "sr_tid1500_example": [],
    "sts002_ct": [(161, 143, 48)],
    "sts002_mr_t1": [(115, 90, 35)],
    "sts002_pet": [(30, 27, 48)],
}


@pytest.mark.parametrize("name", VERDICTS)
def test_real_series_get_the_verdict_of_a_careful_reader(name):
    folder = SHARED / "dicom" / name
    if not folder.is_dir():
        pytest.skip("shared/data/dicom is not here")
    verdicts = []
    for volume in read_folder(folder).volumes:
        codes = [finding.code for finding in volume.findings]
        if volume.error is None:
            try:
                dicom.header_of(volume, folder)
            except ScanError as error:
                codes.append(str(error.code))
        line = describe(volume)
        assert all(code in line for code in codes) if codes else line.endswith(": sound")
        verdicts.append(" ".join(codes) or volume.shape)
    assert sorted(verdicts, key=str) == sorted(VERDICTS[name], key=str)


@pytest.mark.parametrize("name", ["ct", "mr_t1", "pet"])
def test_a_real_series_equals_the_nifti_of_the_same_scan(name):
    folder = SHARED / "dicom" / f"sts002_{name}"
    if not folder.is_dir():
        pytest.skip("shared/data/dicom is not here")
    (twin,) = (folder / "nifti").glob("*_image.nii.gz")
    series, nifti = read_volume(folder / "series"), read_volume(twin)
    assert_same(series, nifti)
    if name != "pet":
        assert np.array_equal(series.canonical().array, nifti.canonical().array)


def test_compressed_twins_of_a_real_series_are_equal():
    folder = SHARED / "dicom"
    if not folder.is_dir():
        pytest.skip("shared/data/dicom is not here")
    plain = read_volume(folder / "d2n_generic_compressed_rle_001")
    for codec in ("j2k", "jpegls"):
        twin = read_volume(folder / f"d2n_generic_compressed_{codec}_001")
        assert np.array_equal(twin.array, plain.array)
        assert np.array_equal(twin.geometry.affine, plain.geometry.affine)


def test_an_empty_value_of_an_unknown_type_is_an_absent_one(tmp_path):
    def without_place(header, index):
        del header.ImagePositionPatient

    folder = write_series(straight_volume(), tmp_path / "study", Series(edit=without_place))
    file = min(folder.iterdir())
    content = file.read_bytes()
    at = content.index(b"\x20\x00\x0e\x00UI") + 4  # the type of SeriesInstanceUID
    length = int.from_bytes(content[at + 2 : at + 4], "little")
    file.write_bytes(content[:at] + b"U\0\0\0" + content[at + 4 + length :])
    with pytest.raises(ScanError) as caught:
        read_volume(folder)
    assert caught.value.code == "E_NOGEOM"
