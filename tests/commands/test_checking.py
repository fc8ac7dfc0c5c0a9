import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import volseg
from volseg.cli import app
from volseg.commands import table_columns
from volseg.errors import VolsegError
from volseg.io.volumes import read_mask, write_volume
from volseg.store.outputs import OutputFolder


def test_a_good_dataset_model_recipe_and_scan_have_no_problem(dataset, model):
    assert volseg.check(dataset) == []
    assert volseg.check(model) == []
    assert volseg.check("smoke") == []
    assert volseg.check(dataset / "images" / "scan_0.nii.gz") == []


def test_the_folder_of_a_training_that_did_not_finish_holds_no_model(tmp_path):
    with OutputFolder(tmp_path, "train") as outputs:
        outputs.write("history.csv", "epoch")
    (problem,) = volseg.check(tmp_path)
    assert "did not finish" in problem["problem"]


def test_every_problem_of_a_dataset_is_reported_at_once(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    data = tmp_path / "data"
    path = data / "images" / "scan_0.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])
    shutil.copy(data / "labels" / "scan_3.nii.gz", data / "labels" / "scan_2.nii.gz")
    table = data / "cases.csv"
    table.write_text(table.read_text().rstrip() + "\n" + _row_of_a_lost_scan(table))
    problems = volseg.check(data)
    assert "images/lost.nii.gz' does not exist" in problems[0]["problem"]
    assert [(problem["where"], problem["code"]) for problem in problems[1:]] == [
        (str(data), "W_NO_LABEL"),
        ("scan_0", "E_TRUNCATED"),
        ("scan_2", "E_PAIR"),
    ]
    assert all(problem["fix"] for problem in problems)


def test_with_a_recipe_the_label_values_count_too_and_empty_masks_are_pointed_out(
    dataset, tiny_recipe, tmp_path
):
    shutil.copytree(dataset, tmp_path / "data")
    mask = read_mask(tmp_path / "data" / "labels" / "scan_0.nii.gz")
    write_volume(
        mask.with_array(np.zeros_like(mask.array)), tmp_path / "data" / "labels" / "scan_0.nii.gz"
    )
    assert [problem["code"] for problem in volseg.check(tmp_path / "data")] == ["W_EMPTY"]
    other = tiny_recipe.model_copy(
        update={"data": tiny_recipe.data.model_copy(update={"labels": {"lesion": 4}})}
    )
    problems = volseg.check(tmp_path / "data", other)
    assert [(problem["where"], problem["code"]) for problem in problems] == [
        ("scan_0", "W_EMPTY"),
        *((f"scan_{number}", "E_LABELS") for number in range(1, 8)),
        (str(tmp_path / "data"), "W_LABELS"),
    ]


def test_labels_that_no_mask_holds_are_a_warning(dataset, tiny_recipe):
    labels = {"cyst": 2, **tiny_recipe.data.labels}
    data = tiny_recipe.data.model_copy(update={"labels": labels})
    (problem,) = volseg.check(dataset, tiny_recipe.model_copy(update={"data": data}))
    assert (problem["code"], problem["where"]) == ("W_LABELS", str(dataset))
    assert "no mask holds label 'cyst' (value 2)" in problem["problem"]


@pytest.mark.parametrize(
    "line, misspelt, expected",
    [
        ('name = "unet3d"', 'name = "unet3"', "unet3d"),
        ("features = [16, 32, 48]", "featurs = [16, 32, 48]", "features"),
        ('step = "remove_small"', 'step = "remove_smal"', "remove_small"),
        ("min_volume_mm3 = ", "min_volum_mm3 = ", "min_volume_mm3"),
        ("[train]", '[train.loss]\noverlap = "dise"\n[train]', "dice, generalised_dice"),
        ("[train]", '[train.loss]\nvoxel = "cross_entropie"\n[train]', "cross_entropy"),
        ("[train]", "[train.loss]\nfocal_gama = 2\n[train]", "focal_gamma"),
        ("patch_shape = [64, 64, 32]", "patch_shape = [64, 64, 30]", "28 or 32"),
    ],
)
def test_misspelt_names_and_settings_are_refused_with_the_known_ones(
    line, misspelt, expected, tmp_path, dataset
):
    text = (Path(__file__).parents[2] / "pipelines" / "smoke.toml").read_text()
    assert line in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(line, misspelt))
    (problem,) = volseg.check(path)
    assert expected in problem["fix"] and problem["code"] == "E_RECIPE"
    for command, options in ((volseg.plan, {}), (volseg.train, {"out": tmp_path / "model"})):
        with pytest.raises(VolsegError) as caught:
            command(dataset, recipe=path, **options)
        assert caught.value.problem == problem["problem"]
    assert not (tmp_path / "model").exists()


def test_all_mistakes_in_names_are_reported_at_once(tmp_path):
    text = (Path(__file__).parents[2] / "pipelines" / "smoke.toml").read_text()
    text = text.replace("remove_small", "remove_smal").replace("unet3d", "unet3")
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace("[train]", "[train.loss]\nfocal_gama = 2\n[train]"))
    assert [problem["code"] for problem in volseg.check(path)] == ["E_RECIPE"] * 3
    with pytest.raises(VolsegError, match=r"3 mistakes.*unet3.*focal_gama.*remove_smal"):
        volseg.train(tmp_path, recipe=path, out=tmp_path / "model")


def test_warnings_are_not_counted_as_problems(dataset, tiny_recipe, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    for number in (0, 1):
        path = tmp_path / "data" / "labels" / f"scan_{number}.nii.gz"
        mask = read_mask(path)
        write_volume(mask.with_array(np.zeros_like(mask.array)), path)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "data")])
    assert result.exit_code == 0
    assert result.output.rstrip().endswith("data: 0 problems, 2 warnings")


def test_results_are_named_as_such_and_not_read_as_a_dataset(dataset, tmp_path):
    scans, masks = dataset / "images", dataset / "labels"
    volseg.measure(image=scans, mask=masks, out=tmp_path / "r", pages=False)
    (problem,) = volseg.check(tmp_path / "r")
    assert problem["code"] == "E_USAGE"
    assert "holds the results of measure" in problem["problem"]


def test_a_path_stands_once_in_a_line_and_what_needs_no_change_has_no_advice(dataset, tmp_path):
    missing = tmp_path / "missing"
    line = CliRunner().invoke(app, ["check", str(missing)]).output.splitlines()[0]
    assert line.count(str(missing)) == 1
    table = tmp_path / "table.csv"
    scans = [f"{dataset}/{kind}/scan_0.nii.gz" for kind in ("images", "labels")]
    table.write_text(f"Image,Mask\n{','.join(scans)}\n")
    line = CliRunner().invoke(app, ["check", str(table)]).output.splitlines()[0]
    assert line == f"note: N_HEAD: {table}: column 'Mask' is read as 'label'"


def test_a_recipe_that_leaves_its_network_to_the_plan_has_no_problem(tmp_path, tiny_recipe):
    text = (Path(__file__).parents[2] / "pipelines" / "smoke.toml").read_text()
    text = text.replace("features = [16, 32, 48]", 'features = "auto"\nkernels = "auto"')
    path = tmp_path / "r.toml"
    path.write_text(text.replace("strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]", 'strides = "auto"'))
    assert volseg.check(path) == []
    path.write_text(text)
    assert "make all of them 'auto', or none" in volseg.check(path)[0]["problem"]


def test_a_bad_recipe_and_an_unknown_step_are_reported(tmp_path):
    path = tmp_path / "r.toml"
    text = (Path(__file__).parents[2] / "pipelines" / "smoke.toml").read_text()
    path.write_text(text.replace('step = "remove_small"', 'step = "remove_smal"'))
    assert "remove_smal" in volseg.check(path)[0]["problem"]
    path.write_text(text.replace("[infer]", "[infre]"))
    assert volseg.check(path)[0]["code"] == "E_RECIPE"


def test_every_column_has_a_meaning():
    for columns in table_columns().values():
        assert all(meaning for _, _, meaning, _ in columns)
        assert len({name for name, *_ in columns}) == len(columns)


def _row_of_a_lost_scan(table: Path) -> str:
    columns = table.read_text().splitlines()[0].split(",")
    cells = {"subject": "lost", "image": "images/lost.nii.gz"}
    return ",".join(cells.get(name, "") for name in columns) + "\n"
