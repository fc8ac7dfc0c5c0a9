"""The NRRD reader on odd, damaged and hostile files, compared with pynrrd and SimpleITK."""

from __future__ import annotations

import gzip
import os
import re

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from laws import GRIDS
from odd_files import read_or_refused
from text_headers import AFFINE, RAW, SHAPE, VOXELS
from text_headers import nrrd_header as header

from volseg.errors import ScanError
from volseg.io.volumes import read_header, read_mask, read_volume, scan_digest, write_volume
from volseg.volume import LPS_TO_RAS, Geometry, Volume


def made(*, voxels=RAW, **options) -> bytes:
    return header(**options).encode() + voxels


def packed(data: bytes = RAW) -> bytes:
    return gzip.compress(data, 1, mtime=0)


FLOATS = np.where(np.arange(VOXELS.size).reshape(SHAPE) == 99, np.nan, VOXELS).astype("<f4")
FOUR = {"dimension": "4", "kinds": "domain domain domain list", "sizes": "16 17 12 2"}
DIRECTIONS = re.search("space directions: (.*)", header())[1]
FIRST, _, OTHERS = DIRECTIONS.partition(" ")
LONG = "x" * 100_000
# name: (contents, expected code or None)
FILES = {
    "raw": (made(), None),
    "gzip": (made(voxels=packed(), encoding="gzip"), None),
    "gz": (made(voxels=packed(), encoding="gz"), None),
    "big_endian": (made(voxels=VOXELS.astype(">i2").tobytes(order="F"), endian="big"), None),
    "carriage_returns": (header().replace("\n", "\r\n").encode() + RAW, None),
    "no_kinds": (made(removed=["kinds"]), None),
    "ras": (made(affine=LPS_TO_RAS @ AFFINE, space="right-anterior-superior"), None),
    "short": (made(type="signed short int"), None),
    "byte_skip": (made(voxels=b"junk" + RAW, byte_skip="4"), None),
    "byte_skip_from_end": (made(voxels=b"junk" + RAW, byte_skip="-1"), None),
    "millimetres": (made(space_units='"mm" "mm" "mm"'), None),
    "an_axis_of_one": (
        made(**FOUR | {"sizes": "16 17 12 1"}, space_directions=f"{DIRECTIONS} none"), None
    ),
    "keys": (header()[:-1].encode() + b"Name:=M\xc3\xbcller: 7\n\n" + RAW, None),
    "starts_like_gzip": (made(voxels=b"\x1f\x8b" + RAW[2:]), None),
    "quantised": (made(old_min="-1000", old_max="3000"), "W_SCALE"),
    "slice": (made(sizes="16 17 1", voxels=RAW[: 16 * 17 * 2]), "W_SLICE"),
    "far": (made(space_origin="(0,0,20000)"), "W_ORIGIN"),
    "empty": (b"", "E_EMPTY"),
    "text": (b"hello", "E_NOTNRRD"),
    "version_six": (b"NRRD0006" + made()[8:], "E_NOTNRRD"),
    "whole_file_gzip": (packed(made()), "E_NOTNRRD"),
    "no_end": (header().rstrip().encode(), "E_HEADER"),
    "no_field": (made().replace(b"# a comment", b"a comment"), "E_HEADER"),
    "twice": (made().replace(b"# a comment", b"Sizes: 1 2 3"), "E_HEADER"),
    "binary": (made().replace(b"# a comment", b"a: \x01"), "E_HEADER"),
    "long_line": (made(content=LONG * 20), "E_HEADER"),
    "many_fields": (made(**{f"f{n}": "1" for n in range(200_000)}), "E_HEADER"),
    "thousands_of_fields": (made(**{f"f{n}": "1" for n in range(9_000)}), None),
    "no_space": (made(removed=["space"]), "E_NOGEOM"),
    "space_dimension": (made(removed=["space"], space_dimension="3"), "E_NOGEOM"),
    "scanner": (made(space="scanner-xyz"), "E_NOGEOM"),
    "no_directions": (made(removed=["space directions"], spacings="1 1 1"), "E_NOGEOM"),
    "no_origin": (made(removed=["space origin"]), "E_NOGEOM"),
    "metres": (made(space_units='"m" "m" "m"'), "E_UNITS"),
    "two_directions": (made(space_directions="(1,0,0) (0,1,0) none"), "E_NDIM"),
    "directions_missing": (made(space_directions="(1,0,0) (0,1,0)"), "E_HEADER"),
    "directions_with_junk": (made(space_directions=f"{DIRECTIONS} 5"), "E_HEADER"),
    "directions_in_a_plane": (made(space_directions="(1,0) (0,1) (1,1)"), "E_HEADER"),
    "nan_direction": (made(space_directions="(nan,0,0) (0,1,0) (0,0,1)"), "E_HEADER"),
    "huge_direction": (made(space_directions="(1e999,0,0) (0,1,0) (0,0,1)"), "E_GEOM"),
    "zero_direction": (made(space_directions="(0,0,0) (0,1,0) (0,0,1)"), "E_GEOM"),
    "parallel": (made(space_directions="(1,0,0) (1,0,0) (0,0,1)"), "E_GEOM"),
    "sheared": (made(space_directions="(0.75,0,0) (0.1,0.8,0) (0,0,2.5)"), "E_SHEAR"),
    "tiny": (made(space_directions="(1e-4,0,0) (0,1e-4,0) (0,0,1e-4)"), "E_SPACING"),
    "origin": (made(space_origin="0 0 0"), "E_HEADER"),
    "dimension": (made(dimension="4"), "E_DIM"),
    "dimension_zero": (made(dimension="0", sizes="1"), "E_DIM"),
    "negative_size": (made(sizes="-16 17 12"), "E_DIM"),
    "decimal_size": (made(sizes="16.0 17 12"), "E_HEADER"),
    "long_size": (made(sizes=f"{'9' * 5000} 17 12"), "E_HEADER"),
    "series": (made(**FOUR, space_directions=f"{DIRECTIONS} none", voxels=RAW * 2), "E_NDIM"),
    "layers": (
        made(dimension="4", sizes="2 16 17 12", space_directions=f"none {DIRECTIONS}",
             kinds="list domain domain domain", voxels=RAW * 2), "E_NDIM"
    ),
    "colours": (
        made(dimension="4", sizes="16 3 17 12", space_directions=f"{FIRST} none {OTHERS}",
             kinds="domain RGB-color domain domain", voxels=RAW * 3), "E_NDIM"
    ),
    "block": (made(type="block", block_size="2"), "E_DTYPE"),
    "no_type": (made(removed=["type"]), "E_HEADER"),
    "no_endian": (made(removed=["endian"]), "E_HEADER"),
    "bzip2": (made(encoding="bzip2"), "E_ENCODING"),
    "ascii": (made(encoding="ascii"), "E_ENCODING"),
    "byte_skip_in_gzip": (
        made(voxels=packed(b"ab" + RAW), encoding="gzip", byteskip="2"), "E_HEADER"
    ),
    "line_skip": (made(line_skip="1"), "E_HEADER"),
    "byte_skip_minus_two": (made(byte_skip="-2"), "E_HEADER"),
    "byte_skip_past_the_end": (made(byte_skip="999999"), "E_HEADER"),
    "truncated": (made()[:-1], "E_TRUNCATED"),
    "truncated_gzip": (made(voxels=packed()[:-9], encoding="gzip"), "E_TRUNCATED"),
    "short_in_gzip": (made(voxels=packed(RAW[:-1]), encoding="gzip"), "E_TRUNCATED"),
    "too_long": (made() + b"\n", "E_BOMB"),
    "too_long_in_gzip": (made(voxels=packed(RAW + b"\n"), encoding="gzip"), "E_BOMB"),
    "bomb": (made(voxels=packed(RAW + bytes(2**24)), encoding="gzip"), "E_BOMB"),
    "not_gzip": (made(encoding="gzip"), "E_CRC"),
    "checksum": (made(voxels=packed()[:-8] + b"1234" + packed()[-4:], encoding="gzip"), "E_CRC"),
    "after_gzip": (made(voxels=packed() + b"junk", encoding="gzip"), "E_GZIP"),
    "huge": (made(sizes="30000 30000 30000"), "E_TOOBIG"),
    "more_than_gzip_can_hold": (
        made(voxels=packed(), encoding="gzip", sizes="3000 300 300"), "E_TOOBIG"
    ),
    "constant": (made(voxels=bytes(len(RAW))), "E_CONST"),
    "nan_voxel": (made(type="float", voxels=FLOATS.tobytes(order="F")), "E_NAN"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_odd_file_is_read_correctly_or_refused_with_its_code(name, tmp_path):
    data, code = FILES[name]
    path = tmp_path / "scan.nrrd"
    path.write_bytes(data)
    volume = read_or_refused(path, code)
    if volume is None:
        return
    array, fields = nrrd.read(str(path))
    np.testing.assert_array_equal(volume.array, array.reshape(volume.array.shape, order="F"))
    columns = [row for row in fields["space directions"] if np.isfinite(row).all()]
    flips = np.diag(LPS_TO_RAS)[:3] if fields["space"].startswith("left") else np.ones(3)
    expected = (np.array([*columns, fields["space origin"]]) * flips).T
    np.testing.assert_allclose(volume.geometry.affine[:3], expected, rtol=1e-6, atol=1e-6)
    assert volume.sha256 == scan_digest(path)


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nhdr"])
def test_the_file_that_a_header_names_must_lie_in_its_folder(name, tmp_path):
    folder = tmp_path / "case"
    (folder / "below").mkdir(parents=True)
    for place in ("voxels.raw", "case/voxels.raw", "case/below/voxels.raw"):
        (tmp_path / place).write_bytes(RAW)
    os.symlink(tmp_path / "voxels.raw", folder / "link.raw")
    os.symlink(folder / "voxels.raw", folder / "inside.raw")
    os.symlink("loop.raw", folder / "loop.raw")
    os.mkfifo(folder / "pipe.raw")
    names = {
        "voxels.raw": None,
        "./voxels.raw": None,
        "below/voxels.raw": None,
        "inside.raw": None,
        "../voxels.raw": "E_OUTSIDE",
        "below/../../voxels.raw": "E_OUTSIDE",
        "../case/voxels.raw": "E_OUTSIDE",
        "../../../../../../../../etc/hostname": "E_OUTSIDE",
        str(tmp_path / "voxels.raw"): "E_OUTSIDE",
        str(folder / "voxels.raw"): "E_OUTSIDE",
        "link.raw": "E_OUTSIDE",
        "C:\\voxels.raw": "E_OUTSIDE",
        "..\\voxels.raw": "E_OUTSIDE",
        "": "E_OUTSIDE",
        "x" * 5000: "E_MISSING",
        "loop.raw": "E_OUTSIDE",
        "pipe.raw": "E_NOTFILE",
        ".": "E_NOTFILE",
        "other.raw": "E_MISSING",
        "LIST": "E_MANYFILES",
        "LIST 2": "E_MANYFILES",
        "slice%03d.raw 1 100 1": "E_MANYFILES",
    }
    codes = {}
    for data_file in names:
        path = folder / name
        path.write_text(header(data_file=data_file) + f"{data_file}\n")
        try:
            volume = read_volume(path)
        except ScanError as error:
            codes[data_file] = error.code
            assert error.fix and "\n" not in str(error)
        else:
            codes[data_file] = None
            np.testing.assert_array_equal(volume.array, VOXELS)
            assert volume.sha256 == scan_digest(path)
    assert codes == names


@pytest.mark.parametrize("order, field", [("<", "little"), (">", "big")])
def test_every_dtype_as_pynrrd_writes_it(order, field, tmp_path):
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"):
        for encoding in ("raw", "gzip"):
            for name in ("scan.nrrd", "scan.nhdr"):
                array = (VOXELS % 101).astype(order + dtype)
                path = tmp_path / name
                fields = {"space": "LPS", "space directions": np.diag([0.5, 1, 2.0])}
                fields |= {"space origin": [1.0, 2, 3], "endian": field, "encoding": encoding}
                nrrd.write(str(path), array, fields, detached_header=name.endswith(".nhdr"))
                volume = read_volume(path)
                assert volume.array.dtype == np.dtype(dtype)
                np.testing.assert_array_equal(volume.array, array)
                np.testing.assert_array_equal(
                    volume.geometry.affine,
                    [[-0.5, 0, 0, -1], [0, -1, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]],
                )
                np.testing.assert_array_equal(read_mask(path).array, array)


@pytest.mark.parametrize("grid", sorted(GRIDS.keys() - {"sheared"}))
def test_pynrrd_and_simpleitk_read_what_is_written(grid, tmp_path):
    affine, path = GRIDS[grid]((0.7, 1.1, 2.5)), tmp_path / "scan.nrrd"
    write_volume(Volume(VOXELS, Geometry(SHAPE, affine)), path)
    array, fields = nrrd.read(str(path))
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(array, VOXELS)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, VOXELS)
    lps = LPS_TO_RAS @ affine
    np.testing.assert_array_equal(fields["space directions"].T, lps[:3, :3])  # exactly
    np.testing.assert_array_equal(fields["space origin"], lps[:3, 3])
    for index in ((0, 0, 0), (15, 16, 11), (15, 0, 11)):
        expected = lps[:3] @ (*index, 1)
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), expected, atol=1e-9)
    first = path.read_bytes()
    write_volume(Volume(VOXELS, Geometry(SHAPE, affine)), path)
    assert path.read_bytes() == first


def test_a_volume_of_a_series(tmp_path):
    path = tmp_path / "scan.nrrd"
    directions = f"{DIRECTIONS} none"
    for encoding, pack in (("raw", bytes), ("gzip", packed)):
        data = pack(RAW + VOXELS[::-1].tobytes(order="F"))
        path.write_bytes(made(**FOUR, space_directions=directions, encoding=encoding, voxels=data))
        np.testing.assert_array_equal(read_volume(f"{path}#1").array, VOXELS)
        np.testing.assert_array_equal(read_volume(f"{path}#2").array, VOXELS[::-1])
        with pytest.raises(ScanError, match="there is no volume 3"):
            read_volume(f"{path}#3")


def test_what_nrrd_cannot_store_is_refused(tmp_path):
    geometry = Geometry(SHAPE, AFFINE)
    for volume in (Volume(VOXELS, geometry, slope=2.0), Volume(VOXELS * 1j, geometry)):
        with pytest.raises(ValueError, match="NRRD"):
            write_volume(volume, tmp_path / "scan.nrrd")
    for affine in (GRIDS["sheared"]((1, 1, 1)), np.diag([1e-3, 1, 1, 1])):
        with pytest.raises(ScanError):
            write_volume(Volume(VOXELS, Geometry(SHAPE, affine)), tmp_path / "scan.nrrd")
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_a_name_of_nifti_says_what_it_is(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(made())
    with pytest.raises(ScanError, match="is NRRD, not NIfTI") as caught:
        read_volume(tmp_path / "scan.nii.gz")
    assert ".nrrd" in caught.value.fix


def test_a_header_is_checked_before_memory_is_allocated(tmp_path):
    path = tmp_path / "scan.nrrd"
    path.write_bytes(made(sizes="2000 2000 2000", encoding="gzip", voxels=packed(bytes(2**24))))
    with pytest.raises(ScanError) as caught:
        read_header(path)
    assert caught.value.code == "E_TOOBIG"
