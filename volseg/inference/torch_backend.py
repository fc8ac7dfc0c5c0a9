"""Backend that runs a torch module, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from volseg.execution.cpu import physical_cores
from volseg.inference.backend import out_of_memory_as_scan_error
from volseg.inference.cuda_graph import RecordedPass
from volseg.inference.head import Head


class TorchBackend:
    """A torch module in evaluation mode on one device.

    Args:
        precision: fp32, or fp16 for autocast on a GPU; auto is fp16 on CUDA and fp32 elsewhere.
        channels_last: on CUDA, keep images and weights in the layout of the tensor cores.
        head: the head that was cut off the network, if it is deferred.
        may_record: on CUDA, replay a CUDA graph if that is faster; the network's weights must stay
            at their addresses.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        precision: str = "auto",
        channels_last: bool = True,
        head: Head | None = None,
        may_record: bool = False,
    ) -> None:
        self.device = device
        self.head = None if head is None else head.to(device)
        self.half = device.type == "cuda" and precision in ("auto", "fp16")
        self.channels_last = channels_last and device.type == "cuda"
        self.network = network.to(device).eval()
        if self.channels_last:
            _channels_last(self.network)
        self._recorded = RecordedPass() if may_record and device.type == "cuda" else None
        if device.type == "cpu" and torch.get_num_threads() > physical_cores():
            torch.set_num_threads(physical_cores())

    @property
    def identity(self) -> Mapping[str, str]:
        return {"backend": "torch", "precision": "fp16" if self.half else "fp32"}

    def logits(self, batch: np.ndarray) -> np.ndarray:
        return self.run(torch.from_numpy(batch).to(self.device)).cpu().numpy()

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        with (
            out_of_memory_as_scan_error(tuple(batch.shape), str(self.device)),
            torch.no_grad(),
            # All patches have one shape: cuDNN measures once which algorithm is fastest. TF32 is
            # not fp32.
            torch.backends.cudnn.flags(enabled=True, benchmark=on_gpu, allow_tf32=self.half),
            # Each weight is used once, and a CUDA graph must not use casts that autocast frees.
            torch.autocast("cuda", torch.float16, enabled=self.half, cache_enabled=False),
        ):
            if self.channels_last:
                batch = batch.contiguous(memory_format=_memory_format(batch))
            if self._recorded is None:
                return self._forward(batch)
            return self._recorded.run(self._forward, batch)

    def release(self) -> None:
        if self._recorded is not None:
            self._recorded.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.network(batch).float()


def _channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=_memory_format(parameter))


def _memory_format(images: torch.Tensor) -> torch.memory_format:
    """Return the channels-last format, the layout of a GPU's tensor cores."""
    return torch.channels_last_3d if images.ndim == 5 else torch.channels_last
