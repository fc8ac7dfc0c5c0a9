"""Laws that hold for every row of the table of file formats."""

from __future__ import annotations

from dataclasses import replace

import nibabel
import numpy as np
import pytest
from laws import GRIDS, oblique, orientations

from volseg.errors import ScanError
from volseg.io import formats
from volseg.io.formats import FORMATS, READABLE, SUFFIXES, format_of, is_scan, stem_of
from volseg.io.layouts import find_cases, find_scans
from volseg.io.series import TILT, with_mark
from volseg.io.volumes import (
    read_header,
    read_mask,
    read_volume,
    scan_digest,
    write_volume,
)
from volseg.volume import Geometry, Volume

SHAPE = (9, 8, 7)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
LABELS = (np.random.default_rng(1).random(SHAPE) * 4).astype(np.uint8)
SCANS = [s for row in FORMATS if row.encode and row.holds_scans for s in row.suffixes]
MASKS = [s for row in FORMATS if row.encode and row.holds_masks for s in row.suffixes]
GRID_NAMES = sorted(GRIDS.keys() - {"sheared"})


def test_every_suffix_belongs_to_one_format():
    all_suffixes = [s for row in FORMATS for s in row.suffixes + row.partner_suffixes]
    assert len(set(all_suffixes)) == len(all_suffixes)
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in all_suffixes)
    assert all(suffix in READABLE for suffix in SUFFIXES)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_names_lead_to_the_format_and_ids_are_without_suffix(row, tmp_path):
    for suffix in row.suffixes + row.partner_suffixes:
        for name in (f"p.1{suffix}", f"p.1{suffix.upper()}"):
            assert format_of(tmp_path / name) is row
            assert stem_of(tmp_path / name) == "p.1"
            assert is_scan(tmp_path / name) == (suffix in row.suffixes)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folders_of_scans_and_of_masks_are_searched_for_every_suffix(suffix, tmp_path):
    for name in (f"images/a{suffix}", f"labels/a{suffix}", f"images/._a{suffix}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (case,) = find_cases(tmp_path)
    assert (case.id, case.images["image"].name) == ("a", f"a{suffix}")
    assert case.reference == tmp_path / f"labels/a{suffix}"
    (case,) = find_scans([tmp_path / "images"])
    assert case.id == "a"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("contents", [b"", b"hello", bytes(2000), b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_scan_is_refused_in_one_line(suffix, contents, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(contents)
    for read in (read_header, read_volume, read_mask):
        with pytest.raises(ScanError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert caught.value.fix and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place, code", [("missing", "E_MISSING"), ("folder", "E_NOTFILE")])
def test_a_path_without_a_file_is_refused(suffix, place, code, tmp_path):
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ScanError) as caught:
        read_volume(tmp_path / f"{place}{suffix}")
    assert caught.value.code == code


@pytest.mark.parametrize("suffix", SCANS)
@pytest.mark.parametrize("grid", GRID_NAMES)
def test_scans_and_masks_come_back(suffix, grid, tmp_path):
    geometry = Geometry(SHAPE, GRIDS[grid]((0.7, 1.1, 2.5)))
    scan, mask = tmp_path / f"scan{suffix}", tmp_path / f"mask{suffix}"
    write_volume(Volume(VOXELS, geometry), scan)
    write_volume(Volume(LABELS, geometry), mask)
    volume, labels, header = read_volume(scan), read_mask(mask), read_header(scan)
    np.testing.assert_array_equal(volume.intensities(), VOXELS)
    np.testing.assert_array_equal(labels.array, LABELS)
    assert (volume.array.dtype, labels.array.dtype) == (np.int16, np.uint8)
    assert volume.array.dtype.isnative and volume.array.flags.f_contiguous
    assert labels.geometry.matches(volume.geometry)
    np.testing.assert_allclose(volume.geometry.affine, geometry.affine, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(header.geometry.affine, volume.geometry.affine)
    assert (header.geometry.shape, header.n_bytes) == (SHAPE, VOXELS.nbytes)
    assert volume.sha256 == scan_digest(scan)


@pytest.mark.parametrize("suffix", MASKS)
@pytest.mark.parametrize("grid", GRID_NAMES)
def test_masks_come_back_on_the_grid_of_a_scan_in_another_format(suffix, grid, tmp_path):
    geometry = Geometry(SHAPE, GRIDS[grid]((0.7, 1.1, 2.5)))
    write_volume(Volume(VOXELS, geometry), tmp_path / "scan.nii.gz")
    scan = read_header(tmp_path / "scan.nii.gz").geometry
    mask = tmp_path / f"mask{suffix}"
    write_volume(Volume(LABELS, scan), mask, like=tmp_path / "scan.nii.gz")
    labels = read_mask(mask)
    np.testing.assert_array_equal(labels.array, LABELS)
    assert labels.geometry.matches(scan) and labels.sha256 == scan_digest(mask)
    corners = scan.corners()
    offset_mm = labels.geometry.to_world_mm(corners) - scan.to_world_mm(corners)
    assert np.abs(offset_mm).max() < 1e-5
    if not format_of(mask).holds_scans:
        with pytest.raises(ScanError, match="holds labels only, no scan"):
            read_volume(mask)


def test_a_format_without_masks_gives_none(monkeypatch, tmp_path):
    pictures = replace(formats.NIFTI, name="Picture", suffixes=(".picture",), holds_masks=False)
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, pictures))
    write_volume(Volume(LABELS, Geometry(SHAPE, oblique((1, 1, 2)))), tmp_path / "a.nii")
    path = (tmp_path / "a.nii").rename(tmp_path / "a.picture")
    np.testing.assert_array_equal(read_volume(path).array, LABELS)
    with pytest.raises(ScanError, match="Picture holds intensities only, no mask"):
        read_mask(path)


@pytest.mark.parametrize("suffix", SCANS)
@pytest.mark.parametrize("affine", [np.diag([0.7, 1.1, 2.5, 1.0]), oblique((0.7, 1.1, 2.5))])
def test_all_48_orientations_give_the_same_patient(suffix, affine, tmp_path):
    path = tmp_path / f"scan{suffix}"
    expected = Volume(VOXELS, Geometry(SHAPE, affine))
    point_mm = expected.geometry.to_world_mm(np.array([[2, 3, 4]]))
    codes = set()
    for array, turned in orientations(expected):
        write_volume(Volume(array, Geometry(array.shape, turned)), path)
        volume = read_volume(path)
        codes.add(volume.geometry.axis_codes)
        assert volume.geometry.voxel_volume_mm3 == pytest.approx(0.7 * 1.1 * 2.5, rel=1e-5)
        index = volume.geometry.to_index(point_mm)
        np.testing.assert_allclose(index, np.rint(index), atol=1e-4)
        assert volume.array[tuple(np.rint(index[0]).astype(int))] == VOXELS[2, 3, 4]
    assert len(codes) == 48


@pytest.mark.parametrize("suffix", SCANS)
@pytest.mark.parametrize("grid", GRID_NAMES)
def test_a_mask_has_the_grid_of_the_scan_bit_for_bit(suffix, grid, tmp_path):
    scan = tmp_path / f"scan{suffix}"
    write_volume(Volume(VOXELS, Geometry(SHAPE, GRIDS[grid]((0.7, 1.1, 2.5)))), scan)
    geometry = read_header(scan).geometry
    write_volume(Volume(LABELS, geometry), tmp_path / "mask.nii.gz", like=scan)
    mask = read_mask(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.geometry.affine, geometry.affine)  # exactly
    np.testing.assert_array_equal(mask.array, LABELS)
    moved = geometry.affine + np.array([[0, 0, 0, 1e-3]] * 3 + [[0] * 4])
    with pytest.raises(ValueError, match="another grid"):
        write_volume(Volume(LABELS, Geometry(SHAPE, moved)), tmp_path / "m.nii.gz", like=scan)


@pytest.mark.parametrize("suffix", [suffix for suffix in SCANS if suffix.endswith("gz")])
def test_every_flipped_byte_of_a_compressed_file_is_noticed(suffix, tmp_path):
    path = tmp_path / f"scan{suffix}"
    array = VOXELS[:4, :4, :4]
    write_volume(Volume(array, Geometry(array.shape, oblique((1, 1, 2)))), path)
    whole = path.read_bytes()
    geometry = read_header(path).geometry
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except ScanError:
            continue
        np.testing.assert_array_equal(volume.array, array)  # such as a bit of the time stamp
        np.testing.assert_array_equal(volume.geometry.affine, geometry.affine)


@pytest.mark.parametrize("suffix", MASKS)
def test_a_tilted_mask_is_written_where_its_format_holds_it_and_else_the_fix_says_where(
    suffix, tmp_path
):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[1, 2] = 0.7
    array = np.zeros((6, 7, 5), np.uint8, order="F")
    array[2:4, 2:5, 1:3] = 1
    scan, path = tmp_path / "scan.nii.gz", tmp_path / f"mask{suffix}"
    nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), affine), scan)
    like = with_mark(scan, TILT)
    mask = Volume(array, read_volume(like).geometry)
    if format_of(path).holds_tilt:
        write_volume(mask, path, like=like)
        assert np.array_equal(read_mask(with_mark(path, TILT)).array, array)
        with pytest.raises(ScanError, match="give `like`"):
            write_volume(mask, tmp_path / f"other{suffix}")
    else:
        with pytest.raises(ScanError, match="write it as NIfTI") as caught:
            write_volume(mask, path, like=like)
        assert caught.value.code == "E_SHEAR" and not path.exists()


def test_paths_of_a_folder_are_named_in_messages_and_those_beside_it_stay(tmp_path):
    study, name = tmp_path / "Doe^Jane", "s0123456789ab"
    (study / "sub").mkdir(parents=True)
    text = f"{study}/sub/a b.dcm: broken; {study}2/x: kept; see {study}#{name}"
    expected = f"{name}: broken; {study}2/x: kept; see {name}"
    assert formats.without_places(text, {study: name}) == expected
    (study / "x.dcm").touch()
    assert formats.without_places(text, {study / "x.dcm": name}) == expected
    assert formats.without_places("no path", {study: name}) == "no path"
