"""Run commands on JSON files in which one value was exchanged for nonsense, in a process whose memory and time are bounded.

`python mutations.py FOLDER NUMBER SEED [KIND...]` makes the files of each kind in the folder, tries `NUMBER` of all mutations of each
(0: every one) and prints a JSON object with how many were tried and what went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY, write_dataset
from nnunet_folder import dataset as nnunet_dataset
from nnunet_folder import write_model

import volseg
from volseg import cli
from volseg.bundle import ModelBundle, save_bundle
from volseg.io.nifti import write_volume
from volseg.models import build_segmentation, weights_of
from volseg.plan import DatasetFingerprint, IntensityStatistics, Plan
from volseg.recipe import Window, parse_recipe
from volseg.volume import Geometry, Volume

SECONDS = 8.0  # of a command that goes on with a harmless value; one that is refused takes a tenth
BYTES = 2 << 30  # of address space beyond that of the libraries
HOLE = '"\\u0007hole"'
NEVER = (
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "9" * 400,
    "NaN",
    "1e999",
    '"\\ud800"',
)
ODD = (
    "-1", "0", "1", "2.5", "1000000000", "1e-6", "1e300", "-1e300", "[]", "{}", '""', "null", "true", '"x"', '"auto"',
    '["a", 1]', '{"a": [1]}', "[1, 1, 1]", "[1000000000, 1000000000, 1000000000]", '"' + "n" * 100_000 + '"',
)  # fmt: skip
Path_ = tuple[Any, ...]


def untrained_model(folder: Path) -> Path:
    """A model of random weights, with a coarse first pass left out."""
    content = tomllib.loads(TINY)
    content.pop("classify")
    recipe = parse_recipe(content, where="tiny")
    torch.manual_seed(0)
    numbers = IntensityStatistics(mean=0, sd=1, p00_5=-1, median=0, p99_5=1)
    fingerprint = DatasetFingerprint(
        n_cases=1,
        spacings_mm=((2, 2, 2),),
        shapes=((30, 30, 30),),
        label_voxels={3: 9},
        foreground={"ct": numbers},
    )
    window = Window(method="window", low=-200, high=300, mean=40, sd=100)
    plan = Plan(
        spacing_mm=(2, 2, 2), patch_shape=(16, 16, 16), batch_size=2, windows={"ct": window}
    )
    weights = {"segmentation": weights_of(build_segmentation(recipe))}
    metrics = {
        "training_cases": 4,
        "validation_cases": 1,
        "best_epoch": 2,
        "training_seconds": 1.5,
        "warnings": "few",
    }
    metrics |= {"validation_dice_lesion": 0.8, "validation_dice_lesion_95": [0.7, 0.9]}
    metrics |= {"nnunet_validation_dice_fold_0": 0.8}
    save_bundle(
        ModelBundle(
            recipe=recipe, plan=plan, fingerprint=fingerprint, weights=weights, metrics=metrics
        ),
        folder,
    )
    return folder


def scan(path: Path) -> Path:
    values = np.random.default_rng(0).integers(-1000, 300, (20, 18, 16)).astype(np.int16)
    write_volume(
        Volume(np.asfortranarray(values), Geometry(values.shape, np.diag([2.0, 2, 2, 1]))), path
    )
    return path


def mask(path: Path) -> Path:
    values = np.zeros((20, 18, 16), np.uint8, order="F")
    values[4:8, 4:8, 4:8], values[10:12, 10:12, 10:12] = 1, 2
    write_volume(Volume(values, Geometry(values.shape, np.diag([2.0, 2, 2, 1]))), path)
    return path


def paths_in(content: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where every value stands, that of the whole first."""
    yield at
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield from paths_in(value, (*at, key))


def mutated(content: Any, at: Path_, value: str) -> str:
    """The JSON with one value exchanged, which need not be JSON."""
    if not at:
        return value
    copy = json.loads(json.dumps(content))
    place = copy
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = "\u0007hole"
    return json.dumps(copy).replace(HOLE, value)


# ---- kinds of files: what to exchange values in, and the commands that read it


def model(folder: Path) -> tuple[Path, list[list[Any]]]:
    bundle, image = untrained_model(folder / "model"), scan(folder / "scan.nii.gz")
    infer = [
        "infer",
        image,
        "--model",
        bundle,
        "--out",
        folder / "out",
        "--backend",
        "torch",
        "--no-report",
    ]
    return bundle / "model.json", [["check", bundle], infer]


def nnunet(folder: Path, name: str) -> tuple[Path, list[list[Any]]]:
    source = write_model(folder)
    return source / name, [["import-nnunet", source, "--out", folder / "out"]]


def raw_dataset(folder: Path) -> tuple[Path, list[list[Any]]]:
    for sub, make, ending in (("imagesTr", scan, "_0000"), ("labelsTr", mask, "")):
        (folder / "data" / sub).mkdir(parents=True)
        for name in "ab":
            make(folder / "data" / sub / f"{name}{ending}.nii.gz")
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    path = folder / "data/dataset.json"
    path.write_text(json.dumps(nnunet_dataset(labels=labels, regions_class_order=[1, 2])))
    return path, [["check", folder / "data"], ["plan", folder / "data"]]


def label_names(folder: Path) -> tuple[Path, list[list[Any]]]:
    (folder / "names.json").write_text(json.dumps({"1": "spleen", "2": "liver"}))
    image = scan(folder / "scan.nii.gz")
    pair = [
        "--image",
        image,
        "--mask",
        mask(folder / "mask.nii.gz"),
        "--label-names",
        folder / "names.json",
    ]
    return folder / "names.json", [["measure", *pair, "--out", folder / "out", "--no-report"]]


def plan(folder: Path) -> tuple[Path, list[list[Any]]]:
    write_dataset(folder / "data")
    volseg.plan(folder / "data", out=folder / "plan.json")
    return folder / "plan.json", [["train", folder / "data", "--plan", folder / "plan.json", "--out", folder / "out", "--preview"]]  # fmt: skip


KINDS: dict[str, Callable[[Path], tuple[Path, list[list[Any]]]]] = {
    "model.json": model,
    "plans.json": lambda folder: nnunet(folder, "plans.json"),
    "dataset.json of a model": lambda folder: nnunet(folder, "dataset.json"),
    "dataset.json of scans": raw_dataset,
    "label names": label_names,
    "plan": plan,
}


def outcome(arguments: Sequence[Any]) -> tuple[int, str]:
    """Exit code of a command, run by its own entry point, and what it printed: to stderr, then to stdout. A traceback is code 1."""
    messages, sys.argv = io.StringIO(), ["volseg", *map(str, arguments)]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(messages):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            return 1, traceback.format_exc()
    return code, messages.getvalue() + printed.getvalue()


def try_kind(folder: Path, kind: str, number: int, seed: int) -> dict[str, Any]:
    """How many mutations were tried, the seconds of the slowest command, and those that went wrong."""
    folder.mkdir()
    path, commands = KINDS[kind](folder)
    text = path.read_text()
    content = json.loads(text)
    for command in commands:
        code, messages = outcome(command)
        assert code == 0, (command, messages)
        shutil.rmtree(folder / "out", ignore_errors=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    cases = [(at, value) for at in paths_in(content) for value in (*NEVER, *ODD)]
    if number:
        cases = random.Random(seed).sample(cases, min(number, len(cases)))
    wrong, slowest = [], 0.0
    for at, value in cases:
        path.write_text(mutated(content, at, value))
        for command in commands:
            began = time.monotonic()
            code, messages = outcome(command)
            seconds = time.monotonic() - began
            slowest = max(slowest, seconds)
            lines = [line for line in messages.splitlines() if line.strip()]
            is_right = (
                code in ((2, 4) if value in NEVER else (0, 2, 3, 4)) and "Traceback" not in messages
            )
            if not is_right or seconds > SECONDS:
                wrong.append(
                    [
                        command[0],
                        list(at),
                        value[:40],
                        code,
                        round(seconds, 1),
                        lines[-1:],
                        messages[-1500:],
                    ]
                )
            shutil.rmtree(folder / "out", ignore_errors=True)
    path.write_text(text)
    return {"tried": len(cases), "slowest": round(slowest, 2), "wrong": wrong}


def main(folder: Path, number: int, seed: int, kinds: Sequence[str]) -> None:
    found = {kind: try_kind(folder / str(n), kind, number, seed) for n, kind in enumerate(kinds)}
    print(json.dumps(found), file=sys.__stdout__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(KINDS))
