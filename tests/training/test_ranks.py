import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from volseg.errors import EnvironmentProblem
from volseg.training.ranks import Team, team_of

BF16 = """
import torch
from lightning_fabric import Fabric
from volseg.training import ranks

with ranks.team_of(torch.device("cpu"), 1, print, "half") as team:
    fabric = team.fabric
with fabric.autocast():
    print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
"""


@pytest.mark.slow
def test_bf16_is_not_announced_except_to_other_users_of_fabric():
    quiet = subprocess.run([sys.executable, "-c", BF16], capture_output=True, text=True, check=True)
    assert (quiet.stdout, quiet.stderr) == ("torch.bfloat16\n", "")
    code = BF16 + "Fabric(accelerator='cpu', devices=1, precision='bf16-mixed')"
    loud = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loud.stderr == "Using bfloat16 Automatic Mixed Precision (AMP)\n"


SLURM = """
import sys, torch
from volseg.errors import VolsegError
from volseg.training.ranks import team_of, total_over_ranks

try:
    with team_of(torch.device("cpu"), 1, print, "fp32") as team:
        message = team.broadcast("trains" if team.rank == 0 else None)
        total = total_over_ranks(torch.tensor(1.0 + team.rank)).item()
        sys.stdout.write(f"{team.rank} of {team.size} {message} {total}\\n")
except VolsegError as error:
    sys.exit(str(error))
"""


def slurm_tasks(n, **more):
    """Start processes with the environment that srun gives its tasks on one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "volseg",
        "SLURM_NTASKS": str(n),
    }
    common |= {
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": port,
    } | more
    return [
        subprocess.Popen(
            [sys.executable, "-c", SLURM],
            env=common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


@pytest.mark.slow
def test_the_tasks_of_slurm_are_one_team():
    tasks = slurm_tasks(2, SLURM_NTASKS_PER_NODE="2")
    outputs = [task.communicate(timeout=120) for task in tasks]
    expected = ["0 of 2 trains 3.0\n", "1 of 2 trains 3.0\n"]
    assert [stdout for stdout, _ in outputs] == expected, outputs


def test_tasks_of_slurm_without_their_number_per_node_are_refused(monkeypatch):
    for name, value in {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NAME": "volseg",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with (
        pytest.raises(EnvironmentProblem, match="--ntasks-per-node"),
        team_of(torch.device("cpu"), 1, print),
    ):
        pass


def test_ctrl_c_waits_for_the_end_of_a_shared_step():
    with pytest.raises(KeyboardInterrupt), Team(fabric=None, precision="", size=2).in_step():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def die(team):
    raise SystemExit(3)


@pytest.mark.slow
def test_a_process_that_ends_early_raises_an_error_in_the_others():
    with pytest.raises(RuntimeError), team_of(torch.device("cpu"), 2, die) as team:
        team.fabric.all_reduce(torch.ones(1))
