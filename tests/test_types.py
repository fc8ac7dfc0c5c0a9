"""A type checker knows the arguments of the functions, which derive from declared settings."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = """
import volseg
from pathlib import Path

volseg.infer("scan.nii.gz", model=Path("model"), max_ram="4G", figures=True)
volseg.measure(image="scan.nii.gz", mask="mask.nii.gz", intensity_unit="HU")
volseg.compare("a", "b", out="c", lymph_nodes=["node"])
report = volseg.train("data", out="model", recipe="smoke", time_budget_seconds="20m", epochs=3)
metrics = dict(report.metrics)
"""
WRONG = ("volseg.infer()", "volseg.infer('a', figure=True)", "volseg.infer('a', overlap='much')")


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("pyright", path=Path(sys.executable).parent), reason="no pyright"
)
def test_calls_are_checked_against_the_declared_settings(tmp_path):
    for name, text in {"right": RIGHT, "wrong": "import volseg\n" + "\n".join(WRONG)}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"]}}')
    command = [Path(sys.executable).parent / "pyright", "--pythonpath", sys.executable, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == len(WRONG) and all("wrong.py" in line for line in errors), done.stdout
