import signal
import subprocess
import sys

import pytest
import torch

from volseg.errors import VolsegError
from volseg.train.ranks import Team, team_of

BF16 = """
import torch
from lightning_fabric import Fabric
from volseg.train import ranks

with ranks.team_of(torch.device("cpu"), 1, print, "half") as team:
    fabric = team.fabric
with fabric.autocast():
    print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
"""


def test_training_in_bf16_does_not_announce_it_and_other_users_of_fabric_still_hear_of_theirs():
    quiet = subprocess.run([sys.executable, "-c", BF16], capture_output=True, text=True, check=True)
    assert (quiet.stdout, quiet.stderr) == ("torch.bfloat16\n", "")
    own = BF16 + "Fabric(accelerator='cpu', devices=1, precision='bf16-mixed')"
    heard = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True)
    assert heard.stderr == "Using bfloat16 Automatic Mixed Precision (AMP)\n"


def test_an_unknown_precision_is_refused():
    with (
        pytest.raises(VolsegError, match="precision 'int4' is unknown"),
        team_of(torch.device("cpu"), 1, print, "int4"),
    ):
        pass


def test_ctrl_c_waits_for_the_end_of_a_step_that_several_take_together():
    with pytest.raises(KeyboardInterrupt), Team(fabric=None, precision="", size=2).in_step():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def die(team):
    raise SystemExit(3)


def test_a_process_that_ends_early_does_not_leave_the_others_waiting_for_ever():
    """What it left behind is an error, not silence."""
    with pytest.raises(RuntimeError), team_of(torch.device("cpu"), 2, die) as team:
        team.fabric.all_reduce(torch.ones(1))
