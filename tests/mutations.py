"""Run commands on JSON files with one value replaced by nonsense, with limited memory and time.

`python mutations.py FOLDER NUMBER SEED [KIND...]` makes the files of each kind in the folder, tries
`NUMBER` mutations of each (0: all) and prints a JSON object with their number and the failures.
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
from conftest import TINY
from nnunet_folder import dataset as nnunet_dataset
from nnunet_folder import write_model

from volseg import cli
from volseg.bundle import ModelBundle, save_bundle
from volseg.io.volumes import write_volume
from volseg.networks import build_segmentation, unique_tensors
from volseg.planning.fingerprint import DatasetFingerprint, IntensityStatistics
from volseg.recipe import parse_recipe
from volseg.volume import Geometry, Volume

SECONDS = 8.0  # for a command that accepts a harmless value; a refusal takes a tenth
BYTES = 2 << 30  # of address space in addition to that of the libraries
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
    "-1", "0", "1", "2.5", "1000000000", "1e-6", "1e300", "-1e300", "[]", "{}", '""', "null",
    "true", '"x"', '"auto"', '["a", 1]', '{"a": [1]}', "[1, 1, 1]",
    "[1000000000, 1000000000, 1000000000]", '"' + "n" * 100_000 + '"',
)  # fmt: skip
Path_ = tuple[Any, ...]


def untrained_model(folder: Path) -> Path:
    """Save a model with random weights and without a coarse first pass."""
    content = tomllib.loads(TINY)
    content.pop("classify")
    content["preprocess"]["normalise"] |= {"mean": 40, "sd": 100}
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
    weights = {"segmentation": unique_tensors(build_segmentation(recipe))}
    metrics = {
        "training_cases": 4,
        "validation_cases": 1,
        "best_epoch": 2,
        "training_seconds": 1.5,
        "warnings": "few",
    }
    metrics |= {"validation_dice_lesion": 0.8, "validation_dice_lesion_95": [0.7, 0.9]}
    metrics |= {"nnunet_validation_dice_fold_0": 0.8}
    parts = {"recipe": recipe, "fingerprint": fingerprint}
    save_bundle(ModelBundle(**parts, weights=weights, metrics=metrics), folder)
    return folder


def scan(path: Path) -> Path:
    values = np.random.default_rng(0).integers(-1000, 300, (20, 18, 16)).astype(np.int16)
    geometry = Geometry(values.shape, np.diag([2.0, 2, 2, 1]))
    write_volume(Volume(np.asfortranarray(values), geometry), path)
    return path


def mask(path: Path) -> Path:
    values = np.zeros((20, 18, 16), np.uint8, order="F")
    values[4:8, 4:8, 4:8], values[10:12, 10:12, 10:12] = 1, 2
    write_volume(Volume(values, Geometry(values.shape, np.diag([2.0, 2, 2, 1]))), path)
    return path


def paths_in(content: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every value, that of the whole content first."""
    yield path
    items = content.items() if isinstance(content, dict) else ()
    for key, value in enumerate(content) if isinstance(content, list) else items:
        yield from paths_in(value, (*path, key))


def mutated(content: Any, path: Path_, value: str) -> str:
    """Return the JSON with one value replaced; the new value need not be JSON."""
    if not path:
        return value
    copy = json.loads(json.dumps(content))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "\u0007hole"
    return json.dumps(copy).replace(HOLE, value)


# ---- kinds of files: the file to mutate and the commands that read it


def model(folder: Path) -> tuple[Path, list[list[Any]]]:
    bundle, image = untrained_model(folder / "model"), scan(folder / "scan.nii.gz")
    options = ["--out", folder / "out", "--backend", "torch", "--no-report"]
    infer = ["infer", image, "--model", bundle, *options]
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
    names = folder / "names.json"
    names.write_text(json.dumps({"1": "spleen", "2": "liver"}))
    image, labels = scan(folder / "scan.nii.gz"), mask(folder / "mask.nii.gz")
    options = ["--label-names", names, "--out", folder / "out", "--no-report"]
    return names, [["measure", "--image", image, "--mask", labels, *options]]


KINDS: dict[str, Callable[[Path], tuple[Path, list[list[Any]]]]] = {
    "model.json": model,
    "plans.json": lambda folder: nnunet(folder, "plans.json"),
    "dataset.json of a model": lambda folder: nnunet(folder, "dataset.json"),
    "dataset.json of scans": raw_dataset,
    "label names": label_names,
}


def outcome(arguments: Sequence[Any]) -> tuple[int, str]:
    """Run a command by its entry point; return its exit code and its output, stderr first.

    A traceback is exit code 1.
    """
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
    """Return the number of mutations, the seconds of the slowest command, and the failures."""
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
    cases = [(place, value) for place in paths_in(content) for value in (*NEVER, *ODD)]
    if number:
        cases = random.Random(seed).sample(cases, min(number, len(cases)))
    wrong, slowest = [], 0.0
    for place, value in cases:
        path.write_text(mutated(content, place, value))
        for command in commands:
            began = time.monotonic()
            code, messages = outcome(command)
            seconds = time.monotonic() - began
            slowest = max(slowest, seconds)
            lines = [line for line in messages.splitlines() if line.strip()]
            codes = (2, 4) if value in NEVER else (0, 2, 3, 4)
            if code not in codes or "Traceback" in messages or seconds > SECONDS:
                case = [command[0], list(place), value[:40], code, round(seconds, 1)]
                wrong.append([*case, lines[-1:], messages[-1500:]])
            shutil.rmtree(folder / "out", ignore_errors=True)
    path.write_text(text)
    return {"tried": len(cases), "slowest": round(slowest, 2), "wrong": wrong}


def main(folder: Path, number: int, seed: int, kinds: Sequence[str]) -> None:
    results = {kind: try_kind(folder / str(n), kind, number, seed) for n, kind in enumerate(kinds)}
    print(json.dumps(results), file=sys.__stdout__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(KINDS))
