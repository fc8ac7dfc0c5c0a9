import shutil
from pathlib import Path

import volseg
from volseg.workflows import table_columns


def test_a_good_dataset_model_recipe_and_scan_have_no_problem(dataset, model):
    assert volseg.check(dataset) == []
    assert volseg.check(model) == []
    assert volseg.check("smoke") == []
    assert volseg.check(dataset / "images" / "scan_0.nii.gz") == []


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
        ("scan_0", "E_TRUNCATED"),
        ("scan_2", "E_PAIR"),
    ]
    assert all(problem["fix"] for problem in problems)


def test_a_bad_recipe_and_an_unknown_step_are_reported(tmp_path):
    path = tmp_path / "r.toml"
    text = (Path(__file__).parents[2] / "pipelines" / "smoke.toml").read_text()
    path.write_text(text.replace('step = "remove_small"', 'step = "remove_smal"'))
    assert "remove_smal" in volseg.check(path)[0]["problem"]
    path.write_text(text.replace("[infer]", "[infre]"))
    assert volseg.check(path)[0]["code"] == "E_RECIPE"


def test_every_column_has_a_meaning():
    for columns in table_columns().values():
        assert all(meaning for _, _, meaning in columns)
        assert len({name for name, _, _ in columns}) == len(columns)


def _row_of_a_lost_scan(table: Path) -> str:
    columns = table.read_text().splitlines()[0].split(",")
    return ",".join({"subject": "lost", "image": "images/lost.nii.gz"}.get(name, "") for name in columns) + "\n"
