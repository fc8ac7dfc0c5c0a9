"""The notebooks run from top to bottom, and every result that they show can be shown."""

import ast
import json
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
LONG = ("train_and_infer",)


def run_cell(source, names):
    """Run a code cell and return what a notebook would show: the value of its last expression."""
    tree, value = ast.parse(source), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    to_html = getattr(value, "_repr_html_", lambda: "")
    return f"{value!r}\n{to_html()}"


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else [], id=path.name)
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_as_it_is(notebook, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {}
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            shown = run_cell("".join(cell["source"]), names)
            assert " object at 0x" not in shown
    assert list((tmp_path / "docs").iterdir()) == []  # nothing beside the notebook


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_has_no_outputs(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        required = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            required |= {"outputs", "execution_count"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell) == required
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_both_notebooks_were_found():
    assert [path.stem for path in NOTEBOOKS] == ["measure_and_compare", "train_and_infer"]
