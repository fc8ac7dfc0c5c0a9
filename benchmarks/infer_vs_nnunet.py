"""Run one nnU-Net model on one CT, file to file, with nnU-Net's own predictor and with volseg.

    python benchmarks/infer_vs_nnunet.py --peer PEER/bin/python [--classes 2]
        [--shape 512,512,300] [--patch 128,128,128]

PEER is an environment with nnunetv2 2.8.1. nnU-Net itself makes the model with its default
3d_fullres architecture and trains it for a few steps on synthetic balls. Each side then runs in a
fresh process with its defaults, without test-time augmentation. Prints wall and CPU time, peak
memory, and the fraction of foreground voxels with the same label.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEER = """
import inspect, sys, torch
import nnunetv2.inference.predict_from_raw_data as module
if {float_sums}:  # nnU-Net sums the weighted logits of overlapping tiles in half precision
    source = inspect.getsource(module)
    assert source.count("dtype=torch.half") == 2
    source = source.replace("dtype=torch.half", "dtype=torch.float32")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
nnUNetPredictor = module.nnUNetPredictor
model, scan, out = sys.argv[1:]
torch.set_num_threads(int({threads}))
predictor = nnUNetPredictor(
    use_mirroring=False, perform_everything_on_device={on_gpu}, device=torch.device("{device}"),
    verbose=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(
    model, use_folds=(0,), checkpoint_name="checkpoint_final.pth")
if __name__ == "__main__":
    predictor.predict_from_files(
        [[scan]], [out], save_probabilities=False, overwrite=True, num_processes_preprocessing=1,
        num_processes_segmentation_export=1)
"""
PEERS = (("nnU-Net 2.8.1", False), ("nnU-Net, sums in float32", True))


@dataclass(frozen=True, slots=True)
class Run:
    """Cost of one process with its children: wall and CPU in seconds, resident memory in MB."""

    wall: float
    cpu: float
    peak: float  # of all processes together
    largest: float  # of the largest process alone
    failed: bool = False

    @property
    def highest(self) -> float:
        """Lower bound of the peak memory in MB; exact for a single process."""
        return max(self.peak, self.largest)


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Run:
    """Run a command and measure its process tree.

    The memory of all processes together is sampled once a second; each peak is the kernel's.
    """
    started = time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )
        peak, largest, cpu = 0.0, 0.0, {}
        while child.poll() is None:
            total = 0.0
            for pid in tree(child.pid):
                resident, highest, seconds = usage(pid)
                total += resident
                largest = max(largest, highest)
                cpu[pid] = max(cpu.get(pid, 0.0), seconds)
            peak = max(peak, total)
            time.sleep(1.0)  # the memory of a large process is slow to add up
    wall = time.perf_counter() - started
    return Run(wall, sum(cpu.values()), peak, largest, child.returncode != 0)


def tree(pid: int) -> list[int]:
    """Return the ids of a process and of all its descendants."""
    pids, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        pids.append(parent)
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text()
                waiting += map(int, children.split())
        except OSError:
            continue
    return pids


def usage(pid: int) -> tuple[float, float, float]:
    """Return proportional and peak resident memory in MB, and CPU seconds of a process."""
    seconds = 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return (
            kilobytes(pid, "smaps_rollup", "Pss") / 1024,
            kilobytes(pid, "status", "VmHWM") / 1024,
            seconds,
        )
    except (OSError, IndexError):
        return 0.0, 0.0, seconds


def kilobytes(pid: int, file: str, name: str) -> int:
    """Return a number from a table of /proc; 0 if it is missing."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def make_scan(
    path: Path,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    classes: int = 2,
) -> None:
    """Write a noisy elliptic body in air, with balls of the densities of `nnunet_model.py`."""
    from volseg.io.volumes import write_volume
    from volseg.volume import Geometry, Volume

    rng = np.random.default_rng(0)
    r, a, s = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    inside = (r[:, None, None] / 0.75) ** 2 + (a[None, :, None] / 0.5) ** 2 < 1
    # HU of the background and of each class
    level = np.linspace(-230, 400, min(classes, 25)).astype(np.int16)
    noise = min(27.0, 630 / len(level) / 4)
    array = np.where(inside, level[0], np.int16(-1000)) * np.ones(shape, np.int16)
    half_mm = [n * spacing / 2 for n, spacing in zip(shape, spacing_mm, strict=True)]
    for index in range(60):
        radius_mm, centre = rng.uniform(8, 40), rng.uniform([-0.5, -0.3, -0.9], [0.5, 0.3, 0.9])
        squares = [((x - c) * h) ** 2 for x, c, h in zip((r, a, s), centre, half_mm, strict=True)]
        ball = squares[0][:, None, None] + squares[1][None, :, None] + squares[2] < radius_mm**2
        array[ball] = level[1 + index % (len(level) - 1)]
    for index in range(shape[2]):
        array[:, :, index] += rng.normal(0, noise, shape[:2]).astype(np.int16)
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    write_volume(Volume(np.asfortranarray(array), Geometry(shape, affine)), path)


def agreement(first: Path, second: Path) -> tuple[float, float]:
    """Return the fraction of foreground voxels with equal labels, and that of foreground.

    Foreground is what is foreground in either mask.
    """
    from volseg.io.volumes import read_mask

    a, b = read_mask(first).array, read_mask(second).array
    foreground = (a > 0) | (b > 0)
    return float((a[foreground] == b[foreground]).mean()), float(foreground.mean())


def agreements(mask: Path, others: dict[str, Path]) -> str:
    """Return the agreement of a mask with each of the others, as text."""
    fractions = {name: agreement(other, mask) for name, other in others.items() if other.exists()}
    return "".join(
        f"; {same:.5f} of foreground ({foreground:.1%} of the scan) agree with {name}"
        for name, (same, foreground) in fractions.items()
    )


def main() -> None:
    numbers = lambda kind: lambda text: tuple(kind(part) for part in text.split(","))  # noqa: E731
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with nnunetv2")
    parser.add_argument("--classes", type=int, default=2, help="including the background")
    parser.add_argument("--shape", type=numbers(int), default=(512, 512, 300))
    parser.add_argument(
        "--spacing", type=numbers(float), default=(0.8, 0.8, 1.5), help="of the scan, mm"
    )
    parser.add_argument("--patch", default="128,128,128")
    parser.add_argument("--features", default="32,64,128,256,320,320")
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument(
        "--volseg",
        action="append",
        help="more options of `volseg infer`; repeat it for several runs",
        default=None,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides")
    parser.add_argument("--no-peer", action="store_true", help="run only volseg")
    parser.add_argument(
        "--float-sums",
        action="store_true",
        help="also run nnU-Net with float32 sums of overlapping tiles, and compare with it too",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for the model and the scan, to reuse them in later runs"
    )
    parser.add_argument("--make-scan", type=Path, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make_scan:
        make_scan(arguments.make_scan, arguments.shape, arguments.spacing, arguments.classes)
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(arguments, arguments.keep or Path(temporary))


def compare(arguments: Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scan, bundle = folder / "scan.nii.gz", folder / "volseg_model"
    script = Path(__file__)
    volseg = [sys.executable, "-m", "volseg"]
    if not scan.exists():
        # In a separate process: a child's peak memory on Linux starts from that of its parent.
        names = ("shape", "spacing")
        sizes = [f"--{name}={','.join(map(str, getattr(arguments, name)))}" for name in names]
        options = [*sizes, f"--classes={arguments.classes}", "--make-scan", scan]
        subprocess.run([sys.executable, script, "--peer", "-", *options], check=True)
    if not bundle.exists():
        maker = [arguments.peer, str(script.with_name("nnunet_model.py"))]
        maker += ["--out", str(folder / "nnunet"), "--classes", str(arguments.classes)]
        maker += ["--patch", arguments.patch, "--features", arguments.features]
        maker += ["--train-steps", str(arguments.train_steps), "--train-patch", "64,64,64"]
        maker += ["--small-checkpoint"]
        made = subprocess.run(maker, check=True, stdout=subprocess.PIPE, text=True)
        (folder / "nnunet_model.txt").write_text(made.stdout.splitlines()[-1])
        command = [*volseg, "import-nnunet", made.stdout.splitlines()[-1], "--out", bundle]
        subprocess.run(command, check=True)
    model = (folder / "nnunet_model.txt").read_text()
    rows: list[tuple[str, Run, str]] = []
    masks: dict[str, Path] = {}  # with --no-peer: the peer's masks of an earlier run
    for name, float_sums in PEERS[: 1 + arguments.float_sums]:
        stem = "theirs_float" if float_sums else "theirs"
        mask = folder / f"{stem}.nii.gz"
        if arguments.no_peer:
            masks[name] = mask
            continue
        device, on_gpu = arguments.device, arguments.device == "cuda"
        values = {"threads": os.cpu_count(), "float_sums": float_sums}
        peer = folder / f"{stem}.py"
        peer.write_text(PEER.format(**values, device=device, on_gpu=on_gpu))
        variables = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        environment = dict.fromkeys(variables, str(folder))
        command = [arguments.peer, str(peer), model, str(scan), str(folder / stem)]
        cost = run(command, folder / f"{stem}.log", environment)
        remark = f"failed, see {stem}.log" if cost.failed else agreements(mask, masks)
        rows.append((name, cost, remark))
        masks[name] = mask
    for index, options in enumerate(arguments.volseg or [""]):
        out = folder / f"volseg_{index}"
        subprocess.run(["rm", "-rf", out], check=True)
        command = [*volseg, "infer", str(scan), "--model", str(bundle), "--out", str(out)]
        command += ["--no-tta", "--device", arguments.device, *options.split()]
        cost = run(command, folder / f"volseg_{index}.log")
        remark = f"failed, see volseg_{index}.log"
        if not cost.failed:
            computed = json.loads((out / "run.json").read_text())["options"]
            remark = f"{computed['backend']} {computed['precision']}"
            remark += agreements(out / "masks" / "scan.nii.gz", masks)
        rows.append((f"volseg {options}".strip(), cost, remark))
    base = rows[0][1]
    shape = " × ".join(map(str, arguments.shape))
    print(f"{arguments.classes} classes, {shape} voxels, patch {arguments.patch}")
    print("| | wall, s | ratio | CPU, s | peak memory, MB | ratio | |")
    print("|---|---|---|---|---|---|---|")
    for name, cost, remark in rows:
        print(
            f"| {name} | {cost.wall:.1f} | {cost.wall / base.wall:.3f} | {cost.cpu:.1f} "
            f"| {cost.highest:.0f} | {cost.highest / base.highest:.3f} | {remark} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
