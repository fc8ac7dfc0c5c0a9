"""Commands on masks in DICOM give what they give on the same masks in NIfTI."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_files import NAME, Series, oblique_volume, write_series
from dicom_mask_files import Roi, Seg, contour_on, refer_to, write_rtstruct, write_seg
from pydicom import dcmread

import volseg
from volseg.commands.automatic_recipe import auto_recipe
from volseg.commands.training_cases import read_training_case
from volseg.errors import ScanError, VolsegError
from volseg.io.layouts import find_cases
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Volume

FRAME = "1.2.826.0.1.3680043.8.498.12345678901"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_of(row: dict[str, str]) -> dict[str, str]:
    volatile = ("case_id", "image", "seconds", "warnings", "label_name", "notes")
    return {name: cell for name, cell in row.items() if name not in volatile}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A series, with one mask as contours, as a segmentation and in NIfTI."""
    folder = tmp_path_factory.mktemp("study")

    def framed(header, index):
        header.FrameOfReferenceUID = FRAME

    write_series(oblique_volume((30, 26, 7)), folder / "ct", Series(edit=framed))
    scan = read_volume(folder / "ct")
    ring = 8 * np.array([(np.cos(a), np.sin(a)) for a in np.linspace(0, 6, 25)])
    rois = [
        Roi(number=4, contours=[contour_on(scan.geometry, ring + 11, k) for k in (2, 3)]),
        Roi(number=9, name="node", contours=[contour_on(scan.geometry, ring / 2 + 20, 5)]),
    ]  # fmt: skip
    contours = write_rtstruct(rois, folder / "rt" / "RS.dcm", frame=FRAME)
    mask = read_mask(contours, like=folder / "ct")
    names = {4: "GTV", 9: "node"}
    write_seg(mask, folder / "seg" / "S.dcm", Seg(names=names, seed=2))
    write_volume(mask, folder / "mask.nii.gz", like=folder / "ct")
    return folder


MASKS = ("rt", "rt/RS.dcm", "rt/RS.dcm#GTV,node", "seg", "seg/S.dcm")


@pytest.mark.parametrize("name", MASKS)
def test_measure_equals_that_of_the_mask_in_nifti(name, study, tmp_path):
    volseg.measure(image=study / "ct", mask=study / "mask.nii.gz", out=tmp_path / "nifti")
    report = volseg.measure(image=study / "ct", mask=study / name, out=tmp_path / "dicom")
    assert report.exit_code == 0
    one, other = (rows(tmp_path / kind / "lesions.csv") for kind in ("dicom", "nifti"))
    assert one and list(map(numbers_of, one)) == list(map(numbers_of, other))
    assert [row["label_name"] for row in one] == ["GTV", "node"]
    again = volseg.measure(image=study / "ct", mask=study / name, out=tmp_path / "dicom")
    assert not again.done and len(again.kept) == 1


def test_one_region_alone_can_be_measured(study, tmp_path):
    mask = study / "rt" / "RS.dcm#node"
    volseg.measure(image=study / "ct", mask=mask, out=tmp_path)
    assert [row["label_name"] for row in rows(tmp_path / "lesions.csv")] == ["node"]
    with pytest.raises(VolsegError, match="does not exist"):
        volseg.measure(image=study / "ct", mask=study / "rt" / "none.dcm#node", out=tmp_path)


def test_measure_in_memory_takes_the_files_too(study):
    for name in MASKS[:4]:
        for image in (study / "ct", read_volume(study / "ct")):
            result = volseg.measure_mask(image, study / name)
            assert list(result.lesions["label_name"]) == ["GTV", "node"]


def table(study: Path, path: Path, *masks: str) -> Path:
    lines = [f"case_{n},{study / 'ct'},{study / mask}" for n, mask in enumerate(masks)]
    path.write_text("\n".join(["subject,image,label", *lines]) + "\n")
    return path


def test_evaluate_takes_them_in_a_table_and_names_their_labels(study, tmp_path):
    names = ("rt/RS.dcm", "seg/S.dcm", "mask.nii.gz")
    reference = table(study, tmp_path / "reference.csv", *names)
    predicted = table(study, tmp_path / "predicted.csv", *("mask.nii.gz",) * 3)
    report = volseg.evaluate(reference=reference, predicted=predicted, out=tmp_path / "out")
    assert report.exit_code == 0
    lines = rows(tmp_path / "out" / "evaluation.csv")
    assert len(lines) == 6 and {row["dice"] for row in lines} == {"1"}
    assert [row["label_name"] for row in lines[:4]] == ["GTV", "node"] * 2


def test_a_pair_that_fails_does_not_name_the_folder_of_its_patient(study, tmp_path):
    folder = shutil.copytree(study / "ct", tmp_path / NAME / "ct")
    shutil.copytree(study / "rt", tmp_path / NAME / "rt")
    other = oblique_volume(seed=9)
    write_volume(other.with_array((other.array > 0).astype(np.uint8)), tmp_path / "other.nii.gz")
    table = tmp_path / "reference.csv"
    table.write_text(f"image,label,subject\n{folder},{folder.parent / 'rt'},a\n")
    (tmp_path / "predicted.csv").write_text("image,label,subject\nother.nii.gz,other.nii.gz,a\n")
    volseg.evaluate(reference=table, predicted=tmp_path / "predicted.csv", out=tmp_path / "out")
    (row,) = rows(tmp_path / "out" / "evaluation.csv")
    assert row["status"] == "failed" and row["reason"].startswith("E_PAIR: the prediction")
    assert NAME not in row["reason"] and "the reference" in row["reason"]


def test_evaluate_takes_a_folder_of_segmentations(study, tmp_path):
    for place in ("seg", "nifti"):
        (tmp_path / place).mkdir()
    shutil.copy(study / "seg" / "S.dcm", tmp_path / "seg" / "p1.dcm")
    mask = read_mask(study / "mask.nii.gz")
    smaller = mask.array.copy()
    smaller[np.nonzero(smaller == 4)[0][0]] = 0  # a slab of the first region
    write_volume(mask.with_array(smaller), tmp_path / "nifti" / "p1.nii.gz")
    dice = {}
    for one, other in (("seg", "nifti"), ("nifti", "seg")):
        places = {"reference": tmp_path / one, "predicted": tmp_path / other}
        report = volseg.evaluate(**places, out=tmp_path / f"of_{one}")
        assert report.exit_code == 0
        lines = rows(tmp_path / f"of_{one}" / "evaluation.csv")
        assert [row["case_id"] for row in lines] == ["p1", "p1"]
        dice[one] = [float(row["dice"]) for row in lines]
    both, sizes = (
        ((mask.array == 4) & (smaller == 4)).sum(),
        [(m == 4).sum() for m in (mask.array, smaller)],
    )
    assert dice["seg"] == dice["nifti"] == [pytest.approx(2 * both / sum(sizes), abs=1e-6), 1]
    shutil.copy(study / "seg" / "S.dcm", tmp_path / "seg" / "p1.dicom")
    with pytest.raises(VolsegError, match="p1"):
        volseg.evaluate(**places, out=tmp_path / "twice")


def test_check_reads_them_with_their_scans(study, tmp_path):
    sound = table(study, tmp_path / "sound.csv", "rt", "seg/S.dcm")
    assert not [problem for problem in volseg.check(sound) if problem["code"][0] != "N"]
    scan = read_volume(study / "ct")
    square = np.array([(2, 2), (9, 2), (9, 9), (2, 9)]) + 0.3
    contours = [contour_on(scan.geometry, square, k) for k in (1, 4)]
    write_rtstruct([Roi(number=1, contours=contours)], tmp_path / "sparse.dcm")
    write_rtstruct([Roi(number=1, contours=contours)], tmp_path / "other.dcm", frame="1.2.3")
    faulty = table(study, tmp_path / "faulty.csv", *map(str, tmp_path.glob("*.dcm")))
    codes = sorted(problem["code"] for problem in volseg.check(faulty))
    assert codes == ["E_PAIR", "W_SPARSE"]


def test_training_goes_by_the_names_of_regions_and_not_by_their_numbers(study, tmp_path):
    mask = read_mask(study / "seg" / "S.dcm")
    swapped = Volume(np.select([mask.array == 4, mask.array == 9], [9, 4]), mask.geometry)
    swapped.array.setflags(write=True)
    names = {9: "GTV", 4: "node"}
    other = Volume(swapped.array.astype(np.uint8), mask.geometry)
    write_seg(other, tmp_path / "swapped.dcm", Seg(names=names))
    cases = find_cases(table(study, tmp_path / "a.csv", "rt/RS.dcm", "seg/S.dcm"))
    recipe = auto_recipe(tmp_path / "a.csv", cases)
    assert recipe.data.labels == {"GTV": 4, "node": 9}
    masks = ("seg/S.dcm", str(tmp_path / "swapped.dcm"), "rt")
    cases = find_cases(table(study, tmp_path / "b.csv", *masks))
    recipe = auto_recipe(tmp_path / "b.csv", cases)
    assert recipe.data.labels == {"GTV": 1, "node": 2}
    read = [read_training_case(case, recipe).reference.array for case in cases]
    assert set(np.unique(read[0])) == {0, 1, 2}
    assert np.array_equal(read[0], read[1]) and np.array_equal(read[0], read[2])
    (alone,) = find_cases(table(study, tmp_path / "c.csv", "rt/RS.dcm#GTV"))
    assert set(np.unique(read_training_case(alone, recipe).reference.array)) == {0, 1}
    fewer = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"labels": {"GTV": 1}})}
    )
    with pytest.raises(ScanError, match=r"'node'.*RS\.dcm#GTV"):
        read_training_case(find_cases(table(study, tmp_path / "d.csv", "rt/RS.dcm"))[0], fewer)


def test_a_study_gives_each_series_the_mask_that_refers_to_it(study, tmp_path):
    uid = dcmread(next((study / "ct").iterdir())).SeriesInstanceUID
    for name in ("rt/RS.dcm", "seg/S.dcm"):
        folder = tmp_path / name[:2]
        shutil.copytree(study / "ct", folder / "ct")
        mask = refer_to(Path(shutil.copy(study / name, folder / "mask.dcm")), uid)
        shutil.copy(study / name, folder / "of_another_series.dcm")
        (case,) = find_cases(folder)
        assert case.reference == mask
        volseg.measure(image=folder, mask=folder, out=tmp_path / f"out_{name[:2]}")
        lesions = rows(tmp_path / f"out_{name[:2]}" / "lesions.csv")
        assert [row["label_name"] for row in lesions] == ["GTV", "node"]
        codes = [problem["code"] for problem in volseg.check(folder)]
        assert sorted(codes) == ["N_SERIES", "N_SKIPPED"]
        shutil.copy(mask, folder / "second.dcm")
        (case,) = find_cases(folder)
        assert case.reference is None
        assert "N_MASKS" in [problem["code"] for problem in volseg.check(folder)]


def test_what_is_planted_in_masks_is_in_no_result(study, tmp_path):
    for name in ("rt", "seg"):
        volseg.measure(image=study / "ct", mask=study / name, out=tmp_path / name, figures=True)
        for suffix in ("html", "md"):
            volseg.report(tmp_path / name, scan="*", format=suffix)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} >= {".csv", ".html", ".png", ".gz", ".json", ".md"}
        for path in files:
            content = path.read_bytes()
            if path.suffix == ".gz":
                import gzip

                content = gzip.decompress(content)
            for word in (NAME, "Thorax", "19611111", "20111111", FRAME, "1.2.826.0.1.3680043"):
                assert word.encode() not in content, (path, word)


@pytest.mark.parametrize(
    "name", [NAME, "GTV planted", "Boost name 2", "ptv_2011-11-11", f"{NAME.lower()}, left"]
)
def test_a_region_named_after_the_patient_has_a_number_instead(name, study, tmp_path):
    labels = read_mask(study / "seg", like=study / "ct")
    names = {4: name, 9: "Unplanted GTV"}
    seg = write_seg(labels, tmp_path / "seg.dcm", Seg(names=names))
    square = np.array([[2, 2], [6, 2], [6, 6], [2, 6.0]])
    grid = read_volume(study / "ct").geometry
    contour = [contour_on(grid, square, 2)]
    rt = write_rtstruct([Roi(number=4, contours=contour, name=name)], tmp_path / "rt.dcm")
    for mask in (seg, rt):
        out = tmp_path / mask.stem
        volseg.measure(image=study / "ct", mask=mask, out=out)
        lesions, (case,) = rows(out / "lesions.csv"), rows(out / "cases.csv")
        assert {row["label_name"] for row in lesions} <= {"region 4", "Unplanted GTV"}
        assert "region 4" in {row["label_name"] for row in lesions}
        assert "W_NAME: named after the patient or a date: region 4" in case["warnings"]
        for path in out.rglob("*"):
            assert not path.is_file() or name.encode() not in path.read_bytes(), path


def test_check_says_once_that_a_scan_with_contours_cannot_be_read(study, tmp_path):
    shutil.copytree(study / "ct", tmp_path / "ct")
    (tmp_path / "ct" / "IM0003").unlink()
    cases = tmp_path / "cases.csv"
    cases.write_text(f"image,label\n{tmp_path / 'ct'},{study / 'rt'}\n")
    assert [problem["code"] for problem in volseg.check(cases)] == ["E_GAP"]


def numbered_in_two_ways(folder: Path, mask: Volume) -> None:
    """Write two cases thrice: with GTV and node, and with node alone, which is then number 1."""
    gtv, node = mask.array == 4, mask.array == 9
    for kind, numbers in {"one": (1, 2), "other": (2, 1)}.items():
        for case, regions in {"both": (gtv, node), "node": (np.zeros_like(gtv), node)}.items():
            number = 1 if case == "node" else numbers[1]  # files number the regions that they hold
            values = np.select([regions[0], regions[1]], [numbers[0], number]).astype(np.uint8)
            names = {numbers[0]: "GTV", number: "node"} if case == "both" else {number: "node"}
            write_seg(mask.with_array(values), folder / kind / f"{case}.dcm", Seg(names=names))
            stated = np.select(list(regions), [3, 5]).astype(np.uint8)
            (folder / "nifti").mkdir(exist_ok=True)
            write_volume(mask.with_array(stated), folder / "nifti" / f"{case}.nii.gz")


def test_evaluate_goes_by_the_names_of_regions_and_not_by_their_numbers(study, tmp_path):
    numbered_in_two_ways(tmp_path, read_mask(study / "seg" / "S.dcm"))
    results = tmp_path / "results"
    shutil.copytree(tmp_path / "nifti", results / "masks")
    shutil.copytree(tmp_path / "one", results / "dicom_seg")
    names = ("case_id", "label", "label_name", "confidence_mean")
    lines = (names, ("both", 3, "GTV", ""), ("both", 5, "node", ""), ("node", 5, "node", ""))
    with (results / "lesions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    pairs = (("one", "other"), ("other", "one"), ("other", "results"))
    pairs += (("nifti", "results"), ("nifti", "results/dicom_seg"))
    for number, (reference, predicted) in enumerate(pairs):
        out = tmp_path / f"evaluation_{number}"
        volseg.evaluate(reference=tmp_path / reference, predicted=tmp_path / predicted, out=out)
        lines = rows(out / "evaluation.csv")
        dice = {(line["case_id"], line["label_name"]): line["dice"] for line in lines}
        assert dice.pop(("node", "GTV"), "") == ""  # in neither mask
        assert dice == {("both", "GTV"): "1", ("both", "node"): "1", ("node", "node"): "1"}
        # A label has one value in all cases, so means are of one label.
        assert len({(line["label"], line["label_name"]) for line in lines}) == 2
