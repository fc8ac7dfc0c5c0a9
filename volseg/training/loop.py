"""The training loop: batches → steps → validation → the best weights."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from volseg.errors import VolsegError
from volseg.execution.cpu import is_out_of_memory
from volseg.execution.threads import Threads
from volseg.training.checkpoint import load_checkpoint, save_checkpoint
from volseg.training.ranks import Team
from volseg.training.run import Job, Run
from volseg.training.schedule import Clock, Stop
from volseg.training.state import Epoch

DIVERGED = "E_DIVERGED"
DIVERGED_FIX = "lower train.learning_rate in the recipe, or train.max_grad_norm, and train again"


@dataclass(frozen=True, slots=True)
class Watch:
    """What follows a run.

    Args:
        report: called after each epoch with the history and the fraction of the run done.
        tick: called after each step and each validated tile with what is being done and the
            fraction of the run done.
        threads: the search for the fastest number of threads; gets the time of each step.
    """

    report: Callable[[Sequence[Epoch], float], None]
    tick: Callable[[str, float], None]
    threads: Threads | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The best weights, their history, and their validation on all validation cases."""

    weights: Mapping[str, torch.Tensor]
    history: Sequence[Epoch]
    metrics: Mapping[str, Any]
    validation: Sequence[Any]  # rows of the objective
    stop: Stop
    stopped: str  # why the run ended early, in words


def train_network(job: Job, team: Team, watch: Watch) -> Trained:
    """Train the objective's network and keep the weights with the best validation score.

    A batch depends only on the seed and the step, so a resumed run sees the same batches as an
    uninterrupted one. Ctrl-C or a loss that is not finite ends a run with its best weights so far.

    Args:
        team: the processes that share each batch; called in the one that leads them.

    Raises:
        VolsegError: the loss is not finite before there are weights to keep, or the checkpoint to
            resume from is damaged.
    """
    began = time.monotonic()
    run = start_run(job, team, _identity(job, team))
    with run.batches:
        if watch.threads is not None:
            watch.threads.begin()
        return _Lead(run, watch, began).run()


def start_run(job: Job, team: Team, identity: str) -> Run:
    """Start a run in every rank of a team that serves; return it for the rank that leads."""
    if team.size > 1:
        team.broadcast((replace(job, initial=dict(job.initial)), identity))
    return Run(job, team, identity)


def serve(team: Team) -> None:
    """Take part in one run after another, as a rank from 1 on, until rank 0 broadcasts None."""
    while (message := team.broadcast()) is not None:
        job, identity = message
        run = Run(job, team, identity)
        with run.batches:
            run.follow()


def _identity(job: Job, team: Team) -> str:
    """Hash everything that decides what a step does, so that only the same run is resumed."""
    options = [job.settings.seed, team.size, team.precision, list(job.settings.freeze)]
    facts = [job.objective.identity(), options]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(job.initial):
        digest.update(name.encode() + job.initial[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_less(loss: float | None, than: float | None) -> bool:
    """Tell whether a loss breaks the tie of two equal scores, such as two AUCs of 1."""
    return loss is not None and than is not None and loss < than


class _DivergedError(Exception):
    pass


@dataclass(slots=True, eq=False)
class _Kept:
    """Weights with their epoch, and their rows of the final validation as far as it went."""

    weights: Mapping[str, torch.Tensor]
    epoch: int
    rows: Sequence[Any] = ()
    n_missed: int = 0


class _Lead:
    """Rank 0 of a run, which paces the others, validates, saves and reports.

    `began` is the time at which the call started.
    """

    def __init__(self, run: Run, watch: Watch, began: float) -> None:
        self._run, self._watch = run, watch
        self._job, self._state, self._objective = run.job, run.state, run.job.objective
        settings = run.job.settings
        self._clock = Clock(settings, run.train.steps_per_epoch, run.state, began)
        self._validation = self._objective.validation(run.device, settings.seconds, self._tick)
        self._state.reserve = self._validation.reserve

    def run(self) -> Trained:
        """Train to the end; return the best weights."""
        problem = ""
        try:
            stop = self._train()
        except KeyboardInterrupt:
            stop = Stop.INTERRUPTED
        except _DivergedError as error:
            stop, problem = Stop.DIVERGED, str(error)
        self._run.team.broadcast(None)  # ends this run in the other ranks
        self._keep_weights(stop, problem)
        weights, facts = load_checkpoint(self._job.best)
        kept = _Kept(weights, facts["epoch"])
        try:
            if stop is not Stop.INTERRUPTED:
                self._validate(kept, stop)
        except KeyboardInterrupt:
            stop = Stop.INTERRUPTED
        reason = ""
        if stop is Stop.INTERRUPTED:
            reason = stop.value
        elif stop is Stop.DIVERGED:
            reason = f"{problem}; the best weights before that are kept; {DIVERGED_FIX}"
        metrics = self._metrics(kept, reason)
        return Trained(kept.weights, self._state.history(), metrics, kept.rows, stop, reason)

    def _train(self) -> Stop:
        """Train epochs until there is a reason to stop."""
        state, settings = self._state, self._job.settings
        while state.stop is None:
            self._epoch()
            state.stop = self._clock.reached()
            if state.stop is None and state.n_worse() >= settings.patience:
                state.stop = Stop.PATIENCE
            self._run.save()
            self._watch.report(state.history(), self._clock.done())
        return state.stop

    def _epoch(self) -> None:
        """Train one epoch, validate if it is due, and keep weights with a new best score."""
        run, state, clock = self._run, self._state, self._clock
        started, waited, first = time.monotonic(), run.batches.waited, state.step
        loss = self._steps()
        stepping, waited = time.monotonic() - started, run.batches.waited - waited
        score, validation_loss, number = None, None, len(state.epochs) + 1
        if self._validation.due_after(stepping) or clock.done() >= 1:
            rows = self._validation.validate_subset(self._finite_weights(), clock.ends)
            if rows:
                score = self._objective.score(rows)
                validation_loss = self._objective.validation_loss(rows)
            state.reserve = self._validation.reserve
        state.seconds = clock.seconds()
        epoch = Epoch(
            epoch=number,
            step=state.step,
            seconds=round(state.seconds, 1),
            learning_rate=run.optimizer.param_groups[0]["lr"],
            loss=round(loss, 6),
            validation_score=None if score is None else round(score, 4),
            validation_loss=None if validation_loss is None else round(validation_loss, 6),
            steps_per_second=round((state.step - first) / stepping, 3),
            waiting_share=round(waited / stepping, 4),
        )
        state.epochs.append(asdict(epoch))
        is_better = self._is_better(score, state.best_score)
        if is_better or (score == state.best_score and _is_less(validation_loss, state.best_loss)):
            facts = {"epoch": number, self._objective.score_name: score}
            save_checkpoint(self._job.best, run.averaged, facts)
            state.best_score, state.best_loss, state.best_epoch = score, validation_loss, number

    def _is_better(self, score: float | None, than: float | None) -> bool:
        if score is None or than is None:
            return score is not None
        return score > than if self._objective.higher_is_better else score < than

    def _steps(self) -> float:
        """Take the steps of an epoch; return their mean loss."""
        run, clock = self._run, self._clock
        losses: list[torch.Tensor] = []
        run.network.train()
        n_steps = run.train.steps_per_epoch
        while len(losses) < n_steps and not (losses and clock.done() >= 1):
            began = time.monotonic()
            with run.team.in_step(), self._reporting_out_of_memory():
                losses.append(run.step(run.team.broadcast(clock.done())))
            if self._watch.threads is not None:
                self._watch.threads.took(time.monotonic() - began)
            self._tick(f"step {run.state.step}")
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise _DivergedError(f"the loss became {loss} at about step {run.state.step}")
        return loss

    def _finite_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the averaged weights.

        Raises:
            _DivergedError: a weight is not finite. The losses can still be: the last step of an
                epoch changes the weights after its loss.
        """
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._run.averaged.values()):
            step = self._state.step
            raise _DivergedError(f"the weights were no longer finite after step {step}")
        return self._run.averaged

    def _keep_weights(self, stop: Stop, problem: str) -> None:
        """Write the last weights as the best if none were validated.

        Raises:
            KeyboardInterrupt: the run was interrupted in its first epoch.
            VolsegError: it diverged before there were weights to keep.
        """
        state = self._state
        if state.best_epoch:
            return
        if stop is Stop.DIVERGED:
            self._objective.check()  # bad values in the data may be the cause
            raise VolsegError(problem, fix=DIVERGED_FIX, code=DIVERGED)
        if not state.epochs:
            raise KeyboardInterrupt
        state.best_epoch = len(state.epochs)
        save_checkpoint(self._job.best, self._run.averaged, {"epoch": state.best_epoch})

    def _validate(self, kept: _Kept, stop: Stop) -> None:
        """Validate the best weights on all cases; keep the last ones instead if they are better."""
        until, started = self._clock.ends, time.monotonic()
        # The earlier call may have used up the time, but validation still gets its reserve.
        if self._job.resume:
            until = max(until, started + self._state.reserve)
        kept.rows = self._validation.validate_all(kept.weights, until)
        elapsed = time.monotonic() - started
        kept.n_missed = self._objective.n_missed(kept.rows)
        has_time = not kept.n_missed and time.monotonic() + elapsed <= until
        has_newer = self._state.best_epoch < len(self._state.epochs)
        if stop is Stop.DIVERGED or not has_time or not has_newer:
            return
        if self._validation.compares_last:
            last = self._validation.validate_all(self._run.averaged)
            score = self._objective.score(kept.rows)
            if self._is_better(self._objective.score(last), score):
                kept.rows, kept.epoch = last, len(self._state.epochs)
                kept.weights = {name: tensor.cpu() for name, tensor in self._run.averaged.items()}

    def _metrics(self, kept: _Kept, reason: str) -> dict[str, Any]:
        state = self._state
        metrics: dict[str, Any] = {"steps": state.step, "training_seconds": round(state.seconds, 1)}
        if kept.n_missed:
            metrics["not_validated"] = kept.n_missed
        metrics["best_epoch"] = kept.epoch
        if self._run.random:
            metrics["began_at_random"] = ", ".join(self._run.random)
        if kept.rows:
            metrics |= self._objective.metrics(kept.rows)
        if reason:
            metrics["stopped"] = reason
            if state.best_score is not None:
                name = f"watched_{self._objective.score_name}"
                metrics[name] = round(float(state.best_score), 4)
        return metrics

    def _tick(self, doing: str) -> None:
        self._watch.tick(doing, self._clock.done())

    @contextmanager
    def _reporting_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._objective.out_of_memory(self._run.device) from error
