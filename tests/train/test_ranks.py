import subprocess
import sys

BF16 = """
import torch
from lightning_fabric import Fabric
from volseg.train import ranks

ranks._is_fast_in_bf16 = lambda device: True  # as on a CPU with AMX, whatever this one has
fabric = ranks._quiet_fabric(torch.device("cpu"))
with fabric.autocast():
    print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
"""


def test_training_in_bf16_does_not_announce_it_and_other_users_of_fabric_still_hear_of_theirs():
    quiet = subprocess.run([sys.executable, "-c", BF16], capture_output=True, text=True, check=True)
    assert (quiet.stdout, quiet.stderr) == ("torch.bfloat16\n", "")
    own = BF16 + "Fabric(accelerator='cpu', devices=1, precision='bf16-mixed')"
    heard = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True)
    assert heard.stderr == "Using bfloat16 Automatic Mixed Precision (AMP)\n"
