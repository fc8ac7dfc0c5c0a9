"""2D images are read as a reader sees them, or refused in one line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from laws import GRIDS, oblique, orientations
from PIL import Image

from volseg.errors import ScanError
from volseg.image import Image2D
from volseg.io import images
from volseg.io.image_tables import read_image_arrays
from volseg.io.images import (
    MAX_PIXELS,
    ImageReader,
    read_image,
    slice_image,
    stack_slices,
    through_axis,
)
from volseg.io.volumes import write_volume
from volseg.preprocessing.planes import PLANES
from volseg.volume import Geometry, Volume

DATA = Path(__file__).parents[2].parent / "shared/data"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 11), np.uint8)
COLOUR = RNG.integers(0, 256, (7, 11, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (7, 11), np.uint16)
ALPHA = RNG.integers(0, 256, (7, 11, 1), np.uint8)


def refused(path: Path, code: str, index: int | None = None) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_image(path, index)
    error = caught.value
    assert error.code == code, error
    assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and error.fix
    return error


def saved(path: Path, array: np.ndarray, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


# ---- pictures

GREYS = [("L", GREY), ("1", np.where(GREY > 127, 255, 0).astype(np.uint8)), ("P", GREY)]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "PNG"])
@pytest.mark.parametrize(("mode", "pixels"), GREYS, ids=[mode for mode, _ in GREYS])
def test_grey_has_one_channel_however_it_is_stored(suffix, mode, pixels, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(GREY).convert(mode, dither=Image.Dither.NONE).save(path)
    image = read_image(path)
    assert (image.largest, image.spacing_mm, image.array.dtype) == (255.0, None, np.uint8)
    np.testing.assert_array_equal(image.array, pixels[None])


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_colour_has_three_channels_and_transparency_is_left_out(suffix, has_alpha, tmp_path):
    array = np.concatenate([COLOUR, ALPHA], axis=2) if has_alpha else COLOUR
    image = read_image(saved(tmp_path / f"x.{suffix}", array))
    np.testing.assert_array_equal(image.array, np.moveaxis(COLOUR, -1, 0))


def test_a_palette_of_colours_gives_colours(tmp_path):
    few = (COLOUR // 128) * 255
    Image.fromarray(few).quantize(8).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png").array, np.moveaxis(few, -1, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_kept(suffix, tmp_path):
    image = read_image(saved(tmp_path / f"x.{suffix}", DEEP))
    assert (image.largest, image.array.dtype) == (65535.0, np.uint16)
    np.testing.assert_array_equal(image.array[0], DEEP)


def test_floating_point_has_no_white_and_must_be_finite(tmp_path):
    array = RNG.normal(size=(5, 6)).astype(np.float32)
    image = read_image(saved(tmp_path / "x.tif", array))
    assert image.largest is None
    np.testing.assert_array_equal(image.array[0], array)
    array[0, 0] = np.nan
    refused(saved(tmp_path / "nan.tif", array), "E_NAN")


@pytest.mark.parametrize("shape", [(64, 48), (64, 48, 3)])
def test_jpeg_is_close_to_what_was_saved(shape, tmp_path):
    ramp = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    array = ramp if len(shape) == 2 else np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
    image = read_image(saved(tmp_path / "x.jpeg", array, quality=98, subsampling=0))
    expected = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    assert np.abs(image.array.astype(int) - expected).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_turned_camera_is_turned_back(orientation, suffix, tmp_path):
    """EXIF 2.32: the orientation says where row 0 and column 0 of the file lie in the scene."""
    scene = np.kron(np.array([[0, 80, 160], [250, 40, 200]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }[orientation](scene)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"x.{suffix}", np.ascontiguousarray(stored), exif=exif)
    seen = read_image(path).array[0]
    assert seen.shape == scene.shape
    assert np.abs(seen[8::16, 8::16].astype(int) - scene[8::16, 8::16]).max() <= 4


def test_a_page_of_several_is_named_by_its_index(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", 1).array[0], GREY[::-1])
    assert "holds 2 images" in str(refused(tmp_path / "x.tif", "E_INDEX"))
    assert "give an index from 0 to 1" in str(refused(tmp_path / "x.tif", "E_INDEX", 2))
    refused(tmp_path / "x.tif", "E_INDEX", -1)


def test_files_that_are_no_images_are_refused(tmp_path):
    refused(tmp_path / "missing.png", "E_MISSING")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "E_NOTFILE")
    for name, content, code in [
        ("empty.png", b"", "E_EMPTY"),
        ("text.jpg", b"Not Found", "E_NOTIMAGE"),
        ("page.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "E_NOTIMAGE"),
        ("x.dcm", b"\x00" * 200, "E_NOTIMAGE"),
        ("x.npz", b"PK\x03\x04 and no more", "E_DAMAGED"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, code)
    gif = io.BytesIO()
    Image.fromarray(GREY).save(gif, "GIF")  # other decoders of Pillow stay shut
    (tmp_path / "x.png").write_bytes(gif.getvalue())
    refused(tmp_path / "x.png", "E_NOTIMAGE")


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    for edge in (int(MAX_PIXELS**0.5) + 1, 50_000):
        header = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
        body = chunk(b"IDAT", zlib.compress(b"\x00" * 1000)) + chunk(b"IEND", b"")
        path = tmp_path / f"{edge}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body)
        refused(path, "E_TOOBIG")


def encoded(kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(COLOUR if kind == "JPEG" else GREY).save(stream, kind, **options)
    return stream.getvalue()


FILES = {
    "png": encoded("PNG"),
    "jpg": encoded("JPEG"),
    "bmp": encoded("BMP"),
    "tif": encoded("TIFF", compression="tiff_lzw"),
    "tiff": encoded("TIFF"),
}


@pytest.mark.parametrize("suffix", FILES)
def test_a_truncated_picture_is_refused(suffix, tmp_path):
    content = FILES[suffix]
    for n in range(1, len(content), max(1, len(content) // 40)):
        path = tmp_path / f"{n}.{suffix}"
        path.write_bytes(content[:n])
        try:
            image = read_image(path)
        except ScanError as error:
            assert error.code in ("E_DAMAGED", "E_NOTIMAGE", "E_TOOBIG"), (n, error)
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:  # what is missing belongs to no pixel
            path.write_bytes(content)
            np.testing.assert_array_equal(image.array, read_image(path).array)


@pytest.mark.parametrize("suffix", FILES)
def test_a_damaged_picture_is_read_or_refused_and_nothing_else(suffix, tmp_path):
    rng = np.random.default_rng(1)
    n_refused = 0
    for number in range(150):
        content = bytearray(FILES[suffix])
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(content)
        try:
            assert isinstance(read_image(path), Image2D)
        except ScanError as error:
            n_refused += 1
            assert "\n" not in str(error) and error.code.startswith("E_")
    assert n_refused


# ---- DICOM


def dicom(path: Path, array: np.ndarray, *, photometric: str, bits: int, **tags: str) -> Path:
    """Write a single-frame image, explicit VR little endian (PS3.5 and PS3.10)."""

    def element(group: int, number: int, kind: str, value: bytes) -> bytes:
        value += b"\x00" * (len(value) % 2) if kind in ("UI", "OW") else b" " * (len(value) % 2)
        size = struct.pack("<H", len(value))
        if kind in ("OW", "OB"):
            size = b"\x00\x00" + struct.pack("<I", len(value))
        return struct.pack("<HH", group, number) + kind.encode() + size + value

    def number(value: int) -> bytes:
        return struct.pack("<H", value)

    uid = b"1.2.840.10008.5.1.4.1.1.7"
    meta = element(2, 1, "OB", b"\x00\x01") + element(2, 2, "UI", uid)
    meta += element(2, 3, "UI", b"1.2.3.4") + element(2, 16, "UI", b"1.2.840.10008.1.2.1")
    meta = element(2, 0, "UL", struct.pack("<I", len(meta))) + meta
    data = element(8, 0x16, "UI", uid) + element(8, 0x18, "UI", b"1.2.3.4")
    data += element(8, 0x60, "CS", b"DX")
    if "spacing" in tags:
        data += element(0x28, 2, "US", number(1)) + element(0x28, 4, "CS", photometric.encode())
        data += element(0x28, 0x10, "US", number(array.shape[0]))
        data += element(0x28, 0x11, "US", number(array.shape[1]))
        data += element(0x28, 0x30, "DS", tags["spacing"].encode())
    else:
        data += element(0x28, 2, "US", number(1)) + element(0x28, 4, "CS", photometric.encode())
        data += element(0x28, 0x10, "US", number(array.shape[0]))
        data += element(0x28, 0x11, "US", number(array.shape[1]))
    data += element(0x28, 0x100, "US", number(16)) + element(0x28, 0x101, "US", number(bits))
    data += element(0x28, 0x102, "US", number(bits - 1))
    data += element(0x28, 0x103, "US", number(int(array.dtype.kind == "i")))
    if "slope" in tags:
        data += element(0x28, 0x1052, "DS", tags["intercept"].encode())
        data += element(0x28, 0x1053, "DS", tags["slope"].encode())
    data += element(0x7FE0, 0x10, "OW", array.astype("<" + array.dtype.str[1:]).tobytes())
    path.write_bytes(b"\x00" * 128 + b"DICM" + meta + data)
    return path


def test_a_radiograph_shows_bone_white_whichever_way_it_is_stored(tmp_path):
    array = RNG.integers(0, 4096, (9, 13)).astype(np.uint16)
    plain = dicom(tmp_path / "a.dcm", array, photometric="MONOCHROME2", bits=12, spacing="0.2\\0.3")
    inverted = dicom(tmp_path / "b.dcm", 4095 - array, photometric="MONOCHROME1", bits=12)
    for path, spacing in ((plain, (0.2, 0.3)), (inverted, None)):
        image = read_image(path)
        np.testing.assert_array_equal(image.array[0], array)
        assert (image.largest, image.spacing_mm) == (4095, spacing)
    plain.rename(tmp_path / "no_suffix")
    np.testing.assert_array_equal(read_image(tmp_path / "no_suffix").array[0], array)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_rescale_of_the_modality_is_applied(photometric, tmp_path):
    array = RNG.integers(-1000, 2000, (9, 13)).astype(np.int16)
    tags = {"slope": "2", "intercept": "-100"}
    path = dicom(tmp_path / "x.dcm", array, photometric=photometric, bits=16, **tags)
    units = array * 2.0 - 100
    low, high = -(2**15) * 2.0 - 100, (2**15 - 1) * 2.0 - 100
    expected = low + high - units if photometric == "MONOCHROME1" else units
    image = read_image(path)
    np.testing.assert_array_equal(image.array[0], expected)
    assert image.largest is None  # nothing is white in HU


def test_a_damaged_dicom_image_is_refused(tmp_path, capfd):
    array = RNG.integers(0, 4096, (30, 40)).astype(np.uint16)
    path = dicom(tmp_path / "x.dcm", array, photometric="MONOCHROME2", bits=12)
    content = path.read_bytes()
    for n, code in ((140, "E_DAMAGED"), (300, "E_DAMAGED"), (len(content) - 900, "E_TRUNCATED")):
        path.write_bytes(content[:n])
        refused(path, code)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "volume"),
    [("sts002_ct", "CT"), ("sts002_mr_t1", "MR_T1"), ("sts002_pet", "PET")],
)
def test_a_dicom_image_equals_the_slice_of_the_volume_that_another_converter_made(name, volume):
    folder = DATA / "dicom" / name
    if not folder.is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    reader, path = ImageReader(), folder / "nifti" / f"{volume}_image.nii.gz"
    n_equal = 0
    for image in (read_image(p) for p in sorted(folder.rglob("*.dcm")) if p.name != "RS.dcm"):
        expected = reader.read(path, n_equal)  # from the feet on, as the files are named
        np.testing.assert_allclose(image.array, expected.array, rtol=1e-4, atol=1e-3)
        assert image.spacing_mm == pytest.approx(expected.spacing_mm, rel=1e-5)
        n_equal += 1
    assert n_equal > 30


def test_a_real_colour_image_is_read_and_a_contour_set_is_no_image():
    folder = DATA / "dicom"
    if not folder.is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    paths = sorted((folder / "d2n_generic_rgb_001").rglob("*.dcm"))
    assert {read_image(path).array.shape[0] for path in paths} == {3}
    refused(next((folder / "sts002_ct").rglob("RS.dcm")), "E_DAMAGED")


# ---- slices of volumes


def test_a_slice_is_drawn_as_radiologists_do_in_any_of_the_48_orders(tmp_path):
    geometry = Geometry((6, 7, 5), oblique((1.0, 0.8, 2.5)))
    scan = Volume(RNG.integers(-900, 900, geometry.shape).astype(np.int16), geometry)
    canonical = scan.canonical()
    expected = PLANES[0].slice_of(canonical.array, 3)  # (R, A): R to the left, A to the top
    for number, (stored, affine) in enumerate(orientations(scan)):
        path = tmp_path / f"{number}.nii.gz"
        write_volume(Volume(stored, Geometry(stored.shape, affine)), path)
        image = read_image(path, 3)
        np.testing.assert_array_equal(image.array[0], expected[::-1, ::-1].T)
        assert image.spacing_mm == pytest.approx(canonical.geometry.spacing_mm[1::-1], rel=1e-5)
    refused(tmp_path / "0.nii.gz", "E_INDEX")
    refused(tmp_path / "0.nii.gz", "E_INDEX", 5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice_needs_no_index(axis, tmp_path):
    shape = [20, 24, 18]
    shape[axis] = 1
    scan = Volume(RNG.integers(0, 200, shape).astype(np.uint8), Geometry(tuple(shape), np.eye(4)))
    write_volume(scan, tmp_path / "x.nii.gz")
    image = read_image(tmp_path / "x.nii.gz")
    (plane,) = (plane for plane in PLANES if plane.through == axis)
    expected = plane.slice_of(scan.array, 0)[::-1, ::-1].T
    np.testing.assert_array_equal(image.array[0], expected)
    assert image.largest == 255


# ---- MedMNIST


def arrays(path: Path, **changes) -> Path:
    content = {
        "train_images": RNG.integers(0, 255, (5, 8, 9), np.uint8),
        "train_labels": np.array([[0], [1], [0], [1], [1]]),
        "test_images": RNG.integers(0, 255, (2, 8, 9), np.uint8),
        "test_labels": np.array([[1], [0]]),
    }
    kept = {name: array for name, array in (content | changes).items() if array is not None}
    np.savez_compressed(path, **kept)
    return path


def test_rows_are_counted_through_the_splits(tmp_path):
    path = arrays(tmp_path / "x.npz")
    with np.load(path) as stored:
        expected = [*stored["train_images"], *stored["test_images"]]
    reader = ImageReader()
    for index, row in enumerate(expected):
        image = reader.read(path, index)
        np.testing.assert_array_equal(image.array, row[None])
        assert image.largest == 255
    refused(path, "E_INDEX", 7)
    colour = RNG.integers(0, 255, (2, 4, 5, 3), np.uint8)
    path = arrays(tmp_path / "rgb.npz", test_images=colour)
    np.testing.assert_array_equal(read_image(path, 6).array, np.moveaxis(colour[1], -1, 0))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"train_images": None, "test_images": None}, "E_NOTIMAGE"),
        ({"test_images": np.zeros((2, 8, 8, 8), np.uint8)}, "E_NDIM"),
        ({"test_images": np.zeros((2, 8, 0), np.uint8)}, "E_EMPTY"),
        ({"test_images": np.array([["a"]] * 2)[:, :, None]}, "E_DTYPE"),
        ({"test_images": np.array([[[object()]]] * 2)}, "E_DTYPE"),  # pickled objects
        ({"test_images": np.zeros((2, 8, 8), complex)}, "E_DTYPE"),
        ({"test_images": np.full((2, 3, 3), np.nan)}, "E_NAN"),
    ],
)
def test_other_arrays_are_refused(changes, code, tmp_path):
    refused(arrays(tmp_path / "x.npz", **changes), code, 6)


def test_a_last_axis_of_one_channel_and_booleans_are_greys(tmp_path):
    grey, truth = RNG.integers(0, 255, (2, 4, 5, 1), np.uint8), RNG.integers(0, 2, (5, 4, 5)) > 0
    path = arrays(tmp_path / "x.npz", test_images=grey, train_images=truth)
    np.testing.assert_array_equal(read_image(path, 6).array, grey[1, :, :, 0][None])
    image = read_image(path, 3)
    np.testing.assert_array_equal(image.array[0], truth[3] * 255)
    assert image.array.dtype == np.uint8 and image.largest == 255


@pytest.mark.parametrize("name", ["train_images", "train_labels"])
@pytest.mark.parametrize("dtype", [object, complex, "U1"])
def test_arrays_of_no_numbers_are_refused_once_with_a_fix(name, dtype, tmp_path):
    content = np.ones((5, 4, 5) if name == "train_images" else (5, 1)).astype(dtype)
    path = arrays(tmp_path / "x.npz", **{name: content})
    with pytest.raises(ScanError, match=rf"{name} is of type .*store numbers") as error:
        read_image_arrays(path)
    assert error.value.code == "E_DTYPE"


def test_a_damaged_archive_is_refused_or_read_and_nothing_else(tmp_path):
    content = arrays(tmp_path / "x.npz").read_bytes()
    rng, codes = np.random.default_rng(2), set()
    for number in range(200):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path = tmp_path / f"{number}.npz"
        path.write_bytes(damaged[: rng.integers(10, len(damaged) + 1)] if number % 2 else damaged)
        try:
            read_image(path, 6)
        except ScanError as error:
            codes.add(error.code)
            assert "\n" not in str(error)
    assert "E_DAMAGED" in codes


# ---- slices back into a volume


@pytest.mark.parametrize("grid", GRIDS)
def test_slices_that_were_read_make_the_volume_again_in_every_orientation(grid, tmp_path):
    array = np.random.default_rng(3).normal(size=(5, 6, 4)).astype(np.float32)
    volume = Volume(array, Geometry(array.shape, GRIDS[grid]((0.8, 0.9, 2.5))))
    for number, (stored, affine) in enumerate(orientations(volume)):
        if number % 5 and grid != "oblique":
            continue  # all 48 on one grid
        geometry = Geometry(stored.shape, affine)
        canonical = Volume(stored, geometry).canonical()
        through = through_axis(canonical.geometry.shape)
        slices = {k: slice_image(canonical, through, k).array[0] for k in range(array.shape[2])}
        stacked = stack_slices(slices, geometry)
        np.testing.assert_array_equal(stacked.array, stored)
        np.testing.assert_array_equal(stacked.geometry.affine, affine)


def test_a_slice_that_is_not_given_is_unknown_and_not_zero():
    geometry = Geometry((5, 6, 4), oblique((1, 1, 2)))
    stacked = stack_slices({2: np.ones((6, 5), np.float32)}, geometry)
    assert np.isnan(stacked.array).sum() == 3 * 30 and np.nansum(stacked.array) == 30
    canonical = stacked.canonical().array
    assert np.isfinite(canonical[:, :, 2]).all()


def test_a_single_coronal_slice_is_stacked_as_it_was_read(tmp_path):
    array = np.random.default_rng(3).normal(size=(5, 1, 7)).astype(np.float32)
    volume = Volume(array, Geometry(array.shape, np.diag([-1.0, 2.0, 1.5, 1.0])))
    canonical = volume.canonical()
    image = slice_image(canonical, through_axis(canonical.geometry.shape), 0).array[0]
    np.testing.assert_array_equal(stack_slices({0: image}, volume.geometry).array, array)


def test_a_picture_without_room_in_memory_is_refused_by_name(tmp_path):
    with (
        pytest.raises(ScanError, match="more memory than there is") as caught,
        images._decoding(tmp_path / "a.tif"),
    ):
        np.empty(2**62, np.uint8)  # as a damaged size asks for
    assert caught.value.code == "E_TOOBIG" and caught.value.fix
