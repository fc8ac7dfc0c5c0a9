"""Train in one process, or in several that share each batch: local, torchrun or SLURM."""

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
from volseg.execution.cpu import physical_cores

# The other ranks wait this long for rank 0, which prepares data and validates.
CONTROL_TIMEOUT = timedelta(days=7)
JOIN_SECONDS = 60  # before a process that does not end by itself is terminated


@dataclass(frozen=True, slots=True, eq=False)
class Team:
    """The processes that train together, as seen from one of them; rank 0 leads the others.

    `control` is the process group for messages; it is separate, so that they never wait for a GPU.
    """

    fabric: Fabric
    precision: str
    rank: int = 0
    size: int = 1
    control: distributed.ProcessGroup | None = None

    def broadcast(self, message: Any = None) -> Any:
        """Return rank 0's message in every process."""
        if self.size == 1:
            return message
        messages = [message]
        distributed.broadcast_object_list(messages, src=0, group=self.control)
        return messages[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Delay Ctrl-C until the block ends, so that no rank waits for one that left midway."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        signals: list[int] = []

        def record(number: int, frame: FrameType | None) -> None:
            signals.append(number)

        handler = signal.signal(signal.SIGINT, record)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
        if signals:
            raise KeyboardInterrupt


def total_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks; differentiable: gradients are summed over the ranks too."""
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
    """Yield the team of this call of `train`.

    The team is this process alone, this process with `processes` - 1 others that are started here,
    or the ranks of a launcher (torchrun, SLURM), of which this process is one.

    Args:
        processes: overridden by a launcher's number of ranks.
        serve: run by the processes started here, until rank 0 broadcasts None.
        precision: fp32; half for 16-bit convolutions; auto for half where it is faster.

    Raises:
        VolsegError: there are fewer GPUs than processes.
        EnvironmentProblem: a process does not start, or SLURM does not state the tasks per node.
    """
    launcher = _launcher()
    if launcher is not None and launcher.world_size() > 1:
        with _joined(device, launcher, _nodes(launcher), precision) as team:
            if team.rank > 0 and threading.current_thread() is threading.main_thread():
                # Ctrl-C reaches every rank; rank 0 handles it.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            yield team
            if team.rank == 0:
                team.broadcast(None)
        return
    if processes == 1:
        kind = _precision_of(device, precision)
        yield Team(_quiet_fabric(device, kind), kind)
        return
    if device.type == "cuda" and processes > (n_gpus := torch.cuda.device_count()):
        raise VolsegError(
            f"--devices {processes} needs as many GPUs, and there are {n_gpus}",
            fix=f"give --devices {n_gpus}, or train on the CPU with --device cpu",
            code="E_USAGE",
        )
    with (
        _started(device, processes, serve, precision) as (port, others),
        _joined(device, _LocalProcesses(0, processes, port), 1, precision) as team,
    ):
        try:
            yield team
        except BaseException:
            for process in others:  # before their process group is destroyed
                process.terminate()
            raise
        team.broadcast(None)


def _launcher() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # A batch script not started by srun is one process, however many tasks the job may have.
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment()
        except RuntimeError as error:  # --ntasks without --ntasks-per-node
            n = os.environ.get("SLURM_NTASKS")
            raise EnvironmentProblem(
                f"SLURM started {n} tasks without --ntasks-per-node",
                fix="start them with srun --ntasks-per-node=N",
                code="E_BACKEND",
            ) from error
    return None


def _nodes(launcher: ClusterEnvironment) -> int:
    name = "SLURM_NNODES" if isinstance(launcher, SLURMEnvironment) else "GROUP_WORLD_SIZE"
    return int(os.environ.get(name, "1"))


class _LocalProcesses(ClusterEnvironment):
    """The ranks of a run on this machine that volseg started itself."""

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
    """Join the ranks with this process, on a CPU with its part of the cores; yield the team."""
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
        control = distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
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
    """Start processes for the ranks from 1 on; yield their common port and them.

    They end with the block.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for rank in range(1, ranks):
            receiver, sender = context.Pipe(duplex=False)
            local = _LocalProcesses(rank, ranks, port)
            arguments = (local, device.type, serve, precision, sender)
            process = context.Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        for connection in connections:
            wait([connection])
            if not connection.poll() or not _is_ready(connection):
                raise EnvironmentProblem(
                    f"one of the {ranks - 1} further processes did not start",
                    fix="see its message above, or train with --devices 1",
                    code="E_BACKEND",
                )
        yield port, processes
        for process in processes:
            process.join(timeout=JOIN_SECONDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def _is_ready(connection: Connection) -> bool:
    try:
        return bool(connection.recv())
    except EOFError:  # the process ended
        return False


def _run_rank(
    local: _LocalProcesses,
    device: str,
    serve: Callable[[Team], None],
    precision: str,
    ready: Connection,
) -> None:
    """Run one rank in a process of its own; rank 0 handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready.send(True)
    ready.close()
    # Rank 0 reports mistakes in the request, which it finds too.
    with (
        _joined(torch.device(device), local, 1, precision) as team,
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
    """Return a Fabric that does not announce precision and ranks on stderr."""
    names = ("rank_zero", "distributed")
    loggers = [logging.getLogger(f"lightning_fabric.utilities.{name}") for name in names]
    for logger in loggers:
        logger.addFilter(_is_worth_logging)
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
            logger.removeFilter(_is_worth_logging)


def _precision_of(device: torch.device, precision: str) -> str:
    """Return Fabric's name of the precision on this device."""
    if precision == "fp32" or (precision == "auto" and not _is_fast_in_half(device)):
        return "32-true"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "16-mixed"
    return "bf16-mixed"


def _is_worth_logging(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    noise = ("Automatic Mixed Precision", "Initializing distributed", "distributed_backend")
    return not any(words in text for words in noise)


def _is_fast_in_half(device: torch.device) -> bool:
    """Tell whether 16-bit training is faster: on GPUs, and on CPUs with bf16 instructions.

    On those CPUs a step takes a half to two thirds of the time; on others torch falls back to slow
    kernels.
    """
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return True
