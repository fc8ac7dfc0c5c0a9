"""The training loop: batches → steps → validation → the best weights."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.evaluation.validation import ValidationRow, mean_dice, summary
from volseg.execution.cpu import is_out_of_memory
from volseg.execution.threads import Threads
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.networks import build_segmentation, copy_weights, unique_tensors
from volseg.recipe import Recipe
from volseg.training.batches import Batches
from volseg.training.checkpoint import (
    flatten,
    load_checkpoint,
    save_checkpoint,
    unflatten,
    unusable_checkpoint,
)
from volseg.training.losses import SegmentationLoss
from volseg.training.ranks import Team, total_over_ranks
from volseg.training.validator import Validator

WARM_UP = 0.03  # fraction of the run in which the learning rate rises
INTERRUPTED = "interrupted"  # by Ctrl-C
DIVERGED = "E_DIVERGED"
DIVERGED_FIX = "lower train.learning_rate in the recipe, or train.max_grad_norm, and train again"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Limits and seed of a run.

    Args:
        epochs: None to train until the time is over; then `seconds` is required.
        patience: stop after this many consecutive validations without a new best Dice.
        seconds: time budget of the loop and its final validation, None for no limit.
        freeze: patterns of the names of parameters that are not trained.
    """

    seed: int = 0
    epochs: int | None
    patience: int
    seconds: float | None = None
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of history.csv."""

    epoch: int
    step: int
    seconds: float
    learning_rate: float
    loss: float
    validation_dice: float | None  # on the validation subset; None if no time was left for it
    steps_per_second: float
    waiting_share: float  # fraction of the steps' time spent waiting for patches to be cut


Report = Callable[[Sequence[Epoch], float], None]
Tick = Callable[[str, float], None]  # what is being done, and the fraction of the run done


def no_tick(doing: str, done: float) -> None:
    """Ignore progress within an epoch."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The best weights, their history, and their validation on all validation cases."""

    weights: Mapping[str, torch.Tensor]
    history: Sequence[Epoch]
    metrics: Mapping[str, Any]
    validation: Sequence[ValidationRow] = ()
    stopped: str = ""  # why the run ended early


@dataclass(slots=True)
class _State:
    identity: str  # hash of recipe, seed, cases and initial weights
    step: int = 0
    seconds: float = 0.0
    reserve: float = 0.0  # seconds of the budget kept for the final validation
    is_finished: bool = False
    best_dice: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a rank needs to take part in a run."""

    training: Sequence[PreparedCase]
    recipe: Recipe
    settings: RunSettings
    checkpoint: Path
    initial: Mapping[str, torch.Tensor]
    identity: str
    resume: bool

    def to_message(self) -> tuple[Any, ...]:
        """Return the job for another process, with cases as their paths."""
        paths = [(case.folder, case.id) for case in self.training]
        shared = (self.recipe, self.settings, self.checkpoint, dict(self.initial))
        return (paths, *shared, self.identity, self.resume)

    @staticmethod
    def from_message(paths: Sequence[tuple[Path, str]], *fields: Any) -> Job:
        return Job([read_prepared_case(folder, case_id) for folder, case_id in paths], *fields)


def train_segmentation(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    settings: RunSettings,
    *,
    team: Team,
    checkpoints: Path,
    resume: bool,
    initial: Mapping[str, torch.Tensor],
    report: Report,
    tick: Tick = no_tick,
    threads: Threads | None = None,
) -> Trained:
    """Train the recipe's network and keep the weights with the best validation Dice.

    A batch depends only on the seed and the step, so a resumed run sees the same batches as an
    uninterrupted one. Ctrl-C or a loss that is not finite ends a run with its best weights so far.

    Args:
        team: the processes that share each batch; called in the one that leads them.
        checkpoints: folder for `last` (written after each epoch) and `best`.
        resume: continue from `last` if it exists.
        initial: weights to start from where name and shape match; empty for random ones.
        report: called after each epoch with the history and the fraction of the run done.
        tick: called after each step and each validated tile.
        threads: the search for the fastest number of threads; gets the time of each step.

    Raises:
        VolsegError: the loss is not finite before there are weights to keep, or the checkpoint to
            resume from is damaged.
    """
    began = time.monotonic()
    identity = _identity(training, validation, recipe, settings, team, initial)
    last, best = checkpoints / "last.safetensors", checkpoints / "best.safetensors"
    job = Job(training, recipe, settings, last, initial, identity, resume)
    if team.size > 1:
        team.broadcast(job.to_message())
    run = Run(job, team)
    with run.batches:
        run.threads = threads
        if threads is not None:
            threads.begin()
        return run.lead(validation, report, tick, best=best, began=began)


def serve(team: Team) -> None:
    """Take part in one run after another, as a rank from 1 on, until rank 0 broadcasts None."""
    while (message := team.broadcast()) is not None:
        run = Run(Job.from_message(*message), team)
        with run.batches:
            run.follow()


class Run:
    """A network in training on one rank, with its optimizer, loss and batches."""

    def __init__(self, job: Job, team: Team) -> None:
        self.job, self.team = job, team
        self.threads: Threads | None = None
        self.recipe, self.settings = job.recipe, job.settings
        self.device = team.fabric.device
        # Moved to its device before the optimizer takes its parameters.
        self.raw = _new_network(job.recipe, job.settings.seed).to(self.device)
        loaded = _matching(job.initial, unique_tensors(self.raw))
        self.random = [
            name for name in unique_tensors(self.raw) if job.initial and name not in loaded
        ]
        copy_weights(self.raw, unique_tensors(self.raw) | loaded)
        optimizer = _optimizer(_freeze(self.raw, job.settings.freeze), job.recipe)
        self.averaged = {key: tensor.clone() for key, tensor in unique_tensors(self.raw).items()}
        self.state = _State(identity=job.identity)
        if job.resume and job.checkpoint.exists():
            self.state = _restore(
                job.checkpoint, self.raw, self.averaged, optimizer, expected=job.identity
            )
        self.network, self.optimizer = team.fabric.setup(self.raw, optimizer)
        self.loss = SegmentationLoss(
            job.recipe.train.loss,
            class_weights=job.recipe.train.class_weights,
            regions=job.recipe.data.region_classes,
            total=total_over_ranks if team.size > 1 else None,
        ).to(self.device)
        self.batches = Batches(
            job.training,
            job.recipe,
            seed=job.settings.seed,
            device=self.device,
            rank=team.rank,
            ranks=team.size,
        )

    def lead(
        self,
        validation: Sequence[PreparedCase],
        report: Report,
        tick: Tick,
        *,
        best: Path,
        began: float,
    ) -> Trained:
        """Run rank 0, which paces the others, validates, saves and reports.

        `began` is the time at which this call started.
        """
        settings, state = self.settings, self.state
        clock = _Clock(settings, self.recipe.train.steps_per_epoch, state, began)
        validator = Validator(
            validation,
            self.recipe,
            self.device,
            settings.seconds,
            tick=lambda doing: tick(doing, clock.done()),
        )
        state.reserve = validator.reserve
        stopped = ""
        try:
            while not state.is_finished:
                loss, stepping, waited, steps = self._epoch(clock, tick)
                score, number = None, len(state.history) + 1
                if validator.due_after(stepping) or clock.done() >= 1:
                    subset = validator.validate_subset(self._finite_weights(), clock.ends)
                    score = mean_dice(subset) if subset else None
                    state.reserve = validator.reserve
                state.seconds = clock.seconds()
                epoch = Epoch(
                    epoch=number,
                    step=state.step,
                    seconds=round(state.seconds, 1),
                    learning_rate=self.optimizer.param_groups[0]["lr"],
                    loss=round(loss, 6),
                    validation_dice=None if score is None else round(score, 4),
                    steps_per_second=round(steps / stepping, 3),
                    waiting_share=round(waited / stepping, 4),
                )
                state.history.append(asdict(epoch))
                if score is not None and score > state.best_dice:
                    facts = {"epoch": number, "validation_dice": score}
                    save_checkpoint(best, self.averaged, facts)
                    state.best_dice, state.best_epoch = score, number
                since_best = [line["validation_dice"] for line in state.history[state.best_epoch :]]
                n_worse = sum(dice is not None for dice in since_best)
                state.is_finished = clock.done() >= 1 or n_worse >= settings.patience
                _save(self.job.checkpoint, self.raw, self.averaged, self.optimizer, state)
                report(self._history(), clock.done())
        except KeyboardInterrupt:
            stopped = INTERRUPTED
        except _DivergedError as error:
            stopped = str(error)
        self.team.broadcast(None)  # ends this run in the other ranks
        # Without any validation the last weights are the best.
        if stopped in ("", INTERRUPTED) and state.history and not state.best_epoch:
            save_checkpoint(best, self.averaged, {"epoch": len(state.history)})
            state.best_epoch = len(state.history)
        if stopped and not state.best_epoch:
            if stopped == INTERRUPTED:
                raise KeyboardInterrupt
            for case in self.job.training:
                case.check()  # bad values in a prepared case may be the cause
            raise VolsegError(stopped, fix=DIVERGED_FIX, code=DIVERGED)
        if stopped and stopped != INTERRUPTED:
            stopped = f"{stopped}; the best weights before that are kept; {DIVERGED_FIX}"
        weights, facts = load_checkpoint(best)
        metrics: dict[str, Any] = {"steps": state.step, "training_seconds": round(state.seconds, 1)}
        rows: list[ValidationRow] = []
        until = clock.ends
        # The earlier call may have used up the time, but validation still gets its reserve.
        if self.job.resume:
            until = max(until, time.monotonic() + state.reserve)
        try:
            started = time.monotonic()
            if stopped != INTERRUPTED:
                rows = validator.validate_all(weights, until)
            elapsed = time.monotonic() - started
            n_missed = len(validation) - len({row.case_id for row in rows})
            if stopped != INTERRUPTED and n_missed:
                metrics["not_validated"] = n_missed
            has_time = not n_missed and time.monotonic() + elapsed <= until
            has_newer = state.best_epoch < len(state.history)
            if not stopped and has_time and has_newer and validator.compares_last:
                last = validator.validate_all(self.averaged)
                if mean_dice(last) > mean_dice(rows):
                    rows, facts = last, {"epoch": len(state.history)}
                    weights = {name: tensor.cpu() for name, tensor in self.averaged.items()}
        except KeyboardInterrupt:
            stopped = INTERRUPTED
        metrics["best_epoch"] = facts["epoch"]
        if self.random:
            metrics["began_at_random"] = ", ".join(self.random)
        if rows:
            metrics |= summary(rows)
        if stopped:
            metrics["stopped"] = stopped
        if stopped and state.best_dice >= 0:
            metrics["watched_validation_dice"] = round(float(state.best_dice), 4)
        return Trained(weights, self._history(), metrics, rows, stopped)

    def _finite_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the averaged weights.

        Raises:
            _DivergedError: a weight is not finite. The losses can still be: the last step of an
                epoch changes the weights after its loss.
        """
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.averaged.values()):
            raise _DivergedError(f"the weights were no longer finite after step {self.state.step}")
        return self.averaged

    def _history(self) -> list[Epoch]:
        return [Epoch(**line) for line in self.state.history]

    def follow(self) -> None:
        """Run another rank, which steps when rank 0 does."""
        self.network.train()
        while (done := self.team.broadcast()) is not None:
            self.step(done)

    def step(self, done: float) -> torch.Tensor:
        """Take one step on this rank and return the loss, which a GPU may still be computing.

        `done` is the fraction of the run before this step.
        """
        train, fabric = self.recipe.train, self.team.fabric
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * _schedule(done, train.schedule)
        parts = self.batches.at(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with _seeded(self.settings.seed, self.state.step, self.team.rank, self.device):
            for index, (images, masks) in enumerate(parts):
                is_last = index + 1 == len(parts)
                is_local = not is_last and self.team.size > 1
                with fabric.no_backward_sync(self.network, enabled=is_local):
                    loss = self.loss(self.network(images), masks) / len(parts)
                    if train.l1 and is_last:
                        l1 = sum(weights.abs().sum() for weights in self.raw.parameters())
                        loss = loss + train.l1 * l1
                    fabric.backward(loss)
                total += loss.detach()
        fabric.clip_gradients(
            self.network, self.optimizer, max_norm=train.max_grad_norm, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.state.step += 1
        if self.team.rank == 0:
            decay = min(train.ema_decay, self.state.step / (self.state.step + 10))
            _average(self.averaged, unique_tensors(self.raw), decay)
        return total

    @contextmanager
    def _reporting_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            n, patch = self.recipe.batch_size, " × ".join(map(str, self.recipe.patch_shape))
            raise VolsegError(
                f"{n} patches of {patch} voxels do not fit into the memory of {self.device}",
                fix="lower train.batch_size or train.patch_shape in the recipe, "
                "or set them to 'auto' and give the memory with --vram",
                code="E_BUDGET",
            ) from error

    def _epoch(self, clock: _Clock, tick: Tick) -> tuple[float, float, float, int]:
        """Train one epoch.

        Returns:
            Mean loss, seconds of all steps, seconds of these spent waiting for patches, and the
            number of steps.
        """
        started, waited = time.monotonic(), self.batches.waited
        losses: list[torch.Tensor] = []
        self.network.train()
        n_steps = self.recipe.train.steps_per_epoch
        while len(losses) < n_steps and not (losses and clock.done() >= 1):
            began = time.monotonic()
            with self.team.in_step(), self._reporting_out_of_memory():
                losses.append(self.step(self.team.broadcast(clock.done())))
            if self.threads is not None:
                self.threads.took(time.monotonic() - began)
            tick(f"step {self.state.step}", clock.done())
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise _DivergedError(f"the loss became {loss} at about step {self.state.step}")
        return loss, time.monotonic() - started, self.batches.waited - waited, len(losses)


class _DivergedError(Exception):
    pass


class _Clock:
    """The progress of a run, in steps or seconds; with both limits, the one reached first."""

    def __init__(
        self, settings: RunSettings, steps_per_epoch: int, state: _State, began: float
    ) -> None:
        self._settings, self._state = settings, state
        self._steps = math.inf if settings.epochs is None else settings.epochs * steps_per_epoch
        self._started = began - state.seconds

    @property
    def ends(self) -> float:
        """The time of `time.monotonic` at which the run, with its validation, has to end."""
        seconds = self._settings.seconds
        return math.inf if seconds is None else self._started + seconds

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def done(self) -> float:
        """Return the fraction of the run done."""
        fraction = self._state.step / self._steps
        if self._settings.seconds is not None:
            available = max(1.0, self._settings.seconds - self._state.reserve)
            fraction = max(fraction, self.seconds() / available)
        return min(1.0, fraction)


@contextmanager
def _seeded(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator, which dropout uses, so that a resumed run draws the same."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
        yield


def _optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    train = recipe.train
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            momentum=0.99,
            nesterov=True,
        )
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


def _freeze(network: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Freeze the parameters whose name matches a pattern; return the others.

    Raises:
        VolsegError: a pattern matches no parameter, or all are frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    unused = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)]
    if unused:
        raise VolsegError(
            f"no layer matches {unused[0]!r}; the first are {', '.join(names[:3])}",
            fix="give patterns of these names to --freeze, such as 'downsamples.*'",
            code="E_USAGE",
        )
    trainable = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad = not any(fnmatch(name, pattern) for pattern in patterns)
        if parameter.requires_grad:
            trainable.append(parameter)
    if not trainable:
        problem = "--freeze leaves no parameter to train"
        raise VolsegError(problem, fix="freeze fewer layers", code="E_USAGE")
    return trainable


def _identity(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    settings: RunSettings,
    team: Team,
    initial: Mapping[str, torch.Tensor],
) -> str:
    """Hash everything that decides what a step does, so that only the same run is resumed."""
    cases = [[case.id, case.record.get("key")] for case in (*training, *validation)]
    options = [settings.seed, team.size, team.precision, list(settings.freeze)]
    facts = [recipe.sha256, options, cases, len(training)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(initial):
        digest.update(name.encode() + initial[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _new_network(recipe: Recipe, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # weights are drawn from torch's global generator
        torch.manual_seed(seed)
        return build_segmentation(recipe)


def _matching(
    initial: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the initial tensors that match by name and shape: usually all but the output head."""
    matching = {
        name: tensor
        for name, tensor in initial.items()
        if name in weights and weights[name].shape == tensor.shape
    }
    if initial and len(matching) < len(weights) / 2:
        n, total = len(matching), len(weights)
        raise VolsegError(
            f"only {n} of the {total} tensors of the recipe's network match the model of --init",
            fix="use a recipe with the [network] of that model, or train without --init",
            code="E_CKPT",
        )
    return matching


def _schedule(done: float, kind: str) -> float:
    """Return the learning-rate factor: linear warm-up, then cosine or polynomial decay to 0."""
    if done < WARM_UP:
        return max(0.05, done / WARM_UP)
    decay = (done - WARM_UP) / (1 - WARM_UP)
    return (1 - decay) ** 0.9 if kind == "poly" else 0.5 * (1 + math.cos(math.pi * decay))


@torch.no_grad()
def _average(
    averaged: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], decay: float
) -> None:
    for key, tensor in averaged.items():
        if tensor.is_floating_point():
            tensor.lerp_(current[key], 1 - decay)
        else:
            tensor.copy_(current[key])


def _save(
    path: Path,
    network: nn.Module,
    averaged: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: _State,
) -> None:
    moments = {
        f"{index}.{key}": tensor
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    tensors = (
        flatten("network", unique_tensors(network))
        | flatten("averaged", averaged)
        | flatten("optimizer", moments)
    )
    save_checkpoint(path, tensors, asdict(state))


def _restore(
    path: Path,
    network: nn.Module,
    averaged: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    expected: str,
) -> _State:
    tensors, state = load_checkpoint(path)
    if "identity" not in state:
        raise unusable_checkpoint(path, "it has no run identity")
    if state["identity"] != expected:
        raise VolsegError(
            f"{path}: belongs to a run with another recipe, seed, fold, precision, number of "
            "devices, frozen layers, --init or cases",
            fix="resume with the options the run was started with, or delete the folder",
            code="E_EXISTS",
        )
    copy_weights(network, unflatten("network", tensors))
    try:
        for key, tensor in unflatten("averaged", tensors).items():
            averaged[key].copy_(tensor)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in unflatten("optimizer", tensors).items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        return _State(**state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise unusable_checkpoint(path, error) from error
