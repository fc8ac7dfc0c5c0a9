"""Random runs of every command among a user's files, ended at random, must not lose a file.

A run is drawn from a seed: a command, an output folder (new, with results of this or another
command, with the user's files, or an input folder), the user's files, perhaps named like outputs,
results edited by hand, an unreadable input, options that change the results or make every case
fail, and an end: normal, by SIGINT, SIGTERM or SIGKILL after some time, or by a full disk.
Afterwards, every file that volseg did not write must be unchanged, and the tables must hold all
rows of every finished case, either those from before or those of the run.
`benchmarks/random_runs.py` does many runs, the test suite a few.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COMMANDS = (
    "infer", "measure", "measure-cases", "measure-results", "evaluate", "compare", "preprocess",
    "train", "plan", "report", "import-nnunet", "quantise",
)  # fmt: skip
ENDS = ("itself", "SIGINT", "SIGTERM", "SIGKILL", "full disk")
# The table of items, the table of their lesions, and the column that names the item.
TABLES = (
    ("cases.csv", "lesions.csv", "case_id"),
    ("response.csv", "comparison.csv", "patient"),
    ("evaluation.csv", "detections.csv", "case_id"),
)
Tables = dict[str, list[dict[str, str]]]  # table → rows
Rows = dict[str, Tables]  # finished item → its tables
PAIRS = "patient,baseline,followup\nscan_1,scan_1,scan_1\nother,scan_0,scan_2\n"
# Options of each command; the results in the world are made with the first.
VARIANTS = {
    "infer": ("", "--figures --overlap 0.1", "--overlap 0.1 --max-ram 1M"),
    "measure": ("", "--calcium", "--calcium --max-ram 1M"),
    "measure-cases": ("", "--figures", "--calcium --max-ram 1M"),
    "evaluate": ("", "--min-iou 0.5", "--max-ram 1M", "--min-iou 0.5 --max-ram 1M"),
    "compare": (
        "", "--max-distance 3", "--pairs PAIRS", "--pairs PAIRS --max-distance 3",
        "--max-distance 3 --max-ram 1M",
    ),
    "preprocess": ("", "--seed 1"),
    "train": ("", "--resume"),
}  # fmt: skip
RECIPE = """
name = "tiny"
description = "Bright balls in noise."
[data]
channels = ["ct"]
intensity_unit = "HU"
labels = { lesion = 3 }
[preprocess]
spacing_mm = [2.0, 2.0, 2.0]
body_above = -500.0
[preprocess.normalise]
method = "window"
low = -200
high = 300
[network]
name = "unet3d"
features = [4, 8, 8]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[train]
patch_shape = [16, 16, 16]
batch_size = 2
steps_per_epoch = 2
epochs = 2
"""
USERS_NAMES = (
    "lesions.csv", "cases.csv", "run.json", "report.html", "summary.json", "evaluation.csv",
    "detections.csv", "froc.png", "comparison.csv", "response.csv", "model.json", "card.md",
    "segmentation.safetensors", "history.csv", "curves.png", "plan.toml", "prepared.json",
    "notes.txt", ".tmp-anything", ".tmp-0123456789abcdef", "masks/scan_0.nii.gz", "masks/notes.txt",
    "lesion_ids/scan_1.nii.gz", "lesion_ids/.tmp-mine", "figures/scan_0.png", "viewer/scan_0.html",
    "viewer/thumbnails/scan_0.jpg", "cases/scan_0/image.npy", "cases/scan_0/notes.txt",
    "openvino/segmentation.int8.xml", "masks", "lesion_ids", "viewer", ".training/notes.txt",
    ".volseg/notes.txt", ".volseg/scan_0.json",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A random run: its arguments, its output folder and how it ends."""

    command: str
    place: str
    arguments: Sequence[str]
    out: Path
    end: str
    seconds: float
    file_bytes: int
    options: str
    broken: str = ""  # name of a case with an unreadable input


def make_world(
    folder: Path, write_dataset, make_nnunet, commands: Sequence[str] = COMMANDS
) -> Path:
    """Make a dataset, a model and results of the commands, each by the command itself.

    `expected.json` holds the rows that each command makes with the options of `VARIANTS`. All of it
    is made at the path of the later copies, since records hold absolute paths, and comparisons
    hashes of records; then it is moved. Returns the template.

    Args:
        write_dataset: (folder, n) → writes a dataset of n scans.
        make_nnunet: folder → writes a trained nnU-Net model into it.
    """
    template, folder = folder / "template", folder / "world"
    folder.mkdir()
    write_dataset(folder / "data", n=5)
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "pairs.csv").write_text(PAIRS)
    make_nnunet(folder / "nnunet")
    for command in (
        "train", "infer", "measure", "measure-cases", "compare", "preprocess", "evaluate", "plan",
        "import-nnunet",
    ):  # fmt: skip
        if command not in commands:
            continue
        out = folder / "done" / command
        out.parent.mkdir(exist_ok=True)
        if command == "plan":
            out.mkdir()
        code, output = run_command(arguments_of(command, folder, out))
        assert code == 0, (command, output)
    makers = {"measure-results": "infer", "report": "infer", "quantise": "train"}
    for command, maker in makers.items():
        if command in commands:
            shutil.copytree(folder / "done" / maker, folder / "done" / command)
    expected = {f"{command} ": rows_of(folder / "done" / command) for command in commands}
    for command, variants in VARIANTS.items():
        for options in variants[1:] if command in commands and command != "train" else ():
            if "--max-ram" not in options:
                code, output = run_command(arguments_of(command, folder, folder / "new", options))
                assert code == 0, (command, output)
                expected[f"{command} {options}"] = rows_of(folder / "new")
                shutil.rmtree(folder / "new")
    for made in ("measure ", "compare ", "evaluate "):
        for tables in expected.get(made, {}).values():
            assert all(tables.values()), (made, tables)
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder.rename(template)


def arguments_of(command: str, world: Path, out: Path, options: str = "") -> list[str]:
    """Return the arguments of a command."""
    data, model, done = world / "data", world / "done" / "train", world / "done"
    pair = ["--image", data / "images", "--mask", data / "labels"]
    predicted = done / "infer" if (done / "infer").exists() else data / "labels"
    masks = ["--reference", data / "labels", "--predicted", predicted]
    results, recipe = (
        (done / "measure", done / "measure-cases"),
        ("--recipe", world / "recipe.toml"),
    )
    line: list[str | Path] = {
        "infer": ["infer", data / "images", "--model", model, "--backend", "torch", "--out", out],
        "measure": ["measure", *pair, "--unit", "HU", "--out", out],
        "measure-cases": ["measure", "--cases", data / "cases.csv", "--unit", "HU", "--out", out],
        "measure-results": ["measure", out],
        "evaluate": ["evaluate", *masks, "--out", out],
        "compare": ["compare", *results, "--no-registration", "--out", out],
        "preprocess": ["preprocess", data, *recipe, "--out", out],
        "train": ["train", data, *recipe, "--device", "cpu", "--out", out],
        "plan": ["plan", data, *recipe, "--out", out / "plan.toml"],
        "report": ["report", out],
        "import-nnunet": ["import-nnunet", next((world / "nnunet").iterdir()), "--out", out],
        "quantise": ["quantise", out, data],
    }[command]  # fmt: skip
    added = options.replace("PAIRS", str(world / "pairs.csv")).split()
    return [str(part) for part in [*line, *added]]


def run_command(
    arguments: Sequence[str], *, end: str = "itself", seconds: float = 0, file_bytes: int = 0
):
    """Run a command in a process of its own and end it as requested.

    Returns its exit code and its output.
    """
    out, into = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the command starts
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(out)
            os.dup2(into, 1)
            os.dup2(into, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if end == "full disk":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            code = _main(arguments)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.close(into)
    if end.startswith("SIG"):
        time.sleep(seconds)
        # Harmless after the end of the child, which is not reaped yet.
        os.kill(child, getattr(signal, end))
    output = b""
    while chunk := os.read(out, 65536):
        output += chunk
    os.close(out)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.decode("utf-8", "replace")


def _main(arguments: Sequence[str]) -> int:
    import sys

    from volseg.__main__ import main

    sys.argv = ["volseg", *arguments]
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    except KeyboardInterrupt:
        return 130
    code = None
    try:
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except KeyboardInterrupt as late:
        # Ignore a signal that arrived in this function, after the end of the command.
        frames = [frame.name for frame in traceback.extract_tb(late.__traceback__)]
        if code is None and frames != ["_main"]:
            raise
    return 130 if code is None else code


def draw_run(seed: int, world: Path, seconds: float, commands: Sequence[str]) -> Run:
    """Draw a run in `world` and put the user's files there.

    A signal comes within `seconds`.
    """
    rng = np.random.default_rng(seed)
    command = commands[seed % len(commands)]
    places = ["new", "users", "done", "done", "done", "other", "data", "images", "labels"]
    if command in ("measure-results", "report", "quantise"):
        places = ["done"]
    place = str(rng.choice(places))
    others = [name for name in commands if name != command]
    folders = {
        "new": world / "new",
        "users": world / "users",
        "done": world / "done" / command,
        "other": world / "done" / str(rng.choice(others)),
        "data": world / "data",
        "images": world / "data" / "images",
        "labels": world / "data" / "labels",
    }
    out = folders[place]
    for name in rng.permutation(USERS_NAMES)[: int(rng.integers(0, 4)) if place != "new" else 0]:
        path = out / name
        if not os.path.lexists(path) and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine {seed}")
    options = str(rng.choice(VARIANTS.get(command, ("",))))
    return Run(
        command=command,
        place=place,
        arguments=arguments_of(command, world, out, options),
        options=options,
        out=out,
        end=str(rng.choice(ENDS)),
        seconds=float(rng.uniform(0, seconds)),
        file_bytes=int(rng.choice([0, 500, 3_000, 20_000, 100_000])),
        broken=_break_input(command, world, rng) if rng.random() < 0.2 else "",
    )


def _break_input(command: str, world: Path, rng: np.random.Generator) -> str:
    """Truncate an input of a run; return its case, empty if the command needs all cases."""
    case = f"scan_{rng.integers(3)}"
    predicted = world / "done" / "infer" / "masks"
    folder = {
        "infer": world / "data" / "images",
        "measure": world / "data" / "labels",
        "measure-cases": world / "data" / "images",
        "evaluate": predicted if predicted.exists() else world / "data" / "labels",
        "compare": world / "done" / "measure" / "lesion_ids",
    }.get(command)
    if folder is None:
        return ""
    path = folder / f"{case}.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    return case


def edit_results(seed: int, out: Path) -> list[Path]:
    """Edit some results by hand, as a user may, in every second run; return their paths."""
    rng = np.random.default_rng([seed, 1])
    if rng.random() < 0.5:
        return []
    paths = [path for path in sorted(out.rglob("*")) if ".volseg" not in path.parts]
    files = [path for path in paths if path.is_file()]
    edited = [path for path in files if rng.random() < min(0.5, 1.5 / max(1, len(files)))]
    for path in edited:
        path.write_bytes(path.read_bytes() + b"by hand")
    return edited


def check_run(
    seed: int, template: Path, seconds: float = 4.0, commands: Sequence[str] = COMMANDS
) -> tuple[Run, list[str], int]:
    """Do one random run; return the run, all faults found afterwards, and the exit code."""
    world = template.with_name("world")
    shutil.copytree(template, world, symlinks=True)
    volsegs = set(_tree(world / "done"))  # written by commands, before the user's files
    run = draw_run(seed, world, seconds, commands)
    edited = set(edit_results(seed, run.out)) if run.place == "done" else set()
    before = _tree(world)
    users = {
        path: digest
        for path, digest in before.items()
        if path not in volsegs or path in edited or run.out not in path.parents
    }
    rows = _Rows(run, edited, json.loads((world / "expected.json").read_text()))
    limits = {"seconds": run.seconds, "file_bytes": run.file_bytes}
    code, output = run_command(run.arguments, end=run.end, **limits)
    faults = _lost(users, world, "after the run")
    if not any((run.out / ".volseg").glob("ready-*")):  # else the next run finishes writing them
        faults += rows.faults("after the run", is_done=code == 0)
    if "Traceback" in output:
        faults.append(f"traceback: {output[-600:]}")
    again, output = run_command(run.arguments)
    faults += _lost(users, world, "after a second run")
    faults += rows.faults("after a second run", is_done=again == 0)
    if "Traceback" in output or again not in (0, 2, 3, 4):
        faults.append(f"second run: exit {again}: {output[-600:]}")
    hidden = (run.out / ".volseg").glob("*") if again == 0 else ()
    left = [path for path in hidden if re.match(r"(tmp|ready)-", path.name)]
    faults += [f"left behind: {path}" for path in left]
    shutil.rmtree(world)
    return run, faults, code


def _tree(folder: Path) -> dict[Path, str]:
    """Return every file with its hash, without the files that volseg keeps in `.volseg`."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and (path.parent.name != ".volseg" or path.read_bytes().startswith(b"mine"))
    }


def _lost(users: dict[Path, str], world: Path, when: str) -> list[str]:
    after = _tree(world)
    gone = [path for path, digest in users.items() if after.get(path) != digest]
    # A user's file in `.volseg` may be renamed, with its content intact.
    kept = set(after.values())
    lost = [path for path in gone if not (".volseg" in path.parts and users[path] in kept)]
    states = {path: "changed" if path in after else "lost" for path in lost}
    return [f"{state} {when}: {path.relative_to(world)}" for path, state in states.items()]


def rows_of(out: Path, edited: Collection[Path] = ()) -> Rows:
    """Return the rows of every case or patient with status done, without what varies between runs.

    Tables edited by hand are left out.
    """
    tables_of: Rows = {}
    for items, lesions, column in TABLES:
        rows = _read(out / items, edited)
        done = [row for row in rows if row.get("status") == "done" and row.get(column)]
        others = _read(out / lesions, edited)
        for name in {row[column] for row in done}:
            tables = tables_of.setdefault(name, {})
            for table, rows in ((items, done), (lesions, others)):
                if out / table not in edited:
                    of_item = [row for row in rows if row.get(column) == name]
                    tables[table] = [_lasting(table, row) for row in of_item]
    return tables_of


def _read(path: Path, edited: Collection[Path]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [] if path in edited else list(csv.DictReader(file))
    except (OSError, ValueError):
        return []


def _lasting(table: str, row: Mapping[str, str]) -> dict[str, str]:
    """Return the cells of a row that are the same in every run."""
    dropped = {"seconds", "warnings"} | ({"notes"} if table == "evaluation.csv" else set())
    return {name: cell for name, cell in row.items() if name not in dropped}


def _prepared_cases(out: Path) -> Mapping[str, str]:
    try:
        return json.loads((out / "prepared.json").read_text())["cases"]
    except (OSError, ValueError, KeyError):
        return {}


class _Rows:
    """The rows of the tables before a run and those allowed after it."""

    def __init__(self, run: Run, edited: Collection[Path], expected: Mapping[str, Rows]) -> None:
        self._run, self._edited = run, edited
        self._before = self._now()
        self._is_prepared = bool(_prepared_cases(run.out))
        self._expected = expected.get(f"{run.command} {run.options}", {})
        if run.command in ("measure-results", "report"):
            self._expected = {}  # measuring again gives the same rows, see `_now`
        involved = {"other"} if run.broken in ("scan_0", "scan_2") else set()
        self._broken = {run.broken} | involved if run.broken else set()
        # A corrected mask is kept, and so are its rows.
        masks = [path.name for path in edited if path.parent.name == "masks"]
        self._kept = {name.removesuffix(".nii.gz") for name in masks}

    def _now(self) -> Rows:
        rows = rows_of(self._run.out, self._edited)
        if self._run.command == "measure-results":  # corrected masks have no confidence or class
            for row in (row for tables in rows.values() for row in tables.get("lesions.csv", ())):
                of_model = [name for name in row if str(name).startswith(("confidence", "class"))]
                row |= dict.fromkeys(of_model, "")
        return rows

    def faults(self, when: str, *, is_done: bool) -> list[str]:
        """List the items whose rows are gone, or neither those from before nor those of this run.

        Args:
            is_done: the run succeeded, so its own rows must be there.
        """
        now, faults = self._now(), []
        if self._is_prepared and not _prepared_cases(self._run.out):
            faults.append(f"prepared.json lists no case {when}")
        for name in sorted({*self._before, *self._expected, *now} - self._broken):
            before, after = self._before.get(name), self._of_tables(self._expected.get(name))
            if is_done and after is not None and name not in self._kept:
                before = after
            if now.get(name) != before and (name not in now or now[name] != after):
                state = "gone" if name not in now else "neither as before nor as expected"
                faults.append(f"rows of {name} {state} {when}")
        return faults

    def _of_tables(self, tables: Tables | None) -> Tables | None:
        if tables is None:
            return None
        out, edited = self._run.out, self._edited
        return {name: rows for name, rows in tables.items() if out / name not in edited}
