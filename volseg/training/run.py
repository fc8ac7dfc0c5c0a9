"""One rank of a run: a network in training, with its optimizer, loss and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.networks import copy_weights, unique_tensors
from volseg.training.objective import Objective, Optimisation, ParameterGroup
from volseg.training.ranks import Team, total_over_ranks
from volseg.training.schedule import RunSettings, learning_rate_factor
from volseg.training.state import State, restore_state, save_state

LAST, BEST = "last.safetensors", "best.safetensors"  # in the folder of checkpoints


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What to train, and how.

    Args:
        checkpoints: folder for `last` (written after each epoch) and `best`.
        initial: weights to start from where name and shape match; empty for random ones.
        resume: continue from `last` if it exists.
    """

    objective: Objective
    settings: RunSettings
    checkpoints: Path
    initial: Mapping[str, torch.Tensor] = field(default_factory=dict)
    resume: bool = False

    @property
    def last(self) -> Path:
        return self.checkpoints / LAST

    @property
    def best(self) -> Path:
        return self.checkpoints / BEST


class Run:
    """A network in training on one rank. `identity` is the hash of what decides its steps."""

    def __init__(self, job: Job, team: Team, identity: str) -> None:
        self.job, self.team = job, team
        self.train = job.objective.train
        self.device = team.fabric.device
        # Moved to its device before the optimizer takes its parameters.
        self.raw = _new_network(job).to(self.device)
        loaded = _matching(job.initial, unique_tensors(self.raw))
        self.random = [
            name for name in unique_tensors(self.raw) if job.initial and name not in loaded
        ]
        copy_weights(self.raw, unique_tensors(self.raw) | loaded)
        _freeze(self.raw, job.settings.freeze)
        self.groups = job.objective.groups(self.raw)
        optimizer = _optimizer(self.raw, self.groups, self.train)
        self.averaged = {key: tensor.clone() for key, tensor in unique_tensors(self.raw).items()}
        self.state = State(identity)
        if job.resume and job.last.exists():
            self.state = restore_state(
                job.last, self.raw, self.averaged, optimizer, identity=identity
            )
        self.network, self.optimizer = team.fabric.setup(self.raw, optimizer)
        total = total_over_ranks if team.size > 1 else None
        self.loss = job.objective.loss(total).to(self.device)
        self.batches = job.objective.batches(
            job.settings.seed, self.device, rank=team.rank, ranks=team.size
        )

    def save(self) -> None:
        save_state(self.job.last, self.raw, self.averaged, self.optimizer, self.state)

    def follow(self) -> None:
        """Run another rank, which steps when rank 0 does."""
        self.network.train()
        while (done := self.team.broadcast()) is not None:
            self.step(done)

    def step(self, done: float) -> torch.Tensor:
        """Take one step on this rank and return the loss, which a GPU may still be computing.

        `done` is the fraction of the run before this step.
        """
        train, fabric = self.train, self.team.fabric
        learning_rate = train.learning_rate * learning_rate_factor(done, train.schedule)
        for values, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            values["lr"] = learning_rate * group.factor
        self.job.objective.prepare(self.raw, self.state.step)
        parts = self.batches.at(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with _seeded(self.job.settings.seed, self.state.step, self.team.rank, self.device):
            for index, (inputs, targets) in enumerate(parts):
                is_last = index + 1 == len(parts)
                is_local = not is_last and self.team.size > 1
                with fabric.no_backward_sync(self.network, enabled=is_local):
                    loss = self.loss(self.network(inputs), targets) / len(parts)
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
def _seeded(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator, which dropout uses, so that a resumed run draws the same."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
        yield


def _new_network(job: Job) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # weights are drawn from torch's global generator
        torch.manual_seed(job.settings.seed)
        return job.objective.network()


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


def _optimizer(
    network: nn.Module, groups: Sequence[ParameterGroup], train: Optimisation
) -> torch.optim.Optimizer:
    """Return an optimizer with one group of its own per group, without frozen parameters."""
    named = dict(network.named_parameters())
    parameters = [
        {"params": [named[name] for name in group.names if named[name].requires_grad]}
        for group in groups
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            momentum=0.99,
            nesterov=True,
        )
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


def _freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose name matches a pattern.

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
    for name, parameter in network.named_parameters():
        parameter.requires_grad = not any(fnmatch(name, pattern) for pattern in patterns)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        problem = "--freeze leaves no parameter to train"
        raise VolsegError(problem, fix="freeze fewer layers", code="E_USAGE")


@torch.no_grad()
def _average(
    averaged: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], decay: float
) -> None:
    for key, tensor in averaged.items():
        if tensor.is_floating_point():
            tensor.lerp_(current[key], 1 - decay)
        else:
            tensor.copy_(current[key])
