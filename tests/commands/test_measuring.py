import csv
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from laws import ball, grid_around, oblique, real_data

import volseg
from volseg.errors import VolsegError
from volseg.io.label_names import read_label_names
from volseg.io.volumes import read_volume, write_volume
from volseg.volume import Geometry, Volume


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def pair(tmp_path):
    """Write an image of 40 HU balls in −300, and its mask with values 2 (large) and 7 (small)."""
    geometry = grid_around(16, oblique((0.8, 1.0, 2.0)), margin=3)
    centre = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    large, small = ball(8, geometry, centre - [7, 0, 0]), ball(4, geometry, centre + [10, 0, 0])
    mask = large * 2 + small * 7
    write_volume(
        Volume(np.where(mask > 0, 40, -300).astype(np.int16), geometry), tmp_path / "scan.nii.gz"
    )
    write_volume(Volume(mask.astype(np.uint8), geometry), tmp_path / "mask.nii.gz")
    return tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"


def test_any_mask_is_measured_without_a_model(pair, tmp_path):
    image, mask = pair
    report = volseg.measure(
        image=image, mask=mask, out=tmp_path / "out", label_names={7: "cyst"}, figures=True
    )
    assert report.exit_code == 0
    large, small = rows(tmp_path / "out" / "lesions.csv")
    assert (large["label"], large["label_name"]) == ("2", "label_2")
    assert (small["label"], small["label_name"]) == ("7", "cyst")
    assert float(large["volume_ml"]) == pytest.approx(4 / 3 * np.pi * 0.8**3, rel=0.03)
    intensity = (large["intensity_mean"], large["intensity_sd"], large["intensity_unit"])
    assert intensity == ("40", "0", "HU")
    assert (large["confidence_mean"], large["class_name"]) == ("", "")
    assert (tmp_path / "out" / "figures" / "scan.png").exists()
    assert not (tmp_path / "out" / "masks").exists()


def test_a_mask_of_another_scan_is_a_failed_row_with_numbers(pair, tmp_path):
    image, mask = pair
    other = read_volume(mask)
    affine = other.geometry.affine.copy()
    affine[:3, 3] += 3 * affine[:3, 0]
    write_volume(Volume(other.array, type(other.geometry)(other.array.shape, affine)), mask)
    report = volseg.measure(image=image, mask=mask, out=tmp_path / "out")
    assert report.exit_code == 4
    assert "E_PAIR" in report.failed["scan"]
    assert "3 voxels" in report.failed["scan"] and "(2.4 mm)" in report.failed["scan"]
    assert re.search(r"; 9\d% of it lies within the scan", report.failed["scan"])


@pytest.mark.slow
def test_the_48_files_of_one_scan_give_identical_rows(tmp_path):
    folder = real_data("nifti_zoo/orientations48")
    lines = ["subject,image,label"]
    for path in sorted(folder.glob("*.nii.gz")):
        scan = read_volume(path)
        values = scan.intensities()
        mask = (values > 90).astype(np.uint8)
        write_volume(scan.with_array(mask), tmp_path / f"mask_{path.name}", like=path)
        lines.append(f"{path.name.split('.')[0]},{path},mask_{path.name}")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    assert len(lines) == 49
    report = volseg.measure(cases=tmp_path / "cases.csv", out=tmp_path / "out", pages=False)
    assert report.exit_code == 0
    by_case = {}
    for row in rows(tmp_path / "out" / "lesions.csv"):
        case = row.pop("case_id")
        centroid = [float(row.pop(f"centroid_{axis}_mm")) for axis in "ras"]
        by_case.setdefault(case, []).append((row, centroid))
    assert len(by_case) == 48
    expected = by_case.popitem()[1]
    assert len(expected) > 1
    for lesions in by_case.values():
        assert [row for row, _ in lesions] == [row for row, _ in expected]
        np.testing.assert_allclose(  # up to the last digit
            [centroid for _, centroid in lesions], [c for _, c in expected], atol=1.01e-4
        )


@pytest.mark.parametrize("subject", ["example_ct_sm_fast", "example_ct_sm"])
def test_volumes_of_all_117_labels_equal_the_published_statistics(subject, tmp_path):
    folder = real_data("totalseg_example_ct")
    names = {
        int(row["label"]): row["name"]
        for row in rows(folder / "label_names.csv")
        if row["map"] == "total"
    }
    assert len(names) == 117
    case = next(row for row in rows(folder / "cases.csv") if row["subject"] == subject)
    volseg.measure(
        image=folder / case["image"],
        mask=folder / case["label"],
        out=tmp_path / "out",
        objects="labels",
        label_names=names,
    )
    lesions = {row["label_name"]: row for row in rows(tmp_path / "out" / "lesions.csv")}
    voxels = dict(pair.split(":") for pair in case["label_values"].split(";"))
    assert {row["label"]: row["n_voxels"] for row in lesions.values()} == {
        k: v for k, v in voxels.items() if k != "0"
    }
    if subject != "example_ct_sm_fast":
        return  # the published statistics are for the other mask
    statistics = json.loads((folder / "example_ct_sm_fast_statistics.json").read_text())
    assert set(statistics) == set(names.values())
    for name, expected in statistics.items():
        volume = float(lesions[name]["volume_mm3"]) if name in lesions else 0.0
        assert volume == expected["volume"]
        if name in lesions:
            mean = float(lesions[name]["intensity_mean"])
            assert mean == pytest.approx(expected["intensity"], abs=0.5)


@pytest.mark.parametrize(
    "arguments", [{}, {"image": "a.nii"}, {"image": "a.nii", "mask": "b.nii", "cases": "c.csv"}]
)
def test_a_pair_or_a_table_is_needed(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in arguments.values():
        Path(name).touch()
    with pytest.raises(VolsegError, match="needs a scan and its mask"):
        volseg.measure(**arguments, out=tmp_path / "out")


def test_new_voxels_of_a_header_and_image_pair_are_noticed(tmp_path):
    import nibabel

    affine = oblique((1, 1, 2))
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    values = np.arange(216, dtype=np.int16).reshape(6, 6, 6)
    for name, array in (("scan", values), ("mask", mask)):
        image = nibabel.Nifti1Pair(array, affine)
        image.set_sform(affine, 1)
        nibabel.save(image, tmp_path / f"{name}.hdr")
    pair = {"image": tmp_path / "scan.hdr", "mask": tmp_path / "mask.hdr", "out": tmp_path / "out"}
    assert list(volseg.measure(**pair).done) == ["scan"]
    assert list(volseg.measure(**pair).kept) == ["scan"]
    voxels = np.fromfile(tmp_path / "scan.img", np.int16) + 5
    voxels.tofile(tmp_path / "scan.img")
    assert list(volseg.measure(**pair).done) == ["scan"]
    assert rows(tmp_path / "out" / "lesions.csv")[0]["intensity_mean"] == str(
        float(values[mask == 1].mean()) + 5
    )


def test_label_names_come_from_json_either_way_round_or_csv(tmp_path):
    (tmp_path / "a.json").write_text('{"1": "spleen", "12": "aorta"}')
    (tmp_path / "b.json").write_text('{"spleen": 1, "aorta": 12}')
    (tmp_path / "c.csv").write_text("label,name\n1,spleen\n12,aorta\n")
    for name in ("a.json", "b.json", "c.csv"):
        assert read_label_names(tmp_path / name) == {1: "spleen", 12: "aorta"}
    (tmp_path / "d.csv").write_text("value,title\n1,spleen\n")
    with pytest.raises(VolsegError, match=r"d\.csv: is not a list of label names"):
        read_label_names(tmp_path / "d.csv")


def test_label_names_of_a_csv_may_hold_what_other_readers_split_on(tmp_path):
    names = {1: "a\rb", 2: "c\u2028d", 3: "e\x0bf\x85g", 4: 'say "h, i"'}
    quoted = "".join('{},"{}"\r\n'.format(n, name.replace('"', '""')) for n, name in names.items())
    (tmp_path / "names.csv").write_bytes(f"label,name\r\n{quoted}".encode())
    assert read_label_names(tmp_path / "names.csv") == names
    unquoted = "label,name\n2,c\u2028d\n3,e\x0bf\x85g\n"
    (tmp_path / "plain.csv").write_bytes(unquoted.encode())
    assert read_label_names(tmp_path / "plain.csv") == {2: "c\u2028d", 3: "e\x0bf\x85g"}
    (tmp_path / "excel.csv").write_bytes("\ufefflabel;name\r1;Milz, groß\r".encode())
    assert read_label_names(tmp_path / "excel.csv") == {1: "Milz, groß"}
    with pytest.raises(VolsegError, match=r"none\.csv: is not a list of label names"):
        read_label_names(tmp_path / "none.csv")


def test_line_breaks_in_names_of_files_and_labels_make_no_rows(pair, tmp_path):
    image, mask = pair
    hostile = tmp_path / "scan\rof\x0ba\u2028day.nii.gz"
    image.rename(hostile)
    names = {2: "left\rkidney", 7: "\x85cyst\x1c"}
    arguments = {"image": hostile, "mask": mask, "out": tmp_path / "out", "label_names": names}
    volseg.measure(**arguments)
    for name, n_rows in (("lesions.csv", 2), ("cases.csv", 1)):
        table = rows(tmp_path / "out" / name)
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert len(table) == len(list(csv.DictReader(text.splitlines()))) == n_rows
    assert table[0]["image"].endswith(hostile.name)
    lesions = rows(tmp_path / "out" / "lesions.csv")
    assert [row["label_name"] for row in lesions] == list(names.values())
    assert volseg.report(tmp_path / "out").done == list(volseg.measure(**arguments).kept)


def test_two_folders_are_paired_by_name(pair, tmp_path):
    image, mask = pair
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    for folder, file in ((scans, image), (masks, mask)):
        folder.mkdir()
        for name in ("a", "b"):
            (folder / f"{name}.nii.gz").write_bytes(file.read_bytes())
    report = volseg.measure(image=scans, mask=masks, out=tmp_path / "out", intensity_unit="HU")
    assert sorted(report.done) == ["a", "b"]
    assert report.warnings == []
    (masks / "c.nii.gz").write_bytes(mask.read_bytes())
    report = volseg.measure(image=scans, mask=masks, out=tmp_path / "out", intensity_unit="HU")
    assert report.warnings == ["W_MASK: 1 of 3 masks has no scan and was skipped, such as 'c'"]
    (masks / "b.nii.gz").unlink()
    with pytest.raises(VolsegError, match="no mask for 1 of 2 scans, first 'b'"):
        volseg.measure(image=scans, mask=masks, out=tmp_path / "other")
    with pytest.raises(VolsegError, match="one is a folder"):
        volseg.measure(image=scans, mask=mask, out=tmp_path / "other")


def test_lesions_in_an_organ_have_a_burden(pair, tmp_path):
    image, mask = pair
    report = volseg.measure(
        image=image,
        mask=mask,
        out=tmp_path / "out",
        label_names={2: "liver", 7: "cyst"},
        organ="liver",
    )
    assert report.exit_code == 0
    (cyst,) = rows(tmp_path / "out" / "lesions.csv")
    (case,) = rows(tmp_path / "out" / "cases.csv")
    array = read_volume(mask).array
    assert (cyst["label_name"], cyst["lesion_id"]) == ("cyst", "1")
    assert float(case["burden"]) == pytest.approx((array == 7).sum() / (array > 0).sum(), rel=1e-5)
    assert float(case["organ_volume_ml"]) == pytest.approx((array > 0).sum() * 1.6 / 1000, rel=1e-4)
    for misspelt in ({"organ": "spleen"}, {"lymph_nodes": ["spleen"]}):
        report = volseg.measure(image=image, mask=mask, out=tmp_path / "out", **misspelt)
        assert "E_LABELS" in report.failed["scan"] and "'spleen'" in report.failed["scan"]
    volseg.measure(image=image, mask=mask, out=tmp_path / "out", organ="9")  # in no voxel
    (case,) = rows(tmp_path / "out" / "cases.csv")
    assert (case["burden"], case["organ_volume_ml"]) == ("", "")
    assert "W_ORGAN: no voxel is 9" in case["warnings"]


def test_an_organ_without_another_label_is_a_warning(pair, tmp_path):
    image, mask = pair
    volume = read_volume(mask)
    write_volume(volume.with_array((volume.array > 0).astype(np.uint8)), mask)
    report = volseg.measure(image=image, mask=mask, out=tmp_path / "out", organ="1")
    assert "W_ORGAN: scan: no label but the organ, 1, so no lesion was" in "; ".join(
        report.warnings
    )
    assert rows(tmp_path / "out" / "lesions.csv") == []


@pytest.mark.parametrize(("fraction", "unit"), [(0.0, "a.u."), (0.002, "a.u."), (0.05, "HU")])
def test_a_few_voxels_below_air_do_not_make_a_scan_ct(fraction, unit, tmp_path):
    values = np.random.default_rng(0).normal(100, 20, (20, 20, 20)).astype(np.float32)
    values.ravel()[: int(fraction * values.size)] -= 1000
    values[10, 10, 10] = -np.inf
    np.random.default_rng(1).shuffle(values.ravel())
    mask = np.zeros(values.shape, np.uint8)
    mask[5:8, 5:8, 5:8] = 1
    geometry = Geometry(values.shape, np.diag([1.0, 1.0, 2.0, 1.0]))
    write_volume(Volume(values, geometry), tmp_path / "scan.nii.gz")
    write_volume(Volume(mask, geometry), tmp_path / "mask.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    volseg.measure(**files, out=tmp_path / "out")
    (case,), (lesion,) = (rows(tmp_path / "out" / f"{name}.csv") for name in ("cases", "lesions"))
    assert lesion["intensity_unit"] == unit
    assert "W_UNIT: no --unit given" in case["warnings"] and "HU" in case["warnings"]
    volseg.measure(**files, out=tmp_path / "stated", intensity_unit=unit)
    assert "W_UNIT" not in rows(tmp_path / "stated" / "cases.csv")[0]["warnings"]


def test_names_come_from_the_label_table_of_the_mask(pair, tmp_path):
    image, mask = pair
    loaded = nibabel.nifti1.load(mask)
    table = """<?xml version="1.0"?><CaretExtension><VolumeInformation Index="0"><LabelTable>
        <Label Key="0" Alpha="0"><![CDATA[???]]></Label>
        <Label Key="2" Red="1"><![CDATA[left kidney]]></Label>
        <Label Key="7" Red="1">cyst &amp; stone</Label>
        </LabelTable></VolumeInformation></CaretExtension>"""
    loaded.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, table.encode()))
    nibabel.nifti1.save(loaded, mask)
    volseg.measure(image=image, mask=mask, out=tmp_path / "out")
    lesions = rows(tmp_path / "out" / "lesions.csv")
    assert [row["label_name"] for row in lesions] == ["left kidney", "cyst & stone"]
    volseg.measure(image=image, mask=mask, out=tmp_path / "out", label_names={2: "mine"})
    lesions = rows(tmp_path / "out" / "lesions.csv")
    assert [row["label_name"] for row in lesions] == ["mine", "label_7"]


def test_a_hole_in_the_scan_empties_the_intensities_of_its_lesion_only(pair, tmp_path):
    image, mask = pair
    scan, ids = read_volume(image), read_volume(mask).array
    array = scan.array.astype(np.float32)
    array[tuple(np.argwhere(ids == 7)[0])] = np.nan
    write_volume(scan.with_array(array), image)
    report = volseg.measure(
        image=image, mask=mask, out=tmp_path / "out", intensity_unit="HU", figures=True
    )
    assert report.exit_code == 0
    large, small = rows(tmp_path / "out" / "lesions.csv")
    assert (large["intensity_mean"], small["intensity_mean"], small["mass_g"]) == ("40", "", "")
    assert float(small["volume_ml"]) > 0
    assert "intensity, mass, density: 1 of " in small["notes"]  # the form that the page parses
    assert "W_NAN" in rows(tmp_path / "out" / "cases.csv")[0]["warnings"]


@pytest.mark.parametrize(
    "values, problem",
    [(np.float32([0, 0.37, 1]), "0.37"), (np.int16([0, -1, 1]), "-1")],
)
def test_masks_of_other_than_whole_numbers_are_refused_with_their_values(
    pair, tmp_path, values, problem
):
    image, mask = pair
    scan = read_volume(mask)
    array = values[np.minimum(scan.array, 1)]
    write_volume(scan.with_array(np.asfortranarray(array)), mask)
    report = volseg.measure(image=image, mask=mask, out=tmp_path / "out")
    assert report.exit_code == 4
    assert "E_LABELS" in report.failed["scan"] and problem in report.failed["scan"]


def test_an_empty_mask_is_a_scan_without_lesions(pair, tmp_path):
    image, mask = pair
    scan = read_volume(mask)
    write_volume(scan.with_array(np.zeros_like(scan.array)), mask)
    volseg.measure(image=image, mask=mask, out=tmp_path / "out")
    assert rows(tmp_path / "out" / "lesions.csv") == []
    (case,) = rows(tmp_path / "out" / "cases.csv")
    assert (case["status"], case["n_lesions"]) == ("done", "0")
    assert (case["total_volume_ml"], case["largest_volume_ml"]) == ("0", "")


def test_one_mask_with_a_table_of_several_scans_is_refused(pair, tmp_path):
    image, mask = pair
    table = tmp_path / "scans.csv"
    table.write_text(f"subject,image\na,{image}\n")
    assert list(volseg.measure(image=table, mask=mask, out=tmp_path / "one").done) == ["a"]
    table.write_text(f"subject,image\na,{image}\nb,{image}\n")
    problem = r"scans\.csv: lists 2 scans, but .*mask\.nii\.gz is one mask"
    with pytest.raises(VolsegError, match=problem) as refusal:
        volseg.measure(image=table, mask=mask, out=tmp_path / "out")
    assert refusal.value.code == "E_USAGE" and f"--cases {table}" in refusal.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "label",
    ["0", "label_0", "air", "4294967296", "9" * 5000, "²", "-1", "1.0", "", "label_", "part"],
)
@pytest.mark.parametrize("option", ["organ", "lymph_nodes"])
def test_a_label_is_a_value_of_a_mask_or_the_name_of_one_and_never_the_background(
    option, label, pair, tmp_path
):
    image, mask = pair
    names = {0: "air", 1: "part", 2: "part"}
    options = {"organ": label} if option == "organ" else {"lymph_nodes": [label]}
    report = volseg.measure(
        image=image, mask=mask, out=tmp_path / "out", label_names=names, **options
    )
    assert report.failed["scan"].startswith("E_LABELS: ") and len(report.failed["scan"]) < 500


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"liver": 1.7, "spleen": 2}', "1.7"),
        ('{"liver": true}', "true"),
        ('{"liver": null}', "null"),
        ('{"liver": 1, "spleen": 1}', "1 is both 'liver' and 'spleen'"),
        ('{"1": "liver", "01": "spleen"}', "1 is both 'liver' and 'spleen'"),
        ('{"1": "liver", "1": "spleen"}', "'1' appears twice"),
        ('{"liver": 1, "liver": 2}', "'liver' appears twice"),
        ('{"1": 2}', "2"),
        ('{"1": ["liver"]}', "liver"),
        ('{"liver": "9999999999999"}', "9999999999999"),
        ('{"%s": "liver"}' % ("9" * 5000), "999"),
        ('{"liver": -1}', "-1"),
        ('["liver"]', "not a list of label names"),
        ("label,name\n1,liver\n1,spleen\n", "1 is both 'liver' and 'spleen'"),
        ("label,name\n1.0,liver\n", "1.0"),
        ("label,name\n1_0,liver\n", "1_0"),
        ("label,name\n%s,liver\n" % ("9" * 5000), "999"),
    ],
)  # fmt: skip
def test_label_names_without_whole_numbers_or_with_a_value_twice_are_refused(
    content, problem, tmp_path
):
    path = tmp_path / ("names.json" if content[0] in "{[" else "names.csv")
    path.write_text(content)
    message = re.escape(f"{path}: is not a list of label names")
    with pytest.raises(VolsegError, match=message) as refusal:
        read_label_names(path)
    assert refusal.value.code == "E_LABELS" and problem in refusal.value.problem
    assert len(refusal.value.problem) < 300 + len(str(path))


@pytest.mark.parametrize("content", ['{"liver": 1.0}', "label,name\n1,liver\n1,liver\n"])
def test_a_whole_float_or_a_repeated_line_gives_one_name(content, tmp_path):
    path = tmp_path / ("names.json" if content[0] == "{" else "names.csv")
    path.write_text(content)
    assert read_label_names(path) == {1: "liver"}
