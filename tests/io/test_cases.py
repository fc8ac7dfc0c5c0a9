"""Every layout of a data set gives the same cases, and all mistakes are reported at once."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from volseg.errors import VolsegError
from volseg.io.cases import ID_PATTERN, Case
from volseg.io.formats import stem_of
from volseg.io.layouts import find_cases, find_scans, survey_cases

DATA = Path(__file__).parents[2].parent / "shared/data"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def table(folder: Path, text: str, name: str = "cases.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def problem_of(call, *args) -> str:
    with pytest.raises(VolsegError) as caught:
        call(*args)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value.problem


# ---- CSV

ROWS = (
    "subject,image,label,split,patient,malignancy\n"
    "a,a.nii.gz,a_mask.nii.gz,train,P1,5\nb,b.nii.gz,,val,P2,\n"
)
CASES = [
    ("a", "a.nii.gz", "a_mask.nii.gz", "train", "P1", {"malignancy": "5"}),
    ("b", "b.nii.gz", None, "val", "P2", {"malignancy": ""}),
]


@pytest.mark.parametrize(
    "text, encoding",
    [
        (ROWS, "utf-8"),
        (ROWS, "utf-8-sig"),  # as Excel saves it
        (ROWS.replace("\n", "\r\n"), "utf-8"),
        (ROWS.replace("\n", "\r"), "utf-8"),
        (ROWS.replace(",", ";"), "utf-8"),
        (ROWS.replace(",", "\t"), "utf-8"),
        (ROWS.replace("\n", "\n,,,,,\n\n"), "utf-8"),
        (ROWS.replace(",", " , "), "utf-8"),
        (ROWS.replace("a.nii.gz", '"a.nii.gz"'), "utf-8"),
    ],
    ids=["plain", "bom", "crlf", "cr", "semicolon", "tab", "blank_lines", "spaces", "quotes"],
)
def test_csv_dialects(text, encoding, tmp_path):
    touch(tmp_path, "a.nii.gz", "a_mask.nii.gz", "b.nii.gz")
    path = table(tmp_path, text, encoding=encoding)
    expected = [
        Case(id, {"image": tmp_path / image}, label and tmp_path / label, split, patient, classes)
        for id, image, label, split, patient, classes in CASES
    ]
    assert find_cases(path) == expected
    assert find_cases(tmp_path) == expected
    assert find_scans([path]) == find_scans([tmp_path]) == expected


def test_id_defaults_to_the_name_of_the_first_channel(tmp_path):
    touch(tmp_path, "x/scan 7.nii.gz", "x/scan 7 t2.nii.gz")
    table(tmp_path, "image_t1,image_t2\nx/scan 7.nii.gz,x/scan 7 t2.nii.gz\n")
    (case,) = find_cases(tmp_path, ["t1", "t2"])
    assert case == Case(
        "scan 7", {"t1": tmp_path / "x/scan 7.nii.gz", "t2": tmp_path / "x/scan 7 t2.nii.gz"}
    )


def test_channels(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    both = table(tmp_path, "image_t1,image_t2\na.nii,b.nii\n", "both.csv")
    single = table(tmp_path, "image\na.nii\n", "one.csv")
    named = table(tmp_path, "image_ct\na.nii\n", "named.csv")
    a, b = tmp_path / "a.nii", tmp_path / "b.nii"
    assert find_cases(both, ["t2"])[0].images == {"t2": b}
    assert list(find_cases(both, ["T2", "t1"])[0].images.items()) == [("T2", b), ("t1", a)]
    assert find_cases(single, ["ct"])[0].images == {"ct": a}  # a single channel of any name
    assert find_cases(named)[0].images == {"image": a}
    assert problem_of(find_cases, named, ["t1"]).endswith("has no channel 't1'; it has 'ct'")
    assert problem_of(find_cases, both).endswith("has no channel 'image'; it has 't1', 't2'")
    assert problem_of(find_cases, single, ["t1", "flair"]).endswith(
        "has no channel 't1', 'flair'; it has 'image'"
    )
    assert problem_of(find_scans, [a], ["t1", "flair"]).endswith(
        "has no channel 't1', 'flair'; it has 'image'"
    )


@pytest.mark.parametrize(
    "text, encoding, words",
    [
        ("", "utf-8", "is empty"),
        ("image\n", "utf-8", "no scans found"),
        (
            "picture,label\na.nii,b.nii\n",
            "utf-8",
            "no column 'image'; its columns are 'picture', 'label'",
        ),
        ("image,label,image\na.nii,b.nii,c.nii\n", "utf-8", "has columns 'image' twice"),
        ("image,note\na.nii,Größe\n", "cp1252", "is not UTF-8"),
        ("image\na.nii\n", "utf-16", "is not UTF-8"),
        ('image\n"a.nii\n', "utf-8", "is not valid CSV"),
        ("image,label\na.nii\n", "utf-8", "line 2: has 1 cell under 2 columns"),
        ("image,label\na.nii,\n,a.nii\n", "utf-8", "line 3: the cell of 'image' is empty"),
        ("image\nb.nii\n", "utf-8", "line 2: file '{}/b.nii' does not exist"),
        ("image,label\na.nii,b.nii\n", "utf-8", "line 2: file '{}/b.nii' does not exist"),
        ("image\n.\n", "utf-8", "is a folder, not a file"),
        (
            "subject,image\n../../x,a.nii\n",
            "utf-8",
            "subject '../../x' is not a valid file name; '%2E.%2F..%2Fx' would be",
        ),
        (
            "subject,image\n=cmd|calc,a.nii\n",
            "utf-8",
            "subject '=cmd|calc' is not a valid file name; '%3Dcmd%7Ccalc' would be",
        ),
        ("subject,image\nJürgen/K,a.nii\n", "utf-8", "'Jürgen%2FK' would be"),
        ("image,mask,seg\na.nii,,\n", "utf-8", "'mask' and 'seg' may both be the label"),
        (
            "subject,image\nx,a.nii\nX,a.nii\n",
            "utf-8",
            "id 'X' is used for both {}/a.nii and {}/a.nii",
        ),
    ],
)
def test_mistakes_in_a_table(text, encoding, words, tmp_path):
    touch(tmp_path, "a.nii", "a.nii.gz")
    problem = problem_of(find_cases, table(tmp_path, text, encoding=encoding))
    assert words.replace("{}", str(tmp_path)) in problem


def test_splits_are_mistakes_where_they_are_used_and_a_remark_elsewhere(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    path = table(tmp_path, "image,patient,split\na.nii,P,val\nb.nii,P,test\n")
    text = "cases.csv line 3: patient 'P' is in split 'test', but in 'val' at cases.csv line 2"
    assert survey_cases(path).mistakes == [text]
    for find in (find_cases, lambda path, remark: find_scans([path], remark=remark)):
        remarks = []
        assert len(find(path, remark=remarks.append)) == 2
        assert remarks == [f"W_SPLIT: {path}: {text}; only training uses splits"]


def test_all_mistakes_are_listed_at_once_and_counted_beyond_ten(tmp_path):
    touch(tmp_path, "a.nii")
    table(tmp_path, "subject,image\n" + "".join(f"case/{n},missing{n}.nii\n" for n in range(20)))
    problem = problem_of(find_cases, tmp_path)
    assert "40 mistakes: (1) " in problem and "(10) " in problem
    assert problem.endswith("; and 30 more")
    table(tmp_path, "subject,image,label\na/b,a.nii,\nc,no.nii,no_mask.nii\nC,a.nii,\n")
    problem = problem_of(find_cases, tmp_path)
    assert "4 mistakes" in problem and "subject 'a/b'" in problem and "id 'C' is used" in problem
    assert "no.nii' does not exist" in problem and "no_mask.nii' does not" in problem


# ---- folders


def test_images_and_labels(tmp_path):
    touch(tmp_path / "images", "b.nii.gz", "a.nii", "._a.nii", "notes.txt")
    touch(tmp_path, "labels/a.nii.gz")
    assert find_cases(tmp_path) == [
        Case("a", {"image": tmp_path / "images/a.nii"}, tmp_path / "labels/a.nii.gz"),
        Case("b", {"image": tmp_path / "images/b.nii.gz"}),
    ]
    touch(tmp_path, "labels/c.nii.gz")
    words = "labels/c.nii.gz: no scan goes with this mask"
    assert words in problem_of(find_cases, tmp_path)


def test_folder_of_scans(tmp_path):
    touch(tmp_path, "a.nii", "B.NII.GZ", "p.hdr", "p.img", ".hidden.nii", "._x.nii.gz", "readme.md")
    expected = {"B": "B.NII.GZ", "a": "a.nii", "p": "p.hdr"}
    paths = [tmp_path / name for name in expected.values()]
    for cases in (find_scans([tmp_path]), find_cases(tmp_path), find_scans(paths)):
        assert {case.id: case.images["image"].name for case in cases} == expected
    assert find_scans([tmp_path], ["ct"])[0].images == {"ct": tmp_path / "B.NII.GZ"}


def test_names_become_valid_ids(tmp_path):
    names = {
        "scan 1.nii": "scan 1",
        "Jürgen (2).nii.gz": "Jürgen %282%29",
        "患者.nii": "患者",
        "_x.y.nii": "_x.y",
        "-a .nii": "%2Da%20",
        "100%.nii": "100%25",
        "हिन्दी.nii": "हिन्दी",
        "con.nii": "%63on",
    }
    touch(tmp_path, *names)
    cases = find_scans([tmp_path])
    assert {case.images["image"].name: case.id for case in cases} == names
    assert all(re.fullmatch(ID_PATTERN, case.id) for case in cases)
    assert {unquote(case.id) for case in cases} == {stem_of(Path(name)) for name in names}


def test_a_name_that_is_too_long_for_results_is_refused(tmp_path):
    touch(tmp_path, "患" * 70 + ".nii")
    assert "give a shorter one in the column subject" in problem_of(find_scans, [tmp_path])


@pytest.mark.parametrize(
    "names", [("a.nii", "a.nii.gz"), ("a.nii", "A.nii"), ("é.nii", "e\u0301.nii")]
)
def test_two_scans_with_the_same_id_are_refused_before_any_work(names, tmp_path):
    touch(tmp_path, *names)
    problem = problem_of(find_scans, [tmp_path])
    assert all(str(tmp_path / name) in problem for name in names)
    problem = problem_of(find_scans, [tmp_path / name for name in names])
    assert all(str(tmp_path / name) in problem for name in names)


def test_nothing_found(tmp_path):
    expected = f"{tmp_path}: no scans found; they end in .nii, .nii.gz"
    assert problem_of(find_scans, [tmp_path]).startswith(expected)
    assert problem_of(find_cases, tmp_path).startswith(expected)
    missing = tmp_path / "none"
    assert problem_of(find_cases, missing) == f"{missing}: does not exist"
    assert "none.nii' does not exist" in problem_of(find_scans, [tmp_path / "none.nii"])


def test_no_case_without_a_valid_id():
    for name in ("", "../x", ".x", "a/b", "a\n", "a ", "患" * 61, "x" * 129):
        with pytest.raises(ValueError):
            Case(name, {})


# ---- nnU-Net and Decathlon


def describe(folder: Path, **description) -> None:
    (folder / "dataset.json").write_text(json.dumps(description))


def test_nnunet_raw(tmp_path):
    for name in ("imagesTr/p_01", "imagesTr/p_02", "imagesTs/q", "imagesTr/._p_01"):
        touch(tmp_path, f"{name}_0000.nii.gz", f"{name}_0001.nii.gz")
    touch(tmp_path, "labelsTr/p_01.nii.gz", "labelsTr/p_02.nii.gz")
    channels = {"0": "T1", "1": "FLAIR"}
    describe(tmp_path, channel_names=channels, labels={"background": 0}, file_ending=".nii.gz")
    cases = find_cases(tmp_path, ["flair", "t1"])
    splits = [(case.id, case.split) for case in cases]
    assert splits == [("p_01", None), ("p_02", None), ("q", "test")]
    assert cases[1].images == {
        "flair": tmp_path / "imagesTr/p_02_0001.nii.gz",
        "t1": tmp_path / "imagesTr/p_02_0000.nii.gz",
    }
    assert cases[1].reference == tmp_path / "labelsTr/p_02.nii.gz"
    assert cases[2].reference is None
    assert problem_of(find_cases, tmp_path).endswith("has no channel 'image'; it has 'T1', 'FLAIR'")
    (tmp_path / "imagesTr/p_01_0001.nii.gz").unlink()
    (tmp_path / "labelsTr/p_02.nii.gz").unlink()
    problem = problem_of(find_cases, tmp_path, ["t1", "flair"])
    assert "2 mistakes" in problem and "p_01_0001" in problem and "labelsTr/p_02" in problem


def test_nnunet_of_one_channel_and_of_version_1(tmp_path):
    touch(tmp_path, "imagesTr/liver_1_0000.nii.gz", "labelsTr/liver_1.nii.gz")
    images = {"image": tmp_path / "imagesTr/liver_1_0000.nii.gz"}
    expected = [Case("liver_1", images, tmp_path / "labelsTr/liver_1.nii.gz")]
    describe(tmp_path, channel_names={"0": "CT"})
    assert find_cases(tmp_path) == expected
    pairs = [{"image": "./imagesTr/liver_1.nii.gz", "label": "./labelsTr/liver_1.nii.gz"}]
    describe(tmp_path, modality={"0": "CT"}, training=pairs)
    assert find_cases(tmp_path) == expected


@pytest.mark.parametrize("number", ["_0000", ""], ids=["nnU-Net", "Decathlon"])
def test_a_case_that_the_list_lacks_is_not_used_and_named(number, tmp_path):
    for name in ("a", "b", "c"):
        touch(tmp_path, f"imagesTr/{name}{number}.nii.gz", f"labelsTr/{name}.nii.gz")
    pairs = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in ("a", "c")
    ]
    describe(tmp_path, modality={"0": "CT"}, training=pairs)
    remarks: list[str] = []
    assert [case.id for case in find_cases(tmp_path, remark=remarks.append)] == ["a", "c"]
    assert remarks == [
        f"W_LIST: {tmp_path}: 1 case of imagesTr is not in the list of dataset.json, so it is not "
        "used: b"
    ]
    assert survey_cases(tmp_path).remarks == remarks and not survey_cases(tmp_path).mistakes
    describe(tmp_path, modality={"0": "CT"}, training=[], channel_names={"0": "CT"})
    if number:  # an empty list says nothing
        assert [case.id for case in find_cases(tmp_path)] == ["a", "b", "c"]


def test_decathlon(tmp_path):
    touch(tmp_path, "imagesTr/lung_0000.nii.gz", "imagesTs/lung_0002.nii.gz")
    touch(tmp_path, "labelsTr/lung_0000.nii.gz")
    pairs = [{"image": "./imagesTr/lung_0000.nii.gz", "label": "./labelsTr/lung_0000.nii.gz"}]
    describe(tmp_path, modality={"0": "CT"}, training=pairs, test=["./imagesTs/lung_0002.nii.gz"])
    train, test = find_cases(tmp_path, ["ct"])
    assert train.images == {"ct": tmp_path / "imagesTr/lung_0000.nii.gz"}
    assert train.reference == tmp_path / "labelsTr/lung_0000.nii.gz"
    assert (train.id, train.split, test.id, test.split) == ("lung_0000", None, "lung_0002", "test")
    (tmp_path / "imagesTr/lung_0000.nii.gz").unlink()
    assert "training[0]: file" in problem_of(find_cases, tmp_path)  # still no nnU-Net folder
    describe(tmp_path, training=[*pairs, {"image": 3}, 7, {"image": "imagesTr/no.nii.gz"}])
    problem = problem_of(find_cases, tmp_path)
    assert "4 mistakes" in problem and "no.nii.gz" in problem
    assert "training[1]" in problem and "training[2]" in problem


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"channel_names": "CT"}', '{"channel_names": {"first": "CT"}}', '{"a": 1}']
)
def test_bad_dataset_json(text, tmp_path):
    touch(tmp_path, "imagesTr/p_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(text)
    assert "dataset.json" in problem_of(find_cases, tmp_path)


@pytest.mark.parametrize(
    ("labels", "repeated"),
    [
        ({"background": 0, "liver": 1, "spleen": 1}, "1"),
        ({"0": "background", "1": "liver", "2": "liver"}, "'liver'"),
        ({"1": "liver", "01": "spleen"}, "1"),
    ],
)
def test_a_repeated_label_or_value_is_a_mistake(labels, repeated, tmp_path):
    touch(tmp_path, "imagesTr/p_0000.nii.gz", "labelsTr/p.nii.gz")
    describe(tmp_path, channel_names={"0": "CT"}, labels=labels)
    assert f"dataset.json: labels has {repeated} twice" in problem_of(find_cases, tmp_path, ["ct"])


def test_images_tr_alone_is_not_guessed(tmp_path):
    touch(tmp_path, "imagesTr/p_0000.nii.gz")
    assert "has imagesTr but no dataset.json" in problem_of(find_cases, tmp_path)


# ---- real tables


@pytest.mark.parametrize(
    "name, splits",
    [
        ("lidc_nodules/cases.csv", {"train": 601, "val": 155, "test": 97}),
        ("sts_sarcoma/cases.csv", {"train": 32, "val": 9, "test": 7}),
        ("sts_sarcoma/cases_ct.csv", {"train": 2, "val": 1, "test": 1}),
        ("sts_sarcoma/cases_pet.csv", {"train": 15, "val": 4, "test": 3}),
        ("sts_sarcoma/cases_t1.csv", {"train": 15, "val": 4, "test": 3}),
        ("msd_hippocampus/cases.csv", {"train": 160, "val": 30, "test": 30}),
        ("msd_spleen_ct/cases.csv", {"dev": 1}),
        ("totalseg_example_ct/cases.csv", {"dev": 3}),
        ("ibsi_phantoms/cases.csv", {"dev": 1}),
        ("pyradiomics_cases/cases.csv", {"dev": 1}),
        ("pneumoniamnist/cases.csv", {"official inside npz": 1}),
    ],
)
def test_real_tables(name, splits):
    if not DATA.is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    cases = find_cases(DATA / name)
    assert Counter(case.split for case in cases) == splits
    assert all(path.is_file() for case in cases for path in case.images.values())
    if name.startswith("lidc"):
        assert cases[0].classes["malignancy"] == "5"
        assert cases[0].patient == "LIDC-IDRI-0001"


def test_two_channels_of_nnunet_with_the_same_name_are_refused(tmp_path):
    touch(tmp_path, "imagesTr/p_0000.nii.gz", "imagesTr/p_0001.nii.gz", "labelsTr/p.nii.gz")
    channels = {"0": "zScore", "1": "zScore"}
    describe(tmp_path, channel_names=channels, labels={"background": 0}, file_ending=".nii.gz")
    assert "gives two channels the same name" in problem_of(find_cases, tmp_path, None)


def test_with_may_miss_a_case_may_lack_any_channel_but_the_first(tmp_path):
    touch(tmp_path, "a_t1.nii.gz", "a_flair.nii.gz", "b_t1.nii.gz", "c_flair.nii.gz")
    table = tmp_path / "cases.csv"
    table.write_text("subject,image_t1,image_flair\na,a_t1.nii.gz,a_flair.nii.gz\nb,b_t1.nii.gz,\n")
    assert "the cell of 'image_flair' is empty" in problem_of(find_cases, table, ["t1", "flair"])
    both, single = find_cases(table, ["t1", "flair"], allow_missing=True)
    assert (list(both.images), list(single.images)) == (["t1", "flair"], ["t1"])
    table.write_text("subject,image_t1,image_flair\nc,,c_flair.nii.gz\n")
    with pytest.raises(VolsegError, match="the cell of 'image_t1' is empty"):
        find_cases(table, ["t1", "flair"], allow_missing=True)
    table.write_text("subject,image_t1\na,a_t1.nii.gz\n")
    (single,) = find_cases(table, ["t1", "flair"], allow_missing=True)
    assert list(single.images) == ["t1"]


def test_channels_that_differ_only_in_case_are_read_from_their_own_files_or_refused(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    a, b = tmp_path / "a.nii", tmp_path / "b.nii"
    path = table(tmp_path, "image_T1,image_t1\na.nii,b.nii\n")
    assert find_cases(path, ["T1", "t1"])[0].images == {"T1": a, "t1": b}
    assert find_cases(path, ["T1"])[0].images == {"T1": a}
    assert find_scans([path], ["t1"])[0].images == {"t1": b}
    for channels in (None, ["T2"], ["T1", "T2"]):
        problem = problem_of(find_cases, path, channels)
        assert "channels 'T1', 't1' differ only in upper and lower case" in problem
    with pytest.raises(VolsegError, match="differ only in upper and lower case"):
        survey_cases(path)
    single = table(tmp_path, "image_t1\nb.nii\n", "one.csv")
    assert "differ only in upper and lower case" in problem_of(find_cases, single, ["T1", "t1"])
    nnunet = tmp_path / "n"
    touch(nnunet, "imagesTr/p_0000.nii.gz", "imagesTr/p_0001.nii.gz", "labelsTr/p.nii.gz")
    channels = {"0": "T1", "1": "t1"}
    describe(nnunet, channel_names=channels, labels={"background": 0}, file_ending=".nii.gz")
    assert "differ only in upper and lower case" in problem_of(find_cases, nnunet, None)
    assert find_cases(nnunet, ["t1"])[0].images["t1"].name == "p_0001.nii.gz"


def test_two_columns_of_one_channel_and_two_masks_of_one_scan_are_refused(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "d/images/a.nii", "d/labels/a.nii", "d/labels/a.nii.gz")
    problem = problem_of(find_cases, tmp_path / "d")
    path = table(tmp_path, "image,image_image\na.nii,b.nii\n")
    assert "'image' and 'image_image' for the same channel" in problem_of(find_cases, path)
    assert "d/images/a.nii: has 2 masks: " in problem and "d/labels/a.nii.gz" in problem


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.mha", "IM0001"])
def test_one_scan_is_no_dataset(name, tmp_path):
    (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(range(128, 256)))
    assert "is one scan or mask" in problem_of(find_cases, tmp_path / name)
