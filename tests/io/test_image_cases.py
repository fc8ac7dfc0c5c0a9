"""Every layout of a data set of 2D images gives the same images, and all mistakes at once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from volseg.errors import VolsegError
from volseg.io.image_cases import find_images, looks_like_images, survey_images
from volseg.io.images import read_image
from volseg.io.targets import TargetCells
from volseg.io.volumes import write_volume
from volseg.recipe.classification import Target
from volseg.volume import Geometry, Volume

DATA = Path(__file__).parents[2].parent / "shared/data"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def table(folder: Path, text: str) -> Path:
    (folder / "cases.csv").write_text(text)
    return folder / "cases.csv"


def volume(path: Path, shape=(20, 22, 5), labelled=()) -> Path:
    array = np.random.default_rng(0).integers(1, 200, shape).astype(np.uint8)
    if path.name.startswith("mask"):
        array[:] = 0
        array[3:5, 4:6, list(labelled)] = 1
    write_volume(Volume(array, Geometry(shape, np.diag([1.0, 1, 3, 1]))), path)
    return path


def summary(survey) -> list[tuple]:
    return sorted((case.path.name, case.split, case.cells.get("class")) for case in survey.cases)


# ---- layouts

CONTENT = [
    ("a.png", "train", "benign"),
    ("b.png", "train", "malignant"),
    ("c.png", "val", "benign"),
    ("d.png", "test", "malignant"),
]
LAYOUTS = {
    "split/class": "{split}/{name}/{file}",
    "class/split": "{name}/{split}/{file}",
    "wrapped": "chest_xray/{split}/{name}/{file}",
    "other words": "{word}/{name}/{file}",
}
WORDS = {"train": "Training", "val": "valid", "test": "ts"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_give_the_class_and_the_split(layout, tmp_path):
    for file, split, name in CONTENT:
        words = {"file": file, "split": split, "name": name, "word": WORDS[split]}
        touch(tmp_path, LAYOUTS[layout].format(**words))
    assert looks_like_images(tmp_path)
    survey = survey_images(tmp_path, target="class")
    assert summary(survey) == CONTENT
    assert (survey.mistakes, survey.unlabelled) == ([], [])
    assert survey.remarks[0].startswith("N_FOLDERS: ")
    assert "benign (2), malignant (2)" in survey.remarks[0]
    assert [(c.name, c.kind) for c in survey.target_columns] == [("class", "classes")]


def test_a_table_gives_the_same_images(tmp_path):
    lines = [f"{file},{split},{name}" for file, split, name in CONTENT]
    touch(tmp_path, *(file for file, _, _ in CONTENT))
    path = table(tmp_path, "Filename,set,class\n" + "\n".join(lines))
    for dataset in (path, tmp_path):
        assert looks_like_images(dataset)
        survey = survey_images(dataset, target="class")
        assert summary(survey) == CONTENT
        assert [case.id for case in survey.cases] == ["a", "b", "c", "d"]


def test_folders_without_a_split_have_none_and_flat_ones_no_class(tmp_path):
    touch(tmp_path / "x", "benign/1.png", "benign/2.png", "malignant/1.jpg", "malignant/3.JPG")
    survey = survey_images(tmp_path / "x")
    assert {case.split for case in survey.cases} == {None}
    assert [case.id for case in survey.cases] == [
        *("benign_1", "benign_2", "malignant_1", "malignant_3")
    ]
    (column,) = survey.target_columns
    expected = ("class", "classes", ("benign", "malignant"), 0)
    assert (column.name, column.kind, column.values, column.n_empty) == expected
    touch(tmp_path / "y", "1.png", "2.bmp", ".hidden.png", "notes.txt")
    survey = survey_images(tmp_path / "y")
    assert [case.id for case in survey.cases] == ["1", "2"]
    assert survey.target_columns == [] and survey.cases[0].cells == {}
    with pytest.raises(VolsegError, match="put images of each class into a folder") as caught:
        survey_images(tmp_path / "y", target="class")
    assert caught.value.code == "E_TARGET"


def test_images_beside_the_folders_of_classes_have_an_empty_class(tmp_path):
    touch(tmp_path, "benign/1.png", "benign/2.png", "malignant/3.png", "malignant/4.png", "5.png")
    survey = survey_images(tmp_path, target="class")
    assert survey.unlabelled == [f"{tmp_path / '5.png'}: the cell of 'class' is empty"]
    assert len(survey.cases) == 5


def test_a_mask_beside_its_image_is_no_image(tmp_path):
    names = ["benign (1).png", "benign (1)_mask.png", "benign (1)_mask_1.png", "lone_mask.png"]
    touch(tmp_path, *(f"benign/{name}" for name in names))
    survey = survey_images(tmp_path)
    assert [case.path.name for case in survey.cases] == ["benign (1).png", "lone_mask.png"]
    assert survey.cases[0].mask == tmp_path / "benign" / "benign (1)_mask.png"
    assert survey.remarks[0].startswith("N_MASKS: ") and "2 files" in survey.remarks[0]


def test_names_that_repeat_are_told_apart_by_folders_then_suffixes(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "b/1.jpg")
    ids = [case.id for case in survey_images(tmp_path).cases]
    assert ids == ["a_1.png", "b_1.jpg", "b_1.png"]


# ---- tables


def test_other_columns_are_cells_and_those_that_could_be_the_target_are_listed(tmp_path):
    touch(tmp_path, *(f"{n}.png" for n in range(12)))
    heads = "image,subject,patient,split,label,age,grade,remark,site,slice"
    rows = [f"{n}.png,s{n},p{n},train,{n % 2},{40 + n}.5,{n % 3},r{n},A,{n}" for n in range(11)]
    table(tmp_path, "\n".join([heads, *rows, "11.png,s11,p11,val,,,,,,"]))
    survey = survey_images(tmp_path, target="grade")
    first = survey.cases[0]
    assert (first.id, first.patient, first.split, first.index) == ("s0", "p0", "train", None)
    assert first.cells == {
        **{"label": "0", "age": "40.5", "grade": "0", "remark": "r0", "site": "A"},
        **{"slice": "0"},
    }
    columns = [(c.name, c.kind, c.n_values, c.n_empty) for c in survey.target_columns]
    assert columns == [
        ("label", "classes", 2, 1),
        ("age", "number", 11, 1),
        ("grade", "classes", 3, 1),
    ]
    assert survey.unlabelled == ["cases.csv line 13: the cell of 'grade' is empty"]
    with pytest.raises(VolsegError, match="did you mean 'grade'") as caught:
        survey_images(tmp_path, target="grad")
    assert caught.value.code == "E_TARGET"


def test_every_mistake_of_a_table_is_named_with_its_line(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        "a.png,P1,train,x",
        "b.png,P1,val,x",
        "lost.png,P2,train,x",
        ",P2,train,x",
        "a.png,P3,train,x",
        "c.png,P4,holdout,x",
        "c.png,P4",
    ]
    table(tmp_path, "\n".join(["image,patient,split,class", *rows]))
    mistakes = survey_images(tmp_path).mistakes
    assert len(mistakes) == 6
    for line, text in [
        (3, "patient 'P1' is in split 'val', but in 'train' at cases.csv line 2"),
        (4, "does not exist"),
        (5, "the cell of 'image' is empty"),
        (6, "id 'a' is also that of cases.csv line 2"),
        (7, "split 'holdout' is unknown"),
        (8, "has 2 cells under 4 columns"),
    ]:
        assert any(f"line {line}: " in mistake and text in mistake for mistake in mistakes), line


def test_a_row_without_an_image_leaves_a_table_of_images(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.jpg")
    table(tmp_path, "image,label\na.png,x\nb.png,y\nc.jpg,x\nno_suffix,y\nscan.nii.gz,y")
    assert looks_like_images(tmp_path)
    survey = survey_images(tmp_path, target="label")
    assert [case.id for case in survey.cases] == ["a", "b", "c"]
    assert len(survey.mistakes) == 2 and all("line" in text for text in survey.mistakes)


def test_other_files_are_no_images(tmp_path):
    touch(tmp_path, "a.gif", "b/a.gif")
    with pytest.raises(VolsegError, match=r"a\.gif: is not an image; images end in \.png") as error:
        find_images([tmp_path / "a.gif"])
    assert error.value.fix == "convert it to PNG"
    with pytest.raises(VolsegError, match=r"no images found; they end in \.png.* volumes in \.nii"):
        find_images([tmp_path / "b"])


def test_a_data_set_without_images_is_not_said_to_lack_a_column(tmp_path):
    with pytest.raises(VolsegError, match="no images found"):
        survey_images(tmp_path, target="class")


def test_names_that_differ_in_case_are_to_be_renamed(tmp_path):
    touch(tmp_path, "x/1.png", "x/1.PNG")
    (mistake,) = survey_images(tmp_path).mistakes
    assert "1.png" in mistake and "1.PNG" in mistake and "rename one" in mistake


def test_a_patient_in_two_splits_is_one_mistake_however_many_slices_it_has(tmp_path):
    touch(tmp_path, *(f"{n}.png" for n in range(10)))
    rows = [f"{n}.png,P1,{'train' if n < 5 else 'test'}" for n in range(10)]
    table(tmp_path, "\n".join(["image,patient,split", *rows]))
    assert len(survey_images(tmp_path).mistakes) == 1


# ---- slices of volumes


def test_a_row_per_slice_names_it_and_keeps_its_patient(tmp_path):
    volume(tmp_path / "ct1.nii.gz")
    volume(tmp_path / "ct2.nii.gz")
    rows = [f"ct1.nii.gz,{k},{k % 2}" for k in range(5)] + ["ct2.nii.gz,4,1", "ct2.nii.gz,5,0"]
    table(tmp_path, "\n".join(["image,slice,bleeding", *rows]))
    assert looks_like_images(tmp_path)
    survey = survey_images(tmp_path, target="bleeding")
    assert [(case.id, case.index, case.patient) for case in survey.cases[4:]] == [
        ("ct1_s004", 4, "ct1"),
        ("ct2_s004", 4, "ct2"),
    ]
    assert survey.mistakes == [
        "cases.csv line 8: slice '5' is not a whole number from 0 to 4",
    ]


def test_rows_of_an_array_and_pages_are_named_like_slices(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=np.zeros((3, 8, 8), np.uint8))
    pages = [Image.new("L", (9, 9), n) for n in range(2)]
    pages[0].save(tmp_path / "y.tif", save_all=True, append_images=pages[1:])
    Image.new("L", (9, 9)).save(tmp_path / "z.tif")
    rows = ["x.npz,2", "x.npz,0", "x.npz,3", "y.tif,1", "y.tif,0", "z.tif,", "z.tif,one"]
    table(tmp_path, "\n".join(["image,slice_number", *rows]))
    assert looks_like_images(tmp_path)
    survey = survey_images(tmp_path)
    assert [(case.id, case.index) for case in survey.cases] == [
        *(("x_s002", 2), ("x_s000", 0), ("y_s001", 1), ("y_s000", 0), ("z", None))
    ]
    assert [mistake.partition(": ")[0] for mistake in survey.mistakes] == [
        *("cases.csv line 4", "cases.csv line 8")
    ]
    assert [read_image(case.path, case.index).array.max() for case in survey.cases[2:4]] == [1, 0]


def test_masks_say_which_slices_hold_a_label(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, labelled in (("x", [1, 2]), ("y", [])):
        volume(tmp_path / "images" / f"{name}.nii.gz")
        mask = volume(tmp_path / "labels" / "mask.nii.gz", labelled=labelled)
        mask.rename(tmp_path / "labels" / f"{name}.nii.gz")
    assert not looks_like_images(tmp_path)
    survey = survey_images(tmp_path)
    assert [(column.name, column.kind) for column in survey.target_columns] == [("label", "mask")]
    survey = survey_images(tmp_path, target="label")
    labelled = {case.id for case in survey.cases if case.cells["label"] == "with label"}
    assert labelled == {"x_s001", "x_s002"}
    assert len(survey.cases) == 10 and survey.mistakes == []
    assert {case.patient for case in survey.cases} == {"x", "y"}
    volume(tmp_path / "labels" / "mask.nii.gz", (20, 22, 6), [0])
    (tmp_path / "labels" / "mask.nii.gz").rename(tmp_path / "labels" / "y.nii.gz")
    survey = survey_images(tmp_path, target="label")
    assert len(survey.cases) == 5
    assert "is not on the grid of y.nii.gz" in survey.mistakes[0] and len(survey.mistakes) == 1


# ---- MedMNIST


@pytest.mark.parametrize("n_labels", [1, 3])
def test_a_medmnist_file_states_splits_and_labels(n_labels, tmp_path):
    rng = np.random.default_rng(0)
    content = {}
    for split, n in (("train", 6), ("val", 4), ("test", 5)):
        content[f"{split}_images"] = rng.integers(0, 255, (n, 8, 8), np.uint8)
        content[f"{split}_labels"] = rng.integers(0, 2, (n, n_labels))
    np.savez(tmp_path / "x.npz", **content)
    names = ["label"] if n_labels == 1 else ["label", "label_0", "label_1", "label_2"]
    table(tmp_path, "image,patient,note\nx.npz,all,made")  # as of one scan: adds nothing
    for dataset in (tmp_path / "x.npz", tmp_path):
        assert looks_like_images(dataset)
        survey = survey_images(dataset, target=names[0])
        assert Counter(case.split for case in survey.cases) == {"train": 6, "val": 4, "test": 5}
        assert [case.index for case in survey.cases] == list(range(15))
        case = survey.cases[7]
        expected = content["val_labels"][1]
        assert case.id == "val_1"
        cells = dict(zip(names[-n_labels:], map(str, expected)))
        if n_labels > 1:
            cells["label"] = "|".join(f"{k}" for k in range(3) if expected[k]) or "|"
        assert case.cells == cells
    content["val_labels"] = content["val_labels"][:2]
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(VolsegError, match="give 4 rows of whole numbers") as caught:
        survey_images(tmp_path / "x.npz")
    assert caught.value.code == "E_LABELS"


def test_columns_of_flags_are_several_labels_at_once(tmp_path):
    flags = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]])
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=flags)
    survey = survey_images(tmp_path / "x.npz")
    assert survey.likely_target == "label"
    (column,) = (column for column in survey.target_columns if column.name == "label")
    assert (column.kind, column.values, column.n_empty) == ("labels", ("0", "1", "2"), 0)
    cells = {case.id: case.cells["label"] for case in survey.cases}
    data = TargetCells("label", cells).describe(Target(target="label"))
    values, mistakes = TargetCells("label", cells).values(data)
    assert data.kind == "labels" and not mistakes
    assert [values[f"train_{row}"] for row in range(6)] == [
        tuple(np.flatnonzero(row).tolist()) for row in flags
    ]
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=2 * flags)  # grades, no flags
    assert survey_images(tmp_path / "x.npz").likely_target is None


def test_pictures_of_a_format_that_is_not_read_are_named(tmp_path):
    touch(tmp_path, "a/1.png", "a/2.GIF", "b/3.png", "b/4.webp", "b/notes.txt")
    survey = survey_images(tmp_path)
    assert [case.path.name for case in survey.cases] == ["1.png", "3.png"]
    (remark,) = (text for text in survey.remarks if text.startswith("W_FORMAT: "))
    assert f"left out 2 pictures of a format that is not read, first {Path('a/2.GIF')}" in remark


# ---- images to classify


def test_files_volumes_and_data_sets_are_found_together(tmp_path):
    touch(tmp_path, "lone.png", "set/a/1.png", "set/b/2.png")
    volume(tmp_path / "ct.nii.gz")
    remarks = []
    cases = find_images(
        [tmp_path / "lone.png", tmp_path / "ct.nii.gz", tmp_path / "set"], remark=remarks.append
    )
    assert [case.id for case in cases] == ["lone", *(f"ct_s00{k}" for k in range(5)), "1", "2"]
    assert len(remarks) == 1 and remarks[0].startswith("N_FOLDERS: ")
    with pytest.raises(VolsegError, match=r"\(1\) .*lost.png.* does not exist; \(2\) .*also that"):
        find_images([tmp_path / "lost.png", tmp_path / "lone.png", tmp_path / "lone.png"])


# ---- which kind of data set


def test_data_sets_of_scans_are_no_images(tmp_path):
    assert not looks_like_images(tmp_path)
    assert not looks_like_images(tmp_path / "missing")
    touch(tmp_path / "a", "x.nii.gz", "preview.png")
    assert not looks_like_images(tmp_path / "a")
    touch(tmp_path / "b", "x.nii.gz")
    table(tmp_path / "b", "image,label\nx.nii.gz,m.nii.gz")
    assert not looks_like_images(tmp_path / "b")
    (tmp_path / "b" / "cases.csv").write_bytes(b"\xff\xfe")
    assert not looks_like_images(tmp_path / "b")


KINDS = {
    **dict.fromkeys(["busi_ultrasound", "ct_ich_slices", "oasis1_midslices"], True),
    **dict.fromkeys(["pneumoniamnist"], True),
    **dict.fromkeys(["lgg_mri_flair", "lidc_nodules", "msd_hippocampus", "sts_sarcoma"], False),
}


@pytest.mark.parametrize("name", KINDS)
def test_real_data_sets_are_told_apart_and_listed_in_full(name):
    if not (DATA / name).is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    assert looks_like_images(DATA / name) == KINDS[name]
    survey = survey_images(DATA / name)
    assert survey.cases and survey.target_columns and survey.mistakes == []
    assert len({case.id for case in survey.cases}) == len(survey.cases)
