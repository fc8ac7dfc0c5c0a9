"""Commands on noisy masks: announced memory holds, the largest lesions are measured, W_SPECKS."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest

import volseg
from volseg.commands import mask_measurement
from volseg.errors import ScanError
from volseg.measurement.memory import KEPT, lesion_bytes, plan_measuring, report_bytes
from volseg.options.declare import amount
from volseg.postprocessing.lesions import MANY

AFFINE = np.diag([-0.8, -0.8, 1.5, 1.0])
GB = 2**30


def write_noise(folder, shape, fraction, n_labels, dtype=np.int16):
    rng = np.random.default_rng(0)
    scan = rng.normal(30, 100, shape).astype(dtype)
    mask = (rng.integers(1, n_labels + 1, shape) * (rng.random(shape) < fraction)).astype(np.uint8)
    for name, array in (("scan", scan), ("mask", mask)):
        nibabel.nifti1.save(nibabel.nifti1.Nifti1Image(array, AFFINE), folder / f"{name}.nii")
    return folder / "scan.nii", folder / "mask.nii", mask


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure a mask with more lesions than are measured in full."""
    folder = tmp_path_factory.mktemp("noise")
    scan, mask, array = write_noise(folder, (90, 80, 60), 0.05, 30)
    texts = []
    report = volseg.measure(image=scan, mask=mask, out=folder / "out", announce=texts.append)
    return report, array, texts, folder / "out"


@pytest.mark.slow
def test_every_component_has_a_row_and_the_largest_have_every_column(measured):
    _report, array, _, out = measured
    rows = rows_of(out / "lesions.csv")
    assert len(rows) > MANY
    assert [int(row["lesion_id"]) for row in rows] == list(range(1, len(rows) + 1))
    assert sum(int(row["n_voxels"]) for row in rows) == np.count_nonzero(array)
    assert all(row["long_axis_mm"] for row in rows[:MANY])
    assert not any(row["long_axis_mm"] for row in rows[MANY:])
    cheap = ["volume_ml", "intensity_mean", "intensity_max"]
    cheap += ["centroid_s_mm", "bbox_max_a_mm", "touches_border"]
    assert all(row[name] for row in rows[MANY:] for name in cheap)
    assert all("only the 10 000 largest" in row["notes"] for row in rows[MANY:])
    (case,) = rows_of(out / "cases.csv")
    assert int(case["n_lesions"]) == len(rows)
    total_ml = np.count_nonzero(array) * 0.8 * 0.8 * 1.5 / 1000
    assert float(case["total_volume_ml"]) == pytest.approx(total_ml, rel=1e-4)


@pytest.mark.slow
def test_the_row_the_pages_and_the_terminal_warn_of_noise(measured):
    report, _, _, out = measured
    (case,) = rows_of(out / "cases.csv")
    n = f"{int(case['n_lesions']):,}".replace(",", " ")
    warning = f"W_SPECKS: {n} components: this mask looks like noise"
    assert warning in case["warnings"]
    assert warning in (out / "report.html").read_text(encoding="utf-8")
    assert warning in (out / "viewer" / "scan.html").read_text(encoding="utf-8")
    (text,) = (text for text in report.warnings if "W_SPECKS" in text)
    assert text.startswith(warning.replace("W_SPECKS: ", "W_SPECKS: scan: "))


@pytest.mark.slow
def test_a_second_call_keeps_all_rows(measured):
    _report, _, _, out = measured
    before = (out / "lesions.csv").read_bytes()
    volseg.measure(image=out.parent / "scan.nii", mask=out.parent / "mask.nii", out=out)
    assert (out / "lesions.csv").read_bytes() == before


def test_an_ordinary_mask_has_no_such_warning(tmp_path):
    scan, mask, _ = write_noise(tmp_path, (30, 30, 20), 0.02, 1)
    report = volseg.measure(image=scan, mask=mask, out=tmp_path / "out")
    assert not any("W_SPECKS" in text for text in report.warnings)
    assert "W_SPECKS" not in rows_of(tmp_path / "out" / "cases.csv")[0]["warnings"]


@pytest.mark.slow
def test_a_budget_that_is_too_small_gives_a_failed_row_that_names_a_sufficient_one(tmp_path):
    scan, mask, _ = write_noise(tmp_path, (40, 40, 30), 0.05, 3)
    report = volseg.measure(image=scan, mask=mask, out=tmp_path / "out", max_ram="100M")
    (reason,) = report.failed.values()
    assert reason.startswith("E_RAM") and "the budget is 0.10 GB" in reason
    enough = re.search(r"--max-ram ([0-9.]+G)", reason)[1]
    texts = []
    report = volseg.measure(
        image=scan, mask=mask, out=tmp_path / "out", max_ram=enough, announce=texts.append
    )
    assert not report.failed
    assert float(re.search(r"at most ([0-9.]+) GB", texts[0])[1]) * GB <= amount(enough)


def test_the_plan_grows_with_the_grid_alone():
    small, large = (
        plan_measuring(voxels, 2, 1, process=0, n_cases=1) for voxels in (256**3, 512 * 512 * 300)
    )
    assert small.total < 1.1 * GB
    assert large.parts["lesions"] - small.parts["lesions"] < 7 * (512 * 512 * 300 - 256**3)
    assert lesion_bytes(256**3, 8) - lesion_bytes(256**3, 2) == 6 * 256**3


def test_the_plan_holds_the_tables_and_pages_of_the_whole_folder():
    few, many = (plan_measuring(1000, 2, 1, process=0, n_cases=n) for n in (1, 10**6))
    assert few.total >= report_bytes(1)
    assert many.total >= report_bytes(10**6) > 10**9


def test_a_million_labels_are_not_named_before_their_rows_are_written(tmp_path, monkeypatch):
    shape = (64, 64, 32)
    n = np.prod(shape)
    numbers = np.arange(1, n + 1, dtype=np.int32)
    labels = np.random.default_rng(0).permutation(numbers).reshape(shape)
    for name, array in (("scan", labels.astype(np.int16)), ("mask", labels)):
        nibabel.nifti1.save(nibabel.nifti1.Nifti1Image(array, AFFINE), tmp_path / f"{name}.nii")
    held = []

    def look(scan):
        read = scan.image.array.nbytes + scan.lesions.ids.nbytes
        held.append(tracemalloc.get_traced_memory()[0] - read)
        names = scan.label_names
        assert (len(scan.lesions.labels), names[n], names[1]) == (n, f"label_{n}", "spleen")
        raise ScanError("looked", fix="", code="E_LOOKED")

    monkeypatch.setattr(mask_measurement, "measure_largest", look)
    options = {"objects": "labels", "label_names": {1: "spleen"}, "pages": False}
    options |= {"image": tmp_path / "scan.nii", "mask": tmp_path / "mask.nii"}
    options |= {"out": tmp_path / "out"}
    volseg.measure(**options, lymph_nodes=["spleen"])
    tracemalloc.start()
    try:
        report = volseg.measure(**options)
    finally:
        tracemalloc.stop()
    assert report.failed["scan"].startswith("E_LOOKED")
    assert held[1] < labels.nbytes + KEPT * n + 1e6  # the mask, and what the plan counts


MEASURE = """
import resource, sys
from pathlib import Path
import volseg
from volseg.errors import VolsegError
from volseg.execution.memory import LIBRARIES

folder = Path(sys.argv[1])
small = folder / "small"
volseg.measure(image=small / "scan.nii", mask=small / "mask.nii", out=folder / "warm")
announced = []

def announce(text):
    if not text.startswith("memory: "):
        return
    announced.append(float(text.split("at most ")[1].split(" GB")[0]) * 2**30)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    # Libraries are loaded already; addresses are rounded up.
    beyond = announced[0] - resident - LIBRARIES + (32 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (held + int(beyond), held + int(beyond)))

report = volseg.measure(
    image=folder / "scan.nii", mask=folder / "mask.nii", out=folder / "out", announce=announce
)
status = Path("/proc/self/status").read_text()  # getrusage may count the parent
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print("failed" if report.failed else "measured", peak <= announced[0], report.failed)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux limits the address space"
)
def test_noise_is_measured_in_an_address_space_of_the_announced_size(tmp_path):
    (tmp_path / "small").mkdir()
    write_noise(tmp_path / "small", (24, 24, 24), 0.05, 3)
    write_noise(tmp_path, (120, 110, 90), 0.01, 117)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("measured True"), done.stdout + done.stderr[-2000:]
