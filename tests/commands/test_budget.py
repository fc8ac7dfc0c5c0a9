"""Memory of evaluate and compare: announced peaks hold, and budgets are kept or refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import volseg
from volseg.options.declare import amount

AFFINE = np.diag([-0.8, -0.8, 1.5, 1.0])
GB = 2**30
# name → fraction of the voxels, number of labels
NOISE = {"few": (0.01, 1), "many labels": (0.1, 40), "much": (0.2, 1)}
on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux limits the address space"
)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.nifti1.save(nibabel.nifti1.Nifti1Image(np.asfortranarray(array), affine), path)


def noise(shape, fraction, n_labels, seed):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, n_labels + 1, shape) * (rng.random(shape) < fraction)).astype(np.uint8)


def ball(shape, radius, off=0.0):
    index = np.indices(shape, dtype=np.float32)
    offset = index - ((np.array(shape, np.float32) - 1) / 2 + off)[:, None, None, None]
    return (np.square(offset).sum(axis=0) <= radius**2).astype(np.uint8)


def run_limited(code: str, folder: Path) -> str:
    """Run `code` in a child process and return its output.

    There, `limited(run)` calls `run(announce)` with memory limited to the announced amount.
    """
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + code, folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


LIMITED = """
import resource, sys
from pathlib import Path
import volseg
from volseg.evaluation.memory import LIBRARIES

folder = Path(sys.argv[1])

def pages():
    return [int(n) * 4096 for n in Path("/proc/self/statm").read_text().split()[:2]]

def limited(run):
    def announce(text):
        if not text.startswith("memory: "):
            return
        announced = float(text.split("at most ")[1].split(" GB")[0]) * 2**30
        held, resident = pages()
        # Libraries are loaded already; addresses are rounded up.
        beyond = announced - resident - LIBRARIES + (8 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (held + int(beyond), resource.RLIM_INFINITY))
        texts.append(text)

    texts = []
    report = run(announce)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    status = "failed" if report.failed or not report.done else "done"
    print(folder.name, status, len(texts), report.failed, texts)
"""

EVALUATE = """
def evaluate(name, announce):
    masks = {"reference": folder / name / "truth", "predicted": folder / name / "guess"}
    return volseg.evaluate(**masks, out=folder / name / "out", announce=announce)

evaluate("small", lambda text: None)  # imports the libraries
for name in sorted(path.name for path in folder.iterdir()):
    limited(lambda announce: evaluate(name, announce))
"""


@pytest.mark.slow
@on_linux
def test_noise_and_a_ball_are_evaluated_in_the_announced_memory(tmp_path):
    shapes = {"few": (100, 90, 80), "many labels": (50, 50, 40), "much": (180, 160, 140)}
    for name, (fraction, n_labels) in NOISE.items():
        for seed, side in enumerate(("truth", "guess")):
            save(tmp_path / name / side / "case.nii", noise(shapes[name], fraction, n_labels, seed))
    for side, off in (("truth", 0), ("guess", 3)):
        save(tmp_path / "ball" / side / "case.nii", ball((100, 90, 80), 30, off).astype(np.int16))
        save(tmp_path / "small" / side / "case.nii", noise((24, 24, 24), 0.1, 3, off))
    lines = run_limited(EVALUATE, tmp_path).splitlines()
    assert len(lines) == len(NOISE) + 2
    assert all(" done 1 " in line for line in lines), lines


COMPARE = """
from volseg.execution.memory import LIBRARIES

def compare(name, announce, **options):
    options |= {"out": folder / name / "out", "announce": announce}
    return volseg.compare(folder / name / "baseline", folder / name / "followup", **options)

compare("small", lambda text: None, figures=True)  # imports the libraries
for name in sorted(path.name for path in folder.iterdir()):
    options = {"registration": False} if name == "tilted" else {}
    limited(lambda announce: compare(name, announce, **options))
"""


def two_times(folder: Path, masks, tilt_rad=0.0):
    """Measure noise that was scanned twice, the second time with the head tilted."""
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(tilt_rad), -np.sin(tilt_rad)], [np.sin(tilt_rad), np.cos(tilt_rad)]]
    values = np.random.default_rng(3).normal(size=masks[0].shape).astype(np.float32)
    anatomy, affines = gaussian_filter(values, 4) * 3000, (AFFINE, tilt @ AFFINE)
    for time, mask, affine in zip(("baseline", "followup"), masks, affines, strict=True):
        scan = anatomy + np.random.default_rng(len(time)).normal(0, 5, mask.shape)
        save(folder / time / "scan.nii", scan.astype(np.int16), affine)
        save(folder / time / "mask.nii", mask, affine)
        paths = {"image": folder / time / "scan.nii", "mask": folder / time / "mask.nii"}
        assert not volseg.measure(**paths, out=folder / time, pages=False).failed
    return folder


@pytest.mark.slow
@on_linux
def test_noise_and_a_ball_are_compared_in_the_announced_memory(tmp_path):
    shape = (40, 40, 30)
    for name, tilt_rad in (("much", 0.0), ("tilted", 0.1)):
        two_times(tmp_path / name, [noise(shape, 0.2, 1, seed) for seed in (0, 1)], tilt_rad)
    two_times(tmp_path / "many labels", [noise(shape, 0.01, 40, seed) for seed in (0, 1)])
    two_times(tmp_path / "ball", [ball((90, 90, 70), 25, off) for off in (0, 2)])
    two_times(tmp_path / "small", [noise((30, 30, 30), 0.02, 2, seed) for seed in (0, 1)])
    lines = run_limited(COMPARE, tmp_path).splitlines()
    assert len(lines) == 5
    assert all(" done 1 " in line for line in lines), lines


def test_a_patient_over_the_budget_is_a_failed_row_that_names_a_sufficient_one(tmp_path):
    folder = two_times(tmp_path, [ball((30, 30, 30), 8, off) for off in (0, 2)])
    scans = {name: folder / name for name in ("baseline", "followup", "out")}
    report = volseg.compare(**scans, max_ram="100M")
    (reason,) = report.failed.values()
    assert reason.startswith("E_RAM: comparing these scans takes up to")
    assert "the budget is 0.10 GB" in reason
    enough = re.search(r"--max-ram ([0-9.]+G)", reason)[1]
    texts = []
    assert not volseg.compare(**scans, max_ram=enough, announce=texts.append).failed
    assert amounts(texts)[0] <= amount(enough)


@pytest.fixture
def pair(tmp_path):
    """Save two cases: one of noise, and a small one."""
    for seed, side in enumerate(("truth", "guess")):
        save(tmp_path / side / "noise.nii", noise((100, 90, 80), 0.2, 2, seed))
        save(tmp_path / side / "small.nii", ball((20, 20, 20), 5, seed))
    folders = {"reference": tmp_path / "truth", "predicted": tmp_path / "guess"}
    return folders | {"out": tmp_path / "out"}


def amounts(texts):
    pattern = r"memory: at most ([0-9.]+) GB \(process"
    return [
        float(re.search(pattern, text)[1]) * GB for text in texts if text.startswith("memory: ")
    ]


@pytest.mark.slow
def test_a_pair_over_the_budget_is_a_failed_row_and_the_others_go_on(pair):
    texts = []
    volseg.evaluate(**pair)  # imports the libraries
    volseg.evaluate(**pair, announce=texts.append)
    (largest,) = amounts(texts)  # the small one takes less
    budget = int(largest) - (12 << 20)
    report = volseg.evaluate(**pair, max_ram=budget)
    assert list(report.done) == ["small"]
    reason = report.failed["noise"]
    assert reason.startswith("E_RAM") and f"the budget is {budget / GB:.2f} GB" in reason
    assert "comparing these masks takes up to" in reason
    enough = re.search(r"--max-ram ([0-9.]+G)", reason)[1]
    report = volseg.evaluate(**pair, max_ram=enough, announce=texts.append)
    assert not report.failed
    assert amounts(texts)[-1] <= amount(enough)


def test_masks_that_cannot_be_read_within_the_budget_are_not_read(pair, monkeypatch):
    monkeypatch.setattr(
        "volseg.commands.mask_pairs.read_mask", lambda path: pytest.fail("was read")
    )
    report = volseg.evaluate(**pair, max_ram="1M")
    enough = re.search(r"--max-ram ([0-9.]+G)", report.failed["noise"])[1]
    monkeypatch.undo()
    assert not volseg.evaluate(**pair, max_ram=enough).failed


def test_memory_is_announced_only_when_it_grows(tmp_path):
    for n in range(4):
        for side in ("truth", "guess"):
            save(tmp_path / side / f"{n}.nii", ball((20, 20, 20), 4 + n))
    texts = []
    masks = {"reference": tmp_path / "truth", "predicted": tmp_path / "guess"}
    volseg.evaluate(**masks, out=tmp_path / "out", announce=texts.append)
    assert amounts(texts) == sorted(amounts(texts))
    assert len(texts) <= 4
