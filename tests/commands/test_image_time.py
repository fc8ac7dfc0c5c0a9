"""A time budget for images holds, or is refused with one that suffices."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace

import pytest
from image_sets import table_of_images

import volseg
from volseg.commands.forecast import GUARDED_SECONDS
from volseg.commands.image_data import PREPARING, READING
from volseg.commands.image_time import BASELINE_SECONDS, ImageTime, _Guard
from volseg.errors import VolsegError
from volseg.execution.time_budget import TimeBudget
from volseg.recipe import ClassifyRecipe
from volseg.sizing import LEAST_STEPS


def recipe(**train):
    train = {"epochs": 4, "baselines": False, "batch_size": 8, "steps_per_epoch": 5} | train
    content = {
        "task": "classify",
        "name": "shapes",
        "description": "Shapes.",
        "data": {"target": "shape"},
        "network": {"name": "cnn_small", "features": (8, 16)},
        "train": train,
    }
    return ClassifyRecipe.model_validate(content)


class Progress:
    """A progress callback that is silent."""

    def __call__(self, stage, done, detail):
        pass

    def tick(self, stage, done, detail):
        pass


@dataclass
class Call:
    """The part of a call of `train` that time depends on."""

    time: TimeBudget
    options: SimpleNamespace
    progress: Progress = field(default_factory=Progress)
    threads: None = None
    team: None = None


def call_of(seconds, **options):
    given = {"epochs": None, "init": None, "folds": None, "seed": 0} | options
    return Call(TimeBudget(seconds=seconds), SimpleNamespace(**given))


def objective_of(stated, n_validation=24):
    return SimpleNamespace(recipe=stated, validation_images=range(n_validation))


@pytest.fixture
def step(monkeypatch):
    """Sets how long a step takes, without one."""

    def set_seconds(seconds):
        speed = import_module("volseg.training.speed")
        monkeypatch.setattr(speed, "seconds_per_step", lambda *a, **k: seconds)

    return set_seconds


def is_enough(seconds, networks=1, stated=None, **options):
    try:
        ImageTime(call_of(seconds, **options)).check(objective_of(stated or recipe()), networks)
    except VolsegError as refusal:
        assert refusal.code == "E_BUDGET"
        return False
    return True


def test_the_budget_that_a_refusal_suggests_suffices_and_the_refused_one_does_not(step):
    for seconds in (0.01, 0.2, 3.0):
        step(seconds)
        for networks in (1, 5):
            for stated in (recipe(), recipe(baselines=True)):
                time_of = ImageTime(call_of(0.1 * seconds * LEAST_STEPS, folds=networks))
                with pytest.raises(VolsegError, match="the time budget of") as caught:
                    time_of.check(objective_of(stated), networks)
                longer = re.search(r"give --time-budget (\d+)([sm])", caught.value.fix)
                needed = int(longer[1]) * (60 if longer[2] == "m" else 1)
                assert is_enough(needed, networks, stated)
                assert not is_enough(seconds * LEAST_STEPS * networks, networks, stated)
                assert ("--folds 1" in caught.value.fix) == (networks > 1)


def test_few_epochs_and_fine_tuning_need_fewer_steps_and_validation_counts(step):
    step(1.0)
    assert not is_enough(150)
    assert is_enough(150, epochs=10)  # of five steps each
    assert is_enough(150, init="weights.safetensors")
    assert is_enough(280, stated=recipe()) and not is_enough(
        280, stated=recipe(steps_per_epoch=1)
    )  # validation follows every step then
    assert is_enough(None)


def test_the_time_of_baselines_is_kept_for_them():
    for seconds in (60.0, 6000.0):
        without, with_them = recipe(), recipe(baselines=True)
        times = ImageTime(call_of(seconds))
        assert times.baselines(without) == 0
        assert times.baselines(with_them) == min(BASELINE_SECONDS, 0.1 * seconds)
        difference = times.left(without) - times.left(with_them)
        assert difference == pytest.approx(times.baselines(with_them), abs=0.1)
    assert ImageTime(call_of(None)).left(recipe()) is None


def test_reading_that_takes_too_long_is_refused_once_its_pace_is_known():
    now = time.monotonic()
    for budget, stage, is_refused in (
        (1000, READING, False),
        (150, READING, True),  # preparing takes about as long
        (150, PREPARING, False),
    ):
        call = Call(TimeBudget(seconds=budget, started=now), SimpleNamespace())
        clock = iter((now, now + GUARDED_SECONDS / 2, now + 10))
        guard = _Guard(call, lambda clock=clock: next(clock))
        guard.show(stage, 0.01, "a")
        guard.show(stage, 0.02, "b")  # too early to tell
        if not is_refused:
            guard.show(stage, 0.1, "c")
            continue
        with pytest.raises(VolsegError, match="reading and preparing the images") as caught:
            guard.show(stage, 0.1, "c")
        assert "5m" in caught.value.fix  # 1.5 times 200 s


def test_a_short_budget_is_refused_before_training_and_the_folder_can_be_used_again(tmp_path):
    table = table_of_images(tmp_path / "data")
    stated = recipe(steps_per_epoch="auto", epochs=1)
    with pytest.raises(VolsegError, match=r"200 steps with validation take about"):
        volseg.train(table, recipe=stated, out=tmp_path / "m", time_budget_seconds=1)
    assert not (tmp_path / "m" / "model.json").exists()
    began = time.monotonic()
    volseg.train(table, recipe=stated, out=tmp_path / "m", time_budget_seconds=60, epochs=1)
    assert (tmp_path / "m" / "model.json").is_file() and time.monotonic() - began < 60
