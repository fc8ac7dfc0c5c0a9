"""The one training loop: batches → steps → validation → the best weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.distributed.nn.functional import all_reduce

from volseg.errors import VolsegError
from volseg.evaluate.validation import ValidationRow, mean_dice, summary
from volseg.io.prepared import PreparedCase
from volseg.models import build_segmentation, set_weights, weights_of
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.batches import Batches
from volseg.train.checkpoint import flatten, load_checkpoint, save_checkpoint, unflatten
from volseg.train.losses import SegmentationLoss
from volseg.train.ranks import fabric_of, helpers
from volseg.train.validate import validate

WARM_UP = 0.03  # share of the run in which the learning rate rises
LARGEST_RESERVE = 0.1  # share of the time budget kept for the final validation
DIVERGED_FIX = "lower train.learning_rate in the recipe, or train.gradient_norm, and train again"
VALIDATION_OVERLAP = 0.25  # cheap and close: the final metrics use the recipe's own overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run may use. `seconds` is the budget of the whole loop with its final validation, None for no limit."""

    device: torch.device
    seed: int = 0
    epochs: int
    patience: int
    seconds: float | None = None
    devices: int = 1  # processes, each with a device of its own and its share of each batch
    freeze: tuple[str, ...] = ()  # patterns of the names of parameters that stay as they are


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of history.csv."""

    epoch: int
    step: int
    seconds: float
    learning_rate: float
    loss: float
    validation_dice: float
    steps_per_second: float
    waiting_share: float  # of the time of the steps, in which they waited for patches to be cut


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
    identity: str = ""  # of the run: recipe, plan, seed and cases
    step: int = 0
    seconds: float = 0.0
    best_dice: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def train_segmentation(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    settings: RunSettings,
    *,
    checkpoints: Path,
    resume: bool,
    initial: Mapping[str, torch.Tensor],
    report: Callable[[Epoch, float], None],
) -> Trained:
    """Train the recipe's network and keep the weights with the best validation Dice.

    A batch depends on the seed and the step alone, so an interrupted run that is resumed sees what it would have seen. A run that
    Ctrl-C ends, or whose loss is no longer finite, gives the best weights that it has had.

    Args:
        checkpoints: folder for `last` (written after each epoch) and `best`.
        resume: go on from `last` where it is there.
        initial: weights to start from where name and shape agree with the network's; empty for random ones.
        report: called after each epoch with it and the share of the run that is done, in [0, 1].

    Raises:
        VolsegError: the loss is not finite before there are any weights to keep, or the checkpoint to resume from is damaged.
    """
    ranks = settings.devices
    together = (training, validation, recipe, plan, settings, checkpoints, resume, initial)
    with helpers(ranks, _follow, together) as port:
        run = Run(*together, rank=0, port=port)
        with run.batches:
            return run.lead(validation, report)


def _follow(rank: int, port: int, *together: Any) -> None:
    """What the processes of the other ranks do."""
    run = Run(*together, rank=rank, port=port)
    with run.batches:
        run.follow()


class Run:
    """A network on its way: what a step changes."""

    def __init__(
        self,
        training: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        recipe: Recipe,
        plan: Plan,
        settings: RunSettings,
        checkpoints: Path,
        resume: bool,
        initial: Mapping[str, torch.Tensor],
        *,
        rank: int,
        port: int,
    ) -> None:
        self.recipe, self.plan, self.settings = recipe, plan, settings
        self.last, self.best = checkpoints / "last.safetensors", checkpoints / "best.safetensors"
        self.fabric = _fabric(settings.device, rank=rank, ranks=settings.devices, port=port)
        self.raw = _new_network(recipe, settings.seed).to(
            self.fabric.device
        )  # before the optimizer takes its parameters
        taken = _fitting(initial, weights_of(self.raw))
        self.left_out = [name for name in weights_of(self.raw) if initial and name not in taken]
        set_weights(self.raw, weights_of(self.raw) | taken)
        trained = _unfrozen(self.raw, settings.freeze)
        optimizer = _optimizer(trained, recipe)
        self.averaged = {key: tensor.clone() for key, tensor in weights_of(self.raw).items()}
        self.state = _State(identity=_identity(training, validation, recipe, plan, settings))
        if resume and self.last.exists():
            self.state = _restore(self.last, self.raw, self.averaged, optimizer, expected=self.state.identity)
        self.network, self.optimizer = self.fabric.setup(self.raw, optimizer)
        self.loss = SegmentationLoss(
            recipe.train.loss,
            class_weights=recipe.train.class_weights,
            regions=recipe.data.regions_class_order is not None,
            total=_summed if settings.devices > 1 else None,
        ).to(self.fabric.device)
        self.batches = Batches(
            training,
            recipe,
            plan,
            seed=settings.seed,
            device=self.fabric.device,
            rank=rank,
            ranks=settings.devices,
        )

    def lead(self, validation: Sequence[PreparedCase], report: Callable[[Epoch, float], None]) -> Trained:
        """Rank 0: decides when to go on, validates, keeps and reports."""
        recipe, plan, settings, state = self.recipe, self.plan, self.settings, self.state
        evaluated = build_segmentation(recipe)
        watched = _spread(validation, recipe.train.validation_cases)
        clock = _Clock(settings, recipe.train.steps_per_epoch, state)
        stopped = ""
        try:
            while clock.done() < 1 and len(state.history) - state.best_epoch < settings.patience:
                started, waited, before_step = time.monotonic(), self.batches.waited, state.step
                losses: list[torch.Tensor] = []
                self.network.train()
                while len(losses) < recipe.train.steps_per_epoch and not (losses and clock.done() >= 1):
                    losses.append(self.step(clock.done()))
                loss = float(torch.stack(losses).mean())
                if not math.isfinite(loss):
                    raise _DivergedError(f"the loss became {loss} at about step {state.step}")
                stepping = time.monotonic() - started
                set_weights(evaluated, self.averaged)
                looked = validate(evaluated, watched, recipe, plan, self.fabric.device, overlap=VALIDATION_OVERLAP)
                score = mean_dice(looked)
                if settings.seconds is not None:
                    # The final metrics look at all cases with more overlap: about twice the cost per case, which is kept free.
                    per_case = (time.monotonic() - started - stepping) / len(watched)
                    clock.reserve = min(2 * per_case * len(validation), LARGEST_RESERVE * settings.seconds)
                state.seconds = clock.seconds()
                epoch = Epoch(
                    epoch=len(state.history) + 1,
                    step=state.step,
                    seconds=round(state.seconds, 1),
                    learning_rate=self.optimizer.param_groups[0]["lr"],
                    loss=round(loss, 4),
                    validation_dice=round(score, 4),
                    steps_per_second=round((state.step - before_step) / stepping, 3),
                    waiting_share=round((self.batches.waited - waited) / stepping, 4),
                )
                state.history.append(asdict(epoch))
                if score > state.best_dice:
                    state.best_dice, state.best_epoch = score, epoch.epoch
                    save_checkpoint(self.best, self.averaged, {"epoch": epoch.epoch, "validation_dice": score})
                _save(self.last, self.raw, self.averaged, self.optimizer, state)
                report(epoch, clock.done())
        except KeyboardInterrupt:
            if not state.best_epoch:
                raise
            stopped = "interrupted"
        except _DivergedError as error:
            if not state.best_epoch:
                raise VolsegError(str(error), fix=DIVERGED_FIX, code="E_DIVERGED") from error
            stopped = f"{error}; these are the best weights until then; {DIVERGED_FIX}"
        self.dismiss()
        weights, chosen = load_checkpoint(self.best)
        set_weights(evaluated, weights)
        metrics: dict[str, Any] = {
            "steps": state.step,
            "training_seconds": round(state.seconds, 1),
            "best_epoch": chosen["epoch"],
        }
        if self.left_out:
            metrics["began_at_random"] = ", ".join(self.left_out)
        if stopped:
            metrics |= {"stopped": stopped, "watched_validation_dice": round(float(chosen["validation_dice"]), 4)}
        rows: list[ValidationRow] = []
        if stopped != "interrupted":
            rows = validate(evaluated, validation, recipe, plan, self.fabric.device, overlap=recipe.infer.overlap)
            metrics |= summary(rows, settings.seed)
        return Trained(weights, [Epoch(**line) for line in state.history], metrics, rows, stopped)

    def follow(self) -> None:
        """The other ranks: step when rank 0 does."""
        self.network.train()
        while (done := self.fabric.broadcast(None, src=0)) is not None:
            self._step(done)

    def dismiss(self) -> None:
        """Let the other ranks end."""
        if self.settings.devices > 1:
            self.fabric.broadcast(None, src=0)

    def step(self, done: float) -> torch.Tensor:
        """One step of all ranks, `done` of the run being behind; the loss, which a GPU may still be computing."""
        if self.settings.devices > 1:
            self.fabric.broadcast(done, src=0)
        return self._step(done)

    def _step(self, done: float) -> torch.Tensor:
        train = self.recipe.train
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * _schedule(done, train.schedule)
        parts = self.batches.at(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.fabric.device)
        for index, (images, masks) in enumerate(parts):
            is_last = index + 1 == len(parts)
            with self.fabric.no_backward_sync(self.network, enabled=not is_last and self.settings.devices > 1):
                loss = self.loss(self.network(images), masks) / len(parts)
                if train.l1 and is_last:
                    loss = loss + train.l1 * sum(weights.abs().sum() for weights in self.raw.parameters())
                self.fabric.backward(loss)
            total += loss.detach()
        self.fabric.clip_gradients(self.network, self.optimizer, max_norm=train.gradient_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.state.step += 1
        _average(self.averaged, weights_of(self.raw), min(train.ema_decay, self.state.step / (self.state.step + 10)))
        return total


class _DivergedError(Exception):
    pass


class _Clock:
    """How much of a run is done: by its steps, or by its seconds where they end first."""

    def __init__(self, settings: RunSettings, steps_per_epoch: int, state: _State) -> None:
        self._settings, self._state = settings, state
        self._steps = settings.epochs * steps_per_epoch
        self._started = time.monotonic() - state.seconds
        self.reserve = 0.0  # seconds kept for the final validation

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def done(self) -> float:
        share = self._state.step / self._steps
        if self._settings.seconds is not None:
            share = max(share, self.seconds() / max(1.0, self._settings.seconds - self.reserve))
        return min(1.0, share)


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    """Over the ranks, in both directions: the gradient of each rank's share is that of the whole."""
    return all_reduce(tensor)


def _optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    train = recipe.train
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.learning_rate, weight_decay=train.weight_decay, momentum=0.99, nesterov=True
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
        raise VolsegError("--freeze leaves nothing to train", fix="freeze fewer layers", code="E_USAGE")
    return kept


def _fabric(device: torch.device, *, rank: int = 0, ranks: int = 1, port: int = 0) -> Fabric:
    """Fabric in the precision that suits the device, without its line on stderr about it."""
    logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
    logger.addFilter(_is_not_about_precision)
    try:
        precision = "bf16-mixed" if _is_fast_in_bf16(device) else "32-true"
        return fabric_of(device, precision, rank=rank, ranks=ranks, port=port)
    finally:
        logger.removeFilter(_is_not_about_precision)


def _is_not_about_precision(record: logging.LogRecord) -> bool:
    return "Automatic Mixed Precision" not in record.getMessage()


def _is_fast_in_bf16(device: torch.device) -> bool:
    """GPUs are, and CPUs with AMX, where a step takes half the time; without it, torch falls back to slow kernels."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
    return True


def _identity(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    settings: RunSettings,
) -> str:
    """Hash of all that decides what a step does, so that two different runs are never continued as one."""
    cases = [[case.id, case.record.get("key")] for case in (*training, *validation)]
    chosen = [settings.seed, settings.devices, list(settings.freeze)]
    facts = [recipe.sha256, plan.model_dump(mode="json"), chosen, cases, len(training)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _new_network(recipe: Recipe, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from torch's global generator
        torch.manual_seed(seed)
        return build_segmentation(recipe)


def _fitting(initial: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the initial weights that the network can take: all but a head for other labels, usually."""
    fitting = {
        name: tensor for name, tensor in initial.items() if name in wanted and wanted[name].shape == tensor.shape
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
def _average(averaged: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], decay: float) -> None:
    for key, tensor in averaged.items():
        if tensor.is_floating_point():
            tensor.lerp_(current[key], 1 - decay)
        else:
            tensor.copy_(current[key])


def _spread(cases: Sequence[PreparedCase], n: int) -> list[PreparedCase]:
    """At most `n` cases, evenly spread over the list."""
    return [cases[round(index)] for index in np.linspace(0, len(cases) - 1, min(n, len(cases)))]


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
    tensors = flatten("network", weights_of(network)) | flatten("averaged", averaged) | flatten("optimizer", moments)
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
    if state["identity"] != expected:
        raise VolsegError(
            f"{path}: belongs to a run with another recipe, seed, fold or other cases",
            fix="resume with what it was started with, or delete the folder",
            code="E_EXISTS",
        )
    set_weights(network, unflatten("network", tensors))
    for key, tensor in unflatten("averaged", tensors).items():
        averaged[key].copy_(tensor)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in unflatten("optimizer", tensors).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return _State(**state)
