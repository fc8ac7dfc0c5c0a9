"""The tables of a command as data frames of its report."""

import subprocess
import sys

import pytest

from volseg.reports import CasesReport, CompareReport, EvaluateReport
from volseg.store.tables import TABLES, table

FRAMES = {
    ("cases", "lesions.csv"): "lesions",
    ("cases", "cases.csv"): "cases",
    ("compare", "response.csv"): "responses",
    ("compare", "comparison.csv"): "changes",
    ("evaluate", "evaluation.csv"): "evaluation",
    ("evaluate", "detections.csv"): "detections",
}


@pytest.mark.parametrize(("command", "name"), FRAMES)
def test_a_report_reads_the_tables_that_its_command_wrote(command, name, tmp_path):
    reports = {
        "cases": CasesReport(out=tmp_path, objects="components", pages=False),
        "compare": CompareReport(out=tmp_path, patients=[]),
        "evaluate": EvaluateReport(out=tmp_path, summary={}),
    }
    with (tmp_path / name).open("wb") as file:
        table(TABLES[name], [])(file)
    frame = getattr(reports[command], FRAMES[command, name])
    assert len(frame) == 0
    assert "status" in frame.columns or "volume_ml" in frame.columns


def test_a_report_is_light():
    code = "import sys, volseg.reports; print({'numpy', 'pandas', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
