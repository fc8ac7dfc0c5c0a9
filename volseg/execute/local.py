"""One process: every item in turn, files read and written beside the work; a failure is an outcome and not a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

from volseg.errors import EnvironmentProblem, UnexpectedError, VolsegError
from volseg.execute.cpu import is_out_of_memory

Item = TypeVar("Item")
Value = TypeVar("Value")
Read = TypeVar("Read")


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
        yield _outcome(item, lambda item=item: task(item))


def run_overlapped(
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Value],
    write: Callable[[Item, Value], None],
    items: Iterable[Item],
    *,
    ahead: bool = True,
) -> Iterator[Outcome[Item, None]]:
    """As `run`, for a task in three parts: the next item is read and the last one written while one is worked on.

    So memory holds three items that were read and the results of two at most; without `ahead` one of each.

    Raises:
        EnvironmentProblem: as `run`; what was worked on before is written first.
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
            earlier, last = (
                last,
                writer.submit(_after, worked, lambda value, item=item: write(item, value)),
            )
            del (
                was_read,
                worked,
                started,
            )  # the writer alone holds them now, and only until they are written
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
    """The next part of an item's task, unless a part before it failed."""
    if outcome.error is not None:
        return Outcome(outcome.item, error=outcome.error)
    return _outcome(outcome.item, lambda: task(cast(Read, outcome.value)))


def _outcome(item: Item, task: Callable[[], Value]) -> Outcome[Item, Value]:
    """What the task gives, or the error that the user can repair."""
    try:
        return Outcome(item, value=task())
    except EnvironmentProblem:
        raise
    except VolsegError as error:
        return Outcome(item, error=_without_frames(error))
    except Exception as error:
        if not is_out_of_memory(error):  # a bug, met by this item and maybe by no other
            return Outcome(item, error=UnexpectedError(error))
        said = str(error).strip().splitlines() or ["MemoryError"]
        problem = VolsegError(
            f"not enough memory ({said[-1]})",
            fix="use --device cpu"
            if "CUDA" in str(error)
            else "close other programs or use a larger machine",
            code="E_OOM",
        )
        return Outcome(item, error=problem)


def _without_frames(error: VolsegError) -> VolsegError:
    """The error alone: the frames in which it was raised hold a scan and all that was made of it, and the next scans want their memory."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
