"""The recipe for a file format in docs/extend.md, carried out in a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_extend import SECTIONS

ROOT = Path(__file__).parents[1]
USE = """
import csv
import numpy as np
import volseg
from pathlib import Path
from volseg.io.formats import READABLE
from volseg.io.layouts import find_cases, find_scans
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Geometry, Volume

assert ".npz" in READABLE and "volseg_copy" in volseg.__file__, volseg.__file__
rng, folder = np.random.default_rng(0), Path("data")
affine = np.array([[0, -0.7, 0, 3], [1.1, 0, 0, 1 / 3], [0, 0, 2.5, 7], [0, 0, 0, 1]])
geometry = Geometry((20, 18, 12), affine)
labels = np.zeros(geometry.shape, np.uint8)
labels[5:12, 4:11, 3:8] = 1
values = np.where(labels > 0, 40, -300).astype(np.int16)
for name, array in (("images", values), ("labels", labels)):
    (folder / name).mkdir(parents=True)
    write_volume(Volume(array, geometry), folder / name / "patient 1.npz")
(case,) = find_scans([folder / "images"])
assert case.id == "patient 1", case
assert volseg.check(folder) == []
assert volseg.check(folder / "images" / "patient 1.npz") == []
report = volseg.measure(
    image=folder / "images", mask=folder / "labels", out="out", intensity_unit="HU"
)
assert report.exit_code == 0
(row,) = csv.DictReader(open("out/lesions.csv", encoding="utf-8"))
assert abs(float(row["volume_ml"]) - 7 * 7 * 5 * 0.7 * 1.1 * 2.5 / 1000) < 1e-6, row["volume_ml"]
(folder / "images" / "patient 1.npz").write_bytes(b"PK")
(problem,) = volseg.check(folder)
assert problem["code"] == "E_NPZ" and problem["fix"], problem
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a checkout in which the recipe was carried out."""
    root = tmp_path_factory.mktemp("volseg_copy")
    shutil.copytree(ROOT / "volseg", root / "volseg", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/laws.py", "tests/io/test_formats.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for edit in SECTIONS["A file format"].edits:
        edit.apply(root)
    return root


def run(root, *arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_know_the_format(copy):
    run(copy, "-c", USE)


@pytest.mark.slow
def test_the_laws_hold_for_the_format(copy):
    laws = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rA", "tests/io/test_formats.py"]
    assert "bit_for_bit[oblique-.npz]" in run(copy, *laws)
