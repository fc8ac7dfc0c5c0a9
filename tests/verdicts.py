"""What each command says of one dataset: refused, failed cases, warnings."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from generated_datasets import LABELS, N_CASES, Dataset, Scope

import volseg
from volseg.bundle import ModelBundle, save_bundle
from volseg.errors import VolsegError
from volseg.io.formats import stem_of
from volseg.io.layouts import survey_cases
from volseg.networks import build_segmentation, unique_tensors
from volseg.planning.fingerprint import DatasetFingerprint, IntensityStatistics
from volseg.recipe import Recipe, parse_recipe

OF_DATASETS = (
    Scope.WHOLE,
    Scope.CHANNEL,
    Scope.REQUIREMENT,
    Scope.SPLIT,
)  # no row can hold such a fault
REMARKS = (Scope.REMARK, Scope.MASK_REMARK, Scope.TRAINING_REMARK)
COUNTING = ("preprocess", "infer", "measure", "evaluate")  # report how many cases they used
COMMANDS = ("check", "plan", "preprocess", "train", "infer", "measure", "evaluate")
REFUSING = ("check", "plan", "train")  # refuse a dataset of which one case cannot be used
RECIPE = """
name = "balls"
description = "Bright balls in noise."
intended_use = "Tests."
limits = "Tests only."
[data]
intensity_unit = "a.u."
[preprocess]
spacing_mm = [1.5, 1.5, 1.5]
[preprocess.normalise]
method = "zscore"
[network]
name = "unet3d"
features = [4, 4, 4]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[train]
patch_shape = [8, 8, 8]
batch_size = 1
steps_per_epoch = 2
epochs = 1
"""
CLASSES = """
[classify]
column = "grade"
classes = { low = [1, 2], high = [3, 4] }
field_of_view_mm = 12
pixels = 8
low = 0
high = 150
batch_size = 1
epochs = 1
[classify.network]
name = "cnn2d"
features = [4]
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a command said.

    Args:
        problems: sentences of the error that it raised; for check of each problem with `E_`.
        code: of the first of them.
        failed: case → reason.
        remarks: warnings and what was announced.
        n_done: number of cases that were used, where the command counts them.
    """

    problems: Sequence[str] = ()
    code: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    n_done: int = 0

    @property
    def text(self) -> str:
        return "; ".join([*self.problems, *self.failed.values()])

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.failed


def recipe_of(data: Dataset) -> Recipe:
    """Return a recipe for a generated dataset; with classes for tables."""
    has_classes = data.layout.kind == "table"
    content = tomllib.loads(RECIPE + (CLASSES if has_classes else ""))
    content["data"] |= {"channels": data.channels, "labels": LABELS}
    return parse_recipe(content, where="the test")


def untrained(folder: Path, data: Dataset) -> Path:
    """Save a model with random weights for the channels of a dataset, once per number of them."""
    out = folder / "_".join(data.channels)
    if out.exists():
        return out
    content = tomllib.loads(RECIPE)
    content["data"] |= {"channels": data.channels, "labels": LABELS}
    recipe = parse_recipe(content, where="the test")
    torch.manual_seed(0)
    numbers = IntensityStatistics(mean=20, sd=10, p00_5=0, median=20, p99_5=120)
    fingerprint = DatasetFingerprint(
        n_cases=3,
        spacings_mm=((1.0, 1.5, 2.0),),
        shapes=((12, 12, 12),),
        label_voxels={1: 9},
        foreground=dict.fromkeys(data.channels, numbers),
    )
    weights = {"segmentation": unique_tensors(build_segmentation(recipe))}
    save_bundle(
        ModelBundle(recipe=recipe, fingerprint=fingerprint, weights=weights, metrics={}), out
    )
    return out


def predictions(data: Dataset, out: Path) -> Path:
    """Copy the masks of a dataset before its fault, named after their cases."""
    out.mkdir()
    for case in sound_cases(data):
        assert case.reference is not None
        suffix = case.reference.name.removeprefix(stem_of(case.reference))
        shutil.copy(case.reference, out / f"{case.id}{suffix}")
    return out


def sound_cases(data: Dataset):
    """Return the cases of a dataset as they were before its fault."""
    return survey_cases(data.sound).cases


def faulty_id(data: Dataset) -> str:
    """Return the id of the case with the fault."""
    scan = data.sound_folder / data.scan(data.at or 1).relative_to(data.folder)
    return next(case.id for case in sound_cases(data) if scan in case.images.values())


def verdicts_of(
    data: Dataset, work: Path, models: Path, commands: tuple[str, ...] = COMMANDS
) -> dict[str, Verdict]:
    """Run commands on a dataset; return what each said."""
    recipe = recipe_of(data) if data.has_recipe else None
    calls = {
        "check": lambda **_: volseg.check(data.path, recipe),
        "plan": lambda announce: volseg.plan(
            data.path, recipe=recipe, device="cpu", memory="2G", folds=1
        ),
        "preprocess": lambda announce: volseg.preprocess(
            data.path, recipe=recipe, out=work / "p", device="cpu", announce=announce
        ),
        "train": lambda announce: volseg.train(
            data.path,
            recipe=recipe_of(data) if data.scope is Scope.NONE else recipe,
            out=work / "t",
            device="cpu",
            folds=1,
            preview=data.scope is not Scope.NONE,
            announce=announce,
        ),
        "infer": lambda announce: volseg.infer(
            data.path,
            model=untrained(models, data),
            out=work / "i",
            device="cpu",
            pages=False,
            accept_mismatch=True,
            backend="torch",
            announce=announce,
        ),
        "measure": lambda announce: volseg.measure(
            cases=data.path,
            out=work / "m",
            pages=False,
            intensity_unit="a.u.",
            announce=announce,
            channel=data.channels[0] if len(data.channels) > 1 else None,
        ),
        "evaluate": lambda announce: volseg.evaluate(
            reference=data.path,
            predicted=predictions(data, work / "masks"),
            out=work / "e",
            announce=announce,
        ),
    }
    return {name: _verdict(calls[name], is_check=name == "check") for name in commands}


def _verdict(call: Callable[..., Any], *, is_check: bool) -> Verdict:
    lines: list[str] = []
    try:
        report = call(announce=lines.append)
    except VolsegError as error:
        return Verdict([error.problem], error.code, remarks=lines)
    if is_check:
        errors = [problem for problem in report if problem["code"].startswith("E_")]
        remarks = [f"{p['code']}: {p['problem']}" for p in report if p not in errors]
        code = errors[0]["code"] if errors else ""
        return Verdict([problem["problem"] for problem in errors], code, remarks=remarks)
    return Verdict(
        failed=report.failed, remarks=[*lines, *report.warnings], n_done=len(report.done)
    )


# ---- the rule


def readers_of(data: Dataset) -> set[str]:
    """Return the commands that read what holds the fault."""
    training = {"check", "plan", "preprocess", "train"}
    on_scan = {"measure"} if data.channel in ("", data.channels[0]) else set()
    return {
        Scope.NONE: set(),
        Scope.WHOLE: set(COMMANDS),
        Scope.REMARK: set(COMMANDS),
        Scope.CHANNEL: {*training, "infer", *on_scan},
        Scope.SCAN: {*training, "infer", *on_scan},
        Scope.MASK: {*training, "measure", "evaluate"},
        Scope.MASK_REMARK: {*training, "measure", "evaluate"},
        Scope.TRAINING: training,
        Scope.REQUIREMENT: training,
        Scope.SPLIT: training,
        Scope.TRAINING_REMARK: training,
    }[data.scope]


def disagreements(data: Dataset, verdicts: Mapping[str, Verdict]) -> list[str]:
    """Return how the verdicts break the rule; none if all commands agree and name the fault."""
    wrong = []
    for command, verdict in verdicts.items():
        is_reader = command in readers_of(data)
        if is_reader and data.scope not in REMARKS:
            wrong += _not_named(data, command, verdict, verdicts["check"])
            continue
        if not verdict.is_good:
            wrong.append(f"{command} refuses what it does not read: {verdict.text}")
        if command in COUNTING and verdict.n_done < N_CASES - (data.scope in REMARKS):
            wrong.append(f"{command} used {verdict.n_done} cases")
        text = "; ".join(verdict.remarks)
        if is_reader or data.scope is Scope.SPLIT:
            wrong += [f"{command} does not say {w}: {text}" for w in data.words if w not in text]
    return wrong


def _not_named(data: Dataset, command: str, verdict: Verdict, check: Verdict) -> list[str]:
    """Return how a command that reads the fault does not name it as it should."""
    refuses = data.scope in OF_DATASETS or command in REFUSING
    # Without a recipe the labels are those of dataset.json, so there is nothing to prepare with.
    refuses |= data.scope is Scope.TRAINING and not data.has_recipe
    if refuses != bool(verdict.problems):
        return [f"{command} gives no {'error' if refuses else 'row'}: {verdict.text}"]
    if not refuses and set(verdict.failed) != {faulty_id(data)}:
        return [f"{command} fails {sorted(verdict.failed)}"]
    if missing := [word for word in data.words if word not in verdict.text]:
        return [f"{command} does not name {missing}: {verdict.text}"]
    is_other_code = check.code not in f"{verdict.code} {verdict.text}"
    is_other_sentence = not any(problem in verdict.text for problem in check.problems)
    # evaluate compares a mask with a reference instead of a scan, and says so
    if is_other_code or (is_other_sentence and (command != "evaluate" or refuses)):
        return [f"{command} says {verdict.code} {verdict.text} BUT {check.code} {check.text}"]
    return []
