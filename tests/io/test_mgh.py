"""The MGH reader on odd, damaged and hostile files, compared with nibabel; the writer."""

from __future__ import annotations

import gzip
import struct

import nibabel
import numpy as np
import pytest
from laws import GRIDS, oblique
from odd_files import read_or_refused

from volseg.errors import ScanError
from volseg.io.volumes import read_header, read_mask, read_volume, write_volume
from volseg.volume import Geometry, Volume

SHAPE = (16, 17, 12)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
AFFINE = oblique((0.75, 0.8, 2.5))


def mgh_bytes(array=VOXELS, affine=AFFINE) -> bytes:
    """Return a valid file written by nibabel, independent of the writer under test."""
    return nibabel.MGHImage(array, affine).to_bytes()


def poked(offset: int, layout: str, *values, data: bytes | None = None) -> bytes:
    """Return the file with header bytes overwritten; offsets as in the definition of MGH."""
    data = bytearray(mgh_bytes() if data is None else data)
    struct.pack_into(">" + layout, data, offset, *values)
    return bytes(data)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def flipped(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 0x10
    return bytes(damaged)


PLAIN = mgh_bytes()
GZ = packed(PLAIN)
END = 284 + VOXELS.nbytes
NAN = float("nan")
FLOATS = VOXELS.astype(np.float32)
WITH_NAN = np.where(np.arange(FLOATS.size).reshape(SHAPE) == 99, np.float32(NAN), FLOATS)
# name: (file name, contents, expected code or None)
FILES = {
    "mgz": ("scan.mgz", GZ, None),
    "mgh": ("scan.mgh", PLAIN, None),
    "mgh_gz": ("scan.mgh.gz", GZ, None),
    "upper_case_name": ("SCAN.MGZ", GZ, None),
    "no_footer": ("scan.mgh", PLAIN[:END], None),
    "long_footer": ("scan.mgz", packed(PLAIN + bytes(100_000)), None),
    "intent_label": ("scan.mgz", packed(poked(0, "i", 0x101)), None),
    "plain_named_mgz": ("scan.mgz", PLAIN, "W_EXT"),
    "gz_named_mgh": ("scan.mgh", GZ, "W_EXT"),
    "empty_file": ("scan.mgz", b"", "E_EMPTY"),
    "empty_gz": ("scan.mgz", packed(b""), "E_EMPTY"),
    "text": ("scan.mgz", b"hello", "E_NOTMGH"),
    "nifti": ("scan.mgz", nibabel.Nifti1Image(VOXELS, AFFINE).to_bytes(), "E_NOTMGH"),
    "version_two": ("scan.mgh", poked(0, "i", 2), "E_NOTMGH"),
    "short_header": ("scan.mgh", PLAIN[:200], "E_TRUNCATED"),
    "header_only": ("scan.mgh", PLAIN[:284], "E_TRUNCATED"),
    "truncated": ("scan.mgh", PLAIN[: END - 1], "E_TRUNCATED"),
    "truncated_gz": ("scan.mgz", GZ[: len(GZ) // 2], "E_TRUNCATED"),
    "short_inside_gz": ("scan.mgz", packed(PLAIN[: END - 1]), "E_TRUNCATED"),
    "gz_bad_crc": ("scan.mgz", flipped(GZ, -7), "E_CRC"),
    "gz_trailing_garbage": ("scan.mgz", GZ + b"garbage", "E_GZIP"),
    "long_tail": ("scan.mgz", packed(PLAIN + bytes(2**20 + 100)), "E_BOMB"),
    "huge": ("scan.mgz", packed(poked(4, "4i", 30_000, 30_000, 30_000, 1)), "E_TOOBIG"),
    "negative_dim": ("scan.mgh", poked(4, "i", -16), "E_DIM"),
    "zero_frames": ("scan.mgh", poked(16, "i", 0), "E_DIM"),
    "frames": ("scan.mgh", mgh_bytes(np.stack([VOXELS] * 2, axis=-1)), "E_NDIM"),
    "surface": ("scan.mgh", mgh_bytes(VOXELS[:, :1, :1]), "E_NDIM"),
    "unknown_type": ("scan.mgh", poked(20, "i", 7), "E_DTYPE"),
    "no_geometry": ("scan.mgh", poked(28, "h", 0), "E_NOGEOM"),
    "zero_spacing": ("scan.mgh", poked(30, "f", 0.0), "E_GEOM"),
    "negative_spacing": ("scan.mgh", poked(30, "f", -1.0), "E_GEOM"),
    "nan_spacing": ("scan.mgh", poked(34, "f", NAN), "E_GEOM"),
    "long_direction": ("scan.mgh", poked(42, "3f", 2.0, 0.0, 0.0), "E_GEOM"),
    "nan_direction": ("scan.mgh", poked(42, "f", NAN), "E_GEOM"),
    "nan_centre": ("scan.mgh", poked(78, "f", NAN), "E_GEOM"),
    "sheared": ("scan.mgh", poked(42, "6f", 1, 0, 0, 0.6, 0.8, 0), "E_SHEAR"),
    "metres": ("scan.mgh", poked(30, "3f", 7.5e-4, 8e-4, 2.5e-3), "E_SPACING"),
    "far": ("scan.mgh", poked(78, "f", 5e4), "W_ORIGIN"),
    "nan_voxel": ("scan.mgz", packed(mgh_bytes(WITH_NAN)), "E_NAN"),
    "constant": ("scan.mgz", packed(mgh_bytes(np.full(SHAPE, 7, np.int16))), "E_CONST"),
}


@pytest.mark.parametrize("name", FILES)
def test_odd_file_is_read_correctly_or_refused_with_its_code(name, tmp_path):
    file_name, data, code = FILES[name]
    path = tmp_path / file_name
    path.write_bytes(data)
    volume = read_or_refused(path, code)
    if volume is None:
        return
    plain = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    plain = struct.pack(">i", 1) + plain[4:]  # nibabel refuses files that state an intent
    image = nibabel.MGHImage.from_bytes(plain)
    np.testing.assert_array_equal(volume.array, np.asanyarray(image.dataobj))
    np.testing.assert_array_equal(volume.geometry.affine, image.affine.astype(np.float32))


def test_a_file_of_mgh_under_a_name_of_nifti_says_what_it_is(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(GZ)
    with pytest.raises(ScanError, match="is FreeSurfer MGH, not NIfTI") as caught:
        read_volume(tmp_path / "scan.nii.gz")
    assert ".mgz" in caught.value.fix


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "u2"])
@pytest.mark.parametrize("grid", sorted(GRIDS.keys() - {"sheared"}))
def test_every_dtype_as_nibabel_writes_it(dtype, grid, tmp_path):
    array = (VOXELS % 101).astype(dtype)
    affine = GRIDS[grid]((0.7, 1.1, 2.5))
    path = tmp_path / "scan.mgz"
    path.write_bytes(packed(mgh_bytes(array, affine)))
    assert read_header(path).stored[16:20] == bytes([0, 0, 0, 1])  # one frame of a series
    volume = read_volume(path)
    assert volume.array.dtype == np.dtype(dtype)
    assert volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(read_mask(path).array, array)


def test_every_truncated_file_is_refused(tmp_path):
    whole = packed(mgh_bytes(VOXELS[:4, :4, :4]))
    path = tmp_path / "scan.mgz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ScanError):
            read_volume(path)


@pytest.mark.parametrize("name", ["scan.mgz", "scan.mgh"])
def test_nibabel_reads_what_is_written(name, tmp_path):
    affine = oblique((0.7, 1.1, 2.5))
    write_volume(Volume(VOXELS, Geometry(SHAPE, affine)), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x1f\x8b") == (name == "scan.mgz")
    image = nibabel.MGHImage.from_bytes(gzip.decompress(data) if name == "scan.mgz" else data)
    assert image.get_data_dtype() == ">i2"
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), VOXELS)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)


def test_what_mgh_cannot_store_is_refused(tmp_path):
    geometry = Geometry(SHAPE, AFFINE)
    for volume in (
        Volume(VOXELS.astype(np.float64), geometry),
        Volume(VOXELS.astype(np.int64), geometry),
        Volume(VOXELS, geometry, slope=2.0),
    ):
        with pytest.raises(ValueError, match="MGH"):
            write_volume(volume, tmp_path / "scan.mgz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(300))
def test_mutated_headers_are_refused_or_agree_with_nibabel(seed, tmp_path):
    rng = np.random.default_rng(seed)
    data = bytearray(PLAIN)
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(0, 90)] = rng.integers(0, 256)
    path = tmp_path / "scan.mgh"
    path.write_bytes(data)
    try:
        volume = read_volume(path)
    except ScanError as error:
        assert error.code.startswith("E_")
        return
    image = nibabel.MGHImage.from_bytes(struct.pack(">i", 1) + bytes(data[4:]))
    np.testing.assert_array_equal(volume.array, np.asanyarray(image.dataobj))
    np.testing.assert_array_equal(volume.geometry.affine, image.affine.astype(np.float32))
