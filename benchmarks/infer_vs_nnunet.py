"""The same nnU-Net model on the same CT, file to file: nnU-Net's own predictor beside volseg.

    python benchmarks/infer_vs_nnunet.py --peer PEER_ENVIRONMENT/bin/python [--classes 2] [--shape 512,512,300] [--patch 128,128,128]

The peer's environment holds nnunetv2 2.8.1. The model is made by nnU-Net itself with its default 3d_fullres architecture and trained for a
few steps on synthetic balls; each side then runs in a fresh process with its defaults, test-time mirroring off on both. Prints wall and
CPU time and peak memory of the processes, the tiles, and how many foreground voxels have the same label.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEER = """
import inspect, sys, torch
import nnunetv2.inference.predict_from_raw_data as module
if {float_sums}:  # as shipped it adds the weighted logits of overlapping tiles up in half precision
    source = inspect.getsource(module)
    assert source.count("dtype=torch.half") == 2
    exec(compile(source.replace("dtype=torch.half", "dtype=torch.float32"), module.__file__, "exec"), module.__dict__)
nnUNetPredictor = module.nnUNetPredictor
model, scan, out = sys.argv[1:]
torch.set_num_threads(int({threads}))
predictor = nnUNetPredictor(use_mirroring=False, perform_everything_on_device={on_gpu}, device=torch.device("{device}"), verbose=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, use_folds=(0,), checkpoint_name="checkpoint_final.pth")
if __name__ == "__main__":
    predictor.predict_from_files([[scan]], [out], save_probabilities=False, overwrite=True, num_processes_preprocessing=1, num_processes_segmentation_export=1)
"""
PEERS = (("nnU-Net 2.8.1", False), ("nnU-Net, sums in float32", True))


@dataclass(frozen=True, slots=True)
class Run:
    """One process with its children: seconds of wall and CPU, peak resident memory in MB of all together and of the largest alone."""

    wall: float
    cpu: float
    peak: float
    largest: float
    failed: bool = False

    @property
    def highest(self) -> float:
        """What it had at least; of a single process exact."""
        return max(self.peak, self.largest)


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Run:
    """Run a command and watch its process tree; memory of all its processes together is sampled once a second, of each alone the kernel knows the peak."""
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
    return Run(
        time.perf_counter() - started, sum(cpu.values()), peak, largest, child.returncode != 0
    )


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                waiting += [
                    int(each)
                    for each in Path(f"/proc/{one}/task/{task}/children").read_text().split()
                ]
        except OSError:
            continue
    return found


def usage(pid: int) -> tuple[float, float, float]:
    """Proportional resident memory in MB, the highest resident memory so far, and CPU seconds of a process."""
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
    """A number from a table of /proc; 0 where it is not there."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def make_scan(
    path: Path,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    classes: int = 2,
) -> None:
    """A noisy body of an elliptic section in air with balls in it, of the densities on which `nnunet_model.py` trains."""
    from volseg.io.nifti import write_volume
    from volseg.volume import Geometry, Volume

    rng = np.random.default_rng(0)
    r, a, s = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    inside = (r[:, None, None] / 0.75) ** 2 + (a[None, :, None] / 0.5) ** 2 < 1
    level = np.linspace(-230, 400, min(classes, 25)).astype(
        np.int16
    )  # HU of the background and of each class
    noise = min(27.0, 630 / len(level) / 4)
    array = np.where(inside, level[0], np.int16(-1000)) * np.ones(shape, np.int16)
    half_mm = [n * each / 2 for n, each in zip(shape, spacing_mm, strict=True)]
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
    """Share of the voxels that are foreground in either mask which have the same label in both, and share of foreground."""
    from volseg.io.nifti import read_mask

    one, other = read_mask(first).array, read_mask(second).array
    foreground = (one > 0) | (other > 0)
    return float((one[foreground] == other[foreground]).mean()), float(foreground.mean())


def agreements(mask: Path, others: dict[str, Path]) -> str:
    """The agreement of a mask with each of others, as text."""
    shares = {name: agreement(other, mask) for name, other in others.items() if other.exists()}
    return "".join(
        f"; {same:.5f} of foreground ({share:.1%} of the scan) agree with {name}"
        for name, (same, share) in shares.items()
    )


def main() -> None:
    numbers = lambda kind: lambda text: tuple(kind(part) for part in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="python of an environment with nnunetv2")
    parser.add_argument("--classes", type=int, default=2, help="with the background")
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
        help="further options of `volseg infer`, one run for each",
        default=None,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both")
    parser.add_argument("--no-peer", action="store_true", help="run volseg alone")
    parser.add_argument(
        "--float-sums",
        action="store_true",
        help="run nnU-Net once more with its sums of overlapping tiles in float32, and compare every mask with that too",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the model and the scan, which are made again if not there",
    )
    parser.add_argument("--make-scan", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make_scan:
        make_scan(arguments.make_scan, arguments.shape, arguments.spacing, arguments.classes)
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(arguments, arguments.keep or Path(temporary))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scan, own = folder / "scan.nii.gz", folder / "volseg_model"
    here = Path(__file__)
    volseg = [sys.executable, "-m", "volseg"]
    if not scan.exists():
        # In a process of its own: a child's peak memory on Linux starts from that of its parent.
        shape = [
            f"--{name}={','.join(map(str, getattr(arguments, name)))}"
            for name in ("shape", "spacing")
        ]
        shape.append(f"--classes={arguments.classes}")
        subprocess.run(
            [sys.executable, here, "--peer", "-", *shape, "--make-scan", scan], check=True
        )
    if not own.exists():
        maker = [
            arguments.peer,
            str(here.with_name("nnunet_model.py")),
            "--out",
            str(folder / "nnunet"),
        ]
        maker += [
            "--classes",
            str(arguments.classes),
            "--patch",
            arguments.patch,
            "--features",
            arguments.features,
        ]
        maker += [
            "--train-steps",
            str(arguments.train_steps),
            "--train-patch",
            "64,64,64",
            "--small-checkpoint",
        ]
        made = subprocess.run(maker, check=True, stdout=subprocess.PIPE, text=True)
        (folder / "nnunet_model.txt").write_text(made.stdout.splitlines()[-1])
        subprocess.run(
            [*volseg, "import-nnunet", made.stdout.splitlines()[-1], "--out", own], check=True
        )
    model = (folder / "nnunet_model.txt").read_text()
    rows: list[tuple[str, Run, str]] = []
    masks: dict[str, Path] = {}  # without the peer: those that it made in an earlier run
    for name, float_sums in PEERS[: 1 + arguments.float_sums]:
        stem = "theirs_float" if float_sums else "theirs"
        mask = folder / f"{stem}.nii.gz"
        if arguments.no_peer:
            masks[name] = mask
            continue
        script = folder / f"{stem}.py"
        script.write_text(
            PEER.format(
                threads=os.cpu_count(),
                float_sums=float_sums,
                device=arguments.device,
                on_gpu=arguments.device == "cuda",
            )
        )
        environment = {
            name: str(folder) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        }
        command = [arguments.peer, str(script), model, str(scan), str(folder / stem)]
        found = run(command, folder / f"{stem}.log", environment)
        rows.append(
            (name, found, f"failed, see {stem}.log" if found.failed else agreements(mask, masks))
        )
        masks[name] = mask
    for index, options in enumerate(arguments.volseg or [""]):
        out = folder / f"volseg_{index}"
        subprocess.run(["rm", "-rf", out], check=True)
        command = [
            *volseg,
            "infer",
            str(scan),
            "--model",
            str(own),
            "--out",
            str(out),
            "--no-tta",
            "--device",
            arguments.device,
            *options.split(),
        ]
        found = run(command, folder / f"volseg_{index}.log")
        remark = f"failed, see volseg_{index}.log"
        if not found.failed:
            computed = json.loads((out / "run.json").read_text())["options"]
            remark = f"{computed['backend']} {computed['precision']}"
            remark += agreements(out / "masks" / "scan.nii.gz", masks)
        rows.append((f"volseg {options}".strip(), found, remark))
    base = rows[0][1]
    print(
        f"{arguments.classes} classes, {' × '.join(map(str, arguments.shape))} voxels, patch {arguments.patch}"
    )
    print("| | wall, s | ratio | CPU, s | peak memory, MB | ratio | |")
    print("|---|---|---|---|---|---|---|")
    for name, found, remark in rows:
        print(
            f"| {name} | {found.wall:.1f} | {found.wall / base.wall:.3f} | {found.cpu:.1f} | {found.highest:.0f} | {found.highest / base.highest:.3f} | {remark} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
