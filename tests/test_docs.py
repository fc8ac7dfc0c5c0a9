import doctest
import inspect
import re
import runpy
import shutil
from importlib import import_module
from pathlib import Path

import bright_squares
import nnunet_folder
import pytest
from bundles import random_classifier
from conftest import TINY
from image_sets import folder_of_classes

import volseg

ROOT = Path(__file__).parents[1]
LONG = {
    "volseg.commands.inference",
    "volseg.commands.training",
    "volseg.commands.quantising",
    "volseg.commands.in_memory",
}  # modules whose examples take long
EXAMPLES = [
    pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
    for name in (
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "volseg").rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    )
]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_page_of_columns_is_that_of_the_code():
    page = runpy.run_path(str(ROOT / "docs" / "make_columns.py"))["columns_page"]()
    assert (ROOT / "docs" / "columns.md").read_text(encoding="utf-8") == page


def test_the_page_of_options_is_that_of_the_code():
    page = runpy.run_path(str(ROOT / "docs" / "make_options.py"))["options_page"]()
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_run_and_links_lead_somewhere(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


def test_pages_were_found():
    assert len(PAGES) >= 4


def test_the_page_of_python_is_that_of_the_docstrings():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["api_page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page
    headings = set(re.findall(r"^### (?:volseg\.)?(\w+)$", page, re.M))
    assert set(volseg.__all__) - headings == {"__version__"}


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch, request):
    source = Path(import_module(module).__file__).read_text(encoding="utf-8")
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    for fixture in ("model", "dataset"):
        if re.search(rf'^ *(>>>|\.\.\.) .*"{fixture}"', source, re.M):
            shutil.copytree(request.getfixturevalue(fixture), tmp_path / fixture)
    (tmp_path / "recipe.toml").write_text(TINY, encoding="utf-8")
    if '"images"' in source:
        folder_of_classes(tmp_path / "images", n=6)
    if '"image_model"' in source:
        bright_squares.save_model(tmp_path / "image_model")
    if '"lesion_filter"' in source:
        random_classifier(tmp_path / "lesion_filter", "lesion", ["false", "matched"])
    if nnunet_folder.FOLDER in source:
        nnunet_folder.write_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = doctest.testmod(import_module(module))
    assert done.attempted and not done.failed


def test_every_function_of_the_front_door_has_an_example():
    functions = [name for name in volseg.__all__ if inspect.isfunction(getattr(volseg, name))]
    assert len(functions) >= 17
    assert [name for name in functions if ">>> " not in getattr(volseg, name).__doc__] == []


def test_where_things_are_is_where_the_architecture_says():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Where is")[1].split("\n## ")[0]
    places = re.findall(r"`([\w/]+\.py)`: `(\w+)`", section)
    assert len(places) > 15
    for file, name in places:
        source = (ROOT / "volseg" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b|^ *{name}\b.*[:=]", source, re.M), (file, name)
