"""Training in one process, or in several that share each batch: started here on one machine, or by torchrun or SLURM."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy
from torch import distributed

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.execute.cpu import physical_cores

PATIENCE = timedelta(
    days=7
)  # that the other ranks wait for rank 0, which prepares data and validates
PRECISIONS = ("auto", "fp32", "half")
ENDING_SECONDS = 60  # that a process of ours has to end by itself


@dataclass(frozen=True, slots=True, eq=False)
class Team:
    """The processes that train together, seen from one of them. Rank 0 leads; the others do what it tells them.

    `control` is a group of its own for what is told, so that nothing waits for a GPU.
    """

    fabric: Fabric
    precision: str
    rank: int = 0
    size: int = 1
    control: distributed.ProcessGroup | None = None

    def tell(self, message: Any = None) -> Any:
        """What rank 0 says, in every process."""
        if self.size == 1:
            return message
        said = [message]
        distributed.broadcast_object_list(said, src=0, group=self.control)
        return said[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Ctrl-C waits until the block is over, so that no rank waits for another that left in its midst."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        pressed: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            pressed.append(number)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt


def total_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, differentiable: the gradient of each rank's share is that of the whole."""
    total: torch.Tensor = _Total.apply(tensor)  # pyright: ignore[reportAssignmentType]
    return total


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


@contextmanager
def team_of(
    device: torch.device, processes: int, serve: Callable[[Team], None], precision: str = "auto"
) -> Iterator[Team]:
    """The team of this call of `train`: this process alone, with `processes` - 1 others that are started here, or one of a launcher's ranks.

    Args:
        processes: a launcher's number of ranks counts instead, where there is one.
        serve: what the processes started here do until rank 0 tells them None.
        precision: fp32; half, for convolutions in two bytes; or auto, which is half where the device is faster so.

    Raises:
        VolsegError: there are fewer GPUs than processes, or the precision is none of these.
        EnvironmentProblem: one of the processes does not start, or SLURM was told of tasks but not how many each node has.
    """
    if precision not in PRECISIONS:
        raise VolsegError(
            f"precision {precision!r} is unknown",
            fix=f"give one of {', '.join(PRECISIONS)}",
            code="E_USAGE",
        )
    launcher = _launcher()
    if launcher is not None and launcher.world_size() > 1:
        with _joined(device, launcher, _nodes(launcher), precision) as team:
            if team.rank > 0 and threading.current_thread() is threading.main_thread():
                signal.signal(
                    signal.SIGINT, signal.SIG_IGN
                )  # Ctrl-C reaches every rank; it is rank 0's to hear
            yield team
            if team.rank == 0:
                team.tell(None)
        return
    if processes == 1:
        kind = _precision_of(device, precision)
        yield Team(_quiet_fabric(device, kind), kind)
        return
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise VolsegError(
            f"{processes} devices were asked for, and there are {torch.cuda.device_count()} GPUs",
            fix=f"give --devices {torch.cuda.device_count()}, or train on the CPU with --device cpu",
            code="E_USAGE",
        )
    with (
        _started(device, processes, serve, precision) as (port, others),
        _joined(device, _OwnProcesses(0, processes, port), 1, precision) as team,
    ):
        try:
            yield team
        except BaseException:
            for process in others:  # before the group is closed under their feet
                process.terminate()
            raise
        team.tell(None)


def _launcher() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # A batch script that srun did not start is one process, however many tasks it may start.
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment()
        except RuntimeError as error:  # of --ntasks without --ntasks-per-node
            raise EnvironmentProblem(
                f"SLURM started {os.environ.get('SLURM_NTASKS')} tasks without saying how many each node has",
                fix="ask for them with srun --ntasks-per-node=N",
                code="E_BACKEND",
            ) from error
    return None


def _nodes(launcher: ClusterEnvironment) -> int:
    name = "SLURM_NNODES" if isinstance(launcher, SLURMEnvironment) else "GROUP_WORLD_SIZE"
    return int(os.environ.get(name, "1"))


class _OwnProcesses(ClusterEnvironment):
    """The ranks of one run on this machine, which we started ourselves."""

    def __init__(self, rank: int, ranks: int, port: int) -> None:
        super().__init__()
        self._rank, self._ranks, self._port = rank, ranks, port

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self._port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0


@contextmanager
def _joined(
    device: torch.device, environment: ClusterEnvironment, nodes: int, precision: str
) -> Iterator[Team]:
    """This process as one of the ranks; on a CPU with its share of the cores."""
    size, threads = environment.world_size(), torch.get_num_threads()
    per_node = size // nodes
    if device.type == "cpu":
        torch.set_num_threads(max(1, physical_cores() // per_node))
    strategy = DDPStrategy(
        cluster_environment=environment,
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
    )
    try:
        kind = _precision_of(device, precision)
        fabric = _quiet_fabric(device, kind, strategy=strategy, devices=per_node, num_nodes=nodes)
        control = distributed.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(control, distributed.ProcessGroup)
        yield Team(fabric, kind, environment.global_rank(), size, control)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        torch.set_num_threads(threads)


@contextmanager
def _started(
    device: torch.device, ranks: int, serve: Callable[[Team], None], precision: str
) -> Iterator[tuple[int, list[BaseProcess]]]:
    """Processes for the ranks from 1 on; yields the port at which all meet, and them. They end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    ready: list[Connection] = []
    try:
        for rank in range(1, ranks):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, ranks, port, device.type, serve, precision, theirs)
            process = context.Process(target=_help, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ready.append(ours)
        for connection in ready:
            wait([connection])
            if not connection.poll() or not _has_said_so(connection):
                raise EnvironmentProblem(
                    f"one of the {ranks - 1} further processes did not start",
                    fix="look at its message above; train with --devices 1",
                    code="E_BACKEND",
                )
        yield port, processes
        for process in processes:
            process.join(timeout=ENDING_SECONDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def _has_said_so(connection: Connection) -> bool:
    try:
        return bool(connection.recv())
    except EOFError:  # it ended instead
        return False


def _help(
    rank: int,
    ranks: int,
    port: int,
    device: str,
    serve: Callable[[Team], None],
    precision: str,
    ready: Connection,
) -> None:
    """The whole life of a process that was started here. Ctrl-C is rank 0's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready.send(True)
    ready.close()
    # What is wrong with the request is said by rank 0, which finds it too.
    with (
        _joined(torch.device(device), _OwnProcesses(rank, ranks, port), 1, precision) as team,
        suppress(VolsegError),
    ):
        serve(team)


def _quiet_fabric(
    device: torch.device,
    precision: Any,
    *,
    strategy: DDPStrategy | str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Fabric:
    """Fabric without its lines on stderr about precision and ranks."""
    loggers = [
        logging.getLogger(f"lightning_fabric.utilities.{name}")
        for name in ("rank_zero", "distributed")
    ]
    for logger in loggers:
        logger.addFilter(_is_no_announcement)
    try:
        fabric = Fabric(
            accelerator=device.type,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            strategy=strategy,
        )
        if isinstance(strategy, DDPStrategy):
            fabric.launch()
        return fabric
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_announcement)


def _precision_of(device: torch.device, precision: str) -> str:
    """Fabric's word for the precision of this device."""
    if precision == "fp32" or (precision == "auto" and not _is_fast_in_half(device)):
        return "32-true"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "16-mixed"
    return "bf16-mixed"


def _is_no_announcement(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(
        words in text
        for words in (
            "Automatic Mixed Precision",
            "Initializing distributed",
            "distributed_backend",
        )
    )


def _is_fast_in_half(device: torch.device) -> bool:
    """GPUs are, and CPUs with instructions for it, on which a step takes a half to two thirds of the time.

    Without them torch falls back to slow kernels.
    """
    if device.type == "cpu":
        found = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return True
