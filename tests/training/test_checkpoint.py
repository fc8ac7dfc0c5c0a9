import os

import pytest
import torch

from volseg.errors import VolsegError
from volseg.training.checkpoint import flatten, load_checkpoint, save_checkpoint, unflatten


def test_tensors_and_state_come_back_bit_for_bit(tmp_path):
    tensors = flatten("network", {"a.weight": torch.randn(3, 4)}) | flatten(
        "optimizer", {"0.step": torch.tensor(7.0)}
    )
    state = {"step": 7, "seconds": 1.25, "history": [{"epoch": 1, "loss": 0.5}]}
    save_checkpoint(tmp_path / "last.safetensors", tensors, state)
    loaded, loaded_state = load_checkpoint(tmp_path / "last.safetensors")
    assert loaded_state == state
    assert torch.equal(unflatten("network", loaded)["a.weight"], tensors["network.a.weight"])
    assert list(unflatten("optimizer", loaded)) == ["0.step"]


def test_a_pipe_is_refused_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "last.safetensors")
    with pytest.raises(VolsegError, match="is a pipe"):
        load_checkpoint(tmp_path / "last.safetensors")


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>" + b[6:]]
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"a": torch.ones(100)}, {"step": 1})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VolsegError, match=r"last\.safetensors") as caught:
        load_checkpoint(path)
    assert caught.value.code == "E_CKPT"
