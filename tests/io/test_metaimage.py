"""The MetaImage reader on odd, damaged and hostile files, compared with SimpleITK."""

from __future__ import annotations

import gzip
import os
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from laws import GRIDS
from odd_files import read_or_refused
from text_headers import AFFINE, RAW, SHAPE, VOXELS
from text_headers import metaimage_header as header

from volseg.errors import ScanError
from volseg.io.volumes import read_header, read_mask, read_volume, scan_digest, write_volume
from volseg.volume import LPS_TO_RAS, Geometry, Volume

ZLIB = zlib.compress(RAW, 1)


def made(*, voxels=RAW, **options) -> bytes:
    return header(**options).encode() + voxels


def packed(voxels=ZLIB, **options) -> bytes:
    return made(voxels=voxels, CompressedData="True", **options)


FOUR = {
    "NDims": "4",
    "DimSize": "16 17 12 2",
    "ElementSpacing": "1 1 2 1",
    "TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
    "Offset": "1 2 3 0",
}
FLOATS = np.where(np.arange(VOXELS.size).reshape(SHAPE) == 99, np.nan, VOXELS).astype("<f4")
MATRIX = header().split("TransformMatrix = ")[1].split("\n")[0]
# name: (contents, expected code or None)
FILES = {
    "raw": (made(), None),
    "zlib": (packed(), None),
    "zlib_with_size": (packed(CompressedDataSize=str(len(ZLIB))), None),
    "gzip": (packed(voxels=gzip.compress(RAW, 1)), None),
    "big_endian": (
        made(voxels=VOXELS.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True"), None
    ),
    "other_order_name": (
        made(removed=["BinaryDataByteOrderMSB"], ElementByteOrderMSB="False"), None
    ),
    "rotation": (made(removed=["TransformMatrix"], Rotation=MATRIX), None),
    "orientation": (made(removed=["TransformMatrix"], Orientation=MATRIX), None),
    "position": (made(removed=["Offset"], Position="1 2 3"), None),
    "origin": (made(removed=["Offset"], Origin="1 2 3"), None),
    "carriage_returns": (header().replace("\n", "\r\n").encode() + RAW, None),
    "one_channel": (made(ElementNumberOfChannels="1"), None),
    "slope_one": (made(ElementToIntensityFunctionSlope="1.0"), None),
    "starts_like_gzip": (made(voxels=b"\x1f\x8b" + RAW[2:]), None),
    "comment": (made(Comment="Müller = 7"), None),
    "slice": (made(DimSize="16 17 1", voxels=RAW[: 16 * 17 * 2]), "W_SLICE"),
    "far": (made(Offset="0 0 20000"), "W_ORIGIN"),
    "empty": (b"", "E_EMPTY"),
    "text": (b"hello", "E_NOTMETA"),
    "binary": (b"\0" + made(), "E_NOTMETA"),
    "whole_file_gzip": (gzip.compress(made()), "E_NOTMETA"),
    "no_data_file": (made(removed=["ElementDataFile"]), "E_NOTMETA"),
    "data_file_beyond_a_mib": (made(Comment="x" * 2**21), "E_NOTMETA"),
    "thousands_of_fields": (made(**{f"f{n}": "1" for n in range(9_000)}), None),
    "tube": (made(ObjectType="Tube"), "E_NOTMETA"),
    "no_field": (made().replace(b"NDims = 3", b"NDims 3"), "E_HEADER"),
    "control": (made(Comment="\x07"), "E_HEADER"),
    "two_matrices": (made(Rotation="1 0 0 0 1 0 0 0 1"), "E_HEADER"),
    "two_offsets": (made(Position="1 2 3"), "E_HEADER"),
    "no_spacing": (made(removed=["ElementSpacing"]), "E_NOGEOM"),
    "element_size_alone": (made(removed=["ElementSpacing"], ElementSize="1 1 1"), "E_NOGEOM"),
    "no_matrix": (made(removed=["TransformMatrix"]), "E_NOGEOM"),
    "no_offset": (made(removed=["Offset"]), "E_NOGEOM"),
    "short_matrix": (made(TransformMatrix="1 0 0 0 1 0"), "E_HEADER"),
    "nan_matrix": (made(TransformMatrix="nan 0 0 0 1 0 0 0 1"), "E_HEADER"),
    "scaled_matrix": (made(TransformMatrix="2 0 0 0 1 0 0 0 1"), "E_GEOM"),
    "parallel": (made(TransformMatrix="1 0 0 1 0 0 0 0 1"), "E_GEOM"),
    "sheared": (made(TransformMatrix="1 0 0 0.6 0.8 0 0 0 1"), "E_SHEAR"),
    "zero_spacing": (made(ElementSpacing="0 1 1"), "E_GEOM"),
    "negative_spacing": (made(ElementSpacing="-1 1 1"), "E_GEOM"),
    "huge_spacing": (made(ElementSpacing="1e999 1 1"), "E_GEOM"),
    "tiny_spacing": (made(ElementSpacing="1e-4 1e-4 1e-4"), "E_SPACING"),
    "metres": (made(DistanceUnits="m"), "E_UNITS"),
    "two_axes": (made(NDims="2", DimSize="16 17"), "E_NDIM"),
    "dimensions": (made(NDims="4"), "E_DIM"),
    "negative_size": (made(DimSize="-16 17 12"), "E_DIM"),
    "decimal_size": (made(DimSize="16.0 17 12"), "E_HEADER"),
    "long_size": (made(DimSize=f"{'9' * 5000} 17 12"), "E_HEADER"),
    "series": (made(**FOUR, voxels=RAW * 2), "E_NDIM"),
    "channels": (made(ElementNumberOfChannels="3", voxels=RAW * 3), "E_NDIM"),
    "channels_nonsense": (made(ElementNumberOfChannels="one"), "E_NDIM"),
    "no_type": (made(removed=["ElementType"]), "E_HEADER"),
    "text_type": (made(ElementType="MET_STRING"), "E_DTYPE"),
    "array_type": (made(ElementType="MET_SHORT_ARRAY"), "E_DTYPE"),
    "no_byte_order": (made(removed=["BinaryDataByteOrderMSB"]), "E_HEADER"),
    "byte_order_nonsense": (made(BinaryDataByteOrderMSB="maybe"), "E_HEADER"),
    "slope": (made(ElementToIntensityFunctionSlope="2"), "E_SCALE"),
    "ascii": (made(BinaryData="False"), "E_ENCODING"),
    "header_size_in_local": (made(HeaderSize="4", voxels=b"junk" + RAW), "E_HEADER"),
    "truncated": (made()[:-1], "E_TRUNCATED"),
    "truncated_zlib": (packed()[:-3], "E_TRUNCATED"),
    "wrong_packed_size": (packed(CompressedDataSize=str(len(ZLIB) + 1)), "E_TRUNCATED"),
    "small_packed_size": (packed(CompressedDataSize="5"), "E_HEADER"),
    "packed_size_nonsense": (packed(CompressedDataSize="many"), "E_HEADER"),
    "short_in_zlib": (packed(voxels=zlib.compress(RAW[:-1])), "E_TRUNCATED"),
    "too_long": (made() + b"\n", "E_BOMB"),
    "too_long_in_zlib": (packed(voxels=zlib.compress(RAW + b"\n")), "E_BOMB"),
    "bomb": (packed(voxels=zlib.compress(RAW + bytes(2**24))), "E_BOMB"),
    "not_zlib": (made(CompressedData="True"), "E_CRC"),
    "checksum": (packed(voxels=ZLIB[:-4] + b"1234"), "E_CRC"),
    "after_zlib": (packed(voxels=ZLIB + b"junk"), "E_GZIP"),
    "huge": (made(DimSize="30000 30000 30000"), "E_TOOBIG"),
    "more_than_zlib_can_hold": (packed(DimSize="3000 300 300"), "E_TOOBIG"),
    "constant": (made(voxels=bytes(len(RAW))), "E_CONST"),
    "nan_voxel": (made(ElementType="MET_FLOAT", voxels=FLOATS.tobytes(order="F")), "E_NAN"),
}  # fmt: skip


def by_simpleitk(path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels (I, J, K) and the affine (4, 4) to RAS mm."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS_TO_RAS @ affine


# SimpleITK needs the number of compressed bytes, and does not know gzip here.
NOT_IN_SIMPLEITK = {"zlib", "gzip"}


@pytest.mark.parametrize("name", FILES)
def test_odd_file_is_read_correctly_or_refused_with_its_code(name, tmp_path):
    data, code = FILES[name]
    path = tmp_path / "scan.mha"
    path.write_bytes(data)
    volume = read_or_refused(path, code)
    if volume is None:
        return
    assert volume.sha256 == scan_digest(path)
    if name in NOT_IN_SIMPLEITK:
        np.testing.assert_array_equal(volume.array, VOXELS)
        np.testing.assert_allclose(volume.geometry.affine, AFFINE, atol=1e-5)
        return
    array, affine = by_simpleitk(path)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-5)


def test_the_file_that_a_header_names_must_lie_in_its_folder(tmp_path):
    folder = tmp_path / "case"
    (folder / "below").mkdir(parents=True)
    for place in ("voxels.raw", "case/voxels.raw", "case/below/voxels.raw"):
        (tmp_path / place).write_bytes(RAW)
    os.symlink(tmp_path / "voxels.raw", folder / "link.raw")
    (folder / "with junk.raw").write_bytes(b"junk" + RAW)
    names = {
        ("voxels.raw", "0"): None,
        ("below/voxels.raw", "0"): None,
        ("with junk.raw", "4"): None,
        ("with junk.raw", "-1"): None,
        ("with junk.raw", "0"): "E_BOMB",
        ("with junk.raw", "5"): "E_TRUNCATED",
        ("with junk.raw", "-2"): "E_HEADER",
        ("with junk.raw", "99999"): "E_HEADER",
        ("../voxels.raw", "0"): "E_OUTSIDE",
        ("../../../../../../../../etc/hostname", "0"): "E_OUTSIDE",
        (str(folder / "voxels.raw"), "0"): "E_OUTSIDE",
        ("link.raw", "0"): "E_OUTSIDE",
        ("other.raw", "0"): "E_MISSING",
        ("LIST", "0"): "E_MANYFILES",
        ("slice%03d.raw 1 100 1", "0"): "E_MANYFILES",
    }
    codes, path = {}, folder / "scan.mhd"
    for data_file, skip in names:
        path.write_text(header(ElementDataFile=data_file, HeaderSize=skip))
        try:
            volume = read_volume(path)
        except ScanError as error:
            codes[data_file, skip] = error.code
            assert error.fix and "\n" not in str(error)
        else:
            codes[data_file, skip] = None
            np.testing.assert_array_equal(volume.array, VOXELS)
            assert volume.sha256 == scan_digest(path)
    assert codes == names


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("grid", sorted(GRIDS.keys() - {"sheared"}))
def test_every_dtype_as_simpleitk_writes_it(name, is_compressed, grid, tmp_path):
    affine = GRIDS[grid]((0.7, 1.1, 2.5))
    lps, path = LPS_TO_RAS @ affine, tmp_path / name
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"):
        array = (VOXELS % 101).astype(dtype)
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        sitk.WriteImage(image, str(path), is_compressed)
        volume = read_volume(path)
        assert volume.array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-5)
        np.testing.assert_array_equal(read_mask(path).array, array)


@pytest.mark.parametrize("grid", sorted(GRIDS.keys() - {"sheared"}))
def test_simpleitk_reads_what_is_written(grid, tmp_path):
    affine, path = GRIDS[grid]((0.7, 1.1, 2.5)), tmp_path / "scan.mha"
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"):
        voxels = (VOXELS % 101).astype(dtype)
        write_volume(Volume(voxels, Geometry(SHAPE, affine)), path)
        array, read = by_simpleitk(path)
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array, voxels)
        np.testing.assert_allclose(read, affine, atol=1e-12)
    first = path.read_bytes()
    write_volume(Volume(voxels, Geometry(SHAPE, affine)), path)
    assert path.read_bytes() == first


def test_a_volume_of_a_series(tmp_path):
    path = tmp_path / "scan.mha"
    both = RAW + VOXELS[::-1].tobytes(order="F")
    for data in (made(**FOUR, voxels=both), packed(**FOUR, voxels=zlib.compress(both))):
        path.write_bytes(data)
        np.testing.assert_array_equal(read_volume(f"{path}#1").array, VOXELS)
        np.testing.assert_array_equal(read_volume(f"{path}#2").array, VOXELS[::-1])
        with pytest.raises(ScanError, match="there is no volume 3"):
            read_volume(f"{path}#3")
    mixed = FOUR | {"TransformMatrix": "1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1"}
    path.write_bytes(made(**mixed, voxels=both))
    with pytest.raises(ScanError, match="mixes space and time"):
        read_volume(f"{path}#1")


def test_what_metaimage_cannot_store_is_refused(tmp_path):
    geometry = Geometry(SHAPE, AFFINE)
    for volume in (Volume(VOXELS, geometry, slope=2.0), Volume(VOXELS * 1j, geometry)):
        with pytest.raises(ValueError, match="MetaImage"):
            write_volume(volume, tmp_path / "scan.mha")
    for affine in (GRIDS["sheared"]((1, 1, 1)), np.diag([1e-3, 1, 1, 1])):
        with pytest.raises(ScanError):
            write_volume(Volume(VOXELS, Geometry(SHAPE, affine)), tmp_path / "scan.mha")
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_a_name_of_nifti_says_what_it_is(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(made())
    with pytest.raises(ScanError, match="is MetaImage, not NIfTI") as caught:
        read_header(tmp_path / "scan.nii.gz")
    assert ".mha" in caught.value.fix
