"""The state of a run that a later call resumes: history, weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.networks import copy_weights, unique_tensors
from volseg.training.checkpoint import (
    flatten,
    load_checkpoint,
    save_checkpoint,
    unflatten,
    unusable_checkpoint,
)
from volseg.training.schedule import Stop


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of history.csv."""

    epoch: int
    step: int
    seconds: float
    learning_rate: float
    loss: float
    # On the validation subset, the score under the objective's name; None if no time was left.
    validation_score: float | None
    validation_loss: float | None  # None if the objective has none
    steps_per_second: float
    waiting_share: float  # fraction of the steps' time spent waiting for patches to be cut


@dataclass(slots=True)
class State:
    """How far a run is. `identity` is the hash of what decides its steps."""

    identity: str
    step: int = 0
    seconds: float = 0.0
    reserve: float = 0.0  # seconds of the budget kept for the final validation
    stop: Stop | None = None  # None while it runs
    best_score: float | None = None
    best_loss: float | None = None  # validation loss of the best epoch
    best_epoch: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)  # fields of `Epoch`

    def history(self) -> list[Epoch]:
        return [Epoch(**line) for line in self.epochs]

    def n_worse(self) -> int:
        """Count the validations since the best one."""
        return sum(line["validation_score"] is not None for line in self.epochs[self.best_epoch :])


def save_state(
    path: Path,
    network: nn.Module,
    averaged: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: State,
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


def restore_state(
    path: Path,
    network: nn.Module,
    averaged: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    identity: str,
) -> State:
    """Undo `save_state`: fill network, averaged weights and optimizer; return the state.

    Raises:
        VolsegError: the checkpoint is damaged or belongs to a run with another identity.
    """
    tensors, state = load_checkpoint(path)
    if "identity" not in state:
        raise unusable_checkpoint(path, "it has no run identity")
    if state["identity"] != identity:
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
        if state["stop"] is not None:
            state["stop"] = Stop(state["stop"])
        return State(**state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise unusable_checkpoint(path, error) from error
