"""Deferred head: the last layer of a network with many classes, applied after blending.

The last layer of a U-Net is a 1 × 1 × 1 convolution: a linear map from the features of a voxel to
its logits. Blending (weights sum to 1) and test-time augmentation are linear too, so they may come
first. With more classes than features this saves computation, and memory does not depend on the
number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    import openvino

BACKGROUND = 20.0  # background's lead in logits where no tile was run: labels get p = 2e-9


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear map from features to logits; `weight` (classes, features), `bias` (classes,)."""

    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def n_features(self) -> int:
        return self.weight.shape[1]

    def to(self, device: torch.device) -> Head:
        return Head(self.weight.to(device), self.bias.to(device))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (classes, r, a, s) float32 for features (features, r, a, s) on its device.

        An extra last channel is 1 where no tile was run: there the logits are background.
        """
        flat = features.flatten(1)
        logits = torch.addmm(self.bias[:, None], self.weight, flat[: self.n_features].float())
        if len(features) > self.n_features:
            is_empty = flat[-1] > 0.5
            logits[0].masked_fill_(is_empty, 0)
            logits[1:].masked_fill_(is_empty, -BACKGROUND)
        return logits.reshape(-1, *features.shape[1:])


def cut_openvino_head(model: openvino.Model) -> Head | None:
    """Cut the head off an OpenVINO model, which then returns features.

    Returns:
        None, with the model unchanged, if there are no more classes than features or the last layer
        is no plain convolution, as after quantisation.
    """
    result = model.get_results()[0]
    total = result.input_value(0).get_node()
    if total.get_type_name() != "Add":
        return None
    convolution, bias = (value.get_node() for value in total.input_values())
    if bias.get_type_name() == "Reshape":
        bias = bias.input_value(0).get_node()
    if (convolution.get_type_name(), bias.get_type_name()) != ("Convolution", "Constant"):
        return None
    kernel = convolution.input_value(1).get_node()
    if kernel.get_type_name() != "Constant":
        return None
    weight = torch.from_numpy(kernel.data.copy()).float()
    if not _is_head(weight):
        return None
    result.input(0).replace_source_output(convolution.input_value(0))
    model.validate_nodes_and_infer_types()
    return Head(weight.flatten(1), torch.from_numpy(bias.data.copy()).float().flatten())


def cut_torch_head(network: nn.Module, example: Callable[[], torch.Tensor]) -> Head | None:
    """Replace the head of a torch module by an identity; see `cut_openvino_head`.

    Args:
        example: makes a patch (1, channels, R, A, S), to check that the convolution is the last
            layer.
    """
    modules = network.named_modules()
    name, last = [(name, layer) for name, layer in modules if isinstance(layer, nn.Conv3d)][-1]
    if not _is_head(last.weight) or last.bias is None:
        return None
    head = Head(last.weight.detach().float().flatten(1), last.bias.detach().float())
    patch, is_last = example(), False
    with torch.inference_mode():
        expected = network(patch)[0]
        network.set_submodule(name, nn.Identity())
        try:
            features = network(patch)[0]
            is_last = len(features) == head.n_features and torch.allclose(
                head(features), expected, atol=1e-3, rtol=1e-3
            )
        finally:
            if not is_last:
                network.set_submodule(name, last)
    return head if is_last else None


def _is_head(weight: torch.Tensor) -> bool:
    """Check whether weights (classes, features, 1, 1, 1) have more classes than features."""
    return tuple(weight.shape[2:]) == (1, 1, 1) and weight.shape[0] > weight.shape[1]
