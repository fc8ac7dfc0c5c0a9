"""Running a batch in one process: a failed item is an outcome, not a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

from volseg.errors import EnvironmentProblem, UnexpectedError, VolsegError
from volseg.execution.cpu import is_out_of_memory

Item = TypeVar("Item")
Value = TypeVar("Value")
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Item, Value]):
    """The `value` computed for `item`, or the `error` that prevented it."""

    item: Item
    value: Value | None = None
    error: VolsegError | None = None


def run(task: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Outcome[Item, Value]]:
    """Yield the outcome of each item, in order, as soon as it is computed.

    Raises:
        EnvironmentProblem: e.g. a full disk, which would affect all other items too.
    """
    for item in items:
        yield _outcome(item, lambda item=item: task(item))


def run_overlapped(
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Value],
    write: Callable[[Item, Value], None],
    items: Iterable[Item],
    *,
    ahead: bool = True,
) -> Iterator[Outcome[Item, None]]:
    """Run a task in three parts: read the next item and write the last one during the work on one.

    Memory then holds at most three items and two results; without `ahead`, one of each.

    Raises:
        EnvironmentProblem: as for `run`; earlier results are written first.
    """
    if not ahead:
        yield from run(lambda item: write(item, work(item, read(item))), items)
        return
    with (
        ThreadPoolExecutor(1, "volseg-read") as reader,
        ThreadPoolExecutor(1, "volseg-write") as writer,
    ):
        waiting = iter(items)
        following = _begin(reader, read, waiting)
        last: Future[Outcome[Item, None]] | None = None
        while following is not None:
            item, started = following
            was_read = started.result()
            following = _begin(reader, read, waiting)
            worked = _after(was_read, lambda value, item=item: work(item, value))
            earlier = last
            last = writer.submit(_after, worked, lambda value, item=item: write(item, value))
            del was_read, worked, started  # so that memory is freed once they are written
            if earlier is not None:
                yield earlier.result()
        if last is not None:
            yield last.result()


def _begin(
    reader: Executor, read: Callable[[Item], Read], waiting: Iterator[Item]
) -> tuple[Item, Future[Outcome[Item, Read]]] | None:
    for item in waiting:
        return item, reader.submit(_outcome, item, partial(read, item))
    return None


def _after(outcome: Outcome[Item, Read], task: Callable[[Read], Value]) -> Outcome[Item, Value]:
    """Run the next part of an item's task, unless an earlier part failed."""
    if outcome.error is not None:
        return Outcome(outcome.item, error=outcome.error)
    return _outcome(outcome.item, lambda: task(cast(Read, outcome.value)))


def _outcome(item: Item, task: Callable[[], Value]) -> Outcome[Item, Value]:
    """Run a task; return its value, or the error for the user."""
    try:
        return Outcome(item, value=task())
    except EnvironmentProblem:
        raise
    except VolsegError as error:
        return Outcome(item, error=_without_frames(error))
    except Exception as error:
        if not is_out_of_memory(error):  # a bug, which other items may not run into
            return Outcome(item, error=UnexpectedError(error))
        lines = str(error).strip().splitlines() or ["MemoryError"]
        is_gpu = "CUDA" in str(error)
        fix = "use --device cpu" if is_gpu else "close other programs or use a larger machine"
        problem = VolsegError(f"not enough memory ({lines[-1]})", fix=fix, code="E_OOM")
        return Outcome(item, error=problem)


def _without_frames(error: VolsegError) -> VolsegError:
    """Drop the tracebacks of an error, whose frames would keep a scan and its results in memory."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error
