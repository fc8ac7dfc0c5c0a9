"""The one training loop: batches → steps → validation → the best weights."""

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
from volseg.evaluate.validation import ValidationRow, mean_dice, summary
from volseg.execute.cpu import is_out_of_memory
from volseg.execute.threads import Threads
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.models import build_segmentation, set_weights, weights_of
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.batches import Batches
from volseg.train.checkpoint import (
    flatten,
    load_checkpoint,
    save_checkpoint,
    unflatten,
    unusable_checkpoint,
)
from volseg.train.losses import SegmentationLoss
from volseg.train.ranks import Team, total_over_ranks
from volseg.train.watch import Watch

WARM_UP = 0.03  # share of the run in which the learning rate rises
INTERRUPTED = "interrupted"  # why a run stopped
DIVERGED = "E_DIVERGED"
DIVERGED_FIX = "lower train.learning_rate in the recipe, or train.max_grad_norm, and train again"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run may use.

    Args:
        epochs: after which it ends; None: when its time is over, which then has to be given.
        patience: looks at the watched cases, one after another, none of them better than the best, that end it.
        seconds: the budget of the whole loop with its final validation, None for no limit.
    """

    seed: int = 0
    epochs: int | None
    patience: int
    seconds: float | None = None
    freeze: tuple[str, ...] = ()  # patterns of the names of parameters that stay as they are


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of history.csv."""

    epoch: int
    step: int
    seconds: float
    learning_rate: float
    loss: float
    validation_dice: (
        float | None
    )  # of the watched cases; empty where a time budget left no time to look
    steps_per_second: float
    waiting_share: float  # of the time of the steps, in which they waited for patches to be cut


Report = Callable[[Sequence[Epoch], float], None]
Tick = Callable[
    [str, float], None
]  # what is being done within an epoch, and the share of the run that is done


def no_tick(doing: str, done: float) -> None:
    """The callback of those who only want to hear of epochs."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The best weights, how they came about, and what the whole validation split says of them."""

    weights: Mapping[str, torch.Tensor]
    history: Sequence[Epoch]
    metrics: Mapping[str, Any]
    validation: Sequence[ValidationRow] = ()
    stopped: str = ""  # why, where it was not its end


@dataclass(slots=True)
class _State:
    identity: str  # of the run: recipe, plan, seed, cases and first weights
    step: int = 0
    seconds: float = 0.0
    reserve: float = 0.0  # seconds of the budget that are kept for the final validation
    is_finished: bool = False
    best_dice: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank has to know to take part in a run."""

    training: Sequence[PreparedCase]
    recipe: Recipe
    plan: Plan
    settings: RunSettings
    checkpoint: Path
    initial: Mapping[str, torch.Tensor]
    identity: str
    resume: bool

    def sent(self) -> tuple[Any, ...]:
        """As it goes to another process: cases by their place on disk."""
        places = [(case.folder, case.id) for case in self.training]
        return (
            places, self.recipe, self.plan, self.settings, self.checkpoint, dict(self.initial), self.identity, self.resume
        )  # fmt: skip

    @staticmethod
    def received(places: Sequence[tuple[Path, str]], *rest: Any) -> Job:
        return Job([read_prepared_case(folder, case_id) for folder, case_id in places], *rest)


def train_segmentation(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
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

    A batch depends on the seed and the step alone, so an interrupted run that is resumed sees what it would have seen. A run that
    Ctrl-C ends, or whose loss is no longer finite, gives the best weights that it has had.

    Args:
        team: the processes that share each batch; called in the one that leads them.
        checkpoints: folder for `last` (written after each epoch) and `best`.
        resume: go on from `last` where it is there.
        initial: weights to start from where name and shape agree with the network's; empty for random ones.
        report: called after each epoch with the history so far and the share of the run that is done, in [0, 1].
        tick: called after each step and each validated tile.
        threads: told how long each step takes, where their number may change during the run.

    Raises:
        VolsegError: the loss is not finite before there are any weights to keep, or the checkpoint to resume from is damaged.
    """
    began = time.monotonic()
    identity = _identity(training, validation, recipe, plan, settings, team, initial)
    job = Job(
        training,
        recipe,
        plan,
        settings,
        checkpoints / "last.safetensors",
        initial,
        identity,
        resume,
    )
    if team.size > 1:
        team.tell(job.sent())
    run = Run(job, team)
    with run.batches:
        run.threads = threads
        if threads is not None:
            threads.begin()
        return run.lead(
            validation, report, tick, best=checkpoints / "best.safetensors", began=began
        )


def serve(team: Team) -> None:
    """What the ranks from 1 on do: take part in one run after the other until they are told None."""
    while (sent := team.tell()) is not None:
        run = Run(Job.received(*sent), team)
        with run.batches:
            run.follow()


class Run:
    """A network on its way, on one rank: what a step changes."""

    def __init__(self, job: Job, team: Team) -> None:
        self.job, self.team = job, team
        self.threads: Threads | None = None
        self.recipe, self.settings = job.recipe, job.settings
        self.device = team.fabric.device
        # On its device before the optimizer takes its parameters.
        self.raw = _new_network(job.recipe, job.settings.seed).to(self.device)
        taken = _fitting(job.initial, weights_of(self.raw))
        self.left_out = [name for name in weights_of(self.raw) if job.initial and name not in taken]
        set_weights(self.raw, weights_of(self.raw) | taken)
        trained = _unfrozen(self.raw, job.settings.freeze)
        optimizer = _optimizer(trained, job.recipe)
        self.averaged = {key: tensor.clone() for key, tensor in weights_of(self.raw).items()}
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
            job.plan,
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
        """Rank 0: decides when to go on, validates, keeps and reports. `began` is when this call began."""
        settings, state = self.settings, self.state
        clock = _Clock(settings, self.recipe.train.steps_per_epoch, state, began)
        watch = Watch(
            validation,
            self.recipe,
            self.job.plan,
            self.device,
            settings.seconds,
            tick=lambda doing: tick(doing, clock.done()),
        )
        state.reserve = watch.reserve
        stopped = ""
        try:
            while not state.is_finished:
                loss, stepping, waited, steps = self._epoch(clock, tick)
                score, number = None, len(state.history) + 1
                if watch.is_due(stepping) or clock.done() >= 1:
                    looked = watch.look(self._finite_weights(), clock.ends)
                    score = mean_dice(looked) if looked else None
                    state.reserve = watch.reserve
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
                    save_checkpoint(
                        best, self.averaged, {"epoch": number, "validation_dice": score}
                    )
                    state.best_dice, state.best_epoch = score, number
                looks = [
                    each
                    for each in state.history[state.best_epoch :]
                    if each["validation_dice"] is not None
                ]
                state.is_finished = clock.done() >= 1 or len(looks) >= settings.patience
                _save(self.job.checkpoint, self.raw, self.averaged, self.optimizer, state)
                report(self._history(), clock.done())
        except KeyboardInterrupt:
            stopped = INTERRUPTED
        except _DivergedError as error:
            stopped = str(error)
        self.team.tell(None)  # lets the other ranks end this run
        # Nobody has looked, or there was no time to: these are all there is.
        if stopped in ("", INTERRUPTED) and state.history and not state.best_epoch:
            save_checkpoint(best, self.averaged, {"epoch": len(state.history)})
            state.best_epoch = len(state.history)
        if stopped and not state.best_epoch:
            if stopped == INTERRUPTED:
                raise KeyboardInterrupt
            for case in self.job.training:
                case.check()  # what a stranger prepared may be why
            raise VolsegError(stopped, fix=DIVERGED_FIX, code=DIVERGED)
        if stopped and stopped != INTERRUPTED:
            stopped = f"{stopped}; these are the best weights until then; {DIVERGED_FIX}"
        weights, chosen = load_checkpoint(best)
        metrics: dict[str, Any] = {"steps": state.step, "training_seconds": round(state.seconds, 1)}
        rows: list[ValidationRow] = []
        until = clock.ends
        if (
            self.job.resume
        ):  # an earlier call may have spent the time of the run, but not that of its validation
            until = max(until, time.monotonic() + state.reserve)
        try:
            since = time.monotonic()
            if stopped != INTERRUPTED:
                rows = watch.validate(weights, until)
            took, missed = (
                time.monotonic() - since,
                len(validation) - len({row.case_id for row in rows}),
            )
            if stopped != INTERRUPTED and missed:
                metrics["not_validated"] = missed
            in_time = not missed and time.monotonic() + took <= until
            if (
                not stopped
                and in_time
                and watch.compares_last
                and state.best_epoch < len(state.history)
            ):
                last = watch.validate(self.averaged)
                if mean_dice(last) > mean_dice(rows):
                    rows, chosen = last, {"epoch": len(state.history)}
                    weights = {name: tensor.cpu() for name, tensor in self.averaged.items()}
        except KeyboardInterrupt:
            stopped = INTERRUPTED
        metrics["best_epoch"] = chosen["epoch"]
        if self.left_out:
            metrics["began_at_random"] = ", ".join(self.left_out)
        if rows:
            metrics |= summary(rows)
        if stopped:
            metrics["stopped"] = stopped
        if stopped and state.best_dice >= 0:
            metrics["watched_validation_dice"] = round(float(state.best_dice), 4)
        return Trained(weights, self._history(), metrics, rows, stopped)

    def _finite_weights(self) -> Mapping[str, torch.Tensor]:
        """The averaged weights.

        Raises:
            _DivergedError: one is not finite, though the losses were: the last step of an epoch did it.
        """
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.averaged.values()):
            raise _DivergedError(f"the weights were no longer finite after step {self.state.step}")
        return self.averaged

    def _history(self) -> list[Epoch]:
        return [Epoch(**line) for line in self.state.history]

    def follow(self) -> None:
        """The other ranks: step when rank 0 does."""
        self.network.train()
        while (done := self.team.tell()) is not None:
            self.step(done)

    def step(self, done: float) -> torch.Tensor:
        """One step of this rank, `done` of the run being behind; the loss, which a GPU may still be computing."""
        train, fabric = self.recipe.train, self.team.fabric
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * _schedule(done, train.schedule)
        parts = self.batches.at(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with _drawing(self.settings.seed, self.state.step, self.team.rank, self.device):
            for index, (images, masks) in enumerate(parts):
                is_last = index + 1 == len(parts)
                with fabric.no_backward_sync(
                    self.network, enabled=not is_last and self.team.size > 1
                ):
                    loss = self.loss(self.network(images), masks) / len(parts)
                    if train.l1 and is_last:
                        loss = loss + train.l1 * sum(
                            weights.abs().sum() for weights in self.raw.parameters()
                        )
                    fabric.backward(loss)
                total += loss.detach()
        fabric.clip_gradients(
            self.network, self.optimizer, max_norm=train.max_grad_norm, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.state.step += 1
        if self.team.rank == 0:
            decay = min(train.ema_decay, self.state.step / (self.state.step + 10))
            _average(self.averaged, weights_of(self.raw), decay)
        return total

    @contextmanager
    def _fitting_into_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            patch = " × ".join(map(str, self.job.plan.patch_shape))
            raise VolsegError(
                f"{self.job.plan.batch_size} patches of {patch} voxels do not fit into the memory of {self.device}",
                fix="lower train.batch_size or train.patch_shape in the recipe, or make them 'auto' and state the memory with --vram",
                code="E_BUDGET",
            ) from error

    def _epoch(self, clock: _Clock, tick: Tick) -> tuple[float, float, float, int]:
        """Mean loss, seconds of the steps, seconds of these in which they waited for patches, and how many they were."""
        started, waited = time.monotonic(), self.batches.waited
        losses: list[torch.Tensor] = []
        self.network.train()
        while len(losses) < self.recipe.train.steps_per_epoch and not (
            losses and clock.done() >= 1
        ):
            began = time.monotonic()
            with self.team.in_step(), self._fitting_into_memory():
                losses.append(self.step(self.team.tell(clock.done())))
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
    """How much of a run is done: by its steps, by its seconds, or, where both are limited, by what ends first."""

    def __init__(
        self, settings: RunSettings, steps_per_epoch: int, state: _State, began: float
    ) -> None:
        self._settings, self._state = settings, state
        self._steps = math.inf if settings.epochs is None else settings.epochs * steps_per_epoch
        self._started = began - state.seconds

    @property
    def ends(self) -> float:
        """The time of `time.monotonic` at which the run has to be over, its validation included."""
        return (
            math.inf if self._settings.seconds is None else self._started + self._settings.seconds
        )

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def done(self) -> float:
        share = self._state.step / self._steps
        if self._settings.seconds is not None:
            share = max(
                share, self.seconds() / max(1.0, self._settings.seconds - self._state.reserve)
            )
        return min(1.0, share)


@contextmanager
def _drawing(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Layers that draw, such as dropout, draw from torch's global generator: here what a resumed run would draw again."""
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


def _unfrozen(network: nn.Module, freeze: Sequence[str]) -> list[nn.Parameter]:
    """The parameters to train; the others are frozen.

    Raises:
        VolsegError: a pattern matches no parameter, or all are frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    idle = [pattern for pattern in freeze if not any(fnmatch(name, pattern) for name in names)]
    if idle:
        raise VolsegError(
            f"no layer matches {idle[0]!r}; the first are {', '.join(names[:3])}",
            fix="give patterns of these names to --freeze, such as 'downsamples.*'",
            code="E_USAGE",
        )
    kept = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad = not any(fnmatch(name, pattern) for pattern in freeze)
        if parameter.requires_grad:
            kept.append(parameter)
    if not kept:
        raise VolsegError(
            "--freeze leaves nothing to train", fix="freeze fewer layers", code="E_USAGE"
        )
    return kept


def _identity(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    settings: RunSettings,
    team: Team,
    initial: Mapping[str, torch.Tensor],
) -> str:
    """Hash of all that decides what a step does, so that two different runs are never continued as one."""
    cases = [[case.id, case.record.get("key")] for case in (*training, *validation)]
    chosen = [settings.seed, team.size, team.precision, list(settings.freeze)]
    facts = [
        recipe.sha256,
        plan.model_dump(mode="json", exclude={"lines"}),
        chosen,
        cases,
        len(training),
    ]
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(initial):
        found.update(name.encode() + initial[name].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _new_network(recipe: Recipe, seed: int) -> nn.Module:
    with torch.random.fork_rng(
        devices=[]
    ):  # layers draw their first weights from torch's global generator
        torch.manual_seed(seed)
        return build_segmentation(recipe)


def _fitting(
    initial: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those of the initial weights that the network can take: all but a head for other labels, usually."""
    fitting = {
        name: tensor
        for name, tensor in initial.items()
        if name in wanted and wanted[name].shape == tensor.shape
    }
    if initial and len(fitting) < len(wanted) / 2:
        raise VolsegError(
            f"only {len(fitting)} of the {len(wanted)} tensors of the recipe's network fit the model to start from",
            fix="use a recipe with the [network] of that model, or train without --init",
            code="E_CKPT",
        )
    return fitting


def _schedule(done: float, kind: str) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine or a power of 0.9 down to 0 at the end of the run."""
    if done < WARM_UP:
        return max(0.05, done / WARM_UP)
    rest = (done - WARM_UP) / (1 - WARM_UP)
    return (1 - rest) ** 0.9 if kind == "poly" else 0.5 * (1 + math.cos(math.pi * rest))


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
        flatten("network", weights_of(network))
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
        raise unusable_checkpoint(path, "it names no run")
    if state["identity"] != expected:
        raise VolsegError(
            f"{path}: belongs to a run with another recipe, plan, seed, fold, precision, number of devices, frozen layers or --init, or to other cases",
            fix="resume with what it was started with, or delete the folder",
            code="E_EXISTS",
        )
    set_weights(network, unflatten("network", tensors))
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
