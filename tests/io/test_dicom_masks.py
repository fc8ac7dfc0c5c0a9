"""DICOM segmentations and contours are the masks that were drawn, or are refused by name."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from dicom_files import Series, oblique_volume, write_series
from dicom_mask_files import Roi, Seg, contour_on, write_rtstruct, write_seg
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from skimage.draw import polygon2mask

from volseg.commands.placing import place_mask
from volseg.errors import ScanError
from volseg.io.label_table import read_label_table
from volseg.io.polygons import fill_polygons
from volseg.io.volumes import (
    mask_digest,
    mask_notes,
    read_header,
    read_mask,
    read_mask_header,
    read_volume,
    write_volume,
)
from volseg.volume import AxisOrder, Geometry, Volume

SHARED = Path(__file__).parents[2].parent / "shared/data/dicom"
PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
PACKED = (RLELossless, JPEG2000Lossless, JPEGLSLossless)
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")


def labels_on(geometry: Geometry, n_labels: int = 3, seed: int = 0) -> Volume:
    """Return labels, without any on the first slice and on one in the middle."""
    rng = np.random.default_rng(seed)
    array = rng.integers(0, n_labels + 1, geometry.shape).astype(np.uint8)
    array[:, :, 0] = array[:, :, 3] = 0
    return Volume(np.asfortranarray(array), geometry)


def placed(path: Path, geometry: Geometry, **how) -> np.ndarray:
    mask = read_mask(path, **how)
    return place_mask(mask, geometry, mask_name="mask", grid_name="scan").mask.array


def refused(path: Path, **how) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_mask(path, **how)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


# ---- segmentations


CASES = [
    *(("BINARY", syntax) for syntax in PLAIN),
    *(("LABELMAP", syntax) for syntax in (*PLAIN, ExplicitVRBigEndian, *PACKED)),
]


@pytest.mark.parametrize("keeps_empty", [False, True])
@pytest.mark.parametrize(("kind", "syntax"), CASES)
def test_segments_come_back_whatever_is_left_out_and_in_any_order(
    kind, syntax, keeps_empty, tmp_path
):
    scan = oblique_volume((67, 45, 6), seed=3)
    labels = labels_on(scan.geometry)
    how = Seg(kind=kind, syntax=syntax, keeps_empty=keeps_empty, names={1: "liver", 3: "lesion"})
    path = write_seg(labels, tmp_path / "mask.dcm", how)
    assert np.array_equal(placed(path, scan.geometry), labels.array)
    expected = {1: "liver", 2: "segment 2", 3: "lesion"}
    assert read_label_table(path) == expected
    assert read_mask(path).sha256 == mask_digest(path)
    assert np.array_equal(read_mask(path, like=scan.geometry).array, labels.array)
    # Without empty frames the grid ends with the last one.
    assert read_mask(path).geometry.shape[2] == (6 if keeps_empty else 5)


def test_the_distance_of_slices_is_that_between_frames_where_none_is_stated(tmp_path):
    scan = oblique_volume((9, 7, 6))
    labels = labels_on(scan.geometry)
    path = write_seg(labels, tmp_path / "mask.dcm", Seg(distance=False))
    assert np.array_equal(placed(path, scan.geometry), labels.array)
    labels.array[:, :, [2, 4]] = 0  # every other slice: the distance of slices is unknown
    sparse = write_seg(labels, tmp_path / "sparse.dcm", Seg(distance=False))
    with pytest.raises(ScanError) as caught:
        placed(sparse, scan.geometry)
    assert caught.value.code == "E_PAIR"
    assert np.array_equal(
        placed(write_seg(labels, tmp_path / "stated.dcm"), scan.geometry), labels.array
    )


def test_a_segmentation_of_one_slice_is_placed(tmp_path):
    scan = oblique_volume((9, 7, 6))
    labels = labels_on(scan.geometry)
    labels.array[:, :, [1, 2, 4, 5]] = 0
    labels.array[2:5, 3, 4] = 2
    path = write_seg(labels, tmp_path / "mask.dcm")
    assert np.array_equal(placed(path, scan.geometry), labels.array)


def test_segments_that_overlap_are_refused_by_name_and_some_can_be_taken(tmp_path):
    scan = oblique_volume((9, 7, 6))
    layers = [Volume(np.zeros(scan.geometry.shape, np.uint8), scan.geometry) for _ in range(3)]
    layers[0].array[:4], layers[1].array[3:6], layers[2].array[7:] = 1, 2, 5
    names = {1: "GTV", 2: "PTV, wide", 5: "cord"}
    path = write_seg(layers, tmp_path / "mask.dcm", Seg(names=names))
    error = refused(path)
    assert error.code == "E_OVERLAP" and "'GTV' and 'PTV, wide'" in str(error)
    assert "mask.dcm#GTV" in error.fix
    for choice, expected in {
        "GTV": {0: 1},
        "PTV, wide": {1: 2},
        "2": {1: 2},
        "GTV,cord": {0: 1, 2: 5},
        " 5 , GTV": {0: 1, 2: 5},
    }.items():
        chosen_path = path.with_name(f"mask.dcm#{choice}")
        union = np.sum([layers[index].array for index in expected], axis=0)
        assert np.array_equal(placed(chosen_path, scan.geometry), union)
        assert set(read_label_table(chosen_path)) == set(expected.values())
        assert mask_digest(chosen_path) == read_mask(chosen_path).sha256 != mask_digest(path)
    for choice in ("liver", "9", "GTV,liver"):
        error = refused(path.with_name(f"mask.dcm#{choice}"))
        assert error.code == "E_LABELS" and "1 'GTV', 2 'PTV, wide', 5 'cord'" in str(error)


def test_fractions_need_a_threshold(tmp_path):
    scan = oblique_volume((9, 7, 6))
    labels = labels_on(scan.geometry, n_labels=1)
    path = write_seg(labels, tmp_path / "mask.dcm", Seg(kind="FRACTIONAL"))  # 150 of 200
    assert refused(path).code == "E_LABELS"
    assert np.array_equal(placed(path, scan.geometry, threshold=0.75), labels.array)
    assert not placed(path, scan.geometry, threshold=0.76).any()


def test_padding_of_a_label_map_is_background(tmp_path):
    scan = oblique_volume((9, 7, 6))
    labels = labels_on(scan.geometry)

    def pad(header):
        header.PixelPaddingValue = 3
        header["PixelPaddingValue"].VR = "US"
        header.SegmentSequence = header.SegmentSequence[:2]

    path = write_seg(labels, tmp_path / "mask.dcm", Seg(kind="LABELMAP", edit=pad))
    expected = np.where(labels.array == 3, 0, labels.array)
    assert np.array_equal(placed(path, scan.geometry), expected)


def without_place(header):
    del header.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence


def uneven(header):
    place = header.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    position = np.array(place.ImagePositionPatient, float)
    place.ImagePositionPatient = [f"{value:.6f}" for value in position + 0.4]


def cut(header):
    header.PixelData = header.PixelData[: len(header.PixelData) // 4 * 2]


def nameless_frame(header):
    del header.PerFrameFunctionalGroupsSequence[1].SegmentIdentificationSequence


FAULTS = {
    "E_NOGEOM": without_place,
    "E_UNEVEN": uneven,
    "E_TRUNCATED": cut,
    "E_LABELS": nameless_frame,
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_segmentation_that_cannot_be_trusted_is_refused(code, tmp_path):
    labels = labels_on(oblique_volume((9, 7, 6)).geometry)
    assert refused(write_seg(labels, tmp_path / "mask.dcm", Seg(edit=FAULTS[code]))).code == code


def test_a_folder_is_a_mask_if_it_holds_one(tmp_path):
    scan = oblique_volume((9, 7, 6))
    write_series(scan, tmp_path / "study" / "ct")
    assert refused(tmp_path / "study").code == "E_LABELS"
    labels = labels_on(scan.geometry)
    write_seg(labels, tmp_path / "study" / "seg.dcm")
    assert np.array_equal(placed(tmp_path / "study", scan.geometry), labels.array)
    write_seg(labels, tmp_path / "study" / "other.dcm")
    assert "other.dcm, seg.dcm" in str(refused(tmp_path / "study"))


# ---- contours


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_filled_as_another_program_fills_them(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(5, 60)), int(rng.integers(5, 60)))
    polygons = [rng.uniform(-5, 65, (int(rng.integers(3, 40)), 2)) for _ in range(3)]
    expected = np.zeros(shape, bool)
    for polygon in polygons:
        expected ^= polygon2mask(shape, polygon)
    box, inside = fill_polygons(polygons, shape)
    whole = np.zeros(shape, bool)
    whole[box] = inside
    assert np.array_equal(whole, expected)


def test_a_centre_on_a_common_edge_belongs_to_one_of_two_polygons():
    counts = np.zeros((7, 7), int)
    for a, b in itertools.product((0, 3), repeat=2):
        corners = np.array([(a, b), (a + 3, b), (a + 3, b + 3), (a, b + 3)])
        box, inside = fill_polygons([corners], (7, 7))
        assert inside.sum() == 9
        counts[box] += inside
    assert counts[:6, :6].min() == counts.max() == 1


def test_polygons_outside_an_image_fill_nothing():
    for offset in ((100, 0), (0, 100), (-100, 0), (0, -100)):
        square = np.array([(0, 0), (5, 0), (5, 5), (0, 5)]) + offset
        _, inside = fill_polygons([square], (10, 10))
        assert not inside.any()


def drawn(geometry: Geometry, seed: int = 0) -> tuple[list[Roi], np.ndarray]:
    """Return regions, one with a hole, and the mask by another program's filling."""
    rng, rois = np.random.default_rng(seed), []
    expected = np.zeros(geometry.shape, np.uint8)
    size = np.array(geometry.shape[:2])
    for number, (centre, slices) in {2: (0.3, (1, 2, 3)), 7: (0.75, (2, 3))}.items():
        contours = []
        for k in slices:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 30))
            ring = np.column_stack([np.cos(angles), np.sin(angles)])
            outer = size * centre + ring * size * rng.uniform(0.1, 0.22, (30, 1))
            inner = size * centre + ring[::3] * size * 0.06
            for polygon in (outer, inner) if number == 2 else (outer,):
                contours.append(contour_on(geometry, polygon, k))
                inside = polygon2mask(geometry.shape[:2], polygon)
                expected[:, :, k] ^= number * inside.astype(np.uint8)
        rois.append(Roi(number=number, name=f"roi {number}", contours=contours))
    return rois, expected


@pytest.mark.parametrize("seed", range(4))
def test_contours_are_drawn_on_the_slices_of_an_oblique_scan(seed, tmp_path):
    scan = oblique_volume((41, 53, 6), seed=seed)
    rois, expected = drawn(scan.geometry, seed)
    path = write_rtstruct(rois, tmp_path / "rs.dcm")
    mask = read_mask(path, like=scan.geometry)
    assert np.array_equal(mask.array, expected) and mask.array.max() == 7
    assert np.array_equal(mask.geometry.affine, scan.geometry.affine)
    assert read_label_table(path, scan.geometry) == {2: "roi 2", 7: "roi 7"}
    assert not mask_notes(path, scan.geometry)
    series = write_series(scan, tmp_path / "ct")
    as_series = read_mask(path, like=series).canonical()
    assert np.array_equal(as_series.array, mask.canonical().array)
    only = read_mask(path.with_name("rs.dcm#roi 7"), like=series).canonical().array
    assert np.array_equal(only, np.where(as_series.array == 7, 7, 0))


def test_contours_are_drawn_on_a_scan_in_any_axis_order(tmp_path):
    scan = oblique_volume((21, 25, 6))
    rois, expected = drawn(scan.geometry)
    path = write_rtstruct(rois, tmp_path / "rs.dcm")
    for axes in itertools.permutations(range(3)):
        order = AxisOrder(axes, (True, False, True))
        geometry = scan.geometry.reordered(order)
        assert np.array_equal(read_mask(path, like=geometry).array, order.apply(expected))


def test_masks_of_a_tilted_scan_lie_on_its_slices(tmp_path):
    straight = oblique_volume((41, 53, 6)).geometry
    shear = np.eye(4)
    shear[1, 2] = 0.3  # each slice is 0.3 rows further, as with a tilted gantry
    tilted = Geometry(straight.shape, straight.affine @ shear)
    rois, expected = drawn(tilted)
    contours = write_rtstruct(rois, tmp_path / "rs.dcm")
    assert np.array_equal(read_mask(contours, like=tilted).array, expected)
    labels = Volume(expected, tilted)
    for kind in ("BINARY", "LABELMAP"):
        path = write_seg(labels, tmp_path / f"{kind}.dcm", Seg(kind=kind, distance=False))
        assert np.array_equal(read_mask(path, like=tilted).array, expected)


def square(geometry: Geometry, k: float, at: float = 4.6, edge: float = 6.0) -> np.ndarray:
    corners = at + edge * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    return contour_on(geometry, corners, k)


GRID = oblique_volume((20, 20, 6)).geometry
TILTED_SQUARE = contour_on(GRID, np.array([(1, 1), (8, 1), (8, 8)]), 2) + np.array([0, 0, 1])
TILTED_SQUARE[0] += 5


@pytest.mark.parametrize(
    ("rois", "code", "text"),
    [
        ([Roi(number=1, contours=[square(GRID, 2)], kind="POINT")], "E_LABELS", "POINT"),
        ([Roi(number=1, contours=[square(GRID, 2)], kind="OPEN_PLANAR")], "E_LABELS", "OPEN"),
        ([Roi(number=1, contours=[square(GRID, 2)[:2]])], "E_LABELS", "2 points"),
        ([Roi(number=1, contours=[])], "E_LABELS", "no closed contour"),
        ([Roi(number=1, contours=[square(GRID, 2), square(GRID, 6)])], "E_PAIR", "1 of 2"),
        ([Roi(number=1, contours=[square(GRID, -0.6)])], "E_PAIR", "outside the slices"),
        ([Roi(number=1, contours=[square(GRID, k) for k in (2.3, 1.8)])], "E_PAIR", "several"),
        ([Roi(number=1, contours=[TILTED_SQUARE])], "E_PAIR", "not parallel"),
        ([Roi(number=0, contours=[square(GRID, 2)])], "E_LABELS", "0 is the background"),
        (
            [
                Roi(number=1, name="GTV", contours=[square(GRID, 2)]),
                Roi(number=4, name="PTV", contours=[square(GRID, 2, 6)]),
            ],
            "E_OVERLAP",
            "'GTV' and 'PTV'",
        ),
    ],
)  # fmt: skip
def test_contours_that_cannot_be_a_mask_of_the_scan_are_refused(rois, code, text, tmp_path):
    error = refused(write_rtstruct(rois, tmp_path / "rs.dcm"), like=GRID)
    assert error.code == code and text in str(error)


@pytest.mark.parametrize(
    ("rois", "code", "text", "n_voxels"),
    [
        (
            [
                Roi(number=1, contours=[square(GRID, 2)]),
                Roi(number=2, name="ISO", contours=[square(GRID, 2)[:1]], kind="POINT"),
            ],
            "W_ROI",
            "'ISO' (POINT)",
            36,
        ),
        ([Roi(number=1, contours=[square(GRID, k) for k in (1, 4)])], "W_SPARSE", "2 of the 4", 72),
        ([Roi(number=1, contours=[square(GRID, 2.2)])], "W_PLANES", "beside the slices", 36),
        ([Roi(number=1, contours=[square(GRID, 2, at=-3.4)])], "W_CUT", "is cut off", 9),
    ],
)  # fmt: skip
def test_what_is_unusual_with_contours_is_noted(rois, code, text, n_voxels, tmp_path):
    path = write_rtstruct(rois, tmp_path / "rs.dcm")
    (note,) = mask_notes(path, GRID)
    assert note.startswith(f"{code}: ") and text in note
    assert np.count_nonzero(read_mask(path, like=GRID).array) == n_voxels


def test_contours_need_their_scan_in_its_frame_of_reference(tmp_path):
    scan = oblique_volume((20, 20, 6))
    rois = [Roi(number=1, contours=[square(GRID, 2)])]
    path = write_rtstruct(rois, tmp_path / "rs.dcm", frame="1.2")
    assert refused(path).code == "E_NOGEOM"

    def framed(header, index):
        header.FrameOfReferenceUID = frame

    for frame in ("1.2", "1.3"):
        series = write_series(scan, tmp_path / frame, Series(edit=framed))
        if frame == "1.2":
            assert read_mask(path, like=series).array.any()
        else:
            assert "frame of reference" in str(refused(path, like=series))


def test_damaged_masks_are_refused_and_never_a_traceback(tmp_path):
    rng = np.random.default_rng(0)
    labels = labels_on(oblique_volume((9, 7, 6)).geometry)
    rois, _ = drawn(GRID)
    sources = [
        write_seg(labels, tmp_path / "a.dcm"),
        write_seg(labels, tmp_path / "b.dcm", Seg(kind="LABELMAP", syntax=RLELossless)),
        write_rtstruct(rois, tmp_path / "c.dcm"),
    ]
    contents, n_read, codes = [path.read_bytes() for path in sources], 0, set()
    target = tmp_path / "x.dcm"
    for number in range(300):
        content = bytearray(contents[number % len(contents)])
        for _ in range(int(rng.integers(1, 6))):
            content[int(rng.integers(132, len(content)))] = int(rng.integers(256))
        if number % 5 == 0:
            del content[int(rng.integers(len(content))) :]
        target.write_bytes(bytes(content))
        try:
            read_mask(target, like=GRID)
            n_read += 1
        except ScanError as error:
            codes.add(error.code)
    assert n_read > 20 and len(codes) > 4


# ---- real files


@needs_data
@pytest.mark.parametrize("modality", ["ct", "mr_t1", "pet"])
def test_contours_of_a_study_equal_its_masks_in_nifti(modality):
    folder = SHARED / f"sts002_{modality}"
    (twin,) = (folder / "nifti").glob("*_mask.nii.gz")
    (image,) = (folder / "nifti").glob("*_image.nii.gz")
    expected = read_mask(twin).canonical().array
    for scan in (folder / "series", image):
        started = time.monotonic()
        mask = read_mask(folder / "rtstruct", like=scan).canonical()
        assert time.monotonic() - started < 2
        assert mask.array.any() and np.array_equal(mask.array, expected)


TWINS = {
    "liver.dcm": ("liver_seg.nrrd", [1]),
    "sparse-labelmap-noppv.dcm": ("sparse_labelmap_noppv_seg.nrrd", [1]),
    "sparse-labelmap-ppv5.dcm": ("sparse_labelmap_ppv5_seg.nrrd", [1]),  # 5 is padding
    "partial_overlaps.dcm#1,4,5": ("partial_overlaps-1.nrrd", [1, 4, 5]),
    "partial_overlaps.dcm#2": ("partial_overlaps-2.nrrd", [2]),
    "partial_overlaps.dcm#3": ("partial_overlaps-3.nrrd", [3]),
}


@needs_data
@pytest.mark.parametrize("name", TWINS)
def test_segmentations_equal_their_twins_in_nrrd(name):
    folder = SHARED / "ct_3slice_seg" / "seg"
    twin = read_mask(folder / TWINS[name][0])
    expected = np.where(np.isin(twin.array, TWINS[name][1]), twin.array, 0)
    assert np.array_equal(placed(folder / name, twin.geometry), expected)


@needs_data
def test_real_files_that_do_not_fit_are_refused():
    folder = SHARED / "rtstruct_rtutils"
    for name in ("invalid_reference_rt", "non_existent_reference_rt"):
        assert refused(folder / f"{name}.dcm", like=folder).code == "E_PAIR"
    assert refused(SHARED / "ct_3slice_seg/seg/partial_overlaps.dcm").code == "E_OVERLAP"
    assert refused(SHARED / "sts002_ct/series").code == "E_LABELS"
    assert refused(SHARED / "sr_tid1500_example/sr.dcm").code == "E_LABELS"
    label = placed(SHARED / "seg_23x38x3/seg", read_header(SHARED / "seg_23x38x3/image").geometry)
    assert np.count_nonzero(label) == 322


@needs_data
def test_contours_that_refer_to_the_series_are_its_own_whatever_space_they_state():
    folder = SHARED / "rtstruct_rtutils"
    mask = read_mask(folder / "rt.dcm", like=folder)
    assert [bool(mask.array[:, :, k].any()) for k in range(2)] == [True, False]


def test_a_header_says_where_the_mask_is_before_it_is_read(tmp_path):
    scan = oblique_volume((20, 20, 6))
    write_volume(scan, tmp_path / "scan.nii.gz")
    rois, _ = drawn(scan.geometry)
    path = write_rtstruct(rois, tmp_path / "rs.dcm")
    header = read_mask_header(path, tmp_path / "scan.nii.gz")
    mask = read_mask(path, like=tmp_path / "scan.nii.gz")
    assert header.geometry.shape == mask.geometry.shape and header.dtype == mask.array.dtype
    assert read_volume(tmp_path / "scan.nii.gz").geometry.matches(mask.geometry)
