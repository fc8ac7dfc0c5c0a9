"""Segmentations of 3D Slicer: layers, names, and files that other readers open."""

from __future__ import annotations

import csv
import gzip

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from text_headers import AFFINE, SHAPE, VOXELS, nrrd_header

import volseg
from volseg.errors import ScanError
from volseg.io.label_table import read_label_table
from volseg.io.layouts import find_cases
from volseg.io.volumes import read_header, read_mask, read_volume, scan_digest, write_volume
from volseg.volume import LPS_TO_RAS, BoundingBox, Geometry, Volume

GEOMETRY = Geometry(SHAPE, AFFINE)
DIRECTIONS = nrrd_header().split("space directions: ")[1].split("\n")[0]
LIVER, SPLEEN, LESION = (np.zeros(SHAPE, np.uint8) for _ in range(3))
LIVER[2:8, 3:9, 2:7], SPLEEN[10:14, 4:8, 3:6], LESION[3:5, 4:6, 3:5] = 1, 2, 7
NAMES = {1: "liver", 2: "Milz, groß", 7: "lesion"}


def segment(number: int, label: int, layer: int = 0, **keys: str) -> str:
    values = {"ID": f"Segment_{number}", "Name": NAMES.get(label, f"name {label}")}
    values |= {"LabelValue": str(label), "Layer": str(layer), "Color": "1 0 0"} | keys
    lines = (f"Segment{number}_{key}:={value}\n" for key, value in values.items() if value)
    return "".join(lines)


def made(layers, segments: str, **fields) -> bytes:
    """Return a file as 3D Slicer lays it out: one layer is 3-D, more are the fastest axis."""
    array, sizes = np.stack(layers), " ".join(map(str, layers[0].shape))
    if len(layers) > 1:
        fields |= {"dimension": "4", "sizes": f"{len(layers)} {sizes}"}
        fields |= {"kinds": "list domain domain domain", "space_directions": f"none {DIRECTIONS}"}
    else:
        fields |= {"sizes": sizes}
    header = nrrd_header(type="unsigned char", encoding="gzip", **fields)
    return header[:-1].encode() + segments.encode() + b"\n" + gzip.compress(array.tobytes("F"), 1)


TWO = segment(0, 1) + segment(1, 2)


def test_a_layer_is_read_with_the_names_of_its_segments(tmp_path):
    path = tmp_path / "mask.seg.nrrd"
    path.write_bytes(made([LIVER + SPLEEN], TWO))
    mask = read_mask(path)
    np.testing.assert_array_equal(mask.array, LIVER + SPLEEN)
    np.testing.assert_allclose(mask.geometry.affine, AFFINE, atol=1e-5)
    assert read_label_table(path) == {1: "liver", 2: "Milz, groß"}
    assert mask.sha256 == scan_digest(path)


def test_layers_are_merged_where_no_segments_overlap(tmp_path):
    path = tmp_path / "mask.seg.nrrd"
    layers = [LIVER, SPLEEN, np.zeros_like(LIVER)]
    path.write_bytes(made(layers, TWO + segment(2, 7, 2)).replace(b"1_Layer:=0", b"1_Layer:=1"))
    mask = read_mask(path)
    np.testing.assert_array_equal(mask.array, LIVER + SPLEEN)
    assert read_label_table(path) == NAMES
    assert (mask.sha256, read_header(path).geometry.shape) == (scan_digest(path), SHAPE)
    components = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # SimpleITK: (K, J, I, layer)
    np.testing.assert_array_equal(components.sum(axis=-1).T, mask.array)


@pytest.mark.parametrize(
    "layers, segments, code, message",
    [
        ([LIVER, LESION], segment(0, 1) + segment(1, 7, 1), "E_OVERLAP", "'liver' and 'lesion'"),
        ([LIVER, SPLEEN // 2], segment(0, 1) + segment(1, 1, 1), "E_LABELS", "have the label 1"),
        ([LIVER], segment(0, 1) + segment(1, 1, Name="b"), "E_LABELS", "'liver' and 'b'"),
        ([LIVER], segment(0, 1, LabelValue="", Layer=""), "E_LABELS", "no label value"),
        ([LIVER], segment(0, 0), "E_LABELS", "no label value"),
        ([LIVER], segment(0, 1, LabelValue="1.5"), "E_LABELS", "no label value"),
        ([LIVER], segment(0, 1, 1), "E_HEADER", "layer 1 of 1"),
        ([LIVER, SPLEEN], segment(0, 1), "E_HEADER", "1 of its 2 layers"),
        ([LIVER, SPLEEN], "", "E_HEADER", "0 of its 2 layers"),
        ([LIVER, SPLEEN], segment(0, 1, 5) + segment(1, 2, 1), "E_HEADER", "of its 2 layers"),
    ],
)
def test_segments_that_are_not_one_mask_are_refused(layers, segments, code, message, tmp_path):
    path = tmp_path / "mask.seg.nrrd"
    path.write_bytes(made(layers, segments))
    with pytest.raises(ScanError, match=message) as caught:
        read_mask(path)
    assert caught.value.code == code and caught.value.fix


def test_damaged_layers_are_refused(tmp_path):
    path, segments = tmp_path / "mask.seg.nrrd", segment(0, 1) + segment(1, 2, 1)
    whole = made([LIVER, SPLEEN], segments)
    start = whole.index(b"\x1f\x8b")
    voxels = gzip.decompress(whole[start:])
    for data, code in (
        (whole[:-12], "E_TRUNCATED"),
        (whole[:start] + gzip.compress(voxels[:-1]), "E_TRUNCATED"),
        (whole[:start] + gzip.compress(voxels[: len(voxels) // 2]), "E_TRUNCATED"),
        (whole[:start] + gzip.compress(voxels + b"a"), "E_BOMB"),
        (whole[:-8] + b"1234" + whole[-4:], "E_CRC"),
        (whole.replace(b"sizes: 2 16 17 12", b"sizes: 2 16 17 99999"), "E_TOOBIG"),
        (whole.replace(b"sizes: 2 16 17 12", b"sizes: 2000000000 16 17 1"), "E_NDIM"),
    ):
        path.write_bytes(data)
        with pytest.raises(ScanError) as caught:
            read_mask(path)
        assert caught.value.code == code


def test_labels_without_segments_are_a_mask_without_names(tmp_path):
    path = tmp_path / "mask.seg.nrrd"
    path.write_bytes(made([LIVER + SPLEEN], ""))
    np.testing.assert_array_equal(read_mask(path).array, LIVER + SPLEEN)
    assert read_label_table(path) == {}


def test_what_is_written_holds_names_and_colours(tmp_path):
    path = tmp_path / "mask.seg.nrrd"
    labels = LIVER + SPLEEN
    labels[LIVER * LESION > 0] = 9  # a label without a name
    write_volume(Volume(labels, GEOMETRY), path, label_names=NAMES)
    assert read_label_table(path) == NAMES | {9: "label_9"}
    array, keys = nrrd.read(str(path))
    np.testing.assert_array_equal(array, labels)
    np.testing.assert_array_equal(keys["space directions"].T, (LPS_TO_RAS @ AFFINE)[:3, :3])
    segments = [{key: keys[f"Segment{n}_{key}"] for key in ("ID", "LabelValue", "Layer", "Extent")}
                for n in range(4)]  # fmt: skip
    assert [entry["LabelValue"] for entry in segments] == ["1", "2", "7", "9"]
    assert len({entry["ID"] for entry in segments}) == 4
    assert all((e["Layer"], e["Extent"]) == ("0", "0 15 0 16 0 11") for e in segments)
    colours = [tuple(map(float, keys[f"Segment{n}_Color"].split())) for n in range(4)]
    assert len(set(colours)) == 4 and all(0 <= part <= 1 for colour in colours for part in colour)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, labels)


@pytest.mark.parametrize(
    "array", [VOXELS, LIVER.astype(np.float32), np.arange(3264).reshape(SHAPE)]
)
def test_what_is_no_mask_is_not_written(array, tmp_path):
    with pytest.raises(ValueError, match="label"):
        write_volume(Volume(array, GEOMETRY), tmp_path / "mask.seg.nrrd")
    with pytest.raises(ScanError, match="holds labels only"):
        (tmp_path / "mask.seg.nrrd").write_bytes(made([LIVER], segment(0, 1)))
        read_volume(tmp_path / "mask.seg.nrrd")


def test_a_smaller_extent_is_placed_on_the_scan_and_its_names_are_those_of_the_rows(tmp_path):
    """The mask of a crop gives the rows of the whole mask, and names without --label-names."""
    folder, labels = tmp_path / "data", LIVER + SPLEEN
    folder.mkdir()
    write_volume(Volume(VOXELS, GEOMETRY), folder / "a.nrrd")
    box = BoundingBox.around(labels)
    crop = Volume(np.asfortranarray(labels[box.slices]), GEOMETRY.crop(box))
    write_volume(crop, folder / "a.seg.nrrd", label_names=NAMES)
    write_volume(Volume(labels, GEOMETRY), tmp_path / "whole.nii.gz")
    (case,) = find_cases(folder)
    assert (case.images["image"].name, case.reference.name) == ("a.nrrd", "a.seg.nrrd")
    tables = []
    for name, mask in (("crop", folder / "a.seg.nrrd"), ("whole", tmp_path / "whole.nii.gz")):
        report = volseg.measure(
            image=folder / "a.nrrd", mask=mask, out=tmp_path / name, intensity_unit="HU",
            pages=False, objects="labels",
        )  # fmt: skip
        assert report.exit_code == 0
        with (tmp_path / name / "lesions.csv").open(encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    placed, whole = tables
    assert [row["label_name"] for row in placed] == ["liver", "Milz, groß"]
    for row in placed + whole:
        row.pop("label_name")
        row.pop("notes", None)
    assert placed == whole


def test_a_mask_between_the_voxels_of_its_scan_is_refused(tmp_path):
    write_volume(Volume(VOXELS, GEOMETRY), tmp_path / "a.nrrd")
    affine = AFFINE @ np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_volume(Volume(LIVER, Geometry(SHAPE, affine)), tmp_path / "b.seg.nrrd")
    report = volseg.measure(
        image=tmp_path / "a.nrrd", mask=tmp_path / "b.seg.nrrd", out=tmp_path / "out",
        intensity_unit="HU", pages=False,
    )  # fmt: skip
    assert report.exit_code == 4
