"""docs/extend.md, carried out: its blocks go into a copy of the package and keep to the laws."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("volseg", "pipelines", "tests", "pyproject.toml")
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
HEADER = re.compile(
    r"# (?P<file>[\w./]+)"
    r"(?: \((?:(?P<new>new)|a copy of (?P<source>[\w./]+))\))?"
    r"(?:, (?P<where>above|below|instead of): (?P<mark>.+))?\n"
)
LAWS = [
    "tests/postprocessing/test_steps.py::test_laws_of_every_step",
    "tests/training/test_losses.py::test_laws_of_every_loss",
    "tests/training/test_losses.py::test_every_term_is_a_frozen_dataclass",
    "tests/networks/test_models.py::test_laws_of_every_architecture",
    "tests/recipe/test_normalise.py::test_laws_of_every_normaliser",
    "tests/test_columns.py::test_every_column_is_filled_in_some_scan",
]


class Edit(NamedTuple):
    """A block with a file in its first line: the text, and where it goes."""

    file: str
    source: str | None  # the file to copy first
    where: str  # new, above, below or instead of
    mark: str  # start of the line that it is put above, below or instead of
    text: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        if self.source and not path.exists():
            shutil.copy(root / self.source, path)
        if self.where == "new":
            assert not path.exists(), f"{self.file} is not new"
            path.write_text(self.text, encoding="utf-8")
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (at,) = (n for n, line in enumerate(lines) if line.strip().startswith(self.mark))
        end = at if self.where == "above" else at + 1
        lines[at + (self.where == "below") : end] = [self.text]
        path.write_text("".join(lines), encoding="utf-8")


class Section(NamedTuple):
    title: str
    edits: list[Edit]
    keys: list[str]  # blocks of TOML for a recipe


def read_sections() -> dict[str, Section]:
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    sections = {}
    for part in page.split("\n## ")[1:]:
        title, edits, keys = part.splitlines()[0], [], []
        for language, text in FENCE.findall(part):
            header = HEADER.match(text)
            if header:
                where = "new" if header["new"] else header["where"]
                code = text[header.end() :]
                edits.append(Edit(header["file"], header["source"], where, header["mark"], code))
            elif language == "toml":
                keys.append(text)
        sections[title] = Section(title, edits, keys)
    return sections


SECTIONS = read_sections()


def stated_files() -> dict[str, int]:
    """Return the number of files that the table at the top says, by section."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(.+?)\]\(#.*?\) \| (\d+) \|$", page, re.MULTILINE)
    return {title[0].upper() + title[1:]: int(n) for title, n in rows}


def copy_package(folder: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def digests(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_python(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def recipe_with(keys: str) -> str:
    """Return the recipe smoke with these sections instead of its own, or with one more step."""
    text = (ROOT / "pipelines" / "smoke.toml").read_text(encoding="utf-8")
    for header in re.findall(r"^\[[\w.]+\]$", keys, re.MULTILINE):
        text = re.sub(rf"^{re.escape(header)}$.*?(?=^\[)", "", text, flags=re.M | re.S)
    return f"{text}\n{keys}"


def problems_of(folder: Path, recipes: dict[str, str]) -> dict[str, str]:
    """Return what `volseg check` says about each recipe, by its name."""
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    script = (
        "import json, volseg; "
        f"print(json.dumps({{name: volseg.check(f'{{name}}.toml') for name in {list(recipes)}}}))"
    )
    done = run_python(folder, "-c", script)
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)
    return {
        name: "; ".join(f"{item['problem']} ({item['fix']})" for item in items)
        for name, items in problems.items()
    }


def failed_laws(folder: Path) -> tuple[set[str], str]:
    """Return the parameters of the laws that fail in this copy, and the output."""
    done = run_python(folder, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rfE", *LAWS)
    return set(re.findall(r"^(?:FAILED|ERROR) \S+\[(\S+?)\]", done.stdout, re.M)), done.stdout


def test_the_table_lists_every_section():
    assert list(stated_files()) == list(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_as_many_files_are_touched_as_the_page_says(title, tmp_path):
    before = digests(copy_package(tmp_path))
    for edit in SECTIONS[title].edits:
        edit.apply(tmp_path)
    touched = [path for path, digest in digests(tmp_path).items() if before.get(path) != digest]
    assert len(touched) == stated_files()[title]


@pytest.mark.slow
def test_what_the_page_adds_is_held_by_the_laws_and_known_to_check(tmp_path):
    copy_package(tmp_path)
    for section in SECTIONS.values():
        for edit in section.edits:
            edit.apply(tmp_path)
    recipes = {
        section.title.split()[-1]: recipe_with("\n".join(section.keys))
        for section in SECTIONS.values()
        if section.keys
    }
    assert set(problems_of(tmp_path, recipes).values()) == {""}
    failed, output = failed_laws(tmp_path)
    assert not failed and " passed" in output, output
    for name in ("keep_below", "jaccard", "dilated"):
        listed = run_python(tmp_path, "-m", "pytest", "--collect-only", "-n", "0", *LAWS).stdout
        assert f"[{name}" in listed or f"{name}+" in listed, name


def block(title: str, number: int = 0) -> Edit:
    return SECTIONS[title].edits[number]


# name of the wrong row → what is wrong with the code of the page
STEPS = {
    "step_not_frozen": ("frozen=True, ", ""),
    "step_wrong_signature": ("mask: np.ndarray, geometry: Geometry", "mask: np.ndarray"),
    "step_changes_dtype": ("return kept", "return kept.astype(np.int64)"),
    "step_changes_shape": ("return kept", "return kept[1:]"),
    "step_writes_into_its_input": ("mask.copy()", "mask"),
    "step_invents_a_label": ("mask[mask > 0], 0)", "mask[mask > 0], 9)"),
    "step_counts_voxels_not_mm": ("geometry.to_world_mm(np.argwhere(mask))", "np.argwhere(mask)"),
}
LOSSES = {
    "loss_not_frozen": ("frozen=True, ", ""),
    "loss_wrong_signature": ("tp: torch.Tensor, fp: torch.Tensor, fn", "tp: torch.Tensor, fn"),
    "loss_is_negative": ("(1 - (tp", "(0.5 - (tp"),
    "loss_likes_errors": ("(1 - (tp", "(0 + (tp"),
}
ARCHITECTURES = {
    "network_without_settings": ("class Settings", "class Options"),
    "network_silent_about_patches": ("def patch_divisors", "def divisors"),
    "network_wrong_about_patches": ("return (2, 2, 2)", "return (1, 1, 1)"),
    "network_off_the_grid": ("out_channels, 2, stride=2)", "out_channels, 1)"),
}


@pytest.mark.slow
def test_mistakes_of_a_newcomer_fail_a_law_or_are_refused_by_check(tmp_path):
    """Each wrong row fails its law; so do a function and an instance in place of a class."""
    copy_package(tmp_path)
    for title, mistakes, file, table in (
        ("A post-processing step", STEPS, "volseg/postprocessing/steps.py", "STEPS"),
        ("A loss", LOSSES, "volseg/training/losses.py", "OVERLAPS"),
    ):
        good = block(title)
        name = re.findall(r"^class (\w+)", good.text, re.M)[0]
        for row, (right, wrong) in mistakes.items():
            assert right in good.text, (row, right)
            text = good.text.replace(right, wrong).replace(f"class {name}", f"class {row}")
            good._replace(text=text).apply(tmp_path)
            Edit(file, None, "below", table, f'    "{row}": {row},\n').apply(tmp_path)
        good.apply(tmp_path)  # without its row
    lambda_row = '    "step_is_a_function": lambda mask, geometry: mask,\n'
    Edit("volseg/postprocessing/steps.py", None, "below", "STEPS", lambda_row).apply(tmp_path)
    instance = '    "loss_is_an_instance": Jaccard(),\n'
    Edit("volseg/training/losses.py", None, "below", "OVERLAPS", instance).apply(tmp_path)
    block("A column").apply(tmp_path)  # which nothing fills
    good = block("An architecture")
    for name, (right, wrong) in ARCHITECTURES.items():
        assert right in good.text, (name, right)
        file = f"volseg/networks/{name}.py"
        good._replace(file=file, text=good.text.replace(right, wrong)).apply(tmp_path)

    failed, output = failed_laws(tmp_path)
    names = {re.split(r"[+-]", parameter.removeprefix("None-"))[0] for parameter in failed}
    expected = {*STEPS, *LOSSES, *ARCHITECTURES, "step_is_a_function", "loss_is_an_instance"}
    assert expected <= {re.sub(r"^regions1-", "", name) for name in names} | names, output

    assert "nothing fills ball_surface_mm2" in output

    problems = problems_of(
        tmp_path,
        {
            "unregistered_step": recipe_with('[[postprocess]]\nstep = "keep_below"'),
            "unregistered_loss": recipe_with('[train.loss]\noverlap = "jaccard"'),
            "misspelt_network": recipe_with('[network]\nname = "dilatd"'),
            "network_without_settings": recipe_with('[network]\nname = "network_without_settings"'),
            "network_silent_about_patches": recipe_with(
                '[network]\nname = "network_silent_about_patches"'
            ),
        },
    )
    assert "'keep_below' is unknown (use one of" in problems["unregistered_step"]
    assert "'jaccard' is unknown (use one of" in problems["unregistered_loss"]
    assert "'dilatd' is unknown" in problems["misspelt_network"]
    assert "has no class Settings" in problems["network_without_settings"]
    assert "patch_divisors" in problems["network_silent_about_patches"]
