"""Arrays and pictures as scans: the voxels of their NIfTI twin, or a reason in one line."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from volseg.errors import ScanError, VolsegError
from volseg.io.formats import format_of, is_scan, stem_of, table_name
from volseg.io.images import read_image
from volseg.io.series import place_of, split_spacing, with_spacing
from volseg.io.stacks import stacks_in
from volseg.io.volumes import read_header, read_mask, read_volume, scan_digest, write_volume

SPACING = (0.7, 1.3, 2.9)
ARRAY = np.random.default_rng(0).integers(0, 4000, (13, 9, 12)).astype(np.uint16)


def pictures_of(folder, array, suffix=".png", first=0):
    """Write the slices of (I, J, K); their numbers have no leading zeros."""
    folder.mkdir()
    for k in range(array.shape[2]):
        Image.fromarray(array[:, :, k].T).save(folder / f"slice{k + first}{suffix}")
    return folder


def tiff_of(path, array):
    pages = [Image.fromarray(array[:, :, k].T) for k in range(array.shape[2])]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def npy_of(path, array):
    np.save(path, array)
    return path


def npz_of(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


FORMS = {
    "C order": lambda folder: npy_of(folder / "s.npy", ARRAY),
    "Fortran order": lambda folder: npy_of(folder / "s.npy", np.asfortranarray(ARRAY)),
    "big-endian": lambda folder: npy_of(folder / "s.npy", ARRAY.astype(">u2")),
    "archive": lambda folder: npz_of(folder / "s.npz", volume=ARRAY),
    "PNG": lambda folder: pictures_of(folder / "s", ARRAY, first=7),
    "TIFF pictures": lambda folder: pictures_of(folder / "s", ARRAY, ".tif"),
    "TIFF pages": lambda folder: tiff_of(folder / "s.tiff", ARRAY),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_voxels_and_the_stated_spacing(form, tmp_path):
    place = FORMS[form](tmp_path)
    path = with_spacing(place, SPACING)
    scan = read_volume(path)
    assert scan.array.dtype == ARRAY.dtype and np.array_equal(scan.array, ARRAY)
    expected = np.diag([*SPACING, 1]).astype(np.float32)
    assert np.array_equal(scan.geometry.affine, expected) and scan.geometry.axis_codes == "RAS"
    assert scan.sha256 == scan_digest(path) != read_volume(with_spacing(place, (1, 1, 1))).sha256
    assert (place_of(path), split_spacing(path)[1]) == (place, SPACING)
    assert (stem_of(path), table_name(path)) == ("s", place.name)
    write_volume(scan, tmp_path / "twin.nii.gz", like=path)
    twin = read_volume(tmp_path / "twin.nii.gz")
    assert np.array_equal(twin.array, ARRAY) and twin.geometry.matches(scan.geometry)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_spacing_the_option_is_named(form, tmp_path):
    place = FORMS[form](tmp_path)
    with pytest.raises(ScanError, match=r"--spacing I,J,K in mm") as caught:
        read_volume(place)
    assert caught.value.code == "E_NOGEOM"
    assert not is_scan(place)  # folders of images and MedMNIST files stay those of classifiers


def test_masks_are_read_too(tmp_path):
    labels = (ARRAY > 3000).astype(np.uint8)
    for place in (
        npy_of(tmp_path / "m.npy", labels.astype(bool)),
        npy_of(tmp_path / "f.npy", labels.astype(np.float16)),
        pictures_of(tmp_path / "m", labels),
    ):
        assert np.array_equal(read_mask(with_spacing(place, SPACING)).array, labels), place


def with_gap(folder):
    pictures_of(folder / "s", ARRAY)
    (folder / "s" / "slice4.png").unlink()
    return folder / "s"


def twice(folder):
    pictures_of(folder / "s", ARRAY)
    (folder / "s" / "slice04.png").write_bytes((folder / "s" / "slice4.png").read_bytes())
    return folder / "s"


def two_series(folder):
    pictures_of(folder / "s", ARRAY)
    (folder / "s" / "other4.png").write_bytes((folder / "s" / "slice4.png").read_bytes())
    return folder / "s"


def other_size(folder):
    pictures_of(folder / "s", ARRAY)
    Image.fromarray(ARRAY[:, :-1, 0].T).save(folder / "s" / "slice12.png")
    return folder / "s"


def coloured(folder):
    pictures_of(folder / "s", ARRAY)
    Image.new("RGB", (13, 9)).save(folder / "s" / "slice3.png")
    return folder / "s"


def truncated(folder):
    path = npy_of(folder / "s.npy", ARRAY)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def damaged_picture(folder):
    pictures_of(folder / "s", ARRAY)
    path = folder / "s" / "slice5.png"
    path.write_bytes(path.read_bytes()[:-30])
    return folder / "s"


def pickled(folder):
    file = io.BytesIO()
    np.save(file, np.array([None] * 8, dtype=object).reshape(2, 2, 2), allow_pickle=True)
    (folder / "s.npy").write_bytes(file.getvalue() + pickle.dumps(1))
    return folder / "s.npy"


REFUSED = {
    with_gap: "E_GAP",
    twice: "E_GAP",
    two_series: "E_SERIES",
    other_size: "E_SHAPE",
    coloured: "E_RGB",
    truncated: "E_TRUNCATED",
    damaged_picture: "E_DAMAGED",
    pickled: "E_DTYPE",
    lambda folder: npy_of(folder / "s.npy", ARRAY.astype(complex)): "E_DTYPE",
    lambda folder: npy_of(folder / "s.npy", ARRAY[None, None]): "E_NDIM",
    lambda folder: npz_of(folder / "s.npz", a=ARRAY, b=ARRAY): "E_NDIM",
    lambda folder: folder / "missing.npy": "E_MISSING",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: getattr(make, "__name__", ""))
def test_what_is_no_volume_is_refused(make, tmp_path):
    path = with_spacing(make(tmp_path), SPACING)
    with pytest.raises(ScanError) as caught:
        read_volume(path)
    assert caught.value.code == REFUSED[make]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spacing", [(0.0001, 1, 1), (1, 1, 5000)])
def test_a_spacing_of_no_scanner_is_refused(spacing, tmp_path):
    path = with_spacing(npy_of(tmp_path / "s.npy", ARRAY), spacing)
    with pytest.raises(ScanError, match=r"outside 0\.01 to 100 mm"):
        read_header(path)


def test_damaged_arrays_raise_nothing_but_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    for form in ("C order", "archive", "TIFF pages"):
        place = FORMS[form](tmp_path)
        sound = place.read_bytes()
        for _ in range(120):
            content = bytearray(sound)
            for position in rng.integers(0, min(len(sound), 600), rng.integers(1, 4)).tolist():
                content[position] = rng.integers(256)
            place.write_bytes(content)
            try:
                read_volume(with_spacing(place, SPACING))
            except VolsegError as error:
                assert "\n" not in str(error)


def test_the_stacks_of_a_folder_are_found(tmp_path):
    one = pictures_of(tmp_path / "p1", ARRAY)
    two = pictures_of(tmp_path / "p2", ARRAY, ".tif")
    pages, array = tiff_of(tmp_path / "p3.tif", ARRAY), npy_of(tmp_path / "p4.npy", ARRAY)
    assert stacks_in(tmp_path) == [one, two, pages, array]
    assert stacks_in(one) == [one] and stacks_in(array) == [array]
    (tmp_path / "notes.txt").write_text("no scan")
    assert stacks_in(tmp_path / "notes.txt") == []


def test_pictures_and_pages_stay_images_for_classifiers(tmp_path):
    folder = pictures_of(tmp_path / "s", ARRAY)
    assert np.array_equal(read_image(folder / "slice3.png").array[0], ARRAY[:, :, 3].T)
    path = tiff_of(tmp_path / "s.tif", ARRAY)
    assert np.array_equal(read_image(path, 5).array[0], ARRAY[:, :, 5].T)
    assert format_of(path).name == "array or pictures" and stem_of(path) == "s.tif"
