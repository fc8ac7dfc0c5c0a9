"""A scan in memory is the same scan in every form, and a form that is none is refused at once."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from in_memory_forms import FORMS, ITK_LPS
from laws import oblique, orientations, ras
from monai.data import MetaTensor

from volseg.errors import VolsegError
from volseg.io.arrays import Placement, as_mask, as_scan, kind_of, like_source
from volseg.io.volumes import read_volume, write_volume
from volseg.volume import Geometry, Volume

SHAPE = (7, 6, 5)


def scan(affine=None, dtype=np.int16):
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    return Volume(array, Geometry(SHAPE, oblique((0.8, 1.1, 2.5)) if affine is None else affine))


@pytest.mark.parametrize("form", FORMS)
def test_every_voxel_keeps_its_value_and_place_in_all_48_orders(form):
    for array, affine in orientations(scan()):
        image, placement = FORMS[form](array, affine)
        volume = as_scan(image, placement=placement).volume
        np.testing.assert_array_equal(volume.intensities(), array)
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_volume_goes_back_into_the_form_it_came_from(form, dtype):
    original = scan(dtype=dtype)
    image, placement = FORMS[form](original.array, original.geometry.affine)
    volume = as_scan(image, placement=placement).volume
    again = like_source(volume.with_array(volume.array + volume.array.dtype.type(1)), image)
    assert isinstance(again, type(image))
    back = as_scan(again, placement=placement).volume
    np.testing.assert_array_equal(back.array, original.array + 1)
    np.testing.assert_allclose(back.geometry.affine, volume.geometry.affine, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_reading_leaves_the_callers_voxels_alone(form):
    image, placement = FORMS[form](scan().array.copy(), scan().geometry.affine)
    before = as_scan(image, placement=placement).volume.array.copy()
    as_mask(image, like=as_scan(image, placement=placement))
    np.testing.assert_array_equal(as_scan(image, placement=placement).volume.array, before)


def test_a_path_gives_a_volume_and_its_header_warnings(tmp_path):
    path = tmp_path / "scan.nii.gz"
    write_volume(scan(), path)
    for value in (path, str(path)):
        read = as_scan(value)
        np.testing.assert_array_equal(read.volume.array, scan().array)
        assert isinstance(like_source(read.volume, value), Volume)


def test_simpleitk_reads_the_same_grid_as_volseg(tmp_path):
    for number, (array, affine) in enumerate(orientations(scan())):
        path = tmp_path / f"{number}.nii"
        write_volume(Volume(array, Geometry(array.shape, affine)), path)
        of_itk = as_scan(sitk.ReadImage(str(path))).volume
        of_file = read_volume(path)
        np.testing.assert_array_equal(of_itk.array, of_file.array)
        np.testing.assert_allclose(of_itk.geometry.affine, of_file.geometry.affine, atol=1e-4)


def test_nibabel_keeps_the_stored_values_of_a_scaled_file(tmp_path):
    path = tmp_path / "scaled.nii"
    write_volume(Volume(scan().array, scan().geometry, slope=0.5, intercept=-100.0), path)
    read, of_file = as_scan(nibabel.load(path)).volume, read_volume(path)
    assert (read.array.dtype, read.slope, read.intercept) == (np.int16, 0.5, -100.0)
    np.testing.assert_array_equal(read.intensities(), of_file.intensities())
    np.testing.assert_array_equal(read.geometry.affine, of_file.geometry.affine)


def test_monai_in_lps_is_turned_to_ras():
    affine = oblique((0.8, 1.1, 2.5))
    tensor = MetaTensor(
        torch.from_numpy(scan().array[None]),
        affine=torch.as_tensor(ITK_LPS @ affine),
        meta={"space": "LPS"},
    )
    np.testing.assert_allclose(as_scan(tensor).volume.geometry.affine, affine)
    again = like_source(as_scan(tensor).volume, tensor)
    np.testing.assert_allclose(as_scan(again).volume.geometry.affine, affine)


def test_types_that_no_file_holds_are_converted_exactly():
    placement = Placement(affine=ras((1, 1, 2)))
    half = scan(dtype=np.float16).array
    for array in (half, scan().array.astype(">i2"), scan().array.astype(np.longdouble)):
        read = as_scan(array, placement=placement).volume
        assert read.array.dtype.isnative
        np.testing.assert_array_equal(read.array, array)
    bits = torch.from_numpy(scan(dtype=np.float32).array).to(torch.bfloat16)
    np.testing.assert_array_equal(
        as_scan(bits, placement=placement).volume.array, bits.float().numpy()
    )
    mask = scan().array > 100
    read = as_mask(mask, like=as_scan(scan()))
    assert read.volume.array.dtype == np.uint8
    np.testing.assert_array_equal(read.volume.array, mask)


def test_spacing_alone_places_the_axes_and_says_so():
    read = as_scan(scan().array, placement=Placement(spacing_mm=(0.5, 1, 2)))
    assert read.volume.geometry.spacing_mm == (0.5, 1, 2)
    assert [warning.code for warning in read.warnings] == ["W_AXES"]


@pytest.mark.parametrize(
    "image",
    [
        sitk.GetImageFromArray(scan().array.transpose(2, 1, 0)),
        MetaTensor(torch.from_numpy(scan().array[None])),
        nibabel.Nifti1Image(scan().array, np.eye(4)),
    ],
    ids=lambda image: type(image).__name__,
)
def test_the_default_grid_of_a_library_is_a_warning(image):
    assert [warning.code for warning in as_scan(image).warnings] == ["W_GRID"]


NO_SCAN = {
    "none": None,
    "number": 3,
    "list": [[[1, 2], [3, 4]]],
    "bytes": b"scan.nii.gz",
    "object": object(),
    "type": np.ndarray,
    "dict": {"image": 1},
}


@pytest.mark.parametrize("name", NO_SCAN)
def test_a_wrong_type_is_named_with_the_right_ones(name):
    value = NO_SCAN[name]
    with pytest.raises(VolsegError, match=r"mask is of type .*give a path, a NumPy") as caught:
        kind_of(value, "mask")
    assert caught.value.code == "E_TYPE"
    assert "\n" not in str(caught.value)


def meta(shape, **more):
    return MetaTensor(torch.rand(shape), affine=torch.as_tensor(oblique((1, 1, 2))), **more)


def unplaced():
    image = nibabel.Nifti1Image(scan().array, scan().geometry.affine)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image._affine = image.header.get_best_affine()  # as nibabel loads such a file
    return image


def complex_itk():
    return sitk.Image(4, 4, 4, sitk.sitkComplexFloat32)


REFUSED = {
    "array without a grid": (scan().array, {}, "E_NOGEOM", "give affine="),
    "two axes": (np.ones((4, 4)), {"spacing_mm": (1, 1, 1)}, "E_NDIM", "three axes"),
    "channels of an array": (
        np.ones((2, 4, 4, 4)), {"spacing_mm": (1, 1, 1)}, "E_NDIM", r"array\[0\]",
    ),
    "series of an array": (
        np.ones((9, 9, 9, 3)), {"spacing_mm": (1, 1, 1)}, "E_NDIM", r"fix: .*array\[\.\.\., 0\]",
    ),
    "constant": (np.ones((4, 4, 4)), {"spacing_mm": (1, 1, 1)}, "E_CONST", "every voxel is 1"),
    "complex": (np.ones((4, 4, 4), complex), {"spacing_mm": (1, 1, 1)}, "E_DTYPE", "complex"),
    "text": (np.full((4, 4, 4), "a"), {"spacing_mm": (1, 1, 1)}, "E_DTYPE", "type"),
    "all NaN": (np.full((4, 4, 4), np.nan), {"spacing_mm": (1, 1, 1)}, "E_NAN", "64 voxels"),
    "metres": (scan().array, {"spacing_mm": (0.001, 0.001, 0.001)}, "E_SPACING", "mm"),
    "singular affine": (scan().array, {"affine": np.zeros((4, 4))}, "E_GEOM", "invertible"),
    "masked voxels": (
        np.ma.masked_less(scan().array, 50), {"spacing_mm": (1, 1, 1)}, "E_NAN", "50 voxels",
    ),
    "channels of MONAI": (meta((2, 4, 4, 4)), {}, "E_CHANNELS", "2 channels"),
    "batch of MONAI": (meta((1, 1, 4, 4, 4)), {}, "E_NDIM", "batch"),
    "channels of SimpleITK": (
        sitk.Image([4, 4, 4], sitk.sitkVectorUInt8, 3), {}, "E_CHANNELS", "3 channels",
    ),
    "slice of SimpleITK": (sitk.Image(4, 4, sitk.sitkUInt8), {}, "E_NDIM", "shape"),
    "complex SimpleITK": (complex_itk(), {}, "E_DTYPE", "type"),
    "series of nibabel": (
        nibabel.Nifti1Image(np.ones((4, 4, 4, 9)), np.eye(4)), {}, "E_NDIM", "image.slicer",
    ),
    "nibabel without a grid": (unplaced(), {}, "E_NOGEOM", "left and right"),
    "nibabel without an affine": (
        nibabel.Nifti1Image(scan().array, None), {}, "E_NOGEOM", r"no affine.*Nifti1Image\(array",
    ),
    "larger slice of SimpleITK": (
        sitk.Image(9, 9, sitk.sitkUInt8), {}, "E_NDIM", r"2 axes.*k:k\+1",
    ),
    "ANALYZE": (nibabel.AnalyzeImage(scan().array, np.eye(4)), {}, "E_NOGEOM", "ANALYZE"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_could_not_be_is_refused_in_memory_too(name):
    image, grid, code, text = REFUSED[name]
    with pytest.raises(VolsegError, match=text) as caught:
        as_scan(image, placement=Placement(**grid))
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("image (")


@pytest.mark.parametrize(
    "grid",
    [
        {"affine": np.eye(4), "spacing_mm": (1, 1, 1)},
        {"affine": np.eye(3)},
        {"affine": "RAS"},
        {"spacing_mm": (1, 1)},
        {"spacing_mm": 1.0},
        {"spacing_mm": (1, 1, -1)},
        {"spacing_mm": (1, 1, np.nan)},
        {"spacing_mm": {"x": 1}},
    ],
    ids=str,
)
def test_a_grid_that_is_none_is_refused(grid):
    with pytest.raises(VolsegError) as caught:
        Placement(**grid)
    assert caught.value.code == "E_USAGE"


def test_a_mask_array_lies_on_the_voxels_of_its_scan_or_says_why_not():
    image = as_scan(scan())
    mask = (scan().array > 100).astype(np.uint8)
    assert as_mask(mask, like=image).volume.geometry is image.volume.geometry
    with pytest.raises(VolsegError, match=r"reversed.*transpose"):
        as_mask(mask.transpose(2, 1, 0), like=image)
    with pytest.raises(VolsegError, match="has shape"):
        as_mask(mask[1:], like=image)
    itk = as_scan(sitk.GetImageFromArray(scan().array.transpose(2, 1, 0)))
    with pytest.raises(VolsegError, match="axes of the mask are unknown"):
        as_mask(mask, like=itk)  # even where the shapes happen to agree


def test_an_image_in_place_of_a_mask_is_refused():
    image = as_scan(scan())
    with pytest.raises(VolsegError, match="not whole numbers") as caught:
        as_mask(scan().array + np.linspace(0, 1, 5), like=image)
    assert caught.value.code == "E_LABELS"
