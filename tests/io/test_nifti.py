"""The reader on ninety odd, damaged and hostile files, compared with nibabel; the writer."""

from __future__ import annotations

import csv
import errno
import gzip
import itertools
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_files import read_or_refused

from volseg.errors import EnvironmentProblem, ScanError
from volseg.io import files, voxels
from volseg.io.formats import stem_of
from volseg.io.volumes import read_header, read_mask, read_volume, scan_digest, write_volume
from volseg.volume import Geometry, Volume

DATA = Path(__file__).parents[2].parent / "shared/data"
SHAPE = (16, 17, 12)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)


def oblique(spacing_mm=(0.75, 0.75, 2.5), angle=0.3, origin=(-120.0, 80.0, -300.0)) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    affine = np.eye(4)
    rotation = np.array([[-c, s, 0], [-s, -c, 0], [0, 0, 1]])  # LPS, rotated about z
    affine[:3, :3] = rotation @ np.diag(spacing_mm)
    affine[:3, 3] = origin
    return affine


def nifti_bytes(array=VOXELS, affine=None, version=1, sform=1, qform=1, units=2) -> bytes:
    """Return a valid file written by nibabel, independent of the writer under test."""
    affine = oblique() if affine is None else affine
    image_type = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = image_type(array, affine, dtype=array.dtype)
    image.header.set_qform(affine, qform)
    image.header.set_sform(affine, sform)
    image.header["xyzt_units"] = units
    return image.to_bytes()


def poked(offset: int, layout: str, *values, data: bytes | None = None) -> bytes:
    """Return the file with header bytes overwritten; offsets as in the NIfTI-1 standard."""
    data = bytearray(nifti_bytes() if data is None else data)
    struct.pack_into("<" + layout, data, offset, *values)
    return bytes(data)


def with_srow(affine: np.ndarray, data: bytes | None = None) -> bytes:
    return poked(280, "12f", *affine[:3].ravel(), data=data)


def only_qform(data: bytes) -> bytes:
    return poked(254, "h", 0, data=poked(280, "12f", *[0.0] * 12, data=data))


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def flipped(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 0x10
    return bytes(damaged)


def sheared(amount: float) -> np.ndarray:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[1, 2] = amount
    return affine


PLAIN = nifti_bytes()
GZ = packed(PLAIN)
FLOATS = VOXELS.astype(np.float32)
UNIT = nifti_bytes(affine=np.diag([1.0, 1.0, 1.0, 1.0]))
NAN, INF = float("nan"), float("inf")


def with_voxel(value: float, array=FLOATS) -> np.ndarray:
    array = array.copy()
    array[3, 4, 5] = value
    return array


HUGE = poked(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1)
# name: (file name, contents, expected code or None)
CONTAINERS = {
    "ok_plain": ("scan.nii", PLAIN, None),
    "ok_gz": ("scan.nii.gz", GZ, None),
    "two_members": ("scan.nii.gz", packed(PLAIN[:999]) + packed(PLAIN[999:]), None),
    "zero_padding": ("scan.nii.gz", GZ + bytes(512), None),
    "upper_case_name": ("SCAN.NII.GZ", GZ, None),
    "unicode_space_name": ("Jürgen 2 – Kopf.nii.gz", GZ, None),
    "plain_named_gz": ("scan.nii.gz", PLAIN, "W_EXT"),
    "gz_named_plain": ("scan.nii", GZ, "W_EXT"),
    "wrong_ext": ("scan.dat", PLAIN, None),
    "empty_file": ("scan.nii", b"", "E_EMPTY"),
    "empty_gz": ("scan.nii.gz", packed(b""), "E_EMPTY"),
    "short_header": ("scan.nii", PLAIN[:200], "E_TRUNCATED"),
    "header_only": ("scan.nii", PLAIN[:352], "E_TRUNCATED"),
    "header_only_gz": ("scan.nii.gz", packed(PLAIN[:352]), "E_TRUNCATED"),
    "truncated_data": ("scan.nii", PLAIN[:-1], "E_TRUNCATED"),
    "short_inside_gz": ("scan.nii.gz", packed(PLAIN[:-1]), "E_TRUNCATED"),
    "truncated_gz": ("scan.nii.gz", GZ[: len(GZ) // 2], "E_TRUNCATED"),
    "gz_missing_trailer": ("scan.nii.gz", GZ[:-8], "E_TRUNCATED"),
    "gz_half_trailer": ("scan.nii.gz", GZ[:-4], "E_TRUNCATED"),
    "gz_bad_crc": ("scan.nii.gz", flipped(GZ, -7), "E_CRC"),
    "gz_bad_length": ("scan.nii.gz", flipped(GZ, -3), "E_CRC"),
    "gz_bit_flip": ("scan.nii.gz", flipped(GZ, len(GZ) - 500), "E_CRC"),
    "gz_trailing_garbage": ("scan.nii.gz", GZ + b"garbage", "E_GZIP"),
    "gz_trailing_byte": ("scan.nii.gz", GZ + b"\x1f", "E_GZIP"),
    "gz_twice": ("scan.nii.gz", packed(GZ), "E_NOTNIFTI"),
    "long_tail": ("scan.nii", PLAIN + bytes(2**20 + 1), "E_BOMB"),
    "short_tail": ("scan.nii", PLAIN + b"x" * 100, None),
    "text_file": ("scan.nii", b"hello", "E_NOTNIFTI"),
    "html_login_page": ("scan.nii", b"<!DOCTYPE html>" + b" " * 500, "E_NOTNIFTI"),
    "lfs_pointer": ("scan.nii", b"version https://git-lfs.github.com/spec/v1\n", "E_NOTNIFTI"),
    "dicom": ("scan.dcm", bytes(128) + b"DICM" + bytes(900), "E_DAMAGED"),
    "dicom under another name": ("scan.nii", bytes(128) + b"DICM" + bytes(900), "E_NOTNIFTI"),
}
HEADERS = {
    "huge_dims": ("scan.nii", HUGE, "E_TOOBIG"),
    "huge_dims_gz": ("scan.nii.gz", packed(HUGE), "E_TOOBIG"),
    "more_than_gzip_holds": (
        "scan.nii.gz",
        packed(poked(40, "8h", 3, 1500, 1500, 1500, 1, 1, 1, 1)),
        "E_TOOBIG",
    ),
    "overflow_dims": ("scan.nii", poked(40, "8h", 7, *[32767] * 7), "E_NDIM"),
    "two_d": ("scan.nii", poked(40, "h", 2), "W_SLICE"),
    "single_slice": ("scan.nii", nifti_bytes(VOXELS[:, :, :1]), "W_SLICE"),
    "surface_values": ("scan.nii", nifti_bytes(VOXELS[:, :1, :1]), "E_NDIM"),
    "two_slices": ("scan.nii", nifti_bytes(VOXELS[:, :, :2]), None),
    "four_d": ("scan.nii", nifti_bytes(np.stack([VOXELS] * 2, axis=-1)), "E_NDIM"),
    "five_d": ("scan.nii", nifti_bytes(np.zeros((4, 4, 4, 1, 3), np.float32)), "E_NDIM"),
    "four_d_singleton": ("scan.nii", nifti_bytes(VOXELS[..., None]), None),
    "six_d_singleton": ("scan.nii", nifti_bytes(VOXELS[..., None, None, None]), None),
    "negative_dim": ("scan.nii", poked(42, "h", -16), "E_DIM"),
    "zero_dim": ("scan.nii", poked(44, "h", 0), "E_DIM"),
    "dim0_zero": ("scan.nii", poked(40, "h", 0), "E_DIM"),
    "dim0_nine": ("scan.nii", poked(40, "h", 9), "E_DIM"),
    "rgb": ("scan.nii", poked(70, "2h", 128, 24), "E_DTYPE"),
    "complex64": ("scan.nii", nifti_bytes(VOXELS.astype(np.complex64)), "E_DTYPE"),
    "float128_dt": ("scan.nii", poked(70, "2h", 1536, 128), "E_DTYPE"),
    "unknown_dtype": ("scan.nii", poked(70, "h", 9999), "E_DTYPE"),
    "bitpix_mismatch": ("scan.nii", poked(72, "h", 64), None),
    "int64": ("scan.nii", nifti_bytes(VOXELS.astype(np.int64)), None),
    "nifti2": ("scan.nii.gz", packed(nifti_bytes(version=2)), None),
    "nifti2_text_mode": ("scan.nii", nifti_bytes(version=2).replace(b"\r\n", b"\n"), "E_NOTNIFTI"),
    "bad_magic": ("scan.nii", poked(344, "4s", b"n+9"), "E_NOTNIFTI"),
    "analyze": ("scan.hdr", poked(344, "4s", b""), "E_NOTNIFTI"),
    "sizeof_hdr_bad": ("scan.nii", poked(0, "i", 999), "E_NOTNIFTI"),
    "vox_offset_zero": ("scan.nii", poked(108, "f", 0.0), "W_OFFSET"),
    "vox_offset_in_header": ("scan.nii", poked(108, "f", 100.0), "E_HEADER"),
    "vox_offset_fraction": ("scan.nii", poked(108, "f", 352.5), "E_HEADER"),
    "vox_offset_negative": ("scan.nii", poked(108, "f", -352.0), "E_HEADER"),
    "vox_offset_past_end": ("scan.nii", poked(108, "f", 1e6), "E_HEADER"),
    "vox_offset_huge": ("scan.nii", poked(108, "f", 1e9), "E_HEADER"),
    "vox_offset_nan": ("scan.nii.gz", packed(poked(108, "f", NAN)), "E_HEADER"),
    "extension": (
        "scan.nii.gz",
        packed(poked(108, "f", 416.0)[:352] + b"comment " * 8 + PLAIN[352:]),
        None,
    ),
    "lone_header": ("scan.hdr", poked(344, "4s", b"ni1"), "E_MISSING"),
    "lone_image": ("scan.img", PLAIN, "E_MISSING"),
}
INTENSITIES = {
    "nan_voxels": ("scan.nii", nifti_bytes(with_voxel(NAN)), "E_NAN"),
    "inf_voxels": ("scan.nii", nifti_bytes(with_voxel(-INF)), "E_NAN"),
    "all_nan": ("scan.nii", nifti_bytes(np.full(SHAPE, NAN)), "E_NAN"),
    "constant": ("scan.nii", nifti_bytes(np.full(SHAPE, -1024, np.int16)), "E_CONST"),
    "beyond_float32": (
        "scan.nii",
        nifti_bytes(with_voxel(1e300, VOXELS.astype(np.float64))),
        "E_SCALE",
    ),
    "slope_zero": ("scan.nii", poked(112, "2f", 0.0, -1024.0), "W_SCALE"),
    "slope_and_intercept_zero": ("scan.nii", poked(112, "2f", 0.0, 0.0), None),
    "slope_nan": ("scan.nii", poked(112, "2f", NAN, NAN), None),
    "slope_inf": ("scan.nii", poked(112, "f", INF), "E_SCALE"),
    "slope_huge": ("scan.nii", poked(112, "f", 1e38), "E_SCALE"),
    "slope_negative": ("scan.nii", poked(112, "2f", -1.0, 0.0), "E_SCALE"),
    "intercept_nan": ("scan.nii", poked(112, "2f", 2.0, NAN), "E_SCALE"),
}
GEOMETRIES = {
    "pixdim_zero": ("scan.nii", poked(88, "f", 0.0), "E_PIXDIM"),
    "pixdim_nan": ("scan.nii", poked(80, "f", NAN), "E_PIXDIM"),
    "pixdim_sform_disagree": ("scan.nii", poked(80, "f", 1.6), "E_PIXDIM"),
    "pixdim_rounded": ("scan.nii", poked(80, "2f", 0.752, 0.752), None),
    "pixdim_negative": ("scan.nii", poked(80, "f", -0.75), "W_QS"),
    "q_s_disagree": ("scan.nii", poked(268, "f", -100.0), "W_QS"),
    "quatern_invalid_good_sform": ("scan.nii", poked(256, "3f", 1.0, 1.0, 1.0), "W_QS"),
    "pixdim_zero_nosform": ("scan.nii", only_qform(poked(88, "f", 0.0)), "E_GEOM"),
    "pixdim_nan_nosform": ("scan.nii", only_qform(poked(88, "f", NAN)), "E_GEOM"),
    "offset_nan_nosform": ("scan.nii", only_qform(poked(268, "f", NAN)), "E_GEOM"),
    "qform_only": ("scan.nii", only_qform(PLAIN), None),
    "qfac_zero": ("scan.nii", only_qform(poked(76, "f", 0.0)), None),
    "singular_sform": ("scan.nii", with_srow(np.diag([1.0, 1.0, 0.0, 1.0]), UNIT), "E_GEOM"),
    "parallel_axes": (
        "scan.nii",
        with_srow(np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0.0]]), UNIT),
        "E_GEOM",
    ),
    "zero_sform": ("scan.nii", with_srow(np.zeros((3, 4))), "W_QS"),  # the qform is sound
    "nan_sform": ("scan.nii", poked(292, "f", NAN), "E_GEOM"),
    "units_metre": ("scan.nii", poked(123, "B", 1), "E_UNITS"),
    "units_micron": ("scan.nii", poked(123, "B", 3), "E_UNITS"),
    "units_nonsense": ("scan.nii", poked(123, "B", 7), "E_UNITS"),
    "units_unknown": ("scan.nii", poked(123, "B", 0), None),
    "units_mm_and_s": ("scan.nii", poked(123, "B", 10), None),
    "code_negative": ("scan.nii", poked(254, "h", -1), "E_NOGEOM"),
    "code_unknown": ("scan.nii", poked(252, "h", 64), "E_NOGEOM"),
    "no_codes": ("scan.nii", poked(252, "2h", 0, 0), "E_NOGEOM"),
    "quatern_invalid": ("scan.nii", only_qform(poked(256, "3f", 1.0, 1.0, 1.0)), "E_NOGEOM"),
    "qfac_invalid": ("scan.nii", only_qform(poked(76, "f", 0.5)), "E_NOGEOM"),
    "sheared_sform": ("scan.nii", with_srow(sheared(0.1), UNIT), "E_SHEAR"),
    "gantry_tilt": ("scan.nii", with_srow(sheared(math.tan(math.radians(15))), UNIT), "E_SHEAR"),
    "near_orthonormal": ("scan.nii", with_srow(sheared(1e-4), UNIT), "W_SHEAR"),
    "huge_origin": ("scan.nii", nifti_bytes(affine=oblique(origin=(5e4, 0, 0))), "W_ORIGIN"),
    "tiny_spacing": (
        "scan.nii",
        nifti_bytes(affine=oblique((7.5e-4, 7.5e-4, 2.5e-3))),
        "E_SPACING",
    ),
    "giant_spacing": ("scan.nii", nifti_bytes(affine=oblique((750, 750, 2500))), "E_SPACING"),
    "anisotropic_extreme": ("scan.nii", nifti_bytes(affine=oblique((0.1, 0.1, 50))), "W_ANISO"),
}
FILES = CONTAINERS | HEADERS | INTENSITIES | GEOMETRIES


@pytest.mark.parametrize("name", FILES)
def test_odd_file_is_read_correctly_or_refused_with_its_code(name, tmp_path):
    file_name, data, code = FILES[name]
    path = tmp_path / file_name
    path.write_bytes(data)
    volume = read_or_refused(path, code)
    if volume is None:
        return
    np.testing.assert_array_equal(volume.array, VOXELS[:, :, : volume.array.shape[2]])
    plain = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    image = (nibabel.Nifti2Image if plain[0] == 0x1C else nibabel.Nifti1Image).from_bytes(plain)
    np.testing.assert_array_equal(volume.geometry.affine, affine_of(image))


def test_messages_contain_the_values(tmp_path):
    path = tmp_path / "scan.nii"
    for data, words in (
        (PLAIN[: 352 + 1234], "holds 1,234 of 6,528 voxel bytes"),
        (poked(80, "f", 1.6), "spacing of 1.6 0.75 2.5 mm, but the sform 0.75 0.75 2.5 mm"),
        (nifti_bytes(with_voxel(NAN)), "1 voxels are NaN and 0 infinite, of 3,264"),
        (nifti_bytes(np.stack([VOXELS] * 3, axis=-1)), "16×17×12×3"),
        (with_srow(sheared(0.1), UNIT), "5.71° away from right angles"),
        (poked(123, "B", 3), "micron"),
    ):
        path.write_bytes(data)
        with pytest.raises(ScanError) as caught:
            read_volume(path)
        assert words in caught.value.problem


PLACES = {
    "missing": "E_MISSING",
    "dangling": "E_MISSING",
    "file.nii/inside.nii": "E_MISSING",
    "zero\0byte.nii": "E_MISSING",
    "x" * 300 + ".nii": "E_MISSING",
    "folder": "E_NOTFILE",
    "loop": "E_NOTFILE",
    "pipe": "E_NOTFILE",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: repr(place)[:20])
@pytest.mark.parametrize("read", [read_volume, read_mask, read_header])
def test_paths_that_are_not_files_are_refused_without_waiting(place, read, tmp_path):
    (tmp_path / "file.nii").write_bytes(PLAIN)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScanError) as caught:
        read(tmp_path / place)
    assert caught.value.code == PLACES[place]


def test_permission_and_disk_errors_become_scan_errors(tmp_path, monkeypatch):
    path = tmp_path / "scan\nwith a line break.nii"
    path.write_bytes(PLAIN)
    for number, code in ((errno.EACCES, "E_PERM"), (errno.EIO, "E_READ")):

        def failing(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("builtins.open", failing)  # chmod has no effect for root
        with pytest.raises(ScanError) as caught:
            read_volume(path)
        monkeypatch.undo()
        assert caught.value.code == code
        assert "\n" not in str(caught.value)


def test_gzip_bomb_after_the_voxels_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(packed(PLAIN) + gzip.compress(bytes(64 * 2**20), 9))
    tracemalloc.start()
    with pytest.raises(ScanError) as caught:
        read_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "E_BOMB"
    assert peak < 4 * 2**20


def test_a_header_that_requests_too_much_is_refused_before_memory_is_allocated(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(packed(PLAIN))
    tracemalloc.start()
    with pytest.raises(ScanError) as caught:
        read_header(path, max_bytes=6000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "E_TOOBIG"
    assert "6,528 bytes, above the limit of 6,000" in caught.value.problem
    assert peak < 2**20
    read_header(path, max_bytes=6528)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncated_file_is_refused(compressed, tmp_path):
    whole = nifti_bytes(VOXELS[:4, :4, :4])
    whole = packed(whole) if compressed else whole
    path = tmp_path / "scan"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ScanError):
            read_volume(path)


def test_no_flipped_bit_of_a_gzip_file_changes_a_voxel(tmp_path):
    array = VOXELS[:5, :5, :5]
    whole = packed(nifti_bytes(array))
    path = tmp_path / "scan.nii.gz"
    n_refused = 0
    for bit in range(0, len(whole) * 8, 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except ScanError:
            n_refused += 1
        else:  # a bit without effect, such as one of the time stamp
            np.testing.assert_array_equal(volume.array, array)
            np.testing.assert_array_equal(volume.geometry.affine, oblique().astype(np.float32))
    assert n_refused > 0.9 * len(whole) * 8 / 7


# ---- voxels and geometry


def signed_permutations():
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            yield np.eye(3)[:, order] * signs


@pytest.mark.parametrize(
    "rotation", [np.eye(3), oblique((1, 1, 1))[:3, :3]], ids=["straight", "oblique"]
)
def test_all_48_axis_orders_give_the_same_patient(rotation, tmp_path):
    path = tmp_path / "scan.nii.gz"
    spacing = np.array([0.7, 1.1, 2.5])
    codes = set()
    for axes in signed_permutations():
        affine = np.eye(4)
        affine[:3, :3] = rotation @ (np.diag(spacing) @ axes)
        affine[:3, 3] = -30, 12, 700
        path.write_bytes(packed(nifti_bytes(affine=affine)))
        volume = read_volume(path)
        codes.add(volume.geometry.axis_codes)
        assert volume.geometry.voxel_volume_mm3 == pytest.approx(0.7 * 1.1 * 2.5, rel=1e-6)
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-4)
        assert volume.array[2, 3, 4] == VOXELS[2, 3, 4]
    assert len(codes) == 48


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("endianness", "<>")
def test_every_dtype_in_either_byte_order(dtype, endianness, tmp_path):
    array = (VOXELS % 101).astype(dtype)
    header = nibabel.Nifti1Header(endianness=endianness)
    header.set_data_dtype(dtype)
    path = tmp_path / "scan.nii"
    image = nibabel.Nifti1Image(array, None, header)
    image.header.set_sform(oblique(), 1)
    image.header["pixdim"][1:4] = 0.75, 0.75, 2.5
    path.write_bytes(image.to_bytes())
    assert path.read_bytes()[:2] == (b"\x5c\x01" if endianness == "<" else b"\0\0")
    volume = read_volume(path)
    assert volume.array.dtype == np.dtype(dtype)
    assert volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.geometry.affine, oblique(), rtol=1e-6)


def test_scale_is_stored_and_applied_on_demand(tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(poked(112, "2f", 0.5, -1024.0))
    volume = read_volume(path)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, VOXELS)
    np.testing.assert_array_equal(volume.intensities(), VOXELS * 0.5 - 1024)
    assert volume.intensities(np.array([1000]))[0] == -524


@pytest.mark.parametrize(
    "suffixes", [(".hdr", ".img"), (".hdr.gz", ".img.gz"), (".hdr", ".img.gz"), (".HDR", ".IMG")]
)
def test_pairs(suffixes, tmp_path):
    """Either file may be given; the offset into the .img is respected."""
    pair = poked(344, "4s", b"ni1", data=poked(108, "f", 16.0))[:348]
    for suffix, data in zip(suffixes, (pair, bytes(16) + PLAIN[352:]), strict=True):
        (tmp_path / f"a.b{suffix}").write_bytes(packed(data) if suffix.endswith(".gz") else data)
    for suffix in suffixes:
        volume = read_volume(tmp_path / f"a.b{suffix}")
        np.testing.assert_array_equal(volume.array, VOXELS)
        np.testing.assert_array_equal(volume.geometry.affine, oblique().astype(np.float32))
        assert read_header(tmp_path / f"a.b{suffix}").warnings == ()


def test_a_header_that_names_a_pair_is_hashed_with_its_voxels(tmp_path):
    (tmp_path / "a.nii").write_bytes(poked(344, "4s", b"ni1", data=poked(108, "f", 16.0))[:348])
    (tmp_path / "a.img").write_bytes(bytes(16) + PLAIN[352:])
    assert scan_digest(tmp_path / "a.nii") == read_volume(tmp_path / "a.nii").sha256


def test_header_is_read_without_the_voxels(tmp_path):
    path = tmp_path / "scan.nii.gz"
    noise = np.random.default_rng(1).integers(0, 4000, (64, 64, 64)).astype(np.int16)
    whole = packed(nifti_bytes(noise))
    path.write_bytes(whole[: len(whole) // 2])
    header = read_header(path)
    assert header.geometry.shape == (64, 64, 64)
    assert header.geometry.spacing_mm == pytest.approx((0.75, 0.75, 2.5), rel=1e-6)
    assert (header.n_bytes, header.data_offset, header.dtype) == (64**3 * 2, 352, np.dtype("<i2"))
    assert read_header(path).geometry.axis_codes == "LPS"
    with pytest.raises(ScanError):
        read_volume(path)


# ---- masks

LABELS = (np.random.default_rng(2).random(SHAPE) * 4).astype(np.uint8)
NOISE = np.random.default_rng(3).normal(scale=1e-5, size=SHAPE).astype(np.float32)


@pytest.mark.parametrize(
    "stored, dtype",
    [
        (LABELS, np.uint8),
        (LABELS.astype(np.int64), np.uint8),
        (LABELS.astype(np.float64), np.uint8),
        (LABELS + NOISE, np.uint8),
        (LABELS - np.float32(9e-4), np.uint8),  # truncation would lower every label by one
        (LABELS.astype(np.uint16) * 100, np.uint16),
        (LABELS.astype(np.int32) * 100_000, np.uint32),
        (LABELS.astype(np.float32) * 500_000, np.uint32),
        (LABELS * 0, np.uint8),
    ],
)
def test_labels_come_back_whole_in_the_smallest_dtype(stored, dtype, tmp_path):
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(packed(nifti_bytes(stored)))
    mask = read_mask(path)
    assert mask.array.dtype == dtype
    np.testing.assert_array_equal(mask.array, np.rint(stored))
    assert not mask.is_scaled
    np.testing.assert_array_equal(mask.geometry.affine, oblique().astype(np.float32))


def test_scaled_labels(tmp_path):
    path = tmp_path / "mask.nii"
    path.write_bytes(poked(112, "2f", 2.0, 1.0, data=nifti_bytes(LABELS)))
    np.testing.assert_array_equal(read_mask(path).array, LABELS * 2 + 1)
    path.write_bytes(poked(112, "2f", 0.1, 0.0, data=nifti_bytes(LABELS)))
    words = r"holds 0\.\d+(, 0\.\d+)*, which (is not a whole number|are not whole numbers)"
    with pytest.raises(ScanError, match=words):
        read_mask(path)


@pytest.mark.parametrize(
    "stored, code, words",
    [
        (with_voxel(0.37, LABELS.astype(np.float32)), "E_LABELS", "0.37, which is not a whole"),
        (with_voxel(-1, LABELS.astype(np.int16)), "E_LABELS", "the label -1"),
        (with_voxel(-1, LABELS.astype(np.float32)), "E_LABELS", "the label -1"),
        (with_voxel(1e30, LABELS.astype(np.float32)), "E_LABELS", "the label 1"),
        (with_voxel(NAN, LABELS.astype(np.float32)), "E_NAN", "1 voxels are NaN"),
        (VOXELS + 1000, "E_LABELS", "more than 1,000 distinct values"),
        ((VOXELS + 1000).astype(np.int32) * 100_000, "E_LABELS", "more than 1,000 distinct values"),
    ],
)
def test_an_image_is_refused_as_a_mask(stored, code, words, tmp_path):
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti_bytes(stored))
    with pytest.raises(ScanError) as caught:
        read_mask(path)
    assert caught.value.code == code
    assert words in caught.value.problem


def test_max_labels_is_an_exact_bound(tmp_path):
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti_bytes(LABELS))
    assert len(np.unique(read_mask(path, max_labels=4).array)) == 4
    with pytest.raises(ScanError, match="more than 3 distinct"):
        read_mask(path, max_labels=3)


# ---- writing


def sources():
    """Yield scans whose affine is in different fields of the header."""
    left_handed = np.diag([0.8, 0.8, 3.0, 1.0])
    permuted = oblique()[:, [2, 0, 1, 3]]
    yield "nifti1", nifti_bytes()
    yield "nifti2", nifti_bytes(version=2)
    yield "left_handed", nifti_bytes(affine=left_handed)
    yield "permuted", nifti_bytes(affine=permuted)
    yield "qform_only", only_qform(nifti_bytes(affine=oblique(angle=0.7)))
    yield "qform_only_qfac_zero", only_qform(poked(76, "f", 0.0))
    yield "q_s_disagree", poked(268, "f", -100.0)
    yield "pixdim_negative", poked(80, "f", -0.75)
    yield "near_orthonormal", with_srow(sheared(1e-4), UNIT)
    yield "units_unknown", poked(123, "B", 0)
    yield "singleton", nifti_bytes(VOXELS[..., None])
    image = nibabel.Nifti1Image(VOXELS, None, nibabel.Nifti1Header(endianness=">"))
    image.set_sform(oblique(), 1)
    image.header["pixdim"][1:4] = 0.75, 0.75, 2.5
    yield "big_endian", image.to_bytes()
    nifti2_oblique = nibabel.Nifti2Image(VOXELS, oblique(angle=1 / 3))
    assert not np.array_equal(nifti2_oblique.affine, nifti2_oblique.affine.astype(np.float32))
    yield "nifti2_float64", nifti2_oblique.to_bytes()


@pytest.mark.parametrize(
    "data", [data for _, data in sources()], ids=[name for name, _ in sources()]
)
@pytest.mark.parametrize("target", ["mask.nii", "mask.nii.gz"])
def test_mask_has_the_grid_of_the_scan_bit_for_bit(data, target, tmp_path):
    scan = tmp_path / "scan.nii"
    scan.write_bytes(data)
    geometry = read_header(scan).geometry
    mask = Volume(np.asfortranarray(LABELS), geometry)
    write_volume(mask, tmp_path / target, like=scan)

    written = read_mask(tmp_path / target)
    np.testing.assert_array_equal(written.array, LABELS)
    np.testing.assert_array_equal(written.geometry.affine, geometry.affine)  # exactly
    image, original = nibabel.load(tmp_path / target), nibabel.load(scan)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), LABELS)
    np.testing.assert_array_equal(image.affine, original.affine)
    assert type(image) is type(original)
    fields = "pixdim qform_code sform_code quatern_b quatern_c quatern_d qoffset_x srow_y"
    for field in fields.split():
        np.testing.assert_array_equal(image.header[field], original.header[field])


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">i2"]
)
@pytest.mark.parametrize("order", "CF")
def test_every_dtype_and_memory_order_is_written(dtype, order, tmp_path):
    array = np.array(VOXELS % 120, dtype=dtype, order=order)
    write_volume(Volume(array, Geometry(SHAPE, oblique())), tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), array)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, array)


def test_a_new_grid_is_stored_in_sform_and_qform_as_float32(tmp_path):
    geometry = Geometry(SHAPE, oblique((0.7, 0.7, 1.9), angle=1.1))
    write_volume(Volume(LABELS, geometry), tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    header = image.header
    affine = read_header(tmp_path / "a.nii.gz").geometry.affine
    np.testing.assert_array_equal(affine, geometry.affine.astype(np.float32))
    np.testing.assert_allclose(header.get_qform(), geometry.affine, atol=1e-5)
    codes = [int(header[name]) for name in ("sform_code", "qform_code", "xyzt_units")]
    assert codes == [1, 1, 2]
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    contents = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    assert struct.unpack("<2f", contents[112:120]) == (1, 0)  # never NaN
    texts = {header[name].item() for name in ("descrip", "aux_file", "db_name", "intent_name")}
    assert texts == {b""}


def test_scale_is_written(tmp_path):
    write_volume(Volume(VOXELS, Geometry(SHAPE, oblique()), 0.5, -1024.0), tmp_path / "a.nii")
    np.testing.assert_array_equal(nibabel.load(tmp_path / "a.nii").get_fdata(), VOXELS * 0.5 - 1024)


def test_long_axes_need_nifti2(tmp_path):
    array = np.zeros((40_000, 2, 2), np.uint8)
    geometry = Geometry(array.shape, np.diag([0.1, 1, 1, 1]))
    write_volume(Volume(array, geometry), tmp_path / "a.nii.gz")
    assert read_mask(tmp_path / "a.nii.gz").array.shape == (40_000, 2, 2)


def test_equal_volumes_give_equal_bytes(tmp_path):
    volume = Volume(LABELS, Geometry(SHAPE, oblique()))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(volume, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz"))
    assert first == second
    assert first[3] == 0  # no file name
    assert first[4:8] == bytes(4)  # no time
    # Readable as the umask allows, not private like mkstemp.
    assert (tmp_path / "a.nii.gz").stat().st_mode & 0o444


def test_writer_refuses_volumes_that_it_cannot_store(tmp_path):
    (tmp_path / "scan.nii").write_bytes(PLAIN)
    geometry = read_header(tmp_path / "scan.nii").geometry
    shifted = geometry.affine + np.array([[0, 0, 0, 1e-5]] * 3 + [[0] * 4])
    valid = Volume(LABELS, geometry)
    for volume, name, like in (
        (valid, "a.mhd", None),
        (valid, "a.hdr", None),
        (valid.with_array(LABELS.astype(np.complex64)), "a.nii", None),
        (valid.with_array(LABELS.astype(np.float16)), "a.nii", None),
        (Volume(LABELS, geometry, slope=0.1), "a.nii", None),
        (Volume(LABELS, Geometry(SHAPE, shifted)), "a.nii", tmp_path / "scan.nii"),
    ):
        with pytest.raises(ValueError):
            write_volume(volume, tmp_path / name, like)
    with pytest.raises(ScanError, match="three axes"):
        line = Volume(LABELS[:, :1, :1], Geometry((16, 1, 1), oblique()))
        write_volume(line, tmp_path / "a.nii")
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


def test_a_bad_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.nii.gz"
    volume = Volume(LABELS, Geometry(SHAPE, oblique()))
    write_volume(volume, target)
    before = target.read_bytes()

    def flip(file):
        file.seek(-20, os.SEEK_END)
        file.write(b"?")

    def cut(file):
        file.truncate(file.tell() - 4)

    def append(file):
        file.write(gzip.compress(b"x"))

    for damage in (flip, cut, append):

        def on_bad_disk(path, write, verify, damage=damage):
            files.atomic_write(path, lambda file: (write(file), damage(file))[0], verify)

        monkeypatch.setattr(voxels, "atomic_write", on_bad_disk)
        with pytest.raises(EnvironmentProblem, match="read back differ") as caught:
            write_volume(volume, target)
        assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
        assert target.read_bytes() == before
        assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE simulates the full disk, in a separate process."""
    code = f"""
import resource, numpy as np
from pathlib import Path
from volseg.errors import EnvironmentProblem
from volseg.io.volumes import write_volume
from volseg.volume import Geometry, Volume
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 255, (40, 40, 40)).astype(np.uint8)
volume = Volume(noise, Geometry(noise.shape, np.diag([1, 1, 2, 1.0])))
for name in ("a.nii", "a.nii.gz"):
    try:
        write_volume(volume, Path({str(tmp_path)!r}) / name)
    except EnvironmentProblem as problem:
        assert problem.code == "E_DISK", problem.code
    else:
        raise SystemExit("nothing was raised")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_import_is_light_and_silent():
    heavy = {"torch", "monai", "pandas", "SimpleITK"}
    code = f"import sys, volseg.io.volumes; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_stem_of():
    names = ["a.nii", "a.nii.gz", "a.b.NII.GZ", "a.hdr", "a.img.gz", "a.txt", "nii.gz"]
    stems = ["a", "a", "a.b", "a", "a", "a.txt", "nii.gz"]
    assert [stem_of(Path("x") / name) for name in names] == stems


# ---- fuzzing: only ScanError may be raised, and an accepted file equals what nibabel reads

FINITE_OR_NOT = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, 0.75, 2.5, NAN, INF, 1e-30, 1e30, 3.4e38])
)
SHORTS = st.one_of(st.integers(-32768, 32767), st.integers(-2, 20))
CODES = st.sampled_from([0, 1, 2, 4, 8, 16, 64, 256, 512, -1])
MUTATIONS = st.one_of(
    # dim
    st.tuples(st.sampled_from(range(40, 56, 2)), st.just("h"), SHORTS),
    # datatype, bitpix, qform_code, sform_code
    st.tuples(st.sampled_from([70, 72, 252, 254]), st.just("h"), CODES),
    # pixdim, vox_offset, scale
    st.tuples(st.sampled_from(range(76, 124, 4)), st.just("f"), FINITE_OR_NOT),
    # quaternion, offsets, srow
    st.tuples(st.sampled_from(range(256, 328, 4)), st.just("f"), FINITE_OR_NOT),
    # any byte
    st.tuples(st.integers(0, 400), st.just("B"), st.integers(0, 255)),
)
BASES = {
    "plain": PLAIN,
    "unit": UNIT,
    "qform": only_qform(PLAIN),
    "float": nifti_bytes(FLOATS),
    "nifti2": nifti_bytes(version=2),
}


@pytest.fixture(scope="module")
def fuzzed_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "scan.nii"


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(sorted(BASES)),
    st.lists(MUTATIONS, min_size=1, max_size=3),
    st.integers(0, 8000),
    st.booleans(),
)
def test_mutated_headers(fuzzed_file, base, mutations, cut, compressed):
    data = BASES[base]
    for offset, layout, value in mutations:
        data = poked(offset, layout, value, data=data)
    data = data[: len(data) - cut] if cut < 100 else data
    fuzzed_file.write_bytes(packed(data) if compressed else data)
    for read in (read_volume, read_mask):
        try:
            volume = read(fuzzed_file)
        except ScanError as error:
            assert error.code.startswith("E_")
            continue
        if read is read_volume:
            agree_with_nibabel(volume, data)


def agree_with_nibabel(volume: Volume, data: bytes) -> None:
    """Compare voxels, affine and scale with nibabel, which refuses some files that volseg reads."""
    refusals = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        image = (nibabel.Nifti2Image if data[0] == 0x1C else nibabel.Nifti1Image).from_bytes(data)
        stored = np.asanyarray(image.dataobj.get_unscaled())
    except (*refusals, ValueError, OSError):
        return
    if image.dataobj.offset != 0:  # with 0, nibabel reads the header as voxels
        np.testing.assert_array_equal(volume.array, stored.reshape(volume.array.shape))
    assert (volume.slope, volume.intercept) == (image.dataobj.slope, image.dataobj.inter)
    np.testing.assert_array_equal(volume.geometry.affine, affine_of(image))


def affine_of(image):
    """Return the affine; nibabel takes a sform of zeros as it is."""
    return image.affine if image.affine[:3, :3].any() else image.header.get_qform()


# ---- real files


@pytest.fixture
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    return DATA


ZOO = {
    "dcmqa__ax_asc_35sl_6.nii": "E_NDIM",
    "derived_corrupt/not_gzip_but_named_gz.nii.gz": "W_EXT",
    "derived_corrupt/truncated_data.nii": "E_TRUNCATED",
    "derived_corrupt/zero_bytes.nii.gz": "E_EMPTY",
    "nibabel__analyze.hdr": "E_NOTNIFTI",
    "nibabel__anatomical.nii": None,
    "nibabel__example_nifti2.nii.gz": "E_NDIM",
    "nibabel__nifti1.hdr": "E_MISSING",
    "nibabel__nifti2.hdr": "E_MISSING",
    "nibabel__reoriented_anat_moved.nii": None,
    "nibabel__row_major.dconn.nii": "E_NDIM",
    "nibabel__someones_anatomy.nii.gz": None,
    "nibabel__standard.nii.gz": None,
    "niivue_d__FLAIR.nii.gz": None,
    "niivue_d__minimal.nii.gz": "E_NOGEOM",
    "niivue_t__complex_image.nii.gz": "E_DTYPE",
    "niivue_t__ct_perfusion.nii.gz": "E_DTYPE",
    "niivue_t__pval.LH.nii.gz": "E_NDIM",
    "niivue_t__ras.hdr": None,
    "niivue_t__ras.img": None,
    "niivueimages__CT_AVM.nii.gz": None,
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name, data_folder):
    path, code = data_folder / "nifti_zoo" / name, ZOO[name]
    if code is not None and code.startswith("E_"):
        with pytest.raises(ScanError) as caught:
            read_volume(path)
        assert caught.value.code == code
        return
    volume = read_volume(path)
    codes = [warning.code for warning in read_header(path).warnings]
    assert codes == ([] if code is None else [code])
    if code is None:
        image = nibabel.load(path)
        np.testing.assert_array_equal(volume.geometry.affine, image.affine)
        np.testing.assert_allclose(volume.intensities(), image.get_fdata(), rtol=1e-6)


def test_the_48_orientations_of_one_head_have_equal_measurements(data_folder):
    paths = sorted((data_folder / "nifti_zoo/orientations48").glob("*.nii.gz"))
    assert len(paths) == 48
    centres = []
    for path in paths:
        volume = read_volume(path)
        assert volume.geometry.axis_codes == stem_of(path)[-3:]
        bright = np.argwhere(volume.array > 130)
        centre_mm = volume.geometry.to_world_mm(bright.mean(axis=0, keepdims=True))[0]
        centres.append((*centre_mm, len(bright), volume.geometry.voxel_volume_mm3))
    np.testing.assert_allclose(centres, np.broadcast_to(centres[0], (48, 5)), rtol=1e-4, atol=0.02)


@pytest.mark.parametrize(
    "dataset",
    ["lidc_nodules", "sts_sarcoma", "msd_hippocampus", "totalseg_example_ct", "ibsi_phantoms"],
)
def test_real_scans_and_masks_match_their_table(dataset, data_folder, tmp_path):
    with open(data_folder / dataset / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows[:: max(1, len(rows) // 12)]:
        scan = data_folder / dataset / row["image"]
        volume = read_volume(scan)
        assert "x".join(map(str, volume.geometry.shape)) == row["shape"]
        assert volume.array.dtype == row["dtype"]
        assert volume.geometry.axis_codes == row["orientation"]
        spacing_mm = [float(s) for s in row["spacing"].split("x")]
        assert volume.geometry.spacing_mm == pytest.approx(spacing_mm, rel=1e-3)
        if not row["label"]:
            continue
        mask = read_mask(data_folder / dataset / row["label"])
        assert mask.geometry.matches(volume.geometry)
        counts = zip(*np.unique(mask.array, return_counts=True), strict=True)
        text = ";".join(f"{value}:{n}" for value, n in counts)
        assert text == row["label_values"].split(" ")[0]
        write_volume(volume.with_array(mask.array), tmp_path / "mask.nii.gz", like=scan)
        affine = read_header(tmp_path / "mask.nii.gz").geometry.affine
        np.testing.assert_array_equal(affine, nibabel.load(scan).affine)
