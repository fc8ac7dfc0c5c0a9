"""What a task adds to the training loop: network, batches, loss and validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn

from volseg.errors import VolsegError

Weights = Mapping[str, torch.Tensor]
Total = Callable[[torch.Tensor], torch.Tensor]  # sums over the ranks that share a batch


class Optimisation(Protocol):
    """The keys of a recipe's [train] that the loop reads."""

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def l1(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def ema_decay(self) -> float: ...


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that are trained alike.

    Args:
        names: of the parameters.
        factor: times the learning rate.
    """

    names: Sequence[str]
    factor: float = 1.0


class BatchSource(AbstractContextManager["BatchSource"], Protocol):
    """The batches of one rank; each depends only on the seed, the step and the number of ranks.

    `waited` counts the seconds that steps waited for their batch.
    """

    @property
    def waited(self) -> float: ...

    def at(self, step: int) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Return inputs and targets of each accumulated part of a step, on the device."""
        ...


class ReadyBatches:
    """Base of batch sources that are made when they are asked for, without a thread to end."""

    waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class EveryEpoch:
    """Base of validations that cost so little that they take all cases after every epoch."""

    reserve = 0.0
    compares_last = False

    def due_after(self, seconds: float) -> bool:
        return True


class Validation(Protocol):
    """Validates weights on a subset during training and on all cases at the end.

    Rows are those of the objective's table; times are those of `time.monotonic`.
    """

    @property
    def reserve(self) -> float:
        """Seconds of the time budget kept for the last validations."""
        ...

    @property
    def compares_last(self) -> bool:
        """True if the best and the last weights are compared on all cases at the end."""
        ...

    def due_after(self, seconds: float) -> bool:
        """Add seconds of training; tell whether to validate now."""
        ...

    def validate_subset(self, weights: Weights, until: float = math.inf) -> Sequence[Any]:
        """Return no rows if time ran out."""
        ...

    def validate_all(self, weights: Weights, until: float = math.inf) -> Sequence[Any]:
        """Return the rows of the cases completed in time."""
        ...


class Objective(Protocol):
    """A network to train, its data, and which of its weights are kept: those of the best score.

    It is pickled for the other ranks of a team.
    """

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is a better one."""
        ...

    @property
    def score_name(self) -> str: ...

    @property
    def train(self) -> Optimisation: ...

    def identity(self) -> Sequence[Any]:
        """Return JSON values that decide what a step and a validation do."""
        ...

    def network(self) -> nn.Module:
        """Return a network with random weights, drawn from torch's global generator."""
        ...

    def groups(self, network: nn.Module) -> Sequence[ParameterGroup]:
        """Return groups that together hold every parameter of the network."""
        ...

    def prepare(self, network: nn.Module, step: int) -> None:
        """Change what is trained in this step and those after it, such as the end of a freeze."""
        ...

    def batches(
        self, seed: int, device: torch.device, *, rank: int = 0, ranks: int = 1
    ) -> BatchSource: ...

    def loss(self, total: Total | None) -> nn.Module:
        """Return the loss of the network's output and the targets; `total` None for one rank."""
        ...

    def validation(
        self, device: torch.device, seconds: float | None, tick: Callable[[str], None]
    ) -> Validation:
        """Return the validation of a run of these seconds; `tick` gets what is being done."""
        ...

    def score(self, rows: Sequence[Any]) -> float | None:
        """Return the score; None if it is undefined, such as an AUC without positive cases."""
        ...

    def validation_loss(self, rows: Sequence[Any]) -> float | None: ...

    def metrics(self, rows: Sequence[Any]) -> Mapping[str, Any]: ...

    def n_missed(self, rows: Sequence[Any]) -> int:
        """Return how many validation cases have no rows."""
        ...

    def check(self) -> None:
        """Check all training data, which may be why a run diverged; raise VolsegError."""
        ...

    def out_of_memory(self, device: torch.device) -> VolsegError:
        """Return the error for a batch that does not fit into memory."""
        ...
