"""One process: every item in turn, a failure is an outcome and not a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from volseg.errors import EnvironmentProblem, VolsegError

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Item, Value]):
    """`value`, or the `error` that kept `item` from having one."""

    item: Item
    value: Value | None = None
    error: VolsegError | None = None


def run(task: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Outcome[Item, Value]]:
    """Outcomes in the order of the items, each as soon as it is there.

    Raises:
        EnvironmentProblem: a full disk stops the batch, since every other item would meet it too.
    """
    for item in items:
        try:
            yield Outcome(item, value=task(item))
        except EnvironmentProblem:
            raise
        except VolsegError as error:
            yield Outcome(item, error=error)
        except MemoryError as error:
            problem = VolsegError(
                f"not enough memory ({error})", fix="close other programs or use a larger machine", code="E_OOM"
            )
            yield Outcome(item, error=problem)
