"""Files that belong together are put together by their names, in every layout of strangers."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from volseg.errors import VolsegError
from volseg.io.layouts import find_cases, find_scans, survey_cases
from volseg.io.matching import group_files, pair_names

CHANNELS = ("t1c", "t1n", "t2f", "t2w")
LAYOUTS = {  # name → files of case n, and the id, channels and mask expected of case 1
    "brats": (
        [f"B-{{n}}-000/B-{{n}}-000-{part}.nii.gz" for part in (*CHANNELS, "seg")],
        ("B-1-000", set(CHANNELS), "B-1-000/B-1-000-seg.nii.gz"),
    ),
    "brats in one folder": (
        [f"B{{n}}_{part}.nii.gz" for part in ("T1CE", "FLAIR", "seg")],
        ("B1", {"t1ce", "flair"}, "B1_seg.nii.gz"),
    ),
    "multiple sclerosis": (
        ["training0{n}_01_flair_pp.nii", "training0{n}_01_mask1.nii"],
        ("training01_01", {"flair"}, "training01_01_mask1.nii"),
    ),
    "bids": (
        [
            *(f"sub-0{{n}}/ses-1/anat/sub-0{{n}}_ses-1_{part}.nii.gz" for part in ("T1w", "FLAIR")),
            "derivatives/manual/sub-0{n}/ses-1/anat/sub-0{n}_ses-1_label-lesion_mask.nii.gz",
            "derivatives/prep/sub-0{n}/ses-1/anat/sub-0{n}_ses-1_desc-brain_T1w.nii.gz",
        ],
        (
            "sub-01_ses-1",
            {"t1w", "flair"},
            "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_label-lesion_mask.nii.gz",
        ),
    ),
    "a folder per patient": (
        ["pat{n}/image.nii.gz", "pat{n}/mask.nii.gz"],
        ("pat1", {"image"}, "pat1/mask.nii.gz"),
    ),
    "suffixes": (
        ["P00{n}_CT.nii.gz", "P00{n}_nodule.nii.gz"],
        ("P001", {"ct"}, "P001_nodule.nii.gz"),
    ),
    "a mask beside its scan": (
        ["x{n}.nii.gz", "x{n}_seg.nii.gz"],
        ("x1", {"image"}, "x1_seg.nii.gz"),
    ),
    "images and labels": (
        ["images/x{n}_FLAIR.nii.gz", "labels/x{n}.nii.gz"],
        ("x1", {"flair"}, "labels/x1.nii.gz"),
    ),
    "unknown words": (
        ["images/x{n}_orig.nii.gz", "labels/x{n}_zebra.nii.gz"],
        ("x1", {"image"}, "labels/x1_zebra.nii.gz"),
    ),
    "numbered channels": (
        ["images/x{n}_0000.nii.gz", "images/x{n}_0001.nii.gz", "labels/x{n}.nii.gz"],
        ("x1", {"0000", "0001"}, "labels/x1.nii.gz"),
    ),
    "one numbered channel": (
        ["images/x{n}_0000.nii.gz", "labels/x{n}.nii.gz"],
        ("x1", {"0000"}, "labels/x1.nii.gz"),
    ),
    "any script": (
        ["患者{n}.nii.gz", "患者{n}_mask.nii.gz"],
        ("患者1", {"image"}, "患者1_mask.nii.gz"),
    ),
}


def write(folder: Path, patterns: list[str], n_cases: int = 3) -> Path:
    for pattern in patterns:
        for n in range(1, n_cases + 1):
            path = folder / pattern.format(n=n)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_cases", [1, 3])
def test_layouts_of_strangers_are_recognised(layout, n_cases, tmp_path):
    patterns, (case_id, channels, mask) = LAYOUTS[layout]
    if n_cases == 1 and layout in ("multiple sclerosis", "unknown words"):
        pytest.skip("one case does not show which words all share")
    survey = survey_cases(write(tmp_path, patterns, n_cases))
    assert survey.mistakes == [] and len(survey.cases) == n_cases
    case = survey.cases[0]
    assert (case.id, set(case.images)) == (case_id, channels)
    assert case.reference == tmp_path / mask
    assert len(survey.remarks) == 1 and survey.remarks[0].startswith("N_NAMES: ")
    assert len({path for case in survey.cases for path in case.images.values()}) == n_cases * len(
        channels
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_never_taken_for_scans(layout, tmp_path):
    patterns, (_, channels, _) = LAYOUTS[layout]
    requested = sorted(channels) if len(channels) > 1 else ["ct"]
    cases = find_scans([write(tmp_path, patterns)], requested)
    names = {path.name for case in cases for path in case.images.values()}
    assert len(cases) == 3 and not any("mask" in n or "seg" in n for n in names)


def test_equal_names_win_over_words(tmp_path):
    folder = write(tmp_path, ["images/a_ct_{n}.nii", "labels/a_ct_{n}.nii", "images/a-ct-{n}.nii"])
    cases = find_cases(folder)
    assert {case.id: bool(case.reference) for case in cases} == {
        f"a{mark}ct{mark}{n}": mark == "_" for mark in "_-" for n in (1, 2, 3)
    }


def test_masks_of_other_patients_are_not_paired(tmp_path):
    folder = write(tmp_path, ["images/smith.nii.gz", "labels/jones.nii.gz"], 1)
    with pytest.raises(VolsegError, match="no scan goes with this mask"):
        find_cases(folder)
    folder = write(tmp_path / "b", ["images/P001.nii.gz", "images/P002.nii", "labels/P003.nii"], 1)
    with pytest.raises(VolsegError, match=r"similar names are P00[12], P00[12]"):
        find_cases(folder)


def test_several_masks_and_two_files_of_one_stem_are_named(tmp_path):
    folder = write(tmp_path, ["x{n}.nii", "x{n}_seg1.nii", "x{n}_seg2.nii"], 1)
    with pytest.raises(VolsegError, match=r"x1\.nii: has 2 masks: .*seg1.*seg2.*`volseg cases"):
        find_cases(folder)
    folder = write(tmp_path / "b", ["c.nii", "c.nii.gz", "c_seg.nii"], 1)
    with pytest.raises(VolsegError, match=r"c\.nii\.gz: .*same channel; rename one"):
        find_cases(folder)
    folder = write(tmp_path / "c", ["c.nii", "c.nii.gz"], 1)
    with pytest.raises(VolsegError, match="used for both"):
        find_scans([folder])


def test_a_case_that_lacks_a_channel_is_named(tmp_path):
    folder = write(tmp_path, ["x{n}_t1.nii", "x{n}_flair.nii", "x{n}_seg.nii"])
    (folder / "x2_flair.nii").unlink()
    with pytest.raises(VolsegError, match=r"x2_t1\.nii: has no channel 'flair'; it has 't1'"):
        find_cases(folder, ["t1", "flair"])
    cases = find_cases(folder, ["t1", "flair"], allow_missing=True)
    assert [sorted(case.images) for case in cases] == [["flair", "t1"], ["t1"], ["flair", "t1"]]


def test_a_model_of_one_channel_takes_scans_of_other_names_one_by_one(tmp_path):
    folder = write(tmp_path, ["x{n}_t1.nii", "x{n}_t2.nii"], 2)  # may be times 1 and 2
    remarks: list[str] = []
    cases = find_scans([folder], ["ct"], remark=remarks.append)
    assert [case.id for case in cases] == ["x1_t1", "x1_t2", "x2_t1", "x2_t2"]
    assert remarks == [
        f"W_CHANNELS: {folder}: holds scans named t1, t2, and one channel is needed, so each scan "
        "is a case of its own"
    ]
    cases = find_scans([folder], ["t2"], remark=remarks.append)
    assert [case.id for case in cases] == ["x1", "x2"] and "N_NAMES: " in remarks[1]


def test_scans_of_one_folder_are_of_one_patient(tmp_path):
    cases = find_cases(write(tmp_path, ["p{n}/a/image.nii", "p{n}/b/image.nii"], 2))
    assert {case.id: case.patient for case in cases} == {
        "p1_a": "p1", "p1_b": "p1", "p2_a": "p2", "p2_b": "p2"
    }  # fmt: skip


def test_results_of_volseg_are_not_searched(tmp_path):
    folder = write(tmp_path, ["p{n}/image.nii.gz", "p{n}/mask.nii.gz", "out/masks/p{n}.nii.gz"])
    (folder / "out" / ".volseg").mkdir()
    assert [case.id for case in find_cases(folder)] == ["p1", "p2", "p3"]


@pytest.mark.parametrize(
    ("scans", "masks", "pairs"),
    [
        (["a", "b"], ["a", "b", "c"], {"a": "a", "b": "b"}),
        (["a", "b"], ["a_seg", "b_seg"], {"a": "a_seg", "b": "b_seg"}),
        (["1_CT", "2_CT"], ["1_roi", "2_roi"], {"1_CT": "1_roi", "2_CT": "2_roi"}),
        (["P1_CT"], ["P1_nodule"], {"P1_CT": "P1_nodule"}),
        (["smith"], ["jones"], {}),
        (["a", "b"], ["c", "d"], {}),
        (["a_1", "a_2"], ["a_1"], {"a_1": "a_1"}),
        (["x", "y"], ["x_seg", "y_seg", "z_seg"], {"x": "x_seg", "y": "y_seg"}),
    ],
)  # fmt: skip
def test_pairs_of_two_folders(scans, masks, pairs):
    assert pair_names(scans, masks) == pairs


def test_grouping_does_not_depend_on_the_order_of_files():
    paths = [PurePath(p.format(n=n)) for p in LAYOUTS["bids"][0] for n in (1, 2, 3)]
    groups = {g.id: (dict(g.images), list(g.masks)) for g in group_files(paths)}
    assert groups == {g.id: (dict(g.images), list(g.masks)) for g in group_files(paths[::-1])}
