"""Training in several processes on one machine, a device each, when nobody else started them.

Under torchrun or SLURM Fabric finds the ranks by itself.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import ClusterEnvironment
from lightning_fabric.strategies import DDPStrategy


class OwnProcesses(ClusterEnvironment):
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


def fabric_of(device: torch.device, precision: Any, *, rank: int = 0, ranks: int = 1, port: int = 0) -> Fabric:
    """Fabric for one rank of a run that we started ourselves; launched."""
    if ranks == 1:
        return Fabric(accelerator=device.type, devices=1, precision=precision)
    strategy = DDPStrategy(
        cluster_environment=OwnProcesses(rank, ranks, port),
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
    )
    fabric = Fabric(accelerator=device.type, devices=ranks, precision=precision, strategy=strategy)
    fabric.launch()
    return fabric


@contextmanager
def helpers(ranks: int, follow: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[int]:
    """Processes for the ranks from 1 on, each running `follow(rank, port, *arguments)`; yields the port at which they meet.

    They end with the block: by themselves after a run, or else they are stopped.
    """
    if ranks == 1:
        yield 0
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=follow, args=(rank, port, *arguments), daemon=True) for rank in range(1, ranks)]
    for process in processes:
        process.start()
    try:
        yield port
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
