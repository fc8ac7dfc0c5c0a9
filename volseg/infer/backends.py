"""What runs the network: a class with `logits(batch)`."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import nn

from volseg.errors import EnvironmentProblem, ScanError, VolsegError


class Backend(Protocol):
    def logits(self, batch: np.ndarray) -> np.ndarray:
        """(N, channels, …) float32 → (N, classes, …) float32."""
        ...


class TorchBackend:
    """A torch module in evaluation mode on one device; half precision on CUDA, float32 elsewhere."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device).eval()
        self.device = device

    def logits(self, batch: np.ndarray) -> np.ndarray:
        half = torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")
        try:
            with torch.inference_mode(), half:
                return self.network(torch.from_numpy(batch).to(self.device)).float().cpu().numpy()
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise ScanError(
                f"a batch of patches of shape {batch.shape} does not fit into the memory of {self.device}",
                fix="close other programs, or use --device cpu",
                code="E_OOM",
            ) from error


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device that is there.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not available.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise VolsegError(f"device {name!r} is unknown", fix="use auto, cpu or cuda", code="E_USAGE")
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "device cuda was asked for, but torch finds no CUDA device",
            fix="install a driver and a CUDA build of torch, or use --device cpu",
            code="E_DEVICE",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
