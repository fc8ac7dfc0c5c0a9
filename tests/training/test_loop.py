"""The loop trains any objective: here a line through points, without scans or segmentation."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.recipe import load_recipe
from volseg.training.loop import Watch, serve, train_network
from volseg.training.objective import ParameterGroup
from volseg.training.ranks import team_of
from volseg.training.run import Job
from volseg.training.schedule import RunSettings, Stop

STEPS = 5


class Points:
    """Batches of points on y = 2 x."""

    waited = 0.0

    def __init__(self, seed, factor):
        self.seed, self.factor = seed, factor

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def at(self, step):
        x = torch.randn((8, 1), generator=torch.Generator().manual_seed(self.seed + step))
        return [(x, self.factor * x)]


class Errors:
    """Validation by the distance of the weight from the right one."""

    reserve, compares_last = 0.0, False

    def due_after(self, seconds):
        return True

    def validate_subset(self, weights, until=math.inf):
        return [abs(float(weights["weight"]) - 2.0)]

    validate_all = validate_subset


class Line:
    score_name = "validation_closeness"
    higher_is_better = True

    def __init__(self, factor=2.0, constant=False, **train):
        usual = {"steps_per_epoch": STEPS, "learning_rate": 0.05, "ema_decay": 0.5}
        self.train = load_recipe("lung_nodule_ct").train.model_copy(update=usual | train)
        self.factor, self.constant = factor, constant

    def identity(self):
        return [self.factor]

    def network(self):
        return nn.Linear(1, 1, bias=False)

    def groups(self, network):
        return [ParameterGroup(["weight"])]

    def prepare(self, network, step):
        pass

    def batches(self, seed, device, *, rank=0, ranks=1):
        return Points(seed, self.factor)

    def loss(self, total):
        return nn.MSELoss()

    def validation(self, device, seconds, tick):
        return Errors()

    def score(self, rows):
        return 0.5 if self.constant else 1 / (1 + rows[0])

    def validation_loss(self, rows):
        return None if self.constant else rows[0]

    def metrics(self, rows):
        return {"error": rows[0]}

    def n_missed(self, rows):
        return 0

    def check(self):
        pass

    def out_of_memory(self, device):
        return VolsegError("too large", fix="use less", code="E_BUDGET")


def trained(folder, objective, *, report=lambda history, done: None, resume=False, **settings):
    folder.mkdir(exist_ok=True)
    settings = RunSettings(**{"epochs": 6, "patience": 10} | settings)
    job = Job(objective=objective, settings=settings, checkpoints=folder, resume=resume)
    with team_of(torch.device("cpu"), 1, serve, "fp32") as team:
        return train_network(job, team, Watch(report, lambda doing, done: None))


def interrupt(history, done):
    if len(history) == 2:
        raise KeyboardInterrupt


def test_the_weights_of_the_best_score_are_kept(tmp_path):
    result = trained(tmp_path, Line())
    assert result.stop is Stop.FINISHED and result.stopped == ""
    assert len(result.history) == 6 and result.metrics["steps"] == 6 * STEPS
    scores = [epoch.validation_score for epoch in result.history]
    assert result.metrics["best_epoch"] == 1 + scores.index(max(scores))
    assert result.metrics["error"] == pytest.approx(1 / max(scores) - 1, abs=1e-3)


class Distance(Line):
    """The same line, judged by the distance, of which less is better."""

    score_name, higher_is_better = "validation_distance", False

    def score(self, rows):
        return rows[0]


def test_less_is_better_where_the_objective_says_so(tmp_path):
    near, far = trained(tmp_path / "near", Distance()), trained(tmp_path / "far", Line())
    assert torch.equal(near.weights["weight"], far.weights["weight"])
    scores = [epoch.validation_score for epoch in near.history]
    assert near.metrics["best_epoch"] == 1 + scores.index(min(scores))
    assert [epoch.validation_loss for epoch in far.history] == pytest.approx(scores, abs=1e-3)


class Saturated(Line):
    """A line of which every score is the best possible one, while the loss still falls."""

    def score(self, rows):
        return 1.0


def test_of_equal_scores_the_one_with_the_least_loss_is_kept(tmp_path):
    result = trained(tmp_path, Saturated())
    losses = [epoch.validation_loss for epoch in result.history]
    assert result.metrics["best_epoch"] == 1 + losses.index(min(losses)) > 1


class Frozen(Line):
    """A line with an offset, which alone is trained for two epochs."""

    def network(self):
        return nn.Linear(1, 1)

    def groups(self, network):
        return [ParameterGroup(["weight"]), ParameterGroup(["bias"])]

    def prepare(self, network, step):
        network.weight.requires_grad = step >= 2 * STEPS


def test_a_frozen_group_stays_for_its_steps_and_then_moves(tmp_path):
    scores = [epoch.validation_score for epoch in trained(tmp_path, Frozen()).history]
    assert scores[0] == scores[1] and len(set(scores[1:])) == len(scores) - 1


def test_each_reason_to_stop_is_told(tmp_path):
    assert trained(tmp_path, Line(constant=True), patience=2).stop is Stop.PATIENCE
    late = trained(tmp_path / "time", Line(), epochs=None, seconds=0.5, patience=10**6)
    assert late.stop is Stop.TIME
    pressed = trained(tmp_path / "pressed", Line(), report=interrupt)
    assert pressed.stop is Stop.INTERRUPTED
    assert pressed.metrics["stopped"] == pressed.stopped == "interrupted"
    assert "watched_validation_closeness" in pressed.metrics
    with pytest.raises(VolsegError, match="the loss became nan") as refusal:
        trained(tmp_path / "nan", Line(factor=math.nan))
    assert refusal.value.code == "E_DIVERGED"


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = trained(tmp_path / "whole", Line())
    trained(tmp_path / "parts", Line(), report=interrupt)
    resumed = trained(tmp_path / "parts", Line(), resume=True)
    assert torch.equal(whole.weights["weight"], resumed.weights["weight"])
    assert [epoch.loss for epoch in whole.history] == [epoch.loss for epoch in resumed.history]
    with pytest.raises(VolsegError, match="belongs to a run with another recipe"):
        trained(tmp_path / "parts", Line(factor=3.0), resume=True)


@pytest.mark.slow
def test_the_loop_does_not_know_segmentation():
    code = (
        "import sys, volseg.training.loop\n"
        "names = ('losses', 'validator', 'validate', 'batches', 'samples', 'segmentation')\n"
        "print([name for name in names if f'volseg.training.{name}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
