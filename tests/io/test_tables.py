"""Tables that people type are read by the heads they use; what is not used is named."""

from __future__ import annotations

import pytest

from volseg.commands.patients import HEADS
from volseg.errors import VolsegError
from volseg.io.cases import COLUMNS, split_of
from volseg.io.label_names import read_label_names
from volseg.io.layouts import find_cases, survey_cases
from volseg.io.tables import read_table


def table(folder, text, name="cases.csv"):
    (folder / name).write_bytes(text.encode())
    for case in "ab":
        for part in (".nii", "_m.nii"):
            (folder / f"{case}{part}").write_bytes(b"")
    return folder / name


@pytest.mark.parametrize("column", COLUMNS)
def test_every_usual_head_stands_for_its_column(column, tmp_path):
    cells = {"image": "a.nii", "label": "a_m.nii", "subject": "s", "patient": "p", "split": "train"}
    for head in (column, *COLUMNS[column]):
        for text in (
            head,
            head.upper(),
            head.replace("_", " ").title(),
            head.title().replace("_", ""),
        ):
            heads = {name: text if name == column else name for name in cells}
            lines = [",".join(heads.values()), ",".join(cells.values())]
            (case,) = find_cases(table(tmp_path, "\n".join(lines)))
            assert (case.id, case.patient, case.split) == ("s", "p", "train"), text
            assert case.reference == tmp_path / "a_m.nii" and not case.classes


@pytest.mark.parametrize(
    "head", ["pateint", "Patient Nr", "patients_id", "lable", "splitt", "subjct"]
)
def test_a_head_close_to_a_known_one_is_named_when_it_is_not_used(head, tmp_path):
    survey = survey_cases(table(tmp_path, f"image,{head}\na.nii,x\n"))
    (remark,) = survey.remarks
    assert f"column {head!r} is not used; did you mean " in remark


def test_other_columns_are_no_remark(tmp_path):
    survey = survey_cases(table(tmp_path, "image,malignancy,age,notes,why\na.nii,5,61,,x\n"))
    assert survey.remarks == [] and survey.mistakes == []
    assert survey.cases[0].classes == {"malignancy": "5", "age": "61", "notes": ""}


@pytest.mark.parametrize("head", ["image_pet", "Image_Pat"])  # resembles image_path
def test_a_channel_is_used(head, tmp_path):
    survey = survey_cases(table(tmp_path, f"{head}\na.nii\n"))
    assert [list(case.images) for case in survey.cases] == [[head[6:]]]
    assert survey.remarks == []


def test_a_head_in_other_words_is_said(tmp_path):
    survey = survey_cases(table(tmp_path, "scan,PatientID\na.nii,P\n"))
    assert all(text.startswith("N_HEAD: ") for text in survey.remarks)
    assert [text.split(": ")[2] for text in survey.remarks] == [
        "column 'scan' is read as 'image'",
        "column 'PatientID' is read as 'patient'",
    ]


def test_the_exact_head_wins_and_two_others_are_refused(tmp_path):
    (case,) = find_cases(table(tmp_path, "image,label,mask\na.nii,a_m.nii,b_m.nii\n"))
    assert case.reference == tmp_path / "a_m.nii"
    with pytest.raises(VolsegError, match="columns 'mask' and 'seg' may both be the label"):
        find_cases(table(tmp_path, "image,mask,seg\na.nii,a_m.nii,b_m.nii\n"))


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nimage;label\na.nii;a_m.nii\n",
        "sep=,\r\nimage,label\r\na.nii,a_m.nii\r\n",
        "\ufeffimage\tlabel\na.nii\ta_m.nii\n",
        "image;label;;\na.nii;a_m.nii;;\n",
        "image,label,\na.nii,a_m.nii\n",
        "image,label\n.\\a.nii,.\\a_m.nii\n",
    ],
)
def test_what_spreadsheets_write_is_read(text, tmp_path):
    (case,) = find_cases(table(tmp_path, text))
    assert case.images["image"].resolve() == tmp_path / "a.nii"
    assert case.reference is not None and case.reference.resolve() == tmp_path / "a_m.nii"


def test_cells_without_a_head_are_a_mistake(tmp_path):
    with pytest.raises(VolsegError, match="column 3 has cells but no name"):
        find_cases(table(tmp_path, "image,label,\na.nii,a_m.nii,x\n"))
    with pytest.raises(VolsegError, match="line 2: has 3 cells under 2 columns"):
        find_cases(table(tmp_path, "image,label\na.nii,a_m.nii,x\n"))


def test_lines_are_counted_from_the_first_also_below_a_separator(tmp_path):
    with pytest.raises(VolsegError, match=r"line 3: file '[^']*x\.nii' does not exist"):
        find_cases(table(tmp_path, "sep=;\nimage;label\nx.nii;\n"))


@pytest.mark.parametrize(
    ("word", "split"),
    [("Training", "train"), ("valid", "val"), ("Val", "val"), ("TEST", "test"), ("0", None)],
)
def test_words_for_splits(word, split, tmp_path):
    assert split_of(word) == split
    survey = survey_cases(table(tmp_path, f"image,label,split\na.nii,a_m.nii,{word}\n"))
    if split is None:
        assert survey.mistakes == [
            "cases.csv line 2: split '0' is unknown: use train, val, test or leave it empty"
        ]
    else:
        assert survey.cases[0].split == split and not survey.mistakes


def test_a_row_of_the_training_split_without_a_label_is_named(tmp_path):
    text = "image,label,split\na.nii,,train\nb.nii,,test\n"
    (remark,) = survey_cases(table(tmp_path, text)).remarks
    assert "line 2 is of the training split but has no label" in remark


def test_ids_stay_text(tmp_path):
    names = ["007", "1E5", "TRUE", "nan", "NA"]
    lines = [f"{name},{'ab'[n % 2]}.nii" for n, name in enumerate(names)]
    cases = find_cases(table(tmp_path, "subject,image\n" + "\n".join(lines)))
    assert [case.id for case in cases] == names


def test_label_names_and_pairs_have_the_same_reader(tmp_path):
    path = table(tmp_path, "sep=;\nIndex;Structure\n1;spleen\n", "names.csv")
    assert read_label_names(path) == {1: "spleen"}
    path = table(tmp_path, "Patient ID\tBefore\tFollow-up\nP\ta\tb\n", "pairs.csv")
    assert read_table(path, HEADS).columns == ["patient", "baseline", "followup"]
